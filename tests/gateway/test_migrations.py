"""Migrations: from nothing, again, by many at once, backwards, and never to an older release."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import sqlalchemy as sa

from gateway.db import Database, sqlite_path
from gateway.ledger import Expire
from gateway.migrations import run as migrations
from gateway.migrations.run import HEAD, NewerDatabase, current_revision, migrate
from gateway.migrations.schema import metadata
from tests import servers

MIGRATE = """
import asyncio, sys
from gateway.db import Database
from gateway.migrations.run import migrate

async def main() -> None:
    db = await Database.connect(sys.argv[1], wait_s=30)
    try:
        print(await migrate(db))
    finally:
        await db.close()

asyncio.run(main())
"""


async def connect_and_migrate(url: str) -> str:
    db = await Database.connect(url)
    try:
        return await migrate(db)
    finally:
        await db.close()


async def deployment(url: str) -> object:
    db = await Database.connect(url)
    try:
        async with db.read() as tx:
            return await tx.fetchval("SELECT value FROM meta WHERE key = 'deployment'")
    finally:
        await db.close()


T = TypeVar("T")


async def with_connection(url: str, work: Callable[[sa.Connection], T]) -> T:
    """Run ``work(connection)`` on SQLAlchemy's connection; what it changes is committed."""
    if url.startswith("sqlite"):
        engine = sa.create_engine(url)
        try:
            with engine.begin() as connection:
                return work(connection)
        finally:
            engine.dispose()
    from sqlalchemy.ext.asyncio import create_async_engine

    async_engine = create_async_engine("postgresql+asyncpg://" + url.split("://", 1)[1])
    try:
        async with async_engine.begin() as connection:
            return await connection.run_sync(work)
    finally:
        await async_engine.dispose()


def tables(connection: sa.Connection) -> set[str]:
    return set(sa.inspect(connection).get_table_names())


async def test_an_empty_database_gets_the_whole_schema(empty_db_url: str) -> None:
    db = await Database.connect(empty_db_url)
    assert await current_revision(db) is None
    assert await migrate(db) == HEAD
    assert await current_revision(db) == HEAD
    await db.close()
    found = await with_connection(empty_db_url, tables)
    assert found == {*metadata.tables, "alembic_version"}


async def test_the_head_is_the_newest_script() -> None:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.set_main_option("path_separator", "os")
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]


async def test_again_changes_nothing(empty_db_url: str) -> None:
    await connect_and_migrate(empty_db_url)
    name = await deployment(empty_db_url)
    assert isinstance(name, str)
    assert len(name) == 32
    await connect_and_migrate(empty_db_url)
    assert await deployment(empty_db_url) == name


async def test_every_deployment_has_a_name_of_its_own(tmp_path: Path) -> None:
    names = set()
    for i in range(2):
        url = f"sqlite:///{tmp_path / f'{i}.db'}"
        await connect_and_migrate(url)
        names.add(await deployment(url))
    assert len(names) == 2


async def test_processes_that_start_together(empty_db_url: str) -> None:
    async def process() -> tuple[int | None, bytes, bytes]:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            MIGRATE,
            empty_db_url,
            cwd=Path(__file__).parents[2],
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=servers.child_env(),
        )
        out, err = await child.communicate()
        return child.returncode, out, err

    for code, out, err in await asyncio.gather(*(process() for _ in range(3))):
        assert code == 0, err.decode()
        assert out.decode().strip() == HEAD
    assert await deployment(empty_db_url) is not None


async def test_tasks_of_one_process_that_start_together(empty_db_url: str) -> None:
    found = await asyncio.gather(*(connect_and_migrate(empty_db_url) for _ in range(3)))
    assert found == [HEAD] * 3


async def test_a_newer_database_is_refused_and_left_alone(empty_db_url: str) -> None:
    await connect_and_migrate(empty_db_url)
    db = await Database.connect(empty_db_url)
    async with db.write() as tx:
        await tx.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(NewerDatabase, match="9999"):
        await migrate(db)
    assert await current_revision(db) == "9999"
    await db.close()


