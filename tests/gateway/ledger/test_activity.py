"""The calls of an account and of its runs: sums, pages that stay, and what finding them costs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gateway.db import Database
from gateway.ledger import Close, HoldRow, Refund, Refunded, pages
from gateway.ledger.activity import (
    CALLS_OF_RUN,
    RUN_SUM,
    Call,
    RunSum,
    Wanted,
    calls,
    calls_of_run,
    run_sum,
)
from gateway.ledger.pages import Page
from tests.gateway.ledger import helpers
from tests.gateway.ledger.helpers import CALL, T0, capture, hold, mint, minted, one, void

UNITS = 10_000


async def rich(db: Database, n: int = 1) -> int:
    account = await helpers.open_account(db, n)
    await minted(db, mint(account, 1_000 * UNITS, f"a{n}"))
    return account


async def called(
    db: Database, account: int, name: str, run: str | None, at_ms: int = T0
) -> HoldRow:
    step = replace(hold(account, name, UNITS), call=replace(CALL, run=run))
    return await helpers.held(db, step, at_ms)


async def total(db: Database, account: int, run: str) -> RunSum | None:
    async with db.read() as tx:
        return await run_sum(tx, account, run)


async def page(
    db: Database, account: int, run: str | None, limit: int, cursor: int | None
) -> Page[Call]:
    async with db.read() as tx:
        if run is None:
            return await calls(tx, account, limit, cursor)
        return await calls_of_run(tx, account, run, limit, cursor)


async def ids(db: Database, account: int, run: str | None, limit: int) -> list[str]:
    """All calls, page by page."""
    found: list[str] = []
    cursor: int | None = None
    for _ in range(100):
        got = await page(db, account, run, limit, cursor)
        found += [call.hold.request_id for call in got.rows]
        cursor = got.next_cursor
        if cursor is None:
            return found
    raise AssertionError("the pages never end")


async def test_a_run_is_summed_in_one_query(db: Database) -> None:
    account, other = await rich(db), await rich(db, 2)
    one_row = await called(db, account, "a", "r", T0 + 5)
    await one(db, capture(one_row, UNITS))
    part = await called(db, account, "b", "r", T0 + 6)
    await one(db, capture(part, UNITS // 4))
    await one(db, void(await called(db, account, "c", "r", T0 + 7)))
    await called(db, account, "d", "r", T0 + 8)
    # What must not be counted: another run, none, another account's run of the same name.
    await one(db, capture(await called(db, account, "e", "r2"), UNITS))
    await one(db, capture(await called(db, account, "f", None), UNITS))
    await one(db, capture(await called(db, other, "g", "r"), UNITS))
    back = await one(db, Refund(one_row.id, "k", UNITS // 2))
    assert isinstance(back, Refunded)
    assert await total(db, account, "r") == RunSum(
        calls=4,
        charged=2,
        not_charged=1,
        pending=1,
        charged_units=UNITS + UNITS // 4,
        refunded_units=UNITS // 2,
        held_units=UNITS,
        first_at_ms=T0 + 5,
        last_at_ms=T0 + 8,
    )
    assert await total(db, account, "nothing") is None
    (first, *_) = [
        call for call in (await page(db, account, "r", 10, None)).rows if call.charge.refunded_units
    ]
    assert (first.hold.id, first.charge.refunded_units) == (one_row.id, UNITS // 2)


async def test_pages_of_a_run_stay_while_calls_are_made(db: Database) -> None:
    account = await rich(db)
    rows = [await called(db, account, f"r{n}", "r") for n in range(7)]
    first = await page(db, account, "r", 3, None)
    assert [call.hold.request_id for call in first.rows] == ["r6", "r5", "r4"]
    await called(db, account, "new", "r")
    await one(db, Close(rows[3], UNITS))  # to end changes no place
    second = await page(db, account, "r", 3, first.next_cursor)
    assert [call.hold.request_id for call in second.rows] == ["r3", "r2", "r1"]
    assert [call.charge.close is not None for call in second.rows] == [True, False, False]
    assert await ids(db, account, "r", 2) == ["new", *(f"r{n}" for n in reversed(range(7)))]


async def test_all_calls_by_the_statement(db: Database) -> None:
    """Those that run come first; behind the cursor nothing moves."""
    account = await rich(db)
    rows = [await called(db, account, f"r{n}", None) for n in range(6)]
    for n in (1, 0, 4, 5):
        await one(db, capture(rows[n], UNITS))
    await minted(db, mint(account, UNITS, "between"))
    await one(db, void(rows[2]))
    assert await ids(db, account, None, 10) == ["r3", "r2", "r5", "r4", "r0", "r1"]
    first = await page(db, account, None, 2, None)
    assert [call.hold.request_id for call in first.rows] == ["r3", "r2", "r5"]
    await one(db, capture(rows[3], UNITS))
    await one(db, capture(await called(db, account, "new", None), UNITS))
    second = await page(db, account, None, 2, first.next_cursor)
    assert [call.hold.request_id for call in second.rows] == ["r4", "r0"]
    assert await ids(db, account, None, 1) == ["new", "r3", "r2", "r5", "r4", "r0", "r1"]
    stranger = await rich(db, 2)
    assert (await page(db, stranger, None, 5, first.next_cursor)).rows == ()
    assert await ids(db, stranger, None, 5) == []


@pytest.mark.parametrize("run", [None, "r"])
async def test_a_filter_gives_what_every_row_would_say(
    db: Database, run: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the wanted ones lie further apart than is looked at for one page."""
    monkeypatch.setattr(pages, "STRETCH", 2)
    monkeypatch.setattr(pages, "STRETCHES", 3)
    account = await rich(db)
    rows = []
    for n in range(24):
        call = replace(CALL, run=run, route=f"GET /{n % 5}", price=f"flat:{n % 3}")
        step = replace(hold(account, f"r{n}", UNITS, principal=f"0x{n % 2}"), call=call)
        rows.append(await helpers.held(db, step, T0 + n * 1_000_000))
    for n, row in enumerate(rows[:21]):
        await one(db, void(row) if n % 4 == 0 else capture(row, n), T0 + n * 1_000_000 + 5)
    back = await one(db, Refund(rows[7].id, "k", 1))
    assert isinstance(back, Refunded)

    async def all_of(wanted: Wanted, limit: int) -> list[str]:
        found: list[str] = []
        cursor: int | None = None
        for _ in range(100):
            async with db.read() as tx:
                if run is None:
                    got = await calls(tx, account, limit, cursor, wanted)
                else:
                    got = await calls_of_run(tx, account, run, limit, cursor, wanted)
            found += [call.hold.request_id for call in got.rows]
            cursor = got.next_cursor
            if cursor is None:
                return found
        raise AssertionError("the pages never end")

    async with db.read() as tx:
        every = (await calls(tx, account, 100)).rows
    asked = [
        Wanted(route="GET /3"),
        Wanted(route="GET /4", state="charged"),
        Wanted(state="not_charged"),
        Wanted(state="refunded"),
        Wanted(state="pending"),
        Wanted(principal="0x1", price="flat:2"),
        Wanted(from_ms=T0 + 4_000_000, to_ms=T0 + 9_000_000),
        Wanted(from_ms=T0 + 20_000_000),
        Wanted(to_ms=T0),
        Wanted(route="nothing"),
    ]
    for wanted in asked:
        expected = [call.hold.request_id for call in every if call in wanted]
        for limit in (1, 2, 100):
            assert await all_of(wanted, limit) == expected, (wanted, limit)
    assert len([call for call in every if call in asked[6]]) == 5


async def test_a_run_is_found_without_reading_other_calls(db: Database) -> None:
    account = await rich(db)
    await called(db, account, "a", "r")
    params = {RUN_SUM: (account, "r"), CALLS_OF_RUN: (account, "r", 2**62, 10)}
    for query, values in params.items():
        async with db.read() as tx:
            if tx.dialect == "postgres":
                await tx.execute("SET LOCAL enable_seqscan = off")  # the table is small
                rows = [str(row[0]) for row in await tx.fetch(f"EXPLAIN {query}", *values)]
            else:
                plan = await tx.fetch(f"EXPLAIN QUERY PLAN {query}", *values)
                rows = [row["detail"] for row in plan]
        assert any("ix_hold_run" in row for row in rows), rows
        assert not any(row.startswith("SCAN h") or "Seq Scan on hold" in row for row in rows), rows
