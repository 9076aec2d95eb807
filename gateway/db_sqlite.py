"""SQLite behind ``gateway/db.py``.

One connection writes, guarded by a lock in the process and ``BEGIN IMMEDIATE`` against other
processes; a few others read. They run on the event loop's own thread, because a statement takes
microseconds and sqlite3 gives up the GIL at every row; all but COMMIT where the disk is slow
(``_Commits``). WAL and synchronous=FULL: an answer that left is on disk.

A commit appends to the WAL and waits for that alone. A thread with a connection of its own moves
what stands there into the database file (``_Checkpoints``), so that no request waits for it.
"""

from __future__ import annotations

import asyncio
import os
import queue
import re
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from gateway.db import (
    READERS,
    Database,
    DatabaseUnavailable,
    Dialect,
    Row,
    Tx,
    WriteConflict,
    sqlite_path,
)
from gateway.observe import log

# Account rows kept between transactions; forgotten all at once when there are more.
_REMEMBERED_ROWS: Final = 100_000

# Shorter than what the event loop may stand still for; a thread costs 3 % of what can be spent.
_QUICK_S: Final = 0.003

# How often the WAL is moved into the database file, if anything was committed.
_CHECKPOINT_EVERY_S: Final = 0.25
# Beyond so many pages (32 MB) the writer is asked to begin the WAL anew.
_LARGE_WAL_PAGES: Final = 8_192
_RESTART_WAIT_MS: Final = 20


@lru_cache(maxsize=512)
def _numbered(sql: str) -> str:
    """``$1`` to SQLite's ``?1``."""
    return re.sub(r"\$(\d+)", r"?\1", sql)


@lru_cache(maxsize=512)
def _any_of(sql: str, first: int, count: int) -> str:
    """``{any}`` as SQLite's ``IN (…)`` over the parameters behind the ``first``."""
    marks = ",".join(f"?{first + 1 + i}" for i in range(count))
    return _numbered(sql).replace("{any}", f"IN ({marks})")


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


class _Checkpoints:
    """Moves what was committed from the WAL into the database file, in a thread of its own.

    It begins with the first commit: most one-shot commands never need it. What is left when the
    last connection closes SQLite moves by itself, and after a crash when it is next opened.
    """

    def __init__(self, connect: Callable[[], sqlite3.Connection]) -> None:
        self._connect = connect
        self._commits = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def committed(self) -> None:
        self._commits += 1
        if self._thread is None:
            # A daemon: a database that nobody closed must not keep the process alive.
            self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
            self._thread.start()

    async def close(self) -> None:
        """Its connection is gone when this returns, so that the writer's can be the last one."""
        if self._thread is not None:
            self._stop.set()
            await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        moved, failing = 0, False
        connection = None
        while not self._stop.wait(_CHECKPOINT_EVERY_S):
            commits = self._commits
            if commits == moved:
                continue
            try:
                if connection is None:
                    connection = self._connect()
                    connection.execute(f"PRAGMA busy_timeout = {_RESTART_WAIT_MS}")
                self.move(connection)
                moved, failing = commits, False
            except sqlite3.Error as error:
                if not failing:  # once an outage
                    log.warning("the WAL could not be moved into the database file: %s", error)
                failing = True
        if connection is not None:
            connection.close()

    def move(self, connection: sqlite3.Connection) -> None:
        """Move what can be moved without keeping anybody waiting."""
        _, pages, _ = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        if pages < _LARGE_WAL_PAGES:
            return
        # Commits went on meanwhile, so PASSIVE never finishes and the WAL only grows. This one
        # takes the write lock for the few pages since (and two fsyncs: hence not often), and the
        # next commit begins the WAL anew.
        # A reader that stands on an old snapshot keeps it from that, and is waited for only so
        # briefly that nobody notices. Not TRUNCATE: the writer would forget its pages over it,
        # and the rows it remembers.
        connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()


