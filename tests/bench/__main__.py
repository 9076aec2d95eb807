"""``make bench``: the figures of docs/performance.md, one JSON line each.

python -m tests.bench [--rounds N] [--seconds N] [FIGURE …]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench import requests, run
from tests.bench.run import Load, median
from tests.servers import free_port

FIGURES: dict[str, Callable[[argparse.Namespace], None]] = {}


def put(figure: str, value: float, goal: float | None, unit: str, **more: Any) -> None:
    """One figure, with the floors and peers of the same run."""
    line = {"id": figure, "value": round(value, 3), "goal": goal, "unit": unit, **more}
    print(json.dumps(line), flush=True)


def _row(load: Load) -> dict[str, float]:
    return {
        "per_s": round(load.per_s),
        "p50_ms": round(load.p50_ms, 2),
        "p99_ms": round(load.p99_ms, 2),
        "cpu_us": round(load.cpu_us, 1),
    }


def floor_round(folder: Path, seconds: int) -> Load:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    file = requests.write(folder / "floor.bin", requests.plain(url) + b"\0")
    with run.server("floor", port, "--port", str(port)) as pid:
        return run.load(url, file, pid, seconds=seconds)


def spend_round(folder: Path, seconds: int, kind: str, upstream_port: int) -> Load:
    gateway = run.gateway(folder, f"sqlite:///{folder}/bench.db", upstream_port, accounts=256)
    file = requests.write(
        folder / "spend.bin",
        requests.signed(gateway.url, gateway.wallets, count=int(12_000 * seconds)),
    )
    with run.server(kind, gateway.port, "--config", str(gateway.config)) as pid:
        return run.load(gateway.url, file, pid, seconds=seconds, once=True)


def spend(given: argparse.Namespace) -> None:
    """FLOOR and P-spend in alternating rounds."""
    floors, spends = [], []
    for _ in range(given.rounds):
        with run.scratch() as folder:
            floors.append(floor_round(folder, given.seconds))
            spends.append(spend_round(folder, given.seconds, "spend", 1))
    floor, found = median(floors), median(spends)
    put("FLOOR", floor.per_s, None, "requests/s", **_row(floor))
    put("P-spend", found.per_s / floor.per_s, 0.45, "x FLOOR", floor=_row(floor), **_row(found))
    put("P-tail", found.p99_ms, 10, "ms", floor_p99_ms=round(floor.p99_ms, 2))


def unpaid(given: argparse.Namespace) -> None:
    """P-402: the full 402 to a request without an identity."""
    floors, found = [], []
    for _ in range(given.rounds):
        with run.scratch() as folder:
            floors.append(floor_round(folder, given.seconds))
            gateway = run.gateway(folder, f"sqlite:///{folder}/bench.db", 1, accounts=1)
            file = requests.write(folder / "402.bin", requests.plain(gateway.url) + b"\0")
            with run.server("spend", gateway.port, "--config", str(gateway.config)) as pid:
                found.append(run.load(gateway.url, file, pid, seconds=given.seconds, want=402))
    floor, mid = median(floors), median(found)
    put("P-402", mid.per_s / floor.per_s, 0.8, "x FLOOR", floor=_row(floor), **_row(mid))


def start(given: argparse.Namespace) -> None:
    """P-start: how long ``farebox --help`` takes, and a gateway until it is ready."""
    program = str(Path(sys.executable).parent / "farebox")
    helps = []
    for _ in range(max(given.rounds, 3)):
        begun = time.perf_counter()
        subprocess.run([program, "--help"], check=True, capture_output=True)
        helps.append(time.perf_counter() - begun)
    put("P-start.help", sorted(helps)[len(helps) // 2], 0.3, "s")
    with run.scratch() as folder:
        gateway = run.gateway(folder, f"sqlite:///{folder}/bench.db", 1, accounts=1)
        begun = time.perf_counter()
        with run.server("through", gateway.port, "--config", str(gateway.config)) as pid:
            put("P-start.ready", time.perf_counter() - begun, 2, "s")
            time.sleep(1)  # the figure is memory at rest
            status = Path(f"/proc/{pid}/status").read_text()
            kib = int(status.split("VmRSS:")[1].split()[0])
            put("P-start.memory", kib / 1024, 150, "MB")


FIGURES.update({"spend": spend, "402": unpaid, "start": start})


def main() -> None:
    parser = argparse.ArgumentParser(description="Farebox benchmarks")
    parser.add_argument("figures", nargs="*", default=[*FIGURES], choices=[*FIGURES])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5)
    given = parser.parse_args()
    for name in given.figures:
        FIGURES[name](given)


if __name__ == "__main__":
    main()
