"""Running an interrupted call again: one run at a time, none after any other end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from gateway.db import Database
from gateway.ledger import (
    Close,
    Conflict,
    Held,
    Hold,
    HoldRow,
    Outcome,
    Repeated,
    Writer,
)
from gateway.ledger.sweep import INTERRUPTED
from gateway.proxy.again import MOST_RUNS, run_again
from tests.gateway.ledger import helpers
from tests.gateway.ledger.conftest import broken_db, db

__all__ = ["broken_db", "db"]

UNITS = 10_000


@asynccontextmanager
async def nodes(first: Database, count: int) -> AsyncIterator[list[Writer]]:
    """Writers of ``count`` nodes: on SQLite one process writes, so they share its connection."""
    own = [first] * count
    if first.dialect == "postgres":
        own = [first, *[await Database.connect(first.url) for _ in range(count - 1)]]
    writers = [await Writer.start(each) for each in own]
    try:
        yield writers
    finally:
        for writer in writers:
            await writer.stop()
        for each in own[1:]:
            if each is not first:
                await each.close()


async def ask(writer: Writer, step: Hold) -> Outcome:
    """One presentation of a request, as the paid route makes it."""
    return await run_again(writer, step, await writer.submit(step))


async def account(db: Database) -> int:
    account_id = await helpers.open_account(db)
    await helpers.minted(db, helpers.mint(account_id, 100 * UNITS, "a"))
    return account_id


def interrupt(row: HoldRow) -> Close:
    return Close(row, void_reason=INTERRUPTED)


def running(outcomes: Sequence[Outcome]) -> HoldRow:
    """The one hold among many outcomes; all others were told that it runs."""
    (taken,) = [each.hold for each in outcomes if isinstance(each, Held)]
    others = [each for each in outcomes if not isinstance(each, Held)]
    for each in others:
        assert isinstance(each, Repeated) and each.close is None, each
        assert each.hold.id == taken.id
    return taken


async def test_of_many_repeats_on_two_nodes_one_runs(db: Database) -> None:
    account_id = await account(db)
    step = helpers.hold(account_id, "r1", UNITS)
    async with nodes(db, 2) as writers:

        async def all_at_once() -> list[Outcome]:
            return await asyncio.gather(*(ask(writers[n % 2], step) for n in range(40)))

        taken = running(await all_at_once())
        ids = {taken.id}
        for _ in range(2):
            await writers[0].submit(interrupt(taken))
            taken = running(await all_at_once())
            assert (taken.request_id, taken.principal) == ("r1", step.guard.principal)
            ids.add(taken.id)
        assert len(ids) == 3
        await writers[1].submit(Close(taken, UNITS))
        for outcome in await all_at_once():
            assert isinstance(outcome, Repeated) and outcome.close is not None
            assert (outcome.close.kind, outcome.hold.id) == ("capture", taken.id)
    assert await helpers.scalar(db, "SELECT count(*) FROM hold") == 3
    assert await helpers.scalar(db, "SELECT spent FROM account") == UNITS


@pytest.mark.parametrize("reason", ["upstream_error", "gateway_error", "too_slow", None])
async def test_only_an_interrupted_call_runs_again(reason: str | None, db: Database) -> None:
    step = helpers.hold(await account(db), "r1", UNITS)
    async with nodes(db, 1) as (writer,):
        first = await ask(writer, step)
        assert isinstance(first, Held)
        await writer.submit(Close(first.hold, 0 if reason else UNITS, void_reason=reason))
        again = await ask(writer, step)
        assert isinstance(again, Repeated) and again.hold.id == first.hold.id
    assert await helpers.scalar(db, "SELECT count(*) FROM hold") == 1


async def test_a_run_that_fails_is_the_last_one(db: Database) -> None:
    step = helpers.hold(await account(db), "r1", UNITS)
    async with nodes(db, 1) as (writer,):
        first = running([await ask(writer, step)])
        await writer.submit(interrupt(first))
        second = running([await ask(writer, step)])
        await writer.submit(helpers.void(second, "upstream_error"))
        again = await ask(writer, step)
        assert isinstance(again, Repeated) and again.hold.id == second.id
        assert again.close is not None and again.close.reason == "upstream_error"


async def test_it_is_not_run_for_ever(db: Database) -> None:
    step = helpers.hold(await account(db), "r1", UNITS)
    async with nodes(db, 1) as (writer,):
        for _ in range(MOST_RUNS):
            await writer.submit(interrupt(running([await ask(writer, step)])))
        last = await ask(writer, step)
        assert isinstance(last, Repeated) and last.close is not None
        assert last.close.reason == INTERRUPTED
    assert await helpers.scalar(db, "SELECT count(*) FROM hold") == MOST_RUNS


async def test_other_content_is_a_conflict_and_runs_nothing(db: Database) -> None:
    step = helpers.hold(await account(db), "r1", UNITS)
    async with nodes(db, 1) as (writer,):
        await writer.submit(interrupt(running([await ask(writer, step)])))
        assert isinstance(await ask(writer, replace(step, content=b"other")), Conflict)
        second = running([await ask(writer, step)])
        assert isinstance(await ask(writer, replace(step, content=b"other")), Conflict)
        await writer.submit(Close(second, UNITS))
    assert await helpers.scalar(db, "SELECT count(*) FROM hold") == 2


async def test_signed_anew_under_the_same_alias_it_is_the_same_call(db: Database) -> None:
    """The next run belongs to the call, not to the signature it was asked with."""
    account_id = await account(db)
    steps = [helpers.hold(account_id, f"r{n}", UNITS, alias="key") for n in range(5)]
    async with nodes(db, 2) as writers:
        first = running([await ask(writers[0], steps[0])])
        await writers[0].submit(interrupt(first))
        asked = [ask(writers[n % 2], step) for n, step in enumerate(steps * 4)]
        second = running(await asyncio.gather(*asked))
        assert second.request_id == "r0"
        await writers[0].submit(Close(second, UNITS))
        for step in steps:
            known = await ask(writers[1], step)
            assert isinstance(known, Repeated) and known.hold.id == second.id
    assert await helpers.scalar(db, "SELECT count(*) FROM hold") == 2


async def test_a_run_needs_credits_and_burns_nothing_without(db: Database) -> None:
    account_id = await helpers.open_account(db)
    await helpers.minted(db, helpers.mint(account_id, UNITS, "a"))
    step = helpers.hold(account_id, "r1", UNITS)
    async with nodes(db, 1) as (writer,):
        await writer.submit(interrupt(running([await ask(writer, step)])))
        spent = running([await ask(writer, helpers.hold(account_id, "r2", UNITS))])
        await writer.submit(Close(spent, UNITS))
        assert type(await ask(writer, step)).__name__ == "Short"
        await helpers.minted(db, helpers.mint(account_id, UNITS, "b"))
        await writer.submit(Close(running([await ask(writer, step)]), UNITS))
