"""Holds whose owner died: found without an index, ended when their lease is over."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.db import Database
from gateway.ledger.apply import apply
from gateway.ledger.ids import SETTLED_AFTER_MS, settled_below
from gateway.ledger.rows import HOLD, columns, hold_row
from gateway.ledger.steps import Close, Closed, Expire, HoldRow

INTERRUPTED = "interrupted"
_STRIDE = 20_000
_DUE = 500


async def note_open_holds(db: Database) -> int:
    """Move the watermark up and remember the holds below it that are still open.

    A hold is written once and never touched, so nothing marks it as open but the absence of its
    close. Each id range is looked at once; what survives stands in ``open_hold``.
    """
    async with db.write() as tx:
        now_ms = await tx.now_ms()
        # Held to the end of this transaction, so that two sweepers do not skip a range.
        start: int = await tx.fetchval(
            f"SELECT next FROM sequence WHERE name = 'swept'{tx.for_update}"  # noqa: S608
        )
        end = min(await settled_below(tx, now_ms), start + _STRIDE)
        if end <= start:
            return 0
        found = await tx.execute(
            "INSERT INTO open_hold (hold_id, account_id, lease_ms)"
            " SELECT h.id, h.account_id, h.lease_ms FROM hold h LEFT JOIN transfer t"
            " ON t.id = h.id WHERE h.id >= $1 AND h.id < $2 AND t.id IS NULL"
            " ON CONFLICT (hold_id) DO NOTHING",
            start,
            end,
        )
        await tx.execute("UPDATE sequence SET next = $1 WHERE name = 'swept'", end)
        await tx.execute("DELETE FROM id_block WHERE at_ms < $1", now_ms - 10 * SETTLED_AFTER_MS)
        return found


async def renew(db: Database, holds: Sequence[HoldRow], lease_ms: int) -> None:
    """The live owner of long calls speaks for their holds again, for ``lease_ms`` from now.

    Only holds that have lived for a third of their lease are written. One that was closed
    meanwhile leaves a row behind that the sweeper clears.
    """
    if not holds:
        return
    async with db.write() as tx:
        now_ms = await tx.now_ms()
        await tx.executemany(
            "INSERT INTO open_hold (hold_id, account_id, lease_ms) VALUES ($1, $2, $3)"
            " ON CONFLICT (hold_id) DO UPDATE SET lease_ms = excluded.lease_ms",
            [
                (hold.id, hold.account_id, now_ms + lease_ms)
                for hold in sorted(holds, key=lambda each: each.id)
                if now_ms - hold.at_ms >= (hold.lease_ms - hold.at_ms) // 3
            ],
        )


async def void_lapsed(db: Database, margin_ms: int) -> list[HoldRow]:
    """Void the holds whose lease has been over for ``margin_ms``. Returns them.

    The owner may close its hold at the same moment: both write the row with the hold's id, and
    the primary key decides.
    """
    async with db.write() as tx:
        now_ms = await tx.now_ms()
        await tx.execute(
            "DELETE FROM open_hold WHERE hold_id IN (SELECT o.hold_id FROM open_hold o"
            " JOIN transfer t ON t.id = o.hold_id)"
        )
        rows = await tx.fetch(
            f"SELECT {columns(HOLD, 'h')} FROM open_hold o JOIN hold h ON h.id = o.hold_id"  # noqa: S608
            " WHERE o.lease_ms < $1 ORDER BY h.account_id, h.id LIMIT $2",
            now_ms - margin_ms,
            _DUE,
        )
        holds = [hold_row(row) for row in rows]
        steps = [Close(h, void_reason=INTERRUPTED, if_lapsed=True) for h in holds]
        outcomes = await apply(tx, steps, now_ms)
        return [h for h, o in zip(holds, outcomes, strict=True) if isinstance(o, Closed)]


async def expire_due(db: Database) -> int:
    """Expire what is due on accounts that nobody touches. Returns how many accounts."""
    async with db.write() as tx:
        now_ms = await tx.now_ms()
        rows = await tx.fetch(
            "SELECT id FROM account WHERE next_expiry_ms <= $1 ORDER BY id LIMIT $2", now_ms, _DUE
        )
        steps: Sequence[Expire] = [Expire(row["id"]) for row in rows]
        await apply(tx, steps, now_ms)
        return len(steps)


async def purge_answers(db: Database, before_ms: int) -> int:
    """Forget stored answers older than ``before_ms``; the request ids stay burnt."""
    async with db.write() as tx:
        return await tx.execute("DELETE FROM answer WHERE at_ms < $1", before_ms)
