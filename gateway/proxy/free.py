"""A free route: forwarded as it is, streamed both ways; nobody is identified, nothing is held.

When the caller leaves, so does the call: nobody pays for the rest, and it would keep one of the
connections that paid calls need.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any, Final

from gateway.errors import Problem
from gateway.fields import values
from gateway.middleware import CallerGoneError, content_length, stream_body
from gateway.node import Node
from gateway.proxy import cors, headers, location
from gateway.proxy.forward import timeouts_of
from gateway.proxy.identity import Headers
from gateway.proxy.routes_table import Route, upstream_target
from gateway.proxy.target import Target
from gateway.proxy.upstream import open_upstream

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

# Most calls are over before it is worth looking whether anybody still waits for them.
LOOK_AFTER_S: Final = 1.0


async def serve(  # noqa: PLR0917  (an ASGI call and what it was matched to)
    node: Node,
    route: Route,
    target: Target,
    scope: MutableMapping[str, Any],
    receive: Receive,
    send: Send,
    read: tuple[Headers, bytes] | None = None,
) -> None:
    """Forward one request. Identity and payment fields do not reach the upstream.

    ``read``: header fields and body to send instead of the request's own, which was read.
    """
    behind = node.upstreams[route.upstream]
    incoming = scope["headers"]
    length = content_length(incoming)
    body: AsyncIterator[bytes] | bytes | None = None
    taken = asyncio.Event()  # the whole request; until then who reads it notices a hang-up
    if read is not None:
        incoming, body = read
        length = None
        taken.set()
    elif length or values(incoming, b"transfer-encoding"):
        limit = node.settings.server.max_body_bytes
        body = _then(taken, stream_body(receive, incoming, limit))
    else:
        taken.set()
    async with (
        _as_long_as_somebody_waits(receive, taken),
        open_upstream(
            node.client,
            behind.origin,
            scope["method"],
            upstream_target(route, behind.origin.base_path, target),
            headers=headers.request_headers(
                incoming, host=behind.origin.authority, inject=behind.inject
            ),
            body=body,
            timeouts=timeouts_of(node, behind, route),
            length=length,
        ) as answer,
    ):
        if answer.status == 402:
            raise Problem("upstream_wants_payment", "The upstream itself asks for payment.")
        fields = location.rewrite(
            headers.response_headers(answer.headers, length=answer.content_length),
            route,
            behind.origin,
            node.settings.server.public_url,
        )
        await send(
            {
                "type": "http.response.start",
                "status": answer.status,
                "headers": cors.expose(fields),
            }
        )
        async for piece in answer.chunks():
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _then(taken: asyncio.Event, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async for piece in pieces:
        yield piece
    taken.set()


@asynccontextmanager
async def _as_long_as_somebody_waits(receive: Receive, taken: asyncio.Event) -> AsyncIterator[None]:
    """Ends the block with ``CallerGoneError`` when the caller hangs up."""
    loop = asyncio.get_running_loop()
    watching: list[asyncio.Task[None]] = []

    async def watch() -> None:
        await taken.wait()
        while (await receive())["type"] != "http.disconnect":
            continue
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
