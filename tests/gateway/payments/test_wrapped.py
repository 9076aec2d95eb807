"""Our own sales to contract wallets whose signature comes in a wrapper (ERC-6492).

What the wrapper would deploy is the payer's own calldata: nobody here ever runs it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from dataclasses import replace
from typing import Any

import pytest

from anvil.devnet import Devnet
from gateway.errors import Problem
from gateway.ledger import read
from gateway.payments import challenge, from_credits, offers, x402
from gateway.payments.offers import Asked
from gateway.payments.order import CameWith
from gateway.payments.wire import decode_object
from tests.fixtures_chain import NETWORK, FaultyNode
from tests.fixtures_permit2 import approve, plant, signed
from tests.fixtures_wallets import SUFFIX, Wallets, wallets
from tests.gateway.ledger import helpers
from tests.gateway.payments.parts import PAY_TO, Desk, opened_desk

UNITS = 1_000_000
ASKED = Asked("POST", b"/farebox/v1/credits/purchase", 0)
UNDEPLOYED = "invalid_exact_evm_payload_undeployed_smart_wallet"


def offer_of(desk: Desk, method: str = "eip3009") -> dict[str, Any]:
    """What is asked for a dollar of credits."""
    now_s = time.time_ns() // 10**9
    problem = challenge.for_credits(desk.rails.settings, desk.rails.keys, ASKED, now_s, UNITS)
    accepts = json.loads(base64.b64decode(problem.headers["PAYMENT-REQUIRED"]))["accepts"]
    how = [each["extra"].get("assetTransferMethod", "eip3009") for each in accepts]
    found: dict[str, Any] = accepts[how.index(method)]
    return found


async def pay(
    desk: Desk, offer: dict[str, Any], payload: dict[str, Any], content: bytes = b"c" * 32
) -> x402.Paid:
    body = {"x402Version": 2, "accepted": offer, "payload": payload}
    presented = decode_object(body, permit2=True)
    return await x402.pay(desk.rails, presented, CameWith(ASKED, offers.CREDITS, content, UNITS))


async def refused(desk: Desk, offer: dict[str, Any], payload: dict[str, Any]) -> Problem:
    """Nothing is claimed and nothing sent."""
    before = transactions(desk.net)
    with pytest.raises(Problem) as raised:
        await pay(desk, offer, payload)
    assert transactions(desk.net) == before
    async with desk.rails.db.read() as tx:
        for table in ("payment", "authorization_use", "chain_tx"):
            assert await tx.fetchval(f"SELECT count(*) FROM {table}") == 0
    return raised.value


def transactions(net: Devnet) -> int:
    return int(net.rpc("eth_getTransactionCount", net.settler.address, "pending"), 16)


def dollar(made: Wallets) -> dict[str, Any]:
    return made.pay(PAY_TO, UNITS, valid_before_s=int(time.time()) + 100)


async def credits_of(desk: Desk, made: Wallets) -> list[tuple[int, str]]:
    """What the wallet has, and on which chain it is somebody."""
    async with desk.rails.db.read() as tx:
        rows = await tx.fetch(
            "SELECT account_id, chain FROM wallet WHERE address = $1", made.address
        )
        found = [(await read.account(tx, row["account_id"]), row["chain"]) for row in rows]
    return [(seen.available_units, chain) for seen, chain in found if seen is not None]


async def test_a_wallet_that_is_there_pays(chain_net: Devnet, db_url: str) -> None:
    """The same payment, wrapped, bare and wrapped otherwise, on two nodes at once: one mint."""
    made = wallets(chain_net)
    made.deploy()
    async with opened_desk(chain_net, db_url) as one, opened_desk(chain_net, db_url) as two:
        bare, offer = dollar(made), offer_of(one)
        otherwise = made.wrap(bare, factory="0x" + "ee" * 20, call=b"nonsense")
        forms = (made.wrap(bare), bare, otherwise, made.wrap(bare))
        before = transactions(chain_net)
        desks = (one, two, one, two)
        told = await asyncio.gather(
            *(pay(desk, offer, form) for desk, form in zip(desks, forms, strict=True))
        )
        assert {each.payment.state for each in told} == {"succeeded"}
        assert len({each.payment.id for each in told}) == 1
        assert transactions(chain_net) == before + 1
        ((_, payment_id, units),) = await one.minted()
        assert (payment_id, units) == (told[0].payment.id, UNITS)
        assert await credits_of(one, made) == [(UNITS, NETWORK.caip2)]
        with pytest.raises(Problem) as raised:
            await pay(two, offer, bare, b"d" * 32)
        assert raised.value.code == "payment_already_used"
        assert await helpers.faults(one.rails.db) == []


async def test_a_wallet_that_is_not_there_yet(
    chain_net: Devnet, sqlite_url: str, faulty_node: FaultyNode
) -> None:
    """Refused until somebody else has deployed it; then the very same payment is good. Its factory
    is not even asked."""
    made = wallets(chain_net)
    async with opened_desk(chain_net, sqlite_url, faulty_node.url) as desk:
        payload, offer = made.wrap(dollar(made)), offer_of(desk)
        for form in (payload, made.wrap(dollar(made), call=b"")):
            refusal = await refused(desk, offer, form)
            assert (refusal.code, refusal.status) == (UNDEPLOYED, 402)
        assert chain_net.rpc("eth_getCode", made.address, "latest") == "0x"
        made.deploy()
        assert (await pay(desk, offer, payload)).payment.state == "succeeded"
        assert await credits_of(desk, made) == [(UNITS, NETWORK.caip2)]
    words = json.dumps(faulty_node.seen)
    assert made.address[2:] in words
    assert made.factory[2:] not in words and made.deploy_call.hex() not in words


async def test_a_wallet_that_comes_between_the_look_and_the_claim(
    chain_net: Devnet, sqlite_url: str
) -> None:
    """The key of an address signed, and the address has code when it is looked at: the wallet
    decides, by what was in the wrapper."""
    made = wallets(chain_net)
    made.deploy()
    code = chain_net.rpc("eth_getCode", made.address, "latest")
    key = chain_net.accounts[3]
    assert key == made.owner  # the wallet's code has its owner in it
    chain_net.rpc("anvil_setCode", key.address, code)
    own = replace(made, address=key.address)
    async with opened_desk(chain_net, sqlite_url) as desk:
        paid = await pay(desk, offer_of(desk), own.wrap(dollar(own)))
        assert paid.payment.state == "succeeded"
        assert await credits_of(desk, own) == [(UNITS, NETWORK.caip2)]


async def test_a_delegated_key_stays_its_own_account(chain_net: Devnet, sqlite_url: str) -> None:
    """EIP-7702: the code decides about the signature, and the credits are the key's everywhere."""
    made = wallets(chain_net)
    made.deploy()
    key = chain_net.accounts[4]
    chain_net.rpc("anvil_setCode", key.address, "0xef0100" + made.address[2:])
    own = replace(made, address=key.address)
    async with opened_desk(chain_net, sqlite_url) as desk:
        paid = await pay(desk, offer_of(desk), own.wrap(dollar(own)))
        assert paid.payment.state == "succeeded"
        assert await credits_of(desk, own) == [(UNITS, "")]
        by_key = own.wrap(replace(own, owner=key).pay(PAY_TO, UNITS))
        with pytest.raises(Problem) as raised:
            await pay(desk, offer_of(desk), by_key)
        assert raised.value.code == "invalid_exact_evm_payload_signature"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda made, form: made.wrap(made.wrap(form)),
        lambda _, form: form | {"signature": "0x" + SUFFIX.hex()},
        lambda _, form: form | {"signature": "0x" + "11" * 96 + SUFFIX.hex()},
        lambda made, form: made.wrap(form | {"signature": "0x"}),
        lambda made, form: made.wrap(form | {"signature": form["signature"][:-2] + "1f"}),
        lambda made, _: made.wrap(replace(made, owner=made.net.accounts[5]).pay(PAY_TO, UNITS)),
    ],
    ids=["wrapped twice", "empty", "malformed", "nothing in it", "odd parity", "another key"],
)
async def test_odd_wrappers_are_refused(chain_net: Devnet, sqlite_url: str, spoil: Any) -> None:
    made = wallets(chain_net)
    made.deploy()
    async with opened_desk(chain_net, sqlite_url) as desk:
        refusal = await refused(desk, offer_of(desk), spoil(made, dollar(made)))
        assert (refusal.code, refusal.status) == ("invalid_exact_evm_payload_signature", 402)


