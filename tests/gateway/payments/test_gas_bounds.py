"""What may be spent on gas has bounds, whatever nodes say and however many look after it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import pytest

from anvil.devnet import Devnet, running
from chain import sender
from chain.errors import Unavailable
from chain.networks import NETWORKS
from chain.sender import Fees, Market, Prepared
from gateway.db import Database, DatabaseUnavailable, Tx, transact
from gateway.payments import budget, engine, gas, nonces, worth
from gateway.payments.lane import Handed, Job
from gateway.payments.recover import recover
from tests.fixtures_chain import NETWORK, FaultyNode
from tests.gateway.ledger import helpers
from tests.gateway.payments.parts import Desk, opened_desk

GWEI = 10**9
UNDERPRICED = {"code": -32000, "message": "replacement transaction underpriced"}


@pytest.fixture
def net() -> Iterator[Devnet]:
    """A chain of the test's own, whose prices it can change."""
    with running() as found:
        yield found


@pytest.fixture
def still(net: Devnet) -> Devnet:
    """Blocks are made on demand only."""
    net.rpc("evm_setAutomine", False)
    return net


@pytest.fixture
async def faulty_node(net: Devnet) -> AsyncIterator[FaultyNode]:
    node = FaultyNode(net)
    await node.start()
    yield node
    await node.stop()


@pytest.fixture
async def desk(net: Devnet, sqlite_url: str) -> AsyncIterator[Desk]:
    async with opened_desk(net, sqlite_url, wait_s=1) as found:
        yield found
        assert await helpers.faults(found.rails.db) == []


async def pending(desk: Desk, *numbers: int) -> list[Job]:
    """Jobs that were sent, each by itself, and are in no block."""
    jobs = [replace(desk.job(desk.net.accounts[n]), alone=True) for n in numbers]
    outcomes = await asyncio.gather(*(engine.settle(desk.rails, job) for job in jobs))
    assert all(isinstance(each, Handed) and each.receipt is None for each in outcomes)
    return jobs


async def tend(desk: Desk) -> None:
    chain = desk.rails.settings.chains[0]
    who = desk.net.settler.address
    assert await gas.tend(desk.rails, desk.rpc, chain, who, patience_ms=0)


async def age(desk: Desk, seconds: int) -> None:
    """Everything that was signed was signed so much earlier."""
    async with desk.rails.db.write() as tx:
        for table in ("chain_tx", "chain_nonce"):
            await tx.execute(f"UPDATE {table} SET at_ms = at_ms - $1", seconds * 1_000)


async def reserved(desk: Desk) -> list[int]:
    async with desk.rails.db.read() as tx:
        rows = await tx.fetch("SELECT cost_gwei FROM chain_nonce ORDER BY nonce")
    return [row["cost_gwei"] for row in rows]


async def succeeds(desk: Desk, job: Job) -> None:
    row = await desk.row(job)
    assert row is not None and await recover(desk.rails, row) == "succeeded"


def signed_again(desk: Desk, old: Prepared, more_wei: int) -> Prepared:
    """What replaces a transaction, by one of those who look after it."""
    fees = sender.fees_of(old.raw)
    fees = Fees(fees.gas_limit, fees.max_fee_wei + more_wei, fees.tip_wei + more_wei, fees.nonce)
    key = desk.net.settler.private_key
    return sender.sign(key, NETWORK.chain_id, old.nonce, *sender.call_of(old.raw), fees)


# --- replacements ---------------------------------------------------------------------------------


async def test_of_two_replacements_at_once_one_is_stored(
    net: Devnet, postgres_url: str, still: Devnet
) -> None:
    """Two nodes saw the same newest transaction: the second waits for the first, and then knows."""
    async with opened_desk(net, postgres_url, wait_s=1) as desk:
        (job,) = await pending(desk, 0)
        (old,) = await desk.sent_for(job)
        one, two = (signed_again(desk, old, more * GWEI) for more in (1, 2))

        async def second(tx: Tx) -> bool:
            return await nonces.replace(tx, two, old.tx_hash, await tx.now_ms(), 1)

        async with desk.rails.db.write() as tx:
            assert await nonces.replace(tx, one, old.tx_hash, await tx.now_ms(), 1)
            later = asyncio.create_task(transact(desk.rails.db, second))
            async with asyncio.timeout(60):
                while not later.done() and not await _somebody_waits(desk.rails.db):
                    await asyncio.sleep(0.02)
        assert not await later
        assert await desk.sent_for(job) == [one, old]


