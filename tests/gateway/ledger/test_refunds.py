"""Refunds of calls: to the lots that paid, from the end, at most once and at most the charge."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from gateway.db import Database, transact
from gateway.ledger import (
    Balance,
    Close,
    Closed,
    Current,
    Expire,
    Held,
    HoldRow,
    LedgerFault,
    NotRefundable,
    Outcome,
    Refund,
    RefundConflict,
    Refunded,
    RefundedBefore,
    Reverse,
    Short,
    apply,
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


async def refunded(db: Database, row: HoldRow, units: int | None, key: str, at_ms: int = T0) -> int:
    """Refund what must be refundable; what the account can spend after it."""
    outcome = await one(db, Refund(row.id, key, units), at_ms)
    assert isinstance(outcome, Refunded), outcome
    return outcome.balance.available_units


async def left(db: Database, account: int) -> dict[int, int]:
    """What truly remains of each lot."""
    async with db.read() as tx:
        return {lot.id: lot.remaining_units for lot in await read.lots(tx, account, 100)}


async def test_a_refund_gives_the_charge_back(db: Database) -> None:
    account = await funded(db, 10)
    row = await charged(db, account, "r", 7, of=9)
    outcome = await one(db, Refund(row.id, "k", reason="it was wrong"))
    assert isinstance(outcome, Refunded)
    assert (outcome.refund.amount_units, outcome.balance) == (7, Balance(10, 0))
    assert await scalar(db, "SELECT spent FROM account WHERE id = $1", account) == 0
    async with db.read() as tx:
        line = (await read.statement(tx, account, 1))[0]
    assert (line.kind, line.amount_units, line.ref) == ("refund", 7, row.id)
    assert (line.reason, line.balance_units) == ("it was wrong", 10)
    assert isinstance(await one(db, hold(account, "r2", 10)), Held)


async def test_parts_end_at_the_whole(db: Database) -> None:
    account = await funded(db, 10)
    row = await charged(db, account, "r", 7)
    assert await one(db, Refund(row.id, "k0", 8)) == NotRefundable(7)
    assert await refunded(db, row, 2, "k1") == 5
    assert await one(db, Refund(row.id, "k2", 6)) == NotRefundable(5)
    assert await refunded(db, row, None, "k2") == 10  # a refused key may be used again
    assert await one(db, Refund(row.id, "k3", 1)) == NotRefundable(0)
    assert await one(db, Refund(row.id, "k3")) == NotRefundable(0)
    async with db.read() as tx:
        assert await read.refunded_units(tx, row.id) == 7
        assert await read.refunded_units(tx, row.id + 1) == 0


async def test_the_same_key_again_changes_nothing(db: Database) -> None:
    account = await funded(db, 10)
    row = await charged(db, account, "r", 4)
    other = await charged(db, account, "r2", 4)
    first, again, more = await run(
        db, Refund(row.id, "k", 3), Refund(row.id, "k", 3), Refund(row.id, "k", 1)
    )
    assert isinstance(first, Refunded)
    assert again == RefundedBefore(first.refund)
    assert more == RefundConflict(first.refund)
    assert await one(db, Refund(row.id, "k", 3)) == again
    for change in (Refund(row.id, "k", 2), Refund(row.id, "k"), Refund(other.id, "k", 3)):
        assert await one(db, change) == more
    assert await refunded(db, other, None, "k2") == 9


async def test_a_key_counts_for_one_account(db: Database) -> None:
    mine, theirs = await open_account(db, 1), await open_account(db, 2)
    await run(db, mint(mine, 10, "a"), mint(theirs, 10, "b"))
    rows = [await charged(db, mine, "r", 4), await charged(db, theirs, "r", 4)]
    assert [await refunded(db, row, None, "k") for row in rows] == [10, 10]


async def test_what_was_not_charged_is_not_refunded(db: Database) -> None:
    account = await funded(db, 10)
    voided = await held(db, hold(account, "v", 4))
    await one(db, void(voided))
    free = await charged(db, account, "f", 0, of=4)
    running = await held(db, hold(account, "o", 4))
    for row in (voided, free, running):
        assert await one(db, Refund(row.id, "k")) == NotRefundable(0)
        assert await one(db, Refund(row.id, "k", 1)) == NotRefundable(0)


async def test_a_nonsense_refund_is_a_fault(db: Database) -> None:
    account = await funded(db, 10)
    row = await charged(db, account, "r", 4)
    for step in (Refund(row.id, "k", 0), Refund(row.id, "k", -1), Refund(99_999, "k")):
        with pytest.raises(LedgerFault):
            await one(db, step)


async def test_a_charge_can_be_refunded_in_the_transaction_that_makes_it(db: Database) -> None:
    account = await funded(db, 10)
    row = await held(db, hold(account, "r", 6))
    closed, refund = await run(db, capture(row, 6), Refund(row.id, "k", 5))
    assert isinstance(closed, Closed)
    assert isinstance(refund, Refunded)
    assert refund.balance == Balance(9, 0)


async def test_it_goes_back_to_the_lots_that_paid_from_the_end(db: Database) -> None:
    account = await open_account(db)
    soon = await minted(db, mint(account, 10, "soon", expires_ms=T0 + 100))
    late = await minted(db, mint(account, 10, "late", expires_ms=T0 + 200))
    never = await minted(db, mint(account, 10, "never"))
    row = await charged(db, account, "r", 25)
    assert await left(db, account) == {soon: 0, late: 0, never: 5}
    await refunded(db, row, 7, "k1")
    assert await left(db, account) == {soon: 0, late: 2, never: 10}
    await refunded(db, row, 9, "k2")
    assert await left(db, account) == {soon: 1, late: 10, never: 10}
    # With the expiry they had: what came back expires with its lot, and is spent before it does.
    assert await one(db, Expire(account), T0 + 100) == Current(Balance(20, 0))
    assert await one(db, Expire(account), T0 + 200) == Current(Balance(10, 0))


async def test_what_came_back_is_spent_again_first(db: Database) -> None:
    account = await open_account(db)
    soon = await minted(db, mint(account, 10, "soon", expires_ms=T0 + 100))
    never = await minted(db, mint(account, 10, "never"))
    row = await charged(db, account, "r", 12)
    await refunded(db, row, None, "k")
    again = await charged(db, account, "r2", 11)
    assert await left(db, account) == {soon: 0, never: 9}
    await refunded(db, again, 2, "k2")
    assert await left(db, account) == {soon: 1, never: 10}


async def test_only_the_refunded_call_gets_back_what_it_paid(db: Database) -> None:
    """Three calls side by side on one tape; the one in the middle is refunded."""
    account = await open_account(db)
    one_lot = await minted(db, mint(account, 10, "a", expires_ms=T0 + 100))
    other = await minted(db, mint(account, 10, "b"))
    await charged(db, account, "r1", 6)
    middle = await charged(db, account, "r2", 6)  # 4 of a, 2 of b
    await charged(db, account, "r3", 6)
    await refunded(db, middle, 3, "k")
    assert await left(db, account) == {one_lot: 1, other: 4}
    await refunded(db, middle, None, "k2")
    assert await left(db, account) == {one_lot: 4, other: 4}


async def test_of_an_expired_lot_the_house_keeps_it(db: Database) -> None:
    account = await open_account(db)
    await run(db, mint(account, 10, "a", expires_ms=T0 + 100), mint(account, 10, "b"))
    row = await charged(db, account, "r", 14)
    assert await refunded(db, row, None, "k", T0 + 100) == 10
    async with db.read() as tx:
        last, before = await read.statement(tx, account, 2)
    assert [(before.kind, before.amount_units)] == [("refund", 14)]
    assert [(last.kind, last.amount_units)] == [("expire", 10)]
    assert await one(db, hold(account, "r2", 11), T0 + 100) == Short(10, 11)


async def test_of_a_lot_that_lapsed_after_it_was_empty(db: Database) -> None:
    """Nobody looks at an emptied lot when its time comes; the refund does."""
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "a", expires_ms=T0 + 100))
    row = await charged(db, account, "r", 10)
    await minted(db, mint(account, 1, "b"))  # folds
    await one(db, Expire(account), T0 + 500)
    assert await scalar(db, "SELECT state FROM lot WHERE id = $1", lot) == "live"
    assert await refunded(db, row, 4, "k", T0 + 500) == 1
    assert await scalar(db, "SELECT state FROM lot WHERE id = $1", lot) == "expired"
    assert await scalar(db, "SELECT expired_units FROM lot WHERE id = $1", lot) == 4


async def test_pins_are_refunded_after_the_tape(db: Database) -> None:
    account = await open_account(db)
    dead = await minted(db, mint(account, 10, "dead", expires_ms=T0 + 100))
    live = await minted(db, mint(account, 10, "live"))
    row = await held(db, hold(account, "r", 15))
    await one(db, Expire(account), T0 + 100)
    await one(db, capture(row, 13), T0 + 101)  # 10 pinned, 3 of the tape
    assert await refunded(db, row, 4, "k1", T0 + 102) == 10
    assert await left(db, account) == {dead: 0, live: 10}
    assert await scalar(db, "SELECT expired_units FROM lot WHERE id = $1", dead) == 1
    assert await refunded(db, row, None, "k2", T0 + 103) == 10
    assert await scalar(db, "SELECT expired_units FROM lot WHERE id = $1", dead) == 10


async def test_a_refund_finds_what_is_due_first(db: Database) -> None:
    account = await open_account(db)
    await run(db, mint(account, 10, "a", expires_ms=T0 + 100), mint(account, 10, "b"))
    row = await charged(db, account, "r", 5)
    # Nobody looked at T0 + 100: the other 5 of the lot lapse before the 5 come back and lapse.
    assert await refunded(db, row, None, "k", T0 + 300) == 10


async def test_a_refund_settles_what_its_lot_owes(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "a"))
    row = await charged(db, account, "r", 8)
    await one(db, Reverse(lot, 10, "charged back"))
    assert await scalar(db, "SELECT debt FROM account WHERE id = $1", account) == 8
    assert await refunded(db, row, 3, "k1") == 0
    assert await scalar(db, "SELECT debt FROM account WHERE id = $1", account) == 5
    assert await refunded(db, row, None, "k2") == 0
    assert await scalar(db, "SELECT debt FROM account WHERE id = $1", account) == 0


async def test_two_charges_on_one_segment_are_refunded_together(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "a"))
    rows = [await charged(db, account, f"r{i}", 4) for i in range(2)]
    await minted(db, mint(account, 1, "fold"))
    outcomes = await run(db, *(Refund(row.id, row.request_id) for row in rows))
    assert all(isinstance(outcome, Refunded) for outcome in outcomes)
    assert (await left(db, account))[lot] == 10


async def test_refunds_beside_other_steps_of_a_batch(db: Database) -> None:
    account = await funded(db, 10)
    row = await charged(db, account, "r", 10)
    other = await open_account(db, 2)
    outcomes = await run(
        db,
        hold(account, "r2", 1),
        Refund(row.id, "k", 6),
        hold(account, "r3", 6),
        mint(other, 5, "b"),
        hold(other, "r", 5),
        Refund(row.id, "k2"),
    )
    kinds = [type(outcome).__name__ for outcome in outcomes]
    assert kinds == ["Short", "Refunded", "Held", "Minted", "Held", "Refunded"]


async def test_a_refund_by_an_operator_is_kept_with_who_and_why(db: Database) -> None:
    account = await funded(db, 10)
    row = await charged(db, account, "r", 4)
    step = Refund(row.id, "k", reason="they asked nicely", by="ann")
    first, _ = await run(db, step, step)
    assert isinstance(first, Refunded)
    async with db.read() as tx:
        (action,) = await tx.fetch("SELECT * FROM operator_action")
    assert (action["action"], action["ref"]) == ("refund", first.refund.id)
    assert (action["account_id"], action["by"]) == (account, "ann")
    assert action["reason"] == "they asked nicely"


async def test_a_folded_tape_of_many_lots(db: Database) -> None:
    """The stretch is found among segments before and behind it."""
    account = await open_account(db)
    lots = [await minted(db, mint(account, 3, f"lot{i}")) for i in range(20)]
    rows = [await charged(db, account, f"r{i}", 4) for i in range(15)]
    await minted(db, mint(account, 1, "fold"))
    await refunded(db, rows[7], None, "k")  # units 28 to 32: lots 9, 9, 10, 10
    found = await left(db, account)
    assert {i for i, lot in enumerate(lots) if found[lot]} == {9, 10}
    assert [found[lots[9]], found[lots[10]]] == [2, 2]


async def test_closing_again_after_a_refund_changes_nothing(db: Database) -> None:
    account = await funded(db, 10)
    row = await charged(db, account, "r", 4)
    await refunded(db, row, None, "k")
    again = await one(db, Close(row, 4))
    assert type(again).__name__ == "AlreadyClosed"
    assert await one(db, Expire(account)) == Current(Balance(10, 0))


async def test_refunds_by_two_processes_at_once(postgres: Database) -> None:
    """One key refunds once, and all keys together no more than the charge."""
    account = await open_account(postgres)
    await minted(postgres, mint(account, 100, "a"))
    row = await charged(postgres, account, "r", 50)
    other = await Database.connect(postgres.url)

    async def give(db: Database, key: str) -> Sequence[Outcome]:
        return await transact(db, lambda tx: apply(tx, [Refund(row.id, key, 7)], T0))

    keys = [f"k{i}" for i in range(12)]
    asked = [give(db, key) for key in keys for db in (postgres, other)]
    outcomes = [outcome for (outcome,) in await asyncio.gather(*asked)]
    await other.close()
    assert sum(isinstance(outcome, Refunded) for outcome in outcomes) == 7
    assert await one(postgres, Expire(account)) == Current(Balance(99, 0))
