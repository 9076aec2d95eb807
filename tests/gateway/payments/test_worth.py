"""Gas against price: what a settlement costs in dollars, and what is offered because of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anvil.devnet import Devnet
from chain import rollup, sender
from chain.networks import NETWORKS
from chain.schemes import eip3009
from chain.sender import Market
from gateway.db import Database, DatabaseUnavailable
from gateway.errors import Problem
from gateway.payments import engine, gas, offers, worth
from gateway.payments.offers import CALL, CREDITS, Asked, Floors
from gateway.payments.order import CameWith, order_of
from gateway.payments.rails import Rails
from gateway.payments.wire import Presented
from gateway.settings import Chain, Settings
from tests.fixtures_chain import NETWORK, FaultyNode, payment
from tests.fixtures_rollup import plant
from tests.gateway.ledger import helpers
from tests.gateway.payments.parts import KEYS, PAY_TO, SETTLER_KEY, Desk, opened_desk, settings_for

GWEI = 10**9
CENT = 10_000


def shop(native_usd: str = "$2000", **chain: Any) -> Settings:
    given_chain = {"rpc": ["http://127.0.0.1:1"], "pay_to": PAY_TO, "settler_key": SETTLER_KEY}
    return settings_for(chains={"base-sepolia": given_chain | {"native_usd": native_usd} | chain})


def at(gwei: int) -> Market:
    """Gas at this price."""
    return Market(gwei * GWEI, 0, 0, 1, 1)


# --- what it costs --------------------------------------------------------------------------------


def test_a_settlement_in_dollars() -> None:
    (chain,) = shop("$2500").chains
    gwei = worth.settlement_gwei(at(2), 0)
    assert gwei == 180_000  # 90,000 gas at 2 gwei
    assert worth.cost_units(chain, gwei) == 450_000  # $0.45
    assert worth.floor_units(chain, gwei) == 1_350_000
    assert worth.settlement_gwei(at(2), 10 * GWEI) == 180_000 + 10 * worth.SETTLE_BYTES


def test_without_a_price_of_the_coin_nothing_hangs_on_gas() -> None:
    (chain,) = shop("").chains
    assert worth.cost_units(chain, 10**12) is None
    assert worth.floor_units(chain, 10**12) == 0


@given(st.integers(0, 2**256), st.integers(1, 10**15))
def test_no_cost_is_rounded_down_or_too_large_to_tell(wei: int, usd: int) -> None:
    """Whatever a node says: it fits a column and a number of JSON."""
    gwei = worth.settlement_gwei(Market(wei, 0, 0, 1, 1), 0)
    assert gwei * GWEI >= min(wei * worth.SETTLE_GAS, 2**53)
    chain = Chain.model_construct(native_usd_units=usd)
    cost = worth.cost_units(chain, gwei)
    assert cost is not None and cost * GWEI >= gwei * usd
    assert min(3 * cost, 10**15) == worth.floor_units(chain, gwei) < 2**53


async def test_a_transaction_is_no_longer_than_it_is_taken_for(
    chain_net: Devnet, sqlite_url: str
) -> None:
    """Both for one settlement that stands for all, and for the reservation of each."""
    async with opened_desk(chain_net, sqlite_url) as desk:
        fees = sender.Fees(2**32, 2**50, 2**50, 0)
        call = desk.job(chain_net.accounts[0]).call
        key = chain_net.settler.private_key
        raw = sender.sign(key, NETWORK.chain_id, 2**40, call.to, call.data, fees).raw
        assert len(raw) <= worth.SETTLE_BYTES
        assert len(raw) <= worth.ENVELOPE_BYTES + len(call.data)


# --- what is offered ------------------------------------------------------------------------------


@pytest.fixture
async def books(sqlite_url: str) -> AsyncIterator[Database]:
    db = await Database.connect(sqlite_url)
    yield db
    await db.close()


class Clock:
    now_ms = 1_000_000

    def __call__(self) -> int:
        return self.now_ms


async def noted(rails: Rails, gwei: int) -> None:
    async with rails.db.write() as tx:
        await worth.note(tx, rails.settings.chains[0], gwei, await tx.now_ms())


async def test_what_is_noted_is_what_every_process_offers_by(books: Database) -> None:
    """A rise withholds at once; the lowest floor of an offer's life is remembered for as long."""
    rails = Rails(shop(), books, KEYS, {})
    clock = Clock()
    follower = worth.Follower(rails, clock)
    caip2 = NETWORK.caip2

    async def floors(gwei: int | None, later_s: int = 0) -> tuple[Floors, Floors]:
        if gwei is not None:
            await noted(rails, gwei)
        clock.now_ms += later_s * 1_000
        await follower.look()
        return rails.floors, rails.lately

    assert await floors(None) == ((), ())  # nobody has looked yet
    assert await floors(1_666) == ((), ())  # $0.009996
    assert await floors(1_667) == (((caip2, 10_002),), ())
    # While an offer lives, and some seconds for processes that read the same later.
    life_s = rails.settings.server.offer_timeout_s
    assert await floors(5_000, life_s + 9) == (((caip2, 30_000),), ())
    assert await floors(None, 2) == (((caip2, 30_000),), ((caip2, 10_002),))
    assert await floors(None, life_s + 11) == (((caip2, 30_000),),) * 2
    assert await floors(4_000) == (((caip2, 24_000),),) * 2
    assert await floors(10) == ((), ())
    assert await floors(5_000) == (((caip2, 30_000),), ())


