"""The calls of an account: those of one run with their sum, or all of them, newest first.

A run is found by an index that only holds of a run stand in, so a call without one pays nothing
for it (docs/decisions/0006). All calls are found by the account's statement, which costs nothing
to keep: closed calls in the order in which they ended, and before them those that still run.
What is asked for beyond that (a route, a state, a time) is looked for along the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from gateway.db import Tx
from gateway.ledger import pages
from gateway.ledger.read import Charge
from gateway.ledger.rows import HOLD, TRANSFER, columns, hold_row, transfer_row
from gateway.ledger.steps import HoldRow, TransferRow
from gateway.ledger.store import OPEN_HOLDS

_END: Final = 2**62
_RUNNING: Final = 1_000  # calls that still run, at most, shown
STATES: Final = ("pending", "charged", "not_charged", "refunded")


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which calls are asked for; None: no matter. Times are those at which calls began, in
    milliseconds, ``from_ms`` included and ``to_ms`` not."""

    route: str | None = None
    state: str | None = None
    principal: str | None = None
    price: str | None = None
    from_ms: int | None = None
    to_ms: int | None = None

    def __contains__(self, call: Call) -> bool:
        hold = call.hold
        return (
            (self.route is None or hold.route == self.route)
            and (self.principal is None or hold.principal == self.principal)
            and (self.price is None or hold.price == self.price)
            and (self.from_ms is None or hold.at_ms >= self.from_ms)
            and (self.to_ms is None or hold.at_ms < self.to_ms)
            and (self.state is None or call.charge.state == self.state)
        )


ALL: Final = Wanted()


@dataclass(frozen=True, slots=True)
class Call:
    """One call, and what became of it."""

    hold: HoldRow
    charge: Charge


@dataclass(frozen=True, slots=True)
class RunSum:
    """What the calls of a run came to. Units; ``held_units`` is promised to those that run."""

    calls: int
    charged: int
    not_charged: int
    pending: int
    charged_units: int
    refunded_units: int
    held_units: int
    first_at_ms: int
    last_at_ms: int


RUN_SUM: Final = """SELECT count(*) AS calls,
  sum(CASE WHEN kind = 'capture' THEN 1 ELSE 0 END) AS charged,
  sum(CASE WHEN kind = 'void' THEN 1 ELSE 0 END) AS not_charged,
  sum(CASE WHEN kind IS NULL THEN 1 ELSE 0 END) AS pending,
  coalesce(sum(amount_units), 0) AS charged_units,
  coalesce(sum(refunded), 0) AS refunded_units,
  coalesce(sum(CASE WHEN kind IS NULL THEN max_units END), 0) AS held_units,
  min(at_ms) AS first_at_ms, max(at_ms) AS last_at_ms
FROM (SELECT h.max_units, h.at_ms, t.kind, t.amount_units,
    (SELECT sum(r.amount_units) FROM refund r WHERE r.charge_id = h.id) AS refunded
  FROM hold h LEFT JOIN transfer t ON t.id = h.id
  WHERE h.account_id = $1 AND h.run = $2) AS calls"""

CALLS_OF_RUN: Final = (
    f"SELECT {columns(HOLD)} FROM hold"  # noqa: S608
    " WHERE account_id = $1 AND run = $2 AND id < $3 ORDER BY id DESC LIMIT $4"
)

_CLOSED_CALLS: Final = (
    "WITH RECURSIVE line AS (SELECT * FROM transfer WHERE id = $1 AND account_id = $2"  # noqa: S608
    " UNION ALL SELECT t.* FROM transfer t JOIN line ON t.id = line.prev_id)"
    f" SELECT {columns(TRANSFER)} FROM line WHERE kind IN ('capture', 'void') LIMIT $3"
)


async def run_sum(tx: Tx, account_id: int, run: str) -> RunSum | None:
    """The sum of a run in one query; None if the account has no call of it."""
    row = await tx.fetchrow(RUN_SUM, account_id, run)
    if row is None or not row["calls"]:
        return None
    return RunSum(*(int(value) for value in row))


