"""An EIP-2612 permit for Permit2 beside a payment: read strictly, and settled in one call."""

from __future__ import annotations

import time
from typing import Any

import pytest

from anvil.devnet import Account, Devnet
from chain.errors import Rejected
from chain.eth import selector, uint_word
from chain.rpc import Rpc
from chain.schemes import eip2612, permit2
from tests.fixtures_chain import USDC
from tests.fixtures_permit2 import (
    SELLER,
    approve,
    hand_in_permit,
    permit,
    plant,
    send_as,
    settle_by_stranger,
    signed,
    take_back,
)
from wallet_auth.keys import address_word

UNITS = 10_000
NOW_S = int(time.time())


@pytest.fixture
def net(chain_net: Devnet) -> Devnet:
    plant(chain_net)
    return chain_net


def info(payer: Account, **change: Any) -> dict[str, Any]:
    """``change``: what stands there, whatever was signed; None: it is missing."""
    given = permit(payer, UNITS)[eip2612.KEY]["info"] | change
    return {eip2612.KEY: {"info": {name: v for name, v in given.items() if v is not None}}}


# --- how it is read ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extensions",
    [
        None,
        [],
        {},
        {"payment-identifier": {}},
        {eip2612.KEY: None},
        {eip2612.KEY: "signature"},
        {eip2612.KEY: {"info": []}},
        # What a client sends back that has approved Permit2 already, or cannot look.
        {eip2612.KEY: {"info": {"description": "…", "version": "1"}, "schema": {}}},
    ],
)
def test_what_has_no_signature_is_no_permit(extensions: object) -> None:
    assert eip2612.find(extensions) is None


def test_what_a_server_declared_stands_beside_it(net: Devnet) -> None:
    payer = net.accounts[5]
    found = eip2612.find(info(payer, description="told by the server"))
    assert found is not None
    assert (found.from_, found.asset, found.spender) == (
        payer.address.lower(),
        USDC.address,
        permit2.PERMIT2,
    )
    assert (found.value_units, found.nonce, len(found.signature)) == (UNITS, 0, 65)


ODD = ("0x2710", "1e4", "10_000", " 10000", "", "-1", "1.0", "١", str(2**256), "9" * 79, 10_000)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("amount", "nonce", "deadline") for value in (*ODD, None)),
        *(
            (name, value)
            for name in ("from", "asset", "spender")
            for value in ("", "0x12", "ab" * 20, 7, None, ["0x" + "00" * 20])
        ),
        *(("version", value) for value in ("2", "1.0", 1, "", None)),
        *(("signature", value) for value in ("", "0x", "0x" + "ab" * 64, "0x" + "ab" * 66)),
        *(("signature", value) for value in ("0x" + "zz" * 65, "ab" * 65, 7, ["0x"])),
    ],
)
def test_odd_forms_are_refused(net: Devnet, name: str, value: object) -> None:
    with pytest.raises(Rejected) as raised:
        eip2612.find(info(net.accounts[5], **{name: value}))
    assert raised.value.code == "invalid_eip2612_extension_format"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"from": "0x" + "0b" * 20}, "eip2612_from_mismatch"),
        ({"asset": "0x" + "0b" * 20}, "eip2612_asset_mismatch"),
        ({"spender": permit2.EXACT_PROXY}, "eip2612_spender_not_permit2"),
        ({"deadline": str(NOW_S + 5)}, "eip2612_deadline_expired"),
        ({"amount": str(UNITS - 1)}, "permit2_2612_amount_mismatch"),
        ({"amount": str(2**256 - 1)}, "permit2_2612_amount_mismatch"),
    ],
)
def test_it_is_for_this_very_payment(net: Devnet, change: dict[str, Any], code: str) -> None:
    payer = net.accounts[5]
    check(permit2.parse(signed(payer), info(payer, deadline=str(NOW_S + 6))))
    with pytest.raises(Rejected) as raised:
        check(permit2.parse(signed(payer), info(payer, **change)))
    assert raised.value.code == code


def check(auth: permit2.Authorization) -> None:
    permit2.check(auth, asset=USDC, pay_to=SELLER, amount_units=UNITS, now_s=NOW_S)


# --- what the chain says ----------------------------------------------------------------------


def allowance(net: Devnet, payer: Account) -> int:
    data = selector("allowance(address,address)") + address_word(payer.address.lower())
    data += address_word(permit2.PERMIT2)
    call = {"to": USDC.address, "data": "0x" + data.hex()}
    return int(net.rpc("eth_call", call, "latest"), 16)


def sponsored(payer: Account, **change: Any) -> permit2.Authorization:
    return permit2.parse(signed(payer), permit(payer, UNITS, **change))


