"""The paid route: who, how much, hold, upstream, capture.

    identify -> body against its digest -> quote -> pay if a payment came -> hold and burn the id
    -> forward -> capture or void -> answer

Refusals before the hold burn nothing: the same request may be sent again. Everything after it is
final and stored: the same request gets the same answer, and no second charge. The one exception is
a ``retry_safe`` route whose gateway died in the middle: there the same request runs again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from chain.errors import ChainError
from gateway import ledger, observe
from gateway.db import CommitUnknown, DatabaseUnavailable
from gateway.errors import Problem
from gateway.fields import by_name, first, values
from gateway.limits import Flight
from gateway.middleware import Outgoing
from gateway.money import format_usd
from gateway.node import Node, unavailable
from gateway.payments import from_credits, identifier, offers, x402
from gateway.payments.from_credits import MakeHold
from gateway.payments.order import CameWith, asset_of
from gateway.payments.rails import content_hash
from gateway.payments.wire import Presented
from gateway.pricing.quote import PriceRequest, Quote, quote
from gateway.proxy import afterwards, cost, forward, quotes, replies, runs, siwx
from gateway.proxy import body as bodies
from gateway.proxy.again import run_again
from gateway.proxy.asking import Request, answer_unpaid, asked_of, challenge_of, refusal_of
from gateway.proxy.identity import Caller, auth_problem, guard_of, identify
from gateway.proxy.pace import refuse_uncharged, take_off
from wallet_auth import AuthError, check_digests

Receive = Callable[[], Awaitable[Any]]
# What of a request's headers decides what is asked, beside its body: RFC 9110 representation data
# and the caller's own conditions.
_ASKING = (b"content-type", b"content-encoding", b"farebox-max", b"farebox-run", b"farebox-quote")


async def serve(node: Node, request: Request, receive: Receive, send: Outgoing) -> None:
    """Answer a request to a priced route. Raises ``Problem`` for every refusal."""
    presented = None
    if request.route.upto:
        request = request._replace(upto=True)
    try:
        caller = await identify(
            node, request.method, request.target, request.headers, request.now_s, request.client
        )
        presented = caller.presented
        if request.pace is not None:
            await request.pace.identified(caller)
            send.also = request.pace.told()
        if presented is not None:
            # Before the body is read. What may be refused of a payment that was taken before,
            # when the terms were others, is not for here: its repeat is answered from store.
            asset_of(node.rails.chain_of(presented), presented)
    except Problem as refusal:
        if refusal.meaning.status != 402:
            raise
        request, price = await _looked_at(node, request, receive, send)
        raise refusal_of(node, request, price, presented, refusal) from None
    if caller.proves_nothing:
        request, price = await _looked_at(node, request, receive, send)
        await answer_unpaid(node, request, price, send)
        return
    body = await _body(node, request, caller, receive, send.body_that_came())
    try:
        taken = await _taken(node, request, caller, body)
        if isinstance(taken, replies.Reply):
            observe.count("requests", outcome="replayed")
            await replies.send(taken, request.method, send)
            return
        incoming = forward.Incoming(
            request.route, request.target, request.headers, body, request.client
        )
        await forward.run(node, incoming, taken, receive, send)
    finally:
        body.close()


async def _looked_at(
    node: Node, request: Request, receive: Receive, send: Outgoing
) -> tuple[Request, Quote]:
    """What a request that is answered with a 402 would cost, as far as its body has to be seen."""
    if request.route.needs_body:
        body = await _body(node, request, None, receive, send.body_that_came())
        try:
            if body.size:
                return _priced(node, request, body)
            # Who sends none asks what it may cost.
            return request._replace(tag=siwx.tag_of(body)), _quote(node, request, None)
        finally:
            body.close()
    tag = await siwx.look(receive, request.headers, send.body_that_came())
    request = request._replace(tag=tag)
    return request, _quote(node, request, None)


def _quote(node: Node, request: Request, body: bytes | None, *, held: bool = False) -> Quote:
    if request.route.fixed is not None:
        return request.route.fixed
    return quote(request.route.price, _price_request(node, request, body, held=held))


def _price_request(
    node: Node, request: Request, body: bytes | None, *, held: bool = False
) -> PriceRequest:
    now_s = request.now_s
    when = cost.held(node.settings, now_s) if held else cost.shown(now_s)
    route, method, target = request.route, request.method, request.target
    return cost.asked_of(route, method, target, request.headers, body, when)


def _priced(
    node: Node, request: Request, body: bodies.Body, *, held: bool = False
) -> tuple[Request, Quote]:
    """A request whose body has been read whole, and the most it can cost."""
    route, tag = request.route, siwx.tag_of(body)
    if route.fixed is not None:
        return request._replace(tag=tag), route.fixed
    bound = cost.bound(route, body.data or b"")
    return request._replace(tag=tag, bound=bound), _quote(node, request, body.data, held=held)


async def _body(
    node: Node, request: Request, caller: Caller | None, receive: Receive, came: bytes | None
) -> bodies.Body:
    """The whole body. It is needed before the hold: a digest may have been signed, and the request
    id is burnt for these very bytes."""
    server = node.settings.server
    signer = None if caller is None else caller.signer
    limit, memory = server.max_body_bytes, server.body_memory_bytes
    if request.route.needs_body:
        limit, memory = min(limit, cost.MOST_BYTES), cost.MOST_BYTES
    return await bodies.read(
        receive,
        request.headers,
        limit=limit,
        memory=memory,
        algorithms=() if signer is None else [name for name, _ in signer.digests],
        came=came,
    )


async def _taken(
    node: Node, request: Request, caller: Caller, body: bodies.Body
) -> forward.Ticket | replies.Reply:
    """From a whole body to the hold, or to the answer of a request that is known already."""
    request, price = _priced(node, request, body, held=True)
    if caller.signer is not None:
        try:
            check_digests(caller.signer, body.size, body.digests)
        except AuthError as error:
            if caller.ceiling_units is not None:  # a challenge that was made for another body
                wrong = Problem("invalid_siwx_nonce", error.detail)
                raise refusal_of(node, request, price, None, wrong) from None
            raise auth_problem(node, request.method, request.target, error) from None
    if quote_texts := values(request.headers, quotes.HEADER):
        asked = _price_request(node, request, body.data, held=True)
        use = quotes.Use(request.target.raw, body.content, _made_at_s(request, caller))
        price = await quotes.apply(node, quote_texts, use, asked, price)
    cost.within_ceiling(caller, price, request.headers)
    run = runs.run_of(request.headers)
    content = _content(request, body)
    try:
        return await take_hold(node, request, caller, price, content, run)
    except (DatabaseUnavailable, CommitUnknown, ChainError) as error:
        # After a lost COMMIT the hold or the payment may stand. Running the call could be running
        # it twice; a repeat is told what became of it, and nothing stands for ever unowned.
        raise unavailable(error) from error


def _made_at_s(request: Request, caller: Caller) -> int:
    """When the request was made, as far as that is proven: its repeat is a repeat, also after a
    quote has expired."""
    if caller.signer is None:
        return request.now_s
    return min(request.now_s, caller.signer.created_s)


def _content(request: Request, body: bodies.Body) -> bytes:
    named = by_name(request.headers)
    asking = [b"\x00".join(named.get(name, ())) for name in _ASKING]
    return content_hash(request.method.encode(), request.target.raw, *asking, body.content)


async def take_hold(  # noqa: PLR0917  (one caller)
    node: Node,
    request: Request,
    caller: Caller,
    price: Quote,
    content: bytes,
    run: str | None,
) -> forward.Ticket | replies.Reply:
    """Get hold of the money for this call: from credits, or by settling the payment with it."""
    guard = guard_of(node, caller)

    def hold(account_id: int, units: int) -> ledger.Hold:
        return ledger.Hold(
            account_id=account_id,
            guard=guard,
            content=content,
            max_units=units,
            lease_ms=node.settings.server.hold_lease_s * 1000,
            call=ledger.Call(
                route=request.route.id,
                method=request.method,
                target=request.target.raw.decode("ascii")[:2_000],
                price=price.price_version,
                run=run,
            ),
            owner=node.writer.id,
            only=caller.only,
        )

    if caller.presented is not None:
        return await _take_paid(node, request, caller, price, content, hold)
    proof = caller.credential
    if proof is not None:
        account_id: int | None = proof.account_id
    else:
        account_id = await node.account_of(*(caller.wallet or ("", "")))
    if account_id is None:
        raise challenge_of(node, request, price, balance_units=0)
    refuse_uncharged(node, account_id, request.client)
    units = price.max_units
    if caller.ceiling_units is not None:  # the challenge locked it, as an offer does
        if caller.ceiling_units < units and request.route.needs_body and request.tag is None:
            # It says nothing of a body so long: it may have been made for a cheaper one.
            wrong = Problem("invalid_siwx_nonce", "The challenge is for a call that costs less.")
            raise refusal_of(node, request, price, None, wrong)
        units = min(units, caller.ceiling_units)
    step = hold(account_id, units)
    if proof is not None:
        step = replace(step, only=ledger.Only(proof.lot_id))
    flight = take_off(node, account_id, request.client)
    taken: forward.Ticket | replies.Reply | None = None
    try:
        outcome = await node.writer.submit(step)
        taken = await _settle_hold(node, request, price, caller, step, outcome, None, flight)
        return taken
    finally:
        if not isinstance(taken, forward.Ticket):
            flight.land()


async def _take_paid(  # noqa: PLR0917  (one caller)
    node: Node,
    request: Request,
    caller: Caller,
    price: Quote,
    content: bytes,
    hold: MakeHold,
) -> forward.Ticket | replies.Reply:
    presented = caller.presented
    if presented is None:
        raise ledger.LedgerFault("no payment to take")
    payer = await node.account_of(presented.authorization.from_, "")
    refuse_uncharged(node, payer, request.client)  # before anybody's money moves
    bare = caller.signer is None and request.shows_credential
    alias = presented.identifier
    came = CameWith(asked_of(request, price), offers.CALL, content, bare=bare, alias=alias)
    if presented.scheme == offers.UPTO:
        return await afterwards.take(node, request, caller, price, came, hold)
    try:
        spent = None
        if caller.signer is None:
            spent = await identifier.find(node.rails, presented, came)
        spent = spent or await _from_credits(node, request, presented, came, hold)
        if spent is not None:
            return await _take_spent(node, request, caller, price, spent, hold)
        paid = await x402.pay(node.rails, presented, came, hold)
    except from_credits.Decided:
        spent = await from_credits.take(node.rails, presented, came, hold)
        if spent is None:
            raise
        return await _take_spent(node, request, caller, price, spent, hold)
    except Problem as refusal:
        raise refusal_of(node, request, price, presented, refusal) from None
    payment = paid.payment
    receipt = replies.payment_receipt(node, payment, request.target.raw)
    if payment.state in ("failed", "reversed"):
        failure = Problem(
            payment.error_code or "settlement_failed", payment.error_detail or "It failed."
        )
        raise refusal_of(node, request, price, presented, failure)
    if payment.state != "succeeded":
        raise replies.pending(node, payment)
    return await _take_settled(node, request, caller, price, paid, hold, receipt)


async def _take_settled(  # noqa: PLR0917  (one caller)
    node: Node,
    request: Request,
    caller: Caller,
    price: Quote,
    paid: x402.Paid,
    hold: MakeHold,
    receipt: replies.Receipt,
) -> forward.Ticket | replies.Reply:
    """The call of a payment that was settled."""
    payment = paid.payment
    account_id = await node.account_of(payment.recipient or "", payment.recipient_chain)
    if account_id is None:
        raise ledger.LedgerFault(f"payment {payment.id} made no account")
    # The price of the offer holds, and nobody pays more than the price now.
    units = price.max_units
    if paid.price_units is not None:
        units = min(units, paid.price_units)
    step = hold(account_id, units)
    held = paid.held
    if held is None:
        known = caller.signer is not None or paid.same_presenter or not paid.repeat
        if not known:
            # A settled authorization is public: whoever shows it again may have read it in the
            # chain's calldata. The receipt is for anyone, the answer for the first presenter.
            return await replies.receipt_only(node, account_id, payment, receipt)
        held = await node.writer.submit(step)
    taken = await _settle_hold(node, request, price, caller, step, held, receipt)
    if isinstance(taken, forward.Ticket):  # a stored answer goes without it
        taken = taken._replace(credential=paid.credential)
    return taken


async def _from_credits(
    node: Node, request: Request, presented: Presented, came: CameWith, hold: MakeHold
) -> from_credits.Spent | None:
    if b"settle" in first(request.headers, b"farebox-prefer").lower():
        return None
    return await from_credits.take(node.rails, presented, came, hold)


async def _take_spent(  # noqa: PLR0917  (one caller)
    node: Node,
    request: Request,
    caller: Caller,
    price: Quote,
    spent: from_credits.Spent,
    hold: MakeHold,
) -> forward.Ticket | replies.Reply:
    """The call of a payment that was answered from the payer's credits."""
    receipt = replies.Receipt(spent.payer, (), spent.chain)
    outcome = spent.outcome
    known = caller.signer is not None or spent.same_presenter
    if isinstance(outcome, ledger.Repeated) and not known:
        return await replies.receipt_of_credits(node, outcome.hold, receipt)
    step = hold(spent.account_id, spent.price_units)
    step = replace(step, only=from_credits.only(spent.payer))  # if it has to run again
    return await _settle_hold(node, request, price, caller, step, outcome, receipt)


