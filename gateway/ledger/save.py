"""Write a book back. Every row that changes is guarded by the version that was read."""

from __future__ import annotations

import json
from functools import lru_cache
from operator import attrgetter
from typing import Final

from gateway.db import Tx
from gateway.ledger import rare, save_postgres
from gateway.ledger.book import Book, LedgerFault
from gateway.ledger.chain import Chain, append, make
from gateway.ledger.rows import ACCOUNT, HOLD, LOT, PIN, TRANSFER, columns, insert

# A hold is seldom of a run or of a payment, a transfer seldom has a reason. sqlite3 takes its time
# over a None, so those columns, which come last, are left out where they are empty.
_SHORT_HOLD: Final = len(HOLD) - 2
_SHORT_TRANSFER: Final = len(TRANSFER) - 1
_INSERT_HOLD: Final = insert("hold", HOLD)
_INSERT_SHORT_HOLD: Final = insert("hold", HOLD[:_SHORT_HOLD])
_INSERT_TRANSFER: Final = insert("transfer", TRANSFER)
_INSERT_SHORT_TRANSFER: Final = insert("transfer", TRANSFER[:_SHORT_TRANSFER])
_INSERT_ALIAS: Final = insert("request_alias", ("account_id", "principal", "alias", "hold_id"))
_INSERT_LIMIT: Final = insert("hold_limit", ("hold_id", "lot_id", "source", "payer", "session"))
_INSERT_BREAKDOWN: Final = insert("breakdown", ("hold_id", "amount_units", "lines"))
_INSERT_ANSWER: Final = insert("answer", ("hold_id", "status", "headers", "body", "at_ms"))
_INSERT_LOT: Final = insert("lot", LOT)
_INSERT_PIN: Final = insert("pin", PIN)
_CHANGING_LOT: Final = (
    *("id", "remaining_units", "state", "expired_units"),
    *("reversed_units", "short_units", "repaid_units", "outgoing_units", "paid_out_units"),
    "lost_units",
)
# Of an answer's header fields as text, so that the cache of those is below 2 MB.
_LONGEST_KEPT: Final = 1_024
_PAIR: Final = 8  # what a pair has around its two texts
_UPDATE_LOT: Final = (
    f"UPDATE lot SET {', '.join(f'{n} = ${i + 1}' for i, n in enumerate(_CHANGING_LOT) if i)}"  # noqa: S608
    " WHERE id = $1"
)
_changing_lot: Final = attrgetter(*_CHANGING_LOT)


async def save(tx: Tx, book: Book, writer: int, chain: Chain | None) -> None:
    """Write the book back. Raises ``LedgerFault`` if a row is not as we read it."""
    if tx.dialect == "postgres" and _is_spending(book):
        await _save_spending(tx, book, writer, chain)
        return
    if book.new_holds:
        await _save_holds(tx, book)
    if book.new_aliases:
        rows = [(*key, hold_id) for key, hold_id in book.new_aliases]
        await tx.executemany(_INSERT_ALIAS, rows)
    if book.new_transfers:
        await _save_transfers(tx, book)
    if book.lots or book.pins or book.new_mints:
        await _save_lots(tx, book)
        await _save_pins(tx, book)
    if book.new_limits:
        await tx.executemany(_INSERT_LIMIT, book.new_limits)
    if book.rare is not None:
        await rare.save(tx, book, book.rare)
    if book.new_breakdowns:
        await tx.executemany(_INSERT_BREAKDOWN, book.new_breakdowns)
    if book.new_answers:
        await tx.executemany(_INSERT_ANSWER, _answers(book))
    await _save_accounts(tx, book)
    await _save_house(tx, book, writer)
    await append(tx, book, chain)


async def _save_holds(tx: Tx, book: Book) -> None:
    full = [row for row in book.new_holds if row.run is not None or row.payment_id is not None]
    if len(full) < len(book.new_holds):
        short = [
            # A bytearray is bound as it is; sqlite3 looks for an adapter for bytes.
            (*row[:5], bytearray(row.content), *row[6:_SHORT_HOLD])
            for row in book.new_holds
            if row.run is None and row.payment_id is None
        ]
        await tx.executemany(_INSERT_SHORT_HOLD, short)
    if full:
        await tx.executemany(_INSERT_HOLD, full)


async def _save_transfers(tx: Tx, book: Book) -> None:
    full = [row for row in book.new_transfers if row.reason is not None]
    if len(full) < len(book.new_transfers):
        short = [row[:_SHORT_TRANSFER] for row in book.new_transfers if row.reason is None]
        await tx.executemany(_INSERT_SHORT_TRANSFER, short)
    if full:
        await tx.executemany(_INSERT_TRANSFER, full)


def _answers(book: Book) -> list[tuple[int, int, str, bytes | None, int]]:
    return [
        (hold_id, a.status, _headers_text(a.headers), a.body, book.now_ms)
        for hold_id, a in book.new_answers
    ]


def _headers_text(headers: tuple[tuple[str, str], ...]) -> str:
    # Upstreams make them, some with texts of their callers: long ones are not kept.
    if sum([len(name) + len(value) + _PAIR for name, value in headers]) > _LONGEST_KEPT:
        return json.dumps(headers)
    return _kept_text(headers)


