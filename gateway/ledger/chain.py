"""A hash over everything a transaction wrote, and over the one before it.

Every application of steps that writes holds or transfers is one *batch* row: which ids it took,
which holds it closed, and the hash. A changed, added, missing or moved row makes its batch's hash
another one; a batch that is missing, doubled or moved breaks its chain. Whoever can write to the
database can make the chain anew, so it proves as much as the heads that were kept elsewhere
(``farebox ledger export`` writes the rows).

Every ``Writer`` has a chain of its own, so nobody waits for anybody. Who writes rarely shares
chain 0, behind a lock.

The batch is also the mark by which a commit is known: when the connection is lost inside COMMIT,
its key is there or it is not (``Tx.marked_by``).

The hash is sha256 over ``prev`` and the text of the batch. That text is fields, each followed by
NUL: ``farebox batch 2``, writer, n, first_id, end_id, at_ms, the number of holds and that of
transfers; then all columns of the holds and of the transfers, by id. Numbers are decimal, bytes
hexadecimal, and a column that may be null is empty, or ``=`` and its text. No text has a NUL.
A batch none of whose holds has a price version says ``farebox batch 1`` and leaves that column
out: so they were written before holds had one.
"""

from __future__ import annotations

import hashlib
import struct
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from gateway.db import Row, Tx
from gateway.ledger.book import Book, LedgerFault
from gateway.ledger.rows import (
    HOLD,
    SELECT_TRANSFERS,
    TRANSFER,
    columns,
    hold_row,
    insert,
    transfer_row,
)
from gateway.ledger.steps import HoldRow, TransferRow

R = TypeVar("R", HoldRow, TransferRow)

START: Final = bytes(32)  # prev of a chain's first batch
SHARED: Final = 0  # the chain of all that are no Writer
BATCH: Final = ("writer", "n", "first_id", "end_id", "closed", "at_ms", "prev", "hash")

_INSERT: Final = insert("batch", BATCH)
_LOCK: Final = 0x6661_7265_0001  # "fare", 1
CLOSES: Final = ("capture", "void")

_HEAD: Final = "farebox batch %d\0" + "%d\0" * 7
_HOLD: Final = "%d\0%d\0%s\0%s\0%s\0%s\0%d\0%d\0%d\0%d\0%d\0%s\0%s\0%s\0%s\0%s\0%s\0"
_UNPRICED_HOLD: Final = _HOLD.removesuffix("%s\0")
_TRANSFER: Final = "%d\0%s\0%d\0%d\0%d\0%d\0%d\0%d\0%d\0%d\0%d\0%d\0%d\0%s\0"


@dataclass(slots=True)
class Chain:
    """Where a writer's chain stands. It moves on only when a batch is committed."""

    writer: int
    n: int = 0
    hash: bytes = START


def digest(
    prev: bytes,
    numbers: tuple[int, int, int, int, int],
    holds: Sequence[HoldRow],
    transfers: Sequence[TransferRow],
) -> bytes:
    """The hash of a batch. ``numbers``: writer, n, first_id, end_id, at_ms. Rows by id.

    Raises ``LedgerFault`` for text with a NUL: two rows could then read the same.
    """
    priced = any(hold.price is not None for hold in holds)
    parts = [_HEAD % (1 + priced, *numbers, len(holds), len(transfers))]
    if priced:
        parts += [_HOLD % (*h[:5], h.content.hex(), *h[6:14], *map(_maybe, h[14:])) for h in holds]
    else:
        parts += [
            _UNPRICED_HOLD % (*h[:5], h.content.hex(), *h[6:14], *map(_maybe, h[15:]))
            for h in holds
        ]
    parts += [_TRANSFER % (*row[:13], _maybe(row.reason)) for row in transfers]
    text = "".join(parts)
    columns_of_hold = len(HOLD) - (not priced)
    if text.count("\0") != 8 + columns_of_hold * len(holds) + len(TRANSFER) * len(transfers):
        raise LedgerFault("a text of this batch has a NUL in it")
    return hashlib.sha256(prev + text.encode()).digest()


def _maybe(text: str | None) -> str:
    return "" if text is None else f"={text}"


async def make(tx: Tx, book: Book, chain: Chain | None) -> tuple[Any, ...]:
    """The batch of a book as a row (``BATCH``) to be written. ``chain`` None: the shared one."""
    if chain is None:
        writer, n, prev = SHARED, *await _shared_head(tx)
    else:
        writer, n, prev = chain.writer, chain.n, chain.hash
    n += 1
    transfers = sorted(book.new_transfers)
    closed = [row.id for row in transfers if row.kind in CLOSES]
    first, end, at_ms = book.taken.start, book.taken.stop, book.now_ms
    made = digest(prev, (writer, n, first, end, at_ms), book.new_holds, transfers)
    packed = struct.pack(f">{len(closed)}q", *closed)
    tx.marked_by(_INSERT, writer, n, first, end, b"", at_ms, prev, b"")
    if chain is not None:

        def advance() -> None:
            chain.n, chain.hash = n, made

        tx.after_commit(advance)
    return (writer, n, first, end, packed, at_ms, prev, made)


async def append(tx: Tx, book: Book, chain: Chain | None) -> None:
    """Write the batch of a book, if it has anything."""
    if book.new_holds or book.new_transfers:
        await tx.execute(_INSERT, *await make(tx, book, chain))


