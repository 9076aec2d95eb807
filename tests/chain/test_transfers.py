"""Transfer logs as proofs: every field counts, and an authorization is found whoever used it."""

from __future__ import annotations

import copy
import secrets
import time
from collections.abc import Callable
from typing import Any

import pytest
from eth_account import Account as Signer
from hypothesis import given, settings
from hypothesis import strategies as st

from anvil import multicall3
from anvil.devnet import Account, Devnet
from chain import receipts, transfers
from chain.errors import Rejected, Unavailable
from chain.eth import bytes_tail, selector, uint_word
from chain.rpc import Rpc
from chain.schemes import eip3009
from chain.schemes.eip3009 import Authorization
from tests.fixtures_chain import NETWORK, USDC, FaultyNode, payment, typed_data
from wallet_auth.keys import address_word

PAY_TO = "0x00000000000000000000000000000000000feeed"


def _auth(payer: Account, units: int = 5) -> Authorization:
    return eip3009.parse(payment(payer, PAY_TO, units))


def _settle(net: Devnet, auth: Authorization, sender: str | None = None) -> str:
    """Have somebody else than the gateway's sender include the authorization."""
    data = "0x" + eip3009.transfer_calldata(auth).hex()
    return net.send(sender or net.accounts[9].address, USDC.address, data)


async def _found(rpc: Rpc, tx_hash: str) -> list[transfers.Transfer]:
    found = await transfers.transfers_of(rpc, tx_hash, USDC, PAY_TO)
    assert found is not None
    return found


# --- what counts ----------------------------------------------------------------------------


async def test_whoever_sends_an_authorization_it_is_found_and_is_its_payers(
    chain_net: Devnet, rpc: Rpc
) -> None:
    payer = chain_net.accounts[1]
    auth = _auth(payer)
    find = (rpc, USDC, payer.address, auth.nonce)
    before = await rpc.block_number()
    assert await transfers.find_authorization(*find, before) is None
    assert not await transfers.authorization_used(*find)
    tx_hash = _settle(chain_net, auth)
    assert await transfers.find_authorization(*find, before) == tx_hash
    assert await transfers.find_authorization(*find, await rpc.block_number() + 1) is None
    assert await transfers.authorization_used(*find)
    (found,) = await _found(rpc, tx_hash)
    assert (found.from_, found.authorizer, found.auth_nonce) == (
        payer.address,
        payer.address,
        auth.nonce,
    )


async def test_a_plain_transfer_has_no_authorization(chain_net: Devnet, rpc: Rpc) -> None:
    payer = chain_net.accounts[1]
    (found,) = await _found(rpc, chain_net.transfer(payer.address, PAY_TO, 7))
    assert (found.value_units, found.from_) == (7, payer.address)
    assert found.authorizer is found.auth_nonce is None


async def test_a_cancelled_authorization_is_used_and_in_no_transfer(
    chain_net: Devnet, rpc: Rpc
) -> None:
    payer = chain_net.accounts[1]
    auth = _auth(payer)
    data = typed_data(payer.address, PAY_TO, 5, nonce=auth.nonce)
    data["types"]["CancelAuthorization"] = [
        {"name": "authorizer", "type": "address"},
        {"name": "nonce", "type": "bytes32"},
    ]
    del data["types"]["TransferWithAuthorization"]
    data |= {
        "primaryType": "CancelAuthorization",
        "message": {"authorizer": payer.address, "nonce": auth.nonce},
    }
    signature = bytes(Signer.sign_typed_data(payer.private_key, full_message=data).signature)
    call = (
        selector("cancelAuthorization(address,bytes32,bytes)")
        + address_word(payer.address)
        + bytes.fromhex(auth.nonce[2:])
        + uint_word(96)
        + bytes_tail(signature)
    )
    chain_net.send(payer.address, USDC.address, "0x" + call.hex())
    assert await transfers.authorization_used(rpc, USDC, payer.address, auth.nonce)
    assert await transfers.find_authorization(rpc, USDC, payer.address, auth.nonce, 0) is None
    with pytest.raises(Rejected) as error:
        await eip3009.verify(rpc, USDC, auth, int(time.time()))
    assert error.value.code == "invalid_transaction_state"


