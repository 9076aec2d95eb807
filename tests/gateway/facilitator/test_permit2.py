"""``exact`` by Permit2: the real Permit2 on a local chain, and a stand-in for x402's proxy."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from anvil import permit2 as planted
from anvil.devnet import Account, Devnet
from chain import multicall
from chain.eth import selector, uint_word
from chain.networks import NETWORKS
from chain.rpc import Rpc
from chain.schemes import permit2
from gateway import work
from gateway.payments.methods import METHODS, Spent
from tests.chain.test_x402_vectors import META, VECTORS
from tests.fixtures_chain import NETWORK, USDC, FaultyNode
from tests.fixtures_permit2 import approve, plant, settle_by_stranger, signed, take_back
from tests.gateway.facilitator.parts import SELLER, Facilitator, asking, opened
from tests.gateway.facilitator.parts import requirements as wanted_for
from wallet_auth.keys import address_word, keccak256, recover

EXTRA = {"name": "USDC", "version": "2", "assetTransferMethod": "permit2"}


def requirements(**change: Any) -> dict[str, Any]:
    return wanted_for(**({"extra": EXTRA} | change))


@pytest.fixture
def net(chain_net: Devnet) -> Devnet:
    """A chain with Permit2 and the proxy, and a first account that has approved Permit2."""
    plant(chain_net)
    approve(chain_net, chain_net.accounts[0], 2**256 - 1)
    return chain_net


def pays(payer: Account, **change: Any) -> dict[str, Any]:
    return asking(signed(payer, **change), requirements())


def test_the_planted_code_is_the_committed_one(net: Devnet) -> None:
    assert "0x" + keccak256(planted.CODE).hex() == planted.CODE_HASH
    assert permit2.PERMIT2 == planted.ADDRESS
    domain = "0x" + selector("DOMAIN_SEPARATOR()").hex()
    told = net.rpc("eth_call", {"to": planted.ADDRESS, "data": domain}, "latest")
    expected = keccak256(
        keccak256(b"EIP712Domain(string name,uint256 chainId,address verifyingContract)")
        + keccak256(b"Permit2")
        + uint_word(NETWORK.chain_id)
        + address_word(planted.ADDRESS)
    )
    assert told == "0x" + expected.hex()


def test_the_vectors_payload_is_signed_by_its_payer() -> None:
    """Made by the official client."""
    vector = next(
        v for v in VECTORS["permit2_unsigned_onchain"] if v["requirements"]["scheme"] == "exact"
    )
    auth = permit2.parse(vector["payload"]["payload"])
    assert recover(permit2.digest(NETWORK, auth), auth.signature) == META["payer"].lower()


async def settled(ours: Facilitator, asked: dict[str, Any]) -> dict[str, Any]:
    assert (await ours.ask("verify", asked)) == {
        "isValid": True,
        "payer": asked["paymentPayload"]["payload"]["permit2Authorization"]["from"],
    }
    told = await ours.ask("settle", asked)
    assert told["success"] is True, told
    return told


async def test_it_settles_once_however_often_it_is_asked(net: Devnet, db_url: str) -> None:
    payer = net.accounts[0]
    asked = pays(payer)
    async with opened(net, db_url) as ours:
        before, sent = net.balance_units(SELLER), ours.sent()
        told = await settled(ours, asked)
        again = await asyncio.gather(*(ours.ask("settle", asked) for _ in range(3)))
        assert again == [told] * 3
        assert ours.sent() == sent + 1
        assert net.balance_units(SELLER) == before + 10_000
        verdict = await ours.ask("verify", asked)
        assert verdict["invalidReason"] == "invalid_transaction_state"
        (row,) = await ours.rows()
        assert (row["method"], row["state"]) == ("permit2", "succeeded")


async def test_two_nonces_of_one_word_are_two_payments(net: Devnet, sqlite_url: str) -> None:
    payer = net.accounts[0]
    async with opened(net, sqlite_url) as ours:
        told = [await settled(ours, pays(payer, nonce=n)) for n in (256, 511, 512)]
        assert len({each["transaction"] for each in told}) == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"spender": "0x" + "40" * 20}, "invalid_permit2_spender"),
        ({"to": "0x" + "0b" * 20}, "invalid_permit2_recipient_mismatch"),
        ({"deadline": 1_700_000_000}, "permit2_deadline_expired"),
        ({"validAfter": 2**40}, "permit2_not_yet_valid"),
        ({"amount": 9_999}, "permit2_amount_mismatch"),
        ({"amount": 10_001}, "permit2_amount_mismatch"),
        ({"token": "0x" + "70" * 20}, "permit2_token_mismatch"),
    ],
)
async def test_what_does_not_match_is_refused(
    net: Devnet, sqlite_url: str, change: dict[str, Any], reason: str
) -> None:
    await refused(net, sqlite_url, pays(net.accounts[0], **change), reason)


async def refused(net: Devnet, database: str, asked: dict[str, Any], reason: str) -> None:
    async with opened(net, database) as ours:
        sent = ours.sent()
        assert (await ours.ask("verify", asked))["invalidReason"] == reason
        told = await ours.ask("settle", asked)
        assert (told["success"], told["errorReason"], told["transaction"]) == (False, reason, "")
        assert ours.sent() == sent
        assert await ours.rows() == []


async def test_bad_signatures_are_refused(net: Devnet, sqlite_url: str) -> None:
    payer, other = net.accounts[:2]
    good = signed(payer)
    body = bytes.fromhex(good["signature"][2:])
    flipped = "0x" + (bytes((body[0] ^ 1,)) + body[1:]).hex()
    foreign = signed(other)
    foreign["permit2Authorization"]["from"] = payer.address
    for payload in (
        good | {"signature": flipped},
        good | {"signature": "0x" + body[:64].hex()},  # EIP-2098, which Permit2 itself would take
        foreign,
        signed(payer, NETWORKS["base"]),
    ):
        asked = asking(payload, requirements())
        await refused(net, sqlite_url, asked, "invalid_permit2_signature")


async def test_an_allowance_is_needed_and_money(net: Devnet, sqlite_url: str) -> None:
    stranger = net.accounts[1]
    await refused(net, sqlite_url, pays(stranger), "permit2_allowance_required")
    approve(net, stranger, 9_999)
    await refused(net, sqlite_url, pays(stranger), "permit2_allowance_required")
    approve(net, stranger, 2**255)
    net.transfer(stranger.address, "0x" + "0b" * 20, net.balance_units(stranger.address) - 9_999)
    await refused(net, sqlite_url, pays(stranger), "permit2_insufficient_balance")


async def test_without_code_at_the_proxy_nothing_succeeds(net: Devnet, sqlite_url: str) -> None:
    """A call to an address without code has status 1 and moves nothing."""
    for empty in (permit2.EXACT_PROXY, permit2.PERMIT2):
        code = net.rpc("eth_getCode", empty, "latest")
        net.rpc("anvil_setCode", empty, "0x")
        await refused(net, sqlite_url, pays(net.accounts[0]), "permit2_proxy_not_deployed")
        net.rpc("anvil_setCode", empty, code)


async def test_a_proxy_that_moves_nothing_is_no_success(net: Devnet, sqlite_url: str) -> None:
    """Status 1 and no Transfer: never a success, and not to be paid again before the deadline."""
    net.rpc("anvil_setCode", permit2.EXACT_PROXY, "0x00")  # STOP
    async with opened(net, sqlite_url, settle_wait_s=1) as ours:
        told = await ours.ask("settle", pays(net.accounts[0]))
        assert told["success"] is False, told


async def test_its_nonce_is_spent_elsewhere_first(net: Devnet, sqlite_url: str) -> None:
    payload = signed(net.accounts[0])
    settle_by_stranger(net, payload)
    await refused(net, sqlite_url, asking(payload, requirements()), "permit2_invalid_nonce")


async def test_somebody_is_faster_than_our_transaction(
    net: Devnet, sqlite_url: str, faulty_node: FaultyNode
) -> None:
    """Claimed here, included by a stranger: found by its nonce in that one's calldata."""
    payload = signed(net.accounts[0])
    faulty_node.fault("eth_sendRawTransaction", "drop")
    async with opened(net, sqlite_url, faulty_node.url, settle_wait_s=1) as ours:
        told = await ours.ask("settle", asking(payload, requirements()))
        assert told["errorReason"] == "settlement_pending"
        theirs = settle_by_stranger(net, payload)
        async with ours.node.db.write() as tx:
            await tx.execute("UPDATE payment SET lease_ms = 0")
    async with opened(net, sqlite_url) as ours:  # a node that reaches the chain
        await work.finish_payments(ours.node)
        told = await ours.ask("settle", asking(payload, requirements()))
        assert (told["success"], told["transaction"]) == (True, theirs)


