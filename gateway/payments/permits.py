"""Payments by Permit2 that bring its approval along, as an EIP-2612 permit of their payer.

A permit is used by whoever hands it in first, and what it approves is moved by the first payment
that needs as much. So of the payments that bring one and the same, one is sent at a time; and what
became impossible since it was looked at is tried once more without it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from chain.errors import Rejected
from chain.networks import Asset
from chain.schemes import eip2612, exact, permit2
from gateway.db import Tx
from gateway.payments import engine, journal
from gateway.payments.journal import AuthKey, Claim
from gateway.payments.lane import Begun, Handed, Job
from gateway.payments.rails import Rails

_PERMIT: Final = "permit"  # authorization_use.decision: which payment is sent with a permit


class InUse(Rejected):
    """Another payment is sent with the same permit."""


async def settle(
    rails: Rails, asset: Asset, auth: permit2.Authorization, job: Job
) -> Handed | None:
    """``engine.settle`` for a payment in the form that ``permit2.settable`` gave it. Alone, since
    calldata tells its transfer, which others could mix."""
    alone = replace(job, alone=True)
    if auth.permit is None:
        return await engine.settle(rails, _calling(alone, asset, auth))
    async with rails.db.read() as tx:
        since_ms = await tx.now_ms()
    job_of_it = _with_permit(_calling(alone, asset, auth), auth.permit, since_ms)
    try:
        return await engine.settle(rails, job_of_it)
    except InUse:
        # Also if there is an allowance by now: the permit that is under way replaces it.
        raise
    except Rejected as refusal:
        # The permit or its allowance was used since we looked.
        plain = replace(auth, permit=None)
        try:
            await permit2.verify(rails.rpcs[job.chain.caip2], asset, plain)
        except Rejected as now:
            raise (refusal if refusal.code == now.code else now) from None
    return await engine.settle(rails, _calling(alone, asset, plain))


def _calling(job: Job, asset: Asset, auth: permit2.Authorization) -> Job:
    to, data = exact.call_of(asset, auth)
    return replace(job, call=replace(job.call, to=to, data=data))


def _with_permit(job: Job, permit: eip2612.Permit, since_ms: int) -> Job:
    async def begin(tx: Tx, at: Begun) -> bool:
        if not await job.begin(tx, at):
            return False
        await hold(tx, job, permit, since_ms, at.now_ms)
        return True

    return replace(job, begin=begin)


async def hold(tx: Tx, job: Job, permit: eip2612.Permit, since_ms: int, now_ms: int) -> None:
    """Nobody else sends this permit until the payment has ended. ``InUse`` if somebody does, or did
    ``since_ms``, when we had not asked the chain yet whether it is good.

    Of two that come at once one waits for the row of the other, and then sees its payment.
    """
    key = AuthKey(job.chain.caip2, permit.asset, permit.from_, f"permit:{permit.nonce}")
    mine = Claim(job.call.payment_id, b"", None, _PERMIT)
    if await journal.claim(tx, key, mine, now_ms):
        return
    of = "WHERE network = $1 AND asset = $2 AND payer = $3 AND nonce = $4"
    names = (key.network, key.asset, key.payer, key.nonce)
    holder = await tx.fetchval(
        f"SELECT payment_id FROM authorization_use {of}{tx.for_update}",  # noqa: S608
        *names,
    )
    payment = await journal.by_id(tx, holder)
    if payment is not None and (payment.state == "processing" or payment.updated_at_ms >= since_ms):
        raise InUse(
            permit2.ALLOWANCE_REQUIRED,
            f"another payment of {permit.from_} with the same EIP-2612 permit is under way",
        )
    await tx.execute(
        f"UPDATE authorization_use SET payment_id = $5, at_ms = $6 {of}",  # noqa: S608
        *names,
        mine.payment_id,
        now_ms,
    )
