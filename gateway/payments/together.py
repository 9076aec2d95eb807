"""Writes of payments that ended together, in one transaction of the database.

The members of a batch end in the same instant, and mints wait for each other anyway: on SQLite for
the one writer and the disk, on PostgreSQL for the row that guards a network's limits
(exposure.py). One by one each would wait for as many commits as there are others.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from gateway.db import CommitUnknown, Database, DatabaseUnavailable, Tx, transact

T = TypeVar("T")
MAX: Final = 50
NEW: Final = 2**63 - 1


@dataclass(slots=True, eq=False)
class _Write:
    work: Callable[[Tx], Awaitable[Any]]
    account_id: int
    written: asyncio.Future[Any]


@dataclass(slots=True)
class Together:
    """What waits for the next transaction of this process."""

    waiting: deque[_Write] = field(default_factory=deque)
    runner: asyncio.Task[None] | None = None


async def write(
    shared: Together, db: Database, account_id: int | None, work: Callable[[Tx], Awaitable[T]]
) -> T:
    """Run ``work`` in a write transaction, with others that come at the same time.

    As ``transact``: ``work`` must do nothing but use its ``Tx``, and may run more than once. It is
    committed when this returns. What one of them raises is raised to that one only. ``account_id``:
    whose row it locks, None for a new one; they are taken in the order in which the ledger's writer
    takes them, so that the two do not wait for each other.
    """
    loop = asyncio.get_running_loop()
    written: asyncio.Future[T] = loop.create_future()
    shared.waiting.append(_Write(work, NEW if account_id is None else account_id, written))
    if shared.runner is None:
        shared.runner = loop.create_task(_run(shared, db))
    return await asyncio.shield(written)


async def _run(shared: Together, db: Database) -> None:
    batch: list[_Write] = []
    try:
        while shared.waiting:
            await asyncio.sleep(0)  # those who were woken with the first
            size = min(len(shared.waiting), MAX)
            batch = [shared.waiting.popleft() for _ in range(size)]
            await _commit(db, sorted(batch, key=lambda one: one.account_id))
    finally:
        shared.runner = None
        # However it ends, nobody may wait for an answer that will not come.
        for one in [*batch, *shared.waiting]:
            _fail(one, CommitUnknown("the gateway is stopping"))
        shared.waiting.clear()


async def _commit(db: Database, batch: list[_Write]) -> None:
    async def all_of(tx: Tx) -> list[Any]:
        return [await one.work(tx) for one in batch]

    try:
        results = await transact(db, all_of)
    except (DatabaseUnavailable, CommitUnknown) as error:
        for one in batch:
            _fail(one, error)
    except Exception as error:
        if len(batch) == 1:
            _fail(batch[0], error)
            return
        # One of them is at fault, and nothing was written: each by itself.
        for one in batch:
            await _commit(db, [one])
    else:
        for one, result in zip(batch, results, strict=True):
            if not one.written.done():
                one.written.set_result(result)


def _fail(one: _Write, error: Exception) -> None:
    if not one.written.done():
        one.written.set_exception(error)
        one.written.exception()  # whoever waited may be gone, and nobody need be told
