"""Callers that leave, or are slow, while the upstream has nothing to say: what that keeps busy."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from gateway.fields import EXCHANGE
from gateway.proxy import streaming, wire, wire_httptools
from tests.gateway.payments.parts import PAY_TO
from tests.gateway.proxy import misbehave
from tests.gateway.proxy.misbehave import Request, Upstream, Writer
from tests.gateway.proxy.serving import PARSERS, body_of, serving, status_of
from tests.gateway.proxy.whole import CREDITS_UNITS, EVENTS, PRICE_UNITS, until_cut, whole
from tests.servers import eventually

EVENT = b"9\r\ndata: 1\n\n\r\n"
PATIENCE_S = 20  # for what takes no time at all


async def within(work: Any) -> Any:
    return await asyncio.wait_for(work, PATIENCE_S)


# --- on the wire ----------------------------------------------------------------------------------

GET = b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.mark.parametrize("parser", PARSERS)
async def test_who_leaves_behind_a_second_request_has_left(
    parser: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another request waits nothing is read: the transport does not see the end."""
    monkeypatch.setattr(wire, "_LOOK_EVERY_S", 0.05)
    listening, gone = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        listening.set()
        while (await receive())["type"] != "http.disconnect":
            continue
        gone.set()

    async with serving(app, parser) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET)
        await within(listening.wait())
        writer.write(GET)
        writer.close()
        await within(gone.wait())


async def test_who_leaves_behind_a_body_that_nobody_takes_has_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wire, "_LOOK_EVERY_S", 0.05)
    exchanges: list[wire_httptools.Exchange] = []
    over = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        exchanges.append(scope["state"][EXCHANGE])
        await over.wait()

    async with serving(app, "httptools") as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        head = b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 900000\r\n\r\n"
        writer.write(head + b"x" * 150_000)
        await eventually(lambda: bool(exchanges) and exchanges[0].flow.read_paused)
        writer.close()
        await eventually(lambda: exchanges[0].disconnected)
        over.set()


@pytest.mark.parametrize("parser", PARSERS)
async def test_who_sends_more_than_is_wanted_now_has_not_left(
    parser: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "_LOOK_EVERY_S", 0.01)
    waited = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await waited.wait()
        head = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": b"ok"})

    looks: list[bool] = []
    left = wire._left
    monkeypatch.setattr(wire, "_left", lambda t: looks.append(left(t)) or looks[-1])
    async with serving(app, parser) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET + GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        await eventually(lambda: len(looks) > 3)
        waited.set()
        answers = await within(reader.read())
        writer.close()
    assert answers.count(b"HTTP/1.1 200") == 2
    assert not any(looks)


async def refuse(scope: Any, receive: Any, send: Any) -> None:
    """Answers before the body, and wants no more of this connection."""
    head = [(b"content-length", b"3"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 413, "headers": head})
    await send({"type": "http.response.body", "body": b"no\n"})


LONG = b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n"


async def test_an_answer_before_the_end_of_the_request_is_not_taken_back() -> None:
    async with serving(refuse, "httptools") as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(LONG)
        for _ in range(200):  # more than all buffers between us hold
            writer.write(b"x" * 100_000)
            await within(writer.drain())
        assert body_of(await within(reader.read())) == b"no\n"
        writer.close()


async def test_but_it_is_not_read_away_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_httptools, "LINGER_S", 0.1)
    monkeypatch.setattr(wire, "_LOOK_EVERY_S", 0.05)
    async with serving(refuse, "httptools") as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(LONG)

        async def send_on() -> None:
            while True:
                writer.write(b"x" * 100_000)
                await writer.drain()
                await asyncio.sleep(0)

        with pytest.raises(ConnectionError):
            await within(send_on())
        writer.close()


# --- free routes ----------------------------------------------------------------------------------


async def test_a_slow_upload_keeps_no_connection_to_the_upstream(sqlite_url: str) -> None:
    body = b"x" * 3_000
    async with whole(sqlite_url) as shop, shop.caller() as (reader, writer):
        request = shop.request("POST", "/free/a", body, Connection="close")
        writer.write(request[:-1])
        async with shop.caller() as (other, asking):
            asking.write(shop.request("GET", "/free/b", Connection="close"))
            assert status_of(await within(other.read())) == 200
        assert (shop.up.connections, shop.up.begun) == (1, 1)  # the other's
        writer.write(request[-1:])
        assert (await within(reader.read())).endswith(body)


async def test_who_leaves_an_upload_was_never_there(sqlite_url: str) -> None:
    async with whole(sqlite_url) as shop:
        async with shop.caller() as (_, writer):
            writer.write(shop.request("POST", "/free/a", b"x" * 300_000)[:-1])
            await writer.drain()
        async with shop.caller() as (reader, writer):
            writer.write(shop.request("GET", "/free/b", Connection="close"))
            assert status_of(await within(reader.read())) == 200
        assert [request.target for request in shop.up.requests] == [b"/free/b"]
        assert shop.up.begun == 1


@pytest.mark.parametrize("memory", ["1 MiB", "64 KiB"])
async def test_a_body_arrives_whole_from_memory_or_disk(memory: str, sqlite_url: str) -> None:
    body = bytes(range(256)) * 1_000
    async with (
        whole(sqlite_url, body_memory=memory) as shop,
        shop.caller() as (reader, writer),
    ):
        writer.write(shop.request("POST", "/free/a", body, Connection="close"))
        assert (await within(reader.read())).endswith(body)
        (seen,) = shop.up.requests
    assert seen.body == body
    assert seen.header(b"content-length") == [str(len(body)).encode()]


