"""Lots: earliest expiry first, expiry under open holds, pins (design: lots off the hot path)."""

from __future__ import annotations

import pytest

from gateway.db import Database
from gateway.ledger import Balance, Closed, Current, Expire, Held, LedgerFault, Minted, Short
from gateway.ledger.store import OPEN_HOLDS
from tests.gateway.ledger.helpers import (
    T0,
    capture,
    held,
    hold,
    mint,
    minted,
    one,
    open_account,
    run,
    void,
)


async def lots(db: Database, account: int) -> list[tuple[str, int, str]]:
    """Reference, stored remainder and state of every lot, in spending order."""
    async with db.read() as tx:
        rows = await tx.fetch(
            "SELECT k.ref, l.remaining_units, l.state FROM lot l JOIN mint_key k ON k.lot_id = l.id"
            " WHERE l.account_id = $1 ORDER BY l.expires_ms, l.id",
            account,
        )
    return [(row["ref"], row["remaining_units"], row["state"]) for row in rows]


async def expired(db: Database) -> dict[str, int]:
    """How much of each lot has expired."""
    async with db.read() as tx:
        rows = await tx.fetch(
            "SELECT k.ref, sum(t.amount_units) AS units FROM transfer t"
            " JOIN mint_key k ON k.lot_id = t.ref WHERE t.kind = 'expire' GROUP BY k.ref"
        )
    return {row["ref"]: int(row["units"]) for row in rows}


async def test_credits_expire_at_their_moment(db: Database) -> None:
    account = await open_account(db)
    await minted(db, mint(account, 10, "a", expires_ms=T0 + 100))
    assert await one(db, Expire(account), T0 + 99) == Current(Balance(10, 0))
    assert await one(db, hold(account, "r", 10), T0 + 100) == Short(0, 10)
    assert await expired(db) == {"a": 10}  # time passes for refused requests, too


async def test_what_expires_first_is_spent_first(db: Database) -> None:
    account = await open_account(db)
    await run(db, mint(account, 10, "never"), mint(account, 10, "soon", expires_ms=T0 + 100))
    row = await held(db, hold(account, "r", 12))
    await one(db, capture(row, 12))
    assert await one(db, Expire(account), T0 + 100) == Current(Balance(8, 0))
    assert await lots(db, account) == [("soon", 0, "live"), ("never", 8, "live")]
    assert await expired(db) == {}


async def test_spending_is_booked_on_the_lots_of_its_time(db: Database) -> None:
    account = await open_account(db)
    await minted(db, mint(account, 10, "first"))
    row = await held(db, hold(account, "r", 6))
    await one(db, capture(row, 6))
    # It expires earlier, but it was not there when the 6 were spent.
    await minted(db, mint(account, 10, "later", expires_ms=T0 + 100))
    assert await lots(db, account) == [("later", 10, "live"), ("first", 4, "live")]
    assert await one(db, Expire(account), T0 + 100) == Current(Balance(4, 0))
    assert await expired(db) == {"later": 10}


async def test_a_hold_survives_the_expiry_of_what_it_stands_on(db: Database) -> None:
    account = await open_account(db)
    await minted(db, mint(account, 10, "a", expires_ms=T0 + 100))
    row = await held(db, hold(account, "r", 6))
    assert await one(db, Expire(account), T0 + 100) == Current(Balance(0, 6))
    assert await expired(db) == {"a": 4}
    closed = await one(db, capture(row, 5), T0 + 5_000)
    assert isinstance(closed, Closed)
    assert (closed.transfer.amount_units, closed.balance) == (5, Balance(0, 0))
    assert await expired(db) == {"a": 5}


async def test_late_discovery_equals_punctual(db: Database) -> None:
    account = await open_account(db)
    await minted(db, mint(account, 10, "a", expires_ms=T0 + 100))
    row = await held(db, hold(account, "r", 6))
    closed = await one(db, capture(row, 5), T0 + 5_000)  # nobody looked at T0 + 100
    assert isinstance(closed, Closed)
    assert closed.balance == Balance(0, 0)
    assert await expired(db) == {"a": 5}


