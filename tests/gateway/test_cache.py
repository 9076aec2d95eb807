"""Counters in a real Redis: exact, in one round trip, and never in the way."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway import cache
from gateway.cache import Cache, Counted
from tests import servers
from tests.servers import eventually

WINDOW_MS = 60_000
LONG_MS = 10_000  # a deadline that no healthy Redis misses, however busy the machine is


@asynccontextmanager
async def connected(url: str, deadline_ms: int = LONG_MS) -> AsyncIterator[Cache]:
    found = cache.connect(url, deadline_ms=deadline_ms)
    assert found is not None
    try:
        yield found
    finally:
        await found.close()


async def command(url: str, *words: Any) -> Any:
    import redis.asyncio

    async with redis.asyncio.Redis.from_url(url) as client:
        return await client.execute_command(*words)


async def total(found: Cache, key: str = "k", known: int = 0) -> int | None:
    counted = await found.count(key, WINDOW_MS, known)
    return None if counted is None else counted.total


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


class Own:
    """A Redis of one test, which may be stopped."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("redis-server") or shutil.which("valkey-server")
        if program is None:
            servers.missing("Redis", "install redis-server")
        self._folder = folder
        self.port = servers.free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        self._command = [program, *options, "--appendonly", "no"]
        self.process = self.start()

    def start(self) -> servers.Process:
        self.process = servers.Process(self._command, self._folder, servers.child_env())
        self.process.wait_port(self.port)
        return self.process


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Own]:
    made = Own(tmp_path)
    yield made
    made.process.signal(signal.SIGCONT)
    made.process.kill()


# --- counting -------------------------------------------------------------------------------------


async def test_each_count_is_given_once(redis_url: str) -> None:
    async with connected(redis_url) as one, connected(redis_url) as two:
        counts = await asyncio.gather(*(total((one, two)[i % 2]) for i in range(1_000)))
    assert sorted(c for c in counts if c is not None) == list(range(1, 1_001))


async def test_those_who_ask_together_share_a_round_trip(redis_url: str) -> None:
    async with connected(redis_url) as found:
        assert await total(found, "first") == 1  # the script is known from here on
        await command(redis_url, "CONFIG", "RESETSTAT")
        counts = await asyncio.gather(*(total(found, f"k{i}") for i in range(cache.MAX_BATCH)))
        assert counts == [1] * cache.MAX_BATCH
        stats = await command(redis_url, "INFO", "commandstats")
        assert stats["cmdstat_evalsha"]["calls"] == 1
        assert "cmdstat_eval" not in stats


async def test_a_window_ends_and_no_counter_stays(redis_url: str) -> None:
    async with connected(redis_url) as found:
        first = await found.count("short", 30, 0)
        assert first is not None and first.total == 1 and 0 < first.left_ms <= 30
        again = await found.count("k", WINDOW_MS, 0)
        assert again is not None and WINDOW_MS - 5_000 < again.left_ms <= WINDOW_MS
        second = await found.count("k", 5 * WINDOW_MS, 0)
        assert second is not None and second.total == 2 and second.left_ms <= again.left_ms
        assert 0 < await command(redis_url, "PTTL", "k") <= WINDOW_MS
        async with asyncio.timeout(20):
            while await command(redis_url, "EXISTS", "short"):
                await asyncio.sleep(0.01)
        anew = await found.count("short", WINDOW_MS, 0)
        assert anew is not None and anew.total == 1


async def test_a_counter_without_an_end_gets_one(redis_url: str) -> None:
    """As another program, or a crash between two commands, could leave it."""
    await command(redis_url, "SET", "k", "5")
    async with connected(redis_url) as found:
        assert await total(found) == 6
    assert 0 < await command(redis_url, "PTTL", "k") <= WINDOW_MS


async def test_what_redis_lost_goes_on_from_what_the_asker_knows(redis_url: str) -> None:
    async with connected(redis_url) as found:
        assert await found.count("k", WINDOW_MS, 0) == Counted(1, WINDOW_MS)
        assert await total(found, known=1) == 2
        await command(redis_url, "FLUSHALL")
        counted = await found.count("k", 7_000, 2)
        assert counted is not None and counted.total == 3 and counted.left_ms <= 7_000
        assert await total(found, known=3) == 4


async def test_a_forgotten_script_is_sent_again(redis_url: str) -> None:
    async with connected(redis_url) as found:
        assert await total(found) == 1
        await command(redis_url, "SCRIPT", "FLUSH")
        assert await total(found) == 2
        assert found.outages == 0


def test_without_a_url_there_is_no_cache() -> None:
    assert cache.connect("", deadline_ms=50) is None


async def test_who_leaves_disturbs_nobody(redis_url: str) -> None:
    async with connected(redis_url) as found:
        leaving = [asyncio.create_task(total(found)) for _ in range(5)]
        staying = [asyncio.create_task(total(found)) for _ in range(5)]
        await asyncio.sleep(0)
        for task in leaving:
            task.cancel()
        counts = await asyncio.gather(*staying)
        assert None not in counts and len(set(counts)) == 5


# --- without Redis ------------------------------------------------------------------------------


