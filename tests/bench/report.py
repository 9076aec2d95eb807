"""What the benchmarks print: one JSON line a figure, and the same as a table for the docs."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.run import Load

NOT_IDLE = 0.1  # of all cores, before anything of ours runs


@dataclass
class Run:
    """One call of ``python -m tests.bench``: how much is measured, and what was found so far."""

    rounds: int
    seconds: int
    holds: int = 1_000_000
    lines: list[dict[str, Any]] = field(default_factory=list)
    quiet: bool = True

    def put(
        self,
        figure: str,
        value: float,
        unit: str,
        *,
        goal: float | None = None,
        then: float | None = None,
        most: bool = False,
        **more: Any,
    ) -> None:
        """One figure. ``goal``: at least this much, or with ``most`` at most; ``then`` is the goal
        after that one. ``more``: the floors and peers of the same run."""
        line: dict[str, Any] = {"id": figure, "value": round(value, 3), "unit": unit}
        if goal is not None:
            line |= {"goal": goal, "at": "most" if most else "least"}
            line["met"] = value <= goal if most else value >= goal
        if then is not None:
            line["then"] = then
        line |= more
        self.lines.append(line)
        print(json.dumps(line), flush=True)

    def look_at_machine(self) -> None:
        """Say how busy the machine is before a figure is measured: figures of a busy one are
        worth little, and the line says so."""
        busy = busy_share()
        load_1, load_5, _ = os.getloadavg()
        idle = busy < NOT_IDLE
        self.quiet = self.quiet and idle
        line = {
            "machine": f"{os.cpu_count()} cores",
            "busy_before": round(busy, 2),
            "load_1_min": round(load_1, 2),
            "load_5_min": round(load_5, 2),
            "idle": idle,
        }
        print(json.dumps(line), flush=True)


def busy_share(over_s: float = 0.5) -> float:
    """The share of all cores that somebody uses now."""

    def read() -> tuple[int, int]:
        fields = [int(f) for f in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]  # idle, waiting for a disk

    total, idle = read()
    time.sleep(over_s)  # what is measured is this very time
    total_after, idle_after = read()
    spent = total_after - total
    return 1 - (idle_after - idle) / spent if spent else 0.0


def row(load: Load) -> dict[str, Any]:
    """A run of the load generator, for a line."""
    return {
        "per_s": round(load.per_s),
        "p50_ms": round(load.p50_ms, 2),
        "p99_ms": round(load.p99_ms, 2),
        "cpu_us": round(load.cpu_us, 1),
    }


def markdown(run: Run, commands: dict[str, str]) -> str:
    """The table of docs/performance.md. ``commands``: figure id up to its dot -> how to get it."""
    lines = ["| figure | measured | goal | command |", "|---|---|---|---|"]
    for line in run.lines:
        goal = ""
        if "goal" in line:
            goal = f"{'≤' if line['at'] == 'most' else '≥'} {line['goal']:g}"
            goal += f", then {line['then']:g}" if "then" in line else ""
        command = commands[line["id"].partition(".")[0]]
        value = f"{line['value']:g} {line['unit']}"
        lines.append(f"| {line['id']} | {value} | {goal} | `{command}` |")
    if not run.quiet:
        lines += ["", "The machine was not idle: measure again."]
    return "\n".join(lines)
