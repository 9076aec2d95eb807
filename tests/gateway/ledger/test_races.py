"""Two processes on one PostgreSQL: locks and constraints decide, not who looked first."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import pytest

from gateway.accounts import wallets
from gateway.db import Database, DatabaseUnavailable, Tx, transact
from gateway.ledger import (
    AlreadyClosed,
    Closed,
    Expire,
    Held,
    Minted,
    MintedBefore,
    Outcome,
    Repeated,
    Short,
    Writer,
    apply,
)
from tests import servers
from tests.gateway.ledger.helpers import (
    T0,
    address,
    capture,
    faults,
    held,
    hold,
    mint,
    minted,
    one,
    open_account,
    scalar,
    void,
)


@pytest.fixture
async def second(postgres: Database) -> AsyncIterator[Database]:
    """Another process's connections to the same database."""
    other = await Database.connect(postgres.url)
    yield other
    await other.close()


async def both(postgres: Database, second: Database) -> list[Writer]:
    return [await Writer.start(postgres), await Writer.start(second)]


async def test_two_writers_spend_ten_ten_times(postgres: Database, second: Database) -> None:
    account = await open_account(postgres)
    await minted(postgres, mint(account, 10, "a"))
    writers = await both(postgres, second)
    outcomes = await asyncio.gather(
        *(writers[i % 2].submit(hold(account, f"r{i}", 1)) for i in range(100))
    )
    assert Counter(map(type, outcomes)) == Counter({Held: 10, Short: 90})
    rows = [outcome.hold for outcome in outcomes if isinstance(outcome, Held)]
    # Each is closed by both at once: the first one counts.
    closed = await asyncio.gather(
        *(w.submit(capture(row, i)) for row in rows for i, w in enumerate(writers))
    )
    assert Counter(map(type, closed)) == Counter({Closed: 10, AlreadyClosed: 10})
    for writer in writers:
        await writer.stop()


async def test_one_guard_a_hundred_times_through_two_writers(
    postgres: Database, second: Database
) -> None:
    account = await open_account(postgres)
    await minted(postgres, mint(account, 1_000, "a"))
    writers = await both(postgres, second)
    outcomes = await asyncio.gather(
        *(writers[i % 2].submit(hold(account, "same", 7)) for i in range(100))
    )
    assert Counter(map(type, outcomes)) == Counter({Held: 1, Repeated: 99})
    assert {o.hold.id for o in outcomes if isinstance(o, Held | Repeated)} == {
        next(o.hold.id for o in outcomes if isinstance(o, Held))
    }
    for writer in writers:
        await writer.stop()


async def test_one_alias_under_many_one_time_values_through_two_writers(
    postgres: Database, second: Database
) -> None:
    account = await open_account(postgres)
    await minted(postgres, mint(account, 1_000, "a"))
    writers = await both(postgres, second)
    outcomes = await asyncio.gather(
        *(writers[i % 2].submit(hold(account, f"r{i}", 7, alias="k")) for i in range(40))
    )
    assert Counter(map(type, outcomes)) == Counter({Held: 1, Repeated: 39})
    for writer in writers:
        await writer.stop()


async def test_writers_on_many_accounts_do_not_lose_a_step(
    postgres: Database, second: Database
) -> None:
    accounts = [await open_account(postgres, n) for n in range(1, 9)]
    writers = await both(postgres, second)
    await asyncio.gather(*(writers[0].submit(mint(a, 1_000, f"m{a}")) for a in accounts))

    async def spend(writer: Writer, account: int, name: str) -> None:
        outcome = await writer.submit(hold(account, name, 5))
        assert isinstance(outcome, Held)
        assert isinstance(await writer.submit(capture(outcome.hold, 2)), Closed)

    await asyncio.gather(
        *(
            spend(writers[(i + account) % 2], account, f"r{i}")
            for i in range(25)
            for account in accounts
        )
    )
    for account in accounts:
        row = await scalar(postgres, "SELECT available FROM account WHERE id = $1", account)
        assert row == 1_000 - 50
    for writer in writers:
        await writer.stop()