@pytest.mark.parametrize(("size", "code"), [(3_700, "succeeded"), (4_100, "invalid_payload")])
async def test_the_calldata_in_it_is_bounded(
    chain_net: Devnet, sqlite_url: str, size: int, code: str
) -> None:
    made = wallets(chain_net)
    made.deploy()
    async with opened_desk(chain_net, sqlite_url) as desk:
        payload, offer = made.wrap(dollar(made), call=b"c" * size), offer_of(desk)
        if code == "succeeded":
            assert (await pay(desk, offer, payload)).payment.state == code
        else:
            assert (await refused(desk, offer, payload)).code == code


async def test_it_is_settled_and_never_answered_from_credits(
    chain_net: Devnet, sqlite_url: str
) -> None:
    """As every payment of a contract wallet: only keys spend credits by a payment's signature."""
    made = wallets(chain_net, 10 * UNITS)
    made.deploy()
    async with opened_desk(chain_net, sqlite_url) as desk:
        offer = offer_of(desk)
        await pay(desk, offer, made.wrap(dollar(made)))
        body = {"x402Version": 2, "accepted": offer, "payload": made.wrap(dollar(made))}
        came = CameWith(ASKED, offers.CREDITS, b"e" * 32, UNITS)

        def never(account_id: int, price_units: int) -> Any:
            raise AssertionError((account_id, price_units))

        assert await from_credits.take(desk.rails, decode_object(body), came, never) is None


async def test_by_permit2_too(chain_net: Devnet, sqlite_url: str) -> None:
    plant(chain_net)
    made = wallets(chain_net)
    async with opened_desk(chain_net, sqlite_url, permit2=True) as desk:
        offer = offer_of(desk, "permit2")
        bare = signed(made.owner, amount=UNITS, to=PAY_TO)
        bare["permit2Authorization"]["from"] = made.address
        refusal = await refused(desk, offer, made.wrap(bare))
        assert refusal.code == "invalid_permit2_signature" and "deployed" in refusal.detail
        twice = await refused(desk, offer, made.wrap(made.wrap(bare)))
        assert twice.code == "invalid_permit2_signature" and "ERC-6492" in twice.detail
        made.deploy()
        approve(chain_net, replace(made.owner, address=made.address))
        told = await asyncio.gather(pay(desk, offer, made.wrap(bare)), pay(desk, offer, bare))
        assert {each.payment.state for each in told} == {"succeeded"}
        assert len({each.payment.id for each in told}) == 1
