"""Finish payments that nobody waits for: after a crash, a lost answer, a slow chain.

The chain decides. A transfer is looked for in our own transactions and in anybody's that used the
authorization. To give a payment up takes proof, because it tells the payer to pay again: that the
authorization was cancelled or went elsewhere, or that it is unused at a block after which it can
not be used, or after which ours has failed. "Not found" is no proof: the nodes behind one URL need
not be at the same block, and blocks are made between two questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from chain import receipts, sender, transfers
from chain.errors import Rejected, Unavailable, Unknown
from chain.networks import Asset
from chain.rpc import Rpc
from gateway import ledger
from gateway.db import Tx, transact
from gateway.payments import journal
from gateway.payments.journal import Payment
from gateway.payments.rails import Rails, by_authorization
from gateway.settings import Chain

LAG_MS: Final = 60_000  # how far one node may be behind another
_GAP_PER_LOOK: Final = 50
LOOK_BACK_MS: Final = 3_600_000  # an offer lives two minutes; who paid one comes soon


async def recover(rails: Rails, payment: Payment) -> str:
    """One look at a payment that nobody waits for. Returns what it is now.

    Raises ``ChainError`` and ``DatabaseUnavailable``; the lease makes somebody look again.
    """
    if payment.network is None or payment.payer is None or payment.auth_nonce is None:
        raise ledger.LedgerFault(f"payment {payment.id} has no authorization")
    rpc = rails.rpcs.get(payment.network)
    if rpc is None:
        raise Unavailable("rpc_error", f"{payment.network} is not configured any more")
    chain = rails.settings.chain(payment.network)
    asset = chain.network.asset(payment.asset or "")
    if asset is None:
        raise Unavailable("rpc_error", f"{payment.asset} is not configured any more")
    async with rails.db.read() as tx:
        sent = await journal.sent_for(tx, payment.id)
    if not sent:
        raise ledger.LedgerFault(f"payment {payment.id} has no transaction")
    looked_for = _LookedFor(rpc, chain, asset, payment)
    found = await _on_chain(looked_for, sent)
    if found is not None:
        transfer = found

        async def work(tx: Tx) -> None:
            await journal.finish(tx, payment.id, transfer, await tx.now_ms())

        await transact(rails.db, work)
        return "succeeded"
    return await _unfound(rails, looked_for, sent)


@dataclass(frozen=True, slots=True)
class _LookedFor:
    """A payment, and where its transfer is looked for."""

    rpc: Rpc
    chain: Chain
    asset: Asset
    payment: Payment

    @property
    def authorization(self) -> tuple[str, str]:
        return self.payment.payer or "", self.payment.auth_nonce or ""

    @property
    def from_block(self) -> int:
        """A little before the block at which it was seen unused: that node may have lagged."""
        margin = LAG_MS // self.rpc.network.finality.block_ms
        return max((self.payment.from_block or 0) - margin, 0)


async def seen(
    rpc: Rpc, chain: Chain, asset: Asset, payer: str, nonce: str
) -> transfers.Transfer | None:
    """The transfer to us of an authorization that is marked as used, of the last hour or so.

    None: it is not marked, was cancelled, paid somebody else, or was used longer ago.
    """
    if not await transfers.authorization_used(rpc, asset, payer, nonce):
        return None
    blocks = LOOK_BACK_MS // rpc.network.finality.block_ms
    start = max(await rpc.block_number() - blocks, 0)
    return await _by_anyone(rpc, chain, asset, (payer, nonce), start)


async def _by_anyone(
    rpc: Rpc, chain: Chain, asset: Asset, authorization: tuple[str, str], from_block: int
) -> transfers.Transfer | None:
    payer, nonce = authorization
    tx_hash = await transfers.find_authorization(rpc, asset, payer, nonce, from_block)
    if tx_hash is None:
        return None
    moved = await transfers.transfers_of(rpc, tx_hash, asset, chain.pay_to)
    return by_authorization(moved or [], payer, nonce)


async def _on_chain(
    looked_for: _LookedFor, sent: Sequence[sender.Prepared]
) -> transfers.Transfer | None:
    """The transfer of this authorization, in one of our transactions or in somebody else's."""
    rpc, chain, asset = looked_for.rpc, looked_for.chain, looked_for.asset
    for ours in sent:
        moved = await transfers.transfers_of(rpc, ours.tx_hash, asset, chain.pay_to)
        match = by_authorization(moved or [], *looked_for.authorization)
        if match is not None:
            return match
    return await _by_anyone(rpc, chain, asset, looked_for.authorization, looked_for.from_block)