async def test_a_voided_hold_lets_go_of_what_has_expired(db: Database) -> None:
    account = await open_account(db)
    await run(db, mint(account, 10, "a", expires_ms=T0 + 100), mint(account, 10, "b"))
    row = await held(db, hold(account, "r", 14))
    await one(db, Expire(account), T0 + 100)
    closed = await one(db, void(row), T0 + 200)
    assert isinstance(closed, Closed)
    assert closed.balance == Balance(10, 0)
    assert await expired(db) == {"a": 10}


async def test_the_oldest_hold_is_pinned_first(db: Database) -> None:
    account = await open_account(db)
    await run(db, mint(account, 10, "a", expires_ms=T0 + 100), mint(account, 10, "b"))
    old = await held(db, hold(account, "r1", 8))
    young = await held(db, hold(account, "r2", 8))
    assert await one(db, Expire(account), T0 + 100) == Current(Balance(4, 16))
    # a: 8 pinned to the old hold, 2 to the young one, whose other 6 float on b.
    closed = await one(db, void(young), T0 + 101)
    assert isinstance(closed, Closed)
    assert closed.balance == Balance(10, 8)
    assert await expired(db) == {"a": 2}
    closed = await one(db, capture(old, 3), T0 + 102)
    assert isinstance(closed, Closed)
    assert closed.balance == Balance(10, 0)
    assert await expired(db) == {"a": 7}


async def test_pins_are_spent_before_live_credits(db: Database) -> None:
    account = await open_account(db)
    await run(db, mint(account, 4, "a", expires_ms=T0 + 100), mint(account, 10, "b"))
    row = await held(db, hold(account, "r", 9))
    await one(db, Expire(account), T0 + 100)
    closed = await one(db, capture(row, 6), T0 + 101)
    assert isinstance(closed, Closed)
    assert closed.transfer.tape_units == 2
    assert closed.balance == Balance(8, 0)
    assert await expired(db) == {}


async def test_pins_are_spent_in_the_order_their_lots_expired(db: Database) -> None:
    account = await open_account(db)
    await run(
        db,
        mint(account, 5, "b", expires_ms=T0 + 200),
        mint(account, 5, "a", expires_ms=T0 + 100),
    )
    row = await held(db, hold(account, "r", 10))
    await one(db, Expire(account), T0 + 100)
    await one(db, Expire(account), T0 + 200)
    await one(db, capture(row, 6), T0 + 300)
    assert await expired(db) == {"b": 4}


async def test_a_hold_lets_go_of_many_pins_at_once(db: Database) -> None:
    """Each is a line of the statement and needs an id."""
    account = await open_account(db)
    await run(db, *(mint(account, 5, f"lot{i}", expires_ms=T0 + i) for i in range(1, 8)))
    row = await held(db, hold(account, "r", 35))
    for i in range(1, 8):
        await one(db, Expire(account), T0 + i)
    closed = await one(db, void(row), T0 + 100)
    assert isinstance(closed, Closed)
    assert closed.balance == Balance(0, 0)
    assert await expired(db) == {f"lot{i}": 5 for i in range(1, 8)}


async def test_a_pinned_hold_is_closed_when_another_lot_is_due(db: Database) -> None:
    """Its pins were once loaded twice: with the close, and with the account's open holds."""
    account = await open_account(db)
    await run(
        db,
        mint(account, 5, "a", expires_ms=T0 + 100),
        mint(account, 5, "b", expires_ms=T0 + 200),
    )
    row = await held(db, hold(account, "r", 7))
    await one(db, Expire(account), T0 + 100)
    closed = await one(db, capture(row, 6), T0 + 200)
    assert isinstance(closed, Closed)
    assert closed.balance == Balance(0, 0)
    assert await expired(db) == {"b": 4}


async def test_the_fold_reaches_past_lots_that_expire_with_it(db: Database) -> None:
    """What is due does not count for how far a fold gets: lots behind it were not loaded."""
    account = await open_account(db)
    await run(
        db,
        mint(account, 60, "a", expires_ms=T0 + 100),
        mint(account, 10, "b", expires_ms=T0 + 1_000),
        mint(account, 20, "c", expires_ms=T0 + 1_001),
        mint(account, 130, "d", expires_ms=T0 + 1_002),
    )
    await held(db, hold(account, "old", 60))
    young = await held(db, hold(account, "young", 60))
    closed, came, now = await run(
        db, capture(young, 60), mint(account, 1, "e"), Expire(account), at_ms=T0 + 100
    )
    assert isinstance(closed, Closed)
    assert isinstance(came, Minted)
    assert now == Current(Balance(101, 60))
    assert (await lots(db, account))[1:] == [
        ("b", 0, "live"),
        ("c", 0, "live"),
        ("d", 100, "live"),
        ("e", 1, "live"),
    ]


