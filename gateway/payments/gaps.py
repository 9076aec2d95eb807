"""Chain nonces that nobody signs for, below some that were signed for: used up by nothing.

A number is allotted by what the nodes count. If that was a transaction from elsewhere that only
ever stood in a pool, or a node counted wrong once, the numbers in between are nobody's, and all
that was signed above them waits for ever. Each is filled with a transfer of zero to ourselves,
stored before it is sent, and from then on looked after like any other (``gas.py``).

Not before something has waited there for long, and not while nodes tell of a transaction in that
place: it may be the operator's own. One that has kept us waiting for twice as long is outbid.
"""

from __future__ import annotations

from typing import Final

from chain import sender
from chain.errors import ChainError, Rejected, Unavailable, Unknown
from chain.rpc import Rpc
from gateway.db import Tx, transact
from gateway.observe import log
from gateway.payments import gas, nonces, worth
from gateway.payments.gas import GasAccount
from gateway.payments.rails import Rails
from gateway.settings import Chain

_AT_ONCE: Final = 50
FARTHEST: Final = 1_000  # a wider gap is for a person: to fill it would cost too much


async def fill_all(rails: Rails) -> None:
    """One round for the background loop: every gas account."""
    for chain in rails.settings.chains:
        for account in gas.accounts(chain):
            try:
                await _fill(rails, rails.rpcs[chain.caip2], chain, account)
            except ChainError as error:
                log.warning("%s: gas account %s: %s", chain.name, account.address, error)


async def _fill(rails: Rails, rpc: Rpc, chain: Chain, account: GasAccount) -> None:
    late_ms = gas.overdue_ms(rpc, chain)
    async with rails.db.read() as tx:
        now_ms = await tx.now_ms()
        waiting_ms = await nonces.oldest_open_ms(tx, chain.caip2, account.address)
    if waiting_ms is None or now_ms - waiting_ms < late_ms:
        return
    mined = await sender.mined_count(rpc, account.address)
    async with rails.db.read() as tx:
        taken = await nonces.taken_from(tx, chain.caip2, account.address, mined, _AT_ONCE)
    missing = _missing(mined, [number for number, _ in taken])
    if not 0 < len(missing) <= FARTHEST:
        return
    since_ms = min(at_ms for number, at_ms in taken if number > missing[0])
    if now_ms - since_ms < late_ms:
        return
    if now_ms - since_ms < 2 * late_ms:
        counts = await rpc.call_each("eth_getTransactionCount", [account.address, "pending"], 2)
        told = max(rpc.count(each) for each in counts)
        missing = [number for number in missing if number >= told]
    await _use_up(rails, rpc, chain, account, missing[:_AT_ONCE])


def _missing(mined: int, taken: list[int]) -> list[int]:
    """The numbers below the last of ``taken`` that are not among them, from ``mined`` on."""
    if not taken:
        return []
    return sorted(set(range(mined, min(taken[-1], mined + FARTHEST + _AT_ONCE + 1))) - set(taken))


async def _use_up(
    rails: Rails, rpc: Rpc, chain: Chain, account: GasAccount, numbers: list[int]
) -> None:
    if not numbers:
        return
    limit = await sender.gas_limit(rpc, account.address, account.address, b"")
    now = await sender.market(rpc, account.address)
    fees = now.fees(limit, gas.most_wei(chain))
    data_wei = worth.ENVELOPE_BYTES * await worth.byte_wei(rails, rpc, chain)
    cost = gas.expected_gwei(limit, now, data_wei)
    for number in numbers:
        nothing = sender.sign(
            account.key, chain.network.chain_id, number, account.address, b"", fees
        )

        async def work(tx: Tx, nothing: sender.Prepared = nothing) -> bool:
            return await nonces.fill(tx, nothing, await tx.now_ms(), cost)

        if not await transact(rails.db, work):
            continue  # another node was faster
        log.warning("%s: nonce %d of %s was nobody's", chain.name, number, account.address)
        try:
            await sender.broadcast(rpc, nothing.raw)
        except (Unavailable, Unknown, Rejected) as error:
            log.warning("transaction %s: %s; it is looked at again", nothing.tx_hash, error)
