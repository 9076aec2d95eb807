"""Request targets: the accepted ones pass untouched, under both of uvicorn's parsers; every form
that is known to be read in two ways is refused."""

from __future__ import annotations

import asyncio
import contextlib
import posixpath
from typing import Any
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.errors import Problem
from gateway.proxy import target, wire
from tests.gateway.proxy.serving import PARSERS, body_of, serving, status_of, talk
from tests.servers import eventually

ACCEPTED = [
    b"/",
    b"/a",
    b"/a/",
    b"/v1/forecast/oslo",
    b"/a?",
    b"/a?x=1&y=2",
    b"/a?b?c",
    b"/?",
    b"/a?url=https%3A%2F%2Fexample.com%2F..%2F%25",
    b"/a?x=../../etc;y=//z",
    b'/a?filter[a]=b&q="<>^`{|}\\',
    b"/a:b@c/$&'()*+,=!~._-",
    b"/foo%40bar.com",
    b"/caf%C3%A9",
    b"/caf%c3%a9",
    b"/a%20b",
    b"/a%3Fb",
    b"/a%23b",
    b"/a%5Bb%5D",
    b"/...",
    b"/..a",
    b"/.well-known/x",
    b"/a./b.",
    b"/a?line=%0A%00",
]

REFUSED = [
    b"",
    b"*",
    b"a",
    b"example.com:443",
    b"http://other/a",
    b"HTTP://other/a?b",
    b"//",
    b"//evil/b",
    b"/a//b",
    b"/a//",
    b"/.",
    b"/..",
    b"/./a",
    b"/../a",
    b"/a/.",
    b"/a/..",
    b"/a/./b",
    b"/free/../paid",
    b"/a/..?x",
    b"/a%2fb",
    b"/a%2Fb",
    b"/a%5cb",
    b"/a%5Cb",
    b"/%2e",
    b"/%2e%2e/a",
    b"/.%2e/a",
    b"/%2E./a",
    b"/a%2ejson",
    b"/a%252fb",
    b"/a%25",
    b"/a%00",
    b"/a%0d%0aX:1",
    b"/a%1f",
    b"/a%7f",
    b"/a;b",
    b"/a;/../b",
    b"/..;/b",
    b"/a%3bb",
    b"/a\\b",
    b"/a\\..\\b",
    b"/%66ree",
    b"/fre%65",
    b"/%2D",
    b"/%5F",
    b"/%7E",
    b"/%30",
    b"/a#f",
    b"/a?x#f",
    b"/a?#",
    b"/a b",
    b"/a\tb",
    b"/a\x00b",
    b"/a\x01",
    b"/a\x7f",
    b"/caf\xc3\xa9",
    b"/a?caf\xc3\xa9",
    b'/a"b',
    b"/a<b>",
    b"/a[b]",
    b"/a^b",
    b"/a`b",
    b"/a{b}",
    b"/a|b",
    b"/a%",
    b"/a%4",
    b"/a%zz",
    b"/a?%",
    b"/a?%zz",
    b"/a?x= ",
    b"/a?x=\x7f",
    b"/%ff",
    b"/%c0%ae",  # an overlong dot
    b"/%c0%af",  # an overlong slash
    b"/%ed%a0%80",  # a surrogate
    b"/%c3",
    b"/a?%ff",
    b"/a\n",
    b"/a?b\n",
    b"/" + b"a" * 8_000,
]


@pytest.mark.parametrize("raw", ACCEPTED)
def test_accepted(raw: bytes) -> None:
    found = target.parse(raw)
    assert found.raw == raw
    assert found.path + (b"" if found.query is None else b"?" + found.query) == raw
    assert found.decoded == unquote_to_bytes(found.path)


@pytest.mark.parametrize("raw", REFUSED)
def test_refused(raw: bytes) -> None:
    with pytest.raises(Problem) as raised:
        target.parse(raw)
    assert raised.value.code == "invalid_target"
    assert raised.value.status in (400, 414)


def test_an_empty_query_is_not_no_query() -> None:
    assert target.parse(b"/a").query is None
    assert target.parse(b"/a?").query == b""


