"""One page of what is wanted, out of rows that lie in an order no index of the filter helps with.

The rows are looked at along their own order, a stretch at a time, and a bounded number of them for
a page: a filter costs its asker pages, and nobody an index. On SQLite a read keeps the event loop,
so others get their turn between two stretches.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

STRETCH: Final = 100
"""Rows looked at at once while a filter looks for its own."""
STRETCHES: Final = 10
"""At most for one page, which may then be a short one with a cursor."""
SKEW_MS: Final = 60_000
"""By which clocks of nodes may differ: the order of rows is only so nearly that of their times."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Stretch(Generic[T]):
    """Some rows in their order, and where the next stretch begins; None: they end here."""

    rows: Sequence[T]
    next: int | None


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Some rows, and the cursor behind which the next page begins; None: there is none."""

    rows: tuple[T, ...]
    next_cursor: int | None


async def look(
    stretch: Callable[[int, int], Awaitable[Stretch[T]]],
    start: int,
    limit: int,
    wanted: Callable[[T], bool] | None,
    id_of: Callable[[T], int],
) -> Page[T]:
    """``wanted`` None: all. The cursor is the last row looked at, so that the next page goes on
    behind it whether or not it was wanted."""
    if wanted is None:
        seen = await stretch(start, limit)
        last = id_of(seen.rows[-1]) if seen.next is not None else None
        return Page(tuple(seen.rows), last)
    found: list[T] = []
    at, last = start, None
    for _ in range(STRETCHES):
        seen = await stretch(at, STRETCH)
        for row in seen.rows:
            last = id_of(row)
            if wanted(row):
                found.append(row)
                if len(found) == limit:
                    more = row is not seen.rows[-1] or seen.next is not None
                    return Page(tuple(found), last if more else None)
        if seen.next is None:
            return Page(tuple(found), None)
        at = seen.next
        await asyncio.sleep(0)
    return Page(tuple(found), last)
