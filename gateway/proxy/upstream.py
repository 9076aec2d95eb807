"""One call of an upstream, as ``async with open_upstream(…) as answer``.

Exactly one request is started and never a second: no redirect is followed and nothing is tried
again, not even when a kept-alive connection turns out to have been closed, because whether the
upstream had begun to work cannot be known (design: per guard key at most one upstream call is
started). A connection that is known to be closed is not used in the first place. The caller gets
``upstream_error``, which is retryable and not charged.

An answer that ends early (Content-Length short, chunked cut) is never mistaken for a whole one:
``chunks`` raises. Only an answer without a length, which ends with its connection, cannot be told
from a cut one; that is how HTTP/1.0 works, and a reset is still seen.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final

from gateway.errors import Problem
from gateway.proxy.client import Origin, Pool, UpstreamClient, parse_origin
from gateway.proxy.connection import BrokenError, Connection, request_head

__all__ = ["Answer", "Origin", "Timeouts", "UpstreamClient", "open_upstream", "parse_origin"]

_BODILESS: Final = frozenset({"GET", "HEAD", "OPTIONS", "DELETE"})


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long to wait for an upstream, in seconds.

    ``first_byte_s`` runs from the last byte of the request sent to the answer's head, ``idle_s``
    between two pieces of its body. ``total_s`` bounds the time spent waiting for the upstream, the
    head included; time in which the caller is slow to take the answer does not count, so nobody
    can force the upstream's timeout by reading slowly.
    """

    connect_s: float = 5
    first_byte_s: float = 60
    idle_s: float = 60
    total_s: float = 300


