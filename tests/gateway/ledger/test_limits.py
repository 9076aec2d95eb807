"""Holds that may be taken from certain lots only: nothing else pays for them, ever."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

import pytest

from gateway.db import Database
from gateway.ledger import (
    Balance,
    Capped,
    Close,
    Closed,
    Expire,
    Freeze,
    Held,
    Hold,
    LotIs,
    Mint,
    Only,
    PayOut,
    Refund,
    Refunded,
    Repeated,
    Short,
    Unfreeze,
    Withheld,
    Writer,
    read,
)
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
    scalar,
    void,
)

ONLY_A = Only(source="external", payer="0xa")


def of(only: Only, account: int, name: str, units: int) -> Hold:
    return replace(hold(account, name, units), only=only)


def bought(  # noqa: PLR0917  (a row)
    account: int, units: int, ref: str, source: str, payer: str | None, expires_ms: int = 2**62
) -> Mint:
    return Mint(account, units, "test", ref, 0, source, expires_ms, payer)


async def left(db: Database, account: int) -> dict[int, int]:
    async with db.read() as tx:
        return {lot.id: lot.remaining_units for lot in await read.lots(tx, account, 100)}


async def test_one_lot_is_spent_and_the_one_before_it_is_not(db: Database) -> None:
    account = await open_account(db)
    early = await minted(db, mint(account, 10, "a", expires_ms=T0 + 1_000))
    late = await minted(db, mint(account, 5, "b"))
    only = Only(lot_id=late)
    assert await one(db, of(only, account, "much", 6)) == Short(5, 6)
    row = await held(db, of(only, account, "r", 4))
    closed = await one(db, capture(row, 3))
    assert isinstance(closed, Closed)
    assert closed.balance == Balance(12, 0)
    assert await left(db, account) == {early: 10, late: 2}
    # What it had held and not spent is the lot's again, and no more than that.
    assert await one(db, of(only, account, "again", 3)) == Short(2, 3)
    await one(db, void(await held(db, of(only, account, "last", 2))))
    assert await left(db, account) == {early: 10, late: 2}


async def test_a_kind_of_lots_is_spent_in_their_order(db: Database) -> None:
    account = await open_account(db)
    lots = [
        await minted(db, step)
        for step in (
            bought(account, 4, "a", "external", "0xa", T0 + 9_000),
            bought(account, 4, "b", "external", "0xb"),
            bought(account, 4, "c", "x402", "0xa"),
            bought(account, 4, "d", "external", "0xa", T0 + 8_000),
            bought(account, 4, "e", "external", None),
        )
    ]
    assert await one(db, of(ONLY_A, account, "much", 9)) == Short(8, 9)
    await one(db, capture(await held(db, of(ONLY_A, account, "r", 6)), 6))
    assert list((await left(db, account)).values())[::-1] == [2, 4, 4, 0, 4]
    assert await one(db, of(Only(source="external"), account, "s", 11)) == Short(10, 11)
    assert await one(db, of(Only(payer="0xa"), account, "t", 7)) == Short(6, 7)
    assert await one(db, of(Only(payer="0xc"), account, "u", 1)) == Short(0, 1)
    assert lots == sorted(lots)


async def test_nobody_else_spends_what_is_held_of_a_lot(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 5, "a", expires_ms=T0 + 1_000))
    await minted(db, mint(account, 5, "b"))
    row = await held(db, of(Only(lot_id=lot), account, "r", 5))
    # Without the pin this would take the lot that expires first.
    await one(db, capture(await held(db, hold(account, "other", 5)), 5))
    assert await one(db, hold(account, "more", 1)) == Short(0, 1)
    closed = await one(db, capture(row, 5))
    assert isinstance(closed, Closed)
    assert closed.balance == Balance(0, 0)


async def test_what_is_promised_to_others_is_not_held_again(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 5, "a"))
    floating = await held(db, hold(account, "other", 4))
    only = Only(lot_id=lot)
    assert await one(db, of(only, account, "much", 2)) == Short(1, 2)
    await held(db, of(only, account, "r", 1))
    await one(db, capture(floating, 4))


async def test_what_was_spent_before_and_not_booked_is_not_there(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 5, "a"))
    other = await minted(db, mint(account, 5, "b"))
    await one(db, capture(await held(db, hold(account, "other", 4)), 4))
    async with db.read() as tx:
        assert [await read.left_of(tx, account, Only(lot)) for lot in (lot, other, 77)] == [1, 5, 0]
        assert await read.left_of(tx, account, Only(source="grant")) == 6
        assert await read.left_of(tx, account, Only(payer="0xa")) == 0
        assert await read.left_of(tx, 999, Only()) == 0
    assert await scalar(db, "SELECT remaining_units FROM lot WHERE id = $1", lot) == 5
    assert await one(db, of(Only(lot_id=lot), account, "much", 2)) == Short(1, 2)
    # A refusal changes nothing, not even by booking what had been spent.
    assert await scalar(db, "SELECT remaining_units FROM lot WHERE id = $1", lot) == 5


async def test_a_lot_far_behind_others_is_found(db: Database) -> None:
    account = await open_account(db)
    await run(db, *(mint(account, 2, f"a{i}", expires_ms=T0 + 100 + i) for i in range(30)))
    lot = await minted(db, bought(account, 3, "z", "external", "0xa"))
    await one(db, capture(await held(db, hold(account, "other", 7)), 7))
    for only in (Only(lot_id=lot), Only(payer="0xa")):
        await one(db, capture(await held(db, of(only, account, f"r{only}", 1)), 1))
    assert (await left(db, account))[lot] == 1
    # The account still knows when the first of the others expires, and they do.
    await one(db, Expire(account), T0 + 50_000)
    assert await left(db, account) | {lot: 1} == await left(db, account)
    assert sum((await left(db, account)).values()) == 1


async def test_many_holds_of_several_lots_together(db: Database) -> None:
    account = await open_account(db)
    lots = [await minted(db, mint(account, 5, f"{i}", expires_ms=T0 + 9_000 - i)) for i in range(4)]
    steps = [of(Only(lot_id=lots[i % 4]), account, f"r{i}", 2) for i in range(12)]
    outcomes = await run(db, *steps, hold(account, "other", 5))
    kinds = Counter(type(each) for each in outcomes)
    assert kinds == Counter({Held: 8, Short: 5})  # two of each lot; of the rest no five are left
    rows = [outcome.hold for outcome in outcomes if isinstance(outcome, Held)]
    await run(db, *(capture(row, 1) for row in rows))
    assert list((await left(db, account)).values()) == [3, 3, 3, 3]


async def test_its_lot_expires_under_it(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 5, "a", expires_ms=T0 + 100))
    row = await held(db, of(Only(lot_id=lot), account, "r", 4))
    assert await one(db, Expire(account), T0 + 200)
    closed = await one(db, capture(row, 3), T0 + 300)
    assert isinstance(closed, Closed)
    assert closed.balance == Balance(0, 0)
    expired = await scalar(db, "SELECT expired_units FROM lot WHERE id = $1", lot)
    assert expired == 2
    assert await one(db, of(Only(lot_id=lot), account, "s", 1), T0 + 300) == Short(0, 1)


async def test_its_lot_is_disputed_under_it(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 5, "a"))
    row = await held(db, of(Only(lot_id=lot), account, "r", 4))
    frozen = await one(db, Freeze(lot, "disputed"))
    assert isinstance(frozen, LotIs)
    assert frozen.debt_units == 4
    await one(db, capture(row, 3))
    ended = await one(db, Unfreeze(lot))
    assert isinstance(ended, LotIs)
    assert (ended.debt_units, ended.balance) == (0, Balance(2, 0))


async def test_a_payout_leaves_what_is_held(db: Database) -> None:
    account = await open_account(db)
    lot = await minted(db, mint(account, 5, "a"))
    await minted(db, mint(account, 5, "b"))
    row = await held(db, of(Only(lot_id=lot), account, "r", 4))
    async with db.write() as tx:
        await tx.execute(
            "INSERT INTO payment (id, provider, state, purpose, amount_units, created_at_ms,"
            " updated_at_ms, lease_ms) VALUES ('p', 'payout', 'processing', 'refund', 1, 0, 0, 0)"
        )
    paid = await one(db, PayOut(lot, "p"))
    assert isinstance(paid, Withheld)
    assert paid.payout.amount_units == 1
    await one(db, capture(row, 4))


async def test_a_refund_goes_back_to_its_lot(db: Database) -> None:
    account = await open_account(db)
    other = await minted(db, mint(account, 5, "a", expires_ms=T0 + 1_000))
    lot = await minted(db, mint(account, 5, "b"))
    row = await held(db, of(Only(lot_id=lot), account, "r", 4))
    await one(db, capture(row, 4))
    assert isinstance(await one(db, Refund(row.id, "k", 3)), Refunded)
    assert await left(db, account) == {other: 5, lot: 4}


async def test_a_hold_of_nothing_needs_no_lot(db: Database) -> None:
    account = await open_account(db)
    row = await held(db, of(ONLY_A, account, "r", 0))
    await one(db, capture(row, 0))
    assert isinstance(await one(db, of(ONLY_A, account, "r", 0)), Repeated)


@pytest.mark.parametrize("close", [lambda row: capture(row, 2), void])
async def test_the_calls_beside_it_are_not_touched(db: Database, close: object) -> None:
    """No other hold has to look for pins because of it: the account's epoch stands."""
    account = await open_account(db)
    lot = await minted(db, mint(account, 9, "a"))
    beside = await held(db, hold(account, "other", 2))
    row = await held(db, of(Only(lot_id=lot), account, "r", 2))
    assert callable(close)
    await one(db, close(row))
    assert await scalar(db, "SELECT epoch FROM account WHERE id = $1", account) == beside.epoch
    await one(db, capture(beside, 2))


