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

from chain.errors import Rejected, Unavailable
from chain.receipts import Receipt
from chain.receipts import read as read_receipt
from chain.rpc import Rpc
from chain.schemes import permit2
from chain.sender import Prepared
from chain.transfers import Transfer
from gateway import ledger
from gateway.db import Tx, transact
from gateway.payments import engine, gas, journal, nonces, remote
from gateway.payments.journal import Payment
from gateway.payments.lane import Begun, Job
from gateway.payments.methods import METHODS, Method, Spent
from gateway.payments.nonces import Call
from gateway.payments.rails import Rails
from gateway.settings import Chain

USED: Final = "invalid_transaction_state"  # what a used authorization is refused with, among others
SPENT: Final = frozenset(
    (
        USED,
        "permit2_invalid_nonce",
        "permit2_simulation_failed",
        # They may have been read after the nonce was, and it used in between.
        "permit2_insufficient_balance",
        permit2.ALLOWANCE_REQUIRED,
    )
)
"""What an authorization can be refused with because it has moved its money already."""
LAG_MS: Final = 60_000  # how far one node may be behind another
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
        sent = await nonces.sent_for(tx, payment.id)
        given = await remote.call_for(tx, payment.id)
    if not sent and given is None:
        raise ledger.LedgerFault(f"payment {payment.id} has no transaction")
    pay_to = payment.pay_to or chain.pay_to
    spent = Spent(asset, payment.payer, payment.auth_nonce, pay_to, payment.amount_units)
    looked_for = _LookedFor(rpc, chain, METHODS[payment.method], spent, payment)
    ended = await end_with(rails, payment, await _on_chain(looked_for, sent))
    if ended is not None:
        return ended
    if not sent and given is not None:
        return await _given_away(rails, looked_for, given)
    return await _unfound(rails, looked_for, sent)


async def end_with(rails: Rails, payment: Payment, found: Sequence[Transfer]) -> str | None:
    """End a payment by the first of these transfers that no other payment has. Returns what it is
    now (still ``processing``: its block is not deep enough for its amount); None: it has none."""
    if not found:
        return None

    async def work(tx: Tx) -> str | None:
        now_ms = await tx.now_ms()
        transfer = await journal.take(tx, payment, found, now_ms)
        if transfer is None:
            return None
        done, _ = await journal.finish(tx, payment.id, transfer, now_ms)
        return done.state

    return await transact(rails.db, work)


async def _given_away(rails: Rails, looked_for: _LookedFor, call: Call) -> str:
    """A facilitator has it and nothing is on chain. It may still send it, so it has failed only
    once the token would refuse it; until then we hand it in ourselves."""
    rpc, payment = looked_for.rpc, looked_for.payment
    number, time_s = await newest_block(rpc)
    if await looked_for.method.is_used(rpc, looked_for.spent, hex(number)):
        return await _used_up(rails, looked_for)
    if time_s >= (payment.valid_before_s or 0):
        code = "invalid_exact_evm_payload_authorization_valid_before"
        return await _give_up(rails, payment, code, "was not included before it expired")
    spent = looked_for.spent

    async def nothing(_tx: Tx, _at: Begun) -> bool:
        return False  # it is claimed already: remote.ourselves begins in its own way

    job = Job(
        chain=looked_for.chain,
        call=call,
        payer=spent.payer,
        spends=(spent.asset.address, spent.payer, spent.nonce),
        valid_before_s=payment.valid_before_s or 0,
        begin=nothing,
    )
    await remote.ourselves(rails, job)
    return "processing"


@dataclass(frozen=True, slots=True)
class _LookedFor:
    """A payment, and where its transfer is looked for."""

    rpc: Rpc
    chain: Chain
    method: Method
    spent: Spent
    payment: Payment

    @property
    def from_block(self) -> int:
        """A little before the block at which it was seen unused: that node may have lagged."""
        margin = LAG_MS // self.rpc.network.finality.block_ms
        return max((self.payment.from_block or 0) - margin, 0)


async def seen(rpc: Rpc, spent: Spent, method: str) -> list[Transfer]:
    """The transfers to us that may be of an authorization that is marked as used, of the last
    hour or so (``journal.take``).

    None of them: it is not marked, was cancelled, paid somebody else, or was used longer ago.
    """
    if not await METHODS[method].is_used(rpc, spent, "latest"):
        return []
    blocks = LOOK_BACK_MS // rpc.network.finality.block_ms
    start = max(await rpc.block_number() - blocks, 0)
    return await _by_anyone(rpc, METHODS[method], spent, start)


async def _by_anyone(rpc: Rpc, method: Method, spent: Spent, from_block: int) -> list[Transfer]:
    moved: list[Transfer] = []
    for tx_hash in await method.find(rpc, spent, from_block):
        receipt = await read_receipt(rpc, tx_hash)
        if receipt is not None:
            moved += method.transfers(rpc.network.caip2, receipt, spent)
    return moved