async def test_several_in_one_transaction_are_counted(chain_net: Devnet, rpc: Rpc) -> None:
    """Two of ours, one of nothing, one to somebody else: in the order of the chain."""
    payers = chain_net.accounts[1:3]
    ours = [_auth(payers[0], 11), _auth(payers[0], 0), _auth(payers[1], 22)]
    other = eip3009.parse(payment(payers[1], chain_net.accounts[4].address, 33))
    calls = [eip3009.transfer_calldata(auth) for auth in (ours[0], other, ours[1], ours[2])]
    tx_hash = chain_net.send(
        chain_net.settler.address, multicall3.ADDRESS, _aggregate3(USDC.address, calls)
    )
    found = await _found(rpc, tx_hash)
    assert [(t.n, t.value_units, t.auth_nonce) for t in found] == [
        (0, 11, ours[0].nonce),
        (2, 22, ours[2].nonce),  # 1 is the transfer of nothing: counted, not credited
    ]


def _aggregate3(target: str, calls: list[bytes]) -> str:
    """Multicall3 ``aggregate3((address target, bool allowFailure, bytes callData)[])``."""
    items = [
        address_word(target) + uint_word(0) + uint_word(96) + bytes_tail(call) for call in calls
    ]
    offsets, at = b"", 32 * len(items)
    for item in items:
        offsets += uint_word(at)
        at += len(item)
    body = uint_word(32) + uint_word(len(items)) + offsets + b"".join(items)
    return "0x" + (selector("aggregate3((address,bool,bytes)[])") + body).hex()


async def test_a_log_of_another_contract_is_worth_nothing(chain_net: Devnet, rpc: Rpc) -> None:
    """A contract that cries Transfer(payer, us, 2^256 - 1) in the right words."""
    liar = "0x" + "bb" * 20
    code = (
        "7f" + "ff" * 32 + "600052"  # the value, to memory
        + "7f" + address_word(PAY_TO).hex()
        + "7f" + address_word(chain_net.accounts[0].address).hex()
        + "7f" + transfers.TRANSFER.hex()
        + "60206000a3"  # LOG3 over that word
    )  # fmt: skip
    chain_net.rpc("anvil_setCode", liar, "0x" + code)
    tx_hash = chain_net.send(chain_net.settler.address, liar, "0x")
    receipt = await receipts.read(rpc, tx_hash)
    assert receipt is not None and receipt.succeeded and len(receipt.logs) == 1
    assert receipt.logs[0].topics[0] == transfers.TRANSFER
    assert await _found(rpc, tx_hash) == []


async def test_a_transfer_to_somebody_else_is_worth_nothing(chain_net: Devnet, rpc: Rpc) -> None:
    me, you = chain_net.accounts[:2]
    assert await _found(rpc, chain_net.transfer(me.address, you.address, 5)) == []
    assert await _found(rpc, chain_net.transfer(me.address, PAY_TO, 0)) == []


async def test_a_reorganisation_takes_a_transfer_away_and_can_bring_it_back(
    chain_net: Devnet, rpc: Rpc
) -> None:
    auth = _auth(chain_net.accounts[1])
    chain_net.mine(2)
    tx_hash = _settle(chain_net, auth)
    (before,) = await _found(rpc, tx_hash)
    chain_net.rpc("anvil_reorg", 2, [])
    assert await transfers.transfers_of(rpc, tx_hash, USDC, PAY_TO) is None
    assert not await transfers.authorization_used(
        rpc, USDC, chain_net.accounts[1].address, auth.nonce
    )
    again = _settle(chain_net, auth, chain_net.accounts[8].address)
    (after,) = await _found(rpc, again)
    assert (after.auth_nonce, after.n) == (before.auth_nonce, before.n)
    assert after.block_hash != before.block_hash


