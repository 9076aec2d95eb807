"""Deadlines, failover, the chain-id check and what becomes of each kind of bad answer."""

from __future__ import annotations

from typing import Any

import pytest

from anvil.devnet import Devnet
from chain.errors import NodeError, Reverted, Unavailable, Unknown
from chain.eth import selector
from chain.networks import NETWORKS
from chain.rpc import Rpc
from chain.sender import Prepared, fees, sign
from tests import servers
from tests.fixtures_chain import NETWORK, USDC, FaultyNode
from wallet_auth.keys import address_word


async def _self_transfer(net: Devnet, rpc: Rpc) -> Prepared:
    """A signed transaction of the settler that moves nothing."""
    me = net.settler
    needed = await fees(rpc, me.address, me.address, b"")
    return sign(me.private_key, net.chain_id, needed.nonce, me.address, b"", needed)


def _dead_url() -> str:
    return f"http://127.0.0.1:{servers.free_port()}"


async def test_another_chain_behind_the_url_is_never_believed(chain_net: Devnet) -> None:
    wrong = Rpc(NETWORKS["base"], [chain_net.rpc_url])
    try:
        for question in (wrong.block_number(), wrong.check_chain_id(), wrong.send_raw(b"\x02")):
            with pytest.raises(Unavailable) as error:
                await question
            assert error.value.code == "rpc_wrong_chain"
            assert "84532" in error.value.detail and "8453" in error.value.detail
    finally:
        await wrong.close()


async def test_a_new_connection_is_asked_for_its_chain_again(faulty_node: FaultyNode) -> None:
    client = Rpc(NETWORK, [faulty_node.url])
    try:
        await client.block_number()
        await client.block_number()
        assert faulty_node.asked.count("eth_chainId") == 1  # one connection, one check
        faulty_node.fault("eth_blockNumber", "close", times=1)
        await client.block_number()
        faulty_node.fault("eth_chainId", "change", lambda _: "0x1")
        with pytest.raises(Unavailable) as error:
            await client.block_number()
        assert error.value.code == "rpc_wrong_chain"
    finally:
        await client.close()


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("drop", None),
        ("lose", None),
        ("hang", None),
        ("status", 429),
        ("status", 500),
        ("status", 302),
        ("body", b"<html>"),
        ("body", b"[]"),
        ("body", b'{"jsonrpc":"2.0","id":1}'),
        ("body", b'{"jsonrpc":"2.0","id":1,"result":"0x1","result":"0x2"}'),
        ("body", b'{"jsonrpc":"2.0","id":1,"result":NaN}'),
        ("body", b'{"jsonrpc":"2.0","id":1,"result":1.5}'),
        ("body", b"[" * 100_000),
        ("error", {"code": -32005, "message": "limit exceeded"}),
        ("error", {"code": -32601, "message": "method not found"}),
        ("error", "not an object"),
    ],
)
async def test_a_read_moves_on_to_the_next_url(
    chain_net: Devnet, faulty_node: FaultyNode, kind: str, value: Any
) -> None:
    faulty_node.fault("eth_getBalance", kind, value)
    asked = [chain_net.settler.address, "latest"]
    two = Rpc(NETWORK, [faulty_node.url, chain_net.rpc_url], timeout_s=6)
    one = Rpc(NETWORK, [faulty_node.url], timeout_s=1)
    try:
        assert await two.call("eth_getBalance", asked) == hex(10_000 * 10**18)
        with pytest.raises(Unavailable):
            await one.call("eth_getBalance", asked)
    finally:
        await two.close()
        await one.close()


async def test_a_redirect_is_not_followed(chain_net: Devnet, faulty_node: FaultyNode) -> None:
    """It would carry a signed transaction, or a question, to whoever the answer names."""
    faulty_node.fault("eth_blockNumber", "redirect", chain_net.rpc_url)
    client = Rpc(NETWORK, [faulty_node.url])
    try:
        with pytest.raises(Unavailable) as error:
            await client.block_number()
        assert "HTTP 307" in error.value.detail
    finally:
        await client.close()


