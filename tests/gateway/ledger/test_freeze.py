"""Disputes and reversals of a lot, the debt they leave, and accounts stopped by an operator."""

from __future__ import annotations

import pytest

from gateway.db import Database
from gateway.ledger import (
    DEBT,
    FUNDING,
    SUSPENSE,
    AccountIs,
    Balance,
    Current,
    Expire,
    Freeze,
    FreezeAccount,
    Frozen,
    Held,
    LedgerFault,
    LotIs,
    Reverse,
    Short,
    Unfreeze,
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


async def house(db: Database, account_id: int) -> int:
    """The balance of an account of the house."""
    units = await scalar(
        db, "SELECT coalesce(sum(balance), 0) FROM house_balance WHERE account_id = $1", account_id
    )
    return int(str(units))


async def lot_row(db: Database, lot: int) -> tuple[str, int, int, int, int, int]:
    """State, remaining, expired, reversed, short, repaid."""
    async with db.read() as tx:
        row = await tx.fetchrow("SELECT * FROM lot WHERE id = $1", lot)
    assert row is not None
    return (
        row["state"],
        row["remaining_units"],
        row["expired_units"],
        row["reversed_units"],
        row["short_units"],
        row["repaid_units"],
    )


async def debt(db: Database, account: int) -> object:
    return await scalar(db, "SELECT debt FROM account WHERE id = $1", account)


# --- one lot in dispute ---------------------------------------------------------------------


async def test_a_dispute_blocks_just_those_credits(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "a"))
    await minted(db, mint(account, 5, "b"))
    assert await one(db, Freeze(lot, "disputed")) == LotIs(lot, True, 0, Balance(5, 0))
    assert await one(db, hold(account, "r", 6)) == Short(5, 6)
    await charged(db, account, "r2", 5)
    assert (await house(db, SUSPENSE), await house(db, DEBT)) == (10, 0)
    async with db.read() as tx:
        lines = await read.statement(tx, account, 2)
    assert (lines[1].kind, lines[1].ref, lines[1].reason) == ("freeze", lot, "disputed")


async def test_a_dispute_that_ends_brings_them_back(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "a", expires_ms=T0 + 100))
    await charged(db, account, "r", 4)
    await one(db, Freeze(lot, "disputed"))
    async with db.read() as tx:
        seen = await read.account(tx, account)
    assert seen is not None
    assert seen.next_expiry_ms is None  # what is in dispute does not expire
    assert await one(db, Unfreeze(lot, "won")) == LotIs(lot, True, 0, Balance(6, 0))
    assert await lot_row(db, lot) == ("live", 6, 0, 0, 0, 0)
    assert (await house(db, SUSPENSE), await house(db, DEBT)) == (0, 0)
    # With the expiry it had.
    assert await one(db, Expire(account), T0 + 100) == Current(Balance(0, 0))
    assert await lot_row(db, lot) == ("expired", 0, 6, 0, 0, 0)


async def test_a_frozen_lot_does_not_expire_and_does_when_it_thaws(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "a", expires_ms=T0 + 100))
    await one(db, Freeze(lot, "disputed"))
    assert await one(db, Expire(account), T0 + 500) == Current(Balance(0, 0))
    assert await lot_row(db, lot) == ("frozen", 0, 0, 0, 0, 0)
    assert await one(db, Unfreeze(lot), T0 + 600) == LotIs(lot, True, 0, Balance(0, 0))
    assert await lot_row(db, lot) == ("expired", 0, 10, 0, 0, 0)


async def test_what_was_spent_of_a_disputed_lot_is_owed(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "a"))
    await charged(db, account, "r", 4)
    await minted(db, mint(account, 5, "b"))
    assert await one(db, Freeze(lot, "disputed")) == LotIs(lot, True, 4, Balance(5, 0))
    assert await one(db, hold(account, "r2", 0)) == Frozen(4)
    assert (await house(db, SUSPENSE), await house(db, DEBT)) == (10, -4)
    assert await one(db, Unfreeze(lot)) == LotIs(lot, True, 0, Balance(11, 0))
    assert isinstance(await one(db, hold(account, "r2", 11)), Held)


async def test_the_same_again_changes_nothing(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "a"))
    for step, after in (
        (Unfreeze(lot), Balance(10, 0)),
        (Freeze(lot, "x"), Balance(0, 0)),
        (Reverse(lot, 3, "x"), Balance(0, 0)),
        (Unfreeze(lot), Balance(7, 0)),
        (Reverse(lot, 0, "x"), Balance(10, 0)),
    ):
        first = await one(db, step)
        lines = await scalar(db, "SELECT count(*) FROM transfer")
        assert isinstance(first, LotIs)
        assert first.balance == after
        assert await one(db, step) == LotIs(lot, False, 0, after)
        assert await scalar(db, "SELECT count(*) FROM transfer") == lines


