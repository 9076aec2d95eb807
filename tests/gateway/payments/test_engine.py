"""The engine on a real chain: who goes together, and what becomes of each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import pytest

from anvil import multicall3
from anvil.devnet import Account, Devnet
from chain import multicall, receipts, transfers
from chain.errors import Rejected, Unavailable
from gateway.payments import engine, journal, nonces
from gateway.payments.journal import AuthKey
from gateway.payments.lane import Handed, Job
from gateway.payments.methods import METHODS, Spent
from gateway.payments.recover import recover
from tests.e2e.stage import new_account, transfers_to
from tests.fixtures_chain import NETWORK, USDC, FaultyNode
from tests.gateway.ledger import helpers
from tests.gateway.payments.parts import PAY_TO, Desk, opened_desk
from tests.gateway.payments.test_recover import cancel

UNITS = 10_000


@pytest.fixture
async def desk(chain_net: Devnet, sqlite_url: str) -> AsyncIterator[Desk]:
    async with opened_desk(chain_net, sqlite_url) as found:
        yield found
        assert await helpers.faults(found.rails.db) == []


@pytest.fixture
async def faulty(
    chain_net: Devnet, faulty_node: FaultyNode, sqlite_url: str
) -> AsyncIterator[Desk]:
    """A desk whose node can be told to misbehave. It waits a second for everything."""
    async with opened_desk(chain_net, sqlite_url, faulty_node.url, timeout_s=1, wait_s=1) as found:
        yield found
        assert await helpers.faults(found.rails.db) == []


@pytest.fixture
async def brief(chain_net: Devnet, sqlite_url: str) -> AsyncIterator[Desk]:
    """A desk that waits a second for a block."""
    async with opened_desk(chain_net, sqlite_url, wait_s=1) as found:
        yield found
        assert await helpers.faults(found.rails.db) == []


@pytest.fixture
def still(chain_net: Devnet) -> Iterator[Devnet]:
    """Blocks are made on demand only."""
    chain_net.rpc("evm_setAutomine", False)
    yield chain_net
    chain_net.rpc("anvil_dropAllTransactions")
    chain_net.rpc("evm_setAutomine", True)


async def settled(desk: Desk, *jobs: Job) -> list[Handed | BaseException | None]:
    """All at once; an idle lane takes what is there when it looks."""
    return await asyncio.gather(
        *(engine.settle(desk.rails, job) for job in jobs), return_exceptions=True
    )


def tx_of(outcome: object) -> str:
    assert isinstance(outcome, Handed), outcome
    assert outcome.receipt is not None and outcome.receipt.tx_hash == outcome.tx_hash
    return outcome.tx_hash


def moved(desk: Desk, outcome: object, job: Job) -> transfers.Transfer | None:
    """The transfer of a job by its own logs."""
    assert isinstance(outcome, Handed) and outcome.receipt is not None
    spent = Spent(USDC, job.payer, job.spends[2], PAY_TO, 10_000)
    found = METHODS["eip3009"].transfers(NETWORK.caip2, outcome.receipt, spent)
    return found[0] if found else None


async def looked_at(desk: Desk, job: Job) -> str:
    row = await desk.row(job)
    assert row is not None
    return await recover(desk.rails, row)


async def ended(desk: Desk, job: Job) -> str:
    """Its state after as many looks as it takes, with blocks made in between."""
    for _ in range(10):
        if (state := await looked_at(desk, job)) != "processing":
            return state
        desk.net.mine()
    raise AssertionError("it does not end")


def empty(net: Devnet, account: Account, *, tip_gwei: int = 1) -> None:
    """The payer's money goes elsewhere, ahead of what waits if ``tip_gwei`` is more than its."""
    units = net.balance_units(account.address)
    data = "0xa9059cbb" + "0" * 24 + net.accounts[9].address[2:] + f"{units:064x}"
    tx = {"from": account.address, "to": USDC.address, "data": data}
    fee = {"maxPriorityFeePerGas": hex(tip_gwei * 10**9), "maxFeePerGas": hex(1000 * 10**9)}
    net.rpc("eth_sendTransaction", {**tx, **fee})


# --- together -------------------------------------------------------------------------------------


