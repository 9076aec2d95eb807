"""Contract wallets of a factory, there or not yet there, and signatures as ERC-6492 wraps them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anvil.devnet import Account, Devnet
from tests.fixtures_chain import deploy, payment

SUFFIX = bytes.fromhex("6492" * 16)
FACTORY = "0x" + "fa" * 20
FIXTURES = Path(__file__).parents[1] / "contracts" / "fixtures"
COMPILED: dict[str, Any] = json.loads((FIXTURES / "compiled.json").read_text())


def wrapped(inner: bytes, call: bytes = b"call", factory: str = FACTORY) -> bytes:
    """A signature and what would deploy its wallet."""
    from eth_abi import encode

    made: bytes = encode(["address", "bytes", "bytes"], [factory, call, inner])
    return made + SUFFIX


@dataclass(frozen=True, slots=True)
class Wallets:
    """A factory, and the wallet it would make for an owner."""

    net: Devnet
    factory: str
    owner: Account
    address: str

    @property
    def deploy_call(self) -> bytes:
        from eth_abi import encode
        from eth_utils import function_signature_to_4byte_selector as selector

        arguments = encode(["address", "bytes32"], [self.owner.address, bytes(32)])
        return bytes(selector("deploy(address,bytes32)")) + arguments

    def deploy(self) -> None:
        """Somebody, not the gateway, deploys it."""
        self.net.send(self.owner.address, self.factory, "0x" + self.deploy_call.hex())
        assert self.net.rpc("eth_getCode", self.address, "latest") != "0x"

    def pay(self, to: str, units: int = 10_000, **fields: Any) -> dict[str, Any]:
        """Paid by the wallet, signed by its owner, without a wrapper."""
        return payment(self.owner, to, units, from_=self.address, **fields)

    def wrap(
        self, signed: dict[str, Any], *, factory: str | None = None, call: bytes | None = None
    ) -> dict[str, Any]:
        """The same payment, its signature wrapped."""
        inner = bytes.fromhex(signed["signature"][2:])
        call = self.deploy_call if call is None else call
        return signed | {"signature": "0x" + wrapped(inner, call, factory or self.factory).hex()}


def wallets(net: Devnet, units: int = 1_000_000) -> Wallets:
    """A factory on the chain, and the address of a wallet that is not there yet and has money."""
    from eth_abi import encode
    from eth_utils import function_signature_to_4byte_selector as selector

    owner = net.accounts[3]
    factory = deploy(net, owner.address, COMPILED["SmartWalletFactory"]["creation"])
    data = bytes(selector("addressOf(address,bytes32)"))
    data += encode(["address", "bytes32"], [owner.address, bytes(32)])
    word: str = net.rpc("eth_call", {"to": factory, "data": "0x" + data.hex()}, "latest")
    address = "0x" + word[-40:]
    net.mint(address, units)
    return Wallets(net, factory, owner, address)
