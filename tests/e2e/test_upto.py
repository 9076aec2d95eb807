"""Metered calls that are paid after the work (x402 ``upto``): whatever the payer, the chain and the
processes do, what was delivered is settled once and what was not is never paid."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from anvil.devnet import Devnet
from chain.schemes import permit2
from gateway import hands, hands_upto
from tests.e2e.chat import Chat
from tests.e2e.stage import Api, Gateway, new_account, transfers_to
from tests.e2e.test_clients import pay
from tests.e2e.test_metered import TERMS, used
from tests.e2e.wallet import Wallet, buy, decode, encode, new_wallet, offers, outcome, problem
from tests.fixtures_chain import NETWORK, FaultyNode
from tests.fixtures_permit2 import approve, plant, signed_upto, take_back
from tests.servers import eventually

Launch = Callable[..., Gateway]
MAX = 50_000
ROUTES = f"""[
  {{ match = "POST /chat/*", upto = true, price = {{ rule = "metered", {TERMS} }} }},
  {{ match = "POST /other/*", upto = true, price = {{ rule = "metered", {TERMS} }} }},
  {{ match = "POST /usual/*", price = {{ rule = "metered", {TERMS} }} }},
]"""
COST = used(3)
LOOKED = "SELECT value FROM meta WHERE key LIKE 'settlement_cost_%'"


@pytest.fixture(autouse=True)
def _planted(chain_session: Devnet) -> None:
    plant(chain_session)


@pytest.fixture
def payer(wallet: Wallet, chain_session: Devnet) -> Wallet:
    """A wallet that has approved Permit2."""
    approve(chain_session, wallet.account)
    return wallet


class Line:
    """A gateway, a chat behind it at a path of the test's own, and what is said to it."""

    def __init__(self, gateway: Gateway, http: httpx.AsyncClient, chat: Chat, path: str) -> None:
        self.gateway, self.http, self.chat, self.path = gateway, http, chat, path

    async def offer(self, path: str = "", **asked: Any) -> dict[str, Any]:
        (found,) = offers(await self.http.post(path or self.path, content=body(**asked)))
        return found

    async def paid(self, payer: Wallet, **asked: Any) -> dict[str, str]:
        """The header of a payment for a call."""
        return header(payer, await self.offer(**asked))

    async def ask(self, headers: dict[str, str], path: str = "", **asked: Any) -> httpx.Response:
        return await self.http.post(path or self.path, content=body(**asked), headers=headers)

    def calls(self, payer: Wallet) -> list[dict[str, Any]]:
        return self.gateway.rows(
            "SELECT * FROM upto_call WHERE payer = $1 ORDER BY at_ms", payer.address
        )

    def states(self, payer: Wallet) -> list[str]:
        return [row["state"] for row in self.calls(payer)]

    def settled(self, payer: Wallet, units: int = COST) -> None:
        """Paid once, minted once, charged once, nothing left."""
        moved = transfers_to(self.gateway.net, self.gateway.pay_to)
        assert [int(log["data"], 16) for log in moved] == [units]
        assert entries(self.gateway, payer) == [("mint", units, "upto"), ("capture", units, None)]
        assert self.gateway.balance(payer.address) == (0, 0)
        assert self.states(payer) == ["settled"]
        (row,) = self.gateway.payments(payer.address)
        assert (row["state"], row["amount_units"], row["door"]) == ("succeeded", units, "upto")

    def unpaid(self, payer: Wallet) -> None:
        """Nothing was sent and nothing charged."""
        assert transfers_to(self.gateway.net, self.gateway.pay_to) == []
        assert entries(self.gateway, payer) == []
        assert self.gateway.payments(payer.address) == []
        assert self.gateway.sent() == 0


def entries(gateway: Gateway, payer: Wallet) -> list[tuple[str, int, str | None]]:
    """Those that move something."""
    return [each for each in gateway.transfers(payer.address) if each[1]]


def body(words: int = 3, **asked: Any) -> bytes:
    return json.dumps({"model": "small", "words": words, **asked}).encode()


def header(
    payer: Wallet, offer: dict[str, Any], extensions: Any = None, **change: Any
) -> dict[str, str]:
    terms = {
        "amount": int(offer["amount"]),
        "to": offer["payTo"],
        "deadline": int(time.time()) + offer["maxTimeoutSeconds"],
    } | change
    facilitator = terms.pop("facilitator", offer["extra"]["facilitatorAddress"].lower())
    payload = signed_upto(payer.account, facilitator, **terms)
    paid = {"x402Version": 2, "payload": payload, "accepted": offer}
    if extensions is not None:
        paid["extensions"] = extensions
    return {"PAYMENT-SIGNATURE": encode(paid)}


