"""Tools of MCP servers through the wallet API: servers that want a session first, and what a list
of actions knows of their tools."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from anvil.devnet import Devnet
from tests import servers
from tests.e2e.stage import Api, Gateway
from tests.e2e.test_external import API, Agent
from tests.e2e.wallet import new_wallet, problem
from tests.gateway.proxy import misbehave
from tests.wallet_auth.support import CLIENTS

Launch = Callable[..., Gateway]
SCHEMA = {"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]}
ANYTHING = {"type": "object"}
PRICE_UNITS = 50_000


class Scripted:
    """An MCP server that does as a test says, and remembers what it was asked.

    ``stateful``: it gives sessions, and answers nothing without one.
    """

    def __init__(self) -> None:
        self.stateful = True
        self.schema: Any = SCHEMA
        self.fails = ""
        self.silent = False
        self.asked: list[tuple[str, str]] = []
        self._open: set[str] = set()
        self._given = 0

    async def __call__(self, _up: Any, request: misbehave.Request, writer: Any) -> bool:
        while self.silent:
            await asyncio.sleep(0.05)
        session = b"".join(request.header(b"mcp-session-id")).decode()
        message = json.loads(request.body or b'{"method": "DELETE"}')
        self.asked.append((message["method"], session))
        status = self._status(message, session)
        if status:
            return _answer(writer, b"", status)
        return self._result(writer, message)

    def _status(self, message: dict[str, Any], session: str) -> bytes:
        """Of an answer without a message in it."""
        method = message["method"]
        if method == "DELETE":
            self._open.discard(session)
            return b"200 OK"
        if method == self.fails:
            return b"503 Service Unavailable"
        if self.stateful and session not in self._open and method != "initialize":
            return b"400 Bad Request"
        return b"" if "id" in message else b"202 Accepted"

    def _result(self, writer: Any, message: dict[str, Any]) -> bool:
        if message["method"] == "initialize":
            return self._initialize(writer, message)
        if message["method"] == "tools/list":
            tool = {"name": "search", "description": "Finds.", "inputSchema": self.schema}
            return _told(writer, message, {"tools": [tool]})
        text = json.dumps(message["params"]["arguments"])
        return _told(writer, message, {"content": [{"type": "text", "text": text}]})

    def _initialize(self, writer: Any, message: dict[str, Any]) -> bool:
        head = []
        if self.stateful:
            self._given += 1
            self._open.add(f"session-{self._given}")
            head.append(f"Mcp-Session-Id: session-{self._given}".encode())
        result = {"protocolVersion": "2025-03-26", "capabilities": {}, "serverInfo": {}}
        return _told(writer, message, result, *head)

    def methods(self) -> list[str]:
        """What it was asked since the last time."""
        found, self.asked = [method for method, _ in self.asked], []
        return found

    async def heard(self, methods: list[str]) -> None:
        """Wait until it was asked this and no more: a session ends after the answer."""
        end = time.monotonic() + 60
        while len(self.asked) < len(methods) and time.monotonic() < end:
            await asyncio.sleep(0.02)
        assert self.methods() == methods


def _told(writer: Any, message: dict[str, Any], result: Any, *head: bytes) -> bool:
    text = json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}).encode()
    return _answer(writer, text, b"200 OK", *head)


def _answer(writer: Any, body: bytes, status: bytes, *head: bytes) -> bool:
    kind = b"Content-Type: application/json"
    writer.write(misbehave.answer(body, kind, *head, status=status))
    return True


@pytest.fixture
def scripted(api: Api) -> Iterator[Scripted]:
    server = Scripted()
    misbehave.BEHAVIOURS[b"/scripted"] = server
    yield server
    del misbehave.BEHAVIOURS[b"/scripted"]


def shop_of(launch: Launch, url: str, *names: str) -> Gateway:
    shop = launch("sqlite", running=False, server={"settle_wait_s": 1})
    tools = ", ".join(f'{name} = "$0.05"' for name in names)
    shop.chain_extra = f"""