# --- what a node may say --------------------------------------------------------------------


def _tamper(path: list[Any], value: Any) -> Callable[[Any], Any]:
    """Change one member of a receipt; ``...`` deletes it."""

    def change(receipt: Any) -> Any:
        told = copy.deepcopy(receipt)
        place = told
        for step in path[:-1]:
            place = place[step]
        if value is ...:
            del place[path[-1]]
        else:
            place[path[-1]] = value
        return told

    return change


_SIGNED_OFF: list[tuple[list[Any], Any]] = [
    (["status"], "0x0"),
    (["logs", 1, "removed"], True),
    (["logs", 1, "address"], "0x" + "99" * 20),
    (["logs", 1, "topics", 0], "0x" + "99" * 32),
    (["logs", 1, "topics", 2], "0x" + "99" * 32),
    (["logs", 1, "topics"], []),
    (["logs", 1, "data"], "0x"),
    (["logs", 1, "data"], "0x" + "00" * 32),
    (["logs", 1, "data"], "0x" + "01" * 33),
    (["logs"], []),
]


@pytest.mark.parametrize(("path", "value"), _SIGNED_OFF)
async def test_a_log_that_differs_is_no_proof(
    chain_net: Devnet, faulty_node: FaultyNode, path: list[Any], value: Any
) -> None:
    tx_hash = _settle(chain_net, _auth(chain_net.accounts[1]))
    client = Rpc(NETWORK, [faulty_node.url])
    try:
        assert len(await _found(client, tx_hash)) == 1
        faulty_node.fault("eth_getTransactionReceipt", "change", _tamper(path, value))
        assert await _found(client, tx_hash) == []
    finally:
        await client.close()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["transactionHash"], "0x" + "99" * 32),
        (["transactionHash"], None),
        (["status"], ...),
        (["status"], "0x2"),
        (["status"], 1),
        (["blockHash"], None),
        (["blockNumber"], None),
        (["blockNumber"], hex(2**63)),
        (["gasUsed"], "12"),
        (["logs"], ...),
        (["logs"], {}),
        (["logs", 0], "log"),
        (["logs", 1, "transactionHash"], "0x" + "99" * 32),
        (["logs", 1, "blockHash"], "0x" + "99" * 32),
        (["logs", 1, "logIndex"], "0x0"),
        (["logs", 1, "logIndex"], None),
        (["logs", 1, "topics"], None),
        (["logs", 1, "topics", 1], "0x12"),
        (["logs", 1, "address"], None),
        (["logs", 1, "data"], "0x1"),
    ],
)
async def test_a_receipt_of_another_form_is_no_answer(
    chain_net: Devnet, faulty_node: FaultyNode, path: list[Any], value: Any
) -> None:
    tx_hash = _settle(chain_net, _auth(chain_net.accounts[1]))
    faulty_node.fault("eth_getTransactionReceipt", "change", _tamper(path, value))
    client = Rpc(NETWORK, [faulty_node.url])
    try:
        with pytest.raises(Unavailable) as error:
            await transfers.transfers_of(client, tx_hash, USDC, PAY_TO)
        assert error.value.code == "rpc_bad_answer"
    finally:
        await client.close()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["logs", 0, "address"], "0x" + "99" * 20),
        (["logs", 0, "topics", 0], "0x" + "99" * 32),
        (["logs", 0, "topics", 1], "0x" + "99" * 32),
        (["logs", 0, "removed"], True),
        (["logs", 1, "logIndex"], "0x63"),
    ],
)
async def test_an_authorization_must_stand_directly_before(
    chain_net: Devnet, faulty_node: FaultyNode, path: list[Any], value: Any
) -> None:
    tx_hash = _settle(chain_net, _auth(chain_net.accounts[1]))
    faulty_node.fault("eth_getTransactionReceipt", "change", _tamper(path, value))
    client = Rpc(NETWORK, [faulty_node.url])
    try:
        (found,) = await _found(client, tx_hash)
        assert found.authorizer is found.auth_nonce is None
    finally:
        await client.close()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.just("0x" + "00" * 32),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=10,
)
_MEMBERS = ("transactionHash", "status", "blockHash", "blockNumber", "gasUsed", "logs")