async def _shared_head(tx: Tx) -> tuple[int, bytes]:
    if tx.dialect == "postgres":
        # In a statement of its own: the next one must see what the one waited for has committed.
        await tx.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
    row = await tx.fetchrow(
        "SELECT n, hash FROM batch WHERE writer = $1 ORDER BY n DESC LIMIT 1", SHARED
    )
    return (0, START) if row is None else (row["n"], bytes(row["hash"]))


MOST_FAULTS: Final = 20
_PAGE: Final = 200
_MOST_ROWS: Final = 200_000  # of one page: more are found only where a batch is a forged one


@dataclass(slots=True)
class Faults:
    """What is wrong with the chains: batches, and how many rows are in none."""

    broken: list[dict[str, object]] = field(default_factory=list)
    unchained: list[dict[str, object]] = field(default_factory=list)


async def check(tx: Tx) -> Faults:
    """Compare every batch with its rows, some hundred at a time, in one snapshot."""
    faults = Faults()
    counted = {"hold": 0, "transfer": 0}
    at, chain = (-1, 0), Chain(-1)
    while len(faults.broken) < MOST_FAULTS:
        batches = await tx.fetch(
            f"SELECT {columns(BATCH)} FROM batch WHERE (writer, n) > ($1, $2)"  # noqa: S608
            f" ORDER BY writer, n LIMIT {_PAGE}",
            *at,
        )
        if not batches:
            break
        page = await _page(tx, batches)
        for batch in batches:
            writer, n = at = (batch["writer"], batch["n"])
            if writer != chain.writer:
                chain = Chain(writer)
            holds, transfers = page.rows_of(batch)
            counted["hold"] += len(holds)
            counted["transfer"] += len(transfers)
            why = _fault(chain, batch, holds, transfers)
            if why is not None:
                faults.broken.append({"writer": writer, "n": n, "why": why})
            chain.n, chain.hash = n, bytes(batch["hash"])
    if not faults.broken:  # else the numbers say nothing new
        faults.unchained = [
            each for table, count in counted.items() if (each := await _rest(tx, table, count))
        ]
    return faults


@dataclass(slots=True)
class _Page:
    """The rows of some batches, by id."""

    holds: list[HoldRow]
    made: list[TransferRow]  # in the batches' stretches of ids, other than closes
    closes: dict[int, TransferRow]

    def rows_of(self, batch: Row) -> tuple[list[HoldRow], list[TransferRow]]:
        transfers = _within(self.made, batch)
        transfers += [self.closes[i] for i in _closed(batch) if i in self.closes]
        return _within(self.holds, batch), sorted(transfers)


def _within(rows: list[R], batch: Row) -> list[R]:
    start, end = (
        bisect_left(rows, id_, key=lambda row: row.id)
        for id_ in (batch["first_id"], batch["end_id"])
    )
    return rows[start:end]


def _closed(batch: Row) -> tuple[int, ...]:
    packed = bytes(batch["closed"])
    return struct.unpack(f">{len(packed) // 8}q", packed[: len(packed) // 8 * 8])


async def _page(tx: Tx, batches: Sequence[Row]) -> _Page:
    page = _Page([], [], {})
    for start, end in _stretches(batches):
        for table, names in (("hold", HOLD), ("transfer", TRANSFER)):
            rows = await tx.fetch(
                f"SELECT {columns(names)} FROM {table} WHERE id >= $1 AND id < $2"  # noqa: S608
                f" ORDER BY id LIMIT {_MOST_ROWS}",
                start,
                end,
            )
            if table == "hold":
                page.holds += map(hold_row, rows)
            else:
                made = map(transfer_row, rows)
                page.made += [row for row in made if row.kind not in CLOSES]
    closed = [i for batch in batches for i in _closed(batch)]
    for row in await tx.fetch_any(SELECT_TRANSFERS, closed):
        close = transfer_row(row)
        if close.kind in CLOSES:
            page.closes[close.id] = close
    page.holds.sort()
    page.made.sort()
    return page


def _stretches(batches: Iterable[Row]) -> list[tuple[int, int]]:
    """Their stretches of ids; those of one writer mostly continue each other."""
    found: list[tuple[int, int]] = []
    for start, end in sorted((batch["first_id"], batch["end_id"]) for batch in batches):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def _fault(
    chain: Chain, batch: Row, holds: list[HoldRow], transfers: list[TransferRow]
) -> str | None:
    n, prev = batch["n"], bytes(batch["prev"])
    if n != chain.n + 1:
        return f"batch {chain.n + 1} is missing"
    if prev != chain.hash:
        return "it does not follow the one before it"
    names = ("first_id", "end_id", "at_ms")
    try:
        made = digest(prev, (chain.writer, n, *(batch[x] for x in names)), holds, transfers)
    except LedgerFault as error:
        return str(error)
    if made != bytes(batch["hash"]):
        return "its rows are not as they were written"
    return None


async def _rest(tx: Tx, table: str, in_batches: int) -> dict[str, object] | None:
    """Rows beyond those in batches and those from before there were batches."""
    rows: int = await tx.fetchval(f"SELECT count(*) FROM {table}")  # noqa: S608
    before = await tx.fetchval("SELECT value FROM meta WHERE key = $1", f"unchained_{table}s")
    if rows == in_batches + int(before or 0):
        return None
    return {"table": table, "rows": rows, "in_batches": in_batches, "before": before}
