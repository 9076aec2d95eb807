"""Ids of holds and transfers: one rising sequence, handed out in blocks.

A process takes a block and uses it for a few seconds at most, so that ids stay close to time and
the sweeper knows below which id nothing new can appear (``settled_below``).
"""

from __future__ import annotations

from gateway.db import APPLICATION, Tx

BLOCK = 1_000
# A block is used by transactions that begin at most this long after it was reserved.
BLOCK_LIFE_MS = 5_000
# They may wait 5 s for their locks (the server's statement_timeout) before anybody can see that
# they write. Beyond this age a block is used by nobody but those that are seen to be writing.
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
        self._until_ms = 0

    async def take(self, tx: Tx, count: int, now_ms: int) -> range:
        """``count`` ids for use inside ``tx``. ``now_ms``: the database's clock at its beginning.

        No clock of this machine: it stands still while the machine is suspended.
        """
        if now_ms > self._until_ms or len(self._block) < count:
            fresh = await reserve(tx, max(BLOCK, count))
            mine, rest = fresh[:count], fresh[count:]
            # Others may use the rest only once the reservation itself stands.
            tx.after_commit(lambda: self._keep(rest, now_ms + BLOCK_LIFE_MS))
            return mine
        mine, self._block = self._block[:count], self._block[count:]
        return mine

    def _keep(self, block: range, until_ms: int) -> None:
        self._block = block
        self._until_ms = until_ms


async def settled_below(tx: Tx, now_ms: int) -> int:
    """Every id below this one is in the database by now, or never will be."""
    # First: a block that is reserved after this look lies above it, whoever sees its row.
    bound: int = await tx.fetchval("SELECT next FROM sequence WHERE name = 'id'")
    since_ms = now_ms - SETTLED_AFTER_MS
    if tx.dialect == "postgres":
        # A transaction may take long after its locks: many waits, a COMMIT that a standby delays.
        writing_ms = await tx.fetchval(
            "SELECT (extract(epoch FROM min(xact_start)) * 1000)::bigint FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = $1"
            " AND backend_xid IS NOT NULL AND pid <> pg_backend_pid()",
            APPLICATION,
        )
        if writing_ms is not None:
            since_ms = min(since_ms, writing_ms - BLOCK_LIFE_MS)
    oldest_live: int | None = await tx.fetchval(
        "SELECT min(start) FROM id_block WHERE at_ms > $1", since_ms
    )
    return bound if oldest_live is None else min(bound, oldest_live)
