"""Settling for others what a wallet pays by Permit2 that never approved it (EIP-2612)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from anvil.devnet import Devnet
from chain.schemes import eip2612, permit2
from gateway import work
from tests.fixtures_chain import FaultyNode
from tests.fixtures_permit2 import (
    approve,
    hand_in_permit,
    permit,
    plant,
    settle_by_stranger,
    signed,
    take_back,
)
from tests.gateway.facilitator.parts import SELLER, Facilitator, asking, opened
from tests.gateway.facilitator.test_permit2 import requirements

UNITS = 10_000


@pytest.fixture
def net(chain_net: Devnet) -> Devnet:
    """A chain with Permit2 and the proxy; nobody has approved anything."""
    plant(chain_net)
    return chain_net


def sponsored(payload: dict[str, Any], extensions: dict[str, Any]) -> dict[str, Any]:
    asked = asking(payload, requirements())
    asked["paymentPayload"]["extensions"] = extensions
    return asked


async def test_it_says_that_it_takes_them(net: Devnet, sqlite_url: str) -> None:
    async with opened(net, sqlite_url) as ours:
        told = (await ours.http.get("/farebox/x402/supported")).json()
        assert eip2612.KEY in told["extensions"]
        # The other one would have us send what its payer signed as a transaction.
        assert "erc20ApprovalGasSponsoring" not in told["extensions"]


async def test_it_settles_once_however_often_it_is_asked(net: Devnet, db_url: str) -> None:
    payer = net.accounts[5]
    net.rpc("anvil_setBalance", payer.address, "0x0")
    asked = sponsored(signed(payer), permit(payer, UNITS))
    async with opened(net, db_url) as ours:
        before, sent = net.balance_units(SELLER), ours.sent()
        assert (await ours.ask("verify", asked)) == {"isValid": True, "payer": payer.address}
        told = await asyncio.gather(*(ours.ask("settle", asked) for _ in range(3)))
        assert told[0]["success"] is True, told
        assert told == [told[0]] * 3
        assert (ours.sent(), net.balance_units(SELLER)) == (sent + 1, before + UNITS)
        verdict = await ours.ask("verify", asked)
        assert verdict["invalidReason"] == "invalid_transaction_state"
        (row,) = await ours.rows()
        assert (row["method"], row["state"]) == ("permit2", "succeeded")


async def refused(ours: Facilitator, asked: dict[str, Any], reason: str) -> None:
    """By both, and nothing is written or sent."""
    sent = ours.sent()
    assert (await ours.ask("verify", asked))["invalidReason"] == reason
    told = await ours.ask("settle", asked)
    assert (told["success"], told["errorReason"], told["transaction"]) == (False, reason, "")
    assert ours.sent() == sent
    assert await ours.rows() == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"amount": 10_000}, "invalid_eip2612_extension_format"),
        ({"signature": ""}, "invalid_eip2612_extension_format"),
        ({"version": "2"}, "invalid_eip2612_extension_format"),
        ({"from": SELLER}, "eip2612_from_mismatch"),
        ({"asset": SELLER}, "eip2612_asset_mismatch"),
        ({"spender": permit2.EXACT_PROXY}, "eip2612_spender_not_permit2"),
        ({"deadline": "1700000000"}, "eip2612_deadline_expired"),
        ({"amount": str(UNITS + 1)}, "permit2_2612_amount_mismatch"),
        # The token looks at these.
        ({"nonce": "5", "deadline": "9999999999"}, "permit2_allowance_required"),
        ({"signature": "0x" + "1b" * 65}, "permit2_allowance_required"),
    ],
)
async def test_a_permit_that_is_not_the_one_is_refused(
    net: Devnet, sqlite_url: str, change: dict[str, Any], reason: str
) -> None:
    payer = net.accounts[5]
    extensions = permit(payer, UNITS)
    extensions[eip2612.KEY]["info"] |= change
    async with opened(net, sqlite_url) as ours:
        await refused(ours, sponsored(signed(payer), extensions), reason)


async def test_an_echo_is_no_permit(net: Devnet, sqlite_url: str) -> None:
    payer = net.accounts[5]
    echo = {eip2612.KEY: {"info": {"version": "1"}, "schema": {}}, "bazaar": {}}
    async with opened(net, sqlite_url) as ours:
        await refused(ours, sponsored(signed(payer), echo), "permit2_allowance_required")
        approve(net, payer)
        told = await ours.ask("settle", sponsored(signed(payer), echo))
        assert told["success"] is True


async def test_what_was_taken_back_is_refused(net: Devnet, sqlite_url: str) -> None:
    payer = net.accounts[5]
    payload = signed(payer)
    take_back(net, payload)
    async with opened(net, sqlite_url) as ours:
        await refused(ours, sponsored(payload, permit(payer, UNITS)), "permit2_invalid_nonce")


async def test_between_verify_and_settle_the_permit_is_used(net: Devnet, db_url: str) -> None:
    """With its allowance left the payment needs none; without it nothing is claimed."""
    payer = net.accounts[5]
    extensions = permit(payer, UNITS)
    left, gone = (sponsored(signed(payer), extensions) for _ in range(2))
    async with opened(net, db_url) as ours:
        for asked in (left, gone):
            assert (await ours.ask("verify", asked))["isValid"] is True
        hand_in_permit(net, extensions)
        assert (await ours.ask("settle", left))["success"] is True
        sent = ours.sent()
        told = await ours.ask("settle", gone)
        assert told["errorReason"] == "permit2_allowance_required"
        assert (ours.sent(), len(await ours.rows())) == (sent, 1)
        # A new permit makes the very same payment good.
        gone["paymentPayload"]["extensions"] = permit(payer, UNITS, nonce=1)
        assert (await ours.ask("settle", gone))["success"] is True


@pytest.mark.parametrize("how", ["ours", "strangers"])
async def test_one_that_is_claimed_ends_by_whatever_moved_it(
    net: Devnet, db_url: str, faulty_node: FaultyNode, how: str
) -> None:
    payer = net.accounts[5]
    payload, extensions = signed(payer), permit(payer, UNITS)
    asked = sponsored(payload, extensions)
    faulty_node.fault("eth_sendRawTransaction", "drop")
    async with opened(net, db_url, faulty_node.url, settle_wait_s=1) as ours:
        before = net.balance_units(SELLER)
        told = await ours.ask("settle", asked)
        assert (told["success"], told["errorReason"]) == (False, "settlement_pending")
        if how == "strangers":
            tx_hash = settle_by_stranger(net, payload, extensions)
        else:
            hand_in_permit(net, extensions)
            tx_hash = await sent_now(ours)
        async with ours.node.db.write() as tx:
            await tx.execute("UPDATE payment SET lease_ms = 0")
    async with opened(net, db_url) as ours:  # a node that reaches the chain
        await work.finish_payments(ours.node)
        again = await ours.ask("settle", asked)
        assert (again["success"], again["transaction"]) == (True, tx_hash)
        assert net.balance_units(SELLER) == before + UNITS
        assert [row["state"] for row in await ours.rows()] == ["succeeded"]


async def sent_now(ours: Facilitator) -> str:
    """What was signed reaches the chain."""
    async with ours.node.db.read() as tx:
        raw = bytes(await tx.fetchval("SELECT raw FROM chain_tx"))
    tx_hash: str = ours.net.rpc("eth_sendRawTransaction", "0x" + raw.hex())
    assert ours.net.receipt(tx_hash)["status"] == "0x1"
    return tx_hash


async def test_a_permit_is_sent_with_one_payment_at_a_time(
    net: Devnet, db_url: str, faulty_node: FaultyNode
) -> None:
    payer = net.accounts[5]
    asked = [sponsored(signed(payer), permit(payer, UNITS)) for _ in range(2)]
    faulty_node.fault("eth_sendRawTransaction", "drop")
    async with opened(net, db_url, faulty_node.url, settle_wait_s=1) as ours:
        first = await ours.ask("settle", asked[0])
        assert first["errorReason"] == "settlement_pending"
        second = await ours.ask("settle", asked[1])
        assert second["errorReason"] == "permit2_allowance_required"
        assert "is under way" in second["errorMessage"]
        assert len(await ours.rows()) == 1
