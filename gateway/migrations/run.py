"""Bring a database to this release's schema, once, also when many processes start together."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gateway.db import Database, DatabaseUnavailable, Row, sqlite_path

if TYPE_CHECKING:
    from sqlalchemy import Connection

# The newest revision; a test holds it against the scripts. Lets an up-to-date start skip alembic.
HEAD: Final = "0023"

# Any number: it names the lock that makes others wait while one migrates.
_LOCK: Final = 4_020_842


class NewerDatabase(Exception):  # noqa: N818
    """The database was written by a later release. Starting would risk what it holds."""


class OlderDatabase(Exception):  # noqa: N818
    """The database is of an earlier release, or holds nothing yet: what is asked for in it may not
    be there."""


async def require_current(db: Database) -> None:
    """Raises ``OlderDatabase`` unless the schema is this release's, or a later one's."""
    at = await current_revision(db)
    if at is None:
        raise OlderDatabase("the database is empty")
    if at < HEAD:
        raise OlderDatabase(f"the database is at revision {at}, this release needs {HEAD}")


async def current_revision(db: Database) -> str | None:
    """What the database is at; None for an empty one."""
    async with db.read() as tx:
        if tx.dialect == "sqlite":
            known: Row | None = await tx.fetchrow(
                "SELECT 1 AS one FROM sqlite_master WHERE name = 'alembic_version'"
            )
        else:
            known = await tx.fetchrow(
                "SELECT 1 AS one WHERE to_regclass('alembic_version') IS NOT NULL"
            )
        if known is None:
            return None
        revision: str | None = await tx.fetchval("SELECT version_num FROM alembic_version")
        return revision


async def migrate(db: Database) -> str:
    """Migrate to ``HEAD`` behind a database lock and return it.

    Raises ``NewerDatabase`` for a revision this release does not know.
    """
    if await current_revision(db) != HEAD:
        if db.dialect == "sqlite":
            await asyncio.to_thread(_upgrade_sqlite, sqlite_path(db.url))
        else:
            await _upgrade_postgres(db.url)
    await _first_start(db)
    return HEAD


async def _first_start(db: Database) -> None:
    """A ledger has a name of its own for ever: signatures and refunds are bound to it."""
    async with db.write() as tx:
        await tx.execute(
            "INSERT INTO meta (key, value) VALUES ('deployment', $1) ON CONFLICT DO NOTHING",
            secrets.token_hex(16),
        )


def _upgrade(connection: Connection, *, to: str = "head") -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.set_main_option("path_separator", "os")
    at = MigrationContext.configure(connection).get_current_revision()
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if at is not None and at not in known:
        raise NewerDatabase(f"the database is at revision {at}, which this release does not know")
    config.attributes["connection"] = connection
    command.upgrade(config, to)


def _upgrade_sqlite(path: Path) -> None:
    import sqlalchemy as sa

    engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": 30})
    # sqlite3 would begin on its own, too late to keep a second process out.
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        try:
            _upgrade(connection)
        except BaseException:
            connection.exec_driver_sql("ROLLBACK")
            raise
        connection.exec_driver_sql("COMMIT")
    engine.dispose()


async def _upgrade_postgres(url: str) -> None:
    from sqlalchemy.exc import DBAPIError
    from sqlalchemy.ext.asyncio import create_async_engine

    from gateway.db_postgres import single

    # asyncpg reads the URL as it does for the gateway: SQLAlchemy knows other options (sslmode).
    engine = create_async_engine("postgresql+asyncpg://", async_creator=lambda: single(url))
    try:
        async with engine.begin() as connection:
            await connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
            await connection.run_sync(_upgrade)
    except (OSError, DBAPIError) as error:
        raise DatabaseUnavailable(f"cannot migrate the database: {error}") from error
    finally:
        await engine.dispose()
