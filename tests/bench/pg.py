"""P-pg: the same spend on PostgreSQL, and two gateway processes on one database.

PostgreSQL is durable (fsync) and shares a core with the load. The second process needs a core of
its own: on a machine with two, it shares the load's and PostgreSQL's.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.bench import run
from tests.bench.figures import ACCOUNTS, floor_round, gateway_round, signed_file
from tests.bench.report import Run, row
from tests.bench.run import LOAD_CORE, SERVER_CORE, Load, median
from tests.soak.postgres import cluster


def postgres(given: Run) -> None:
    """FLOOR, one process and two, in alternating rounds; the books are audited after each."""
    floors, ones, twos = [], [], []
    for _ in range(given.rounds):
        with run.scratch() as folder:
            folder.chmod(0o711)  # PostgreSQL does not run as root
            floors.append(floor_round(folder, given.seconds))
            with cluster(run.prefix(LOAD_CORE), folder) as database:
                gateway = run.gateway(folder, database.url, 1, ACCOUNTS)
                ones.append(gateway_round(folder, gateway, given.seconds))
                run.check_books(database.url)
            with cluster(run.prefix(LOAD_CORE), folder) as database:
                twos.append(_two(folder, database.url, given.seconds))
                run.check_books(database.url)
    floor, one = median(floors), median(ones)
    ratio = one.per_s / floor.per_s
    given.put("P-pg", ratio, "x FLOOR", goal=0.4, then=0.5, floor=row(floor), **row(one))
    pairs = sorted(a.per_s + b.per_s for a, b in twos)
    together = pairs[len(pairs) // 2]
    given.put(
        "P-pg.two",
        together / one.per_s,
        "x one process",
        goal=1,
        per_s=round(together),
        p99_ms=round(median([max(pair, key=lambda each: each.p99_ms) for pair in twos]).p99_ms, 2),
        one=row(one),
        audits="clean",
        errors=0,  # else the round would have ended it
        cores=os.cpu_count(),
    )


def _two(folder: Path, database: str, seconds: int) -> tuple[Load, Load]:
    """Two processes, each with half of the connections; both spend from all accounts."""
    first = run.gateway(folder, database, 1, ACCOUNTS)
    second = run.another(first, folder)
    files = [signed_file(folder, gateway, seconds) for gateway in (first, second)]
    own = LOAD_CORE if (os.cpu_count() or 1) < 3 else LOAD_CORE + 1
    with (
        run.server("spend", first.port, "--config", str(first.config), core=SERVER_CORE) as one,
        run.server("spend", second.port, "--config", str(second.config), core=own) as two,
        ThreadPoolExecutor(2) as pool,
    ):
        for gateway, (_, few) in zip((first, second), files, strict=True):
            run.warm(gateway.port, few)
        futures = [
            pool.submit(
                run.load, gateway.url, file, pid, seconds=seconds, connections=16, once=True
            )
            for gateway, file, pid in ((first, files[0][0], one), (second, files[1][0], two))
        ]
        a, b = (future.result() for future in futures)
    return a, b
