"""Connections: used again when that is safe, never when it is not; one call is one request."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import pytest

from gateway.errors import Problem
from gateway.proxy import client as client_module
from gateway.proxy import connection as connection_module
from gateway.proxy.client import Origin, UpstreamClient, parse_origin
from gateway.proxy.upstream import Timeouts
from tests.gateway.proxy.calls import calling, pieces, whole
from tests.gateway.proxy.misbehave import Upstream
from tests.servers import eventually


async def test_connections_are_used_again(up: Upstream, client: UpstreamClient) -> None:
    for target in (b"/echo", b"/500", b"/204", b"/304", b"/chunked", b"/interim", b"/echo"):
        async with calling(client, up, target) as answer:
            await whole(answer)
    async with calling(client, up, b"/echo", "POST", body=pieces(b"a", b"b")) as answer:
        await whole(answer)
    assert (up.connections, len(up.requests)) == (1, 8)


@pytest.mark.parametrize("target", [b"/extra", b"/extra-empty", b"/until-close", b"/http10"])
async def test_connections_that_cannot_be_used_again_are_not(
    target: bytes, up: Upstream, client: UpstreamClient
) -> None:
    async with calling(client, up, target) as answer:
        body = await whole(answer)
    assert body in (b"body", b"all of it")
    async with calling(client, up, b"/echo") as answer:
        assert (await whole(answer)).startswith(b"GET /echo")
    assert up.connections == 2


async def test_an_answer_left_half_read_costs_its_connection(
    up: Upstream, client: UpstreamClient
) -> None:
    async with calling(client, up, b"/stall-mid"):
        pass
    async with calling(client, up, b"/echo") as answer:
        assert (await whole(answer)).startswith(b"GET /echo")
    assert up.connections == 2


async def test_an_unread_but_whole_answer_keeps_its_connection(
    up: Upstream, client: UpstreamClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading was paused because nobody took the body; the next exchange must not stay paused."""
    monkeypatch.setattr(connection_module, "HIGH_WATER_BYTES", 10)
    async with calling(client, up, b"/echo") as answer:
        await eventually(lambda: answer.complete)
        assert answer._connection._paused
    async with calling(client, up, b"/echo") as answer:
        assert (await whole(answer)).startswith(b"GET /echo")
    assert up.connections == 1


async def test_a_connection_that_was_closed_meanwhile_is_not_used(
    up: Upstream, client: UpstreamClient
) -> None:
    """Without giving the event loop a turn to notice: the socket itself is asked."""
    for i in range(20):
        async with calling(client, up, b"/close-after") as answer:
            await whole(answer)
        if i % 2:
            await eventually(lambda: up.open_connections == 0)
    assert up.count(b"/close-after") == 20


async def test_a_request_is_never_sent_twice(up: Upstream, client: UpstreamClient) -> None:
    """The connection worked before, the method is idempotent, and still: one request, one error."""
    async with calling(client, up, b"/echo") as answer:
        await whole(answer)
    for target in (b"/close", b"/reset"):
        with pytest.raises(Problem):
            async with calling(client, up, target):
                pytest.fail("an answer was made of nothing")
        assert up.count(target) == 1
        async with calling(client, up, b"/echo") as answer:
            await whole(answer)


async def test_old_connections_are_not_used(
    up: Upstream, client: UpstreamClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def call() -> None:
        async with calling(client, up, b"/echo") as answer:
            await whole(answer)

    await call()
    monkeypatch.setattr(client_module, "KEEP_IDLE_S", -1.0)
    await call()  # one is idle, and too old
    assert up.connections == 2
    # Every return drops those that have grown old, so that they do not stay for ever.
    await eventually(lambda: up.open_connections == 0)


async def test_the_number_of_connections_is_bounded(
    up: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "MAX_CONNECTIONS", 2)
    client = UpstreamClient()
    slow = Timeouts(connect_s=0.1)
    async with calling(client, up, b"/stall-mid"), calling(client, up, b"/stall-mid"):
        with pytest.raises(Problem) as raised:
            async with calling(client, up, b"/echo", timeouts=slow):
                pytest.fail("a third connection")
        assert raised.value.code == "upstream_timeout"
    async with calling(client, up, b"/echo") as answer:
        await whole(answer)
    await client.close()


async def test_cancelling_a_call_frees_its_place(
    up: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "MAX_CONNECTIONS", 1)
    client = UpstreamClient()

    async def call(body: Any = None) -> None:
        async with calling(client, up, b"/stall", "POST", body=body):
            pytest.fail("a stalled upstream answered")

    for body in (None, pieces(b"x")):
        task = asyncio.create_task(call(body))
        await eventually(lambda: up.count(b"/stall") > 0)
        up.requests.clear()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    async with calling(client, up, b"/echo") as answer:
        await whole(answer)
    await client.close()


async def test_a_closed_client_makes_no_connections(up: Upstream, client: UpstreamClient) -> None:
    async with calling(client, up, b"/echo") as answer:
        await whole(answer)
    await client.close()
    await eventually(lambda: up.open_connections == 0)
    with pytest.raises(Problem):
        async with calling(client, up, b"/echo"):
            pytest.fail("a closed client called")


async def test_many_at_once(up: Upstream, client: UpstreamClient) -> None:
    async def one(i: int) -> None:
        async with calling(client, up, b"/n?%d" % i, "POST", body=b"%d" % i) as answer:
            got = await whole(answer)
        assert got.startswith(b"POST /n?%d " % i) and got.endswith(b"\r\n\r\n%d" % i)

    await asyncio.gather(*(one(i) for i in range(200)))
    assert len(up.requests) == 200


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("http://a.example", Origin(False, "a.example", 80, b"a.example", b"")),
        ("https://a.example/", Origin(True, "a.example", 443, b"a.example", b"")),
        (
            "http://127.0.0.1:9000/api/",
            Origin(False, "127.0.0.1", 9000, b"127.0.0.1:9000", b"/api"),
        ),
        ("http://[::1]:9", Origin(False, "::1", 9, b"[::1]:9", b"")),
    ],
)
def test_origins(url: str, origin: Origin) -> None:
    assert parse_origin(url) == origin


@pytest.mark.parametrize(
    "url",
    [
        "ftp://a",
        "http://",
        "a.example",
        "http://u:p@a",
        "http://a?x",
        "http://a#x",
        "http://a/../b",
        "http://a/b//c",
    ],
)
def test_urls_that_are_no_origin(url: str) -> None:
    with pytest.raises(ValueError):
        parse_origin(url)


def test_tls_is_checked_by_default() -> None:
    client = UpstreamClient()
    context = client._context()
    assert context.verify_mode is ssl.CERT_REQUIRED and context.check_hostname
