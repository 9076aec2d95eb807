"""The paid route, where a payment permits a maximum and what the call came to is settled after it.

    known? -> order, verify, begin (payments/upto.py) -> upstream -> end -> settle -> answer

An answer that is kept back until its end leaves when its payment is in a block. Until then, and
where the payer has seen to it that nothing can be taken, it stays here, and the same request with
the same payment gets it later. A stream is out before that: it is settled after its tail.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from chain.errors import ChainError
from gateway import ledger
from gateway.db import CommitUnknown, DatabaseUnavailable
from gateway.errors import Problem
from gateway.node import Node
from gateway.observe import log
from gateway.payments import journal, upto, upto_order, upto_rows
from gateway.payments.from_credits import MakeHold
from gateway.payments.order import CameWith
from gateway.payments.upto import Known
from gateway.payments.wire import response_headers
from gateway.pricing.quote import Quote
from gateway.proxy import forward, replies
from gateway.proxy.asking import Request, refusal_of
from gateway.proxy.identity import Caller
from gateway.proxy.pace import take_off


async def take(  # noqa: PLR0917  (one caller)
    node: Node,
    request: Request,
    caller: Caller,
    price: Quote,
    came: CameWith,
    hold: MakeHold,
) -> forward.Ticket | replies.Reply:
    """The right to run the call of a payment by ``upto``, or the answer of one that is known."""
    presented = caller.presented
    if presented is None:
        raise ledger.LedgerFault("no payment to take")
    behind = node.upstreams[request.route.upstream]
    work_s = int(forward.timeouts_of(node, behind, request.route).total_s)
    try:
        while True:
            found = await upto.known(node.rails, presented, came)
            if found is not None:
                return await _again(node, request, caller, found)
            async with node.db.read() as tx:
                now_s = await tx.now_ms() // 1_000
            order = upto_order.order_of(node.rails, presented, came, now_s, work_s)
            taken = await upto.begin(
                node.rails, order, lambda account_id: replace(hold(account_id, 0), only=None)
            )
            if taken is not None:
                return await _ticket(node, request, caller, price, taken, order.auth.from_)
    except Problem as refusal:
        raise refusal_of(node, request, price, presented, refusal) from None


async def _ticket(  # noqa: PLR0917  (one caller)
    node: Node,
    request: Request,
    caller: Caller,
    price: Quote,
    taken: upto.Taken,
    payer: str,
) -> forward.Ticket | replies.Reply:
    match taken.outcome:
        case ledger.Held(hold=row, balance=balance):
            return forward.Ticket(
                row,
                balance,
                caller.signer,
                replies.Receipt(payer, ()),
                take_off(node, row.account_id, request.client),
                price,
                after=forward.After(taken.payment_id, taken.most_units, _run, PaidAfter),
            )
        case ledger.Repeated(hold=row, close=close):
            # Signed by the wallet too, and the signature was used before, with another payment.
            return await replies.repeat(node, row, close, None)
        case ledger.Conflict():
            raise Problem(
                "request_id_conflict",
                "This request id was used before, with other content. Sign with a new one.",
            )
        case ledger.Frozen():
            raise Problem("account_frozen", "This account cannot spend now; nothing was taken.")
        case _:
            raise ledger.LedgerFault(f"a hold was answered with {taken.outcome}")


async def _run(call: forward.HeldCall, incoming: forward.Incoming) -> None:
    await forward.run_call(call, incoming)
    after = call.ticket.after
    if after is not None and isinstance(call, PaidAfter) and call.owed:
        await _settle(call.node, after.payment_id)


async def _settle(node: Node, payment_id: str) -> None:
    """Settle what is due; what cannot be now is left to the background loop."""
    try:
        await upto.settle(node.rails, payment_id)
    except (ChainError, DatabaseUnavailable, CommitUnknown) as error:
        log.warning("payment %s: %s; it is looked at again", payment_id, error)


async def _settle_and_wait(node: Node, payment_id: str) -> None:
    """The same, and wait for it if somebody else has sent it, no longer than for one of our own."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + node.settings.server.settle_wait_s
    await _settle(node, payment_id)
    pause_s = 0.02
    while loop.time() < deadline_s:
        async with node.db.read() as tx:
            call = await upto_rows.by_id(tx, payment_id)
        if call is None or call.state != "sent":
            return
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 2, 0.5)


