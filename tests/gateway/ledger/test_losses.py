"""Debts that nobody will pay: the house bears them, and gets back what comes in after all."""

from __future__ import annotations

from gateway.db import Database
from gateway.ledger import (
    DEBT,
    LOSSES,
    Balance,
    Expire,
    Freeze,
    Held,
    LotIs,
    Refund,
    Reopen,
    Reverse,
    Unfreeze,
    WriteOff,
    read,
)
from tests.gateway.ledger.helpers import (
    capture,
    charged,
    held,
    hold,
    mint,
    minted,
    one,
    open_account,
    run,
    scalar,
)
from tests.gateway.ledger.test_freeze import debt, house


async def lost(db: Database, lot: int) -> tuple[int, int, int]:
    """Short, lost, repaid."""
    async with db.read() as tx:
        row = await tx.fetchrow("SELECT * FROM lot WHERE id = $1", lot)
    assert row is not None
    return row["short_units"], row["lost_units"], row["repaid_units"]


def off(lot: int) -> WriteOff:
    return WriteOff(lot, "they never came back", "ops")


async def spent_and_gone(db: Database, units: int = 7) -> tuple[int, int]:
    """An account that bought 10, spent some, and whose money is gone; its lot."""
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "bought"))
    await charged(db, account, "r", units)
    await one(db, Reverse(lot, 10, "its block left the chain"))
    return account, lot


async def test_what_is_given_up_is_the_houses(db: Database) -> None:
    account, lot = await spent_and_gone(db)
    before = await house(db, LOSSES), await house(db, DEBT)
    assert await one(db, off(lot)) == LotIs(lot, True, 0, Balance(0, 0))
    assert await lost(db, lot) == (0, 7, 0)
    assert (await house(db, LOSSES), await house(db, DEBT)) == (before[0] - 7, before[1] + 7)
    await minted(db, mint(account, 3, "new"))
    assert isinstance(await one(db, hold(account, "again", 3)), Held)


async def test_the_same_again_changes_nothing_and_is_noted_once(db: Database) -> None:
    account, lot = await spent_and_gone(db)
    first, second = await run(db, off(lot), off(lot))
    assert (first, second) == (
        LotIs(lot, True, 0, Balance(0, 0)),
        LotIs(lot, False, 0, Balance(0, 0)),
    )
    async with db.read() as tx:
        noted = await tx.fetch("SELECT * FROM operator_action WHERE account_id = $1", account)
        lines = await read.statement(tx, account, 10)
    assert [(row["action"], row["by"], row["reason"]) for row in noted] == [
        ("write_off", "ops", "they never came back")
    ]
    loss = next(line for line in lines if line.kind == "loss")
    assert (noted[0]["ref"], loss.reason, loss.amount_units) == (loss.id, off(lot).reason, 7)


async def test_what_comes_back_pays_the_house_first(db: Database) -> None:
    account, lot = await spent_and_gone(db)
    await one(db, off(lot))
    at_first = await house(db, LOSSES)
    assert await one(db, Reverse(lot, 4, "")) == LotIs(lot, True, 0, Balance(0, 0))
    assert (await lost(db, lot), await house(db, LOSSES)) == ((0, 1, 0), at_first + 6)
    assert await one(db, Reverse(lot, 0, "")) == LotIs(lot, True, 0, Balance(3, 0))
    assert (await lost(db, lot), await house(db, LOSSES)) == ((0, 0, 0), at_first + 7)
    assert await one(db, Reverse(lot, 10, "gone again")) == LotIs(lot, True, 7, Balance(0, 0))
    assert await debt(db, account) == 7


async def test_what_the_customer_had_paid_of_it_comes_back_before(db: Database) -> None:
    account, lot = await spent_and_gone(db)
    other = await minted(db, mint(account, 4, "paid some of it"))
    assert await lost(db, other) == (0, 0, 4)
    assert await one(db, off(lot)) == LotIs(lot, True, 0, Balance(0, 0))
    assert await lost(db, lot) == (4, 3, 0)
    assert await one(db, Reverse(lot, 5, "")) == LotIs(lot, True, 0, Balance(4, 0))
    assert (await lost(db, lot), await lost(db, other)) == ((0, 2, 0), (0, 0, 0))
    assert await one(db, Reverse(lot, 0, "")) == LotIs(lot, True, 0, Balance(7, 0))
    assert await lost(db, lot) == (0, 0, 0)


async def test_a_lot_in_dispute_is_not_given_up(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "card"))
    await charged(db, account, "r", 10)
    await one(db, Freeze(lot, "disputed"))
    assert await one(db, off(lot)) == LotIs(lot, False, 10, Balance(0, 0))
    await run(db, Reverse(lot, 10, "lost"), Unfreeze(lot))
    assert await one(db, off(lot)) == LotIs(lot, True, 0, Balance(0, 0))


async def test_a_call_that_is_given_back_gives_it_to_the_house(db: Database) -> None:
    """Nobody ever paid for it."""
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "bought"))
    call = await held(db, hold(account, "r", 7))
    await run(db, capture(call, 7), Reverse(lot, 10, "gone"), off(lot), Refund(call.id, "k", 5))
    assert (await lost(db, lot), await debt(db, account)) == ((0, 2, 0), 0)
    assert await scalar(db, "SELECT available FROM account WHERE id = $1", account) == 0


async def test_it_is_owed_again_when_its_money_comes_in_another_way(db: Database) -> None:
    account, lot = await spent_and_gone(db)
    await one(db, off(lot))
    at_first = await house(db, LOSSES)
    opened, _ = await run(db, Reopen(lot, "paid again"), mint(account, 10, "the same, once more"))
    assert opened == LotIs(lot, True, 7, Balance(0, 0))
    assert (await lost(db, lot), await house(db, LOSSES)) == ((7, 0, 0), at_first + 7)
    assert await one(db, Expire(account)) is not None
    assert await scalar(db, "SELECT available FROM account WHERE id = $1", account) == 3
    assert await debt(db, account) == 0
    assert (await one(db, Reopen(lot, "paid again"))) == LotIs(lot, False, 0, Balance(3, 0))


async def test_no_line_of_the_statement_is_below_zero(db: Database) -> None:
    account, lot = await spent_and_gone(db)
    await run(db, off(lot), Reopen(lot, ""), off(lot), Reverse(lot, 0, ""))
    async with db.read() as tx:
        lines = (await read.statement(tx, account, 50))[::-1]
    assert all(line.balance_units >= 0 for line in lines)
    assert lines[-1].balance_units == 3
