"""``make bench``: the figures of docs/performance.md, one JSON line each.

    python -m tests.bench [--rounds N] [--seconds N] [--markdown] [--all] [FIGURE …]

Every figure is the median of alternating rounds, with its goal and the floors and peers of the
same run. A round with an error or an answer that is not 2xx (402 where that is asked for) ends it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from tests.bench import buy, figures, flat, peers, pg, streams
from tests.bench.report import Run, markdown
from tests.bench.run import BenchFault, need_wrk
from tests.soak.postgres import PostgresMissing

FIGURES: dict[str, Callable[[Run], None]] = {
    "spend": figures.spend,
    "ceiling": figures.ceiling,
    "personal": figures.personal,
    "proxy": figures.proxy,
    "pg": pg.postgres,
    "402": figures.unpaid,
    "hot": figures.hot,
    "start": figures.start,
    "peer": peers.peers,
    "buy": buy.buy,
    "gas": buy.gas,
    "sse": streams.streams,
    "flat": flat.flat,
}
LONG = {"flat"}  # takes minutes: only by name or with --all
MEASURED_BY = {
    "FLOOR": "spend",
    "P-spend": "spend",
    "P-tail": "spend",
    "P-ceiling": "ceiling",
    "P-personal": "personal",
    "P-invoke": "personal",
    "P-proxy": "proxy",
    "P-pg": "pg",
    "P-402": "402",
    "P-hot": "hot",
    "P-start": "start",
    "P-peer": "peer",
    "P-buy": "buy",
    "P-gas": "gas",
    "P-sse": "sse",
    "P-flat": "flat",
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Farebox benchmarks")
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=", ".join(FIGURES))
    parser.add_argument("--all", action="store_true", help=f"with {', '.join(LONG)}: minutes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5, help="of load in each round")
    parser.add_argument("--holds", type=int, default=1_000_000, help="of P-flat")
    parser.add_argument("--markdown", action="store_true", help="print the table of the docs too")
    given = parser.parse_args()
    unknown = set(given.figures) - set(FIGURES)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(FIGURES)}")
    wanted = given.figures or [name for name in FIGURES if given.all or name not in LONG]
    run = Run(given.rounds, given.seconds, given.holds)
    try:
        need_wrk()
        for name in wanted:
            run.look_at_machine()
            FIGURES[name](run)
    except (BenchFault, PostgresMissing) as error:
        print(f"farebox: {error}", file=sys.stderr)
        return 1
    if given.markdown:
        print(markdown(run, {f: f"python -m tests.bench {by}" for f, by in MEASURED_BY.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
