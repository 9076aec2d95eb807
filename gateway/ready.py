"""Whether requests can be served now, looked up at most about once a second for all who ask."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Generic, NamedTuple, TypeVar

from chain.errors import ChainError
from chain.survey import survey
from gateway.db import DatabaseUnavailable
from gateway.money import format_usd
from gateway.payments import gas, remote, worth

if TYPE_CHECKING:
    from gateway.node import Node

KEEP_S: Final = 1.0
T = TypeVar("T")


class Readiness(NamedTuple):
    """``checks`` names each part and how it is; ``ready`` is what they come to."""

    ready: bool
    checks: dict[str, str]


class Looks(Generic[T]):
    """One look at a time: anybody may ask, and a look asks the database and every chain.

    Who asks while one is under way waits for it; for ``KEEP_S`` after its end its answer is given.
    """

    def __init__(
        self,
        look: Callable[[], Awaitable[T]],
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._look = look
        self._clock_s = clock_s
        self._running: asyncio.Task[T] | None = None
        self._last: T | None = None
        self._until_s = 0.0

    async def ask(self) -> T:
        """How it stands. Raises what the look raises, which is not kept."""
        if self._last is not None and self._clock_s() < self._until_s:
            return self._last
        if self._running is None:
            self._running = asyncio.create_task(self._once(), name="readyz")
        # Who hangs up does not end it for the others.
        return await asyncio.shield(self._running)

    async def _once(self) -> T:
        try:
            self._last = await self._look()
            self._until_s = self._clock_s() + KEEP_S
            return self._last
        finally:
            self._running = None

    async def close(self) -> None:
        """End a look that is under way."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)


async def look(node: Node) -> Readiness:
    """The database answers and the writer lives.

    A chain that does not answer is reported and does not make the gateway unready: only
    purchases on it are refused. So is a gas account that is low, empty or stuck, and gas so dear
    that some offers are withheld. Nor does Redis: limits are counted per process until it answers.
    """
    checks: dict[str, str] = {"writer": "ok" if node.writer.alive else "stopped"}
    try:
        await node.look_at_clock()
        checks["database"] = "ok"
    except DatabaseUnavailable:
        checks["database"] = "unreachable"
    ready = all(state == "ok" for state in checks.values())
    if node.limits.cache is not None:
        checks["redis"] = "ok" if await node.limits.cache.ping() else "unreachable"
    for caip2, rpc in node.rails.rpcs.items():
        try:
            await rpc.check_chain_id()
            checks[caip2] = "ok"
        except ChainError as error:
            checks[caip2] = error.code
            ready = ready and error.code != "rpc_wrong_chain"
        # Said, and no reason to serve nobody: who lags or disagrees is believed last, and what
        # they cannot agree on is not minted.
        for view in await survey(rpc, node.now_s()):
            if view.fault in ("rpc_lagging", "rpc_disagrees", "rpc_stale"):
                checks[f"{caip2} {view.label}"] = view.fault
    for chain in node.settings.chains:
        if chain.facilitator:
            # Said, and no reason either: meanwhile payments are settled here.
            checks[f"{chain.caip2} facilitator"] = remote.standing(node.rails, chain)
        fault = worth.data_fault(node.rails, chain)
        if fault is not None:
            checks[f"{chain.caip2} data on L1"] = fault
    for caip2, units in node.rails.floors:
        checks[f"{caip2} offers"] = f"none below {format_usd(units)}: gas is dear"
    with suppress(DatabaseUnavailable):  # said above already
        checks |= {f"gas {where}": what for where, what in (await gas.standing(node.rails)).items()}
    return Readiness(ready, checks)
