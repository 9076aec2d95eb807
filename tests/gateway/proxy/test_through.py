"""The parts together, from raw bytes in to raw bytes out, under both of uvicorn's parsers.

The smallest proxy that can be made of them: edge, target, table, headers, upstream; no money. What
reaches the upstream must be a route that was matched, spelled as the caller spelled it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gateway.errors import Problem
from gateway.middleware import content_length, edge, stream_body
from gateway.proxy import cors, target
from gateway.proxy.headers import request_headers, response_headers
from gateway.proxy.routes_table import MethodNotAllowed, Route, compile_routes, upstream_target
from gateway.proxy.upstream import Timeouts, UpstreamClient, open_upstream, parse_origin
from tests.gateway.proxy.misbehave import Upstream, misbehaving
from tests.gateway.proxy.serving import PARSERS, body_of, serving, status_of, talk
from tests.gateway.proxy.test_routes_table import upstream
from tests.gateway.proxy.test_target import ACCEPTED, REFUSED
from tests.servers import eventually

ROUTES = compile_routes(
    [
        upstream(
            ("GET /paid/*", "$1"),
            ("GET /Mixed/[id]", "$1"),
            ("POST /upload", "$1"),
            ("GET /*", "free"),
            ("POST /*", "free"),
        )
    ]
)


def proxy(client: UpstreamClient, up: Upstream) -> Any:
    origin = parse_origin(up.url)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        asked = target.from_scope(scope)
        if cors.is_preflight(scope["method"], scope["headers"]):
            fields = cors.preflight_headers(ROUTES.methods(asked.decoded), scope["headers"])
            await send({"type": "http.response.start", "status": 204, "headers": fields})
            await send({"type": "http.response.body", "body": b""})
            return
        route = ROUTES.match(scope["method"], asked.decoded)
        if isinstance(route, MethodNotAllowed):
            allow = ", ".join(route.allow)
            raise Problem("method_not_allowed", "no", headers={"Allow": allow})
        if not isinstance(route, Route):
            raise Problem("not_found", "no")
        headers = request_headers(
            scope["headers"],
            host=origin.authority,
            ours=[(b"farebox-auth", b"bound"), (b"farebox-route", route.pattern.encode())],
        )
        call = open_upstream(
            client,
            origin,
            scope["method"],
            upstream_target(route, origin.base_path, asked),
            headers=headers,
            body=stream_body(receive, scope["headers"], 10_000_000)
            if scope["method"] == "POST"
            else None,
            length=content_length(scope["headers"]),
            timeouts=Timeouts(),
        )
        async with call as answer:
            fields = response_headers(answer.headers, length=answer.content_length)
            await send({"type": "http.response.start", "status": answer.status, "headers": fields})
            async for chunk in answer.chunks():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    return edge(app)


@asynccontextmanager
async def gateway(parser: str) -> AsyncIterator[tuple[int, Upstream]]:
    client = UpstreamClient()
    async with misbehaving() as up, serving(proxy(client, up), parser) as port:
        yield port, up
        await client.close()


def get(raw: bytes, *lines: bytes, method: bytes = b"GET") -> bytes:
    fields = (b"Host: a", b"Connection: close", *lines)
    return method + b" " + raw + b" HTTP/1.1\r\n" + b"\r\n".join(fields) + b"\r\n\r\n"


@pytest.mark.parametrize("parser", PARSERS)
async def test_targets_reach_the_upstream_as_they_came_or_not_at_all(parser: str) -> None:
    async with gateway(parser) as (port, up):
        for raw in REFUSED:
            if not raw.endswith(b" "):
                assert status_of(await talk(port, get(raw))) in (400, 414), raw
        assert up.begun == 0
        for raw in ACCEPTED:
            answer = await talk(port, get(raw))
            assert status_of(answer) == 200, raw
            assert body_of(answer).startswith(b"GET " + raw + b" HTTP/1.1\r\n")
        assert [r.target for r in up.requests] == ACCEPTED


# Every way found in the wild to ask for a dear path by another name.
DISGUISES = [
    b"/paid/../paid/x",
    b"/free/../paid/x",
    b"/free/%2e%2e/paid/x",
    b"/free/..%2fpaid/x",
    b"/./paid/x",
    b"//paid/x",
    b"/paid%2fx",
    b"/%70aid/x",
    b"/paid%5cx",
    b"/paid\\x",
    b"/paid;a=b/x",
    b"/PAID/x",
    b"/Paid/x",
    b"/paid",
    b"/mixed/7",
    b"/MIXED/7",
    b"/Mixed/7/",
    b"http://other/paid/x",
    b"/paid/x#",
    b"/free\x00/../paid/x",
    b"/free?/../paid/x#/paid",
]


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
async def test_a_dear_path_has_no_free_disguise(parser: str, method: bytes) -> None:
    async with gateway(parser) as (port, up):
        for raw in DISGUISES:
            status = status_of(await talk(port, get(raw, method=method)))
            assert status in (400, 404), raw
        assert up.begun == 0
        for raw in (b"/paid/x", b"/Mixed/7"):
            await talk(port, get(raw, method=method))
        assert [r.header(b"farebox-route") for r in up.requests] == [[b"/paid/*"], [b"/Mixed/[id]"]]


@pytest.mark.parametrize("parser", PARSERS)
async def test_the_caller_cannot_speak_for_the_gateway(parser: str) -> None:
    async with gateway(parser) as (port, up):
        await talk(
            port,
            get(
                b"/a",
                b"Farebox-Auth: payment",
                b"farebox_auth: payment",
                b"X_Wallet: 0x1",
                b"X-Forwarded-For: 1.2.3.4",
                b"Authorization: Bearer fbx_secret",
                b"Connection: farebox-auth, farebox-route",
                b"X-HTTP-Method-Override: DELETE",
                b"X-Original-URL: /paid/x",
                b"X-Stays: 1",
            ),
        )
        (request,) = up.requests
    assert [n for n, _ in request.headers] == [
        b"host",
        b"x-stays",
        b"farebox-auth",
        b"farebox-route",
    ]
    assert request.header(b"farebox-auth") == [b"bound"]


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("method", [b"TRACE", b"CONNECT", b"DELETE", b"OPTIONS", b"get", b"PURGE"])
async def test_methods_that_are_not_sold(parser: str, method: bytes) -> None:
    async with gateway(parser) as (port, up):
        assert status_of(await talk(port, get(b"/a", method=method))) in (400, 405)
        assert up.begun == 0


@pytest.mark.parametrize("parser", PARSERS)
async def test_a_preflight_is_answered_here(parser: str) -> None:
    async with gateway(parser) as (port, up):
        answer = await talk(
            port,
            get(
                b"/paid/x",
                b"Origin: https://a.example",
                b"Access-Control-Request-Method: GET",
                method=b"OPTIONS",
            ),
        )
        assert status_of(answer) == 204 and b"payment-signature" in answer.lower()
        assert up.begun == 0


@pytest.mark.parametrize("parser", PARSERS)
async def test_uploads_and_answers_stream_through(parser: str) -> None:
    big = b"x" * 3_000_000
    async with gateway(parser) as (port, up):
        head = b"POST /upload HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
        stated = head + b"Content-Length: %d\r\n\r\n" % len(big) + big
        chunked = head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (
            len(big),
            big,
        )
        for request in (stated, chunked):
            assert body_of(await talk(port, request)).endswith(big)
        assert [r.body for r in up.requests] == [big, big]
        assert [len(r.header(b"content-length")) for r in up.requests] == [1, 0]


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("target_", [b"/truncate", b"/truncate-chunked", b"/reset-mid"])
async def test_a_cut_answer_is_cut_for_the_caller_too(parser: str, target_: bytes) -> None:
    async with gateway(parser) as (port, up):
        up.released.set()
        answer = await talk(port, get(target_))
    assert not answer.endswith(b"0\r\n\r\n")
    if status_of(answer) == 200:
        assert b"first" in answer or b"hello" in answer
    else:
        assert status_of(answer) == 502


@pytest.mark.parametrize("parser", PARSERS)
async def test_a_caller_that_leaves_mid_upload_leaves_no_request_behind(parser: str) -> None:
    async with gateway(parser) as (port, up):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /upload HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nhalf")
        await eventually(lambda: up.begun == 1)
        writer.close()
        await eventually(lambda: up.open_connections == 0)
        assert up.requests == []
