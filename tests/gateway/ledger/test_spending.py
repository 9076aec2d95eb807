"""Holds and closes: what is reserved, charged, given back and refused."""

from __future__ import annotations

import pytest

from gateway.db import Database
from gateway.ledger import (
    AlreadyClosed,
    Answer,
    Balance,
    Close,
    Closed,
    Current,
    Expire,
    FreezeAccount,
    Frozen,
    Held,
    LedgerFault,
    Reverse,
    Short,
    StillLeased,
    read,
)
from tests.gateway.ledger.helpers import (
    T0,
    capture,
    charged,
    funded,
    held,
    hold,
    mint,
    minted,
    one,
    open_account,
    run,
    scalar,
    void,
)


async def test_a_hold_reserves_and_a_capture_charges_what_was_used(db: Database) -> None:
    account = await funded(db, 100)
    outcome = await one(db, hold(account, "r1", 60))
    assert isinstance(outcome, Held)
    assert outcome.balance == Balance(40, 60)
    closed = await one(db, capture(outcome.hold, 25))
    assert isinstance(closed, Closed)
    assert closed.balance == Balance(75, 0)
    assert closed.transfer.id == outcome.hold.id
    assert (closed.transfer.kind, closed.transfer.amount_units) == ("capture", 25)
    async with db.read() as tx:
        view = await read.account(tx, account)
    assert view is not None
    assert (view.available_units, view.held_units) == (75, 0)
    assert (view.added_units, view.spent_units) == (100, 25)
    assert view.next_expiry_ms is None


async def test_a_void_gives_everything_back(db: Database) -> None:
    account = await funded(db, 10)
    row = await held(db, hold(account, "r1", 10))
    closed = await one(db, void(row, "upstream_timeout"))
    assert isinstance(closed, Closed)
    assert closed.balance == Balance(10, 0)
    assert (closed.transfer.kind, closed.transfer.reason) == ("void", "upstream_timeout")


async def test_a_capture_of_nothing_is_a_capture(db: Database) -> None:
    account = await open_account(db)
    row = await held(db, hold(account, "r1", 0))
    closed = await one(db, capture(row, 0))
    assert isinstance(closed, Closed)
    assert (closed.transfer.kind, closed.transfer.amount_units) == ("capture", 0)


async def test_what_the_account_has_not_got_is_refused_and_nothing_is_stored(db: Database) -> None:
    account = await funded(db, 10)
    assert await one(db, hold(account, "r1", 11)) == Short(10, 11)
    assert await scalar(db, "SELECT count(*) FROM hold") == 0
    # The refused id was not burnt: with other content it is a request of its own.
    row = await held(db, hold(account, "r1", 10, content=b"other"))
    assert row.content == b"other"


async def test_what_is_held_cannot_be_held_again(db: Database) -> None:
    account = await funded(db, 10)
    outcomes = await run(db, *(hold(account, f"r{i}", 4) for i in range(4)))
    assert [type(outcome) for outcome in outcomes] == [Held, Held, Short, Short]
    assert outcomes[2] == Short(2, 4)


async def test_steps_of_one_transaction_see_each_other(db: Database) -> None:
    account = await open_account(db)
    outcomes = await run(
        db, hold(account, "r1", 5), mint(account, 5, "a"), hold(account, "r1", 5), Expire(account)
    )
    assert outcomes[0] == Short(0, 5)
    assert isinstance(outcomes[2], Held)
    assert outcomes[3] == Current(Balance(0, 5))


async def test_a_hold_ends_once(db: Database) -> None:
    account = await funded(db, 10)
    row = await held(db, hold(account, "r1", 10))
    first, second, third = await run(db, capture(row, 4), capture(row, 9), void(row))
    assert isinstance(first, Closed)
    assert second == third == AlreadyClosed(first.transfer)
    assert await one(db, capture(row, 1)) == AlreadyClosed(first.transfer)
    assert await scalar(db, "SELECT spent FROM account WHERE id = $1", account) == 4


async def test_a_voided_hold_cannot_be_captured(db: Database) -> None:
    account = await funded(db, 10)
    row = await held(db, hold(account, "r1", 10))
    await one(db, void(row))
    late = await one(db, capture(row, 10))
    assert isinstance(late, AlreadyClosed)
    assert late.transfer.kind == "void"
    assert await scalar(db, "SELECT available FROM account WHERE id = $1", account) == 10


