"""Balance and statement as their owner sees them."""

from __future__ import annotations

from gateway.db import Database
from gateway.ledger import Expire, read
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
)


async def test_the_statement_is_newest_first_and_comes_in_pages(db: Database) -> None:
    account, other = await open_account(db, 1), await open_account(db, 2)
    await minted(db, mint(account, 100, "a"))
    await minted(db, mint(other, 100, "b"))
    for i in range(12):
        row = await held(db, hold(account, f"r{i}", 5))
        await one(db, capture(row, i % 3))
        await one(db, capture(await held(db, hold(other, f"r{i}", 5)), 1))
    async with db.read() as tx:
        whole = await read.statement(tx, account, 100)
        assert [line.seq for line in whole] == list(range(13, 0, -1))
        assert whole[-1].kind == "mint"
        assert whole[0].balance_units == 100 - 12
        pages, before = [], None
        while page := await read.statement(tx, account, 5, before):
            pages.append(page)
            before = page[-1].id
        assert [len(page) for page in pages] == [5, 5, 3]
        assert [line for page in pages for line in page] == list(whole)
        # A line of somebody else's statement leads nowhere.
        theirs = (await read.statement(tx, other, 1))[0].id
        assert list(await read.statement(tx, account, 5, theirs)) == []
        assert list(await read.statement(tx, account, 5, 10**9)) == []


async def test_an_account_without_history(db: Database) -> None:
    account = await open_account(db)
    async with db.read() as tx:
        assert list(await read.statement(tx, account, 5)) == []
        assert await read.account(tx, account + 1) is None
        assert list(await read.lots(tx, account, 5)) == []


async def test_what_expires_next_is_shown(db: Database) -> None:
    account = await open_account(db)
    await run(db, mint(account, 5, "a", expires_ms=T0 + 50), mint(account, 5, "b"))
    async with db.read() as tx:
        view = await read.account(tx, account)
    assert view is not None
    assert view.next_expiry_ms == T0 + 50
    await one(db, Expire(account), T0 + 50)
    async with db.read() as tx:
        view = await read.account(tx, account)
    assert view is not None
    assert (view.next_expiry_ms, view.available_units) == (None, 5)


async def test_lots_are_shown_with_what_truly_remains(db: Database) -> None:
    account = await open_account(db)
    soon = await minted(db, mint(account, 10, "soon", expires_ms=T0 + 1_000))
    late = await minted(db, mint(account, 10, "late"))
    row = await held(db, hold(account, "r", 14))
    async with db.read() as tx:  # a hold takes no lot until it is captured
        assert [lot.remaining_units for lot in await read.lots(tx, account, 9)] == [10, 10]
    await one(db, capture(row, 13))
    async with db.read() as tx:
        shown = await read.lots(tx, account, 9)
        assert [(lot.id, lot.remaining_units) for lot in shown] == [(late, 7), (soon, 0)]
        assert [lot.id for lot in await read.lots(tx, account, 1)] == [late]
        assert await read.minted_units(tx, soon) == 10
        assert await read.minted_units(tx, 1) is None