@given(st.binary(max_size=40).map(lambda tail: b"/" + tail))
@example(b"/a/%2e%2e/b")
@example(b"/%")
def test_whatever_is_accepted_has_one_reading(raw: bytes) -> None:
    """The claim itself, checked against independent readers of paths."""
    try:
        found = target.parse(raw)
    except Problem as problem:
        assert problem.code == "invalid_target"
        return
    decoded = found.decoded.decode()  # UTF-8
    assert found.path.count(b"/") == found.decoded.count(b"/")
    for reading in (found.path.decode(), decoded):
        assert posixpath.normpath(reading) in (reading, reading.rstrip("/"), reading or "/")
        assert "\\" not in reading and ";" not in reading and "//" not in reading
    # Decoding again changes nothing that means anything to a router.
    assert b"%" not in found.decoded
    assert not any(byte < 0x20 or byte == 0x7F for byte in found.decoded)


async def echo_target(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the target as Farebox sees it, or the problem's status."""
    try:
        found = target.from_scope(scope)
        status, body = 200, found.raw
    except Problem as problem:
        status, body = problem.status, problem.code.encode()
    length = str(len(body)).encode()
    head = [(b"content-length", length), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})


@pytest.mark.parametrize("parser", PARSERS)
async def test_on_the_wire(parser: str) -> None:
    """Real bytes through both parsers: accepted targets arrive whole, the others give 400."""
    async with serving(echo_target, parser) as port:
        for raw in ACCEPTED:
            answer = await talk(port, b"GET " + raw + b" HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (status_of(answer), body_of(answer)) == (200, raw), raw
        for raw in REFUSED:
            if raw.endswith(b" "):
                continue  # on the wire that is one more separator, which parsers may skip
            answer = await talk(port, b"GET " + raw + b" HTTP/1.1\r\nHost: a\r\n\r\n")
            assert status_of(answer) in (400, 414), raw


@pytest.mark.parametrize("parser", PARSERS)
async def test_targets_do_not_leak_between_requests_of_a_connection(parser: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = target.from_scope(scope).raw + b"\n"
        head = [(b"content-length", str(len(body)).encode())]
        if scope["raw_path"] == b"/3":
            head.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": body})

    async with serving(app, parser) as port:
        request = b"".join(
            b"GET " + raw + b" HTTP/1.1\r\nHost: a\r\n\r\n" for raw in (b"/1?", b"/2", b"/3?c")
        )
        answer = await talk(port, request)
    assert [line for line in answer.split(b"\n") if line.startswith(b"/")] == [
        b"/1?",
        b"/2",
        b"/3?c",
    ]


async def test_without_our_protocol_the_target_is_rebuilt() -> None:
    scope = {"type": "http", "raw_path": b"/a", "query_string": b"x=1"}
    assert target.from_scope(scope).raw == b"/a?x=1"
    assert target.from_scope({**scope, "query_string": b""}).query is None


GOOD_FRAMING = [
    (b"", "1.1"),
    (b"content-length: 5", "1.1"),
    (b"transfer-encoding: chunked", "1.1"),
    (b"transfer-encoding: Chunked", "1.1"),
]
BAD_FRAMING = [
    (b"content-length: 5\ntransfer-encoding: chunked", "1.1"),
    (b"content-length: 5\ncontent-length: 6", "1.1"),
    (b"content-length: 5\ncontent-length: 5", "1.1"),
    (b"content-length: 5, 5", "1.1"),
    (b"content-length: +5", "1.1"),
    (b"content-length: -1", "1.1"),
    (b"content-length: 0x5", "1.1"),
    (b"content-length: ", "1.1"),
    (b"content-length: " + b"9" * 30, "1.1"),
    (b"transfer-encoding: chunked\ntransfer-encoding: chunked", "1.1"),
    (b"transfer-encoding: gzip, chunked", "1.1"),
    (b"transfer-encoding: identity", "1.1"),
    (b"transfer-encoding: xchunked", "1.1"),
    (b"transfer-encoding: chunked, identity", "1.1"),
    (b"transfer-encoding: chunked", "1.0"),
    (b"host: b", "1.1"),
]


def _fields(text: bytes, host: bool = True) -> list[tuple[bytes, bytes]]:
    fields = [(b"host", b"a")] if host else []
    for line in filter(None, text.split(b"\n")):
        name, _, value = line.partition(b": ")
        fields.append((name, value))
    return fields


@pytest.mark.parametrize(("text", "version"), GOOD_FRAMING)
def test_good_framing(text: bytes, version: str) -> None:
    target.check_framing(_fields(text), version)


@pytest.mark.parametrize(("text", "version"), BAD_FRAMING)
def test_bad_framing_closes_the_connection(text: bytes, version: str) -> None:
    with pytest.raises(Problem) as raised:
        target.check_framing(_fields(text), version)
    assert raised.value.status == 400
    assert raised.value.headers == {"Connection": "close"}


def test_host_may_be_missing_in_http_1_0_only() -> None:
    target.check_framing(_fields(b"", host=False), "1.0")
    with pytest.raises(Problem):
        target.check_framing(_fields(b"", host=False), "1.1")


@pytest.mark.parametrize("parser", PARSERS)
async def test_bad_framing_on_the_wire(parser: str) -> None:
    """Nothing after a request with two lengths is taken for a second request."""
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["path"])
        try:
            target.check_framing(scope["headers"], scope["http_version"])
            status, extra = 200, []
        except Problem as problem:
            status = problem.status
            extra = [(k.lower().encode(), v.encode()) for k, v in problem.headers.items()]
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(b"content-length", b"0"), *extra],
            }
        )
        await send({"type": "http.response.body", "body": b""})

    smuggled = b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
    async with serving(app, parser) as port:
        for text, version in BAD_FRAMING:
            if parser == "h11" and text in (
                b"content-length: 5\ncontent-length: 5",
                b"content-length: 5, 5",
            ):
                continue  # h11 makes one field of equal ones, as RFC 9110 section 8.6 allows
            head = b"POST /a HTTP/" + version.encode() + b"\r\nhost: a\r\n"
            head += text.replace(b"\n", b"\r\n") + b"\r\n\r\n"
            answer = await talk(port, head + smuggled)
            assert status_of(answer) == 400, text
    assert "/smuggled" not in seen