async def calls_of_run(  # noqa: PLR0917  (as calls)
    tx: Tx, account_id: int, run: str, limit: int, cursor: int | None = None, wanted: Wanted = ALL
) -> pages.Page[Call]:
    """Calls of a run, newest first. A new call never moves those behind a cursor."""

    async def stretch(before: int, most: int) -> pages.Stretch[Call]:
        rows = await tx.fetch(CALLS_OF_RUN, account_id, run, before, most)
        holds = [hold_row(row) for row in rows]
        closes = {row.id: row for row in await _closes(tx, holds)} if holds else {}
        found = await _with_refunds(tx, holds, closes)
        return pages.Stretch(found, holds[-1].id if len(holds) == most else None)

    return await pages.look(stretch, _END if cursor is None else cursor, limit, _only(wanted), _id)


async def calls(
    tx: Tx, account_id: int, limit: int, cursor: int | None = None, wanted: Wanted = ALL
) -> pages.Page[Call]:
    """All calls: those that still run (on the first page, beyond its limit), then the others as
    they ended.

    ``cursor`` is a line of the statement, so pages behind it never change.
    """
    running: tuple[Call, ...] = ()
    if cursor is None:
        head = await tx.fetchval("SELECT last_id FROM account WHERE id = $1", account_id)
        rows = await tx.fetch(
            f"SELECT * FROM ({OPEN_HOLDS}) AS running ORDER BY id DESC LIMIT $2",  # noqa: S608
            account_id,
            _RUNNING,
        )
        running = await _with_refunds(tx, [hold_row(row) for row in rows], {})
    else:
        head = await _line_before(tx, account_id, cursor)

    async def stretch(head: int, most: int) -> pages.Stretch[Call]:
        lines = [transfer_row(row) for row in await tx.fetch(_CLOSED_CALLS, head, account_id, most)]
        if not lines:
            return pages.Stretch((), None)
        rows = await tx.fetch_any(
            f"SELECT {columns(HOLD)} FROM hold WHERE id {{any}}",  # noqa: S608
            [line.id for line in lines],
        )
        holds = {row["id"]: hold_row(row) for row in rows}
        closes = {line.id: line for line in lines}
        found = await _with_refunds(tx, [holds[line.id] for line in lines], closes)
        # Nothing that ended before the time began in it.
        early = wanted.from_ms is not None and lines[-1].at_ms < wanted.from_ms - pages.SKEW_MS
        more = len(lines) == most and not early and lines[-1].prev_id != 0
        return pages.Stretch(found, lines[-1].prev_id if more else None)

    page = await pages.look(stretch, head or 0, limit, _only(wanted), _id)
    now = (call for call in running if call in wanted)
    return pages.Page((*now, *page.rows), page.next_cursor)


def _only(wanted: Wanted) -> Callable[[Call], bool] | None:
    return None if wanted == ALL else wanted.__contains__


def _id(call: Call) -> int:
    return call.hold.id


async def _line_before(tx: Tx, account_id: int, line: int) -> int | None:
    found: int | None = await tx.fetchval(
        "SELECT prev_id FROM transfer WHERE id = $1 AND account_id = $2", line, account_id
    )
    return found


async def _closes(tx: Tx, holds: Sequence[HoldRow]) -> list[TransferRow]:
    rows = await tx.fetch_any(
        f"SELECT {columns(TRANSFER)} FROM transfer WHERE id {{any}}",  # noqa: S608
        [hold.id for hold in holds],
    )
    return [transfer_row(row) for row in rows]


async def _with_refunds(
    tx: Tx, holds: Sequence[HoldRow], closes: dict[int, TransferRow]
) -> tuple[Call, ...]:
    charged = [hold.id for hold in holds if hold.id in closes and closes[hold.id].amount_units]
    refunded: dict[int, int] = {}
    if charged:
        for row in await tx.fetch_any(
            "SELECT charge_id, sum(amount_units) AS units FROM refund WHERE charge_id {any}"
            " GROUP BY charge_id",
            charged,
        ):
            refunded[row["charge_id"]] = int(row["units"])
    return tuple(Call(h, Charge(closes.get(h.id), refunded.get(h.id, 0))) for h in holds)
