"""An account's statement for a reader: each line with what it was for, filtered and paged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from gateway.db import Tx
from gateway.ledger import pages, read
from gateway.ledger.rows import HOLD, columns, hold_row
from gateway.ledger.steps import HoldRow, TransferRow

_BY_SOURCE: Final = {"grant": "bonus", "plan": "subscription_credit", "topup": "auto_top_up"}
_BY_KIND: Final = {"capture": "usage", "void": "usage"}
TYPES: Final = (
    *("usage", "purchase", "bonus", "subscription_credit", "auto_top_up", "refund"),
    *("expire", "unexpire", "freeze", "unfreeze", "reverse", "restore", "debt", "forgive"),
    *("repay", "unrepay", "loss", "recover", "withhold", "release", "payout"),
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
) -> pages.Page[Line]:
    """Lines, newest first. ``cursor``: the line behind which the page begins."""

    async def stretch(behind: int, most: int) -> pages.Stretch[Line]:
        rows = await read.statement(tx, account_id, most, behind or None)
        # Lines stand nearly in the order of their times.
        since_ms = 0 if wanted.from_ms is None else wanted.from_ms - pages.SKEW_MS
        early = rows and rows[-1].at_ms < since_ms
        more = len(rows) == most and not early and rows[-1].prev_id != 0
        return pages.Stretch(await _told(tx, rows), rows[-1].id if more else None)

    only = None if wanted == ALL else wanted.__contains__
    return await pages.look(stretch, cursor or 0, limit, only, lambda line: line.transfer.id)


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
