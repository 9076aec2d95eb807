"""Answers the gateway gives itself on a priced route: repeats, receipts, payments under way."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from gateway import ledger
from gateway.accounts import credentials
from gateway.errors import NextAction, Problem
from gateway.ledger import read
from gateway.ledger.sweep import INTERRUPTED
from gateway.money import format_credits
from gateway.node import Node
from gateway.payments import receipts
from gateway.payments.journal import Payment
from gateway.payments.wire import Presented, response_headers
from gateway.proxy import cors
from gateway.settings import Chain

Send = Callable[[Any], Awaitable[None]]
Pairs = Sequence[tuple[str, str]]
_FROM_CREDITS: Final = (("Farebox-Paid-From", "credits"),)


@dataclass(frozen=True, slots=True)
class Receipt:
    """What came of the payment that was sent with a request: what it was settled with, or the
    chain it was made out for and not sent on, because it was answered from credits."""

    payer: str
    headers: tuple[tuple[str, str], ...]
    unsent: Chain | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer. ``headers`` may hold a name more than once."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes = field(repr=False)


async def send(reply: Reply, method: str, send_: Send) -> None:
    """Send a whole answer; HEAD gets its headers."""
    headers = [(n.lower().encode("latin-1"), v.encode("latin-1")) for n, v in reply.headers]
    headers.append((b"content-length", str(len(reply.body)).encode()))
    start = {"type": "http.response.start", "status": reply.status}
    await send_({**start, "headers": cors.expose(headers)})
    body = b"" if method == "HEAD" else reply.body
    await send_({"type": "http.response.body", "body": body})


def json_reply(status: int, value: object, headers: Pairs = ()) -> Reply:
    """A JSON answer of the gateway's own."""
    fixed = (("Content-Type", "application/json"), ("Cache-Control", "no-store"))
    return Reply(status, (*fixed, *headers), json.dumps(value, ensure_ascii=False).encode())


def payment_receipt(node: Node, payment: Payment, target: bytes) -> Receipt:
    """The PAYMENT-RESPONSE of a payment that succeeded, for what was asked at ``target``."""
    return Receipt(payment.payer or "", tuple(_response(node, payment, target)))


def paid_from(
    node: Node, receipt: Receipt | None, charged_units: int | None, available_units: int
) -> Pairs:
    """Where the money for a call came from, and the PAYMENT-RESPONSE of a payment beside it.

    One that was answered from credits has a response only if the call was charged
    (``charged_units`` None or 0: it was not, or is not yet).
    """
    if receipt is None:
        return _FROM_CREDITS
    if receipt.unsent is None:
        return (("Farebox-Paid-From", "settlement"), *receipt.headers)
    if not charged_units:
        return _FROM_CREDITS
    per_usd = node.settings.credits.per_usd
    network = receipt.unsent.network
    told = response_headers(
        success=True,
        network=network.caip2,
        payer=receipt.payer,
        amount_units=0,
        v1_name=network.v1_name,
        extra={
            "paidFrom": "credits",
            "charged": format_credits(charged_units, per_usd),
            "balance": format_credits(available_units, per_usd),
        },
    )
    return (*_FROM_CREDITS, *told)


def _response(node: Node, payment: Payment, target: bytes = b"") -> list[tuple[str, str]]:
    chain = node.settings.chain(payment.network or "")
    done = payment.state == "succeeded"
    extensions = None
    if done and target:
        url = node.settings.server.public_url + target.decode("ascii")
        told = receipts.Receipt(
            chain.caip2,
            url,
            payment.payer or "",
            payment.created_at_ms // 1000,
            payment.tx_hash or "",
        )
        extensions = receipts.signed(node.rails.keys, told)
    reason = "settlement_pending" if payment.state == "processing" else payment.error_code
    return response_headers(
        success=done,
        network=chain.caip2,
        payer=payment.payer or "",
        transaction=payment.tx_hash or "",
        amount_units=payment.amount_units if done else None,
        error=None if done else (reason or "settlement_failed", payment.error_detail or ""),
        v1_name=chain.network.v1_name,
        extensions=extensions,
    )


def refusal_headers(
    node: Node, presented: Presented | None, refusal: Problem
) -> list[tuple[str, str]]:
    """PAYMENT-RESPONSE of a payment that was refused before it was sent.

    ``presented`` None: it could not be read so far; then the network is the one we offer first.
    """
    named = v1_name = "" if presented is None else presented.network
    for chain in node.settings.chains:
        if named in ("", chain.caip2, chain.network.v1_name):
            named, v1_name = chain.caip2, chain.network.v1_name or chain.caip2
            break
    return response_headers(
        success=False,
        network=named,
        payer="" if presented is None else presented.authorization.from_,
        error=(refusal.code, refusal.detail),
        v1_name=v1_name,
    )


def pending(node: Node, payment: Payment, *, status: int | None = None) -> Problem:
    """Sent, and not known to be final. Without PAYMENT-REQUIRED: nobody should pay again."""
    problem = Problem(
        "settlement_pending",
        "The payment was sent and is not confirmed yet. Send the same request again; it is "
        "never taken twice.",
        headers={"Retry-After": "2"},
        members={"payment_id": payment.id, "transaction": payment.tx_hash},
        next_actions=[
            NextAction(
                "GET",
                f"{node.settings.server.public_url}/farebox/v1/payments/{payment.id}",
                "nothing: the state of the payment",
                "read",
            )
        ],
        status=status,
    )
    for name, value in _response(node, payment):
        problem.headers[name] = value
    return problem


