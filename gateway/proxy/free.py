"""A free route: forwarded as it is, streamed both ways; nobody is identified, nothing is held."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

from gateway.errors import Problem
from gateway.fields import values
from gateway.middleware import content_length, stream_body
from gateway.node import Node
from gateway.proxy import cors, headers, location
from gateway.proxy.forward import timeouts_of
from gateway.proxy.routes_table import Route, upstream_target
from gateway.proxy.target import Target
from gateway.proxy.upstream import open_upstream

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


async def serve(  # noqa: PLR0917  (an ASGI call and what it was matched to)
    node: Node,
    route: Route,
    target: Target,
    scope: MutableMapping[str, Any],
    receive: Receive,
    send: Send,
) -> None:
    """Forward one request. Identity and payment fields do not reach the upstream."""
    behind = node.upstreams[route.upstream]
    incoming = scope["headers"]
    length = content_length(incoming)
    body: AsyncIterator[bytes] | None = None
    if length or values(incoming, b"transfer-encoding"):
        body = stream_body(receive, incoming, node.settings.server.max_body_bytes)
    async with open_upstream(
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
    ) as answer:
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
