"""A real chain for tests, and payments signed by an independent library.

Import the fixtures you need into a ``conftest.py``: ``chain_session``, ``chain_net``, ``rpc``.
``chain_net`` is one Anvil per worker, put back to how it was after every test; a test that
changes how blocks are made starts its own with ``anvil.devnet.running``.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from anvil.devnet import Account, Devnet, DevnetError, running
from chain.networks import NETWORKS
from chain.rpc import Rpc
from tests import servers

NETWORK = NETWORKS["base-sepolia"]
USDC = NETWORK.usdc


@pytest.fixture(scope="session")
def chain_session() -> Iterator[Devnet]:
    """The worker's chain. Ask for ``chain_net`` instead, which tidies up."""
    try:
        context = running()
        net = context.__enter__()
    except DevnetError as error:
        servers.missing("Anvil", str(error))
    servers.note("Anvil", str(net.rpc("web3_clientVersion")))
    try:
        yield net
    finally:
        context.__exit__(None, None, None)


@pytest.fixture
def chain_net(chain_session: Devnet) -> Iterator[Devnet]:
    """A chain with real USDC. What the test does to it is undone afterwards."""
    snapshot = chain_session.rpc("evm_snapshot")
    yield chain_session
    assert chain_session.rpc("evm_revert", snapshot) is True


@pytest.fixture
async def rpc(chain_net: Devnet) -> AsyncIterator[Rpc]:
    """A client of ``chain_net``."""
    client = Rpc(NETWORK, [chain_net.rpc_url])
    yield client
    await client.close()


def typed_data(
    from_: str,
    to: str,
    units: int,
    *,
    nonce: str,
    valid_after_s: int = 0,
    valid_before_s: int | None = None,
    name: str = USDC.eip712_name,
    chain_id: int = NETWORK.chain_id,
    asset: str = USDC.address,
) -> dict[str, Any]:
    """TransferWithAuthorization as EIP-712 typed data, for eth_account."""
    if valid_before_s is None:
        valid_before_s = int(time.time()) + 3_600
    names = ("from", "to", "value", "validAfter", "validBefore", "nonce")
    types = ("address", "address", "uint256", "uint256", "uint256", "bytes32")
    values = (from_, to, units, valid_after_s, valid_before_s, nonce)
    return {
        "types": {
            "EIP712Domain": [
                {"name": "name", "type": "string"},
                {"name": "version", "type": "string"},
                {"name": "chainId", "type": "uint256"},
                {"name": "verifyingContract", "type": "address"},
            ],
            "TransferWithAuthorization": [
                {"name": n, "type": t} for n, t in zip(names, types, strict=True)
            ],
        },
        "primaryType": "TransferWithAuthorization",
        "domain": {"name": name, "version": "2", "chainId": chain_id, "verifyingContract": asset},
        "message": dict(zip(names, values, strict=True)),
    }


def payment(
    payer: Account, to: str, units: int, *, from_: str | None = None, **fields: Any
) -> dict[str, Any]:
    """The scheme's part of an x402 payload, signed by ``payer`` with eth_account.

    ``from_`` differs from the payer's address for contract wallets; the other fields are those
    of ``typed_data``.
    """
    from eth_account import Account as Signer

    fields.setdefault("nonce", "0x" + secrets.token_hex(32))
    data = typed_data(from_ or payer.address, to, units, **fields)
    signed = Signer.sign_typed_data(payer.private_key, full_message=data)
    message = data["message"]
    return {
        "signature": "0x" + signed.signature.hex().removeprefix("0x"),
        "authorization": {key: str(value) for key, value in message.items()},
    }
