"""Carry out what was withheld: hand the refund to the chain, and end it by what is proven there.

    send      an EIP-3009 authorization of the refund wallet, through the engine like a payment that
              comes in. Its nonce is a hash of deployment, mint and ordinal (``payout.py``), so the
              token itself takes one authorization for each payout, however many are signed or sent
    end       by what is final on chain: its transfer, then the units are paid out; or a block past
              ``validBefore`` at which the token has it unused, then they are the lot's again

Until one of the two is proven the units stay withheld: an authorization that was signed once may
be in other hands, such as the node's that was asked to simulate it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from chain import blocks
from chain.errors import ChainError, Rejected, Unavailable
from chain.eth import selector
from chain.networks import Asset
from chain.receipts import read as read_receipt
from chain.rpc import Rpc
from chain.schemes import eip3009
from chain.schemes.eip3009 import Authorization
from chain.sender import Prepared
from chain.transfers import Transfer
from gateway import ledger
from gateway.db import CommitUnknown, DatabaseUnavailable, Tx, transact
from gateway.errors import Problem
from gateway.observe import log
from gateway.payments import confirm, engine, gas, in_hand, journal, nonces, recover
from gateway.payments.journal import Payment
from gateway.payments.lane import Begun, Job
from gateway.payments.methods import EIP3009, Spent
from gateway.payments.nonces import Call
from gateway.payments.rails import Rails
from gateway.settings import Chain
from wallet_auth.keys import address_of, address_word, private_key, sign_digest

_SENDABLE_S: Final = 30  # before validBefore; later it is not worth its gas
_USED: Final = selector("authorizationState(address,bytes32)")


def wallet_of(chain: Chain) -> str:
    """The address that pays out on a network."""
    if chain.refund_key is None:
        raise Problem("refund_not_offered", f"Credits are not paid back on {chain.name}.")
    return address_of(private_key(chain.refund_key.get_secret_value()))


async def first_try(rails: Rails, payment_id: str) -> None:
    """Send what was just withheld. Whatever happens here, the background loop goes on with it."""
    try:
        async with rails.db.read() as tx:
            payment = await journal.by_id(tx, payment_id)
        if payment is not None:
            with in_hand.working_on(rails, [payment_id]):
                await _send(rails, _sight(rails, payment))
        async with rails.db.write() as tx:
            await journal.release(tx, payment_id, await tx.now_ms())
    except (ChainError, DatabaseUnavailable, CommitUnknown) as error:
        log.warning("refund %s: %s; it is tried again", payment_id, error)


@dataclass(frozen=True, slots=True)
class _Sight:
    """A payout and where it is looked for."""

    payment: Payment
    chain: Chain
    rpc: Rpc
    asset: Asset
    spent: Spent

    @property
    def valid_before_s(self) -> int:
        return self.payment.valid_before_s or 0


def _sight(rails: Rails, payment: Payment) -> _Sight:
    rpc = rails.rpcs.get(payment.network or "")
    if rpc is None or payment.network is None:
        raise Unavailable("rpc_error", f"{payment.network} is not configured any more")
    chain = rails.settings.chain(payment.network)
    asset = chain.network.asset(payment.asset or "")
    if asset is None:
        raise Unavailable("rpc_error", f"{payment.asset} is not configured any more")
    if payment.payer is None or payment.auth_nonce is None or payment.pay_to is None:
        raise ledger.LedgerFault(f"payout {payment.id} has no authorization")
    spent = Spent(asset, payment.payer, payment.auth_nonce, payment.pay_to, payment.amount_units)
    return _Sight(payment, chain, rpc, asset, spent)


def _signed(at: _Sight) -> Authorization:
    """The authorization of a payout: from its row alone, so that it is the same every time."""
    key = at.chain.refund_key
    if key is None or wallet_of(at.chain) != at.spent.payer:
        raise Unavailable("rpc_error", f"{at.chain.name}: the key of {at.spent.payer} is gone")
    bare = Authorization(
        from_=at.spent.payer,
        to=at.spent.pay_to,
        value_units=at.payment.amount_units,
        valid_after_s=0,
        valid_before_s=at.valid_before_s,
        nonce=at.spent.nonce,
        signature=b"",
    )
    digest = eip3009.digest(at.chain.network, at.asset, bare)
    signature = sign_digest(private_key(key.get_secret_value()), digest)
    return replace(bare, signature=signature)


async def _send(rails: Rails, at: _Sight) -> None:
    """Hand it to the engine, once: whoever comes second finds what the first has stored."""
    payment = at.payment

    async def begin(tx: Tx, _at: Begun) -> bool:
        row = await journal.by_id(tx, payment.id, lock=True)
        if row is None or row.state != "processing":
            return False
        return not await nonces.sent_for(tx, payment.id)

    job = Job(
        chain=at.chain,
        call=Call(payment.id, at.asset.address, eip3009.transfer_calldata(_signed(at))),
        payer=at.spent.payer,
        spends=(at.asset.address, at.spent.payer, at.spent.nonce),
        valid_before_s=at.valid_before_s,
        begin=begin,
    )
    await engine.settle(rails, job)


# -- ending ----------------------------------------------------------------------------------------


async def look(rails: Rails, payment: Payment) -> str:
    """Bring a payout nearer to its end. Returns the payment's state.

    Raises ``ChainError`` and ``DatabaseUnavailable``; the lease makes somebody look again.
    """
    at = _sight(rails, payment)
    async with rails.db.read() as tx:
        sent = await nonces.sent_for(tx, payment.id)
        now_s = await tx.now_ms() // 1000
    points = await blocks.points(at.rpc, confirm.trusted(at.chain))
    final = await blocks.header(at.rpc, points.final) if points.final >= 0 else None
    found = await _on_chain(at, [each.tx_hash for each in sent])
    if found is not None:
        stands = await blocks.header(at.rpc, found.block_number)
        deep = found.block_number <= points.final
        if deep and stands is not None and stands.hash == found.block_hash:
            return await _end(rails, at, found, None)
        return "processing"
    if final is not None and final.time_s >= at.valid_before_s:
        if not await _is_used(at, final.number):
            return await _end(rails, at, None, "was in no block before it expired")
        if await EIP3009.was_taken_back(at.rpc, at.spent, _since(at)):
            return await _end(rails, at, None, "was cancelled by the refund wallet")
        raise Unavailable("rpc_disagrees", f"refund {payment.id} is used and not found")
    if now_s < at.valid_before_s - _SENDABLE_S:
        await _help(rails, at, sent)
    return "processing"


def _since(at: _Sight) -> int:
    margin = recover.LAG_MS // at.rpc.network.finality.block_ms
    return max((at.payment.from_block or 0) - margin, 0)


async def _on_chain(at: _Sight, ours: Sequence[str]) -> Transfer | None:
    """The token's own log of this payout: in one of our transactions, or in anybody's."""
    for tx_hash in (*ours, *await EIP3009.find(at.rpc, at.spent, _since(at))):
        receipt = None if tx_hash is None else await read_receipt(at.rpc, tx_hash)
        found = [] if receipt is None else EIP3009.transfers(at.chain.caip2, receipt, at.spent)
        if found and found[0].value_units == at.payment.amount_units:
            return found[0]
    return None


async def _is_used(at: _Sight, block: int) -> bool:
    """Whether any of two providers has the nonce as used at a final block."""
    data = _USED + address_word(at.spent.payer) + bytes.fromhex(at.spent.nonce[2:])
    call = {"to": at.asset.address, "data": "0x" + data.hex()}
    told = await at.rpc.call_each("eth_call", [call, hex(block)], confirm.AGREEING)
    return any(int.from_bytes(at.rpc.data(word), "big") for word in told)


async def _help(rails: Rails, at: _Sight, sent: Sequence[Prepared]) -> None:
    """It is in no block that is known: send it, again if what was sent has moved nothing."""
    try:
        if not sent:
            await _send(rails, at)
            return
        account = sent[0].sender
        counted = await at.rpc.call("eth_getTransactionCount", [account, "latest"])
        if at.rpc.quantity(counted) > sent[0].nonce:
            await engine.again(rails, at.chain, at.payment.id, sent)
        else:
            await gas.tend(rails, at.rpc, at.chain, account, patience_ms=0)
    except Rejected as refusal:
        # Withheld all the same until it has expired: what is refused now may be taken then.
        log.warning("refund %s is refused: %s", at.payment.id, refusal)


async def _end(rails: Rails, at: _Sight, found: Transfer | None, why: str | None) -> str:
    """Proven: paid out, or never to be."""
    payment_id = at.payment.id

    async def work(tx: Tx) -> str:
        now_ms = await tx.now_ms()
        payment = await journal.by_id(tx, payment_id, lock=True)
        if payment is None or payment.state != "processing":
            return "" if payment is None else payment.state
        payout_id = await tx.fetchval("SELECT id FROM payout WHERE payment_id = $1", payment_id)
        paid = found is not None
        reason = found.tx_hash if found is not None else f"the refund {why}"
        await ledger.apply(tx, [ledger.EndPayOut(payout_id, paid, reason)], now_ms)
        await tx.execute(
            "UPDATE payment SET state = $2, tx_hash = coalesce($3, tx_hash), error_code = $4,"
            " error_detail = $5, updated_at_ms = $6 WHERE id = $1",
            payment_id,
            "succeeded" if paid else "failed",
            None if found is None else found.tx_hash,
            None if paid else "refund_failed",
            None if paid else reason,
            now_ms,
        )
        return "succeeded" if paid else "failed"

    return await transact(rails.db, work)
