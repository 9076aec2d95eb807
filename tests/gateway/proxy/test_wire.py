"""What a request may not be besides what it says: trailers, upgrades, callers that do not read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from operator import itemgetter
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.fields import EXCHANGE
from gateway.middleware import Outgoing, edge, read_body
from gateway.proxy import wire, wire_httptools
from tests.gateway.proxy.serving import PARSERS, body_of, serving, status_of, talk
from tests.servers import eventually

CHUNKED = b"POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n"
NEXT = b"GET /next HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Says what the request was: method, path, names of fields after its body, the body."""
    body = await read_body(receive, scope["headers"], 1_000_000)
    names = b",".join(sorted(name for name, _ in scope["headers"]))
    said = b" ".join((scope["method"].encode(), scope["raw_path"], names, body)) + b"\n"
    head = [(b"content-length", str(len(said)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": said})


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def in_two(port: int, first: bytes, then: bytes) -> bytes:
    """Send ``first``, let it arrive, send the rest, and read to the end."""
    async with connected(port) as (reader, writer):
        writer.write(first)
        await writer.drain()
        await asyncio.sleep(0.05)  # so that they are two reads; if they are not, it must hold too
        writer.write(then)
        return await asyncio.wait_for(reader.read(), 10)


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize(
    "what",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET /a HTTP/1.1\r\nHost: a\r\nPAYMENT-SIGNATURE: a\x00b\r\n\r\n",
        b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
        CHUNKED + b"\r\nzz\r\n",
    ],
)
async def test_what_cannot_be_parsed_is_refused_like_everything_else(
    parser: str, what: bytes
) -> None:
    """With a code and a request id; uvicorn would answer in plain text."""
    async with serving(edge(echo), parser) as port:
        answer = await talk(port, what)
    assert status_of(answer) == 400
    assert b"content-type: application/problem+json\r\n" in answer
    said = json.loads(body_of(answer))
    assert (said["code"], said["status"]) == ("invalid_request", 400)
    assert len(said["request_id"]) == 16 and said["next_actions"] == []


@pytest.mark.parametrize("parser", PARSERS)
async def test_trailers_are_no_header_fields(parser: str) -> None:
    fields = b"Farebox-Run: x\r\nX-Forwarded-For: 1.2.3.4\r\n"
    body = b"Connection: close\r\n\r\n3\r\nabc\r\n"
    async with serving(edge(echo), parser) as port:
        for answer in (
            await talk(port, CHUNKED + body + b"0\r\n" + fields + b"\r\n"),
            await in_two(port, CHUNKED + body, b"0\r\n" + fields + b"\r\n"),
        ):
            assert body_of(answer) == b"POST /a connection,host,transfer-encoding abc\n"


@pytest.mark.parametrize("what", [b"x: %s\r\n" % (b"y" * 90), b"z" * 90])
async def test_trailers_without_end_are_cut_off(what: bytes) -> None:
    held: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await echo(scope, receive, send)
        finally:
            held.append(sum(len(n) + len(v) for n, v in scope["headers"]))

    async with serving(edge(app), "httptools") as port, connected(port) as (_, writer):
        start = b"0\r\n" if what.startswith(b"x") else b"0\r\nx: "
        writer.write(CHUNKED + b"\r\n3\r\nabc\r\n" + start)
        sent = 0
        with pytest.raises(ConnectionError):
            while sent < 50 * wire.HEAD_BYTES:
                writer.write(what * 100)
                await writer.drain()
                await asyncio.sleep(0)
                sent += 100 * len(what)
        await eventually(lambda: bool(held))
    assert held[0] < 100


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize(
    "body",
    [
        b"Content-Length: %d\r\n\r\n%b" % (len(NEXT), NEXT),
        b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(NEXT), NEXT),
    ],
    ids=["length", "chunked"],
)
@pytest.mark.parametrize("cut", ["whole", "after the head", "in the head"])
async def test_the_body_of_an_upgrade_is_not_the_next_request(
    parser: str, body: bytes, cut: str
) -> None:
    head = b"POST /a HTTP/1.1\r\nHost: a\r\nUpgrade: h2c\r\nConnection: Upgrade, close\r\n"
    whole = head + body
    at = {"whole": len(whole), "after the head": whole.index(b"\r\n\r\n") + 4, "in the head": 30}
    async with serving(edge(echo), parser) as port:
        answer = await in_two(port, whole[: at[cut]], whole[at[cut] :])
    assert answer.count(b"HTTP/1.1 200") == 1
    assert body_of(answer).startswith(b"POST /a ")
    assert body_of(answer).endswith(b" " + NEXT + b"\n")


async def test_a_request_behind_an_upgrade_is_answered() -> None:
    upgrade = b"GET /a HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
    async with serving(edge(echo), "httptools") as port:
        for answer in (
            await talk(port, upgrade + upgrade + NEXT),
            await in_two(port, upgrade, upgrade + NEXT),
        ):
            assert answer.count(b"HTTP/1.1 200") == 3
            assert b"GET /a connection,host \n" in answer  # what nobody takes up is not told
            assert answer.endswith(b"GET /next connection,host \n")


async def test_nothing_is_read_behind_connect() -> None:
    connect = b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n"
    async with serving(edge(echo), "httptools") as port:
        for answer in (await talk(port, connect + NEXT), await in_two(port, connect, NEXT)):
            assert answer.count(b"HTTP/1.1 ") == 1
            assert b"connection: close" in answer


async def test_an_answer_is_not_written_into() -> None:
    """What is no HTTP behind a request ends the connection, and not as part of its answer."""
    go_on = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"part", "more_body": True})
        await go_on.wait()
        await send({"type": "http.response.body", "body": b"rest"})

    async with serving(app, "httptools") as port, connected(port) as (reader, writer):
        writer.write(NEXT.replace(b"Connection: close\r\n", b""))
        head = await reader.readuntil(b"part\r\n")
        writer.write(b"\x00\x01 no HTTP\r\n\r\n")
        rest = await asyncio.wait_for(reader.read(), 10)
        go_on.set()
    assert status_of(head) == 200
    assert rest == b""


