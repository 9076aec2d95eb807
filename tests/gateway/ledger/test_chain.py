"""The hash chain: what was written stays as it was written, or the audit says where it did not."""

from __future__ import annotations

import asyncio
import hashlib
import struct
from collections.abc import Sequence
from dataclasses import replace

import pytest

from gateway.db import Database, Row, Tx, transact
from gateway.ledger import Call, Closed, Held, Refund, Writer, apply, chain
from gateway.ledger.rows import HOLD, TRANSFER
from tests.gateway.ledger.helpers import (
    T0,
    capture,
    faults,
    held,
    hold,
    mint,
    minted,
    one,
    open_account,
    run,
    scalar,
    void,
)

TABLES = ("hold", "transfer", "batch")


async def _books(db: Database) -> None:
    """Two writers' chains and the shared one, each with several batches."""
    account = await open_account(db)
    await minted(db, mint(account, 1_000, "a"))
    for name in ("one", "two"):
        writer = await Writer.start(db)
        for n in range(3):
            outcome = await writer.submit(hold(account, f"{name} {n}", 10))
            assert isinstance(outcome, Held)
            close = void(outcome.hold) if n == 1 else capture(outcome.hold, 5)
            assert isinstance(await writer.submit(close), Closed)
        await writer.stop()
    row = await held(db, hold(account, "shared", 10))
    await run(db, capture(row, 10), Refund(row.id, "k", 2), mint(account, 3, "b"))
    assert await faults(db) == []


async def _tamper(db: Database, *statements: str) -> None:
    async with db.write() as tx:
        if tx.dialect == "sqlite":
            for row in await tx.fetch("SELECT name FROM sqlite_master WHERE type = 'trigger'"):
                await tx.execute(f"DROP TRIGGER {row['name']}")
        else:
            for table in TABLES:
                await tx.execute(f"ALTER TABLE {table} DISABLE TRIGGER USER")
        for sql in statements:
            assert await tx.execute(sql), f"nothing was changed by {sql}"


_CAPTURE = "SELECT min(id) FROM transfer WHERE kind = 'capture'"
_VOID = "SELECT min(id) FROM transfer WHERE kind = 'void'"
_OTHER = "SELECT max(writer) FROM batch"
# What no other audit would see.
CHANGED = [
    f"UPDATE hold SET target = '/other' WHERE id = ({_CAPTURE})",
    f"UPDATE hold SET price = 'flat:1' WHERE id = ({_CAPTURE})",
    f"UPDATE hold SET price = NULL WHERE id = ({_CAPTURE})",
    f"UPDATE hold SET run = '' WHERE id = ({_CAPTURE})",
    f"UPDATE hold SET principal = 'x', scheme = scheme || '0' WHERE id = ({_CAPTURE})",
    f"UPDATE hold SET max_units = max_units + 1 WHERE id = ({_CAPTURE})",
    f"UPDATE hold SET lease_ms = lease_ms + 1 WHERE id = ({_CAPTURE})",
    f"UPDATE transfer SET at_ms = at_ms + 1 WHERE id = ({_CAPTURE})",
    f"UPDATE transfer SET reason = 'other' WHERE id = ({_VOID})",
    f"UPDATE transfer SET reason = NULL WHERE id = ({_VOID})",
    f"UPDATE transfer SET kind = 'void' WHERE id = ({_CAPTURE})",
    f"UPDATE transfer SET amount_units = amount_units + 1 WHERE id = ({_CAPTURE})",
    "UPDATE batch SET at_ms = at_ms + 1 WHERE n = 2",
    "UPDATE batch SET hash = prev WHERE n = 2",
    "UPDATE batch SET first_id = first_id + 1 WHERE n = 1",
    "UPDATE batch SET closed = hash WHERE n = 2 AND writer > 0",
    f"UPDATE batch SET writer = 77 WHERE writer = ({_OTHER}) AND n > 1",
    f"UPDATE batch SET writer = 77 WHERE writer = ({_OTHER})",
    f"DELETE FROM batch WHERE writer = ({_OTHER}) AND n = 1",
    f"DELETE FROM batch WHERE writer = ({_OTHER}) AND n = 3",
]


