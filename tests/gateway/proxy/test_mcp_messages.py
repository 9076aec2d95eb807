"""MCP messages: what is read from a client, and what a server may say about money."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.errors import Problem
from gateway.proxy import events
from gateway.proxy import mcp_messages as messages
from gateway.proxy.routes_table import McpMount, compile_routes
from tests.gateway.payments.parts import settings_for

PRICES = {"search": "$0.005", "gift": "free", "*": "$0.01"}


def mount(**prices: str) -> McpMount:
    tools = {"kind": "mcp", "url": "http://127.0.0.1:9/mcp", "mount": "/mcp", "tools": prices}
    found = compile_routes(settings_for(upstreams={"tools": tools}).upstreams).match(
        "POST", b"/mcp"
    )
    assert isinstance(found, McpMount)
    return found


def call(**params: Any) -> bytes:
    params = {"name": "search", "arguments": {"b": 1, "a": 2}} | params
    return json.dumps(
        {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
    ).encode()


def test_a_payment_is_taken_out_of_the_message() -> None:
    read = messages.read(call(_meta={"x402/payment": {"x402Version": 2}, "progressToken": 7}))
    assert read.payment == {"x402Version": 2}
    assert b"x402" not in read.up and b'"progressToken":7' in read.up
    alone = messages.read(call(_meta={"x402/payment": '{"x402Version": 2}'}))
    assert alone.payment == {"x402Version": 2}
    assert b"_meta" not in alone.up


@pytest.mark.parametrize("payment", ["no json", "[]", 7, ["a"], None])
def test_a_payment_that_is_none(payment: object) -> None:
    with pytest.raises(Problem, match="invalid_payload"):
        messages.read(call(_meta={"x402/payment": payment}))


def test_what_is_asked_is_the_same_however_it_is_spelled() -> None:
    one, other = (
        messages.read(call(arguments=each, _meta={"progressToken": n}))
        for n, each in enumerate(({"a": 2, "b": 1}, {"b": 1, "a": 2}))
    )
    assert one.arguments == other.arguments
    assert one.arguments != messages.read(call(arguments={"a": 2})).arguments


def test_the_price_of_a_tool() -> None:
    tools = mount(**PRICES).tools
    assert messages.price_of(tools, "search").price.fixed_units == 5_000
    assert messages.price_of(tools, "other").price.fixed_units == 10_000
    assert messages.price_of(tools, "gift").free
    for name in ("Search", "SEARCH", " search", "search\n"):
        with pytest.raises(Problem, match="not_found"):
            messages.price_of(tools, name)
    with pytest.raises(Problem, match="not_found"):
        messages.price_of(mount(search="$0.01").tools, "other")


def test_a_list_shows_prices_and_only_what_is_sold() -> None:
    tools = [{"name": "search", "description": "Finds.", "_meta": {"a": 1}}, {"name": "gift"}]
    odd = [{"name": "other"}, {"name": 7}, "none", {}]
    answer = {"jsonrpc": "2.0", "id": 1, "result": {"tools": tools + odd, "nextCursor": "n"}}
    shown = messages.listed(answer, mount(search="$0.005", gift="free").tools, 100)["result"]
    assert shown == {
        "tools": [
            {
                "name": "search",
                "description": "Finds. Price: $0.005 a call.",
                "_meta": {
                    "a": 1,
                    "farebox/price": {"units": 5_000, "usd": "$0.005", "credits": "0.5"},
                },
            },
            {"name": "gift", "description": "Free.", "_meta": {"farebox/price": {"units": 0}}},
        ],
        "nextCursor": "n",
    }
    for other in ({"error": {}}, {"result": 7}, {"result": {"tools": 7}}):
        assert messages.listed(other, {}, 100) == other


OURS = {"x402/payment-response": {"success": True}}


def test_what_a_server_says_about_money_is_not_passed() -> None:
    theirs = {"x402/payment-response": {"success": False}, "farebox/charged": "0", "mine": 1}
    answer = {"id": 1, "result": {"content": [], "_meta": theirs}}
    assert messages.with_meta(answer, OURS)["result"]["_meta"] == {**OURS, "mine": 1}
    assert messages.with_meta({"id": 1, "result": {}}, {})["result"]["_meta"] == {}
    error = {"id": 1, "error": {"code": 1}}
    assert messages.with_meta(error, OURS) == error


ASKS = {"x402Version": 2, "accepts": [{}]}


@pytest.mark.parametrize(
    "answer",
    [
        {"error": {"code": 402, "data": ASKS}},
        {"result": {"isError": True, "structuredContent": ASKS}},
        {"result": {"isError": True, "content": [{"type": "text", "text": json.dumps(ASKS)}]}},
    ],
)
def test_a_server_that_asks_for_payment_itself(answer: dict[str, Any]) -> None:
    with pytest.raises(Problem, match="upstream_wants_payment"):
        messages.why_not_charged(answer)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"result": {"content": []}}, None),
        ({"result": {"content": [], "isError": False}}, None),
        ({"result": {"content": [], "isError": True}}, "answer_with:result.isError"),
        ({"error": {"code": -32602}}, "answer_with:error"),
        ({"error": "odd"}, "answer_with:error"),
        ({"result": None}, "answer_without:result"),
        ({}, "answer_without:result"),
    ],
)
def test_what_is_charged(answer: dict[str, Any], reason: str | None) -> None:
    assert messages.why_not_charged(answer) == reason


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_events_are_told_apart(end: bytes) -> None:
    lines = [b": a note", b'data: {"id": 1,', b'data:"result": {}}', b"", b"data: {}", b"", b"da"]
    first = events.split(end.join(lines))
    assert first is not None
    assert events.data_of(first[0]) == {"id": 1, "result": {}}
    second = events.split(first[1])
    assert second is not None and events.data_of(second[0]) == {}
    assert events.split(second[1]) is None


def test_the_response_to_ours() -> None:
    assert messages.answers({"id": 1, "result": {}}, 1)
    for other in (None, {"id": 2, "result": {}}, {"id": 1, "method": "ping"}, {"result": {}}):
        assert not messages.answers(other, 1)
