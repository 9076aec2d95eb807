"""Signed offers: the official SDK finds who signed them, and which of ``accepts`` each is."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.app import build, close_node, open_node
from gateway.errors import Problem
from gateway.payments import challenge, receipts
from gateway.payments.offers import Asked
from tests.gateway.payments.parts import KEYS, PAY_TO, SETTLER_KEY, settings_for
from tests.wallet_auth.support import KEY, Peer

NOW_S = 1_800_000_000
CHAIN = {"rpc": ["http://127.0.0.1:1"], "pay_to": PAY_TO, "settler_key": SETTLER_KEY}
SIGNING = settings_for(
    server={"sign_offers": True, "offer_timeout_s": 60},
    chains={"base-sepolia": CHAIN, "base": CHAIN},
)
ASKED = Asked("GET", b"/v1/a?b=1", 2_000)


@pytest.fixture(scope="module")
def sdk() -> Iterator[Peer]:
    peer = Peer("read_402.mjs")
    yield peer
    peer.close()


def required(problem: Problem) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(b64decode(problem.headers["PAYMENT-REQUIRED"]))
    return found


def test_the_official_sdk_finds_the_signer_and_the_offer(sdk: Peer) -> None:
    told = required(
        challenge.for_call(SIGNING, KEYS, ASKED, NOW_S, extensions='{"other":{"info":{}}}')
    )
    got = sdk.ask({"key": KEY, "required": told})
    # One for each network; packs beside the call are not signed.
    assert [each["accepts"] for each in got["offers"]] == told["accepts"][:2]
    assert {each["signer"] for each in got["offers"]} == set(receipts.addresses(KEYS))
    for each in got["offers"]:
        assert each["payload"]["resourceUrl"] == told["resource"]["url"]
        assert each["payload"]["validUntil"] == NOW_S + 60
    assert told["extensions"].keys() == {"other", "offer-receipt"}
    # The client gives them back with its payment; that is all there is to say in the header.
    assert got["payload"]["extensions"]["offer-receipt"] == told["extensions"]["offer-receipt"]
    assert len(json.dumps(told)) < 5_000


def test_offers_of_credits_are_signed_too(sdk: Peer) -> None:
    asked = Asked("POST", b"/farebox/v1/credits/purchase", 0)
    told = required(challenge.for_credits(SIGNING, KEYS, asked, NOW_S, 1_000_000))
    got = sdk.ask({"key": KEY, "required": told})
    assert [each["payload"]["amount"] for each in got["offers"]] == ["1000000", "1000000"]
    assert {each["signer"] for each in got["offers"]} == set(receipts.addresses(KEYS))


def test_one_that_was_changed_is_somebody_elses(sdk: Peer) -> None:
    told = required(challenge.for_call(SIGNING, KEYS, ASKED, NOW_S))
    told["extensions"]["offer-receipt"]["info"]["offers"][0]["payload"]["payTo"] = "0x" + "66" * 20
    (changed, other) = sdk.ask({"key": KEY, "required": told})["offers"]
    assert changed["signer"] not in receipts.addresses(KEYS)
    assert changed["accepts"] is None
    assert other["signer"] in receipts.addresses(KEYS)


def test_they_are_off_unless_asked_for_and_need_something_to_offer() -> None:
    told = required(challenge.for_call(settings_for(), KEYS, ASKED, NOW_S))
    assert "extensions" not in told
    nothing = settings_for(
        server={"sign_offers": True},
        chains={"base-sepolia": {name: CHAIN[name] for name in ("rpc", "pay_to")}},
    )
    assert "extensions" not in required(challenge.for_call(nothing, KEYS, ASKED, NOW_S))


@pytest.mark.parametrize("signing", [True, False])
async def test_the_402_of_a_route_has_them(signing: bool, tmp_path: Path) -> None:
    """Also of a request that says nothing, whose answer is prepared where nothing is signed."""
    server = {"database": f"sqlite:///{tmp_path}/a.db", "sign_offers": signing}
    node = await open_node(settings_for(server=server))
    try:
        transport = httpx.ASGITransport(build(node))
        async with httpx.AsyncClient(transport=transport, base_url="http://shop.test") as http:
            answer = await http.get("/v1/x")
            keys = (await http.get("/farebox/v1/receipts/keys")).json()["addresses"]
        extensions = json.loads(b64decode(answer.headers["payment-required"]))["extensions"]
        assert {"sign-in-with-x", "payment-identifier", "bazaar"} <= extensions.keys()
        assert ("offer-receipt" in extensions) is signing
        if signing:
            (offer,) = extensions["offer-receipt"]["info"]["offers"]
            assert receipts.signer_of(offer) in [key.lower() for key in keys]
            assert offer["payload"]["resourceUrl"] == "http://shop.test/v1/x"
    finally:
        await close_node(node)
