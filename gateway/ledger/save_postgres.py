"""Ordinary spending on PostgreSQL: everything a batch writes, in one statement.

Columns go as arrays, one for each column of a table, so the statement is the same whatever the
number of rows. Accounts are updated only where ``ver`` is still what was read; the statement
answers how many that were.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any, Final

from gateway.ledger.book import Book
from gateway.ledger.chain import BATCH
from gateway.ledger.rows import HOLD, TRANSFER, columns

_TEXT: Final = frozenset(
    (
        *("principal", "scheme", "request_id", "route", "method", "target"),
        *("price", "run", "payment_id", "kind", "reason", "headers"),
    )
)
_BYTES: Final = frozenset(("content", "body", "closed", "prev", "hash"))
_ANSWER: Final = ("hold_id", "status", "headers", "body", "at_ms")
_HOUSE: Final = ("account_id", "writer", "balance")


def _type(name: str) -> str:
    if name in _TEXT:
        return "text"
    return "bytea" if name in _BYTES else "bigint"


def statement(spending: Sequence[str]) -> str:
    """The statement; ``spending`` are the columns of an account that it changes."""
    number = count(1)

    def arrays(names: Sequence[str]) -> str:
        return ", ".join(f"${next(number)}::{_type(name)}[]" for name in names)

    def insert(table: str, names: Sequence[str]) -> str:
        return (
            f"INSERT INTO {table} ({columns(names)})"  # noqa: S608  (names of this file)
            f" SELECT {columns(names)} FROM unnest({arrays(names)}) AS n({columns(names)})"
        )

    guarded = ("id", "ver", *spending)
    changes = ", ".join(f"{name} = n.{name}" for name in spending)
    return (
        f"WITH a AS (UPDATE account x SET {changes}, ver = x.ver + 1"  # noqa: S608
        f" FROM unnest({arrays(guarded)}) AS n({columns(guarded)})"
        " WHERE x.id = n.id AND x.ver = n.ver RETURNING 1),"
        f" h AS ({insert('hold', HOLD)}),"
        f" t AS ({insert('transfer', TRANSFER)}),"
        f" w AS ({insert('answer', _ANSWER)}),"
        f" b AS ({insert('batch', BATCH)}),"
        f" s AS ({insert('house_balance', _HOUSE)} ON CONFLICT (account_id, writer)"
        " DO UPDATE SET balance = house_balance.balance + excluded.balance)"
        " SELECT count(*) FROM a"
    )


def parameters(
    accounts: Sequence[tuple[Any, ...]],
    book: Book,
    answers: Sequence[tuple[Any, ...]],
    batch: tuple[Any, ...],
    writer: int,
) -> list[Any]:
    """What belongs to the marks of ``statement``, in their order."""
    house = [(account_id, writer, units) for account_id, units in sorted(book.house.items())]
    tables = (
        (len(accounts[0]), accounts),
        (len(HOLD), book.new_holds),
        (len(TRANSFER), book.new_transfers),
        (len(_ANSWER), answers),
        (len(BATCH), [batch]),
        (len(_HOUSE), [row for row in house if row[2]]),
    )
    made: list[Any] = []
    for width, rows in tables:
        made += zip(*rows, strict=True) if rows else [()] * width
    return made
