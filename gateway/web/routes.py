"""Buying credits as a person: the buy page, the page of a payment, and their files."""

from __future__ import annotations

import asyncio
from typing import Final
from urllib.parse import parse_qsl

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from gateway import forms
from gateway.errors import Problem
from gateway.node import Node
from gateway.observe import log
from gateway.own import answer, body_of, count_checkout, count_of_client, node_of
from gateway.payments import card, journal, stripe
from gateway.payments.journal import Payment
from gateway.web import pages, shop
from wallet_auth.keys import checksum

LOOK_S: Final = 5.0  # how long the page of a payment waits for Stripe before it shows what we know
LOOK_AGAIN: Final = forms.RateLimit(1, 1)  # for one payment
LOOKS_PER_MIN: Final = 60  # for one address
_FORM: Final = "application/x-www-form-urlencoded"


async def buy_page(request: Request) -> Response:
    """``GET buy?wallet=&usd=&pay=card|usdc``: choose an amount and a wallet."""
    node = node_of(request)
    query = dict(request.query_params)
    order = shop.prefilled(node.settings, query)
    return _buy(node, order, query, notice=_notice(query))


def _notice(query: dict[str, str]) -> str:
    return "You left the payment page. Nothing was charged." if "canceled" in query else ""


def _buy(
    node: Node, order: shop.Order, query: dict[str, str], *, notice: str = "", status: int = 200
) -> Response:
    cards = node.cards is not None
    said = shop.terms(node.settings)
    usdc = said["networks"] and query.get("pay") == "usdc"
    chosen = "card" if cards and not usdc else "usdc"
    return pages.render(
        "buy.html",
        status=status,
        form_targets=shop.checkout_origins(node.settings),
        **shop.frame(node.settings),
        **said,
        snippets=shop.snippets(node.settings),
        order=order,
        notice=notice,
        cards=cards,
        card_test=node.cards is not None and not node.cards.client.livemode,
        chosen=chosen,
    )


async def buy(request: Request) -> Response:
    """``POST buy``: the form without scripts. Leads to the card provider's page."""
    node = node_of(request)
    if node.cards is None:
        raise Problem("not_found", "Cards are not switched on here.")
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _FORM:
        raise Problem("unsupported_media_type", f"This takes {_FORM}.")
    try:
        pairs = parse_qsl(
            (await body_of(request)).decode("utf-8"), keep_blank_values=True, max_num_fields=20
        )
    except ValueError:
        raise Problem("invalid_request", "The form could not be read.") from None
    order = shop.read_order(node.settings, dict(pairs))
    if not order.ok:
        return _buy(node, order, {}, status=400)
    try:
        await count_checkout(request)
        payment = await card.start(node.cards, order.units, order.address)
    except Problem as problem:
        page = _buy(node, order, {}, notice=problem.detail, status=problem.status)
        page.headers.update(problem.headers)
        return page
    return RedirectResponse(
        payment.external_url or f"/farebox/buy/{payment.id}",
        303,
        pages.headers(shop.checkout_origins(node.settings)),
    )


async def wallet(request: Request) -> Response:
    """``GET buy/wallet?address=``: the address as people compare it (EIP-55), or what is wrong."""
    try:
        found = forms.address(request.query_params.get("address", "").strip())
    except ValueError as error:
        raise Problem("invalid_request", f"The wallet address {error}.") from None
    return answer(200, {"address": checksum(found)})


async def payment_page(request: Request) -> Response:
    """``GET buy/{payment_id}``: how a payment stands; where Checkout sends people back to."""
    node = node_of(request)
    payment_id = request.path_params["payment_id"]
    async with node.db.read() as tx:
        payment, now_ms = await journal.by_id(tx, payment_id), await tx.now_ms()
    if payment is None:
        return pages.render(
            "message.html",
            status=404,
            **shop.frame(node.settings),
            title="There is no such payment",
            text="The address may be incomplete. Nothing was charged by opening this page.",
        )
    if await _look(request, node, payment):
        async with node.db.read() as tx:
            payment = await journal.by_id(tx, payment_id) or payment
    return pages.render(
        "payment.html",
        **shop.frame(node.settings),
        **shop.payment_facts(node.settings, payment, now_ms),
    )


async def _look(request: Request, node: Node, payment: Payment) -> bool:
    """Ask Stripe about an open payment: its message may be late, or lost. True if it moved.

    Not for every view, which would let anybody make us ask as often as they like: what is not
    asked now is asked by a later view, or by work.py.
    """
    waiting = payment.provider == card.PROVIDER and payment.state in {"created", "processing"}
    if node.cards is None or not waiting or payment.external_ref is None:
        return False
    if not (await node.limits.take(f"look:payment:{payment.id}", LOOK_AGAIN)).allowed:
        return False
    if not (await count_of_client(request, "look", LOOKS_PER_MIN)).allowed:
        return False
    try:
        async with asyncio.timeout(LOOK_S):
            return await card.look(node.cards, payment) != payment.state
    except (stripe.CardError, TimeoutError) as error:
        # the page shows what is known; the webhook or work.py will bring the rest
        log.info("payment %s: Stripe could not be asked: %r", payment.id, error)
        return False


async def static(request: Request) -> Response:
    """``GET static/{name}``: style, scripts and signs of the pages."""
    found = pages.static(request.path_params["name"], request.query_params.get("v"))
    if found is None:
        raise Problem("not_found", "There is no such file.")
    return found


ROUTES = [
    Route("/farebox/buy", buy_page, methods=["GET"]),
    Route("/farebox/buy", buy, methods=["POST"]),
    Route("/farebox/buy/wallet", wallet, methods=["GET"]),
    Route("/farebox/buy/{payment_id}", payment_page, methods=["GET"]),
    Route("/farebox/static/{name}", static, methods=["GET"]),
]
