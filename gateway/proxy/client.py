"""A small HTTP/1.1 client on httptools: what goes on the wire is what it was handed.

Why not aiohttp: it retries on its own over a kept-alive connection (one hold must start one
upstream call), it cannot send ``/a?`` (yarl drops an empty query), it re-encodes header values
that are not UTF-8, and it costs several times as much per request. What is needed here is little:
one request at a time on a connection, HTTP/1.1, no redirects, no cookies, no decompression, no
proxies, and no header field that was not given.

``Connection`` is one exchange after another; ``Pool`` keeps idle ones of one origin. Timeouts,
errors for callers and the body's life are in ``gateway/proxy/upstream.py``.
"""

from __future__ import annotations

import asyncio
import select
import ssl
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, cast
from urllib.parse import urlsplit

import httptools

from gateway.errors import Problem
from gateway.proxy import target as targets

MAX_HEAD_BYTES: Final = 64 * 1024
MAX_INTERIM: Final = 16
HIGH_WATER_BYTES: Final = 256 * 1024
# Below the 5 s after which uvicorn and Node close an idle connection, so that a request is rarely
# written into one that is just being closed.
KEEP_IDLE_S: Final = 4.0
MAX_IDLE: Final = 128
MAX_CONNECTIONS: Final = 512
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


class BrokenError(Exception):
    """The upstream closed, reset or broke HTTP. The text is fit for callers."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an upstream is: taken apart once from its configured URL."""

    tls: bool
    host: str
    port: int
    authority: bytes
    base_path: bytes


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