async def test_a_url_that_failed_is_asked_last_for_a_while(
    chain_net: Devnet, faulty_node: FaultyNode
) -> None:
    faulty_node.fault("eth_blockNumber", "drop", times=1)
    client = Rpc(NETWORK, [faulty_node.url, chain_net.rpc_url])
    try:
        await client.block_number()
        before = len(faulty_node.asked)
        await client.block_number()
        assert len(faulty_node.asked) == before
    finally:
        await client.close()


async def test_nothing_listens(chain_net: Devnet) -> None:
    one = Rpc(NETWORK, [_dead_url()])
    two = Rpc(NETWORK, [_dead_url(), chain_net.rpc_url])
    try:
        with pytest.raises(Unavailable) as error:
            await one.block_number()
        assert error.value.code == "rpc_unreachable"
        with pytest.raises(Unavailable):
            await one.send_raw(b"\x02")
        with pytest.raises(Unavailable):
            await two.check_chain_id()
        assert await two.block_number() > 0
        prepared = await _self_transfer(chain_net, two)
        await two.send_raw(prepared.raw)  # nothing was written to the first, so the second gets it
        assert chain_net.rpc("eth_getTransactionByHash", prepared.tx_hash) is not None
    finally:
        await one.close()
        await two.close()


@pytest.mark.parametrize(
    ("kind", "value"),
    [("lose", None), ("hang", None), ("status", 502), ("body", b"?"), ("change", lambda _: "0x00")],
)
async def test_a_send_whose_answer_is_lost_is_unknown_and_not_sent_again(
    chain_net: Devnet, faulty_node: FaultyNode, rpc: Rpc, kind: str, value: Any
) -> None:
    prepared = await _self_transfer(chain_net, rpc)
    other = FaultyNode(chain_net)
    await other.start()
    faulty_node.fault("eth_sendRawTransaction", kind, value)
    # What hangs is waited for, and the question for the chain's id must be over before.
    client = Rpc(NETWORK, [faulty_node.url, other.url], timeout_s=4 if kind == "hang" else 20)
    try:
        with pytest.raises(Unknown) as error:
            await client.send_raw(prepared.raw)
        assert error.value.tx_hash == prepared.tx_hash
        assert faulty_node.asked.count("eth_sendRawTransaction") == 1
        assert other.asked == []
    finally:
        await client.close()
        await other.stop()


@pytest.mark.parametrize(
    ("kind", "value"),
    [("status", 429), ("error", {"code": 429, "message": "too many requests"})],
)
async def test_a_send_that_was_turned_away_goes_to_the_next_url(
    chain_net: Devnet, faulty_node: FaultyNode, rpc: Rpc, kind: str, value: Any
) -> None:
    prepared = await _self_transfer(chain_net, rpc)
    faulty_node.fault("eth_sendRawTransaction", kind, value)
    client = Rpc(NETWORK, [faulty_node.url, chain_net.rpc_url])
    try:
        await client.send_raw(prepared.raw)
        assert chain_net.rpc("eth_getTransactionByHash", prepared.tx_hash) is not None
    finally:
        await client.close()


async def test_a_send_to_the_wrong_chain_goes_to_the_right_one(
    chain_net: Devnet, faulty_node: FaultyNode, rpc: Rpc
) -> None:
    prepared = await _self_transfer(chain_net, rpc)
    faulty_node.fault("eth_chainId", "change", lambda _: "0x1")
    client = Rpc(NETWORK, [faulty_node.url, chain_net.rpc_url])
    try:
        await client.send_raw(prepared.raw)
        assert "eth_sendRawTransaction" not in faulty_node.asked
    finally:
        await client.close()


async def test_a_revert_is_final_and_says_why(
    chain_net: Devnet, faulty_node: FaultyNode, rpc: Rpc
) -> None:
    spend = selector("transfer(address,uint256)") + address_word("0x" + "11" * 20) + b"\xff" * 32
    with pytest.raises(Reverted) as error:
        await rpc.eth_call(USDC.address, spend)
    assert error.value.reason == "ERC20: transfer from the zero address"
    assert error.value.code == "invalid_transaction_state"
    assert error.value.data[:4].hex() == "08c379a0"

    # Some nodes give the words only, some wrap the data, some answer with no reason at all.
    for told, reason in (
        ({"code": -32000, "message": "execution reverted: Pausable: paused"}, "Pausable: paused"),
        ({"code": 3, "message": "execution reverted", "data": {"data": "0x"}}, ""),
        ({"code": 3, "message": "execution reverted", "data": "0x08c379a0ffff"}, ""),
        ({"code": 3, "message": "execution reverted", "data": "junk"}, ""),
        ({"code": -32015, "message": "VM execution error: reverted"}, ""),
    ):
        faulty_node.fault("eth_call", "error", told)
        client = Rpc(NETWORK, [faulty_node.url, chain_net.rpc_url])
        try:
            with pytest.raises(Reverted) as error:
                await client.eth_call(USDC.address, spend)
            assert error.value.reason == reason
        finally:
            await client.close()


