"""Credits that go back outside: withheld first, ended once, and never more than the lot has."""

from __future__ import annotations

import asyncio
import random

import pytest

from gateway.db import Database, transact
from gateway.ledger import (
    OUTGOING,
    PAID_OUT,
    Balance,
    EndPayOut,
    Expire,
    Freeze,
    FreezeAccount,
    Frozen,
    LedgerFault,
    LotIs,
    NotPayable,
    PayOut,
    PayoutEnded,
    PayoutRow,
    Refund,
    Reverse,
    Unfreeze,
    Withheld,
    apply,
    read,
)
from tests.gateway.ledger.helpers import (
    T0,
    capture,
    faults,
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


async def withheld(db: Database, lot: int, units: int | None, name: str = "p") -> PayoutRow:
    outcome = await one(db, PayOut(lot, name, units))
    assert isinstance(outcome, Withheld), outcome
    return outcome.payout


async def house(db: Database, account_id: int) -> int:
    found = await scalar(
        db, "SELECT coalesce(sum(balance), 0) FROM house_balance WHERE account_id = $1", account_id
    )
    return int(str(found))


async def rest(db: Database, lot: int) -> tuple[int, int, int]:
    async with db.read() as tx:
        row = await tx.fetchrow(
            "SELECT remaining_units, outgoing_units, paid_out_units FROM lot WHERE id = $1", lot
        )
    assert row is not None
    return tuple(row)  # type: ignore[return-value]  (three columns)


async def test_withheld_units_cannot_be_spent_and_are_paid_out_once(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "a"))
    row = await withheld(db, lot, None)
    assert (row.ordinal, row.amount_units) == (1, 10)
    assert (await house(db, OUTGOING), await house(db, PAID_OUT)) == (10, 0)
    assert await one(db, PayOut(lot, "q")) == NotPayable(0)
    assert await one(db, EndPayOut(row.id, True, "0xabc")) == PayoutEnded(True, True, Balance(0, 0))
    assert await one(db, EndPayOut(row.id, True)) == PayoutEnded(True, False, Balance(0, 0))
    assert (await house(db, OUTGOING), await house(db, PAID_OUT)) == (0, 10)
    assert await rest(db, lot) == (0, 0, 10)
    with pytest.raises(LedgerFault):
        await one(db, EndPayOut(row.id, False))
    async with db.read() as tx:
        lines = await read.statement(tx, account, 10)
    assert [(t.kind, t.balance_units) for t in reversed(lines)] == [
        ("mint", 10),
        ("withhold", 0),
        ("release", 10),
        ("payout", 0),
    ]


async def test_what_was_not_paid_is_the_lots_again_with_its_expiry(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "a", expires_ms=T0 + 100))
    first, second = await withheld(db, lot, 4), await withheld(db, lot, 6, "q")
    assert second.ordinal == 2
    await one(db, EndPayOut(first.id, False))
    assert await rest(db, lot) == (4, 6, 0)
    assert await scalar(db, "SELECT next_expiry_ms FROM account") == T0 + 100
    await one(db, Expire(account), T0 + 100)
    assert await rest(db, lot) == (0, 6, 0)  # what was withheld does not lapse
    ended = await one(db, EndPayOut(second.id, False), T0 + 101)
    assert ended == PayoutEnded(False, True, Balance(0, 0))  # too late for the lot
    assert await scalar(db, "SELECT expired_units FROM lot") == 10


async def test_only_what_no_call_needs_is_withheld(db: Database) -> None:
    account = await open_account(db)
    early = await minted(db, mint(account, 10, "a", expires_ms=T0 + 1_000))
    late = await minted(db, mint(account, 10, "b"))
    await one(db, capture(await held(db, hold(account, "spent", 3)), 3))
    open_ = await held(db, hold(account, "open", 12))
    assert await one(db, PayOut(early, "p", 8)) == NotPayable(5)
    row = await withheld(db, early, None)
    assert row.amount_units == 5  # 7 are left of it, 5 are available
    assert await one(db, capture(open_, 12)) is not None
    await one(db, EndPayOut(row.id, True))
    assert await rest(db, late) == (0, 0, 0)
    assert await scalar(db, "SELECT available + held FROM account") == 0


