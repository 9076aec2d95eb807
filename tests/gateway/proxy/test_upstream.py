"""Calls of an upstream: what is sent is what was given, what comes back is what was sent."""

from __future__ import annotations

import asyncio

import pytest

from gateway.proxy import connection as connection_module
from gateway.proxy import target as targets
from gateway.proxy.client import UpstreamClient, parse_origin
from gateway.proxy.connection import request_head
from tests.gateway.proxy.calls import calling, pieces, whole
from tests.gateway.proxy.misbehave import Upstream
from tests.gateway.proxy.test_target import ACCEPTED
from tests.servers import eventually

# --- what goes out ------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", ACCEPTED)
async def test_every_accepted_target_arrives_unchanged(
    raw: bytes, up: Upstream, client: UpstreamClient
) -> None:
    async with calling(client, up, targets.parse(raw).raw) as answer:
        await whole(answer)
    assert [r.target for r in up.requests] == [raw]


async def test_nothing_is_added_and_bytes_are_kept(up: Upstream, client: UpstreamClient) -> None:
    fields = [(b"x-a", b"1"), (b"x-a", b"2"), (b"x-utf8", "é".encode()), (b"x-raw", b"caf\xe9\x80")]
    async with calling(client, up, b"/echo", headers=fields) as answer:
        assert answer.status == 200
        sent = await whole(answer)
    authority = parse_origin(up.url).authority
    assert sent == (
        b"GET /echo HTTP/1.1\r\nhost: " + authority + b"\r\nx-a: 1\r\nx-a: 2\r\n"
        b"x-utf8: \xc3\xa9\r\nx-raw: caf\xe9\x80\r\n\r\n"
    )


@pytest.mark.parametrize(
    ("method", "body", "framing"),
    [
        ("GET", None, []),
        ("GET", b"", []),
        ("GET", b"x", [(b"content-length", b"1")]),
        ("DELETE", None, []),
        ("POST", None, [(b"content-length", b"0")]),
        ("POST", b"", [(b"content-length", b"0")]),
        ("POST", b"abc", [(b"content-length", b"3")]),
        ("PUT", None, [(b"content-length", b"0")]),
        ("QUERY", b"q", [(b"content-length", b"1")]),
    ],
)
async def test_framing_of_whole_bodies(
    method: str,
    body: bytes | None,
    framing: list[tuple[bytes, bytes]],
    up: Upstream,
    client: UpstreamClient,
) -> None:
    async with calling(client, up, b"/echo", method, body=body) as answer:
        await whole(answer)
    (request,) = up.requests
    assert list(request.headers[1:]) == framing
    assert request.body == (body or b"")


@pytest.mark.parametrize(
    ("length", "framing"),
    [(None, (b"transfer-encoding", b"chunked")), (11, (b"content-length", b"11"))],
)
async def test_a_streamed_body(
    length: int | None, framing: tuple[bytes, bytes], up: Upstream, client: UpstreamClient
) -> None:
    body = pieces(b"hello", b"", b" world")
    async with calling(client, up, b"/echo", "POST", body=body, length=length) as answer:
        await whole(answer)
    (request,) = up.requests
    assert request.body == b"hello world"
    assert list(request.headers[1:]) == [framing]


async def test_a_large_streamed_body_both_ways(up: Upstream, client: UpstreamClient) -> None:
    parts = [bytes([i % 256]) * 100_000 for i in range(50)]
    async with calling(client, up, b"/echo", "POST", body=pieces(*parts)) as answer:
        assert (await whole(answer)).endswith(b"".join(parts))


@pytest.mark.parametrize("length", [None, 100])
async def test_a_body_that_fails_is_never_finished_upstream(
    length: int | None, up: Upstream, client: UpstreamClient
) -> None:
    """A digest that turns out wrong at the end, or a caller that hangs up."""

    class GoneError(Exception):
        pass

    body = pieces(b"hello", GoneError())
    with pytest.raises(GoneError):
        async with calling(client, up, b"/echo", "POST", body=body, length=length):
            pytest.fail("an answer to half a request")
    await eventually(lambda: up.open_connections == 0)
    assert (up.begun, up.requests) == (1, [])