async def _settle_hold(  # noqa: PLR0917  (one shape for both ways to a hold)
    node: Node,
    request: Request,
    price: Quote,
    caller: Caller,
    step: ledger.Hold,
    outcome: ledger.Outcome,
    receipt: replies.Receipt | None,
    flight: Flight | None = None,
) -> forward.Ticket | replies.Reply:
    """What the outcome of a hold means for the caller."""
    if request.route.retry_safe:
        outcome = await run_again(node.writer, step, outcome)
    match outcome:
        case ledger.Held(hold=row, balance=balance):
            flight = flight or take_off(node, row.account_id, request.client)
            metered = price if request.route.metered else None
            signer, payer = caller.signer, None
            if caller.only is not None and caller.signer is not None:
                signer, payer = None, caller.signer.address  # worth a payment, and not a login
            elif receipt is None and caller.credential is not None:
                payer = caller.credential.payer
            return forward.Ticket(row, balance, signer, receipt, flight, metered, payer)
        case ledger.Repeated(hold=row, close=close):
            return await replies.repeat(node, row, close, receipt)
        case ledger.Conflict():
            raise Problem(
                "request_id_conflict",
                "This request id was used before, with other content. Sign with a new one.",
            )
        case ledger.Short(available_units=available, needed_units=needed):
            raise challenge_of(node, request, price, balance_units=available, needed_units=needed)
        case ledger.Capped(left_units=left, needed_units=needed):
            raise Problem(
                "session_limit_reached",
                f"This session may spend {format_usd(left)} more, and the call can cost "
                f"{format_usd(needed)}: take a new session nonce.",
                members={"left_units": left, "needed_units": needed},
            )
        case ledger.Frozen():
            raise Problem("account_frozen", "This account cannot spend now.")
        case _:
            raise ledger.LedgerFault(f"a hold was answered with {outcome}")
