"""Several questions at once, of which none outlives the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar, overload

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")


@overload
async def all_of(one: Awaitable[A], two: Awaitable[B], /) -> tuple[A, B]: ...
@overload
async def all_of(
    one: Awaitable[A], two: Awaitable[B], three: Awaitable[C], /
) -> tuple[A, B, C]: ...
@overload
async def all_of(
    one: Awaitable[A], two: Awaitable[B], three: Awaitable[C], four: Awaitable[D], /
) -> tuple[A, B, C, D]: ...
async def all_of(*questions: Awaitable[Any]) -> tuple[Any, ...]:
    """The results in their order, or the first fault there is.

    ``asyncio.gather`` leaves the others running then: they would go on asking, and open again what
    has been closed meanwhile. Here they are cancelled, and have ended.
    """
    tasks = [asyncio.ensure_future(question) for question in questions]
    try:
        return tuple(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
