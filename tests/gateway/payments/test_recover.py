"""Payments nobody waits for, on a real chain: finished by what it says, given up only on proof."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import pytest
from eth_account import Account as Maker

from anvil.devnet import Account, Devnet
from chain.errors import Unavailable
from chain.eth import selector, uint_word
from chain.schemes import eip3009
from gateway import ledger
from gateway.db import Database
from gateway.payments import nonces
from gateway.payments.rails import Rails
from gateway.payments.recover import recover
from tests.fixtures_chain import USDC, FaultyNode, payment, typed_data
from tests.gateway.ledger import helpers
from tests.gateway.payments.parts import PAY_TO, Claimed, Desk, opened_desk
from wallet_auth.keys import address_word

EXPIRED = "invalid_exact_evm_payload_authorization_valid_before"
FAILED = "invalid_transaction_state"


@pytest.fixture
async def desk(chain_net: Devnet, sqlite_url: str) -> AsyncIterator[Desk]:
    async with opened_desk(chain_net, sqlite_url) as found:
        yield found
        assert await helpers.faults(found.rails.db) == []


@pytest.fixture
async def lying(chain_net: Devnet, faulty_node: FaultyNode, sqlite_url: str) -> AsyncIterator[Desk]:
    """The same behind a node that can be told to lag."""
    async with opened_desk(chain_net, sqlite_url, faulty_node.url) as found:
        yield found
        assert await helpers.faults(found.rails.db) == []


@pytest.fixture
def still(chain_net: Devnet) -> Iterator[Devnet]:
    """Blocks are made on demand only."""
    chain_net.rpc("evm_setAutomine", False)
    yield chain_net
    chain_net.rpc("anvil_dropAllTransactions")
    chain_net.rpc("evm_setAutomine", True)


def now_s(net: Devnet) -> int:
    """The time of the newest block."""
    return int(net.rpc("eth_getBlockByNumber", "latest", False)["timestamp"], 16)


def cancel(net: Devnet, payer: Account, nonce: str) -> None:
    """The payer takes the authorization back (EIP-3009 cancelAuthorization)."""
    data = typed_data(payer.address, payer.address, 1, nonce=nonce)
    fields = [{"name": "authorizer", "type": "address"}, {"name": "nonce", "type": "bytes32"}]
    signed = Maker.sign_typed_data(
        payer.private_key,
        full_message={
            "types": {
                "EIP712Domain": data["types"]["EIP712Domain"],
                "CancelAuthorization": fields,
            },
            "primaryType": "CancelAuthorization",
            "domain": data["domain"],
            "message": {"authorizer": payer.address, "nonce": nonce},
        },
    )
    call = selector("cancelAuthorization(address,bytes32,uint8,bytes32,bytes32)")
    call += address_word(payer.address) + bytes.fromhex(nonce[2:])
    call += uint_word(signed.v) + uint_word(signed.r) + uint_word(signed.s)
    net.send(net.operator.address, USDC.address, "0x" + call.hex())


async def look(desk: Desk, claimed: Claimed) -> str:
    """One look; what it says is what the row says."""
    state = await recover(desk.rails, await desk.payment(claimed))
    assert (await desk.payment(claimed)).state == state
    return state


async def failed(desk: Desk, claimed: Claimed, code: str, word: str) -> None:
    """It ends, for this reason, and nothing was credited."""
    assert await look(desk, claimed) == "failed"
    after = await desk.payment(claimed)
    assert after.error_code == code
    assert after.error_detail is not None and word in after.error_detail
    assert await desk.minted() == []


async def succeeded(desk: Desk, claimed: Claimed, tx_hash: str) -> None:
    """It is minted once, under this transaction, however often it is looked at."""
    desk.net.receipt(tx_hash)  # a block can lag a moment behind the broadcast
    for _ in range(2):
        assert await look(desk, claimed) == "succeeded"
    after = await desk.payment(claimed)
    assert (after.tx_hash, after.error_code) == (tx_hash, None)
    assert after.lot_id is not None
    assert await desk.minted() == [(tx_hash, claimed.payment.id, claimed.payment.amount_units)]


# --- it happened ----------------------------------------------------------------------------


async def test_our_transaction_was_included(desk: Desk) -> None:
    claimed = await desk.claim()
    await succeeded(desk, claimed, desk.send(claimed))


async def test_on_postgres_too(chain_net: Devnet, postgres_url: str) -> None:
    async with opened_desk(chain_net, postgres_url) as desk:
        claimed = await desk.claim()
        await succeeded(desk, claimed, desk.send(claimed))
        assert await helpers.faults(desk.rails.db) == []


async def test_it_was_never_sent(desk: Desk) -> None:
    """Killed between the claim and the broadcast: the stored bytes are handed over."""
    claimed = await desk.claim()
    assert await look(desk, claimed) == "processing"
    await succeeded(desk, claimed, claimed.prepared.tx_hash)


async def test_it_was_sent_and_is_in_no_block_yet(desk: Desk, still: Devnet) -> None:
    claimed = await desk.claim()
    desk.send(claimed)
    for _ in range(3):
        assert await look(desk, claimed) == "processing"
    still.mine()
    await succeeded(desk, claimed, claimed.prepared.tx_hash)


async def test_a_stranger_handed_it_in(desk: Desk) -> None:
    claimed = await desk.claim()
    await succeeded(desk, claimed, desk.send_by_stranger(claimed))


async def test_a_stranger_was_first_and_ours_failed(desk: Desk) -> None:
    claimed = await desk.claim()
    theirs = desk.send_by_stranger(claimed)
    ours = desk.send(claimed)
    assert desk.net.receipt(ours)["status"] == "0x0"
    await succeeded(desk, claimed, theirs)


async def test_our_chain_nonce_went_to_another_transaction(desk: Desk) -> None:
    """The gas account is used elsewhere: the payment gets another number."""
    claimed = await desk.claim()
    desk.net.send(desk.net.settler.address, desk.net.settler.address, "0x")
    assert await look(desk, claimed) == "processing"
    async with desk.rails.db.read() as tx:
        fresh, dead = await nonces.sent_for(tx, claimed.payment.id)
    assert dead == claimed.prepared
    assert (fresh.nonce, fresh.sender) == (dead.nonce + 1, dead.sender)
    await succeeded(desk, claimed, fresh.tx_hash)


async def test_bytes_that_no_block_can_hold_do_not_take_another_number(
    lying: Desk, faulty_node: FaultyNode
) -> None:
    """Only a number that is gone is a reason to sign again; the first may still be included."""
    claimed = await lying.claim()
    faulty_node.fault(
        "eth_sendRawTransaction", "error", {"code": -32000, "message": "intrinsic gas too low"}
    )
    assert await look(lying, claimed) == "processing"
    async with lying.rails.db.read() as tx:
        assert await nonces.sent_for(tx, claimed.payment.id) == [claimed.prepared]


async def test_two_payments_of_one_payer_do_not_take_each_others_transfer(desk: Desk) -> None:
    one, two = await desk.claim(), await desk.claim()
    first = desk.send(one)
    assert await look(desk, two) == "processing"  # it hands its own in
    await succeeded(desk, one, first)
    desk.net.receipt(two.prepared.tx_hash)
    assert await look(desk, two) == "succeeded"
    assert (await desk.payment(two)).tx_hash == two.prepared.tx_hash != first
    assert len(await desk.minted()) == 2


# --- it never will --------------------------------------------------------------------------


async def test_the_payer_cancelled_it(desk: Desk) -> None:
    claimed = await desk.claim()
    cancel(desk.net, desk.net.accounts[0], claimed.authorization.nonce)
    await failed(desk, claimed, FAILED, "cancelled")


async def test_the_same_nonce_was_used_to_pay_somebody_else(desk: Desk) -> None:
    """One nonce, two signatures: only one of them can be used."""
    claimed = await desk.claim()
    elsewhere = await other_signature(desk, claimed)
    desk.send_by_stranger(elsewhere)
    assert desk.net.receipt(desk.send(claimed))["status"] == "0x0"
    await failed(desk, claimed, FAILED, "elsewhere")


async def other_signature(desk: Desk, claimed: Claimed) -> Claimed:
    signed = payment(
        desk.net.accounts[0],
        desk.net.accounts[5].address,
        claimed.payment.amount_units,
        nonce=claimed.authorization.nonce,
    )
    return replace(claimed, authorization=eip3009.parse(signed))


async def test_it_expired_before_it_was_included(desk: Desk) -> None:
    claimed = await desk.claim(valid_before_s=now_s(desk.net))
    desk.net.mine()
    await failed(desk, claimed, EXPIRED, "expired")


async def test_it_expired_after_ours_failed(desk: Desk) -> None:
    claimed = await desk.claim(valid_before_s=now_s(desk.net))
    desk.net.mine()
    assert desk.net.receipt(desk.send(claimed))["status"] == "0x0"
    await failed(desk, claimed, EXPIRED, "expired")


async def test_the_token_refused_it(desk: Desk) -> None:
    """The payer's money was gone when ours was included; the authorization is still good."""
    claimed = await desk.claim()
    payer = desk.net.accounts[0]
    desk.net.transfer(
        payer.address, desk.net.accounts[1].address, desk.net.balance_units(payer.address)
    )
    assert desk.net.receipt(desk.send(claimed))["status"] == "0x0"
    await failed(desk, claimed, FAILED, "refused by the token")


