"""The crash sweep: a gateway is killed at every message of every flow, and started again.

A flow (flows.py) is run a few times to see what it says to each dependency, and which of that
changes anything (taps.py says which points follow from it, and why the others are the same). Then
it is run for each of these points with a wallet of its own, and killed there. Whoever paid goes on
asking until there is an answer. Nothing may be lost, nothing be minted or charged twice, the books
and the chain must agree.

A long sweep can be done in pieces: ``--sweep-part 2/5`` takes every fifth point, ``--sweep-log``
names a file of JSON lines, one a kill; what stands there is not done again and counts.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from gateway import hands
from tests import servers
from tests.e2e.flows import Attempt, Flow, Site, Wronged
from tests.e2e.taps import CUSTOMER, Line, Message, Point

CONVERGE_S = 60
# What goes on in the background is not the same in every run: the points of so many are taken, and
# one that a run does not come to is waited for a little at its end, and tried again.
COUNTED = 2
TRIES = 3
TAIL_S = 3


class Verdict(NamedTuple):
    """What was found after one run of a flow."""

    lost: int  # transfers that were not minted
    duplicated: int  # mints without a transfer of their own
    fault: str  # "" if all was well


@dataclass(slots=True)
class Swept:
    """What a sweep of one flow on one database found."""

    flow: str
    database: str
    short: bool = False  # the short form: nothing was counted, and nothing is waited for
    log: Path | None = None
    messages: int = 0
    classes: int = 0
    points: int = 0
    kills: Counter[str] = field(default_factory=Counter)  # by line
    missed: list[str] = field(default_factory=list)  # points that no run came to
    recovered_s: list[float] = field(default_factory=list)
    lost: int = 0
    duplicated: int = 0
    faults: list[str] = field(default_factory=list)
    done: set[Point] = field(default_factory=set)  # by ``place``

    def members(self) -> dict[str, Any]:
        slow = sorted(self.recovered_s) or [0.0]
        return {
            "flow": self.flow,
            "database": self.database,
            "messages": self.messages,
            "classes": self.classes,
            "points": self.points,
            "kills": self.kills.total(),
            "kills_by_line": dict(self.kills),
            "missed": len(self.missed),
            "missed_points": self.missed,
            "lost": self.lost,
            "duplicated": self.duplicated,
            "p50_s": round(slow[len(slow) // 2], 1),
            "p95_s": round(slow[min(int(len(slow) * 0.95), len(slow) - 1)], 1),
            "max_s": round(slow[-1], 1),
            "faults": self.faults,
        }

    def take(self, verdict: Verdict) -> None:
        self.lost += verdict.lost
        self.duplicated += verdict.duplicated
        self.faults += [verdict.fault] if verdict.fault else []

    def killed(self, row: dict[str, Any]) -> None:
        """Count a kill, one that the log knows or a new one."""
        point = Point(**row["point"])
        self.done.add(point.place)
        self.kills[row["line"]] += 1
        self.recovered_s.append(row["recovered_s"])
        self.take(Verdict(**row["verdict"]))

    def resume(self) -> None:
        """Take over what the log has of this flow."""
        for row in _rows(self.log):
            if (row["flow"], row["database"]) == (self.flow, self.database):
                self.killed(row)

    def record(self, row: dict[str, Any]) -> None:
        self.killed(row)
        if self.log is not None:
            row = {"flow": self.flow, "database": self.database, **row}
            with servers.locked("crash-sweep-log"), self.log.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")

    def note(self) -> None:
        """Keep it for the summary of the run (``summary``)."""
        with servers.locked("crash-sweep") as file, file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(self.members()) + "\n")

    def check(self) -> None:
        assert self.faults == []
        assert not self.lost and not self.duplicated
        # The few points of the short form may all lie behind this very run's end.
        assert self.kills or self.missed


def _rows(log: Path | None) -> Iterator[dict[str, Any]]:
    if log is not None and log.exists():
        for line in log.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def summary(file: Path, write: Callable[[str], object]) -> None:
    """Every sweep of a run on a line, their sums, and all of it once more as JSON.

    Also into the file that CRASH_SWEEP_JSON names.
    """
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: (row["flow"], row["database"]))
    shown = "{flow:<30} {database:<9} {messages:>8} {classes:>7} {points:>6} {kills:>5} {missed:>6}"
    shown += " {lost:>4} {duplicated:>10} {p50_s:>6} {p95_s:>6} {max_s:>6}  {kills_by_line}"
    names = ("flow", "database", "messages", "classes", "points", "kills", "missed", "lost")
    names += ("duplicated", "p50_s", "p95_s", "max_s")
    write(shown.format(**{name: name for name in names}, kills_by_line="kills by line"))
    for row in rows:
        write(shown.format(**row))
    sums = ("messages", "classes", "points", "kills", "missed", "lost", "duplicated")
    total: dict[str, Any] = {name: sum(row[name] for row in rows) for name in sums}
    total["slowest_s"] = max(row["max_s"] for row in rows)
    total["load"] = [round(each, 1) for each in os.getloadavg()]
    write(json.dumps({"crash_sweep": {**total, "flows": rows}}))
    given = os.environ.get("CRASH_SWEEP_JSON")
    if given:
        Path(given).write_text(json.dumps({**total, "flows": rows}) + "\n", encoding="utf-8")


async def sweep(
    site: Site, flow: Flow, line: Line, found: Swept, *, every: int, part: tuple[int, int]
) -> None:
    """Kill a flow at each ``every``-th of its points, those of one part of them.

    ``site.gateway`` runs, and runs at the end.
    """
    found.resume()
    # What a gateway asks in its first seconds is not part of the flow.
    _, *runs = [await _counted(site, flow, line, found) for _ in range(1 + COUNTED)]
    points = line.points(runs)[::every][part[0] - 1 :: part[1]]
    found.points = len(points)
    found.messages = max(sum(m.line != CUSTOMER for m in run) for run in runs)
    found.classes = max(map(line.classes, runs))
    await some(site, flow, line, found, [each for each in points if each.place not in found.done])


async def some(site: Site, flow: Flow, line: Line, found: Swept, points: Sequence[Point]) -> None:
    """Kill at these points, as far as a run of the flow comes to them."""
    tries = 1 if found.short else TRIES
    for point in points:
        for _ in range(tries):
            if await _run(site, flow, line, point, found):
                break
        else:
            found.missed.append(str(point))
    found.faults += await asyncio.to_thread(_disagreement, site)
    found.faults += [f"the tap: {error!r}" for error in line.faults]


async def _counted(site: Site, flow: Flow, line: Line, found: Swept) -> list[Message]:
    await _run(site, flow, line, None, found)
    return line.messages


async def _run(site: Site, flow: Flow, line: Line, point: Point | None, found: Swept) -> bool:
    """Run a flow once, killed at a point or only counted. Whether it was killed."""
    process = site.gateway.process
    assert process is not None
    attempt = await flow(site)
    await asyncio.to_thread(line.arm, process, point)
    try:
        stood = await _drive(site, attempt, line)
        if point is not None and not found.short:
            await _tail(line)
    except httpx.TransportError:
        stood = "the connection was lost"  # by the kill, or else that is a fault
    finally:
        await asyncio.to_thread(line.disarm)
    label = f"{found.flow}, {found.database}: "
    if point is None or not await _killed(site, line):
        verdict = await _judge(site, attempt, stood, label + "undisturbed")
        found.take(verdict)
        return False
    began_s = time.monotonic()
    # In this thread: a child is ended with the thread that made it.
    began = site.gateway.spawn()
    await asyncio.to_thread(began.wait_for, r'"ready": true')
    stood = await _drive(site, attempt, line)
    recovered_s = time.monotonic() - began_s
    verdict = await _judge(site, attempt, stood, f"{label}{point} ({line.last.said.words})")
    found.record(
        {
            "point": asdict(point),
            "line": line.last.line,
            "said": line.last.said.words,
            "recovered_s": round(recovered_s, 2),
            "load": round(os.getloadavg()[0], 1),
            "verdict": verdict._asdict(),
        }
    )
    return True


async def _tail(line: Line) -> None:
    """The flow has ended before its point: some of what goes on in the background comes yet."""
    end_s = time.monotonic() + TAIL_S
    while time.monotonic() < end_s and not line.fired:
        await asyncio.sleep(0.02)


async def _killed(site: Site, line: Line) -> bool:
    """Whether the gateway was killed, however lately: what is being killed answers no more."""
    process = site.gateway.process
    assert process is not None
    try:
        await site.send("GET", "/healthz", {}, None)
    except httpx.TransportError:
        code = await asyncio.to_thread(process.wait_end, 30)
        if code != -signal.SIGKILL or not line.fired:
            raise AssertionError(f"it died by itself, {code}: {process.text[-2000:]}") from None
        return True
    return False


async def _drive(site: Site, attempt: Attempt, line: Line) -> str:
    """Go on until it has ended, the gateway is dead or the time is over; what is missing then."""
    end_s = time.monotonic() + CONVERGE_S
    assert site.gateway.process is not None
    while True:
        line.act()
        try:
            left = await attempt.step()
        except Wronged as error:
            return str(error)
        if not left or not site.gateway.process.running or time.monotonic() > end_s:
            return left
        await asyncio.sleep(0.1)


async def _judge(site: Site, attempt: Attempt, stood: str, label: str) -> Verdict:
    """One transfer is one mint; what else the flow promises; the audits."""

    def look() -> tuple[list[int], list[int], str, dict[str, Any]]:
        entries = site.gateway.transfers(attempt.owner.address)
        mints = [units for kind, units, _ in entries if kind == "mint"]
        wrong = "" if stood else attempt.wrong()
        return mints, site.moved(attempt.payer), wrong, site.gateway.broken()

    mints, moved, wrong, broken = await asyncio.to_thread(look)
    left = Counter(moved)
    left.subtract(mints)
    fault = ""
    if stood or wrong or mints != moved or broken:
        fault = f"{label}: {stood or 'ended'}; {wrong}; minted {mints}, moved {moved}; {broken}"
    lost = sum(n for n in left.values() if n > 0)
    return Verdict(lost, -sum(n for n in left.values() if n < 0), fault)


def _disagreement(site: Site) -> Sequence[str]:
    """What ``reconcile --once`` cannot explain, over all that was moved in this sweep."""
    with ThreadPoolExecutor(1) as pool:  # it brings a loop of its own
        compared = pool.submit(hands.reconcile, site.gateway.settings()).result()
    odd = [d for each in compared for d in each["differences"] if not d["explained"]]
    return [f"reconcile: {each}" for each in odd]
