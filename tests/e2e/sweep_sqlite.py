"""The crash sweep at SQLite's boundaries, which are system calls. Part of ``make soak`` only: it
needs strace, and the right to trace."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from tests.e2e.flows import FLOWS
from tests.e2e.sweep import Swept

pytestmark = pytest.mark.timeout(14_400)


@pytest.mark.parametrize("flow", FLOWS)
async def test_killed_at_every_write(flow: str, swept: Callable[..., Awaitable[Swept]]) -> None:
    found = await swept(flow, "sqlite", disk=True)
    found.check()