@pytest.fixture
async def line(dialect: str, launch: Launch, api: Api, target: str) -> Any:
    gateway = launch(dialect, routes=ROUTES)
    path = f"/chat{target}"
    async with gateway.client() as http:
        yield Line(gateway, http, Chat(api, path), path)


@pytest.fixture
async def sqlite_line(launch: Launch, api: Api, target: str) -> Any:
    gateway = launch("sqlite", routes=ROUTES)
    path = f"/chat{target}"
    async with gateway.client() as http:
        yield Line(gateway, http, Chat(api, path), path)


# --- what is offered, and paid --------------------------------------------------------------------


async def test_it_is_offered_alone_and_only_where_it_was_chosen(sqlite_line: Line) -> None:
    line = sqlite_line
    answer = await line.http.post(line.path, content=body())
    (offer,) = offers(answer)
    assert (offer["scheme"], offer["amount"]) == ("upto", str(MAX))
    assert offer["extra"]["facilitatorAddress"].lower() == line.gateway.settler.address
    assert "paymentFlow" not in offer["extra"]
    told = answer.json()
    assert told["accepts"] == []  # there is none in x402 v1
    assert "used first" not in told["detail"]
    usual = offers(await line.http.post(line.path.replace("/chat/", "/usual/"), content=body()))
    assert {each["scheme"] for each in usual} == {"exact"}


@pytest.mark.parametrize("words", [0, 3, 40])
async def test_what_a_call_came_to_is_paid_once(line: Line, payer: Wallet, words: int) -> None:
    paid = await line.paid(payer, words=words)
    answer = await line.ask(paid, words=words)
    assert answer.status_code == 200, answer.text
    told = outcome(answer)
    assert (told["success"], told["amount"]) == (True, str(used(words)))
    (log,) = transfers_to(line.gateway.net, line.gateway.pay_to)
    assert log["transactionHash"] == told["transaction"]
    assert answer.headers["farebox-paid-from"] == "settlement"
    assert answer.headers["farebox-charged"] == f"{used(words) / 10_000:g}"
    assert answer.headers["farebox-balance"] == "0"
    line.settled(payer, used(words))
    again = await line.ask(paid, words=words)
    assert (again.content, again.headers["farebox-replayed"]) == (answer.content, "true")
    problem(await line.ask(paid, words=words + 1), "payment_already_used")
    other = await line.ask(paid, line.path.replace("/chat/", "/other/"), words=words)
    problem(other, "payment_already_used")
    assert len(line.chat.requests) == 1
    line.settled(payer, used(words))
    for each in in_thread(hands.reconcile, line.gateway.settings()):
        assert [row for row in each["differences"] if not row["explained"]] == [], each
    (request,) = line.chat.requests
    assert request.header(b"farebox-payer") == [payer.address.encode()]


async def test_one_call_after_the_other(line: Line, payer: Wallet) -> None:
    for words in (1, 2, 3):
        answer = await line.ask(await line.paid(payer, words=words), words=words)
        assert answer.status_code == 200, answer.text
    assert line.states(payer) == ["settled"] * 3
    moved = [int(log["data"], 16) for log in transfers_to(line.gateway.net, line.gateway.pay_to)]
    assert moved == [used(words) for words in (1, 2, 3)]


@pytest.mark.parametrize("client", ["pay_upto.mjs", "pay_upto.py"])
async def test_a_stock_client_pays_what_it_came_to(
    client: str, sqlite_line: Line, payer: Wallet
) -> None:
    line = sqlite_line
    asked = (line.gateway.url + line.path, payer.key, "POST", body().decode(), "2")
    first, second = await asyncio.to_thread(pay, "", *asked, script=client)
    for got in (first, second):
        assert got["status"] == 200, (got, line.gateway.log[-2000:])
        told = decode(got["headers"]["payment-response"])
        assert (told["success"], told["amount"]) == (True, str(COST))
    assert line.states(payer) == ["settled"] * 2


async def test_its_request_shows_the_charge(sqlite_line: Line, payer: Wallet) -> None:
    line = sqlite_line
    answer = await line.ask(await line.paid(payer))
    url = f"/farebox/v1/requests/{answer.headers['farebox-request-id']}"
    told = (await line.http.get(url, headers=payer.sign("GET", line.gateway.url + url))).json()
    assert (told["state"], told["charged_units"]) == ("charged", COST)
    assert sum(each["units"] for each in told["breakdown"]) == COST
    assert [call["reason"] for call in told["calls"]] == [None, "paid_after"]


