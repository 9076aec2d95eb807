"""``make soak``: SOAK_S seconds (1200 unless set) on PostgreSQL with two nodes, then on SQLite.

    python -m tests.soak [--seed TEXT] [--clients N] [--workers N] [sqlite|postgres …]

Prints the seed, one JSON line of figures a database, and every promise that was broken; exit code
1 if one was.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys

from tests.soak.postgres import PostgresMissing
from tests.soak.run import Plan, soak, tell


def main() -> int:
    parser = argparse.ArgumentParser(description="Farebox soak")
    parser.add_argument("databases", nargs="*", default=["postgres", "sqlite"])
    parser.add_argument("--seed", default=secrets.token_hex(4))
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("SOAK_S", "1200")))
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1, help="processes a node (PostgreSQL)")
    parser.add_argument("--kill-every", type=float, default=5.0, metavar="S")
    parser.add_argument("--stop-every", type=float, default=20.0, metavar="S")
    given = parser.parse_args()
    wrong = set(given.databases) - {"postgres", "sqlite"}
    if wrong or given.seconds <= 0:
        parser.error(f"unknown: {wrong}" if wrong else "SOAK_S is a number of seconds above 0")
    print(f"farebox: soak of {given.seconds:.0f} s each, seed {given.seed}", flush=True)
    broken = 0
    for dialect in given.databases:
        workers = given.workers if dialect == "postgres" else 1
        plan = Plan(
            dialect,
            given.seed,
            given.seconds,
            clients=given.clients,
            workers=workers,
            kill_every_s=given.kill_every,
            stop_every_s=given.stop_every,
        )
        try:
            report = soak(plan)
        except PostgresMissing as error:
            print(f"farebox: {error}", file=sys.stderr)
            return 1
        tell(report)
        broken += len(report.broken)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
