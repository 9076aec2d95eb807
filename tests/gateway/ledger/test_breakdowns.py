"""What a charge is made of is written with it, adds up to it, and stays."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gateway.db import Database
from gateway.ledger import Closed, LedgerFault, breakdowns, read
from tests.gateway.ledger.helpers import capture, faults, funded, held, hold, one, scalar, void

LINES = [{"for": "tokens_in", "units": 4, "count": 9, "rate": "$1 / 1M"}, {"for": "x", "units": 0}]


async def test_the_lines_of_a_charge_are_kept_with_it(db: Database) -> None:
    account = await funded(db, 10)
    row = await held(db, hold(account, "a", 6))
    closed = await one(db, replace(capture(row, 4), breakdown=breakdowns.text_of(LINES)))
    assert isinstance(closed, Closed)
    assert closed.balance.available_units == 6
    async with db.read() as tx:
        assert await breakdowns.of_call(tx, await read.close_of(tx, row.id)) == LINES
    # Asked again it is known, and nothing is written twice.
    await one(db, replace(capture(row, 4), breakdown=breakdowns.text_of(LINES)))
    assert await scalar(db, "SELECT count(*) FROM breakdown") == 1
    assert await faults(db) == []


async def test_lines_that_do_not_add_up_are_not_written(db: Database) -> None:
    account = await funded(db, 10)
    row = await held(db, hold(account, "a", 6))
    with pytest.raises(LedgerFault, match="breakdown"):
        await one(db, replace(capture(row, 5), breakdown=breakdowns.text_of(LINES)))
    async with db.read() as tx:
        assert await read.close_of(tx, row.id) is None
    assert await scalar(db, "SELECT count(*) FROM breakdown") == 0


async def test_a_charge_without_lines_is_its_price(db: Database) -> None:
    account = await funded(db, 10)
    flat, nothing, none = [await held(db, hold(account, name, 3)) for name in "abc"]
    await one(db, capture(flat, 3))
    await one(db, capture(nothing, 0))
    await one(db, void(none))
    async with db.read() as tx:
        told = [
            await breakdowns.of_call(tx, await read.close_of(tx, row.id))
            for row in (flat, nothing, none)
        ]
        assert await breakdowns.of_call(tx, None) == []
    assert told == [[{"for": "call", "units": 3}], [], []]


async def test_a_breakdown_is_never_changed(db: Database) -> None:
    account = await funded(db, 10)
    row = await held(db, hold(account, "a", 6))
    await one(db, replace(capture(row, 4), breakdown=breakdowns.text_of(LINES)))
    for sql in ("UPDATE breakdown SET amount_units = 1", "DELETE FROM breakdown"):
        with pytest.raises(Exception, match="append-only"):  # each driver has its own
            async with db.write() as tx:
                await tx.execute(sql)
