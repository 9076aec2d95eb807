"""COMMIT on a line that breaks: the batch says what became of it, and callers are told that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from gateway import db_postgres
from gateway.db import CommitUnknown, Database, DatabaseUnavailable
from gateway.ledger import Closed, Held, Outcome, Repeated, Step, Writer
from tests.gateway import lines
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
from tests.gateway.lines import Ends, Line


class Losing(Line):
    """A line on which a COMMIT is lost: on the way there, or its answer.

    ``server_side``: the server does not notice until it is set that its client is gone.
    ``close_then``: from then on nobody gets through, until ``closed`` is taken back.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.lose: str | None = None
        self.close_then = False
        self.lost = 0
        self.server_side = asyncio.Event()

    async def commit(self, ends: Ends, data: bytes) -> bool:
        if self.lose is None:
            return False
        await ends.hold_back()
        if self.lose == "the answer":
            ends.up_writer.write(data)
            await ends.up_reader.readuntil(b"COMMIT")
        self.lose, self.lost, self.closed = None, self.lost + 1, self.close_then
        ends.writer.close()
        await self.server_side.wait()
        return True


@pytest.fixture
async def line(postgres_url: str) -> AsyncIterator[Losing]:
    made = Losing(postgres_url)
    made.server_side.set()
    yield made
    await made.end()


@pytest.fixture
async def through(postgres_url: str, line: Losing) -> AsyncIterator[Database]:
    async with lines.through(line, postgres_url) as db:
        yield db


@pytest.fixture
async def writer(through: Database) -> AsyncIterator[Writer]:
    started = await Writer.start(through)
    yield started
    await started.stop()


async def ask(writer: Writer, *steps: Step) -> list[Outcome | BaseException]:
    return await asyncio.gather(*map(writer.submit, steps), return_exceptions=True)


async def test_a_commit_whose_answer_was_lost_is_told_as_it_is(
    postgres: Database, line: Losing, writer: Writer
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
    postgres: Database, line: Losing, writer: Writer
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
    postgres: Database, line: Losing, writer: Writer
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
    line: Losing,
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
    postgres: Database, line: Losing, through: Database
) -> None:
    account = await open_account(postgres)
    line.lose = "the answer"
    await run(through, mint(account, 5, "a"))
    line.lose = "the question"
    with pytest.raises(DatabaseUnavailable, match="nothing was written"):
        await run(through, mint(account, 6, "b"))
    assert line.lost == 2
    assert await scalar(postgres, "SELECT added FROM account WHERE id = $1", account) == 5
