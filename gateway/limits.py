"""How often: counts in windows of time, per account and per client address.

A window begins with the first request counted in it and lasts as long as its limit says; then the
next one begins. Counts are kept in this process and, with a cache, shared with the others: then
this process' window is a copy that is never behind what it has been told. So a window that is
known to be full costs no round trip, and when the cache goes away counting goes on from there.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

from gateway.cache import Cache
from gateway.forms import IPNetwork, RateLimit

MAX_WINDOWS: Final = 100_000
MAX_FORWARDED: Final = 20
PARALLEL: Final = 4
"""How many calls may be on their way at once, for each that may still end uncharged."""
_LAND_MS: Final = 1_000  # when to ask again if too many are on their way


class Standing(NamedTuple):
    """What a count came to: whether it was within the limit, and what is left until when."""

    allowed: bool
    remaining: int
    reset_ms: int


class _Window:
    __slots__ = ("before", "charged", "count", "ends_ms", "flying")

    def __init__(self, ends_ms: int) -> None:
        self.count = 0
        self.ends_ms = ends_ms
        self.flying = 0  # calls on their way, whenever they began
        self.charged = 0  # calls of this window that were charged
        self.before = 0  # the same of the window before


class Flight:
    """A call on its way: counted from before its hold, so that as many at once are as many."""

    __slots__ = ("_windows",)

    def __init__(self, windows: list[_Window]) -> None:
        self._windows = windows
        for window in windows:
            window.flying += 1

    def land(self, *, charged: bool = False) -> None:
        """It ended, or was not made after all. Once; more often changes nothing."""
        windows, self._windows = self._windows, []
        for window in windows:
            window.flying -= 1
            window.charged += charged


def _now_ms() -> int:
    return time.monotonic_ns() // 1_000_000


class Limits:
    """The counters of one process. One event loop's."""

    def __init__(
        self,
        cache: Cache | None,
        *,
        deployment: str,
        uncharged_per_min: int,
        now_ms: Callable[[], int] = _now_ms,
    ) -> None:
        self.cache = cache
        self._prefix = f"farebox:{deployment[:16]}:"
        self._uncharged = RateLimit(uncharged_per_min, 60)
        self._now_ms = now_ms
        # Bounded: above MAX_WINDOWS the one that was opened first is forgotten.
        self._windows: OrderedDict[str, _Window] = OrderedDict()
        self._telling: set[asyncio.Task[None]] = set()

    async def take(self, key: str, limit: RateLimit) -> Standing:
        """Count a request under ``key``. One that is over the limit is not counted."""
        window = self._window(key, limit)
        if window.count >= limit.count:
            return self._standing(window, limit, allowed=False)
        if self.cache is not None:
            left_ms = window.ends_ms - self._now_ms()
            counted = await self.cache.count(self._prefix + key, max(left_ms, 1), window.count)
            window = self._window(key, limit)  # the old one may have ended meanwhile
            if counted is not None:
                window.count = max(window.count, counted.total)
                window.ends_ms = self._now_ms() + counted.left_ms
                return self._standing(window, limit, allowed=counted.total <= limit.count)
            if window.count >= limit.count:
                return self._standing(window, limit, allowed=False)
        window.count += 1
        return self._standing(window, limit, allowed=True)

    def _window(self, key: str, limit: RateLimit) -> _Window:
        now_ms = self._now_ms()
        window = self._windows.get(key)
        if window is None:
            window = self._windows[key] = _Window(now_ms + limit.window_s * 1000)
            if len(self._windows) > MAX_WINDOWS:
                self._windows.popitem(last=False)
        elif window.ends_ms <= now_ms:
            recent = now_ms - window.ends_ms < limit.window_s * 1000
            window.before, window.charged = window.charged if recent else 0, 0
            window.count, window.ends_ms = 0, now_ms + limit.window_s * 1000
            self._windows.move_to_end(key)
        return window

    def _standing(self, window: _Window, limit: RateLimit, *, allowed: bool) -> Standing:
        remaining = max(limit.count - window.count, 0)
        return Standing(allowed, remaining, max(window.ends_ms - self._now_ms(), 1))

    # -- calls that ended uncharged --------------------------------------------------------------

    def too_many_uncharged(self, *keys: str | None) -> tuple[RateLimit, Standing] | None:
        """The limit that is used up for one of ``keys``, if one is. Counts nothing.

        Calls on their way may all end uncharged. So there may be ``PARALLEL`` times what is left
        of the limit of them, and one more for each that was charged in this window and the one
        before: who pays for calls may have many at once.
        """
        now_ms, most = self._now_ms(), self._uncharged.count
        for key in keys:
            window = self._windows.get(f"uncharged:{key}") if key else None
            if window is None:
                continue
            count = window.count if window.ends_ms > now_ms else 0
            if count >= most:
                return self._uncharged, self._standing(window, self._uncharged, allowed=False)
            if window.flying >= (most - count) * PARALLEL + window.charged + window.before:
                return self._uncharged, Standing(False, 0, _LAND_MS)
        return None

    def take_off(self, *keys: str | None) -> Flight:
        """A call begins. Of this process only: it costs no round trip, and one that is charged
        leaves nothing for the others to know."""
        names = [f"uncharged:{key}" for key in keys if key]
        return Flight([self._window(name, self._uncharged) for name in names])

    def ended_uncharged(self, *keys: str | None) -> None:
        """Count a call that was made and not charged. The other processes hear of it soon."""
        for key in keys:
            if not key:
                continue
            name = f"uncharged:{key}"
            window = self._window(name, self._uncharged)
            known = window.count
            window.count += 1
            if self.cache is not None:
                task = asyncio.create_task(self._tell(self.cache, name, window, known))
                self._telling.add(task)
                task.add_done_callback(self._telling.discard)

    async def _tell(self, cache: Cache, name: str, window: _Window, known: int) -> None:
        left_ms = max(window.ends_ms - self._now_ms(), 1)
        counted = await cache.count(self._prefix + name, left_ms, known)
        if counted is not None:
            window.count = max(window.count, counted.total)
            window.ends_ms = self._now_ms() + counted.left_ms