async def test_nonsense_is_a_fault(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "a"))
    for step in (Reverse(lot, 11, "x"), Reverse(lot, -1, "x"), Freeze(99_999, "x")):
        with pytest.raises(LedgerFault):
            await one(db, step)


# --- under open holds -----------------------------------------------------------------------


async def test_other_lots_cover_what_runs_before_the_frozen_one_does(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "a"))
    await minted(db, mint(account, 8, "b"))
    row = await held(db, hold(account, "r", 8))
    assert await one(db, Freeze(lot, "x")) == LotIs(lot, True, 0, Balance(0, 8))
    assert await scalar(db, "SELECT pinned FROM account WHERE id = $1", account) == 0
    await one(db, capture(row, 8))
    assert await lot_row(db, lot) == ("frozen", 0, 0, 0, 0, 0)


async def test_only_what_runs_needs_is_pinned_and_returns_to_suspense(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "a"))
    row = await held(db, hold(account, "r", 7))
    # The house lends what the call may still use, until it is known.
    assert await one(db, Freeze(lot, "x")) == LotIs(lot, True, 7, Balance(0, 7))
    await one(db, capture(row, 2))
    assert await lot_row(db, lot) == ("frozen", 0, 0, 0, 2, 0)
    assert (await debt(db, account), await house(db, SUSPENSE), await house(db, DEBT)) == (
        *(2, 10),
        -2,
    )
    assert await one(db, Unfreeze(lot)) == LotIs(lot, True, 0, Balance(8, 0))


async def test_a_pin_asks_its_lot_when_it_is_let_go(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "a", expires_ms=T0 + 100))
    rows = [await held(db, hold(account, f"r{i}", 3)) for i in range(3)]
    await one(db, Freeze(lot, "x"))
    await one(db, void(rows[0]))
    assert await lot_row(db, lot) == ("frozen", 0, 0, 0, 6, 0)
    await one(db, Unfreeze(lot))
    await one(db, void(rows[1]))  # live again
    assert await lot_row(db, lot) == ("live", 7, 0, 0, 0, 0)
    assert await one(db, Expire(account), T0 + 100) == Current(Balance(0, 3))
    await one(db, void(rows[2]), T0 + 101)  # and then its time was over
    assert await lot_row(db, lot) == ("expired", 0, 10, 0, 0, 0)


async def test_what_was_spent_before_a_lot_got_units_back_stays_where_it_was(db: Database) -> None:
    account = await open_account(db)
    first = await minted(db, mint(account, 10, "a", expires_ms=T0 + 100))
    second = await minted(db, mint(account, 5, "b"))
    rows = [await held(db, hold(account, f"r{units}", units)) for units in (10, 5)]
    await run(db, Freeze(first, "x"), Unfreeze(first))  # all of it is pinned to the older call
    await one(db, capture(rows[1], 5))
    await one(db, void(rows[0]))
    async with db.read() as tx:
        left = {lot.id: lot.remaining_units for lot in await read.lots(tx, account, 9)}
    assert left == {first: 10, second: 0}


async def test_a_lot_that_is_frozen_again_pins_on_top(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "a"))
    row = await held(db, hold(account, "r", 6))
    await one(db, Freeze(lot, "x"))
    await one(db, Unfreeze(lot))
    second = await held(db, hold(account, "r2", 4))
    await one(db, Freeze(lot, "x"))
    assert await scalar(db, "SELECT pinned FROM account WHERE id = $1", account) == 10
    await run(db, capture(row, 1), void(second))
    assert await lot_row(db, lot) == ("frozen", 0, 0, 0, 1, 0)


async def test_a_pin_grows_when_its_lot_dies_again(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "a"))
    row = await held(db, hold(account, "r", 10))
    await one(db, Reverse(lot, 4, "x"))
    await one(db, Reverse(lot, 9, "x"))
    async with db.read() as tx:
        pins = await tx.fetch("SELECT amount_units FROM pin WHERE hold_id = $1", row.id)
    assert [pin["amount_units"] for pin in pins] == [9]
    await one(db, capture(row, 3))
    # 7 came back: 6 of the 9 that were lent, and one that nobody claims.
    assert await lot_row(db, lot) == ("live", 1, 0, 9, 3, 0)


async def test_all_of_it_in_one_batch(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "a"))
    rows = [await held(db, hold(account, f"r{i}", 5)) for i in range(2)]
    *_, last = await run(
        db,
        Freeze(lot, "x"),
        capture(rows[0], 2),
        Reverse(lot, 10, "lost"),
        mint(account, 4, "b"),
        void(rows[1]),
        Unfreeze(lot),
    )
    # 2 were spent; the new lot paid 4 of what was lent, and got 2 back when the hold let go.
    assert last == LotIs(lot, True, 0, Balance(2, 0))


