"""What costs nothing on an MCP server, and a server that tries to be paid for it by the callers."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Callable, Iterator
from typing import Any, Final

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.demo.upstreams import Calls, SampleApi
from tests.e2e.stage import PRICE_UNITS, Api, Gateway
from tests.e2e.test_mcp import ACCEPT, ask, called, open_shop, paying, required, result
from tests.e2e.wallet import Wallet, problem
from tests.gateway.proxy import misbehave

ASKS: Final = {"x402Version": 2, "accepts": [{"payTo": "0x" + "66" * 20}]}
ASKING: Final = {"isError": True, "structuredContent": ASKS, "content": []}
TYPED: Final = {"resultType": "payment_required", "paymentRequired": ASKS}
META: Final = {"x402/payment-response": {"success": True}, "farebox/charged": "0", "mine": 1}
JSON: Final = "application/json"
STREAM: Final = "text/event-stream"


def respond(message_id: Any, how: str) -> Response:
    def whole(result: dict[str, Any], **other: Any) -> bytes:
        return json.dumps({"jsonrpc": "2.0", "id": message_id, "result": result, **other}).encode()

    asking, good = whole(ASKING), whole({"content": []})
    error = {"jsonrpc": "2.0", "id": message_id, "error": {"code": 402, "data": ASKS}}
    # A client may read the id "1" as 1.
    mixed = b"data: %b\n\ndata: %b\n\n" % (whole(ASKING, id=str(message_id)), good)
    known: dict[str, tuple[bytes, str]] = {
        "json": (asking, JSON),
        "typed": (whole(TYPED), JSON),
        "error": (json.dumps(error).encode(), JSON),
        "stream": (b"data: " + asking + b"\n\r\ndata: {}\n\n", STREAM),
        "other id": (mixed, STREAM),
        "array": (b"[" + asking + b"]", JSON),
        "gzip": (gzip.compress(asking), JSON),
        "gzip stream": (gzip.compress(b"\n\ndata: " + asking + b"\n\n", 0), STREAM),
        "created": (asking, JSON),
        "long": (b'{"a":"' + b"x" * (5 << 20) + b'"}', JSON),
        "well": (whole({"content": [], "_meta": META}), "text/x"),
    }
    body, kind = known[how]
    fields = {"content-encoding": "gzip"} if how.startswith("gzip") else {}
    return Response(body, 201 if how == "created" else 200, fields, media_type=kind)


def build(calls: Calls) -> Starlette:
    async def message(request: Request) -> Response:
        if request.method == "GET":
            return respond(1, "stream")
        sent = await request.json()
        params = sent.get("params") or {}
        calls.note(sent["method"].upper(), json.dumps(params.get("_meta")), None)
        if sent["method"] == "server/discover":
            found = {"capabilities": {"tools": {}}, "resultType": "complete"}
            return Response(json.dumps({"jsonrpc": "2.0", "id": sent["id"], "result": found}))
        how = params.get("uri") or (params.get("arguments") or {}).get("how")
        return respond(sent["id"], str(how))

    return Starlette(routes=[Route("/mcp", message, methods=["GET", "POST"])])


@pytest.fixture(scope="module")
def server() -> Iterator[SampleApi]:
    with SampleApi(make=build) as running:
        yield running


@pytest.fixture
def shop(launch: Callable[..., Gateway], server: SampleApi) -> Gateway:
    server.calls.clear()
    return open_shop(launch, f"{server.url}/mcp")


def says_nothing_of_money(answer: httpx.Response) -> None:
    assert "accepts" not in answer.text and "66" * 20 not in answer.text, answer.text
    assert "x402" not in answer.text
    assert gzip.compress(b"")[:2] not in answer.content


HOW = ["json", "typed", "error", "stream", "other id", "array", "gzip", "gzip stream", "created"]


@pytest.mark.parametrize("how", [*HOW, "long"])
async def test_a_free_answer_never_asks_for_payment(shop: Gateway, how: str) -> None:
    read = {"jsonrpc": "2.0", "id": 1, "method": "resources/read", "params": {"uri": how}}
    async with shop.client() as http:
        for message in (called("ping", how=how), read):
            answer = await ask(http, message)
            says_nothing_of_money(answer)
            if how in {"json", "typed", "error", "created"}:
                told = answer.json()
                assert told["id"] == 1
                assert told["error"]["data"] == {"code": "upstream_wants_payment"}
            elif how in {"array", "gzip", "gzip stream", "long"}:
                problem(answer, "upstream_error")
        listening = await http.get("/mcp", headers=ACCEPT)
        says_nothing_of_money(listening)


@pytest.mark.parametrize("how", HOW)
async def test_neither_does_one_that_is_paid_for(shop: Gateway, how: str, wallet: Wallet) -> None:
    async with shop.client() as http:
        message = called("search", how=how)
        paid = paying(wallet, message, required(await ask(http, message)))
        passed = b""
        with contextlib.suppress(httpx.RemoteProtocolError):  # a stream that has begun is cut
            body = json.dumps(paid)
            async with http.stream("POST", "/mcp", content=body, headers=ACCEPT) as answer:
                async for piece in answer.aiter_raw():
                    passed += piece
        assert b"66" * 20 not in passed
        assert gzip.compress(b"")[:2] not in passed
    # Its last word was a result in one case only.
    assert shop.balance(wallet.address)[0] == PRICE_UNITS - (5_000 if how == "other id" else 0)


async def test_what_else_an_answer_says_is_passed(shop: Gateway) -> None:
    async with shop.client() as http:
        told = result(await ask(http, called("ping", how="well")))
        assert told == {"content": [], "_meta": {"mine": 1}}


EXTENSION: Final = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientCapabilities": {"extensions": {"org.x402/payment": {}, "a": {}}},
}


def with_extension(message: dict[str, Any]) -> dict[str, Any]:
    params = message["params"]
    return {**message, "params": {**params, "_meta": {**params.get("_meta", {}), **EXTENSION}}}


async def test_who_speaks_the_extension_is_asked_and_pays(
    shop: Gateway, server: SampleApi, wallet: Wallet
) -> None:
    async with shop.client() as http:
        discover = {"jsonrpc": "2.0", "id": 0, "method": "server/discover", "params": {}}
        capabilities = result(await ask(http, discover))["capabilities"]
        assert capabilities == {"tools": {}, "extensions": {"org.x402/payment": {}}}

        message = called("search", how="well")
        asked = result(await ask(http, with_extension(message)))
        assert asked["resultType"] == "payment_required"
        assert asked.keys() == {"resultType", "paymentRequired"}
        told = asked["paymentRequired"]
        assert told["accepts"][0]["amount"] == str(PRICE_UNITS)
        assert server.calls.count() == 1

        paid = paying(wallet, message, told)
        bought = result(await ask(http, with_extension(paid)))
        assert bought["_meta"]["x402/payment-response"]["success"] is True
        assert bought["_meta"]["farebox/charged"] == "0.5"
        # The server does not learn that its caller can pay, or what.
        capable = "io.modelcontextprotocol/clientCapabilities"
        up = json.dumps({**EXTENSION, capable: {"extensions": {"a": {}}}})
        assert server.calls.count(f"TOOLS/CALL {up}") == 1

        # One that was used for another call is answered with new offers, and with no settlement.
        other = {**paid, "params": {**paid["params"], "arguments": {"how": "json"}}}
        again = result(await ask(http, with_extension(other)))
        assert again["resultType"] == "payment_required"
        assert again["paymentRequired"]["error"].startswith("payment_already_used")
        assert result(await ask(http, other))["structuredContent"]["code"] == "payment_already_used"
    assert shop.received() == PRICE_UNITS


async def test_header_fields_cannot_name_another_tool(shop: Gateway, server: SampleApi) -> None:
    async with shop.client() as http:
        free = called("ping", how="well")
        for wrong in ({"Mcp-Name": "search"}, {"Mcp-Method": "tools/list"}):
            problem(await ask(http, free, **wrong), "invalid_request")
        right = {"Mcp-Name": "ping", "Mcp-Method": "tools/call"}
        assert (await ask(http, free, **right)).status_code == 200
    assert server.calls.count() == 1


@pytest.mark.parametrize("how", ["gzip", "gzip stream", "array", "stream"])
async def test_fields_may_be_spelled_as_most_servers_do(
    launch: Callable[..., Gateway], api: Api, how: str
) -> None:
    """With capitals, over a server that does not make them small."""

    async def spelled(_up: Any, request: misbehave.Request, writer: Any) -> bool:
        made = respond(1, how)
        fields = [n.title() + b": " + v for n, v in made.raw_headers if n != b"content-length"]
        writer.write(misbehave.answer(bytes(made.body), *fields))
        return True

    path = f"/spelled-{how.replace(' ', '-')}"
    misbehave.BEHAVIOURS[path.encode()] = spelled
    try:
        shop = open_shop(launch, api.url + path)
        async with shop.client() as http:
            says_nothing_of_money(await ask(http, called("ping", how=how)))
    finally:
        del misbehave.BEHAVIOURS[path.encode()]
