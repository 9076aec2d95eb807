"""The gateway as one ASGI application.

Farebox's own paths are a Starlette application; everything else goes to the priced routes as raw
ASGI, without a framework in between. Both stand behind one edge (``middleware.py``).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route, Router

from chain import tokens
from chain.errors import ChainError
from chain.rpc import Rpc
from gateway import admin, cache, ledger, observe
from gateway.accounts import routes as account_routes
from gateway.db import CommitUnknown, Database, DatabaseUnavailable
from gateway.discovery import routes as discovery_routes
from gateway.errors import Problem
from gateway.external import catalog
from gateway.external import routes as external_routes
from gateway.facilitator import routes as facilitator_routes
from gateway.fields import values
from gateway.ledger import sweep
from gateway.limits import Limits, client_of
from gateway.middleware import Outgoing, edge
from gateway.migrations.run import migrate
from gateway.node import Node, unavailable
from gateway.observe import log
from gateway.own import NODE, node_of
from gateway.payments import card, exposure, journal, offers, stripe, watcher
from gateway.payments import routes as payment_routes
from gateway.payments.rails import Rails
from gateway.proxy import advice, cors, free, mcp, paid, quotes
from gateway.proxy import routes as request_routes
from gateway.proxy.asking import Request as PricedRequest
from gateway.proxy.client import UpstreamClient
from gateway.proxy.pace import Pace
from gateway.proxy.price_changes import open_routes
from gateway.proxy.routes_table import McpMount, MethodNotAllowed, is_reserved
from gateway.proxy.routes_table import Route as PricedRoute
from gateway.proxy.target import Target, from_scope
from gateway.reload import behind
from gateway.settings import Server, Settings
from gateway.web import routes as web_routes
from gateway.web.required import payment_required, wants_page

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send


class BadToken(Exception):  # noqa: N818
    """A configured token is not what the table says: signatures for it would be worthless."""


async def open_node(settings: Settings) -> Node:
    """Connect to everything and bring the schema up to date.

    Raises ``DatabaseUnavailable``, ``NewerDatabase`` and ``BadToken``. A chain that cannot be
    reached does not keep the gateway from starting: purchases there are 503 until it can.
    """
    db = await Database.connect(settings.server.database)
    try:
        await migrate(db)
        keys = await offers.load_keys(db)
        routes = await open_routes(db, settings)
        writer = await ledger.Writer.start(db)
    except BaseException:
        await db.close()
        raise
    rpcs = {
        chain.caip2: Rpc(chain.network, chain.rpc, timeout_s=chain.rpc_timeout_s)
        for chain in settings.chains
    }
    cards = None
    if settings.stripe.secret_key is not None:
        client = stripe.connect(
            settings.stripe.secret_key.get_secret_value(), api_base=settings.stripe.api_base
        )
        cards = card.Cards(settings, db, client)
    node = Node(
        settings=settings,
        db=db,
        writer=writer,
        rails=Rails(settings, db, keys, rpcs),
        routes=routes,
        catalog=catalog.build(settings.upstreams, routes),
        upstreams=behind(settings.upstreams),
        client=UpstreamClient(),
        limits=_limits(settings.server, keys.deployment),
        cards=cards,
    )
    try:
        await node.look_at_clock()
        async with db.write() as tx:
            await exposure.set_policies(tx, settings)
        await _take_over(db)
        await _check_tokens(node)
    except BaseException:
        await close_node(node)
        raise
    return node


async def _take_over(db: Database) -> None:
    """Where all who ever worked on this database are known to be dead, nothing they had begun is
    waited for. Before this process begins anything."""
    async with db.starting() as alone:
        if alone:
            async with db.write() as tx:
                await sweep.drop_leases(tx, await tx.now_ms())
                await journal.drop_leases(tx)
                await watcher.drop_leases(tx)


def _limits(server: Server, deployment: str) -> Limits:
    # On SQLite one process serves: it has nobody to share its counts with.
    url = server.redis if server.on_postgres else ""
    return Limits(
        cache.connect(url, deadline_ms=server.redis_timeout_ms),
        deployment=deployment,
        uncharged_per_min=server.uncharged_per_min,
    )


async def _check_tokens(node: Node) -> None:
    """Refuse to serve when a token's own name, version or decimals are not the table's.

    Notes at the very first start from which block on transfers count.
    """
    for chain in node.settings.chains:
        rpc = node.rails.rpcs[chain.caip2]
        for asset in chain.network.assets:
            try:
                token = await tokens.read_token(rpc, asset)
                await watcher.begin(node.rails, chain, asset)
            except ChainError as error:
                log.warning("%s cannot be asked about %s now: %s", chain.name, asset.symbol, error)
                continue
            faults = tokens.token_faults(chain.network, asset, token)
            if faults:
                raise BadToken("; ".join(faults))


async def close_node(node: Node) -> None:
    """Finish what is queued and close every connection."""
    node.stopping.set()
    await node.looks.close()
    await node.metrics.close()
    await node.writer.stop()
    await node.client.close()
    if node.limits.cache is not None:
        await node.limits.cache.close()
    for rpc in node.rails.rpcs.values():
        await rpc.close()
    if node.cards is not None:
        await stripe.close(node.cards.client)
    await node.db.close()


@asynccontextmanager
async def closing(node: Node) -> AsyncIterator[None]:
    """Close the node at the end of the block."""
    try:
        yield
    finally:
        await close_node(node)


async def healthz(request: Request) -> Response:
    """The process is alive. Says nothing of what it depends on."""
    return JSONResponse({"status": "ok"})


async def readyz(request: Request) -> Response:
    """Whether requests can be served now (``gateway/ready.py``)."""
    found = await node_of(request).looks.ask()
    return JSONResponse(
        {"status": "ready" if found.ready else "not ready", "checks": found.checks},
        200 if found.ready else 503,
    )


def build(node: Node) -> ASGIApp:
    """The application for an open node."""
    server = node.settings.server
    # No redirects: they would name the Host of the request, and a signature is for one path.
    front = _Front(node, Router(own_routes(server), redirect_slashes=False))
    return edge(front, max_headers_bytes=server.max_headers_bytes, base=server.public_url)


def own_routes(server: Server) -> list[BaseRoute]:
    """Every path of Farebox's own that is served."""
    return [
        Route("/healthz", healthz),
        Route("/readyz", readyz),
        *account_routes.ROUTES,
        *payment_routes.ROUTES,
        *facilitator_routes.ROUTES,
        *request_routes.ROUTES,
        *discovery_routes.ROUTES,
        *quotes.ROUTES,
        *external_routes.ROUTES,
        *web_routes.ROUTES,
        *admin.routes(server),
    ]