async def test_credits_pay_here_too(sqlite_line: Line, payer: Wallet) -> None:
    """By a signed request: held and captured as everywhere, and no transfer."""
    line = sqlite_line
    await buy(line.http, payer)
    kind = {"content-type": "application/json"}
    signed = payer.sign("POST", line.gateway.url + line.path, body(), headers=kind)
    answer = await line.ask(signed)
    assert answer.headers["farebox-charged"] == f"{COST / 10_000:g}"
    assert line.gateway.balance(payer.address) == (1_000_000 - COST, 0)
    assert line.calls(payer) == []


# --- what costs nothing ---------------------------------------------------------------------------


async def test_an_upstream_that_fails_costs_nothing(line: Line, payer: Wallet) -> None:
    paid = await line.paid(payer, break_at=1)
    answer = await line.ask(paid, break_at=1)
    problem(answer, "upstream_error")
    assert "payment-response" not in answer.headers
    again = await line.ask(paid, break_at=1)
    assert (again.status_code, again.headers["farebox-replayed"]) == (answer.status_code, "true")
    assert len(line.chat.requests) == 1
    assert line.states(payer) == ["nothing"]
    line.unpaid(payer)
    assert (await line.ask(await line.paid(payer))).status_code == 200  # and nothing is left of it


async def test_what_came_to_nothing_is_no_transaction(
    dialect: str, launch: Launch, api: Api, target: str, payer: Wallet
) -> None:
    free = 'max = "$0.05", when_unknown = "min", rates = { tokens_out = "$100 / 1M" }'
    routes = f'[{{ match = "POST /*", upto = true, price = {{ rule = "metered", {free} }} }}]'
    gateway = launch(dialect, routes=routes)
    async with gateway.client() as http:
        line = Line(gateway, http, Chat(api, target), target)
        paid = await line.paid(payer, words=0)
        for _ in range(2):
            answer = await line.ask(paid, words=0)
            assert answer.status_code == 200, answer.text
            told = outcome(answer)
            assert (told["success"], told["transaction"], told["amount"]) == (True, "", "0")
        assert len(line.chat.requests) == 1
        assert line.states(payer) == ["nothing"]
        line.unpaid(payer)


# --- what is refused ------------------------------------------------------------------------------


async def test_payments_that_do_not_answer_the_offer_are_refused(
    sqlite_line: Line, payer: Wallet
) -> None:
    line = sqlite_line
    offer = await line.offer()
    late = int(time.time()) + 300
    elsewhere = {"extra": {**offer["extra"], "facilitatorAddress": payer.address}}
    for paid, code in (
        (header(payer, offer, amount=MAX - 1), "permit2_amount_mismatch"),
        (header(payer, offer, to="0x" + "0b" * 20), "invalid_permit2_recipient_mismatch"),
        (header(payer, offer, facilitator=payer.address), "upto_facilitator_mismatch"),
        (header(payer, offer | elsewhere), "upto_facilitator_mismatch"),
        (header(payer, offer, spender=permit2.EXACT_PROXY), "invalid_permit2_spender"),
        (header(payer, offer, deadline=late), "permit2_deadline_expired"),
        (header(payer, offer | {"amount": "1"}, amount=1), "invalid_payment_requirements"),
        (header(payer, offer | {"maxTimeoutSeconds": 9}), "invalid_payment_requirements"),
        (header(payer, await line.offer(words=9)), None),  # the price does not hang on the body
    ):
        answer = await line.ask(paid)
        if code is None:
            assert answer.status_code == 200, answer.text
            continue
        told = problem(answer, code)
        assert told["status"] == 402
        assert [each["scheme"] for each in offers(answer)] == ["upto"]
        assert outcome(answer)["errorReason"] == code
    assert len(line.chat.requests) == 1


async def test_other_routes_do_not_take_it(sqlite_line: Line, payer: Wallet) -> None:
    line = sqlite_line
    paid = await line.paid(payer)
    usual = await line.ask(paid, line.path.replace("/chat/", "/usual/"))
    problem(usual, "invalid_scheme")
    bought = await line.ask(paid, "/farebox/v1/credits/purchase")
    assert bought.status_code in (400, 402), bought.text
    exact = payer.pay(offers(await line.http.post("/usual/x", content=body()))[0])
    problem(await line.ask({"PAYMENT-SIGNATURE": exact}), "invalid_payment_requirements")
    line.unpaid(payer)


