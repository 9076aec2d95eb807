"""An MCP server behind the gateway: its tools are priced, everything else passes (streamable HTTP).

    tools/call              priced by the tool's name
    tools/list              free, with the price of each tool
    all else, GET, DELETE   free; what a server says about money is not passed

A call is paid as any other request: signed over HTTP (ERC-8128), or with a payment header; then it
is also refused as any other. A client that says nothing in its headers is taken for one that knows
x402's MCP transport: it gets its 402 as the result of the tool, or as a result of a type of its own
if it speaks the extension (``org.x402/payment``), and pays in ``params._meta["x402/payment"]``. A
batch is refused, since one answer cannot have two prices.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import replace
from functools import partial
from typing import Any, Final
from urllib.parse import quote as quoted

from chain.errors import ChainError
from gateway import observe
from gateway.db import CommitUnknown, DatabaseUnavailable
from gateway.errors import Problem
from gateway.fields import Fields, values
from gateway.limits import Client
from gateway.middleware import Outgoing, log_id, read_body
from gateway.node import Node, unavailable
from gateway.payments.rails import content_hash
from gateway.payments.wire import decode_object
from gateway.pricing.quote import Quote
from gateway.proxy import body as bodies
from gateway.proxy import cost, events, forward, free, mcp_free, paid, quotes, replies, runs
from gateway.proxy import mcp_answers as answers
from gateway.proxy import mcp_messages as messages
from gateway.proxy.asking import Request, challenge_of, refusal_of
from gateway.proxy.cost import bound, quote_of, within_ceiling
from gateway.proxy.identity import (
    Caller,
    Headers,
    auth_problem,
    identify,
    require_same_wallet,
    says_nothing,
)
from gateway.proxy.mcp_call import ToolCall
from gateway.proxy.mcp_messages import Message
from gateway.proxy.routes_table import McpMount, Route
from gateway.proxy.target import Target
from wallet_auth import AuthError, check_body

Receive = Callable[[], Awaitable[Any]]
# About a body that is written anew.
_OF_THE_BODY: Final = frozenset(
    b"content-type content-encoding content-digest repr-digest digest content-md5".split()
)
_JSON: Final = (b"content-type", b"application/json")
LISTEN_S: Final = 3_600
# Refusals of a payment that are no 402: nothing was sent for it, and another one would be taken.
_ANOTHER_WILL_DO: Final = frozenset({"invalid_payload", "payment_already_used"})


async def serve(  # noqa: PLR0917  (an ASGI call and what it was matched to)
    node: Node,
    mount: McpMount,
    target: Target,
    client: Client,
    scope: MutableMapping[str, Any],
    receive: Receive,
    send: Outgoing,
) -> None:
    """Answer a request for an MCP server. Raises ``Problem``."""
    if scope["method"] in ("GET", "DELETE"):
        # A stream of what the server has to say, which may be silent for long.
        route = replace(mount.free, timeout_s=mount.free.timeout_s or LISTEN_S)
        await free.serve(node, route, target, scope, receive, send, relay=mcp_free.relay)
        return
    if scope["method"] != "POST":
        allow = {"Allow": "GET, POST, DELETE"}
        raise Problem("method_not_allowed", "Not with this method.", headers=allow)
    incoming: Headers = scope["headers"]
    if any(value.lower() != b"identity" for value in values(incoming, b"content-encoding")):
        raise Problem("unsupported_media_type", "Send the message without a content encoding.")
    body = await read_body(receive, incoming, node.settings.server.max_body_bytes)
    message = messages.read(body)
    up = Fields([*(pair for pair in incoming if pair[0] not in _OF_THE_BODY), _JSON])
    messages.require_same(incoming, message)
    if message.method == messages.CALL:
        route = messages.price_of(mount.tools, message.tool)
        if not route.free:
            call = _Asked(node, route, target, client, incoming, up, body, message, log_id(scope))
            await _call(call, receive, send)
            return
    relay = partial(mcp_free.relay, show=_show(node, mount, message.method))
    await free.serve(
        node, mount.free, target, scope, receive, send, (up, bodies.of(message.up)), relay
    )


def _show(node: Node, mount: McpMount, method: str) -> answers.Show:
    if method == messages.LIST:
        per_usd = node.settings.credits.per_usd
        return partial(answers.listed, tools=mount.tools, per_usd=per_usd, now_s=node.now_s())
    return answers.advertised if method == messages.DISCOVER else answers.unchanged


class _Asked:
    """A call of a priced tool, as far as it has been read."""

    def __init__(  # noqa: PLR0917  (one caller)
        self,
        node: Node,
        route: Route,
        target: Target,
        client: Client,
        incoming: Headers,
        up: Headers,
        body: bytes,
        message: Message,
        log_id: str,
    ) -> None:
        self.node = node
        self.target = target
        self.incoming = incoming
        self.up = up
        self.body = body
        self.message = message
        self.log_id = log_id
        # "#" stands in no target on the wire: an offer for a tool is good for that tool only.
        raw = target.raw + b"#tool/" + quoted(message.tool, safe="").encode()
        self.request = Request(
            route,
            "POST",
            replace(target, raw=raw),
            incoming,
            node.now_s(),
            client,
            None,
            bound=bound(route, message.arguments),
            shows_credential=False,
        )


async def _call(call: _Asked, receive: Receive, send: Outgoing) -> None:
    over_http = not says_nothing(call.incoming)
    try:
        taken = await _taken(call)
    except Problem as problem:
        if over_http:
            raise
        observe.count("requests", outcome="unpaid" if problem.status == 402 else "refused")
        told = messages.refusal(_payable(call, problem), call.message, call.log_id)
        await _send(send, messages.answer(call.message.id, "result", told))
        return
    if isinstance(taken, replies.Reply):
        await _again(call, taken, send)
        return
    body = bodies.of(call.message.up)
    incoming = forward.Incoming(call.request.route, call.target, call.up, body, call.request.client)
    make = partial(ToolCall, message_id=call.message.id)
    await forward.run_call(make(call.node, call.request.route, taken, receive, send), incoming)


def _payable(call: _Asked, problem: Problem) -> Problem:
    """A payment that is no good is answered with offers, in the extension's words too."""
    message = call.message
    if message.extension and message.payment is not None and problem.code in _ANOTHER_WILL_DO:
        price = _quote(call, cost.shown(call.request.now_s))
        return challenge_of(call.node, call.request, price, refusal=problem)
    return problem