# --- who is at the other end ----------------------------------------------------------------


class Client(NamedTuple):
    """Where a request came from. ``address`` is what is counted: of IPv6 its /64 network."""

    address: str
    single: bool
    """False where many callers may share the address: nobody can say who is behind it."""


UNKNOWN: Final = Client("unknown", single=False)


def client_of(
    peer: str, headers: Sequence[tuple[bytes, bytes]], trusted: Sequence[IPNetwork]
) -> Client:
    """The client of a connection from ``peer``.

    ``X-Forwarded-For`` counts only from a trusted proxy, and of it the last address that is not
    such a proxy itself: everything left of that is the client's own words. A peer with an address
    of a private network is probably a proxy that nobody named, so ``single`` is False.
    """
    if not trusted:
        return _peer(peer)
    address = _parsed(peer)
    if address is None or not _is_one_of(address, trusted):
        return _peer(peer)
    listed = b",".join(value for name, value in headers if name == b"x-forwarded-for")
    for part in reversed(listed.decode("latin-1").split(",")[-MAX_FORWARDED:]):
        found = _parsed(part.strip())
        if found is None:
            break
        if not _is_one_of(found, trusted):
            return Client(_counted(found), single=True)
    return Client(_counted(address), single=False)


def _is_one_of(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, networks: Sequence[IPNetwork]
) -> bool:
    return any(address in network for network in networks)


# Bounded; a client sends many requests and its address is parsed once.
@lru_cache(maxsize=10_000)
def _parsed(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


@lru_cache(maxsize=10_000)
def _peer(peer: str) -> Client:
    address = _parsed(peer)
    if address is None:
        return UNKNOWN
    return Client(_counted(address), single=address.is_global)


def _counted(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    # A single subscriber has at least a /64 to himself.
    return str(ipaddress.IPv6Network((address, 64), strict=False))