async def test_concurrent_mints_of_one_fact_make_one_lot(
    postgres: Database, second: Database
) -> None:
    one_account, other_account = await open_account(postgres, 1), await open_account(postgres, 2)
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def first(tx: Tx) -> list[Outcome]:
        outcomes = await apply(tx, [mint(one_account, 10, "0xtx")], T0)
        begun.set()
        await go_on.wait()
        return outcomes

    async def then(tx: Tx) -> list[Outcome]:
        return await apply(tx, [mint(other_account, 10, "0xtx")], T0)

    slow = asyncio.create_task(transact(postgres, first))
    await begun.wait()
    fast = asyncio.create_task(transact(second, then))
    await _waiting(postgres)
    go_on.set()
    (won,), (lost,) = await slow, await fast
    assert isinstance(won, Minted)
    assert lost == MintedBefore(won.lot_id, one_account, 10)
    assert await scalar(postgres, "SELECT count(*) FROM lot") == 1


async def test_many_mints_of_one_fact_at_once(postgres: Database, second: Database) -> None:
    accounts = [await open_account(postgres, n) for n in range(1, 5)]

    async def work(db: Database, account: int) -> Outcome:
        async def step(tx: Tx) -> list[Outcome]:
            return await apply(tx, [mint(account, 10, "0xtx")], T0)

        return (await transact(db, step))[0]

    outcomes = await asyncio.gather(
        *(work(db, account) for account in accounts for db in (postgres, second))
    )
    assert Counter(map(type, outcomes)) == Counter({Minted: 1, MintedBefore: 7})


async def _waiting(db: Database, count: int = 1) -> None:
    """Return when as many transactions wait for a lock."""
    for _ in range(2_000):
        waiting = await scalar(
            db,
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            " AND datname = current_database()",
        )
        if isinstance(waiting, int) and waiting >= count:
            return
        await asyncio.sleep(0.005)
    raise AssertionError("nobody waits")


async def test_a_guard_is_read_after_the_wait_for_the_account(
    postgres: Database, second: Database
) -> None:
    """Who waited for the account's lock must see the hold that was made meanwhile."""
    account = await open_account(postgres)
    await minted(postgres, mint(account, 10, "a"))
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow() -> list[Outcome]:
        async with postgres.write() as tx:
            outcomes = await apply(tx, [hold(account, "r", 3)], T0)
            begun.set()
            await go_on.wait()
        return outcomes

    task = asyncio.create_task(slow())
    await begun.wait()
    late = asyncio.create_task(one(second, hold(account, "r", 3)))
    await _waiting(postgres)
    go_on.set()
    (first,) = await task
    assert isinstance(first, Held)
    assert await late == Repeated(first.hold, None)


async def test_two_closes_at_once(postgres: Database, second: Database) -> None:
    account = await open_account(postgres)
    await minted(postgres, mint(account, 100, "a"))
    for i in range(10):
        row = await held(postgres, hold(account, f"r{i}", 5))
        outcomes = await asyncio.gather(one(postgres, capture(row, 5)), one(second, void(row)))
        assert Counter(map(type, outcomes)) == Counter({Closed: 1, AlreadyClosed: 1})


async def test_a_killed_connection_fails_its_batch_and_nothing_else(postgres: Database) -> None:
    account = await open_account(postgres)
    await minted(postgres, mint(account, 10, "a"))
    observer = await Database.connect(postgres.url)
    victim = await Database.connect(postgres.url)
    writer = await Writer.start(victim)
    async with observer.write() as tx:  # holds the account, so that the batch is in the middle
        await tx.fetch("SELECT id FROM account WHERE id = $1 FOR UPDATE", account)
        tasks = [asyncio.create_task(writer.submit(hold(account, f"r{i}", 1))) for i in range(3)]
        await _waiting(postgres)
        name = urlsplit(postgres.url).path.lstrip("/")
        await asyncio.to_thread(
            servers._sql,
            servers.with_database(postgres.url, "postgres"),
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            f" WHERE wait_event_type = 'Lock' AND datname = '{name}'",
        )
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [DatabaseUnavailable] * 3
    assert await scalar(postgres, "SELECT count(*) FROM hold") == 0
    assert await faults(postgres) == []
    assert isinstance(await writer.submit(hold(account, "r0", 1)), Held)
    await writer.stop()
    await victim.close()
    await observer.close()


async def test_new_wallets_opened_at_once_get_one_account(
    postgres: Database, second: Database
) -> None:
    async def opened(db: Database) -> int:
        async def work(tx: Tx) -> int:
            return await wallets.ensure(tx, address(9), T0)

        return await transact(db, work)

    accounts = await asyncio.gather(*(opened(db) for db in (postgres, second) * 5))
    assert len(set(accounts)) == 1
    assert await scalar(postgres, "SELECT count(*) FROM account") == 1
    assert await one(postgres, Expire(accounts[0])) is not None
