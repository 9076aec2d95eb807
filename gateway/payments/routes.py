"""Buying credits, asking after a payment, and Stripe's messages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway import forms
from gateway.db import CommitUnknown, DatabaseUnavailable
from gateway.errors import Problem
from gateway.ledger import read
from gateway.limits import client_of
from gateway.money import parse_usd
from gateway.node import Node, unavailable
from gateway.own import (
    amount,
    answer,
    body_of,
    bound_caller,
    caller_of,
    count_checkout,
    node_of,
    object_of,
)
from gateway.payments import (
    by_hash,
    card,
    challenge,
    journal,
    offers,
    payout,
    purchase,
    receipts,
    sponsor,
    two_step,
    x402,
)
from gateway.payments.order import CameWith, Gift
from gateway.payments.rails import content_hash
from gateway.payments.wire import Presented, decode_object
from gateway.proxy import replies
from gateway.proxy.identity import Caller, require_same_wallet
from gateway.proxy.target import from_scope

_PAYLOAD = two_step.PAYLOAD
PURCHASE = (
    by_hash.MEMBERS
    | sponsor.MEMBERS
    | two_step.MEMBERS
    | frozenset(
        ("amount_usd", "credits", "wallet_address", "payment_method", "request_id", _PAYLOAD)
    )
)
_OVER_X402 = ("x402", "x402direct")  # the second says that header fields cannot be set
_BY_HASH = forms.RateLimit(60, 60)
_REFUND = frozenset(("lot", "amount_usd", "all"))
_CARD = frozenset(("amount_usd", "credits", "wallet_address"))


Done = tuple[dict[str, Any], dict[str, str]]
"""What a purchase is answered with, and its header fields."""


async def buy(request: Request) -> Response:
    """``POST v1/credits/purchase``: pay over x402 and get credits, or ask how to."""
    body = await body_of(request)
    view, headers = await bought(request, body, object_of(body, PURCHASE))
    return answer(200, view, headers)


async def bought(request: Request, body: bytes, wanted: dict[str, Any], door: str = "") -> Done:
    """What ``wanted`` asks for, through whichever door of money. ``door``: whose weaker signatures
    may spend what becomes of it. Raises ``Problem``; 402 and 202 are some too."""
    node = node_of(request)
    if "transaction_hash" in wanted:
        return await _by_hash(request, node, body, wanted, door)
    extra = sorted(by_hash.MEMBERS & wanted.keys())
    if extra:
        raise Problem("invalid_request", f"{extra[0]} belongs to a transaction_hash.")
    target = from_scope(request.scope)
    asked = offers.Asked("POST", target.raw, 0)
    wanted = two_step.as_payment(node.rails, wanted, asked)
    units = purchase.amount_of(node.settings, wanted)
    method = wanted.get("payment_method", "x402")
    if method == "card":
        if wanted.get(_PAYLOAD) is not None:
            raise Problem("invalid_request", f"{_PAYLOAD} is no card payment.")
        return await _card(request, body, wanted, units)
    if method not in _OVER_X402:
        raise Problem("invalid_request", 'payment_method is "x402", "x402direct" or "card".')
    now = node.now_s()
    try:
        caller = await _caller(request, body, wanted)
    except Problem as refusal:
        raise _refused(node, asked, now, units, None, refusal) from None
    if caller.presented is None:
        for named in ("wallet_address", "payer_wallet_address"):
            if wanted.get(named) is not None:
                _wallet(wanted, named)  # what would be refused with the payment is not offered
        rails = node.rails
        raise challenge.for_credits(
            node.settings, rails.keys, asked, now, units, floors=rails.floors
        )
    try:
        came = _came_with(request, wanted, caller.presented, asked, units, door)
        came = replace(came, bare=caller.signer is None)
        paid = await x402.pay(node.rails, caller.presented, came)
    except Problem as refusal:
        raise _refused(node, asked, now, units, caller.presented, refusal) from None
    return await _bought(node, asked, now, units, caller.presented, paid)


async def _caller(request: Request, body: bytes, wanted: dict[str, Any]) -> Caller:
    """Who pays, in a header field or in the body. Raises ``Problem``."""
    caller = await caller_of(request, body)
    payload = wanted.get(_PAYLOAD)
    if payload is None:
        return caller
    if caller.presented is not None:
        raise Problem("identity_conflict", "The request carries more than one payment.")
    if not isinstance(payload, dict):
        raise Problem("invalid_payload", f"{_PAYLOAD} is not an object.")
    caller = caller._replace(
        presented=decode_object(payload, permit2=node_of(request).settings.takes_permit2)
    )
    require_same_wallet(node_of(request), caller)
    return caller


def _came_with(  # noqa: PLR0917  (one caller)
    request: Request,
    wanted: dict[str, Any],
    presented: Presented,
    asked: offers.Asked,
    units: int,
    door: str,
) -> CameWith:
    gift = _gift(request, wanted, presented)
    # What was asked for, not its spelling: a repeat may order its members differently.
    parts = [str(units), presented.authorization.from_]
    if gift is not None:
        parts.append(gift.recipient)
    content = content_hash(b"credits/purchase", *(part.encode() for part in parts))
    return CameWith(
        asked, offers.CREDITS, content, units, gift, alias=presented.identifier, door=door
    )


def _gift(request: Request, wanted: dict[str, Any], presented: Presented) -> Gift | None:
    """Whose the credits are to be, if not the payer's. Raises ``Problem``: without the payer's
    signature they are nobody else's."""
    node, payer = node_of(request), presented.authorization.from_
    if wanted.get("payer_wallet_address") is not None:
        named = _wallet(wanted, "payer_wallet_address")
        if named != payer:
            raise Problem(
                "payer_mismatch", f"payer_wallet_address is {named}; the payment is from {payer}."
            )
    signature = sponsor.signature_in(wanted)
    recipient = _wallet(wanted) if "wallet_address" in wanted else payer
    if recipient == payer:
        return None
    if signature is None:
        raise Problem(
            "payer_mismatch",
            f"The credits are for {recipient} and the payment is from {payer}: credits go to the "
            "wallet that pays, unless it signs the message (EIP-191 personal_sign) for another.",
            members={"message": sponsor.text_of(node.rails, presented, recipient), "payer": payer},
            next_actions=sponsor.next_actions(node.settings),
        )

    async def ask(caip2: str, to: str, data: bytes) -> bytes:
        await _count(request, node)
        return await node.eth_call(caip2, to, data)

    return Gift(recipient, signature, ask)


