"""Writes of payments that ended together, in one transaction of the database.

On SQLite writers wait for each other and each waits for the disk, so the members of a batch would
pay for as many commits one after the other. On PostgreSQL transactions commit side by side, and
one that touched many accounts would hold the rows of all of them: each is its own there.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from gateway.db import CommitUnknown, Database, DatabaseUnavailable, Tx, transact

T = TypeVar("T")
MAX: Final = 100
Work = Callable[[Tx], Awaitable[Any]]


@dataclass(slots=True)
class Together:
    """What waits for the next transaction of this process."""

    waiting: deque[tuple[Work, asyncio.Future[Any]]] = field(default_factory=deque)
    runner: asyncio.Task[None] | None = None


async def write(shared: Together, db: Database, work: Callable[[Tx], Awaitable[T]]) -> T:
    """Run ``work`` in a write transaction, with others that come at the same time.

    As ``transact``: ``work`` must do nothing but use its ``Tx``, and may run more than once. It is
    committed when this returns. What one of them raises is raised to that one only.
    """
    if db.dialect != "sqlite":
        return await transact(db, work)
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    shared.waiting.append((work, future))
    if shared.runner is None:
        shared.runner = loop.create_task(_run(shared, db))
    return await asyncio.shield(future)


async def _run(shared: Together, db: Database) -> None:
    batch: list[tuple[Work, asyncio.Future[Any]]] = []
    try:
        while shared.waiting:
            await asyncio.sleep(0)  # those who were woken with the first
            size = min(len(shared.waiting), MAX)
            batch = [shared.waiting.popleft() for _ in range(size)]
            await _commit(db, batch)
    finally:
        shared.runner = None
        # However it ends, nobody may wait for an answer that will not come.
        for _, future in [*batch, *shared.waiting]:
            if not future.done():
                future.set_exception(CommitUnknown("the gateway is stopping"))
        shared.waiting.clear()


async def _commit(db: Database, batch: list[tuple[Work, asyncio.Future[Any]]]) -> None:
    async def all_of(tx: Tx) -> list[Any]:
        return [await work(tx) for work, _ in batch]

    try:
        results = await transact(db, all_of)
    except (DatabaseUnavailable, CommitUnknown) as error:
        for _, future in batch:
            _fail(future, error)
        return
    except Exception as error:
        if len(batch) == 1:
            _fail(batch[0][1], error)
            return
        # One of them is at fault, and nothing was written: each by itself.
        for one in batch:
            await _commit(db, [one])
        return
    for (_, future), result in zip(batch, results, strict=True):
        if not future.done():
            future.set_result(result)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # whoever waited may be gone, and nobody need be told
