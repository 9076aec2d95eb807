"""Gas accounts: nothing stays stuck, nothing is spent beyond what may be, the load is spread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import pytest

from anvil.devnet import Account, Devnet, running
from chain import sender
from chain.errors import Unavailable
from chain.sender import Fees, Market
from gateway.payments import budget, engine, gas, nonces
from gateway.payments.lane import Handed, Job
from gateway.payments.recover import recover
from gateway.payments.x402 import refused
from tests.e2e.stage import new_account
from tests.fixtures_chain import NETWORK, FaultyNode
from tests.gateway.ledger import helpers
from tests.gateway.payments.parts import PAY_TO, Claimed, Desk, opened_desk

GWEI = 10**9


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
    """A node in front of it that can be told to misbehave."""
    node = FaultyNode(net)
    await node.start()
    yield node
    await node.stop()


@pytest.fixture
async def desk(net: Devnet, sqlite_url: str) -> AsyncIterator[Desk]:
    async with opened_desk(net, sqlite_url, wait_s=1) as found:
        yield found
        assert await helpers.faults(found.rails.db) == []


async def tend(desk: Desk, address: str = "", patience_ms: int = 0) -> None:
    chain = desk.rails.settings.chains[0]
    who = address or desk.net.settler.address
    assert await gas.tend(desk.rails, desk.rpc, chain, who, patience_ms=patience_ms)


async def age(desk: Desk, seconds: int) -> None:
    """Everything that was signed was signed so much earlier."""
    async with desk.rails.db.write() as tx:
        for table in ("chain_tx", "chain_nonce"):
            await tx.execute(f"UPDATE {table} SET at_ms = at_ms - $1", seconds * 1_000)
        await tx.execute("UPDATE gas_account SET stuck_ms = stuck_ms - $1", seconds * 1_000)


async def pending(desk: Desk, *payers: Account) -> list[Job]:
    """Jobs that were sent and are in no block."""
    jobs = [desk.job(payer) for payer in payers]
    outcomes = await asyncio.gather(*(engine.settle(desk.rails, job) for job in jobs))
    assert all(isinstance(each, Handed) and each.receipt is None for each in outcomes)
    return jobs


async def look(desk: Desk, job: Job | Claimed) -> str:
    row = await (desk.row(job) if isinstance(job, Job) else desk.payment(job))
    assert row is not None
    return await recover(desk.rails, row)


def fees_of(sent: sender.Prepared) -> Fees:
    return sender.fees_of(sent.raw)


def dearer(net: Devnet, wei: int) -> None:
    """The next block wants this for a unit of gas."""
    net.rpc("anvil_setNextBlockBaseFeePerGas", hex(wei))
    net.mine()


async def state_of(desk: Desk) -> dict[str, Any]:
    async with desk.rails.db.read() as tx:
        row = await tx.fetchrow("SELECT * FROM gas_account")
    assert row is not None
    return {name: row[name] for name in ("tended_ms", "noted_ms", "stuck_ms")}


# --- stuck, dropped, not wanted any more ----------------------------------------------------------


async def test_a_transaction_that_is_too_cheap_is_offered_more(desk: Desk, still: Devnet) -> None:
    """The same nonce and call, stored before it is sent; whichever is included, it is one mint."""
    (job,) = await pending(desk, still.accounts[0])
    (first,) = await desk.sent_for(job)
    dearer(still, 2 * fees_of(first).max_fee_wei)
    still.mine()
    assert still.rpc("eth_getTransactionReceipt", first.tx_hash) is None
    await tend(desk)  # nodes may have thrown it out for its price: no need to wait then
    await age(desk, 11)
    await tend(desk)
    second, *_, before = await desk.sent_for(job)
    assert before == first
    assert (second.nonce, second.sender) == (first.nonce, first.sender)
    assert sender.call_of(second.raw) == sender.call_of(first.raw)
    old, new = fees_of(first), fees_of(second)
    assert new.max_fee_wei * 8 > old.max_fee_wei * 9 and new.tip_wei * 8 > old.tip_wei * 9
    assert new.gas_limit == old.gas_limit
    row = await desk.row(job)
    assert row is not None and row.tx_hash == second.tx_hash
    still.mine()
    assert await look(desk, job) == "succeeded"
    assert [ref for ref, _, _ in await desk.minted()] == [second.tx_hash]


async def test_the_first_one_is_included_after_all(
    net: Devnet, sqlite_url: str, still: Devnet, faulty_node: FaultyNode
) -> None:
    """The replacement never arrived; the payment is found in the transaction that it replaced."""
    async with opened_desk(net, sqlite_url, faulty_node.url, wait_s=1) as desk:
        (job,) = await pending(desk, still.accounts[0])
        await age(desk, 11)
        faulty_node.fault("eth_sendRawTransaction", "drop")
        await tend(desk)
        second, first = await desk.sent_for(job)
        assert still.rpc("eth_getTransactionByHash", second.tx_hash) is None
        still.mine()
        faulty_node.faults.clear()
        for endpoint in desk.rpc.endpoints:
            endpoint.answered()
        assert await look(desk, job) == "succeeded"
        assert [ref for ref, _, _ in await desk.minted()] == [first.tx_hash]


async def test_a_request_that_waits_sees_its_replacement_included(
    net: Devnet, sqlite_url: str, still: Devnet
) -> None:
    async with opened_desk(net, sqlite_url, wait_s=15) as desk:
        job = desk.job(still.accounts[0])
        waiting = asyncio.create_task(engine.settle(desk.rails, job))
        while not await desk.sent_for(job):
            await asyncio.sleep(0.02)
        (first,) = await desk.sent_for(job)
        dearer(still, 2 * fees_of(first).max_fee_wei)
        await age(desk, 11)
        await tend(desk)
        still.mine()
        outcome = await waiting
        assert outcome is not None and outcome.receipt is not None
        assert outcome.tx_hash == (await desk.sent_for(job))[0].tx_hash != first.tx_hash


async def test_no_more_is_offered_than_the_operator_allows(
    net: Devnet, sqlite_url: str, still: Devnet
) -> None:
    """It waits for cheaper gas, its account counts as stuck, and settlements pause."""
    async with opened_desk(net, sqlite_url, wait_s=1, max_fee_gwei=3) as desk:
        (job,) = await pending(desk, still.accounts[0])
        (first,) = await desk.sent_for(job)
        dearer(still, 50 * GWEI)
        for _ in range(3):
            await age(desk, 60)
            await tend(desk)
        assert await desk.sent_for(job) == [first]
        with pytest.raises(Unavailable) as error:
            await engine.settle(desk.rails, desk.job(still.accounts[1]))
        assert error.value.code == "gas_accounts_stuck"
        assert refused(error.value).code == "settlement_paused"
        assert list((await gas.standing(desk.rails)).values()) == ["stuck"]
        dearer(still, 1)
        await tend(desk)
        still.mine()
        await tend(desk)
        assert await gas.standing(desk.rails) == {}
        assert await look(desk, job) == "succeeded"


async def test_gas_that_is_too_dear_pauses_settlements(net: Devnet, sqlite_url: str) -> None:
    async with opened_desk(net, sqlite_url, max_fee_gwei=2) as desk:
        net.rpc("anvil_setNextBlockBaseFeePerGas", hex(9 * GWEI))
        net.mine()
        job = desk.job(net.accounts[0])
        with pytest.raises(Unavailable, match="gas_price_too_high"):
            await engine.settle(desk.rails, job)
        assert await desk.row(job) is None


async def test_what_nodes_have_dropped_is_sent_again(desk: Desk, still: Devnet) -> None:
    jobs = await pending(desk, *still.accounts[:3])
    (sent,) = await desk.sent_for(jobs[0])
    still.rpc("anvil_dropTransaction", sent.tx_hash)
    await tend(desk, patience_ms=60_000)
    assert still.rpc("eth_getTransactionByHash", sent.tx_hash) is None  # it may be on its way
    await tend(desk)
    still.mine()
    for job in jobs:
        assert await look(desk, job) == "succeeded"
        assert await desk.sent_for(job) == [sent]


async def test_a_nonce_whose_payments_have_all_ended_is_freed_cheaply(
    desk: Desk, still: Devnet
) -> None:
    """Expired in the pool: replaced by a transfer of nothing, so that the next can be included."""
    now_s = int(still.rpc("eth_getBlockByNumber", "latest", False)["timestamp"], 16)
    over = await desk.claim(valid_before_s=now_s + 30)
    desk.send(over)
    later = await desk.claim(still.accounts[1])
    desk.send(later)
    still.rpc("anvil_setNextBlockBaseFeePerGas", hex(40 * GWEI))  # neither is included
    still.rpc("evm_increaseTime", 60)
    still.mine()
    await age(desk, 5)
    assert await look(desk, over) == "failed"
    await tend(desk)
    async with desk.rails.db.read() as tx:
        hashes = await tx.fetch(
            "SELECT tx_hash FROM chain_tx WHERE nonce = $1 AND tx_hash <> $2",
            over.prepared.nonce,
            over.prepared.tx_hash,
        )
    (instead,) = [row["tx_hash"] for row in hashes]
    still.rpc("anvil_setNextBlockBaseFeePerGas", hex(GWEI))
    still.mine()
    receipt = still.receipt(instead)
    assert (receipt["status"], receipt["to"]) == ("0x1", still.settler.address)
    assert int(receipt["gasUsed"], 16) == 21_000
    assert await look(desk, later) == "succeeded"
    assert (await desk.payment(over)).state == "failed"
    assert still.balance_units(PAY_TO) == later.payment.amount_units


async def test_a_nonce_is_not_freed_while_one_of_its_payments_lives(
    desk: Desk, still: Devnet
) -> None:
    one, two = await pending(desk, *still.accounts[:2])
    (sent,) = await desk.sent_for(one)
    async with desk.rails.db.write() as tx:
        await tx.execute("UPDATE payment SET state = 'failed' WHERE id = $1", one.call.payment_id)
    await age(desk, 5)
    await tend(desk)
    assert await desk.sent_for(two) == [sent]
    still.mine()
    assert await look(desk, two) == "succeeded"


async def test_two_that_look_after_one_account_do_not_both_act(desk: Desk, still: Devnet) -> None:
    await pending(desk, still.accounts[0])
    await age(desk, 11)
    chain = desk.rails.settings.chains[0]
    who = still.settler.address
    done = await asyncio.gather(
        *(gas.tend(desk.rails, desk.rpc, chain, who, patience_ms=0) for _ in range(4))
    )
    assert done.count(True) >= 1
    async with desk.rails.db.read() as tx:
        assert await tx.fetchval("SELECT count(*) FROM chain_tx") == 2
    assert (await state_of(desk))["tended_ms"] == 0


async def test_what_another_node_has_replaced_is_not_replaced_from_an_old_view(
    desk: Desk, still: Devnet
) -> None:
    """Two nodes saw the same newest transaction of a chain nonce, and one of them was slower: its
    lease was over. What it signs by that view is neither stored nor sent."""
    (job,) = await pending(desk, still.accounts[0])
    await age(desk, 11)
    chain, who = desk.rails.settings.chains[0], still.settler.address
    async with desk.rails.db.read() as tx:
        (seen,) = await nonces.open_of(tx, NETWORK.caip2, who, 9)
    now = await sender.market(desk.rpc, who)
    assert await gas._replace(desk.rails, desk.rpc, chain, seen, now)
    second, first = await desk.sent_for(job)
    assert first == seen.newest
    # What gas costs has changed meanwhile, so what the slower one signs is another transaction.
    later = replace(now, tip_wei=4 * fees_of(second).tip_wei)
    assert await gas._replace(desk.rails, desk.rpc, chain, seen, later)
    assert await desk.sent_for(job) == [second, first]
    row = await desk.row(job)
    assert row is not None and row.tx_hash == second.tx_hash
    assert still.rpc("eth_getTransactionByHash", second.tx_hash) is not None
    still.mine()
    assert await look(desk, job) == "succeeded"
    assert [ref for ref, _, _ in await desk.minted()] == [second.tx_hash]


async def test_what_is_in_a_block_is_closed_with_its_cost(desk: Desk, still: Devnet) -> None:
    """Nobody waited for it: the round of the background loop sees it."""
    (job,) = await pending(desk, still.accounts[0])
    still.mine()
    await tend(desk)
    (sent,) = await desk.sent_for(job)
    receipt = still.receipt(sent.tx_hash)
    wei = int(receipt["gasUsed"], 16) * int(receipt["effectiveGasPrice"], 16)
    async with desk.rails.db.read() as tx:
        row = await tx.fetchrow("SELECT done_ms, cost_gwei FROM chain_nonce")
    assert row is not None and row["done_ms"] is not None
    assert row["cost_gwei"] == -(-wei // GWEI)


@pytest.mark.parametrize(
    ("l1_fee", "gwei"), [("0x3b9aca01", 2), (None, 0), ("0x0", 0), (hex(2**200), 2**53)]
)
async def test_what_a_rollup_takes_for_its_data_counts(
    net: Devnet, sqlite_url: str, faulty_node: FaultyNode, l1_fee: str | None, gwei: int
) -> None:
    """``l1Fee`` of OP-stack receipts; the devnet has none, so the node in between adds it."""

    def with_fee(receipt: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if receipt is None else {**receipt, "l1Fee": l1_fee}

    faulty_node.fault("eth_getTransactionReceipt", "change", with_fee)
    async with opened_desk(net, sqlite_url, faulty_node.url) as desk:
        job = desk.job(net.accounts[0])
        handed = await engine.settle(desk.rails, job)
        assert handed is not None and handed.receipt is not None
        for lane in desk.rails.lanes.values():
            await asyncio.gather(*lane.in_flight)
        receipt = net.receipt(handed.tx_hash)
        wei = int(receipt["gasUsed"], 16) * int(receipt["effectiveGasPrice"], 16)
        async with desk.rails.db.read() as tx:
            cost = await tx.fetchval("SELECT cost_gwei FROM chain_nonce")
        plain = -(-wei // GWEI)
        assert cost == gwei if gwei > 2 else plain + max(gwei - 1, 0) <= cost <= plain + gwei


async def test_a_transaction_whose_block_is_gone_is_sent_again(desk: Desk, still: Devnet) -> None:
    """It was in a block, nobody minted yet, and the chain forgot the block and the transaction."""
    (job,) = await pending(desk, still.accounts[0])
    (sent,) = await desk.sent_for(job)
    still.rpc("anvil_dropTransaction", sent.tx_hash)
    snapshot = still.rpc("evm_snapshot")
    await tend(desk)
    still.mine()
    await tend(desk)  # closed
    async with desk.rails.db.read() as tx:
        assert not await nonces.open_of(tx, NETWORK.caip2, still.settler.address, 9)
    assert still.rpc("evm_revert", snapshot) is True
    assert still.rpc("eth_getTransactionByHash", sent.tx_hash) is None
    assert await look(desk, job) == "processing"
    still.mine()
    assert await look(desk, job) == "succeeded"
    assert [ref for ref, _, _ in await desk.minted()] == [sent.tx_hash]


# --- fees -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap_wei", [None, 10**12])
def test_a_replacement_offers_an_eighth_more_or_the_price_of_now(cap_wei: int | None) -> None:
    old = Fees(100, 800, 80, 7)
    cheap, dear = (Market(base, tip, 9, 1, 1) for base, tip in ((10, 5), (1_000, 500)))
    assert sender.raised(old, cheap, cap_wei) == Fees(100, 901, 91, 7)
    assert sender.raised(old, dear, cap_wei) == Fees(100, 2_500, 500, 7)


def test_a_replacement_stays_under_the_cap_or_is_none() -> None:
    old, now = Fees(100, 800, 80, 7), Market(1_000, 5, 9, 1, 1)
    assert sender.raised(old, now, 950) == Fees(100, 950, 91, 7)
    assert sender.raised(old, now, 900) is None
    assert sender.raised(Fees(1, 10, 10, 0), Market(1, 50, 0, 1, 1), 40) is None


# --- which account, and how much ------------------------------------------------------------------


def several(net: Devnet, count: int = 3) -> tuple[list[Account], list[str]]:
    made = [new_account() for _ in range(count)]
    for each in made:
        net.rpc("anvil_setBalance", each.address, hex(10**18))
    return made, [each.private_key for each in made]


async def test_the_load_is_spread_over_all_gas_accounts(
    net: Devnet, sqlite_url: str, still: Devnet
) -> None:
    accounts, keys = several(net)
    async with opened_desk(net, sqlite_url, wait_s=1, settler_keys=keys, settle_batch=1) as desk:
        jobs = await pending(desk, *net.accounts[:6])
        sent = [(await desk.sent_for(job))[0] for job in jobs]
        counts = [sum(each.sender == account.address for each in sent) for account in accounts]
        assert counts == [2, 2, 2]
        assert {(each.sender, each.nonce) for each in sent} == {
            (account.address, nonce) for account in accounts for nonce in (0, 1)
        }
        still.mine()
        for job in jobs:
            assert await look(desk, job) == "succeeded"


@pytest.mark.parametrize("trouble", ["stuck", "empty", "low"])
async def test_an_account_in_trouble_is_passed_over(
    net: Devnet, sqlite_url: str, trouble: str
) -> None:
    (bad, good), keys = several(net, 2)
    async with opened_desk(net, sqlite_url, settler_keys=keys) as desk:
        if trouble != "stuck":
            cost = 130_000 * (10 * GWEI)
            net.rpc("anvil_setBalance", bad.address, hex(cost if trouble == "low" else 1))
        await gas.tend_all(desk.rails)
        if trouble == "stuck":
            async with desk.rails.db.write() as tx:
                await tx.execute(
                    "UPDATE gas_account SET stuck_ms = 1 WHERE sender = $1", bad.address
                )
        told = await gas.standing(desk.rails)
        assert told == {f"{NETWORK.caip2} {bad.address}": trouble}
        for payer in net.accounts[:3]:
            job = desk.job(payer)
            await engine.settle(desk.rails, job)
            assert [each.sender for each in await desk.sent_for(job)] == [good.address]


async def test_empty_accounts_pause_settlements_and_say_so(
    net: Devnet, sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    (account,), keys = several(net, 1)
    net.rpc("anvil_setBalance", account.address, "0x0")
    async with opened_desk(net, sqlite_url, settler_keys=keys) as desk:
        await gas.tend_all(desk.rails)
        assert f"gas account {account.address} is low" in caplog.text
        job = desk.job(net.accounts[0])
        with pytest.raises(Unavailable, match="gas_account_empty"):
            await engine.settle(desk.rails, job)
        assert await desk.row(job) is None
        net.rpc("anvil_setBalance", account.address, hex(10**18))
        await gas.tend(desk.rails, desk.rpc, desk.rails.settings.chains[0], account.address)
        assert await engine.settle(desk.rails, job) is not None


async def test_no_more_gas_is_spent_in_an_hour_than_may_be(net: Devnet, sqlite_url: str) -> None:
    """What is under way counts at what it is expected to cost, then at what it did."""
    async with opened_desk(net, sqlite_url, gas_per_hour="0.001") as desk:
        first = desk.job(net.accounts[0])
        assert await engine.settle(desk.rails, first) is not None
        async with desk.rails.db.write() as tx:
            await tx.execute("UPDATE chain_nonce SET cost_gwei = 1000000")
        second = desk.job(net.accounts[1])
        with pytest.raises(Unavailable) as error:
            await engine.settle(desk.rails, second)
        assert error.value.code == "gas_budget_spent"
        assert await gas.standing(desk.rails) == {NETWORK.caip2: "gas_budget_spent"}
        await age(desk, 3_601)
        assert await engine.settle(desk.rails, second) is not None


async def test_a_payer_whose_settlements_fail_is_refused_for_an_hour(
    desk: Desk, net: Devnet
) -> None:
    chain = desk.rails.settings.chains[0]
    payer = net.accounts[0].address

    async def blocked(later_ms: int = 0, who: str = payer) -> bool:
        async with desk.rails.db.read() as tx:
            return await budget.payer_is_blocked(tx, chain, who, await tx.now_ms() + later_ms)

    claimed = await desk.claim()
    assert not await blocked()
    async with desk.rails.db.write() as tx:
        await tx.execute(
            "UPDATE payment SET state = 'failed', updated_at_ms = $1, error_code = $2",
            await tx.now_ms(),
            "invalid_exact_evm_payload_authorization_valid_before",
        )
    assert not await blocked()  # it was not included in time: our own fault
    async with desk.rails.db.write() as tx:
        await tx.execute("UPDATE payment SET error_code = 'invalid_transaction_state'")
    assert await blocked()
    assert not await blocked(who=net.accounts[1].address)
    assert not await blocked(later_ms=budget.HOUR_MS + 1_000)
    assert (await desk.payment(claimed)).state == "failed"