async def test_it_has_to_be_covered_before_the_work(
    sqlite_line: Line, wallet: Wallet, chain_session: Devnet
) -> None:
    line = sqlite_line
    paid = await line.paid(wallet)
    told = problem(await line.ask(paid), "PERMIT2_ALLOWANCE_REQUIRED")
    assert told["amount"] == str(MAX)
    approve(chain_session, wallet.account)
    poor = new_wallet(chain_session, units=MAX - 1)
    approve(chain_session, poor.account)
    problem(await line.ask(await line.paid(poor)), "permit2_insufficient_balance")
    assert line.chat.requests == []
    assert (await line.ask(paid)).status_code == 200  # nothing of it was taken


async def test_a_wallet_has_one_at_a_time(line: Line, payer: Wallet) -> None:
    first = asyncio.create_task(
        line.ask(await line.paid(payer, stream=True, gate_at=1), stream=True, gate_at=1)
    )
    await eventually(lambda: len(line.chat.requests) == 1, "the call")
    told = problem(await line.ask(await line.paid(payer)), "upto_in_progress")
    assert told["payment_id"] == line.calls(payer)[0]["payment_id"]
    assert len(line.chat.requests) == 1
    line.chat.gate.open()
    assert (await first).status_code == 200
    line.gateway.wait(lambda: line.states(payer) == ["settled"], "the settlement")
    line.settled(payer)
    assert (await line.ask(await line.paid(payer))).status_code == 200


async def test_all_together_count_into_the_exposure(
    launch: Launch, api: Api, target: str, payer: Wallet, chain_session: Devnet
) -> None:
    gateway = launch("sqlite", routes=ROUTES, running=False)
    gateway.chain_extra = 'exposure_limit = "$0.06"'
    gateway.start()
    second = new_wallet(chain_session)
    approve(chain_session, second.account)
    path = f"/chat{target}"
    async with gateway.client() as http:
        line = Line(gateway, http, Chat(api, path), path)
        asked = {"stream": True, "gate_at": 1}
        first = asyncio.create_task(line.ask(await line.paid(payer, **asked), **asked))
        await eventually(lambda: len(line.chat.requests) == 1, "the call")
        problem(await line.ask(await line.paid(second)), "settlement_paused")
        assert line.calls(second) == []
        line.chat.gate.open()
        assert (await first).status_code == 200


async def test_many_of_one_payment_are_one_call(
    launch: Launch, api: Api, target: str, payer: Wallet
) -> None:
    """At once, on two nodes."""
    one = launch("postgres", routes=ROUTES)
    two = launch("postgres", routes=ROUTES, beside=one)
    path = f"/chat{target}"
    async with one.client() as first, two.client() as second:
        chat = Chat(api, path)
        lines = [Line(one, first, chat, path), Line(two, second, chat, path)]
        paid = await lines[0].paid(payer)
        told = await asyncio.gather(*(line.ask(paid) for line in lines * 3))
        assert {each.status_code for each in told} <= {200, 409}, [each.text for each in told]
        one.wait(lambda: lines[0].states(payer) == ["settled"], "the settlement")
        assert (await lines[1].ask(paid)).status_code == 200
    assert len(chat.requests) == 1
    lines[0].settled(payer)


# --- who does not pay -----------------------------------------------------------------------------


def empty(net: Devnet, wallet: Wallet) -> int:
    """The payer moves its money away, to somebody who gives it back; how much."""
    units = net.balance_units(wallet.address)
    net.rpc("anvil_setBalance", wallet.address, hex(10**18))
    net.rpc("anvil_impersonateAccount", wallet.address)
    net.transfer(wallet.address, "0x" + "0d" * 20, units)
    net.rpc("anvil_stopImpersonatingAccount", wallet.address)
    return units


async def gated(line: Line, payer: Wallet, **asked: Any) -> tuple[Any, dict[str, str]]:
    """A call that is under way in the upstream, and its payment."""
    asked = {"stream": True, "gate_at": 1, **asked}
    paid = await line.paid(payer, **asked)
    task = asyncio.create_task(line.ask(paid, **asked))
    await eventually(lambda: len(line.chat.requests) == 1, "the call")
    return task, paid


