"""Our own sales by Permit2: settled once, minted once, whoever sees the transfer first."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Awaitable, Callable
from itertools import combinations_with_replacement
from typing import Any

import pytest

from anvil.devnet import Account, Devnet
from chain import transfers
from chain.schemes import permit2
from gateway.db import Tx, transact
from gateway.errors import Problem
from gateway.payments import budget, challenge, claims, from_credits, journal, offers, watcher, x402
from gateway.payments.journal import Payment
from gateway.payments.offers import Asked
from gateway.payments.order import CameWith
from gateway.payments.recover import recover
from gateway.payments.watcher import Watch
from gateway.payments.wire import decode_object
from tests.fixtures_chain import USDC, FaultyNode, payment
from tests.fixtures_permit2 import (
    approve,
    plant,
    send_as,
    settle_by_stranger,
    signed,
    take_back,
)
from tests.gateway.ledger import helpers
from tests.gateway.payments.parts import PAY_TO, Desk, opened_desk, settings_for
from tests.gateway.payments.test_finality import account
from wallet_auth.keys import address_word

UNITS = 1_000_000
ASKED = Asked("POST", b"/farebox/v1/credits/purchase", 0)
TARGET = Asked("GET", b"/v1/forecast/oslo", 10_000)
CHAIN = {"rpc": ["http://127.0.0.1:1"], "pay_to": PAY_TO, "settler_key": "0x" + "11" * 32}


@pytest.fixture
def net(chain_net: Devnet) -> Devnet:
    """A chain with Permit2 and the proxy; the first accounts have approved."""
    return ready(chain_net)


def ready(net: Devnet) -> Devnet:
    plant(net)
    for payer in net.accounts[:4]:
        approve(net, payer)
    return net


def desk_at(net: Devnet, database: str, *urls: str, **options: Any) -> Any:
    return opened_desk(net, database, *urls, **({"permit2": True} | options))


# --- what is offered --------------------------------------------------------------------------


def required(problem: Problem) -> list[dict[str, Any]]:
    found = json.loads(base64.b64decode(problem.headers["PAYMENT-REQUIRED"]))["accepts"]
    assert isinstance(found, list)
    return found


def without_token(offer: dict[str, Any]) -> dict[str, Any]:
    return offer | {"extra": {n: v for n, v in offer["extra"].items() if n != "offer"}}


def test_it_stands_last_and_only_where_it_is_on(desk_keys: offers.Keys) -> None:
    off = settings_for()
    on = settings_for(chains={"base-sepolia": CHAIN | {"permit2": True}})
    for make in (
        lambda s: challenge.for_call(s, desk_keys, TARGET, 0),
        lambda s: challenge.for_credits(s, desk_keys, ASKED, 0, UNITS),
    ):
        usual = [without_token(each) for each in required(make(off))]
        both = [without_token(each) for each in required(make(on))]
        assert not any("assetTransferMethod" in each["extra"] for each in usual)
        assert both[: len(usual)] == usual
        (by_permit2,) = both[len(usual) :]
        assert by_permit2["extra"].pop("assetTransferMethod") == "permit2"
        assert by_permit2 == usual[0]
        assert make(on).members["accepts"] == make(off).members["accepts"]  # v1


@pytest.fixture
def desk_keys() -> offers.Keys:
    return offers.Keys("d-tests", {b"\0\0\0\1": b"k" * 32}, b"\0\0\0\1")


def test_tokens_of_the_usual_way_are_as_they_were() -> None:
    chain = settings_for().chains[0]
    usual = offers.Terms(chain, USDC.address, PAY_TO, 10_000, offers.CALL, 120)
    by_permit2 = offers.Terms(chain, USDC.address, PAY_TO, 10_000, offers.CALL, 120, "permit2")
    parts = ("eip155:84532", USDC.address, PAY_TO, "10000", "call", "120")
    assert usual.sealed() == b"".join(len(p).to_bytes(2, "big") + p.encode() for p in parts)
    assert by_permit2.sealed() == usual.sealed() + b"\0\7permit2"


# --- a payment --------------------------------------------------------------------------------


def offer_of(desk: Desk, method: str = "permit2", asked: Asked = ASKED) -> dict[str, Any]:
    settings, keys = desk.rails.settings, desk.rails.keys
    now_s = time.time_ns() // 10**9
    if asked is ASKED:
        problem = challenge.for_credits(settings, keys, asked, now_s, UNITS)
    else:
        problem = challenge.for_call(settings, keys, asked, now_s)
    found = required(problem)
    how = [each["extra"].get("assetTransferMethod", "eip3009") for each in found]
    return found[how.index(method)]


def by_permit2(payer: Account, **change: Any) -> dict[str, Any]:
    return signed(payer, **({"amount": UNITS, "to": PAY_TO} | change))


def whole(offer: dict[str, Any], payload: dict[str, Any]) -> dict[str, Any]:
    return {"x402Version": 2, "accepted": offer, "payload": payload}


async def pay(desk: Desk, body: dict[str, Any], content: bytes = b"c" * 32) -> x402.Paid:
    presented = decode_object(body, permit2=True)
    return await x402.pay(desk.rails, presented, CameWith(ASKED, offers.CREDITS, content, UNITS))


async def refused(desk: Desk, body: dict[str, Any]) -> Problem:
    """Nothing is written and nothing sent."""
    before = transactions(desk.net)
    with pytest.raises(Problem) as raised:
        await pay(desk, body)
    assert transactions(desk.net) == before
    async with desk.rails.db.read() as tx:
        for table in ("payment", "authorization_use", "chain_tx"):
            assert await tx.fetchval(f"SELECT count(*) FROM {table}") == 0
    return raised.value


def transactions(net: Devnet) -> int:
    return int(net.rpc("eth_getTransactionCount", net.settler.address, "pending"), 16)


async def test_it_is_settled_once_on_two_nodes(net: Devnet, db_url: str) -> None:
    payer = net.accounts[0]
    async with desk_at(net, db_url) as one, desk_at(net, db_url) as two:
        body = whole(offer_of(one), by_permit2(payer))
        before = transactions(net)
        told = await asyncio.gather(*(pay(desk, body) for desk in (one, two, one, two)))
        assert {(each.payment.state, each.payment.method) for each in told} == {
            ("succeeded", "permit2")
        }
        assert len({each.payment.id for each in told}) == 1
        assert transactions(net) == before + 1
        ((ref, payment_id, units),) = await one.minted()
        assert (ref, payment_id, units) == (told[0].payment.tx_hash, told[0].payment.id, UNITS)
        assert (await account(one, payer.address)).available_units == UNITS
        with pytest.raises(Problem) as raised:
            await pay(two, body, b"d" * 32)
        assert raised.value.code == "payment_already_used"
        assert await helpers.faults(one.rails.db) == []


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"spender": "0x" + "40" * 20}, "invalid_permit2_spender"),
        ({"to": "0x" + "0b" * 20}, "invalid_permit2_recipient_mismatch"),
        ({"deadline": 1_700_000_000}, "permit2_deadline_expired"),
        ({"validAfter": 2**40}, "permit2_not_yet_valid"),
        ({"amount": UNITS - 1}, "permit2_amount_mismatch"),
        ({"amount": UNITS + 1}, "permit2_amount_mismatch"),
        ({"token": "0x" + "70" * 20}, "permit2_token_mismatch"),
    ],
)
async def test_another_payment_than_was_offered_is_refused(
    net: Devnet, sqlite_url: str, change: dict[str, Any], code: str
) -> None:
    async with desk_at(net, sqlite_url) as desk:
        body = whole(offer_of(desk), by_permit2(net.accounts[0], **change))
        assert (await refused(desk, body)).code == code


AUTH = "permit2Authorization"


@pytest.mark.parametrize(
    ("where", "value", "code"),
    [
        (("from",), "0x" + "0c" * 20, "invalid_permit2_signature"),
        (("nonce",), "7", "invalid_permit2_signature"),
        (("deadline",), "9999999999", "invalid_permit2_signature"),
        (("witness", "validAfter"), "1", "invalid_permit2_signature"),
        (("nonce",), "0x07", "invalid_payload"),
        (("nonce",), 7, "invalid_payload"),
        (("nonce",), str(2**256), "invalid_payload"),
        (("permitted", "amount"), " 1000000", "invalid_payload"),
        (("more",), "1", "invalid_payload"),
    ],
)
async def test_what_was_changed_after_it_was_signed_is_refused(
    net: Devnet, sqlite_url: str, where: tuple[str, ...], value: object, code: str
) -> None:
    payload = by_permit2(net.accounts[0])
    inner = payload[AUTH]
    for name in where[:-1]:
        inner = inner[name]
    inner[where[-1]] = value
    async with desk_at(net, sqlite_url) as desk:
        assert (await refused(desk, whole(offer_of(desk), payload))).code == code


async def test_one_ways_offer_is_not_paid_the_other_way(net: Devnet, sqlite_url: str) -> None:
    payer = net.accounts[0]
    async with desk_at(net, sqlite_url) as desk:
        usual, other = payment(payer, PAY_TO, UNITS), by_permit2(payer)
        for offer, payload in (
            (offer_of(desk), usual),
            (offer_of(desk, "eip3009"), other),
            (offer_of(desk) | {"extra": offer_of(desk, "eip3009")["extra"]}, other),
        ):
            refusal = await refused(desk, whole(offer, payload))
            assert refusal.code == "invalid_payment_requirements"
        both = await refused(desk, whole(offer_of(desk), usual | other))
        assert both.code == "invalid_payload"
        flat = {"x402Version": 1, "scheme": "exact", "network": "base-sepolia", "payload": other}
        assert (await refused(desk, flat)).code == "invalid_scheme"


async def test_where_it_is_off_it_is_refused(net: Devnet, sqlite_url: str) -> None:
    payload = by_permit2(net.accounts[0])
    async with desk_at(net, sqlite_url) as desk:
        offer = offer_of(desk)
    async with desk_at(net, sqlite_url, permit2=False) as desk:
        assert (await refused(desk, whole(offer, payload))).code == "invalid_scheme"
        with pytest.raises(Problem, match="Permit2 is not accepted"):
            decode_object(whole(offer, payload), permit2=desk.rails.settings.takes_permit2)


async def test_without_an_allowance_it_says_what_to_approve(net: Devnet, db_url: str) -> None:
    payer = net.accounts[5]
    async with desk_at(net, db_url) as desk:
        body = whole(offer_of(desk), by_permit2(payer))
        refusal = await refused(desk, body)
        assert (refusal.code, refusal.status) == ("PERMIT2_ALLOWANCE_REQUIRED", 412)
        told = {name: str(refusal.members[name]).lower() for name in ("spender", "token", "amount")}
        assert told == {"spender": permit2.PERMIT2, "token": USDC.address, "amount": str(UNITS)}
        approve(net, payer, UNITS)
        assert (await pay(desk, body)).payment.state == "succeeded"
        # What it was approved for is used up, and that is no reason to ask for more.
        assert (await pay(desk, body)).payment.state == "succeeded"


async def test_it_is_never_paid_from_credits(net: Devnet, sqlite_url: str) -> None:
    payer = net.accounts[0]
    async with desk_at(net, sqlite_url) as desk:
        await pay(desk, whole(offer_of(desk), by_permit2(payer)))
        offer = offer_of(desk, asked=TARGET)
        # All else is as it should be for that.
        payload = by_permit2(payer, amount=10_000, deadline=int(time.time()) + 100)
        presented = decode_object(whole(offer, payload), permit2=True)
        came = CameWith(TARGET, offers.CALL, b"c" * 32)

        def no_hold(account_id: int, units: int) -> Any:
            raise AssertionError((account_id, units))

        assert await from_credits.take(desk.rails, presented, came, no_hold) is None


# --- used before it was presented -------------------------------------------------------------


async def test_a_stranger_has_settled_it_already(net: Devnet, db_url: str) -> None:
    payer, payload = net.accounts[0], by_permit2(net.accounts[0])
    async with desk_at(net, db_url) as desk:
        body = whole(offer_of(desk), payload)
        theirs = settle_by_stranger(net, payload)
        told = await pay(desk, body)
        assert (told.payment.state, told.payment.tx_hash) == ("succeeded", theirs)
        assert (told.repeat, told.same_presenter) == (True, False)
        assert [(ref, units) for ref, _, units in await desk.minted()] == [(theirs, UNITS)]
        assert (await account(desk, payer.address)).available_units == UNITS


async def test_a_nonce_that_was_taken_back_is_refused(net: Devnet, sqlite_url: str) -> None:
    payload = by_permit2(net.accounts[0])
    take_back(net, payload)
    async with desk_at(net, sqlite_url) as desk:
        assert (await refused(desk, whole(offer_of(desk), payload))).code == "permit2_invalid_nonce"


async def test_two_payments_do_not_share_one_transfer(net: Devnet, db_url: str) -> None:
    """Both nonces are taken back, and one transfer carries them."""
    payer = net.accounts[0]
    payloads = [by_permit2(payer) for _ in range(2)]
    for payload in payloads:
        take_back(net, payload)
    data = b"\xa9\x05\x9c\xbb" + address_word(PAY_TO) + UNITS.to_bytes(32, "big")
    for payload in payloads:
        data += bytes.fromhex(permit2.parse(payload).nonce[2:])
    theirs = send_as(net, payer.address, USDC.address, data)
    async with desk_at(net, db_url) as desk:
        first = await pay(desk, whole(offer_of(desk), payloads[0]))
        assert (first.payment.state, first.payment.tx_hash) == ("succeeded", theirs)
        with pytest.raises(Problem) as raised:
            await pay(desk, whole(offer_of(desk), payloads[1]))
        assert raised.value.code == "permit2_invalid_nonce"
        async with desk.rails.db.read() as tx:
            assert await tx.fetchval("SELECT count(*) FROM payment") == 1
        assert [units for *_, units in await desk.minted()] == [UNITS]


# --- a payer who takes it back while we settle -------------------------------------------------


async def test_who_takes_back_what_we_sent_is_refused_before_that_is_proven(
    net: Devnet, db_url: str, faulty_node: FaultyNode
) -> None:
    payer, payload = net.accounts[0], by_permit2(net.accounts[0])
    net.rpc("anvil_mine", hex(120))  # Permit2 is no new contract
    faulty_node.fault("eth_sendRawTransaction", "drop")
    async with desk_at(net, db_url, faulty_node.url, wait_s=1) as desk:
        told = await pay(desk, whole(offer_of(desk), payload))
        assert told.payment.state == "processing"
        assert not await blocked(desk, payer)
        take_back(net, payload)
        async with desk.rails.db.read() as tx:
            raw = bytes(await tx.fetchval("SELECT raw FROM chain_tx"))
        failed = net.rpc("eth_sendRawTransaction", "0x" + raw.hex())
        assert net.receipt(failed)["status"] == "0x0"
        assert await recover(desk.rails, told.payment) == "processing"
        assert await blocked(desk, payer)
        assert not await blocked(desk, net.accounts[1])
        with pytest.raises(Problem) as raised:
            await pay(desk, whole(offer_of(desk), by_permit2(payer)))
        assert raised.value.code == "rate_limited"
        net.rpc("anvil_mine", hex(120))
        assert await recover(desk.rails, told.payment) == "failed"
        assert await blocked(desk, payer)
        assert await desk.minted() == []


async def blocked(desk: Desk, payer: Account) -> bool:
    async with desk.rails.db.read() as tx:
        now_ms = await tx.now_ms()
        return await budget.payer_is_blocked(
            tx, desk.rails.settings.chains[0], payer.address, now_ms
        )


# --- seen through two doors -------------------------------------------------------------------


async def row(desk: Desk, paid: Payment) -> Payment:
    async with desk.rails.db.read() as tx:
        found = await journal.by_id(tx, paid.id)
    assert found is not None
    return found


async def send(desk: Desk, paid: Payment) -> str:
    async with desk.rails.db.read() as tx:
        raw = await tx.fetchval("SELECT raw FROM chain_tx WHERE payment_id = $1", paid.id)
    tx_hash: str = desk.net.rpc("eth_sendRawTransaction", "0x" + bytes(raw).hex())
    assert desk.net.receipt(tx_hash)["status"] == "0x1"
    return tx_hash


async def look(desk: Desk) -> None:
    """The watcher of a process that is alone."""
    async with desk.rails.db.write() as tx:
        await tx.execute("UPDATE lease SET until_ms = 0")
    await Watch().look(desk.rails, desk.rails.settings.chains[0])


async def give(desk: Desk, tx_hash: str, recipient: str) -> str:
    """Somebody names the transaction."""
    (moved,) = await transfers.transfers_of(desk.rpc, tx_hash, USDC, PAY_TO) or []
    said = await claims.calldata_of(desk.rails, moved)

    async def work(tx: Tx) -> str:
        placed = await claims.give(tx, desk.rails.settings, moved, recipient, "", said)
        return "taken" if placed.taken else placed.row.state

    return await transact(desk.rails.db, work)


Door = Callable[[Desk, Payment, str], Awaitable[object]]


async def by_recovery(desk: Desk, paid: Payment, _tx_hash: str) -> object:
    return await recover(desk.rails, await row(desk, paid))


async def by_watcher(desk: Desk, _paid: Payment, _tx_hash: str) -> object:
    await Watch().look(desk.rails, desk.rails.settings.chains[0])
    return await Watch().look(desk.rails, desk.rails.settings.chains[0])


async def by_hash(desk: Desk, paid: Payment, tx_hash: str) -> object:
    return await give(desk, tx_hash, paid.payer or "")


async def by_another(desk: Desk, _paid: Payment, tx_hash: str) -> object:
    return await give(desk, tx_hash, "0x" + "99" * 20)


DOORS: list[Door] = [by_recovery, by_watcher, by_hash, by_another]


@pytest.mark.parametrize("stranger", [False, True], ids=["ours", "strangers"])
@pytest.mark.parametrize("pair", list(combinations_with_replacement(range(4), 2)), ids=str)
async def test_two_doors_at_once_at_two_nodes_are_one_mint(
    net: Devnet,
    postgres_url: str,
    faulty_node: FaultyNode,
    pair: tuple[int, int],
    stranger: bool,
) -> None:
    payer = net.accounts[0]
    faulty_node.fault("eth_sendRawTransaction", "drop")
    async with (
        desk_at(net, postgres_url, faulty_node.url, wait_s=1, mint_at=AT_ONCE) as one,
        desk_at(net, postgres_url, mint_at=AT_ONCE) as two,
    ):
        await watcher.begin(one.rails, one.rails.settings.chains[0], USDC)
        payload = by_permit2(payer)
        told = await pay(one, whole(offer_of(one), payload))
        assert told.payment.state == "processing"
        tx_hash = settle_by_stranger(net, payload) if stranger else await send(one, told.payment)
        net.mine(70)  # safe: the watcher would credit a deposit
        await asyncio.gather(
            *(DOORS[i](desk, told.payment, tx_hash) for i in pair for desk in (one, two))
        )
        await by_recovery(two, told.payment, tx_hash)
        await look(two)
        await look(two)
        done = await row(one, told.payment)
        assert (done.state, done.tx_hash) == ("succeeded", tx_hash)
        assert await one.minted() == [(tx_hash, done.id, UNITS)]
        async with one.rails.db.read() as tx:
            assert await tx.fetchval("SELECT count(*) FROM payment") == 1
            assert await tx.fetchval("SELECT source FROM lot") == "x402"
        assert (await account(one, payer.address)).available_units == UNITS
        assert await helpers.faults(one.rails.db) == []


AT_ONCE = {"instant_limit": "$5", "otherwise": "safe"}


@pytest.mark.parametrize("first", [by_watcher, by_hash], ids=["watcher", "hash"])
@pytest.mark.parametrize("stranger", [False, True], ids=["ours", "strangers"])
async def test_what_was_given_to_another_wallet_is_no_deposit(
    net: Devnet, db_url: str, faulty_node: FaultyNode, first: Door, stranger: bool
) -> None:
    """The payer signed its credits away: whoever sees the transfer first must not credit it."""
    payer, other = net.accounts[0], "0x" + "77" * 20
    faulty_node.fault("eth_sendRawTransaction", "drop")
    async with desk_at(net, db_url, faulty_node.url, wait_s=1) as desk:
        await watcher.begin(desk.rails, desk.rails.settings.chains[0], USDC)
        payload = by_permit2(payer)
        told = await pay(desk, whole(offer_of(desk), payload))
        async with desk.rails.db.write() as tx:
            await tx.execute("UPDATE payment SET recipient = $1", other)
        tx_hash = settle_by_stranger(net, payload) if stranger else await send(desk, told.payment)
        net.mine(70)
        await first(desk, told.payment, tx_hash)
        assert (await row(desk, told.payment)).state == "succeeded"
        assert await desk.minted() == [(tx_hash, told.payment.id, UNITS)]
        assert (await account(desk, other)).available_units == UNITS


async def test_a_deposit_of_the_same_amount_stays_one(
    net: Devnet, db_url: str, faulty_node: FaultyNode
) -> None:
    payer = net.accounts[0]
    faulty_node.fault("eth_sendRawTransaction", "drop")
    async with desk_at(net, db_url, faulty_node.url, wait_s=1) as desk:
        await watcher.begin(desk.rails, desk.rails.settings.chains[0], USDC)
        told = await pay(desk, whole(offer_of(desk), by_permit2(payer)))
        deposit = net.transfer(payer.address, PAY_TO, UNITS)
        net.mine(70)
        assert await give(desk, deposit, payer.address) == "minted"
        assert (await row(desk, told.payment)).state == "processing"
        tx_hash = await send(desk, told.payment)
        assert await by_recovery(desk, told.payment, tx_hash) == "succeeded"
        assert [(ref, units) for ref, _, units in await desk.minted()] == [
            (deposit, UNITS),
            (tx_hash, UNITS),
        ]


async def test_one_that_waits_for_its_block_keeps_its_transfer(
    net: Devnet, db_url: str, faulty_node: FaultyNode
) -> None:
    """Looked at again and again while its amount waits for a safe block."""
    payer = net.accounts[0]
    faulty_node.fault("eth_sendRawTransaction", "drop")
    waits = {"instant_limit": "$0.5", "otherwise": "safe"}
    async with desk_at(net, db_url, faulty_node.url, wait_s=1, mint_at=waits) as desk:
        await watcher.begin(desk.rails, desk.rails.settings.chains[0], USDC)
        payload = by_permit2(payer)
        told = await pay(desk, whole(offer_of(desk), payload))
        tx_hash = settle_by_stranger(net, payload)
        for _ in range(3):
            assert await by_recovery(desk, told.payment, tx_hash) == "processing"
            assert await give(desk, tx_hash, payer.address) == "waiting"
            assert await give(desk, tx_hash, "0x" + "99" * 20) == "taken"
        assert not await blocked(desk, payer)
        net.mine(140)
        assert await by_recovery(desk, told.payment, tx_hash) == "processing"
        await look(desk)
        assert (await row(desk, told.payment)).state == "succeeded"
        assert await desk.minted() == [(tx_hash, told.payment.id, UNITS)]


async def test_the_deadline_itself_is_still_good(net: Devnet, sqlite_url: str) -> None:
    """Unlike validBefore: a payment is given up a second later."""
    payer, until_s = net.accounts[0], int(time.time()) + 300
    async with desk_at(net, sqlite_url) as desk:
        told = await pay(desk, whole(offer_of(desk), by_permit2(payer, deadline=until_s)))
        assert told.payment.valid_before_s == until_s + 1
        other = by_permit2(payer, deadline=until_s + 600)
        net.rpc("evm_setNextBlockTimestamp", until_s + 600)
        assert net.receipt(settle_by_stranger(net, other))["status"] == "0x1"


async def test_ours_is_of_the_payment_it_was_made_for(
    net: Devnet, db_url: str, faulty_node: FaultyNode
) -> None:
    """A nonce may be a number that stands in every calldata, such as the length of a signature."""
    payer = net.accounts[0]
    faulty_node.fault("eth_sendRawTransaction", "drop")
    async with desk_at(net, db_url, faulty_node.url, wait_s=1) as desk:
        everywhere = await pay(desk, whole(offer_of(desk), by_permit2(payer, nonce=65)))
        faulty_node.faults.clear()
        # Sent, but the first one's nonce of the gas account has to be used before.
        own = await pay(desk, whole(offer_of(desk), by_permit2(payer)))
        first = await send(desk, everywhere.payment)
        async with desk.rails.db.read() as tx:
            raw = await tx.fetchval(
                "SELECT tx_hash FROM chain_tx WHERE payment_id = $1", own.payment.id
            )
        net.receipt(raw)
        patient = desk.patient()
        # The second transaction carries 65 too, and is asked for first.
        async with patient.rails.db.read() as tx:
            (moved,) = await transfers.transfers_of(desk.rpc, raw, USDC, PAY_TO) or []
            assert await journal.owner_of(tx, moved) == own.payment.id
        async with patient.rails.db.write() as tx:
            assert await journal.take(tx, everywhere.payment, [moved], 1) is None
        assert await recover(patient.rails, everywhere.payment) == "succeeded"
        assert await recover(patient.rails, own.payment) == "succeeded"
        assert {(ref, paid) for ref, paid, _ in await desk.minted()} == {
            (first, everywhere.payment.id),
            (raw, own.payment.id),
        }
