"""What a second presentation of a request or a payment gets (design: proofs, sections 2 and 3)."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.e2e.stage import CHEAP_UNITS, PRICE_UNITS, ROUTES, Api, Gateway
from tests.e2e.wallet import Wallet, buy, decode, encode, offers, outcome, problem

Launch = Callable[..., Gateway]
PURCHASE = "/farebox/v1/credits/purchase"


async def first(
    http: httpx.AsyncClient, wallet: Wallet, target: str, **headers: str
) -> dict[str, str]:
    """Pay for a call and get its answer; the headers it was paid with."""
    paid = {"PAYMENT-SIGNATURE": wallet.pay(offers(await http.get(target))[0]), **headers}
    answer = await http.get(target, headers=paid)
    assert answer.status_code == 200, answer.text
    return paid


async def test_with_its_offer_token_the_stored_answer(
    gateway: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    sent = gateway.sent()
    async with gateway.client() as http:
        paid = await first(http, wallet, target)
        again = await http.get(target, headers=paid)
        # The token decides, not the bytes around it.
        respelled = {"X-PAYMENT": encode(decode(paid["PAYMENT-SIGNATURE"]) | {"resource": {}})}
        third = await http.get(target, headers=respelled)
    for answer in (again, third):
        assert answer.status_code == 200
        assert target in answer.text
        assert answer.headers["farebox-replayed"] == "true"
        assert answer.headers["farebox-charged"] == "0"
        assert outcome(answer)["success"] is True
    assert api.calls(target) == 1
    assert gateway.sent() == sent + 1


async def test_without_its_token_the_receipt_only(
    gateway: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    """A settled authorization stands in calldata: whoever read it there learns nothing."""
    async with gateway.client() as http:
        paid = await first(http, wallet, target)
        payload = decode(paid["PAYMENT-SIGNATURE"])
        v1 = {"scheme": "exact", "network": "base-sepolia", "payload": payload["payload"]}
        other_token = offers(await http.get(target))[0]
        for stolen in (
            {"x402Version": 1, **v1},
            {**payload, "accepted": other_token},
            {**payload, "accepted": {**other_token, "extra": {}}},
        ):
            answer = await http.get(target, headers={"PAYMENT-SIGNATURE": encode(stolen)})
            assert answer.status_code == 200, answer.text
            receipt = answer.json()
            assert receipt["payment"]["state"] == "succeeded"
            assert receipt["payment"]["transaction"] == outcome(answer)["transaction"]
            assert receipt["charged_units"] == PRICE_UNITS
            assert target not in answer.text
            assert answer.headers["farebox-replayed"] == "true"
    assert api.calls(target) == 1
    assert gateway.balance(wallet.address) == (0, 0)


async def test_two_offers_for_the_same_request_are_two_secrets(
    sqlite_gateway: Gateway, target: str
) -> None:
    """Else a stranger who asks in the same second holds the token of somebody else's payment."""
    async with sqlite_gateway.client() as http:
        tokens = [
            offer["extra"]["offer"] for _ in range(20) for offer in offers(await http.get(target))
        ]
    assert len(set(tokens)) == len(tokens)


