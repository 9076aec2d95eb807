"""COMMIT on a line that breaks: the batch says what became of it, and callers are told that."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from urllib.parse import urlsplit, urlunsplit

import pytest

from gateway import db_postgres
from gateway.db import CommitUnknown, Database, DatabaseUnavailable
from gateway.ledger import Closed, Held, Outcome, Repeated, Step, Writer
from tests.gateway.ledger.helpers import (
    capture,
    faults,
    hold,
    mint,
    minted,
    open_account,
    run,
    scalar,
)


class Line:
    """A line to PostgreSQL on which a COMMIT is lost: on the way there, or its answer.

    ``server_side``: the server does not notice until it is set that its client is gone.
    ``close_then``: from then on nobody gets through, until ``closed`` is taken back.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.lose: str | None = None
        self.close_then = False
        self.closed = False
        self.lost = 0
        self.server_side = asyncio.Event()
        self.running: set[asyncio.Task[None]] = set()

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.running.add(asyncio.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.closed:
            writer.close()
            return
        up_reader, up_writer = await asyncio.open_connection(*self.target)
        down = asyncio.create_task(_pump(up_reader, writer))
        try:
            while data := await reader.read(65_536):
                if self.lose is not None and b"COMMIT" in data:
                    down.cancel()
                    await asyncio.gather(down, return_exceptions=True)
                    if self.lose == "the answer":
                        up_writer.write(data)
                        await up_reader.readuntil(b"COMMIT")
                    self.lose, self.lost, self.closed = None, self.lost + 1, self.close_then
                    writer.close()
                    await self.server_side.wait()
                    return
                up_writer.write(data)
        except ConnectionError:
            pass
        finally:
            down.cancel()
            await asyncio.gather(down, return_exceptions=True)
            for each in (writer, up_writer):
                each.close()
                with contextlib.suppress(ConnectionError):
                    await each.wait_closed()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
    writer.close()


@pytest.fixture
async def line(postgres_url: str) -> AsyncIterator[Line]:
    parts = urlsplit(postgres_url)
    assert parts.hostname is not None
    made = Line((parts.hostname, parts.port or 5432))
    made.server_side.set()
    yield made
    made.server_side.set()
    for task in made.running:
        task.cancel()
    await asyncio.gather(*made.running, return_exceptions=True)


@pytest.fixture
async def through(postgres_url: str, line: Line) -> AsyncIterator[Database]:
    server = await asyncio.start_server(line.accept, "127.0.0.1", 0)
    parts = urlsplit(postgres_url)
    where = f"{parts.username}@127.0.0.1:{server.sockets[0].getsockname()[1]}"
    db = await Database.connect(urlunsplit(parts._replace(netloc=where)), wait_s=2)
    yield db
    await db.close()
    server.close()


@pytest.fixture
async def writer(through: Database) -> AsyncIterator[Writer]:
    started = await Writer.start(through)
    yield started
    await started.stop()


async def ask(writer: Writer, *steps: Step) -> list[Outcome | BaseException]:
    return await asyncio.gather(*map(writer.submit, steps), return_exceptions=True)


async def test_a_commit_whose_answer_was_lost_is_told_as_it_is(
    postgres: Database, line: Line, writer: Writer
) -> None:
    account = await open_account(postgres)
    await minted(postgres, mint(account, 10, "a"))
    line.lose = "the answer"
    first, second = await ask(writer, hold(account, "r1", 3), hold(account, "r2", 4))
    assert isinstance(first, Held)
    assert isinstance(second, Held)
    assert line.lost == 1
    assert await scalar(postgres, "SELECT held FROM account WHERE id = $1", account) == 7
    # The writer goes on, on the same chain, and knows what it did.
    assert isinstance((await ask(writer, capture(first.hold, 3)))[0], Closed)
    assert await ask(writer, hold(account, "r2", 4)) == [Repeated(second.hold, None)]
    assert await scalar(postgres, "SELECT count(DISTINCT writer) FROM batch WHERE writer > 0") == 1


async def test_a_commit_that_was_lost_on_its_way_is_told_as_not_written(
    postgres: Database, line: Line, writer: Writer
) -> None:
    account = await open_account(postgres)
    await minted(postgres, mint(account, 10, "a"))
    line.lose = "the question"
    (told,) = await ask(writer, hold(account, "r1", 3))
    assert isinstance(told, DatabaseUnavailable)
    assert "nothing was written" in str(told)
    assert line.lost == 1
    assert await scalar(postgres, "SELECT count(*) FROM hold") == 0
    (outcome,) = await ask(writer, hold(account, "r1", 3))
    assert isinstance(outcome, Held)


async def test_a_transaction_that_the_server_still_has_open_is_waited_for(
    postgres: Database, line: Line, writer: Writer
) -> None:
    """A look for the row would say that it is not there, while it may still be committed."""
    account = await open_account(postgres)
    await minted(postgres, mint(account, 10, "a"))
    line.lose = "the question"
    line.server_side.clear()
    asked = asyncio.create_task(ask(writer, hold(account, "r1", 3)))
    waiting = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND wait_event = 'transactionid'"
    )
    async with asyncio.timeout(20):
        while not await scalar(postgres, waiting):
            await asyncio.sleep(0.01)
    assert not asked.done()
    line.server_side.set()
    (told,) = await asked
    assert isinstance(told, DatabaseUnavailable)
    assert await scalar(postgres, "SELECT count(*) FROM hold") == 0


@pytest.mark.parametrize("lose", ["the answer", "the question"])
async def test_what_cannot_be_asked_stays_unknown(
    postgres: Database,
    line: Line,
    writer: Writer,
    monkeypatch: pytest.MonkeyPatch,
    lose: str,
) -> None:
    monkeypatch.setattr(db_postgres, "ASK_S", 0.5)
    account = await open_account(postgres)
    await minted(postgres, mint(account, 10, "a"))
    line.lose, line.close_then = lose, True
    (told,) = await ask(writer, hold(account, "r1", 3))
    assert isinstance(told, CommitUnknown)
    line.closed = False
    # Asked again, the guard tells; and the writer begins a chain anew.
    (again,) = await ask(writer, hold(account, "r1", 3))
    assert type(again) is (Repeated if lose == "the answer" else Held)
    (other,) = await ask(writer, hold(account, "r2", 3))
    assert isinstance(other, Held)
    assert await faults(postgres) == []


async def test_others_that_apply_steps_are_told_too(
    postgres: Database, line: Line, through: Database
) -> None:
    account = await open_account(postgres)
    line.lose = "the answer"
    await run(through, mint(account, 5, "a"))
    line.lose = "the question"
    with pytest.raises(DatabaseUnavailable, match="nothing was written"):
        await run(through, mint(account, 6, "b"))
    assert line.lost == 2
    assert await scalar(postgres, "SELECT added FROM account WHERE id = $1", account) == 5
