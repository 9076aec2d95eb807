"""Ids of holds and transfers: one rising sequence, handed out in blocks.

A process takes a block and uses it for a few seconds at most, so that ids stay close to time and
the sweeper knows below which id nothing new can appear (``settled_below``).
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from gateway.db import Tx

BLOCK = 1_000
BLOCK_LIFE_S = 5.0
# A block is used for BLOCK_LIFE_S after it was reserved, and a transaction is bounded to a few
# seconds by the server; beyond this age every id of it stands in the database or never will.
SETTLED_AFTER_MS = 12_000


async def reserve(tx: Tx, count: int) -> range:
    """``count`` new ids, straight from the sequence, inside this transaction."""
    end: int = await tx.fetchval(
        "UPDATE sequence SET next = next + $1 WHERE name = 'id' RETURNING next", count
    )
    await tx.execute(
        "INSERT INTO id_block (start, at_ms) VALUES ($1, $2)", end - count, await tx.now_ms()
    )
    return range(end - count, end)


class IdBlocks:
    """One process's current block. A rollback burns ids; it never hands one out twice."""

    def __init__(self) -> None:
        self._block = range(0)
        self._until_s = 0.0

    async def take(self, tx: Tx, count: int) -> Iterator[int]:
        """At least ``count`` ids for use inside ``tx``."""
        if time.monotonic() > self._until_s or len(self._block) < count:
            fresh = await reserve(tx, max(BLOCK, count))
            mine, rest = fresh[:count], fresh[count:]
            # Others may use the rest only once the reservation itself stands.
            until_s = time.monotonic() + BLOCK_LIFE_S
            tx.after_commit(lambda: self._keep(rest, until_s))
            return iter(mine)
        mine, self._block = self._block[:count], self._block[count:]
        return iter(mine)

    def _keep(self, block: range, until_s: float) -> None:
        self._block = block
        self._until_s = until_s


async def settled_below(tx: Tx, now_ms: int) -> int:
    """Every id below this one is in the database by now, or never will be."""
    oldest_live = await tx.fetchval(
        "SELECT min(start) FROM id_block WHERE at_ms > $1", now_ms - SETTLED_AFTER_MS
    )
    if oldest_live is not None:
        return int(oldest_live)
    bound: int = await tx.fetchval("SELECT next FROM sequence WHERE name = 'id'")
    return bound