@pytest.mark.parametrize("sql", CHANGED)
async def test_what_was_changed_afterwards_is_found(broken_db: Database, sql: str) -> None:
    await _books(broken_db)
    await _tamper(broken_db, sql)
    assert "I10_batch_is_as_written" in await faults(broken_db)


async def test_a_deleted_call_is_found(broken_db: Database) -> None:
    """With its hold and its close gone, only totals could tell, and those can be made right."""
    await _books(broken_db)
    gone = await scalar(broken_db, _VOID)
    await _tamper(broken_db, *(f"DELETE FROM {t} WHERE id = {gone}" for t in ("transfer", "hold")))
    assert "I10_batch_is_as_written" in await faults(broken_db)


async def test_swapped_batches_are_found(broken_db: Database) -> None:
    await _books(broken_db)
    await _tamper(
        broken_db,
        f"UPDATE batch SET n = -n WHERE writer = ({_OTHER}) AND n IN (3, 5)",
        f"UPDATE batch SET n = 8 + n WHERE writer = ({_OTHER}) AND n IN (-3, -5)",
    )
    async with broken_db.read() as tx:
        found = (await chain.check(tx)).broken
    assert [each["n"] for each in found][:2] == [3, 4]


async def test_a_batch_that_is_cut_off_leaves_its_rows_behind(broken_db: Database) -> None:
    await _books(broken_db)
    last = f"SELECT max(n) FROM batch WHERE writer = ({_OTHER})"
    await _tamper(broken_db, f"DELETE FROM batch WHERE writer = ({_OTHER}) AND n = ({last})")
    assert await faults(broken_db) == ["I10_every_row_is_in_a_batch"]


async def test_a_row_that_was_slipped_in_is_found(broken_db: Database) -> None:
    await _books(broken_db)
    names = ", ".join(name for name in HOLD if name not in ("id", "request_id", "max_units"))
    await _tamper(
        broken_db,
        f"INSERT INTO hold (id, request_id, max_units, {names})"
        f" SELECT 900000, 'slipped in', 0, {names} FROM hold WHERE id = ({_CAPTURE})",
    )
    assert await faults(broken_db) == ["I10_every_row_is_in_a_batch"]
    async with broken_db.read() as tx:
        (rest,) = (await chain.check(tx)).unchained
    assert (rest["table"], rest["rows"]) == ("hold", rest["in_batches"] + 1)  # type: ignore[operator]  # an int


async def test_the_hash_is_as_it_is_described(db: Database) -> None:
    """Made again from the rows alone, by another hand."""
    await _books(db)
    async with db.read() as tx:
        batches = await tx.fetch("SELECT * FROM batch ORDER BY writer, n")
        holds = await tx.fetch(f"SELECT {', '.join(HOLD)} FROM hold ORDER BY id")
        transfers = await tx.fetch(f"SELECT {', '.join(TRANSFER)} FROM transfer ORDER BY id")
    prev: dict[int, bytes] = {}
    for batch in batches:
        ids = range(batch["first_id"], batch["end_id"])
        closed = {number for (number,) in struct.iter_unpack(">q", bytes(batch["closed"]))}
        mine = [row for row in holds if row["id"] in ids]
        moved = [
            row
            for row in transfers
            if (row["id"] in closed if row["kind"] in ("capture", "void") else row["id"] in ids)
        ]
        numbers = [batch[name] for name in ("writer", "n", "first_id", "end_id", "at_ms")]
        priced = any(row["price"] is not None for row in mine)
        fields = [
            f"farebox batch {1 + priced}",
            *map(str, numbers),
            str(len(mine)),
            str(len(moved)),
        ]
        for row in mine:
            fields += _fields(row, [name for name in HOLD if priced or name != "price"])
        for row in moved:
            fields += _fields(row, TRANSFER)
        before = prev.get(batch["writer"], bytes(32))
        assert bytes(batch["prev"]) == before
        text = "".join(f"{each}\0" for each in fields).encode()
        assert hashlib.sha256(before + text).digest() == bytes(batch["hash"])
        prev[batch["writer"]] = bytes(batch["hash"])
    assert sorted(prev)[0] == chain.SHARED
    assert len(prev) == 3