@lru_cache(maxsize=512)
def _kept_text(headers: tuple[tuple[str, str], ...]) -> str:
    return json.dumps(headers)


async def _save_lots(tx: Tx, book: Book) -> None:
    new = [lot for lot in book.lot.values() if lot.new]
    changed = [lot for lot in book.lot.values() if lot.touched and not lot.new]
    if new:
        await tx.executemany(_INSERT_LOT, [[getattr(x, n) for n in LOT] for x in new])
    if changed:
        await tx.executemany(_UPDATE_LOT, [_changing_lot(lot) for lot in changed])
    if book.new_segments:
        await tx.executemany(
            insert("segment", ("account_id", "from_pos", "to_pos", "lot_id")),
            [(s.account_id, s.from_pos, s.to_pos, s.lot_id) for s in book.new_segments],
        )
    if book.new_mints:
        await tx.executemany(
            insert("mint_key", ("network", "ref", "n", "lot_id")),
            [(*key, lot_id) for key, lot_id in book.new_mints],
        )


async def _save_pins(tx: Tx, book: Book) -> None:
    every = [pin for pins in book.pins.values() for pin in pins]
    new = [pin for pin in every if pin.new]
    changed = [pin for pin in every if pin.touched and not pin.new]
    if new:
        await tx.executemany(_INSERT_PIN, [[getattr(p, name) for name in PIN] for p in new])
    if changed:
        await tx.executemany(
            "UPDATE pin SET captured_units = $3, amount_units = $4"
            " WHERE hold_id = $1 AND lot_id = $2",
            [(p.hold_id, p.lot_id, p.captured_units, p.amount_units) for p in changed],
        )


# What spending changes. The other columns change only where lots or pins are in the book too, or
# something rare is: nothing gets at them otherwise.
_SPENDING: Final = ("available", "held", "spent", "pos", "seq", "last_id")
_CHANGING: Final = tuple(n for n in ACCOUNT if n not in ("id", "ver"))


class _Update:
    """The statement that writes some columns of accounts, for both dialects."""

    def __init__(self, names: tuple[str, ...]) -> None:
        guarded = ("id", "ver", *names)
        self.values = attrgetter(*guarded)
        marks = ", ".join(f"${i + 1}::bigint[]" for i in range(len(guarded)))
        self.postgres = (
            f"UPDATE account a SET {', '.join(f'{n} = n.{n}' for n in names)}, ver = a.ver + 1"  # noqa: S608
            f" FROM unnest({marks}) AS n({columns(guarded)}) WHERE a.id = n.id AND a.ver = n.ver"
        )
        self.sqlite = (
            f"UPDATE account SET {', '.join(f'{n} = ${i + 3}' for i, n in enumerate(names))},"  # noqa: S608
            " ver = $2 + 1 WHERE id = $1 AND ver = $2"
        )


_SPENT: Final = _Update(_SPENDING)
_CHANGED: Final = _Update(_CHANGING)
_SAVE_SPENDING: Final = save_postgres.statement(_SPENDING)


def _has_more(book: Book) -> bool:
    """Whether other columns of an account than ``_SPENDING`` may have changed."""
    return bool(book.lots or book.pins) or book.rare is not None


def _is_spending(book: Book) -> bool:
    written = bool(book.new_holds or book.new_transfers)
    more = book.new_aliases or book.new_mints or book.new_breakdowns
    return written and not (_has_more(book) or more)


async def _save_spending(tx: Tx, book: Book, writer: int, chain: Chain | None) -> None:
    touched = [a for a in book.accounts.values() if a.touched]
    batch = await make(tx, book, chain)
    # In the order of their ids: two that update the same accounts must not wait for each other.
    accounts = sorted(map(_SPENT.values, touched))
    values = save_postgres.parameters(accounts, book, _answers(book), batch, writer)
    if await tx.fetchval(_SAVE_SPENDING, *values) != len(touched):
        raise LedgerFault("an account changed under our lock")
    for account in touched:
        account.touched = False
        account.ver += 1


async def _save_accounts(tx: Tx, book: Book) -> None:
    touched = [a for a in book.accounts.values() if a.touched]
    if not touched:
        return
    # Absolute values are safe only because the row is still the one we read: ver says so.
    update = _CHANGED if _has_more(book) else _SPENT
    values = map(update.values, touched)
    if tx.dialect == "postgres":
        count = await tx.execute(update.postgres, *map(list, zip(*values, strict=True)))
    else:
        count = await tx.executemany(update.sqlite, values)
    if count != len(touched):
        raise LedgerFault("an account changed under our lock")
    for account in touched:
        account.touched = False
        account.ver += 1


async def _save_house(tx: Tx, book: Book, writer: int) -> None:
    for account_id, gained in sorted(book.house.items()):
        if gained:
            await tx.execute(
                "INSERT INTO house_balance (account_id, writer, balance) VALUES ($1, $2, $3)"
                " ON CONFLICT (account_id, writer)"
                " DO UPDATE SET balance = house_balance.balance + excluded.balance",
                account_id,
                writer,
                gained,
            )
