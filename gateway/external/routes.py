"""The published wallet API under ``/api/external``; its strong form also under ``/farebox/v1``."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from gateway import forms, ledger
from gateway.errors import NextAction, Problem
from gateway.external import buying, envelope, invoke, maker, proof, servers
from gateway.external.catalog import ANYTHING, Action, Catalog, Tool
from gateway.ledger import read
from gateway.middleware import Outgoing
from gateway.node import Node
from gateway.own import NODE, answer, body_of, bound_caller, count_of_client, node_of, object_of
from gateway.payments import journal
from gateway.payments import routes as payments
from gateway.pricing.scheduled import in_force
from gateway.proxy.target import from_scope
from wallet_auth import personal
from wallet_auth.personal import Call
from wallet_auth.strict import json_object

EXTERNAL: Final = "/api/external"
OURS: Final = "/farebox/v1"
_INVOKE: Final = "/tools/{product}/actions/{action}/invoke"
_INVOKE_OLD: Final = "/tools/{product}/invoke"
_BALANCE: Final = Call("balance", "-")
_DAY_MS: Final = 86_400_000
_MAKER_PER_MIN: Final = 5


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        return json_object(body) if body.strip() else {}
    except ValueError as error:
        raise Problem("invalid_request", f"The body is {error}.") from None


def _iso(at_s: int) -> str:
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# -- sessions -----------------------------------------------------------------------------------


async def session(request: Request) -> Response:
    """``POST auth/session``: a nonce for a wallet, for many requests. It writes nothing."""
    node = node_of(request)
    await _count(request, "session", node.settings.external.sessions_per_min)
    wanted = _parsed(await body_of(request))
    try:
        wallet = forms.address(wanted.get("wallet_address"))
    except ValueError as error:
        raise Problem("invalid_request", f"wallet_address {error}.") from None
    nonce, expiry_s = personal.session_nonce(node.rails.keys, wallet, node.now_s())
    return answer(
        200,
        {
            "session_nonce": nonce,
            "expires_in": personal.SESSION_S,
            "expires_at": _iso(expiry_s),
            "wallet_address": wallet,
        },
    )


async def _count(request: Request, what: str, most: int) -> None:
    standing = await count_of_client(request, what, most)
    if not standing.allowed:
        raise Problem(
            "rate_limited",
            f"More than {most} of these from here within a minute.",
            headers={"Retry-After": str(-(-standing.reset_ms // 1000))},
        )


# -- credits ------------------------------------------------------------------------------------


async def purchase(request: Request) -> Response:
    """``POST credits/purchase``: as our own purchase, in the published forms."""
    node = node_of(request)
    body = await body_of(request)
    wanted = _parsed(body)
    # What else clients of that API send has no meaning for a purchase.
    wanted = {name: wanted[name] for name in wanted.keys() & payments.PURCHASE}
    if "wallet_address" not in wanted and "purchase_id" not in wanted:
        raise Problem("invalid_request", "wallet_address is missing: who gets the credits.")
    request.scope["headers"] = buying.with_usual_payment(node, request.scope["headers"])
    try:
        view, headers = await payments.bought(request, body, wanted, journal.EXTERNAL)
    except Problem as refusal:
        if refusal.status == 202:
            refusal.members["transaction_hash"] = refusal.members.get("transaction")
        raise
    return answer(200, buying.in_numbers(node, view), headers)


async def balance(request: Request) -> Response:
    """``POST credits/balance``: what the signature of the body may itself spend."""
    node = node_of(request)
    body = _parsed(await body_of(request))
    if not proof.is_wrapper(body):
        raise _unsigned(request, node)
    target, headers = from_scope(request.scope), request.scope["headers"]
    found = proof.of_nothing(node, target, headers, body, _BALANCE)
    return answer(200, await _balance_of(node, found))


def _unsigned(request: Request, node: Node) -> Problem:
    base = node.settings.server.public_url
    url = base + from_scope(request.scope).raw.decode("ascii")
    return Problem(
        "identity_required",
        "The body has to say who signs it: wallet_address, session_nonce, request_id, signature.",
        next_actions=[
            proof.new_session(node, EXTERNAL),
            NextAction("POST", url, "the signed body"),
        ],
    )


async def _balance_of(node: Node, found: proof.Proof) -> dict[str, Any]:
    caller = found.caller
    account_id = await node.account_of(found.signed.wallet, "")
    if account_id is not None:
        await node.writer.submit(ledger.Expire(account_id))
    if not found.bound and await proof.may_spend_all(node, found.signed.wallet):
        caller = caller._replace(only=proof.every_lot(node, found.signed))
    units = await envelope.left(node, caller)
    next_ms = now_ms = 0
    if account_id is not None:
        async with node.db.read() as tx:
            now_ms = await tx.now_ms()
            next_ms = await read.next_expiry_of(tx, account_id, caller.only) or 0
    per_usd = node.settings.credits.per_usd
    credits_left = envelope.number(units, per_usd)
    return {
        "success": True,
        "wallet_address": found.signed.wallet,
        "balance": credits_left,
        "balance_credits": credits_left,
        "balance_usd": envelope.number(units),
        "balance_units": units,
        "expiration": _iso(next_ms // 1000) if next_ms else None,
        "expires_in_days": max(next_ms - now_ms, 0) // _DAY_MS if next_ms else None,
        "credit_source": "wallet",
    }


async def allowed(request: Request) -> Response:
    """``POST v1/auth/external`` with ``{"spends": "own" | "all"}``, signed by the wallet: whether
    its published signatures spend all its credits, or only what was bought with them."""
    node = node_of(request)
    body = await body_of(request)
    caller, account_id = await bound_caller(request, body)
    wanted = object_of(body, frozenset(("spends",))).get("spends")
    if wanted not in ("own", "all"):
        raise Problem("invalid_request", 'spends is "own" or "all".')
    address, chain = caller.wallet or ("", "")
    if account_id is None or chain:
        raise Problem("not_found", "This wallet has no credits here that a key could spend.")
    async with node.db.write() as tx:
        await tx.execute(
            "UPDATE wallet SET external_all = $2 WHERE address = $1 AND chain = ''",
            address,
            int(wanted == "all"),
        )
    return answer(200, {"wallet_address": address, "spends": wanted})


# -- tools --------------------------------------------------------------------------------------


def _catalog(request_or_scope: Any) -> Catalog:
    node: Node = request_or_scope[NODE]
    return node.catalog


async def tools(request: Request) -> Response:
    """``GET tools``: what can be invoked, for how much."""
    node = node_of(request)
    here = request.url.path.rsplit("/", 1)[0]
    actions = node.catalog.actions
    asked = dict.fromkeys(each.server for each in actions if each.server is not None)
    found = await asyncio.gather(*(servers.tools_of(node, server) for server in asked))
    known = dict(zip(asked, found, strict=True))
    listed: dict[str, list[dict[str, Any]]] = {}
    for action in actions:
        tool = known[action.server].get(action.name) if action.server is not None else None
        listed.setdefault(action.product, []).append(_shown(node, action, here, tool))
    told = [{"product": p, "product_slug": p, "actions": each} for p, each in listed.items()]
    return answer(200, {"success": True, "tools": told}, {"Cache-Control": "no-cache"})


def _shown(node: Node, action: Action, here: str, tool: Tool | None) -> dict[str, Any]:
    # A raise is not charged to all at once (price_changes.py), and is shown at once.
    price = in_force(action.route.price, node.now_s())
    units = price.fixed_units
    per_usd = node.settings.credits.per_usd
    path = f"{here}/tools/{action.product}/actions/{action.slug}/invoke"
    return {
        "id": action.id,
        "action": action.slug,
        "action_slug": action.slug,
        "name": action.name,
        "description": action.route.description or ("" if tool is None else tool.description),
        "price_credits": None if units is None else envelope.number(units, per_usd),
        "price": price.describe(),
        "unit_type": "request",
        "x402_direct": True,
        "invoke": {"method": "POST", "url": node.settings.server.public_url + path},
        "input_schema": ANYTHING if tool is None else tool.schema,
    }


class _Invoke:
    """The invoke routes as ASGI: a call under its hold answers in pieces of its own."""

    def __init__(self, find: Callable[[Catalog, dict[str, str]], tuple[Action, Call]]) -> None:
        self._find = find

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        action, call = self._find(_catalog(scope), scope["path_params"])
        outgoing = send if isinstance(send, Outgoing) else Outgoing(scope, send)
        await invoke.serve(scope[NODE], action, call, scope, receive, outgoing)


def _current(catalog: Catalog, named: dict[str, str]) -> tuple[Action, Call]:
    action = catalog.find(named["product"], named["action"])
    spelled = {(action.product, action.slug): None, (named["product"], named["action"]): None}
    paths = [
        f"{prefix}/external/tools/{product}/actions/{slug}/invoke{end}"
        for product, slug in spelled
        for end in ("", "/")
        for prefix in ("", "/api")
    ]
    return action, Call("invoke", action.product, tuple(paths))


def _older(catalog: Catalog, named: dict[str, str]) -> tuple[Action, Call]:
    return catalog.of_id(named["product"]), Call("invoke", named["product"])


# -- wallets ------------------------------------------------------------------------------------


async def agent_address(request: Request) -> Response:
    """``POST agentaddress``: a new wallet, told once and kept nowhere. Off unless switched on."""
    node = node_of(request)
    if not node.settings.external.wallet_maker:
        raise Problem("not_found", "Wallets are not made here: make one where you keep your keys.")
    await _count(request, "agentaddress", _MAKER_PER_MIN)
    made = await asyncio.to_thread(maker.make)
    return answer(200, {"success": True, **made})


Endpoint = Callable[[Request], Awaitable[Response]]


def _both(path: str, endpoint: Any, methods: tuple[str, ...] = ("POST",)) -> list[BaseRoute]:
    """One handler under both prefixes, with or without a slash at the end."""
    return [
        Route(prefix + path + end, endpoint, methods=list(methods))
        for prefix in (EXTERNAL, OURS)
        for end in ("", "/")
    ]


ROUTES: Final[list[BaseRoute]] = [
    *_both("/auth/session", session),
    *_both("/tools", tools, ("GET",)),
    *_both(_INVOKE, _Invoke(_current)),
    Route(EXTERNAL + _INVOKE_OLD, _Invoke(_older), methods=["POST"]),
    Route(EXTERNAL + "/credits/purchase", purchase, methods=["POST"]),
    Route(EXTERNAL + "/credits/balance", balance, methods=["POST"]),
    Route(EXTERNAL + "/agentaddress", agent_address, methods=["POST"]),
    Route(OURS + "/auth/external", allowed, methods=["POST"]),
]
