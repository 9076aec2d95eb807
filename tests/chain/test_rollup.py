"""What data on L1 costs: asked of the predeploy, and believed within reason."""

from __future__ import annotations

from dataclasses import replace

import pytest

from anvil.devnet import Devnet
from chain import rollup
from chain.errors import Unavailable
from chain.eth import selector, uint_word
from chain.networks import NETWORKS
from chain.rpc import Rpc
from tests.fixtures_chain import NETWORK, FaultyNode
from tests.fixtures_rollup import GWEI, plant

UPPER_BOUND = selector("getL1FeeUpperBound(uint256)")


def test_which_networks_are_rollups_of_the_op_stack() -> None:
    found = {name for name, row in NETWORKS.items() if row.op_stack}
    assert found == {"base", "base-sepolia", "optimism"}


def test_the_function_is_the_one_that_is_deployed() -> None:
    assert UPPER_BOUND.hex() == "f1c7a58b"


@pytest.mark.parametrize("l1_gwei", [1, 30, 900])
async def test_no_transaction_costs_more_than_its_bytes(
    chain_net: Devnet, rpc: Rpc, l1_gwei: int
) -> None:
    """The estimate by signed bytes is at least what the oracle says of the unsigned size, and near
    it: from one settlement to a batch of a hundred."""
    plant(chain_net, l1_gwei * GWEI)
    byte_wei = await rollup.byte_wei(rpc)
    for unsigned in (330, 450, 1_000, 5_000, 45_000):
        answer = await rpc.eth_call(rollup.ORACLE, UPPER_BOUND + uint_word(unsigned))
        true_wei = int.from_bytes(answer, "big")
        estimate_wei = byte_wei * (unsigned + 67)
        assert true_wei <= estimate_wei <= true_wei * 115 // 100, unsigned


@pytest.mark.parametrize(
    ("mood", "said"),
    [(1, "only supports Fjord"), (2, "reverted"), (3, "cannot be"), (4, "31 bytes")],
)
async def test_an_oracle_that_lies_or_fails_is_not_believed(
    chain_net: Devnet, rpc: Rpc, mood: int, said: str
) -> None:
    plant(chain_net, 30 * GWEI, mood=mood)
    with pytest.raises(Unavailable, match=said) as error:
        await rollup.byte_wei(rpc)
    assert error.value.code == "l1_fee_unknown"


async def test_what_can_just_be_is_believed(chain_net: Devnet, rpc: Rpc) -> None:
    dearest = 1_000 * GWEI  # posted as calldata, not compressed
    plant(chain_net, dearest, base_scalar=1_000_000, blob_scalar=0)
    assert 0 < await rollup.byte_wei(rpc) <= rollup.MOST_BYTE_WEI
    plant(chain_net, 2 * dearest, base_scalar=1_000_000, blob_scalar=0)
    with pytest.raises(Unavailable, match="cannot be"):
        await rollup.byte_wei(rpc)


async def test_a_local_chain_has_no_oracle(rpc: Rpc) -> None:
    with pytest.raises(Unavailable) as error:
        await rollup.byte_wei(rpc)
    assert error.value.code == "l1_oracle_missing"


async def test_other_chains_are_not_asked(chain_net: Devnet, faulty_node: FaultyNode) -> None:
    client = Rpc(replace(NETWORK, op_stack=False), [faulty_node.url])
    assert await rollup.byte_wei(client) == 0
    await client.close()
    assert faulty_node.asked == []


async def test_the_question_costs_no_more_than_so_much_gas_and_time(
    chain_net: Devnet, faulty_node: FaultyNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Rpc(NETWORK, [faulty_node.url], timeout_s=60)
    plant(chain_net, 30 * GWEI)
    await rollup.byte_wei(client)
    (asked,) = (each["params"] for each in faulty_node.seen if each["method"] == "eth_call")
    assert int(asked[0]["gas"], 16) <= 500_000
    monkeypatch.setattr(rollup, "WAIT_S", 0)
    faulty_node.fault("eth_call", "hang")
    with pytest.raises(Unavailable, match="did not answer") as error:
        await rollup.byte_wei(client)
    assert error.value.code == "l1_fee_unknown"
    await client.close()