async def test_the_tables_are_as_described(db_url: str) -> None:
    """What the tables.py files say is what the scripts make, on both databases."""

    def differences(connection: sa.Connection) -> list[object]:
        from alembic.autogenerate import compare_metadata
        from alembic.migration import MigrationContext

        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": _default_differs}
        )
        return list(compare_metadata(context, metadata))

    assert await with_connection(db_url, differences) == []


def _default_differs(
    _context: object,
    _inspected_column: object,
    described: sa.Column[object],
    inspected: str | None,
    *_more: object,
) -> bool:
    """alembic's own comparison stumbles over an empty text, which SQLite has as ('')."""
    clause = described.server_default
    said = f"'{clause.arg}'" if isinstance(clause, sa.DefaultClause) else None
    return (None if inspected is None else inspected.partition("::")[0].strip("()")) != said


async def test_the_checks_are_as_described(db_url: str) -> None:
    """alembic does not compare CHECK constraints."""

    def checks(connection: sa.Connection) -> dict[str, set[str | None]]:
        inspector = sa.inspect(connection)
        return {
            name: {check["name"] for check in inspector.get_check_constraints(name)}
            for name in metadata.tables
        }

    described = {
        name: {
            str(c.name)
            for c in table.constraints
            if isinstance(c, sa.CheckConstraint) and c.name is not None
        }
        for name, table in metadata.tables.items()
    }
    assert await with_connection(db_url, checks) == described
    assert described["account"] >= {"ck_account_available", "ck_account_pinned"}


async def test_back_to_nothing_and_up_again(db_url: str) -> None:
    await with_connection(db_url, _downgrade)
    left = await with_connection(db_url, tables)
    assert left == {"alembic_version"}
    assert await connect_and_migrate(db_url) == HEAD
    assert await with_connection(db_url, tables) == {*metadata.tables, "alembic_version"}


async def test_what_had_expired_is_counted_when_lots_learn_to_say_so(db_url: str) -> None:
    """0002 gives lots a sum that stood in the transfers alone."""
    from tests.gateway.ledger.helpers import T0, faults, mint, minted, open_account, run

    db = await Database.connect(db_url)
    account = await open_account(db)
    for name, units in (("a", 10), ("b", 7)):
        await minted(db, mint(account, units, name, expires_ms=T0 + 1))
    await minted(db, mint(account, 5, "c"))
    await run(db, Expire(account), at_ms=T0 + 1)
    await db.close()
    await with_connection(db_url, lambda c: _downgrade(c, to="0001"))
    await connect_and_migrate(db_url)
    db = await Database.connect(db_url)
    async with db.read() as tx:
        rows = await tx.fetch("SELECT minted_units, expired_units FROM lot ORDER BY id")
    assert [tuple(row) for row in rows] == [(10, 10), (7, 7), (5, 0)]
    assert await faults(db) == []
    await db.close()


async def test_what_was_written_before_there_were_batches_stands_in_none(db_url: str) -> None:
    """0004 begins the chain behind the rows that are there."""
    from tests.gateway.ledger.helpers import (
        capture,
        faults,
        held,
        hold,
        mint,
        minted,
        one,
        open_account,
    )

    db = await Database.connect(db_url)
    account = await open_account(db)
    await minted(db, mint(account, 10, "a"))
    before = await held(db, hold(account, "before", 5))
    await one(db, capture(await held(db, hold(account, "closed before", 5)), 5))
    await db.close()
    await with_connection(db_url, lambda c: _downgrade(c, to="0003"))
    await connect_and_migrate(db_url)
    db = await Database.connect(db_url)
    async with db.read() as tx:
        assert await tx.fetchval("SELECT count(*) FROM batch") == 0
    assert await faults(db) == []
    await one(db, capture(before, 5))  # a hold of then is closed by a batch of now
    await minted(db, mint(account, 5, "after"))
    assert await faults(db) == []
    await db.close()


def _downgrade(connection: sa.Connection, to: str = "base") -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.downgrade(config, to)


