"""Settling for others: one authorization, one transaction, however often it is asked for.

The row is claimed before anything is sent, under the same key as a payment to us. Whoever asks
again, on whatever node, is told what became of it; what is not known is pending, with the
transaction's hash, and never a failure, because a failure tells the buyer to pay again.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from chain.errors import ChainError, Rejected, Unavailable
from chain.receipts import Receipt
from chain.schemes import erc6492, exact, permit2, upto
from gateway.db import CommitUnknown, DatabaseUnavailable, Tx
from gateway.facilitator import judge, wire
from gateway.facilitator.judge import Order
from gateway.observe import log
from gateway.payments import budget, engine, in_hand, journal, permits, recover
from gateway.payments.journal import FACILITATOR, AuthKey, Claim, Payment
from gateway.payments.lane import Begun, Job
from gateway.payments.methods import METHODS, Spent
from gateway.payments.nonces import Call
from gateway.payments.rails import Rails, content_hash

_FOREVER_S = 2**62  # validBefore may be anything a token takes, a column may not


async def settle(rails: Rails, order: Order) -> Payment:
    """Bring a payment to its end, or as far as the bounded wait goes: its row, ``succeeded``,
    ``processing`` or ``failed``.

    Raises, with nothing sent: ``Rejected``, ``Unavailable``. ``DatabaseUnavailable``: ask again.
    """
    key = order.key
    while True:
        known = await _known(rails, order, key)
        if known is not None:
            return known
        running = rails.settling.get(key)
        if running is not None:
            await asyncio.shield(running)
            continue
        running = rails.settling[key] = asyncio.get_running_loop().create_future()
        try:
            first = await _first(rails, order, key)
        finally:
            del rails.settling[key]
            running.set_result(None)
        if first is not None:
            return first


async def settle_nothing(rails: Rails, order: Order) -> None:
    """An ``upto`` payment whose call came to nothing: no transaction. It is claimed all the same,
    so that nobody settles it for more afterwards. Any number of times.

    Raises as ``settle``.
    """
    claimed = await _claimed_as_nothing(rails, order)
    if claimed is None:
        await judge.look(rails, order, 0)  # who signed it; at what time matters for a transfer only
        async with rails.db.write() as tx:
            claim = Claim("", _content(order), None, journal.NOTHING)
            if await journal.claim(tx, order.key, claim, await tx.now_ms()):
                return
        claimed = await _claimed_as_nothing(rails, order)
    if not claimed:
        raise Rejected(recover.USED, "this authorization was used for something else")


async def _claimed_as_nothing(rails: Rails, order: Order) -> bool | None:
    """Whether it is; None: nobody has claimed it."""
    async with rails.db.read() as tx:
        claim = await journal.claim_of(tx, order.key)
    return None if claim is None else claim.content == _content(order)


async def already_presented(rails: Rails, key: AuthKey) -> bool:
    """Whether somebody has claimed this authorization: no seller should serve for it again."""
    async with rails.db.read() as tx:
        return await journal.claim_of(tx, key) is not None


async def within_budget(rails: Rails, order: Order) -> None:
    """``Unavailable("gas_budget_spent")`` when others have cost us enough for this hour."""
    async with rails.db.read() as tx:
        if await _is_spent(tx, rails, order, await tx.now_ms()):
            raise _budget_spent()


def _budget_spent() -> Unavailable:
    return Unavailable("gas_budget_spent", "facilitator.gas_per_hour is used up")


async def _is_spent(tx: Tx, rails: Rails, order: Order, now_ms: int) -> bool:
    spent: int = await tx.fetchval(
        "SELECT CAST(coalesce(sum(n.cost_gwei), 0) AS BIGINT) FROM chain_nonce n JOIN payment p"
        " ON p.id = n.payment_id WHERE n.network = $1 AND n.at_ms > $2 AND p.provider = $3",
        order.chain.caip2,
        now_ms - budget.HOUR_MS,
        FACILITATOR,
    )
    return spent >= rails.settings.facilitator.gas_per_hour_gwei


async def _known(rails: Rails, order: Order, key: AuthKey) -> Payment | None:
    """What became of an authorization that was presented before. Waits while it is under way."""
    async with rails.db.read() as tx:
        claim = await journal.claim_of(tx, key)
        payment = None if claim is None else await journal.by_id(tx, claim.payment_id)
    if claim is None:
        return None
    if payment is None or payment.provider != FACILITATOR or claim.content != _content(order):
        raise Rejected(recover.USED, "this authorization was used for something else")
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + rails.settings.server.settle_wait_s
    pause_s = 0.02
    while payment.state == "processing" and loop.time() < deadline_s:
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 2, 0.5)
        async with rails.db.read() as tx:
            payment = await journal.by_id(tx, payment.id) or payment
    await _not_stale(rails, payment)
    return payment


async def _not_stale(rails: Rails, payment: Payment) -> None:
    """A seller that settles first is told of a payment long since settled that it is spent."""
    async with rails.db.read() as tx:
        age_ms = await tx.now_ms() - payment.updated_at_ms
    if payment.state == "succeeded" and age_ms > rails.settings.facilitator.repeat_s * 1_000:
        raise Rejected(recover.USED, f"it was settled before, by {payment.tx_hash}")


def _content(order: Order) -> bytes:
    how = [wire.UPTO.encode()] if isinstance(order.auth, upto.Authorization) else []
    return content_hash(b"facilitator", order.auth.to.encode(), str(order.units).encode(), *how)


async def _first(rails: Rails, order: Order, key: AuthKey) -> Payment | None:
    """Verify, claim, send, wait. None: another node has claimed it meanwhile."""
    async with rails.db.read() as tx:
        now_ms = await tx.now_ms()
        if await budget.payer_is_blocked(tx, order.chain, order.auth.from_, now_ms):
            raise Rejected(recover.USED, "payments of this wallet failed on chain a moment ago")
    begun: list[Payment] = []
    over_budget: list[bool] = []
    try:
        kind, form = await judge.look(rails, order, now_ms // 1_000)
        if kind == erc6492.UNDEPLOYED:
            raise Rejected(
                "invalid_exact_evm_payload_undeployed_smart_wallet",
                "the paying wallet has to be deployed first",
            )
        job = _job(rails, order, begun, over_budget)
        with in_hand.working_on(rails, [job.call.payment_id]):
            if isinstance(form, permit2.Authorization):
                handed = await permits.settle(rails, order.asset, form, job)
            else:
                handed = await engine.settle(rails, job)
    except Rejected:
        if await already_presented(rails, key):
            return None  # by another node, whose transaction is why it is refused now
        raise
    except CommitUnknown:
        if await already_presented(rails, key):
            return None
        raise
    if handed is None:
        if over_budget:
            raise _budget_spent()
        return None
    payment = begun[-1]
    try:
        if handed.receipt is not None:
            await _finish(rails, order, payment, handed.receipt)
    except (ChainError, DatabaseUnavailable, CommitUnknown) as error:
        # The money may have moved; the background loop finds out.
        log.info("payment %s: %s; it is looked at again", payment.id, error)
    return await _as_it_is(rails, payment, handed.tx_hash)


async def _as_it_is(rails: Rails, payment: Payment, tx_hash: str) -> Payment:
    """The row now; what is unfinished goes to the background loop. Without a database: pending."""
    sent = replace(payment, tx_hash=tx_hash)
    try:
        async with rails.db.write() as tx:
            await journal.release(tx, payment.id, await tx.now_ms())
            return await journal.by_id(tx, payment.id) or sent
    except (DatabaseUnavailable, CommitUnknown):
        return sent


def _job(rails: Rails, order: Order, begun: list[Payment], over_budget: list[bool]) -> Job:
    auth, key = order.auth, order.key
    payment_id = journal.new_id()

    async def begin(tx: Tx, at: Begun) -> bool:
        if await _is_spent(tx, rails, order, at.now_ms):
            over_budget.append(True)
            return False
        claim = Claim(payment_id, _content(order), None)
        if not await journal.claim(tx, key, claim, at.now_ms):
            return False
        payment = _new_payment(rails, order, payment_id, at)
        await journal.insert(tx, payment)
        begun.append(payment)
        return True

    return Job(
        chain=order.chain,
        call=Call(payment_id, *order.call),
        payer=auth.from_,
        spends=(key.asset, auth.from_, auth.nonce),
        valid_before_s=auth.valid_before_s,
        begin=begin,
        # Apart from our own sales: what others cost is counted by transactions of their own.
        alone=True,
    )


def _new_payment(rails: Rails, order: Order, payment_id: str, at: Begun) -> Payment:
    auth = order.auth
    return Payment(
        id=payment_id,
        provider=FACILITATOR,
        state="processing",
        purpose="facilitated",
        payer=auth.from_,
        recipient=None,
        recipient_chain="",
        network=order.chain.caip2,
        asset=order.asset.address,
        amount_units=order.units,
        expires_ms=None,
        auth_nonce=auth.nonce,
        valid_before_s=min(exact.refused_from_s(auth), _FOREVER_S),
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
        method=order.method,
        pay_to=auth.to,
    )


async def _finish(rails: Rails, order: Order, payment: Payment, receipt: Receipt) -> None:
    """Finish by what the logs say of this very payment; a status says nothing."""
    auth = order.auth
    spent = Spent(order.asset, auth.from_, auth.nonce, auth.to, order.units)
    found = METHODS[payment.method].transfers(order.chain.caip2, receipt, spent)
    if not await recover.end_with(rails, payment, found):
        await recover.recover(rails, payment)