async def _by_hash(
    request: Request, node: Node, body: bytes, wanted: dict[str, Any], door: str
) -> Done:
    """Money that was sent already. The log is the proof; an identity is not needed."""
    if wanted.get("payment_method", "x402") not in _OVER_X402:
        raise Problem("invalid_request", "A transaction hash is no card payment.")
    caller = await caller_of(request, body)
    if caller.presented is not None or wanted.get(_PAYLOAD) is not None:
        raise Problem("invalid_request", "Send a payment or a transaction hash, not both.")
    recipient = _wallet(wanted) if "wallet_address" in wanted else None
    asked = by_hash.parse(node.settings, wanted, recipient)
    done = await by_hash.known(node.rails, asked)
    if done is None:
        await _count(request, node)
        done = await by_hash.credit(node.rails, asked, node.eth_call)
    if not done.minted:
        raise replies.pending(node, done.payment, status=202)
    if door:
        await by_hash.came_through(node.rails, done, door)
    target = from_scope(request.scope).raw
    headers = dict(replies.payment_receipt(node, done.payment, target).headers)
    if done.repeat:
        headers["Farebox-Replayed"] = "true"
    return by_hash.shown(node.settings, asked, done), headers


async def _count(request: Request, node: Node) -> None:
    """Each address may have us ask the nodes so often. Raises ``Problem("rate_limited")``."""
    peer, _ = request.scope["client"] or ("", 0)
    trusted = node.settings.server.trusted_proxies
    client = client_of(peer, request.scope["headers"], trusted)
    if not client.single:
        return
    standing = await node.limits.take(f"by-hash:{client.address}", _BY_HASH)
    if not standing.allowed:
        raise Problem(
            "rate_limited",
            f"More than {_BY_HASH.count} questions about transactions within a minute.",
            headers={"Retry-After": str(-(-standing.reset_ms // 1000))},
        )


def _refused(  # noqa: PLR0917
    node: Node,
    asked: offers.Asked,
    now: int,
    units: int,
    presented: Presented | None,
    refusal: Problem,
) -> Problem:
    if refusal.meaning.status != 402:
        return refusal
    rails = node.rails
    problem = challenge.for_credits(
        node.settings, rails.keys, asked, now, units, refusal=refusal, floors=rails.floors
    )
    for name, value in replies.refusal_headers(node, presented, refusal):
        problem.headers[name] = value
    return problem


async def _bought(  # noqa: PLR0917
    node: Node,
    asked: offers.Asked,
    now: int,
    units: int,
    presented: Presented,
    paid: x402.Paid,
) -> Done:
    payment = paid.payment
    if payment.state in ("failed", "reversed"):
        failure = Problem(
            payment.error_code or "settlement_failed", payment.error_detail or "It failed."
        )
        raise _refused(node, asked, now, units, presented, failure)
    if payment.state != "succeeded":
        raise replies.pending(node, payment, status=202)
    view = await _view(node, payment) | {"refund_policy": payout.policy(node.settings)}
    view["wallet_address"] = payment.recipient
    account_id = None
    # Who gives to a wallet learns nothing about it, nor does who read a payment in the calldata.
    if payment.recipient == payment.payer and paid.same_presenter:
        account_id = await node.account_of(payment.recipient or "", payment.recipient_chain)
    if account_id is not None:
        async with node.db.read() as tx:
            seen = await read.account(tx, account_id)
        if seen is not None:
            view |= amount(node, "balance", seen.available_units)
    headers = dict(replies.payment_receipt(node, payment, asked.target).headers)
    if paid.repeat:
        headers["Farebox-Replayed"] = "true"
    if paid.credential is not None:
        headers["Farebox-Credential"] = paid.credential
    return {"success": True, **view}, headers


async def _view(node: Node, payment: journal.Payment) -> dict[str, Any]:
    minted = None
    if payment.lot_id is not None:
        async with node.db.read() as tx:
            minted = await read.minted_units(tx, payment.lot_id)
    return purchase.shown(node.settings, payment, minted)


def _wallet(wanted: dict[str, Any], member: str = "wallet_address") -> str:
    """The wallet that gets the credits. A mixed-case address must have its EIP-55 checksum right:
    a card payment to a mistyped one would be lost."""
    try:
        return forms.address(wanted.get(member))
    except ValueError as error:
        raise Problem("invalid_request", f"{member} {error}.") from None


async def _card(request: Request, body: bytes, wanted: dict[str, Any], units: int) -> Done:
    node = node_of(request)
    if node.cards is None:
        raise Problem("not_found", "Cards are not switched on here.")
    wallet = _wallet(wanted)
    await count_checkout(request, await _signed_by(request, body))
    payment = await card.start(node.cards, units, wallet)
    view = {
        **purchase.shown(node.settings, payment, None),
        "checkout_url": payment.external_url,
        "status_url": f"{node.settings.server.public_url}/farebox/v1/payments/{payment.id}",
    }
    return view, {}


async def _signed_by(request: Request, body: bytes) -> int | None:
    """The account of whoever signed the request; None for anybody else."""
    if "signature-input" not in request.headers:
        return None
    caller = await caller_of(request, body)
    return None if caller.wallet is None else await node_of(request).account_of(*caller.wallet)


async def card_checkout(request: Request) -> Response:
    """``POST v1/card/checkout``: a Checkout page that pays credits to a wallet."""
    node = node_of(request)
    body = await body_of(request)
    wanted = object_of(body, _CARD)
    view, headers = await _card(request, body, wanted, purchase.amount_of(node.settings, wanted))
    return answer(200, view, headers)


async def payment_state(request: Request) -> Response:
    """``GET v1/payments/{id}``: the id is long and random, and known to whoever paid."""
    node = node_of(request)
    async with node.db.read() as tx:
        payment = await journal.by_id(tx, request.path_params["payment_id"])
    if payment is None:
        raise Problem("not_found", "There is no such payment.")
    if payment.provider == journal.PAYOUT:
        return answer(200, payout.shown(node.settings, payment))
    return answer(200, await _view(node, payment))


async def refund(request: Request) -> Response:
    """``POST v1/credits/refund``: unused credits back on chain, to the wallet that paid and asks.

    202 while any of it is on its way; a repeat is answered with what became of it."""
    node = node_of(request)
    body = await body_of(request)
    caller, account_id = await bound_caller(request, body, reads=False)
    wanted = _wanted(object_of(body, _REFUND))
    if account_id is None or caller.wallet is None or caller.signer is None:
        raise Problem("not_refundable", "This wallet has no credits here.")
    # The signature's nonce is used once; an Idempotency-Key lets it be signed again.
    key = f"key {caller.alias}" if caller.alias else f"nonce {caller.signer.request_id}"
    asker = payout.Asker(account_id, *caller.wallet, key)
    asked = (str(wanted.lot_id).encode(), str(wanted.amount_units).encode())
    content = content_hash(b"credits/refund", *asked)
    try:
        ids, repeat = await payout.ask(node.rails, asker, wanted, content)
    except (CommitUnknown, DatabaseUnavailable) as error:
        raise unavailable(error) from error
    async with node.db.read() as tx:
        payments = await payout.rows_of(tx, ids)
        seen = await read.account(tx, account_id)
    view: dict[str, Any] = {"refunds": [payout.shown(node.settings, each) for each in payments]}
    if seen is not None:
        view |= amount(node, "balance", seen.available_units)
    ended = all(each.state != "processing" for each in payments)
    headers = {"Farebox-Replayed": "true"} if repeat else {}
    return answer(200 if ended else 202, view, headers)


def _wanted(asked: dict[str, Any]) -> payout.Wanted:
    lot, usd, everything = asked.get("lot"), asked.get("amount_usd"), asked.get("all")
    if sum(each is not None for each in (lot, usd, everything)) != 1 or everything is False:
        raise Problem(
            "invalid_request",
            'Say what: {"lot": 123}, {"amount_usd": "1"} or {"all": true}, one of them.',
        )
    if usd is not None:
        try:
            units = parse_usd(usd) if isinstance(usd, str) else 0
        except ValueError as error:
            raise Problem("invalid_amount", f"amount_usd: {error}.") from None
        if not 0 < units <= purchase.MAX_PURCHASE_UNITS:
            raise Problem("invalid_amount", 'amount_usd is text, such as "1" or "2.50".')
        return payout.Wanted(None, units)
    if everything is not None:
        if everything is not True:
            raise Problem("invalid_request", "all is true.")
        return payout.Wanted(None, None)
    if isinstance(lot, bool) or not isinstance(lot, int) or not 0 < lot < 2**62:
        raise Problem("invalid_request", "lot is the id of one: GET /farebox/v1/credits/lots.")
    return payout.Wanted(lot, None)


async def stripe_webhook(request: Request) -> Response:
    """``POST webhooks/stripe``: 200 only once what it says is durable."""
    node = node_of(request)
    if node.cards is None:
        raise Problem("not_found", "Cards are not switched on here.")
    payload = await body_of(request)
    try:
        outcome = await card.webhook(node.cards, payload, request.headers.get("stripe-signature"))
    except DatabaseUnavailable as error:
        raise unavailable(error) from error
    return answer(200, {"received": True, "outcome": outcome})


async def receipt_keys(request: Request) -> Response:
    """``GET v1/receipts/keys``: whose signatures on receipts are this deployment's."""
    node = node_of(request)
    found = {"addresses": receipts.addresses(node.rails.keys), "format": "eip712"}
    return answer(200, found)


ROUTES = [
    Route("/farebox/v1/receipts/keys", receipt_keys, methods=["GET"]),
    Route("/farebox/v1/credits/purchase", buy, methods=["POST"]),
    Route("/farebox/v1/credits/refund", refund, methods=["POST"]),
    Route("/farebox/v1/card/checkout", card_checkout, methods=["POST"]),
    Route("/farebox/v1/payments/{payment_id}", payment_state, methods=["GET"]),
    Route("/farebox/webhooks/stripe", stripe_webhook, methods=["POST"]),
]