class _Commits:
    """Commits here where the disk is quick, and where it is not in a thread of its own, so that
    the event loop serves others while the disk works.

    Only the fsync can be worth a thread: all other statements take microseconds. Whoever commits
    holds the writer's lock until it has ended, so the connection has one user at a time.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._usual_s = 0.0  # what a commit took of late

    async def run(self, connection: sqlite3.Connection) -> None:
        """COMMIT. Raises what sqlite3 raises."""
        began_s = time.perf_counter()
        if self._usual_s < _QUICK_S:
            connection.execute("COMMIT")
        else:
            await self._in_thread(connection)
        self._usual_s += (time.perf_counter() - began_s - self._usual_s) / 8

    async def _in_thread(self, connection: sqlite3.Connection) -> None:
        if self._thread is None:
            # A daemon: a database that nobody closed must not keep the process alive.
            self._thread = threading.Thread(target=self._run, name="commits", daemon=True)
            self._thread.start()
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        self._jobs.put((connection, loop, ended))
        cancelled = False
        while not ended.done():
            try:
                await asyncio.shield(ended)
            except asyncio.CancelledError:
                # It cannot be called back, and the connection is in use until it ends.
                cancelled = True
            except sqlite3.Error:
                break
        ended.result()
        if cancelled:
            raise asyncio.CancelledError

    async def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._jobs.put(None)
            await asyncio.to_thread(self._thread.join)
            self._thread = None

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            connection, loop, ended = job
            fault: BaseException | None = None
            try:
                connection.execute("COMMIT")
            except BaseException as error:
                fault = error
            loop.call_soon_threadsafe(_end, ended, fault)


_Job = tuple[sqlite3.Connection, asyncio.AbstractEventLoop, "asyncio.Future[None]"]


def _end(ended: asyncio.Future[None], fault: BaseException | None) -> None:
    if fault is None:
        ended.set_result(None)
    else:
        ended.set_exception(fault)


class _Here:
    """That this process serves from a database file, as other processes see it: a lock that whoever
    serves shares as long as it lives. The kernel takes it back however a process ends.

    On a file beside the database: SQLite has its own locks on that one.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(f"{path}-serving", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def alone(self) -> bool:
        """Whether nobody else shares it; then nobody does before our ``share``."""
        return self._lock(exclusive=True)

    def share(self) -> None:
        """Be there, with others. Waits for one that is alone to share it."""
        self._lock(exclusive=False)

    def _lock(self, *, exclusive: bool) -> bool:
        """False if it cannot be had: others have it, or there are no such locks here, in which
        case nobody is ever alone."""
        try:
            import fcntl

            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
        except (ImportError, OSError):  # Windows; in use, or a file system without them
            return False
        return True

    def close(self) -> None:
        os.close(self._file)


class SqliteDatabase(Database):
    dialect: Dialect = "sqlite"

    def __init__(self, url: str, wait_s: float) -> None:
        self.url = url
        self._wait_s = wait_s
        self._lock = asyncio.Lock()
        self._path = sqlite_path(url)
        self._reading = asyncio.Semaphore(READERS)
        self._idle: list[sqlite3.Connection] = []
        self._under_lock: dict[int, Any] = {}
        self._version = 0
        self._commits = _Commits()
        self._checkpoints = _Checkpoints(self._open)
        self._here: _Here | None = None
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
        # Used by one thread at a time, under our own lock.
        connection = sqlite3.connect(
            self._path, isolation_level=None, timeout=self._wait_s, check_same_thread=False
        )
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        # INSERT OR REPLACE deletes without firing delete triggers unless this is on, and would get
        # past those that keep the append-only tables so.
        connection.execute("PRAGMA recursive_triggers = ON")
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
                await self._commits.run(self._writer)
            except BaseException as error:
                self._under_lock.clear()
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                if _is_outage(error):
                    raise DatabaseUnavailable(str(error)) from error
                if _is_unique_violation(error):
                    raise WriteConflict(str(error)) from error
                raise
        self._checkpoints.committed()
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

    @asynccontextmanager
    async def starting(self) -> AsyncIterator[bool]:
        here = self._here = _Here(self._path)
        try:
            yield here.alone()
        finally:
            await asyncio.to_thread(here.share)

    async def close(self) -> None:
        async with self._lock:
            await self._commits.close()
            await self._checkpoints.close()
            for connection in (*self._idle, self._writer):
                connection.close()
            if self._here is not None:
                self._here.close()