async def test_those_who_wait_together_go_together(desk: Desk) -> None:
    """One transaction, one chain nonce; ten transfers, ten mints, each its own ordinal."""
    jobs = [desk.job(payer) for payer in desk.net.accounts]
    outcomes = await settled(desk, *jobs)
    assert len({tx_of(each) for each in outcomes}) == 1
    (sent,) = await desk.sent_for(jobs[0])
    async with desk.rails.db.write() as tx:
        for outcome, job in zip(outcomes, jobs, strict=True):
            assert await desk.sent_for(job) == [sent]
            found = moved(desk, outcome, job)
            assert found is not None and found.from_ == job.payer
            await journal.finish(tx, job.call.payment_id, found, await tx.now_ms())
        rows = await tx.fetch("SELECT n FROM mint_key ORDER BY n")
    assert [row["n"] for row in rows] == list(range(10))
    async with desk.rails.db.read() as tx:
        assert not await nonces.open_of(tx, NETWORK.caip2, desk.net.settler.address, 9)
    assert len(await desk.minted()) == 10
    assert desk.net.balance_units(PAY_TO) == 10 * UNITS
    for job in jobs:
        assert await looked_at(desk, job) == "succeeded"  # and nothing is minted twice
    assert len(await desk.minted()) == 10


async def test_one_alone_goes_straight_to_the_token(desk: Desk) -> None:
    job = desk.job(desk.net.accounts[0])
    (outcome,) = await settled(desk, job)
    tx = desk.net.rpc("eth_getTransactionByHash", tx_of(outcome))
    assert tx["to"] == USDC.address
    assert bytes.fromhex(tx["input"][2:]) == job.call.data


async def test_who_comes_while_one_is_sent_goes_with_the_next(
    faulty: Desk, faulty_node: FaultyNode
) -> None:
    """Group commit: nobody is turned away or sent alone while the first is prepared."""
    first, *others = [faulty.job(payer) for payer in faulty.net.accounts[:6]]
    arrived: list[asyncio.Task[Any]] = []
    release = asyncio.Event()

    def begun(result: Any) -> Any:
        if not arrived:
            arrived.extend(asyncio.ensure_future(settled(faulty, job)) for job in others)
            release.set()
        return result

    faulty_node.fault("eth_estimateGas", "change", begun)
    (outcome,) = await settled(faulty, first)
    await release.wait()
    later = [(await task)[0] for task in arrived]
    assert len({tx_of(each) for each in later}) == 1
    assert tx_of(outcome) != tx_of(later[0])


async def test_no_more_than_may_go_together(chain_net: Devnet, sqlite_url: str) -> None:
    async with opened_desk(chain_net, sqlite_url, settle_batch=4) as desk:
        outcomes = await settled(desk, *(desk.job(payer) for payer in chain_net.accounts))
        sizes: dict[str, int] = {}
        for each in outcomes:
            sizes[tx_of(each)] = sizes.get(tx_of(each), 0) + 1
        assert sorted(sizes.values()) == [2, 4, 4]


@pytest.mark.parametrize("why", ["no contract", "settle_batch = 1"])
async def test_one_by_one_where_they_cannot_go_together(
    chain_net: Devnet, sqlite_url: str, why: str
) -> None:
    batch = {"settle_batch": 1} if why.startswith("settle_batch") else {}
    if not batch:
        chain_net.rpc("anvil_setCode", multicall3.ADDRESS, "0x")
    async with opened_desk(chain_net, sqlite_url, **batch) as desk:
        outcomes = await settled(desk, *(desk.job(payer) for payer in chain_net.accounts[:4]))
        assert len({tx_of(each) for each in outcomes}) == 4
        assert chain_net.balance_units(PAY_TO) == 4 * UNITS


