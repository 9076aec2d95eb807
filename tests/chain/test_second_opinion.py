"""web3 and eth_account against our own client: they agree, and what is broken is found."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sha3
from coincurve import PrivateKey, PublicKey
from eth_abi.abi import encode

from anvil.devnet import Devnet
from chain import sender, tokens
from chain.errors import Unavailable
from chain.eth import bytes_tail, selector, uint_word
from chain.networks import NETWORKS, Asset, Network
from chain.rpc import Rpc
from chain.schemes import eip3009
from chain.second_opinion import differences, library_fault
from chain.tokens import Standing
from tests.fixtures_chain import NETWORK, USDC, FaultyNode
from tests.servers import until
from wallet_auth import keys

ASSETS = [(NETWORK, USDC)]
ROOT = Path(__file__).parents[2]


def output(script: str, **env: str) -> str:
    """What a program that has loaded nothing yet prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, **env},
    )
    return done.stdout


# --- the libraries --------------------------------------------------------------------------


def test_the_libraries_agree_for_every_network() -> None:
    assert (
        library_fault([(row, asset) for row in NETWORKS.values() for asset in row.assets]) is None
    )


# A library that computes wrongly cannot be had for a test, so each of these stands in for one.


@pytest.mark.parametrize("longest", [0, 135, 271])
def test_a_broken_keccak_is_found(monkeypatch: pytest.MonkeyPatch, longest: int) -> None:
    """Also one that is right for short texts, as all are that fit into fewer blocks."""

    def hashed(text: bytes) -> Any:
        return sha3.keccak_256(text) if len(text) <= longest else sha3.sha3_256(text)

    monkeypatch.setattr(keys, "sha3", SimpleNamespace(keccak_256=hashed))
    fault = library_fault(ASSETS)
    assert fault is not None
    assert "safe-pysha3" in fault and "wrongly" in fault


def test_a_broken_keccak_does_not_agree_with_itself() -> None:
    """eth_hash can be told to use pysha3 too; then both sides would be wrong alike."""
    script = (
        "import sha3; right = sha3.keccak_256\n"  # broken before anyone takes it from there
        "sha3.keccak_256 = lambda text: (right if len(text) < 136 else sha3.sha3_256)(text)\n"
        "from chain.networks import NETWORKS\n"
        "from chain.second_opinion import library_fault\n"
        "print(library_fault([(NETWORKS['base'], NETWORKS['base'].usdc)]))"
    )
    said = output(script, ETH_HASH_BACKEND="pysha3")
    assert said == "Keccak-256 (safe-pysha3): this installation computes it wrongly\n"


def _sign(self: PrivateKey, message: bytes, hasher: Any = None) -> bytes:
    right: bytes = SIGN(self, message, hasher=hasher)
    return right[:63] + bytes((right[63] ^ 1,)) + right[64:]


def _format(self: PublicKey, compressed: bool = True) -> bytes:
    right: bytes = FORMAT(self, compressed)
    return right[:-1] + bytes((right[-1] ^ 1,))


SIGN, FORMAT = PrivateKey.sign_recoverable, PublicKey.format


@pytest.mark.parametrize(
    ("kind", "name", "wrong", "says"),
    [
        (PrivateKey, "sign_recoverable", _sign, "EIP-191 signature (coincurve)"),
        (PublicKey, "format", _format, "address of a key (coincurve)"),
    ],
    ids=["sign", "address"],
)
def test_a_broken_curve_is_found(
    monkeypatch: pytest.MonkeyPatch, kind: type, name: str, wrong: Any, says: str
) -> None:
    """The breaks are in coincurve's own classes, which eth_account left alone would use as well:
    the second is so consistent that the two would agree."""
    monkeypatch.setattr(kind, name, wrong)
    fault = library_fault(ASSETS)
    assert fault is not None and says in fault