async def test_who_empties_the_wallet_meanwhile_gets_no_answer_until_it_pays(
    line: Line, payer: Wallet, chain_session: Devnet
) -> None:
    paid = await line.paid(payer)
    line.chat.before = lambda: empty(chain_session, payer)
    answer = await line.ask(paid)
    told = problem(answer, "upto_not_settled")
    assert told["units"] == COST
    assert outcome(answer)["success"] is False
    assert "payment-required" not in answer.headers
    assert line.states(payer) == ["due"]
    line.unpaid(payer)
    problem(await line.ask(paid), "upto_not_settled")
    chain_session.transfer(chain_session.accounts[0].address, payer.address, MAX)
    line.gateway.wait(lambda: line.states(payer) == ["settled"], "the settlement")
    whole = await line.ask(paid)
    assert (whole.status_code, whole.headers["farebox-replayed"]) == (200, "true")
    assert outcome(whole)["amount"] == str(COST)
    assert len(line.chat.requests) == 1
    line.settled(payer)


async def test_a_signature_beside_it_does_not_get_the_answer_unpaid(
    line: Line, payer: Wallet, chain_session: Devnet
) -> None:
    """Nor does another payment under the same identifier: what is kept is kept for who pays."""
    kind = {"content-type": "application/json"}
    name = {"payment-identifier": {"info": {"id": "a-name-of-the-payers-own"}}}
    paid = header(payer, await line.offer(), extensions=name)
    signed = payer.sign("POST", line.gateway.url + line.path, body(), headers=kind)
    line.chat.before = lambda: empty(chain_session, payer)
    problem(await line.ask({**signed, **paid}), "upto_not_settled")
    line.chat.before = lambda: None
    for headers in (signed, header(payer, await line.offer(), extensions=name)):
        answer = await line.ask(headers)
        assert "word" not in answer.text, answer.text
    assert len(line.chat.requests) == 1
    line.unpaid(payer)
    chain_session.transfer(chain_session.accounts[0].address, payer.address, MAX)
    line.gateway.wait(lambda: line.states(payer) == ["settled"], "the settlement")
    whole = await line.ask({**signed, **paid})
    assert (whole.status_code, whole.headers["farebox-replayed"]) == (200, "true")
    assert "word" in whole.text
    assert len(line.chat.requests) == 1
    line.settled(payer)


async def test_a_stream_is_settled_after_its_tail(line: Line, payer: Wallet) -> None:
    asked = {"stream": True, "words": 5}
    answer = await line.ask(await line.paid(payer, **asked), **asked)
    assert answer.status_code == 200
    assert answer.headers["farebox-held"] == "5"
    assert answer.text.endswith("[DONE]\n\n")
    line.gateway.wait(lambda: line.states(payer) == ["settled"], "the settlement")
    line.settled(payer, used(5))


async def test_a_stream_is_cut_at_the_maximum(sqlite_line: Line, payer: Wallet) -> None:
    line = sqlite_line
    path = line.path
    words = 2 * MAX // 100
    asked = {"stream": True, "words": words}
    answer = await line.ask(await line.paid(payer, **asked), **asked)
    assert answer.status_code == 200
    line.gateway.wait(lambda: line.states(payer) == ["settled"], "the settlement")
    (moved,) = transfers_to(line.gateway.net, line.gateway.pay_to)
    assert int(moved["data"], 16) == MAX, path


async def test_an_offer_of_before_is_the_most_where_the_price_has_risen(
    sqlite_line: Line, payer: Wallet
) -> None:
    line, words = sqlite_line, 2 * MAX // 100
    paid = await line.paid(payer, words=words)
    line.gateway.kill()
    line.gateway.routes = ROUTES.replace('max = "$0.05"', 'max = "$0.50"')
    line.gateway.start()
    answer = await line.ask(paid, words=words)
    assert answer.status_code == 200, answer.text
    line.settled(payer, MAX)
    (raised,) = offers(await line.http.post(line.path, content=body(words=words)))
    assert int(raised["amount"]) == 10 * MAX


