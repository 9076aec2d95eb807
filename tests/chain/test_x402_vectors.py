"""The payments of tests/vectors/x402-vectors.json: made by the official clients, judged here."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from anvil.devnet import Devnet
from chain.errors import Rejected
from chain.networks import Asset
from chain.rpc import Rpc
from chain.schemes import eip3009
from tests.fixtures_chain import USDC, wallet_artifact

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "vectors" / "x402-vectors.json").read_text()
)
META = VECTORS["meta"]
MADE_S = 1_795_207_556  # when the vectors were made

CONTRACT_WALLET = "v2-exact ERC-1271 deployed wallet"
VALID = [v for v in VECTORS["valid"] if "6492" not in v["name"]]
VALID += [v for v in VECTORS["python_generated"] if "echo" not in v["name"]]

_PREFIX = "invalid_exact_evm_payload_"
# The code of the specification's core list; official SDKs spell several of them differently.
INVALID = {
    "6492 factory not allowlisted": _PREFIX + "undeployed_smart_wallet",
    "recipient mismatch": _PREFIX + "recipient_mismatch",
    "v1 recipient mismatch": _PREFIX + "recipient_mismatch",
    "value too low": _PREFIX + "authorization_value_mismatch",
    "value too high": _PREFIX + "authorization_value_mismatch",
    "expired validBefore": _PREFIX + "authorization_valid_before",
    "validBefore within 6s buffer": _PREFIX + "authorization_valid_before",
    "validAfter in future": _PREFIX + "authorization_valid_after",
    "signature bit-flip": _PREFIX + "signature",
    "signed by another key": _PREFIX + "signature",
    "signed for wrong chainId domain": _PREFIX + "signature",
    "signed for wrong token name": _PREFIX + "signature",
    "signed for wrong verifyingContract": _PREFIX + "signature",
    "high-s malleated signature": _PREFIX + "signature",
    "asset not a contract": _PREFIX + "signature",
    "insufficient balance (valid sig, unfunded key)": "insufficient_funds",
    # Malformed: not a payment at all.
    "missing signature": "invalid_payload",
    "empty signature 0x": "invalid_payload",
    "missing authorization": "invalid_payload",
    "nonce short": "invalid_payload",
    "value as hex string": "invalid_payload",
    "value with plus/space": "invalid_payload",
    "value as JSON number": "invalid_payload",
    "value negative": "invalid_payload",
}
# About the envelope, not the scheme: the gateway compares it with its own offers.
ENVELOPE = {
    "accepted.network mismatch",
    "accepted.scheme mismatch",
    "requirements lack EIP-712 domain",
    "x402Version 3",
}


async def _judge(rpc: Rpc, vector: dict[str, Any], now_s: int = MADE_S) -> str:
    wanted = vector["requirements"]
    asset = Asset(wanted["asset"].lower(), "USDC", 6, USDC.eip712_name, USDC.eip712_version)
    auth = eip3009.parse(vector["payload"]["payload"])
    amount = int(wanted.get("amount") or wanted["maxAmountRequired"])
    eip3009.check(auth, pay_to=wanted["payTo"], amount_units=amount, now_s=now_s)
    return await eip3009.verify(rpc, asset, auth, now_s)


def test_every_vector_is_accounted_for() -> None:
    assert INVALID.keys() | ENVELOPE == {v["name"] for v in VECTORS["invalid"]}
    assert not INVALID.keys() & ENVELOPE
    assert len(VALID) == 9


@pytest.mark.parametrize("vector", VALID, ids=lambda v: v["name"])
async def test_valid_ones_pass_and_settle(
    chain_net: Devnet, rpc: Rpc, vector: dict[str, Any]
) -> None:
    if vector["name"] == CONTRACT_WALLET:
        # The wallet of the vectors is not published; Circle's own stand-in says yes like it.
        wallet = META["wallet_deployed"]
        code = wallet_artifact("MockERC1271WalletWithCustomValidation")["deployedBytecode"]
        chain_net.rpc("anvil_setCode", wallet, code)
        chain_net.rpc("anvil_setStorageAt", wallet, "0x0", f"0x{1 << 160:064x}")
        chain_net.mint(wallet.lower(), 1_000_000)
    kind = "contract" if vector["name"] == CONTRACT_WALLET else "key"
    assert await _judge(rpc, vector) == kind
    auth = eip3009.parse(vector["payload"]["payload"])
    before = chain_net.balance_units(META["payTo"].lower())
    data = "0x" + eip3009.transfer_calldata(auth).hex()
    chain_net.send(chain_net.settler.address, USDC.address, data)
    assert chain_net.balance_units(META["payTo"].lower()) == before + 10_000


@pytest.mark.parametrize(
    "vector", [v for v in VECTORS["invalid"] if v["name"] in INVALID], ids=lambda v: v["name"]
)
async def test_invalid_ones_are_refused_with_the_specs_code(
    rpc: Rpc, vector: dict[str, Any]
) -> None:
    now_s = MADE_S
    if vector["name"] == "validBefore within 6s buffer":
        now_s = int(vector["payload"]["payload"]["authorization"]["validBefore"]) - 3
    with pytest.raises(Rejected) as error:
        await _judge(rpc, vector, now_s)
    assert error.value.code == INVALID[vector["name"]]


async def test_a_wallet_that_is_not_deployed_is_refused(rpc: Rpc) -> None:
    """Valid only where somebody allows a factory; nobody can here (ERC-6492 is denied)."""
    vector = next(v for v in VECTORS["valid"] if "6492" in v["name"])
    with pytest.raises(Rejected) as error:
        await _judge(rpc, vector)
    assert error.value.code == INVALID["6492 factory not allowlisted"]
    assert "ERC-6492" in error.value.detail


def test_what_malformed_headers_decode_to_is_no_payload() -> None:
    decoded = 0
    for vector in VECTORS["malformed_headers"]:
        try:
            value = json.loads(base64.b64decode(vector["header"], validate=True))
        except ValueError:
            continue
        if isinstance(value, dict):
            continue
        decoded += 1
        with pytest.raises(Rejected) as error:
            eip3009.parse(value)
        assert error.value.code == "invalid_payload"
    assert decoded >= 2