async def _unfound(rails: Rails, looked_for: _LookedFor, sent: Sequence[sender.Prepared]) -> str:
    """No transfer was found: it never will be, or it is waited for and helped along."""
    rpc, payment, newest = looked_for.rpc, looked_for.payment, sent[0]
    receipt = await receipts.read(rpc, newest.tx_hash)
    number, time_s = await _newest_block(rpc)
    # Asked at this very block: a node that does not have it cannot answer, and whatever happened
    # up to it is in the answer.
    at = max(number, receipt.block_number if receipt is not None else 0)
    if await transfers.authorization_used(
        rpc, looked_for.asset, *looked_for.authorization, block=hex(at)
    ):
        if await _went_elsewhere(looked_for):
            return await _give_up(
                rails, payment, "invalid_transaction_state", "was cancelled or went elsewhere"
            )
        return "processing"  # just used, or these nodes do not agree yet
    if time_s >= (payment.valid_before_s or 0):
        # The token refuses it in every later block.
        return await _give_up(
            rails,
            payment,
            "invalid_exact_evm_payload_authorization_valid_before",
            "was not included before it expired",
        )
    if receipt is not None:
        # Ours is in a block and moved nothing. The authorization is still good, but what made
        # the token refuse it has to be cured by the payer; sending again only burns gas.
        return await _give_up(
            rails, payment, "invalid_transaction_state", "was refused by the token"
        )
    await _fill_gap(rails, rpc, newest)
    try:
        await sender.broadcast(rpc, newest.raw)
    except Rejected as error:
        if error.code != "nonce_taken":
            raise
        await _sign_again(rails, rpc, payment, newest)
    return "processing"


async def _newest_block(rpc: Rpc) -> tuple[int, int]:
    """Its number and its time in seconds."""
    block = await rpc.call("eth_getBlockByNumber", ["latest", False])
    if not isinstance(block, dict):
        raise Unavailable("rpc_bad_answer", "there is no newest block")
    return rpc.quantity(block.get("number")), rpc.quantity(block.get("timestamp"))


async def _went_elsewhere(looked_for: _LookedFor) -> bool:
    """Whether what marked the authorization is known, and moved nothing to us."""
    rpc, asset, from_block = looked_for.rpc, looked_for.asset, looked_for.from_block
    payer, nonce = looked_for.authorization
    used_by = await transfers.find_authorization(rpc, asset, payer, nonce, from_block)
    if used_by is not None:
        moved = await transfers.transfers_of(rpc, used_by, asset, looked_for.chain.pay_to)
        return moved is not None and by_authorization(moved, payer, nonce) is None
    event = transfers.AUTHORIZATION_CANCELED
    return (
        await transfers.find_authorization(rpc, asset, payer, nonce, from_block, event) is not None
    )


async def _fill_gap(rails: Rails, rpc: Rpc, ours: sender.Prepared) -> None:
    """Hand over again what our gas account signed before this one and the node does not have.

    A payment that expired before any node took its transaction, or whose transaction a node has
    forgotten, leaves a chain nonce behind that nobody uses; until somebody does, no later
    transaction of the account can be included. The token refuses what has expired, so this costs
    its gas and moves nothing.
    """
    count = await rpc.call("eth_getTransactionCount", [ours.sender, "pending"])
    first = rpc.quantity(count)
    if first >= ours.nonce:
        return
    async with rails.db.read() as tx:
        before = await journal.sent_before(tx, ours, first, _GAP_PER_LOOK)
    for each in before:
        try:
            await sender.broadcast(rpc, each.raw)
        except (Rejected, Unknown):  # in a block meanwhile, or perhaps sent: the next look tells
            continue


async def _sign_again(rails: Rails, rpc: Rpc, payment: Payment, dead: sender.Prepared) -> None:
    """The chain nonce went to a transaction this ledger does not know: take another one.

    The dead transaction can never be included, and the token would take the authorization only
    once anyway.
    """
    chain = rails.settings.chain(payment.network or "")
    if chain.settler_key is None:
        raise Unavailable("gas_account_empty", f"{chain.name} has no settler key")
    key = chain.settler_key.get_secret_value()
    to, data = sender.call_of(dead.raw)
    async with rails.gas_locks[chain.caip2]:
        fees = await sender.fees(rpc, dead.sender, to, data)

        async def work(tx: Tx) -> sender.Prepared:
            nonce = await journal.allot(tx, chain.caip2, dead.sender, fees.nonce, payment.id)
            fresh = sender.sign(key, chain.network.chain_id, nonce, to, data, fees)
            await journal.store_prepared(tx, fresh, payment.id, await tx.now_ms())
            return fresh

        await sender.broadcast(rpc, (await transact(rails.db, work)).raw)


async def _give_up(rails: Rails, payment: Payment, code: str, why: str) -> str:
    async with rails.db.write() as tx:
        await journal.fail(tx, payment.id, code, f"the payment {why}", await tx.now_ms())
    return "failed"
