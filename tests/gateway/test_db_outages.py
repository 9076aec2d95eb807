"""What is told when the database is busy, killed, or cut off in the middle of a transaction."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator
from urllib.parse import urlsplit, urlunsplit

import pytest

from gateway.db import CommitUnknown, Database, DatabaseUnavailable, sqlite_path
from tests import servers

PUT = "INSERT INTO meta (key, value) VALUES ($1, $2)"


@pytest.fixture
async def postgres(postgres_url: str) -> AsyncIterator[Database]:
    database = await Database.connect(postgres_url, wait_s=2)
    yield database
    await database.close()


async def value(db: Database, key: str) -> object:
    async with db.read() as tx:
        return await tx.fetchval("SELECT value FROM meta WHERE key = $1", key)


async def test_sqlite_is_waited_for_while_another_process_writes(sqlite_url: str) -> None:
    db = await Database.connect(sqlite_url, wait_s=30)
    other = sqlite3.connect(sqlite_path(sqlite_url), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    async def put() -> None:
        async with db.write() as tx:
            await tx.execute(PUT, "a", "1")

    task = asyncio.create_task(put())
    await asyncio.sleep(0.02)
    assert not task.done()
    other.execute("COMMIT")
    await task
    other.close()
    await db.close()


async def test_sqlite_busy_beyond_the_bound_is_unavailable(sqlite_url: str) -> None:
    db = await Database.connect(sqlite_url, wait_s=0.05)
    other = sqlite3.connect(sqlite_path(sqlite_url), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseUnavailable):
        async with db.write():
            pytest.fail("two writers at once")
    other.execute("ROLLBACK")
    other.close()
    async with db.write() as tx:
        await tx.execute(PUT, "a", "1")
    await db.close()


async def kill_backends(db: Database) -> None:
    """End everybody else's connection to this database, as an administrator would."""
    name = urlsplit(db.url).path.lstrip("/")
    server = servers.with_database(db.url, "postgres")
    await asyncio.to_thread(
        servers._sql,
        server,
        f"SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = '{name}'",
    )


@pytest.mark.parametrize("where", ["between statements", "before commit"])
async def test_a_killed_connection_writes_nothing(postgres: Database, where: str) -> None:
    with pytest.raises((DatabaseUnavailable, CommitUnknown)) as caught:
        async with postgres.write() as tx:
            await tx.execute(PUT, "a", "1")
            await kill_backends(postgres)
            if where == "between statements":
                await tx.execute(PUT, "b", "1")
    if where == "between statements":
        assert isinstance(caught.value, DatabaseUnavailable)
    assert await value(postgres, "a") is None
    async with postgres.write() as tx:
        await tx.execute(PUT, "a", "2")


async def test_closing_does_not_wait_for_ever(postgres_url: str) -> None:
    db = await Database.connect(postgres_url, wait_s=0.1)
    inside = asyncio.Event()

    async def hang() -> None:
        async with db.write():
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(hang())
    await inside.wait()
    await db.close()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


class Line:
    """A proxy before PostgreSQL that cuts the line when it sees COMMIT."""

    def __init__(self, target: tuple[str, int], deliver: bool) -> None:
        self.target = target
        self.deliver = deliver  # whether the server still gets the COMMIT
        self.armed = False
        self.cut = 0
        self.running: set[asyncio.Task[None]] = set()

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.running.add(asyncio.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(*self.target)
        down = asyncio.create_task(_pump(up_reader, writer))
        while data := await reader.read(65_536):
            if self.armed and b"COMMIT" in data:
                self.cut += 1
                down.cancel()
                await asyncio.gather(down, return_exceptions=True)
                if self.deliver:
                    up_writer.write(data)
                    await up_reader.read(1)  # it has been answered, so it was done
                break
            up_writer.write(data)
        down.cancel()
        await asyncio.gather(down, return_exceptions=True)
        for each in (writer, up_writer):
            each.close()
            with contextlib.suppress(ConnectionError):
                await each.wait_closed()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
    writer.close()  # the server has ended it


@pytest.mark.parametrize("deliver", [True, False])
async def test_a_connection_lost_in_commit_is_told_as_unknown(
    postgres_url: str, deliver: bool
) -> None:
    parts = urlsplit(postgres_url)
    assert parts.hostname is not None
    line = Line((parts.hostname, parts.port or 5432), deliver)
    server = await asyncio.start_server(line.accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    through = urlunsplit(parts._replace(netloc=f"{parts.username}@127.0.0.1:{port}"))
    db = await Database.connect(through)
    line.armed = True
    done: list[str] = []
    with pytest.raises(CommitUnknown):
        async with db.write() as tx:
            await tx.execute(PUT, "a", "1")
            tx.after_commit(lambda: done.append("a"))
    assert (line.cut, done) == (1, [])
    line.armed = False
    direct = await Database.connect(postgres_url)
    assert await value(direct, "a") == ("1" if deliver else None)
    await direct.close()
    await db.close()
    await asyncio.gather(*line.running)
    server.close()
    await server.wait_closed()