class PaidAfter(forward.HeldCall):
    """A call whose end is written with what it came to. ``owed``: that is not settled yet, since
    its answer went out as it came."""

    owed = False
    _ended = False

    async def _submit(self, step: ledger.Close) -> ledger.Closed:
        after = self.ticket.after
        if after is None or self._ended:
            # Its end stands; what is wrong since then is told to the caller and changes nothing.
            raise Problem("request_in_progress", "This call has ended.")
        units = step.amount_units if step.void_reason is None else 0
        close = replace(step, amount_units=0, breakdown=None)
        outcome = await upto.end(self.node.rails, after.payment_id, close, units, step.breakdown)
        if not isinstance(outcome, ledger.Closed):
            raise Problem("outcome_unknown", "The call took longer than its hold lasted.")
        self._ended = True
        self.charged = units > 0
        if self._started:
            self.owed = self.charged
        elif step.void_reason is None:
            await self._paid(after.payment_id, units)
        return outcome._replace(transfer=outcome.transfer._replace(amount_units=units))

    async def _paid(self, payment_id: str, units: int) -> None:
        """Have it settled before its answer leaves. Raises ``Problem`` if it is not."""
        if units:
            await _settle_and_wait(self.node, payment_id)
        receipt = await _receipt(self.node, payment_id, self.ticket.hold.target.encode())
        self.ticket = self.ticket._replace(receipt=receipt)


async def _receipt(node: Node, payment_id: str, target: bytes) -> replies.Receipt:
    """The receipt of a call that has ended, if it is paid. Raises ``Problem`` if it is not."""
    async with node.db.read() as tx:
        call = await upto_rows.by_id(tx, payment_id)
        payment = await journal.by_id(tx, payment_id)
    if call is None:
        raise ledger.LedgerFault(f"payment {payment_id} vanished")
    if call.state in ("settled", "forgiven"):
        if payment is not None and payment.state == "succeeded":
            return replies.payment_receipt(node, payment, target)
        return replies.Receipt(call.payer, ())
    if call.state == "nothing":
        return replies.Receipt(call.payer, _nothing(node, call) if call.units == 0 else ())
    if payment is not None and payment.state == "processing":
        raise replies.pending(node, payment)
    raise _not_settled(node, call)


def _nothing(node: Node, call: upto_rows.UptoCall) -> tuple[tuple[str, str], ...]:
    chain = node.settings.chain(call.network)
    return tuple(
        response_headers(
            success=True,
            network=chain.caip2,
            payer=call.payer,
            amount_units=0,
            v1_name=chain.network.v1_name,
        )
    )


def _not_settled(node: Node, call: upto_rows.UptoCall) -> Problem:
    """Done, and not paid: without new offers, since another payment would be refused."""
    for_good = call.state == "unsettled"
    why = call.error or "nothing could be sent yet"
    words = (
        "It can not be any more."
        if for_good
        else "Send the same request again once it can be: it is answered then, and paid once."
    )
    problem = Problem(
        "upto_unsettled" if for_good else "upto_not_settled",
        f"The call is done, and its payment of {call.units} units could not be settled: {why}. "
        f"{words}",
        headers={} if for_good else {"Retry-After": "5"},
        members={"payment_id": call.payment_id, "units": call.units},
    )
    chain = node.settings.chain(call.network)
    for name, value in response_headers(
        success=False,
        network=chain.caip2,
        payer=call.payer,
        error=(problem.code, why),
        v1_name=chain.network.v1_name,
    ):
        problem.headers[name] = value
    return problem


async def _again(
    node: Node, request: Request, caller: Caller, found: Known
) -> forward.Ticket | replies.Reply:
    """The answer to a payment that was presented with this request before."""
    call = found.call
    if found.close is None:
        return await replies.repeat(node, found.hold, None, None)  # it still runs
    if call.state in ("due", "sent"):
        await _settle_and_wait(node, call.payment_id)
        async with node.db.read() as tx:
            call = await upto_rows.by_id(tx, call.payment_id) or call
    if call.units is None or (call.units == 0 and found.close.kind == "void"):
        return await replies.repeat(node, found.hold, found.close, replies.Receipt(call.payer, ()))
    receipt = await _receipt(node, call.payment_id, request.target.raw)
    if caller.signer is None and not found.same_presenter:
        # Once it is settled it stands in the chain's calldata, and anybody can show it.
        async with node.db.read() as tx:
            payment = await journal.by_id(tx, call.payment_id)
        if payment is None:
            raise Problem(
                "payment_already_used", "This payment was presented with this request before."
            )
        return await replies.receipt_only(node, found.hold.account_id, payment, receipt)
    async with node.db.read() as tx:
        paid = await upto_rows.charge_of(tx, call, found.hold)
    hold, close = (found.hold, found.close) if paid is None else paid
    return await replies.repeat(node, hold, close, receipt)