async def claimed(
    net: Devnet, database: str, node: FaultyNode, payloads: list[dict[str, Any]]
) -> None:
    """Payments that are claimed and signed here, and that no block has."""
    node.fault("eth_sendRawTransaction", "drop")
    async with opened(net, database, node.url, settle_wait_s=1) as ours:
        for payload in payloads:
            told = await ours.ask("settle", asking(payload, requirements()))
            assert told["errorReason"] == "settlement_pending", told
        async with ours.node.db.write() as tx:
            await tx.execute("UPDATE payment SET lease_ms = 0")


def invalidate(net: Devnet, payloads: list[dict[str, Any]]) -> None:
    """The payer takes the nonces back at Permit2."""
    for payload in payloads:
        take_back(net, payload)


def paid_beside(net: Devnet, payloads: list[dict[str, Any]], units: int) -> str:
    """One plain transfer of the payer to the seller, with all these nonces in its calldata."""
    auths = [permit2.parse(payload) for payload in payloads]
    data = selector("transfer(address,uint256)") + address_word(SELLER) + uint_word(units)
    data += b"".join(bytes.fromhex(auth.nonce[2:]) for auth in auths)
    return net.send(auths[0].from_, USDC.address, "0x" + data.hex())


async def looked_at(net: Devnet, database: str) -> list[dict[str, Any]]:
    """The background loop of a node that reaches the chain, once."""
    async with opened(net, database) as ours:
        async with ours.node.db.write() as tx:
            await tx.execute("UPDATE payment SET lease_ms = 0")
        await work.finish_payments(ours.node)
        return await ours.rows()


