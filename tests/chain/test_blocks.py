"""A line of blocks by parent hash, across reorganisations of a real chain."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from anvil.devnet import Devnet, Options, running
from chain import blocks
from chain.blocks import Trail
from chain.errors import Unavailable
from chain.rpc import Rpc
from tests.fixtures_chain import NETWORK, FaultyNode


@pytest.fixture(scope="module")
def shallow() -> Iterator[Devnet]:
    """A chain of its own whose blocks are safe after 4 and final after 8."""
    with running(options=Options(slots_in_an_epoch=4)) as net:
        yield net


def hash_at(net: Devnet, number: int) -> str:
    return str(net.rpc("eth_getBlockByNumber", hex(number), False)["hash"])


async def test_a_trail_is_extended_and_cut(shallow: Devnet) -> None:
    rpc = Rpc(NETWORK, [shallow.rpc_url])
    trail = Trail()
    try:
        shallow.mine(40)
        head = await trail.follow(rpc, 3)
        assert sorted(trail.blocks) == list(range(3, head.number + 1))
        shallow.mine(5)
        longer = await trail.follow(rpc, head.number - 10)
        assert min(trail.blocks) == head.number - 10
        for number in range(head.number - 10, longer.number + 1):
            assert trail.hash_at(number) == hash_at(shallow, number)
        assert trail.hash_at(head.number - 11) is None
    finally:
        await rpc.close()


@pytest.mark.parametrize("depth", [1, 3, 8])
async def test_a_reorganisation_shows_at_the_places_it_changed(shallow: Devnet, depth: int) -> None:
    rpc = Rpc(NETWORK, [shallow.rpc_url])
    trail = Trail()
    try:
        shallow.mine(12)
        head = await trail.follow(rpc, 0)
        before = {number: block.hash for number, block in trail.blocks.items()}
        shallow.rpc("anvil_reorg", depth, [])
        await trail.follow(rpc, 0)
        changed = [n for n in before if trail.hash_at(n) != before[n]]
        assert changed and min(changed) == head.number - depth + 1
        assert all(trail.hash_at(n) == hash_at(shallow, n) for n in trail.blocks)
    finally:
        await rpc.close()


@pytest.mark.parametrize("member", ["number", "timestamp"])
async def test_a_block_past_all_bounds_is_no_answer(
    chain_net: Devnet, faulty_node: FaultyNode, member: str
) -> None:
    """No column holds such a number: it must not get so far."""
    faulty_node.fault("eth_getBlockByNumber", "change", lambda block: {**block, member: hex(2**63)})
    rpc = Rpc(NETWORK, [faulty_node.url])
    try:
        with pytest.raises(Unavailable) as error:
            await blocks.header(rpc, "latest")
        assert error.value.code == "rpc_bad_answer"
    finally:
        await rpc.close()


async def test_blocks_that_do_not_join_are_no_trail(
    chain_net: Devnet, faulty_node: FaultyNode
) -> None:
    chain_net.mine(6)
    rpc = Rpc(NETWORK, [faulty_node.url])

    def forged(asked: Any, block: Any) -> Any:
        return block if asked["params"][0] == "latest" else {**block, "hash": "0x" + "5" * 64}

    try:
        faulty_node.fault("eth_getBlockByNumber", "change_by", forged)
        trail = Trail()
        with pytest.raises(Unavailable) as error:
            await trail.follow(rpc, 0)
        assert error.value.code == "rpc_disagrees"
        assert trail.blocks == {}
    finally:
        await rpc.close()


async def test_points_of_trust(shallow: Devnet) -> None:
    shallow.mine(20)
    rpc = Rpc(NETWORK, [shallow.rpc_url])
    try:
        head = await rpc.block_number()
        assert await blocks.points(rpc, "safe") == blocks.Points(head, head - 4, head - 8)
        assert await blocks.points(rpc, "finalized") == blocks.Points(head, head - 8, head - 8)
        assert await blocks.points(rpc, 3) == blocks.Points(head, head - 3, head - 3)
    finally:
        await rpc.close()


async def test_a_chain_without_safe_blocks_has_none(
    chain_net: Devnet, faulty_node: FaultyNode
) -> None:
    rpc = Rpc(NETWORK, [faulty_node.url])

    def no_tags(asked: Any, block: Any) -> Any:
        return None if asked["params"][0] in ("safe", "finalized") else block

    try:
        faulty_node.fault("eth_getBlockByNumber", "change_by", no_tags)
        found = await blocks.points(rpc, "safe")
        assert (found.safe, found.final) == (-1, -1)
    finally:
        await rpc.close()
