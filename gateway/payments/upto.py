"""Calls that are paid after the work for what they came to: the scheme ``upto`` on our own routes.

    order      the payment against the offer it answers (upto_order.py); nothing is written
    verify     the signature, and whether the whole maximum would move now
    begin      one transaction, before any work: the authorization's unique row, the call's hold,
               the row of ``upto_rows.py``
    end        one transaction with the end of the hold: what it came to
    settle     by the one gas account that may; the payment's row, its chain nonce and the signed
               bytes are one transaction, as for every payment

The mint of the transfer and the charge of the call are one transaction too, whoever sees the
transfer first (``inbound.credit``). What nobody works on any more is finished by the background
loop. Between ``begin`` and the transfer the house can lose what the call came to, so a wallet has
one such call at a time, and all together count into ``exposure_limit``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from chain import sender
from chain.errors import ChainError, Rejected, Unavailable
from chain.receipts import Receipt
from chain.schemes import exact, permit2, upto
from gateway import ledger, observe
from gateway.accounts import wallets
from gateway.db import CommitUnknown, DatabaseUnavailable, Tx, transact
from gateway.errors import Problem
from gateway.ledger import read
from gateway.observe import log
from gateway.payments import (
    budget,
    engine,
    exposure,
    gas,
    in_hand,
    journal,
    offers,
    recover,
    upto_rows,
)
from gateway.payments.journal import Claim, Payment
from gateway.payments.lane import Begun, Handed, Job
from gateway.payments.methods import METHODS, Spent
from gateway.payments.nonces import Call
from gateway.payments.order import (
    CameWith,
    allowance_required,
    chain_of_payer,
    key_of,
)
from gateway.payments.rails import Rails, refused
from gateway.payments.upto_order import Order
from gateway.payments.upto_rows import DOOR, UPTO, UptoCall
from gateway.payments.wire import Presented
from gateway.settings import Chain

PAID_AFTER: Final = "paid_after"
"""Why the hold of a call that came to something ended without a charge."""
_LOOK_AGAIN_MS: Final = 30_000  # of whoever looks at a due one; it may take so long
_GRACE_MS: Final = 3_000  # who has just ended a call settles it
_LONGEST_LOOK_MS: Final = 60_000
_PER_ROUND: Final = 50
_FOREVER_S: Final = 2**62
MakeHold = Callable[[int], ledger.Hold]
"""The hold of the call, of an account: it reserves nothing."""


@dataclass(frozen=True, slots=True)
class Taken:
    """The call may run, once (``outcome`` is ``Held``), or its request is known otherwise."""

    payment_id: str
    most_units: int
    outcome: ledger.Outcome


@dataclass(frozen=True, slots=True)
class Known:
    """A payment that was presented before with this very request, and how its call ended (None: it
    runs). ``same_presenter``: whoever shows it now has the token of its offer."""

    call: UptoCall
    hold: ledger.HoldRow
    close: ledger.TransferRow | None
    same_presenter: bool


# -- before the work -------------------------------------------------------------------------------


async def known(rails: Rails, presented: Presented, came: CameWith) -> Known | None:
    """The call this payment was presented for. Raises ``Problem("payment_already_used")`` if it was
    used for something else."""
    key = key_of(rails.chain_of(presented), presented)
    async with rails.db.read() as tx:
        claim = await journal.claim_of(tx, key)
        if claim is None:
            return None
        call = await upto_rows.by_id(tx, claim.payment_id)
        hold = None if call is None else await read.hold_by_id(tx, call.hold_id)
        if claim.decision != UPTO or claim.content != came.content or call is None or hold is None:
            raise Problem(
                "payment_already_used",
                "This payment was presented with another request before.",
                members={"payment_id": claim.payment_id} if claim.payment_id else {},
            )
        close = await read.close_of(tx, call.hold_id)
    token = presented.offer
    same = token is not None and offers.token_digest(token) == claim.offer
    return Known(call, hold, close, same)


async def begin(rails: Rails, order: Order, make_hold: MakeHold) -> Taken | None:
    """Verify and claim. None: another node has claimed it meanwhile. Raises ``Problem``, with
    nothing written; ``DatabaseUnavailable``, ``CommitUnknown``."""
    auth = order.auth
    rpc = rails.rpcs[order.chain.caip2]
    async with rails.db.read() as tx:
        now_ms = await tx.now_ms()
        if await budget.is_spent(tx, order.chain, now_ms):
            raise refused(Unavailable("gas_budget_spent", "gas_per_hour has no room for it"))
        if await budget.payer_is_blocked(tx, order.chain, auth.from_, now_ms):
            raise Problem(
                "rate_limited",
                "Payments of this wallet failed on chain a moment ago. Try again in an hour.",
                headers={"Retry-After": "3600"},
            )
    try:
        # Not for a call whose payment nobody could send.
        account = await gas.choose(rails, order.chain, auth.facilitator)
        most_wei = gas.most_wei(order.chain)
        if most_wei is not None:
            (await sender.market(rpc, account.address, account.known)).fees(0, most_wei)
        # The whole of what is signed: so much may be taken.
        await upto.verify(rpc, order.asset, auth, auth.most_units)
        payer_chain = await chain_of_payer(rpc, auth.from_)
    except ChainError as error:
        async with rails.db.read() as tx:
            if await journal.claim_of(tx, order.key) is not None:
                return None
        observe.count("settlements", outcome="refused")
        if isinstance(error, Rejected) and error.code == permit2.ALLOWANCE_REQUIRED:
            raise allowance_required(
                order.chain, order.asset, auth.from_, auth.most_units, by_permit=False
            ) from error
        raise refused(error) from error
    payment_id = journal.new_id()
    try:
        outcome = await transact(
            rails.db, lambda tx: _begin(tx, order, payment_id, payer_chain, make_hold)
        )
    except _TakenError:
        return None
    except _NotHeldError as error:
        outcome = error.outcome
    return Taken(payment_id, order.most_units, outcome)


class _TakenError(Exception):
    """Another request has the authorization: nothing of this transaction may stand."""


class _NotHeldError(Exception):
    """The call has no hold of its own, so nothing of this transaction may stand."""

    def __init__(self, outcome: ledger.Outcome) -> None:
        super().__init__(str(outcome))
        self.outcome = outcome


async def _begin(
    tx: Tx, order: Order, payment_id: str, payer_chain: str, make_hold: MakeHold
) -> ledger.Outcome:
    now_ms = await tx.now_ms()
    auth = order.auth
    # Locks in the order of a mint: the policy, then the account.
    if not await exposure.has_room(tx, order.chain.caip2, auth.most_units):
        raise Problem(
            "settlement_paused",
            "As much is being done before it is paid as may be; nothing was taken. Ask again "
            "later, or sign the request and spend credits.",
            headers={"Retry-After": "10"},
        )
    account_id = await wallets.ensure(tx, auth.from_, now_ms, payer_chain)
    (outcome,) = await ledger.apply(tx, [make_hold(account_id)], now_ms)
    if not isinstance(outcome, ledger.Held):
        raise _NotHeldError(outcome)
    claim = Claim(payment_id, order.content, order.offer, UPTO)
    if not await journal.claim(tx, order.key, claim, now_ms):
        raise _TakenError
    call = UptoCall(
        payment_id=payment_id,
        hold_id=outcome.hold.id,
        network=order.chain.caip2,
        asset=order.asset.address,
        payer=auth.from_,
        payer_chain=payer_chain,
        pay_to=auth.to,
        nonce=auth.nonce,
        valid_before_s=min(exact.refused_from_s(auth), _FOREVER_S),
        most_units=auth.most_units,
        data=upto.settle_calldata(auth, auth.most_units),
        state="open",
        units=None,
        breakdown=None,
        answer_status=None,
        answer_headers=None,
        answer_body=None,
        error=None,
        at_ms=now_ms,
        updated_at_ms=now_ms,
        look_ms=now_ms,
    )
    if not await upto_rows.insert(tx, call):
        before = await upto_rows.unended_of(tx, auth.from_, payer_chain)
        raise _one_at_a_time(before)
    return outcome


def _one_at_a_time(before: UptoCall | None) -> Problem:
    members = {} if before is None else {"payment_id": before.payment_id}
    if before is not None and before.state == "unsettled":
        return Problem(
            "upto_unsettled",
            "A call of this wallet was done and could not be settled, so it gets no further one; "
            "nothing was taken. Buy credits and sign the request, or ask the operator.",
            members={**members, "units": before.units},
        )
    return Problem(
        "upto_in_progress",
        "A call of this wallet is not settled yet, and it has one at a time; nothing was taken.",
        headers={"Retry-After": "2"},
        members=members,
    )


# -- after the work --------------------------------------------------------------------------------


async def end(
    rails: Rails, payment_id: str, close: ledger.Close, units: int, breakdown: str | None
) -> ledger.Outcome:
    """End the hold of a call and say what it came to, both or neither. ``units`` 0, or a close that
    voids: it came to nothing. Else its charge is an entry of its own, once it is paid (``charge``
    of upto_rows.py), with the same request id."""
    owed, answer = units if close.void_reason is None else 0, close.answer
    if owed:
        close = replace(close, void_reason=PAID_AFTER, answer=None)

    async def work(tx: Tx) -> ledger.Outcome:
        now_ms = await tx.now_ms()
        (outcome,) = await ledger.apply(tx, [close], now_ms)
        if isinstance(outcome, ledger.Closed):
            state, told = ("due", breakdown) if owed else ("nothing", None)
            moved = await upto_rows.move(
                tx, payment_id, ("open",), state, now_ms, units=owed, breakdown=told
            )
            if not moved:
                raise ledger.LedgerFault(f"the call of payment {payment_id} ended before its hold")
            if owed:
                await upto_rows.keep_answer(tx, payment_id, answer)
                await upto_rows.note(tx, payment_id, None, now_ms + _GRACE_MS)
        return outcome

    return await transact(rails.db, work)


async def settle(rails: Rails, payment_id: str) -> None:
    """Hand in what is due, once, and wait for it as long as a request may wait. What became of it
    stands in the rows. Raises ``ChainError`` and ``DatabaseUnavailable`` with nothing lost: the
    background loop goes on with it."""
    async with rails.db.read() as tx:
        call = await upto_rows.by_id(tx, payment_id)
    if call is None or call.state != "due" or call.units is None:
        return
    if call.network not in rails.rpcs:
        raise Unavailable("rpc_error", f"{call.network} is not configured any more")
    chain = rails.settings.chain(call.network)
    begun: list[Payment] = []
    try:
        with in_hand.working_on(rails, [payment_id]):
            handed = await engine.settle(rails, _job(rails, chain, call, call.units, begun))
    except Rejected as refusal:
        if not await _ran_out(rails, call, refusal):
            await _look_later(rails, call, refusal)
        return
    except Unavailable as error:
        if await _ran_out(rails, call, error):
            return
        raise
    if handed is None:
        return
    payment = begun[-1]
    try:
        await _finish(rails, chain, payment, handed)
    except (ChainError, DatabaseUnavailable, CommitUnknown) as error:
        log.info("payment %s: %s; it is looked at again", payment_id, error)
    rails.in_hand.discard(payment_id)
    async with rails.db.write() as tx:
        await journal.release(tx, payment_id, await tx.now_ms())


def _job(rails: Rails, chain: Chain, call: UptoCall, units: int, begun: list[Payment]) -> Job:
    async def begin_(tx: Tx, at: Begun) -> bool:
        if not await upto_rows.move(tx, call.payment_id, ("due",), "sent", at.now_ms):
            return False
        payment = _new_payment(rails, call, units, at)
        await journal.insert(tx, payment)
        begun.append(payment)
        return True

    data = upto.with_amount(call.data, units)
    return Job(
        chain=chain,
        call=Call(call.payment_id, upto.PROXY, data),
        payer=call.payer,
        spends=(permit2.PERMIT2, call.payer, call.nonce),
        valid_before_s=call.valid_before_s,
        begin=begin_,
        alone=True,
        owed=True,
    )


def _new_payment(rails: Rails, call: UptoCall, units: int, at: Begun) -> Payment:
    return Payment(
        id=call.payment_id,
        provider="x402",
        state="processing",
        purpose=offers.CALL,
        payer=call.payer,
        recipient=call.payer,
        recipient_chain=call.payer_chain,
        network=call.network,
        asset=call.asset,
        amount_units=units,
        expires_ms=None,
        auth_nonce=call.nonce,
        valid_before_s=call.valid_before_s,
        from_block=at.from_block,
        tx_hash=None,
        external_ref=None,
        external_url=None,
        lot_id=None,
        error_code=None,
        error_detail=None,
        created_at_ms=at.now_ms,
        updated_at_ms=at.now_ms,
        lease_ms=in_hand.lease_ms(rails, at.now_ms),
        method=offers.PERMIT2,
        pay_to=call.pay_to,
        door=DOOR,
    )


async def _finish(rails: Rails, chain: Chain, payment: Payment, handed: Handed) -> None:
    """End it by the Transfer in its receipt; without one, whoever asks the chain finds out."""
    receipt: Receipt | None = handed.receipt
    if receipt is None:
        return
    asset = chain.network.asset(payment.asset or "")
    if asset is None or payment.payer is None or payment.pay_to is None:
        raise ledger.LedgerFault(f"payment {payment.id} is of no known token")
    spent = Spent(
        asset, payment.payer, payment.auth_nonce or "", payment.pay_to, payment.amount_units
    )
    found = METHODS[payment.method].transfers(chain.caip2, receipt, spent)
    if await recover.end_with(rails, payment, found) is None:
        await recover.recover(rails, payment)


async def _ran_out(rails: Rails, call: UptoCall, error: ChainError) -> bool:
    """Whether nothing of it was sent and Permit2 refuses it in every later block: then it is lost,
    whatever kept it. Raises ``ChainError``."""
    _, time_s = await recover.newest_block(rails.rpcs[call.network])
    if time_s < call.valid_before_s:
        return False
    async with rails.db.write() as tx:
        now_ms = await tx.now_ms()
        await upto_rows.unsettled(tx, call.payment_id, "due", error.detail, now_ms)
    return True


async def _look_later(rails: Rails, call: UptoCall, refusal: Rejected) -> None:
    """The chain would not take it now: the payer has moved its money, or taken the permission back.
    It is tried again until Permit2 would refuse it for good."""
    observe.count("settlements", outcome="refused")
    async with rails.db.write() as tx:
        now_ms = await tx.now_ms()
        again_ms = min(max((now_ms - call.updated_at_ms) // 4, 1_000), _LONGEST_LOOK_MS)
        await upto_rows.note(tx, call.payment_id, refusal.detail, now_ms + again_ms)


# -- what nobody works on --------------------------------------------------------------------------


async def finish_due(rails: Rails) -> list[str]:
    """Let interrupted calls go, and take on what is due. Returns the payments it looked at."""
    async with rails.db.write() as tx:
        now_ms = await tx.now_ms()
        await upto_rows.free_interrupted(tx, now_ms)
        return await upto_rows.take_due(tx, now_ms, _LOOK_AGAIN_MS, _PER_ROUND)
