"""Ids are handed out once, whatever becomes of the transaction; rows are written as read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gateway.db import Database, Tx
from gateway.ledger import Frozen, Held, LedgerFault, Short, apply
from gateway.ledger.ids import BLOCK, BLOCK_LIFE_MS, IdBlocks, reserve
from tests.gateway.ledger.helpers import T0, hold, mint, minted, one, open_account, scalar


async def take(db: Database, blocks: IdBlocks, count: int, at_ms: int = T0) -> list[int]:
    async with db.write() as tx:
        return list(await blocks.take(tx, count, at_ms))


async def test_ids_rise_and_are_handed_out_once(db: Database) -> None:
    mine, theirs = IdBlocks(), IdBlocks()
    got: list[int] = []
    for _ in range(5):
        got += await take(db, mine, 7)
        got += await take(db, theirs, 3)
        async with db.write() as tx:
            got += await reserve(tx, 2)
    assert len(set(got)) == len(got) == 60
    assert min(got) >= 1_000


async def test_more_than_a_block_at_once(db: Database) -> None:
    blocks = IdBlocks()
    ids = await take(db, blocks, BLOCK + 5)
    assert len(set(ids)) == BLOCK + 5
    assert (await take(db, blocks, 1))[0] > ids[-1]


async def test_a_rolled_back_reservation_is_nobodys(db: Database) -> None:
    blocks, others = IdBlocks(), IdBlocks()
    with pytest.raises(KeyError):
        async with db.write() as tx:
            await blocks.take(tx, 5, T0)
            raise KeyError
    theirs = await take(db, others, 500)
    mine = await take(db, blocks, 500)
    assert not set(mine) & set(theirs)


async def test_ids_of_a_rolled_back_transaction_are_burnt(db: Database) -> None:
    blocks = IdBlocks()
    first = await take(db, blocks, 5)
    burnt: list[int] = []
    with pytest.raises(KeyError):
        async with db.write() as tx:
            burnt += await blocks.take(tx, 5, T0)
            raise KeyError
    again = await take(db, blocks, 5)
    assert len({*first, *burnt, *again}) == 15


async def test_a_block_is_left_when_it_is_old(db: Database) -> None:
    blocks = IdBlocks()
    first = await take(db, blocks, 1)
    assert await take(db, blocks, 1, T0 + BLOCK_LIFE_MS) == [first[0] + 1]
    assert (await take(db, blocks, 1, T0 + BLOCK_LIFE_MS + 1))[0] >= first[0] + BLOCK


async def test_an_account_that_changed_since_it_was_read_is_not_written(db: Database) -> None:
    """Absolute values are written: the version is the second wall behind the lock."""
    account = await open_account(db)

    class Meddling(IdBlocks):
        async def take(self, tx: Tx, count: int, now_ms: int) -> Iterator[int]:
            await tx.execute("UPDATE account SET ver = ver + 1 WHERE id = $1", account)
            return await super().take(tx, count, now_ms)

    for step in (mint(account, 5, "a"), hold(account, "r", 0)):
        with pytest.raises(LedgerFault):
            async with db.write() as tx:
                await apply(tx, [step], T0, ids=Meddling())
    assert await scalar(db, "SELECT count(*) FROM transfer") == 0


async def test_what_another_process_changed_is_seen(db: Database) -> None:
    """SQLite keeps account rows between transactions, until somebody else commits."""
    account = await open_account(db)
    other = await Database.connect(db.url)
    await minted(db, mint(account, 10, "a"))
    assert isinstance(await one(other, hold(account, "r1", 6)), Held)
    assert await one(db, hold(account, "r2", 6)) == Short(4, 6)
    assert isinstance(await one(db, hold(account, "r2", 3)), Held)
    assert await one(other, hold(account, "r3", 2)) == Short(1, 2)
    await other.close()


async def test_what_was_rolled_back_is_forgotten(db: Database) -> None:
    account = await open_account(db)
    await minted(db, mint(account, 10, "a"))
    with pytest.raises(KeyError):
        async with db.write() as tx:
            await apply(tx, [hold(account, "r1", 10)], T0)
            raise KeyError
    assert isinstance(await one(db, hold(account, "r2", 10)), Held)


async def test_a_fault_that_is_caught_leaves_nothing_behind(db: Database) -> None:
    account = await open_account(db)
    await minted(db, mint(account, 10, "a"))
    async with db.write() as tx:
        with pytest.raises(LedgerFault):
            await apply(tx, [hold(account, "r1", 10), mint(account, 0, "nothing")], T0)
        (outcome,) = await apply(tx, [hold(account, "r2", 10)], T0)
    assert isinstance(outcome, Held)


async def test_an_account_frozen_by_hand_is_frozen_at_once(db: Database) -> None:
    account = await open_account(db)
    await minted(db, mint(account, 10, "a"))
    async with db.write() as tx:
        assert isinstance((await apply(tx, [hold(account, "r1", 1)], T0))[0], Held)
        await tx.execute("UPDATE account SET frozen = 1 WHERE id = $1", account)
        assert await apply(tx, [hold(account, "r2", 1)], T0) == [Frozen(0)]
    assert await one(db, hold(account, "r2", 1)) == Frozen(0)
    async with db.write() as tx:  # the audit would ask who had decided it
        await tx.execute("UPDATE account SET frozen = 0 WHERE id = $1", account)
