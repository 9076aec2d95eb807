"""Counters shared by several processes, in Redis; without it every process counts for itself.

The only module that knows Redis, and nothing in it is needed: no balance, no replay guard and no
fact about money lies there. Whatever Redis does (down, slow, flushed, full) a count is answered
within a deadline, with None when Redis did not answer it. The log says so once an outage.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from gateway.observe import log

if TYPE_CHECKING:
    from redis.asyncio import Redis

RETRY_S: Final = 1.0
MAX_QUEUE: Final = 10_000
MAX_BATCH: Final = 256
# A trip that missed the deadline goes on without anybody waiting: it may be opening a connection
# to a Redis that is far away, and if it were cut every time there would never be one.
_SOCKET_TIMEOUT_S: Final = 2.0

# A window begins with its first count. A counter that Redis has lost begins with what the asker
# still knows of the window (ARGV: for each key the milliseconds it has left, and that count).
_SCRIPT: Final = """
local out = {}
for i, key in ipairs(KEYS) do
  local count = redis.call('INCR', key)
  local left = redis.call('PTTL', key)
  if left < 0 then
    left = tonumber(ARGV[2 * i - 1])
    count = redis.call('INCRBY', key, ARGV[2 * i])
    redis.call('PEXPIRE', key, left)
  end
  out[2 * i - 1] = count
  out[2 * i] = left
end
return out
"""
_SHA: Final = hashlib.sha1(_SCRIPT.encode(), usedforsecurity=False).hexdigest()


class Counted(NamedTuple):
    """What all processes have counted, and how long the window goes on."""

    total: int
    left_ms: int


class _Asked(NamedTuple):
    key: str
    left_ms: int
    known: int
    answer: asyncio.Future[Counted | None]


def connect(url: str, *, deadline_ms: int) -> Cache | None:
    """The cache at ``redis://…``, ``rediss://…`` or ``unix://…``; None for an empty ``url``.

    Does not wait for Redis: the first count opens the connection. Nobody waits for a count longer
    than ``deadline_ms``.
    """
    if not url:
        return None
    import redis.asyncio
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    return Cache(
        redis.asyncio.Redis.from_url(
            url,
            protocol=2,
            socket_timeout=_SOCKET_TIMEOUT_S,
            socket_connect_timeout=_SOCKET_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        ),
        deadline_ms,
    )


class Cache:
    """Counts that are asked for at the same time share one round trip. One event loop's."""

    def __init__(self, client: Redis, deadline_ms: int) -> None:
        self._client = client
        self._deadline_s = deadline_ms / 1000
        self._queue: list[_Asked] = []
        self._running: asyncio.Task[None] | None = None
        self._late = False
        self._retry_at_s = 0.0
        self.up = True
        """False from the first failure to the next success."""
        self.outages = 0
        """How often ``up`` has become False since the start; for metrics."""
        self.why = ""
        """The last failure."""

    async def count(self, key: str, left_ms: int, known: int) -> Counted | None:
        """Count one more under ``key``. None: count for yourself.

        If Redis does not have the key its window lasts ``left_ms``, and ``known`` were counted in
        it before.
        """
        loop = asyncio.get_running_loop()
        if self._late or loop.time() < self._retry_at_s or len(self._queue) >= MAX_QUEUE:
            return None
        answer: asyncio.Future[Counted | None] = loop.create_future()
        self._queue.append(_Asked(key, left_ms, known, answer))
        if self._running is None:
            self._running = asyncio.create_task(self._run(), name="cache")
        return await answer

    async def ping(self) -> bool:
        """Whether Redis answers now."""
        return await self.count("ping", 1_000, 0) is not None

    async def close(self) -> None:
        """Answer everybody, now and from now on, and close the connections."""
        self._retry_at_s = float("inf")
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        self._dismiss([])  # if it was cancelled before it had begun
        await self._client.aclose()

    async def _run(self) -> None:
        asked: list[_Asked] = []
        try:
            while self._queue:
                await asyncio.sleep(0)  # those who are ready together go together
                asked, self._queue = self._queue[:MAX_BATCH], self._queue[MAX_BATCH:]
                await self._round(asked)
        finally:
            self._running = None
            self._dismiss(asked)

    async def _round(self, asked: list[_Asked]) -> None:
        trip = asyncio.create_task(self._trip(asked))
        try:
            in_time = await _done_within(trip, self._deadline_s)
            if not in_time:
                self._late = True
                self._lost(f"no answer within {self._deadline_s * 1000:.0f} ms")
                self._dismiss(asked)
            counts = await trip  # not for long: the socket has timeouts of its own
        except Exception as error:
            # Of whatever kind: a limit that cannot be shared must not fail a request.
            in_time, counts = False, []
            self._lost(f"{type(error).__name__}: {error}")
        finally:
            self._late = False
            trip.cancel()
        if in_time:
            self._back()
        else:
            self._retry_at_s = asyncio.get_running_loop().time() + RETRY_S
        _answer(asked, counts)

    def _dismiss(self, asked: list[_Asked]) -> None:
        """Let these and all who wait count for themselves."""
        _answer([*asked, *self._queue], [])
        self._queue.clear()

    async def _trip(self, asked: list[_Asked]) -> list[int]:
        from redis.exceptions import NoScriptError

        arguments: list[Any] = [each.key for each in asked]
        for each in asked:
            arguments += (each.left_ms, each.known)
        try:
            reply: list[int] = await self._client.evalsha(_SHA, len(asked), *arguments)
        except NoScriptError:
            reply = await self._client.eval(_SCRIPT, len(asked), *arguments)
        if len(reply) != 2 * len(asked):
            raise ValueError(f"{len(reply)} numbers for {len(asked)} keys")
        return [int(each) for each in reply]

    def _lost(self, why: str) -> None:
        self.why = why
        if self.up:
            self.up = False
            self.outages += 1
            log.warning("Redis: %s; until it answers every process counts for itself", why)

    def _back(self) -> None:
        if not self.up:
            self.up = True
            log.info("Redis answers again; limits are shared")


async def _done_within(trip: asyncio.Task[Any], deadline_s: float) -> bool:
    """Wait for a trip until the deadline.

    In two parts: when this process was too busy to look, all of the first may have passed while
    the answer lay there; the second still reads it.
    """
    for part_s in (deadline_s * 0.8, deadline_s * 0.2):
        await asyncio.wait({trip}, timeout=part_s)
        if trip.done():
            return True
    return False


def _answer(asked: list[_Asked], counts: list[int]) -> None:
    """Give everybody their count, or None where there is none. Who left is passed over."""
    for i, each in enumerate(asked):
        if not each.answer.done():
            found = Counted(counts[2 * i], counts[2 * i + 1]) if counts else None
            each.answer.set_result(found)