@settings(deadline=None)
@given(JSON | st.fixed_dictionaries(dict.fromkeys(_MEMBERS, JSON)))
def test_no_answer_makes_the_reader_stumble(answer: Any) -> None:
    with pytest.raises(Unavailable):
        receipts.parse(answer, "0x" + "00" * 31 + "01")


# --- searching ------------------------------------------------------------------------------


async def test_a_node_that_limits_the_span_is_asked_in_parts(
    chain_net: Devnet, faulty_node: FaultyNode
) -> None:
    payer = chain_net.accounts[1]
    chain_net.mine(40)
    auth = _auth(payer)
    tx_hash = _settle(chain_net, auth)
    chain_net.mine(40)
    faulty_node.fault(
        "eth_getLogs", "error", {"code": -32602, "message": "range is too large"}, times=4
    )
    client = Rpc(NETWORK, [faulty_node.url])
    try:
        find = (client, USDC, payer.address)
        assert await transfers.find_authorization(*find, auth.nonce, 0) == tx_hash
        assert faulty_node.asked.count("eth_getLogs") > 4
        faulty_node.fault("eth_getLogs", "error", {"code": -32602, "message": "too large"})
        with pytest.raises(Unavailable):
            await transfers.find_authorization(*find, auth.nonce, 0)
        assert faulty_node.asked.count("eth_getLogs") < 2 * transfers.MAX_LOG_REQUESTS
        faulty_node.asked.clear()
        with pytest.raises(Unavailable):
            await transfers.find_authorization(*find, auth.nonce, await client.block_number())
        assert faulty_node.asked.count("eth_getLogs") == 1  # a single block cannot be halved
    finally:
        await client.close()


@pytest.mark.parametrize(
    "lie",
    [
        lambda logs: None,
        lambda logs: ["log"],
        lambda logs: [logs[0] | {"address": "0x" + "99" * 20}],
        lambda logs: [logs[0] | {"topics": logs[0]["topics"][:2]}],
        lambda logs: [logs[0] | {"transactionHash": "0x12"}],
        lambda logs: [{}],
    ],
)
async def test_a_log_that_was_not_asked_for_is_no_answer(
    chain_net: Devnet, faulty_node: FaultyNode, lie: Callable[[Any], Any]
) -> None:
    payer = chain_net.accounts[1]
    auth = _auth(payer)
    _settle(chain_net, auth)
    faulty_node.fault("eth_getLogs", "change", lie)
    client = Rpc(NETWORK, [faulty_node.url])
    try:
        with pytest.raises(Unavailable) as error:
            await transfers.find_authorization(client, USDC, payer.address, auth.nonce, 0)
        assert error.value.code == "rpc_bad_answer"
    finally:
        await client.close()


async def test_a_removed_log_is_passed_over(chain_net: Devnet, faulty_node: FaultyNode) -> None:
    payer = chain_net.accounts[1]
    auth = _auth(payer)
    _settle(chain_net, auth)
    faulty_node.fault("eth_getLogs", "change", lambda logs: [logs[0] | {"removed": True}])
    client = Rpc(NETWORK, [faulty_node.url])
    try:
        found = await transfers.find_authorization(client, USDC, payer.address, auth.nonce, 0)
        assert found is None
    finally:
        await client.close()


