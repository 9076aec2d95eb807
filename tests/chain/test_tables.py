"""The networks table, what tokens say of themselves, the small pure pieces, and what is loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest
from eth_abi.abi import encode
from eth_utils.address import is_checksum_address, to_checksum_address
from hypothesis import given, settings
from hypothesis import strategies as st
from x402.mechanisms.evm.default_assets import DEFAULT_ASSETS
from x402.mechanisms.evm.v1.constants import V1_NETWORK_CHAIN_IDS

import chain
from anvil.devnet import Devnet
from chain import eth, networks, tokens
from chain.errors import Unavailable
from chain.networks import NETWORKS, Asset
from chain.rpc import Rpc
from tests.fixtures_chain import NETWORK, USDC, FaultyNode
from wallet_auth.keys import address_word, checksum

EVERY = pytest.mark.parametrize("row", NETWORKS.values(), ids=lambda row: row.name)


@EVERY
def test_a_row_is_consistent(row: networks.Network) -> None:
    assert row.caip2 == f"eip155:{row.chain_id}"
    assert networks.network(row.name) is networks.network(row.caip2) is row
    assert "{tx}" in row.explorer_tx and row.explorer_tx.startswith("https://")
    assert {row.finality.safe, row.finality.final} <= {"safe", "finalized"}
    assert row.usdc is row.asset(row.usdc.address) is row.asset(row.usdc.address.upper())
    assert row.asset("0x" + "00" * 20) is None
    for asset in row.assets:
        assert asset.address == asset.address.lower() and eth.is_address(asset.address)
        assert asset.decimals == 6  # one unit of the ledger is one of the token


@EVERY
def test_a_row_agrees_with_the_official_client(row: networks.Network) -> None:
    if row.v1_name is not None:
        assert V1_NETWORK_CHAIN_IDS[row.v1_name] == row.chain_id
    theirs = DEFAULT_ASSETS.get(row.caip2)
    if theirs is None:
        assert row.name == "optimism"  # the one the client must be told to accept
        return
    assert row.usdc == Asset(
        theirs[0]["asset"].lower(),
        theirs[0]["symbol"],
        theirs[0]["decimals"],
        theirs[0]["name"],
        theirs[0]["version"],
    )


def test_the_rows_are_distinct() -> None:
    rows = NETWORKS.values()
    assert len({row.chain_id for row in rows}) == len({row.usdc.address for row in rows}) == 7
    with pytest.raises(KeyError, match="base-sepolia"):
        networks.network("eip155:31337")


async def test_the_token_is_what_its_row_says(rpc: Rpc) -> None:
    token = await tokens.read_token(rpc, USDC)
    assert (token.name, token.version, token.decimals) == ("USDC", "2", 6)
    assert tokens.token_faults(NETWORK, USDC, token) == []


async def test_every_difference_is_a_fault(rpc: Rpc) -> None:
    token = await tokens.read_token(rpc, USDC)
    faults = tokens.token_faults(NETWORK, Asset(USDC.address, "USDC", 18, "USD Coin", "1"), token)
    assert len(faults) == 3
    assert "'USD Coin'" in faults[0] and "base-sepolia" in faults[0]
    assert "version" in faults[1] and "decimals" in faults[2]
    (fault,) = tokens.token_faults(NETWORKS["base"], USDC, token)
    assert "domain separator" in fault


@pytest.mark.parametrize("answer", ["0x", "0x" + "00" * 64, "0x" + "ff" * 96])
async def test_a_contract_that_is_no_token(
    chain_net: Devnet, faulty_node: FaultyNode, answer: str
) -> None:
    client = Rpc(NETWORK, [faulty_node.url])
    nobody = Asset(chain_net.accounts[0].address, "USDC", 6, "USDC", "2")
    try:
        with pytest.raises(Unavailable, match="no contract"):
            await tokens.read_token(client, nobody)
        faulty_node.fault("eth_call", "change", lambda _: answer)
        with pytest.raises(Unavailable, match="no EIP-3009 token"):
            await tokens.read_token(client, USDC)
    finally:
        await client.close()


async def test_a_contract_without_these_methods_is_no_token(chain_net: Devnet, rpc: Rpc) -> None:
    chain_net.rpc("anvil_setCode", "0x" + "ee" * 20, "0x60006000fd")  # it reverts always
    with pytest.raises(Unavailable, match="no EIP-3009 token"):
        await tokens.read_token(rpc, Asset("0x" + "ee" * 20, "USDC", 6, "USDC", "2"))


# --- the pure pieces ------------------------------------------------------------------------


@settings(deadline=None)
@given(st.binary(min_size=20, max_size=20))
def test_checksums_are_those_of_eth_utils(raw: bytes) -> None:
    address = "0x" + raw.hex()
    assert checksum(address) == to_checksum_address(address)
    assert is_checksum_address(checksum(address))
    assert address_word(address) == encode(["address"], [address])


@settings(deadline=None)
@given(st.text(max_size=100))
def test_a_string_is_read_as_the_abi_writes_it(text: str) -> None:
    assert eth.read_string(encode(["string"], [text])) == text


@settings(deadline=None)
@given(st.binary(max_size=100), st.integers(0, 2**256 - 1))
def test_words_and_bytes_are_those_of_the_abi(data: bytes, number: int) -> None:
    assert eth.uint_word(32) + eth.bytes_tail(data) == encode(["bytes"], [data])
    assert eth.uint_word(number) == encode(["uint256"], [number])


@pytest.mark.parametrize(
    "data", [b"", bytes(64), b"\0" * 31 + b"\x20" + b"\xff" * 32, bytes(31) + b"\x20" + bytes(31)]
)
def test_what_is_no_string_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="not an ABI-encoded string"):
        eth.read_string(data)


def test_hex_has_one_form() -> None:
    assert [eth.quantity(text) for text in ("0x0", "0x1f", "0x" + "f" * 64)] == [
        0,
        31,
        2**256 - 1,
    ]
    assert eth.data_bytes("0xAb") == b"\xab"
    with pytest.raises(ValueError, match="expected 2 bytes"):
        eth.data_bytes("0xab", 2)


@pytest.mark.parametrize(
    "odd", ["0x00", "0x01", "0xF", "1", "-0x1", "0x" + "f" * 65, "0x1\n", None, 1, True]
)
def test_odd_quantities_are_refused(odd: object) -> None:
    with pytest.raises(ValueError, match="not a quantity"):
        eth.quantity(odd)


@pytest.mark.parametrize("odd", ["ab", "0xa", "0x a", "0xab\n", "0Xab", None, b"0x", 1])
def test_odd_data_is_refused(odd: object) -> None:
    with pytest.raises(ValueError, match="not hex data"):
        eth.data_bytes(odd)


# --- loading --------------------------------------------------------------------------------


def test_every_verb_is_there() -> None:
    for name in chain.__all__:
        assert getattr(chain, name) is not None
    assert set(chain.__all__) == {name for names in chain._HOME.values() for name in names}
    with pytest.raises(AttributeError):
        chain.no_such_verb  # noqa: B018


def test_naming_the_package_loads_nothing_heavy() -> None:
    script = (
        "import sys, chain; bare = {m for m in sys.modules if m.startswith('chain.')};"
        "chain.sign, chain.verify, chain.transfers_of, chain.read_token;"
        "heavy = {'web3', 'eth_account', 'eth_abi', 'aiohttp'} & set(sys.modules);"
        "print(sorted(bare), sorted(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[] []"
