"""Chain nonces: one number for one transaction, its members, its replacements."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest

from chain import sender
from chain.sender import Fees, Prepared
from gateway.db import Database, transact
from gateway.payments import journal, nonces
from gateway.payments.nonces import Call
from tests.fixtures_chain import NETWORK, USDC
from tests.gateway.ledger import helpers
from tests.gateway.payments.parts import blank

T0 = 1_700_000_000_000
SENDER = "0x" + "5e" * 20
KEY = "0x" + "11" * 32

Connect = Callable[[], Any]


@pytest.fixture
async def connect(db_url: str) -> AsyncIterator[Connect]:
    """Opens connections of their own to one database, as the nodes of a deployment have."""
    async with AsyncExitStack() as stack:

        async def open_one() -> Database:
            db = await Database.connect(db_url, wait_s=20)
            stack.push_async_callback(db.close)
            return db

        yield open_one


@pytest.fixture
async def db(connect: Connect) -> AsyncIterator[Database]:
    database: Database = await connect()
    yield database
    assert await helpers.faults(database) == []


def call(payment_id: str, data: bytes = b"\x01") -> Call:
    return Call(payment_id, USDC.address, data)


async def inserted(db: Database, *payment_ids: str) -> None:
    async with db.write() as tx:
        for n, payment_id in enumerate(payment_ids):
            await journal.insert(tx, blank(payment_id, auth_nonce=f"0x{n:02x}"))


async def shown(db: Database, payment_id: str) -> str | None:
    async with db.read() as tx:
        found = await journal.by_id(tx, payment_id)
    assert found is not None
    return found.tx_hash


def made(nonce: int, *, who: str = SENDER, version: int = 0) -> Prepared:
    raw = bytes(range(256)) + b"%d.%d" % (nonce, version)
    return Prepared(NETWORK.caip2, who, nonce, raw, f"0x{nonce:032x}{version:032x}")


async def test_nodes_that_share_a_gas_account_never_share_a_number(connect: Connect) -> None:
    """As many as like at once: nobody has to try again, and no number is left out."""
    nodes = [await connect() for _ in range(4)]

    async def allot(node: Database, payment_id: str) -> int:
        async with node.write() as tx:
            return await nonces.allot(tx, NETWORK.caip2, SENDER, 7, [call(payment_id)], T0)

    for start in (7, 47):
        got = await asyncio.gather(*(allot(nodes[n % 4], f"p{start}.{n}") for n in range(40)))
        assert sorted(got) == list(range(start, start + 40))
    async with nodes[0].read() as tx:
        rows = await tx.fetch("SELECT nonce, payment_id FROM chain_nonce ORDER BY nonce")
    assert [row["nonce"] for row in rows] == list(range(7, 87))
    assert len({row["payment_id"] for row in rows}) == 80


async def test_a_number_is_never_below_what_the_nodes_count_nor_given_twice(db: Database) -> None:
    async with db.write() as tx:

        async def allot(floor: int, who: str = SENDER, net: str = "n1") -> int:
            return await nonces.allot(tx, net, who, floor, [call("p")], T0)

        assert [await allot(0), await allot(0), await allot(0)] == [0, 1, 2]
        assert [await allot(9), await allot(3)] == [9, 10]
        assert await allot(0, who="0x" + "5f" * 20) == 0
        assert await allot(0, net="n2") == 0


async def test_what_a_node_of_the_release_before_allotted_is_passed_over(db: Database) -> None:
    """It knows nothing of the counter: two releases run side by side during an upgrade."""
    async with db.write() as tx:
        assert await nonces.allot(tx, "n1", SENDER, 4, [call("p1")], T0) == 4
        await tx.execute(
            "INSERT INTO chain_nonce (network, sender, nonce, payment_id) VALUES"
            " ('n1', $1, 5, 'p2')",
            SENDER,
        )
        assert await nonces.allot(tx, "n1", SENDER, 4, [call("p3")], T0) == 6


async def test_a_number_that_was_rolled_back_is_given_again(db: Database) -> None:
    with pytest.raises(KeyError):
        async with db.write() as tx:
            assert await nonces.allot(tx, "n1", SENDER, 0, [call("p1")], T0) == 0
            raise KeyError
    async with db.write() as tx:
        assert await nonces.allot(tx, "n1", SENDER, 0, [call("p2")], T0) == 0


async def test_what_was_signed_is_kept_to_the_byte(db: Database) -> None:
    await inserted(db, "pay_1", "pay_2", "pay_3")

    async def work(tx: Any) -> None:
        for nonce, members in ((3, ["pay_1", "pay_2"]), (4, ["pay_1"]), (5, ["pay_3"])):
            got = await nonces.allot(
                tx, NETWORK.caip2, SENDER, nonce, [call(m, m.encode()) for m in members], T0
            )
            assert got == nonce
            await nonces.store(tx, made(nonce), T0 + nonce)
        await nonces.store(tx, made(3, version=1), T0 + 9)
        await nonces.store(tx, made(4, version=1), T0 + 8)
        await nonces.store(tx, made(4, version=1), T0 + 20)  # again: nothing new

    await transact(db, work)
    async with db.read() as tx:
        # The newest nonce first by what was signed last for it, its replacements together.
        assert await nonces.sent_for(tx, "pay_1") == [
            made(3, version=1),
            made(3),
            made(4, version=1),
            made(4),
        ]
        assert await nonces.sent_for(tx, "pay_2") == [made(3, version=1), made(3)]
        assert await nonces.sent_for(tx, "pay_4") == []
        assert await nonces.members(tx, made(3)) == ["pay_1", "pay_2"]
        assert await nonces.versions(tx, NETWORK.caip2, SENDER, 4) == [made(4, version=1), made(4)]
        assert await nonces.call_for(tx, "pay_2", made(3)) == call("pay_2", b"pay_2")
    assert await shown(db, "pay_1") == made(4, version=1).tx_hash
    assert await shown(db, "pay_2") == made(3, version=1).tx_hash


async def test_open_numbers_are_those_no_block_has_used(db: Database) -> None:
    await inserted(db, "pay_1", "pay_2", "pay_3", "pay_4")
    other = "0x" + "5f" * 20
    async with db.write() as tx:
        for nonce, members in ((0, ["pay_1"]), (1, ["pay_2", "pay_3"]), (2, ["pay_4"])):
            calls = [call(each) for each in members]
            await nonces.allot(tx, NETWORK.caip2, SENDER, nonce, calls, T0 + nonce)
            await nonces.store(tx, made(nonce), T0 + nonce)
        await nonces.store(tx, made(1, version=1), T0 + 7)
        await nonces.allot(tx, NETWORK.caip2, other, 0, [call("pay_4")], T0)
        await nonces.store(tx, made(0, who=other), T0)
        await nonces.close(tx, made(0), 77, T0 + 9)
        for ended in ("pay_2", "pay_4"):
            await journal.fail(tx, ended, "settlement_failed", "", T0)
    async with db.read() as tx:
        found = await nonces.open_of(tx, NETWORK.caip2, SENDER, 10)
        cost = await tx.fetchval(
            "SELECT cost_gwei FROM chain_nonce WHERE nonce = 0 AND done_ms > 0"
        )
        first = await nonces.open_of(tx, NETWORK.caip2, SENDER, 1)
    assert [(each.nonce, each.newest, each.newest_ms, each.wanted) for each in found] == [
        (1, made(1, version=1), T0 + 7, True),  # pay_3 is still under way
        (2, made(2), T0 + 2, False),
    ]
    assert [each.at_ms for each in found] == [T0 + 1, T0 + 2]
    assert (cost, first) == (77, list(found[:1]))


async def test_rows_of_the_release_before_are_read(db: Database) -> None:
    """It writes no members: the transaction itself is the payment's call."""
    await inserted(db, "pay_1")
    signed = sender.sign(KEY, NETWORK.chain_id, 3, USDC.address, b"\x0a\x0b", Fees(9, 8, 7, 3))
    async with db.write() as tx:
        await tx.execute(
            "INSERT INTO chain_nonce (network, sender, nonce, payment_id) VALUES ($1, $2, 3, $3)",
            signed.network,
            signed.sender,
            "pay_1",
        )
        await nonces.store(tx, signed, T0)
    async with db.read() as tx:
        assert await nonces.sent_for(tx, "pay_1") == [signed]
        assert await nonces.call_for(tx, "pay_1", signed) == call("pay_1", b"\x0a\x0b")
        (found,) = await nonces.open_of(tx, signed.network, signed.sender, 10)
    assert (found.newest, found.wanted) == (signed, True)
    assert replace(signed, nonce=4) != signed
