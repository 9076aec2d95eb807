"""The calls of an account: those of one run with their sum, or all of them, newest first.

A run is found by an index that only holds of a run stand in, so a call without one pays nothing
for it (docs/decisions/0006). All calls are found by the account's statement, which costs nothing
to keep: closed calls in the order in which they ended, and before them those that still run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from gateway.db import Tx
from gateway.ledger.read import Charge
from gateway.ledger.rows import HOLD, TRANSFER, columns, hold_row, transfer_row
from gateway.ledger.steps import HoldRow, TransferRow
from gateway.ledger.store import OPEN_HOLDS

_END: Final = 2**62


@dataclass(frozen=True, slots=True)
class Call:
    """One call, and what became of it."""

    hold: HoldRow
    charge: Charge


@dataclass(frozen=True, slots=True)
class Page:
    """Some calls, and the cursor behind which the next page begins; None: there is none."""

    calls: tuple[Call, ...]
    next_cursor: int | None


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


async def calls_of_run(
    tx: Tx, account_id: int, run: str, limit: int, cursor: int | None = None
) -> Page:
    """Calls of a run, newest first. A new call never moves those behind a cursor."""
    before = _END if cursor is None else cursor
    rows = await tx.fetch(CALLS_OF_RUN, account_id, run, before, limit)
    holds = [hold_row(row) for row in rows]
    closes: dict[int, TransferRow] = {}
    if holds:
        closes = {row.id: row for row in await _closes(tx, holds)}
    calls = await _with_refunds(tx, holds, closes)
    return Page(calls, holds[-1].id if len(holds) == limit else None)


async def calls(tx: Tx, account_id: int, limit: int, cursor: int | None = None) -> Page:
    """All calls: those that still run (on the first page), then the others as they ended.

    ``cursor`` is a line of the statement, so pages behind it never change.
    """
    open_holds: list[HoldRow] = []
    if cursor is None:
        head = await tx.fetchval("SELECT last_id FROM account WHERE id = $1", account_id)
        rows = await tx.fetch(
            f"SELECT * FROM ({OPEN_HOLDS}) AS running ORDER BY id DESC LIMIT $2",  # noqa: S608
            account_id,
            limit,
        )
        open_holds = [hold_row(row) for row in rows]
    else:
        head = await tx.fetchval(
            "SELECT prev_id FROM transfer WHERE id = $1 AND account_id = $2", cursor, account_id
        )
    lines = [
        transfer_row(row) for row in await tx.fetch(_CLOSED_CALLS, head or 0, account_id, limit)
    ]
    found: dict[int, HoldRow] = {}
    if lines:
        rows = await tx.fetch_any(
            f"SELECT {columns(HOLD)} FROM hold WHERE id {{any}}",  # noqa: S608
            [line.id for line in lines],
        )
        found = {row["id"]: hold_row(row) for row in rows}
    closes = {line.id: line for line in lines}
    made = await _with_refunds(tx, [*open_holds, *(found[line.id] for line in lines)], closes)
    return Page(made, lines[-1].id if len(lines) == limit else None)


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
