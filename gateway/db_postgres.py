"""PostgreSQL behind ``gateway/db.py``: an asyncpg pool, READ COMMITTED, rows locked by the caller.

The only module that knows asyncpg. COMMIT is believed only when the server says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from gateway.db import (
    APPLICATION,
    ASK_S,
    CommitUnknown,
    Database,
    DatabaseUnavailable,
    Dialect,
    Row,
    Tx,
    WriteConflict,
)
from gateway.observe import log

if TYPE_CHECKING:
    import asyncpg

    _Connection: TypeAlias = asyncpg.pool.PoolConnectionProxy | asyncpg.Connection


# A transaction that hangs would hold account rows and hide ids from the sweeper.
_SETTINGS: Final = {
    "application_name": APPLICATION,
    "statement_timeout": "5000",
    "idle_in_transaction_session_timeout": "5000",
}
_SURVEY_S: Final = 86_400  # none, for asyncpg

# The writer's own connection asks for nothing but keys, thousands of times a second. Planning each
# time would cost more than running; a plan from when the tables were empty would read them whole.
_HOT_SETTINGS: Final = _SETTINGS | {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
}


class _PostgresTx(Tx):
    dialect: Dialect = "postgres"
    for_update = " FOR UPDATE"

    def __init__(self, connection: _Connection, timeout_s: float | None = None) -> None:
        super().__init__()
        self._connection = connection
        self._timeout_s = timeout_s  # of a fetch; None: the connection's

    async def fetch(self, sql: str, *params: Any) -> Sequence[Row]:
        rows: Sequence[Row] = await self._connection.fetch(sql, *params, timeout=self._timeout_s)
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


async def _roll_back(connection: _Connection) -> None:
    """Never raises: what made us roll back is what the caller must hear of."""
    import asyncpg

    try:
        if not connection.is_closed():
            await connection.execute("ROLLBACK")
    except (*_outages(), asyncpg.PostgresError):
        _end(connection)  # which rolls back as well


def _end(connection: _Connection) -> None:
    import asyncpg

    with suppress(asyncpg.InterfaceError):  # the pool has it back, or was closed under us
        connection.terminate()


async def _commit(connection: _Connection) -> None:
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


async def _stands(url: str, insert: str, params: Sequence[Any]) -> bool:
    """Whether a transaction whose COMMIT was lost has written the row ``insert`` writes again.

    A look for the row would not do: the server may still be at that COMMIT. Writing it waits for
    the end of whoever holds the key. Ours is rolled back. Raises what asyncpg does, and
    ``TimeoutError`` after ``ASK_S``.
    """
    import asyncpg

    async with asyncio.timeout(ASK_S):
        while True:
            try:
                connection = await asyncpg.connect(
                    url, timeout=ASK_S, server_settings={"application_name": APPLICATION}
                )
            except (*_outages(), asyncpg.PostgresError):
                await asyncio.sleep(0.1)  # it may be starting again
                continue
            try:
                await connection.execute("BEGIN")
                await connection.execute(insert, *params)
            except asyncpg.UniqueViolationError:
                return True
            except _outages():
                continue
            else:
                return False
            finally:
                connection.terminate()  # which rolls back


@contextmanager
def _told() -> Iterator[None]:
    """What asyncpg says, in the words of ``gateway/db.py``."""
    import asyncpg

    try:
        yield
    except (*_outages(), asyncpg.TooManyConnectionsError) as error:
        raise DatabaseUnavailable(f"the database did not answer: {error}") from error
    except (
        asyncpg.UniqueViolationError,
        asyncpg.DeadlockDetectedError,
        asyncpg.SerializationError,
    ) as error:
        raise WriteConflict(str(error)) from error


def _dsn(url: str) -> str:
    return url.replace("postgres://", "postgresql://", 1)


class PostgresDatabase(Database):
    dialect: Dialect = "postgres"

    def __init__(self, url: str, wait_s: float, pool: asyncpg.Pool) -> None:
        self.url = url
        self._dsn = _dsn(url)
        self._wait_s = wait_s
        self._pool = pool
        self._hot: asyncpg.Connection | None = None
        self._hot_lock = asyncio.Lock()

    @classmethod
    async def open(cls, url: str, wait_s: float) -> PostgresDatabase:
        import asyncpg

        try:
            pool = await asyncpg.create_pool(
                _dsn(url),
                min_size=1,
                max_size=8,
                timeout=wait_s,
                command_timeout=30,
                server_settings=_SETTINGS,
            )
        except (OSError, asyncpg.PostgresError, TimeoutError) as error:
            raise DatabaseUnavailable(f"cannot reach the database: {error}") from error
        return cls(url, wait_s, pool)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[_Connection]:
        with _told():
            connection = await self._pool.acquire(timeout=self._wait_s)
            try:
                yield connection
            finally:
                await self._release(connection)

    @asynccontextmanager
    async def _hot_connection(self) -> AsyncIterator[_Connection]:
        """Kept open, and not reset between two uses as the pool does: that is a round trip."""
        import asyncpg

        with _told():
            async with self._hot_lock:
                hot = self._hot
                if hot is not None and not hot.is_closed() and hot.is_in_transaction():
                    # Whoever had it was cancelled while it rolled back. The server does that now.
                    hot.terminate()
                if self._hot is None or self._hot.is_closed():
                    self._hot = await asyncpg.connect(
                        self._dsn,
                        timeout=self._wait_s,
                        command_timeout=30,
                        server_settings=_HOT_SETTINGS,
                    )
                yield self._hot

    async def _release(self, connection: asyncpg.pool.PoolConnectionProxy) -> None:
        """Hand a connection back. The transaction has ended by now, however it did: a line that
        breaks here changes nothing about that, and must not be told in its place. The pool closes
        what it cannot reset."""
        import asyncpg

        try:
            await self._pool.release(connection)
        except (*_outages(), asyncpg.PostgresError) as error:
            log.debug("a connection was lost after its transaction: %s", error)

    @asynccontextmanager
    async def write(self) -> AsyncIterator[Tx]:
        async with self._connection() as connection, self._transaction(connection) as tx:
            yield tx

    @asynccontextmanager
    async def write_hot(self) -> AsyncIterator[Tx]:
        async with self._hot_connection() as connection, self._transaction(connection) as tx:
            yield tx

    @asynccontextmanager
    async def _transaction(self, connection: _Connection) -> AsyncIterator[Tx]:
        await connection.execute("BEGIN")
        tx = _PostgresTx(connection)
        try:
            yield tx
        except BaseException:
            await _roll_back(connection)
            raise
        try:
            await _commit(connection)
        except CommitUnknown as error:
            _end(connection)  # it may be open, with that COMMIT on its way
            await self._ask(tx, error)
        # It stands from here on, even if handing the connection back is cancelled.
        for call in tx._after_commit:
            call()

    async def _ask(self, tx: Tx, lost: CommitUnknown) -> None:
        """Returns if the transaction stands after all."""
        import asyncpg

        if tx._mark is None:
            raise lost
        try:
            insert, params = tx._mark
            stands = await _stands(self._dsn, insert, params)
        except (*_outages(), asyncpg.PostgresError) as error:
            raise CommitUnknown(f"{lost}, and it cannot be asked: {error!r}") from error
        if not stands:
            raise DatabaseUnavailable(f"{lost}, and nothing was written") from lost

    @asynccontextmanager
    async def read(self) -> AsyncIterator[Tx]:
        async with (
            self._connection() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            yield _PostgresTx(connection)

    @asynccontextmanager
    async def survey(self) -> AsyncIterator[Tx]:
        async with (
            self._connection() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            for name in ("statement_timeout", "idle_in_transaction_session_timeout"):
                await connection.execute(f"SET LOCAL {name} = 0")
            yield _PostgresTx(connection, _SURVEY_S)

    async def close(self) -> None:
        try:
            async with asyncio.timeout(self._wait_s):
                async with self._hot_lock:
                    if self._hot is not None:
                        await self._hot.close()
                await self._pool.close()
        except TimeoutError:  # somebody is still in a transaction, or the line is dead
            self._pool.terminate()
            if self._hot is not None:
                self._hot.terminate()


async def single(url: str) -> asyncpg.Connection:
    """One connection of its own, for what cannot run in the pool (migrations)."""
    import asyncpg

    return await asyncpg.connect(url)