[upstreams.tools]
kind = "mcp"
url = "{url}"
mount = "/mcp"
tools = {{ {tools} }}
"""
    return shop.start()


@pytest.fixture
def shop(launch: Launch, api: Api, scripted: Scripted) -> Gateway:
    return shop_of(launch, f"{api.url}/scripted", "search")


@pytest.fixture
async def agent(shop: Gateway, chain_session: Devnet) -> AsyncIterator[Agent]:
    async with shop.client() as http:
        yield await agent_at(http, chain_session)


async def agent_at(http: httpx.AsyncClient, net: Devnet) -> Agent:
    agent = Agent(http, new_wallet(net), net)
    await agent.buy()
    await agent.begin()
    return agent


async def call(
    agent: Agent, request_id: str, tool: str = "search", **parameters: Any
) -> httpx.Response:
    path = f"/external/tools/tools/actions/{tool}/invoke"
    body = agent.invoke_body(request_id, parameters, path=path)
    return await agent.http.post(f"/api{path}", json=body)


async def listed(http: httpx.AsyncClient) -> dict[str, Any]:
    products = (await http.get(f"{API}/tools")).json()["tools"]
    product = next(each for each in products if each["product"] == "tools")
    return {action["action"]: action for action in product["actions"]}


async def until(http: httpx.AsyncClient, schema: Any) -> None:
    """Wait for the list to say so of the tool."""
    end = time.monotonic() + 90
    while (told := (await listed(http))["search"])["input_schema"] != schema:
        assert time.monotonic() < end, told
        await asyncio.sleep(0.1)


# -- a server of the official SDK -----------------------------------------------------------------


async def test_a_stateful_server_of_the_official_sdk(
    launch: Launch, chain_session: Devnet, tmp_path: Path
) -> None:
    port = servers.free_port()
    upstream = servers.Process(
        [sys.executable, str(CLIENTS / "mcp_server_py.py"), str(port)],
        tmp_path,
        servers.child_env(),
    )
    try:
        upstream.wait_port(port)
        shop = shop_of(launch, f"http://127.0.0.1:{port}/mcp", "search", "visit", "fail")
        async with shop.client() as http:
            agent = await agent_at(http, chain_session)
            found = await call(agent, "s-1", q="fare")
            assert found.json()["charged_credits"] == 5, found.text
            output = found.json()["response"]["data"]["output"]
            assert output["content"][0]["text"] == "fare: found by the official server"
            for n in range(3):  # nobody finds what somebody else has left in a session
                done = await call(agent, f"v-{n}", "visit")
                told = done.json()["response"]["data"]["output"]["content"]
                assert told[0]["text"] == "visit 1", done.text
            failed = (await call(agent, "f-1", "fail")).json()
            assert (failed["success"], failed["charged_credits"]) == (False, 0)
            again = (await call(agent, "s-1", q="fare")).json()
            assert (again["replayed"], again["charged_credits"]) == (True, 0)
            end = time.monotonic() + 90
            while (tool := (await listed(http))["search"])["input_schema"] == ANYTHING:
                assert time.monotonic() < end
                await asyncio.sleep(0.1)
            assert tool["input_schema"]["required"] == ["q"]
            assert tool["input_schema"]["properties"]["q"]["type"] == "string"
            assert tool["description"] == "Looks a word up."
        assert shop.balance(agent.wallet.address) == (5_000_000 - 4 * PRICE_UNITS, 0)
    finally:
        upstream.stop()


# -- sessions -------------------------------------------------------------------------------------

WHOLE = ["initialize", "notifications/initialized", "tools/call", "DELETE"]


async def test_each_call_has_a_session_of_its_own_and_ends_it(
    shop: Gateway, agent: Agent, scripted: Scripted
) -> None:
    for n in range(2):
        assert (await call(agent, f"a-{n}", q="x")).json()["charged_credits"] == 5
        named = {session for method, session in scripted.asked if method != "initialize"}
        assert named == {f"session-{n + 1}"}
        await scripted.heard(WHOLE)
    # Of the session of a caller's own nothing goes up.
    path = "/external/tools/tools/actions/search/invoke"
    body = agent.invoke_body("a-9", {"q": "x"}, path=path)
    foreign = {"Mcp-Session-Id": "session-1", "Mcp-Name": "other"}
    done = await agent.http.post(f"/api{path}", json=body, headers=foreign)
    assert done.json()["charged_credits"] == 5, done.text
    assert {session for _, session in scripted.asked} == {"", "session-3"}
    await scripted.heard(WHOLE)


async def test_a_server_without_sessions_is_asked_once(
    shop: Gateway, agent: Agent, scripted: Scripted
) -> None:
    scripted.stateful = False
    assert (await call(agent, "b-1", q="x")).json()["charged_credits"] == 5
    assert scripted.methods() == ["initialize", "tools/call"]
    assert (await call(agent, "b-2", q="x")).json()["charged_credits"] == 5
    assert scripted.methods() == ["tools/call"]
    # It has come to want them: the call that finds out is not charged, the next one has one.
    scripted.stateful = True
    refused = (await call(agent, "b-3", q="x")).json()
    assert (refused["success"], refused["charged_credits"]) == (False, 0)
    assert scripted.methods() == ["tools/call"]
    assert (await call(agent, "b-4", q="x")).json()["charged_credits"] == 5
    await scripted.heard(WHOLE)
    assert shop.balance(agent.wallet.address) == (5_000_000 - 3 * PRICE_UNITS, 0)


@pytest.mark.parametrize(
    ("fails", "asked"),
    [
        ("initialize", ["initialize"]),
        ("notifications/initialized", ["initialize", "notifications/initialized"]),
        ("tools/call", WHOLE),
    ],
)
async def test_a_session_that_fails_costs_nothing(
    shop: Gateway, agent: Agent, scripted: Scripted, fails: str, asked: list[str]
) -> None:
    scripted.fails = fails
    problem(await call(agent, "c-1", q="x"), "upstream_error")
    await scripted.heard(asked)
    assert shop.balance(agent.wallet.address) == (5_000_000, 0)
    scripted.fails = ""
    # What became of it is final; another call is another one.
    problem(await call(agent, "c-1", q="x"), "upstream_error")
    assert scripted.methods() == []
    assert (await call(agent, "c-2", q="x")).json()["charged_credits"] == 5


async def test_nobody_has_a_session_begun_without_credits(
    shop: Gateway, chain_session: Devnet, scripted: Scripted
) -> None:
    async with shop.client() as http:
        agent = Agent(http, new_wallet(chain_session, 0), chain_session)
        await agent.begin()
        problem(await call(agent, "d-1", q="x"), "insufficient_credits")
        path = f"{API}/tools/tools/actions/search/invoke"
        problem(await http.post(path, json={"q": "x"}), "payment_required")
    assert scripted.asked == []


# -- the list -------------------------------------------------------------------------------------


async def test_the_list_has_the_schemas_of_the_server(
    shop: Gateway, chain_session: Devnet, scripted: Scripted
) -> None:
    async with shop.client() as http:
        await until(http, SCHEMA)
        action = (await listed(http))["search"]
        assert (action["description"], action["price_credits"]) == ("Finds.", 5)
        assert scripted.methods().count("tools/list") == 1
        assert (await listed(http))["search"]["input_schema"] == SCHEMA
        assert scripted.methods() == []  # it is remembered
        # Read anew with the configuration.
        scripted.schema = {"type": "object", "properties": {"other": {}}}
        assert shop.process is not None
        shop.process.signal(signal.SIGHUP)
        await until(http, scripted.schema)
        # What is no schema, or too long to be shown, is none.
        for odd in ("text", {"type": "object", "x": "y" * 40_000}):
            scripted.schema = odd
            scripted.methods()
            shop.process.signal(signal.SIGHUP)
            await until(http, ANYTHING)


async def test_the_list_answers_when_the_server_is_silent(
    shop: Gateway, chain_session: Devnet, scripted: Scripted
) -> None:
    scripted.silent = True
    async with shop.client() as http:
        told = await asyncio.gather(*(listed(http) for _ in range(5)))
        assert [each["search"]["input_schema"] for each in told] == [ANYTHING] * 5
        assert [each["search"]["price_credits"] for each in told] == [5] * 5
        scripted.silent = False
        await until(http, SCHEMA)
