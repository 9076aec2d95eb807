"""``Farebox-Credential``: what a bare payment is given spends the rest of it, and nothing else."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable

import httpx
import pytest

from tests.e2e.stage import CHEAP_UNITS, PRICE_UNITS, Api, Gate, Gateway
from tests.e2e.test_credits_first import challenge, sign_in
from tests.e2e.wallet import Wallet, buy, decode, encode, new_wallet, offers, problem
from tests.gateway.proxy import misbehave
from tests.gateway.proxy.misbehave import Writer
from wallet_auth.agent import WalletAuth

LOTS = "/farebox/v1/credits/lots"
PURCHASE = "/farebox/v1/credits/purchase"
NAME = "farebox-credential"
Launch = Callable[..., Gateway]


def bearer(credential: str, **more: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {credential}", **more}


async def paid(
    http: httpx.AsyncClient, wallet: Wallet, target: str, **headers: str
) -> tuple[str, httpx.Response]:
    header = wallet.pay(offers(await http.get(target))[0])
    return header, await http.get(target, headers={"PAYMENT-SIGNATURE": header, **headers})


async def test_it_spends_what_its_payment_left(
    gateway: Gateway, api: Api, wallet: Wallet, cheap: str
) -> None:
    async with gateway.client() as http:
        header, first = await paid(http, wallet, cheap)
        credential = first.headers[NAME]
        assert first.headers["cache-control"] == "no-store"
        assert credential.startswith("fbx_c_") and len(credential) == 49
        # Shown again, whoever does so, the payment is given nothing; nor was it stored.
        again = await http.get(cheap, headers={"PAYMENT-SIGNATURE": header})
        assert again.headers["farebox-replayed"] == "true" and NAME not in again.headers
        payload = decode(header)
        del payload["accepted"]["extra"]["offer"]
        stranger = await http.get(cheap, headers={"PAYMENT-SIGNATURE": encode(payload)})
        assert NAME not in stranger.headers
        sent = gateway.sent()
        for _ in range(4):
            answer = await http.get(cheap, headers=bearer(credential))
            assert answer.status_code == 200, answer.text
            assert answer.headers["farebox-paid-from"] == "credits"
            assert answer.headers["farebox-charged"] == "0.2"
            assert "private" in answer.headers["cache-control"]
            for hidden in ("farebox-balance", NAME, "payment-response"):
                assert hidden not in answer.headers
        short = await http.get(cheap, headers=bearer(credential))
        assert short.status_code == 402
        assert offers(short)
    assert gateway.sent() == sent
    assert gateway.balance(wallet.address) == (0, 0)
    assert api.calls(cheap) == 5
    fields = dict(api.seen(cheap)[-1].headers)
    assert fields[b"farebox-auth"] == b"payment"
    assert fields[b"farebox-payer"] == wallet.address.encode()
    assert b"authorization" not in fields and b"farebox-wallet" not in fields


async def test_it_spends_no_other_credits_of_the_wallet(
    gateway: Gateway, wallet: Wallet, cheap: str
) -> None:
    async with gateway.client() as http:
        _, first = await paid(http, wallet, cheap)
        credential = first.headers[NAME]
        before = await buy(http, wallet)  # a dollar more, which expires first
        pack = before.headers[NAME]
        assert pack != credential
        (lot,) = (await http.get(LOTS, headers=bearer(credential))).json()["lots"]
        assert lot["remaining_units"] == PRICE_UNITS - CHEAP_UNITS
        answers = await asyncio.gather(
            *(http.get(cheap, headers=bearer(credential)) for _ in range(12))
        )
        statuses = sorted(answer.status_code for answer in answers)
        assert statuses == [200] * 4 + [402] * 8
        assert gateway.balance(wallet.address) == (1_000_000, 0)
        told = problem(next(a for a in answers if a.status_code == 402), "insufficient_credits")
        assert told["credits"]["balance_units"] == 0
        assert (await http.get(cheap, headers=bearer(pack))).status_code == 200
        (lot,) = (await http.get(LOTS, headers=bearer(pack))).json()["lots"]
        assert lot["remaining_units"] == 1_000_000 - CHEAP_UNITS


async def test_it_opens_nothing_else(sqlite_gateway: Gateway, wallet: Wallet, cheap: str) -> None:
    async with sqlite_gateway.client() as http:
        credential = (await buy(http, wallet)).headers[NAME]
        for path in ("credits/balance", "credits/transactions", "requests"):
            answer = await http.get(f"/farebox/v1/{path}", headers=bearer(credential))
            problem(answer, "identity_required")
        refund = await http.post(
            "/farebox/v1/credits/refund", json={"all": True}, headers=bearer(credential)
        )
        problem(refund, "identity_required")
        for wrong in (credential[:-1], credential + "x", credential[:-1] + "!", "fbx_c_", "fbx_k"):
            code = "credential_invalid" if wrong.startswith("fbx_c_") else "identity_unsupported"
            problem(await http.get(cheap, headers=bearer(wrong)), code)
            problem(await http.get(LOTS, headers=bearer(wrong)), code)
        twice = [("Authorization", f"Bearer {credential}")] * 2
        problem(await http.get(cheap, headers=twice), "identity_conflict")
        signed = wallet.sign("GET", sqlite_gateway.url + cheap)
        problem(await http.get(cheap, headers=bearer(credential, **signed)), "identity_conflict")
        proof = sign_in(wallet, challenge(await http.get(cheap)))
        problem(await http.get(cheap, headers=bearer(credential, **proof)), "identity_conflict")
    assert sqlite_gateway.balance(wallet.address) == (1_000_000, 0)


async def test_a_payment_beside_it_is_of_the_same_wallet(
    sqlite_gateway: Gateway, wallet: Wallet, cheap: str
) -> None:
    other = new_wallet(sqlite_gateway.net)
    async with sqlite_gateway.client() as http:
        _, first = await paid(http, wallet, cheap)
        mine = bearer(first.headers[NAME])
        received = sqlite_gateway.received()
        _, refused = await paid(http, other, cheap, **mine)
        problem(refused, "payer_mismatch")
        assert sqlite_gateway.received() == received
        _, good = await paid(http, wallet, cheap, **mine, **{"Farebox-Prefer": "settle"})
        assert good.status_code == 200, good.text
        assert good.headers["farebox-paid-from"] == "settlement"
        assert NAME in good.headers


async def test_who_is_given_none(sqlite_gateway: Gateway, wallet: Wallet, cheap: str) -> None:
    agent = new_wallet(sqlite_gateway.net, 0)
    async with sqlite_gateway.client() as http:
        # With an identity; from credits; with nothing left of it.
        signed = wallet.sign("GET", sqlite_gateway.url + cheap)
        _, bound = await paid(http, wallet, cheap, **signed)
        assert (bound.status_code, NAME in bound.headers) == (200, False)
        _, credits_first = await paid(http, wallet, cheap)
        assert credits_first.headers["farebox-paid-from"] == "credits"
        assert NAME not in credits_first.headers
        _, whole = await paid(http, wallet, "/v1/" + cheap[7:], **{"Farebox-Prefer": "settle"})
        assert whole.headers["farebox-paid-from"] == "settlement"
        assert NAME not in whole.headers
        # For another wallet.
        from tests.e2e.test_sponsored import sign

        wanted = {"amount_usd": "1", "wallet_address": agent.address}
        header = wallet.pay(offers(await http.post(PURCHASE, json=wanted))[0])
        asked = await http.post(PURCHASE, json=wanted, headers={"PAYMENT-SIGNATURE": header})
        gift = {**wanted, "payer_signature": sign(wallet, asked.json()["message"])}
        given = await http.post(PURCHASE, json=gift, headers={"PAYMENT-SIGNATURE": header})
        assert (given.status_code, NAME in given.headers) == (200, False)


async def _fail(writer: Writer, _gate: Gate) -> bool:
    writer.write(b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n")
    return True


async def _long(writer: Writer, _gate: Gate) -> bool:
    writer.write(misbehave.answer(b"x" * 100_000))
    return True


@pytest.mark.parametrize(("behaviour", "status"), [(_fail, 502), (_long, 200)])
async def test_a_call_that_fails_and_a_long_answer_bring_it_too(  # noqa: PLR0917
    sqlite_gateway: Gateway,
    api: Api,
    wallet: Wallet,
    cheap: str,
    behaviour: Callable[[Writer, Gate], Awaitable[bool]],
    status: int,
) -> None:
    api.behave(cheap, behaviour)
    async with sqlite_gateway.client() as http:
        header, first = await paid(http, wallet, cheap)
        assert first.status_code == status, first.text
        assert first.headers.get_list("cache-control") == ["no-store"]
        again = await http.get(cheap, headers={"PAYMENT-SIGNATURE": header})
        assert again.headers["farebox-replayed"] == "true" and NAME not in again.headers
        (lot,) = (await http.get(LOTS, headers=bearer(first.headers[NAME]))).json()["lots"]
    assert lot["remaining_units"] == PRICE_UNITS - (CHEAP_UNITS if status == 200 else 0)


async def test_of_many_who_show_one_payment_at_once_one_gets_it(
    gateway: Gateway, api: Api, wallet: Wallet, cheap: str
) -> None:
    async with gateway.client() as http:
        header = wallet.pay(offers(await http.get(cheap))[0])
        answers = await asyncio.gather(
            *(http.get(cheap, headers={"PAYMENT-SIGNATURE": header}) for _ in range(12))
        )
    assert sum(NAME in answer.headers for answer in answers) == 1
    assert api.calls(cheap) == 1


async def test_a_key_makes_calls_repeatable(
    gateway: Gateway, api: Api, wallet: Wallet, cheap: str
) -> None:
    async with gateway.client() as http:
        credential = (await buy(http, wallet)).headers[NAME]
        left = gateway.balance(wallet.address)
        keyed = bearer(credential, **{"Idempotency-Key": "one"})
        answers = [await http.get(cheap, headers=keyed) for _ in range(3)]
        assert [a.headers.get("farebox-replayed") for a in answers] == [None, "true", "true"]
        assert len({a.content for a in answers}) == 1
        assert all("farebox-balance" not in a.headers for a in answers)
        conflict = await http.get(cheap + "x", headers=keyed)
        problem(conflict, "request_id_conflict")
    assert api.calls(cheap) == 1
    assert gateway.balance(wallet.address) == (left[0] - CHEAP_UNITS, 0)


async def test_only_its_hash_is_kept_and_its_hour_ends(
    gateway: Gateway, wallet: Wallet, cheap: str
) -> None:
    async with gateway.client() as http:
        _, first = await paid(http, wallet, cheap)
        credential = first.headers[NAME]
        digest = hashlib.sha256(credential.encode()).digest()
        (row,) = gateway.rows("SELECT * FROM credential WHERE payer = $1", wallet.address)
        assert bytes(row["digest"]) == digest
        answers = gateway.rows("SELECT headers, body FROM answer")
        assert credential not in json.dumps([dict(r) for r in answers], default=repr)
        assert credential not in gateway.log
        assert (await http.get(cheap, headers=bearer(credential))).status_code == 200
        await _expire(gateway, digest)
        problem(await http.get(cheap, headers=bearer(credential)), "credential_invalid")
        problem(await http.get(LOTS, headers=bearer(credential)), "credential_invalid")


async def _expire(gateway: Gateway, digest: bytes) -> None:
    from gateway.db import Database

    db = await Database.connect(gateway.settings().server.database)
    async with db.write() as tx:
        now_ms = await tx.now_ms()
        await tx.execute("UPDATE credential SET expires_ms = $1 WHERE digest = $2", now_ms, digest)
    await db.close()


async def test_the_client_of_this_project_spends_it(
    sqlite_gateway: Gateway, api: Api, wallet: Wallet, cheap: str
) -> None:
    told: list[str] = []
    auth = WalletAuth(wallet.key, signs=False, on_event=lambda kind, _: told.append(kind))
    url = sqlite_gateway.url
    async with httpx.AsyncClient(base_url=url, auth=auth, trust_env=False) as http:
        answers = [await http.get(cheap) for _ in range(6)]
        assert [a.status_code for a in answers] == [200] * 6, [a.text for a in answers]
    # The payment of a cent, four calls by its credential, and a payment again.
    assert told == ["paying", "paid", "paying", "paid"]
    shown = [a.request.headers.get("authorization", "")[:13] for a in answers]
    assert shown == ["", *["Bearer fbx_c_"] * 4, ""]
    assert sqlite_gateway.balance(wallet.address) == (PRICE_UNITS - CHEAP_UNITS, 0)
    assert api.calls(cheap) == 6


async def test_the_operator_can_do_without(launch: Launch, wallet: Wallet, cheap: str) -> None:
    gateway = launch("sqlite", running=False)
    gateway.chain_extra = "\n[credits]\ncredential_s = 0\n"
    gateway.start()
    async with gateway.client() as http:
        _, first = await paid(http, wallet, cheap)
        assert (first.status_code, NAME in first.headers) == (200, False)
    assert gateway.rows("SELECT * FROM credential") == []