async def test_ours_ran_out_of_gas(desk: Desk) -> None:
    claimed = await desk.claim(gas=40_000)
    assert desk.net.receipt(desk.send(claimed))["status"] == "0x0"
    await failed(desk, claimed, FAILED, "refused by the token")


# --- "not found" is no proof ----------------------------------------------------------------


def nothing(_result: object) -> Any:
    return None


def no_logs(_result: object) -> Any:
    return []


async def test_a_node_without_the_newest_receipts_and_logs_is_no_proof_of_a_cancellation(
    lying: Desk, faulty_node: FaultyNode
) -> None:
    """Behind one URL are many nodes: one says the authorization is marked, another has not seen
    the block with its transfer."""
    claimed = await lying.claim()
    sent = lying.send(claimed)
    faulty_node.fault("eth_getTransactionReceipt", "change", nothing)
    faulty_node.fault("eth_getLogs", "change", no_logs)
    for _ in range(3):
        assert await look(lying, claimed) == "processing"
    faulty_node.faults.clear()
    await succeeded(lying, claimed, sent)


async def test_a_node_with_the_mark_and_without_its_receipt_is_no_proof_either(
    lying: Desk, faulty_node: FaultyNode
) -> None:
    claimed = await lying.claim()
    theirs = lying.send_by_stranger(claimed)
    faulty_node.fault("eth_getTransactionReceipt", "change", nothing)
    assert await look(lying, claimed) == "processing"
    faulty_node.faults.clear()
    await succeeded(lying, claimed, theirs)