async def refused(rpc: Rpc, auth: permit2.Authorization) -> Rejected:
    with pytest.raises(Rejected) as raised:
        await permit2.settable(rpc, USDC, auth)
    return raised.value


async def test_one_call_approves_and_pays(net: Devnet, rpc: Rpc) -> None:
    payer = net.accounts[5]
    before = net.balance_units(SELLER)
    auth = sponsored(payer)
    kind, form = await permit2.settable(rpc, USDC, auth)
    assert (kind, form) == ("key", auth)
    tx_hash = settle_by_stranger(net, signed(payer), permit(payer, UNITS))
    receipt = net.receipt(tx_hash)
    assert receipt["status"] == "0x1"
    assert int(receipt["gasUsed"], 16) < permit2.SIMULATION_GAS
    assert net.balance_units(SELLER) == before + UNITS
    assert allowance(net, payer) == 0  # what was permitted is what was moved


async def test_a_permit_that_was_handed_in_already_is_left_out(net: Devnet, rpc: Rpc) -> None:
    payer = net.accounts[5]
    payload, extensions = signed(payer), permit(payer, UNITS)
    hand_in_permit(net, extensions)
    auth = permit2.parse(payload, extensions)
    _, form = await permit2.settable(rpc, USDC, auth)
    assert form == permit2.parse(payload)
    # And if it is sent all the same, the proxy does not mind.
    before = net.balance_units(SELLER)
    receipt = net.receipt(settle_by_stranger(net, payload, extensions))
    assert receipt["status"] == "0x1"
    assert net.balance_units(SELLER) == before + UNITS


async def test_where_it_is_approved_the_permit_stays_unused(net: Devnet, rpc: Rpc) -> None:
    payer = net.accounts[5]
    approve(net, payer)
    # Not even a permit that could not be used is a reason to refuse.
    _, form = await permit2.settable(rpc, USDC, sponsored(payer, nonce=7))
    assert form.permit is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"nonce": 1}, "nonce 1, and the token is at 0"),
        ({"deadline": NOW_S + 10**6, "owner": "0x" + "0b" * 20}, "the call fails"),
    ],
)
async def test_a_permit_that_the_token_refuses(
    net: Devnet, rpc: Rpc, change: dict[str, Any], said: str
) -> None:
    payer = net.accounts[5]
    extensions = permit(payer, UNITS, **change)
    extensions[eip2612.KEY]["info"]["from"] = payer.address
    refusal = await refused(rpc, permit2.parse(signed(payer), extensions))
    assert refusal.code == permit2.ALLOWANCE_REQUIRED
    assert said in refusal.detail


async def test_a_permit_that_was_used_and_spent(net: Devnet, rpc: Rpc) -> None:
    """By another payment: this one needs a permit of its own."""
    payer = net.accounts[5]
    settle_by_stranger(net, signed(payer), permit(payer, UNITS))
    refusal = await refused(rpc, sponsored(payer))
    assert (refusal.code, "the token is at 1" in refusal.detail) == (
        "permit2_allowance_required",
        True,
    )
    assert (await permit2.settable(rpc, USDC, sponsored(payer, nonce=1)))[0] == "key"


async def test_neither_a_used_nonce_nor_missing_money_is_a_matter_of_approval(
    net: Devnet, rpc: Rpc
) -> None:
    payer = net.accounts[5]
    payload = signed(payer)
    take_back(net, payload)
    used = permit2.parse(payload, permit(payer, UNITS))
    assert (await refused(rpc, used)).code == "permit2_invalid_nonce"
    data = selector("transfer(address,uint256)") + address_word(SELLER)
    send_as(net, payer.address, USDC.address, data + uint_word(net.balance_units(payer.address)))
    assert (await refused(rpc, sponsored(payer))).code == "permit2_insufficient_balance"


async def test_another_amount_is_refused_by_the_proxy_too(net: Devnet, rpc: Rpc) -> None:
    payer = net.accounts[5]
    auth = permit2.parse(signed(payer), permit(payer, UNITS + 1))
    with pytest.raises(Rejected) as raised:
        await permit2.verify(rpc, USDC, auth)
    assert raised.value.code == permit2.ALLOWANCE_REQUIRED


async def test_bad_signatures_are_refused_with_a_good_permit(net: Devnet, rpc: Rpc) -> None:
    payer = net.accounts[5]
    foreign = signed(net.accounts[6])
    foreign["permit2Authorization"]["from"] = payer.address
    refusal = await refused(rpc, permit2.parse(foreign, permit(payer, UNITS)))
    assert refusal.code == "invalid_permit2_signature"
