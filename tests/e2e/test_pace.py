"""How often: limits of a route and of calls that end uncharged, and what answers say of them."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Iterator

import httpx
import pytest

from anvil.devnet import Devnet
from gateway.limits import PARALLEL
from tests.e2e.stage import CHEAP_UNITS, PRICE_UNITS, ROUTES, Api, Gate, Gateway
from tests.e2e.wallet import Wallet, buy, new_wallet, offers, problem
from tests.gateway.proxy import misbehave

Launch = Callable[..., Gateway]

LIMITED = ROUTES.replace(
    "[",
    """[
  { match = "GET /free/limited", price = "free", rate_limit = "3/h" },
  { match = "GET /limited/*", price = "$0.002", rate_limit = "3/h" },
  { match = "POST /limited/*", price = "$0.002", rate_limit = "1000/d" },""",
    1,
)
PROXY = {"trusted_proxies": ["127.0.0.1"]}


@pytest.fixture
def paced(launch: Launch) -> Iterator[Gateway]:
    """A gateway behind a proxy: tests say in X-Forwarded-For who they are."""
    yield launch(server={**PROXY, "uncharged_per_min": 5}, routes=LIMITED)


def said(answer: httpx.Response) -> tuple[str, int, int, int, int]:
    """Policy, quota, window, what remains, and until when (draft 11)."""
    policy = re.fullmatch(r'"(\w+)";q=(\d+);w=(\d+)', answer.headers["ratelimit-policy"])
    left = re.fullmatch(r'"(\w+)";r=(\d+);t=(\d+)', answer.headers["ratelimit"])
    assert policy and left and policy[1] == left[1], answer.headers
    assert 0 < int(left[3]) <= int(policy[3])
    return policy[1], int(policy[2]), int(policy[3]), int(left[2]), int(left[3])


def limited(answer: httpx.Response) -> None:
    told = problem(answer, "rate_limited")
    assert answer.status_code == 429 and told["retryable"] is True
    policy, _, _, remaining, reset_s = said(answer)
    assert remaining == 0 and policy in told["detail"]
    assert answer.headers["retry-after"] == str(reset_s)
    assert "payment-required" not in answer.headers


def from_address(address: str) -> dict[str, str]:
    return {"X-Forwarded-For": address}


# --- limits of a route ----------------------------------------------------------------------------


async def test_signed_requests_count_for_their_account(
    paced: Gateway, api: Api, wallet: Wallet, chain_session: Devnet
) -> None:
    other = new_wallet(chain_session)
    url = paced.url + "/limited/x"
    async with paced.client() as http:
        for each in (wallet, other):
            await buy(http, each)
        first = wallet.sign("GET", url)
        for remaining in (2, 1, 0):
            answer = await http.get(
                "/limited/x", headers=first if remaining == 2 else wallet.sign("GET", url)
            )
            assert answer.status_code == 200
            assert said(answer)[:4] == ("account", 3, 3600, remaining)
            assert answer.headers.get_list("ratelimit") == [answer.headers["ratelimit"]]
        nonce = "refused-and-not-burnt"
        refused = wallet.sign("GET", url, nonce=nonce, headers=from_address("1.2.3.4"))
        limited(await http.get("/limited/x", headers=refused))  # its address does not matter
        limited(await http.get("/limited/x", headers=first))  # a repeat is a request too
        # Another account, and nobody at all, have limits of their own.
        answer = await http.get("/limited/x", headers=other.sign("GET", url))
        assert answer.status_code == 200 and said(answer)[3] == 2
        answer = await http.get("/limited/x", headers=from_address("1.2.3.4"))
        assert answer.status_code == 402 and said(answer)[:4] == ("address", 3, 3600, 2)
        # And so have other routes, of which most have none.
        answer = await http.get("/v1/x", headers=wallet.sign("GET", paced.url + "/v1/x"))
        assert answer.status_code == 200 and "ratelimit" not in answer.headers
    assert api.calls("/limited/x") == 4
    assert paced.rows("SELECT 1 AS one FROM hold WHERE request_id = $1", nonce) == []
    captures = [e for e in paced.transfers(wallet.address) if e[0] != "mint"]
    assert captures == [("capture", CHEAP_UNITS, None)] * 3 + [("capture", PRICE_UNITS, None)]


async def test_others_count_for_their_address(paced: Gateway, api: Api, wallet: Wallet) -> None:
    here, there = from_address("1.2.3.4"), from_address("5.6.7.8")
    async with paced.client() as http:
        for _ in range(3):
            answer = await http.get("/limited/y", headers=here)
            assert offers(answer)
        limited(await http.get("/limited/y", headers=here))
        # A payment is no proof of who calls: nothing of it is looked at.
        header = wallet.pay(offers(answer)[0])
        sent = paced.sent()
        limited(await http.get("/limited/y", headers={**here, "PAYMENT-SIGNATURE": header}))
        limited(await http.get("/limited/y", headers={**here, "PAYMENT-SIGNATURE": "junk"}))
        assert paced.sent() == sent and paced.payments(wallet.address) == []
        paid = await http.get("/limited/y", headers={**there, "PAYMENT-SIGNATURE": header})
        assert paid.status_code == 200 and said(paid)[:4] == ("address", 3, 3600, 2)
    assert api.calls("/limited/y") == 1


async def test_a_proof_that_fails_counts_for_its_address(paced: Gateway, wallet: Wallet) -> None:
    """Else guessing would be free, and it must not use up the limit of whom it names."""
    url = paced.url + "/limited/z"
    here = from_address("1.2.3.4")
    async with paced.client() as http:
        for remaining in (2, 1, 0):
            signed = wallet.sign("GET", url, now_s=1_000_000)
            answer = await http.get("/limited/z", headers=signed | here)
            problem(answer, "signature_expired")
            assert said(answer)[:4] == ("address", 3, 3600, remaining)
        limited(
            await http.get("/limited/z", headers=wallet.sign("GET", url, now_s=1_000_000) | here)
        )
        limited(await http.get("/limited/z", headers=here))
        await buy(http, wallet)
        answer = await http.get("/limited/z", headers=wallet.sign("GET", url) | here)
        assert answer.status_code == 200 and said(answer)[3] == 2


async def test_a_signature_that_is_no_identity_counts_for_the_address(paced: Gateway) -> None:
    foreign = {
        "Signature-Input": 'sig1=("@method");keyid="some-key";created=1',
        "Signature": "sig1=:AAAA:",
    }
    async with paced.client() as http:
        for _ in range(3):
            answer = await http.get("/limited/f", headers=foreign | from_address("1.2.3.4"))
            assert answer.status_code == 402 and said(answer)[0] == "address"
        limited(await http.get("/limited/f", headers=foreign | from_address("1.2.3.4")))


async def test_a_free_route_counts_by_address(paced: Gateway, api: Api, wallet: Wallet) -> None:
    url = paced.url + "/free/limited"
    async with paced.client() as http:
        for remaining in (2, 1, 0):
            headers = wallet.sign("GET", url) | from_address("1.2.3.4")
            answer = await http.get("/free/limited", headers=headers)
            assert said(answer)[:4] == ("address", 3, 3600, remaining)
        limited(await http.get("/free/limited", headers=from_address("1.2.3.4")))
        assert said(await http.get("/free/limited", headers=from_address("1.2.3.5")))[3] == 2
    assert api.calls("/free/limited") == 4


async def test_the_page_of_a_402_says_it_once(paced: Gateway) -> None:
    async with paced.client() as http:
        page = await http.get("/limited/p", headers={"Accept": "text/html"})
    assert page.status_code == 402 and "text/html" in page.headers["content-type"]
    assert len(page.headers.get_list("ratelimit")) == 1
    assert said(page)[3] == 2


async def test_other_refusals_and_repeats_say_it_too(paced: Gateway, wallet: Wallet) -> None:
    url = paced.url + "/limited/r"
    async with paced.client() as http:
        await buy(http, wallet)
        headers = wallet.sign("POST", url, b"one")
        once = await http.post("/limited/r", content=b"one", headers=headers)
        again = await http.post("/limited/r", content=b"one", headers=headers)
        changed = await http.post("/limited/r", content=b"two", headers=headers)
    assert (once.status_code, again.headers["farebox-replayed"]) == (200, "true")
    problem(changed, "signature_digest_mismatch")
    # Stored with an answer it would be an old one.
    assert [said(answer)[3] for answer in (once, again, changed)] == [999, 998, 997]
    assert len(again.headers.get_list("ratelimit")) == 1


async def test_without_a_trusted_proxy_nobody_says_who_he_is(launch: Launch) -> None:
    gateway = launch(routes=LIMITED)
    async with gateway.client() as http:
        for i in range(3):
            assert (
                await http.get("/limited/q", headers=from_address(f"1.1.1.{i}"))
            ).status_code == 402
        limited(await http.get("/limited/q", headers=from_address("1.1.1.9")))


# --- calls that end uncharged ---------------------------------------------------------------------


async def answer_with_404(writer: misbehave.Writer, _gate: Gate) -> bool:
    writer.write(misbehave.answer(b"not here", status=b"404 Not Found"))
    return True


async def late_404(writer: misbehave.Writer, gate: Gate) -> bool:
    await gate.wait()
    return await answer_with_404(writer, gate)


async def test_uncharged_calls_of_an_account(
    paced: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    """Without it one cent drives the upstream for ever."""
    missing = f"/missing/{target[4:]}"
    api.behave(missing, answer_with_404)
    urls = ["/500", missing, "/close", "/garbage", "/stall"]
    async with paced.client() as http:
        await buy(http, wallet)
        answer = await http.get(target, headers=wallet.sign("GET", paced.url + target))
        assert answer.status_code == 200  # does not count
        first = wallet.sign("GET", paced.url + "/500")
        for i, path in enumerate(urls):
            headers = first if i == 0 else wallet.sign("GET", paced.url + path)
            answer = await http.get(path, headers=headers)
            assert answer.status_code in (404, 502, 504), (path, answer.text)
        begun, rows = api.begun(), len(paced.transfers(wallet.address))
        headers = wallet.sign("GET", paced.url + target)
        for path in (target, "/500", "/cheap/x"):
            signed = headers if path == target else wallet.sign("GET", paced.url + path)
            answer = await http.get(path, headers=signed)
            limited(answer)
            assert said(answer)[:3] == ("uncharged", 5, 60)
        # Nor does it help to pay: before anybody's money moves.
        offer = offers(await http.get(target))[0]
        sent = paced.sent()
        limited(await http.get(target, headers={"PAYMENT-SIGNATURE": wallet.pay(offer)}))
        assert paced.sent() == sent
    assert api.begun() == begun
    assert len(paced.transfers(wallet.address)) == rows
    assert paced.balance(wallet.address) == (1_000_000 - PRICE_UNITS, 0)


async def test_uncharged_calls_at_once(
    launch: Launch, api: Api, wallet: Wallet, target: str
) -> None:
    """They are counted before they end, and a repeat that is answered from store leaves nothing."""
    gateway = launch(server={"uncharged_per_min": 2}, routes=LIMITED)
    most = 2 * PARALLEL + 1  # one was charged
    missing = f"/missing/{target[4:]}"
    gate = api.behave(missing, late_404)
    async with gateway.client() as http:
        await buy(http, wallet)
        good = wallet.sign("GET", gateway.url + target)
        for _ in range(12):  # once charged, then answered from store
            assert (await http.get(target, headers=good)).status_code == 200
        signed = [wallet.sign("GET", gateway.url + missing) for _ in range(40)]
        calls = [asyncio.create_task(http.get(missing, headers=each)) for each in signed]
        for call in asyncio.as_completed(calls):
            limited(await call)
            if sum(each.done() for each in calls) == len(calls) - most:
                break
        gate.open()
        answers = await asyncio.gather(*calls)
    assert Counter(answer.status_code for answer in answers) == {404: most, 429: 40 - most}
    assert gate.arrived == most


async def test_uncharged_calls_of_an_address(
    paced: Gateway, api: Api, wallet: Wallet, chain_session: Devnet
) -> None:
    other = new_wallet(chain_session)
    url = paced.url + "/500"
    async with paced.client() as http:
        for each in (wallet, other):
            await buy(http, each)
        for i in range(5):
            who = (wallet, other)[i % 2]
            headers = who.sign("GET", url, headers=from_address("1.2.3.4"))
            assert (await http.get("/500", headers=headers)).status_code == 502
        for who in (wallet, other):
            headers = who.sign("GET", url, headers=from_address("1.2.3.4"))
            limited(await http.get("/500", headers=headers))
            headers = who.sign("GET", url, headers=from_address("4.3.2.1"))
            assert (await http.get("/500", headers=headers)).status_code == 502


async def test_a_shared_address_is_not_blamed(
    launch: Launch, wallet: Wallet, chain_session: Devnet
) -> None:
    """Behind a proxy that nobody named everybody has its address."""
    gateway = launch(server={"uncharged_per_min": 2}, routes=LIMITED)
    other = new_wallet(chain_session)
    url = gateway.url + "/500"
    async with gateway.client() as http:
        for each in (wallet, other):
            await buy(http, each)
        for _ in range(2):
            assert (await http.get("/500", headers=wallet.sign("GET", url))).status_code == 502
        limited(await http.get("/500", headers=wallet.sign("GET", url)))
        assert (await http.get("/500", headers=other.sign("GET", url))).status_code == 502


# --- signatures of contract wallets ---------------------------------------------------------------


async def test_wrong_signatures_of_contracts_are_not_asked_about_for_ever(
    paced: Gateway, api: Api, wallet: Wallet, cheap: str
) -> None:
    """Anybody can name a contract, and each time a node of the chain, which costs, is asked."""
    balance = "/farebox/v1/credits/balance"

    async def wrong(address: str, path: str) -> httpx.Response:
        made = wallet.sign("GET", paced.url + path, chain_id=84532)
        named = made["Signature-Input"].replace(wallet.address, "0x" + "c0" * 20)
        return await http.get(
            path, headers={**made, "Signature-Input": named, **from_address(address)}
        )

    async with paced.client() as http:
        for n in range(5):
            answer = await wrong("1.2.3.4", cheap if n % 2 else balance)
            assert problem(answer, "signature_invalid")["status"] == 401
        for path in (cheap, balance):
            answer = await wrong("1.2.3.4", path)
            assert problem(answer, "rate_limited")["status"] == 429
            assert 0 < int(answer.headers["retry-after"]) <= 60
            problem(await wrong("1.2.3.5", path), "signature_invalid")
        mine = wallet.sign("GET", paced.url + balance)  # a key's own is not asked about
        answer = await http.get(balance, headers={**mine, **from_address("1.2.3.4")})
        assert answer.status_code == 200
    assert api.calls(cheap) == 0