async def _somebody_waits(db: Database) -> bool:
    async with db.read() as tx:
        waiting: int = await tx.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND wait_event_type = 'Lock'"
        )
    return waiting > 0


async def test_what_a_block_has_used_is_not_replaced(desk: Desk, still: Devnet) -> None:
    (job,) = await pending(desk, 0)
    (old,) = await desk.sent_for(job)
    async with desk.rails.db.write() as tx:
        now_ms = await tx.now_ms()
        await nonces.close(tx, old, 7, now_ms)
        fresh = signed_again(desk, old, GWEI)
        assert not await nonces.replace(tx, fresh, old.tx_hash, now_ms, 9)
    assert await desk.sent_for(job) == [old]
    assert await reserved(desk) == [7]


async def test_what_is_offered_more_takes_more_of_the_budget(desk: Desk, still: Devnet) -> None:
    (job,) = await pending(desk, 0)
    (before,) = await reserved(desk)
    still.rpc("anvil_setNextBlockBaseFeePerGas", hex(40 * GWEI))
    still.mine()
    await age(desk, 11)
    await tend(desk)
    newest, _ = await desk.sent_for(job)
    (after,) = await reserved(desk)
    assert after * GWEI >= sender.fees_of(newest.raw).gas_limit * 40 * GWEI > before * GWEI
    # It falls again when the price does, only by what a block says.
    async with desk.rails.db.write() as tx:
        fresh = signed_again(desk, newest, GWEI)
        assert await nonces.replace(tx, fresh, newest.tx_hash, await tx.now_ms(), 1)
    assert await reserved(desk) == [after]


async def test_a_node_that_finds_every_price_too_low_is_not_paid_any(
    net: Devnet, sqlite_url: str, still: Devnet, faulty_node: FaultyNode
) -> None:
    """It is offered more up to three times the price of now, and then no more; a node that means it
    finds the transaction dear enough long before."""
    faulty_node.fault("eth_sendRawTransaction", "error", UNDERPRICED)
    async with opened_desk(net, sqlite_url, faulty_node.url, wait_s=1) as desk:
        (job,) = await pending(desk, 0)
        for _ in range(20):
            await tend(desk)
        sent = await desk.sent_for(job)
        now = await sender.market(desk.rpc, net.settler.address)
        assert 2 <= len(sent) < 15
        dearest = sender.fees_of(sent[0].raw)
        assert dearest.max_fee_wei < 4 * (2 * now.base_wei + now.tip_wei)
        faulty_node.faults.clear()
        await tend(desk)
        still.mine()
        await succeeds(desk, job)


async def test_a_tip_that_a_node_makes_up_is_not_paid(
    net: Devnet, sqlite_url: str, still: Devnet, faulty_node: FaultyNode
) -> None:
    """Neither at once nor step by step: a base fee is the chain's word, a tip is paid whole."""
    most_wei = NETWORK.most_tip_gwei * GWEI
    faulty_node.fault("eth_maxPriorityFeePerGas", "change", lambda _: hex(10**18))
    faulty_node.fault("eth_getTransactionByHash", "change", lambda _: None)

    def block(asked: dict[str, Any], true: Any) -> Any:
        return true and {**true, "baseFeePerGas": hex(10**13)}

    async with opened_desk(net, sqlite_url, faulty_node.url, wait_s=1) as desk:
        (job,) = await pending(desk, 0)
        faulty_node.fault("eth_getBlockByNumber", "change_by", block)
        for _ in range(4):
            await age(desk, 11)
            await tend(desk)
        tips = [sender.fees_of(each.raw).tip_wei for each in await desk.sent_for(job)]
        assert max(tips) == most_wei
        faulty_node.faults.clear()
        still.mine()
        await succeeds(desk, job)


