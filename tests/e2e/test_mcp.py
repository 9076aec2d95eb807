"""Paid tools: the official MCP client with x402's payments, and wallets that sign over HTTP."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.demo import mcp_server
from gateway.demo.upstreams import SampleApi
from tests import servers
from tests.e2e.stage import PRICE_UNITS, Gateway
from tests.e2e.wallet import Wallet, buy, decode, offers, problem
from tests.wallet_auth.support import CLIENTS, node

SEARCH_UNITS, COUNT_UNITS = 5_000, 10_000
Sent = tuple[dict[str, Any], dict[str, str]]


@pytest.fixture(scope="module")
def tools() -> Iterator[SampleApi]:
    with SampleApi(make=mcp_server.build) as server:
        yield server


Launch = Callable[..., Gateway]


def open_shop(launch: Launch, url: str, dialect: str = "sqlite") -> Gateway:
    gateway = launch(dialect, running=False)
    gateway.chain_extra = f"""
[upstreams.tools]
kind = "mcp"
url = "{url}"
mount = "/mcp"
tools = {{ search = "$0.005", ping = "free", "*" = "$0.01" }}
"""
    return gateway.start()


@pytest.fixture
def shop(launch: Launch, tools: SampleApi) -> Gateway:
    tools.calls.clear()
    return open_shop(launch, f"{tools.url}/mcp")


@pytest.fixture
def each_shop(launch: Launch, tools: SampleApi, dialect: str) -> Gateway:
    """The same on both databases, for what is about money."""
    tools.calls.clear()
    return open_shop(launch, f"{tools.url}/mcp", dialect)


def called(tool: str, message_id: int | str = 1, **arguments: Any) -> dict[str, Any]:
    params = {"name": tool, "arguments": arguments}
    return {"jsonrpc": "2.0", "id": message_id, "method": "tools/call", "params": params}


ACCEPT = {"Accept": "application/json, text/event-stream", "Content-Type": "application/json"}


async def ask(http: httpx.AsyncClient, message: object, **headers: str) -> httpx.Response:
    return await http.post("/mcp", content=json.dumps(message), headers={**ACCEPT, **headers})


def result(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()["result"]
    return found


def required(answer: httpx.Response) -> dict[str, Any]:
    """A tool result that asks for payment."""
    told = result(answer)
    assert told["isError"] is True
    assert json.loads(told["content"][0]["text"]) == told["structuredContent"]
    found: dict[str, Any] = told["structuredContent"]
    assert found["x402Version"] == 2
    return found


def paying(wallet: Wallet, message: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    payment = decode(wallet.pay(told["accepts"][0]))
    params = {**message["params"], "_meta": {"x402/payment": payment}}
    return {**message, "params": params}


def run(*arguments: str, script: str = "mcp_py.py") -> list[dict[str, Any]]:
    program = sys.executable if script.endswith(".py") else node()
    done = subprocess.run(
        [program, script, *arguments],
        cwd=CLIENTS, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("client", ["mcp_py.py", "mcp_js.mjs"])
def test_the_official_client_lists_prices_and_pays(
    client: str, each_shop: Gateway, tools: SampleApi, wallet: Wallet
) -> None:
    shop = each_shop
    asked = (f"{shop.url}/mcp", wallet.key, "search", '{"q": "fare"}', "3")
    listed, *calls = run(*asked, script=client)
    by_name = {tool["name"]: tool for tool in listed["tools"]}
    assert by_name["search"]["description"] == "Looks a word up. Price: $0.005 a call."
    assert by_name["search"]["_meta"]["farebox/price"] == {
        "units": SEARCH_UNITS, "usd": "$0.005", "credits": "0.5",
    }  # fmt: skip
    assert by_name["count"]["_meta"]["farebox/price"]["units"] == COUNT_UNITS
    for call in calls:
        assert call["text"] == ["fare: found in the sample"], call
        assert (call["error"], call["paid"]) == (False, True)
        assert call["response"]["success"] is True
        assert call["response"]["payer"] == wallet.address
    # One cent is settled for the first, whose change pays for the second.
    paid_from = [call["meta"]["farebox/paid-from"] for call in calls]
    assert paid_from == ["settlement", "credits", "settlement"]
    assert calls[1]["response"]["transaction"] == ""
    assert shop.received() == 2 * PRICE_UNITS
    assert tools.calls.count("TOOL search") == 3
    assert shop.balance(wallet.address) == (2 * PRICE_UNITS - 3 * SEARCH_UNITS, 0)


def test_the_official_client_pays_for_a_stream(
    shop: Gateway, tools: SampleApi, wallet: Wallet
) -> None:
    _, call = run(f"{shop.url}/mcp", wallet.key, "count", '{"to": 3}')
    assert call["text"] == ["counted to 3"]
    assert call["meta"]["farebox/charged"] == "1"
    assert call["response"]["transaction"].startswith("0x")
    assert shop.balance(wallet.address) == (PRICE_UNITS - COUNT_UNITS, 0)


async def test_what_is_free_is_passed_and_says_nothing_of_money(
    shop: Gateway, tools: SampleApi
) -> None:
    async with shop.client() as http:
        hello = {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": {}}
        assert result(await ask(http, hello))["serverInfo"]["name"] == "sample"
        note = {"jsonrpc": "2.0", "method": "notifications/initialized"}
        assert (await ask(http, note)).status_code == 202
        assert result(await ask(http, {**hello, "method": "ping"})) == {}
        assert (await ask(http, {**hello, "method": "prompts/list"})).json()["error"]
    assert shop.balance("") == (0, 0)


async def test_a_refusal_is_a_result_for_who_says_nothing_over_http(
    shop: Gateway, tools: SampleApi, wallet: Wallet
) -> None:
    async with shop.client() as http:
        told = required(await ask(http, called("search", q="a")))
        assert told["resource"]["url"] == "mcp://tool/search"
        assert told["accepts"][0]["amount"] == str(PRICE_UNITS)
        assert "sign-in-with-x" not in told.get("extensions", {})
        # The offer of one tool pays for no other, and not over HTTP either.
        message = paying(wallet, called("count", to=2), told)
        assert required(await ask(http, message))["error"].startswith("invalid_payment_requ")
        unknown = {**called("search", q="a")}
        unknown["params"] = {**unknown["params"], "_meta": {"x402/payment": {"x402Version": 2}}}
        refused = result(await ask(http, unknown))
        assert refused["isError"] and refused["structuredContent"]["code"] == "invalid_payload"
    assert tools.calls.count() == 0
    assert shop.received() == 0


async def test_a_call_again_is_answered_under_its_new_id(
    each_shop: Gateway, tools: SampleApi, wallet: Wallet
) -> None:
    shop = each_shop
    async with shop.client() as http:
        message = called("search", 1, q="a")
        paid = paying(wallet, message, required(await ask(http, message)))
        first = await ask(http, paid)
        again = await ask(http, {**paid, "id": "two"})
        assert (first.json()["id"], again.json()["id"]) == (1, "two")
        assert result(again)["content"] == result(first)["content"]
        assert result(again)["_meta"]["farebox/replayed"] == "true"
        assert result(again)["_meta"]["farebox/charged"] == "0"
        other = {**paid, "params": {**paid["params"], "arguments": {"q": "b"}}}
        told = result(await ask(http, other))["structuredContent"]
        assert told["code"] == "payment_already_used"
    assert tools.calls.count("TOOL search") == 1
    assert shop.received() == PRICE_UNITS
    assert shop.balance(wallet.address) == (PRICE_UNITS - SEARCH_UNITS, 0)


async def test_the_same_call_many_times_at_once_runs_once(
    each_shop: Gateway, tools: SampleApi, wallet: Wallet
) -> None:
    shop = each_shop
    async with shop.client() as http:
        message = called("search", q="a")
        paid = paying(wallet, message, required(await ask(http, message)))
        answers = await asyncio.gather(*(ask(http, {**paid, "id": n}) for n in range(12)))
    assert all(answer.status_code == 200 for answer in answers)
    assert tools.calls.count("TOOL search") == 1
    assert shop.received() == PRICE_UNITS


@pytest.mark.parametrize("tool", ["fail", "nowhere"])
async def test_an_error_is_not_charged(
    tool: str, shop: Gateway, tools: SampleApi, wallet: Wallet
) -> None:
    async with shop.client() as http:
        message = called(tool)
        answer = await ask(http, paying(wallet, message, required(await ask(http, message))))
        told = answer.json()
        if tool == "fail":
            assert told["result"]["isError"] is True
            assert told["result"]["content"][0]["text"] == "it failed, as always"
            assert told["result"]["_meta"]["farebox/charged"] == "0"
        else:
            assert told["error"]["code"] == -32602
        assert answer.headers["farebox-charged"] == "0"
    assert shop.transfers(wallet.address) == [
        ("mint", PRICE_UNITS, "x402"),
        ("void", 0, "answer_with:result.isError" if tool == "fail" else "answer_with:error"),
    ]


def signed(shop: Gateway, wallet: Wallet, message: object) -> Sent:
    body = json.dumps(message).encode()
    return {"content": body}, wallet.sign("POST", shop.url + "/mcp", body, headers=ACCEPT)


async def test_a_wallet_that_signs_over_http_spends_credits(
    shop: Gateway, tools: SampleApi, wallet: Wallet
) -> None:
    async with shop.client() as http:
        sent, headers = signed(shop, wallet, called("search", q="a"))
        short = await http.post("/mcp", **sent, headers=headers)
        problem(short, "insufficient_credits")  # who speaks HTTP is answered in HTTP
        assert offers(short)[0]["amount"] == str(PRICE_UNITS)
        await buy(http, wallet)
        sent, headers = signed(shop, wallet, called("search", 7, q="a"))
        quoted = {**headers, "Farebox-Quote": "x"}  # of a tool there is none
        problem(await http.post("/mcp", **sent, headers=quoted), "quote_mismatch")
        answer = await http.post("/mcp", **sent, headers=headers)
        assert (result(answer)["isError"], answer.json()["id"]) == (False, 7)
        assert answer.headers["farebox-charged"] == "0.5"
        again = await http.post("/mcp", **sent, headers=headers)
        assert again.headers["farebox-replayed"] == "true"
        changed = {**sent, "content": sent["content"].replace(b'"a"', b'"b"')}
        problem(await http.post("/mcp", **changed, headers=headers), "signature_digest_mismatch")
        stream, headers = signed(shop, wallet, called("count", to=2))
        events = (await http.post("/mcp", **stream, headers=headers)).text
        assert events.count("event: message") == 3
        assert '"farebox/charged": "1"' in events
    assert shop.balance(wallet.address) == (1_000_000 - SEARCH_UNITS - COUNT_UNITS, 0)


READ_IN_TWO_WAYS = [
    b"[]",
    b'[{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"search"}}]',
    b"not json",
    b'{"method":"ping","method":"tools/call"}',
    b'{"method":"ping","Method":"tools/call","id":1,"params":{"name":"search"}}',
    b'{"method":"tools/call","id":1,"params":{"name":"ping","NAME":"search"}}',
    b'{"method":"tools/call","id":1,"params":{"name":["search"]}}',
    b'{"method":"tools/call","id":null,"params":{"name":"search"}}',
    b'{"method":"tools/call","params":{"name":"search"}}',
    b'{"method":["tools/call"]}',
]


async def test_messages_that_two_readers_may_read_differently(
    shop: Gateway, tools: SampleApi
) -> None:
    async with shop.client() as http:
        for body in READ_IN_TWO_WAYS:
            problem(await http.post("/mcp", content=body, headers=ACCEPT), "invalid_request")
    assert tools.calls.count() == 0


async def test_another_spelling_of_a_tool_is_not_sold_as_any_other(
    shop: Gateway, tools: SampleApi
) -> None:
    async with shop.client() as http:
        problem(await ask(http, called("Search", q="a")), "not_found")
        problem(await ask(http, called(" search", q="a")), "not_found")
        coded = await ask(http, called("search"), **{"Content-Encoding": "gzip"})
        problem(coded, "unsupported_media_type")
        for method, path in (("PUT", "/mcp"), ("POST", "/mcp/more")):
            assert (await http.request(method, path)).status_code in (404, 405)
    assert tools.calls.count() == 0


def test_a_server_of_the_official_sdk(launch: Launch, wallet: Wallet, tmp_path: Path) -> None:
    """Sessions, answers as streams with notices in them, and a stream of the server's own."""
    port = servers.free_port()
    upstream = servers.Process(
        [sys.executable, str(CLIENTS / "mcp_server_py.py"), str(port)],
        tmp_path,
        servers.child_env(),
    )
    try:
        upstream.wait_port(port)
        shop = open_shop(launch, f"http://127.0.0.1:{port}/mcp")
        listed, call = run(f"{shop.url}/mcp", wallet.key, "search", '{"q": "fare"}')
        assert [tool["name"] for tool in listed["tools"]] == ["visit", "search", "fail"]
        assert call["text"] == ["fare: found by the official server"], call
        assert call["meta"]["farebox/charged"] == "0.5"
        _, failed = run(f"{shop.url}/mcp", wallet.key, "fail", "{}")
        assert (failed["error"], failed["meta"]["farebox/charged"]) == (True, "0")
    finally:
        upstream.stop()
    assert shop.balance(wallet.address) == (2 * PRICE_UNITS - SEARCH_UNITS, 0)
