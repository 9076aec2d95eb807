"""The identifier of a purchase: bound with the claim, or not at all."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from chain.schemes.eip3009 import Authorization
from gateway.db import Database
from gateway.errors import Problem
from gateway.migrations.run import migrate
from gateway.payments import aliases, journal, x402
from gateway.payments.journal import Payment
from gateway.payments.lane import Begun
from gateway.payments.order import Order
from gateway.payments.rails import Rails
from tests.fixtures_chain import NETWORK, USDC
from tests.gateway.payments.parts import KEYS, PAY_TO, settings_for

PAYER = "0x" + "aa" * 20
AT = Begun(1_700_000_000_000, 0)


@pytest.fixture
async def db(db_url: str) -> AsyncIterator[Database]:
    database = await Database.connect(db_url)
    await migrate(database)
    yield database
    await database.close()


def order(alias: str | None, n: int = 1) -> Order:
    shop = settings_for()
    nonce, signature = f"0x{n:064x}", bytes(65)
    auth = Authorization(PAYER, PAY_TO, 1_000_000, 0, 2_000_000_000, nonce, signature)
    chain = shop.chain(NETWORK.caip2)
    return Order(chain, USDC, auth, "credits", 0, b"content", None, alias=alias)


async def begun(db: Database, asked: Order) -> str | None:
    """The payment, if the order is the first of its authorization and of its name."""
    made: list[Payment] = []
    job = x402._job(Rails(settings_for(), db, KEYS, {}), asked, journal.new_id(), "", made)
    async with db.write() as tx:
        first = await job.begin(tx, AT)
    assert first is bool(made)
    return made[0].id if made else None


async def names(db: Database) -> dict[str, str]:
    async with db.read() as tx:
        rows = await tx.fetch("SELECT alias, payment_id FROM payment_alias")
    return {row["alias"]: row["payment_id"] for row in rows}


async def test_of_two_authorizations_under_one_name_one_is_sent(db: Database) -> None:
    first = await begun(db, order("name", 1))
    assert first is not None
    assert await begun(db, order("name", 2)) is None
    async with db.read() as tx:
        assert await tx.fetchval("SELECT count(*) FROM payment") == 1
        assert await tx.fetchval("SELECT count(*) FROM authorization_use") == 1
    # Another name, or none, is another purchase.
    second, third = await begun(db, order("other", 2)), await begun(db, order(None, 3))
    assert None not in (second, third)
    assert await names(db) == {"name": first, "other": second}


async def test_an_authorization_that_is_taken_gets_no_second_name(db: Database) -> None:
    """Two nodes present it at once, under two names: the second finds it claimed."""
    first = await begun(db, order("name"))
    assert await begun(db, order("other")) is None
    assert await names(db) == {"name": first}
    assert first is not None
    async with db.read() as tx:
        await aliases.require_same(tx, first, "name")
        await aliases.require_same(tx, first, None)
        with pytest.raises(Problem, match="request_id_conflict"):
            await aliases.require_same(tx, first, "other")
