"""The payments of tests/vectors/x402-vectors.json, sent to verify and to settle.

Each was judged by the official SDKs. What is good settles with real USDC, what is not is refused
before anything is sent.
"""

from __future__ import annotations

import time
from typing import Any

import pytest

from anvil.devnet import Devnet
from tests.chain.test_x402_vectors import INVALID, META, VECTORS
from tests.fixtures_chain import payment
from tests.fixtures_wallets import wallets
from tests.gateway.facilitator.parts import SELLER, asking, opened, requirements

PAYEE = META["payTo"].lower()
KEYS = [v for v in VECTORS["valid"] if "ERC-" not in v["name"]]
KEYS += [v for v in VECTORS["python_generated"] if "echo" not in v["name"]]
TIMED = "validBefore within 6s buffer"  # made again, because its time has passed

REASONS = INVALID | {
    "6492 factory not allowlisted": "invalid_exact_evm_payload_signature",
    "accepted.network mismatch": "invalid_network",
    "accepted.scheme mismatch": "invalid_scheme",
    "requirements lack EIP-712 domain": "invalid_payment_requirements",
    "asset not a contract": "invalid_payment_requirements",
    "x402Version 3": "invalid_x402_version",
}


def whole(vector: dict[str, Any]) -> dict[str, Any]:
    return {
        "x402Version": vector["payload"]["x402Version"],
        "paymentPayload": vector["payload"],
        "paymentRequirements": vector["requirements"],
    }


def test_every_vector_is_here() -> None:
    assert len(KEYS) == 8
    assert REASONS.keys() == {v["name"] for v in VECTORS["invalid"]}


@pytest.mark.parametrize("vector", KEYS, ids=lambda v: v["name"])
async def test_a_good_one_settles(
    chain_net: Devnet, sqlite_url: str, vector: dict[str, Any]
) -> None:
    asked = whole(vector)
    payer = vector["payload"]["payload"]["authorization"]["from"]
    async with opened(chain_net, sqlite_url) as ours:
        before, sent = chain_net.balance_units(PAYEE), ours.sent()
        assert await ours.ask("verify", asked) == {"isValid": True, "payer": payer}
        assert ours.sent() == sent
        told = await ours.ask("settle", asked)
        network = vector["requirements"]["network"]
        tx_hash = told.pop("transaction")
        assert told == {"success": True, "network": network, "payer": payer}
        assert chain_net.receipt(tx_hash)["status"] == "0x1"
        assert chain_net.balance_units(PAYEE) == before + 10_000
        assert ours.sent() == sent + 1
        (row,) = await ours.rows()
        assert (row["provider"], row["state"], row["lot_id"]) == ("facilitator", "succeeded", None)


@pytest.mark.parametrize("vector", VECTORS["invalid"], ids=lambda v: v["name"])
async def test_a_bad_one_is_refused_and_nothing_is_sent(
    chain_net: Devnet, sqlite_url: str, vector: dict[str, Any]
) -> None:
    asked = whole(vector)
    if vector["name"] == TIMED:
        payer = chain_net.accounts[0]
        wanted = vector["requirements"]
        near = payment(payer, PAYEE, 10_000, valid_before_s=int(time.time()) + 3)
        asked = asking(near, wanted)
    async with opened(chain_net, sqlite_url) as ours:
        before, sent = chain_net.balance_units(PAYEE), ours.sent()
        verdict = await ours.ask("verify", asked)
        told = await ours.ask("settle", asked)
        reason = REASONS[vector["name"]]
        assert (verdict["isValid"], verdict["invalidReason"]) == (False, reason), verdict
        assert (told["success"], told["errorReason"], told["transaction"]) == (False, reason, "")
        assert told["network"] == vector["requirements"]["network"]
        assert verdict["invalidMessage"] == told["errorMessage"] != ""
        assert ours.sent() == sent
        assert chain_net.balance_units(PAYEE) == before
        assert await ours.rows() == []


async def test_a_deployed_contract_wallet_pays(chain_net: Devnet, sqlite_url: str) -> None:
    made = wallets(chain_net)
    made.deploy()
    async with opened(chain_net, sqlite_url) as ours:
        asked = asking(made.pay(SELLER))
        assert (await ours.ask("verify", asked))["isValid"] is True
        told = await ours.ask("settle", asked)
        assert told["success"] is True, told
        assert chain_net.balance_units(made.address) == 990_000


async def test_a_wallet_of_a_listed_factory_pays_once_it_is_deployed(
    chain_net: Devnet, sqlite_url: str
) -> None:
    """Good as soon as it is signed; the gas account never makes the payer's call."""
    made = wallets(chain_net)
    asked = asking(made.wrap(made.pay(SELLER)))
    async with opened(chain_net, sqlite_url, erc6492_factories=[made.factory]) as ours:
        sent = ours.sent()
        assert (await ours.ask("verify", asked))["isValid"] is True
        told = await ours.ask("settle", asked)
        assert told["errorReason"] == "invalid_exact_evm_payload_undeployed_smart_wallet"
        assert ours.sent() == sent
        assert chain_net.rpc("eth_getCode", made.address, "latest") == "0x"
        made.deploy()
        assert (await ours.ask("verify", asked))["isValid"] is True
        told = await ours.ask("settle", asked)
        assert told["success"] is True, told
        assert ours.sent() == sent + 1
        assert chain_net.balance_units(made.address) == 990_000


async def test_a_wallet_of_another_factory_is_refused(chain_net: Devnet, sqlite_url: str) -> None:
    made = wallets(chain_net)
    for listed in ([], ["0x" + "fa" * 20]):
        async with opened(chain_net, sqlite_url, erc6492_factories=listed) as ours:
            for what in ("verify", "settle"):
                told = await ours.ask(what, asking(made.wrap(made.pay(SELLER))))
                reason = told.get("invalidReason") or told["errorReason"]
                assert reason == "invalid_exact_evm_payload_signature"
            assert await ours.rows() == []


@pytest.mark.parametrize(
    "change",
    [
        {"amount": 10000},
        {"amount": "0x2710"},
        {"amount": " 10000"},
        {"amount": "+10000"},
        {"amount": "1e4"},
        {"amount": "10000.0"},
        {"amount": "10_000"},
        {"amount": "٣"},
        {"amount": "0"},
        {"amount": str(2**63)},
        {"amount": None},
        {"payTo": "0x1"},
        {"asset": "USDC"},
        {"extra": None},
        {"extra": {"name": "USD Coin", "version": "2"}},
        {"extra": {"name": "USDC", "version": 2}},
    ],
    ids=str,
)
async def test_odd_requirements_are_refused(
    chain_net: Devnet, sqlite_url: str, change: dict[str, Any]
) -> None:
    payer = chain_net.accounts[0]
    asked = asking(payment(payer, requirements()["payTo"], 10_000), requirements(**change))
    async with opened(chain_net, sqlite_url) as ours:
        assert (await ours.ask("verify", asked))["invalidReason"] == "invalid_payment_requirements"
        assert (await ours.ask("settle", asked))["errorReason"] == "invalid_payment_requirements"
        assert await ours.rows() == []
