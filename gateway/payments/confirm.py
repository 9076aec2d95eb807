"""Follow what was seen until it is final: mint what waited, move what moved, reverse what is gone.

Every transfer that is not final stands in a block, and the blocks are followed by parent hash
(``chain/blocks.py``). Where another block stands in that place now, the transaction is looked for
again: in another block it is the same mint, in none it is reversed. Depth only ever decides
together with the block hash it was judged by, so a decision that comes late changes nothing.

One process does this for a network at a time (``watcher.py``), to ask the nodes once; two that do
would be safe.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from chain import blocks, receipts
from chain.blocks import Points, Trail
from chain.endpoints import Endpoint
from chain.errors import Reverted, Unavailable
from chain.networks import Asset
from chain.rpc import Rpc
from chain.transfers import Transfer, transfers_in
from gateway.db import Tx, transact
from gateway.observe import log
from gateway.payments import inbound, journal
from gateway.payments.inbound import Depth, Inbound
from gateway.payments.rails import Rails
from gateway.settings import Chain

PER_LOOK: Final = 2_000
AGREEING: Final = 2  # providers that must tell the same above the limit, where there are two
_DEPTHS: Final[tuple[Depth, ...]] = ("included", "safe", "final")


def trusted(chain: Chain) -> int | str:
    """What ends a mint's being provisional: ``safe``, ``finalized`` or a number of blocks."""
    otherwise = chain.mint_at.otherwise
    return "safe" if otherwise == "included" else otherwise


@dataclass(frozen=True, slots=True)
class _Look:
    """One look at a network: what it needs, and how deep things are now."""

    rails: Rails
    chain: Chain
    rpc: Rpc
    points: Points
    hashes: dict[int, str]  # what stands at the places that matter

    def depth(self, number: int) -> Depth:
        if number <= self.points.final:
            return "final"
        return "safe" if number <= self.points.safe else "included"

    def asset(self, row: Inbound) -> Asset:
        found = self.chain.network.asset(row.asset)
        if found is None:
            raise Unavailable("rpc_error", f"{row.asset} is not configured any more")
        return found


async def look(rails: Rails, chain: Chain, trail: Trail) -> list[tuple[Inbound, Depth]]:
    """One look at every transfer of a network that is not final.

    Returns those that are safe and nobody's, with how deep each is. They are noted as safe, not as
    final: whoever finds out whose they are does that last (``deepen``), for what is final and
    nobody's is not looked at again. Raises ``ChainError`` and ``DatabaseUnavailable``: what was
    decided by then stands, the rest is looked at the next time.
    """
    async with rails.db.read() as tx:
        rows = await _followed(tx, chain.caip2)
    if not rows:
        trail.blocks.clear()
        return []
    rpc = rails.rpcs[chain.caip2]
    at = _Look(rails, chain, rpc, await blocks.points(rpc, trusted(chain)), {})
    await _read_hashes(at, rows, trail)
    unclaimed = []
    for row in rows:
        stands = at.hashes.get(row.block_number)
        if stands is None:
            continue  # these nodes are not there yet, or are no more: nothing is known
        if stands != row.block_hash:
            await _displaced(at, row)
            continue
        # What was safe once is not made less so by a node that is behind.
        depth = max(at.depth(row.block_number), row.depth, key=_DEPTHS.index)
        if row.state == "waiting":
            await _credit(at, row, depth)
            continue
        nobodys = row.state == "unclaimed" and depth != "included"
        noted: Depth = "safe" if nobodys else depth
        if noted != row.depth:
            await deepen(rails, row, noted)
        if nobodys:
            unclaimed.append((row, depth))
    return unclaimed


async def _followed(tx: Tx, network: str) -> list[Inbound]:
    rows = await tx.fetch(
        f"SELECT {inbound.LIST} FROM inbound WHERE network = $1 AND depth <> 'final'"  # noqa: S608
        " AND state <> 'gone' ORDER BY block_number LIMIT $2",
        network,
        PER_LOOK,
    )
    # One that waits although it is final (beyond a limit that was lowered, say) is not followed
    # any more, but must still be minted.
    late = await tx.fetch(
        f"SELECT {inbound.LIST} FROM inbound WHERE network = $1 AND depth = 'final'"  # noqa: S608
        " AND state = 'waiting' LIMIT $2",
        network,
        PER_LOOK,
    )
    return [inbound.row_of(row) for row in (*rows, *late)]


async def _read_hashes(at: _Look, rows: Sequence[Inbound], trail: Trail) -> None:
    """What stands where: below the final block by number, above it by the trail."""
    numbers = {row.block_number for row in rows}
    for number in sorted(n for n in numbers if n <= at.points.final):
        found = await blocks.header(at.rpc, number)
        if found is not None:
            at.hashes[number] = found.hash
    above = [number for number in numbers if number > at.points.final]
    if not above:
        trail.blocks.clear()
        return
    await trail.follow(at.rpc, min(above))
    for number in above:
        stands = trail.hash_at(number)
        if stands is not None:
            at.hashes[number] = stands


