"""Chain nonces that are nobody's: found, used up, and not run into where a node counts wrong."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from anvil.devnet import Devnet, running
from chain.errors import Unavailable
from gateway.payments import engine, gaps, gas, nonces
from gateway.payments.lane import Job
from gateway.payments.recover import recover
from tests.fixtures_chain import NETWORK, FaultyNode
from tests.gateway.ledger import helpers
from tests.gateway.payments.parts import Desk, opened_desk

COUNT = "eth_getTransactionCount"


@pytest.fixture
def net() -> Iterator[Devnet]:
    """A chain of the test's own, whose pool it can play with."""
    with running() as found:
        yield found


@pytest.fixture
async def node(net: Devnet) -> AsyncIterator[FaultyNode]:
    """A node in front of it that can be told to misbehave."""
    found = FaultyNode(net)
    await found.start()
    yield found
    await found.stop()


@pytest.fixture
async def desk(net: Devnet, sqlite_url: str, node: FaultyNode) -> AsyncIterator[Desk]:
    async with opened_desk(net, sqlite_url, node.url, wait_s=1) as found:
        yield found
        assert await helpers.faults(found.rails.db) == []


def more(by: int) -> Callable[[str], str]:
    return lambda told: hex(int(told, 16) + by)


async def age(desk: Desk, seconds: int) -> None:
    """Everything that was signed was signed so much earlier."""
    async with desk.rails.db.write() as tx:
        for table in ("chain_tx", "chain_nonce"):
            await tx.execute(f"UPDATE {table} SET at_ms = at_ms - $1", seconds * 1_000)


async def numbers(desk: Desk) -> list[int]:
    async with desk.rails.db.read() as tx:
        return [n for n, _ in await nonces.taken_from(tx, NETWORK.caip2, settler(desk), 0, 99)]


def settler(desk: Desk) -> str:
    return desk.net.settler.address


async def stranded(desk: Desk, node: FaultyNode, by: int) -> Job:
    """A payment whose number is ``by`` further than what was used, because a node counted so."""
    node.fault(COUNT, "change", more(by), times=1)
    job = desk.job(desk.net.accounts[0])
    handed = await engine.settle(desk.rails, job)
    assert handed is not None and handed.receipt is None
    (sent,) = await desk.sent_for(job)
    assert sent.nonce == by
    return job


async def state(desk: Desk, job: Job) -> str:
    row = await desk.row(job)
    assert row is not None
    return await recover(desk.rails, row)


async def test_numbers_that_a_node_once_counted_too_many_are_used_up(
    desk: Desk, node: FaultyNode
) -> None:
    """One wrong answer, and without this every later payment of the account waits for ever."""
    job = await stranded(desk, node, 3)
    await gaps.fill_all(desk.rails)
    assert await numbers(desk) == [3]  # it may just be waiting its turn
    await age(desk, 11)
    await gaps.fill_all(desk.rails)
    assert await numbers(desk) == [0, 1, 2, 3]
    (sent,) = await desk.sent_for(job)
    desk.net.receipt(sent.tx_hash)
    assert await state(desk, job) == "succeeded"
    again = await engine.settle(desk.rails, desk.job(desk.net.accounts[1]))
    assert again is not None and again.receipt is not None and again.receipt.succeeded
    assert await numbers(desk) == [0, 1, 2, 3, 4]
    # What filled them is looked after like what settles: it ends, with its cost.
    assert await gas.tend(desk.rails, desk.rpc, desk.rails.settings.chains[0], settler(desk))
    async with desk.rails.db.read() as tx:
        rows = await tx.fetch("SELECT nonce, done_ms, cost_gwei FROM chain_nonce ORDER BY nonce")
    assert all(row["done_ms"] is not None and row["cost_gwei"] > 0 for row in rows)


