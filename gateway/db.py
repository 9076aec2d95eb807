"""One way to talk to the database, the same on SQLite and on PostgreSQL.

Statements are plain SQL with ``$1`` placeholders in the dialect both understand; what only one of
them has is a small method of ``Tx`` (``any_of``, ``for_update``). SQLAlchemy describes the schema
and alembic moves it (``gateway/migrations``); nothing here goes through an ORM.

SQLite: one connection writes, guarded by a lock in the process and ``BEGIN IMMEDIATE`` against
other processes; a few others read. All run on the event loop's own thread, because a statement
takes microseconds and sqlite3 gives up the GIL at every row. WAL and synchronous=FULL: an answer
that left is on disk. PostgreSQL: an asyncpg pool, READ COMMITTED, rows locked by the caller.

No network call may be awaited while a ``write()`` is open (house rules, money rule 4).
"""

from __future__ import annotations

import asyncio
import re
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeVar
from urllib.parse import urlsplit

import sqlalchemy as sa

if TYPE_CHECKING:
    import asyncpg

Dialect = Literal["sqlite", "postgres"]
T = TypeVar("T")

# How PostgreSQL tells our sessions from others.
APPLICATION: Final = "farebox"

# Read transactions that may be open at once on SQLite; the pool of PostgreSQL has as many.
_READERS = 8
# Account rows kept between transactions on SQLite; forgotten all at once when there are more.
_REMEMBERED_ROWS = 100_000

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
    """The connection was lost inside COMMIT: the writes may or may not stand."""


class WriteConflict(Exception):  # noqa: N818
    """Another transaction got there first, and a constraint said so: run it again."""


class Row(Protocol):
    """A result row: by name or by position."""

    def __getitem__(self, key: Any) -> Any: ...
    def __iter__(self) -> Iterator[Any]: ...
    def keys(self) -> Iterable[str]: ...


@lru_cache(maxsize=512)
def _numbered(sql: str) -> str:
    """``$1`` to SQLite's ``?1``."""
    return re.sub(r"\$(\d+)", r"?\1", sql)


@lru_cache(maxsize=512)
def _any_of(sql: str, first: int, count: int) -> str:
    """``{any}`` as SQLite's ``IN (…)`` over the parameters behind the ``first``."""
    marks = ",".join(f"?{first + 1 + i}" for i in range(count))
    return _numbered(sql).replace("{any}", f"IN ({marks})")


class Tx:
    """An open transaction. Use it only inside its ``async with``."""

    dialect: Dialect

    # Account rows that are the truth as long as this transaction holds its lock; None where they
    # have to be read and locked one by one. Only the ledger's store uses it (see _SqliteDatabase).
    under_lock: dict[int, Any] | None = None

    def __init__(self) -> None:
        self._after_commit: list[Callable[[], None]] = []

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


class _SqliteTx(Tx):
    dialect: Dialect = "sqlite"
    for_update = ""

    def __init__(
        self, connection: sqlite3.Connection, under_lock: dict[int, Any] | None = None
    ) -> None:
        super().__init__()
        self._connection = connection
        self.under_lock = under_lock

    async def fetch(self, sql: str, *params: Any) -> Sequence[Row]:
        return self._connection.execute(_numbered(sql), params).fetchall()

    async def execute(self, sql: str, *params: Any) -> int:
        if self.under_lock and sql.startswith("UPDATE account "):
            self.under_lock.clear()  # a hand on the table, past the ledger's store
        return self._connection.execute(_numbered(sql), params).rowcount

    async def executemany(self, sql: str, rows: Iterable[Sequence[Any]]) -> int:
        return self._connection.executemany(_numbered(sql), rows).rowcount

    async def fetch_any(self, sql: str, values: Sequence[int], *params: Any) -> Sequence[Row]:
        found: list[Row] = []
        for start in range(0, len(values), 512):  # SQLite's bound on parameters is far above
            part = values[start : start + 512]
            # As many marks as the next power of two: a few statements serve all lengths.
            marks = 1 << (len(part) - 1).bit_length()
            padded = (*params, *part, *([part[-1]] * (marks - len(part))))
            found += self._connection.execute(_any_of(sql, len(params), marks), padded).fetchall()
        return found

    async def now_ms(self) -> int:
        return time.time_ns() // 1_000_000