# --- reversals and debt ---------------------------------------------------------------------


async def test_a_reversal_takes_what_is_left_of_its_own_lot(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "a"))
    await minted(db, mint(account, 10, "b"))
    assert await one(db, Reverse(lot, 10, "lost")) == LotIs(lot, True, 0, Balance(10, 0))
    assert (await house(db, FUNDING), await house(db, SUSPENSE)) == (-10, 0)


async def test_the_shortage_is_debt_and_the_next_mint_pays_it_first(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "a"))
    await charged(db, account, "r", 7)
    assert await one(db, Reverse(lot, 10, "lost")) == LotIs(lot, True, 7, Balance(0, 0))
    first = await minted(db, mint(account, 5, "b"))
    assert await debt(db, account) == 2
    assert await one(db, hold(account, "r2", 0)) == Frozen(2)
    second = await minted(db, mint(account, 5, "c"))
    assert await debt(db, account) == 0
    assert await one(db, hold(account, "r2", 4)) == Short(3, 4)
    assert (await lot_row(db, first))[1:] == (0, 0, 0, 0, 5)
    assert (await lot_row(db, second))[1:] == (3, 0, 0, 0, 2)
    assert await house(db, DEBT) == 0


async def test_a_reversal_that_is_undone_gives_everything_back(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "a"))
    await charged(db, account, "r", 7)
    await one(db, Reverse(lot, 10, "lost"))
    payer = await minted(db, mint(account, 5, "b"))
    assert await one(db, Reverse(lot, 0, "won")) == LotIs(lot, True, 0, Balance(8, 0))
    assert (await lot_row(db, lot))[:2] == ("live", 3)
    assert (await lot_row(db, payer))[1:] == (5, 0, 0, 0, 0)
    assert (await house(db, FUNDING), await house(db, DEBT)) == (-15, 0)


async def test_who_paid_gets_it_back_with_its_own_expiry(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "a"))
    await charged(db, account, "r", 10)
    await one(db, Reverse(lot, 10, "lost"))
    payer = await minted(db, mint(account, 6, "b", expires_ms=T0 + 100))
    await minted(db, mint(account, 6, "c"))
    await one(db, Expire(account), T0 + 100)
    assert await one(db, Reverse(lot, 0, "won"), T0 + 200) == LotIs(lot, True, 0, Balance(6, 0))
    assert await lot_row(db, payer) == ("expired", 0, 6, 0, 0, 0)


async def test_a_smaller_reversal_lifts_the_shortage_first(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "a"))
    await charged(db, account, "r", 4)
    await one(db, Reverse(lot, 10, "lost"))
    assert await one(db, Reverse(lot, 7, "less")) == LotIs(lot, True, 1, Balance(0, 0))
    assert await one(db, Reverse(lot, 5, "less")) == LotIs(lot, True, 0, Balance(1, 0))


async def test_what_the_house_had_of_an_expired_lot_goes_first(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "a", expires_ms=T0 + 100))
    await charged(db, account, "r", 2)
    await one(db, Expire(account), T0 + 100)
    assert await one(db, Reverse(lot, 10, "lost"), T0 + 101) == LotIs(lot, True, 2, Balance(0, 0))
    assert await lot_row(db, lot) == ("expired", 0, 0, 10, 2, 0)
    assert await one(db, Reverse(lot, 0, "won"), T0 + 102) == LotIs(lot, True, 0, Balance(0, 0))
    assert await lot_row(db, lot) == ("expired", 0, 8, 0, 0, 0)


async def test_a_lot_that_paid_and_is_disputed_itself(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "a"))
    await charged(db, account, "r", 4)
    await one(db, Reverse(lot, 10, "lost"))
    payer = await minted(db, mint(account, 10, "b"))
    assert await one(db, Freeze(payer, "x")) == LotIs(payer, True, 4, Balance(0, 0))
    assert await lot_row(db, payer) == ("frozen", 0, 0, 0, 0, 0)
    # What comes out of the dispute pays the debt again.
    assert await one(db, Unfreeze(payer)) == LotIs(payer, True, 0, Balance(6, 0))
    assert await lot_row(db, payer) == ("live", 6, 0, 0, 0, 4)


