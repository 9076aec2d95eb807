"""Wrapped signatures for others' sellers: whom they are good for, and what is never sent."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from anvil.devnet import Devnet
from chain.errors import Rejected
from chain.rpc import Rpc
from chain.schemes import eip3009, erc6492
from chain.schemes.eip3009 import Authorization
from tests.fixtures_chain import NETWORK, USDC, FaultyNode, deploy, payment
from tests.fixtures_wallets import COMPILED, FACTORY, Wallets, wallets
from tests.gateway.facilitator.parts import SELLER


async def judge(rpc: Rpc, auth: Authorization, *factories: str) -> str:
    return await erc6492.verify(rpc, USDC, auth, int(time.time()), frozenset(factories))


def undeployed(made: Wallets, **change: Any) -> Authorization:
    """A payment of the wallet to somebody else's seller, wrapped."""
    return eip3009.parse(made.wrap(made.pay(SELLER), **change))


async def test_listed_or_not_deployed_or_not(chain_net: Devnet, rpc: Rpc) -> None:
    """The whole table: of an undeployed wallet the list decides, of a deployed one the wallet."""
    made = wallets(chain_net)
    auth, bare = undeployed(made), eip3009.parse(made.pay(SELLER))
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
            assert await judge(rpc, each, *factories) == "contract"


async def test_a_keys_own_signature_needs_no_factory(chain_net: Devnet, rpc: Rpc) -> None:
    """A key without code that signs as a wallet would: the token takes it as it is."""
    made = wallets(chain_net)
    assert await judge(rpc, eip3009.parse(made.wrap(payment(made.owner, SELLER, 1)))) == "key"


def spoiled(made: Wallets) -> dict[str, Authorization]:
    good = undeployed(made)
    flipped = bytes((good.signature[0] ^ 1,)) + good.signature[1:]
    other = payment(made.net.accounts[5], SELLER, 10_000, from_=made.address)
    return {
        "another key": eip3009.parse(made.wrap(other)),
        "a flipped bit": replace(good, signature=flipped),
        "another amount": replace(good, value_units=10_001),
        "another payer": replace(good, from_="0x" + "77" * 20),
        "a call that deploys nothing": undeployed(made, call=b""),
        "a call that deploys another wallet": undeployed(made, call=made.deploy_call[:-1] + b"\1"),
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
    auth = undeployed(made, factory=nobody)
    with pytest.raises(Rejected) as error:
        await judge(rpc, auth, nobody)
    assert error.value.code == "invalid_exact_evm_payload_signature"


async def test_it_is_only_asked_and_with_a_cap(chain_net: Devnet, faulty_node: FaultyNode) -> None:
    made = wallets(chain_net)
    rpc = Rpc(NETWORK, [faulty_node.url])
    try:
        await judge(rpc, undeployed(made), made.factory)
    finally:
        await rpc.close()
    assert not [name for name in faulty_node.asked if name.startswith("eth_send")]
    calls = [each["params"][0] for each in faulty_node.seen if each["method"] == "eth_call"]
    assert calls and all(int(call["gas"], 16) <= erc6492.DEPLOY_GAS for call in calls)
    assert all("from" not in call for call in calls)


async def test_an_unpaid_wallet_is_refused_for_its_balance(chain_net: Devnet, rpc: Rpc) -> None:
    made = wallets(chain_net, units=9_999)
    with pytest.raises(Rejected) as error:
        await judge(rpc, undeployed(made), made.factory)
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
