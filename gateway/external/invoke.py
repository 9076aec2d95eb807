"""Invoking an action: by a signed body from credits, or by a payment for this very call.

Both go the way of every priced request (``proxy/paid.py``, ``proxy/forward.py``): the same hold,
the same guard, one call of the upstream, the capture before the answer. Only what is asked comes
out of a JSON body, and the answer goes into one.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from functools import partial
from hashlib import sha256
from typing import Any, Final

from chain.errors import ChainError
from gateway import ledger
from gateway.db import CommitUnknown, DatabaseUnavailable
from gateway.errors import NextAction, Problem
from gateway.external import envelope, proof, servers
from gateway.external.catalog import Action
from gateway.external.envelope import MESSAGE_ID, Invoke, InvokeTool, Money
from gateway.fields import Fields
from gateway.limits import client_of
from gateway.middleware import Outgoing, read_body
from gateway.node import Node, unavailable
from gateway.payments.rails import content_hash
from gateway.pricing.quote import Quote
from gateway.proxy import cost, forward, paid, quotes, replies, runs
from gateway.proxy.asking import Request, challenge_of, refusal_of
from gateway.proxy.body import CONTENT_DIGEST, Body
from gateway.proxy.identity import (
    NOBODY,
    Caller,
    Headers,
    auth_problem,
    identify,
    require_same_wallet,
)
from gateway.proxy.pace import Pace
from gateway.proxy.target import from_scope
from wallet_auth import AuthError, check_digests
from wallet_auth.canonical import ascii_form
from wallet_auth.personal import Call
from wallet_auth.request import DIGESTS
from wallet_auth.siwx import MAX_BODY_BYTES
from wallet_auth.strict import json_object

Receive = Callable[[], Awaitable[Any]]
# About the body that came, or about how its answer should come: both are ours to say.
_NOT_UP: Final = frozenset(
    b"content-type content-encoding content-digest repr-digest digest content-md5 accept"
    b" accept-encoding range if-range if-match if-none-match if-modified-since"
    b" if-unmodified-since".split()
).union(servers.OF_MCP)
_UP: Final = (
    (b"content-type", b"application/json"),
    (b"accept", b"application/json, text/event-stream;q=0.9, */*;q=0.5"),
    (b"accept-encoding", b"identity"),
)


class Asked:
    """An invoke as far as it has been read: what is asked of which action, and by whom.

    ``text`` is what goes up: of a signed body the very text whose hash was signed.
    """

    def __init__(  # noqa: PLR0917  (one caller)
        self,
        node: Node,
        action: Action,
        request: Request,
        parameters: dict[str, Any],
        text: bytes,
        caller: Caller,
    ) -> None:
        self.node = node
        self.action = action
        self.parameters = parameters
        self.text = text
        self.caller = caller
        self.target = action.target(parameters)
        self.request = request._replace(bound=cost.bound(request.route, text))
        self.price = self.shown if caller.proves_nothing else self._held()

    @property
    def shown(self) -> Quote:
        """What is offered: the price now."""
        return self._quote(cost.shown(self.request.now_s))

    def _held(self) -> Quote:
        """A signed call may have been made by an older list."""
        return self._quote(cost.held(self.node.settings, self.request.now_s))

    def _quote(self, when: cost.When) -> Quote:
        route, method = self.request.route, self.action.method
        return cost.quote_of(route, method, self.target, [_UP[0]], self.text, when)

    @property
    def content(self) -> bytes:
        """What makes a repeat the same: the action and its parameters, however they are written."""
        run = runs.run_of(self.request.headers) or ""
        name = f"{self.action.product}/{self.action.slug}"
        return content_hash(b"invoke", name.encode(), ascii_form(self.parameters), run.encode())

    def up(self) -> bytes:
        """The body of the call."""
        if self.action.server is not None:
            params = {"name": self.action.name, "arguments": self.parameters}
            message = {"jsonrpc": "2.0", "id": MESSAGE_ID, "method": "tools/call"}
            return json.dumps({**message, "params": params}).encode()
        return b"" if self.action.asks_in_query else self.text


async def serve(  # noqa: PLR0917  (an ASGI call and what it is about)
    node: Node,
    action: Action,
    call: Call,
    scope: Any,
    receive: Receive,
    send: Outgoing,
) -> None:
    """Answer an invoke. ``call``: what a published message of it has to say. Raises ``Problem``."""
    headers: Headers = scope["headers"]
    peer, _ = scope["client"] or ("", 0)
    client = client_of(peer, headers, node.settings.server.trusted_proxies)
    limit = action.route.rate_limit
    pace = None if limit is None else Pace(node, action.route, limit, client)
    target = from_scope(scope)
    request = Request(
        action.route, "POST", target, headers, node.now_s(), client, pace, shows_credential=False
    )
    try:
        limit_bytes = node.settings.server.max_body_bytes
        raw = await read_body(receive, headers, limit_bytes, send.body_that_came())
        asked = await _read(node, action, call, request, raw)
        if pace is not None:
            await pace.identified(asked.caller)
            send.also = pace.told()
        taken = await _taken(asked)
    except Problem as refusal:
        send.also = []
        raise (refusal if pace is None else await pace.refused(refusal)) from refusal.__cause__
    url = node.settings.server.public_url + target.raw.decode("ascii")
    money = Money(node, asked.caller, asked.price.max_units, url)
    if isinstance(taken, replies.Reply):
        await replies.send(await envelope.again(taken, money), "POST", send)
        return
    up = asked.up()
    body = Body(up, None, len(up), {CONTENT_DIGEST: sha256(up).digest()})
    fields = Fields([pair for pair in headers if pair[0] not in _NOT_UP])
    for name, value in _UP:
        fields.add(name, value)
    incoming = forward.Incoming(action.route, asked.target, fields, body, client, action.method)
    if action.server is None:
        held = Invoke(node, action.route, taken, receive, send, money)
        await forward.run_call(held, incoming)
        return
    tool = InvokeTool(node, action.route, taken, receive, send, money)
    await forward.run_call(tool, incoming, partial(servers.in_session, action.server))


async def _read(node: Node, action: Action, call: Call, request: Request, raw: bytes) -> Asked:
    """What the body asks for, and who sends it."""
    try:
        body = json_object(raw) if raw.strip() else {}
    except ValueError as error:
        raise Problem("invalid_request", f"The body is {error}.") from None
    make = partial(Asked, node, action)
    if proof.is_wrapper(body):
        found = proof.of_parameters(node, request.target, request.headers, body, raw, call)
        caller = await _with_payment(node, request, found)
        return make(request, body.get(proof.PARAMETERS, {}), found.payload, caller)
    digest = sha256(raw).digest()
    tag = digest if raw else b""
    request = request._replace(tag=tag if len(raw) <= MAX_BODY_BYTES else None)
    text = raw or b"{}"
    try:
        caller = await identify(
            node, "POST", request.target, request.headers, request.now_s, request.client
        )
        if caller.presented is not None:
            node.rails.chain_of(caller.presented)
    except Problem as refusal:
        nobody = make(request, body, text, NOBODY)
        raise refusal_of(node, nobody.request, nobody.shown, None, refusal) from None
    asked = make(request, body, text, caller)
    if caller.signer is not None:
        _check_body(asked, raw)
    return asked


async def _with_payment(node: Node, request: Request, found: proof.Proof) -> Caller:
    """A payment beside a signed body: only where that is an identity, and of the same wallet."""
    headers = request.headers
    only_payment = await identify(
        node, "POST", request.target, headers, request.now_s, request.client
    )
    presented = only_payment.presented
    if presented is None:
        return found.caller
    if not found.bound:
        raise Problem(
            "identity_conflict",
            "The body is signed and a payment comes with it: send the parameters alone as the body "
            "to pay for this call, or the signed body without a payment.",
        )
    caller = found.caller._replace(presented=presented)
    require_same_wallet(node, caller)
    return caller


def _check_body(asked: Asked, raw: bytes) -> None:
    signer = asked.caller.signer
    if signer is None:
        return
    found = {"sha-256": sha256(raw).digest()}
    for name, _ in signer.digests:
        found.setdefault(name, DIGESTS[name](raw).digest())
    try:
        check_digests(signer, len(raw), found)
    except AuthError as error:
        if asked.caller.ceiling_units is not None:
            wrong = Problem("invalid_siwx_nonce", error.detail)
            raise refusal_of(asked.node, asked.request, asked.price, None, wrong) from None
        raise auth_problem(asked.node, "POST", asked.request.target, error) from None


async def _taken(asked: Asked) -> forward.Ticket | replies.Reply:
    """The hold, or the answer of an invoke that is known already."""
    node, caller = asked.node, asked.caller
    if caller.proves_nothing:
        raise challenge_of(node, asked.request, asked.shown)
    cost.within_ceiling(caller, asked.price, asked.request.headers)
    quotes.none_here(asked.request.headers)
    run = runs.run_of(asked.request.headers)
    take = partial(
        paid.take_hold, node, asked.request, price=asked.price, content=asked.content, run=run
    )
    try:
        try:
            return await take(caller=caller)
        except Problem as refusal:
            wider = await _wider(node, caller, refusal)
            if wider is None:
                raise
            asked.caller = wider
            return await take(caller=wider)
    except Problem as refusal:
        raise _as_published(asked, refusal) from refusal.__cause__
    except (DatabaseUnavailable, CommitUnknown, ChainError) as error:
        raise unavailable(error) from error


async def _wider(node: Node, caller: Caller, refusal: Problem) -> Caller | None:
    """The same caller with all its credits, if it is short of those its proof spends by itself and
    its wallet has allowed that."""
    signer, only = caller.signer, caller.only
    short = refusal.code == "insufficient_credits" and "balance_units" in refusal.members["credits"]
    if not short or signer is None or only is None or only.source is None:
        return None
    if not await proof.may_spend_all(node, signer.address):
        return None
    return caller._replace(only=ledger.Only(session=only.session, most_units=only.most_units))


def _as_published(asked: Asked, refusal: Problem) -> Problem:
    """A refusal with what clients of the published API look for."""
    if refusal.code == "insufficient_credits":
        told = refusal.members["credits"]
        settings = asked.node.settings.credits
        step_units = 1_000_000 // settings.per_usd * settings.pack_multiple
        packs = max(-(-told["shortfall_units"] // step_units), 1)
        refusal.members |= {
            "required_credits": envelope.number(told["price_units"], settings.per_usd),
            "balance_credits": envelope.number(told["balance_units"], settings.per_usd),
            "suggested_credits": packs * settings.pack_multiple,
        }
    if refusal.code == "session_limit_reached":
        refusal.next_actions = (proof.new_session(asked.node, "/api/external"),)
    if refusal.code != "request_id_conflict" or asked.caller.signer is None:
        return refusal
    if asked.caller.signer.scheme != "personal":
        return refusal
    url = asked.node.settings.server.public_url + asked.request.target.raw.decode("ascii")
    send = "the same body signed anew with a request_id that was not used before"
    return Problem(
        "EXTERNAL_SIGNATURE_REQUEST_REPLAY",
        "This request_id was used in this session before, for something else.",
        next_actions=[NextAction("POST", url, send)],
    )