class _Front:
    """Our own paths to Starlette, everything else to the priced routes."""

    def __init__(self, node: Node, own: ASGIApp) -> None:
        self._node = node
        self._own = own

    async def __call__(self, scope: Scope, receive: Receive, send: Outgoing) -> None:
        url = base = self._node.settings.server.public_url
        try:
            target = from_scope(scope)
            url += target.raw.decode("ascii")
            await self._answer(scope, target, receive, send)
        except Problem as problem:
            advice.complete(problem, scope["method"], url, base)
            raise

    async def _answer(self, scope: Scope, target: Target, receive: Receive, send: Outgoing) -> None:
        headers = scope["headers"]
        method: str = scope["method"]
        ours = is_reserved(target.decoded)
        if cors.is_preflight(method, headers):
            methods = ("GET", "POST") if ours else self._node.routes.methods(target.decoded)
            await _preflight(methods, headers, send)
        elif ours:
            await self._ours(scope, receive, send)
        else:
            try:
                await self._priced(scope, target, receive, send)
            except Problem as refusal:
                if not send.begun:
                    _count(refusal)
                raise

    async def _ours(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[NODE] = self._node
        scope["app"] = self  # with it the router raises instead of answering in its own words
        try:
            await self._own(scope, receive, send)
        except HTTPException as error:
            if error.status_code == 405:
                raise Problem(
                    "method_not_allowed", "Not with this method.", headers=error.headers
                ) from None
            raise Problem("not_found", "There is nothing here.") from None
        except (DatabaseUnavailable, CommitUnknown, ChainError) as error:
            raise unavailable(error) from error

    async def _priced(self, scope: Scope, target: Target, receive: Receive, send: Outgoing) -> None:
        node, method = self._node, scope["method"]
        route = node.routes.match(method, target.decoded)
        if isinstance(route, MethodNotAllowed):
            raise Problem(
                "method_not_allowed",
                f"{method[:20]} is not offered here.",
                headers={"Allow": ", ".join(route.allow)},
            )
        if not isinstance(route, PricedRoute | McpMount):
            raise Problem("not_found", "There is no such route.")
        headers = scope["headers"]
        peer, _ = scope["client"] or ("", 0)
        client = client_of(peer, headers, node.settings.server.trusted_proxies)
        if isinstance(route, McpMount):
            await mcp.serve(node, route, target, client, scope, receive, send)
            return
        pace = None
        if route.rate_limit is not None:
            pace = Pace(node, route, route.rate_limit, client)
        try:
            if pace is not None:
                await pace.arrived(headers)
            if route.free:
                if pace is not None:
                    send.also = pace.told()
                await free.serve(node, route, target, scope, receive, send)
                return
            request = PricedRequest(route, method, target, headers, node.now_s(), client, pace)
            await paid.serve(node, request, receive, send)
        except Problem as refusal:
            send.also = []  # the refusal itself has them
            problem = refusal if pace is None else await pace.refused(refusal)
            if "PAYMENT-REQUIRED" not in problem.headers:
                raise problem from problem.__cause__
            accept = b",".join(values(headers, b"accept"))
            if not wants_page(accept.decode("latin-1")):
                problem.headers["Vary"] = "Accept"
                raise problem from problem.__cause__
            _count(problem)
            page = payment_required(node.settings, problem, method, target.raw.decode("ascii"))
            await page(scope, receive, send)


def _count(refusal: Problem) -> None:
    observe.count("requests", outcome="unpaid" if refusal.status == 402 else "refused")


async def _preflight(methods: Any, headers: Any, send: Send) -> None:
    if not methods:
        raise Problem("not_found", "There is no such route.")
    fields = cors.preflight_headers(methods, headers)
    await send({"type": "http.response.start", "status": 204, "headers": fields})
    await send({"type": "http.response.body", "body": b""})