class _PostgresTx(Tx):
    dialect: Dialect = "postgres"
    for_update = " FOR UPDATE"

    def __init__(self, connection: asyncpg.pool.PoolConnectionProxy) -> None:
        super().__init__()
        self._connection = connection

    async def fetch(self, sql: str, *params: Any) -> Sequence[Row]:
        rows: Sequence[Row] = await self._connection.fetch(sql, *params)
        return rows

    async def execute(self, sql: str, *params: Any) -> int:
        status: str = await self._connection.execute(sql, *params)
        last = status.rsplit(" ", 1)[-1]  # "INSERT 0 1", "UPDATE 3"
        return int(last) if last.isdigit() else 0

    async def executemany(self, sql: str, rows: Iterable[Sequence[Any]]) -> int:
        await self._connection.executemany(sql, rows)
        return -1

    async def fetch_any(self, sql: str, values: Sequence[int], *params: Any) -> Sequence[Row]:
        text = sql.replace("{any}", f"= ANY(${len(params) + 1}::bigint[])")
        rows: Sequence[Row] = await self._connection.fetch(text, *params, list(values))
        return rows

    async def now_ms(self) -> int:
        now: int = await self._connection.fetchval(
            "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint"
        )
        return now


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
            return _SqliteDatabase(url, wait_s)
        if scheme in ("postgresql", "postgres"):
            return await _PostgresDatabase.open(url, wait_s)
        raise ValueError(f"unknown database URL scheme {scheme!r}: sqlite or postgresql")

    @asynccontextmanager
    async def write(self) -> AsyncIterator[Tx]:
        """A transaction: committed at the end of the block, rolled back on an exception.

        Raises ``DatabaseUnavailable``, ``WriteConflict``, ``CommitUnknown``.
        """
        raise NotImplementedError
        yield  # type: ignore[unreachable]  # makes it the generator the decorator needs

    @asynccontextmanager
    async def read(self) -> AsyncIterator[Tx]:
        """A consistent snapshot that writes nothing."""
        raise NotImplementedError
        yield  # type: ignore[unreachable]  # as above

    async def close(self) -> None:
        """Close every connection; transactions that are still open have failed after ``wait_s``."""
        raise NotImplementedError


async def transact(db: Database, work: Callable[[Tx], Awaitable[T]], *, tries: int = 4) -> T:
    """Run ``work`` in a write transaction, again when another one got there first.

    ``work`` must do nothing but use its ``Tx``: it may run more than once.
    """
    for attempt in range(1, tries + 1):
        try:
            async with db.write() as tx:
                return await work(tx)
        except WriteConflict as error:
            if attempt == tries:
                raise DatabaseUnavailable(f"lost to other writers {tries} times") from error
    raise AssertionError("unreachable: the loop returns or raises")


def _is_outage(error: BaseException) -> bool:
    """SQLite says with one class that a file is busy, full or broken and that SQL is wrong."""
    code = getattr(error, "sqlite_errorcode", None)
    return isinstance(error, sqlite3.OperationalError) and code is not None and code & 0xFF != 1


def _is_unique_violation(error: BaseException) -> bool:
    return isinstance(error, sqlite3.IntegrityError) and error.sqlite_errorname in (
        "SQLITE_CONSTRAINT_UNIQUE",
        "SQLITE_CONSTRAINT_PRIMARYKEY",
        "SQLITE_CONSTRAINT_ROWID",
    )


def sqlite_path(url: str) -> Path:
    """``sqlite:///relative.db`` and ``sqlite:////absolute.db``, as SQLAlchemy spells them."""
    rest = url.removeprefix("sqlite://")
    if not rest.startswith("/") or len(rest) < 2:
        raise ValueError("a SQLite URL is sqlite:///file or sqlite:////path/to/file")
    return Path(rest[1:])


class _SqliteDatabase(Database):
    dialect: Dialect = "sqlite"

    def __init__(self, url: str, wait_s: float) -> None:
        self.url = url
        self._wait_s = wait_s
        self._lock = asyncio.Lock()
        self._path = sqlite_path(url)
        self._reading = asyncio.Semaphore(_READERS)
        self._idle: list[sqlite3.Connection] = []
        self._under_lock: dict[int, Any] = {}
        self._version = 0
        try:
            self._writer = self._open()
            self._idle.append(self._open_reader())
        except sqlite3.OperationalError as error:
            raise DatabaseUnavailable(f"cannot open {self._path}: {error}") from error

    def _open_reader(self) -> sqlite3.Connection:
        connection = self._open()
        connection.execute("PRAGMA query_only = 1")
        return connection

    def _open(self) -> sqlite3.Connection:
        # isolation_level=None: we say BEGIN and COMMIT ourselves, at the places that matter.
        connection = sqlite3.connect(self._path, isolation_level=None, timeout=self._wait_s)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        # From here on a busy database is waited for on the event loop, not inside sqlite3.
        connection.execute("PRAGMA busy_timeout = 0")
        return connection

    async def _begin(self) -> None:
        deadline = time.monotonic() + self._wait_s
        pause_s = 0.001
        while True:
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise DatabaseUnavailable(f"the database is not writable: {error}") from error
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, 0.05)

    @asynccontextmanager
    async def write(self) -> AsyncIterator[Tx]:
        async with self._lock:
            await self._begin()
            # Under the write lock, rows seen before are still the truth unless another connection
            # has committed since: data_version says so.
            version = self._writer.execute("PRAGMA data_version").fetchone()[0]
            if version != self._version or len(self._under_lock) > _REMEMBERED_ROWS:
                self._under_lock.clear()
                self._version = version
            tx = _SqliteTx(self._writer, self._under_lock)
            try:
                yield tx
                self._writer.execute("COMMIT")
            except BaseException as error:
                self._under_lock.clear()
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                if _is_outage(error):
                    raise DatabaseUnavailable(str(error)) from error
                if _is_unique_violation(error):
                    raise WriteConflict(str(error)) from error
                raise
        for call in tx._after_commit:
            call()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[Tx]:
        # Blocks overlap on the loop where one awaits something else, so each has a connection of
        # its own: on a shared one the first to end would end the snapshot of the other, and who
        # comes later would not see what was committed before.
        if self._reading.locked():
            try:
                await asyncio.wait_for(self._reading.acquire(), self._wait_s)
            except TimeoutError as error:
                raise DatabaseUnavailable("too many readers") from error
        else:
            await self._reading.acquire()
        try:
            connection = self._idle.pop() if self._idle else self._open_reader()
            try:
                connection.execute("BEGIN")
                yield _SqliteTx(connection)
            finally:
                if connection.in_transaction:
                    connection.execute("COMMIT")
                self._idle.append(connection)
        except sqlite3.OperationalError as error:
            if _is_outage(error):
                raise DatabaseUnavailable(str(error)) from error
            raise
        finally:
            self._reading.release()

    async def close(self) -> None:
        async with self._lock:
            for connection in (*self._idle, self._writer):
                connection.close()