async def _on_chain(looked_for: _LookedFor, sent: Sequence[Prepared]) -> list[Transfer]:
    """The transfers of this authorization, in one of our transactions or in somebody else's."""
    rpc, method, spent = looked_for.rpc, looked_for.method, looked_for.spent
    for ours in sent:
        receipt = await read_receipt(rpc, ours.tx_hash)
        if receipt is not None:
            match = method.transfers(rpc.network.caip2, receipt, spent)
            if match:
                return match
    return await _by_anyone(rpc, method, spent, looked_for.from_block)


async def _unfound(rails: Rails, looked_for: _LookedFor, sent: Sequence[Prepared]) -> str:
    """No transfer was found: it never will be, or it is waited for and helped along."""
    rpc, payment = looked_for.rpc, looked_for.payment
    newest = [each for each in sent if _same_nonce(each, sent[0])]
    receipt = await gas.first_receipt(rpc, newest)
    number, time_s = await newest_block(rpc)
    # Asked at this very block: a node that does not have it cannot answer, and whatever happened
    # up to it is in the answer.
    at = max(number, receipt.block_number if receipt is not None else 0)
    if await looked_for.method.is_used(rpc, looked_for.spent, hex(at)):
        network = rpc.network.caip2
        if receipt is not None and not looked_for.method.transfers(
            network, receipt, looked_for.spent
        ):
            async with rails.db.write() as tx:
                await journal.doubt(tx, payment.id, USED, await tx.now_ms())
        return await _used_up(rails, looked_for)
    if time_s >= (payment.valid_before_s or 0):
        # The token refuses it in every later block.
        return await _give_up(
            rails,
            payment,
            "invalid_exact_evm_payload_authorization_valid_before",
            "was not included before it expired",
        )
    counted = await rpc.call("eth_getTransactionCount", [sent[0].sender, hex(at)])
    if rpc.quantity(counted) > sent[0].nonce:
        # Its nonce is used, and the authorization is not: nothing that was signed for it so far
        # can move its money any more.
        return await _moved_nothing(rails, looked_for, sent, receipt)
    await gas.tend(rails, rpc, looked_for.chain, sent[0].sender, patience_ms=0)
    return "processing"


def _same_nonce(one: Prepared, other: Prepared) -> bool:
    return (one.sender, one.nonce) == (other.sender, other.nonce)


async def _moved_nothing(
    rails: Rails, looked_for: _LookedFor, sent: Sequence[Prepared], receipt: Receipt | None
) -> str:
    """Ours is in a block without its transfer, or the nonce went to somebody else's transaction.

    Once more, alone, where what failed may have been the company, or where none of ours was in
    the block. Otherwise what made the token refuse it has to be cured by the payer, and sending
    again only burns gas.
    """
    payment = looked_for.payment
    async with rails.db.read() as tx:
        company = await nonces.members(tx, sent[0])
    if receipt is None or len(company) > 1:
        try:
            await engine.again(rails, looked_for.chain, payment.id, sent)
        except Rejected as refusal:
            # "Used" can be by a transfer that was made since we asked: the next look finds it.
            if refusal.code != USED:
                return await _give_up(
                    rails, payment, "invalid_transaction_state", f"was refused: {refusal.detail}"
                )
        return "processing"
    return await _give_up(rails, payment, "invalid_transaction_state", "was refused by the token")


async def newest_block(rpc: Rpc) -> tuple[int, int]:
    """Its number and its time in seconds."""
    block = await rpc.call("eth_getBlockByNumber", ["latest", False])
    if not isinstance(block, dict):
        raise Unavailable("rpc_bad_answer", "there is no newest block")
    return rpc.count(block.get("number")), rpc.count(block.get("timestamp"))


async def _used_up(rails: Rails, looked_for: _LookedFor) -> str:
    """Its one-time value is used and no transfer of it was found: it was taken back or paid
    somebody else. Or it was just used, or these nodes do not agree yet."""
    rpc, method, spent = looked_for.rpc, looked_for.method, looked_for.spent
    if not await method.went_elsewhere(rpc, spent, looked_for.from_block):
        return "processing"
    # Asked again, because only what is told from now on counts.
    late = await _by_anyone(rpc, method, spent, looked_for.from_block)
    ended = await end_with(rails, looked_for.payment, late)
    if ended is not None:
        return ended
    return await _give_up(rails, looked_for.payment, USED, "was cancelled or went elsewhere")


async def _give_up(rails: Rails, payment: Payment, code: str, why: str) -> str:
    async with rails.db.write() as tx:
        await journal.fail(tx, payment.id, code, f"the payment {why}", await tx.now_ms())
        done = await journal.by_id(tx, payment.id)
    return "failed" if done is None else done.state
