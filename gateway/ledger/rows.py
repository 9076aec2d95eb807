"""The ledger's rows as the database has them: column names, and how a row becomes an object."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Final

from gateway.db import Row, Tx
from gateway.ledger.book import AccountState, Book, LotState, PinState
from gateway.ledger.payout_steps import PayoutEndRow, PayoutRow
from gateway.ledger.steps import HoldRow, RefundRow, TransferRow

HOLD: Final = HoldRow._fields
TRANSFER: Final = TransferRow._fields
ACCOUNT: Final = tuple(f.name for f in fields(AccountState) if f.name != "touched")
LOT: Final = tuple(f.name for f in fields(LotState) if f.name not in ("new", "touched"))
REFUND: Final = tuple(f.name for f in fields(RefundRow))
PAYOUT: Final = tuple(f.name for f in fields(PayoutRow))
PAYOUT_END: Final = tuple(f.name for f in fields(PayoutEndRow))
PIN: Final = ("hold_id", "lot_id", "amount_units", "captured_units")


def columns(names: Sequence[str], table: str = "") -> str:
    """``a.x, a.y`` for a SELECT."""
    dot = f"{table}." if table else ""
    return ", ".join(dot + name for name in names)


def insert(table: str, names: Sequence[str]) -> str:
    """An INSERT of all columns, in their order."""
    marks = ", ".join(f"${i + 1}" for i in range(len(names)))
    return f"INSERT INTO {table} ({columns(names)}) VALUES ({marks})"  # noqa: S608


def of_kind(first: int) -> str:
    """The condition of ``Only`` on lots; its three parameters begin with ``$first``."""
    return (
        f"id = coalesce(${first}, id) AND source = coalesce(${first + 1}, source)"
        f" AND (CAST(${first + 2} AS TEXT) IS NULL OR payer = ${first + 2})"
    )


SELECT_TRANSFERS: Final = f"SELECT {columns(TRANSFER)} FROM transfer WHERE id {{any}}"  # noqa: S608


def hold_row(row: Row) -> HoldRow:
    """A hold from a row whose columns are ``HOLD``, in that order."""
    return HoldRow._make(row)


def transfer_row(row: Row) -> TransferRow:
    """A transfer from a row whose columns are ``TRANSFER``, in that order."""
    return TransferRow._make(row)


def add_lots(book: Book, rows: Iterable[Row]) -> list[LotState]:
    """Lots from rows whose columns are ``LOT``; one that is in the book stays the one it is."""
    return [book.lot.setdefault(row[0], LotState(*row)) for row in rows]


async def load_transfers(tx: Tx, book: Book, ids: Sequence[int]) -> None:
    """How these holds ended, if they have."""
    for row in await tx.fetch_any(SELECT_TRANSFERS, ids):
        book.closes[row[0]] = TransferRow._make(row)


async def load_pins(tx: Tx, book: Book, hold_ids: Iterable[int]) -> None:
    """The pins of these holds, but for those that are in the book."""
    missing = [hold_id for hold_id in hold_ids if hold_id not in book.pins]
    if not missing:
        return
    for row in await tx.fetch_any(
        f"SELECT {columns(PIN, 'p')}, l.expires_ms FROM pin p JOIN lot l ON l.id = p.lot_id"  # noqa: S608
        " WHERE p.hold_id {any}",
        missing,
    ):
        pin = PinState(*(row[name] for name in (*PIN, "expires_ms")))
        book.pins.setdefault(pin.hold_id, []).append(pin)
