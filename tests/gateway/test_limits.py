"""Windows of time: exact, bounded in memory, shared where they can be, and who is counted."""

from __future__ import annotations

import asyncio
import ipaddress
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from gateway import cache, limits
from gateway.cache import Cache, Counted
from gateway.forms import RateLimit
from gateway.limits import PARALLEL, Client, Flight, Limits, Standing, client_of
from tests import servers

TEN = RateLimit(10, 60)


class Clock:
    def __init__(self) -> None:
        self.now_ms = 1_000_000

    def __call__(self) -> int:
        return self.now_ms


def limits_of(
    found: Cache | None = None,
    clock: Clock | None = None,
    *,
    deployment: str = "d" * 32,
    uncharged_per_min: int = 3,
) -> Limits:
    options: dict[str, Any] = {} if clock is None else {"now_ms": clock}
    return Limits(found, deployment=deployment, uncharged_per_min=uncharged_per_min, **options)


def cache_of(url: str) -> Cache:
    found = cache.connect(url, deadline_ms=10_000)
    assert found is not None
    return found


async def allowed(where: Sequence[Limits], count: int, key: str = "k") -> int:
    """How many of ``count`` requests at once are within ten a minute."""
    every = await asyncio.gather(*(where[i % len(where)].take(key, TEN) for i in range(count)))
    return sum(standing.allowed for standing in every)


# --- one process ----------------------------------------------------------------------------------


async def test_a_window_begins_with_its_first_request() -> None:
    clock = Clock()
    counts = limits_of(clock=clock)
    assert await counts.take("k", TEN) == Standing(True, 9, 60_000)
    clock.now_ms += 59_999
    assert [(await counts.take("k", TEN)).remaining for _ in range(9)] == [*range(8, -1, -1)]
    assert await counts.take("k", TEN) == Standing(False, 0, 1)
    clock.now_ms += 1
    assert await counts.take("k", TEN) == Standing(True, 9, 60_000)


async def test_each_key_has_its_own() -> None:
    counts = limits_of()
    assert await allowed([counts], 15, "a") == 10
    assert await allowed([counts], 15, "b") == 10
    assert await allowed([counts], 15, "a") == 0


async def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_WINDOWS", 100)
    clock = Clock()
    counts = limits_of(clock=clock)
    for i in range(1_000):
        clock.now_ms += 1
        await counts.take(f"k{i}", TEN)
    assert len(counts._windows) == 100
    # The window that was opened last is still known, and an ended one begins anew at the end.
    assert (await counts.take("k999", TEN)).remaining == 8
    clock.now_ms += 60_000
    await counts.take("k900", TEN)
    await counts.take("new", TEN)
    assert (await counts.take("k900", TEN)).remaining == 8


# --- several processes --------------------------------------------------------------------------


async def test_exact_over_three_processes(redis_url: str) -> None:
    caches = [cache_of(redis_url) for _ in range(3)]
    nodes = [limits_of(found) for found in caches]
    assert await allowed(nodes, 300) == 10
    assert await allowed(nodes, 30) == 0
    assert [node.cache and node.cache.outages for node in nodes] == [0, 0, 0]
    for found in caches:
        await found.close()


async def test_two_deployments_on_one_redis_do_not_meet(redis_url: str) -> None:
    found = cache_of(redis_url)
    here, there = limits_of(found), limits_of(found, deployment="e" * 32)
    assert await allowed([here], 15) == 10
    assert await allowed([there], 15) == 10
    await found.close()


class Counting:
    """Stands before a cache and counts what it is asked. (Redis itself cannot say who asked.)"""

    def __init__(self, behind: Cache) -> None:
        self.behind = behind
        self.asked: Counter[str] = Counter()

    async def count(self, key: str, left_ms: int, known: int) -> Counted | None:
        self.asked[key] += 1
        return await self.behind.count(key, left_ms, known)


