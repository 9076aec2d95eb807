"""An account's statement for a reader: each line with what it was for, filtered and paged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from gateway.db import Tx
from gateway.ledger import read
from gateway.ledger.rows import HOLD, columns, hold_row
from gateway.ledger.steps import HoldRow, TransferRow

_STRETCH: Final = 500  # lines read at once while a filter looks for its rows
_STRETCHES: Final = 20  # at most for one page, which may then be a short one with a cursor
_SKEW_MS: Final = 60_000  # by which clocks of nodes may differ
_BY_SOURCE: Final = {"grant": "bonus", "plan": "subscription_credit", "topup": "auto_top_up"}
_BY_KIND: Final = {"capture": "usage", "void": "usage"}
TYPES: Final = (
    *("usage", "purchase", "bonus", "subscription_credit", "auto_top_up", "refund"),
    *("expire", "unexpire", "freeze", "unfreeze", "reverse", "restore", "debt", "forgive"),
    *("repay", "unrepay", "withhold", "release", "payout"),
)
"""What a line can be of. The last two rows are the ledger's own words for what is seldom seen."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line: the transfer, its type, and the call or the lot's source that it was for."""

    transfer: TransferRow
    type: str
    call: HoldRow | None
    source: str | None


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which lines are asked for; None: no matter. ``from_ms`` is included, ``to_ms`` is not."""

    type: str | None = None
    from_ms: int | None = None
    to_ms: int | None = None

    def __contains__(self, line: Line) -> bool:
        at_ms = line.transfer.at_ms
        return (
            (self.type is None or line.type == self.type)
            and (self.from_ms is None or at_ms >= self.from_ms)
            and (self.to_ms is None or at_ms < self.to_ms)
        )


ALL: Final = Wanted()


async def page(
    tx: Tx, account_id: int, limit: int, cursor: int | None = None, wanted: Wanted = ALL
) -> tuple[Sequence[Line], int | None]:
    """Lines, newest first, and the cursor behind which the next page begins (None: none does)."""
    found: list[Line] = []
    stretch = limit if wanted == ALL else _STRETCH
    for _ in range(_STRETCHES):
        rows = await read.statement(tx, account_id, stretch, cursor)
        for line in await _told(tx, rows):
            cursor = line.transfer.id
            if line in wanted:
                found.append(line)
            if len(found) == limit:
                return found, cursor if line.transfer.prev_id else None
        early = wanted.from_ms is not None and rows and rows[-1].at_ms < wanted.from_ms - _SKEW_MS
        if early or len(rows) < stretch:
            return found, None
    return found, cursor


async def _told(tx: Tx, rows: Sequence[TransferRow]) -> list[Line]:
    """The lines with what they were for."""
    calls: dict[int, HoldRow] = {}
    sources: dict[int, str] = {}
    of_calls = [row.ref for row in rows if row.kind in ("capture", "void", "refund")]
    if of_calls:
        for row in await tx.fetch_any(
            f"SELECT {columns(HOLD)} FROM hold WHERE id {{any}}",  # noqa: S608
            of_calls,
        ):
            calls[row["id"]] = hold_row(row)
    mints = [row.ref for row in rows if row.kind == "mint"]
    if mints:
        for row in await tx.fetch_any("SELECT id, source FROM lot WHERE id {any}", mints):
            sources[row["id"]] = row["source"]
    return [
        Line(
            row,
            _type(row, sources.get(row.ref)),
            calls.get(row.ref) if row.kind in ("capture", "void", "refund") else None,
            sources.get(row.ref) if row.kind == "mint" else None,
        )
        for row in rows
    ]


def _type(row: TransferRow, source: str | None) -> str:
    if row.kind == "mint":
        return _BY_SOURCE.get(source or "", "purchase")
    return _BY_KIND.get(row.kind, row.kind)