def test_no_tip_above_what_is_believed_replaces_anything() -> None:
    now = Market(1_000, 5, 9, 1, 1)
    assert sender.raised(Fees(100, 800, 80, 7), now, None, 91) == Fees(100, 2_005, 91, 7)
    assert sender.raised(Fees(100, 800, 80, 7), now, None, 90) is None


def test_every_network_has_a_bound_for_tips() -> None:
    bounds = {name: row.most_tip_gwei for name, row in NETWORKS.items()}
    assert all(0 < most <= 1_000 for most in bounds.values())
    assert {bounds[name] for name in ("base", "base-sepolia", "optimism", "arbitrum")} == {5}


# --- the hour's budget ----------------------------------------------------------------------------


async def test_a_transaction_that_does_not_fit_the_budget_is_not_sent(
    net: Devnet, sqlite_url: str
) -> None:
    """Not the one that is too dear by itself, nor the one that passes what is left."""
    async with opened_desk(net, sqlite_url, gas_per_hour="0.01") as desk:
        net.rpc("anvil_setNextBlockBaseFeePerGas", hex(10_000 * GWEI))
        net.mine()
        job = desk.job(net.accounts[0])
        with pytest.raises(Unavailable) as error:
            await engine.settle(desk.rails, job)
        assert error.value.code == "gas_budget_spent" and "this transaction" in error.value.detail
        assert await desk.row(job) is None and await reserved(desk) == []
        net.rpc("anvil_setNextBlockBaseFeePerGas", hex(GWEI))
        net.mine()
        assert await engine.settle(desk.rails, job) is not None
        async with desk.rails.db.write() as tx:
            await tx.execute("UPDATE chain_nonce SET cost_gwei = 9999999")
        other = desk.job(net.accounts[1])
        with pytest.raises(Unavailable, match="gas_budget_spent"):
            await engine.settle(desk.rails, other)
        assert await desk.row(other) is None and await reserved(desk) == [9_999_999]


@pytest.mark.parametrize(
    ("spent", "counted", "good"),
    [(99, False, True), (100, False, False), (100, True, True), (101, True, False)],
)
async def test_the_budget_is_the_most(
    net: Devnet, sqlite_url: str, spent: int, counted: bool, good: bool
) -> None:
    async with opened_desk(net, sqlite_url) as desk:
        chain = desk.rails.settings.chains[0].model_copy(update={"gas_per_hour_gwei": 100})
        async with desk.rails.db.write() as tx:
            now_ms = await tx.now_ms()
            call = nonces.Call("pay_none", "0x" + "00" * 20, b"")
            await nonces.allot(tx, chain.caip2, "0x" + "aa" * 20, 0, [call], now_ms, spent)
            if good:
                await budget.require(tx, chain, now_ms, counted=counted)
            else:
                with pytest.raises(Unavailable, match="gas_budget_spent"):
                    await budget.require(tx, chain, now_ms, counted=counted)


@pytest.mark.parametrize(("left", "told"), [(0, True), (150, True), (151, False), (152, False)])
async def test_a_budget_without_room_for_a_payment_is_told(
    net: Devnet, sqlite_url: str, left: int, told: bool
) -> None:
    """Where an operator looks, although some of it is left: the next payment is refused."""
    async with opened_desk(net, sqlite_url, gas_per_hour="0.000001") as desk:
        (chain,) = desk.rails.settings.chains
        async with desk.rails.db.write() as tx:
            now_ms = await tx.now_ms()
            call = nonces.Call("pay_none", "0x" + "00" * 20, b"")
            who = net.settler.address
            await nonces.allot(tx, chain.caip2, who, 0, [call], now_ms, 1_000 - left)
            assert await budget.is_spent(tx, chain, now_ms) is (left == 0)  # nobody has looked yet
            await worth.note(tx, chain, 101, now_ms)  # and half as much again is reserved
            assert await budget.is_spent(tx, chain, now_ms) is told
        assert await gas.standing(desk.rails) == (
            {NETWORK.caip2: "gas_budget_spent"} if told else {}
        )


