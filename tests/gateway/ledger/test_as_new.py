"""Steps that are taken for new ones: a repeat among them is found out by the tables' own keys."""

from __future__ import annotations

import pytest

from gateway.db import Database, WriteConflict
from gateway.ledger import (
    AlreadyClosed,
    Closed,
    Conflict,
    Held,
    LedgerFault,
    Outcome,
    Repeated,
    Short,
    Step,
    Writer,
    apply,
)
from tests.gateway.ledger.helpers import (
    T0,
    capture,
    held,
    hold,
    mint,
    minted,
    open_account,
    scalar,
    void,
)


async def as_new(db: Database, *steps: Step, at_ms: int = T0) -> list[Outcome]:
    async with db.write() as tx:
        return await apply(tx, steps, at_ms, as_new=True)


async def warm(db: Database) -> int:
    """An account with ten units whose row has been seen."""
    account = await open_account(db)
    await minted(db, mint(account, 10, "a"))
    return account


async def test_new_requests_are_applied(db: Database) -> None:
    account = await warm(db)
    first, second = await as_new(db, hold(account, "a", 4), hold(account, "b", 6))
    assert isinstance(first, Held)
    assert isinstance(second, Held)
    closes = await as_new(db, capture(first.hold, 4), void(second.hold))
    assert [type(each) for each in closes] == [Closed, Closed]
    assert await scalar(db, "SELECT available FROM account WHERE id = $1", account) == 6


async def test_a_repeat_is_never_applied_again(db: Database) -> None:
    account = await warm(db)
    row = await held(db, hold(account, "a", 4))
    try:
        (outcome,) = await as_new(db, hold(account, "a", 4))
    except WriteConflict:
        pass  # nothing was written: it is to be asked again
    else:
        assert outcome == Repeated(row, None)
    assert await scalar(db, "SELECT held FROM account WHERE id = $1", account) == 4
    assert await scalar(db, "SELECT count(*) FROM hold") == 1


async def test_a_hold_is_closed_once(db: Database) -> None:
    account = await warm(db)
    row = await held(db, hold(account, "a", 4))
    (first,) = await as_new(db, capture(row, 3))
    assert isinstance(first, Closed)
    try:
        (outcome,) = await as_new(db, capture(row, 4))
    except WriteConflict:
        pass
    else:
        assert outcome == AlreadyClosed(first.transfer)
    assert await scalar(db, "SELECT available FROM account WHERE id = $1", account) == 7


async def test_a_repeat_without_funds_is_a_repeat(db: Database) -> None:
    """Its first run emptied the account: what is left must not be looked at."""
    account = await warm(db)
    row = await held(db, hold(account, "all", 10))
    assert await as_new(db, hold(account, "all", 10)) == [Repeated(row, None)]
    assert await as_new(db, hold(account, "all", 10, content=b"other")) == [Conflict(row)]
    assert await as_new(db, hold(account, "more", 1)) == [Short(0, 1)]


async def test_a_refused_neighbour_leaves_no_trace_on_the_others(db: Database) -> None:
    account = await warm(db)
    outcomes = await as_new(db, hold(account, "a", 4), hold(account, "b", 7), hold(account, "c", 6))
    assert [type(each) for each in outcomes] == [Held, Short, Held]
    assert await scalar(db, "SELECT available FROM account WHERE id = $1", account) == 0
    assert await scalar(db, "SELECT held FROM account WHERE id = $1", account) == 10


async def test_a_repeat_in_the_same_batch(db: Database) -> None:
    account = await warm(db)
    first, second = await as_new(db, hold(account, "a", 4), hold(account, "a", 4))
    assert isinstance(first, Held)
    assert second == Repeated(first.hold, None)
    assert await scalar(db, "SELECT held FROM account WHERE id = $1", account) == 4


async def test_a_mistake_is_told_as_one_and_what_is_known_comes_first(db: Database) -> None:
    account = await warm(db)
    row = await held(db, hold(account, "a", 4))
    with pytest.raises(LedgerFault):
        await as_new(db, hold(account, "b", 1), capture(row, 5))
    (closed,) = await as_new(db, capture(row, 4))
    assert isinstance(closed, Closed)
    # Asked again with a wrong amount: it is closed, and that is the answer.
    assert await as_new(db, capture(row, 5)) == [AlreadyClosed(closed.transfer)]
    assert await scalar(db, "SELECT available FROM account WHERE id = $1", account) == 6


async def test_an_alias_is_always_looked_for(db: Database) -> None:
    account = await warm(db)
    row = await held(db, hold(account, "a", 4, alias="order 7"))
    assert await as_new(db, hold(account, "b", 4, alias="order 7")) == [Repeated(row, None)]


async def test_what_is_due_expires_first(db: Database) -> None:
    account = await open_account(db)
    await minted(db, mint(account, 10, "a", expires_ms=T0 + 10))
    (outcome,) = await as_new(db, hold(account, "late", 1), at_ms=T0 + 10)
    assert outcome == Short(0, 1)


async def test_a_writer_answers_a_repeat_whoever_wrote_the_first(db: Database) -> None:
    account = await warm(db)
    one, other = await Writer.start(db), await Writer.start(db)
    try:
        for n in range(3):
            first = await one.submit(hold(account, f"r{n}", 1))
            assert isinstance(first, Held)
            assert await other.submit(hold(account, f"r{n}", 1)) == Repeated(first.hold, None)
            closed = await other.submit(capture(first.hold, 1))
            assert isinstance(closed, Closed)
            assert await one.submit(capture(first.hold, 1)) == AlreadyClosed(closed.transfer)
    finally:
        await one.stop()
        await other.stop()
