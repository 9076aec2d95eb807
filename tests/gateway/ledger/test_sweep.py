"""The sweeper: finds holds whose owner died, and ends only what nobody holds any more."""

from __future__ import annotations

import asyncio

import pytest

from gateway.db import Database, Tx, WriteConflict
from gateway.ledger import (
    AlreadyClosed,
    Answer,
    Balance,
    Close,
    Closed,
    Current,
    Expire,
    HoldRow,
    Outcome,
    Step,
    StillLeased,
    Writer,
    apply,
    ids,
    read,
    sweep,
)
from tests.gateway.ledger.helpers import (
    T0,
    Clock,
    capture,
    faults,
    held,
    hold,
    mint,
    minted,
    one,
    open_account,
    scalar,
)

LEASE_MS = 60_000


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The database's clock in the hands of the test."""
    clock = Clock()
    clock.install(monkeypatch)
    return clock


async def hold_at(db: Database, clock: Clock, account: int, name: str, units: int = 1) -> HoldRow:
    return await held(db, hold(account, name, units, lease_ms=LEASE_MS), clock.now_ms)


async def watermark(db: Database) -> int:
    async with db.read() as tx:
        mark: int = await tx.fetchval("SELECT next FROM sequence WHERE name = 'swept'")
    return mark


async def test_a_lapsed_hold_is_voided(db: Database, clock: Clock) -> None:
    account = await open_account(db)
    await minted(db, mint(account, 10, "a"))
    row = await hold_at(db, clock, account, "r1", 4)
    clock.now_ms += LEASE_MS + 1_001
    assert await sweep.note_open_holds(db) == 1
    assert await sweep.void_lapsed(db, 1_000) == [row]
    async with db.read() as tx:
        close = await read.close_of(tx, row.id)
    assert close is not None
    assert (close.kind, close.reason, close.amount_units) == ("void", "interrupted", 0)
    assert await one(db, Expire(account), clock.now_ms) == Current(Balance(10, 0))
    assert await sweep.void_lapsed(db, 1_000) == []
    assert await scalar(db, "SELECT count(*) FROM open_hold") == 0


async def test_nothing_is_swept_that_is_leased(db: Database, clock: Clock) -> None:
    account = await open_account(db)
    await minted(db, mint(account, 10, "a"))
    row = await hold_at(db, clock, account, "r1")
    clock.now_ms += LEASE_MS
    assert await sweep.note_open_holds(db) == 1
    for late_ms in (0, 1, 1_000):  # its lease, and the margin after it
        clock.now_ms = T0 + LEASE_MS + late_ms
        assert await sweep.void_lapsed(db, 1_000) == []
    clock.now_ms += 1
    assert await sweep.void_lapsed(db, 1_000) == [row]


async def test_the_watermark_waits_for_ids_that_may_still_be_used(
    db: Database, clock: Clock
) -> None:
    account = await open_account(db)
    blocks = ids.IdBlocks()

    async def hold_from_block(name: str) -> None:
        async with db.write() as tx:
            await apply(tx, [hold(account, name, 0)], clock.now_ms, ids=blocks)

    clock.now_ms += 100_000
    await hold_from_block("r1")
    clock.now_ms += ids.BLOCK_LIFE_MS
    start = await watermark(db)
    await sweep.note_open_holds(db)
    assert await scalar(db, "SELECT count(*) FROM open_hold") == 0
    await hold_from_block("r2")  # the last moment of the block
    clock.now_ms += ids.SETTLED_AFTER_MS - ids.BLOCK_LIFE_MS - 1
    await sweep.note_open_holds(db)
    assert await scalar(db, "SELECT count(*) FROM open_hold") == 0
    assert await watermark(db) > start  # up to the block, not into it
    clock.now_ms += 1
    assert await sweep.note_open_holds(db) == 2
    # A block that is too old is left alone.
    await hold_from_block("r3")
    mark = await watermark(db)
    assert await scalar(db, "SELECT count(*) FROM hold WHERE id >= $1", mark) == 1


async def test_each_id_range_is_looked_at_once_and_in_strides(
    db: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "_STRIDE", 7)
    account = await open_account(db)
    rows = [await hold_at(db, clock, account, f"r{i}", 0) for i in range(10)]
    for row in rows[::2]:
        await one(db, capture(row, 0))
    clock.now_ms += 1_000_000
    found, before = 0, None
    while before != (before := await watermark(db)):
        found += await sweep.note_open_holds(db)
    assert found == 5
    assert {row.id for row in await sweep.void_lapsed(db, 0)} == {r.id for r in rows[1::2]}