def request_head(method: str, target: bytes, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """The bytes of a request line and header fields.

    Raises ``ValueError`` if any part would end its line early. The parsers in front make sure of
    that already; a second request written by an injected line break would be paid for by nobody,
    so it is checked where the bytes are made.
    """
    lines = [method.encode("ascii") + b" " + target + b" HTTP/1.1"]
    lines.extend(name + b": " + value for name, value in headers)
    head = b"\r\n".join(lines) + b"\r\n\r\n"
    breaks = len(lines) + 1
    spaced = b" " in target or b" " in method.encode()
    if head.count(b"\n") != breaks or head.count(b"\r") != breaks or b"\0" in head or spaced:
        raise ValueError("a line break, NUL or blank where none may be")
    return head


class Connection(asyncio.Protocol):
    """One TCP (or TLS) connection to an upstream, one exchange at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._lost = False
        self._poll: select.poll | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._writable: asyncio.Future[None] | None = None
        self.idle_since = 0.0
        self._active = False
        self._reset(head_only=False)

    # --- one exchange -------------------------------------------------------------------------

    def _reset(self, *, head_only: bool) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._head_only = head_only
        self._head_bytes = 0
        self._interim = 0
        self._in_interim = False
        self._until_close = False
        self._chunks: deque[bytes] = deque()
        self._buffered = 0
        self._paused = False
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.head_complete = False
        self.complete = False
        self.reusable = False
        self.error: BaseException | None = None

    def begin(self, data: bytes, *, head_only: bool) -> None:
        """Start an exchange with the first bytes of a request. ``head_only``: a HEAD request."""
        self._reset(head_only=head_only)
        self._active = True
        self.write(data)

    def write(self, data: bytes) -> None:
        if self._transport is None or self._lost:
            raise BrokenError("the upstream closed the connection")
        self._transport.write(data)

    async def drain(self) -> None:
        """Wait until the transport takes more."""
        if self._writable is not None:
            await self._writable

    async def wait_head(self, timeout_s: float) -> None:
        """Until status and header fields are there. Raises ``TimeoutError`` or the exchange's
        error."""
        while not self.head_complete:
            await self._wait(timeout_s)

    async def read(self, timeout_s: float) -> bytes:
        """What has come of the body, at least one byte; ``b""`` at its end.

        Raises ``TimeoutError``, or the exchange's error when all that came before it was read.
        """
        while not self._chunks:
            if self.complete:
                return b""
            await self._wait(timeout_s)
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._buffered = 0
        self._resume_reading()
        return data

    def _resume_reading(self) -> None:
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()

    def finish(self) -> bool:
        """End the exchange. True if the connection can take another one."""
        self._active = False
        if self.complete and self.reusable and not self._lost and self.error is None:
            self.idle_since = self._loop.time()
            self._resume_reading()
            return True
        self.abort()
        return False

    def fail(self, error: BaseException) -> None:
        """End the exchange with an error and cut the connection. Nothing more is written, so a
        body that was being sent stays visibly incomplete."""
        if self.error is None and not self.complete:
            self.error = error
        self.abort()
        self._wake()

    def abort(self) -> None:
        if self._transport is not None and not self._lost:
            self._transport.abort()

    def fresh(self, now: float) -> bool:
        """Whether an idle connection may be used: not closed, not old, nothing to read.

        Something to read on an idle connection is its end (or bytes nobody asked for). The event
        loop may not have seen it yet, so the socket is asked.
        """
        if self._lost or self._transport is None or self._transport.is_closing():
            return False
        if now - self.idle_since > KEEP_IDLE_S:
            return False
        return self._poll is None or not self._poll.poll(0)

    # --- waiting ------------------------------------------------------------------------------

    def extend(self, timeout_s: float) -> None:
        """Give a wait that is going on ``timeout_s`` from now."""
        self._deadline = self._loop.time() + timeout_s

    async def _wait(self, timeout_s: float) -> None:
        if self.error is not None:
            raise self.error
        waiter = self._waiter = self._loop.create_future()
        self._deadline = self._loop.time() + timeout_s
        # One timer for the connection's life, set again only when it fires early or late: most
        # waits end long before, and making a timer for each would cost more than the wait.
        if self._timer is None:
            self._timer = self._loop.call_at(self._deadline, self._tick)
        elif self._timer.when() > self._deadline:
            self._timer.cancel()
            self._timer = self._loop.call_at(self._deadline, self._tick)
        try:
            await waiter
        finally:
            self._waiter = None

    def _tick(self) -> None:
        self._timer = None
        if self._waiter is None or self._waiter.done():
            return
        if self._loop.time() >= self._deadline:
            self._waiter.set_exception(TimeoutError())
        else:
            self._timer = self._loop.call_at(self._deadline, self._tick)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # --- asyncio.Protocol ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and hasattr(select, "poll"):
            self._poll = select.poll()
            self._poll.register(sock.fileno(), select.POLLIN)

    def data_received(self, data: bytes) -> None:
        if not self._active or self.error is not None:
            self.abort()  # bytes that answer nothing
            return
        in_head = not self.head_complete
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            # Bytes behind a complete answer only cost the connection.
            self.reusable = False
            if not self.complete:
                self.fail(BrokenError("the upstream's answer is not valid HTTP"))
        if in_head and not self.head_complete:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.fail(BrokenError("the upstream's header fields are too large"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        if self._active and not self.complete and self.error is None:
            if self._until_close and exc is None:
                self.complete = True
            elif self.head_complete:
                self.error = BrokenError("the upstream closed the connection within its answer")
            else:
                self.error = BrokenError("the upstream closed the connection without an answer")
        self._wake()

    def pause_writing(self) -> None:
        self._writable = self._loop.create_future()

    def resume_writing(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    # --- httptools callbacks ------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.complete:
            self.reusable = False  # more bytes than the answer has

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.head_complete and not self.complete:  # afterwards: trailers, which end here
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self.complete or self.error is not None:
            return
        status = self._parser.get_status_code()
        if status < 200:
            self._interim += 1
            if status == 101 or self._interim > MAX_INTERIM:
                self.fail(BrokenError("the upstream's answer is not one this gateway asked for"))
            self.headers.clear()
            self._in_interim = True
            return
        self.status = status
        fault = self._framing()
        if fault:
            self.fail(BrokenError(fault))
            return
        self.head_complete = True
        if self._head_only:
            self._end()
        self._wake()

    def _framing(self) -> str | None:
        """What is wrong with status, size or framing of the head; sets ``_until_close``."""
        if self.status > 599:
            return "the upstream's status is not one of HTTP"
        if sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD_BYTES:
            return "the upstream's header fields are too large"
        codings = [v for n, v in self.headers if n.lower() == b"transfer-encoding"]
        if codings and (len(codings) > 1 or codings[0].lower() != b"chunked"):
            return "the upstream's transfer coding is not one this gateway takes"
        bodiless = self._head_only or self.status in (204, 304)
        self._until_close = not (codings or bodiless or self.content_length is not None)
        return None

    @property
    def content_length(self) -> int | None:
        """The answer's Content-Length (httptools refuses a bad or a second one)."""
        for name, value in self.headers:
            if name.lower() == b"content-length":
                return int(value) if value.isdigit() else None
        return None

    def on_body(self, body: bytes) -> None:
        if self.complete or self.error is not None:
            self.reusable = False
            return
        self._chunks.append(body)
        self._buffered += len(body)
        if self._buffered > HIGH_WATER_BYTES and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def on_message_complete(self) -> None:
        if self._in_interim:
            self._in_interim = False
        elif not self.complete and self.error is None:
            self._end()
            self._wake()

    def _end(self) -> None:
        self.complete = True
        self.reusable = self._parser.should_keep_alive()


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
                if connection.fresh(loop.time()):
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
