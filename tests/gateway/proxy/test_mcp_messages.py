"""MCP messages: what is read from a client, and what a server may say about money."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from gateway.errors import Problem
from gateway.pricing.flat import Flat
from gateway.pricing.scheduled import after
from gateway.proxy import events
from gateway.proxy import mcp_answers as answers
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


@pytest.mark.parametrize(
    "method", ["Tools/Call", "tools/call ", "tools/call\0", "tools／call", "\ttools/call"]
)
def test_a_call_in_another_spelling_is_not_free(method: str) -> None:
    """Some server would run it."""
    message = {"jsonrpc": "2.0", "id": 1, "method": method, "params": {"name": "search"}}
    with pytest.raises(Problem, match="invalid_request"):
        messages.read(json.dumps(message).encode())


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
    for name in ("Search", "SEARCH", " search", "search\n", "search\0x", "ｓearch", "ſearch"):
        with pytest.raises(Problem, match="not_found"):
            messages.price_of(tools, name)
    with pytest.raises(Problem, match="not_found"):
        messages.price_of(mount(search="$0.01").tools, "other")


FREE = {"units": 0, "usd": "$0", "credits": "0"}


def test_a_list_shows_prices_and_only_what_is_sold() -> None:
    theirs = {"a": 1, "farebox/price": {"units": 1}, "x402/offer": {}}
    tools = [{"name": "search", "description": "Finds.", "_meta": theirs}, {"name": "gift"}]
    odd = [{"name": "other"}, {"name": 7}, "none", {}]
    answer = {"jsonrpc": "2.0", "id": 1, "result": {"tools": tools + odd, "nextCursor": "n"}}
    shown = answers.listed(answer, mount(search="$0.005", gift="free").tools, 100, 0)["result"]
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
            {"name": "gift", "description": "Free.", "_meta": {"farebox/price": FREE}},
        ],
        "nextCursor": "n",
    }
    for other in ({"error": {}}, {"result": 7}, {"result": {"tools": 7}}):
        assert answers.listed(other, {}, 100, 0) == other


def test_a_list_shows_the_price_that_holds_now() -> None:
    """Also while the one before is still charged to those who may have read it."""
    (name, route), *_ = mount(search="$0.005").tools.items()
    raised = replace(route, price=after(Flat(2_000), 1_000, route.price))
    answer = {"jsonrpc": "2.0", "id": 1, "result": {"tools": [{"name": "search"}]}}
    (shown,) = answers.listed(answer, {name: raised}, 100, 1_001)["result"]["tools"]
    assert shown["_meta"]["farebox/price"] == {"units": 5_000, "usd": "$0.005", "credits": "0.5"}


OURS = {"x402/payment-response": {"success": True}}


def test_what_a_server_says_about_money_is_not_passed() -> None:
    theirs = {"x402/payment-response": {"success": False}, "farebox/charged": "0", "mine": 1}
    answer = {"id": 1, "result": {"content": [], "_meta": theirs}}
    assert answers.with_meta(answer, OURS)["result"]["_meta"] == {**OURS, "mine": 1}
    assert answers.with_meta({"id": 1, "result": {}}, {})["result"]["_meta"] == {}
    error = {"id": 1, "error": {"code": 1}}
    assert answers.with_meta(error, OURS) == error


ASKS = {"x402Version": 2, "accepts": [{}]}


@pytest.mark.parametrize(
    "answer",
    [
        {"error": {"code": 402, "data": ASKS}},
        {"error": {"code": -32402, "message": "pay"}},
        {"result": {"isError": True, "structuredContent": ASKS}},
        {"result": {"resultType": "payment_required", "paymentRequired": ASKS}},
        {"result": {"content": [], "paymentRequired": ASKS}},
        {"result": {"isError": True, "content": [{"type": "text", "text": json.dumps(ASKS)}]}},
    ],
)
def test_a_server_that_asks_for_payment_itself(answer: dict[str, Any]) -> None:
    with pytest.raises(Problem, match="upstream_wants_payment"):
        answers.why_not_charged(answer)
    told = answers.cleaned({"jsonrpc": "2.0", "id": 5, **answer})
    assert told["error"]["data"] == {"code": "upstream_wants_payment"}
    assert (told["id"], "accepts" in json.dumps(told)) == (5, False)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"result": {"content": []}}, None),
        ({"result": {"content": [], "isError": False}}, None),
        ({"result": {"content": [], "resultType": "complete"}}, None),
        ({"result": {"resultType": "input_required"}}, "answer_with:result.resultType"),
        ({"result": {"content": [], "isError": True}}, "answer_with:result.isError"),
        ({"error": {"code": -32602}}, "answer_with:error"),
        ({"error": "odd"}, "answer_with:error"),
        ({"result": None}, "answer_without:result"),
        ({}, "answer_without:result"),
    ],
)
def test_what_is_charged(answer: dict[str, Any], reason: str | None) -> None:
    assert answers.why_not_charged(answer) == reason


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
    assert answers.answers({"id": 1, "result": {}}, 1)
    for other in (None, {"id": 2, "result": {}}, {"id": 1, "method": "ping"}, {"result": {}}):
        assert not answers.answers(other, 1)


def test_a_free_answer_keeps_what_is_not_about_money() -> None:
    plain = {"id": 1, "result": {"content": []}}
    assert answers.cleaned(plain) == plain
    theirs = {"x402/payment-response": {"success": True}, "farebox/charged": "0", "mine": 1}
    told = answers.cleaned({"id": 1, "result": {"content": [], "_meta": theirs}})
    assert told == {"id": 1, "result": {"content": [], "_meta": {"mine": 1}}}
    notice = {"method": "notifications/x", "params": {"x402Version": 2}}
    assert answers.cleaned(notice) == notice


ASKING = json.dumps({"id": 1, "result": {"isError": True, "structuredContent": ASKS}}).encode()
# Ways to hide an event from a reader that is not the client's own.
HIDDEN = [
    b"data: " + ASKING + b"\n\r\n",
    b"data: " + ASKING + b"\r\n\n",
    b"data: " + ASKING + b"\r\r",
    b"\xef\xbb\xbfdata: " + ASKING + b"\n\n",
    b"data: " + ASKING[:9] + b"\ndata:" + ASKING[9:] + b"\n\n",
    b"data\ndata: " + ASKING + b"\n\n",
    b"data: " + ASKING.replace(b'"id"', b'"\xff": 0, "id"') + b"\n\n",
    b"data: [" + ASKING + b"]\n\n",
    b"data: " + ASKING.replace(b'"id": 1', b'"id": 1, "n": ' + b"1" * 5_000) + b"\n\n",
    b"data: " + ASKING[:-1] + b', "n": ' + b"[" * 9_000 + b"]" * 9_000 + b"}\n\n",
]


@pytest.mark.parametrize("stream", HIDDEN)
def test_no_event_that_asks_for_payment_is_passed(stream: bytes) -> None:
    first = events.split(stream + b"data: {}\n\n")
    assert first is not None
    assert b"accepts" not in answers.shown(first[0])
    second = events.split(first[1])
    assert second is not None and events.data_of(second[0]) == {}


def test_an_event_keeps_its_other_fields() -> None:
    event = b'id: 7\nevent: message\ndata: {"id":1,"result":{"_meta":{"x402/a":1}}}\n\n'
    told = answers.shown(event)
    assert told == b'id: 7\nevent: message\ndata: {"id": 1, "result": {"_meta": {}}}\n\n'
    for other in (b": still here\n\n", b"\n", b"retry: 5\n\n"):
        assert answers.shown(other) == other


CAPABLE = {"io.modelcontextprotocol/clientCapabilities": {"extensions": {"org.x402/payment": {}}}}
MODERN = {"io.modelcontextprotocol/protocolVersion": "2026-07-28"}


def test_who_speaks_the_extension_is_asked_in_its_words_and_the_server_does_not_know() -> None:
    read = messages.read(call(_meta={**CAPABLE, **MODERN, "x402/payment": {}}))
    assert (read.extension, read.typed) == (True, True)
    assert b"x402" not in read.up and b"2026-07-28" in read.up
    for odd in (7, {"extensions": 7}, {"extensions": {"org.x402/payment": None}}, {}):
        meta = {"io.modelcontextprotocol/clientCapabilities": odd}
        assert not messages.read(call(_meta=meta)).extension
    for old in ("2025-11-25", "3", 2026, "2026-7-28"):
        meta = {"io.modelcontextprotocol/protocolVersion": old}
        assert not messages.read(call(_meta=meta)).typed


def test_other_messages_take_no_payment_up() -> None:
    params = {"uri": "a", "_meta": {**CAPABLE, "x402/payment": {"x402Version": 2}}}
    body = {"jsonrpc": "2.0", "id": 1, "method": "resources/read", "params": params}
    assert b"x402" not in messages.read(json.dumps(body).encode()).up


def offered() -> Problem:
    from gateway.payments import challenge, offers
    from tests.gateway.payments.parts import KEYS

    return challenge.for_call(settings_for(), KEYS, offers.Asked("POST", b"/mcp", 5_000), 1)


def test_a_refusal_in_both_bindings() -> None:
    response = {"PAYMENT-RESPONSE": "eyJzdWNjZXNzIjpmYWxzZX0="}
    problem = offered()
    problem.headers.update(response)
    said = messages.refusal(problem, messages.read(call(_meta=CAPABLE)), "log")
    assert said["resultType"] == "payment_required"
    assert said["paymentRequired"]["resource"]["url"] == "mcp://tool/search"
    assert said["_meta"] == {"x402/payment-response": {"success": False}}
    assert said.keys() == {"resultType", "paymentRequired", "_meta"}
    old = messages.refusal(problem, messages.read(call()), "log")
    assert old["structuredContent"] == said["paymentRequired"]
    assert (old["isError"], "resultType" in old) == (True, False)
    assert messages.refusal(problem, messages.read(call(_meta=MODERN)), "log")["resultType"] == (
        "complete"
    )
    # What is not to be paid is not said in the extension's words.
    other = messages.refusal(Problem("rate_limited", "No."), messages.read(call(_meta=CAPABLE)), "")
    assert other["isError"] is True and "paymentRequired" not in other


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ([], True),
        ([(b"mcp-method", b"tools/call"), (b"Mcp-Name", b"search")], True),
        ([(b"mcp-name", b"=?base64?c2VhcmNo?=")], True),
        ([(b"mcp-name", b"other")], False),
        ([(b"mcp-name", b"search"), (b"mcp-name", b"other")], False),
        ([(b"mcp-name", b"=?base64?b3RoZXI=?=")], False),
        ([(b"mcp-name", b"=?base64?\xff?=")], False),
        ([(b"mcp-name", b"=?base64?/w==?=")], False),
        ([(b"MCP-METHOD", b"ping")], False),
    ],
)
def test_header_fields_that_repeat_the_message(
    fields: list[tuple[bytes, bytes]], same: bool
) -> None:
    message = messages.read(call())
    if same:
        messages.require_same(fields, message)
        return
    with pytest.raises(Problem, match="invalid_request"):
        messages.require_same(fields, message)


def test_what_a_tool_asked_for_is_part_of_the_call() -> None:
    plain, more = messages.read(call()), messages.read(call(inputResponses={"a": 1}))
    assert plain.content == plain.arguments == more.arguments
    assert more.content != plain.content
    again = messages.read(call(inputResponses={"a": 1}, _meta={"progressToken": 1}))
    assert again.content == more.content


def test_a_server_is_said_to_be_paid() -> None:
    found = {"id": 1, "result": {"capabilities": {"tools": {}, "extensions": {"a": {}}}}}
    told = answers.advertised(found)["result"]["capabilities"]
    assert told == {"tools": {}, "extensions": {"a": {}, "org.x402/payment": {}}}
    for other in ({"error": {}}, {"result": 7}, {"result": {"capabilities": 7}}):
        assert answers.advertised(other) == other