async def test_what_can_never_be_settled_is_seen_and_ends_it_for_that_wallet(
    dialect: str, launch: Launch, api: Api, target: str, chain_session: Devnet
) -> None:
    """On a chain of its own, whose time is moved on."""
    net = chain_session
    payer = new_wallet(net)
    approve(net, payer.account)
    gateway = launch(dialect, routes=ROUTES)
    path = f"/chat{target}"
    async with gateway.client() as http:
        line = Line(gateway, http, Chat(api, path), path)
        task, paid = await gated(line, payer)
        take_back(net, decode(paid["PAYMENT-SIGNATURE"])["payload"])
        line.chat.gate.open()
        assert (await task).status_code == 200  # a stream is out before it is paid
        gateway.wait(lambda: line.states(payer) == ["due"], "the end of the call")
        # Its time is over, as the rows tell it: the chain of all these tests is not moved on.
        gateway.change(
            "UPDATE upto_call SET valid_before_s = 1, look_ms = 0 WHERE payer = $1", payer.address
        )
        gateway.wait(lambda: line.states(payer) == ["unsettled"], "it to be given up")
        told = problem(await line.ask(await line.paid(payer)), "upto_unsettled")
        assert (told["status"], told["units"]) == (403, COST)
        assert len(line.chat.requests) == 1
        line.unpaid(payer)
        problem(await line.ask(paid, stream=True, gate_at=1), "upto_unsettled")
        (listed,) = in_thread(hands_upto.unpaid, gateway.settings(), payer.address)
        assert (listed["state"], listed["units"], listed["usd"]) == ("unsettled", COST, "$0.0018")
        asked = (gateway.settings(), listed["payment_id"])
        told = in_thread(hands_upto.forgive, *asked, why="a test")
        assert told["state"] == "forgiven"
        assert "a test" in told["why"]
        with pytest.raises(hands.Refused):
            in_thread(hands_upto.forgive, *asked, why="twice")
        assert (await line.ask(await line.paid(payer))).status_code == 200


