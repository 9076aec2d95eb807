"""What goes wrong during the soak: gateways are killed, PostgreSQL is stopped without warning.

Every fault is repaired by what an operator's supervisor would do: start it again. Its window (from
the fault until the part is ready, and a moment more) is kept, because availability is promised
outside of such windows only.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.e2e.stage import Gateway
from tests.servers import Process
from tests.soak.postgres import Cluster

READY_S = 60
WORKER_S = 5.0  # for a parent to notice and to start another worker
SETTLE_S = 1.0  # after a part is back: connections are made anew, queues are drained
_READY = re.compile(r'"ready": true')


class NotReady(Exception):  # noqa: N818
    """A part did not come back."""


@dataclass(frozen=True, slots=True)
class Window:
    """A time in which something was broken. ``node`` None: it concerns all nodes."""

    began_s: float
    ended_s: float
    node: int | None
    what: str


@dataclass
class Faults:
    """Everything that was broken so far."""

    windows: list[Window] = field(default_factory=list)
    said: list[str] = field(default_factory=list)  # by gateways that were killed meanwhile
    kills: int = 0
    stops: int = 0


async def until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Poll without blocking the clients."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise NotReady(f"waited in vain for {what} ({timeout_s:.0f} s)")
        await asyncio.sleep(0.05)


async def start(gateway: Gateway) -> None:
    """Start a gateway, again if it ends at once because its database is away. Raises
    ``NotReady``."""
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        process = gateway.spawn()
        await until(partial(_ready_or_ended, process), READY_S, gateway.url)
        if process.running:
            return
        if process.wait_end(1) != 4:  # 4: what it depends on cannot be reached
            raise NotReady(f"{gateway.url} ended: {process.text[-2000:]}")
        await asyncio.sleep(0.2)
    raise NotReady(f"{gateway.url} does not come up")


def _ready_or_ended(process: Process) -> bool:
    return bool(_READY.search(process.text)) or not process.running


async def kill(gateway: Gateway, node: int, faults: Faults, down_s: float = 0) -> None:
    """SIGKILL to the whole process group, and up again after ``down_s``."""
    began_s = time.monotonic()
    faults.said.append(gateway.log)
    gateway.kill()
    faults.kills += 1
    await asyncio.sleep(down_s)
    await start(gateway)
    faults.windows.append(Window(began_s, time.monotonic() + SETTLE_S, node, "gateway"))


async def kill_all(gateways: Sequence[Gateway], over: asyncio.Event, faults: Faults) -> None:
    """The last word: every node at once, in the middle of what the clients do; then ``over``."""
    ups = [asyncio.create_task(kill(g, node, faults, 0.1)) for node, g in enumerate(gateways)]
    await asyncio.sleep(0)
    over.set()
    await asyncio.gather(*ups)


async def kill_gateways(
    gateways: Sequence[Gateway], rng: random.Random, every_s: float, end_s: float, faults: Faults
) -> None:
    """Kill one of them about every ``every_s`` seconds."""
    while await _pause(every_s * (0.5 + rng.random()), end_s):
        node = rng.randrange(len(gateways))
        workers = _children(gateways[node])
        if workers and rng.random() < 0.5:
            _kill_worker(rng.choice(workers), node, faults)
            continue
        await kill(gateways[node], node, faults, rng.random() * 0.5)


def _children(gateway: Gateway) -> list[int]:
    """The workers of a node that has several."""
    if gateway.process is None:
        return []
    pid = gateway.process.pid
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:  # it ended by itself, or there is no such thing on this system
        return []
    return [int(each) for each in text.split()]


def _kill_worker(pid: int, node: int, faults: Faults) -> None:
    """SIGKILL to one of several processes; its parent is to start another one."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        faults.kills += 1
        began_s = time.monotonic()
        faults.windows.append(Window(began_s, began_s + WORKER_S, node, "worker"))


async def stop_postgres(
    cluster: Cluster, rng: random.Random, every_s: float, end_s: float, faults: Faults
) -> None:
    """``pg_ctl -m immediate`` about every ``every_s`` seconds."""
    while await _pause(every_s * (0.5 + rng.random()), end_s):
        await _restart(cluster, rng.random(), faults)


async def _pause(wait_s: float, end_s: float) -> bool:
    """Wait, but not beyond the end. False: it has come."""
    left_s = end_s - time.monotonic()
    await asyncio.sleep(min(wait_s, max(left_s, 0)))
    return wait_s < left_s


async def _restart(cluster: Cluster, down_s: float, faults: Faults) -> None:
    began_s = time.monotonic()
    await asyncio.to_thread(cluster.stop_immediately)
    faults.stops += 1
    await asyncio.sleep(down_s)
    cluster.spawn()  # by this thread, with which it ends
    end_s = time.monotonic() + READY_S
    while not await asyncio.to_thread(cluster.ready):
        if time.monotonic() > end_s:
            raise NotReady("PostgreSQL does not come back")
        await asyncio.sleep(0.05)
    faults.windows.append(Window(began_s, time.monotonic() + SETTLE_S, None, "postgres"))
