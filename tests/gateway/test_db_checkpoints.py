"""SQLite's WAL is moved into the database file beside the requests, and does not grow for ever."""

from __future__ import annotations

import asyncio
import logging
import shutil
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from gateway import db_sqlite
from gateway.db import Database, sqlite_path
from gateway.db_sqlite import SqliteDatabase

PUT = "INSERT INTO meta (key, value) VALUES ($1, $2)"
LARGE = 64  # pages
PAGE = 4_096


@pytest.fixture
async def db(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SqliteDatabase]:
    monkeypatch.setattr(db_sqlite, "_CHECKPOINT_EVERY_S", 0.005)
    monkeypatch.setattr(db_sqlite, "_LARGE_WAL_PAGES", LARGE)
    database = await Database.connect(sqlite_url)
    assert isinstance(database, SqliteDatabase)
    yield database
    await database.close()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.005)


async def put(db: Database, start: int, count: int) -> None:
    for n in range(start, start + count):
        async with db.write() as tx:
            await tx.execute(PUT, f"k{n}", "x" * 3 * PAGE)
        await asyncio.sleep(0)


def in_the_file(db: Database, folder: Path) -> int:
    """How many rows the database file has without its WAL."""
    alone = folder / "alone.db"
    shutil.copyfile(sqlite_path(db.url), alone)
    connection = sqlite3.connect(alone)
    try:
        (count,) = connection.execute("SELECT count(*) FROM meta WHERE key LIKE 'k%'").fetchone()
    except sqlite3.DatabaseError:  # copied while it was written
        return -1
    finally:
        connection.close()
        for name in ("alone.db-wal", "alone.db-shm"):
            (folder / name).unlink(missing_ok=True)
    return int(count)


def wal_bytes(db: Database) -> int:
    path = sqlite_path(db.url)
    return path.with_name(path.name + "-wal").stat().st_size


async def test_what_was_committed_gets_into_the_file(db: SqliteDatabase, tmp_path: Path) -> None:
    await put(db, 0, 10)
    await until(lambda: in_the_file(db, tmp_path) == 10)
    await put(db, 10, 1)
    await until(lambda: in_the_file(db, tmp_path) == 11)


async def test_the_wal_is_used_anew_while_writing_goes_on(db: SqliteDatabase) -> None:
    """PASSIVE alone never catches up with a busy writer."""
    written = 0
    async with asyncio.timeout(30):
        while written * 3 * PAGE < 4 * wal_bytes(db) or written < 10 * LARGE:
            await put(db, written, 40)
            written += 40
            await asyncio.sleep(0.001)


async def test_a_reader_on_an_old_snapshot_keeps_nobody_waiting(
    db: SqliteDatabase, tmp_path: Path
) -> None:
    await put(db, 0, 1)
    async with db.read() as tx:
        assert await tx.fetchval("SELECT count(*) FROM meta WHERE key LIKE 'k%'") == 1
        await put(db, 1, 3 * LARGE)
        assert await tx.fetchval("SELECT count(*) FROM meta WHERE key LIKE 'k%'") == 1
    rows = 1 + 3 * LARGE
    await put(db, rows, 1)
    await until(lambda: in_the_file(db, tmp_path) == rows + 1)
    written, grown = rows + 1, 0
    async with asyncio.timeout(30):
        while grown != wal_bytes(db):  # until it is used anew
            grown = wal_bytes(db)
            await put(db, written, LARGE)
            written += LARGE


async def test_the_rows_a_writer_remembers_outlive_a_checkpoint(db: SqliteDatabase) -> None:
    async with db.write() as tx:
        assert tx.under_lock is not None
        await tx.execute(PUT, "a", "1")
        tx.under_lock[1] = "remembered"
    connection = sqlite3.connect(sqlite_path(db.url), isolation_level=None)
    for mode in ("PASSIVE", "RESTART"):
        (busy, pages, moved) = connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
        assert (busy, pages) == (0, moved)
        async with db.write() as tx:
            assert tx.under_lock == {1: "remembered"}
            await tx.execute(PUT, mode, "1")
    # Another connection's commit is what makes it forget.
    connection.execute("INSERT INTO meta (key, value) VALUES ('b', '1')")
    connection.close()
    async with db.write() as tx:
        assert tx.under_lock == {}


async def test_nothing_is_left_behind(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(db_sqlite, "_CHECKPOINT_EVERY_S", 0.005)
    before = set(threading.enumerate())
    reading = await Database.connect(sqlite_url)
    async with reading.read() as tx:
        await tx.fetch("SELECT * FROM meta")
    named = [thread.name for thread in threading.enumerate()]
    assert "checkpoints" not in named  # who only reads needs none
    writing = await Database.connect(sqlite_url)
    await put(writing, 0, 3)
    assert "checkpoints" in [thread.name for thread in threading.enumerate()]
    await reading.close()
    await writing.close()
    assert "checkpoints" not in [thread.name for thread in threading.enumerate()]
    # But for the loop's own pool.
    assert [t for t in set(threading.enumerate()) - before if "asyncio" not in t.name] == []
    path = sqlite_path(sqlite_url)
    assert [each.name for each in path.parent.glob(path.name + "*")] == [path.name]


async def test_a_checkpoint_that_fails_is_told_and_tried_again(
    db: SqliteDatabase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    failed = 0
    move = db._checkpoints.move

    def broken(connection: sqlite3.Connection) -> None:
        nonlocal failed
        failed += 1
        if failed < 4:
            raise sqlite3.OperationalError("disk I/O error")
        move(connection)

    monkeypatch.setattr(db._checkpoints, "move", broken)
    with caplog.at_level(logging.WARNING):
        await put(db, 0, 2)
        await until(lambda: in_the_file(db, tmp_path) == 2)
    told = [record for record in caplog.records if "disk I/O error" in record.getMessage()]
    assert len(told) == 1  # once an outage, not once a try
