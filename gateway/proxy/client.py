"""The upstreams' connections: a pool for each origin.

Why not aiohttp: it retries on its own over a kept-alive connection (one hold must start one
upstream call), it cannot send ``/a?`` (yarl drops an empty query), it re-encodes header values
that are not UTF-8, and it costs several times as much per request. What is needed here is little:
HTTP/1.1, no redirects, no cookies, no decompression, no proxies, and no header field that was not
given. The exchange itself is in ``gateway/proxy/connection.py``; timeouts, errors for callers and
the body's life are in ``gateway/proxy/upstream.py``.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from gateway.errors import Problem
from gateway.proxy import target as targets
from gateway.proxy.connection import BrokenError, Connection

# Below the 5 s after which uvicorn and Node close an idle connection, so that a request is rarely
# written into one that is just being closed.
KEEP_IDLE_S: Final = 4.0
MAX_IDLE: Final = 128
MAX_CONNECTIONS: Final = 512
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an upstream is: taken apart once from its configured URL."""

    tls: bool
    host: str
    port: int
    authority: bytes
    base_path: bytes

    def __hash__(self) -> int:  # asked for every call: the short way
        return hash(self.authority)


def parse_origin(url: str) -> Origin:
    """Take a configured URL apart. Raises ``ValueError`` for anything but http(s)://host[:port][/path]."""
    parts = urlsplit(url)
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        raise ValueError("an upstream's URL begins with http:// or https:// and names a host")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ValueError("an upstream's URL has no user, query or fragment")
    base_path = parts.path.rstrip("/").encode()
    if base_path:
        try:
            targets.parse(base_path)
        except Problem as problem:
            raise ValueError(f"the path of an upstream's URL: {problem.detail}") from None
    return Origin(
        tls=parts.scheme == "https",
        host=parts.hostname,
        port=parts.port or _DEFAULT_PORTS[parts.scheme],
        authority=parts.netloc.encode("ascii"),
        base_path=base_path,
    )


class Pool:
    """The connections to one origin: a bounded number, the idle ones used again, last in first
    out (so that those not needed grow old and go)."""

    def __init__(self, origin: Origin, tls: ssl.SSLContext | None) -> None:
        self.origin = origin
        self._tls = tls
        self._idle: list[Connection] = []
        self._free = asyncio.Semaphore(MAX_CONNECTIONS)
        self._closed = False

    async def acquire(self, timeout_s: float) -> Connection:
        """A connection, idle or new. Raises ``TimeoutError`` or ``OSError``."""
        if self._closed:
            raise BrokenError("the gateway is stopping")
        loop = asyncio.get_running_loop()
        if self._free.locked():
            async with asyncio.timeout(timeout_s):
                await self._free.acquire()
        else:
            await self._free.acquire()
        try:
            while self._idle:
                connection = self._idle.pop()
                if connection.fresh(loop.time(), KEEP_IDLE_S):
                    return connection
                connection.abort()
            async with asyncio.timeout(timeout_s):
                _, made = await loop.create_connection(
                    lambda: Connection(loop), self.origin.host, self.origin.port, ssl=self._tls
                )
                return made
        except BaseException:
            self._free.release()
            raise

    def release(self, connection: Connection) -> None:
        """Take a connection back after an exchange, in whatever state it is."""
        self._free.release()
        if connection.finish():
            if self._closed or len(self._idle) >= MAX_IDLE:
                connection.abort()
            else:
                self._idle.append(connection)
                self._drop_old()

    def _drop_old(self) -> None:
        """Idle ones stand in the order they came back, the oldest first."""
        now = asyncio.get_running_loop().time()
        while self._idle and now - self._idle[0].idle_since > KEEP_IDLE_S:
            self._idle.pop(0).abort()

    def close(self) -> None:
        """Cut the idle connections; those in use are cut when they come back."""
        self._closed = True
        for connection in self._idle:
            connection.abort()
        self._idle.clear()


class UpstreamClient:
    """All pools of one event loop. Made at start, closed at the end."""

    def __init__(self, *, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self._pools: dict[Origin, Pool] = {}

    def pool(self, origin: Origin) -> Pool:
        """The pool of an origin. Origins come from the configuration, so their number is fixed."""
        found = self._pools.get(origin)
        if found is None:
            found = self._pools[origin] = Pool(origin, self._context() if origin.tls else None)
        return found

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls

    async def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        await asyncio.sleep(0)  # let the transports say good-bye
