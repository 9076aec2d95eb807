"""The crash sweep: a gateway is killed at every message of every flow, and started again.

A flow (flows.py) is run once to count what it sends to each dependency (taps.py). Then it is run
for each of these points with a wallet of its own, and killed there. Whoever paid goes on asking
until there is an answer. Nothing may be lost, nothing be minted or charged twice, the books and
the chain must agree.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from gateway import hands
from tests import servers
from tests.e2e.flows import Attempt, Flow, Point, Site, Wronged
from tests.e2e.taps import Line

CONVERGE_S = 60
# What goes on in the background is not the same in every run: a point may lie behind the end of
# this one and before that of the next.
MISSES = 3


@dataclass(slots=True)
class Swept:
    """What a sweep of one flow on one database found."""

    flow: str
    database: str
    counted: dict[str, int] = field(default_factory=dict)  # messages, by line
    kills: Counter[str] = field(default_factory=Counter)  # by line
    kinds: set[tuple[str, str, str]] = field(default_factory=set)  # line, side, what it said
    passed_by: int = 0  # points the flow ended before
    converged_s: list[float] = field(default_factory=list)
    lost: int = 0
    duplicated: int = 0
    faults: list[str] = field(default_factory=list)

    def members(self) -> dict[str, Any]:
        slow = sorted(self.converged_s) or [0.0]
        return {
            "flow": self.flow,
            "database": self.database,
            "messages": self.counted,
            "kills": self.kills.total(),
            "kills_by_line": dict(self.kills),
            "kinds": len(self.kinds),
            "passed_by": self.passed_by,
            "lost": self.lost,
            "duplicated": self.duplicated,
            "p50_s": round(slow[len(slow) // 2], 1),
            "p95_s": round(slow[min(int(len(slow) * 0.95), len(slow) - 1)], 1),
            "max_s": round(slow[-1], 1),
            "faults": self.faults,
        }

    def note(self) -> None:
        """Keep it for the summary of the run (``summary``)."""
        with servers.locked("crash-sweep") as file, file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(self.members()) + "\n")

    def check(self) -> None:
        assert self.faults == []
        assert not self.lost and not self.duplicated
        # The few points of the short form may all lie behind this very run's end.
        assert self.kills.total() > (0 if self.counted else -self.passed_by)


def summary(file: Path, write: Callable[[str], object]) -> None:
    """Every sweep of a run on a line, their sums, and all of it once more as JSON.

    Also into the file that CRASH_SWEEP_JSON names.
    """
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: (row["flow"], row["database"]))
    shown = "{flow:<30} {database:<9} {kills:>5} {kinds:>5} {lost:>4} {duplicated:>10}"
    shown += " {p50_s:>6} {p95_s:>6} {max_s:>6}  {kills_by_line}"
    names = ("flow", "database", "kills", "kinds", "lost", "duplicated", "p50_s", "p95_s", "max_s")
    write(shown.format(**{name: name for name in names}, kills_by_line="kills by line"))
    for row in rows:
        write(shown.format(**row))
    total = {name: sum(row[name] for row in rows) for name in ("kills", "lost", "duplicated")}
    total["slowest_s"] = max(row["max_s"] for row in rows)
    write(json.dumps({"crash_sweep": {**total, "flows": rows}}))
    given = os.environ.get("CRASH_SWEEP_JSON")
    if given:
        Path(given).write_text(json.dumps({**total, "flows": rows}) + "\n", encoding="utf-8")


async def sweep(
    site: Site, flow: Flow, lines: Mapping[str, Line], found: Swept, every: int = 1
) -> None:
    """Kill a flow at each ``every``-th of its points. ``site.gateway`` runs, and runs at the end.

    Each line is followed a little beyond what was counted, until nothing is there.
    """
    for _ in range(2):  # what a gateway asks in its first seconds is not part of the flow
        await _run(site, flow, lines, None, found)
    for line in lines.values():
        for side in line.sides:
            misses = 0
            counted = found.counted[line.name]
            # On a slow machine what goes on in the background has no end.
            for at in range(1, counted * 5 // 4 + MISSES + 1, every):
                if at > counted and misses >= MISSES:
                    break
                killed = await _run(site, flow, lines, Point(line.name, at, side), found)
                misses = 0 if killed else misses + 1
    found.faults += await asyncio.to_thread(_disagreement, site)


async def some(
    site: Site,
    flow: Flow,
    lines: Mapping[str, Line],
    found: Swept,
    points: Sequence[Point],
) -> None:
    """The short form: these points, as far as this run of the flow comes to them."""
    for point in points:
        await _run(site, flow, lines, point, found)
    found.faults += await asyncio.to_thread(_disagreement, site)


async def _run(
    site: Site, flow: Flow, lines: Mapping[str, Line], point: Point | None, found: Swept
) -> bool:
    """Run a flow once, killed at a point or only counted. Whether it was killed."""
    process = site.gateway.process
    assert process is not None
    attempt = await flow(site)
    armed = [lines[point.line]] if point is not None else list(lines.values())
    for line in armed:
        await asyncio.to_thread(
            line.arm, process, point.at if point else 0, point.side if point else ""
        )
    try:
        stood = await _drive(site, attempt, CONVERGE_S)
    except httpx.TransportError:
        stood = "the connection was lost"  # by the kill, or else that is a fault
    finally:
        for line in armed:
            await asyncio.to_thread(line.disarm)
    killed = any(line.fired for line in armed)
    label = f"{found.flow}, {found.database}: undisturbed"
    if point is None or not killed:
        found.passed_by += point is not None
        if point is None:
            found.counted = {line.name: line.passed for line in armed}
        if not process.running:
            raise AssertionError(f"it died by itself: {process.text[-2000:]}")
    else:
        line = lines[point.line]
        label = (
            f"{found.flow}, {found.database}: {point.side} {point.line} {point.at} ({line.last})"
        )
        found.kills[point.line] += 1
        found.kinds.add((point.line, point.side, line.last))
        await asyncio.to_thread(process.wait_end, 10)
        began_s = time.monotonic()
        # In this thread: a child is ended with the thread that made it.
        began = site.gateway.spawn()
        await asyncio.to_thread(began.wait_for, r'"ready": true')
        stood = await _drive(site, attempt, CONVERGE_S)
        found.converged_s.append(time.monotonic() - began_s)
    await _judge(site, attempt, stood, label, found)
    return killed


async def _drive(site: Site, attempt: Attempt, most_s: float) -> str:
    """Go on until it has ended, the gateway is dead or the time is over; what is missing then."""
    end_s = time.monotonic() + most_s
    assert site.gateway.process is not None
    while True:
        try:
            left = await attempt.step()
        except Wronged as error:
            return str(error)
        if not left or not site.gateway.process.running or time.monotonic() > end_s:
            return left
        await asyncio.sleep(0.1)


async def _judge(site: Site, attempt: Attempt, stood: str, label: str, found: Swept) -> None:
    """One transfer is one mint; what else the flow promises; the audits."""

    def look() -> tuple[list[int], list[int], str, dict[str, Any]]:
        entries = site.gateway.transfers(attempt.owner.address)
        mints = [units for kind, units, _ in entries if kind == "mint"]
        wrong = "" if stood else attempt.wrong()
        return mints, site.moved(attempt.payer), wrong, site.gateway.broken()

    mints, moved, wrong, broken = await asyncio.to_thread(look)
    left = Counter(moved)
    left.subtract(mints)
    found.lost += sum(n for n in left.values() if n > 0)
    found.duplicated += -sum(n for n in left.values() if n < 0)
    if stood or wrong or mints != moved or broken:
        found.faults.append(
            f"{label}: {stood or 'ended'}; {wrong}; minted {mints}, moved {moved}; {broken}"
        )


def _disagreement(site: Site) -> Sequence[str]:
    """What ``reconcile --once`` cannot explain, over all that was moved in this sweep."""
    with ThreadPoolExecutor(1) as pool:  # it brings a loop of its own
        compared = pool.submit(hands.reconcile, site.gateway.settings()).result()
    odd = [d for each in compared for d in each["differences"] if not d["explained"]]
    return [f"reconcile: {each}" for each in odd]