async def test_two_writers_spend_one_lot_once(postgres: Database) -> None:
    account = await open_account(postgres)
    lot = await minted(postgres, mint(account, 10, "a"))
    await minted(postgres, mint(account, 100, "b", expires_ms=T0 * 2))
    other = await Database.connect(postgres.url)
    writers = [await Writer.start(postgres), await Writer.start(other)]
    steps = [of(Only(lot_id=lot), account, f"r{i}", 1) for i in range(40)]
    steps += [hold(account, f"s{i}", 1) for i in range(40)]
    outcomes = await asyncio.gather(
        *(writers[i % 2].submit(step) for i, step in enumerate(steps)),
    )
    assert Counter(map(type, outcomes[:40])) == Counter({Held: 10, Short: 30})
    assert Counter(map(type, outcomes[40:])) == Counter({Held: 40})
    rows = [outcome.hold for outcome in outcomes if isinstance(outcome, Held)]
    await asyncio.gather(*(writers[i % 2].submit(Close(r, 1)) for i, r in enumerate(rows)))
    assert (await left(postgres, account))[lot] == 0
    for writer in writers:
        await writer.stop()
    await other.close()


async def test_a_session_spends_no_more_than_it_may(db: Database) -> None:
    """Open holds count with all they may cost, those that ended with what they did."""
    account = await open_account(db)
    await minted(db, bought(account, 100, "a", "external", "0xa"))
    await minted(db, bought(account, 100, "b", "card", None))
    one_session = Only(source="external", session="s1", most_units=10)
    first = await held(db, of(one_session, account, "r1", 6))
    assert await one(db, of(one_session, account, "r2", 5)) == Capped(4, 5)
    await one(db, capture(first, 2))
    second = await held(db, of(one_session, account, "r2", 8))
    assert await one(db, of(one_session, account, "r3", 1)) == Capped(0, 1)
    again = await one(db, of(one_session, account, "r1", 6))
    assert isinstance(again, Repeated)  # known before anything is counted
    await one(db, void(second))
    await one(db, capture(await held(db, of(one_session, account, "r4", 8)), 8))
    everything = replace(one_session, source=None)  # the limit is the session's, not the lots'
    assert await one(db, of(everything, account, "r5", 1)) == Capped(0, 1)
    await held(db, of(replace(everything, session="s2"), account, "r6", 10))
    async with db.read() as tx:
        assert await tx.fetchval("SELECT count(*) FROM hold_limit WHERE session = 's1'") == 3


async def test_many_at_once_pass_no_session_limit(db: Database) -> None:
    """In one transaction and in many, from two writers."""
    account = await open_account(db)
    await minted(db, bought(account, 1_000, "a", "external", "0xa"))
    limited = Only(source="external", session="s1", most_units=70)
    writers = [await Writer.start(db), await Writer.start(db)]
    try:
        steps = [of(limited, account, f"r{i}", 10) for i in range(20)]
        told = await asyncio.gather(*(writers[i % 2].submit(step) for i, step in enumerate(steps)))
    finally:
        for writer in writers:
            await writer.stop()
    kinds = Counter(type(outcome) for outcome in told)
    assert kinds == {Held: 7, Capped: 13}