async def test_a_full_window_costs_no_round_trip(redis_url: str) -> None:
    found = cache_of(redis_url)
    counting = Counting(found)
    node = limits_of(counting)  # type: ignore[arg-type]  # it is asked for nothing else
    other = limits_of(found)
    assert await allowed([other], 10) == 10
    assert await allowed([node], 1) == 0  # here it hears of it
    for _ in range(50):
        standing = await node.take("k", TEN)
        assert not standing.allowed and 0 < standing.reset_ms <= 60_000
    assert sum(counting.asked.values()) == 1
    await found.close()


async def test_the_end_of_the_window_is_everybodys(redis_url: str) -> None:
    """A window that others opened half a minute ago is over in half a minute here too."""
    import redis.asyncio

    found, clock = cache_of(redis_url), Clock()
    node = limits_of(found, clock)
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        name = f"farebox:{'d' * 16}:k"
        await client.set(name, 10, px=30_000)
        standing = await node.take("k", TEN)
        assert not standing.allowed and 0 < standing.reset_ms <= 30_000
        await client.delete(name)
        clock.now_ms += standing.reset_ms
        assert (await node.take("k", TEN)).remaining == 9
    await found.close()


async def test_flushed_in_the_middle(redis_url: str) -> None:
    """What a process knows goes on; nobody begins at nothing again."""
    import redis.asyncio

    found = cache_of(redis_url)
    one = limits_of(found)
    assert await allowed([one], 6) == 6
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        await client.flushall()
    assert await allowed([one], 20) == 4
    await found.close()


async def test_redis_goes_away_in_the_middle() -> None:
    away = cache_of(f"redis://127.0.0.1:{servers.free_port()}")
    node = limits_of(away)
    assert await allowed([node], 50) == 10
    assert (away.up, away.outages) == (False, 1)
    await away.close()


# --- calls that end uncharged ---------------------------------------------------------------------


async def test_uncharged_calls_of_account_and_address() -> None:
    clock = Clock()
    counts = limits_of(clock=clock)
    for _ in range(2):
        counts.ended_uncharged("account:1", "address:a")
    assert counts.too_many_uncharged("account:1", "address:a") is None
    counts.ended_uncharged("account:2", "address:a")
    clock.now_ms += 1_000
    found = counts.too_many_uncharged("account:1", "address:a")
    assert found == (RateLimit(3, 60), Standing(False, 0, 59_000))
    assert counts.too_many_uncharged("account:1", None) is None
    assert counts.too_many_uncharged("account:2", "address:b") is None
    counts.ended_uncharged("account:1", None)
    assert counts.too_many_uncharged("account:1", None) is not None
    clock.now_ms += 59_000
    assert counts.too_many_uncharged("account:1", "address:a") is None


def as_many_as_may(counts: Limits, *keys: str) -> list[Flight]:
    """Begin calls until one is refused."""
    flights: list[Flight] = []
    while counts.too_many_uncharged(*keys) is None and len(flights) < 1_000:
        flights.append(counts.take_off(*keys))
    return flights


async def test_calls_at_once_are_counted_before_they_end() -> None:
    counts = limits_of(clock=Clock())
    flights = as_many_as_may(counts, "account:1", "address:a")
    assert len(flights) == 3 * PARALLEL
    assert counts.too_many_uncharged("account:1") == (RateLimit(3, 60), Standing(False, 0, 1_000))
    assert counts.too_many_uncharged("account:2", "address:a") is not None
    assert counts.too_many_uncharged("account:2", "address:b") is None
    # One that was not made after all leaves nothing, however often it is said.
    flights[0].land()
    flights[0].land(charged=True)
    assert counts.too_many_uncharged("account:1", "address:a") is None
    counts.take_off("account:1", "address:a")
    # One that ends uncharged makes no room.
    flights[1].land()
    counts.ended_uncharged("account:1", "address:a")
    assert counts.too_many_uncharged("account:1") is not None
    # One that is charged makes room for itself and another.
    for flight in flights[2:7]:
        flight.land(charged=True)
    more = as_many_as_may(counts, "account:1")
    assert len(more) == 2 * PARALLEL + 5 - (3 * PARALLEL - 1 - 5)


