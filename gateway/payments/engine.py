"""The settlement engine: hand in what was paid, once, many at a time.

    settle        a job waits in the lane of its network until a transaction takes it along
    gather        while one transaction is prepared, whoever comes queues and goes with the next;
                  alone on an idle gateway it does not wait
    simulate      the whole batch, right before it is sent; who would fail is refused, unwritten
    claim         one database transaction: every job's unique key and row, the chain nonce, the
                  signed bytes
    hand over     and wait for a block, for a bounded time; what is not known then is pending

It knows nothing of schemes (but that some calls only one gas account may make) nor of what is done
at the end: a job brings its call and its claim (``lane.Job``), and gets the receipt back, in which
it looks for its own logs. Payments that nobody waits for any more are finished by ``recover.py``,
which asks ``methods.py`` what to look for; their nonces are looked after by ``gas.py``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from chain import multicall, sender
from chain.errors import ChainError, Rejected, Reverted, Unavailable, Unknown
from chain.receipts import Receipt
from chain.rpc import Rpc
from chain.schemes import upto
from chain.sender import Market, Prepared
from chain.waiting import all_of
from gateway.db import CommitUnknown, DatabaseUnavailable, Tx, transact
from gateway.observe import log
from gateway.payments import budget, gas, journal, nonces, worth
from gateway.payments.gas import GasAccount
from gateway.payments.lane import Begun, Handed, Job, Lane, Waiting
from gateway.payments.nonces import Call
from gateway.payments.rails import Rails
from gateway.settings import Chain

ROUND_S: Final = 6  # at least: from the simulation to a block
_NO_MULTICALL_S: Final = 60
_ESTIMATE_S: Final = 60  # how long an estimate is believed
_HAND_OVER_S: Final = 1
_BATCH_GAS: Final = 60_000  # of a batch beside its calls
_REREAD_S: Final = 2  # how often to look whether a transaction was replaced


class PayerHasCode(Exception):  # noqa: N818
    """The payer of a job whose ``code_known`` is False has code: look at its signature by the rules
    of contracts, and hand the job in ``alone``. Nothing was written or sent."""


async def settle(rails: Rails, job: Job) -> Handed | None:
    """Settle one job, with others where that can be. Returns when its transaction is in a block or
    ``settle_wait_s`` is over.

    None: ``begin`` said that somebody has claimed it already. Raises, with nothing written or
    sent: ``Rejected`` if it would fail, ``Unavailable`` if nothing can be sent now,
    ``PayerHasCode``, ``DatabaseUnavailable``. ``CommitUnknown``: it may be claimed; whoever asks
    again finds out.
    """
    loop = asyncio.get_running_loop()
    lane = rails.lanes.setdefault(job.chain.caip2, Lane())
    waiting = Waiting(job, loop.create_future(), job.alone)
    lane.queue.append(waiting)
    lane.arrived.set()
    if lane.runner is None:
        lane.runner = loop.create_task(_run(rails, job.chain, lane))
    outcome = await asyncio.shield(waiting.outcome)
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


# -- the lane --------------------------------------------------------------------------------------


async def _run(rails: Rails, chain: Chain, lane: Lane) -> None:
    """Send what waits, one transaction after the other, until nothing does."""
    batch: list[Waiting] = []
    try:
        while lane.queue:
            batch = []  # those before have their own tasks by now, and are told by them
            await _gather(lane, chain)
            batch.append(lane.queue.popleft())
            await _join(rails, lane, chain, batch)
            try:
                again = await _send(rails, chain, lane, batch)
            except (ChainError, DatabaseUnavailable, CommitUnknown) as error:
                _tell(batch, error)
                continue
            except Exception as error:
                # One of several may be at fault: then only that one hears of it.
                again = batch if len(batch) > 1 else []
                if not again:
                    _tell(batch, error)
            for waiting in again:
                waiting.alone = True
            lane.queue.extendleft(reversed(again))
    except BaseException:  # the loop is closing
        _tell([*batch, *lane.queue], DatabaseUnavailable("the gateway is stopping"))
        lane.queue.clear()
        raise
    finally:
        lane.runner = None


def _tell(batch: Sequence[Waiting], outcome: Handed | BaseException | None) -> None:
    for waiting in batch:
        if not waiting.outcome.done():
            waiting.outcome.set_result(outcome)


async def _gather(lane: Lane, chain: Chain) -> None:
    """Wait for company if it is likely to come, as others are under way or just were: until nobody
    has come for a fifth of the window, or it is over."""
    loop = asyncio.get_running_loop()
    window_s = chain.settle_window_ms / 1_000
    if not lane.in_flight and loop.time() > lane.busy_s + window_s:
        return
    deadline_s = loop.time() + window_s
    while len(lane.queue) < chain.settle_batch:
        lane.arrived.clear()
        quiet_s = loop.time() + window_s / 5
        try:
            async with asyncio.timeout_at(min(deadline_s, quiet_s)):
                await lane.arrived.wait()
        except TimeoutError:
            return


async def _join(rails: Rails, lane: Lane, chain: Chain, batch: list[Waiting]) -> None:
    """Let as many as may go together join the first, in their order; none if it goes alone."""
    first = batch[0]
    if first.alone or chain.settle_batch == 1 or not await _has_multicall(rails, lane, chain):
        return
    try:
        async with rails.db.read() as tx:
            now_s = await tx.now_ms() // 1_000
    except DatabaseUnavailable:
        return  # it is told so when it is to be claimed
    if not _has_time(first, chain, now_s):
        return
    rest: list[Waiting] = []
    while lane.queue and len(batch) < chain.settle_batch:
        waiting = lane.queue.popleft()
        together = not waiting.alone and _has_time(waiting, chain, now_s)
        (batch if together else rest).append(waiting)
    lane.queue.extendleft(reversed(rest))


def _has_time(waiting: Waiting, chain: Chain, now_s: int) -> bool:
    """Two rounds are left: one in company, and one alone if that did not work out."""
    round_s = max(ROUND_S, 2 * chain.network.finality.block_ms // 1_000)
    return waiting.job.valid_before_s >= now_s + 2 * round_s


async def _has_multicall(rails: Rails, lane: Lane, chain: Chain) -> bool:
    if not lane.queue:
        return False  # nobody to go with
    loop = asyncio.get_running_loop()
    if loop.time() < lane.no_multicall_s:
        return False
    try:
        if await rails.rpcs[chain.caip2].has_code(multicall.ADDRESS):
            return True
    except Unavailable as error:
        log.info("%s: %s; payments are settled one by one", chain.name, error)
        return False
    lane.no_multicall_s = loop.time() + _NO_MULTICALL_S
    return False


# -- one transaction -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Sendable:
    """What passed the simulation, and what sending it takes."""

    jobs: list[Waiting]
    again: list[Waiting]  # neither refused nor sent: each goes alone next
    gas_limit: int
    now: Market
    l1_byte_wei: int


async def _send(rails: Rails, chain: Chain, lane: Lane, batch: list[Waiting]) -> list[Waiting]:
    """Simulate, claim, sign, store, hand over. Returns who is to be tried alone."""
    owed = batch[0].job.owed
    account = await gas.choose(rails, chain, _only_sender(batch), owed=owed)
    rpc = rails.rpcs[chain.caip2]
    ready = await _ready(rails, chain, lane, account, batch)
    if not ready.jobs:
        return ready.again
    fees = ready.now.fees(ready.gas_limit, gas.most_wei(chain))
    inorder = sorted(ready.jobs, key=lambda waiting: waiting.job.spends)

    async def work(tx: Tx) -> tuple[list[Waiting], Prepared | None]:
        now_ms = await tx.now_ms()
        begun = Begun(now_ms, ready.now.block_number)
        mine = [waiting for waiting in inorder if await waiting.job.begin(tx, begun)]
        if not mine:
            return [], None
        calls = [waiting.job.call for waiting in mine]
        to, data = _together(calls)
        cost = gas.expected_gwei(ready.gas_limit, ready.now, ready.l1_byte_wei * _size(data))
        nonce = await nonces.allot(
            tx, chain.caip2, account.address, fees.nonce, calls, now_ms, cost
        )
        if not owed:
            await budget.require(tx, chain, now_ms, counted=True)
        prepared = sender.sign(account.key, chain.network.chain_id, nonce, to, data, fees)
        await nonces.store(tx, prepared, now_ms)
        return mine, prepared

    mine, prepared = await transact(rails.db, work)
    _tell([waiting for waiting in inorder if waiting not in mine], None)
    if prepared is None:
        return ready.again
    loop = asyncio.get_running_loop()
    task = loop.create_task(_deliver(rails, rpc, lane, prepared, mine))
    lane.in_flight.add(task)
    task.add_done_callback(lane.in_flight.discard)
    sending = loop.create_task(_hand_over(rails, chain, prepared))
    lane.in_flight.add(sending)
    sending.add_done_callback(lane.in_flight.discard)
    # In their order, but a node that stalls does not hold up the lane: nonces do not hang on it.
    await asyncio.wait({sending}, timeout=_HAND_OVER_S)
    return ready.again


def _only_sender(batch: Sequence[Waiting]) -> str | None:
    """Whom a call is bound to, if it is; such a one is ``alone``."""
    return upto.sender_of(batch[0].job.call.to, batch[0].job.call.data)


def _size(data: bytes) -> int:
    """Bytes of a signed transaction with this calldata, at most."""
    return worth.ENVELOPE_BYTES + len(data)


def _together(calls: Sequence[Call]) -> tuple[str, bytes]:
    """One call that makes all these. Each fails by itself only."""
    if len(calls) == 1:
        return calls[0].to, calls[0].data
    several = [(call.to, call.data) for call in calls]
    return multicall.ADDRESS, multicall.aggregate(several, allow_failure=True)


async def _hand_over(rails: Rails, chain: Chain, prepared: Prepared) -> None:
    try:
        await sender.broadcast(rails.rpcs[chain.caip2], prepared.raw)
    except (Unknown, Unavailable, Rejected) as error:
        # It is stored: whatever this was, the wait or the background loop decides by looking at
        # the chain, and sends the same bytes again if they are still wanted.
        log.info("transaction %s: %s; it is looked at again", prepared.tx_hash, error)
        if error.code == "gas_account_empty":
            with suppress(DatabaseUnavailable, CommitUnknown):  # the next look sees it too
                await gas.mark_empty(rails, chain, prepared.sender)


async def _ready(
    rails: Rails, chain: Chain, lane: Lane, account: GasAccount, batch: list[Waiting]
) -> _Sendable:
    """Ask the chain who of a batch would succeed now, and what that takes. The others are told."""
    rpc = rails.rpcs[chain.caip2]
    unknown = [waiting for waiting in batch if not waiting.job.code_known]
    simulated, now, codes, l1_byte_wei = await all_of(
        _simulated(rpc, lane, account, batch),
        sender.market(rpc, account.address, account.known),
        multicall.having_code(rpc, [waiting.job.payer for waiting in unknown]),
        worth.byte_wei(rails, rpc, chain),
    )
    with_code = [waiting for waiting, code in zip(unknown, codes, strict=True) if code]
    for waiting in with_code:
        _tell([waiting], PayerHasCode())
    jobs = [waiting for waiting in simulated.jobs if waiting not in with_code]
    alone = [waiting for waiting in simulated.again if waiting not in with_code]
    return _Sendable(jobs, alone, simulated.gas_limit, now, l1_byte_wei)


@dataclass(frozen=True, slots=True)
class _Simulated:
    jobs: list[Waiting]
    again: list[Waiting]
    gas_limit: int


async def _simulated(rpc: Rpc, lane: Lane, account: GasAccount, batch: list[Waiting]) -> _Simulated:
    """Who would succeed together, who is to be tried alone, and the gas of the first.

    An estimate runs the batch a dozen times, so it is made once in a while. In between the batch is
    run once, with the gas it is going to get, and each says whether that was enough for it.
    """
    if len(batch) < 2:
        return await _simulated_alone(rpc, account, batch)
    loop = asyncio.get_running_loop()
    if loop.time() < lane.gas_each_s:
        limit = _BATCH_GAS + len(batch) * lane.gas_each
        return await _run_once(rpc, account, batch, limit)
    jobs, unclear = batch, list[Waiting]()
    for _ in range(2):
        try:
            limit = await _estimated(rpc, account, jobs)
        except Reverted:
            found = await _run_once(rpc, account, jobs, len(jobs) * sender.MAX_GAS)
            jobs, unclear = found.jobs, unclear + found.again
            if len(jobs) < 2:
                one = await _simulated_alone(rpc, account, jobs)
                return _Simulated(one.jobs, unclear, one.gas_limit)
        except Rejected:
            break
        else:
            lane.gas_each, lane.gas_each_s = limit // len(jobs), loop.time() + _ESTIMATE_S
            return _Simulated(jobs, unclear, limit)
    # What they do keeps changing under our hands: each by itself.
    return _Simulated([], jobs + unclear, 0)


async def _estimated(rpc: Rpc, account: GasAccount, jobs: list[Waiting]) -> int:
    """The gas of a batch in which no call may fail: where one may, a transaction that runs out of
    gas in the middle passes for a success, and the estimate would be of that."""
    calls = [(waiting.job.call.to, waiting.job.call.data) for waiting in jobs]
    data = multicall.aggregate(calls, allow_failure=False)
    most = len(jobs) * sender.MAX_GAS
    return await sender.gas_limit(rpc, account.address, multicall.ADDRESS, data, max_gas=most)


async def _simulated_alone(rpc: Rpc, account: GasAccount, jobs: list[Waiting]) -> _Simulated:
    if not jobs:
        return _Simulated([], [], 0)
    call = jobs[0].job.call
    try:
        limit = await sender.gas_limit(rpc, account.address, call.to, call.data)
    except Rejected as refusal:
        _tell(jobs, refusal)
        return _Simulated([], [], 0)
    return _Simulated(jobs, [], limit)


async def _run_once(
    rpc: Rpc, account: GasAccount, jobs: list[Waiting], gas_limit: int
) -> _Simulated:
    """Those that succeed one after the other with this much gas; the rest are told why not, but for
    whom it may have been the gas: they are tried alone.

    Leaving one out that fails changes nothing for the others: what it did is undone.
    """
    calls = [(waiting.job.call.to, waiting.job.call.data) for waiting in jobs]
    call = {
        "from": account.address,
        "to": multicall.ADDRESS,
        "data": "0x" + multicall.aggregate(calls, allow_failure=True).hex(),
        "gas": hex(gas_limit),
    }
    try:
        answer = rpc.data(await rpc.call("eth_call", [call, "pending"]))
    except Rejected:
        return _Simulated([], jobs, 0)
    found = _Simulated([], [], gas_limit)
    outcomes = multicall.results(answer, len(jobs))
    for waiting, (succeeds, returned) in zip(jobs, outcomes, strict=True):
        if succeeds:
            found.jobs.append(waiting)
        elif returned:
            _tell([waiting], multicall.refusal(returned))
        else:
            found.again.append(waiting)
    return found


async def _deliver(
    rails: Rails, rpc: Rpc, lane: Lane, prepared: Prepared, jobs: list[Waiting]
) -> None:
    """Wait for the transaction or what replaces it, and tell everybody who is in it."""
    receipt: Receipt | None = None
    try:
        receipt = await _included(rails, rpc, prepared)
        if receipt is not None:
            async with rails.db.write() as tx:
                cost = gas.cost_gwei(receipt)
                await nonces.close(tx, prepared, cost, await tx.now_ms())
    except (ChainError, DatabaseUnavailable, CommitUnknown) as error:
        log.info("transaction %s: %s; it is looked at again", prepared.tx_hash, error)
    finally:
        lane.busy_s = asyncio.get_running_loop().time()
        tx_hash = prepared.tx_hash if receipt is None else receipt.tx_hash
        _tell(jobs, Handed(tx_hash, receipt))


async def _included(rails: Rails, rpc: Rpc, prepared: Prepared) -> Receipt | None:
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + rails.settings.server.settle_wait_s
    versions: Sequence[Prepared] = [prepared]
    while True:
        left_s = int(deadline_s - loop.time() + 0.5)
        receipt = await sender.wait(rpc, versions[0].tx_hash, min(left_s, _REREAD_S))
        if receipt is None and len(versions) > 1:
            receipt = await gas.first_receipt(rpc, versions[1:])
        if receipt is not None or left_s <= _REREAD_S:
            return receipt
        async with rails.db.read() as tx:
            versions = await nonces.versions(tx, prepared.network, prepared.sender, prepared.nonce)


# -- once more, alone ------------------------------------------------------------------------------


async def again(rails: Rails, chain: Chain, payment_id: str, sent: Sequence[Prepared]) -> bool:
    """Sign a payment once more, alone, under a new nonce. ``sent`` is all that was signed for it.

    Only where what was sent before is known to move nothing for it: its nonces are used in blocks.
    The token takes an authorization once anyway. False: somebody else has done so meanwhile, or
    the payment has ended. Raises ``Rejected`` if it would fail now, with nothing written.
    """
    rpc = rails.rpcs[chain.caip2]
    async with rails.db.read() as tx:
        call = await nonces.call_for(tx, payment_id, sent[0])
        known = await journal.by_id(tx, payment_id)
    owed = known is not None and known.owed
    account = await gas.choose(rails, chain, upto.sender_of(call.to, call.data), owed=owed)
    limit, now, l1_byte_wei = await all_of(
        sender.gas_limit(rpc, account.address, call.to, call.data),
        sender.market(rpc, account.address, account.known),
        worth.byte_wei(rails, rpc, chain),
    )
    fees = now.fees(limit, gas.most_wei(chain))
    cost = gas.expected_gwei(limit, now, l1_byte_wei * _size(call.data))

    async def work(tx: Tx) -> Prepared | None:
        payment = await journal.by_id(tx, payment_id, lock=True)
        before = await nonces.sent_for(tx, payment_id)
        if payment is None or payment.state != "processing" or len(before) != len(sent):
            return None
        now_ms = await tx.now_ms()
        nonce = await nonces.allot(
            tx, chain.caip2, account.address, fees.nonce, [call], now_ms, cost
        )
        if not owed:
            await budget.require(tx, chain, now_ms, counted=True)
        fresh = sender.sign(account.key, chain.network.chain_id, nonce, call.to, call.data, fees)
        await nonces.store(tx, fresh, now_ms)
        return fresh

    fresh = await transact(rails.db, work)
    if fresh is not None:
        await _hand_over(rails, chain, fresh)
    return fresh is not None