async def test_lost_after_it_was_frozen(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "a"))
    await charged(db, account, "r", 4)
    await one(db, Freeze(lot, "x"))
    lost, over = await run(db, Reverse(lot, 6, "lost"), Unfreeze(lot))
    assert lost == LotIs(lot, True, 4, Balance(0, 0))
    assert over == LotIs(lot, True, 0, Balance(0, 0))
    assert (await house(db, FUNDING), await house(db, SUSPENSE)) == (-4, 0)


async def test_no_line_of_a_statement_is_below_zero(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "a"))
    await charged(db, account, "r", 10)
    await run(db, Freeze(lot, "x"), Reverse(lot, 10, "x"), Unfreeze(lot), Reverse(lot, 0, "x"))
    async with db.read() as tx:
        lines = await read.statement(tx, account, 100)
    assert {"freeze", "unfreeze", "reverse", "restore", "debt", "forgive"} <= {
        line.kind for line in lines
    }
    assert all(line.balance_units >= 0 for line in lines)


# --- which calls used a lot -----------------------------------------------------------------


async def test_the_calls_that_used_a_lot(db: Database) -> None:
    account = await open_account(db)
    first = await minted(db, mint(account, 10, "a", expires_ms=T0 + 100))
    second = await minted(db, mint(account, 10, "b"))
    rows = []
    for i, units in enumerate((6, 8, 3)):
        rows.append(await held(db, hold(account, f"r{i}", units)))
        await one(db, capture(rows[-1], units))
    running = await held(db, hold(account, "o", 2))

    async def used(lot: int) -> list[tuple[int, int]]:
        async with db.read() as tx:
            return [(use.hold.id, use.units) for use in await read.calls_of_lot(tx, lot, 10)]

    want = {first: [(rows[1].id, 4), (rows[0].id, 6)], second: [(rows[2].id, 3), (rows[1].id, 4)]}
    assert {lot: await used(lot) for lot in (first, second)} == want  # nothing is booked yet
    await minted(db, mint(account, 1, "c"))
    assert {lot: await used(lot) for lot in (first, second)} == want  # everything is
    await one(db, Freeze(second, "x"))
    await one(db, capture(running, 1))
    assert await used(second) == [(running.id, 1), (rows[2].id, 3), (rows[1].id, 4)]
    async with db.read() as tx:
        assert [use.hold.id for use in await read.calls_of_lot(tx, first, 1)] == [rows[1].id]
        assert list(await read.calls_of_lot(tx, 99_999, 5)) == []


async def test_pinned_and_refunded_calls_of_a_lot(db: Database) -> None:
    from gateway.ledger import Refund

    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "a"))
    rows = [await held(db, hold(account, f"r{i}", 5)) for i in range(2)]
    await one(db, Freeze(lot, "x"))
    await run(db, capture(rows[0], 4), capture(rows[1], 5))
    await one(db, Refund(rows[0].id, "k", 1))
    await one(db, Refund(rows[1].id, "k2"))
    async with db.read() as tx:
        uses = await read.calls_of_lot(tx, lot, 10)
    assert [(use.hold.id, use.units, use.refunded_units) for use in uses] == [
        (rows[1].id, 5, 5),
        (rows[0].id, 4, 1),
    ]


# --- an operator stops an account -----------------------------------------------------------


async def test_an_operator_stops_an_account(db: Database) -> None:
    account = await funded(db, 10)
    stop = FreezeAccount(account, True, "under inquiry", "ann")
    go = FreezeAccount(account, False, "cleared", "bob")
    assert await one(db, stop) == AccountIs(True, changed=True)
    assert await one(db, stop) == AccountIs(True, changed=False)
    assert await one(db, hold(account, "r", 1)) == Frozen(0)
    async with db.read() as tx:
        seen = await read.account(tx, account)
    assert seen is not None
    assert seen.frozen
    outcomes = await run(db, go, hold(account, "r", 1), go)
    assert outcomes[0] == AccountIs(False, changed=True)
    assert isinstance(outcomes[1], Held)
    assert outcomes[2] == AccountIs(False, changed=False)
    async with db.read() as tx:
        rows = await tx.fetch("SELECT * FROM operator_action ORDER BY id")
    assert [(row["action"], row["by"], row["reason"]) for row in rows] == [
        ("freeze", "ann", "under inquiry"),
        ("unfreeze", "bob", "cleared"),
    ]


async def test_a_stop_by_another_process_is_seen_at_once(db: Database) -> None:
    account = await open_account(db)
    await minted(db, mint(account, 10, "a"))  # its row is remembered from here on
    other = await Database.connect(db.url)
    await one(other, FreezeAccount(account, True, "x", "ops"))
    assert await one(db, hold(account, "r", 1)) == Frozen(0)
    await one(other, FreezeAccount(account, False, "x", "ops"))
    assert isinstance(await one(db, hold(account, "r", 1)), Held)
    await other.close()