async def test_every_later_expiry_is_found(db: Database) -> None:
    account = await open_account(db)
    for i in range(1, 6):
        await minted(db, mint(account, 10, f"lot{i}", expires_ms=T0 + 100 * i))
    row = await held(db, hold(account, "r", 25))
    await one(db, capture(row, 25))
    left = [25, 25, 20, 10, 0]
    for i, units in enumerate(left, 1):
        assert await one(db, Expire(account), T0 + 100 * i) == Current(Balance(units, 0)), i


async def test_many_expiries_found_at_once(db: Database) -> None:
    account = await open_account(db)
    await run(db, *(mint(account, 3, f"lot{i}", expires_ms=T0 + i + 1) for i in range(40)))
    rows = [await held(db, hold(account, f"r{i}", 10)) for i in range(10)]
    outcomes = await run(db, *(capture(row, 9) for row in rows), at_ms=T0 + 9_000)
    assert all(isinstance(outcome, Closed) for outcome in outcomes)
    assert await one(db, Expire(account), T0 + 9_001) == Current(Balance(0, 0))
    assert sum((await expired(db)).values()) == 30


@pytest.mark.parametrize("late_ms", [0, 7])
async def test_credits_may_come_later_than_their_own_expiry(db: Database, late_ms: int) -> None:
    """A payment whose outcome was unknown for long: the mint must not fail, nor be spendable."""
    account = await open_account(db)
    outcome = await one(db, mint(account, 10, "late", expires_ms=T0 - late_ms))
    assert isinstance(outcome, Minted)
    assert outcome.balance == Balance(0, 0)
    assert await one(db, hold(account, "r", 1)) == Short(0, 1)
    assert await expired(db) == {"late": 10}


async def test_open_holds_may_take_credits_that_come_too_late(db: Database) -> None:
    account = await open_account(db)
    await minted(db, mint(account, 10, "a"))
    old = await held(db, hold(account, "old", 3))
    outcomes = await run(
        db,
        hold(account, "new", 2),
        capture(old, 1),
        mint(account, 9, "late", expires_ms=T0 - 1),
        Expire(account),
    )
    # The old hold is gone; the new one, of this very transaction, keeps 2 of the 9.
    assert outcomes[3] == Current(Balance(9, 2))
    assert isinstance(outcomes[0], Held)
    closed = await one(db, capture(outcomes[0].hold, 1))
    assert isinstance(closed, Closed)
    assert closed.balance == Balance(9, 0)
    assert await expired(db) == {"late": 8}


async def test_lots_that_expire_together_are_spent_in_the_order_of_their_ids(db: Database) -> None:
    account = await open_account(db)
    await run(db, *(mint(account, 5, f"lot{i}", expires_ms=T0 + 100) for i in range(3)))
    row = await held(db, hold(account, "r", 7))
    await one(db, capture(row, 7))
    await minted(db, mint(account, 1, "fold"))
    assert [units for _, units, _ in await lots(db, account)] == [0, 3, 5, 1]


async def test_open_holds_are_found_without_reading_every_hold(sqlite_url: str) -> None:
    db = await Database.connect(sqlite_url)
    async with db.read() as tx:
        plan = [row["detail"] for row in await tx.fetch(f"EXPLAIN QUERY PLAN {OPEN_HOLDS}", 1)]
    assert not [step for step in plan if step in ("SCAN h", "SCAN hold")], plan
    await db.close()


@pytest.mark.parametrize("units", [0, -1])
async def test_a_mint_of_nothing_is_a_fault(db: Database, units: int) -> None:
    account = await open_account(db)
    with pytest.raises(LedgerFault):
        await one(db, mint(account, units, "a"))