async def test_a_head_without_end_is_cut_off() -> None:
    """httptools itself would collect such a header for ever."""
    async with serving(echo_target, "httptools") as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /a HTTP/1.1\r\nHost: a\r\nX: ")
        reading = asyncio.create_task(reader.read())
        sent = 0
        while not reading.done() and sent < 50 * wire.HEAD_BYTES:
            writer.write(b"a" * 16_384)
            sent += 16_384
            await asyncio.sleep(0)
            with contextlib.suppress(ConnectionError):
                await writer.drain()
        with contextlib.suppress(ConnectionError):  # a reset may overtake the answer
            assert status_of(await asyncio.wait_for(reading, 10)) == 431
        writer.close()


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("sent", [b"", b"GET /a HTTP/1.1\r\nHo"])
async def test_a_head_that_never_ends_times_out(
    parser: str, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "HEAD_TIMEOUT_S", 0.05)
    async with serving(echo_target, parser) as port:
        assert status_of(await talk(port, sent)) == 408


@pytest.mark.parametrize("parser", PARSERS)
async def test_the_head_timeout_spares_a_slow_answer(
    parser: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that is being answered, with half of the next one sent already, is not cut."""
    monkeypatch.setattr(wire, "HEAD_TIMEOUT_S", 0.2)
    late = 0
    when_late = wire.Head._late

    def count(head: wire.Head) -> None:
        nonlocal late
        late += 1
        when_late(head)

    monkeypatch.setattr(wire.Head, "_late", count)

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        # h11 reads no next head before this request has its answer.
        await eventually(lambda: late > 1 or parser == "h11", "the second look")
        await echo_target(scope, receive, send)

    async with serving(slow, parser) as port:
        answer = await talk(port, b"GET /a HTTP/1.1\r\nHost: a\r\n\r\nGET /b HTTP/1.1\r\nHo")
    assert (status_of(answer), body_of(answer)) == (200, b"/a")