@pytest.mark.parametrize("told", ["0x", "0x01", "0x" + "00" * 31 + "02", "0x" + "01" * 32])
async def test_yes_and_no_have_one_form(
    chain_net: Devnet, faulty_node: FaultyNode, told: str
) -> None:
    faulty_node.fault("eth_call", "change", lambda _: told)
    client = Rpc(NETWORK, [faulty_node.url])
    try:
        with pytest.raises(Unavailable) as error:
            await transfers.authorization_used(
                client, USDC, chain_net.settler.address, "0x" + "11" * 32
            )
        assert error.value.code == "rpc_bad_answer"
    finally:
        await client.close()


# --- reading what came in -------------------------------------------------------------------


def _paid(net: Devnet, *units: int) -> tuple[str, int, list[str]]:
    """Transfers to a new address: it, the block before them, and their transactions."""
    to = "0x" + secrets.token_hex(20)
    before = int(net.rpc("eth_blockNumber"), 16)
    sent = [net.transfer(net.accounts[0].address, to, each) for each in units]
    for tx_hash in sent:
        net.receipt(tx_hash)
    return to, before, sent


async def test_what_came_in_is_read_from_the_logs(chain_net: Devnet, rpc: Rpc) -> None:
    to, before, sent = _paid(chain_net, 10_000, 0, 30_000)
    head = await rpc.block_number()
    found = await transfers.incoming(rpc, USDC, to, before + 1, head)
    assert [(f.tx_hash, f.n, f.value_units) for f in found] == [
        (sent[0], 0, 10_000),
        (sent[2], 0, 30_000),
    ]
    for each in found:
        alike = await transfers.transfers_of(rpc, each.tx_hash, USDC, to)
        assert alike is not None
        assert [(a.n, a.from_, a.value_units, a.block_hash) for a in alike] == [
            (each.n, each.from_, each.value_units, each.block_hash)
        ]
    assert await transfers.incoming(rpc, USDC, to, head + 1, head) == []


async def test_a_span_that_is_refused_is_halved(chain_net: Devnet, faulty_node: FaultyNode) -> None:
    chain_net.mine(8)
    to, before, sent = _paid(chain_net, 10_000, 20_000, 30_000)
    faulty_node.fault("eth_getLogs", "error", {"code": -32000, "message": "too wide"}, times=3)
    client = Rpc(NETWORK, [faulty_node.url])
    try:
        found = await transfers.incoming(client, USDC, to, before - 5, before + 3)
        assert [each.tx_hash for each in found] == sent
    finally:
        await client.close()


async def test_an_index_that_lags_hides_nothing_from_another_one(
    chain_net: Devnet, faulty_node: FaultyNode
) -> None:
    to, before, sent = _paid(chain_net, 10_000)
    faulty_node.fault("eth_getLogs", "change", lambda _: [])
    client = Rpc(NETWORK, [faulty_node.url, chain_net.rpc_url])
    try:
        found = await transfers.incoming(client, USDC, to, before, before + 1)
        assert [each.tx_hash for each in found] == sent
    finally:
        await client.close()


@pytest.mark.parametrize(
    "change",
    [
        {"address": "0x" + "12" * 20},
        {"topics": []},
        {"data": "0x"},
        {"data": "0x" + "ff" * 32},
        {"blockNumber": "0x0"},
        {"blockHash": "0x12"},
        {"transactionHash": None},
        {"logIndex": 1},
    ],
    ids=str,
)
async def test_a_log_of_something_else_is_no_transfer_to_us(
    chain_net: Devnet, faulty_node: FaultyNode, change: dict[str, object]
) -> None:
    to, before, _ = _paid(chain_net, 10_000)
    client = Rpc(NETWORK, [faulty_node.url])
    try:
        faulty_node.fault("eth_getLogs", "change", lambda logs: [{**logs[0], **change}])
        with pytest.raises(Unavailable) as error:
            await transfers.incoming(client, USDC, to, before, before + 1)
        assert error.value.code == "rpc_bad_answer"
    finally:
        await client.close()
