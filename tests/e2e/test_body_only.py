"""Credits bought by a client that can set no header field: the whole handshake in JSON."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from tests.e2e.stage import Gateway, transfers_to
from tests.e2e.wallet import Wallet, decode, encode, new_wallet, offers, outcome, problem

PURCHASE = "/farebox/v1/credits/purchase"
DOLLAR = {"amount_usd": "1"}


async def ask(http: httpx.AsyncClient, **wanted: Any) -> dict[str, Any]:
    answer = await http.post(PURCHASE, json=wanted or DOLLAR)
    assert answer.status_code == 402, answer.text
    body: dict[str, Any] = answer.json()
    assert body["payment_required"] == decode(answer.headers["payment-required"])
    return body


def payload_of(wallet: Wallet, told: dict[str, Any], version: int = 2) -> dict[str, Any]:
    """The payment as an object, by what the body of the 402 says alone."""
    offer = told["accepts"][0] if version == 1 else told["payment_required"]["accepts"][0]
    pay = wallet.pay_v1 if version == 1 else wallet.pay
    found: dict[str, Any] = decode(pay(offer))
    return found


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("method", [{}, {"payment_method": "x402direct"}], ids=str)
async def test_two_posts_of_json_buy_credits(
    gateway: Gateway, wallet: Wallet, version: int, method: dict[str, str]
) -> None:
    async with gateway.client() as http:
        told = await ask(http, **DOLLAR, **method)
        paying = {**DOLLAR, **method, "paymentPayload": payload_of(wallet, told, version)}
        done = await http.post(PURCHASE, json=paying)
        again = await http.post(PURCHASE, json=paying)
    assert done.status_code == 200, done.text
    body = done.json()
    assert (body["success"], body["state"], body["minted_units"]) == (True, "succeeded", 1_000_000)
    assert body["wallet_address"] == wallet.address
    assert outcome(done)["transaction"] == body["transaction"]
    if version == 1:  # without an offer's token nobody is known to have been the first
        assert "balance" in body
        body = {name: value for name, value in body.items() if not name.startswith("balance")}
    assert again.json() == body
    assert again.headers["farebox-replayed"] == "true"
    assert gateway.transfers(wallet.address) == [("mint", 1_000_000, "x402")]


def second(wallet: Wallet, told: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """``{purchase_id, authorization, signature}`` for the first offer of a 402."""
    payload = decode(wallet.pay(told["payment_required"]["accepts"][0], **fields))["payload"]
    return {"purchase_id": told["purchase_id"], **payload}


async def test_a_second_post_names_the_purchase_and_nothing_else(
    gateway: Gateway, wallet: Wallet
) -> None:
    before = len(transfers_to(gateway.net, gateway.pay_to))
    async with gateway.client() as http:
        told = await ask(http, credits=500, payment_method="x402direct")
        post = second(wallet, told)
        assert post.keys() == {"purchase_id", "authorization", "signature"}
        answers = await asyncio.gather(*(http.post(PURCHASE, json=post) for _ in range(6)))
        assert {a.status_code for a in answers} == {200}, answers[0].text
        first = [a for a in answers if "farebox-replayed" not in a.headers]
        assert len(first) == 1
        assert first[0].json()["minted_units"] == 5_000_000
        # The same payment in a header field is the same payment.
        payload = {name: post[name] for name in ("authorization", "signature")}
        offer = told["payment_required"]["accepts"][0]
        header = {"x402Version": 2, "accepted": offer, "payload": payload}
        same = await http.post(
            PURCHASE, json={"credits": 500}, headers={"PAYMENT-SIGNATURE": encode(header)}
        )
        assert same.json()["payment_id"] == first[0].json()["payment_id"]
    assert len(transfers_to(gateway.net, gateway.pay_to)) == before + 1
    assert gateway.transfers(wallet.address) == [("mint", 5_000_000, "x402")]


async def test_a_second_post_that_pays_something_else_is_no_purchase_of_ours(
    sqlite_gateway: Gateway, wallet: Wallet
) -> None:
    agent = new_wallet(sqlite_gateway.net, 0)
    async with sqlite_gateway.client() as http:
        told, other = await ask(http), await ask(http, amount_usd="2")
        good = second(wallet, told)
        for change in (
            {"purchase_id": other["purchase_id"]},
            {"purchase_id": good["purchase_id"][:-2] + "AA"},
            {"purchase_id": 7},
            {"purchase_id": "pur_1"},
            {"paymentPayload": {}},
            second(wallet, told, amount=2_000_000),
        ):
            problem(await http.post(PURCHASE, json={**good, **change}), "invalid_request")
        for missing in good:
            left = {name: value for name, value in good.items() if name != missing}
            problem(await http.post(PURCHASE, json=left), "invalid_request")
        for odd in ([], {}, {**good["authorization"], "value": 1.5}):
            answer = await http.post(PURCHASE, json={**good, "authorization": odd})
            problem(answer, "invalid_payload")
        wrong = await http.post(PURCHASE, json={**good, "amount_usd": "2"})
        assert wrong.status_code == 402, wrong.text
        thief = await http.post(PURCHASE, json={**good, "wallet_address": agent.address})
        problem(thief, "payer_mismatch")
        stolen = {**good, "signature": second(new_wallet(sqlite_gateway.net), told)["signature"]}
        assert (await http.post(PURCHASE, json=stolen)).status_code == 402
        assert sqlite_gateway.payments(wallet.address) == []
        assert (await http.post(PURCHASE, json=good)).status_code == 200
    assert sqlite_gateway.balance(wallet.address) == (1_000_000, 0)


async def test_body_and_header_are_the_same_payment(gateway: Gateway, wallet: Wallet) -> None:
    before = len(transfers_to(gateway.net, gateway.pay_to))
    async with gateway.client() as http:
        told = await ask(http)
        header = wallet.pay(told["payment_required"]["accepts"][0])
        in_body = {**DOLLAR, "paymentPayload": decode(header)}
        in_header = {"PAYMENT-SIGNATURE": header}
        answers = await asyncio.gather(
            *(http.post(PURCHASE, json=in_body) for _ in range(10)),
            *(http.post(PURCHASE, json=DOLLAR, headers=in_header) for _ in range(10)),
        )
        other = await http.post(PURCHASE, json={**in_body, "amount_usd": "2"})
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["payment_id"] for answer in answers}) == 1
    assert len([a for a in answers if "farebox-replayed" not in a.headers]) == 1
    problem(other, "payment_already_used")
    assert len(transfers_to(gateway.net, gateway.pay_to)) == before + 1
    assert gateway.transfers(wallet.address) == [("mint", 1_000_000, "x402")]


async def test_what_stands_in_calldata_opens_no_account(gateway: Gateway, wallet: Wallet) -> None:
    """A settled authorization is public. Shown again by a reader of the chain it is a receipt."""
    async with gateway.client() as http:
        told = await ask(http)
        mine = payload_of(wallet, told)
        paid = {**DOLLAR, "paymentPayload": mine}
        assert "balance" in (await http.post(PURCHASE, json=paid)).json()
        offer = told["payment_required"]["accepts"][0]
        bare = {**offer, "extra": {**offer["extra"], "offer": "AAAA"}}
        v1 = {"x402Version": 1, "scheme": "exact", "network": told["accepts"][0]["network"]}
        for read in ({**v1, "payload": mine["payload"]}, {**mine, "accepted": bare}):
            answer = await http.post(PURCHASE, json={**DOLLAR, "paymentPayload": read})
            assert answer.status_code == 200, answer.text
            assert answer.json()["state"] == "succeeded"
            assert not [name for name in answer.json() if name.startswith("balance")]
        assert "balance" in (await http.post(PURCHASE, json=paid)).json()
    assert gateway.transfers(wallet.address) == [("mint", 1_000_000, "x402")]


async def test_two_payments_are_one_too_many(gateway: Gateway, wallet: Wallet) -> None:
    async with gateway.client() as http:
        told = await ask(http)
        payload = payload_of(wallet, told)
        offer = told["payment_required"]["accepts"][0]
        for header in (wallet.pay(offer), wallet.pay_v1(told["accepts"][0])):
            both = await http.post(
                PURCHASE,
                json={**DOLLAR, "paymentPayload": payload},
                headers={"X-PAYMENT": header},
            )
            assert problem(both, "identity_conflict")["status"] == 400
        hashed = {"transaction_hash": "0x" + "12" * 32, "paymentPayload": payload}
        problem(await http.post(PURCHASE, json=hashed), "invalid_request")
        card = {
            **DOLLAR,
            "payment_method": "card",
            "wallet_address": wallet.address,
            "paymentPayload": payload,
        }
        problem(await http.post(PURCHASE, json=card), "invalid_request")
    assert gateway.payments(wallet.address) == []


async def test_refusals_are_those_of_the_header(gateway: Gateway, wallet: Wallet) -> None:
    poor = new_wallet(gateway.net, 0)
    async with gateway.client() as http:
        told = await ask(http)
        offer = told["payment_required"]["accepts"][0]
        good = payload_of(wallet, told)
        unspoken = {**good, "x402Version": 3}
        elsewhere = {**good, "accepted": {**offer, "network": "eip155:1"}}
        forged = json.loads(json.dumps(good))
        forged["payload"]["authorization"]["from"] = poor.address
        for odd in ("junk", [good], 7, True):
            answer = await http.post(PURCHASE, json={**DOLLAR, "paymentPayload": odd})
            problem(answer, "invalid_payload")
        for payload, code in (
            ({}, "invalid_payload"),
            (unspoken, "invalid_x402_version"),
            (elsewhere, "invalid_network"),
            (forged, "invalid_exact_evm_payload_signature"),
            (payload_of(poor, told), "insufficient_funds"),
        ):
            answer = await http.post(PURCHASE, json={**DOLLAR, "paymentPayload": payload})
            body = problem(answer, code)
            if answer.status_code == 402:  # with everything that is needed to try again
                assert body["payment_required"]["accepts"] == offers(answer)
                assert outcome(answer)["success"] is False
        signed = json.dumps({**DOLLAR, "paymentPayload": good}).encode()
        by_other = poor.sign("POST", gateway.url + PURCHASE, signed)
        answer = await http.post(PURCHASE, content=signed, headers=by_other)
        problem(answer, "payer_mismatch")
        assert gateway.payments(wallet.address) == gateway.payments(poor.address) == []
        signature = wallet.sign("POST", gateway.url + PURCHASE, signed)
        assert (await http.post(PURCHASE, content=signed, headers=signature)).status_code == 200
    assert gateway.balance(wallet.address) == (1_000_000, 0)
