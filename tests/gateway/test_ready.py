"""One look at a time for everybody who asks whether requests can be served."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from gateway.ready import KEEP_S, Looks, Readiness


class Parts:
    """What is looked at: counts the looks and answers when it is let."""

    def __init__(self) -> None:
        self.looks = 0
        self.now_s = 100.0
        self.open = asyncio.Event()
        self.fails = False

    async def look(self) -> Readiness:
        self.looks += 1
        number = self.looks
        await self.open.wait()
        if self.fails:
            raise ConnectionError("gone")
        return Readiness(True, {"look": str(number)})

    def clock_s(self) -> float:
        return self.now_s


@pytest.fixture
async def parts() -> Parts:
    return Parts()


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_all_who_ask_at_once_get_one_look(parts: Parts) -> None:
    looks = Looks(parts.look, parts.clock_s)
    asking = [asyncio.create_task(looks.ask()) for _ in range(50)]
    await turns()
    parts.open.set()
    assert {found.checks["look"] for found in await asyncio.gather(*asking)} == {"1"}
    assert parts.looks == 1


async def test_an_answer_is_given_for_a_second_from_its_end(parts: Parts) -> None:
    looks = Looks(parts.look, parts.clock_s)
    first = asyncio.create_task(looks.ask())
    await turns()
    parts.now_s += 10  # a slow look
    parts.open.set()
    assert (await first).checks == {"look": "1"}
    parts.now_s += KEEP_S - 0.01
    assert (await looks.ask()).checks == {"look": "1"}
    parts.now_s += 0.02
    assert (await looks.ask()).checks == {"look": "2"}


async def test_who_hangs_up_takes_nothing_from_the_others(parts: Parts) -> None:
    looks = Looks(parts.look, parts.clock_s)
    first, second = (asyncio.create_task(looks.ask()) for _ in range(2))
    await turns()
    first.cancel()
    with suppress(asyncio.CancelledError):
        await first
    parts.open.set()
    assert (await second).checks == {"look": "1"}
    assert first.cancelled()


async def test_a_fault_is_told_and_not_kept(parts: Parts) -> None:
    looks = Looks(parts.look, parts.clock_s)
    parts.open.set()
    parts.fails = True
    for _ in range(2):
        with pytest.raises(ConnectionError):
            await looks.ask()
    parts.fails = False
    assert (await looks.ask()).checks == {"look": "3"}


async def test_a_look_ends_with_the_process(parts: Parts) -> None:
    looks = Looks(parts.look, parts.clock_s)
    asking = asyncio.create_task(looks.ask())
    await turns()
    await looks.close()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await looks.close()
