"""Spending credits with signed requests: once each, never more than there is."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter

import httpx
import pytest

from anvil.devnet import Devnet
from tests.e2e.stage import PRICE_UNITS, Api, Gateway, answer_when_open
from tests.e2e.test_credits_first import challenge, sign_in
from tests.e2e.wallet import Wallet, buy, new_wallet, offers, problem


async def fund(http: httpx.AsyncClient, wallet: Wallet, units: int) -> None:
    """Bring a wallet exactly ``units`` of credits: a call's own settlement, and no call."""
    await buy(http, wallet, f"{units // 1_000_000}.{units % 1_000_000:06d}")


async def test_a_hundred_at_once_on_credits_for_ten(
    gateway: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    async with gateway.client() as http:
        await fund(http, wallet, 10 * PRICE_UNITS)
        assert gateway.balance(wallet.address) == (10 * PRICE_UNITS, 0)
        url = gateway.url + target
        answers = await asyncio.gather(
            *(http.get(target, headers=wallet.sign("GET", url)) for _ in range(100))
        )
    assert Counter(answer.status_code for answer in answers) == {200: 10, 402: 90}
    for answer in answers:
        if answer.status_code == 402:
            told = problem(answer, "insufficient_credits")
            assert told["credits"]["price_units"] == PRICE_UNITS
            assert offers(answer)
    assert api.calls(target) == 10
    assert gateway.balance(wallet.address) == (0, 0)
    assert gateway.transfers(wallet.address) == [
        ("mint", 10 * PRICE_UNITS, "x402"),
        *[("capture", PRICE_UNITS, None)] * 10,
    ]
    # Each answer is of the call it paid for.
    ids = [a.headers["farebox-request-id"] for a in answers if a.status_code == 200]
    assert len(set(ids)) == 10
    assert sorted(ids) == sorted(
        r.header(b"farebox-request-id")[0].decode() for r in api.seen(target)
    )


async def test_the_same_request_fifty_times_at_once(
    gateway: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    """One runs; the others are told that it does, or get its answer. One charge."""
    gate = api.behave(target, answer_when_open)
    async with gateway.client() as http:
        await fund(http, wallet, 10 * PRICE_UNITS)
        headers = wallet.sign("GET", gateway.url + target)
        asked = [asyncio.create_task(http.get(target, headers=headers)) for _ in range(50)]
        done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED, timeout=20)
        assert done
        while len(done) < 49:  # all but the one that runs
            done, _ = await asyncio.wait(asked, timeout=0.05)
        gate.open()
        answers = await asyncio.gather(*asked)
        for answer in answers:
            if answer.status_code == 409:
                assert problem(answer, "request_in_progress")["retryable"] is True
                assert int(answer.headers["retry-after"]) >= 1
        assert Counter(answer.status_code for answer in answers) == {200: 1, 409: 49}
        late = await http.get(target, headers=headers)
    assert late.content == b"late but whole"
    assert late.headers["farebox-replayed"] == "true"
    assert gate.arrived == 1
    assert gateway.balance(wallet.address) == (9 * PRICE_UNITS, 0)


async def test_a_failed_call_is_stored_and_not_run_again(
    gateway: Gateway, api: Api, wallet: Wallet
) -> None:
    async with gateway.client() as http:
        await fund(http, wallet, PRICE_UNITS)
        headers = wallet.sign("GET", gateway.url + "/500")
        before = api.calls("/500")
        first = await http.get("/500", headers=headers)
        again = await http.get("/500", headers=headers)
    for answer in (first, again):
        assert problem(answer, "upstream_error")["upstream_status"] == 500
        assert answer.headers["farebox-charged"] == "0"
    assert again.content == first.content
    assert again.headers["farebox-replayed"] == "true"
    assert api.calls("/500") == before + 1
    assert gateway.transfers(wallet.address)[1:] == [("void", 0, "upstream_status_500")]
    assert gateway.balance(wallet.address) == (PRICE_UNITS, 0)


async def test_a_refusal_before_the_hold_burns_nothing(
    gateway: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    async with gateway.client() as http:
        headers = wallet.sign("GET", gateway.url + target)
        problem(await http.get(target, headers=headers), "insufficient_credits")
        await fund(http, wallet, PRICE_UNITS)
        late = await http.get(target, headers=headers)
    assert late.status_code == 200
    assert "farebox-replayed" not in late.headers
    assert api.calls(target) == 1


async def test_the_upstream_hears_who_calls_and_nothing_secret(
    sqlite_gateway: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    async with sqlite_gateway.client() as http:
        await fund(http, wallet, PRICE_UNITS)
        signed = wallet.sign(
            "GET",
            sqlite_gateway.url + target,
            headers={"X-Wallet": "0xevil", "Farebox-Wallet": "0xevil", "X-Custom": "kept"},
        )
        assert (await http.get(target, headers=signed)).status_code == 200
        await fund(http, wallet, PRICE_UNITS)
        asked = await http.get(target)
        paid = {"PAYMENT-SIGNATURE": wallet.pay(offers(asked)[0])}
        assert (await http.get(target, headers=paid)).status_code == 200
    bound, payment = api.seen(target)
    assert bound.header(b"farebox-auth") == [b"bound"]
    assert bound.header(b"farebox-wallet") == [wallet.address.encode()]
    assert len(bound.header(b"farebox-account")) == 1
    assert bound.header(b"x-custom") == [b"kept"]
    assert bound.header(b"x-wallet") == []
    assert payment.header(b"farebox-auth") == [b"payment"]
    assert payment.header(b"farebox-payer") == [wallet.address.encode()]
    assert payment.header(b"farebox-wallet") == payment.header(b"farebox-account") == []
    for request in (bound, payment):
        for name in (b"signature", b"signature-input", b"payment-signature", b"x-payment"):
            assert request.header(name) == []


# --- identities that fail -------------------------------------------------------------------------


async def test_an_account_is_read_with_a_signature_only(
    sqlite_gateway: Gateway, wallet: Wallet, chain_session: Devnet
) -> None:
    paths = [f"/farebox/v1/credits/{what}" for what in ("balance", "transactions", "lots")]
    async with sqlite_gateway.client() as http:
        await buy(http, wallet)
        asked = await http.get("/v1/whatever")
        payment = wallet.pay(offers(asked)[0])
        for path in paths:
            told = problem(await http.get(path), "identity_required")
            assert told["status"] == 401
            paid = await http.get(path, headers={"PAYMENT-SIGNATURE": payment})
            problem(paid, "identity_required")  # a payer is not a login
            url = sqlite_gateway.url + path
            other = new_wallet(chain_session, 0)
            mine = (await http.get(path, headers=wallet.sign("GET", url))).json()
            theirs = (await http.get(path, headers=other.sign("GET", url))).json()
            assert json.dumps(mine) != json.dumps(theirs)
            assert "1000000" in json.dumps(mine)
            assert "1000000" not in json.dumps(theirs)
        assert sqlite_gateway.payments(wallet.address)[0]["state"] == "succeeded"
    assert len(sqlite_gateway.payments(wallet.address)) == 1


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        ({"url": "http://other.example"}, "signature_invalid"),
        (
            {"url": "http://other.example", "host": "other.example"},
            "signature_authority_mismatch",
        ),
        ({"now_s": -400}, "signature_expired"),
        ({"now_s": +400}, "signature_not_yet_valid"),
    ],
    ids=["other-authority", "other-host", "expired", "not-yet"],
)
async def test_a_signature_for_something_else(  # noqa: PLR0917  (fixtures)
    spoil: dict[str, object],
    code: str,
    sqlite_gateway: Gateway,
    api: Api,
    wallet: Wallet,
    target: str,
) -> None:
    url = str(spoil.get("url", sqlite_gateway.url)) + target
    now_s = int(time.time()) + int(str(spoil.get("now_s", 0)))
    async with sqlite_gateway.client() as http:
        await fund(http, wallet, PRICE_UNITS)
        headers = wallet.sign("GET", url, now_s=now_s)
        if "host" in spoil:  # it words the refusal, and lets nothing in
            headers["Host"] = str(spoil["host"])
        answer = await http.get(target, headers=headers)
    told = problem(answer, code)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Signature")
    assert "content-digest" in answer.headers["accept-signature"]
    assert told["next_actions"][0]["url"] == sqlite_gateway.url + target
    assert api.calls(target) == 0
    assert sqlite_gateway.balance(wallet.address) == (PRICE_UNITS, 0)


async def test_a_ceiling(sqlite_gateway: Gateway, api: Api, wallet: Wallet, target: str) -> None:
    url = sqlite_gateway.url + target
    async with sqlite_gateway.client() as http:
        await fund(http, wallet, PRICE_UNITS)
        low = wallet.sign("GET", url, headers={"Farebox-Max": "$0.009"})
        told = problem(await http.get(target, headers=low), "price_above_ceiling")
        assert (told["price_units"], told["ceiling_units"]) == (PRICE_UNITS, 9_000)
        uncovered = {**wallet.sign("GET", url), "Farebox-Max": "$0.01"}
        assert problem(await http.get(target, headers=uncovered), "ceiling_not_covered")
        odd = wallet.sign("GET", url, headers={"Farebox-Max": "a cent"})
        problem(await http.get(target, headers=odd), "invalid_request")
        assert api.calls(target) == 0
        assert sqlite_gateway.balance(wallet.address) == (PRICE_UNITS, 0)
        enough = wallet.sign("GET", url, headers={"Farebox-Max": "$0.01"})
        assert (await http.get(target, headers=enough)).status_code == 200


async def test_a_ceiling_that_nobody_signed_is_not_passed_over(
    sqlite_gateway: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    """Beside a payment or a challenge that was answered, no signature covers it."""
    low = {"Farebox-Max": "$0.009"}
    async with sqlite_gateway.client() as http:
        unsigned = await http.get(target, headers=low)  # asks what it costs, and says nothing
        paid = {"PAYMENT-SIGNATURE": wallet.pay(offers(unsigned)[0])}
        signed_in = sign_in(wallet, challenge(unsigned))
        for proof in (paid, signed_in):
            told = problem(await http.get(target, headers=proof | low), "ceiling_not_covered")
            assert told["next_actions"][0]["do"] == "change"
        assert sqlite_gateway.payments(wallet.address) == []
        assert api.calls(target) == 0
        assert (await http.get(target, headers=paid)).status_code == 200


async def test_an_idempotency_key_finds_the_call_again(
    gateway: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    """Signed anew under the same key: the stored answer. Not covered by the signature: refused."""
    url = gateway.url + target
    async with gateway.client() as http:
        await fund(http, wallet, 2 * PRICE_UNITS)
        keyed = {"Idempotency-Key": "order-7"}
        first = await http.get(target, headers=wallet.sign("GET", url, headers=keyed))
        again = await http.get(target, headers=wallet.sign("GET", url, headers=keyed))
        assert (first.status_code, again.status_code) == (200, 200)
        assert again.headers["farebox-replayed"] == "true"
        uncovered = {**wallet.sign("GET", url), **keyed}
        problem(await http.get(target, headers=uncovered), "idempotency_key_not_covered")
        other = wallet.sign("GET", url + "?x=1", headers=keyed)
        problem(await http.get(target + "?x=1", headers=other), "request_id_conflict")
    assert api.calls(target) == 1
    assert gateway.balance(wallet.address) == (PRICE_UNITS, 0)