async def test_little_time_is_no_time_for_company(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that fails leaves no time for a second try: it goes alone at once."""
    # Rounds of ten minutes: what has less than two of them left has time enough on any machine.
    monkeypatch.setattr(engine, "ROUND_S", 600)
    hasty = desk.job(desk.net.accounts[0], valid_before_s=int(time.time()) + 1_000)
    outcomes = await settled(
        desk, desk.job(desk.net.accounts[1]), hasty, desk.job(desk.net.accounts[2])
    )
    a, b, c = (tx_of(each) for each in outcomes)
    assert a == c != b


# --- one of them is bad ---------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 4, 9])
async def test_who_would_fail_is_refused_before_anything_is_written(desk: Desk, place: int) -> None:
    jobs = [desk.job(payer) for payer in desk.net.accounts]
    poor = jobs[place] = desk.job(new_account())
    outcomes = await settled(desk, *jobs)
    refusal = outcomes.pop(place)
    assert isinstance(refusal, Rejected) and refusal.code == "insufficient_funds"
    assert await desk.row(poor) is None
    assert len({tx_of(each) for each in outcomes}) == 1
    assert desk.net.balance_units(PAY_TO) == 9 * UNITS


async def test_two_of_one_payer_who_can_pay_one(desk: Desk) -> None:
    """Simulated one after the other, as they will run."""
    payer = desk.net.accounts[0]
    all_of_it = desk.net.balance_units(payer.address)
    jobs = [desk.job(payer, units=all_of_it), desk.job(payer), desk.job(desk.net.accounts[1])]
    first, second, third = await settled(desk, *jobs)
    assert tx_of(first) == tx_of(third)
    assert isinstance(second, Rejected) and second.code == "insufficient_funds"


@pytest.mark.parametrize("back", [False, True])
async def test_one_that_goes_bad_on_the_way_takes_nobody_along(
    brief: Desk, still: Devnet, back: bool
) -> None:
    """The payer's money is gone when the batch is included: nine are settled. If it is there again
    the payment is sent once more, alone; else it has failed."""
    jobs = [brief.job(payer) for payer in still.accounts]
    bad, *good = jobs
    outcomes = await settled(brief, *jobs)
    assert all(isinstance(each, Handed) and each.receipt is None for each in outcomes)
    empty(still, still.accounts[0], tip_gwei=100)
    still.mine()
    for job in good:
        assert await looked_at(brief, job) == "succeeded"
    (batch,) = await brief.sent_for(bad)
    receipt = await receipts.read(brief.rpc, batch.tx_hash)
    assert receipt is not None and receipt.succeeded  # which says nothing of each
    if back:
        still.transfer(still.accounts[9].address, still.accounts[0].address, UNITS)
        still.mine()
    assert await ended(brief, bad) == ("succeeded" if back else "failed")
    assert len(await brief.sent_for(bad)) == (2 if back else 1)
    assert still.balance_units(PAY_TO) == (10 if back else 9) * UNITS
    assert len(await brief.minted()) == (10 if back else 9)


async def test_a_batch_that_runs_out_of_gas_is_done_one_by_one(
    brief: Desk, still: Devnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever one of them burnt: the others are sent again, once, alone."""
    jobs = [brief.job(payer) for payer in still.accounts[:4]]

    async def too_little(*_args: Any, **_more: Any) -> int:
        return 200_000

    with monkeypatch.context() as patch:
        patch.setattr(engine.sender, "gas_limit", too_little)
        await settled(brief, *jobs)
    still.mine()
    for job in jobs:
        assert await ended(brief, job) == "succeeded"
        assert len(await brief.sent_for(job)) <= 2
    assert still.balance_units(PAY_TO) == 4 * UNITS


async def test_a_claim_that_breaks_is_one_payments_own_fault(desk: Desk) -> None:
    jobs = [desk.job(payer) for payer in desk.net.accounts[:5]]

    async def broken(*_args: Any) -> bool:
        raise ZeroDivisionError

    jobs[2] = replace(jobs[2], begin=broken)
    outcomes = await settled(desk, *jobs)
    assert isinstance(outcomes.pop(2), ZeroDivisionError)
    for each in outcomes:
        tx_of(each)
    assert desk.net.balance_units(PAY_TO) == 4 * UNITS


async def test_who_was_claimed_elsewhere_is_left_out(desk: Desk) -> None:
    """Another node has it: the others go without it, and it is told to join."""
    jobs = [desk.job(payer) for payer in desk.net.accounts[:3]]
    async with desk.rails.db.write() as tx:
        key = AuthKey(NETWORK.caip2, *jobs[1].spends)
        claim = journal.Claim("pay_another", b"", None)
        assert await journal.claim(tx, key, claim, 0)
    first, second, third = await settled(desk, *jobs)
    assert second is None
    assert tx_of(first) == tx_of(third)
    assert [t["topics"][1][-40:] for t in transfers_to(desk.net, PAY_TO)] == [
        payer.address[2:] for payer in sorted((desk.net.accounts[0], desk.net.accounts[2]),
                                              key=lambda a: a.address)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("0x5b600056", (engine.PayerHasCode, Rejected)),  # burns whatever it is given
        ("0x631626ba7e60e01b60005260206000f3", engine.PayerHasCode),  # says yes to everything
    ],
)
async def test_a_payer_with_code_does_not_go_with_others(
    desk: Desk, code: str, told: type[Exception]
) -> None:
    """Its code runs when the token asks about the signature, with all the gas there is."""
    jobs = [desk.job(payer) for payer in desk.net.accounts[:4]]
    desk.net.rpc("anvil_setCode", jobs[1].payer, code)
    outcomes = await settled(desk, *jobs)
    assert isinstance(outcomes.pop(1), told)
    assert await desk.row(jobs[1]) is None
    for each in outcomes:
        tx_of(each)
    assert desk.net.balance_units(PAY_TO) == 3 * UNITS