def _fields(row: Row, names: Sequence[str]) -> list[str]:
    made = []
    for name in names:
        value = row[name]
        if name in ("price", "run", "payment_id", "reason"):
            made.append("" if value is None else f"={value}")
        else:
            made.append(bytes(value).hex() if name == "content" else str(value))
    return made


async def test_holds_from_before_prices_were_noted_keep_their_hash(broken_db: Database) -> None:
    account = await open_account(broken_db)
    old = hold(account, "old", 0)
    outcome = await one(broken_db, replace(old, call=Call("GET /paid", "GET", "/paid?x=1")))
    assert isinstance(outcome, Held)
    assert await faults(broken_db) == []
    async with broken_db.read() as tx:
        (batch,) = await tx.fetch("SELECT * FROM batch")
        (row,) = await tx.fetch(f"SELECT {', '.join(HOLD)} FROM hold")
    numbers = [batch[name] for name in ("writer", "n", "first_id", "end_id", "at_ms")]
    names = [name for name in HOLD if name != "price"]
    fields = ["farebox batch 1", *map(str, numbers), "1", "0", *_fields(row, names)]
    text = "".join(f"{each}\0" for each in fields).encode()
    assert hashlib.sha256(bytes(32) + text).digest() == bytes(batch["hash"])
    await _tamper(broken_db, "UPDATE hold SET price = 'flat:0'")
    assert await faults(broken_db) == ["I10_batch_is_as_written"]


async def test_text_with_a_nul_is_refused(db: Database) -> None:
    """Moved over the border of two columns it would read the same."""
    account = await open_account(db)
    with pytest.raises(Exception, match=r"NUL|0x00"):  # PostgreSQL knows no such text
        await one(db, hold(account, "a\0b", 0))
    assert await scalar(db, "SELECT count(*) FROM hold") == 0


async def test_refusals_and_rollbacks_leave_no_batch(db: Database) -> None:
    account = await open_account(db)
    await run(db, hold(account, "too much", 1))
    assert await scalar(db, "SELECT count(*) FROM batch") == 0
    writer = await Writer.start(db)
    for units in (1, 0, 1, 0):
        await writer.submit(hold(account, f"r{units}", units))
    await writer.stop()
    # The second r0 is a repeat.
    assert await scalar(db, "SELECT count(*) FROM batch") == 1


async def test_rare_writers_at_once_share_a_chain(db: Database) -> None:
    accounts = [await open_account(db, n) for n in range(1, 9)]
    other = await Database.connect(db.url)

    def work(n: int) -> object:
        async def mints(tx: Tx) -> object:
            # Two applications in one transaction: two batches, both or neither.
            account = accounts[n % 8]
            await apply(tx, [mint(account, 5, f"a{n}")], T0)
            return await apply(tx, [mint(account, 6, f"b{n}")], T0)

        return transact(other if n % 2 else db, mints)

    await asyncio.gather(*(work(n) for n in range(24)))  # type: ignore[call-overload]  # coroutines
    await other.close()
    assert await scalar(db, "SELECT max(n) FROM batch WHERE writer = 0") == 48
    assert await faults(db) == []


async def test_many_batches_are_checked_in_pages(db: Database) -> None:
    account = await open_account(db)
    await minted(db, mint(account, 1_000, "a"))
    writer = await Writer.start(db)
    for n in range(chain._PAGE + 5):
        assert isinstance(await writer.submit(hold(account, f"r{n}", 1)), Held)
    await writer.stop()
    async with db.read() as tx:
        assert await tx.fetchval("SELECT count(*) FROM batch") == chain._PAGE + 6
        assert await chain.check(tx) == chain.Faults()
