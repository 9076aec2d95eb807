"""Wrapped signatures: what is read, whom they are good for, and what is never sent."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from eth_abi import encode

from anvil.devnet import Devnet
from chain.errors import Rejected
from chain.rpc import Rpc
from chain.schemes import eip3009, erc6492
from chain.schemes.eip3009 import Authorization
from tests.fixtures_chain import NETWORK, USDC, FaultyNode, deploy, payment
from tests.gateway.facilitator.parts import COMPILED, SELLER, Wallets, wallets

SUFFIX = bytes.fromhex("6492" * 16)
FACTORY = "0x" + "fa" * 20


def wrapped(inner: bytes, call: bytes = b"call", factory: str = FACTORY) -> bytes:
    made: bytes = encode(["address", "bytes", "bytes"], [factory, call, inner])
    return made + SUFFIX


@pytest.mark.parametrize("inner", [b"", b"i" * 65, b"i" * 96, b"i" * 130])
@pytest.mark.parametrize("call", [b"", b"c" * 4, b"c" * 68])
def test_the_wrapper_is_read(inner: bytes, call: bytes) -> None:
    assert erc6492.unwrap(wrapped(inner, call)) == erc6492.Wrapped(FACTORY, call, inner)


def test_what_is_not_wrapped_is_left_alone() -> None:
    for signature in (b"", b"s" * 65, SUFFIX[1:], SUFFIX + b"x"):
        assert erc6492.unwrap(signature) is None


@pytest.mark.parametrize(
    "signature",
    [
        SUFFIX,
        bytes(95) + SUFFIX,
        b"\1" + wrapped(b"i")[1:],  # more than an address
        wrapped(b"i" * 65)[:-64] + SUFFIX,  # cut short
        bytes(31) + b"\1" + (2**255).to_bytes(32, "big") * 2 + SUFFIX,
        bytes(32) + (0).to_bytes(32, "big") * 2 + SUFFIX,  # an offset into the head
        bytes(32) + (96).to_bytes(32, "big") * 2 + (2**200).to_bytes(32, "big") + SUFFIX,
        wrapped(wrapped(b"i")),
    ],
)
def test_a_malformed_wrapper_is_refused(signature: bytes) -> None:
    with pytest.raises(Rejected) as error:
        erc6492.unwrap(signature)
    assert error.value.code == "invalid_exact_evm_payload_signature"


async def judge(rpc: Rpc, auth: Authorization, *factories: str) -> str:
    kind, _ = await erc6492.verify(rpc, USDC, auth, int(time.time()), frozenset(factories))
    return kind


async def test_listed_or_not_deployed_or_not(chain_net: Devnet, rpc: Rpc) -> None:
    """The whole table: of an undeployed wallet the list decides, of a deployed one the wallet."""
    made = wallets(chain_net)
    auth = eip3009.parse(made.payment())
    bare = eip3009.parse(made.plain())
    with pytest.raises(Rejected, match="not deployed yet"):
        await judge(rpc, auth)
    with pytest.raises(Rejected, match="not deployed yet"):
        await judge(rpc, auth, FACTORY)
    assert await judge(rpc, auth, FACTORY, made.factory) == "undeployed"
    with pytest.raises(Rejected) as error:
        await judge(rpc, bare, made.factory)
    assert error.value.code == "invalid_exact_evm_payload_signature"
    assert chain_net.rpc("eth_getCode", made.address, "latest") == "0x"
    made.deploy()
    for each in (auth, bare):
        for factories in ((), (made.factory,)):
            kind, seen = await erc6492.verify(rpc, USDC, each, int(time.time()), set(factories))
            assert (kind, seen.signature) == ("contract", bare_signature(each))


def bare_signature(auth: Authorization) -> bytes:
    inside = erc6492.unwrap(auth.signature)
    return auth.signature if inside is None else inside.signature


def spoiled(made: Wallets) -> dict[str, Authorization]:
    good = eip3009.parse(made.payment())
    inside = erc6492.unwrap(good.signature)
    assert inside is not None
    flipped = bytes((inside.signature[0] ^ 1,)) + inside.signature[1:]
    other = payment(made.net.accounts[5], SELLER, 10_000, from_=made.address)
    return {
        "another key": eip3009.parse(
            other
            | {
                "signature": "0x"
                + wrapped(
                    bytes.fromhex(other["signature"][2:]), made.deploy_call, made.factory
                ).hex()
            }
        ),
        "a flipped bit": replace(good, signature=wrapped(flipped, made.deploy_call, made.factory)),
        "another amount": replace(good, value_units=10_001),
        "another payer": replace(good, from_="0x" + "77" * 20),
        "a call that deploys nothing": eip3009.parse(made.payment(call=b"")),
        "a call that deploys another wallet": eip3009.parse(
            made.payment(call=made.deploy_call[:-1] + b"\1")
        ),
    }


async def test_nothing_but_its_own_signature_will_do(chain_net: Devnet, rpc: Rpc) -> None:
    made = wallets(chain_net)
    for name, auth in spoiled(made).items():
        with pytest.raises(Rejected) as error:
            await judge(rpc, auth, made.factory)
        assert error.value.code == "invalid_exact_evm_payload_signature", name


async def test_a_listed_factory_that_is_an_ordinary_key(chain_net: Devnet, rpc: Rpc) -> None:
    """A call to an address without code succeeds; the token still sees no wallet."""
    made = wallets(chain_net)
    nobody = "0x" + "ee" * 20
    auth = eip3009.parse(made.payment(factory=nobody))
    with pytest.raises(Rejected) as error:
        await judge(rpc, auth, nobody)
    assert error.value.code == "invalid_exact_evm_payload_signature"


async def test_it_is_only_asked_and_with_a_cap(chain_net: Devnet, faulty_node: FaultyNode) -> None:
    made = wallets(chain_net)
    rpc = Rpc(NETWORK, [faulty_node.url])
    try:
        await judge(rpc, eip3009.parse(made.payment()), made.factory)
    finally:
        await rpc.close()
    assert not [name for name in faulty_node.asked if name.startswith("eth_send")]
    calls = [each["params"][0] for each in faulty_node.seen if each["method"] == "eth_call"]
    assert calls and all(int(call["gas"], 16) <= erc6492.DEPLOY_GAS for call in calls)
    assert all("from" not in call for call in calls)


async def test_an_unpaid_wallet_is_refused_for_its_balance(chain_net: Devnet, rpc: Rpc) -> None:
    made = wallets(chain_net, units=9_999)
    with pytest.raises(Rejected) as error:
        await judge(rpc, eip3009.parse(made.payment()), made.factory)
    assert error.value.code == "insufficient_funds"


@pytest.mark.parametrize("name", ["GasEater", "LongYes"])
async def test_wallets_that_misbehave(chain_net: Devnet, rpc: Rpc, name: str) -> None:
    """Cut off, or not taken at its word: the standard's answer is one word and no more."""
    owner = chain_net.accounts[3]
    wallet = deploy(chain_net, owner.address, COMPILED[name]["creation"])
    chain_net.mint(wallet, 1_000_000)
    auth = eip3009.parse(payment(owner, SELLER, 10_000, from_=wallet))
    with pytest.raises(Rejected) as error:
        await judge(rpc, auth)
    assert error.value.code == "invalid_exact_evm_payload_signature"