def _outages() -> tuple[type[Exception], ...]:
    import asyncpg

    return (
        OSError,
        TimeoutError,
        asyncpg.PostgresConnectionError,
        asyncpg.OperatorInterventionError,  # shut down, cancelled, or not up yet
        asyncpg.InterfaceError,  # the connection or the pool is closed
        asyncpg.InternalClientError,  # what asyncpg says when the line breaks between two calls
    )


async def _roll_back(connection: asyncpg.pool.PoolConnectionProxy) -> None:
    """Never raises: what made us roll back is what the caller must hear of."""
    import asyncpg

    try:
        if not connection.is_closed():
            await connection.execute("ROLLBACK")
    except (*_outages(), asyncpg.PostgresError):
        with suppress(asyncpg.InterfaceError):  # the pool was closed under us
            connection.terminate()  # which rolls back as well


async def _commit(connection: asyncpg.pool.PoolConnectionProxy) -> None:
    if connection.is_closed():
        raise DatabaseUnavailable("the connection was lost before COMMIT")
    try:
        status = await connection.execute("COMMIT")
    except _outages() as error:
        raise CommitUnknown(f"the connection was lost in COMMIT: {error}") from error
    if status != "COMMIT":
        # A statement had failed and its error was caught inside the block. PostgreSQL then rolls
        # back without an error of its own: whoever asked must not believe that it stands.
        raise RuntimeError(f"COMMIT was answered {status}: nothing was written")


class _PostgresDatabase(Database):
    dialect: Dialect = "postgres"

    def __init__(self, url: str, wait_s: float, pool: asyncpg.Pool) -> None:
        self.url = url
        self._wait_s = wait_s
        self._pool = pool

    @classmethod
    async def open(cls, url: str, wait_s: float) -> _PostgresDatabase:
        import asyncpg

        try:
            pool = await asyncpg.create_pool(
                url.replace("postgres://", "postgresql://", 1),
                min_size=1,
                max_size=8,
                timeout=wait_s,
                command_timeout=30,
                # A transaction that hangs would hold account rows and hide ids from the sweeper.
                server_settings={
                    "application_name": APPLICATION,
                    "statement_timeout": "5000",
                    "idle_in_transaction_session_timeout": "5000",
                },
            )
        except (OSError, asyncpg.PostgresError, TimeoutError) as error:
            raise DatabaseUnavailable(f"cannot reach the database: {error}") from error
        return cls(url, wait_s, pool)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[asyncpg.pool.PoolConnectionProxy]:
        import asyncpg

        try:
            async with self._pool.acquire(timeout=self._wait_s) as connection:
                yield connection
        except (*_outages(), asyncpg.TooManyConnectionsError) as error:
            raise DatabaseUnavailable(f"the database did not answer: {error}") from error
        except (
            asyncpg.UniqueViolationError,
            asyncpg.DeadlockDetectedError,
            asyncpg.SerializationError,
        ) as error:
            raise WriteConflict(str(error)) from error

    @asynccontextmanager
    async def write(self) -> AsyncIterator[Tx]:
        async with self._connection() as connection:
            await connection.execute("BEGIN")
            tx = _PostgresTx(connection)
            try:
                yield tx
            except BaseException:
                await _roll_back(connection)
                raise
            await _commit(connection)
        for call in tx._after_commit:
            call()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[Tx]:
        async with (
            self._connection() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            yield _PostgresTx(connection)

    async def close(self) -> None:
        try:
            async with asyncio.timeout(self._wait_s):
                await self._pool.close()
        except TimeoutError:  # somebody is still in a transaction, or the line is dead
            self._pool.terminate()