async def test_what_its_payer_takes_back_ends_as_failed(
    net: Devnet, db_url: str, faulty_node: FaultyNode
) -> None:
    """Not before it is deep enough that no node's logs can lag behind it."""
    payloads = [signed(net.accounts[0])]
    await claimed(net, db_url, faulty_node, payloads)
    invalidate(net, payloads)
    assert [row["state"] for row in await looked_at(net, db_url)] == ["processing"]
    net.rpc("anvil_mine", hex(120))
    (row,) = await looked_at(net, db_url)
    assert (row["state"], row["error_code"]) == ("failed", "invalid_transaction_state")
    async with opened(net, db_url) as ours:
        told = await ours.ask("settle", asking(payloads[0], requirements()))
        assert (told["success"], told["errorReason"]) == (False, "invalid_transaction_state")


async def test_a_transfer_is_one_payments_however_many_nonces_it_carries(
    net: Devnet, db_url: str, faulty_node: FaultyNode
) -> None:
    """The payer takes three payments back and pays for one, in a transaction that names them all:
    one seller's customer has paid."""
    payloads = [signed(net.accounts[0]) for _ in range(3)]
    await claimed(net, db_url, faulty_node, payloads)
    invalidate(net, payloads)
    theirs = paid_beside(net, payloads, 10_000)
    await looked_at(net, db_url)
    net.rpc("anvil_mine", hex(120))
    rows = await looked_at(net, db_url)
    assert sorted(row["state"] for row in rows) == ["failed", "failed", "succeeded"]
    assert [row["tx_hash"] for row in rows if row["state"] == "succeeded"] == [theirs]
    again = await looked_at(net, db_url)
    assert [row["state"] for row in again] == [row["state"] for row in rows]


async def test_less_than_the_amount_is_not_the_payment(
    net: Devnet, sqlite_url: str, faulty_node: FaultyNode
) -> None:
    payloads = [signed(net.accounts[0])]
    await claimed(net, sqlite_url, faulty_node, payloads)
    invalidate(net, payloads)
    paid_beside(net, payloads, 1)
    assert [row["state"] for row in await looked_at(net, sqlite_url)] == ["processing"]
    net.rpc("anvil_mine", hex(120))
    assert [row["state"] for row in await looked_at(net, sqlite_url)] == ["failed"]


async def test_two_payments_in_one_transaction_of_a_stranger_are_two(
    net: Devnet, sqlite_url: str, faulty_node: FaultyNode
) -> None:
    payloads = [signed(net.accounts[0]) for _ in range(2)]
    await claimed(net, sqlite_url, faulty_node, payloads)
    calls = [
        (permit2.EXACT_PROXY, permit2.settle_calldata(permit2.parse(each))) for each in payloads
    ]
    data = multicall.aggregate(calls, allow_failure=False)
    theirs = net.send(net.operator.address, multicall.ADDRESS, "0x" + data.hex())
    rows = await looked_at(net, sqlite_url)
    assert [(row["state"], row["tx_hash"]) for row in rows] == [("succeeded", theirs)] * 2


async def test_other_transfers_are_not_taken_for_it(net: Devnet) -> None:
    payer = net.accounts[0]
    auth = permit2.parse(signed(payer))
    net.transfer(payer.address, SELLER, 10_000)
    rpc = Rpc(NETWORK, [net.rpc_url])
    try:
        spent = Spent(USDC, auth.from_, auth.nonce, SELLER, 10_000)
        assert await METHODS["permit2"].find(rpc, spent, 0) == []
        assert not await METHODS["permit2"].is_used(rpc, spent, "latest")
    finally:
        await rpc.close()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: p.pop("signature"),
        lambda p: p.update(signature="0x"),
        lambda p: p.update(permit2Authorization=[]),
        lambda p: p["permit2Authorization"].pop("nonce"),
        lambda p: p["permit2Authorization"].update(more="1"),
        lambda p: p["permit2Authorization"].update(nonce="0x1"),
        lambda p: p["permit2Authorization"].update(nonce=1),
        lambda p: p["permit2Authorization"].update(deadline=" 5"),
        lambda p: p["permit2Authorization"].update(spender="0x1"),
        lambda p: p["permit2Authorization"]["permitted"].update(amount=str(2**256)),
        lambda p: p["permit2Authorization"]["witness"].update(validAfter="+1"),
        lambda p: p["permit2Authorization"].update(witness=None),
    ],
)
async def test_odd_forms_are_malformed(net: Devnet, sqlite_url: str, spoil: Any) -> None:
    payload = signed(net.accounts[0])
    spoil(payload)
    await refused(net, sqlite_url, asking(payload, requirements()), "invalid_payload")
