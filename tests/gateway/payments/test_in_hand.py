"""Who works on a payment speaks for it, no longer than it lives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from gateway.db import Database, DatabaseUnavailable, Tx
from gateway.payments import in_hand, journal
from gateway.payments.rails import Rails
from tests.gateway.payments.parts import blank, settings_for
from tests.gateway.payments.test_journal import Connect, connect, inserted, stored

__all__ = ["connect"]


@pytest.fixture
async def rails(connect: Connect, db_url: str) -> AsyncIterator[Rails]:
    """Rails whose leases are as short as may be."""
    db = await connect()
    settings = settings_for(server={"database": db_url, "takeover_s": 2})
    yield Rails(settings, db, keys=None, rpcs={})  # type: ignore[arg-type]  # none is asked


async def lease(rails: Rails, payment_id: str) -> int:
    return (await stored(rails.db, payment_id)).lease_ms


def test_in_hand_is_what_a_block_works_on(rails: Rails) -> None:
    with in_hand.working_on(rails, ["a", "b"]):
        with in_hand.working_on(rails, ["b", "c"]):
            assert rails.in_hand == {"a", "b", "c"}
        assert rails.in_hand == {"a", "b"}
        rails.in_hand.discard("a")  # let go of earlier
    assert rails.in_hand == set()
    with pytest.raises(KeyError), in_hand.working_on(rails, ["a"]):
        raise KeyError
    assert rails.in_hand == set()


async def test_the_leases_of_what_is_in_hand_are_renewed_and_no_other(rails: Rails) -> None:
    await inserted(
        rails.db, blank("mine"), blank("let go"), blank("over", state="succeeded"), blank("none")
    )
    stopping = asyncio.Event()
    task = asyncio.create_task(in_hand.renewing(rails, stopping))
    with in_hand.working_on(rails, ["mine", "over"]):
        first = await _renewed(rails, "mine", 0)
        await _renewed(rails, "mine", first)
    stopping.set()
    await asyncio.wait_for(task, 10)
    last = await lease(rails, "mine")
    async with rails.db.read() as tx:
        assert last <= in_hand.lease_ms(rails, await tx.now_ms())
    assert [await lease(rails, each) for each in ("let go", "over", "none")] == [0, 0, 0]


async def _renewed(rails: Rails, payment_id: str, before_ms: int) -> int:
    async with asyncio.timeout(20):
        while (now_ms := await lease(rails, payment_id)) <= before_ms:
            await asyncio.sleep(0.05)
    return now_ms


async def test_a_database_that_is_away_for_a_round_ends_nothing(
    rails: Rails, monkeypatch: pytest.MonkeyPatch
) -> None:
    await inserted(rails.db, blank("mine"))
    failed, renew = asyncio.Event(), journal.renew

    async def first_fails(tx: Tx, ids: list[str], until_ms: int) -> None:
        if not failed.is_set():
            failed.set()
            raise DatabaseUnavailable("away")
        await renew(tx, ids, until_ms)

    monkeypatch.setattr(journal, "renew", first_fails)
    stopping = asyncio.Event()
    task = asyncio.create_task(in_hand.renewing(rails, stopping))
    with in_hand.working_on(rails, ["mine"]):
        await _renewed(rails, "mine", 0)
    assert failed.is_set()
    stopping.set()
    await asyncio.wait_for(task, 10)


async def test_one_that_is_just_being_finished_is_passed_over(postgres_url: str) -> None:
    """Who finishes several locks them in an order of its own: neither waits for the other."""
    one, two = [await Database.connect(postgres_url) for _ in range(2)]
    await inserted(one, blank("ending"), blank("mine"))
    async with one.write() as tx:
        await journal.by_id(tx, "ending", lock=True)

        async def renew() -> None:
            async with two.write() as other:
                await journal.renew(other, ["ending", "mine"], 77)

        await asyncio.wait_for(renew(), 10)
    assert (await stored(one, "ending")).lease_ms == 0
    assert (await stored(one, "mine")).lease_ms == 77
    await one.close()
    await two.close()
