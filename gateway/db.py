"""One way to talk to the database, the same on SQLite and on PostgreSQL.

Statements are plain SQL with ``$1`` placeholders in the dialect both understand; what only one of
them has is a small method of ``Tx`` (``any_of``, ``for_update``). SQLAlchemy describes the schema
and alembic moves it (``gateway/migrations``); nothing here goes through an ORM.

What is particular to each database is in ``db_sqlite.py`` and ``db_postgres.py``.

No network call may be awaited while a ``write()`` is open (house rules, money rule 4).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeVar
from urllib.parse import urlsplit

import sqlalchemy as sa

if TYPE_CHECKING:
    pass

Dialect = Literal["sqlite", "postgres"]
T = TypeVar("T")

# How PostgreSQL tells our sessions from others.
APPLICATION: Final = "farebox"

# How long a lost COMMIT is asked after. The server ends a session that waits for one in 5 s.
ASK_S: Final = 10.0

# Read transactions that may be open at once.
READERS: Final = 8

# The schema's own description; every tables.py adds to it, the migrations are compared with it.
metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# 64-bit everywhere; on SQLite a plain INTEGER primary key is the row id itself.
Id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


class DatabaseUnavailable(Exception):  # noqa: N818  (a state, not a mistake)
    """The database cannot be reached or is busy beyond the bound. Nothing was written."""


class CommitUnknown(Exception):  # noqa: N818
    """The connection was lost inside COMMIT: the writes may or may not stand.

    Only where that could not be asked: the transaction has no mark, or the database did not
    answer for ``ASK_S`` either.
    """


class WriteConflict(Exception):  # noqa: N818
    """Another transaction got there first, and a constraint said so: run it again."""


class Row(Protocol):
    """A result row: by name or by position."""

    def __getitem__(self, key: Any) -> Any: ...
    def __iter__(self) -> Iterator[Any]: ...
    def keys(self) -> Iterable[str]: ...


class Tx:
    """An open transaction. Use it only inside its ``async with``."""

    dialect: Dialect

    # Account rows that are the truth as long as this transaction holds its lock; None where they
    # have to be read and locked one by one. Only the ledger's store uses it (see db_sqlite.py).
    under_lock: dict[int, Any] | None = None

    def __init__(self) -> None:
        self._after_commit: list[Callable[[], None]] = []
        self._mark: tuple[str, tuple[Any, ...]] | None = None

    def marked_by(self, insert: str, *params: Any) -> None:
        """This transaction has written a row whose key ``insert`` would write again.

        So what became of it can be asked when the connection is lost inside COMMIT: ``insert``
        waits for its end, and then finds the key taken or free.
        """
        self._mark = (insert, params)

    def after_commit(self, call: Callable[[], None]) -> None:
        """Runs ``call`` once the transaction stands; never if it does not."""
        self._after_commit.append(call)

    async def fetch(self, sql: str, *params: Any) -> Sequence[Row]:
        raise NotImplementedError

    async def execute(self, sql: str, *params: Any) -> int:
        """The number of rows touched."""
        raise NotImplementedError

    async def executemany(self, sql: str, rows: Iterable[Sequence[Any]]) -> int:
        """The number of rows touched; -1 where the database does not say (PostgreSQL)."""
        raise NotImplementedError

    async def fetchrow(self, sql: str, *params: Any) -> Row | None:
        rows = await self.fetch(sql, *params)
        return rows[0] if rows else None

    async def fetchval(self, sql: str, *params: Any) -> Any:
        rows = await self.fetch(sql, *params)
        return rows[0][0] if rows else None

    async def fetch_any(self, sql: str, values: Sequence[int], *params: Any) -> Sequence[Row]:
        """``sql`` has ``{any}`` where "is one of ``values``" belongs, as in ``id {any}``.

        The other parameters are ``$1``…; PostgreSQL gets the values as one array behind them.
        """
        raise NotImplementedError

    @property
    def for_update(self) -> str:
        """Locks the rows of a SELECT until the end. SQLite: the write lock is already ours."""
        raise NotImplementedError

    async def now_ms(self) -> int:
        """The database's clock, so that several nodes agree on what has expired."""
        raise NotImplementedError


class Database:
    """What every part is handed: opens transactions, nothing else."""

    dialect: Dialect
    url: str

    @staticmethod
    async def connect(url: str, *, wait_s: float = 5.0) -> Database:
        """Opens ``sqlite:///file`` or ``postgresql://…``. ``wait_s`` bounds every wait for it.

        Raises ``DatabaseUnavailable``; ``ValueError`` for a URL that is neither.
        """
        scheme = urlsplit(url).scheme
        if scheme == "sqlite":
            from gateway.db_sqlite import SqliteDatabase

            return SqliteDatabase(url, wait_s)
        if scheme in ("postgresql", "postgres"):
            from gateway.db_postgres import PostgresDatabase

            return await PostgresDatabase.open(url, wait_s)
        raise ValueError(f"unknown database URL scheme {scheme!r}: sqlite or postgresql")

    @asynccontextmanager
    async def write(self) -> AsyncIterator[Tx]:
        """A transaction: committed at the end of the block, rolled back on an exception.

        Raises ``DatabaseUnavailable``, ``WriteConflict``, ``CommitUnknown``.
        """
        raise NotImplementedError
        yield  # type: ignore[unreachable]  # makes it the generator the decorator needs

    def write_hot(self) -> AbstractAsyncContextManager[Tx]:
        """``write`` for the one task of a process that writes all the time: it has a connection
        of its own where that is worth it. Its statements must be look-ups by key."""
        return self.write()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[Tx]:
        """A consistent snapshot that writes nothing."""
        raise NotImplementedError
        yield  # type: ignore[unreachable]  # as above

    @asynccontextmanager
    async def survey(self) -> AsyncIterator[Tx]:
        """``read`` for who reads everything there is: neither a statement nor what is done between
        two of them has to end soon."""
        async with self.read() as tx:
            yield tx

    @asynccontextmanager
    async def starting(self) -> AsyncIterator[bool]:
        """The start of a process that will hold leases here, before it holds any.

        Yields True if it is certain that every process that ever did so is dead: SQLite's file is
        on this machine, and the kernel knows. On PostgreSQL only a lease can say so.
        """
        yield False

    async def close(self) -> None:
        """Close every connection; transactions that are still open have failed after ``wait_s``."""
        raise NotImplementedError


async def transact(
    db: Database, work: Callable[[Tx], Awaitable[T]], *, tries: int = 4, hot: bool = False
) -> T:
    """Run ``work`` in a write transaction, again when another one got there first.

    ``work`` must do nothing but use its ``Tx``: it may run more than once.
    """
    for attempt in range(1, tries + 1):
        try:
            async with db.write_hot() if hot else db.write() as tx:
                return await work(tx)
        except WriteConflict as error:
            if attempt == tries:
                raise DatabaseUnavailable(f"lost to other writers {tries} times") from error
    raise AssertionError("unreachable: the loop returns or raises")


def sqlite_path(url: str) -> Path:
    """``sqlite:///relative.db`` and ``sqlite:////absolute.db``, as SQLAlchemy spells them."""
    rest = url.removeprefix("sqlite://")
    if not rest.startswith("/") or len(rest) < 2:
        raise ValueError("a SQLite URL is sqlite:///file or sqlite:////path/to/file")
    return Path(rest[1:])
