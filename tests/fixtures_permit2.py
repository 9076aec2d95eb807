"""Permit2 on a local chain, and payments by it, signed by an independent library."""

from __future__ import annotations

import json
import secrets
import time
from pathlib import Path
from typing import Any

from anvil import permit2 as planted
from anvil.devnet import Account, Devnet
from chain.eth import selector, uint_word
from chain.networks import Network
from chain.schemes import eip2612, permit2, upto
from tests.fixtures_chain import NETWORK, USDC
from wallet_auth.keys import address_word

_COMPILED = Path(__file__).parents[1] / "contracts" / "fixtures" / "compiled.json"
SELLER = "0x" + "5e" * 20


def plant(net: Devnet) -> None:
    """The real Permit2 and the stand-ins for x402's proxies, at their addresses."""
    net.rpc("anvil_setCode", planted.ADDRESS, "0x" + planted.CODE.hex())
    compiled = json.loads(_COMPILED.read_text())
    for name, address in (
        ("ExactPermit2Proxy", permit2.EXACT_PROXY),
        ("UptoPermit2Proxy", upto.PROXY),
    ):
        net.rpc("anvil_setCode", address, compiled[name]["runtime"])


def send_as(net: Devnet, sender: str, to: str, data: bytes) -> str:
    """A transaction of any address, which gets the gas it needs; its hash."""
    net.rpc("anvil_setBalance", sender, hex(10**18))
    net.rpc("anvil_impersonateAccount", sender)
    tx_hash = net.send(sender, to, "0x" + data.hex())
    net.rpc("anvil_stopImpersonatingAccount", sender)
    return tx_hash


def approve(net: Devnet, account: Account, units: int = 2**256 - 1) -> None:
    """Let Permit2 move so much of an account's USDC."""
    data = selector("approve(address,uint256)") + address_word(permit2.PERMIT2) + uint_word(units)
    send_as(net, account.address, USDC.address, data)


def settle_by_stranger(
    net: Devnet, payload: dict[str, Any], extensions: dict[str, Any] | None = None
) -> str:
    """Somebody else hands a payment in, with its permit if it has one; the transaction's hash."""
    data = permit2.settle_calldata(permit2.parse(payload, extensions))
    return net.send(net.operator.address, permit2.EXACT_PROXY, "0x" + data.hex())


def permit(payer: Account, units: int, **change: Any) -> dict[str, Any]:
    """The extension ``eip2612GasSponsoring`` of a payment, as the official clients fill it in:
    the approval of Permit2, signed by eth_account. ``change``: what is signed."""
    from eth_account import Account as Signer

    value = {
        "owner": payer.address,
        "spender": permit2.PERMIT2,
        "value": units,
        "nonce": 0,
        "deadline": int(time.time()) + 300,
    } | change
    kinds = ("address", "address", "uint256", "uint256", "uint256")
    data = {
        "types": {
            "EIP712Domain": [
                {"name": "name", "type": "string"},
                {"name": "version", "type": "string"},
                {"name": "chainId", "type": "uint256"},
                {"name": "verifyingContract", "type": "address"},
            ],
            "Permit": [{"name": n, "type": t} for n, t in zip(value, kinds, strict=True)],
        },
        "primaryType": "Permit",
        "domain": {
            "name": USDC.eip712_name,
            "version": USDC.eip712_version,
            "chainId": NETWORK.chain_id,
            "verifyingContract": USDC.address,
        },
        "message": value,
    }
    signature = Signer.sign_typed_data(payer.private_key, full_message=data).signature.hex()
    info = {
        "from": value["owner"],
        "asset": USDC.address,
        "spender": value["spender"],
        "amount": str(value["value"]),
        "nonce": str(value["nonce"]),
        "deadline": str(value["deadline"]),
        "signature": "0x" + signature.removeprefix("0x"),
        "version": "1",
    }
    return {eip2612.KEY: {"info": info}}


def hand_in_permit(net: Devnet, extensions: dict[str, Any]) -> None:
    """Somebody else gives a permit to the token, alone."""
    found = eip2612.find(extensions)
    assert found is not None
    data = selector("permit(address,address,uint256,uint256,uint8,bytes32,bytes32)")
    data += address_word(found.from_) + address_word(found.spender)
    data += uint_word(found.value_units) + uint_word(found.deadline_s)
    data += uint_word(found.signature[64]) + found.signature[:64]
    tx_hash = net.send(net.operator.address, USDC.address, "0x" + data.hex())
    assert net.receipt(tx_hash)["status"] == "0x1"


def take_back(net: Devnet, payload: dict[str, Any]) -> None:
    """The payer invalidates the nonce at Permit2."""
    given = payload["permit2Authorization"]
    place, bit = divmod(int(given["nonce"]), 256)
    data = selector("invalidateUnorderedNonces(uint256,uint256)") + uint_word(place)
    send_as(net, given["from"].lower(), permit2.PERMIT2, data + uint_word(1 << bit))


def signed(payer: Account, network: Network = NETWORK, **change: Any) -> dict[str, Any]:
    """The scheme's part of a payload, signed by eth_account. ``change``: what is signed."""
    from eth_account import Account as Signer

    value = {
        "token": USDC.address,
        "amount": 10_000,
        "spender": permit2.EXACT_PROXY,
        "nonce": int.from_bytes(secrets.token_bytes(32), "big"),
        "deadline": int(time.time()) + 300,
        "to": SELLER,
        "validAfter": 0,
    } | change
    permitted = {"token": value["token"], "amount": value["amount"]}
    who = [name for name in ("to", "facilitator") if name in value]
    witness = {name: value[name] for name in (*who, "validAfter")}
    head = {"spender": value["spender"], "nonce": value["nonce"], "deadline": value["deadline"]}

    def fields(*pairs: tuple[str, str]) -> list[dict[str, str]]:
        return [{"name": name, "type": kind} for name, kind in pairs]

    data = {
        "types": {
            "EIP712Domain": fields(
                ("name", "string"), ("chainId", "uint256"), ("verifyingContract", "address")
            ),
            "PermitWitnessTransferFrom": fields(
                ("permitted", "TokenPermissions"),
                ("spender", "address"),
                ("nonce", "uint256"),
                ("deadline", "uint256"),
                ("witness", "Witness"),
            ),
            "TokenPermissions": fields(("token", "address"), ("amount", "uint256")),
            "Witness": fields(*((name, "address") for name in who), ("validAfter", "uint256")),
        },
        "primaryType": "PermitWitnessTransferFrom",
        "domain": {
            "name": "Permit2",
            "chainId": network.chain_id,
            "verifyingContract": permit2.PERMIT2,
        },
        "message": {"permitted": permitted, **head, "witness": witness},
    }
    signature = Signer.sign_typed_data(payer.private_key, full_message=data).signature.hex()
    return {
        "signature": "0x" + signature.removeprefix("0x"),
        "permit2Authorization": {
            "from": payer.address,
            "permitted": {"token": value["token"], "amount": str(value["amount"])},
            "spender": value["spender"],
            "nonce": str(value["nonce"]),
            "deadline": str(value["deadline"]),
            "witness": {**witness, "validAfter": str(value["validAfter"])},
        },
    }


def signed_upto(
    payer: Account, facilitator: str, network: Network = NETWORK, **change: Any
) -> dict[str, Any]:
    """The same for the scheme ``upto``: ``facilitator`` may move at most ``amount``."""
    return signed(payer, network, **({"spender": upto.PROXY, "facilitator": facilitator} | change))
