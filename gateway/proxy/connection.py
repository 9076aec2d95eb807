"""One connection to an upstream: HTTP/1.1 on httptools, one exchange at a time.

What goes on the wire is what it was handed: nothing is added, decoded or tried again. Why this is
not aiohttp is told in ``gateway/proxy/client.py``.
"""

from __future__ import annotations

import asyncio
import select
from collections import deque
from collections.abc import Sequence
from typing import Final, cast

import httptools

MAX_HEAD_BYTES: Final = 64 * 1024
MAX_INTERIM: Final = 16
HIGH_WATER_BYTES: Final = 256 * 1024


class BrokenError(Exception):
    """The upstream closed, reset or broke HTTP. The text is fit for callers."""


def request_head(method: str, target: bytes, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """The bytes of a request line and header fields.

    Raises ``ValueError`` if any part would end its line early. The parsers in front make sure of
    that already; a second request written by an injected line break would be paid for by nobody,
    so it is checked where the bytes are made.
    """
    lines = [method.encode("ascii") + b" " + target + b" HTTP/1.1"]
    lines.extend([b"%b: %b" % field for field in headers])
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

    def take(self, limit: int) -> bytes | None:
        """All that has come of the body and was not read; None if it is more than ``limit`` or
        the exchange broke."""
        if self.error is not None or self._buffered > limit:
            return None
        data = b"".join(self._chunks)
        self._chunks.clear()
        self._buffered = 0
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

    def fresh(self, now: float, keep_s: float) -> bool:
        """Whether an idle connection may be used: not closed, not old, nothing to read.

        Something to read on an idle connection is its end (or bytes nobody asked for). The event
        loop may not have seen it yet, so the socket is asked.
        """
        if self._lost or self._transport is None or self._transport.is_closing():
            return False
        if now - self.idle_since > keep_s:
            return False
        return self._poll is None or not self._poll.poll(0)

    # --- waiting ------------------------------------------------------------------------------

    def extend(self, timeout_s: float) -> None:
        """Give a wait that is going on ``timeout_s`` from now."""
        self._deadline = self._loop.time() + timeout_s

    def shorten(self, timeout_s: float) -> None:
        """Give a wait that is going on no more than ``timeout_s`` from now."""
        deadline = self._loop.time() + timeout_s
        if self._waiter is None or deadline >= self._deadline:
            return
        self._deadline = deadline
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(deadline, self._tick)

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