@pytest.mark.parametrize(
    ("module", "name", "wrong", "says"),
    [
        (keys, "address_of", lambda _: "0x" + "11" * 20, "address of a key"),
        (keys, "recover", lambda *_: None, "EIP-191"),
        (keys, "eip191_hash", keys.keccak256, "EIP-191"),
        (keys, "eip712_domain", lambda *_: bytes(32), "payment in USDC on base-sepolia"),
        (eip3009, "digest", lambda *_: bytes(32), "payment in USDC on base-sepolia"),
        (eip3009, "transfer_calldata", lambda _: b"", "payment in USDC on base-sepolia"),
        (sender, "_integer", lambda value: value.to_bytes(8, "big"), "EIP-1559"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_part_is_compared(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, wrong: Callable[..., Any], says: str
) -> None:
    monkeypatch.setattr(module, name, wrong)
    fault = library_fault(ASSETS)
    assert fault is not None and says in fault and "wrongly" in fault


def test_a_library_that_throws_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def throws(*_: Any) -> bytes:
        raise OSError("illegal instruction")

    monkeypatch.setattr(keys, "keccak256", throws)
    fault = library_fault(ASSETS)
    assert fault == "Keccak-256 (safe-pysha3) cannot be tried: OSError: illegal instruction"


# --- the chain ------------------------------------------------------------------------------


async def opinion(rpc: Rpc, url: str, net: Devnet, asset: Asset = USDC) -> list[str]:
    asked = (net.accounts[1].address, net.settler.address)
    return await differences(rpc, url, asset, pay_to=asked[0], settler=asked[1])


async def test_both_are_told_the_same(chain_net: Devnet, rpc: Rpc) -> None:
    assert await opinion(rpc, chain_net.rpc_url, chain_net) == []
    chain_net.pause()
    chain_net.blacklist(chain_net.accounts[1].address)
    assert await opinion(rpc, chain_net.rpc_url, chain_net) == []
    assert await differences(rpc, chain_net.rpc_url, USDC, pay_to=USDC.address, settler=None) == []


def _string(text: str) -> str:
    return "0x" + (uint_word(32) + bytes_tail(text.encode())).hex()


LIES = [
    ("name()", _string("USD Coin"), "the token's name is 'USD Coin' through web3 and 'USDC'"),
    ("version()", _string("1"), "version"),
    ("decimals()", "0x" + uint_word(18).hex(), "decimals is 18 through web3 and 6 through"),
    ("DOMAIN_SEPARATOR()", "0x" + bytes(32).hex(), "domain separator"),
    ("paused()", "0x" + uint_word(1).hex(), "paused() is True through web3 and False"),
    ("isBlacklisted(address)", "0x", "isBlacklisted(pay_to) is None"),
]


def lie(node: FaultyNode, *signatures: str, answer: str) -> None:
    """Have ``node`` answer calls of these functions so, and others truly."""
    wanted = tuple("0x" + selector(signature).hex() for signature in signatures)

    def told(asked: dict[str, Any], true: str) -> str:
        return answer if asked["params"][0]["data"].startswith(wanted) else true

    node.fault("eth_call", "change_by", told)


@pytest.mark.parametrize("told", LIES, ids=[told[0] for told in LIES])
async def test_a_second_provider_that_says_otherwise_is_named(
    chain_net: Devnet, faulty_node: FaultyNode, rpc: Rpc, told: tuple[str, str, str]
) -> None:
    signature, answer, says = told
    lie(faulty_node, signature, answer=answer)
    (text,) = await opinion(rpc, faulty_node.url, chain_net)
    assert says in text
    assert text.startswith("127.0.0.1:")


async def test_chain_and_balance_are_compared(
    chain_net: Devnet, faulty_node: FaultyNode, rpc: Rpc
) -> None:
    faulty_node.fault("eth_chainId", "change", lambda _: "0x1")
    faulty_node.fault("eth_getBalance", "change", lambda _: "0x0")
    chain, gas = await opinion(rpc, faulty_node.url, chain_net)
    assert "the chain id is 1 through web3 and 84532" in chain
    assert f"in wei is 0 through web3 and {10_000 * 10**18}" in gas


async def test_what_moved_since_is_no_difference(
    chain_net: Devnet, faulty_node: FaultyNode, rpc: Rpc
) -> None:
    """The provider is a block behind; the settler's balance changed in that block."""
    chain_net.mine()
    behind = chain_net.rpc("eth_blockNumber")
    chain_net.rpc("eth_sendTransaction", {"from": chain_net.settler.address, "value": "0x1"})
    until(  # a block may come a moment after the transaction was taken
        lambda: int(chain_net.rpc("eth_blockNumber"), 16) == int(behind, 16) + 1, 10, "the block"
    )
    faulty_node.fault("eth_blockNumber", "change", lambda _: behind)
    assert await opinion(rpc, faulty_node.url, chain_net) == []
    asked = [each for each in faulty_node.seen if each["method"] == "eth_getBalance"]
    assert [each["params"][1] for each in asked] == [behind]


async def test_a_provider_without_the_token_is_named(
    chain_net: Devnet, faulty_node: FaultyNode, rpc: Rpc
) -> None:
    faulty_node.fault("eth_call", "change", lambda _: "0x")
    (text,) = await opinion(rpc, faulty_node.url, chain_net)
    assert "web3 finds no token" in text


async def test_a_token_without_switches_is_no_difference(
    chain_net: Devnet, faulty_node: FaultyNode
) -> None:
    client = Rpc(NETWORK, [faulty_node.url])
    lie(faulty_node, "paused()", "isBlacklisted(address)", answer="0x")
    try:
        asked = await tokens.read_standing(client, USDC, chain_net.accounts[1].address)
        assert asked == Standing(None, None)
        assert await opinion(client, faulty_node.url, chain_net) == []
    finally:
        await client.close()


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("drop", None),
        ("hang", None),
        ("status", 429),
        ("body", b"[]"),
        ("body", b"<html>"),
        ("error", {"code": -32005, "message": "limit exceeded"}),
        ("redirect", "/elsewhere"),
    ],
)
async def test_a_provider_that_cannot_be_asked_is_no_difference(
    chain_net: Devnet, faulty_node: FaultyNode, kind: str, value: Any
) -> None:
    faulty_node.fault("eth_getBalance", kind, value)
    client = Rpc(NETWORK, [chain_net.rpc_url], timeout_s=2)
    url = faulty_node.url.replace("http://", "http://user:secret@") + "v2/secret"
    try:
        with pytest.raises(Unavailable, match="web3 could not ask") as refused:
            await opinion(client, url, chain_net)
    finally:
        await client.close()
    assert "secret" not in str(refused.value)
    assert faulty_node.asked.count("eth_getBalance") == 1


async def test_no_address_a_contract_names_is_fetched(
    chain_net: Devnet, faulty_node: FaultyNode, rpc: Rpc
) -> None:
    """EIP-3668: web3 would ask the URLs in such a revert, for anyone who can deploy a token."""
    asked: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as elsewhere:
        url = f"http://127.0.0.1:{elsewhere.sockets[0].getsockname()[1]}/"
        kinds = ["address", "string[]", "bytes", "bytes4", "bytes"]
        body = encode(kinds, [USDC.address, [url], b"", bytes(4), b""])
        data = selector("OffchainLookup(address,string[],bytes,bytes4,bytes)") + body
        error = {"code": 3, "message": "execution reverted", "data": "0x" + data.hex()}
        faulty_node.fault("eth_call", "error", error)
        (text,) = await opinion(rpc, faulty_node.url, chain_net)
    assert "finds no token" in text
    assert not asked


# --- standing -------------------------------------------------------------------------------


async def test_the_switches_of_usdc(chain_net: Devnet, rpc: Rpc) -> None:
    pay_to = chain_net.accounts[1].address
    assert await tokens.read_standing(rpc, USDC, pay_to) == Standing(False, False)
    before = hex(await rpc.block_number())
    chain_net.pause()
    chain_net.blacklist(pay_to)
    assert await tokens.read_standing(rpc, USDC, pay_to) == Standing(True, True)
    assert await tokens.read_standing(rpc, USDC, pay_to, before) == Standing(False, False)


async def test_another_token_has_none(chain_net: Devnet, rpc: Rpc) -> None:
    chain_net.rpc("anvil_setCode", "0x" + "ee" * 20, "0x60006000fd")  # it reverts always
    other = Asset("0x" + "ee" * 20, "USDC", 6, "USDC", "2")
    assert await tokens.read_standing(rpc, other, USDC.address) == Standing(None, None)


def test_a_switch_that_is_on_is_a_fault() -> None:
    def faults(standing: Standing, network: Network = NETWORK) -> list[str]:
        return tokens.standing_faults(network, USDC, "0x" + "ab" * 20, standing)

    assert faults(Standing(False, False)) == faults(Standing(None, None)) == []
    paused, listed = faults(Standing(True, True))
    assert "USDC on base-sepolia is paused" in paused
    assert "0xABaBaBaBABabABabAbAbABAbABabababaBaBABaB is on the blacklist" in listed


# --- loading --------------------------------------------------------------------------------


def test_what_serves_does_not_come_here() -> None:
    """Neither the module nor the libraries: with everything else of the program loaded."""
    files = [
        path.relative_to(ROOT).with_suffix("")
        for folder in ("wallet_auth", "chain", "gateway")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    modules = [".".join(path.parts) for path in files if path.name not in ("__init__", "__main__")]
    modules.remove("chain.second_opinion")
    served = [name for name in modules if not name.startswith("gateway.migrations.")]
    script = (
        "import sys\nfrom importlib import import_module\n"
        f"for name in {served}: import_module(name)\n"
        "print({'web3', 'eth_account', 'eth_keys', 'chain.second_opinion'} & set(sys.modules))"
    )
    assert output(script) == "set()\n"
