"""COMMIT on a line that breaks: what was answered stands, and what was not is not known."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway import db_sqlite
from gateway.db import CommitUnknown, Database
from tests.gateway import lines
from tests.gateway.lines import Ends, Line
from tests.servers import eventually

PUT = "INSERT INTO meta (key, value) VALUES ($1, $2)"

# CommandComplete "COMMIT" and ReadyForQuery "idle" (PostgreSQL, message formats).
ANSWER = b"C\0\0\0\x0bCOMMIT\0" + b"Z\0\0\0\x05I"


class Cut(Line):
    """A line that breaks at a byte of the answer to COMMIT, or right after it.

    ``at`` None: it is whole until a COMMIT has been answered in full, and breaks when the client
    next sends something; ``silent``: says nothing then until ``over``.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.armed = False
        self.at: int | None = None
        self.silent = False
        self.cuts = 0
        self.over = asyncio.Event()

    async def commit(self, ends: Ends, data: bytes) -> bool:
        if not self.armed:
            return False
        ends.up_writer.write(data)
        await ends.hold_back()
        assert await ends.up_reader.readexactly(len(ANSWER)) == ANSWER
        ends.writer.write(ANSWER[: self.at])
        await ends.writer.drain()
        # What the pool sends to reset.
        reset = await ends.reader.read(65_536) if self.at is None else b""
        self.cuts += 1
        if self.silent:
            await self.over.wait()
            ends.up_writer.write(reset)
            ends.go_on()
        else:
            ends.writer.close()
        return True


@pytest.fixture
async def cut(postgres_url: str) -> AsyncIterator[Cut]:
    line = Cut(postgres_url)
    yield line
    line.over.set()
    await asyncio.gather(*line.running)


@pytest.fixture
async def through(postgres_url: str, cut: Cut) -> AsyncIterator[Database]:
    async with lines.through(cut, postgres_url, wait_s=2) as db:
        yield db


async def value(db: Database, key: str) -> object:
    async with db.read() as tx:
        return await tx.fetchval("SELECT value FROM meta WHERE key = $1", key)


async def put(db: Database, key: str, done: list[str]) -> None:
    async with db.write() as tx:
        await tx.execute(PUT, key, "1")
        tx.after_commit(lambda: done.append(key))


async def test_half_an_answer_to_commit_is_not_known(cut: Cut, through: Database) -> None:
    done: list[str] = []
    for cut.at in range(len(ANSWER)):
        cut.armed = True
        with pytest.raises(CommitUnknown):
            await put(through, f"cut at {cut.at}", done)
        cut.armed = False
        # It was in fact committed: whoever was told "nothing was written" would do it twice.
        assert await value(through, f"cut at {cut.at}") == "1"
    assert (cut.cuts, done) == (len(ANSWER), [])


@pytest.mark.parametrize("how", ["right after it", "while it is reset", "silent while it is reset"])
async def test_what_was_committed_is_told_as_committed_when_the_line_breaks_then(
    cut: Cut, through: Database, how: str
) -> None:
    cut.at = len(ANSWER) if how == "right after it" else None
    cut.silent = how.startswith("silent")
    cut.armed = True
    done: list[str] = []
    await put(through, "a", done)
    assert done == ["a"]
    cut.armed = False
    # The broken connection is not used again.
    assert await value(through, "a") == "1"
    await put(through, "b", done)
    assert done == ["a", "b"]
    assert cut.cuts == 1


async def test_a_cancelled_caller_leaves_what_was_committed_in_order(
    cut: Cut, through: Database
) -> None:
    """Cancelled while the connection is handed back: the block's work stands, and so must what
    hangs on it."""
    cut.silent = cut.armed = True
    done: list[str] = []
    task = asyncio.create_task(put(through, "a", done))
    await eventually(lambda: cut.cuts == 1, "the cut")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done == ["a"]
    cut.armed = False
    cut.over.set()
    assert await value(through, "a") == "1"


async def test_a_failed_block_tells_its_own_error_when_the_line_breaks_after_it(
    cut: Cut, through: Database
) -> None:
    with pytest.raises(KeyError, match="mine"):
        async with through.write() as tx:
            await tx.execute(PUT, "a", "1")
            await cut.end()
            raise KeyError("mine")
    assert await value(through, "a") is None


async def test_a_commit_that_nobody_waits_for_keeps_the_connection_until_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """COMMIT runs in a thread. A caller that is cancelled meanwhile must not let the next one in
    beside it, and what was committed stays so."""
    entered, go_on = threading.Event(), threading.Event()

    class Slow(sqlite3.Connection):
        def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
            if sql == "COMMIT" and threading.current_thread().name == "commits":
                entered.set()
                assert go_on.wait(30)
            return super().execute(sql, *args)

    monkeypatch.setattr(db_sqlite, "_QUICK_S", 0)  # as on a slow disk
    connect = sqlite3.connect
    monkeypatch.setattr(
        sqlite3, "connect", lambda *args, **more: connect(*args, factory=Slow, **more)
    )
    db = await Database.connect(f"sqlite:///{tmp_path}/slow.db")
    try:
        go_on.set()
        async with db.write() as tx:
            await tx.execute("CREATE TABLE t (x INTEGER)")
        entered.clear()
        go_on.clear()

        async def insert(x: int) -> None:
            async with db.write() as tx:
                await tx.execute("INSERT INTO t VALUES ($1)", x)

        first = asyncio.create_task(insert(1))
        assert await asyncio.to_thread(entered.wait, 30)
        second = asyncio.create_task(insert(2))
        first.cancel()
        for _ in range(20):
            await asyncio.sleep(0)
        assert not first.done() and not second.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await first
        await second
        async with db.read() as tx:
            assert [row["x"] for row in await tx.fetch("SELECT x FROM t ORDER BY x")] == [1, 2]
    finally:
        go_on.set()
        await db.close()
