"""Gas that gets dear while a gateway sells: what it goes on offering, and what it still takes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from anvil.devnet import Devnet, running
from tests.e2e.stage import Gateway
from tests.e2e.wallet import buy, new_wallet, offers, outcome
from tests.fixtures_chain import NETWORK

Launch = Callable[..., Gateway]
GWEI = 10**9
PURCHASE = "/farebox/v1/credits/purchase"
CENT, DOLLAR = "10000", "1000000"


def priced(net: Devnet, gwei: int) -> None:
    """Gas costs this much from now on, apart from what a block changes by itself."""
    net.rpc("anvil_setNextBlockBaseFeePerGas", hex(gwei * GWEI))
    net.mine()


@pytest.fixture
async def shop(launch: Launch) -> AsyncIterator[tuple[Gateway, httpx.AsyncClient]]:
    """A chain of its own, and a gas coin at $10: at 2 gwei a settlement is $0.0018."""
    with running() as net:
        gateway = launch(net=net, running=False)
        gateway.chain_extra = 'native_usd = "$10"'
        gateway.start()
        async with gateway.client() as http:
            yield gateway, http
        gateway.stop()


async def first(http: httpx.AsyncClient, target: str, amount: str) -> httpx.Response:
    """The 402 whose first offer is of this amount (empty: that offers nothing), once there is."""
    async with asyncio.timeout(90):
        while True:
            answer = await http.get(target)
            found = offers(answer)
            if (found[0]["amount"] if found else "") == amount:
                return answer
            await asyncio.sleep(0.1)


async def test_what_is_not_worth_its_gas_is_withheld_and_what_was_offered_is_honoured(
    shop: tuple[Gateway, httpx.AsyncClient],
) -> None:
    gateway, http = shop
    before = await http.get("/cheap/a")
    assert [offer["amount"] for offer in offers(before)] == [CENT, DOLLAR, "5000000", "20000000"]
    priced(gateway.net, 100)  # a settlement is $0.09
    dear = await first(http, "/cheap/a", DOLLAR)
    told = dear.json()
    assert told["withheld"][0]["network"] == NETWORK.caip2
    assert 10_000 < told["withheld"][0]["below_units"] <= 300_000
    assert told["pay"]["usdc"]["amount_units"] == 10_000
    assert told["accepts"][0]["maxAmountRequired"] == DOLLAR
    await _said(gateway, http)

    # Signed for what was offered before: by both versions, settled and served.
    for header, kept in (
        ("PAYMENT-SIGNATURE", new_wallet(gateway.net).pay(offers(before)[0])),
        ("X-PAYMENT", new_wallet(gateway.net).pay_v1(before.json()["accepts"][0])),
    ):
        paid = await http.get("/cheap/a", headers={header: kept})
        assert paid.status_code == 200, paid.text
        assert outcome(paid)["transaction"]
    assert gateway.received() == 2 * 10_000

    # Who has credits spends them: what is signed for the dearer offer is not sent.
    rich = new_wallet(gateway.net)
    await buy(http, rich, "5")
    paid = await http.get("/cheap/b", headers={"PAYMENT-SIGNATURE": rich.pay(offers(dear)[0])})
    assert paid.status_code == 402  # made for another request
    offer = offers(await first(http, "/cheap/b", DOLLAR))[0]
    paid = await http.get("/cheap/b", headers={"PAYMENT-SIGNATURE": rich.pay(offer)})
    assert paid.status_code == 200, paid.text
    assert outcome(paid)["extra"]["paidFrom"] == "credits"
    # Who has none pays the pack once, and the rest is kept for it.
    poor = new_wallet(gateway.net)
    offer = offers(await first(http, "/cheap/c", DOLLAR))[0]
    paid = await http.get("/cheap/c", headers={"PAYMENT-SIGNATURE": poor.pay(offer)})
    assert paid.status_code == 200, paid.text
    assert gateway.received() == 2 * 10_000 + 5_000_000 + 1_000_000

    priced(gateway.net, 1)
    again = await first(http, "/cheap/a", CENT)
    assert "withheld" not in again.json()
    checks = (await http.get("/readyz")).json()["checks"]
    assert f"{NETWORK.caip2} offers" not in checks


async def _said(gateway: Gateway, http: httpx.AsyncClient) -> None:
    """Where an operator looks; nothing of it makes the gateway unready."""
    ready = await http.get("/readyz")
    assert ready.status_code == 200
    assert "gas is dear" in ready.json()["checks"][f"{NETWORK.caip2} offers"]
    assert "gas is dear" in gateway.log


async def test_when_nothing_is_worth_its_gas_nothing_is_offered_on_chain(
    shop: tuple[Gateway, httpx.AsyncClient],
) -> None:
    """A payment at the usual amount without a transfer of ours goes on: the payer sends it."""
    gateway, http = shop
    priced(gateway.net, 10_000)  # a settlement is $9
    dear = await first(http, "/cheap/a", "")
    told = dear.json()
    assert told["withheld"][0]["below_units"] > 20_000_000
    body = json.dumps({"amount_usd": "20"}).encode()
    asked: dict[str, Any] = (await http.post(PURCHASE, content=body)).json()
    assert asked["payment_required"]["accepts"] == [] and asked["withheld"]
    payer = new_wallet(gateway.net, 0)
    gateway.net.rpc("anvil_setBalance", payer.address, hex(10**20))
    usdc = told["pay"]["usdc"]
    gateway.net.mint(payer.address, usdc["amount_units"])
    gateway.net.rpc("anvil_impersonateAccount", payer.address)
    tx_hash = gateway.net.transfer(payer.address, usdc["pay_to"], usdc["amount_units"])
    bought = await http.post(
        PURCHASE,
        content=json.dumps({"transaction_hash": tx_hash, "network": NETWORK.caip2}).encode(),
    )
    assert bought.status_code == 200, bought.text
    assert bought.json()["minted_units"] == 10_000