def in_thread(work: Callable[..., Any], *given: Any, **more: Any) -> Any:
    """What brings an event loop of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work, *given, **more).result()


async def test_a_frozen_account_gets_none(sqlite_line: Line, payer: Wallet) -> None:
    line = sqlite_line
    await buy(line.http, payer)
    line.gateway.freeze(payer.address)
    problem(await line.ask(await line.paid(payer)), "account_frozen")
    assert line.chat.requests == line.calls(payer) == []


async def test_a_permission_for_ever_is_not_taken(sqlite_line: Line, payer: Wallet) -> None:
    """It would be at risk for ever."""
    line = sqlite_line
    late = header(payer, await line.offer(), deadline=int(time.time()) + 10**6)
    problem(await line.ask(late), "invalid_payment_requirements")
    assert line.chat.requests == line.calls(payer) == []


async def test_nothing_is_done_that_nobody_could_settle(
    launch: Launch, api: Api, target: str, payer: Wallet
) -> None:
    """There is no gas money for a single one."""
    gateway = launch("sqlite", routes=ROUTES, running=False)
    gateway.chain_extra = 'gas_per_hour = "0.000000001"'
    gateway.start()
    gateway.wait(lambda: gateway.rows(LOOKED), "a look at the price of gas")
    path = f"/chat{target}"
    async with gateway.client() as http:
        line = Line(gateway, http, Chat(api, path), path)
        problem(await line.ask(await line.paid(payer)), "settlement_paused")
        assert line.chat.requests == line.calls(payer) == []


async def test_nothing_is_done_that_is_too_dear_to_settle(
    launch: Launch, api: Api, target: str, payer: Wallet
) -> None:
    gateway = launch("sqlite", routes=ROUTES, running=False)
    gateway.chain_extra = "max_fee_gwei = 1"
    gateway.start()
    path = f"/chat{target}"
    net = gateway.net
    kept = net.rpc("eth_getBlockByNumber", "latest", False)["baseFeePerGas"]
    async with gateway.client() as http:
        line = Line(gateway, http, Chat(api, path), path)
        paid = await line.paid(payer)
        try:
            net.rpc("anvil_setNextBlockBaseFeePerGas", hex(2 * 10**9))
            net.mine()
            problem(await line.ask(paid), "settlement_paused")
        finally:
            net.rpc("anvil_setNextBlockBaseFeePerGas", kept)
            net.mine()
        assert line.chat.requests == line.calls(payer) == []


async def test_what_is_done_is_settled_though_the_gas_of_the_hour_is_spent(
    dialect: str, launch: Launch, api: Api, target: str, payer: Wallet
) -> None:
    """It was spent while the upstream worked. The next call is not begun."""
    gateway = launch(dialect, routes=ROUTES, running=False)
    gateway.chain_extra = 'gas_per_hour = "0.01"'
    gateway.start()
    path = f"/chat{target}"

    def spend() -> None:
        gateway.change(
            "INSERT INTO chain_nonce (network, sender, nonce, payment_id, at_ms, cost_gwei)"
            " VALUES ($1, $2, 0, 'pay_other', $3, 20000000)",
            NETWORK.caip2,
            "0x" + "0f" * 20,
            int(time.time() * 1_000),
        )

    async with gateway.client() as http:
        line = Line(gateway, http, Chat(api, path), path)
        line.chat.before = spend
        answer = await line.ask(await line.paid(payer))
        assert answer.status_code == 200, answer.text
        line.settled(payer)
        problem(await line.ask(await line.paid(payer)), "settlement_paused")
        assert len(line.chat.requests) == 1
        line.settled(payer)


async def test_it_is_sent_by_the_gas_account_it_names(
    launch: Launch, api: Api, target: str, payer: Wallet
) -> None:
    """Although another one has less to do and more to spend."""
    gateway = launch("sqlite", routes=ROUTES, running=False)
    other = new_account()
    gateway.net.rpc("anvil_setBalance", other.address, hex(10**18))
    (gateway.folder / "more.keys").write_text(other.private_key)
    gateway.chain_extra = 'settler_keys_file = "more.keys"'
    gateway.start()
    first = gateway.settler.address
    gateway.wait(
        lambda: gateway.rows("SELECT * FROM gas_account WHERE balance_gwei IS NOT NULL")[1:],
        "a look at both",
    )
    path = f"/chat{target}"
    async with gateway.client() as http:
        line = Line(gateway, http, Chat(api, path), path)
        line.chat.before = lambda: gateway.change(
            "UPDATE gas_account SET balance_gwei = 2 * need_gwei WHERE sender = $1", first
        )
        answer = await line.ask(await line.paid(payer))
        assert answer.status_code == 200, answer.text
        line.settled(payer)
    sent = gateway.rows("SELECT sender FROM chain_tx")
    assert [row["sender"] for row in sent] == [first]


async def test_an_account_that_is_frozen_meanwhile_pays_for_what_was_done(
    line: Line, payer: Wallet
) -> None:
    line.chat.before = lambda: line.gateway.freeze(payer.address)
    answer = await line.ask(await line.paid(payer))
    assert answer.status_code == 200, answer.text
    line.settled(payer)
    problem(await line.ask(await line.paid(payer)), "account_frozen")
    assert len(line.chat.requests) == 1


async def test_what_has_run_out_is_a_loss_though_nobody_could_have_sent_it(
    line: Line, payer: Wallet
) -> None:
    """Its gas account is empty, so the chain is not even asked about it."""
    gateway = line.gateway

    def stop() -> None:
        gateway.net.rpc("anvil_setBalance", gateway.settler.address, "0x0")
        gateway.change("UPDATE gas_account SET balance_gwei = 0, need_gwei = 1")

    line.chat.before = stop
    paid = await line.paid(payer)
    problem(await line.ask(paid), "upto_not_settled")
    assert line.states(payer) == ["due"]
    gateway.change(
        "UPDATE upto_call SET valid_before_s = 1, look_ms = 0 WHERE payer = $1", payer.address
    )
    gateway.wait(lambda: line.states(payer) == ["unsettled"], "it to be given up")
    line.unpaid(payer)
    gateway.net.rpc("anvil_setBalance", gateway.settler.address, hex(10**18))
    gateway.change("UPDATE gas_account SET balance_gwei = 1000000000")
    problem(await line.ask(await line.paid(payer)), "upto_unsettled")


# --- processes that die ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Site:
    """A gateway that can be killed, behind a node that can be made to fail."""

    gateway: Gateway
    faulty: FaultyNode
    chat: Chat
    path: str

    @asynccontextmanager
    async def line(self) -> AsyncIterator[Line]:
        async with self.gateway.client() as http:
            yield Line(self.gateway, http, self.chat, self.path)


@pytest.fixture
def site(dialect: str, launch: Launch, api: Api, target: str, faulty: FaultyNode) -> Site:
    server = {"settle_wait_s": 1, "hold_lease_s": 1}
    gateway = launch(dialect, routes=ROUTES, rpc_url=faulty.url, server=server)
    path = f"/chat{target}"
    return Site(gateway, faulty, Chat(api, path), path)


async def test_killed_while_the_upstream_works(site: Site, payer: Wallet) -> None:
    """Nothing was delivered: nothing is paid, and the wallet is free again."""
    async with site.line() as line:
        task, paid = await gated(line, payer)
        site.gateway.kill()
        with pytest.raises(httpx.TransportError):
            await task
    site.chat.gate.open()
    site.gateway.start()
    async with site.line() as line:
        site.gateway.wait(lambda: line.states(payer) == ["nothing"], "the call to be let go")
        problem(await line.ask(paid, stream=True, gate_at=1), "outcome_unknown")
        line.unpaid(payer)
        assert (await line.ask(await line.paid(payer))).status_code == 200


@pytest.mark.parametrize(
    ("at", "state"), [("eth_estimateGas", "due"), ("eth_sendRawTransaction", "sent")]
)
async def test_killed_after_the_work_before_and_after_it_is_signed(
    at: str, state: str, site: Site, payer: Wallet
) -> None:
    async with site.line() as line:
        paid = await line.paid(payer)
        site.chat.before = lambda: site.faulty.fault(at, "hang")
        count = site.faulty.asked.count(at)
        task = asyncio.create_task(line.ask(paid))
        await eventually(lambda: site.faulty.asked.count(at) > count, "the settlement")
        site.gateway.kill()
        with pytest.raises(httpx.TransportError):
            await task
        assert line.states(payer) == [state]
    assert entries(site.gateway, payer) == []
    assert site.gateway.broken() == {}
    await settled_after_a_start(site, payer, paid)


async def settled_after_a_start(site: Site, payer: Wallet, paid: dict[str, str]) -> None:
    site.faulty.faults.clear()
    site.gateway.start()
    async with site.line() as line:
        site.gateway.wait(lambda: line.states(payer) == ["settled"], "the settlement")
        again = await line.ask(paid)
        assert (again.status_code, again.headers["farebox-replayed"]) == (200, "true")
        assert len(site.chat.requests) == 1
        line.settled(payer)


async def test_killed_with_the_transaction_in_a_block(site: Site, payer: Wallet) -> None:
    """It was paid, and nobody here knows yet."""
    gateway = site.gateway
    async with site.line() as line:
        paid = await line.paid(payer)
        site.faulty.fault("eth_getTransactionReceipt", "hang")
        task = asyncio.create_task(line.ask(paid))
        await eventually(lambda: len(transfers_to(gateway.net, gateway.pay_to)) == 1, "the block")
        gateway.kill()
        with pytest.raises(httpx.TransportError):
            await task
    assert entries(gateway, payer) == []
    await settled_after_a_start(site, payer, paid)


async def test_receipts_that_nobody_gives_keep_the_answer_here(site: Site, payer: Wallet) -> None:
    """Sent, and not known to be in a block: the answer goes out when it is."""
    async with site.line() as line:
        paid = await line.paid(payer)
        site.faulty.fault("eth_getTransactionReceipt", "status", 500)
        answer = await line.ask(paid)
        told = problem(answer, "settlement_pending")
        assert told["transaction"].startswith("0x")
        assert "payment-required" not in answer.headers
        assert outcome(answer)["errorReason"] == "settlement_pending"
        problem(await line.ask(paid), "settlement_pending")
        assert line.states(payer) == ["sent"]
        problem(await line.ask(await line.paid(payer)), "upto_in_progress")
        site.faulty.faults.clear()
        site.gateway.wait(lambda: line.states(payer) == ["settled"], "the settlement")
        assert (await line.ask(paid)).status_code == 200
        assert len(site.chat.requests) == 1
        line.settled(payer)


async def test_a_chain_that_is_away_after_the_work(
    site: Site, launch: Launch, payer: Wallet
) -> None:
    """The answer waits with the payment: one settlement when the chain is back, on however many
    nodes somebody looks."""
    if site.gateway.database.startswith("postgres"):
        launch("postgres", routes=ROUTES, rpc_url=site.faulty.url, beside=site.gateway)
    async with site.line() as line:
        paid = await line.paid(payer)
        site.chat.before = lambda: site.faulty.fault("eth_estimateGas", "status", 500)
        problem(await line.ask(paid), "upto_not_settled")
        assert line.states(payer) == ["due"]
        site.faulty.faults.clear()
        site.gateway.wait(lambda: line.states(payer) == ["settled"], "the settlement")
        assert (await line.ask(paid)).status_code == 200
        assert len(site.chat.requests) == 1
        line.settled(payer)


async def test_a_chain_that_is_away_before_the_work(site: Site, payer: Wallet) -> None:
    async with site.line() as line:
        paid = await line.paid(payer)
        site.faulty.fault("eth_call", "status", 500)
        problem(await line.ask(paid), "dependency_unavailable")
        assert line.calls(payer) == site.chat.requests == []
        site.faulty.faults.clear()
        assert (await line.ask(paid)).status_code == 200
        line.settled(payer)