async def deepen(rails: Rails, row: Inbound, depth: Depth) -> None:
    """Note how deep the block of a transfer is, if it still stands in that block."""

    async def work(tx: Tx) -> None:
        now_ms = await tx.now_ms()
        await inbound.deepened(tx, row, depth, agreed=bool(row.agreed), now_ms=now_ms)

    await transact(rails.db, work)


async def _credit(at: _Look, row: Inbound, depth: Depth) -> None:
    """Mint what waited, if its block is deep enough now or the limits have room again."""
    agreed = bool(row.agreed)
    if not agreed and row.value_units > at.chain.mint_at.instant_limit_units:
        if depth == "included" and at.chain.mint_at.otherwise != "included":
            return  # it waits for its block; nothing to ask yet
        agreed = await _agreed(at, row, depth)

    async def work(tx: Tx) -> bool:
        now_ms = await tx.now_ms()
        if row.payment_id is not None:  # in the order in which payments are finished
            await journal.by_id(tx, row.payment_id, lock=True)
        await inbound.deepened(tx, row, depth, agreed=agreed, now_ms=now_ms)
        now = await inbound.locked(tx, row.network, row.tx_hash, row.n)
        if now is None or now.state != "waiting" or now.block_hash != row.block_hash:
            return False
        return (await inbound.credit(tx, now, now_ms)).row.state == "minted"

    if await transact(at.rails.db, work):
        log.info("%s of %s waited and is minted", row.tx_hash, row.network)


async def _agreed(at: _Look, row: Inbound, depth: Depth) -> bool:
    """Whether two providers tell the same of a transfer: its amount, its block, how deep it is.

    Where only one is configured, its word is taken once the block is safe by it.
    """
    if len(at.rpc.endpoints) < AGREEING:
        return depth != "included"
    told = await asyncio.gather(*(_says(at, e, row, depth) for e in at.rpc.endpoints))
    return sum(told) >= AGREEING


async def _says(at: _Look, endpoint: Endpoint, row: Inbound, depth: Depth) -> bool:
    """Whether one provider, asked alone, tells of this transfer what we believe of it."""

    async def ask(method: str, *params: Any) -> Any:
        ((_, answer),) = await at.rpc.ask_all(method, params, [endpoint])
        if isinstance(answer, Unavailable):
            raise answer
        return answer

    try:
        receipt = receipts.parse(await ask("eth_getTransactionReceipt", row.tx_hash), row.tx_hash)
        found = _same(transfers_in(row.network, receipt, at.asset(row), row.pay_to), row)
        if found is None or found.block_hash != row.block_hash:
            return False
        place = hex(row.block_number)
        stands = blocks.parse(await ask("eth_getBlockByNumber", place, False))
        if stands is None or stands.hash != row.block_hash:
            return False
        if depth == "included":
            return True
        tag = trusted(at.chain)
        deep = blocks.parse(
            await ask("eth_getBlockByNumber", "latest" if isinstance(tag, int) else tag, False)
        )
    except (Unavailable, Reverted):
        return False
    behind = tag if isinstance(tag, int) else 0
    return deep is not None and row.block_number <= deep.number - behind


def _same(found: Sequence[Transfer], row: Inbound) -> Transfer | None:
    """The very transfer of this row, in whatever block."""
    whose = (row.from_address, row.value_units)
    for each in found:
        if (each.n, each.from_, each.value_units) == (row.ordinal, *whose):
            return each
    return None


async def _displaced(at: _Look, row: Inbound) -> None:
    """Another block stands where this transfer was: find it again, or take back what it minted.

    Gone only if every provider that answers says so of a chain without the old block. One that
    still has it there, or has it in a block that is not on our trail, is not where we are.
    """
    answers = await at.rpc.call_each("eth_getTransactionReceipt", [row.tx_hash], AGREEING)
    found: Transfer | None = None
    for answer in answers:
        if answer is None:
            continue
        receipt = receipts.parse(answer, row.tx_hash)
        match = _same(transfers_in(row.network, receipt, at.asset(row), row.pay_to), row)
        if receipt.block_hash == row.block_hash:
            return
        found = match or found
    if found is not None:
        stands = await blocks.header(at.rpc, found.block_number)
        if stands is None or stands.hash != found.block_hash:
            return
    place = found

    async def work(tx: Tx) -> bool:
        now_ms = await tx.now_ms()
        if row.payment_id is not None:
            await journal.by_id(tx, row.payment_id, lock=True)
        if place is not None:
            await inbound.moved(tx, row, place.block_number, place.block_hash, now_ms)
            return False
        return await inbound.vanished(tx, row, now_ms)

    if await transact(at.rails.db, work):
        log.warning(
            "%s of %s left the chain with block %d: what it minted is reversed",
            row.tx_hash,
            row.network,
            row.block_number,
        )