async def test_a_change_is_one_line_in_the_log(
    books: Database, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    rails = Rails(shop(), books, KEYS, {})
    follower = worth.Follower(rails)
    for gwei in (10, 5_000, 6_000, 6_000, 10, 10):
        await noted(rails, gwei)
        await follower.look()
    dear, cheap = (record.getMessage() for record in caplog.records)
    assert "no payment below $0.03 is offered" in dear
    assert "cheap enough again" in cheap


class Away:
    """A database that does not answer: a real one cannot be told to come back in between."""

    def __init__(self) -> None:
        self.asked = 0

    def read(self) -> Any:
        self.asked += 1
        raise DatabaseUnavailable("away")


async def test_what_was_read_last_holds_while_the_database_is_away(
    books: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    rails = Rails(shop(), books, KEYS, {})
    await noted(rails, 5_000)
    await worth.Follower(rails).look()
    before, away, stopping = rails.floors, Away(), asyncio.Event()
    assert before
    monkeypatch.setattr(worth, "FOLLOW_S", 0)
    rails.db = away  # type: ignore[assignment]  # as said there
    task = asyncio.create_task(worth.following(rails, stopping))
    async with asyncio.timeout(30):
        while away.asked < 3:
            await asyncio.sleep(0)
        assert rails.floors == before
        rails.db = books
        await noted(rails, 10)
        while rails.floors:
            await asyncio.sleep(0.01)
        stopping.set()
        await task


async def test_who_follows_stops_with_the_process(books: Database) -> None:
    stopping = asyncio.Event()
    rails = Rails(shop(), books, KEYS, {})
    await noted(rails, 5_000)
    task = asyncio.create_task(worth.following(rails, stopping))
    async with asyncio.timeout(30):
        while not rails.floors:
            await asyncio.sleep(0.01)
        stopping.set()
        await task


async def test_without_a_price_nobody_follows(books: Database) -> None:
    rails = Rails(shop(""), books, KEYS, {})
    await noted(rails, 5_000)
    await worth.following(rails, asyncio.Event())  # returns
    assert rails.floors == ()


# --- a payment without a token --------------------------------------------------------------------


def v1(units: int, purpose: str, rails: Rails) -> str:
    """The purpose for which an x402 v1 payment of this amount is taken for a call of $0.002."""
    from tests.e2e.stage import new_account

    auth = eip3009.parse(payment(new_account(), PAY_TO, units))
    presented = Presented(1, "exact", NETWORK.v1_name or "", auth)
    came = CameWith(Asked("GET", b"/", 2_000), purpose, b"content")
    return order_of(rails, presented, came, int(time.time())).purpose


async def test_a_small_payment_is_taken_while_an_offer_of_it_may_live(books: Database) -> None:
    """Its payer was shown that offer a moment ago; later nobody was, and it is not settled."""
    rails = Rails(shop(), books, KEYS, {})
    floor = ((NETWORK.caip2, 30_000),)
    assert v1(CENT, CALL, rails) == CALL
    rails.floors = floor
    assert v1(CENT, CALL, rails) == CALL
    assert v1(CENT, CREDITS, rails) == CREDITS
    rails.lately = floor
    for purpose in (CALL, CREDITS):
        with pytest.raises(Problem, match="not on offer") as refusal:
            v1(CENT, purpose, rails)
        assert refusal.value.meaning.status == 402  # with the offers of now
    assert v1(1_000_000, CALL, rails) == CALL  # the smallest pack stands for the call
    assert v1(5_000_000, CALL, rails) == CREDITS
    assert v1(30_000, CREDITS, rails) == CREDITS


# --- on a chain -----------------------------------------------------------------------------------


@pytest.fixture
async def desk(chain_net: Devnet, sqlite_url: str) -> AsyncIterator[Desk]:
    async with opened_desk(chain_net, sqlite_url, native_usd="$2000") as found:
        yield found
        assert await helpers.faults(found.rails.db) == []


async def noted_by_tending(desk: Desk) -> int:
    (chain,) = desk.rails.settings.chains
    await gas.tend_all(desk.rails)  # makes the account's row
    assert await gas.tend(desk.rails, desk.rpc, chain, desk.net.settler.address)
    async with desk.rails.db.read() as tx:
        found = await worth.noted_gwei(tx, chain)
    assert found is not None
    return found


async def test_whoever_looks_after_a_gas_account_notes_the_price(desk: Desk) -> None:
    now = await sender.market(desk.rpc, desk.net.settler.address)
    assert await noted_by_tending(desk) == worth.settlement_gwei(now, 0)


async def test_the_price_is_looked_at_every_few_seconds(desk: Desk) -> None:
    """Not once a minute, as where nothing hangs on it."""
    (chain,) = desk.rails.settings.chains
    without = chain.model_copy(update={"native_usd_units": None})
    await gas.tend_all(desk.rails)
    assert not await gas._is_due(desk.rails, chain, desk.net.settler.address)
    async with desk.rails.db.write() as tx:
        await tx.execute("UPDATE gas_account SET noted_ms = noted_ms - 10001")
    assert await gas._is_due(desk.rails, chain, desk.net.settler.address)
    assert not await gas._is_due(desk.rails, without, desk.net.settler.address)


async def test_data_on_l1_is_reserved_before_it_is_paid(desk: Desk) -> None:
    """In the hour's gas money while the transaction is under way, and in what an offer must be."""
    plant(desk.net, 40 * GWEI)
    byte_wei = await rollup.byte_wei(desk.rpc)
    desk.net.rpc("evm_setAutomine", False)
    try:
        job = desk.job(desk.net.accounts[0])
        sending = asyncio.create_task(engine.settle(desk.rails, job))
        async with asyncio.timeout(30):
            while not await desk.sent_for(job):
                await asyncio.sleep(0.01)
        (sent,) = await desk.sent_for(job)
        now = await sender.market(desk.rpc, desk.net.settler.address)
        async with desk.rails.db.read() as tx:
            reserved = await tx.fetchval("SELECT cost_gwei FROM chain_nonce")
        limit = sender.fees_of(sent.raw).gas_limit
        assert reserved >= gas.expected_gwei(limit, now, byte_wei * len(sent.raw))
        assert reserved - gas.expected_gwei(limit, now, 0) < 2 * byte_wei * len(sent.raw) // GWEI
    finally:
        desk.net.rpc("evm_setAutomine", True)
        desk.net.mine()
    await sending
    plain = worth.settlement_gwei(await sender.market(desk.rpc, desk.net.settler.address), 0)
    assert await noted_by_tending(desk) >= plain + worth.SETTLE_BYTES * byte_wei // GWEI


async def test_an_oracle_that_fails_stops_no_payment_and_is_an_alarm(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    """What it said last holds, one line is logged, and ``/readyz`` and ``/metrics`` say so."""
    (chain,) = desk.rails.settings.chains
    plant(desk.net, 40 * GWEI)
    good = await worth.byte_wei(desk.rails, desk.rpc, chain)
    assert good and worth.data_fault(desk.rails, chain) is None
    plant(desk.net, 40 * GWEI, mood=3)
    for _ in range(3):
        desk.rails.data_prices[chain.caip2].until_s = 0
        assert await worth.byte_wei(desk.rails, desk.rpc, chain) == good
    assert worth.data_fault(desk.rails, chain) == "l1_fee_unknown"
    assert caplog.text.count("what L1 data costs is not known") == 1
    assert await engine.settle(desk.rails, desk.job(desk.net.accounts[0])) is not None
    plant(desk.net, 80 * GWEI)
    desk.rails.data_prices[chain.caip2].until_s = 0
    assert await worth.byte_wei(desk.rails, desk.rpc, chain) > good
    assert worth.data_fault(desk.rails, chain) is None


async def test_it_is_asked_once_in_a_while(
    chain_net: Devnet, sqlite_url: str, faulty_node: FaultyNode
) -> None:
    def questions() -> int:
        calls = [each["params"][0] for each in faulty_node.seen if each["method"] == "eth_call"]
        return sum(call.get("to") == rollup.ORACLE for call in calls)

    async with opened_desk(chain_net, sqlite_url, faulty_node.url) as desk:
        (chain,) = desk.rails.settings.chains
        for planted in (False, True):
            if planted:
                plant(chain_net, 40 * GWEI)
                desk.rails.data_prices.clear()
            before = questions()
            for _ in range(3):
                await worth.byte_wei(desk.rails, desk.rpc, chain)
            assert questions() == before + 1


async def test_a_missing_oracle_is_an_alarm_but_on_a_test_network(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    (chain,) = desk.rails.settings.chains
    assert await worth.byte_wei(desk.rails, desk.rpc, chain) == 0
    assert worth.data_fault(desk.rails, chain) is None
    assert "L1" not in caplog.text
    desk.rails.data_prices.clear()
    for_real = replace(NETWORKS["base-sepolia"], testnet=False)
    main = chain.model_copy(update={"network": for_real})
    assert await worth.byte_wei(desk.rails, desk.rpc, main) == 0
    assert worth.data_fault(desk.rails, main) == "l1_oracle_missing"
    assert "L1" in caplog.text


# --- the offers themselves ------------------------------------------------------------------------


def amounts(found: Any, purpose: str, method: str = offers.EIP3009) -> list[int]:
    return [t.amount_units for t in found if (t.purpose, t.method) == (purpose, method)]


@given(st.integers(0, 30_000_000), st.integers(0, 40_000_000))
def test_nothing_is_offered_below_the_floor(price: int, floor: int) -> None:
    """The call stands first if anything is offered, for what it costs or for the least pack that is
    worth it; by Permit2 at twice the floor."""
    settings = shop(permit2=True)
    packs = settings.credits.packs_units
    floors = ((NETWORK.caip2, floor),)
    found = offers.terms_for_call(settings, price, price, floors)

    def wanted(least: int) -> list[int]:
        usual = max(price, CENT)
        return [usual] if usual >= least else [p for p in packs if p >= max(usual, least)][:1]

    call = amounts(found, CALL)
    assert call == wanted(floor)
    assert amounts(found, CALL, offers.PERMIT2) == wanted(2 * floor)
    left = [p for p in packs if p >= max(price, floor) and [p] != call]
    assert amounts(found, CREDITS) == left
    assert not found or found[0].purpose == CALL or not call
    bought = offers.terms_for_credits(settings, price, floors)
    assert amounts(bought, CREDITS) == [price] * (price >= max(CENT, floor))
    permit2 = amounts(bought, CREDITS, offers.PERMIT2)
    assert permit2 == [price] * (price >= max(CENT, 2 * floor))
