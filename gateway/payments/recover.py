"""Finish payments that nobody waits for: after a crash, a lost answer, a slow chain.

The chain decides, asked in this order: our own transactions, anybody's transaction that used the
authorization, the token's mark, and the time after which the token refuses it for ever. Only the
last two can fail a payment, and a payment that failed is still minted if its transfer shows up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from chain import receipts, sender, transfers
from chain.errors import Rejected, Unavailable
from chain.networks import Asset
from chain.rpc import Rpc
from gateway import ledger
from gateway.db import Tx, transact
from gateway.payments import journal
from gateway.payments.journal import Payment
from gateway.payments.rails import Rails, by_authorization
from gateway.settings import Chain

LOOK_BACK_MS: Final = 3_600_000  # an offer lives two minutes; who paid one comes soon


async def recover(rails: Rails, payment: Payment) -> str:
    """One look at a payment that nobody waits for. Returns what it is now.

    Raises ``ChainError`` and ``DatabaseUnavailable``; the lease makes somebody look again.
    """
    if payment.network is None or payment.payer is None or payment.auth_nonce is None:
        raise ledger.LedgerFault(f"payment {payment.id} has no authorization")
    chain = rails.settings.chain(payment.network)
    asset = chain.network.asset(payment.asset or "")
    rpc = rails.rpcs.get(chain.caip2)
    if asset is None or rpc is None:
        raise Unavailable("rpc_error", f"{payment.network} is not configured any more")
    async with rails.db.read() as tx:
        sent = await journal.sent_for(tx, payment.id)
    found = await _on_chain(rpc, chain, asset, payment, [each.tx_hash for each in sent])
    if found is not None:
        transfer = found

        async def work(tx: Tx) -> None:
            await journal.finish(tx, payment.id, transfer, await tx.now_ms())

        await transact(rails.db, work)
        return "succeeded"
    if await transfers.authorization_used(rpc, asset, payment.payer, payment.auth_nonce):
        # Marked without a transfer to us: the payer cancelled it. Look once more behind the mark,
        # because it may have been used between the two questions.
        found = await _on_chain(rpc, chain, asset, payment, [each.tx_hash for each in sent])
        if found is None:
            return await _give_up(rails, payment, "invalid_transaction_state", "was cancelled")
        return "processing"
    return await _again_or_never(rails, rpc, payment, sent)


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
    rpc: Rpc, chain: Chain, asset: Asset, payment: Payment, hashes: list[str]
) -> transfers.Transfer | None:
    """The transfer of this authorization, in one of our transactions or in somebody else's."""
    payer, nonce = payment.payer or "", payment.auth_nonce or ""
    for tx_hash in hashes:
        moved = await transfers.transfers_of(rpc, tx_hash, asset, chain.pay_to)
        match = by_authorization(moved or [], payer, nonce)
        if match is not None:
            return match
    return await _by_anyone(rpc, chain, asset, (payer, nonce), payment.from_block or 0)


async def _again_or_never(
    rails: Rails, rpc: Rpc, payment: Payment, sent: Sequence[sender.Prepared]
) -> str:
    block = await rpc.call("eth_getBlockByNumber", ["latest", False])
    chain_now_s = rpc.quantity(block["timestamp"]) if isinstance(block, dict) else 0
    if chain_now_s >= (payment.valid_before_s or 0):
        # The token refuses it in every later block; one that could still hold it is past.
        return await _give_up(
            rails,
            payment,
            "invalid_exact_evm_payload_authorization_valid_before",
            "was not included before it expired",
        )
    newest = sent[0]
    if await receipts.read(rpc, newest.tx_hash) is not None:
        # Ours is in a block and moved nothing. The authorization is still good, but what made
        # the token refuse it has to be cured by the payer; sending again only burns gas.
        return await _give_up(
            rails, payment, "invalid_transaction_state", "was refused by the token"
        )
    try:
        await sender.broadcast(rpc, newest.raw)
    except Rejected as error:
        if error.code != "nonce_taken":
            raise
        await _sign_again(rails, rpc, payment, newest)
    return "processing"


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
