"""Signing, handing over, waiting: what a node says, and what it means for money."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from eth_account import Account as Signer
from hypothesis import given, settings
from hypothesis import strategies as st

from anvil.devnet import Devnet, Options, running
from chain import sender, transfers
from chain.errors import Rejected, Reverted, Unavailable, Unknown
from chain.rpc import Rpc
from chain.schemes import eip3009
from chain.sender import Fees, Prepared
from chain.waiting import all_of
from tests.fixtures_chain import NETWORK, USDC, FaultyNode, payment

PAY_TO = "0x00000000000000000000000000000000000feeed"
Change = Callable[[Any], Any]


async def _prepare(net: Devnet, rpc: Rpc, *, nonce: int | None = None, units: int = 5) -> Prepared:
    """A signed settlement of a fresh payment."""
    auth = eip3009.parse(payment(net.accounts[0], PAY_TO, units))
    data = eip3009.transfer_calldata(auth)
    needed = await sender.fees(rpc, net.settler.address, USDC.address, data)
    return sender.sign(
        net.settler.private_key,
        net.chain_id,
        needed.nonce if nonce is None else nonce,
        USDC.address,
        data,
        needed,
    )


def _own(net: Devnet, *, nonce: int = 0, gas: int = 21_000, fee_wei: int = 10**10) -> Prepared:
    """A transaction of the settler to itself, with these fields."""
    me = net.settler
    return sender.sign(
        me.private_key, net.chain_id, nonce, me.address, b"", Fees(gas, fee_wei, 1, 0)
    )


# --- signing --------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.integers(1, 2**200),
    st.tuples(st.integers(1, 2**32), st.integers(0, 2**32), st.integers(0, 2**64)),
    st.tuples(st.integers(0, 2**63), st.integers(0, 2**63)),
    st.binary(max_size=400),
)
def test_the_bytes_are_those_of_eth_account(
    key: int, numbers: tuple[int, int, int], prices: tuple[int, int], data: bytes
) -> None:
    chain_id, nonce, gas = numbers
    tip, fee = sorted(prices)
    to = "0x" + "5a" * 20
    theirs = Signer.sign_transaction(
        {
            "type": 2,
            "chainId": chain_id,
            "nonce": nonce,
            "maxPriorityFeePerGas": tip,
            "maxFeePerGas": fee,
            "gas": gas,
            "to": bytes.fromhex(to[2:]),
            "value": 0,
            "data": data,
        },
        key.to_bytes(32, "big"),
    )
    ours = sender.sign(f"0x{key:064x}", chain_id, nonce, to, data, Fees(gas, fee, tip, 0))
    assert ours.raw == bytes(theirs.raw_transaction)
    assert ours.tx_hash == "0x" + theirs.hash.hex().removeprefix("0x")
    assert ours.sender == Signer.from_key(key.to_bytes(32, "big")).address.lower()
    assert ours.network == f"eip155:{chain_id}" and ours.nonce == nonce


def test_the_signed_bytes_are_not_shown() -> None:
    prepared = sender.sign("0x" + "11" * 32, 1, 0, "0x" + "22" * 20, b"", Fees(1, 1, 1, 0))
    assert "raw" not in repr(prepared) and prepared.raw.hex() not in repr(prepared)


# --- fees -----------------------------------------------------------------------------------


async def test_fees_follow_the_chain_and_the_caps(chain_net: Devnet, rpc: Rpc) -> None:
    me = chain_net.settler.address
    data = eip3009.transfer_calldata(eip3009.parse(payment(chain_net.accounts[0], PAY_TO, 5)))
    base_wei = int(chain_net.rpc("eth_getBlockByNumber", "latest", False)["baseFeePerGas"], 16)
    free = await sender.fees(rpc, me, USDC.address, data)
    assert free.max_fee_wei == 2 * base_wei + free.tip_wei
    call = {"from": me, "to": USDC.address, "data": "0x" + data.hex()}
    estimate = int(chain_net.rpc("eth_estimateGas", call), 16)
    assert free.gas_limit == estimate + estimate // 4 and free.nonce == 0
    assert free.most_wei == free.gas_limit * free.max_fee_wei

    enough = base_wei + free.tip_wei
    capped = await sender.fees(rpc, me, USDC.address, data, max_fee_wei=enough)
    assert capped.max_fee_wei == enough
    with pytest.raises(Unavailable) as dear:
        await sender.fees(rpc, me, USDC.address, data, max_fee_wei=enough - 1)
    assert dear.value.code == "gas_price_too_high"
    with pytest.raises(Rejected) as hungry:
        await sender.fees(rpc, me, USDC.address, data, max_gas=free.gas_limit - 1)
    assert hungry.value.code == "invalid_transaction_state"


async def test_the_estimate_is_the_last_simulation(chain_net: Devnet, rpc: Rpc) -> None:
    poor = eip3009.parse(payment(chain_net.settler, PAY_TO, 5))
    with pytest.raises(Reverted) as error:
        await sender.fees(
            rpc, chain_net.settler.address, USDC.address, eip3009.transfer_calldata(poor)
        )
    assert error.value.code == "insufficient_funds"


async def test_the_nonce_is_the_larger_of_two_nodes(
    chain_net: Devnet, faulty_node: FaultyNode, rpc: Rpc
) -> None:
    me = chain_net.settler.address
    await sender.broadcast(rpc, _own(chain_net).raw)
    faulty_node.fault("eth_getTransactionCount", "change", lambda _: "0x0")  # it lags behind
    client = Rpc(NETWORK, [faulty_node.url, chain_net.rpc_url])
    try:
        assert (await sender.fees(client, me, me, b"")).nonce == 1
        faulty_node.fault("eth_getBlockByNumber", "change", lambda block: {"number": "0x1"})
        with pytest.raises(Unavailable) as error:
            await sender.fees(client, me, me, b"")
        assert "base fee" in error.value.detail
    finally:
        await client.close()


# --- handing over ---------------------------------------------------------------------------


async def test_what_waits_in_the_pool_can_be_handed_over_again(chain_net: Devnet) -> None:
    with running(options=Options(holders=1, mining=False)) as net:
        client = Rpc(NETWORK, [net.rpc_url])
        try:
            prepared = await _prepare(net, client)
            await sender.broadcast(client, prepared.raw)
            await sender.broadcast(client, prepared.raw)
            assert await sender.wait(client, prepared.tx_hash, 0) is None
            assert (await sender.fees(client, net.settler.address, PAY_TO, b"")).nonce == 1

            twin = await _prepare(net, client, nonce=0)
            with pytest.raises(Unavailable) as cheap:
                await sender.broadcast(client, twin.raw)
            assert cheap.value.code == "underpriced"
            net.mine()
            receipt = await sender.wait(client, prepared.tx_hash, 10)
            assert receipt is not None and receipt.succeeded
        finally:
            await client.close()


async def test_a_dropped_transaction_is_sent_again_as_it_was(chain_net: Devnet) -> None:
    with running(options=Options(holders=1, mining=False)) as net:
        client = Rpc(NETWORK, [net.rpc_url])
        try:
            prepared = await _prepare(net, client)
            await sender.broadcast(client, prepared.raw)
            assert net.rpc("anvil_dropTransaction", prepared.tx_hash) == prepared.tx_hash
            net.mine()
            assert await sender.wait(client, prepared.tx_hash, 0) is None
            assert await transfers.transfers_of(client, prepared.tx_hash, USDC, PAY_TO) is None
            await sender.broadcast(client, prepared.raw)
            net.mine()
            found = await transfers.transfers_of(client, prepared.tx_hash, USDC, PAY_TO)
            assert found is not None and len(found) == 1
            assert net.balance_units(PAY_TO) == 5
        finally:
            await client.close()


async def test_a_used_nonce_is_fine_by_this_transaction_and_final_by_another(
    chain_net: Devnet, faulty_node: FaultyNode, rpc: Rpc
) -> None:
    first = await _prepare(chain_net, rpc)
    second = await _prepare(chain_net, rpc)
    assert first.nonce == second.nonce and first.tx_hash != second.tx_hash
    await sender.broadcast(rpc, first.raw)
    assert await sender.wait(rpc, first.tx_hash, 10) is not None
    await sender.broadcast(rpc, first.raw)
    with pytest.raises(Rejected) as error:
        await sender.broadcast(rpc, second.raw)
    assert error.value.code == "nonce_taken"

    faulty_node.fault("eth_getTransactionByHash", "drop")
    client = Rpc(NETWORK, [faulty_node.url])
    try:
        with pytest.raises(Unknown) as unsure:
            await sender.broadcast(client, second.raw)
        assert unsure.value.tx_hash == second.tx_hash
    finally:
        await client.close()

    faulty_node.fault("eth_getTransactionByHash", "change", lambda _: None)  # it lags behind
    client = Rpc(NETWORK, [faulty_node.url, chain_net.rpc_url])
    try:
        await sender.broadcast(client, first.raw)
    finally:
        await client.close()


async def test_what_no_block_can_hold_is_refused_and_what_must_wait_is_not(
    chain_net: Devnet, rpc: Rpc
) -> None:
    for never in (_own(chain_net, gas=20_999).raw, b"\x02\xc0", b"\x02" + bytes(40)):
        with pytest.raises(Rejected) as refused:
            await sender.broadcast(rpc, never)
        assert refused.value.code == "transaction_refused"
    other_chain = sender.sign(
        chain_net.settler.private_key, 1, 0, PAY_TO, b"", Fees(21_000, 10**10, 1, 0)
    )
    with pytest.raises(Rejected) as refused:
        await sender.broadcast(rpc, other_chain.raw)
    assert refused.value.code == "transaction_refused"

    with pytest.raises(Unavailable) as cheap:
        await sender.broadcast(rpc, _own(chain_net, fee_wei=1).raw)
    assert cheap.value.code == "underpriced"
    chain_net.rpc("anvil_setBalance", chain_net.settler.address, "0x1")
    with pytest.raises(Unavailable) as empty:
        await sender.broadcast(rpc, _own(chain_net).raw)
    assert empty.value.code == "gas_account_empty"


@pytest.mark.parametrize(
    ("told", "code"),
    [
        ({"code": -32000, "message": "already known"}, ""),
        ({"code": -32000, "message": "ALREADY_EXISTS: already exists"}, ""),
        ({"code": -32010, "message": "AlreadyKnown"}, "rpc_error"),
        ({"code": -32603, "message": "internal error"}, "rpc_error"),
        ({"code": 3, "message": "execution reverted"}, "rpc_error"),
    ],
)
async def test_words_of_other_nodes(
    chain_net: Devnet, faulty_node: FaultyNode, rpc: Rpc, told: dict[str, Any], code: str
) -> None:
    prepared = await _prepare(chain_net, rpc)
    faulty_node.fault("eth_sendRawTransaction", "error", told)
    client = Rpc(NETWORK, [faulty_node.url])
    try:
        if not code:
            await sender.broadcast(client, prepared.raw)
            return
        with pytest.raises(Unknown) as error:
            await sender.broadcast(client, prepared.raw)
        assert (error.value.code, error.value.tx_hash) == (code, prepared.tx_hash)
    finally:
        await client.close()


async def test_a_lost_answer_is_found_by_its_hash(
    chain_net: Devnet, faulty_node: FaultyNode, rpc: Rpc
) -> None:
    prepared = await _prepare(chain_net, rpc)
    faulty_node.fault("eth_sendRawTransaction", "lose")
    client = Rpc(NETWORK, [faulty_node.url])
    try:
        with pytest.raises(Unknown):
            await sender.broadcast(client, prepared.raw)
    finally:
        await client.close()
    receipt = await sender.wait(rpc, prepared.tx_hash, 10)
    assert receipt is not None and receipt.succeeded
    assert chain_net.balance_units(PAY_TO) == 5


# --- waiting --------------------------------------------------------------------------------


async def test_waiting_outlives_a_node_that_fails_for_a_while(
    chain_net: Devnet, faulty_node: FaultyNode, rpc: Rpc
) -> None:
    prepared = await _prepare(chain_net, rpc)
    await sender.broadcast(rpc, prepared.raw)
    faulty_node.fault("eth_getTransactionReceipt", "status", 503, times=3)
    client = Rpc(NETWORK, [faulty_node.url])
    try:
        receipt = await sender.wait(client, prepared.tx_hash, 30)
        assert receipt is not None and receipt.succeeded
        assert faulty_node.asked.count("eth_getTransactionReceipt") >= 4
    finally:
        await client.close()


async def test_waiting_ends(chain_net: Devnet, faulty_node: FaultyNode, rpc: Rpc) -> None:
    assert await sender.wait(rpc, "0x" + "ab" * 32, 1) is None
    faulty_node.fault("eth_getTransactionReceipt", "hang")
    client = Rpc(NETWORK, [faulty_node.url], timeout_s=60)
    try:
        assert await sender.wait(client, "0x" + "ab" * 32, 1) is None
    finally:
        await client.close()


async def test_a_failed_transaction_has_a_receipt_and_no_transfer(
    chain_net: Devnet, rpc: Rpc
) -> None:
    prepared = await _prepare(chain_net, rpc)
    chain_net.pause()  # between the simulation and the block
    await sender.broadcast(rpc, prepared.raw)
    receipt = await sender.wait(rpc, prepared.tx_hash, 10)
    assert receipt is not None and not receipt.succeeded
    assert await transfers.transfers_of(rpc, prepared.tx_hash, USDC, PAY_TO) == []


async def test_no_question_outlives_the_answer() -> None:
    """What goes on asking after a fault opens connections that nobody closes any more."""
    ended: list[str] = []

    async def slow(name: str) -> str:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(name)
        return name

    async def broken() -> str:
        await asyncio.sleep(0)
        raise Unavailable("rpc_unreachable", "nobody is there")

    async def quick(value: int) -> int:
        return value

    with pytest.raises(Unavailable):
        await all_of(slow("one"), broken(), slow("two"))
    assert ended == ["one", "two"]
    assert await all_of(quick(1), quick(2)) == (1, 2)
