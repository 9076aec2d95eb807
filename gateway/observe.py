"""What the process says about itself: one log on stderr, and counters.

Log lines name payments, routes and request ids, never keys, signatures, payloads or bodies. A
counter has at most one label, whose values stand here: nothing that a caller sends can become one.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Iterator
from typing import Final, NamedTuple

from chain.networks import NETWORKS

log: Final = logging.getLogger("farebox")


def set_up(level: str, *, process: bool = False) -> None:
    """One line an event on stderr, with ``process`` naming whose it is. Libraries speak from
    warnings upwards."""
    handler = logging.StreamHandler()
    whose = "%(name)s[%(process)d]" if process else "%(name)s"
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s %(levelname)-7s {whose} %(message)s", "%Y-%m-%dT%H:%M:%S")
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    log.setLevel(level.upper())


class Counter(NamedTuple):
    """What is counted, and apart by what."""

    meaning: str
    label: str
    values: tuple[str, ...]


OTHER: Final = "other"  # of every counter: a value that does not stand here
COUNTERS: Final[dict[str, Counter]] = {
    "requests": Counter(
        "Requests to priced routes: paid, run and not charged, answered from store, 402, or refused"
        " in another way.",
        "outcome",
        ("paid", "uncharged", "replayed", "unpaid", "refused", OTHER),
    ),
    "settlements": Counter(
        "Payments on chain: ended (succeeded, failed), not known in time (pending), and not sent"
        " because they were refused or because nothing can be sent (unavailable).",
        "outcome",
        ("succeeded", "failed", "pending", "refused", "unavailable", OTHER),
    ),
    "gas_spent_gwei": Counter(
        "What our transactions cost, once a block has them, in 1e-9 of the gas coin.",
        "network",
        (*(network.caip2 for network in NETWORKS.values()), OTHER),
    ),
    "oddity": Counter(
        "What should not come from an upstream, a provider or a node, and was not believed.",
        "kind",
        (
            "meter_malformed",
            "meter_foreign",
            "meter_above_hold",
            "upstream_wants_payment",
            OTHER,
        ),
    ),
}
_PLACES: Final = {
    (name, value): place
    for place, (name, value) in enumerate(
        (name, value) for name, counter in COUNTERS.items() for value in counter.values
    )
}
_WORD: Final = 8  # bytes of one count


class _Counts:
    """One row of counts for each process of this machine, in memory that they share.

    The parent makes it before it forks; each process writes its own row alone, so nothing locks,
    and a worker that takes the place of a dead one goes on where that one ended.
    """

    __slots__ = ("mine", "rows")

    def __init__(self) -> None:
        self.begin(1)

    def begin(self, processes: int) -> None:
        width = len(_PLACES) * _WORD
        memory = memoryview(mmap.mmap(-1, processes * width))
        self.rows = [memory[i * width : (i + 1) * width].cast("Q") for i in range(processes)]
        self.mine = self.rows[0]


# The process's own: what counts stands deep in code that nobody hands anything. Of fixed size.
_counts: Final = _Counts()


def count(name: str, more: int = 1, **label: str) -> None:
    """One more: ``count("oddity", kind="meter_malformed")``. Of one event loop, never of threads.

    A value that does not stand in ``COUNTERS`` counts as ``other``; raises ``KeyError`` for a name
    that does not (a test holds every call against the table).
    """
    (value,) = label.values()
    place = _PLACES.get((name, value))
    _counts.mine[_PLACES[name, OTHER] if place is None else place] += more


_PAID: Final = _PLACES["requests", "paid"]


def count_paid() -> None:
    """``count("requests", outcome="paid")``, for the one place where every lookup shows."""
    _counts.mine[_PAID] += 1


def share(processes: int) -> None:
    """Begin counting anew, in memory that so many forked processes will share."""
    _counts.begin(processes)


def be_process(number: int) -> None:
    """Count in this row from now on: one process, one row."""
    _counts.mine = _counts.rows[number]


def counted() -> Iterator[tuple[str, str, int]]:
    """Name, value of its label and count, of all processes together."""
    for (name, value), place in _PLACES.items():
        yield name, value, sum(row[place] for row in _counts.rows)