async def test_the_place_of_a_transaction_from_elsewhere_is_left_to_it(
    desk: Desk, net: Devnet
) -> None:
    """The operator sends something by hand with the same key, and a pool forgets it."""
    net.rpc("evm_setAutomine", False)
    net.rpc("anvil_impersonateAccount", settler(desk))
    elsewhere = net.send(settler(desk), settler(desk), "0x")
    job = desk.job(net.accounts[0])
    handed = await engine.settle(desk.rails, job)
    assert handed is not None and handed.receipt is None
    await age(desk, 11)
    await gaps.fill_all(desk.rails)
    assert await numbers(desk) == [1]
    net.rpc("anvil_dropTransaction", elsewhere)
    await gaps.fill_all(desk.rails)
    assert await numbers(desk) == [0, 1]
    chain = desk.rails.settings.chains[0]  # the pool forgot what stood behind it, too
    assert await gas.tend(desk.rails, desk.rpc, chain, settler(desk), patience_ms=0)
    net.mine(2)
    assert await state(desk, job) == "succeeded"


async def test_a_place_that_is_said_to_be_taken_for_too_long_is_outbid(
    desk: Desk, node: FaultyNode
) -> None:
    """The node that counts wrong keeps to it."""
    job = await stranded(desk, node, 1)
    node.fault(
        COUNT,
        "change_by",
        lambda asked, told: told if asked["params"][1] != "pending" else more(1)(told),
    )
    await age(desk, 11)
    await gaps.fill_all(desk.rails)
    assert await numbers(desk) == [1]
    await age(desk, 10)
    await gaps.fill_all(desk.rails)
    assert await numbers(desk) == [0, 1]
    (sent,) = await desk.sent_for(job)
    desk.net.receipt(sent.tx_hash)
    assert await state(desk, job) == "succeeded"


@pytest.mark.parametrize("by", [100, 2**62, 2**248])
async def test_a_count_far_beyond_what_is_in_blocks_is_not_believed(
    desk: Desk, node: FaultyNode, by: int
) -> None:
    node.fault(COUNT, "change", more(by), times=1)
    with pytest.raises(Unavailable) as caught:
        await engine.settle(desk.rails, desk.job(desk.net.accounts[0]))
    assert caught.value.code == "rpc_bad_answer"
    assert await numbers(desk) == []
    handed = await engine.settle(desk.rails, desk.job(desk.net.accounts[0]))
    assert handed is not None and handed.receipt is not None
    assert await numbers(desk) == [0]


async def test_a_key_that_has_sent_much_before_may_be_used(desk: Desk, net: Devnet) -> None:
    net.rpc("anvil_setNonce", settler(desk), hex(5_000))
    handed = await engine.settle(desk.rails, desk.job(net.accounts[0]))
    assert handed is not None and handed.receipt is not None
    assert await numbers(desk) == [5_000]


async def test_a_gap_too_wide_is_left_to_a_person(desk: Desk, node: FaultyNode) -> None:
    """Told by a node that says of its blocks what it says of its pool."""
    node.fault(COUNT, "change", more(5_000), times=2)
    handed = await engine.settle(desk.rails, desk.job(desk.net.accounts[0]))
    assert handed is not None and handed.receipt is None
    await age(desk, 30)
    await gaps.fill_all(desk.rails)
    assert await numbers(desk) == [5_000]


async def test_two_nodes_fill_a_gap_once(desk: Desk, node: FaultyNode) -> None:
    """Whoever is second finds the number taken, and signs nothing for it."""
    job = await stranded(desk, node, 2)
    await age(desk, 11)
    chain, account = desk.rails.settings.chains[0], gas.accounts(desk.rails.settings.chains[0])[0]
    await gaps._use_up(desk.rails, desk.rpc, chain, account, [0, 1])
    before = len(node.asked)
    await gaps._use_up(desk.rails, desk.rpc, chain, account, [0, 1])
    assert "eth_sendRawTransaction" not in node.asked[before:]
    async with desk.rails.db.read() as tx:
        assert await tx.fetchval("SELECT count(*) FROM chain_tx") == 3
    assert await state(desk, job) == "succeeded"