@pytest.mark.parametrize(
    "after", ["eth_getTransactionReceipt", "eth_getLogs", "eth_getBlockByNumber", "eth_call"]
)
@pytest.mark.parametrize("who", ["ours", "a stranger's"])
async def test_a_block_is_made_between_two_questions(
    lying: Desk, faulty_node: FaultyNode, who: str, after: str
) -> None:
    """What was asked before the block and what was asked after it do not make a verdict."""
    claimed = await lying.claim()
    hashes: list[str] = []

    def happens(before: Any) -> Any:
        if not hashes:
            if who != "ours":
                hashes.append(lying.send_by_stranger(claimed))
            hashes.append(lying.send(claimed))
            lying.net.receipt(hashes[-1])
        return before

    faulty_node.fault(after, "change", happens, times=1)
    assert await look(lying, claimed) != "failed"
    assert hashes
    await succeeded(lying, claimed, hashes[0])


@pytest.mark.parametrize("over", [False, True])
async def test_a_node_that_lags_in_the_tokens_state_is_not_believed(
    lying: Desk, faulty_node: FaultyNode, over: bool
) -> None:
    """Not marked says the one that has not got the block; the other, that its time is over."""
    claimed = await lying.claim()
    sent = lying.send(claimed)
    late = hex(claimed.authorization.valid_before_s + 1)
    if over:
        faulty_node.fault("eth_getBlockByNumber", "change", lambda b: {**b, "timestamp": late})
    faulty_node.fault("eth_getTransactionReceipt", "change", nothing, times=1)
    faulty_node.fault("eth_getLogs", "change", no_logs)

    def behind(asked: dict[str, Any], result: Any) -> Any:
        # A node that lacks the newest block can answer about the one it calls the newest only.
        return "0x" + "0" * 64 if asked["params"][1] == "latest" else result

    faulty_node.fault("eth_call", "change_by", behind)
    assert await look(lying, claimed) == "processing"
    faulty_node.faults.clear()
    await succeeded(lying, claimed, sent)


async def test_a_claim_made_at_a_node_that_lagged_is_found_a_little_before_it(
    desk: Desk,
) -> None:
    claimed = await desk.claim()
    theirs = desk.send_by_stranger(claimed)
    desk.net.mine(5)
    async with desk.rails.db.write() as tx:
        await tx.execute(
            "UPDATE payment SET from_block = $1 WHERE id = $2",
            int(desk.net.rpc("eth_blockNumber"), 16),
            claimed.payment.id,
        )
    await succeeded(desk, claimed, theirs)


@pytest.mark.parametrize(
    "method",
    [
        "eth_getTransactionReceipt",
        "eth_getLogs",
        "eth_getBlockByNumber",
        "eth_call",
        "eth_getTransactionCount",
        "eth_blockNumber",
    ],
)
async def test_a_question_without_an_answer_decides_nothing(
    lying: Desk, faulty_node: FaultyNode, method: str
) -> None:
    claimed = await lying.claim()
    faulty_node.fault(method, "drop")
    with pytest.raises(Unavailable):
        await recover(lying.rails, claimed.payment)
    faulty_node.fault(method, "change", lambda _result: "0x")
    with pytest.raises(Unavailable):
        await recover(lying.rails, claimed.payment)
    assert (await lying.payment(claimed)).state == "processing"
    faulty_node.faults.clear()
    assert await look(lying, claimed) == "processing"
    await succeeded(lying, claimed, claimed.prepared.tx_hash)


