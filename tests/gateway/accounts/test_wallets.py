"""Which account a wallet belongs to."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from gateway.accounts import wallets
from gateway.db import Database
from gateway.ledger.steps import FIRST_ID

NOW_MS = 1_700_000_000_000
ONE = "0x" + "1" * 40
TWO = "0x" + "2" * 40


@pytest.fixture
async def db(db_url: str) -> AsyncIterator[Database]:
    database = await Database.connect(db_url)
    yield database
    await database.close()


async def test_a_wallet_gets_an_account_once(db: Database) -> None:
    async with db.write() as tx:
        assert await wallets.find(tx, ONE) is None
        account = await wallets.ensure(tx, ONE, NOW_MS)
        assert account >= FIRST_ID
        assert await wallets.ensure(tx, ONE, NOW_MS) == account
        assert await wallets.find(tx, ONE) == account
        assert await wallets.ensure(tx, TWO, NOW_MS) != account
    async with db.write() as tx:
        assert await wallets.ensure(tx, ONE, NOW_MS + 1) == account
        assert await wallets.wallets_of(tx, account) == [ONE]


async def test_a_contract_wallet_is_itself_on_its_own_chain_only(db: Database) -> None:
    async with db.write() as tx:
        key = await wallets.ensure(tx, ONE, NOW_MS)
        base = await wallets.ensure(tx, ONE, NOW_MS, "eip155:8453")
        assert len({key, base, await wallets.ensure(tx, ONE, NOW_MS, "eip155:1")}) == 3
        assert await wallets.find(tx, ONE, "eip155:8453") == base
        assert await wallets.find(tx, ONE, "eip155:10") is None
        assert await wallets.find(tx, ONE) == key


async def test_a_new_account_is_empty_and_nothing_of_it_expires(db: Database) -> None:
    async with db.write() as tx:
        account = await wallets.ensure(tx, ONE, NOW_MS)
        row = await tx.fetchrow("SELECT * FROM account WHERE id = $1", account)
    assert row is not None
    assert row["created_at_ms"] == NOW_MS
    zero = ("available", "held", "pinned", "debt", "added", "spent", "frozen", "ver")
    assert [row[name] for name in zero] == [0] * len(zero)


async def test_what_is_rolled_back_opened_nothing(db: Database) -> None:
    with pytest.raises(KeyError):
        async with db.write() as tx:
            await wallets.ensure(tx, ONE, NOW_MS)
            raise KeyError(ONE)
    async with db.read() as tx:
        assert await wallets.find(tx, ONE) is None
        assert await tx.fetchval("SELECT count(*) FROM account") == 0