# --- somebody is faster than our transaction ------------------------------------------------------


@pytest.mark.parametrize("company", [0, 3])
@pytest.mark.parametrize("what", ["cancels", "empties the wallet", "is handed in by a stranger"])
async def test_between_the_simulation_and_the_block(desk: Desk, what: str, company: int) -> None:
    """Claimed and signed already. Its own logs are missing, so the chain is asked what became of
    it: given up on proof, or minted from what moved it. The others do not notice."""
    payer, *rest = desk.net.accounts[: company + 1]
    job = desk.job(payer)
    begin = job.begin

    async def overtaken(tx: Any, at: Any) -> bool:
        if what == "cancels":
            cancel(desk.net, payer, job.spends[2])
        elif what == "empties the wallet":
            empty(desk.net, payer)
        else:
            stranger = desk.net.operator.address
            desk.net.send(stranger, USDC.address, "0x" + job.call.data.hex())
        return await begin(tx, at)

    others = [desk.job(each) for each in rest]
    outcome, *good = await settled(desk, replace(job, begin=overtaken), *others)
    assert moved(desk, outcome, job) is None
    for each, other in zip(good, others, strict=True):
        assert each.tx_hash == outcome.tx_hash  # type: ignore[union-attr]  # both are Handed
        assert moved(desk, each, other) is not None
        assert await looked_at(desk, other) == "succeeded"
    expected = "succeeded" if what == "is handed in by a stranger" else "failed"
    assert await ended(desk, job) == expected
    assert len(await desk.minted()) == company + (expected == "succeeded")
    assert len(await desk.sent_for(job)) == 1


async def failed_in_company(desk: Desk) -> Job:
    """A payment whose batch is in a block and did not move its money, and that is good again."""
    payer, *rest = desk.net.accounts[:3]
    job = desk.job(payer)
    begin = job.begin
    units = desk.net.balance_units(payer.address)

    async def overtaken(tx: Any, at: Any) -> bool:
        empty(desk.net, payer)
        return await begin(tx, at)

    outcome, *_ = await settled(
        desk, replace(job, begin=overtaken), *(desk.job(each) for each in rest)
    )
    assert moved(desk, outcome, job) is None
    desk.net.transfer(desk.net.accounts[9].address, payer.address, units)
    return job


async def test_a_stranger_is_faster_than_the_second_try(
    faulty: Desk, faulty_node: FaultyNode
) -> None:
    """Refused as used is no reason to give up: it may just have been used to pay us."""
    job = await failed_in_company(faulty)

    def first(count: Any) -> Any:
        faulty.net.send(faulty.net.operator.address, USDC.address, "0x" + job.call.data.hex())
        return count

    faulty_node.fault("eth_getTransactionCount", "change", first, times=1)
    assert await looked_at(faulty, job) == "processing"
    assert await looked_at(faulty, job) == "succeeded"
    assert len(await faulty.sent_for(job)) == 1


async def test_two_that_try_again_at_once_sign_once(desk: Desk) -> None:
    job = await failed_in_company(desk)
    sent = await desk.sent_for(job)
    chain, payment_id = job.chain, job.call.payment_id
    did = await asyncio.gather(
        *(engine.again(desk.rails, chain, payment_id, sent) for _ in range(4)),
        return_exceptions=True,
    )
    assert did.count(True) == 1
    assert len(await desk.sent_for(job)) == 2
    assert await ended(desk, job) == "succeeded"
    with pytest.raises(Rejected, match="used"):
        await engine.again(desk.rails, chain, payment_id, await desk.sent_for(job))
    assert len(await desk.sent_for(job)) == 2


@pytest.mark.parametrize("door", ["", "upto"])
async def test_the_second_try_of_what_is_done_is_not_kept_by_the_gas_of_the_hour(
    desk: Desk, door: str
) -> None:
    job = await failed_in_company(desk)
    sent = await desk.sent_for(job)
    (chain,) = desk.rails.settings.chains
    poor = chain.model_copy(update={"gas_per_hour_gwei": 1})
    async with desk.rails.db.write() as tx:
        await tx.execute("UPDATE payment SET door = $2 WHERE id = $1", job.call.payment_id, door)
    if door:
        assert await engine.again(desk.rails, poor, job.call.payment_id, sent)
    else:
        with pytest.raises(Unavailable, match="gas_budget_spent"):
            await engine.again(desk.rails, poor, job.call.payment_id, sent)
    assert len(await desk.sent_for(job)) == len(sent) + bool(door)