class Answer:
    """An upstream's answer: its head is here, its body comes through ``chunks``."""

    def __init__(self, connection: Connection, timeouts: Timeouts, waited_s: float) -> None:
        self._connection = connection
        self._timeouts = timeouts
        self._waited_s = waited_s
        self._until_s: float | None = None
        self.status = connection.status
        self.headers: Sequence[tuple[bytes, bytes]] = connection.headers
        # None also where there can be no body and the field would only describe another answer.
        bodiless = self.status in (204, 304)
        self.content_length = None if bodiless else connection.content_length

    def values(self, name: bytes) -> list[bytes]:
        """Every value of a field. ``name`` is lower case; an upstream may spell it otherwise."""
        return [value for n, value in self.headers if n.lower() == name]

    @property
    def complete(self) -> bool:
        """Whether the whole body has arrived (it may not have been read yet)."""
        return self._connection.complete

    def at_hand(self, limit: int) -> bytes | None:
        """The whole body, if all of it is here and no longer than ``limit``; nothing is waited
        for. None: read it."""
        return self._connection.take(limit) if self._connection.complete else None

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body as it comes, undecoded. Raises ``Problem`` if it ends badly.

        After ``hear_out`` it may end before its end: ``complete`` tells.
        """
        while data := await self._next():
            yield data

    def hear_out(self, within_s: float) -> None:
        """Wait for no more than what comes ``within_s`` from now: nobody will hear the rest."""
        self._until_s = asyncio.get_running_loop().time() + within_s
        self._connection.shorten(within_s)

    @property
    def waited_s(self) -> float:
        """How long we have waited for the upstream so far, in seconds, its head included."""
        return self._waited_s

    async def read(self, limit: int, *, within_s: float | None = None) -> tuple[bytes, bool]:
        """Read until the end, until more than ``limit`` bytes have come, or for ``within_s``.

        Gives what was read (it may be more than ``limit``) and whether that is the whole body.
        The rest comes through ``chunks``. Raises ``Problem`` if the body ends badly.
        """
        read: list[bytes] = []
        size = 0
        loop = asyncio.get_running_loop()
        until_s = None if within_s is None else loop.time() + within_s
        while size <= limit:
            data = await self._next(None if until_s is None else max(until_s - loop.time(), 0))
            if data is None:
                break
            if not data:
                return b"".join(read), True
            read.append(data)
            size += len(data)
        return b"".join(read), False

    async def _next(self, within_s: float | None = None) -> bytes | None:
        """The next piece, empty at the end; None if nothing came ``within_s``, or as long as it
        is to be heard out."""
        left_s = self._timeouts.total_s - self._waited_s
        patience_s = min(self._timeouts.idle_s, left_s)
        wait_s = patience_s if within_s is None else min(within_s, patience_s)
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        if self._until_s is not None:
            wait_s = max(min(wait_s, self._until_s - began_s), 0)
        try:
            return await self._connection.read(wait_s)
        except TimeoutError:
            if wait_s < patience_s or self._until_s is not None:
                return None
            raise Problem("upstream_timeout", "the upstream stopped within its answer") from None
        except BrokenError as broken:
            raise Problem("upstream_error", str(broken)) from broken
        finally:
            self._waited_s += loop.time() - began_s


Body = bytes | AsyncIterator[bytes] | None


class open_upstream:  # noqa: N801  (used as a function; a class is the cheapest context manager)
    """Send one request to an upstream and give its ``Answer``.

    ``target`` and ``headers`` go on the wire byte for byte (``headers`` includes ``host`` and no
    framing). ``body``: bytes, or an iterator that is sent as it yields, with ``length`` as
    Content-Length if it is known and chunked otherwise. An exception of the iterator cuts the
    connection, so that the upstream sees an unfinished request, and is raised here unchanged.

    Raises ``Problem``: ``upstream_error`` when the upstream refuses, resets or breaks HTTP,
    ``upstream_timeout`` when it is too slow. Leaving the block ends the exchange; if the answer
    was not read to its end the connection is cut.
    """

    def __init__(
        self,
        client: UpstreamClient,
        origin: Origin,
        method: str,
        target: bytes,
        *,
        headers: Sequence[tuple[bytes, bytes]],
        body: Body,
        timeouts: Timeouts,
        length: int | None = None,
    ) -> None:
        self._pool: Pool = client.pool(origin)
        self._method = method
        self._target = target
        self._headers = headers
        self._body = body
        self._length = length
        self._timeouts = timeouts
        self._connection: Connection | None = None
        self._sender: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Answer:
        head, first = self._first_bytes()
        connection = self._connection = await self._connect()
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        try:
            connection.begin(head + first, head_only=self._method == "HEAD")
            if self._body is not None and not isinstance(self._body, bytes):
                self._sender = loop.create_task(self._send(connection, self._body))
            await connection.wait_head(min(self._timeouts.first_byte_s, self._timeouts.total_s))
        except BaseException as failure:
            await self._end()
            if isinstance(failure, TimeoutError):
                raise Problem(
                    "upstream_timeout", "the upstream did not begin its answer in time"
                ) from None
            if isinstance(failure, BrokenError):
                raise Problem("upstream_error", str(failure)) from failure
            raise
        return Answer(connection, self._timeouts, loop.time() - began_s)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._end()

    def _first_bytes(self) -> tuple[bytes, bytes]:
        """The head with its framing, and a body that is known whole."""
        framing: list[tuple[bytes, bytes]] = []
        first = b""
        if self._body is None or isinstance(self._body, bytes):
            first = self._body or b""
            if first or self._method not in _BODILESS:
                framing.append((b"content-length", str(len(first)).encode()))
        elif self._length is not None:
            framing.append((b"content-length", str(self._length).encode()))
        else:
            framing.append((b"transfer-encoding", b"chunked"))
        return request_head(self._method, self._target, [*self._headers, *framing]), first

    async def _connect(self) -> Connection:
        try:
            return await self._pool.acquire(self._timeouts.connect_s)
        except TimeoutError:
            raise Problem(
                "upstream_timeout", "no connection to the upstream could be made in time"
            ) from None
        except (OSError, BrokenError) as failure:  # refused, unreachable, no such name, bad TLS
            raise Problem(
                "upstream_error", "no connection to the upstream could be made"
            ) from failure

    async def _send(self, connection: Connection, body: AsyncIterator[bytes]) -> None:
        """Send a body as it comes, at the pace of both sides."""
        left = self._length
        try:
            async for piece in body:
                if not piece:
                    continue
                if left is not None:
                    left -= len(piece)
                    if left < 0:
                        raise RuntimeError("the body is longer than its Content-Length")
                    connection.write(piece)
                else:
                    connection.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                connection.extend(self._timeouts.first_byte_s)
                await connection.drain()
            if left:
                raise RuntimeError("the body is shorter than its Content-Length")
            if left is None:
                connection.write(b"0\r\n\r\n")
            connection.extend(self._timeouts.first_byte_s)
        except BrokenError:
            pass  # the reading side knows it too, and may still hold an answer (413 and close)
        except Exception as failure:
            connection.fail(failure)

    async def _end(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        try:
            if self._sender is not None and not self._sender.done():
                # An answer before the whole body was sent: the connection cannot be used again.
                connection.reusable = False
                self._sender.cancel()
                await asyncio.wait([self._sender])
        finally:  # also when we are cancelled here: its place in the pool is one of a few
            self._pool.release(connection)
