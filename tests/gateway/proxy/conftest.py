"""An upstream that misbehaves on request, and a client for it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from gateway.proxy.client import UpstreamClient
from tests.gateway.proxy.misbehave import Upstream, misbehaving


@pytest.fixture
async def up() -> AsyncIterator[Upstream]:
    async with misbehaving() as server:
        yield server


@pytest.fixture
async def client() -> AsyncIterator[UpstreamClient]:
    made = UpstreamClient()
    yield made
    await made.close()
