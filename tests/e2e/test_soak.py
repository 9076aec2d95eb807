"""The soak in its short form (``make soak`` is the long one)."""

from __future__ import annotations

import secrets

import pytest

from tests import servers
from tests.soak.postgres import PostgresMissing
from tests.soak.run import Plan, soak, tell


@pytest.mark.timeout(180)
def test_killed_again_and_again_it_keeps_its_promises(dialect: str) -> None:
    """Half of the time something is down. The seed of a failure is in its output."""
    plan = Plan(
        dialect,
        seed=secrets.token_hex(4),
        seconds=4,
        clients=8,
        wallets=4,
        kill_every_s=2,
        stop_every_s=3,
        lease_s=1,
    )
    try:
        report = soak(plan)
    except PostgresMissing as error:
        servers.missing("PostgreSQL", str(error))
    tell(report)
    assert not report.broken, "\n".join(map(str, report.broken))
    # It went wrong, and it went on.
    assert report.figures["kills"] >= plan.nodes
    assert report.figures["charges"] > 0
    assert report.figures["purchases_minted"] > 0
