"""The crash sweep (sweep.py): some points of it here, all of them in ``make soak``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from urllib.parse import urlsplit, urlunsplit

import pytest

from anvil.devnet import Devnet
from tests import servers
from tests.e2e import sweep as sweeps
from tests.e2e.stage import Background, Gateway
from tests.e2e.sweep import AFTER, BEFORE, FLOWS, Swept, Tap

Launch = Callable[..., Gateway]
# Leases end soon: a payment whose gateway died is free for others 10 s after the wait.
QUICK = {"settle_wait_s": 1, "hold_lease_s": 3}
# Of the whole sweep; a part of it is done in seconds.
pytestmark = pytest.mark.timeout(3600)


@pytest.fixture
def tap(background: Background) -> Iterator[Callable[[str], Tap]]:
    made: list[Tap] = []

    def before(url: str) -> Tap:
        made.append(Tap(background, url))
        return made[-1]

    yield before
    for each in made:
        each.close()


@pytest.mark.parametrize("side", [BEFORE, AFTER])
@pytest.mark.parametrize("flow", FLOWS)
async def test_killed_at_every_message_to_the_chain(  # noqa: PLR0917  (fixtures)
    flow: str,
    side: str,
    dialect: str,
    tap: Callable[[str], Tap],
    launch: Launch,
    chain_session: Devnet,
    every: int,
) -> None:
    line = tap(chain_session.rpc_url)
    gateway = launch(dialect, rpc_url=f"http://127.0.0.1:{line.port}", server=QUICK)
    found = Swept(f"{flow}, {dialect}, {side} a message to the chain")
    await sweeps.sweep(gateway, FLOWS[flow], sweeps.tapped(line, side), found, every)
    found.check()


@pytest.mark.parametrize("side", [BEFORE, AFTER])
@pytest.mark.parametrize("flow", FLOWS)
async def test_killed_at_every_message_to_postgres(
    flow: str, side: str, tap: Callable[[str], Tap], launch: Launch, every: int
) -> None:
    database = servers.create_database(servers.postgres_url())
    parts = urlsplit(database)
    line = tap(f"tcp://{parts.hostname}:{parts.port}")
    through = urlunsplit(parts._replace(netloc=f"{parts.username}@127.0.0.1:{line.port}"))
    gateway = launch("postgres", database=through, server=QUICK)
    found = Swept(f"{flow}, {side} a message to PostgreSQL")
    every = 1 if every == 1 else every * 4  # there are many more of them
    try:
        await sweeps.sweep(gateway, FLOWS[flow], sweeps.tapped(line, side), found, every)
        assert gateway.broken() == {}
        found.check()
    finally:
        gateway.stop()
        servers.drop_database(database)