async def test_many_lapsed_holds_are_voided_in_portions(
    db: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "_DUE", 3)
    accounts = [await open_account(db, n) for n in (1, 2)]
    for i in range(8):
        await hold_at(db, clock, accounts[i % 2], f"r{i}", 0)
    clock.now_ms += 1_000_000
    await sweep.note_open_holds(db)
    sizes = []
    while swept := await sweep.void_lapsed(db, 0):
        sizes.append(len(swept))
    assert sizes == [3, 3, 2]


async def test_a_renewed_hold_lives(db: Database, clock: Clock) -> None:
    account = await open_account(db)
    row = await hold_at(db, clock, account, "r1", 0)
    clock.now_ms += LEASE_MS - 1
    await sweep.renew(db, [row], 30_000)
    until_ms = clock.now_ms + 30_000
    clock.now_ms = until_ms
    await sweep.note_open_holds(db)  # finds it with its first lease; the renewed one counts
    assert await sweep.void_lapsed(db, 0) == []
    lapse = Close(row, void_reason="interrupted", if_lapsed=True)
    assert await one(db, lapse, until_ms - 1) == StillLeased()
    await sweep.renew(db, [row], 5_000)  # and again
    clock.now_ms += 5_000
    assert await sweep.void_lapsed(db, 0) == []
    clock.now_ms += 1
    assert await sweep.void_lapsed(db, 0) == [row]


async def test_a_hold_renewed_below_the_watermark_lives(db: Database, clock: Clock) -> None:
    account = await open_account(db)
    row = await hold_at(db, clock, account, "r1", 0)
    clock.now_ms += LEASE_MS - 1
    await sweep.note_open_holds(db)
    await sweep.renew(db, [row], 30_000)
    clock.now_ms += 30_000
    assert await sweep.void_lapsed(db, 0) == []


async def test_renewing_writes_only_holds_that_have_lived_a_while(
    db: Database, clock: Clock
) -> None:
    account = await open_account(db)
    row = await hold_at(db, clock, account, "r1", 0)
    await sweep.renew(db, [], 1)
    clock.now_ms += LEASE_MS // 4 - 1
    await sweep.renew(db, [row], LEASE_MS)
    assert await scalar(db, "SELECT count(*) FROM open_hold") == 0
    clock.now_ms += 1
    await sweep.renew(db, [row], LEASE_MS)
    assert await scalar(db, "SELECT lease_ms FROM open_hold") == clock.now_ms + LEASE_MS


async def test_a_renewal_of_a_closed_hold_is_cleared(db: Database, clock: Clock) -> None:
    account = await open_account(db)
    row = await hold_at(db, clock, account, "r1", 0)
    await one(db, capture(row, 0))
    clock.now_ms += LEASE_MS
    await sweep.renew(db, [row], 1)
    assert await sweep.void_lapsed(db, 0) == []
    assert await scalar(db, "SELECT count(*) FROM open_hold") == 0


async def test_the_owner_is_late_but_first(db: Database, clock: Clock) -> None:
    account = await open_account(db)
    await minted(db, mint(account, 10, "a"))
    row = await hold_at(db, clock, account, "r1", 4)
    clock.now_ms += 1_000_000
    await sweep.note_open_holds(db)
    assert isinstance(await one(db, capture(row, 4), clock.now_ms), Closed)
    assert await sweep.void_lapsed(db, 0) == []
    assert await scalar(db, "SELECT spent FROM account WHERE id = $1", account) == 4


async def test_the_sweeper_is_first(db: Database, clock: Clock) -> None:
    account = await open_account(db)
    await minted(db, mint(account, 10, "a"))
    row = await hold_at(db, clock, account, "r1", 4)
    clock.now_ms += 1_000_000
    await sweep.note_open_holds(db)
    assert await sweep.void_lapsed(db, 0) == [row]
    late = await one(db, capture(row, 4), clock.now_ms)
    assert isinstance(late, AlreadyClosed)
    assert (late.transfer.kind, late.transfer.amount_units) == ("void", 0)
    assert await scalar(db, "SELECT spent FROM account WHERE id = $1", account) == 0


