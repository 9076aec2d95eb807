"""The writer: concurrent steps share a commit, and each gets its own answer, once it is durable."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from gateway.db import CommitUnknown, Database, DatabaseUnavailable, Tx
from gateway.ledger import (
    Closed,
    Expire,
    Held,
    LedgerFault,
    Outcome,
    Repeated,
    Short,
    Step,
    Writer,
    batch,
    save,
)
from gateway.ledger.batch import WriterStopped
from tests.gateway.ledger.helpers import (
    capture,
    held,
    hold,
    mint,
    minted,
    one,
    open_account,
    scalar,
    void,
)


class Counting(Database):
    """Counts transactions. ``lose_commit``: commit the next one, then say that it is not known."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.dialect = db.dialect
        self.url = db.url
        self.begun = 0
        self.lose_commit = False

    @asynccontextmanager
    async def write(self) -> AsyncIterator[Tx]:
        self.begun += 1
        async with self.db.write() as tx:
            yield tx
        if self.lose_commit:
            raise CommitUnknown("lost on the way back")

    @asynccontextmanager
    async def read(self) -> AsyncIterator[Tx]:
        async with self.db.read() as tx:
            yield tx


@pytest.fixture
async def counting(db: Database) -> Counting:
    return Counting(db)


@pytest.fixture
async def writer(counting: Counting) -> AsyncIterator[Writer]:
    started = await Writer.start(counting)
    counting.begun = 0
    yield started
    if started.alive:
        await started.stop()


async def submit_all(writer: Writer, steps: list[Step]) -> list[Outcome | BaseException]:
    return await asyncio.gather(*(writer.submit(s) for s in steps), return_exceptions=True)


@pytest.mark.parametrize("calls", [10, 40, 100])
async def test_a_balance_of_ten_is_spent_ten_times(
    db: Database, writer: Writer, calls: int
) -> None:
    account = await open_account(db)
    await minted(db, mint(account, 10, "a"))
    outcomes = await submit_all(writer, [hold(account, f"r{i}", 1) for i in range(calls)])
    assert Counter(map(type, outcomes)) == Counter({Held: 10, Short: calls - 10})
    assert await scalar(db, "SELECT available FROM account WHERE id = $1", account) == 0
    rows = [outcome.hold for outcome in outcomes if isinstance(outcome, Held)]
    closed = await submit_all(writer, [capture(row, 1) for row in rows])
    assert all(isinstance(outcome, Closed) for outcome in closed)


async def test_one_guard_a_hundred_times_at_once(db: Database, writer: Writer) -> None:
    account = await open_account(db)
    await minted(db, mint(account, 1_000, "a"))
    outcomes = await submit_all(writer, [hold(account, "same", 3) for _ in range(100)])
    assert Counter(map(type, outcomes)) == Counter({Held: 1, Repeated: 99})


async def test_steps_that_are_ready_together_are_committed_together(
    db: Database, counting: Counting, writer: Writer
) -> None:
    account = await open_account(db)
    outcomes = await submit_all(writer, [hold(account, f"r{i}", 0) for i in range(50)])
    assert all(isinstance(outcome, Held) for outcome in outcomes)
    assert counting.begun == 1


async def test_a_batch_is_bounded(
    db: Database, counting: Counting, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "MAX_BATCH", 8)
    account = await open_account(db)
    outcomes = await submit_all(writer, [hold(account, f"r{i}", 0) for i in range(50)])
    assert all(isinstance(outcome, Held) for outcome in outcomes)
    assert counting.begun == 7


async def test_a_fault_does_not_touch_its_neighbours(db: Database, writer: Writer) -> None:
    account = await open_account(db)
    await minted(db, mint(account, 10, "a"))
    row = await held(db, hold(account, "r0", 5))
    outcomes = await submit_all(
        writer,
        [
            hold(account, "r1", 1),
            capture(row, 6),  # more than it holds
            hold(account, "r2", 1),
            hold(7, "r3", 1),  # no such account
            capture(row, 2),
        ],
    )
    kinds = [type(outcome) for outcome in outcomes]
    assert kinds == [Held, LedgerFault, Held, LedgerFault, Closed]
    assert await scalar(db, "SELECT available FROM account WHERE id = $1", account) == 6


async def test_what_the_database_refuses_does_not_touch_its_neighbours(
    db: Database, writer: Writer
) -> None:
    account = await open_account(db)
    outcomes = await submit_all(
        writer,
        [hold(account, "r1", 0), hold(account, "\ud800", 0), hold(account, "r2", 0)],
    )
    assert isinstance(outcomes[0], Held)
    assert isinstance(outcomes[1], Exception)
    assert not isinstance(outcomes[1], DatabaseUnavailable)
    assert isinstance(outcomes[2], Held)


async def test_a_caller_that_leaves_does_not_take_its_step_along(
    db: Database, writer: Writer
) -> None:
    account = await open_account(db)
    leaving = asyncio.create_task(writer.submit(hold(account, "leaving", 0)))
    staying = asyncio.create_task(writer.submit(hold(account, "staying", 0)))
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert isinstance(await staying, Held)
    assert isinstance(await writer.submit(hold(account, "leaving", 0)), Repeated)


async def test_a_caller_that_leaves_a_faulty_step_disturbs_nobody(
    db: Database, writer: Writer
) -> None:
    account = await open_account(db)
    leaving = asyncio.create_task(writer.submit(hold(7, "no such account", 0)))
    staying = asyncio.create_task(writer.submit(hold(account, "staying", 0)))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    assert isinstance(await staying, Held)


