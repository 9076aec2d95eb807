"""payment-identifier on purchases: credits that are signed for again are not paid for again."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from tests.e2e.stage import Gateway
from tests.e2e.wallet import Wallet, decode, encode, new_wallet, offers, problem

PURCHASE = "/farebox/v1/credits/purchase"
ID = "pay_7d5d747be160e280504c099d984bcfe0"
DOLLAR = {"amount_usd": "1"}
MINT = ("mint", 1_000_000, "x402")


async def paid(
    http: httpx.AsyncClient, wallet: Wallet, identifier: str = ID, **asked: Any
) -> dict[str, str]:
    """A new payment of a client that adds the id to what the 402 declared."""
    told = await http.post(PURCHASE, json={**DOLLAR, **asked})
    declared = decode(told.headers["payment-required"])["extensions"]["payment-identifier"]
    payload = decode(wallet.pay(offers(told)[0]))
    declared["info"]["id"] = identifier
    payload["extensions"] = {"payment-identifier": declared}
    return {"PAYMENT-SIGNATURE": encode(payload)}


async def test_signed_again_it_is_the_same_purchase(gateway: Gateway, wallet: Wallet) -> None:
    async with gateway.client() as http:
        header = await paid(http, wallet)
        first = await http.post(PURCHASE, json=DOLLAR, headers=header)
        assert first.status_code == 200, first.text
        sent = gateway.sent()
        anew = await paid(http, wallet)
        assert anew != header
        for again in (header, anew, await paid(http, wallet)):
            answer = await http.post(PURCHASE, json=DOLLAR, headers=again)
            assert (answer.status_code, answer.json()) == (200, first.json())
            assert answer.headers["farebox-replayed"] == "true"
            assert answer.headers["payment-response"] == first.headers["payment-response"]
        # In the body it is the same payment as in a header field.
        in_body = {**DOLLAR, "paymentPayload": decode(anew["PAYMENT-SIGNATURE"])}
        assert (await http.post(PURCHASE, json=in_body)).json() == first.json()
    assert gateway.sent() == sent
    assert gateway.transfers(wallet.address) == [MINT]


async def test_for_something_else_it_is_a_conflict(gateway: Gateway, wallet: Wallet) -> None:
    async with gateway.client() as http:
        await http.post(PURCHASE, json=DOLLAR, headers=await paid(http, wallet))
        sent, two = gateway.sent(), {"amount_usd": "0.5"}
        header = await paid(http, wallet, **two)
        problem(await http.post(PURCHASE, json=two, headers=header), "request_id_conflict")
        assert gateway.sent() == sent
        # The authorization itself is unharmed, and buys under another name.
        payload = decode(header["PAYMENT-SIGNATURE"])
        payload["extensions"]["payment-identifier"]["info"]["id"] = ID + "-2"
        other = {"PAYMENT-SIGNATURE": encode(payload)}
        assert (await http.post(PURCHASE, json=two, headers=other)).status_code == 200
        # And a payment that has a name has no other.
        problem(await http.post(PURCHASE, json=two, headers=header), "request_id_conflict")
    assert gateway.transfers(wallet.address) == [MINT, ("mint", 500_000, "x402")]


async def test_many_at_once_under_one_identifier_are_one_purchase(
    gateway: Gateway, wallet: Wallet
) -> None:
    async with gateway.client() as http:
        sent = gateway.sent()
        headers = [await paid(http, wallet) for _ in range(6)]
        answers = await asyncio.gather(
            *(http.post(PURCHASE, json=DOLLAR, headers=each) for each in headers * 2)
        )
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["payment_id"] for answer in answers}) == 1
    assert len([a for a in answers if "farebox-replayed" not in a.headers]) == 1
    assert gateway.sent() == sent + 1
    assert gateway.transfers(wallet.address) == [MINT]


async def test_an_identifier_belongs_to_its_wallet(gateway: Gateway, wallet: Wallet) -> None:
    other = new_wallet(gateway.net)
    async with gateway.client() as http:
        mine = await http.post(PURCHASE, json=DOLLAR, headers=await paid(http, wallet))
        header = await paid(http, other)
        forged = decode(header["PAYMENT-SIGNATURE"])
        forged["payload"]["authorization"]["from"] = wallet.address
        refused = await http.post(
            PURCHASE, json=DOLLAR, headers={"PAYMENT-SIGNATURE": encode(forged)}
        )
        assert refused.status_code == 402
        assert mine.json()["payment_id"] not in refused.text
        theirs = await http.post(PURCHASE, json=DOLLAR, headers=header)
        assert theirs.status_code == 200
        assert theirs.json()["payment_id"] != mine.json()["payment_id"]
    assert gateway.transfers(other.address) == [MINT]


async def test_what_was_refused_before_it_was_sent_takes_no_identifier(gateway: Gateway) -> None:
    poor = new_wallet(gateway.net, units=0)
    async with gateway.client() as http:
        header = await paid(http, poor)
        problem(await http.post(PURCHASE, json=DOLLAR, headers=header), "insufficient_funds")
        gateway.net.mint(poor.address, 1_000_000)
        anew = await paid(http, poor)
        assert (await http.post(PURCHASE, json=DOLLAR, headers=anew)).status_code == 200
    assert gateway.transfers(poor.address) == [MINT]
