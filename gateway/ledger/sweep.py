"""Holds whose owner died: found without an index, ended when their lease is over."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Final, TypeVar

from gateway.db import CommitUnknown, Database, DatabaseUnavailable, Tx, transact
from gateway.ledger.apply import apply
from gateway.ledger.ids import SETTLED_AFTER_MS, settled_below
from gateway.ledger.rows import HOLD, columns, hold_row
from gateway.ledger.steps import NEVER, Close, Closed, Expire, HoldRow, Outcome
from gateway.observe import log

INTERRUPTED = "interrupted"
# After its lease a hold is left alone for this long: clocks of two nodes are not one.
LAPSE_MARGIN_MS: Final = 2_000
PAUSE_MS: Final = 10_000  # so much longer between two looks than their period is a pause
_STRIDE = 20_000
_DUE = 500  # steps in one transaction
_PAGES = 20  # how far a sweep looks behind those that cannot be applied
S = TypeVar("S", Close, Expire)


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


async def drop_leases(tx: Tx, now_ms: int) -> None:
    """Every hold that is open now has no owner: let the sweeper take it at once.

    Only where it is certain that whoever took one is dead, and before this process takes any.
    """
    lease_ms = now_ms - LAPSE_MARGIN_MS - 1
    await tx.execute(
        "INSERT INTO open_hold (hold_id, account_id, lease_ms)"
        " SELECT h.id, h.account_id, $1 FROM hold h LEFT JOIN transfer t ON t.id = h.id"
        " WHERE h.id >= (SELECT next FROM sequence WHERE name = 'swept') AND t.id IS NULL"
        " ON CONFLICT (hold_id) DO NOTHING",
        lease_ms,
    )
    await tx.execute("UPDATE open_hold SET lease_ms = $1 WHERE lease_ms > $1", lease_ms)


async def renew(db: Database, holds: Sequence[HoldRow], lease_ms: int) -> None:
    """The live owner of long calls speaks for their holds again, for ``lease_ms`` from now.

    Only holds that have lived for a quarter of their lease are written. One that was closed
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
                if now_ms - hold.at_ms >= (hold.lease_ms - hold.at_ms) // 4
            ],
        )


class Patience:
    """Whether everybody who lives has had the time to renew its leases lately.

    That a lease is over says nothing where its owner could not renew it: the database was away, or
    its clock was put forward, or the machine stood still. Then nobody looked at leases either. So
    after a pause between two looks the owners come first: nothing is void until the looks have gone
    on for a third of a lease, in which an owner renews several times. All by the database's clock.

    ``others``: holds of other processes may be open when this one begins.
    """

    def __init__(self, period_s: int, lease_s: int, *, others: bool) -> None:
        self.grace_ms = min(lease_s * 1_000 // 3, 15_000)
        # Shorter ones no lease ends in; below two seconds a busy machine pauses all the time.
        self._most_ms = period_s * 1_000 + min(max(lease_s * 250, 2_000), PAUSE_MS)
        self._looked_ms: int | None = None
        self._since_ms: int | None = None if others else 0

    def is_over(self, now_ms: int) -> bool:
        """At the beginning of a look: whether what has lapsed may be void."""
        last_ms = self._looked_ms
        paused = last_ms is not None and not 0 <= now_ms - last_ms <= self._most_ms
        if self._since_ms is None or paused:
            self._since_ms = now_ms
        self._looked_ms = now_ms
        return now_ms - self._since_ms >= self.grace_ms

    def looked(self, now_ms: int) -> None:
        """At its end: what the look itself took is no pause."""
        self._looked_ms = now_ms


async def void_lapsed(db: Database, margin_ms: int) -> list[HoldRow]:
    """Void the holds whose lease has been over for ``margin_ms``. Returns them.

    The owner may close its hold at the same moment: both write the row with the hold's id, and
    the primary key decides.
    """
    await transact(db, _forget_closed)
    voided: list[HoldRow] = []
    after = (0, 0)
    for _ in range(_PAGES):
        async with db.read() as tx:
            rows = await tx.fetch(
                f"SELECT {columns(HOLD, 'h')} FROM open_hold o JOIN hold h ON h.id = o.hold_id"  # noqa: S608
                " WHERE o.lease_ms < $1 AND (h.account_id, h.id) > ($2, $3)"
                " ORDER BY h.account_id, h.id LIMIT $4",
                await tx.now_ms() - margin_ms,
                *after,
                _DUE,
            )
        holds = [hold_row(row) for row in rows]
        steps = {h.id: Close(h, void_reason=INTERRUPTED, if_lapsed=True) for h in holds}
        ended = await _apply_all(db, [(h.account_id, steps[h.id]) for h in holds])
        voided += [h for h in holds if isinstance(ended.get(steps[h.id]), Closed)]
        if len(holds) < _DUE or len(voided) >= _DUE:
            break
        after = (holds[-1].account_id, holds[-1].id)
    return voided


async def _forget_closed(tx: Tx) -> None:
    await tx.execute(
        "DELETE FROM open_hold WHERE hold_id IN (SELECT o.hold_id FROM open_hold o"
        " JOIN transfer t ON t.id = o.hold_id)"
    )


# Along the partial index, which knows the same bound (tables.py).
DUE_ACCOUNTS: Final = (
    "SELECT next_expiry_ms, id FROM account WHERE next_expiry_ms <= $1"  # noqa: S608
    f" AND next_expiry_ms < {NEVER} AND (next_expiry_ms, id) > ($2, $3)"
    " ORDER BY next_expiry_ms, id LIMIT $4"
)


async def expire_due(db: Database) -> int:
    """Expire what is due on accounts that nobody touches. Returns how many accounts."""
    expired, after = 0, (0, 0)
    for _ in range(_PAGES):
        async with db.read() as tx:
            rows = await tx.fetch(DUE_ACCOUNTS, await tx.now_ms(), *after, _DUE)
        expired += len(await _apply_all(db, [(row["id"], Expire(row["id"])) for row in rows]))
        if len(rows) < _DUE or expired >= _DUE:
            break
        after = (rows[-1]["next_expiry_ms"], rows[-1]["id"])
    return expired


async def _apply_all(db: Database, steps: Sequence[tuple[int, S]]) -> dict[S, Outcome]:
    """Apply steps, each beside its account, together; if that cannot be, account by account.

    A fault of one account is logged and holds up no other. Raises ``DatabaseUnavailable``.
    """
    if not steps:
        return {}
    try:
        return await _apply_some(db, [step for _, step in steps])
    except (DatabaseUnavailable, CommitUnknown):
        raise
    except Exception as error:
        if len({account for account, _ in steps}) == 1:
            log.error("account %d cannot be swept: %s", steps[0][0], error)
            return {}
    done: dict[S, Outcome] = {}
    for _, mine in groupby(steps, key=lambda each: each[0]):
        done |= await _apply_all(db, list(mine))
    return done


async def _apply_some(db: Database, steps: list[S]) -> dict[S, Outcome]:
    async def work(tx: Tx) -> list[Outcome]:
        return await apply(tx, steps, await tx.now_ms())

    return dict(zip(steps, await transact(db, work), strict=True))


async def purge_answers(db: Database, before_ms: int) -> int:
    """Forget stored answers older than ``before_ms``; the request ids stay burnt."""
    async with db.write() as tx:
        return await tx.execute("DELETE FROM answer WHERE at_ms < $1", before_ms)
