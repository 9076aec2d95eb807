"""The second listener, ``server.admin_listen``: what is for the operator alone.

Only ``/metrics`` so far. It is kept apart from the public port because what stands there says how
business goes. Where the token file exists, ``Authorization: Bearer`` with what it holds is needed.
Without one whoever can connect may read, so the configuration then refuses an address that is open
to the network.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway import metrics
from gateway.errors import Problem
from gateway.middleware import Outgoing, edge
from gateway.own import NODE, node_of
from gateway.settings import Server

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope

    from gateway.node import Node

Endpoint = Callable[[Request], Awaitable[Response]]


def token_of(server: Server) -> bytes | None:
    """What the token file holds; None if there is no such file."""
    try:
        return server.admin_token_file.read_bytes().strip()
    except FileNotFoundError:
        return None


def routes(server: Server) -> list[Route]:
    """``/metrics`` for the public port: where there is no other, and only with a token."""
    if server.admin_listen is not None:
        return []
    token = token_of(server)
    return [] if token is None else [Route("/metrics", _metrics(token))]


def build(node: Node) -> ASGIApp:
    """The application of the second listener."""
    endpoint = _metrics(token_of(node.settings.server))

    async def app(scope: Scope, receive: Receive, send: Outgoing) -> None:
        if scope["path"] != "/metrics":
            raise Problem("not_found", "There is nothing here.")
        if scope["method"] not in ("GET", "HEAD"):
            allow = {"Allow": "GET, HEAD"}
            raise Problem("method_not_allowed", "Not with this method.", headers=allow)
        answer = await endpoint(Request({**scope, NODE: node}, receive))
        await answer(scope, receive, send)

    return edge(app, max_headers_bytes=node.settings.server.max_headers_bytes)


def _metrics(token: bytes | None) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        if token is not None:
            _check(request, token)
        told = await node_of(request).metrics.ask()
        headers = {"Cache-Control": "no-store", "Content-Type": metrics.CONTENT_TYPE}
        return Response(told, headers=headers)

    return endpoint


def _check(request: Request, token: bytes) -> None:
    given = request.headers.getlist("authorization")
    if len(given) != 1 or not secrets.compare_digest(given[0].encode(), b"Bearer " + token):
        raise Problem(
            "api_key_required",
            "Send what stands in server.admin_token_file: Authorization: Bearer …",
            headers={"WWW-Authenticate": 'Bearer realm="farebox admin"'},
        )
