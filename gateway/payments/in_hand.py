"""Whoever works on a payment speaks for it, so that nobody else does: a lease, renewed.

Short, because a process may die: what it had in hand is taken over ``takeover_s`` later. Two that
work on one payment would still mint once; they would pay for gas twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from gateway.db import CommitUnknown, DatabaseUnavailable
from gateway.payments import journal
from gateway.payments.rails import Rails


def lease_ms(rails: Rails, now_ms: int) -> int:
    """Until when a payment that is begun or taken now is spoken for."""
    return now_ms + rails.settings.server.takeover_s * 1_000


@contextmanager
def working_on(rails: Rails, payment_ids: Iterable[str]) -> Iterator[None]:
    """Have their leases renewed in this block. Blocks may stand in each other."""
    mine = set(payment_ids) - rails.in_hand
    rails.in_hand.update(mine)
    try:
        yield
    finally:
        rails.in_hand.difference_update(mine)


async def renewing(rails: Rails, stopping: asyncio.Event) -> None:
    """Renew the leases of what this process works on until it stops.

    A round that fails leaves two more before a lease is over.
    """
    while not stopping.is_set():
        with suppress(TimeoutError):
            async with asyncio.timeout(rails.settings.server.takeover_s / 3):
                await stopping.wait()
        if not rails.in_hand:
            continue
        try:
            async with rails.db.write() as tx:
                until_ms = lease_ms(rails, await tx.now_ms())
                await journal.renew(tx, sorted(rails.in_hand), until_ms)
        except (DatabaseUnavailable, CommitUnknown):
            continue