# --- a node that stalls ---------------------------------------------------------------------------

BEFORE = ("eth_estimateGas", "eth_getBlockByNumber", "eth_getTransactionCount", "eth_getCode")
AFTER = ("eth_sendRawTransaction", "eth_getTransactionReceipt")


@pytest.mark.parametrize("kind", ["hang", "drop", "status"])
@pytest.mark.parametrize("method", BEFORE)
async def test_a_node_that_stalls_before_the_claim_leaves_nothing_behind(
    faulty: Desk, faulty_node: FaultyNode, method: str, kind: str
) -> None:
    jobs = [faulty.job(payer) for payer in faulty.net.accounts[:3]]
    faulty_node.fault(method, kind, 503)
    outcomes = await settled(faulty, *jobs)
    assert all(isinstance(each, Unavailable) for each in outcomes)
    assert [await faulty.row(job) for job in jobs] == [None] * 3
    assert "eth_sendRawTransaction" not in faulty_node.asked
    faulty_node.faults.clear()
    for each in await settled(faulty.patient(), *jobs):
        tx_of(each)


@pytest.mark.parametrize("kind", ["hang", "drop", "lose"])
@pytest.mark.parametrize("method", AFTER)
async def test_a_node_that_stalls_after_the_claim_is_waited_out(
    faulty: Desk, faulty_node: FaultyNode, method: str, kind: str
) -> None:
    """Pending, never refused; the very bytes that were stored are all that is ever sent."""
    # What hangs is waited for, and what comes before the claim must not be refused.
    faulty.rpc.timeout_ms = 3_000 if kind == "hang" else 20_000
    jobs = [faulty.job(payer) for payer in faulty.net.accounts[:3]]
    faulty_node.fault(method, kind)
    outcomes = await settled(faulty, *jobs)
    for each in outcomes:
        assert isinstance(each, Handed)
        assert method == "eth_sendRawTransaction" or each.receipt is None
    faulty_node.faults.clear()
    faulty.patient()
    for job in jobs:
        assert await ended(faulty, job) == "succeeded"
        assert len(await faulty.sent_for(job)) == 1
    assert len(await faulty.minted()) == 3
    assert len(transfers_to(faulty.net, PAY_TO)) == 3


# --- the words of Multicall3 ----------------------------------------------------------------------


def test_calldata_is_that_of_the_general_library() -> None:
    from eth_abi import decode, encode

    calls = [(USDC.address, b""), (PAY_TO, b"\x01" * 31), (USDC.address, bytes(range(100)))]
    for allowed in (False, True):
        made = multicall.aggregate(calls, allow_failure=allowed)
        rows = [(to, allowed, data) for to, data in calls]
        assert made[4:] == encode(["(address,bool,bytes)[]"], [rows])
        assert made[:4].hex() == "82ad56cb"
    told = [(True, b""), (False, b"\x08\xc3"), (True, bytes(65))]
    answer = encode(["(bool,bytes)[]"], [told])
    assert multicall.results(answer, 3) == told == list(decode(["(bool,bytes)[]"], answer)[0])


@pytest.mark.parametrize("cut", [0, 31, 32, 64, 96, 160, 200])
def test_an_answer_that_is_no_list_of_results_is_a_nodes_fault(cut: int) -> None:
    from eth_abi import encode

    answer = encode(["(bool,bytes)[]"], [[(True, b"abc"), (False, b"d" * 40)]])
    with pytest.raises(Unavailable):
        multicall.results(answer[:cut], 2)
    with pytest.raises(Unavailable):
        multicall.results(answer, 3)
    wrong = answer.replace((32).to_bytes(32, "big"), (2**255).to_bytes(32, "big"), 1)
    with pytest.raises(Unavailable):
        multicall.results(wrong, 2)


def test_a_refusal_has_the_code_of_the_token() -> None:
    from eth_abi import encode

    said = bytes.fromhex("08c379a0") + encode(["string"], ["Pausable: paused"])
    assert multicall.refusal(said).code == "asset_paused"
    for odd in (b"", b"\x08\xc3\x79\xa0", b"\x08\xc3\x79\xa0" + b"\xff" * 64, b"\x01" * 70):
        assert multicall.refusal(odd).code == "invalid_transaction_state"
