"""The crash sweep at SQLite's boundaries, which are system calls. Part of ``make soak`` only: it
needs strace, and the right to trace."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.e2e import sweep as sweeps
from tests.e2e.stage import Gateway
from tests.e2e.sweep import FLOWS, Swept

pytestmark = pytest.mark.timeout(3600)


@pytest.mark.parametrize("flow", FLOWS)
async def test_killed_at_every_write(flow: str, launch: Callable[..., Gateway], every: int) -> None:
    gateway = launch("sqlite")
    found = Swept(f"{flow}, a write or fsync of SQLite")
    await sweeps.sweep(gateway, FLOWS[flow], sweeps.straced, found, every)
    found.check()
