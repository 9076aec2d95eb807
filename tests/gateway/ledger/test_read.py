"""Balance and statement as their owner sees them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gateway.db import Database
from gateway.ledger import Expire, Refund, Refunded, pages, prices, read, statement
from tests.gateway.ledger.helpers import (
    T0,
    Clock,
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


async def test_the_lots_of_a_call_are_those_whose_calls_it_is(db: Database) -> None:
    """From a call to its lots and from a lot to its calls: the same, before and after a fold, with
    a dead lot under an open hold and with refunds."""
    account = await open_account(db)
    soon = await minted(db, mint(account, 10, "soon", expires_ms=T0 + 1_000))
    await minted(db, mint(account, 10, "late"))
    first = await held(db, hold(account, "a", 6))
    second = await held(db, hold(account, "b", 8))
    pinned = await held(db, hold(account, "c", 4))
    await one(db, capture(first, 6))
    await one(db, capture(second, 7))
    async with db.read() as tx:
        close = await read.close_of(tx, second.id)
        assert close is not None
        parts = await read.lots_of_call(tx, close)
    assert [(part.units, part.ref) for part in parts] == [(4, "soon"), (3, "late")]
    assert [part.network for part in parts] == ["test", "test"]
    await one(db, Expire(account), T0 + 1_000)  # folds, and pins what the open hold stands on
    await one(db, capture(pinned, 3), T0 + 1_001)
    back = await one(db, Refund(second.id, "k", 5), T0 + 1_002)
    assert isinstance(back, Refunded)
    nothing = await held(db, hold(account, "d", 1), T0 + 1_003)
    await one(db, void(nothing), T0 + 1_004)
    async with db.read() as tx:
        by_call: dict[tuple[int, int], tuple[int, int]] = {}
        for row in (first, second, pinned, nothing):
            close = await read.close_of(tx, row.id)
            assert close is not None
            for part in await read.lots_of_call(tx, close):
                by_call[row.id, part.lot_id] = (part.units, part.refunded_units)
        by_lot: dict[tuple[int, int], tuple[int, int]] = {}
        for lot in await read.lots(tx, account, 10):
            for use in await read.calls_of_lot(tx, lot.id, 10):
                by_lot[use.hold.id, lot.id] = (use.units, use.refunded_units)
    assert by_call == by_lot
    assert by_call[second.id, soon][0] == 4
    assert sum(units for units, _ in by_call.values()) == 6 + 7 + 3
    assert sum(refunded for _, refunded in by_call.values()) == 5


async def test_a_statement_by_type_and_time(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "STRETCH", 2)
    monkeypatch.setattr(pages, "STRETCHES", 2)
    account = await open_account(db)
    await minted(db, replace(mint(account, 100, "bought"), source="x402"))
    await minted(db, mint(account, 100, "given"))
    for n in range(9):
        row = await held(db, hold(account, f"r{n}", 5), T0 + n * 1_000_000)
        await one(db, void(row) if n == 3 else capture(row, 5), T0 + n * 1_000_000)
    back = await one(db, Refund(row.id, "k", 1), T0 + 9_000_000)
    assert isinstance(back, Refunded)

    async def lines(wanted: statement.Wanted, limit: int = 100) -> list[tuple[str, int, str]]:
        found: list[statement.Line] = []
        cursor: int | None = None
        for _ in range(30):
            async with db.read() as tx:
                got = await statement.page(tx, account, limit, cursor, wanted)
            found += got.rows
            cursor = got.next_cursor
            if cursor is None:
                return [
                    (
                        each.type,
                        each.transfer.amount_units,
                        each.source if each.call is None else each.call.request_id,
                    )
                    for each in found
                ]
        raise AssertionError("the pages never end")

    every = await lines(statement.ALL)
    assert every == [
        ("refund", 1, "r8"),
        *(("usage", 0 if n == 3 else 5, f"r{n}") for n in reversed(range(9))),
        ("bonus", 100, "grant"),
        ("purchase", 100, "x402"),
    ]
    for limit in (1, 3, 100):
        assert await lines(statement.ALL, limit) == every
        for kind in ("usage", "bonus", "purchase", "refund", "expire"):
            expected = [line for line in every if line[0] == kind]
            assert await lines(statement.Wanted(kind), limit) == expected
        late = statement.Wanted(from_ms=T0 + 7_000_000, to_ms=T0 + 9_000_000)
        assert await lines(late, limit) == [("usage", 5, "r8"), ("usage", 5, "r7")]


async def test_the_terms_of_a_price_are_kept_as_they_were(db: Database) -> None:
    await prices.remember(db, {"flat:1": ({"price": "$0.000001"}, {"rule": "flat"})})
    await prices.remember(db, {"x": ({"a": [1, "ü"]}, {"b": 2})})
    async with db.read() as tx:
        first = await prices.terms_of(tx, "x")
        assert first is not None
        assert (first.version, first.terms, first.source) == ("x", {"a": [1, "ü"]}, {"b": 2})
        assert await prices.terms_of(tx, "y") is None
    await prices.remember(db, {"x": ({"a": "another"}, {}), "y": ({}, {})})
    async with db.read() as tx:
        assert await prices.terms_of(tx, "x") == first
        assert (await prices.terms_of(tx, "y")) is not None


async def test_which_price_a_route_had_is_noted(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    clock.install(monkeypatch)
    assert await prices.note(db, {"GET /a": "v1", "GET /b": "w1"}, 100) == {}
    clock.now_ms += 10
    assert await prices.note(db, {"GET /c": "v1"}, 100) == {}
    clock.now_ms += 10  # noted for the first time just now
    assert await prices.note(db, {"GET /c": "v2"}, 100) == {
        "GET /c": [(T0 + 10, "v1"), (T0 + 20, "v2")]
    }
    clock.now_ms += 1_000
    assert await prices.note(db, {"GET /a": "v1", "GET /b": "w1"}, 100) == {}
    changed = clock.now_ms
    assert await prices.note(db, {"GET /a": "v2", "GET /b": "w1"}, 100) == {
        "GET /a": [(T0, "v1"), (changed, "v2")]
    }
    clock.now_ms += 50
    assert await prices.note(db, {"GET /a": "v3"}, 100) == {
        "GET /a": [(T0, "v1"), (changed, "v2"), (changed + 50, "v3")]
    }
    clock.now_ms += 50  # the first change is too long ago; what it led to was in force since
    assert await prices.note(db, {"GET /a": "v3"}, 100) == {
        "GET /a": [(changed, "v2"), (changed + 50, "v3")]
    }
    clock.now_ms += 50
    assert await prices.note(db, {"GET /a": "v3"}, 100) == {}
    assert await prices.note(db, {"GET /a": "v2"}, 100) == {
        "GET /a": [(changed + 50, "v3"), (clock.now_ms, "v2")]
    }