def endless(gone: asyncio.Event) -> Callable[[Any, Any, Any], Awaitable[None]]:
    """An answer that goes on until the caller has left."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                continue
            gone.set()

        watching = asyncio.create_task(watch())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not gone.is_set():
            await send({"type": "http.response.body", "body": b"x" * 65_536, "more_body": True})
            await asyncio.sleep(0)
        await watching

    return app


@pytest.mark.parametrize("parser", PARSERS)
async def test_who_does_not_read_is_cut_off(parser: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "STALL_S", 0.2)
    gone = asyncio.Event()
    async with serving(endless(gone), parser) as port, connected(port) as (reader, writer):
        writer.transport.pause_reading()  # type: ignore[attr-defined]  # a socket's transport
        writer.write(NEXT)
        await asyncio.wait_for(gone.wait(), 10)
        del reader


class Clock:
    """A loop of which a test moves the time. Timers are kept by when they are due."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now_s

    def call_later(self, after_s: float, call: Callable[[], None]) -> Any:
        self.timers.append((self.now_s + after_s, call))
        return SimpleNamespace(cancel=lambda: None)

    def pass_(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while self.timers and (due := min(self.timers, key=itemgetter(0)))[0] <= end_s:
            self.timers.remove(due)
            self.now_s = due[0]
            due[1]()
        self.now_s = end_s


def test_who_reads_slowly_is_not() -> None:
    """However long it takes in all, as long as it takes something within each minute."""
    cut: list[float] = []
    clock = Clock()
    owner = SimpleNamespace(
        loop=clock, transport=SimpleNamespace(abort=lambda: cut.append(clock.now_s))
    )
    stall = wire.Stall(owner)
    for _ in range(10):
        stall.begin()
        clock.pass_(wire.STALL_S - 1)
        stall.over()
        clock.pass_(0.5)
    assert not cut and clock.now_s > 5 * wire.STALL_S
    began_s = clock.now_s
    stall.begin()
    clock.pass_(wire.STALL_S + 1)
    assert cut == [began_s + wire.STALL_S]


@pytest.mark.parametrize("behind", [b"", NEXT], ids=["alone", "another waits"])
async def test_whoever_is_being_answered_hears_that_the_caller_left(behind: bytes) -> None:
    gone = asyncio.Event()
    async with serving(endless(gone), "httptools") as port:
        async with connected(port) as (reader, writer):
            writer.write(NEXT.replace(b"Connection: close\r\n", b"") + behind)
            await reader.readexactly(100)
            writer.transport.abort()
        await asyncio.wait_for(gone.wait(), 10)


@pytest.mark.parametrize("field", [(b"a", b"b\r\nc: d"), (b"a", b"b\n\nc"), (b"a\0", b"b")])
async def test_a_field_that_would_be_two_leaves_no_caller_waiting(
    field: tuple[bytes, bytes],
) -> None:
    async def app(scope: Any, receive: Any, send: Outgoing) -> None:
        assert isinstance(scope["state"][EXCHANGE], wire_httptools.Exchange)
        await send.whole(200, [field], b"content-length: 2\r\n", b"ok")

    async with serving(edge(app), "httptools") as port:
        assert await talk(port, NEXT.replace(b"Connection: close\r\n", b"")) == b""
