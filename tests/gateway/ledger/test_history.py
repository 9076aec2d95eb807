"""Random histories on both databases against the model: a short form here, a long one in soak.

``TEST_SOAK_S`` (seconds for each database) turns on the long form. A failure prints its seed and
the smallest history that still shows it.
"""

from __future__ import annotations

import itertools
import os
import random
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gateway.accounts import wallets
from gateway.db import Database
from gateway.migrations.run import migrate
from tests import servers
from tests.gateway.ledger.helpers import T0, Clock, address
from tests.gateway.ledger.histories import History, Run, make

LENGTH = 200
SHORT = {"sqlite": 40, "postgres": 20}
SOAK_S = float(os.environ.get("TEST_SOAK_S", "0"))
OUTCOMES = {
    *("held", "repeated", "conflict", "short", "closed", "already closed"),
    *("minted", "minted before", "current", "frozen", "lot", "account"),
    *("refunded", "refunded before", "refund conflict", "not refundable"),
}
_numbers = itertools.count(1)


async def play(db: Database, clock: Clock, history: History, seed: int) -> Run:
    """Run a history on accounts of its own."""

    async def open_account() -> int:
        async with db.write() as tx:
            return await wallets.ensure(tx, address(next(_numbers)), T0)

    other = await Database.connect(db.url)
    try:
        run = Run(db, other, clock, open_account, random.Random(seed))
        await run.all(history)
    finally:
        await other.close()
    return run


@asynccontextmanager
async def fresh(dialect: str, folder: Path) -> AsyncIterator[Database]:
    """A database of its own, outside the fixtures: soak needs many of them."""
    if dialect == "sqlite":
        url = f"sqlite:///{folder / secrets.token_hex(8)}.db"
    else:
        url = servers.create_database(servers.postgres_url())
    db = await Database.connect(url)
    try:
        await migrate(db)
        yield db
    finally:
        await db.close()
        if dialect == "postgres":
            servers.drop_database(url)


async def smallest(history: History, seed: int, clock: Clock, folder: Path) -> str:
    """Leave out what can be left out of a failing history, on SQLite."""

    async def failure(candidate: History) -> str | None:
        clock.now_ms = T0
        async with fresh("sqlite", folder) as db:
            try:
                await play(db, clock, candidate, seed)
            except Exception as error:
                return f"{type(error).__name__}: {error}"
        return None

    told = await failure(history)
    end = time.monotonic() + 40
    size = len(history) // 2
    while told and size and time.monotonic() < end:
        start = 0
        while start < len(history):
            shorter = history[:start] + history[start + size :]
            if found := await failure(shorter):
                history, told = shorter, found
            else:
                start += size
        size //= 2
    return f"{told or 'not seen on SQLite'}\n" + "\n".join(map(repr, history))


async def check(db: Database, clock: Clock, seed: int, folder: Path) -> Run:
    history = make(seed, LENGTH)
    try:
        return await play(db, clock, history, seed)
    except Exception as error:
        small = await smallest(history, seed, clock, folder)
        raise AssertionError(f"seed {seed} on {db.dialect}: {error}\n{small}") from error


async def test_random_histories_are_as_the_model_says(
    db_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = Clock()
    clock.install(monkeypatch)
    db = await Database.connect(db_url)
    runs = [await check(db, clock, seed, tmp_path) for seed in range(SHORT[db.dialect])]
    await db.close()
    # What never happened was not tested.
    assert set().union(*(run.seen for run in runs)) == OUTCOMES
    assert sum(run.steps for run in runs) > 100 * len(runs)
    assert sum(run.swept for run in runs) > 5
    assert sum(run.limited for run in runs) > 2 * len(runs)
    assert sum(run.model.given_up for run in runs) > len(runs) // 2
    assert sum(run.model.recovered for run in runs) > 0


if SOAK_S:  # the long form; TEST_SOAK_S is how many seconds for each database

    @pytest.mark.timeout(SOAK_S + 300)
    async def test_random_histories_for_long(
        dialect: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        clock = Clock()
        clock.install(monkeypatch)
        end, runs, steps = time.monotonic() + SOAK_S, 0, 0
        while time.monotonic() < end:
            async with fresh(dialect, tmp_path) as db:
                for _ in range(50):  # the audits read everything: not too much in one database
                    steps += (await check(db, clock, secrets.randbits(40), tmp_path)).steps
                    runs += 1
                    if time.monotonic() > end:
                        break
        servers.note(f"{dialect} histories", f"{runs} with {steps} steps")
