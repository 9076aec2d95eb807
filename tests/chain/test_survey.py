"""Providers that lag, disagree, refuse or are down: who is asked, how often, and what is said."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from anvil.devnet import Devnet
from chain.endpoints import BREAK_AFTER, Endpoint, retry_after_ms
from chain.errors import Unavailable
from chain.rpc import ROUNDS, Rpc
from chain.survey import survey
from tests import servers
from tests.fixtures_chain import NETWORK, FaultyNode


@pytest.fixture
async def other_node(chain_net: Devnet) -> AsyncIterator[FaultyNode]:
    node = FaultyNode(chain_net)
    await node.start()
    yield node
    await node.stop()


@pytest.fixture
async def clients() -> AsyncIterator[Callable[..., Rpc]]:
    made: list[Rpc] = []

    def make(*urls: str, timeout_s: int = 2) -> Rpc:
        made.append(Rpc(NETWORK, urls, timeout_s=timeout_s))
        return made[-1]

    yield make
    for each in made:
        await each.close()


def block_time_s(net: Devnet) -> int:
    return int(net.rpc("eth_getBlockByNumber", "latest", False)["timestamp"], 16)


def changed(**members: Any) -> Callable[[Any], Any]:
    return lambda block: {**block, **members}


# --- refusals and failures ------------------------------------------------------------------


async def test_a_provider_that_refuses_is_left_alone_as_long_as_it_asks(
    chain_net: Devnet, faulty_node: FaultyNode, clients: Callable[..., Rpc]
) -> None:
    faulty_node.fault("eth_blockNumber", "status", (429, {"Retry-After": "50"}))
    rpc = clients(faulty_node.url, chain_net.rpc_url)
    for _ in range(5):
        await rpc.block_number()
    assert faulty_node.asked.count("eth_blockNumber") == 1
    alone = clients(faulty_node.url)
    for _ in range(5):
        with pytest.raises(Unavailable) as error:
            await alone.block_number()
        assert error.value.code == "rpc_rate_limited"
    assert faulty_node.asked.count("eth_blockNumber") == 2


async def test_a_short_refusal_is_waited_for(
    faulty_node: FaultyNode, clients: Callable[..., Rpc]
) -> None:
    faulty_node.fault("eth_blockNumber", "status", (429, {"Retry-After": "1"}), times=1)
    assert await clients(faulty_node.url, timeout_s=5).block_number() > 0
    assert faulty_node.asked.count("eth_blockNumber") == 2


@pytest.mark.parametrize("kind", ["drop", "lose"])
async def test_what_passes_is_asked_again_inside_the_deadline(
    faulty_node: FaultyNode, clients: Callable[..., Rpc], kind: str
) -> None:
    rpc = clients(faulty_node.url)
    faulty_node.fault("eth_blockNumber", kind, times=ROUNDS - 1)
    assert await rpc.block_number() > 0
    faulty_node.fault("eth_blockNumber", kind, times=ROUNDS)
    with pytest.raises(Unavailable):
        await rpc.block_number()


async def test_no_call_outlives_its_deadline(
    faulty_node: FaultyNode, other_node: FaultyNode, clients: Callable[..., Rpc]
) -> None:
    for node in (faulty_node, other_node):
        node.fault("eth_blockNumber", "hang")
    rpc = clients(faulty_node.url, other_node.url, timeout_s=1)
    async with asyncio.timeout(30):  # else it would hang
        with pytest.raises(Unavailable):
            await rpc.block_number()


async def test_a_provider_that_is_down_is_tried_by_one_question_at_a_time(
    faulty_node: FaultyNode, clients: Callable[..., Rpc]
) -> None:
    rpc = clients(faulty_node.url, timeout_s=1)
    faulty_node.fault("eth_blockNumber", "hang")
    await asyncio.gather(*(rpc.block_number() for _ in range(BREAK_AFTER)), return_exceptions=True)
    before = len(faulty_node.asked)
    said = await asyncio.gather(*(rpc.block_number() for _ in range(20)), return_exceptions=True)
    codes = [e.code for e in said if isinstance(e, Unavailable)]
    assert len(codes) == 20
    assert codes.count("rpc_resting") == 19
    assert len(faulty_node.asked) <= before + 2  # its chain id, then the question
    faulty_node.faults.clear()
    assert await rpc.block_number() > 0  # the next one finds it well, and it is well for all
    assert await asyncio.gather(*(rpc.block_number() for _ in range(20)))


def test_rests_grow_and_end() -> None:
    endpoint = Endpoint.of("http://user:secret@node.test:1/key")
    rests = []
    for _ in range(9):
        before = time.monotonic_ns() // 1_000_000
        endpoint.failed()
        rests.append(endpoint.rest_until_ms - before)
    assert 5_000 <= rests[0] <= 6_300
    assert 10_000 <= rests[1] <= 12_600
    assert all(30_000 <= rest <= 37_600 for rest in rests[3:])
    endpoint.answered()
    assert not endpoint.resting(time.monotonic_ns() // 1_000_000)
    assert "secret" not in repr(endpoint) and "key" not in repr(endpoint)


@pytest.mark.parametrize(
    ("text", "told_ms"),
    [
        *[("3", 3_000), (" 0 ", 0), (None, None), ("", None), ("-1", None), ("soon", None)],
        *[("Wed, 21 Oct 2026 07:28:00 GMT", None), ("9999999", None), ("١", None)],
    ],
)
def test_retry_after(text: str | None, told_ms: int | None) -> None:
    assert retry_after_ms(text) == told_ms


# --- what they tell -------------------------------------------------------------------------


async def test_agreement_is_no_news(
    chain_net: Devnet, faulty_node: FaultyNode, clients: Callable[..., Rpc]
) -> None:
    views = await survey(clients(chain_net.rpc_url, faulty_node.url), block_time_s(chain_net))
    assert [view.fault for view in views] == [None, None]


async def test_one_that_lags_is_named_and_asked_last(
    chain_net: Devnet, faulty_node: FaultyNode, clients: Callable[..., Rpc]
) -> None:
    chain_net.mine(40)

    def behind(asked: Any, block: Any) -> Any:
        if asked["params"][0] != "latest":
            return block
        return chain_net.rpc("eth_getBlockByNumber", hex(int(block["number"], 16) - 30), False)

    faulty_node.fault("eth_getBlockByNumber", "change_by", behind)
    rpc = clients(faulty_node.url, chain_net.rpc_url)
    views = await survey(rpc, block_time_s(chain_net))
    assert [view.fault for view in views] == ["rpc_lagging", None]
    before = faulty_node.asked.count("eth_blockNumber")
    await rpc.block_number()
    assert faulty_node.asked.count("eth_blockNumber") == before
    faulty_node.faults.clear()
    assert [v.fault for v in await survey(rpc, block_time_s(chain_net))] == [None, None]
    await rpc.block_number()
    assert faulty_node.asked.count("eth_blockNumber") == before + 1


async def test_the_one_against_two_is_named(
    chain_net: Devnet, faulty_node: FaultyNode, other_node: FaultyNode, clients: Callable[..., Rpc]
) -> None:
    faulty_node.fault("eth_getBlockByNumber", "change", changed(hash="0x" + "66" * 32))
    rpc = clients(faulty_node.url, other_node.url, chain_net.rpc_url)
    views = await survey(rpc, block_time_s(chain_net))
    assert [view.fault for view in views] == ["rpc_disagrees", None, None]
    two = clients(faulty_node.url, other_node.url)
    views = await survey(two, block_time_s(chain_net))
    assert [view.fault for view in views] == ["rpc_disagrees", "rpc_disagrees"]


async def test_what_cannot_be_asked_is_named_by_its_code(
    chain_net: Devnet, faulty_node: FaultyNode, other_node: FaultyNode, clients: Callable[..., Rpc]
) -> None:
    faulty_node.fault("eth_chainId", "change", lambda _: "0x1")
    other_node.fault("eth_getBlockByNumber", "change", changed(hash=None))
    dead = f"http://127.0.0.1:{servers.free_port()}"
    rpc = clients(faulty_node.url, other_node.url, dead, chain_net.rpc_url)
    views = await survey(rpc, block_time_s(chain_net))
    assert [view.fault for view in views] == [
        "rpc_wrong_chain",
        "rpc_bad_answer",
        "rpc_unreachable",
        None,
    ]


async def test_a_chain_that_stands_still_is_stale_by_the_clock(
    chain_net: Devnet, clients: Callable[..., Rpc]
) -> None:
    rpc = clients(chain_net.rpc_url)
    at_s = block_time_s(chain_net)
    assert [v.fault for v in await survey(rpc, at_s + 100)] == [None]
    assert [v.fault for v in await survey(rpc, at_s + 200)] == ["rpc_stale"]
