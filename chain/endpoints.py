"""One URL of a network, and how much it is trusted to answer: rests, refusals, suspicion.

A URL that fails rests, twice as long each time, and is asked last meanwhile. After
``BREAK_AFTER`` failures in a row its breaker is open: one question at a time tries it, the others
go elsewhere or fail at once, so a provider that is down costs a deadline now and then and not one
for each caller. A provider that says 429 is left alone for as long as it asks.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

REST_MS: Final = 5_000  # after the first failure; doubled by each one more
LONGEST_REST_MS: Final = 30_000
BREAK_AFTER: Final = 3
REFUSAL_MS: Final = 1_000  # of a provider that does not say how long
LONGEST_REFUSAL_MS: Final = 60_000


@dataclass(slots=True)
class Endpoint:
    """A URL and what became of the questions it was asked. One event loop's."""

    url: str = field(repr=False)
    label: str  # host and port only: path and query often hold the provider's key
    verified: bool = False  # the connection in use has shown the right chain id
    failures: int = 0  # in a row
    rest_until_ms: int = 0
    refused_until_ms: int = 0  # it said how long it does not want to be asked
    suspect: str | None = None  # "lagging", "disagrees": believed last (rpc.survey)
    probing: int = 0  # questions under way while its breaker is open

    @classmethod
    def of(cls, url: str) -> Endpoint:
        """A URL that nothing is known of."""
        return cls(url, urlsplit(url).netloc.rpartition("@")[2])

    def resting(self, at_ms: int) -> bool:
        """Whether it failed or refused so recently that others are asked first."""
        return max(self.rest_until_ms, self.refused_until_ms) > at_ms

    def broken(self, at_ms: int) -> bool:
        """Whether its breaker is open: it gets one question at a time."""
        return self.failures >= BREAK_AFTER and self.rest_until_ms > at_ms

    def answered(self) -> None:
        """It gave an answer, be it an error object: it works."""
        self.failures = 0
        self.rest_until_ms = self.refused_until_ms = 0

    def failed(self) -> None:
        """It could not be asked, or what it said was no answer."""
        self.failures += 1
        rest_ms = min(REST_MS << min(self.failures - 1, 8), LONGEST_REST_MS)
        self.rest_until_ms = now_ms() + jittered(rest_ms)

    def refused(self, for_ms: int | None) -> None:
        """It turned the question away unread. ``for_ms``: what it asked to be spared."""
        wanted_ms = REFUSAL_MS if for_ms is None else min(for_ms, LONGEST_REFUSAL_MS)
        self.refused_until_ms = now_ms() + wanted_ms


def jittered(span_ms: int) -> int:
    """Up to a quarter more, so that several processes do not come back together."""
    return span_ms + random.randrange(span_ms // 4 + 1)  # noqa: S311  (nothing secret)


def retry_after_ms(value: str | None) -> int | None:
    """``Retry-After`` in its form of whole seconds; None for any other, or none."""
    text = (value or "").strip()
    if not text.isascii() or not text.isdigit() or len(text) > 6:
        return None
    return int(text) * 1_000


def now_ms() -> int:
    """The clock that deadlines and rests are counted by."""
    return time.monotonic_ns() // 1_000_000