async def test_a_migration_that_fails_leaves_nothing_half_done(empty_db_url: str) -> None:
    last = "CREATE TABLE wallet (address integer)"  # the script comes to it last
    await with_connection(empty_db_url, lambda c: c.exec_driver_sql(last))
    with pytest.raises(Exception, match="wallet"):
        await connect_and_migrate(empty_db_url)
    assert await with_connection(empty_db_url, tables) <= {"wallet", "alembic_version"}
    await with_connection(empty_db_url, lambda c: c.exec_driver_sql("DROP TABLE wallet"))
    assert await connect_and_migrate(empty_db_url) == HEAD


async def test_a_url_with_options_can_be_migrated(postgres_server: str) -> None:
    """asyncpg and SQLAlchemy read the options of a URL in different ways."""
    url = servers.create_database(postgres_server)
    try:
        for options in ("?sslmode=prefer", "?target_session_attrs=any&application_name=mine"):
            assert await connect_and_migrate(url + options) == HEAD
            db = await Database.connect(url + options)
            await db.close()
            await with_connection(url, _downgrade)
    finally:
        servers.drop_database(url)


APPEND_ONLY = {
    "hold": "max_units = 1",
    "transfer": "amount_units = 1",
    "segment": "lot_id = 1",
    "mint_key": "lot_id = 1",
    "refund": "amount_units = 1",
    "refund_part": "amount_units = 1",
    "operator_action": "reason = ''",
    "batch": "n = n + 1",
}


@pytest.mark.parametrize("table", sorted(APPEND_ONLY))
@pytest.mark.parametrize("verb", ["UPDATE", "DELETE"])
async def test_history_cannot_be_rewritten(db_url: str, table: str, verb: str) -> None:
    """Each table has a row, so that a trigger for each row would have to fire, too."""
    from gateway.ledger import Refund
    from tests.gateway.ledger.helpers import capture, held, hold, mint, minted, one, open_account

    db = await Database.connect(db_url)
    account = await open_account(db)
    await minted(db, mint(account, 10, "a"))
    row = await held(db, hold(account, "r", 5))
    await one(db, capture(row, 5))
    await minted(db, mint(account, 10, "b"))  # folds: writes a segment
    await one(db, Refund(row.id, "k", 2, "why", by="ops"))
    async with db.read() as tx:
        before = [tuple(each) for each in await tx.fetch(f"SELECT * FROM {table}")]
    assert before
    sql = f"UPDATE {table} SET {APPEND_ONLY[table]}" if verb == "UPDATE" else f"DELETE FROM {table}"
    with pytest.raises(Exception, match="append-only"):
        async with db.write() as tx:
            await tx.execute(sql)
    async with db.read() as tx:
        assert [tuple(each) for each in await tx.fetch(f"SELECT * FROM {table}")] == before
    await db.close()


async def test_history_cannot_be_truncated(postgres_url: str) -> None:
    db = await Database.connect(postgres_url)
    for table in APPEND_ONLY:
        with pytest.raises(Exception, match="append-only"):
            async with db.write() as tx:
                await tx.execute(f"TRUNCATE {table}")
    await db.close()


async def test_ids_begin_above_the_houses_accounts(db_url: str) -> None:
    db = await Database.connect(db_url)
    async with db.read() as tx:
        rows = await tx.fetch("SELECT name, next FROM sequence ORDER BY name")
    assert [(row["name"], row["next"]) for row in rows] == [
        ("id", 1_000),
        ("swept", 1_000),
        ("writer", 1),
    ]
    await db.close()


async def test_sqlite_is_migrated_behind_its_write_lock(tmp_path: Path) -> None:
    """Nobody else can write between the look at the revision and the end of the migration."""
    url = f"sqlite:///{tmp_path / 'x.db'}"
    db = await Database.connect(url)
    other = sqlite3.connect(sqlite_path(url), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    task = asyncio.create_task(migrate(db))
    done, _ = await asyncio.wait([task], timeout=0.3)
    assert not done
    other.execute("ROLLBACK")
    other.close()
    assert await task == HEAD
    await db.close()