@pytest.mark.parametrize("units", [11, -1, 2**62])
async def test_a_capture_beyond_the_hold_is_a_fault(db: Database, units: int) -> None:
    account = await funded(db, 100)
    row = await held(db, hold(account, "r1", 10))
    with pytest.raises(LedgerFault):
        await one(db, capture(row, units))
    assert isinstance(await one(db, capture(row, 10)), Closed)


async def test_a_void_that_charges_is_a_fault(db: Database) -> None:
    account = await funded(db, 10)
    row = await held(db, hold(account, "r1", 10))
    with pytest.raises(LedgerFault):
        await one(db, Close(row, 1, void_reason="upstream_error"))


async def test_a_negative_hold_is_a_fault(db: Database) -> None:
    account = await funded(db, 10)
    await held(db, hold(account, "r0", 10))
    with pytest.raises(LedgerFault):
        await one(db, hold(account, "r1", -5))
    assert await scalar(db, "SELECT available FROM account WHERE id = $1", account) == 0


async def test_a_fault_takes_its_whole_transaction_with_it(db: Database) -> None:
    account = await funded(db, 10)
    row = await held(db, hold(account, "r1", 5))
    with pytest.raises(LedgerFault):
        await run(db, hold(account, "r2", 1), capture(row, 6))
    assert await scalar(db, "SELECT count(*) FROM hold") == 1


async def test_an_unknown_account_is_a_fault(db: Database) -> None:
    account = await open_account(db)
    row = await held(db, hold(account, "r1", 0))
    for step in (hold(4, "r1", 0), mint(4, 1, "a"), Expire(4)):
        with pytest.raises(LedgerFault):
            await one(db, step)
    await one(db, void(row))


@pytest.mark.parametrize("column", ["debt", "frozen"])
async def test_an_account_that_is_frozen_or_in_debt_spends_nothing(
    db: Database, column: str
) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "a"))
    await charged(db, account, "r", 7)
    await minted(db, mint(account, 10, "b"))
    running = await held(db, hold(account, "r0", 3))
    if column == "debt":
        await one(db, Reverse(lot, 10, "charged back"))
    else:
        await one(db, FreezeAccount(account, True, "asked for", "ops"))
    debt = 7 if column == "debt" else 0
    for units in (0, 1, 1_000):
        assert await one(db, hold(account, "r1", units)) == Frozen(debt)
    # What runs already may end, and money may come in.
    assert isinstance(await one(db, capture(running, 3)), Closed)
    await minted(db, mint(account, 5, "c"))
    assert await one(db, hold(account, "r1", 0)) == Frozen(max(debt - 5, 0))


async def test_two_accounts_do_not_touch_each_other(db: Database) -> None:
    rich, poor = await open_account(db, 1), await open_account(db, 2)
    outcomes = await run(
        db, mint(rich, 10, "a"), hold(poor, "r", 1), hold(rich, "r", 10), hold(poor, "r", 0)
    )
    assert outcomes[1] == Short(0, 1)
    assert isinstance(outcomes[2], Held)
    assert isinstance(outcomes[3], Held)


async def test_the_sweeper_ends_only_what_nobody_holds_any_more(db: Database) -> None:
    account = await funded(db, 10)
    row = await held(db, hold(account, "r1", 5, lease_ms=1_000))
    lapse = Close(row, void_reason="interrupted", if_lapsed=True)
    assert await one(db, lapse, T0 + 999) == StillLeased()
    assert isinstance(await one(db, lapse, T0 + 1_000), Closed)


async def test_the_answer_is_stored_with_the_close(db: Database) -> None:
    account = await open_account(db)
    row = await held(db, hold(account, "r1", 0))
    answer = Answer(200, (("content-type", "text/plain"), ("x", "é")), b"\x00\xff")
    await one(db, Close(row, 0, answer=answer))
    await one(db, Close(row, 0, answer=Answer(500, (), None)))
    async with db.read() as tx:
        assert await read.answer_of(tx, row.id) == answer
        assert await read.answer_of(tx, row.id + 1) is None
        assert (await read.hold_by_id(tx, row.id)) == row
        close = await read.close_of(tx, row.id)
    assert close is not None
    assert close.ref == row.id


async def test_an_answer_too_long_to_keep_has_no_body(db: Database) -> None:
    account = await open_account(db)
    row = await held(db, hold(account, "r1", 0))
    await one(db, Close(row, 0, answer=Answer(200, (), None)))
    async with db.read() as tx:
        assert await read.answer_of(tx, row.id) == Answer(200, (), None)
        assert await read.hold_by_id(tx, row.id + 1) is None
        assert await read.close_of(tx, row.id + 1) is None


async def test_no_steps_no_transaction_work(db: Database) -> None:
    assert await run(db) == []