async def test_a_v1_payment_again_is_a_receipt(
    gateway: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    async with gateway.client() as http:
        offer = (await http.get(target)).json()["accepts"][0]
        paid = {"X-PAYMENT": wallet.pay_v1(offer)}
        answer = await http.get(target, headers=paid)
        assert answer.status_code == 200 and target in answer.text
        again = await http.get(target, headers=paid)
        assert again.status_code == 200 and target not in again.text
        assert again.json()["payment"]["transaction"] == outcome(answer)["transaction"]
    assert api.calls(target) == 1


# A wallet with credits: its payment is settled if it says so, else it spends those.
BOTH_WAYS = pytest.mark.parametrize(
    "way",
    [({"Farebox-Prefer": "settle"}, 1_000_000), ({}, 990_000)],
    ids=["settled", "from-credits"],
)


@BOTH_WAYS
async def test_a_bound_identity_of_the_payer_gets_the_stored_answer(
    gateway: Gateway, api: Api, wallet: Wallet, target: str, way: tuple[dict[str, str], int]
) -> None:
    """Paid bare or signed, repeated bare or signed: one call, one charge."""
    prefer, left = way
    url = gateway.url + target
    async with gateway.client() as http:
        await buy(http, wallet)  # so that a second charge would find something
        paid = await first(http, wallet, target, **prefer)
        signed = await http.get(target, headers=wallet.sign("GET", url, headers=paid))
        assert signed.status_code == 200 and target in signed.text
        assert signed.headers["farebox-replayed"] == "true"
        assert signed.headers["farebox-charged"] == "0"
    assert api.calls(target) == 1
    assert gateway.balance(wallet.address) == (left, 0)


@BOTH_WAYS
async def test_a_signed_payment_burns_both_its_ids(
    gateway: Gateway, api: Api, wallet: Wallet, target: str, way: tuple[dict[str, str], int]
) -> None:
    prefer, left = way
    url = gateway.url + target
    async with gateway.client() as http:
        await buy(http, wallet)
        paid = {"PAYMENT-SIGNATURE": wallet.pay(offers(await http.get(target))[0]), **prefer}
        signed = wallet.sign("GET", url, headers=paid)
        once = await http.get(target, headers=signed)
        assert once.status_code == 200 and "farebox-replayed" not in once.headers
        only_signature = {k: v for k, v in signed.items() if k != "PAYMENT-SIGNATURE"}
        signed_anew = wallet.sign("GET", url, headers=paid)
        for repeat in (signed, only_signature, signed_anew, paid):
            answer = await http.get(target, headers=repeat)
            assert answer.status_code == 200, answer.text
            assert answer.content == once.content
            assert answer.headers["farebox-replayed"] == "true"
            assert answer.headers["farebox-charged"] == "0"
    assert api.calls(target) == 1
    assert gateway.balance(wallet.address) == (left, 0)


@BOTH_WAYS
async def test_a_key_beside_a_signed_payment_does_not_free_the_payment(
    gateway: Gateway, api: Api, wallet: Wallet, target: str, way: tuple[dict[str, str], int]
) -> None:
    """The payment finds its call whatever else was burnt with it, and pays for no other."""
    prefer, left = way
    url = gateway.url + target
    async with gateway.client() as http:
        await buy(http, wallet)  # so that a second charge would find something
        paid = {"PAYMENT-SIGNATURE": wallet.pay(offers(await http.get(target))[0]), **prefer}
        keyed = {"Idempotency-Key": "one"}
        signed = wallet.sign("GET", url, headers=paid | keyed)
        once = await http.get(target, headers=signed)
        assert once.status_code == 200 and "farebox-replayed" not in once.headers
        for repeat in (
            paid,
            wallet.sign("GET", url, headers=paid),
            wallet.sign("GET", url, headers=keyed),
            wallet.sign("GET", url, headers=paid | keyed),
            wallet.sign("GET", url, headers=paid | {"Idempotency-Key": "another"}),
            signed,
        ):
            answer = await http.get(target, headers=repeat)
            assert answer.status_code == 200, answer.text
            assert answer.headers["farebox-replayed"] == "true"
            assert answer.content == once.content
    assert api.calls(target) == 1
    assert gateway.balance(wallet.address) == (left, 0)


async def test_for_something_else_it_is_a_conflict(
    gateway: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    async with gateway.client() as http:
        asked = await http.post(target, content=b"one")
        paid = {"PAYMENT-SIGNATURE": wallet.pay(offers(asked)[0])}
        assert (await http.post(target, content=b"one", headers=paid)).status_code == 200
        for other in (
            await http.post(target, content=b"two", headers=paid),
            await http.get(target, headers=paid),
            await http.post(target + "?x", content=b"one", headers=paid),
            await http.post(target + "/x", content=b"one", headers=paid),
            await http.post(target, content=b"one", headers={**paid, "Content-Type": "text/html"}),
            await http.post(PURCHASE, content=b'{"amount_usd": "0.01"}', headers=paid),
        ):
            told = problem(other, "payment_already_used")
            assert told["status"] == 409
            assert "payment-required" not in other.headers
    assert len(api.seen(target)) == 1
    assert len(gateway.payments(wallet.address)) == 1


async def test_a_token_is_good_for_its_request_only(
    gateway: Gateway, api: Api, wallet: Wallet, target: str, cheap: str
) -> None:
    sent = gateway.sent()
    async with gateway.client() as http:
        offer = offers(await http.get(cheap))[0]
        assert int(offer["amount"]) == PRICE_UNITS  # the smallest settlement, for either
        pack = offers(await http.get(cheap))[1]
        purchase = offers(await http.post(PURCHASE, content=b'{"amount_usd": "1"}'))[0]
        assert pack["amount"] == purchase["amount"] == "1000000"
        paid = {"PAYMENT-SIGNATURE": wallet.pay(offer)}
        wrong: list[tuple[httpx.Response, str]] = [
            (await http.get(target, headers=paid), "another path"),
            (await http.get(cheap + "?a=1", headers=paid), "another query"),
            (await http.post(cheap, headers=paid), "another method"),
        ]
        swapped = {**pack, "extra": {**pack["extra"], "offer": purchase["extra"]["offer"]}}
        header = {"PAYMENT-SIGNATURE": wallet.pay(swapped)}
        wrong.append((await http.get(cheap, headers=header), "the token of a purchase"))
        header = {"PAYMENT-SIGNATURE": wallet.pay({**pack, "amount": "1000001"})}
        wrong.append((await http.get(cheap, headers=header), "another amount"))
        header = {"PAYMENT-SIGNATURE": wallet.pay({**pack, "maxTimeoutSeconds": 100})}
        wrong.append((await http.get(cheap, headers=header), "another timeout"))
        token = bytearray(base64.urlsafe_b64decode(pack["extra"]["offer"] + "=="))
        for place in (0, 5, 14, 25, 40, len(token) - 1):
            spoilt = bytes((*token[:place], token[place] ^ 1, *token[place + 1 :]))
            text = base64.urlsafe_b64encode(spoilt).decode().rstrip("=")
            accepted = {**pack, "extra": {**pack["extra"], "offer": text}}
            header = {"PAYMENT-SIGNATURE": wallet.pay(accepted)}
            wrong.append((await http.get(cheap, headers=header), f"a bit of byte {place}"))
    for answer, why in wrong:
        told = problem(answer, "invalid_payment_requirements")
        assert offers(answer), why
        assert outcome(answer)["errorReason"] == told["code"], why
    assert gateway.sent() == sent
    assert gateway.payments(wallet.address) == []
    assert api.calls(target) == api.calls(cheap) == 0


async def test_an_expired_offer(launch: Launch, api: Api, wallet: Wallet, target: str) -> None:
    gateway = launch("sqlite", server={"offer_timeout_s": 10})
    async with gateway.client() as http:
        offer = offers(await http.get(target))[0]
        expiry = int.from_bytes(base64.urlsafe_b64decode(offer["extra"]["offer"] + "==")[4:12])
        gateway.wait(lambda: time.time() > expiry + 1, "the offer to expire")
        header = wallet.pay(offer, valid_before_s=int(time.time()) + 60)
        late = await http.get(target, headers={"PAYMENT-SIGNATURE": header})
        problem(late, "offer_expired")
        assert outcome(late)["errorReason"] == "offer_expired"
        assert gateway.sent() == 0
        fresh = wallet.pay(offers(late)[0])
        paid = await http.get(target, headers={"PAYMENT-SIGNATURE": fresh})
    assert paid.status_code == 200
    assert api.calls(target) == 1


async def test_the_price_of_an_offer_holds(
    launch: Launch, api: Api, wallet: Wallet, cheap: str
) -> None:
    """Raised between the 402 and the payment: the old price is charged, once."""
    gateway = launch("sqlite")
    async with gateway.client() as http:
        offer = offers(await http.get(cheap))[0]
    gateway.stop()
    gateway.routes = ROUTES.replace('"$0.002"', '"$0.009"')
    gateway.start()
    async with gateway.client() as http:
        paid = {"PAYMENT-SIGNATURE": wallet.pay(offer)}
        answer = await http.get(cheap, headers=paid)
        assert answer.status_code == 200
        assert answer.headers["farebox-charged"] == "0.2"
        again = await http.get(cheap, headers=paid)
        assert (again.headers["farebox-replayed"], again.content) == ("true", answer.content)
        new = await http.get(cheap)
        assert new.json()["credits"]["price_units"] == 9_000
    assert gateway.balance(wallet.address) == (PRICE_UNITS - CHEAP_UNITS, 0)
    assert api.calls(cheap) == 1


async def test_a_price_that_fell_is_the_price(
    launch: Launch, api: Api, wallet: Wallet, cheap: str
) -> None:
    """An offer promises no more than its price; a ceiling that was signed is never passed."""
    gateway = launch("sqlite", routes=ROUTES.replace('"$0.002"', '"$0.009"'))
    async with gateway.client() as http:
        offer = offers(await http.get(cheap))[0]
    gateway.stop()
    gateway.routes = ROUTES
    gateway.start()
    async with gateway.client() as http:
        paid = {"PAYMENT-SIGNATURE": wallet.pay(offer), "Farebox-Max": "$0.002"}
        signed = wallet.sign("GET", gateway.url + cheap, headers=paid)
        answer = await http.get(cheap, headers=signed)
        assert answer.status_code == 200, answer.text
        assert answer.headers["farebox-charged"] == "0.2"
    assert gateway.balance(wallet.address) == (PRICE_UNITS - CHEAP_UNITS, 0)


async def test_a_frozen_account_is_not_taken_money_for_a_call(
    launch: Launch, api: Api, wallet: Wallet, target: str
) -> None:
    gateway = launch("sqlite")
    async with gateway.client() as http:
        await buy(http, wallet)
        paid = await first(http, wallet, target)
        gateway.freeze(wallet.address)
        sent = gateway.sent()
        fresh = {"PAYMENT-SIGNATURE": wallet.pay(offers(await http.get(target))[0])}
        problem(await http.get(target, headers=fresh), "account_frozen")
        signed = wallet.sign("GET", gateway.url + target)
        assert problem(await http.get(target, headers=signed), "account_frozen")["status"] == 403
        again = await http.get(target, headers=paid)  # what was paid and done stays so
        assert again.headers["farebox-replayed"] == "true"
    assert gateway.sent() == sent
    assert api.calls(target) == 1


async def test_a_purchase_again_and_for_another_amount(gateway: Gateway, wallet: Wallet) -> None:
    def ask(usd: str) -> dict[str, Any]:
        return {"content": json.dumps({"amount_usd": usd}).encode()}

    async with gateway.client() as http:
        offer = offers(await http.post(PURCHASE, **ask("1")))[0]
        paid = {"PAYMENT-SIGNATURE": wallet.pay(offer)}
        # More was asked for than is paid.
        answer = await http.post(PURCHASE, **ask("5"), headers=paid)
        problem(answer, "invalid_exact_evm_payload_authorization_value_mismatch")
        assert offers(answer)[0]["amount"] == "5000000"
        asked = await http.post(PURCHASE, **ask("5"))
        v1 = {"X-PAYMENT": wallet.pay_v1(asked.json()["accepts"][0], amount=1_000_000)}
        answer = await http.post(PURCHASE, **ask("5"), headers=v1)
        problem(answer, "invalid_exact_evm_payload_authorization_value_mismatch")
        assert gateway.payments(wallet.address) == []
        bought = await http.post(PURCHASE, **ask("1"), headers=paid)
        again = await http.post(PURCHASE, **ask("1.00"), headers=paid)
        assert bought.status_code == again.status_code == 200
        assert again.headers["farebox-replayed"] == "true"
        assert again.json()["payment_id"] == bought.json()["payment_id"]
        problem(await http.post(PURCHASE, **ask("5"), headers=paid), "payment_already_used")
        state = await http.get(f"/farebox/v1/payments/{bought.json()['payment_id']}")
        assert state.json()["state"] == "succeeded"
    assert gateway.transfers(wallet.address) == [("mint", 1_000_000, "x402")]