async def test_an_old_open_hold_is_pinned_when_its_lot_expires(db: Database, clock: Clock) -> None:
    """It stands in ``open_hold`` by then, below the watermark; young ones stand above it."""
    account = await open_account(db)
    await minted(db, mint(account, 10, "a", expires_ms=T0 + 200_000))
    old = await hold_at(db, clock, account, "old", 3)
    clock.now_ms += 100_000
    await sweep.note_open_holds(db)
    young = await hold_at(db, clock, account, "young", 4)
    await sweep.renew(db, [old], 200_000)
    clock.now_ms += 100_000
    expected = Current(Balance(0, 7))
    assert await one(db, Expire(account), clock.now_ms) == expected
    for row, units in ((old, 3), (young, 4)):
        assert isinstance(await one(db, capture(row, units), clock.now_ms), Closed)


async def test_what_is_due_expires_on_accounts_nobody_touches(
    db: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "_DUE", 2)
    for n in range(1, 6):
        account = await open_account(db, n)
        await minted(db, mint(account, 10, f"a{n}", expires_ms=T0 + n))
    assert await sweep.expire_due(db) == 0
    clock.now_ms = T0 + 3
    assert [await sweep.expire_due(db) for _ in range(3)] == [2, 1, 0]
    assert await scalar(db, "SELECT sum(available) FROM account") == 20


async def test_stored_answers_are_forgotten_and_ids_are_not(db: Database, clock: Clock) -> None:
    account = await open_account(db)
    for i in range(3):
        row = await hold_at(db, clock, account, f"r{i}", 0)
        await one(db, Close(row, 0, answer=Answer(200, (), b"x")), T0 + i)
    assert await sweep.purge_answers(db, T0 + 2) == 2
    assert await scalar(db, "SELECT count(*) FROM answer") == 1
    again = await one(db, hold(account, "r0", 0), clock.now_ms)
    assert again.__class__.__name__ == "Repeated"


async def test_old_id_blocks_are_forgotten(db: Database, clock: Clock) -> None:
    account = await open_account(db)
    await hold_at(db, clock, account, "r0", 0)
    clock.now_ms += 100 * ids.SETTLED_AFTER_MS
    row = await hold_at(db, clock, account, "r1", 0)
    await sweep.note_open_holds(db)
    assert await scalar(db, "SELECT count(*) FROM id_block") == 1
    assert await scalar(db, "SELECT min(start) FROM id_block") == row.id


async def test_holds_that_outlive_their_lease_are_a_finding(db: Database, clock: Clock) -> None:
    account = await open_account(db)
    row = await hold_at(db, clock, account, "r0", 0)
    late_ms = row.lease_ms + 120_000
    assert await faults(db, late_ms) == []
    assert await faults(db, late_ms + 1) == ["I9_holds_end"]


# --- one that cannot be swept -------------------------------------------------------------------


async def spoil(db: Database, account: int, change: str) -> None:
    async with db.write() as tx:
        await tx.execute(f"UPDATE account SET {change}, ver = ver + 1 WHERE id = $1", account)


async def test_a_faulty_account_does_not_hold_up_the_holds_of_others(
    broken_db: Database,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sweep, "_DUE", 2)
    accounts = [await open_account(broken_db, n) for n in (1, 2, 3)]
    rows = []
    for account in accounts:
        await minted(broken_db, mint(account, 10, f"m{account}"))
        rows += [await hold_at(broken_db, clock, account, f"{account} {i}", 2) for i in range(3)]
    clock.now_ms += 1_000_000
    await sweep.note_open_holds(broken_db)
    await spoil(broken_db, accounts[0], "held = 0")  # its holds would take it below zero
    swept = []
    for _ in range(6):
        swept += await sweep.void_lapsed(broken_db, 0)
    assert sorted(row.id for row in swept) == [row.id for row in rows[3:]]
    assert f"account {accounts[0]} cannot be swept" in caplog.text
    await spoil(broken_db, accounts[0], "held = 6")
    again = [*await sweep.void_lapsed(broken_db, 0), *await sweep.void_lapsed(broken_db, 0)]
    assert [row.id for row in again] == [row.id for row in rows[:3]]
    assert await faults(broken_db) == []


