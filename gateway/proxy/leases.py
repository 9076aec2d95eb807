"""The live owner of a long call speaks for its hold until the call ends."""

from __future__ import annotations

import asyncio

from gateway.db import CommitUnknown, DatabaseUnavailable
from gateway.ledger.sweep import renew
from gateway.node import Node


async def renewing(node: Node) -> None:
    """Renew the leases of this process's long calls (``node.in_flight``), in one transaction each
    round, and look at the database's clock.

    A call shorter than a quarter of the lease never comes up here. A round that fails is tried
    again before the lease is over. If the database stays away for longer, nobody can void anything
    either, and when it is back the owners come first (``sweep.Patience``).
    """
    lease_ms = node.settings.server.hold_lease_s * 1000
    while not node.stopping.is_set():
        await asyncio.sleep(min(lease_ms / 6000, 5))
        try:
            await node.look_at_clock()
            await renew(node.db, list(node.in_flight.values()), lease_ms)
        except (DatabaseUnavailable, CommitUnknown):
            continue
