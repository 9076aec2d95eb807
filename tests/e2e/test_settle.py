"""One authorization moves money once, however often and wherever it is presented."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import httpx
import pytest

from anvil.devnet import Devnet
from tests.e2e.stage import PRICE_UNITS, Api, Gateway, transfers_to
from tests.e2e.wallet import Wallet, decode, offers, outcome, problem

Launch = Callable[..., Gateway]
PURCHASE = "/farebox/v1/credits/purchase"
BODY = json.dumps({"amount_usd": "1"}).encode()


def nobody_is_told_to_pay_again(answers: list[httpx.Response]) -> None:
    for answer in answers:
        assert "payment-required" not in answer.headers, answer.text
        assert answer.status_code in (200, 202, 402, 409), answer.text
        if answer.status_code == 402:
            problem(answer, "settlement_pending")
        elif answer.status_code == 409:
            problem(answer, "request_in_progress")
        elif answer.status_code == 200:
            assert outcome(answer)["success"] is True


async def test_one_payment_for_a_call_fifty_times_at_once(
    gateway: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    before = len(transfers_to(gateway.net, gateway.pay_to))
    async with gateway.client() as http:
        paid = {"PAYMENT-SIGNATURE": wallet.pay(offers(await http.get(target))[0])}
        answers = await asyncio.gather(*(http.get(target, headers=paid) for _ in range(50)))
        nobody_is_told_to_pay_again(answers)
        late = await http.get(target, headers=paid)
    fresh = [a for a in answers if a.status_code == 200 and "farebox-replayed" not in a.headers]
    assert len(fresh) == 1
    for answer in [*answers, late]:
        if answer.status_code == 200:
            assert answer.content == fresh[0].content
            assert outcome(answer)["transaction"] == outcome(fresh[0])["transaction"]
    assert late.headers["farebox-replayed"] == "true"
    assert late.headers["farebox-charged"] == "0"
    assert len(transfers_to(gateway.net, gateway.pay_to)) == before + 1
    assert api.calls(target) == 1
    assert gateway.transfers(wallet.address) == [
        ("mint", PRICE_UNITS, "x402"),
        ("capture", PRICE_UNITS, None),
    ]


async def test_one_purchase_fifty_times_at_once(gateway: Gateway, wallet: Wallet) -> None:
    before = len(transfers_to(gateway.net, gateway.pay_to))
    async with gateway.client() as http:
        asked = await http.post(PURCHASE, content=BODY)
        paid = {"PAYMENT-SIGNATURE": wallet.pay(offers(asked)[0])}
        answers = await asyncio.gather(
            *(http.post(PURCHASE, content=BODY, headers=paid) for _ in range(50))
        )
    nobody_is_told_to_pay_again(answers)
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["payment_id"] for answer in answers}) == 1
    assert len([a for a in answers if "farebox-replayed" not in a.headers]) == 1
    assert {answer.json()["minted_units"] for answer in answers} == {1_000_000}
    assert len(transfers_to(gateway.net, gateway.pay_to)) == before + 1
    assert gateway.transfers(wallet.address) == [("mint", 1_000_000, "x402")]


@pytest.mark.parametrize("what", ["call", "purchase"])
async def test_one_payment_at_two_nodes_at_once(
    what: str, launch: Launch, api: Api, wallet: Wallet, target: str
) -> None:
    """Two processes on one database, one settler key: still one transfer and one mint."""
    one = launch("postgres")
    two = launch(beside=one)
    body = BODY if what == "purchase" else None
    path = PURCHASE if what == "purchase" else target
    method = "POST" if what == "purchase" else "GET"
    async with one.client() as first, two.client() as second:
        # The offer is the same on both: the keys of the tokens are the deployment's.
        for round_ in range(3):
            asked = await first.request(method, path + f"?{round_}", content=body)
            paid = {"PAYMENT-SIGNATURE": wallet.pay(offers(asked)[0])}
            answers = await asyncio.gather(
                *(
                    http.request(method, path + f"?{round_}", content=body, headers=paid)
                    for _ in range(12)
                    for http in (first, second)
                )
            )
            nobody_is_told_to_pay_again(list(answers))
            assert any(answer.status_code == 200 for answer in answers)
            assert len(transfers_to(one.net, one.pay_to)) == round_ + 1
            assert [p["state"] for p in one.payments(wallet.address)] == ["succeeded"] * (
                round_ + 1
            )
            if what == "call":
                assert api.calls(path + f"?{round_}") == 1
    mints = [entry for entry in one.transfers(wallet.address) if entry[0] == "mint"]
    assert len(mints) == 3


async def test_many_wallets_pay_at_two_nodes_at_once(
    launch: Launch, chain_session: Devnet, target: str
) -> None:
    """One settler key behind two processes: every transaction, of one payment or of several, gets a
    chain nonce of its own."""
    from tests.e2e.wallet import new_wallet

    one = launch("postgres")
    two = launch(beside=one)
    wallets = [new_wallet(chain_session) for _ in range(16)]
    async with one.client() as first, two.client() as second:
        offer = offers(await first.get(target))[0]
        answers = await asyncio.gather(
            *(
                (first if n % 2 else second).get(
                    target, headers={"PAYMENT-SIGNATURE": each.pay(offer)}
                )
                for n, each in enumerate(wallets)
            )
        )
    assert [answer.status_code for answer in answers] == [200] * 16
    hashes = {decode(answer.headers["payment-response"])["transaction"] for answer in answers}
    assert one.received() == 16 * PRICE_UNITS
    nonces = one.rows("SELECT nonce FROM chain_nonce ORDER BY nonce")
    assert [row["nonce"] for row in nonces] == list(range(len(hashes)))