# --- priced routes --------------------------------------------------------------------------------


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "DRAIN_S", 0.1)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("parser", PARSERS)
async def test_a_silent_stream_is_cut_and_charged_when_its_caller_has_left(
    parser: str,
    sqlite_url: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Not at the upstream's timeout, a minute later, and not as if the upstream had failed."""
    cut = asyncio.Event()
    monkeypatch.setitem(misbehave.BEHAVIOURS, b"/quiet", until_cut(EVENTS + EVENT, cut))
    async with whole(sqlite_url, parser) as shop:
        async with shop.caller() as (reader, writer):
            writer.write(shop.signed("GET", "/quiet"))
            await within(reader.readuntil(b"data: 1\n\n"))
        await within(cut.wait())
        await within(_empty(shop.node.in_flight))
        assert await shop.ended() == [("capture", None)]
        assert await shop.available_units() == CREDITS_UNITS - PRICE_UNITS
    assert "upstream_timeout" not in caplog.text


async def test_a_stream_that_ends_in_time_is_heard_out(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who left may ask again, and gets the answer that was paid for."""
    go_on = asyncio.Event()

    async def behave(_up: Upstream, _request: Request, writer: Writer) -> bool:
        writer.write(EVENTS + EVENT)
        await go_on.wait()
        writer.write(EVENT + b"0\r\n\r\n")
        return True

    monkeypatch.setitem(misbehave.BEHAVIOURS, b"/later", behave)
    hurried: list[float] = []
    hear_out = streaming.Answer.hear_out
    monkeypatch.setattr(
        streaming.Answer, "hear_out", lambda a, s: (hurried.append(s), hear_out(a, s))[0]
    )
    async with whole(sqlite_url) as shop:
        request = shop.signed("GET", "/later")
        async with shop.caller() as (reader, writer):
            writer.write(request)
            await within(reader.readuntil(b"data: 1\n\n"))
        await eventually(lambda: bool(hurried))  # it is known that nobody is there
        go_on.set()
        await within(_empty(shop.node.in_flight))
        async with shop.caller() as (reader, writer):
            writer.write(request)
            again = await within(reader.readuntil(b"data: 1\n\ndata: 1\n\n"))
    assert b"farebox-replayed: true" in again.lower()
    assert hurried == [streaming.DRAIN_S]


async def _empty(table: dict[int, Any]) -> None:
    while table:
        await asyncio.sleep(0.005)


# --- tools ----------------------------------------------------------------------------------------

CALL = json.dumps(
    {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "a", "arguments": {}}}
).encode()
NOTICE = b'data: {"jsonrpc": "2.0", "method": "notifications/progress"}\n\n'
GOING_ON = EVENTS + b"%x\r\n%b\r\n" % (len(NOTICE), NOTICE)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("how", ["silent", "breaks off", "ends without a response"])
async def test_a_tool_whose_caller_has_left_is_charged(
    how: str, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It did its work; else who calls, leaves and lets it be cut rides free."""
    cut, go_on = asyncio.Event(), asyncio.Event()
    silent = until_cut(GOING_ON, cut)

    async def ends(_up: Upstream, _request: Request, writer: Writer) -> bool:
        writer.write(GOING_ON)
        await go_on.wait()
        if how == "ends without a response":
            writer.write(b"0\r\n\r\n")
        cut.set()
        return False

    hurried: list[float] = []
    hear_out = streaming.Answer.hear_out

    def hear(answer: streaming.Answer, within_s: float) -> None:
        hurried.append(within_s)
        hear_out(answer, within_s if how == "silent" else PATIENCE_S)
        go_on.set()

    monkeypatch.setattr(streaming.Answer, "hear_out", hear)
    monkeypatch.setitem(misbehave.BEHAVIOURS, b"/mcp", silent if how == "silent" else ends)
    async with whole(sqlite_url) as shop:
        async with shop.caller() as (reader, writer):
            writer.write(shop.signed("POST", "/mcp", CALL))
            await within(reader.readuntil(b"notifications/progress"))
        await within(cut.wait())
        await within(_empty(shop.node.in_flight))
        assert await shop.ended() == [("capture", None)]
    assert hurried == [streaming.DRAIN_S]


# --- payments beside a long body ------------------------------------------------------------------


@pytest.mark.parametrize("parser", PARSERS)
async def test_a_malformed_payment_is_refused_before_its_body(parser: str, sqlite_url: str) -> None:
    """And the connection serves the next request: what was not wanted is read away."""
    body = b"x" * 1_000_000
    async with whole(sqlite_url, parser) as shop, shop.caller() as (reader, writer):
        fields = {"PAYMENT-SIGNATURE": "bm90IGpzb24=", "Content-Type": "text/plain"}
        request = shop.request("POST", "/a", body, **fields)
        writer.write(request[: -len(body)])
        told = await within(reader.readuntil(b"invalid_payload"))
        assert status_of(told) == 400
        writer.write(body + shop.request("GET", "/free/b", Connection="close"))
        assert b"GET /free/b HTTP/1.1" in await within(reader.read())
        assert [request.target for request in shop.up.requests] == [b"/free/b"]
        assert await shop.ended() == []


async def test_a_payment_in_another_token_is_refused_before_its_body(sqlite_url: str) -> None:
    offer = {
        "scheme": "exact",
        "network": "eip155:84532",
        "amount": str(PRICE_UNITS),
        "asset": "0x" + "77" * 20,
        "payTo": PAY_TO,
        "maxTimeoutSeconds": 60,
    }
    async with whole(sqlite_url) as shop, shop.caller() as (reader, writer):
        fields = {"PAYMENT-SIGNATURE": shop.wallet.pay(offer)}
        request = shop.request("POST", "/a", b"x" * 1_000_000, **fields)
        writer.write(request[:-1_000_000])
        told = await within(reader.readuntil(b"invalid_payment_requirements"))
    assert status_of(told) == 402