async def test_an_error_that_is_no_revert_keeps_the_nodes_words(rpc: Rpc) -> None:
    with pytest.raises(NodeError) as error:
        await rpc.call("eth_noSuchThing", [])
    assert error.value.rpc_code == -32601
    assert "not found" in error.value.message.lower()


@pytest.mark.parametrize("told", ["", "0x", "0x01", "0xZZ", "41", 65, None, True, {}])
async def test_a_quantity_of_another_form_is_refused(faulty_node: FaultyNode, told: Any) -> None:
    faulty_node.fault("eth_blockNumber", "change", lambda _: told)
    client = Rpc(NETWORK, [faulty_node.url])
    try:
        with pytest.raises(Unavailable) as error:
            await client.block_number()
        assert error.value.code == "rpc_bad_answer"
    finally:
        await client.close()


async def test_an_answer_without_end_is_cut_off(
    faulty_node: FaultyNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chain.rpc.MAX_ANSWER_BYTES", 1_000)
    faulty_node.fault("eth_blockNumber", "body", b" " * 1_001)
    client = Rpc(NETWORK, [faulty_node.url])
    try:
        with pytest.raises(Unavailable) as error:
            await client.block_number()
        assert "too long" in error.value.detail
    finally:
        await client.close()


async def test_two_nodes_can_be_asked_at_once(chain_net: Devnet, faulty_node: FaultyNode) -> None:
    faulty_node.fault("eth_getTransactionCount", "change", lambda _: "0x63")
    question: tuple[str, list[Any]] = (
        "eth_getTransactionCount",
        [chain_net.settler.address, "pending"],
    )
    client = Rpc(NETWORK, [faulty_node.url, chain_net.rpc_url, _dead_url()])
    second = Rpc(NETWORK, [_dead_url(), faulty_node.url])
    none = Rpc(NETWORK, [_dead_url(), _dead_url()])
    try:
        assert await client.call_each(*question, 2) == ["0x63", "0x0"]
        assert await second.call_each(*question, 1) == ["0x63"]
        with pytest.raises(Unavailable):
            await none.call_each(*question, 2)
        with pytest.raises(Reverted):
            await client.call_each("eth_call", [{"to": USDC.address, "data": "0x"}, "latest"], 2)

        faulty_node.fault("eth_getTransactionCount", "drop")
        faulty_node.asked.clear()
        for _ in range(3):
            assert await client.call_each(*question, 2) == ["0x0"]
        assert faulty_node.asked.count("eth_getTransactionCount") == 1
    finally:
        for each in (client, second, none):
            await each.close()


async def test_a_token_is_known_to_have_code_for_a_while(faulty_node: FaultyNode) -> None:
    client = Rpc(NETWORK, [faulty_node.url])
    empty = "0x" + "77" * 20
    try:
        assert await client.has_code(USDC.address)
        assert await client.has_code(USDC.address)
        assert faulty_node.asked.count("eth_getCode") == 1
        assert not await client.has_code(empty)
        assert not await client.has_code(empty)
        assert faulty_node.asked.count("eth_getCode") == 3  # a no is never kept
    finally:
        await client.close()


async def test_keys_in_the_url_are_never_shown() -> None:
    client = Rpc(NETWORK, [f"http://user:hunter2@127.0.0.1:{servers.free_port()}/v3/apikey?k=x"])
    try:
        with pytest.raises(Unavailable) as error:
            await client.block_number()
        shown = f"{error.value!r} {error.value} {client.endpoints!r}"
        assert not any(secret in shown for secret in ("hunter2", "apikey", "k=x"))
        assert "127.0.0.1" in shown
    finally:
        await client.close()


def test_without_a_url_there_is_no_client() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Rpc(NETWORK, [])