async def test_a_redis_that_is_not_there(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(f"redis://127.0.0.1:{servers.free_port()}") as found:
        counts = await asyncio.gather(*(total(found) for _ in range(50)))
        assert counts == [None] * 50
        monkeypatch.setattr(cache, "RETRY_S", 0.0)
        found._retry_at_s = 0.0
        assert [await total(found) for _ in range(10)] == [None] * 10  # each tried, and failed
        assert (found.up, found.outages) == (False, 1)
    assert len(warnings(caplog)) == 1 and "every process counts for itself" in warnings(caplog)[0]


async def test_stopped_and_started_again(own: Own, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "farebox")
    async with connected(own.url) as found:
        assert await total(found) == 1
        for outage in (1, 2):
            own.process.kill()
            while await total(found) is not None:
                await asyncio.sleep(0.01)
            assert [await total(found) for _ in range(20)] == [None] * 20
            assert (found.up, found.outages, len(warnings(caplog))) == (False, outage, outage)
            own.start()
            async with asyncio.timeout(20):
                while await total(found) is None:
                    await asyncio.sleep(0.05)
            assert found.up
            back = [r for r in caplog.records if "answers again" in r.getMessage()]
            assert len(back) == outage


async def test_one_that_hangs_is_not_waited_for(own: Own, caplog: pytest.LogCaptureFixture) -> None:
    async with connected(own.url, deadline_ms=50) as found:
        while await total(found) is None:  # connecting may take longer than the deadline
            await asyncio.sleep(0.05)
        before = found.outages
        caplog.clear()
        own.process.signal(signal.SIGSTOP)
        # All are answered though the round trip they share is not over.
        assert await asyncio.gather(*(total(found) for _ in range(100))) == [None] * 100
        assert await asyncio.gather(*(total(found) for _ in range(100))) == [None] * 100
        assert found._late and not found.up
        assert (found.outages, len(warnings(caplog))) == (before + 1, 1)
        await eventually(lambda: not found._late)  # the socket's own timeout
        own.process.signal(signal.SIGCONT)
        async with asyncio.timeout(20):
            while await total(found) is None:
                await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ([("CONFIG", "SET", "requirepass", "secret-word")], "AuthenticationError"),
        ([("SET", "k", "not a number"), ("PEXPIRE", "k", "60000")], "ResponseError"),
        ([("CONFIG", "SET", "min-replicas-to-write", "1")], "ResponseError"),
        ([("CONFIG", "SET", "maxmemory", "1")], "OutOfMemoryError|ResponseError"),
    ],
    ids=["password", "type", "replicas", "memory"],
)
async def test_one_that_refuses(
    own: Own, settings: list[tuple[str, ...]], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    for words in settings:
        await command(own.url, *words)
    async with connected(own.url) as found:
        assert await total(found) is None
        assert found.why.split(":")[0] in why.split("|")
    assert len(warnings(caplog)) == 1
    assert "secret-word" not in caplog.text


@pytest.mark.parametrize("turns", [1, 5])
async def test_closing_answers_who_waits(own: Own, turns: int) -> None:
    """Before their round trip has begun, and in the middle of it."""
    async with connected(own.url) as found:
        assert await total(found) == 1
        own.process.signal(signal.SIGSTOP)
        waiting = [asyncio.create_task(total(found)) for _ in range(10)]
        for _ in range(turns):
            await asyncio.sleep(0)
        await found.close()
        async with asyncio.timeout(20):
            assert await asyncio.gather(*waiting) == [None] * 10
        own.process.signal(signal.SIGCONT)
        assert await total(found) is None


async def test_the_queue_is_bounded(own: Own) -> None:
    async with connected(own.url) as found:
        assert await total(found) == 1
        own.process.signal(signal.SIGSTOP)
        waiting = [asyncio.create_task(total(found)) for _ in range(cache.MAX_QUEUE)]
        await eventually(lambda: len(found._queue) >= cache.MAX_QUEUE - cache.MAX_BATCH)
        more = [asyncio.create_task(total(found)) for _ in range(cache.MAX_BATCH + 1)]
        async with asyncio.timeout(20):
            done, _ = await asyncio.wait(more, return_when=asyncio.FIRST_COMPLETED)
        assert all(task.result() is None for task in done)
        own.process.signal(signal.SIGCONT)
        await asyncio.gather(*waiting, *more)


# --- farebox check --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "text"),
    [("off", "off: limits"), ("there", "not used: with SQLite"), ("away", "ConnectionError: ")],
)
def test_check_says_how_redis_stands(
    farebox: Callable[..., servers.Done], tmp_path: Path, redis_url: str, state: str, text: str
) -> None:
    url = {"off": "", "there": redis_url, "away": f"redis://127.0.0.1:{servers.free_port()}"}[state]
    (tmp_path / "farebox.toml").write_text(
        f"""
[server]
redis = "{url}"

[chains.base-sepolia]
rpc = ["http://127.0.0.1:{servers.free_port()}"]
pay_to = "0x{"1" * 40}"

[upstreams.weather]
url = "http://127.0.0.1:{servers.free_port()}"
routes = [{{ match = "GET /*", price = "$0.002" }}]
"""
    )
    rows = [json.loads(line) for line in farebox("check", "--json").stdout.splitlines()]
    (row,) = [row for row in rows if row["check"] == "redis"]
    assert row["state"] == ("ok" if state == "off" else "warn")
    assert row["text"].startswith(text)
