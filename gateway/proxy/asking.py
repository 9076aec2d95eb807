"""A request to a priced route, and the 402 that says what it costs."""

from __future__ import annotations

from typing import NamedTuple

from gateway import observe
from gateway.errors import Problem
from gateway.fields import values
from gateway.limits import Client
from gateway.middleware import Outgoing
from gateway.node import Node
from gateway.payments import challenge, offers
from gateway.payments.wire import DECLARED, DECLARED_PERMITS, Presented
from gateway.pricing.quote import Quote
from gateway.proxy import replies, siwx, unpaid
from gateway.proxy.identity import Headers
from gateway.proxy.pace import Pace
from gateway.proxy.routes_table import Route
from gateway.proxy.target import Target


class Request(NamedTuple):
    """One request to a priced route, as far as it has been read."""

    route: Route
    method: str
    target: Target
    headers: Headers
    now_s: int
    client: Client
    pace: Pace | None  # on routes with a rate limit
    tag: bytes | None = siwx.UNREAD  # what a challenge can say of its body (siwx.py)
    bound: bytes = b""  # what an offer says of its body (cost.py)
    shows_credential: bool = True  # whether its answer has a place for one
    upto: bool = False  # whether it may be paid for what it came to (afterwards.py)


async def answer_unpaid(node: Node, request: Request, price: Quote, send: Outgoing) -> None:
    """The 402 of a request that says nothing about who sends it."""
    accept = b",".join(values(request.headers, b"accept"))
    signed = node.settings.server.sign_offers  # for this request alone, so nothing is prepared
    if request.pace is not None or signed or b"html" in accept.lower():
        raise challenge_of(node, request, price)
    lines, answer = unpaid.answer(
        node.settings,
        node.rails.keys,
        asked_of(request, price),
        request.now_s,
        send.log_id,
        at_most=not price.exact,
        description=request.route.description,
        extensions=_extensions(node, request, price),
        floors=node.rails.floors,
    )
    observe.count("requests", outcome="unpaid")
    await send.whole(402, [], lines, answer)


def challenge_of(
    node: Node,
    request: Request,
    price: Quote,
    *,
    balance_units: int | None = None,
    needed_units: int | None = None,
    refusal: Problem | None = None,
) -> Problem:
    return challenge.for_call(
        node.settings,
        node.rails.keys,
        asked_of(request, price),
        request.now_s,
        balance_units=balance_units,
        needed_units=needed_units,
        at_most=not price.exact,
        description=request.route.description,
        refusal=refusal,
        extensions=_extensions(node, request, price),
        floors=node.rails.floors,
    )


def refusal_of(
    node: Node, request: Request, price: Quote, presented: Presented | None, refusal: Problem
) -> Problem:
    """A payment that was refused: its reason, a PAYMENT-RESPONSE, and fresh offers."""
    if refusal.meaning.status != 402:
        return refusal
    problem = challenge_of(node, request, price, refusal=refusal)
    if siwx.refused(refusal.code):
        return problem  # no payment came, so there is nothing to say about one
    for name, value in replies.refusal_headers(node, presented, refusal):
        problem.headers[name] = value
    return problem


def asked_of(request: Request, price: Quote) -> offers.Asked:
    return offers.Asked(
        request.method, request.target.raw, price.max_units, request.bound, request.upto
    )


def _extensions(node: Node, request: Request, price: Quote) -> str:
    method, units = request.method, price.max_units
    beside = request.route.extensions.get(method, DECLARED)
    if node.settings.takes_permits and not request.upto:
        beside = f"{beside},{DECLARED_PERMITS}"
    return siwx.extension(node, method, request.target, request.tag, units, request.now_s, beside)
