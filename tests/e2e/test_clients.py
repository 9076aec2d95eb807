"""Unmodified official clients with nothing but a funded key."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from anvil.devnet import Devnet
from tests.e2e.stage import CHEAP_UNITS, PRICE_UNITS, Api, Gateway
from tests.e2e.wallet import Wallet, buy, decode, new_wallet, problem
from tests.wallet_auth.support import CLIENTS, Peer, node

PAYERS = {"v2-js": "pay_v2.mjs", "v1-js": "pay_v1.mjs", "v2-py": "pay_py.py"}


def pay(client: str, *arguments: str, script: str = "") -> list[dict[str, Any]]:
    """Run one of the paying clients (or another script of its language); what it got."""
    script = script or PAYERS[client]
    done = subprocess.run(
        [sys.executable if script.endswith(".py") else node(), script, *arguments],
        cwd=CLIENTS,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("client", PAYERS)
def test_a_stock_client_pays_and_gets_the_answer(
    client: str, gateway: Gateway, api: Api, wallet: Wallet, cheap: str
) -> None:
    before, wallet_before = gateway.received(), gateway.net.balance_units(wallet.address)
    body = '{"q": 1}'
    (got,) = pay(client, gateway.url + cheap, wallet.key, "POST", body)
    assert got["status"] == 200, got
    assert body in got["body"]
    assert [request.body for request in api.seen(cheap)] == [body.encode()]
    told = decode(got["headers"]["payment-response"])
    assert told["success"] is True
    assert told["payer"] == wallet.address
    assert gateway.net.receipt(told["transaction"])["status"] == "0x1"
    # The smallest settlement moved, and what the call left of it is the payer's.
    assert gateway.received() == before + PRICE_UNITS
    assert gateway.net.balance_units(wallet.address) == wallet_before - PRICE_UNITS
    assert gateway.balance(wallet.address) == (PRICE_UNITS - CHEAP_UNITS, 0)
    assert gateway.transfers(wallet.address) == [
        ("mint", PRICE_UNITS, "x402"),
        ("capture", CHEAP_UNITS, None),
    ]
    assert got["headers"]["farebox-paid-from"] == "settlement"
    assert got["headers"]["farebox-charged"] == "0.2"
    assert got["headers"]["farebox-balance"] == "0.8"


def test_a_stock_client_without_money_is_refused(
    sqlite_gateway: Gateway, chain_session: Devnet, api: Api, target: str
) -> None:
    poor = new_wallet(chain_session, units=PRICE_UNITS - 1)
    sent = sqlite_gateway.sent()
    (got,) = pay("v2-js", sqlite_gateway.url + target, poor.key)
    assert got["status"] == 402
    assert json.loads(got["body"])["code"] == "insufficient_funds"
    assert decode(got["headers"]["payment-response"])["errorReason"] == "insufficient_funds"
    assert sqlite_gateway.sent() == sent
    assert api.calls(target) == 0
    assert sqlite_gateway.payments(poor.address) == []


# --- requests signed by an independent ERC-8128 implementation ------------------------------------


@pytest.fixture(scope="module")
def signer() -> Iterator[Peer]:
    peer = Peer("erc8128_sign.mjs")
    yield peer
    peer.close()


def sign(signer: Peer, wallet: Wallet, url: str, body: bytes, nonce: str) -> dict[str, Any]:
    now_s = int(time.time())
    return signer.ask(
        {
            "key": wallet.key,
            "chain_id": 84532,
            "method": "POST",
            "url": url,
            "headers": [["content-type", "application/json"]],
            "body_base64": base64.b64encode(body).decode(),
            "created": now_s,
            "expires": now_s + 60,
            "nonce": nonce,
        }
    )


async def test_a_spend_signed_by_slicekit(
    gateway: Gateway, api: Api, wallet: Wallet, cheap: str, signer: Peer
) -> None:
    body, changed = b'{"q": 1}', b'{"q": 2}'
    async with gateway.client() as http:
        await buy(http, wallet)
        sent = gateway.sent()

        async def ask(signed: dict[str, Any], content: bytes) -> httpx.Response:
            return await http.post(cheap, headers=signed["headers"], content=content)

        signed = sign(signer, wallet, gateway.url + cheap, body, "one-request-only-1")
        assert "error" not in signed, signed
        first = await ask(signed, body)
        assert first.status_code == 200, first.text
        assert first.headers["farebox-charged"] == "0.2"
        assert first.headers["farebox-balance"] == "99.8"
        assert first.headers["farebox-request-id"] == "one-request-only-1"
        assert "farebox-replayed" not in first.headers

        again = await ask(signed, body)
        assert (again.status_code, again.content) == (200, first.content)
        assert again.headers["farebox-replayed"] == "true"
        assert again.headers["farebox-charged"] == "0"
        assert again.headers["farebox-balance"] == "99.8"

        told = problem(await ask(signed, changed), "signature_digest_mismatch")
        assert told["status"] == 401

        resigned = sign(signer, wallet, gateway.url + cheap, changed, "one-request-only-1")
        assert problem(await ask(resigned, changed), "request_id_conflict")["status"] == 409
    assert api.calls(cheap) == 1
    assert gateway.transfers(wallet.address) == [
        ("mint", 1_000_000, "x402"),
        ("capture", CHEAP_UNITS, None),
    ]
    assert gateway.sent() == sent  # a spend has nothing to do with the chain
