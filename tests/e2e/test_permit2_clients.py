"""Unmodified official clients that pay by Permit2: our own sales, and a seller's we settle for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from anvil.devnet import Devnet
from tests import servers
from tests.e2e.stage import CHEAP_UNITS, PRICE_UNITS, Api, Gateway
from tests.e2e.test_clients import pay
from tests.e2e.test_facilitator import API_KEY, PAY_TO
from tests.e2e.wallet import Wallet, decode
from tests.fixtures_permit2 import approve, plant
from tests.wallet_auth.support import CLIENTS, node

Launch = Callable[..., Gateway]
# Users who chose Permit2; ``pay_*`` of test_clients takes the first offer, also if it is one.
CHOOSERS = {"js": "permit2_v2.mjs", "py": "permit2_py.py"}
STOCK = {"js": "pay_v2.mjs", "py": "pay_py.py"}


@pytest.fixture(autouse=True)
def _planted(chain_session: Devnet) -> None:
    plant(chain_session)


def buys(script: str, url: str, wallet: Wallet, *arguments: str) -> dict[str, Any]:
    (got,) = pay("", url, wallet.key, *arguments, script=script)
    return got


@pytest.fixture
def gateway(launch: Launch, dialect: str) -> Gateway:
    """Of this test alone: it has what a network of the tests usually lacks."""
    made = launch(dialect, running=False)
    made.chain_extra = "permit2 = true\neip2612 = true"
    return made.start()


@pytest.mark.parametrize("client", CHOOSERS)
def test_one_that_prefers_permit2_pays_a_call(
    client: str, gateway: Gateway, api: Api, wallet: Wallet, cheap: str
) -> None:
    held, body = gateway.net.balance_units(wallet.address), '{"q": 1}'
    # It cannot look at the chain, so it signs no permit and sends back what it was told.
    refused = buys(CHOOSERS[client], gateway.url + cheap, wallet, "POST", body)
    assert refused["status"] == 412, refused
    assert json.loads(refused["body"])["code"] == "PERMIT2_ALLOWANCE_REQUIRED"
    assert gateway.payments(wallet.address) == []
    approve(gateway.net, wallet.account)
    got = buys(CHOOSERS[client], gateway.url + cheap, wallet, "POST", body)
    assert got["status"] == 200, got
    assert [request.body for request in api.seen(cheap)] == [body.encode()]
    told = decode(got["headers"]["payment-response"])
    assert (told["success"], told["payer"]) == (True, wallet.address)
    assert gateway.net.receipt(told["transaction"])["status"] == "0x1"
    assert gateway.net.balance_units(wallet.address) == held - PRICE_UNITS
    (row,) = gateway.payments(wallet.address)
    assert (row["method"], row["state"]) == ("permit2", "succeeded")
    assert gateway.transfers(wallet.address) == [
        ("mint", PRICE_UNITS, "x402"),
        ("capture", CHEAP_UNITS, None),
    ]


@pytest.fixture
def facilitator(launch: Launch) -> Gateway:
    made = launch("sqlite", running=False)
    made.chain_extra = f'[facilitator]\napi_key = "{API_KEY}"'
    return made.start()


@pytest.fixture
def seller(facilitator: Gateway, run: Callable[..., servers.Process]) -> Iterator[str]:
    """The official one, who takes nothing but Permit2 at ``/permit2``."""
    port = servers.free_port()
    script = str(CLIENTS / "bench" / "facilitated.mjs")
    process = run(node(), script, str(port), facilitator.url + "/farebox/x402", API_KEY, PAY_TO)
    process.wait_port(port)
    yield f"http://127.0.0.1:{port}"


@pytest.mark.parametrize("client", STOCK)
def test_a_seller_that_takes_nothing_else_is_paid_by_a_stock_client(
    client: str, facilitator: Gateway, seller: str, wallet: Wallet
) -> None:
    net = facilitator.net
    before, held = net.balance_units(PAY_TO), net.balance_units(wallet.address)
    refused = buys(STOCK[client], f"{seller}/permit2", wallet)
    assert refused["status"] == 412, refused
    assert (facilitator.sent(), facilitator.payments(wallet.address)) == (0, [])
    approve(net, wallet.account)
    got = buys(STOCK[client], f"{seller}/permit2", wallet)
    assert got["status"] == 200, (got, facilitator.log[-2000:])
    told = decode(got["headers"]["payment-response"])
    assert net.receipt(told["transaction"])["status"] == "0x1"
    assert net.balance_units(PAY_TO) == before + PRICE_UNITS
    assert net.balance_units(wallet.address) == held - PRICE_UNITS
    (row,) = facilitator.payments(wallet.address)
    assert (row["provider"], row["method"], row["state"]) == ("facilitator", "permit2", "succeeded")


# --- a wallet that never approved anything and has no gas -----------------------------------------


def of_nothing_but_usdc(net: Devnet, wallet: Wallet) -> None:
    assert net.rpc("eth_getBalance", wallet.address, "latest") == "0x0"
    assert net.rpc("eth_getTransactionCount", wallet.address, "latest") == "0x0"


@pytest.mark.parametrize("client", CHOOSERS)
def test_one_without_gas_signs_the_approval_and_pays_calls(
    client: str, gateway: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    """Two calls: the second permit has the next nonce of the token."""
    net = gateway.net
    of_nothing_but_usdc(net, wallet)
    held = net.balance_units(wallet.address)
    got = pay(
        "", gateway.url + target, wallet.key, "GET", "", "2", net.rpc_url, script=CHOOSERS[client]
    )
    assert [each["status"] for each in got] == [200, 200], got
    assert api.calls(target) == 2
    assert net.balance_units(wallet.address) == held - 2 * PRICE_UNITS
    of_nothing_but_usdc(net, wallet)
    rows = gateway.payments(wallet.address)
    assert [(row["method"], row["state"]) for row in rows] == [("permit2", "succeeded")] * 2
    assert gateway.transfers(wallet.address) == 2 * [
        ("mint", PRICE_UNITS, "x402"),
        ("capture", PRICE_UNITS, None),
    ]


@pytest.mark.parametrize("client", CHOOSERS)
def test_a_seller_that_declares_it_is_paid_without_gas(
    client: str, facilitator: Gateway, seller: str, wallet: Wallet
) -> None:
    net = facilitator.net
    of_nothing_but_usdc(net, wallet)
    before = net.balance_units(PAY_TO)
    url = f"{seller}/sponsored"
    got = buys(CHOOSERS[client], url, wallet, "GET", "", "1", net.rpc_url)
    assert got["status"] == 200, (got, facilitator.log[-2000:])
    told = decode(got["headers"]["payment-response"])
    assert net.receipt(told["transaction"])["status"] == "0x1"
    assert net.balance_units(PAY_TO) == before + PRICE_UNITS
    of_nothing_but_usdc(net, wallet)
    (row,) = facilitator.payments(wallet.address)
    assert (row["provider"], row["method"], row["state"]) == ("facilitator", "permit2", "succeeded")
