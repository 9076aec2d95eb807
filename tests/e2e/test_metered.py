"""Calls that cost what they used: an OpenAI-style chat, in JSON and in events.

Whatever the upstream says, breaks off or keeps to itself, and whatever the caller does: the charge
is its breakdown, never more than was held, and the books tie out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from gateway.demo import mcp_server
from gateway.demo.upstreams import SampleApi
from tests.e2e.chat import PROMPT_TOKENS, Chat
from tests.e2e.stage import Api, Gateway
from tests.e2e.test_credits_first import challenge, sign_in
from tests.e2e.wallet import Wallet, buy, code_of, offers, outcome, problem
from tests.gateway.proxy.serving import talk

Launch = Callable[..., Gateway]
MINTED = 1_000_000
MAX = 50_000
UNKNOWN = 20_000
# 1,000 prompt tokens are 1,000 units, each word is 100.
RATES = '{ tokens_in = "$1 / 1M", tokens_out = "$100 per 1M tokens" }'
TERMS = f'max = "$0.05", fixed = "$0.0005", when_unknown = "$0.02", rates = {RATES}'
BY_MODEL = (
    '{ small = { max = "$0.001", rates = { tokens_out = "$1 / 1M" } },'
    ' big = { rates = { tokens_out = "$100 / 1M" } } }'
)
BY_PARAMS = (
    '[{ body = { size = "large" }, price = "$0.04" },'
    f' {{ query = {{ by = "use" }}, price = {{ rule = "metered", {TERMS} }} }}]'
)
MODELS = f'max = "$0.05", when_unknown = "max", models = {BY_MODEL}'
PARAMS = f'default = "$0.01", cases = {BY_PARAMS}'
BY_BYTES = '{ bytes_in = "$0.001 / 1K", bytes_out = "$0.001 / 1" }'
BODIES = f'max = "$0.05", when_unknown = "max", rates = {BY_BYTES}'
ROUTES = f"""[
  {{ match = "POST /chat/*", price = {{ rule = "metered", {TERMS} }} }},
  {{ match = "POST /counted/*", price = {{ rule = "metered", {TERMS}, events = "tokens_out" }} }},
  {{ match = "POST /model/*", price = {{ rule = "metered", {MODELS} }} }},
  {{ match = "POST /word/*", amount_from = "upstream", price = {{ rule = "metered", {TERMS} }} }},
  {{ match = "POST /params/*", price = {{ rule = "by_params", {PARAMS} }} }},
  {{ match = "POST /bytes/*", price = {{ rule = "metered", {BODIES} }} }},
]"""


def used(words: int, prompt: int = PROMPT_TOKENS) -> int:
    return 500 + prompt + 100 * words


class Caller:
    """A wallet with credits at one gateway, and the chat behind it."""

    def __init__(
        self, gateway: Gateway, http: httpx.AsyncClient, wallet: Wallet, chat: Chat, path: str
    ) -> None:
        self.gateway, self.http, self.wallet, self.chat = gateway, http, wallet, chat
        self.path = path

    def sign(self, asked: dict[str, Any], path: str = "", **more: str) -> tuple[bytes, Any]:
        body = json.dumps(asked).encode()
        headers = {"content-type": "application/json", **more}
        url = self.gateway.url + (path or self.path)
        return body, self.wallet.sign("POST", url, body, headers=headers)

    async def ask(self, path: str = "", **asked: Any) -> tuple[httpx.Response, dict[str, Any]]:
        """A call, and its receipt."""
        part = {"range": "bytes=0-9", "accept-encoding": "gzip"}
        body, headers = self.sign({"model": "small", **asked}, path, **part)
        answer = await self.http.post(path or self.path, content=body, headers=headers)
        return answer, await self.receipt(answer.headers["farebox-request-id"])

    async def receipt(self, request_id: str) -> dict[str, Any]:
        """What became of a call; the lines add up and nothing is beyond what was held."""
        target = f"/farebox/v1/requests/{request_id}"
        headers = self.wallet.sign("GET", self.gateway.url + target)
        told: dict[str, Any] = (await self.http.get(target, headers=headers)).json()
        assert sum(line["units"] for line in told["breakdown"]) == told["charged_units"], told
        assert 0 <= told["charged_units"] <= told["held_units"], told
        entries = [line["amount_units"] for line in told["audit"]["entries"]]
        assert entries == [told["charged_units"]]
        return told


@pytest.fixture
async def caller(dialect: str, launch: Launch, api: Api, wallet: Wallet, target: str) -> Any:
    gateway = launch(dialect, routes=ROUTES)
    path = f"/chat{target}"
    async with gateway.client() as http:
        await buy(http, wallet)
        yield Caller(gateway, http, wallet, Chat(api, path), path)


async def test_a_chat_costs_its_tokens(caller: Caller) -> None:
    spent = 0
    for stream in (False, True):
        for words in (0, 3, 40):
            answer, told = await caller.ask(stream=stream, words=words)
            assert answer.status_code == 200
            assert told["charged_units"] == used(words)
            assert told["held_units"] == MAX
            assert told["state"] == "charged"
            assert told["breakdown"][-1] == {
                "for": "tokens_out",
                "units": 100 * words,
                "count": words,
                "rate": "$100 per 1M tokens",
            }
            if stream:
                assert answer.headers["farebox-held"] == "5"
                assert answer.text.count("data:") == words + 2
                assert "farebox" not in answer.text
            else:
                assert answer.headers["farebox-charged"] == f"{used(words) / 10_000:g}"
            spent += used(words)
    assert caller.gateway.balance(caller.wallet.address) == (MINTED - spent, 0)
    # The upstream can be read, and is told nothing it could turn against the caller.
    seen = caller.chat.requests[0]
    assert seen.header(b"accept-encoding") == [b"identity"]
    assert seen.header(b"range") == []
    assert seen.header(b"farebox-meter") == []


async def test_more_than_was_held_is_not_charged(caller: Caller) -> None:
    for stream in (False, True):
        answer, told = await caller.ask(stream=stream, words=1_000)
        assert answer.status_code == 200
        assert told["charged_units"] == MAX
        assert told["breakdown"][-1] == {
            "for": "beyond what was held",
            "units": MAX - used(1_000),
        }


NO_USAGE: list[object] = [
    None,
    {},
    {"prompt_tokens": 5},
    {"prompt_tokens": 5, "completion_tokens": -1},
    {"prompt_tokens": 5, "completion_tokens": "7"},
    {"prompt_tokens": 5, "completion_tokens": 7.0},
    {"prompt_tokens": 5, "completion_tokens": True},
    {"prompt_tokens": 5, "completion_tokens": 10**30},
    {"prompt_tokens": 5, "completion_tokens": {"n": 7}},
    "many",
]


async def test_what_is_no_usage_costs_what_was_said(sqlite_caller: Caller) -> None:
    for counts in NO_USAGE:
        for stream in (False, True):
            _, told = await sqlite_caller.ask(stream=stream, words=3, counts=counts)
            assert told["charged_units"] == UNKNOWN, counts
            assert told["breakdown"][-1]["for"] == "usage not known"


@pytest.fixture
async def sqlite_caller(launch: Launch, api: Api, wallet: Wallet, target: str) -> Any:
    gateway = launch("sqlite", routes=ROUTES)
    path = f"/chat{target}"
    async with gateway.client() as http:
        await buy(http, wallet)
        yield Caller(gateway, http, wallet, Chat(api, path), path)


async def test_a_chat_that_breaks_off_is_not_charged(caller: Caller) -> None:
    answer, told = await caller.ask(words=9, break_at=1)
    assert answer.status_code == 502
    assert (told["state"], told["charged_units"]) == ("not_charged", 0)
    body, headers = caller.sign({"stream": True, "words": 9, "break_at": 4})
    with pytest.raises(httpx.RemoteProtocolError):
        await caller.http.post(caller.path, content=body, headers=headers)
    held = caller.gateway.rows("SELECT request_id FROM hold ORDER BY id DESC LIMIT 1")
    told = await caller.receipt(held[0]["request_id"])
    assert (told["state"], told["reason"]) == ("not_charged", "upstream_error")
    assert caller.gateway.balance(caller.wallet.address) == (MINTED, 0)


async def test_who_leaves_pays_what_was_used(caller: Caller) -> None:
    """The upstream is heard out, and says at its end what it was."""
    body, headers = caller.sign({"stream": True, "words": 9, "gate_at": 4})
    async with caller.http.stream("POST", caller.path, content=body, headers=headers) as answer:
        pieces = answer.aiter_raw()
        assert b"word 0" in await anext(pieces)
        request_id = answer.headers["farebox-request-id"]
    caller.chat.gate.open()
    gateway = caller.gateway
    gateway.wait(lambda: gateway.balance(caller.wallet.address)[1] == 0, "the capture")
    told = await caller.receipt(request_id)
    assert (told["state"], told["charged_units"]) == ("charged", used(9))


async def test_who_leaves_before_it_breaks_off_pays_what_was_metered(
    dialect: str, launch: Launch, api: Api, wallet: Wallet, target: str
) -> None:
    gateway = launch(dialect, routes=ROUTES)
    path = f"/counted{target}"
    chat = Chat(api, path)
    async with gateway.client() as http:
        await buy(http, wallet)
        caller = Caller(gateway, http, wallet, chat, path)
        asked = {"stream": True, "words": 600, "gate_at": 400, "break_at": 450}
        body, headers = caller.sign(asked)
        async with http.stream("POST", path, content=body, headers=headers) as answer:
            pieces = answer.aiter_raw()
            await anext(pieces)
            request_id = answer.headers["farebox-request-id"]
        chat.gate.open()
        gateway.wait(lambda: gateway.balance(wallet.address)[1] == 0, "the capture")
        told = await caller.receipt(request_id)
        assert told["state"] == "charged"
        lines = {line["for"]: line for line in told["breakdown"]}
        counted = lines["tokens_out"]["count"]
        # A reset takes with it what had come and was not read.
        assert 0 < counted <= 450
        assert told["charged_units"] == min(max(500 + 100 * counted, UNKNOWN), MAX)


async def test_each_event_counts_until_the_stream_says_better(
    dialect: str, launch: Launch, api: Api, wallet: Wallet, target: str
) -> None:
    gateway = launch(dialect, routes=ROUTES)
    path = f"/counted{target}"
    async with gateway.client() as http:
        await buy(http, wallet)
        caller = Caller(gateway, http, wallet, Chat(api, path), path)
        _, told = await caller.ask(stream=True, words=30, counts={"prompt_tokens": 10})
        # An event for each word, and the one with the usage.
        assert told["charged_units"] == used(31, 10)
        assert {line["for"]: line.get("count") for line in told["breakdown"]}["tokens_out"] == 31
        _, told = await caller.ask(
            stream=True, words=30, counts={"prompt_tokens": 10, "completion_tokens": 4}
        )
        assert told["charged_units"] == used(4, 10)
        # It runs beyond what was held: it is cut there, and ends with the reason.
        answer, told = await caller.ask(stream=True, words=5_000)
        assert told["charged_units"] == MAX
        cut = answer.text.count('"object": "chunk"')
        assert 490 <= cut < 5_000
        assert "data: [DONE]" not in answer.text
        assert json.loads(re.findall(r"data: (.*)\n\n$", answer.text)[0])["error"]["code"] == (
            "cut_at_hold"
        )
        assert caller.chat.requests


async def test_running_costs_are_told_when_asked_for(caller: Caller) -> None:
    body, headers = caller.sign(
        {"stream": True, "words": 8, "gate_at": 2},
        **{"farebox-prefer": "cost-events"},
    )
    text = ""
    async with caller.http.stream("POST", caller.path, content=body, headers=headers) as answer:
        async for piece in answer.aiter_text():
            text += piece
            if "farebox.cost" in text:  # before the upstream is done
                caller.chat.gate.open()
    assert text.count("data: [DONE]") == 1
    told = [json.loads(data) for data in re.findall(r"event: farebox.cost\ndata: (.*)\n\n", text)]
    assert told[0]["so_far_units"] == 500
    assert all(each["held_units"] == MAX for each in told[:-1])
    last = told[-1]
    assert last["final"] is True
    assert last["charged_units"] == used(8)
    assert last["balance_units"] == MINTED - used(8)
    assert last["request_id"] == answer.headers["farebox-request-id"]
    assert text.rstrip().endswith("}")
    # A repeat is not told the costs of another time.
    again = await caller.http.post(caller.path, content=body, headers=headers)
    assert again.headers["farebox-replayed"] == "true"
    assert again.json()["receipt"]["charged_units"] == used(8)
    assert caller.gateway.balance(caller.wallet.address) == (MINTED - used(8), 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_upstreams_own_word_counts_where_it_is_asked(
    launch: Launch, api: Api, wallet: Wallet, target: str, stream: bool
) -> None:
    gateway = launch("sqlite", routes=ROUTES)
    path = f"/word{target}"
    async with gateway.client() as http:
        await buy(http, wallet)
        caller = Caller(gateway, http, wallet, Chat(api, path), path)
        usage, amount = "Farebox-Usage", "Farebox-Amount"
        for say, units in [
            ([(usage, "tokens_in=10, tokens_out=20; t={t}")], used(20, 10)),
            ([("farebox-usage", "tokens_out=1,tokens_in=0;t={t}")], 600),
            ([(amount, "$0.0123; t={t}")], 12_300),
            ([(amount, "$0; t={t}")], 0),
            ([(amount, "$0.05; t={t}")], MAX),
            # Not believed: the usage is not known.
            ([], UNKNOWN),
            ([(amount, "$0.050001; t={t}")], UNKNOWN),
            ([(usage, "tokens_in=10, tokens_out=20000; t={t}")], UNKNOWN),
            ([(amount, "$0.0123; t=x{t}")], UNKNOWN),
            ([(amount, "$0.0123; t=")], UNKNOWN),
            ([(amount, "$0.0123")], UNKNOWN),
            ([(amount, "$0.0123; t={t}"), (amount, "$0.0123; t={t}")], UNKNOWN),
            ([(amount, "$0.0123; t={t}"), (usage, "tokens_in=1, tokens_out=1; t={t}")], UNKNOWN),
            ([(amount, "$-0.01; t={t}")], UNKNOWN),
            ([(amount, "$1e-3; t={t}")], UNKNOWN),
            ([(amount, "$0.0000001; t={t}")], UNKNOWN),
            ([(usage, "tokens_in=10; t={t}")], UNKNOWN),
            ([(usage, "tokens_in=10, tokens_out=+2; t={t}")], UNKNOWN),
            ([(usage, "tokens_in=10, tokens_out=2, tokens_out=2; t={t}")], UNKNOWN),
            ([(usage, "tokens_in=10, tokens_out=2, pages=1; t={t}")], UNKNOWN),
            ([(usage, f"tokens_in=10, tokens_out={10**40}; t={{t}}")], UNKNOWN),
        ]:
            answer, told = await caller.ask(stream=stream, words=3, say=say)
            assert told["charged_units"] == units, (say, told)
            assert not [name for name in answer.headers if "usage" in name or "amount" in name]
        tokens = {request.header(b"farebox-meter")[0] for request in caller.chat.requests}
        assert len(tokens) == len(caller.chat.requests)  # each request its own
        assert gateway.broken() == {}


async def test_an_own_word_is_nothing_elsewhere(sqlite_caller: Caller) -> None:
    _, told = await sqlite_caller.ask(words=2, say=[("Farebox-Amount", "$0; t={t}")])
    assert told["charged_units"] == used(2)


async def test_the_model_decides_what_is_held(
    dialect: str, launch: Launch, api: Api, wallet: Wallet, target: str
) -> None:
    gateway = launch(dialect, routes=ROUTES)
    path = f"/model{target}"
    async with gateway.client() as http:
        await buy(http, wallet)
        caller = Caller(gateway, http, wallet, Chat(api, path), path)
        for model, held, units in (("small", 1_000, 7), ("BIG", MAX, 700)):
            _, told = await caller.ask(model=model, words=7)
            assert (told["held_units"], told["charged_units"]) == (held, units)
        body, headers = caller.sign({"model": "other", "words": 7})
        refused = await http.post(path, content=body, headers=headers)
        assert problem(refused, "price_unknown")["known"] == ["small", "big"]
        for odd in (
            b'{"model": "small", "model": "big", "words": 7}',
            b'{"model": "small", "Model": "big", "words": 7}',
            b"words=7",
        ):
            for signed in (True, False):
                headers = {"content-type": "application/json"}
                if signed:
                    headers = wallet.sign("POST", gateway.url + path, odd, headers=headers)
                refused = await http.post(path, content=odd, headers=headers)
                assert problem(refused, "invalid_request")
        headers = {"content-type": "application/json", "content-encoding": "gzip"}
        refused = await http.post(path, content=b'{"model": "small"}', headers=headers)
        assert code_of(refused) == "unsupported_media_type"
        # Who sends none is told the most that one can cost.
        unread = problem(await http.post(path), "payment_required")["credits"]
        assert (unread["price_units"], unread["at_most"]) == (MAX, True)
        # One that is too long is not even read.
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {(1 << 20) + 1}\r\nConnection: close\r\n\r\n"
        )
        assert b'"code":"body_too_large"' in await talk(gateway.port, head.encode())
        assert len(caller.chat.requests) == 2
        assert gateway.balance(wallet.address) == (MINTED - 707, 0)


async def test_an_offer_for_a_cheap_body_buys_no_dear_one(
    dialect: str, launch: Launch, api: Api, wallet: Wallet, target: str
) -> None:
    gateway = launch(dialect, routes=ROUTES)
    path = f"/model{target}"
    chat = Chat(api, path)
    kind = {"content-type": "application/json"}
    cheap, dear = (json.dumps({"model": m, "words": 7}).encode() for m in ("small", "big"))
    async with gateway.client() as http:
        offer = offers(await http.post(path, content=cheap, headers=kind))[0]
        paid = {**kind, "PAYMENT-SIGNATURE": wallet.pay(offer)}
        refused = await http.post(path, content=dear, headers=paid)
        problem(refused, "invalid_payment_requirements")
        assert gateway.payments(wallet.address) == []
        # The same payment is good for what it was made for.
        answer = await http.post(path, content=cheap, headers=paid)
        assert answer.status_code == 200, answer.text
        assert len(chat.requests) == 1


async def test_who_pays_on_the_spot_pays_the_maximum_and_keeps_the_rest(caller: Caller) -> None:
    gateway, http, path = caller.gateway, caller.http, caller.path
    asked = json.dumps({"model": "small", "words": 7}).encode()
    kind = {"content-type": "application/json"}
    payer = caller.wallet
    required = await http.post(path, content=asked, headers=kind)
    told = problem(required, "payment_required")
    assert "at most 5 credits" in told["detail"]
    assert told["credits"]["at_most"] is True
    offer = offers(required)[0]
    assert int(offer["amount"]) == MAX
    # This wallet has credits that cover the maximum: nothing is transferred.
    answer = await http.post(
        path, content=asked, headers={**kind, "PAYMENT-SIGNATURE": payer.pay(offer)}
    )
    assert answer.status_code == 200, answer.text
    assert answer.headers["farebox-paid-from"] == "credits"
    assert outcome(answer)["extra"]["charged"] == f"{used(7) / 10_000:g}"
    assert gateway.balance(payer.address) == (MINTED - used(7), 0)
    received = gateway.received()
    answer = await http.post(
        path,
        content=asked,
        headers={**kind, "farebox-prefer": "settle", "PAYMENT-SIGNATURE": payer.pay(offer)},
    )
    assert answer.headers["farebox-paid-from"] == "settlement"
    assert gateway.received() == received + MAX
    assert gateway.balance(payer.address) == (MINTED - 2 * used(7) + MAX, 0)


async def test_who_cannot_cover_the_maximum_is_asked_for_it(caller: Caller) -> None:
    while True:
        body, headers = caller.sign({"model": "small", "words": 450})
        answer = await caller.http.post(caller.path, content=body, headers=headers)
        if answer.status_code != 200:
            break
    told = problem(answer, "insufficient_credits")
    assert told["credits"]["price_units"] == MAX
    assert 0 < told["credits"]["shortfall_units"] < MAX


async def test_parameters_choose_the_price(
    dialect: str, launch: Launch, api: Api, wallet: Wallet, target: str
) -> None:
    gateway = launch(dialect, routes=ROUTES)
    path = f"/params{target}"
    async with gateway.client() as http:
        await buy(http, wallet)
        chat = Chat(api, path)
        caller = Caller(gateway, http, wallet, chat, path)
        _, told = await caller.ask(words=3)
        assert (told["held_units"], told["charged_units"]) == (10_000, 10_000)
        _, told = await caller.ask(words=3, size="large")
        assert told["charged_units"] == 40_000
        assert told["breakdown"] == [{"for": "call", "units": 40_000}]
        misbehaved = Chat(api, path + "?by=use")
        _, told = await caller.ask(path + "?by=use", words=3)
        assert told["charged_units"] == used(3)
        assert len(chat.requests) + len(misbehaved.requests) == 3


async def test_bodies_are_counted_as_they_go_by(
    dialect: str, launch: Launch, api: Api, wallet: Wallet, target: str
) -> None:
    gateway = launch(dialect, routes=ROUTES)
    path = f"/bytes{target}"
    async with gateway.client() as http:
        await buy(http, wallet)
        caller = Caller(gateway, http, wallet, Chat(api, path), path)
        answer, told = await caller.ask(words=1)
        sent = len(caller.chat.requests[0].body)
        counted = {line["for"]: line["count"] for line in told["breakdown"] if "count" in line}
        assert counted == {"bytes_in": sent, "bytes_out": len(answer.content)}
        assert told["charged_units"] == MAX


async def test_a_challenge_for_a_long_cheap_body_is_good_for_no_dear_one(
    launch: Launch, api: Api, wallet: Wallet, target: str
) -> None:
    """Of a body above 64 KiB a sign-in challenge says nothing."""
    gateway = launch("sqlite", routes=ROUTES)
    path = f"/model{target}"
    chat = Chat(api, path)
    kind = {"content-type": "application/json"}
    cheap, dear = (
        json.dumps({"model": m, "words": 7, "x": "x" * 70_000}).encode() for m in ("small", "big")
    )
    async with gateway.client() as http:
        await buy(http, wallet)
        proof = sign_in(wallet, challenge(await http.post(path, content=cheap, headers=kind)))
        refused = await http.post(path, content=dear, headers={**kind, **proof})
        problem(refused, "invalid_siwx_nonce")
        assert chat.requests == []
        answer = await http.post(path, content=cheap, headers={**kind, **proof})
        assert answer.status_code == 200, answer.text
        assert gateway.balance(wallet.address) == (MINTED - 7, 0)


SEARCH = (
    '{ rule = "metered", max = "$0.05", when_unknown = "max",'
    ' usage = { parts = "result.content" }, rates = { parts = "$0.003 / 1" } }'
)
COUNT = (
    '{ rule = "by_params", default = "refuse", cases = [{ body = { to = 3 }, price = "$0.03" },'
    ' { body = { to = [1, 2] }, price = "$0.01" }] }'
)
TOOLS = f"{{ search = {SEARCH}, count = {COUNT} }}"


async def test_tools_can_cost_what_they_use_or_what_is_asked(
    dialect: str, launch: Launch, wallet: Wallet
) -> None:
    with SampleApi(make=mcp_server.build) as tools:
        gateway = launch(dialect, running=False)
        gateway.chain_extra = (
            f'[upstreams.tools]\nkind = "mcp"\nurl = "{tools.url}/mcp"\nmount = "/mcp"\n'
            f"tools = {TOOLS}\n"
        )
        gateway.start()
        async with gateway.client() as http:
            await buy(http, wallet)
            body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/list"}).encode()
            kind = {
                "content-type": "application/json",
                "accept": "application/json, text/event-stream",
            }
            listed = (await http.post("/mcp", content=body, headers=kind)).json()["result"]["tools"]
            shown = {tool["name"]: tool["_meta"]["farebox/price"] for tool in listed}
            prices = (await http.get("/farebox/v1/prices")).json()["prices"]
            told = {row["tool"]: row["price"] for row in prices if "tool" in row}
            assert {name: price["rule"] for name, price in shown.items()} == told

            async def call(name: str, **arguments: Any) -> dict[str, Any]:
                params = {"name": name, "arguments": arguments}
                message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
                body = json.dumps(message).encode()
                headers = wallet.sign("POST", gateway.url + "/mcp", body, headers=kind)
                answer = await http.post("/mcp", content=body, headers=headers)
                if answer.status_code != 200:
                    return problem(answer, "price_unknown")
                meta = re.findall(r"farebox/request-id\": \"([^\"]+)", answer.text)
                caller = Caller(gateway, http, wallet, None, "/mcp")  # type: ignore[arg-type]  # unused
                return await caller.receipt(meta[0])

            receipt = await call("search", q="x")
            assert (receipt["held_units"], receipt["charged_units"]) == (MAX, 3_000)
            assert (await call("count", to=3))["charged_units"] == 30_000
            assert (await call("count", to=1))["charged_units"] == 10_000
            assert (await call("count", to=4))["code"] == "price_unknown"
            assert gateway.balance(wallet.address) == (MINTED - 43_000, 0)
