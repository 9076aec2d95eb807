"""The crash sweep (sweep.py): some points of it here, all of them in ``make soak``.

And the sweep itself: it must see what it is there to see.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from tests.e2e.flows import FLOWS
from tests.e2e.sweep import Swept

# Of the whole sweep; a part of it is done in seconds.
pytestmark = pytest.mark.timeout(14_400)


@pytest.mark.parametrize("flow", FLOWS)
async def test_killed_at_every_message(
    flow: str, dialect: str, swept: Callable[..., Awaitable[Swept]]
) -> None:
    found = await swept(flow, dialect)
    found.check()