async def _taken(call: _Asked) -> forward.Ticket | replies.Reply:
    """From the message to the hold, or to the answer of a call that is known already."""
    node, request = call.node, call.request
    shown = _quote(call, cost.shown(request.now_s))
    caller = await _caller(call, shown)
    if caller.proves_nothing:
        raise challenge_of(node, request, shown)
    price = _quote(call, cost.held(node.settings, request.now_s))
    within_ceiling(caller, price, call.incoming)
    quotes.none_here(call.incoming)
    run = runs.run_of(call.incoming)
    target = request.target.raw
    content = content_hash(b"POST", target, call.message.content, (run or "").encode())
    try:
        return await paid.take_hold(node, request, caller, price, content, run)
    except (DatabaseUnavailable, CommitUnknown, ChainError) as error:
        raise unavailable(error) from error


async def _caller(call: _Asked, price: Quote) -> Caller:
    """Who calls and what pays, in the header or in the message."""
    node, message, presented = call.node, call.message, None
    try:
        request = call.request
        caller = await identify(
            node, "POST", call.target, call.incoming, request.now_s, request.client
        )
        if message.payment is not None:
            presented = decode_object(message.payment, permit2=node.settings.takes_permit2)
            if caller.presented is not None:
                raise Problem("identity_conflict", "The call carries more than one payment.")
            caller = caller._replace(presented=presented)
            require_same_wallet(node, caller)
        if caller.presented is not None:
            node.rails.chain_of(caller.presented)
    except Problem as refusal:
        raise refusal_of(node, call.request, price, presented, refusal) from None
    if caller.signer is not None:
        try:
            check_body(caller.signer, call.body)
        except AuthError as error:
            raise auth_problem(node, "POST", call.target, error) from None
    return caller


def _quote(call: _Asked, when: cost.When) -> Quote:
    """By the tool's arguments, which are its body."""
    message = call.message
    return quote_of(call.request.route, "POST", call.target, [_JSON], message.arguments, when)


async def _again(call: _Asked, reply: replies.Reply, send: Outgoing) -> None:
    """The answer to a call that was made before, under the id it is asked with now."""
    if reply.status != 200:
        await replies.send(reply, "POST", send)
        return
    stored = events.object_of(reply.body)
    if stored is None or "jsonrpc" not in stored:
        text = json.dumps(stored)
        stored = {"jsonrpc": "2.0", "result": {"content": [{"type": "text", "text": text}]}}
        if call.message.typed:
            stored["result"]["resultType"] = "complete"
    told = answers.with_meta({**stored, "id": call.message.id}, answers.money(reply.headers))
    fields = [pair for pair in reply.headers if pair[0].lower() != "content-type"]
    await _send(send, json.dumps(told).encode(), fields)


async def _send(send: Outgoing, body: bytes, fields: replies.Pairs = ()) -> None:
    kind = (("Content-Type", "application/json"), *fields)
    if not any(name.lower() == "cache-control" for name, _ in fields):
        kind = (*kind, ("Cache-Control", "no-store"))
    await replies.send(replies.Reply(200, kind, body), "POST", send)
