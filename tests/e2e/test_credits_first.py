"""Stock x402 clients spend credits: with a payment that is never sent, and with sign-in-with-x."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from gateway import hands
from gateway.ledger import NEVER
from tests.e2e.stage import CHEAP_UNITS, PRICE_UNITS, Api, Gateway
from tests.e2e.test_clients import PAYERS, pay
from tests.e2e.wallet import Wallet, buy, decode, encode, new_wallet, offers, outcome, problem

PURCHASE = "/farebox/v1/credits/purchase"


@pytest.mark.parametrize("client", PAYERS)
def test_five_cheap_calls_of_a_stock_client_move_one_cent(
    client: str, gateway: Gateway, api: Api, wallet: Wallet, cheap: str
) -> None:
    """Z27: nothing is registered with the client; it signs a payment for every call."""
    before, sent = gateway.received(), gateway.sent()
    wallet_before = gateway.net.balance_units(wallet.address)
    answers = pay(client, gateway.url + cheap, wallet.key, "GET", "", "5")
    assert [got["status"] for got in answers] == [200] * 5, answers
    assert api.calls(cheap) == 5
    assert gateway.received() == before + PRICE_UNITS
    assert gateway.net.balance_units(wallet.address) == wallet_before - PRICE_UNITS
    assert gateway.sent() == sent + 1
    assert gateway.transfers(wallet.address) == [
        ("mint", PRICE_UNITS, "x402"),
        *[("capture", CHEAP_UNITS, None)] * 5,
    ]
    assert gateway.balance(wallet.address) == (0, 0)
    paid_from = [got["headers"]["farebox-paid-from"] for got in answers]
    assert paid_from == ["settlement", *["credits"] * 4]
    balances = [got["headers"]["farebox-balance"] for got in answers]
    assert balances == ["0.8", "0.6", "0.4", "0.2", "0"]
    for got, balance in zip(answers[1:], balances[1:], strict=True):
        told = decode(got["headers"]["payment-response"])
        assert told == {
            "success": True,
            "transaction": "",
            "network": "eip155:84532",
            "payer": wallet.address,
            "amount": "0",
            "extra": {"paidFrom": "credits", "charged": "0.2", "balance": balance},
        }
        assert decode(got["headers"]["x-payment-response"]) == {
            "success": True,
            "transaction": "",
            "network": "base-sepolia",
            "payer": wallet.address,
        }


async def presented(
    http: httpx.AsyncClient, wallet: Wallet, target: str, **headers: str
) -> tuple[str, httpx.Response]:
    """One call of a stock client: asked, signed, sent."""
    header = wallet.pay(offers(await http.get(target))[0])
    return header, await http.get(target, headers={"PAYMENT-SIGNATURE": header, **headers})


async def test_the_402_says_so_before_anything_is_signed(
    sqlite_gateway: Gateway, cheap: str
) -> None:
    async with sqlite_gateway.client() as http:
        told = problem(await http.get(cheap), "payment_required")
    assert "are used first: then nothing is transferred" in told["detail"]


async def test_shown_again_it_is_answered_from_store_and_never_settled(
    gateway: Gateway, api: Api, wallet: Wallet, cheap: str
) -> None:
    async with gateway.client() as http:
        await presented(http, wallet, cheap)
        sent = gateway.sent()
        header, first = await presented(http, wallet, cheap)
        assert first.headers["farebox-paid-from"] == "credits"
        again = await http.get(cheap, headers={"PAYMENT-SIGNATURE": header})
        assert (again.status_code, again.content) == (200, first.content)
        assert again.headers["farebox-replayed"] == "true"
        assert again.headers["farebox-charged"] == "0"
        assert outcome(again)["transaction"] == ""
        # With another request, or once the credits are gone, it is not settled either.
        for target in (cheap + "x", PURCHASE):
            answer = await http.post(
                target, content=b'{"amount_usd": "1"}', headers={"PAYMENT-SIGNATURE": header}
            )
            assert answer.status_code == 409, answer.text
            problem(answer, "payment_already_used")
        while gateway.balance(wallet.address)[0] >= CHEAP_UNITS:
            await presented(http, wallet, cheap)
        last = await http.get(cheap, headers={"PAYMENT-SIGNATURE": header})
        assert last.headers["farebox-replayed"] == "true"
        assert (
            "payment_already_used"
            in (await http.get(cheap + "y", headers={"PAYMENT-SIGNATURE": header})).text
        )
    assert gateway.sent() == sent
    assert api.calls(cheap) == 5
    assert gateway.balance(wallet.address) == (0, 0)


async def test_a_stranger_who_shows_it_gets_the_receipt_only(
    sqlite_gateway: Gateway, wallet: Wallet, cheap: str
) -> None:
    async with sqlite_gateway.client() as http:
        await presented(http, wallet, cheap)
        header, _ = await presented(http, wallet, cheap)
        payload = decode(header)
        del payload["accepted"]["extra"]["offer"]
        shown = await http.get(cheap, headers={"PAYMENT-SIGNATURE": encode(payload)})
    assert shown.json() == {
        "payment": {"state": "unsent", "transaction": "", "amount_units": 0},
        "charged_units": CHEAP_UNITS,
        "state": "charged",
    }
    assert shown.headers["farebox-replayed"] == "true"


async def test_a_call_that_fails_is_not_told_as_paid(
    sqlite_gateway: Gateway, api: Api, wallet: Wallet
) -> None:
    async with sqlite_gateway.client() as http:
        await buy(http, wallet)
        sent = sqlite_gateway.sent()
        # Bought over x402 by this wallet: its own credits, as change is.
        header, failed = await presented(http, wallet, "/500")
        assert failed.status_code == 502, failed.text
        assert failed.headers["farebox-paid-from"] == "credits"
        assert "payment-response" not in failed.headers
        assert "x-payment-response" not in failed.headers
        again = await http.get("/500", headers={"PAYMENT-SIGNATURE": header})
        assert again.status_code == 502
        assert "payment-response" not in again.headers
    assert sqlite_gateway.sent() == sent
    assert sqlite_gateway.balance(wallet.address) == (1_000_000, 0)


async def test_who_prefers_to_settle_settles(
    sqlite_gateway: Gateway, wallet: Wallet, cheap: str
) -> None:
    async with sqlite_gateway.client() as http:
        await presented(http, wallet, cheap)
        before = sqlite_gateway.received()
        header, answer = await presented(http, wallet, cheap, **{"Farebox-Prefer": "settle"})
        assert answer.headers["farebox-paid-from"] == "settlement"
        assert sqlite_gateway.received() == before + PRICE_UNITS
        again = await http.get(cheap, headers={"PAYMENT-SIGNATURE": header})
        assert again.headers["farebox-paid-from"] == "settlement"
        assert again.headers["farebox-replayed"] == "true"


async def test_the_upstream_sees_a_payer_and_no_login(
    sqlite_gateway: Gateway, api: Api, wallet: Wallet, cheap: str
) -> None:
    async with sqlite_gateway.client() as http:
        await presented(http, wallet, cheap)
        await presented(http, wallet, cheap)
    for request in api.seen(cheap):
        fields = dict(request.headers)
        assert fields[b"farebox-auth"] == b"payment"
        assert fields[b"farebox-payer"] == wallet.address.encode()
        assert b"farebox-wallet" not in fields
        assert b"payment-signature" not in fields


async def test_the_same_payment_many_times_at_once_runs_once(
    gateway: Gateway, api: Api, wallet: Wallet, cheap: str
) -> None:
    async with gateway.client() as http:
        await buy(http, wallet)
        sent = gateway.sent()
        header = wallet.pay(offers(await http.get(cheap))[0])
        answers = await asyncio.gather(
            *(http.get(cheap, headers={"PAYMENT-SIGNATURE": header}) for _ in range(20))
        )
    assert {answer.status_code for answer in answers} <= {200, 409}
    assert any(answer.status_code == 200 for answer in answers)
    for answer in answers:
        if answer.status_code == 409:
            problem(answer, "request_in_progress")
    assert api.calls(cheap) == 1
    assert gateway.sent() == sent
    assert gateway.balance(wallet.address) == (1_000_000 - CHEAP_UNITS, 0)


async def spent_and_sent(gateway: Gateway, wallet: Wallet, cheap: str) -> tuple[str, str]:
    """A payment that was answered from credits: its header, and how a stranger sends it."""
    from chain.schemes import eip3009

    async with gateway.client() as http:
        await presented(http, wallet, cheap)
        header, answer = await presented(http, wallet, cheap)
        assert answer.headers["farebox-paid-from"] == "credits"
    authorization = eip3009.parse(decode(header)["payload"])
    return header, "0x" + eip3009.transfer_calldata(authorization).hex()


def minted(gateway: Gateway, wallet: Wallet) -> list[dict[str, Any]]:
    return gateway.rows(
        "SELECT l.source, l.minted_units, l.expires_ms, l.payer FROM lot l JOIN wallet w"
        " ON w.account_id = l.account_id WHERE w.address = $1 ORDER BY l.id",
        wallet.address,
    )


def as_credits(wallet: Wallet) -> list[dict[str, Any]]:
    """The lots: of the payment that was settled, and of the one that a stranger sent."""
    lot = {"minted_units": PRICE_UNITS, "expires_ms": NEVER, "payer": wallet.address}
    return [{"source": "x402", **lot}, {"source": "deposit", **lot}]


SENT = [("mint", PRICE_UNITS, "x402"), *[("capture", CHEAP_UNITS, None)] * 2,
        ("mint", PRICE_UNITS, "deposit")]  # fmt: skip


async def test_a_payment_spent_as_credits_and_sent_by_a_stranger_is_minted_once(
    gateway: Gateway, api: Api, wallet: Wallet, cheap: str
) -> None:
    """The authorization stays good on chain until it expires; the row never prevents a mint. The
    watcher sees it, and everybody who can tells of it, all at once."""
    header, data = await spent_and_sent(gateway, wallet, cheap)
    net, before = gateway.net, gateway.received()
    tx_hash = await asyncio.to_thread(net.send, net.operator.address, net.usdc, data)
    assert gateway.received() == before + PRICE_UNITS
    await asyncio.to_thread(net.mine, 40)
    claim = {"transaction_hash": tx_hash}
    async with gateway.client() as http:
        shown = {"PAYMENT-SIGNATURE": header}
        answers = await asyncio.gather(
            *(http.post(PURCHASE, json=claim) for _ in range(6)),
            *(http.get(cheap, headers=shown) for _ in range(6)),
            *(http.post(PURCHASE, json={"amount_usd": "1"}, headers=shown) for _ in range(3)),
        )
        assert [a.status_code for a in answers[6:]] == [200] * 6 + [409] * 3
        assert all(a.headers["farebox-replayed"] == "true" for a in answers[6:12])
        assert {a.status_code for a in answers[:6]} <= {200, 202}

        def credited() -> bool:
            return len(minted(gateway, wallet)) == 2

        await asyncio.to_thread(gateway.wait, credited, "the watcher")
        late = await http.post(PURCHASE, json=claim)
        assert late.json()["minted_units"] == PRICE_UNITS
    assert minted(gateway, wallet) == as_credits(wallet)
    assert gateway.transfers(wallet.address) == SENT
    assert gateway.balance(wallet.address) == (2 * PRICE_UNITS - 2 * CHEAP_UNITS, 0)
    assert api.calls(cheap) == 2


async def test_the_same_when_it_is_compared_before_it_is_seen(
    dialect: str, launch: Callable[..., Gateway], wallet: Wallet, cheap: str
) -> None:
    gateway = launch(dialect)
    _, data = await spent_and_sent(gateway, wallet, cheap)
    await asyncio.to_thread(gateway.stop)
    net = gateway.net
    await asyncio.to_thread(net.send, net.operator.address, net.usdc, data)

    def compare() -> list[tuple[str, int, bool]]:
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(hands.reconcile, gateway.settings()).result()
        every = [told for each in found for told in each["differences"]]
        return [(told["kind"], told["outside_units"], told["explained"]) for told in every]

    for _ in range(2):
        assert await asyncio.to_thread(compare) == [("new", PRICE_UNITS, True)]
    assert len(minted(gateway, wallet)) == 1
    gateway.start()  # here: a thread that ends takes its processes along
    await asyncio.to_thread(net.mine, 40)
    await asyncio.to_thread(gateway.wait, lambda: len(minted(gateway, wallet)) == 2, "the watcher")
    assert minted(gateway, wallet) == as_credits(wallet)
    assert gateway.transfers(wallet.address) == SENT
    assert await asyncio.to_thread(compare) == []


async def test_the_signature_is_nowhere(gateway: Gateway, wallet: Wallet, cheap: str) -> None:
    async with gateway.client() as http:
        await presented(http, wallet, cheap)
        header, answer = await presented(http, wallet, cheap)
        assert answer.headers["farebox-paid-from"] == "credits"
    signature = bytes.fromhex(decode(header)["payload"]["signature"][2:])
    tables = gateway.rows(
        "SELECT name FROM sqlite_master WHERE type = 'table'"
        if gateway.database.startswith("sqlite")
        else "SELECT tablename AS name FROM pg_tables WHERE schemaname = 'public'"
    )
    kept = json.dumps(
        [[dict(row) for row in gateway.rows(f"SELECT * FROM {t['name']}")] for t in tables],
        default=repr,
    )
    for form in (signature.hex(), repr(signature), header, signature[:32].hex()):
        assert form not in kept
        assert form not in gateway.log
    if gateway.database.startswith("sqlite"):
        files = [gateway.folder / f"farebox.db{end}" for end in ("", "-wal")]
        assert all(signature not in file.read_bytes() for file in files)


# --- sign-in-with-x -------------------------------------------------------------------------------

SIGNING = {"v2-js": "siwx_v2.mjs", "v2-py": "siwx_py.py"}


@pytest.mark.parametrize("client", SIGNING)
def test_a_pack_bought_once_is_spent_by_a_client_that_signs_in(
    client: str, gateway: Gateway, api: Api, wallet: Wallet, cheap: str
) -> None:
    """A $1 pack, then ten calls that pay nothing."""
    bought = pay(client, gateway.url + PURCHASE, wallet.key, "POST", '{"amount_usd": "1"}',
                 script=SIGNING[client])  # fmt: skip
    assert bought[0]["status"] == 200, bought
    received, sent = gateway.received(), gateway.sent()
    body = '{"q": 1}'
    answers = pay(client, gateway.url + cheap, wallet.key, "POST", body, "10",
                  script=SIGNING[client])  # fmt: skip
    assert [got["status"] for got in answers] == [200] * 10, answers
    assert [request.body for request in api.seen(cheap)] == [body.encode()] * 10
    assert (gateway.received(), gateway.sent()) == (received, sent)
    assert gateway.transfers(wallet.address) == [
        ("mint", 1_000_000, "x402"),
        *[("capture", CHEAP_UNITS, None)] * 10,
    ]
    for got in answers:
        assert got["headers"]["farebox-paid-from"] == "credits"
        assert "payment-response" not in got["headers"]
    fields = dict(api.seen(cheap)[0].headers)
    assert fields[b"farebox-auth"] == b"bound"
    assert fields[b"farebox-wallet"] == wallet.address.encode()
    assert b"sign-in-with-x" not in fields


@pytest.mark.parametrize("client", SIGNING)
def test_without_credits_a_client_that_signs_in_goes_on_to_pay(
    client: str, sqlite_gateway: Gateway, wallet: Wallet, target: str
) -> None:
    answers = pay(client, sqlite_gateway.url + target, wallet.key, "GET", "", "1",
                  script=SIGNING[client])  # fmt: skip
    assert [got["status"] for got in answers] == [200]
    assert answers[0]["headers"]["farebox-paid-from"] == "settlement"


def challenge(answer: httpx.Response) -> dict[str, Any]:
    found: dict[str, Any] = decode(answer.headers["payment-required"])["extensions"][
        "sign-in-with-x"
    ]
    return found


def sign_in(wallet: Wallet, extension: dict[str, Any], **changed: Any) -> dict[str, str]:
    """The header of a client that signs with eth_account."""
    from eth_account import Account
    from eth_account.messages import encode_defunct

    from wallet_auth import siwx

    account = Account.from_key(wallet.key)
    payload = {
        **extension["info"], "address": account.address, "chainId": "eip155:84532",
        "type": "eip191", **changed,
    }  # fmt: skip
    text = siwx.message(siwx.parse(encode({**payload, "signature": "0x00"}).encode()))
    signed = account.sign_message(encode_defunct(text=text))
    signature = "0x" + signed.signature.hex().removeprefix("0x")
    return {"SIGN-IN-WITH-X": encode({**payload, "signature": signature})}


async def test_a_proof_is_spent_once(
    gateway: Gateway, api: Api, wallet: Wallet, cheap: str
) -> None:
    async with gateway.client() as http:
        await buy(http, wallet)
        extension = challenge(await http.get(cheap))
        proof = sign_in(wallet, extension)
        first = await http.get(cheap, headers=proof)
        assert first.status_code == 200, first.text
        assert first.headers["farebox-request-id"] == extension["info"]["nonce"]
        again = await http.get(cheap, headers=proof)
        assert (again.status_code, again.content) == (200, first.content)
        assert again.headers["farebox-replayed"] == "true"
        assert gateway.balance(wallet.address) == (1_000_000 - CHEAP_UNITS, 0)
        assert api.calls(cheap) == 1
        at_once = sign_in(wallet, challenge(await http.get(cheap)))
        answers = await asyncio.gather(*(http.get(cheap, headers=at_once) for _ in range(20)))
    assert {answer.status_code for answer in answers} <= {200, 409}
    assert api.calls(cheap) == 2
    assert gateway.balance(wallet.address) == (1_000_000 - 2 * CHEAP_UNITS, 0)


async def test_a_proof_that_fails_is_answered_with_a_fresh_402(
    sqlite_gateway: Gateway, api: Api, wallet: Wallet, cheap: str
) -> None:
    async with sqlite_gateway.client() as http:
        await buy(http, wallet)
        proof = sign_in(wallet, challenge(await http.post(cheap, content=b"one")))
        changed = sign_in(wallet, challenge(await http.get(cheap)), statement="Give me all")
        for answer, code in (
            (await http.post(cheap, content=b"two", headers=proof), "invalid_siwx_nonce"),
            (await http.post(cheap + "x", content=b"one", headers=proof), "invalid_siwx_nonce"),
            (await http.get(cheap, headers=proof), "invalid_siwx_nonce"),
            (await http.get(cheap, headers=changed), "invalid_siwx_nonce"),
            (await http.get(cheap, headers={"SIGN-IN-WITH-X": "e30="}), "invalid_siwx_header"),
        ):
            assert answer.status_code == 402
            problem(answer, code)
            assert "payment-response" not in answer.headers
            assert len(offers(answer)) > 1
            assert challenge(answer)["info"]["nonce"]
        # The last one's own challenge is good for the call that was refused.
        fresh = sign_in(wallet, challenge(await http.post(cheap, content=b"two", headers=proof)))
        assert (await http.post(cheap, content=b"two", headers=fresh)).status_code == 200
    assert api.calls(cheap) == 1


async def test_a_long_body_is_not_bound(
    sqlite_gateway: Gateway, wallet: Wallet, cheap: str
) -> None:
    body = b"x" * 70_000
    async with sqlite_gateway.client() as http:
        await buy(http, wallet)
        proof = sign_in(wallet, challenge(await http.post(cheap, content=body)))
        assert (await http.post(cheap, content=body, headers=proof)).status_code == 200


async def test_two_identities_are_too_many(
    sqlite_gateway: Gateway, wallet: Wallet, cheap: str
) -> None:
    async with sqlite_gateway.client() as http:
        proof = sign_in(wallet, challenge(await http.get(cheap)))
        signed = wallet.sign("GET", sqlite_gateway.url + cheap)
        problem(await http.get(cheap, headers={**signed, **proof}), "identity_conflict")
        twice = [*proof.items(), *proof.items()]
        problem(await http.get(cheap, headers=twice), "identity_conflict")
        read = await http.get("/farebox/v1/credits/balance", headers=proof)
        assert read.status_code == 401
        problem(read, "invalid_siwx_nonce")


READS = ["credits/balance", "credits/transactions?limit=1", "credits/lots", "requests"]


@pytest.mark.parametrize("path", READS)
async def test_who_signs_in_reads_what_is_theirs(
    gateway: Gateway, wallet: Wallet, path: str
) -> None:
    """The 401 hands the challenge out in the form it has in a 402; a proof is good once."""
    url = f"/farebox/v1/{path}"
    other = new_wallet(gateway.net, 0)
    async with gateway.client() as http:
        await buy(http, wallet)
        told = problem(await http.get(url), "identity_required")
        extension = told["extensions"]["sign-in-with-x"]
        assert "Spend at most $0 " in extension["info"]["statement"]
        proof = sign_in(wallet, extension)
        answers = await asyncio.gather(*(http.get(url, headers=proof) for _ in range(6)))
        assert sorted(a.status_code for a in answers) == [200] + [401] * 5
        good = next(a for a in answers if a.status_code == 200)
        assert good.headers["cache-control"] == "no-store"
        again = await http.get(url, headers=proof)
        assert again.status_code == 401
        fresh = problem(again, "invalid_siwx_nonce")["extensions"]["sign-in-with-x"]
        # Who else signs that challenge reads what is theirs, and nothing of this wallet's.
        theirs = await http.get(url, headers=sign_in(other, fresh))
        assert theirs.status_code == 200
        assert wallet.address not in theirs.text and str(1_000_000) not in theirs.text
        mine = await http.get(url, headers=sign_in(wallet, fresh))
        assert mine.status_code == 200
        for elsewhere in READS:
            if elsewhere != path:
                there = await http.get(f"/farebox/v1/{elsewhere}", headers=sign_in(wallet, fresh))
                assert there.status_code == 401
                problem(there, "invalid_siwx_nonce")


async def test_to_read_is_all_that_signing_in_there_is_good_for(
    sqlite_gateway: Gateway, wallet: Wallet, cheap: str
) -> None:
    balance = "/farebox/v1/credits/balance"
    async with sqlite_gateway.client() as http:
        await buy(http, wallet)
        body = b'{"a": 1}'
        told = problem(await http.post(balance, content=body), "identity_required")
        extension = told["extensions"]["sign-in-with-x"]
        proof = sign_in(wallet, extension)
        for wrong in (
            await http.post(balance, content=b"{}", headers=proof),
            await http.get(balance, headers=proof),
            await http.post(balance, content=body, headers=sign_in(wallet, extension, nonce="1")),
        ):
            assert wrong.status_code == 401, wrong.text
            assert wrong.json()["code"].startswith("invalid_siwx_")
        assert (await http.get(cheap, headers=proof)).status_code == 402
        assert (await http.post(balance, content=body, headers=proof)).status_code == 200
        refund = "/farebox/v1/credits/refund"
        told = problem(await http.post(refund, json={"all": True}), "identity_required")
        assert "extensions" not in told
        refused = await http.post(refund, json={"all": True}, headers=proof)
        problem(refused, "identity_unsupported")


async def test_the_header_of_a_402_stays_small(sqlite_gateway: Gateway, cheap: str) -> None:
    async with sqlite_gateway.client() as http:
        answer = await http.get(cheap)
    assert len(answer.headers["payment-required"]) < 4_000
