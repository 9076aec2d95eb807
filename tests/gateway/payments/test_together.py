"""Writes that come at the same time share a transaction, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway.db import CommitUnknown, Database, DatabaseUnavailable, Tx, WriteConflict
from gateway.payments import journal, together
from gateway.payments.together import Together
from tests.gateway.payments.parts import blank


@pytest.fixture
async def db(db_url: str) -> AsyncIterator[Database]:
    found = await Database.connect(db_url)
    yield found
    await found.close()


def inserting(n: int, seen: list[Tx] | None = None) -> Any:
    async def work(tx: Tx) -> int:
        if seen is not None:
            seen.append(tx)
        await journal.insert(tx, blank(f"pay_{n}", auth_nonce=f"0x{n:064x}"))
        return n

    return work


async def stored(db: Database) -> list[str]:
    async with db.read() as tx:
        return [row["id"] for row in await tx.fetch("SELECT id FROM payment ORDER BY id")]


async def test_they_are_committed_together_and_each_gets_its_own(db: Database) -> None:
    shared, seen = Together(), list[Tx]()
    done = await asyncio.gather(
        *(together.write(shared, db, None, inserting(n, seen)) for n in range(9))
    )
    assert done == list(range(9))
    assert len({id(tx) for tx in seen}) == 1
    assert await stored(db) == [f"pay_{n}" for n in range(9)]
    assert shared.runner is None and not shared.waiting


async def test_accounts_are_locked_in_their_order_and_new_ones_last(db: Database) -> None:
    shared, order = Together(), list[int | None]()

    def noting(account_id: int | None) -> Any:
        async def work(_tx: Tx) -> None:
            order.append(account_id)

        return work

    await asyncio.gather(
        *(together.write(shared, db, each, noting(each)) for each in (7, None, 3, 9, 3))
    )
    assert order == [3, 3, 7, 9, None]


async def test_what_one_raises_is_its_own(db: Database) -> None:
    async def broken(tx: Tx) -> None:
        await inserting(99)(tx)
        raise ZeroDivisionError

    shared = Together()
    works = [inserting(0), inserting(1), broken, inserting(2)]
    done = await asyncio.gather(
        *(together.write(shared, db, n, work) for n, work in enumerate(works)),
        return_exceptions=True,
    )
    assert [type(each) for each in done] == [int, int, ZeroDivisionError, int]
    assert await stored(db) == ["pay_0", "pay_1", "pay_2"]


@pytest.mark.parametrize("error", [DatabaseUnavailable, CommitUnknown])
async def test_a_database_that_is_gone_is_told_to_all(db: Database, error: type[Exception]) -> None:
    async def lost(_tx: Tx) -> None:
        raise error("gone")

    done = await asyncio.gather(
        *(together.write(shared, db, None, work) for shared in (Together(),)
          for work in (inserting(0), lost, inserting(1))),
        return_exceptions=True,
    )  # fmt: skip
    assert [type(each) for each in done] == [error] * 3
    assert await stored(db) == []


async def test_a_conflict_runs_all_of_them_again(db: Database) -> None:
    tries = 0

    async def conflicting(tx: Tx) -> str:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise WriteConflict("somebody was faster")
        return "at last"

    shared = Together()
    done = await asyncio.gather(
        together.write(shared, db, 1, inserting(0)), together.write(shared, db, 2, conflicting)
    )
    assert done == [0, "at last"]
    assert await stored(db) == ["pay_0"]


async def test_who_went_away_is_written_all_the_same(db: Database) -> None:
    shared = Together()
    gone = asyncio.create_task(together.write(shared, db, None, inserting(0)))
    await asyncio.sleep(0)
    gone.cancel()
    assert await together.write(shared, db, None, inserting(1)) == 1
    assert await stored(db) == ["pay_0", "pay_1"]
    with pytest.raises(asyncio.CancelledError):
        await gone
