"""Databases for the ledger's tests; each is audited when its test is over."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from gateway.db import Database
from tests.gateway.ledger import helpers


@pytest.fixture
async def broken_db(db_url: str) -> AsyncIterator[Database]:
    """A fresh database that a test may leave in disorder, once per dialect."""
    database = await Database.connect(db_url)
    yield database
    await database.close()


@pytest.fixture
async def db(broken_db: Database) -> AsyncIterator[Database]:
    """A fresh database whose books must be in order at the end, once per dialect."""
    yield broken_db
    assert await helpers.faults(broken_db) == []


@pytest.fixture
async def postgres(postgres_url: str) -> AsyncIterator[Database]:
    """A fresh PostgreSQL database, for what only several processes can do."""
    database = await Database.connect(postgres_url)
    yield database
    assert await helpers.faults(database) == []
    await database.close()