async def test_who_is_charged_may_have_many_at_once_and_not_for_ever() -> None:
    clock = Clock()
    counts = limits_of(clock=clock)
    for _ in range(100):
        counts.take_off("account:1").land(charged=True)
    for wait_ms, most in [(0, 112), (60_000, 112), (60_000, 12), (600_000, 12)]:
        clock.now_ms += wait_ms
        flights = as_many_as_may(counts, "account:1")
        assert len(flights) == most
        for flight in flights:
            flight.land()


async def test_uncharged_calls_are_told_to_the_others(redis_url: str) -> None:
    found = cache_of(redis_url)
    one, two = limits_of(found), limits_of(found)
    for _ in range(2):
        one.ended_uncharged("account:1")
    await asyncio.gather(*one._telling)
    two.ended_uncharged("account:1")
    await asyncio.gather(*two._telling)
    assert two.too_many_uncharged("account:1") is not None
    one.ended_uncharged("account:1")  # the third here, and the fourth in all
    await asyncio.gather(*one._telling)
    assert one._windows["uncharged:account:1"].count == 4
    await found.close()


async def test_uncharged_calls_at_once_are_counted_once_each(redis_url: str) -> None:
    found = cache_of(redis_url)
    one = limits_of(found, uncharged_per_min=1_000)
    for _ in range(100):
        one.ended_uncharged("account:1")
    await asyncio.gather(*one._telling)
    assert one._windows["uncharged:account:1"].count == 100
    await found.close()


# --- who it is ------------------------------------------------------------------------------------

PROXIES = tuple(map(ipaddress.ip_network, ("10.0.0.0/8", "fd00::/8")))


def of(peer: str, *forwarded: str, trusted: Any = PROXIES) -> Client:
    headers = [(b"x-forwarded-for", value.encode()) for value in forwarded]
    return client_of(peer, [(b"host", b"h"), *headers], trusted)


@pytest.mark.parametrize(
    ("peer", "forwarded", "address", "single"),
    [
        ("8.8.8.8", [], "8.8.8.8", True),
        ("8.8.8.8", ["1.2.3.4"], "8.8.8.8", True),  # not a proxy of ours: its own words
        ("10.0.0.1", ["1.2.3.4"], "1.2.3.4", True),
        ("10.0.0.1", ["9.9.9.9, 1.2.3.4"], "1.2.3.4", True),  # the first one is made up
        ("10.0.0.1", ["9.9.9.9", "1.2.3.4, 10.9.9.9"], "1.2.3.4", True),  # two proxies
        ("10.0.0.1", ["192.168.1.7"], "192.168.1.7", True),  # a caller of the house, told apart
        ("10.0.0.1", [], "10.0.0.1", False),
        ("10.0.0.1", ["junk"], "10.0.0.1", False),
        ("10.0.0.1", ["1.2.3.4, junk"], "10.0.0.1", False),
        ("10.0.0.1", ["1.2.3.4, 10.0.0.2"], "1.2.3.4", True),
        ("10.0.0.1", ["10.0.0.3, 10.0.0.2"], "10.0.0.1", False),
        ("10.0.0.1", ["1.1.1.1, " * 30 + "2.2.2.2"], "2.2.2.2", True),
        ("fd00::1", ["2606:4700:1:2:3:4:5:6"], "2606:4700:1:2::/64", True),
        ("2606:4700:1:2:ffff::1", [], "2606:4700:1:2::/64", True),
        ("::ffff:8.8.8.8", [], "8.8.8.8", True),
        ("::ffff:10.0.0.1", ["1.2.3.4"], "1.2.3.4", True),
        ("fe80::1%eth0", [], "fe80::/64", False),
        ("192.168.1.1", [], "192.168.1.1", False),
        ("127.0.0.1", ["1.2.3.4"], "127.0.0.1", False),
        ("", [], "unknown", False),
        ("testclient", ["1.2.3.4"], "unknown", False),
    ],
)
def test_whose_address(peer: str, forwarded: list[str], address: str, single: bool) -> None:
    assert of(peer, *forwarded) == Client(address, single)


def test_without_proxies_nobody_is_believed() -> None:
    assert of("127.0.0.1", "1.2.3.4", trusted=()) == Client("127.0.0.1", single=False)
