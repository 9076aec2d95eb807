"""The live owner of a long call speaks for its hold until the call ends."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from gateway import ledger
from gateway.db import CommitUnknown, DatabaseUnavailable
from gateway.ledger.sweep import renew
from gateway.node import Node


@contextmanager
def keep(node: Node, hold: ledger.HoldRow) -> Iterator[None]:
    """While inside, the hold's lease is renewed by ``renewing``."""
    node.in_flight[hold.id] = hold
    try:
        yield
    finally:
        node.in_flight.pop(hold.id, None)


async def renewing(node: Node) -> None:
    """Renew the leases of this process's long calls, in one transaction each round, and look at
    the database's clock.

    A call shorter than a third of the lease never comes up here. A round that fails is tried
    again before the lease is over; if the database stays away, the holds lapse, which is what a
    lease is for.
    """
    lease_ms = node.settings.server.hold_lease_s * 1000
    while not node.stopping.is_set():
        await asyncio.sleep(min(lease_ms / 3000, 10))
        try:
            await node.look_at_clock()
            await renew(node.db, list(node.in_flight.values()), lease_ms)
        except (DatabaseUnavailable, CommitUnknown):
            continue
