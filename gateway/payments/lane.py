"""What waits in this process to be sent on one network. The engine (engine.py) works on it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from chain.receipts import Receipt
from gateway.db import Tx
from gateway.payments.nonces import Call
from gateway.settings import Chain


@dataclass(frozen=True, slots=True)
class Begun:
    """When a job is claimed: the database's time, and a block at which it was still good."""

    now_ms: int
    from_block: int


Begin = Callable[[Tx, Begun], Awaitable[bool]]
"""Claims the authorization and writes the payment's row. See ``Job.begin``."""


@dataclass(frozen=True, slots=True)
class Job:
    """One payment to be handed in once, by whatever scheme it came.

    ``call``: what is sent, and the id of the payment row that ``begin`` writes. It must be a call
    that anybody may make: unless it is ``alone``, it goes through Multicall3 with that contract
    as the sender. ``spends``: the unique key of what it uses up, such as ``(asset, payer, nonce)``;
    claims are made in its order, so that two nodes do not wait for each other. ``begin``: inside
    the transaction that stores the signed bytes, takes the unique key and inserts the payment in
    state ``processing``; False if somebody has it already. It may run more than once, and must do
    nothing but use its ``Tx``. ``alone``: in a transaction of its own, as for a payer with code, or
    where the contract looks at who sends (by ``upto`` only the gas account that the payment names).
    ``owed``: what it pays for is done already, so ``gas_per_hour`` does not keep it; ``alone`` too.
    ``code_known``: the caller has looked at whether the payer has code; else the engine does, and
    raises ``PayerHasCode`` if so.
    """

    chain: Chain
    call: Call
    payer: str
    spends: tuple[str, ...]
    valid_before_s: int
    begin: Begin
    alone: bool = False
    owed: bool = False
    code_known: bool = True


@dataclass(frozen=True, slots=True)
class Handed:
    """The job's transaction is stored and was handed over. ``receipt`` None: it is in no block
    within the wait, and what becomes of it is not known. With one, the transaction is in a block,
    which says nothing of the job: its own logs do."""

    tx_hash: str
    receipt: Receipt | None


@dataclass(slots=True, eq=False)
class Waiting:
    """A job in the queue. ``outcome`` is set to what ``settle`` returns or raises."""

    job: Job
    outcome: asyncio.Future[Handed | BaseException | None]
    alone: bool


@dataclass(slots=True)
class Lane:
    """The queue of one network in this process, and what is on its way."""

    queue: deque[Waiting] = field(default_factory=deque)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    runner: asyncio.Task[None] | None = None
    # Transactions without a receipt yet: the tasks that wait for them.
    in_flight: set[asyncio.Task[None]] = field(default_factory=set)
    busy_s: float = float("-inf")  # when something was last under way, of the event loop's clock
    # What a call in a batch may use, by the last estimate, and until when that is believed.
    gas_each: int = 0
    gas_each_s: float = float("-inf")
    # Until when this network is known to have no Multicall3, same clock.
    no_multicall_s: float = float("-inf")