# --- an account without money ---------------------------------------------------------------------


async def test_an_account_that_turns_out_empty_signs_no_more(desk: Desk, net: Devnet) -> None:
    """Nobody has looked at it yet. The payment that finds out waits, and is settled when there is
    money again; no other is claimed meanwhile."""
    net.rpc("anvil_setBalance", net.settler.address, "0x0")
    job, other = desk.job(net.accounts[0]), desk.job(net.accounts[1])
    outcome = await engine.settle(desk.rails, job)
    assert outcome is not None and outcome.receipt is None
    with pytest.raises(Unavailable) as error:
        await engine.settle(desk.rails, other)
    assert error.value.code == "gas_account_empty"
    assert await desk.row(other) is None
    assert list((await gas.standing(desk.rails)).values()) == ["empty"]
    net.rpc("anvil_setBalance", net.settler.address, hex(10**18))
    await tend(desk)
    await succeeds(desk, job)
    assert await gas.standing(desk.rails) == {}
    assert await engine.settle(desk.rails, other) is not None


# --- looking after several ------------------------------------------------------------------------


async def test_a_receipt_that_cannot_be_read_keeps_no_other_waiting(
    net: Devnet, sqlite_url: str, still: Devnet, faulty_node: FaultyNode
) -> None:
    async with opened_desk(net, sqlite_url, faulty_node.url, wait_s=1) as desk:
        one, two = await pending(desk, 0, 1)
        bad = (await desk.sent_for(one))[0].tx_hash
        still.mine()

        def garbled(asked: dict[str, Any], true: Any) -> Any:
            return "0x" if asked["params"] == [bad] else true

        faulty_node.fault("eth_getTransactionReceipt", "change_by", garbled)
        await tend(desk)
        async with desk.rails.db.read() as tx:
            left = await nonces.open_of(tx, NETWORK.caip2, net.settler.address, 9)
            noted = await tx.fetchval("SELECT noted_ms FROM gas_account")
        assert [each.newest.tx_hash for each in left] == [bad]
        assert noted > 0
        faulty_node.faults.clear()
        await tend(desk)
        for job in (one, two):
            await succeeds(desk, job)


async def test_a_lease_that_is_over_is_not_taken_from_the_next_one(desk: Desk) -> None:
    chain, who = desk.rails.settings.chains[0], desk.net.settler.address
    await gas.tend_all(desk.rails)  # makes the account's row
    first = await gas._lease(desk.rails, chain, who)
    assert first is not None and await gas._lease(desk.rails, chain, who) is None
    async with desk.rails.db.write() as tx:  # it took too long, and somebody else has it
        await tx.execute("UPDATE gas_account SET tended_ms = tended_ms + 5")
    await gas._release(desk.rails, chain, who, first)
    assert await gas._lease(desk.rails, chain, who) is None
    await gas._release(desk.rails, chain, who, first + 5)
    assert await gas._lease(desk.rails, chain, who) is not None


# --- the lane -------------------------------------------------------------------------------------


class Away:
    """A database that is away for one read, at the worst moment. No real one can be told when."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self.armed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)

    def read(self) -> Any:
        if self.armed:
            self.armed = False
            raise DatabaseUnavailable("away")
        return self._db.read()


async def test_nobody_is_forgotten_when_the_database_is_away(
    desk: Desk, net: Devnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between taking the first of the queue and asking who may go with it."""
    away = Away(desk.rails.db)
    desk.rails.db = away  # type: ignore[assignment]  # as said there
    has_multicall = engine._has_multicall
    asked = 0

    async def then_away(*given: Any) -> bool:
        nonlocal asked
        found = await has_multicall(*given)
        asked += 1
        away.armed = asked == 1
        return found

    monkeypatch.setattr(engine, "_has_multicall", then_away)
    jobs = [desk.job(net.accounts[n]) for n in range(4)]
    async with asyncio.timeout(60):
        outcomes = await asyncio.gather(
            *(engine.settle(desk.rails, job) for job in jobs), return_exceptions=True
        )
    assert asked and not away.armed
    assert all(isinstance(each, Handed) for each in outcomes), outcomes
