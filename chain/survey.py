"""Whether the providers of a network tell the same chain, and how far behind each one is.

Asked every few seconds by the background loop and by ``/readyz``. A provider that lags or tells
another block than most at a height all of them have is believed last until it agrees again.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

from chain.blocks import Header, parse
from chain.endpoints import Endpoint
from chain.errors import NodeError, Reverted, Unavailable
from chain.networks import Network
from chain.rpc import Rpc

LAG_MS: Final = 30_000  # behind the best of the others
STALE_MS: Final = 120_000  # behind the clock; or this many blocks, whichever is longer
STALE_BLOCKS: Final = 20
SETTLED: Final = 2  # blocks below the lowest head in which honest providers no longer differ


@dataclass(frozen=True, slots=True)
class View:
    """What one provider shows. ``fault``: None, an ``rpc_`` code, ``rpc_lagging``,
    ``rpc_disagrees`` or ``rpc_stale`` (its newest block is old by the clock)."""

    label: str
    head: Header | None
    fault: str | None
    detail: str = ""


async def survey(rpc: Rpc, now_s: int) -> list[View]:
    """Ask every provider for its newest block and compare them. Never raises.

    ``now_s``: the time by our clock.
    """
    heads = await asyncio.gather(*(_head(rpc, e) for e in rpc.endpoints))
    seen = [(e, found) for e, found in zip(rpc.endpoints, heads, strict=True)]
    known = [(e, head) for e, head in seen if isinstance(head, Header)]
    odd = await _odd_ones(rpc, known)
    best = max((head.number for _, head in known), default=0)
    views = []
    for endpoint, found in seen:
        if not isinstance(found, Header):
            views.append(View(endpoint.label, None, found.code, found.detail))
            continue
        fault, detail = None, ""
        behind = best - found.number
        if behind * rpc.network.finality.block_ms > LAG_MS and behind > SETTLED:
            fault, detail = "rpc_lagging", f"{behind} blocks behind the others"
        if endpoint in odd:
            fault, detail = "rpc_disagrees", "tells another chain than the others"
        endpoint.suspect = fault
        age_s = now_s - found.time_s
        if fault is None and age_s * 1_000 > stale_ms(rpc.network):
            fault, detail = "rpc_stale", f"its newest block is {age_s} s old"
        views.append(View(endpoint.label, found, fault, detail))
    return views


def stale_ms(network: Network) -> int:
    """How old the newest block may be by the clock before somebody should know."""
    return max(STALE_MS, STALE_BLOCKS * network.finality.block_ms)


async def _head(rpc: Rpc, endpoint: Endpoint) -> Header | Unavailable:
    return await _one(rpc, endpoint, "latest")


async def _one(rpc: Rpc, endpoint: Endpoint, block: str) -> Header | Unavailable:
    try:
        ((_, answer),) = await rpc.ask_all("eth_getBlockByNumber", [block, False], [endpoint])
        if isinstance(answer, Unavailable):
            return answer
        found = parse(answer)
    except (Unavailable, Reverted) as error:
        return error if isinstance(error, Unavailable) else NodeError(3, error.detail)
    return found or Unavailable("rpc_bad_answer", f"{endpoint.label} has no block {block}")


async def _odd_ones(rpc: Rpc, known: list[tuple[Endpoint, Header]]) -> list[Endpoint]:
    """Those that tell another block than most, where all of them should have the same one.

    Without a majority nobody knows who is wrong, and all of them are named.
    """
    if len(known) < 2:
        return []
    at = max(min(head.number for _, head in known) - SETTLED, 0)
    told: list[Any] = await asyncio.gather(*(_one(rpc, e, hex(at)) for e, _ in known))
    hashes = [
        (endpoint, found.hash)
        for (endpoint, _), found in zip(known, told, strict=True)
        if isinstance(found, Header)
    ]
    counted = Counter(block_hash for _, block_hash in hashes).most_common()
    if len(counted) < 2:
        return []
    most = counted[0][0] if counted[0][1] > counted[1][1] else None
    return [endpoint for endpoint, block_hash in hashes if block_hash != most]
