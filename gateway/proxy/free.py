"""A free route: forwarded as it is, the answer streamed; nobody is identified, nothing is held.

The body is read whole first, as on priced routes, so that a slow upload keeps none of the
connections to the upstream that paid calls need. When the caller leaves, so does the call: nobody
pays for the rest, and it would keep such a connection, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any, Final

from gateway.errors import Problem
from gateway.middleware import CallerGoneError, Outgoing
from gateway.node import Node
from gateway.proxy import body as bodies
from gateway.proxy import cors, headers, location
from gateway.proxy.forward import timeouts_of
from gateway.proxy.identity import Headers
from gateway.proxy.outcome import UNCOMPRESSED
from gateway.proxy.routes_table import Route, upstream_target
from gateway.proxy.streaming import until_hung_up
from gateway.proxy.target import Target
from gateway.proxy.upstream import Answer, open_upstream

Receive = Callable[[], Awaitable[Any]]
FieldsOf = Callable[[int | None], list[tuple[bytes, bytes]]]
"""``(length) -> header fields for the caller``, the body's length if it is known."""
Relay = Callable[[Answer, FieldsOf, Outgoing], Awaitable[None]]

# Most calls are over before it is worth looking whether anybody still waits for them.
LOOK_AFTER_S: Final = 1.0


async def serve(  # noqa: PLR0917  (an ASGI call and what it was matched to)
    node: Node,
    route: Route,
    target: Target,
    scope: MutableMapping[str, Any],
    receive: Receive,
    send: Outgoing,
    read: tuple[Headers, bodies.Body] | None = None,
    relay: Relay | None = None,
) -> None:
    """Forward one request. Identity and payment fields do not reach the upstream.

    ``read``: header fields and body to send instead of the request's own, which was read.
    ``relay``: passes an answer on that is read on the way, and so must come without a coding; None:
    as it is.
    """
    incoming = scope["headers"]
    if read is not None:
        incoming, body = read
    else:
        server = node.settings.server
        body = await bodies.read(
            receive,
            incoming,
            limit=server.max_body_bytes,
            memory=server.body_memory_bytes,
            came=send.body_that_came(),
        )
    try:
        await _forward(node, route, target, scope["method"], incoming, body, receive, send, relay)
    finally:
        body.close()


async def _forward(  # noqa: PLR0917  (one caller)
    node: Node,
    route: Route,
    target: Target,
    method: str,
    incoming: Headers,
    body: bodies.Body,
    receive: Receive,
    send: Outgoing,
    relay: Relay | None,
) -> None:
    behind = node.upstreams[route.upstream]
    async with (
        _as_long_as_somebody_waits(receive),
        open_upstream(
            node.client,
            behind.origin,
            method,
            upstream_target(route, behind.origin.base_path, target),
            headers=headers.request_headers(
                incoming,
                host=behind.origin.authority,
                ours=() if relay is None else [UNCOMPRESSED],
                inject=behind.inject,
            ),
            body=body.up(),
            length=body.size,
            timeouts=timeouts_of(node, behind, route),
        ) as answer,
    ):
        if answer.status == 402:
            raise Problem("upstream_wants_payment", "The upstream itself asks for payment.")

        def fields(length: int | None) -> list[tuple[bytes, bytes]]:
            found = headers.response_headers(answer.headers, length=length)
            public_url = node.settings.server.public_url
            return cors.expose(location.rewrite(found, route, behind.origin, public_url))

        await (relay or _as_it_is)(answer, fields, send)


async def _as_it_is(answer: Answer, fields: FieldsOf, send: Outgoing) -> None:
    start = {"type": "http.response.start", "status": answer.status}
    await send({**start, "headers": fields(answer.content_length)})
    async for piece in answer.chunks():
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


@asynccontextmanager
async def _as_long_as_somebody_waits(receive: Receive) -> AsyncIterator[None]:
    """Ends the block with ``CallerGoneError`` when the caller hangs up."""
    loop = asyncio.get_running_loop()
    watching: list[asyncio.Task[None]] = []

    async def watch() -> None:
        await until_hung_up(receive)
        until.reschedule(loop.time())

    later = loop.call_later(LOOK_AFTER_S, lambda: watching.append(loop.create_task(watch())))
    try:
        async with asyncio.timeout(None) as until:
            yield
    except TimeoutError:
        if until.expired():
            raise CallerGoneError from None
        raise
    finally:
        later.cancel()
        for task in watching:
            task.cancel()