async def test_small_amounts_frozen_accounts_and_dead_lots_are_refused(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "a", expires_ms=T0 + 100))
    assert await one(db, PayOut(lot, "p", least_units=11)) == NotPayable(10)
    assert await one(db, PayOut(lot, "p", 3, least_units=4)) == NotPayable(10)
    await one(db, FreezeAccount(account, True, "x", "ops"))
    assert await one(db, PayOut(lot, "p")) == Frozen(0)
    await one(db, FreezeAccount(account, False, "x", "ops"))
    await one(db, Freeze(lot, "x"))
    assert await one(db, PayOut(lot, "p")) == NotPayable(0)
    await one(db, Unfreeze(lot))
    assert await one(db, PayOut(lot, "p"), T0 + 100) == NotPayable(0)
    assert await scalar(db, "SELECT count(*) FROM payout") == 0
    with pytest.raises(LedgerFault):
        await one(db, EndPayOut(5, True))


@pytest.mark.parametrize("paid", [True, False])
@pytest.mark.parametrize("step", [Freeze, Reverse])
async def test_a_claim_on_a_lot_that_is_on_its_way_out_is_owed(
    db: Database, step: type[Freeze] | type[Reverse], paid: bool
) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "a"))
    row = await withheld(db, lot, 7)
    claim = Freeze(lot, "x") if step is Freeze else Reverse(lot, 10, "x")
    assert await one(db, claim) == LotIs(lot, True, 7, Balance(0, 0))
    assert await one(db, PayOut(lot, "q")) == Frozen(7)
    await one(db, EndPayOut(row.id, paid))
    assert await scalar(db, "SELECT debt FROM account") == (7 if paid else 0)
    undone = Unfreeze(lot) if step is Freeze else Reverse(lot, 0, "x")
    outcome = await one(db, undone)
    assert isinstance(outcome, LotIs)
    assert (outcome.debt_units, outcome.balance) == (0, Balance(3 if paid else 10, 0))


async def test_a_lot_is_paid_out_once_however_many_ask_at_once(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 10, "a"))

    async def ask(name: str) -> object:
        async def work(tx: object) -> object:
            return (await apply(tx, [PayOut(lot, name, 6)], T0))[0]  # type: ignore[arg-type]

        return await transact(db, work)

    outcomes = await asyncio.gather(*(ask(f"p{i}") for i in range(8)))
    assert sorted(type(each).__name__ for each in outcomes) == ["NotPayable"] * 7 + ["Withheld"]


@pytest.mark.parametrize("seed", range(40))
async def test_any_history_adds_up(db: Database, seed: int) -> None:
    """Mints, calls, refunds, claims, expiries and payouts in any order; audited every few steps."""
    dice = random.Random(seed)
    account = await open_account(db)
    lots: list[int] = []
    calls: list[object] = []
    charged: list[int] = []
    payouts: list[int] = []
    now_ms = T0
    for turn in range(40):
        now_ms += dice.choice((0, 1, 40))
        match dice.randrange(10):
            case 0 | 1:
                life = dice.choice((60, 200, 10_000))
                step = mint(account, dice.randint(1, 30), f"m{turn}", expires_ms=now_ms + life)
                lots.append(await minted(db, step, now_ms))
            case 2 | 3:
                made = await one(db, hold(account, f"c{turn}", dice.randint(0, 12)), now_ms)
                calls += [made.hold] if hasattr(made, "hold") else []
            case 4 | 5 if calls:
                row = calls.pop(dice.randrange(len(calls)))
                units = dice.randint(0, row.max_units)  # type: ignore[attr-defined]  (a HoldRow)
                await one(db, capture(row, units) if units else void(row), now_ms)  # type: ignore[arg-type]
                charged += [row.id] if units else []  # type: ignore[attr-defined]
            case 6 if lots:
                units_ = dice.choice((None, 1, 5))
                done = await one(db, PayOut(dice.choice(lots), f"p{turn}", units_), now_ms)
                payouts += [done.payout.id] if isinstance(done, Withheld) else []
            case 7 if payouts:
                which = payouts.pop(dice.randrange(len(payouts)))
                await one(db, EndPayOut(which, dice.random() < 0.5), now_ms)
            case 8 if lots:
                lot = dice.choice(lots)
                claim = (Freeze(lot, "x"), Unfreeze(lot), Reverse(lot, dice.randint(0, 1), "x"))
                await one(db, dice.choice(claim), now_ms)
            case 9 if charged:
                await one(db, Refund(dice.choice(charged), f"r{turn}", 1), now_ms)
        if turn % 8 == 7:
            assert await faults(db) == [], turn
    await run(db, *(EndPayOut(each, True) for each in payouts), at_ms=now_ms)