async def test_a_lost_answer_to_the_broadcast_is_looked_at_again(
    lying: Desk, faulty_node: FaultyNode
) -> None:
    claimed = await lying.claim()
    faulty_node.fault("eth_sendRawTransaction", "lose", times=1)
    assert await look(lying, claimed) == "processing"
    await succeeded(lying, claimed, claimed.prepared.tx_hash)


# --- the gas account's numbers --------------------------------------------------------------


async def test_what_expired_before_it_was_sent_does_not_hold_up_the_next(desk: Desk) -> None:
    """Nodes out of reach for longer than offers live: the chain nonces were handed out, and no
    later transaction can be included before theirs are used."""
    over = [await desk.claim(valid_before_s=now_s(desk.net)) for _ in range(3)]
    desk.net.mine()
    for each in over:
        assert await look(desk, each) == "failed"
    later = await desk.claim()
    assert later.prepared.nonce == over[-1].prepared.nonce + 1
    desk.send(later)
    assert desk.net.rpc("eth_getTransactionReceipt", later.prepared.tx_hash) is None
    assert await look(desk, later) == "processing"
    desk.net.receipt(later.prepared.tx_hash)
    await succeeded(desk, later, later.prepared.tx_hash)
    for each in over:
        assert desk.net.rpc("eth_getTransactionByHash", each.prepared.tx_hash) is None
        assert (await desk.payment(each)).state == "failed"
        async with desk.rails.db.read() as tx:
            instead, _ = await nonces.sent_for(tx, each.payment.id)
        receipt = desk.net.receipt(instead.tx_hash)
        assert (receipt["status"], receipt["to"]) == ("0x1", desk.net.settler.address)
        assert int(receipt["gasUsed"], 16) == 21_000
    assert desk.net.balance_units(PAY_TO) == later.payment.amount_units


async def test_one_in_the_gap_that_a_node_refuses_keeps_nothing_else_back(
    lying: Desk, faulty_node: FaultyNode
) -> None:
    one, two, three = [await lying.claim() for _ in range(3)]
    faulty_node.fault(
        "eth_sendRawTransaction", "error", {"code": -32000, "message": "intrinsic gas too low"}, 1
    )
    assert await look(lying, three) == "processing"
    raw = [seen["params"][0] for seen in faulty_node.seen if "sendRaw" in seen["method"]]
    assert raw == ["0x" + each.prepared.raw.hex() for each in (one, two, three)]
    assert await look(lying, one) == "processing"
    for each in (one, two, three):
        lying.net.receipt(each.prepared.tx_hash)
        assert await look(lying, each) == "succeeded"


# --- rows that cannot be worked on ----------------------------------------------------------


async def test_a_network_that_is_not_configured_any_more_is_waited_for(desk: Desk) -> None:
    claimed = await desk.claim()
    gone = replace(claimed.payment, network="eip155:8453")
    with pytest.raises(Unavailable, match="not configured"):
        await recover(desk.rails, gone)
    without = Rails(desk.rails.settings, desk.rails.db, desk.rails.keys, {})
    with pytest.raises(Unavailable, match="not configured"):
        await recover(without, claimed.payment)
    with pytest.raises(Unavailable, match="not configured"):
        await recover(desk.rails, replace(claimed.payment, asset="0x" + "12" * 20))


@pytest.mark.parametrize("missing", ["network", "payer", "auth_nonce"])
async def test_a_row_without_an_authorization_is_a_fault(desk: Desk, missing: str) -> None:
    claimed = await desk.claim()
    broken: dict[str, Any] = {missing: None}
    with pytest.raises(ledger.LedgerFault):
        await recover(desk.rails, replace(claimed.payment, **broken))


async def test_a_row_without_a_transaction_is_a_fault(desk: Desk) -> None:
    claimed = await desk.claim()
    with pytest.raises(ledger.LedgerFault, match="no transaction"):
        await recover(desk.rails, replace(claimed.payment, id="pay_another"))


async def test_what_has_ended_is_not_ended_otherwise(desk: Desk) -> None:
    """A payment that somebody finished while we looked: our verdict does not overwrite it."""
    claimed = await desk.claim()
    stale = await desk.payment(claimed)
    db: Database = desk.rails.db
    async with db.write() as tx:
        await tx.execute("UPDATE payment SET state = 'succeeded' WHERE id = $1", claimed.payment.id)
    cancel(desk.net, desk.net.accounts[0], claimed.authorization.nonce)
    await recover(desk.rails, stale)
    assert (await desk.payment(claimed)).state == "succeeded"