def charge_headers(node: Node, hold: ledger.HoldRow, charged: int, available: int) -> Pairs:
    """What a call cost and what is left, in credits."""
    per_usd = node.settings.credits.per_usd
    told = (
        ("Farebox-Request-Id", hold.request_id),
        ("Farebox-Charged", format_credits(charged, per_usd)),
    )
    if hold.scheme.startswith(credentials.SCHEME):  # it is not told what else there is
        return told
    return (*told, ("Farebox-Balance", format_credits(available, per_usd)))


def receipt_of_call(node: Node, hold: ledger.HoldRow, charge: read.Charge) -> dict[str, Any]:
    """A call as its owner may read it: what it was, and what became of it.

    ``charged`` is what it cost when it ended; ``refunded``, how much of that was given back.
    """
    per_usd = node.settings.credits.per_usd
    close = charge.close
    charged = close.amount_units if close is not None else 0
    return {
        "request_id": hold.request_id,
        "wallet": hold.principal,
        "scheme": hold.scheme,
        "payment_id": hold.payment_id,
        "route": hold.route,
        "method": hold.method,
        "target": hold.target,
        "price_version": hold.price,
        "run": hold.run,
        "state": charge.state,
        "reason": close.reason if close is not None else None,
        "held": format_credits(hold.max_units, per_usd),
        "held_units": hold.max_units,
        "charged": format_credits(charged, per_usd),
        "charged_units": charged,
        "refunded": format_credits(charge.refunded_units, per_usd),
        "refunded_units": charge.refunded_units,
        "started_at_ms": hold.at_ms,
        "ended_at_ms": close.at_ms if close is not None else None,
        "duration_ms": close.at_ms - hold.at_ms if close is not None else None,
    }


def interrupted(close: ledger.TransferRow | None) -> bool:
    """Whether a call ended because its gateway died: what the upstream did is not known."""
    return close is not None and close.kind == "void" and close.reason == INTERRUPTED


async def repeat(
    node: Node,
    hold: ledger.HoldRow,
    close: ledger.TransferRow | None,
    receipt: Receipt | None,
) -> Reply:
    """The answer to a request that was seen before: the stored one, and charge 0."""
    if close is None:
        raise Problem(
            "request_in_progress",
            "The first request with this id still runs.",
            headers={"Retry-After": "1"},
        )
    if interrupted(close):
        raise Problem(
            "outcome_unknown",
            "The gateway stopped during this call. It was not charged; whether the upstream did "
            "the work is not known. To run it again, sign it with a new id.",
            members={"receipt": receipt_of_call(node, hold, read.Charge(close, 0))},
        )
    async with node.db.read() as tx:
        stored = await read.answer_of(tx, hold.id)
        view = await read.account(tx, hold.account_id)
        told = stored is not None and stored.body is not None
        charge = read.Charge(close, 0 if told else await read.refunded_units(tx, hold.id))
    available_units = view.available_units if view is not None else 0
    headers = [
        *charge_headers(node, hold, 0, available_units),
        ("Farebox-Replayed", "true"),
        *paid_from(node, receipt, close.amount_units, available_units),
    ]
    if stored is None or stored.body is None:
        # Too long to keep, or purged: what it was and what it cost is all there is.
        return json_reply(200, {"receipt": receipt_of_call(node, hold, charge)}, headers)
    return Reply(stored.status, (*stored.headers, *headers), stored.body)


async def receipt_only(node: Node, account_id: int, payment: Payment, receipt: Receipt) -> Reply:
    """For whoever shows a settled payment without proof of having been its first presenter."""
    async with node.db.read() as tx:
        holds = await read.holds_of_request(tx, account_id, payment.auth_nonce or "")
        call = None
        if holds:
            last = max(holds, key=lambda hold: hold.at_ms)  # a call may have been run again
            call = receipt_of_call(node, last, await read.charge_of(tx, last.id))
    body = {
        "payment": {
            "id": payment.id,
            "state": payment.state,
            "transaction": payment.tx_hash,
            "amount_units": payment.amount_units,
        },
        "charged_units": call["charged_units"] if call is not None else 0,
        "state": call["state"] if call is not None else None,
    }
    return json_reply(200, body, (("Farebox-Replayed", "true"), *receipt.headers))


async def receipt_of_credits(node: Node, hold: ledger.HoldRow, receipt: Receipt) -> Reply:
    """The same for a payment that was answered from credits, and so was never sent."""
    async with node.db.read() as tx:
        charge = await read.charge_of(tx, hold.id)
        view = await read.account(tx, hold.account_id)
    call = receipt_of_call(node, hold, charge)
    body = {
        "payment": {"state": "unsent", "transaction": "", "amount_units": 0},
        "charged_units": call["charged_units"],
        "state": call["state"],
    }
    available_units = view.available_units if view is not None else 0
    told = paid_from(node, receipt, call["charged_units"], available_units)
    return json_reply(200, body, (("Farebox-Replayed", "true"), *told))