async def test_stop_finishes_what_is_queued_and_takes_nothing_new(
    db: Database, writer: Writer
) -> None:
    account = await open_account(db)
    tasks = [asyncio.create_task(writer.submit(hold(account, f"r{i}", 0))) for i in range(30)]
    await asyncio.sleep(0)
    await writer.stop()
    assert not writer.alive
    assert all(isinstance(outcome, Held) for outcome in await asyncio.gather(*tasks))
    with pytest.raises(WriterStopped):
        await writer.submit(Expire(account))
    await writer.stop()


async def test_a_full_queue_refuses(
    db: Database, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "MAX_QUEUE", 3)
    account = await open_account(db)
    outcomes = await submit_all(writer, [hold(account, f"r{i}", 0) for i in range(5)])
    assert [type(outcome) for outcome in outcomes] == [Held] * 3 + [DatabaseUnavailable] * 2
    assert isinstance(await writer.submit(hold(account, "r4", 0)), Held)


async def test_a_lost_commit_is_told_to_all_and_not_tried_again(
    db: Database, counting: Counting, writer: Writer
) -> None:
    account = await open_account(db)
    await minted(db, mint(account, 10, "a"))
    counting.lose_commit = True
    steps: list[Step] = [hold(account, f"r{i}", 1) for i in range(3)]
    outcomes = await submit_all(writer, steps)
    assert [type(outcome) for outcome in outcomes] == [CommitUnknown] * 3
    assert counting.begun == 1
    counting.lose_commit = False
    # Asked again, the guard tells that it had been applied.
    assert [type(outcome) for outcome in await submit_all(writer, steps)] == [Repeated] * 3


async def test_an_unreachable_database_is_told_to_all(db: Database, writer: Writer) -> None:
    account = await open_account(db)

    async def away(*_: object, **__: object) -> list[Outcome]:
        raise DatabaseUnavailable("away")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "apply", away)
        outcomes = await submit_all(writer, [hold(account, f"r{i}", 0) for i in range(3)])
    assert [type(outcome) for outcome in outcomes] == [DatabaseUnavailable] * 3
    assert isinstance(await writer.submit(hold(account, "r0", 0)), Held)


async def test_nobody_waits_for_a_writer_that_has_died(db: Database, writer: Writer) -> None:
    account = await open_account(db)
    async with db.write():  # the batch cannot begin
        tasks = [asyncio.create_task(writer.submit(hold(account, "r1", 0)))]
        for _ in range(10):
            await asyncio.sleep(0)
        tasks.append(asyncio.create_task(writer.submit(hold(account, "r2", 0))))
        await asyncio.sleep(0)
        writer._task.cancel()
        _done, waiting = await asyncio.wait(tasks, timeout=10)
        assert not waiting
    assert isinstance(tasks[0].exception(), CommitUnknown)
    assert isinstance(tasks[1].exception(), WriterStopped)
    assert not writer.alive
    with pytest.raises(WriterStopped):
        await writer.submit(hold(account, "r1", 0))
    assert await scalar(db, "SELECT count(*) FROM hold") == 0


async def test_writers_have_balances_of_their_own_and_the_house_is_their_sum(
    db: Database,
) -> None:
    account = await open_account(db)
    await minted(db, mint(account, 100, "a"))
    first, second = await Writer.start(db), await Writer.start(db)
    assert first.id != second.id
    assert 0 not in (first.id, second.id)
    for writer, units in ((first, 3), (second, 4)):
        outcome = await writer.submit(hold(account, f"r{units}", 9))
        assert isinstance(outcome, Held)
        await writer.submit(capture(outcome.hold, units))
    async with db.read() as tx:
        rows = await tx.fetch(
            "SELECT writer, balance FROM house_balance WHERE account_id = 2 ORDER BY writer"
        )
    assert [(row["writer"], row["balance"]) for row in rows] == [(first.id, 3), (second.id, 4)]
    await first.stop()
    await second.stop()


async def test_many_accounts_at_once_each_get_their_own(db: Database, writer: Writer) -> None:
    accounts = [await open_account(db, n) for n in range(1, 6)]
    await asyncio.gather(*(writer.submit(mint(a, 3, f"m{a}")) for a in accounts))
    outcomes = await submit_all(writer, [hold(a, f"r{i}", 1) for i in range(5) for a in accounts])
    assert Counter(map(type, outcomes)) == Counter({Held: 15, Short: 10})
    rows = [outcome.hold for outcome in outcomes if isinstance(outcome, Held)]
    assert Counter(row.account_id for row in rows) == Counter(dict.fromkeys(accounts, 3))
    assert len({row.id for row in rows}) == 15
    await submit_all(writer, [void(row) for row in rows])
    for account in accounts:
        assert (await one(db, hold(account, "last", 3))).__class__ is Held


def test_only_short_header_sets_are_kept_as_text() -> None:
    """Upstreams make them as long as they like."""
    kept = save._kept_text
    kept.cache_clear()
    short = (("content-type", "text/plain"), ("vary", "é"))
    for headers, keeps in [
        (short, 1),
        (short, 1),
        ((("x", "y" * 2_000),), 1),
        ((("x", ""),) * 1_000, 1),  # nothing in it, and yet long
        ((*short, ("z", "1")), 2),
    ]:
        assert json.loads(save._headers_text(headers)) == [list(pair) for pair in headers]
        assert kept.cache_info().currsize == keeps