@pytest.mark.parametrize("parts", [[b"hello"], [b"hello", b" world!"]])
async def test_a_body_of_another_length_than_said_is_a_fault(
    parts: list[bytes], up: Upstream, client: UpstreamClient
) -> None:
    with pytest.raises(RuntimeError, match="Content-Length"):
        async with calling(client, up, b"/echo", "POST", body=pieces(*parts), length=11):
            pytest.fail("an answer to a request that lies")
    await eventually(lambda: up.open_connections == 0)
    assert up.requests == []


@pytest.mark.parametrize(
    ("method", "target", "headers"),
    [
        ("GET", b"/a\r\nX: 1", []),
        ("GET", b"/a b", []),
        ("GET\r\n", b"/a", []),
        ("GET /x HTTP/1.1\r\n", b"/a", []),
        ("GET", b"/a", [(b"x", b"1\r\ny: 2")]),
        ("GET", b"/a", [(b"x", b"1\ny: 2")]),
        ("GET", b"/a", [(b"x", b"1\0")]),
        ("GET", b"/a", [(b"x\r\ny", b"1")]),
    ],
)
def test_a_second_request_cannot_be_written(
    method: str, target: bytes, headers: list[tuple[bytes, bytes]]
) -> None:
    with pytest.raises(ValueError):
        request_head(method, target, headers)


# --- what comes back ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (b"/500", (500, b"broken", 6)),
        (b"/402", (402, b"{}", 2)),
        (b"/204", (204, b"", None)),
        (b"/304", (304, b"", None)),
        (b"/redirect", (302, b"", 0)),
        (b"/gzip", (200, b"\x1f\x8bnot really", 12)),
        (b"/chunked", (200, b"hello world", None)),
        (b"/interim", (200, b"done", 4)),
        (b"/until-close", (200, b"all of it", None)),
        (b"/http10", (200, b"all of it", None)),
    ],
)
async def test_good_answers(
    target: bytes, expected: tuple[int, bytes, int | None], up: Upstream, client: UpstreamClient
) -> None:
    async with calling(client, up, target) as answer:
        assert (answer.status, await whole(answer), answer.content_length) == expected
        assert answer.complete
    assert up.count(target) == 1


async def test_headers_come_raw(up: Upstream, client: UpstreamClient) -> None:
    async with calling(client, up, b"/cookie") as answer:
        cookies = [v for n, v in answer.headers if n.lower() == b"set-cookie"]
        assert cookies == [b"a=1", b"b=2"]
    async with calling(client, up, b"/latin") as answer:
        assert (b"X-Name", b"caf\xe9") in list(answer.headers)
    async with calling(client, up, b"/cookie") as answer:
        await whole(answer)
    assert up.requests[-1].header(b"cookie") == []  # no jar
    async with calling(client, up, b"/chunked") as answer:
        await whole(answer)
        assert not any(n.lower() == b"x-t" for n, _ in answer.headers)  # no trailers
    async with calling(client, up, b"/interim") as answer:
        assert [n for n, _ in answer.headers] == [b"X-Final", b"Content-Length"]


async def test_head_has_a_length_and_no_body(up: Upstream, client: UpstreamClient) -> None:
    for _ in range(2):
        async with calling(client, up, b"/echo", "HEAD") as answer:
            assert (answer.status, answer.content_length) == (200, 42)
            assert await whole(answer) == b""
    assert up.connections == 1


async def test_read_stops_at_the_limit_and_the_rest_streams(
    up: Upstream, client: UpstreamClient
) -> None:
    async with calling(client, up, b"/chunked") as answer:
        assert await answer.read(100) == (b"hello world", True)
    big = b"x" * 2_000_000
    async with calling(client, up, b"/echo", "POST", body=big) as answer:
        first, complete = await answer.read(65_536)
        assert not complete and len(first) > 65_536
        assert (first + await whole(answer)).endswith(big)
    async with calling(client, up, b"/204") as answer:
        assert await answer.read(0) == (b"", True)


async def test_a_flood_is_not_collected(up: Upstream, client: UpstreamClient) -> None:
    """The upstream is held back while nobody reads."""
    async with calling(client, up, b"/flood") as answer:
        await eventually(lambda: answer._connection._paused)
        for _ in range(50):
            await asyncio.sleep(0)
        assert answer._connection._buffered < 4 * connection_module.HIGH_WATER_BYTES
        taken = 0
        async for chunk in answer.chunks():
            taken += len(chunk)
            if taken > 5_000_000:
                break
    await eventually(lambda: up.open_connections == 0)