async def test_a_faulty_account_does_not_hold_up_the_expiry_of_others(
    broken_db: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "_DUE", 2)
    accounts = [await open_account(broken_db, n) for n in (1, 2, 3, 4)]
    for account in accounts:
        lot = mint(account, 10, f"m{account}", expires_ms=clock.now_ms + 10)
        await minted(broken_db, lot, clock.now_ms)
    await spoil(broken_db, accounts[0], "pos = 99")  # more than its lots ever were
    clock.now_ms += 10
    assert await sweep.expire_due(broken_db) == 3
    assert await sweep.expire_due(broken_db) == 0
    await spoil(broken_db, accounts[0], "pos = 0")
    assert await sweep.expire_due(broken_db) == 1
    assert await faults(broken_db) == []


async def test_a_sweep_that_meets_another_writer_is_run_again(
    db: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = await open_account(db)
    row = await hold_at(db, clock, account, "r1", 0)
    clock.now_ms += 1_000_000
    await sweep.note_open_holds(db)
    met = 0

    async def late(tx: Tx, steps: list[Step], now_ms: int) -> list[Outcome]:
        nonlocal met
        met += 1
        if met == 1:
            raise WriteConflict("another one got there first")
        return await apply(tx, steps, now_ms)

    monkeypatch.setattr(sweep, "apply", late)
    assert await sweep.void_lapsed(db, 0) == [row]
    assert met == 2


async def test_what_is_due_is_found_by_an_index(db: Database) -> None:
    explain = "EXPLAIN QUERY PLAN " if db.dialect == "sqlite" else "EXPLAIN "
    async with db.read() as tx:
        if db.dialect == "postgres":  # the table is empty
            await tx.execute("SET LOCAL enable_seqscan = off")
        rows = await tx.fetch(explain + sweep.DUE_ACCOUNTS, 5, 0, 0, 5)
        plan = " ".join(str(tuple(row)) for row in rows)
    assert "ix_account_expiring" in plan


# --- several processes --------------------------------------------------------------------------


async def test_two_sweepers_and_the_owner_at_once(postgres: Database, clock: Clock) -> None:
    other = await Database.connect(postgres.url)
    account = await open_account(postgres)
    await minted(postgres, mint(account, 1_000, "a"))
    rows = [await hold_at(postgres, clock, account, f"r{i}", 5) for i in range(60)]
    clock.now_ms += 1_000_000
    noted = await asyncio.gather(*(sweep.note_open_holds(db) for db in (postgres, other)))
    assert sum(noted) == 60
    writer = await Writer.start(other)

    async def close() -> list[int]:
        outcomes = await asyncio.gather(*(writer.submit(capture(row, 5)) for row in rows[::2]))
        return [o.transfer.id for o in outcomes if isinstance(o, Closed)]

    first, second, owner = await asyncio.gather(
        sweep.void_lapsed(postgres, 0), sweep.void_lapsed(other, 0), close()
    )
    ended = [*(row.id for row in first), *(row.id for row in second), *owner]
    assert sorted(ended) == [row.id for row in rows]  # each once, and none is left
    assert await scalar(postgres, "SELECT held FROM account WHERE id = $1", account) == 0
    spent = await scalar(postgres, "SELECT spent FROM account WHERE id = $1", account)
    assert spent == 5 * len(owner)
    await writer.stop()
    await other.close()


async def test_a_lease_renewed_while_the_sweeper_looks(
    postgres: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = await open_account(postgres)
    row = await hold_at(postgres, clock, account, "r1", 0)
    clock.now_ms += 1_000_000
    await sweep.note_open_holds(postgres)
    other = await Database.connect(postgres.url)

    async def late(tx: Tx, steps: list[Step], now_ms: int) -> list[Outcome]:
        await sweep.renew(other, [row], LEASE_MS)
        return await apply(tx, steps, now_ms)

    monkeypatch.setattr(sweep, "apply", late)
    assert await sweep.void_lapsed(postgres, 0) == []
    assert isinstance(await one(postgres, capture(row, 0), clock.now_ms), Closed)
    await other.close()


async def test_a_block_reserved_between_two_looks_is_not_skipped(
    postgres: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watermark must not pass a block that another process reserves just now."""
    clock.now_ms += 1_000_000
    account = await open_account(postgres)
    other = await Database.connect(postgres.url)
    writer = await Writer.start(other)
    clock.now_ms += 1_000_000
    true_look = ids.settled_below

    class Slow:
        """Lets the other process reserve a block after the sweeper's first look."""

        def __init__(self, tx: object) -> None:
            self.tx = tx

        def __getattr__(self, name: str) -> object:
            return getattr(self.tx, name)

        async def fetchval(self, sql: str, *params: object) -> object:
            found = await self.tx.fetchval(sql, *params)  # type: ignore[attr-defined]  # a Tx
            await writer.submit(hold(account, "first", 0))
            return found

    async def look(tx: object, now_ms: int) -> int:
        return await true_look(Slow(tx), now_ms)  # type: ignore[arg-type]  # acts as one

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "settled_below", look)
        await sweep.note_open_holds(postgres)
    await writer.submit(hold(account, "second", 0))  # from the same block
    clock.now_ms += 1_000_000
    await sweep.note_open_holds(postgres)
    assert await scalar(postgres, "SELECT count(*) FROM open_hold") == 2
    await writer.stop()
    await other.close()


async def test_a_transaction_that_takes_long_is_waited_for(
    postgres: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ids are older than any bound, and yet nobody can see its hold."""
    monkeypatch.setattr(ids, "SETTLED_AFTER_MS", 0)
    account = await open_account(postgres)
    blocks = ids.IdBlocks()

    async def hold_in(tx: Tx, name: str) -> None:
        await apply(tx, [hold(account, name, 0)], await tx.now_ms(), ids=blocks)

    async with postgres.write() as tx:
        await hold_in(tx, "first")
    async with postgres.write() as tx:
        await hold_in(tx, "slow")  # from the block that stands already
        await sweep.note_open_holds(postgres)
    await sweep.note_open_holds(postgres)
    assert await scalar(postgres, "SELECT count(*) FROM open_hold") == 2


# --- when nothing may be void ---------------------------------------------------------------

PERIOD_S, LEASE_S = 5, 45


def looked(patience: sweep.Patience, *at_s: float, took_s: float = 0) -> list[bool]:
    """Looks at these times, each of which took so long: whether what has lapsed was void."""
    said = []
    for each in at_s:
        said.append(patience.is_over(T0 + int(each * 1_000)))
        patience.looked(T0 + int((each + took_s) * 1_000))
    return said


def test_the_owners_of_another_process_come_first() -> None:
    """Whoever begins does not know what happened before."""
    patience = sweep.Patience(PERIOD_S, LEASE_S, others=True)
    assert looked(patience, 0, 5, 10, 15, 20, 7_000_000) == [False] * 3 + [True] * 2 + [False]
    alone = sweep.Patience(PERIOD_S, LEASE_S, others=False)
    assert looked(alone, 0, 5, 10) == [True] * 3


@pytest.mark.parametrize("at_s", [36, 4_000, -1])
def test_after_a_pause_the_owners_come_first(at_s: float) -> None:
    """The database was away, or the machine; or a clock was put forward, or back."""
    patience = sweep.Patience(PERIOD_S, LEASE_S, others=False)
    assert looked(patience, 0, 5, 10, 15, 20) == [True] * 5
    then = [at_s + each for each in (0, 5, 10, 14.9, 15, 20)]
    assert looked(patience, *then) == [False] * 4 + [True] * 2


def test_a_pause_in_which_no_lease_ends_is_none() -> None:
    patience = sweep.Patience(PERIOD_S, LEASE_S, others=False)
    assert looked(patience, 0, 15, 30, 45) == [True] * 4
    assert looked(patience, 60.1) == [False]


def test_a_look_that_takes_long_is_no_pause() -> None:
    """Else a sweeper that has much to do would never do it."""
    patience = sweep.Patience(PERIOD_S, LEASE_S, others=True)
    times = [n * 65 for n in range(4)]
    assert looked(patience, *times, took_s=60) == [False, True, True, True]


@pytest.mark.parametrize("lease_s", [1, 15, 45, 600])
def test_in_the_time_that_is_left_to_them_owners_renew_more_than_once(lease_s: int) -> None:
    patience = sweep.Patience(PERIOD_S, lease_s, others=True)
    assert patience.grace_ms >= 2 * min(lease_s * 1_000 / 6, 5_000) - 1
