"""The one way to the database: transactions, conflicts, outages, snapshots, on both databases."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest

from gateway import db_postgres
from gateway.db import (
    CommitUnknown,
    Database,
    DatabaseUnavailable,
    Tx,
    WriteConflict,
    sqlite_path,
    transact,
)
from gateway.db_postgres import PostgresDatabase
from tests import servers

PUT = "INSERT INTO meta (key, value) VALUES ($1, $2)"


@pytest.fixture
async def db(db_url: str) -> AsyncIterator[Database]:
    database = await Database.connect(db_url, wait_s=2)
    yield database
    await database.close()


async def value(db: Database, key: str) -> object:
    async with db.read() as tx:
        return await tx.fetchval("SELECT value FROM meta WHERE key = $1", key)


# --- opening ----------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["mysql://x", "farebox.db", "", "sqlite:farebox.db", "sqlite://"])
async def test_a_url_that_is_neither_database_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        await Database.connect(url)


async def test_a_database_that_is_not_there_is_unavailable(postgres_server: str) -> None:
    closed = f"postgresql://farebox@127.0.0.1:{servers.free_port()}/x"
    for url in ("sqlite:////nowhere/farebox.db", closed):
        with pytest.raises(DatabaseUnavailable):
            await Database.connect(url, wait_s=1)
    with pytest.raises(DatabaseUnavailable):
        await Database.connect(servers.with_database(postgres_server, "no_such_database"))


def test_sqlite_urls_as_sqlalchemy_spells_them() -> None:
    assert str(sqlite_path("sqlite:///farebox.db")) == "farebox.db"
    assert str(sqlite_path("sqlite:////var/farebox.db")) == "/var/farebox.db"


# --- writing ----------------------------------------------------------------------------------


async def test_a_block_commits_at_its_end(db: Database) -> None:
    done: list[str] = []
    async with db.write() as tx:
        await tx.execute(PUT, "a", "1")
        tx.after_commit(lambda: done.append("a"))
        assert done == []
    assert done == ["a"]
    assert await value(db, "a") == "1"


async def test_an_exception_rolls_back(db: Database) -> None:
    done: list[str] = []
    with pytest.raises(KeyError):
        async with db.write() as tx:
            await tx.execute(PUT, "a", "1")
            tx.after_commit(lambda: done.append("a"))
            raise KeyError("a")
    assert done == []
    assert await value(db, "a") is None


async def test_a_cancelled_block_rolls_back_and_leaves_the_database_usable(db: Database) -> None:
    inside = asyncio.Event()

    async def work() -> None:
        async with db.write() as tx:
            await tx.execute(PUT, "a", "1")
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with db.write() as tx:
        await tx.execute(PUT, "a", "2")
    assert await value(db, "a") == "2"


async def test_a_second_row_of_the_same_key_is_a_conflict(db: Database) -> None:
    with pytest.raises(WriteConflict):
        async with db.write() as tx:
            await tx.execute(PUT, "a", "1")
            await tx.execute(PUT, "a", "2")
    assert await value(db, "a") is None


async def test_a_mistake_is_neither_an_outage_nor_a_conflict(db: Database) -> None:
    mistakes = [
        ("SELEC 1", ()),
        ("SELECT nothing FROM meta", ()),
        ("INSERT INTO meta (key, value) VALUES ($1, NULL)", ("a",)),
        ("INSERT INTO sequence (name, next) VALUES ('x', $1)", (2**63,)),
        (PUT, ("a", "\ud800")),
    ]
    for sql, params in mistakes:
        for block in (db.write, db.read):
            with pytest.raises(Exception) as caught:
                async with block() as tx:
                    await tx.execute(sql, *params)
            known = (WriteConflict, CommitUnknown)
            assert not isinstance(caught.value, known), sql
            # A read may refuse to write before it looks at what is written.
            if block == db.write or not sql.startswith("INSERT"):
                assert not isinstance(caught.value, DatabaseUnavailable), (sql, caught.value)
    assert await value(db, "a") is None


async def test_a_swallowed_error_is_not_taken_for_a_commit(db: Database) -> None:
    """PostgreSQL answers COMMIT with ROLLBACK, and no error, when a statement had failed."""
    done: list[str] = []
    told = True
    try:
        async with db.write() as tx:
            await tx.execute(PUT, "a", "1")
            tx.after_commit(lambda: done.append("a"))
            with contextlib.suppress(Exception):
                await tx.execute("SELECT nothing FROM meta")
    except RuntimeError:
        told = False
    assert (await value(db, "a") == "1") is told
    assert (done == ["a"]) is told


async def test_transact_runs_again_after_a_conflict(db: Database) -> None:
    runs = 0

    async def work(tx: Tx) -> int:
        nonlocal runs
        runs += 1
        await tx.execute(PUT, "a", str(runs))
        if runs < 3:
            await tx.execute(PUT, "a", "again")
        return runs

    assert await transact(db, work) == 3
    assert await value(db, "a") == "3"


async def test_transact_gives_up(db: Database) -> None:
    runs = 0

    async def work(tx: Tx) -> None:
        nonlocal runs
        runs += 1
        await tx.execute(PUT, "a", "1")
        await tx.execute(PUT, "a", "2")

    with pytest.raises(DatabaseUnavailable):
        await transact(db, work, tries=3)
    assert runs == 3
    assert await value(db, "a") is None


async def test_writers_of_one_row_wait_for_each_other(db: Database) -> None:
    async with db.write() as tx:
        await tx.execute(PUT, "n", "0")

    async def work(tx: Tx) -> None:
        text = await tx.fetchval(f"SELECT value FROM meta WHERE key = 'n'{tx.for_update}")
        await asyncio.sleep(0)
        await tx.execute("UPDATE meta SET value = $1 WHERE key = 'n'", str(int(text) + 1))

    await asyncio.gather(*(transact(db, work) for _ in range(20)))
    assert await value(db, "n") == "20"


# --- statements -------------------------------------------------------------------------------


async def test_rows_by_name_and_position(db: Database) -> None:
    async with db.write() as tx:
        assert await tx.execute(PUT, "a", "1") == 1
        await tx.executemany(PUT, [("b", "2"), ("c", "3")])
        await tx.executemany(PUT, [])
        row = await tx.fetchrow("SELECT key, value FROM meta WHERE key = $1", "b")
        assert row is not None
        assert (row["key"], row[1]) == ("b", "2")
        assert list(row.keys()) == ["key", "value"]
        assert await tx.fetchrow("SELECT key FROM meta WHERE key = 'x'") is None
        assert await tx.fetchval("SELECT key FROM meta WHERE key = 'x'") is None
        assert await tx.execute("UPDATE meta SET value = '0' WHERE key IN ('a', 'b')") == 2
        assert await tx.execute("DELETE FROM meta WHERE key = 'x'") == 0


async def test_one_of_many_values(db: Database) -> None:
    async with db.write() as tx:
        await tx.executemany(
            "INSERT INTO sequence (name, next) VALUES ($1, $2)",
            [(f"x{i}", i) for i in range(1_200)],
        )
    async with db.read() as tx:
        found = await tx.fetch_any(
            "SELECT next FROM sequence WHERE name <> $1 AND next {any} AND name LIKE 'x%'",
            list(range(0, 1_200, 2)),
            "x4",
        )
        assert sorted(row["next"] for row in found) == [0, 2, *range(6, 1_200, 2)]
        assert list(await tx.fetch_any("SELECT next FROM sequence WHERE next {any}", [])) == []


async def test_the_databases_clock(db: Database) -> None:
    async with db.read() as tx:
        assert abs(await tx.now_ms() - time.time() * 1_000) < 3_600_000


# --- reading ----------------------------------------------------------------------------------


async def test_a_read_writes_nothing(db: Database) -> None:
    with pytest.raises(Exception, match=r"read-?only"):
        async with db.read() as tx:
            await tx.execute(PUT, "a", "1")
    assert await value(db, "a") is None


async def test_overlapping_reads_each_see_one_state(db: Database) -> None:
    """Each is not older than its beginning, and does not change while it is open."""

    async def put(text: str) -> None:
        async with db.write() as tx:
            await tx.execute(
                PUT + " ON CONFLICT (key) DO UPDATE SET value = excluded.value", "a", text
            )

    async def look(tx: Tx) -> object:
        return await tx.fetchval("SELECT value FROM meta WHERE key = 'a'")

    await put("1")
    async with contextlib.AsyncExitStack() as second_stack:
        async with db.read() as first:
            assert await look(first) == "1"
            await put("2")
            second = await second_stack.enter_async_context(db.read())
            assert await look(second) == "2"
            assert await look(first) == "1"
            await put("3")
        assert await look(second) == "2"
    assert await value(db, "a") == "3"


async def test_more_readers_than_connections_wait_for_one(db: Database) -> None:
    free = asyncio.Event()
    begun = 0

    async def work() -> None:
        nonlocal begun
        async with db.read() as tx:
            begun += 1
            await tx.fetchval("SELECT 1")
            await free.wait()

    tasks = [asyncio.create_task(work()) for _ in range(12)]
    while begun < 8:
        await asyncio.sleep(0.001)
    free.set()
    await asyncio.gather(*tasks)
    assert begun == 12


async def test_readers_wait_a_bounded_time(db_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    db = await Database.connect(db_url)
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(8):
            await stack.enter_async_context(db.read())
        with monkeypatch.context() as soon:  # from here on: to connect may take long
            soon.setattr(db, "_wait_s", 0.05)
            with pytest.raises(DatabaseUnavailable):
                async with db.read():
                    pytest.fail("a ninth reader got in")
    await db.close()


async def test_who_reads_everything_may_take_its_time(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    soon = {"statement_timeout": "100", "idle_in_transaction_session_timeout": "100"}
    monkeypatch.setattr(db_postgres, "_SETTINGS", soon)
    db = await Database.connect(postgres_url)
    for slow in ("SELECT pg_sleep(1)", "SELECT 1"):
        async with db.survey() as tx:
            await tx.fetch(slow)
            await asyncio.sleep(0.3)  # as long as somebody reads what was told
            await tx.fetch("SELECT 1")
        with pytest.raises(DatabaseUnavailable):
            async with db.read() as tx:  # the same connection, bounded again
                await tx.fetch(slow)
                await asyncio.sleep(0.3)
                await tx.fetch("SELECT 1")
    await db.close()


# --- the writer's own connection ----------------------------------------------------------------


async def test_a_hot_transaction_is_one_like_any_other(db: Database) -> None:
    done: list[str] = []
    async with db.write_hot() as tx:
        await tx.execute(PUT, "a", "1")
        tx.after_commit(lambda: done.append("a"))
    with pytest.raises(WriteConflict):
        async with db.write_hot() as tx:
            await tx.execute(PUT, "b", "1")
            await tx.execute(PUT, "a", "2")
    assert (await value(db, "a"), await value(db, "b"), done) == ("1", None, ["a"])


async def test_a_hot_connection_that_is_left_in_a_transaction_is_not_used_again(
    postgres_url: str,
) -> None:
    database = await Database.connect(postgres_url)
    assert isinstance(database, PostgresDatabase)
    async with database.write_hot() as tx:
        await tx.execute(PUT, "a", "1")
    assert database._hot is not None
    await database._hot.execute("BEGIN")
    await database._hot.execute("INSERT INTO meta (key, value) VALUES ('left', '1')")
    async with database.write_hot() as tx:
        await tx.execute(PUT, "b", "1")
    assert await value(database, "left") is None
    assert await value(database, "b") == "1"
    await database._hot.close()  # the server has ended it
    async with database.write_hot() as tx:
        await tx.execute(PUT, "c", "1")
    assert await value(database, "c") == "1"
    await database.close()
    with pytest.raises(DatabaseUnavailable):
        async with database.read() as tx:
            await tx.fetch("SELECT 1")
