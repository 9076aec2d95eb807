"""Gas against price: what a settlement costs in dollars, and which offers are not worth it now.

    note      whoever looks after a gas account (gas.py) writes down what one settlement costs at
              the price of now, once for all nodes
    follow    every process reads it, and offers nothing that is below three times that

Only where the operator said what the gas coin is worth (``native_usd``). What was offered stays
payable for as long as an offer lives, whatever gas does meanwhile; ``gas_per_hour`` bounds what
that can cost.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from chain import endpoints, rollup
from chain.errors import Unavailable
from chain.rpc import Rpc
from chain.sender import Market
from gateway.db import DatabaseUnavailable, Tx
from gateway.money import MAX_UNITS, format_usd
from gateway.observe import log
from gateway.payments.offers import Floors
from gateway.payments.rails import DataPrice, Rails
from gateway.settings import Chain, Settings

TIMES: Final = 3  # an offer is at least so many times what its settlement costs
SETTLE_GAS: Final = 90_000  # of real USDC, one by one: 86,000 from a key, 91,000 from a contract
SETTLE_BYTES: Final = 450  # of the signed transaction
ENVELOPE_BYTES: Final = 140  # of a signed transaction beside its calldata, at most
FOLLOW_S: Final = 2
_APART_MS: Final = 10_000  # how much later than others a process may have read the same
_BELIEVED_S: Final = 15  # how long an answer of the oracle is
_ABSENT_S: Final = 60  # and how long that there is none
_GWEI: Final = 10**9
_MOST_GWEI: Final = 2**53
_NOTED: Final = "settlement_cost"  # key in ``meta``


# -- what it costs ---------------------------------------------------------------------------------


async def byte_wei(rails: Rails, rpc: Rpc, chain: Chain) -> int:
    """What a byte of a transaction costs for data on L1, in wei, at most. Never raises: where that
    cannot be known, it is what was known last, or nothing, and ``data_fault`` says so.

    It is an estimate, for budgets and for what is worth offering. What was paid is counted by the
    receipts, so a node that is silent or lies here stops no payment.
    """
    loop = asyncio.get_running_loop()
    price = rails.data_prices.setdefault(chain.caip2, DataPrice())
    if not chain.network.op_stack or loop.time() < price.until_s:
        return price.byte_wei
    try:
        price.byte_wei, fault = await rollup.byte_wei(rpc), None
    except Unavailable as error:
        fault = error.code
        # A local chain with a test network's id has none; on the others that is an alarm.
        if fault == rollup.MISSING and chain.network.testnet:
            fault = None
        elif fault != price.fault:
            log.error("%s: what L1 data costs is not known: %s", chain.name, error.detail)
    if fault is None and price.fault is not None:
        log.info("%s: what L1 data costs is known again", chain.name)
    absent = price.byte_wei == 0
    price.fault, price.until_s = fault, loop.time() + (_ABSENT_S if absent else _BELIEVED_S)
    return price.byte_wei


def data_fault(rails: Rails, chain: Chain) -> str | None:
    """Why this process does not know what a rollup takes for its data; None if it does."""
    price = rails.data_prices.get(chain.caip2)
    return None if price is None else price.fault


def settlement_gwei(now: Market, l1_byte_wei: int) -> int:
    """What one payment costs to settle at the price of now, rounded up. Bounded, as a node can say
    anything."""
    wei = SETTLE_GAS * (now.base_wei + now.tip_wei) + SETTLE_BYTES * l1_byte_wei
    return min(-(-wei // _GWEI), _MOST_GWEI)


def cost_units(chain: Chain, gwei: int) -> int | None:
    """Gas money in units, rounded up; None where nobody said what the gas coin is worth."""
    if chain.native_usd_units is None:
        return None
    return -(-gwei * chain.native_usd_units // _GWEI)


def floor_units(chain: Chain, gwei: int) -> int:
    """The least that is worth a settlement of this cost; 0 where that is not known."""
    return min(TIMES * (cost_units(chain, gwei) or 0), MAX_UNITS)


# -- told to all nodes -----------------------------------------------------------------------------


async def note(tx: Tx, chain: Chain, gwei: int, now_ms: int) -> None:
    """Keep what a settlement costs now, for all nodes."""
    await tx.execute(
        "INSERT INTO meta (key, value) VALUES ($1, $2)"
        " ON CONFLICT (key) DO UPDATE SET value = excluded.value",
        f"{_NOTED}_{chain.caip2}",
        json.dumps({"at_ms": now_ms, "gwei": gwei}),
    )


async def noted_gwei(tx: Tx, chain: Chain) -> int | None:
    """What a settlement cost when somebody looked last; None: nobody has yet."""
    text: str | None = await tx.fetchval(
        "SELECT value FROM meta WHERE key = $1", f"{_NOTED}_{chain.caip2}"
    )
    if text is None:
        return None
    gwei: int = json.loads(text)["gwei"]
    return gwei


async def floors_now(tx: Tx, settings: Settings) -> Floors:
    """The networks on which something that the settings allow is not worth its gas now."""
    found = []
    for chain in settings.chains:
        if chain.native_usd_units is None:
            continue
        units = floor_units(chain, await noted_gwei(tx, chain) or 0)
        if units > chain.min_onchain_units:
            found.append((chain.caip2, units))
    return tuple(found)


# -- followed by each process ----------------------------------------------------------------------


class Follower:
    """What this process offers, kept to what gas costs. ``rails.lately`` is the lowest of what
    was in force while an offer that was given out then can still be paid."""

    def __init__(self, rails: Rails, clock_ms: Callable[[], int] = endpoints.now_ms) -> None:
        self._rails = rails
        self._clock_ms = clock_ms
        self._before: deque[tuple[int, Floors]] = deque()

    async def look(self) -> None:
        """One round. Raises ``DatabaseUnavailable``, and then nothing changes."""
        rails, now_ms = self._rails, self._clock_ms()
        async with rails.db.read() as tx:
            floors = await floors_now(tx, rails.settings)
        _say(rails.settings, rails.floors, floors)
        # Others may have read the same earlier or later, and offered by it.
        since_ms = now_ms - rails.settings.server.offer_timeout_s * 1_000 - _APART_MS
        self._before.append((now_ms, rails.floors))
        while self._before[0][0] < since_ms:
            self._before.popleft()
        rails.floors = floors
        rails.lately = tuple(
            (caip2, least)
            for caip2, units in floors
            if (least := min([units, *(dict(old).get(caip2, 0) for _, old in self._before)]))
        )


async def following(rails: Rails, stopping: asyncio.Event) -> None:
    """Look every few seconds until the process stops. Nothing to do without ``native_usd``."""
    if all(chain.native_usd_units is None for chain in rails.settings.chains):
        return
    follower = Follower(rails)
    while not stopping.is_set():
        with suppress(DatabaseUnavailable):  # said by everything else; what was read last holds
            await follower.look()
        with suppress(TimeoutError):
            async with asyncio.timeout(FOLLOW_S):
                await stopping.wait()


def _say(settings: Settings, before: Floors, now: Floors) -> None:
    """A change is one line in the log; that the price moves meanwhile is not."""
    for caip2, units in now:
        if caip2 not in dict(before):
            log.warning(
                "%s: gas is dear: no payment below %s is offered until a settlement costs less",
                settings.chain(caip2).name,
                format_usd(units),
            )
    for caip2, _ in before:
        if caip2 not in dict(now):
            log.info("%s: gas is cheap enough again for every offer", settings.chain(caip2).name)
