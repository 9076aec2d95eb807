"""A request's body, read and hashed whole before anything is held for it.

It stays in memory up to ``server.body_memory``; a longer one goes to a temporary file without a
name, which the system frees when it is closed or the process dies, and is sent up from there. So
the memory a request takes does not grow with its body.
"""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import IO, Any, Final

from gateway.errors import Problem
from gateway.middleware import has_body, stream_body, too_large
from wallet_auth.request import DIGESTS

PIECE_BYTES: Final = 256 << 10
CONTENT_DIGEST: Final = "sha-256"
"""What identifies a body within a request's content."""

_OF_NOTHING: Final = {name: make().digest() for name, make in DIGESTS.items()}

Receive = Callable[[], Awaitable[Any]]


class Body:
    """A whole body. ``data`` None: it stands in the file. ``close`` it in every case."""

    __slots__ = ("_file", "data", "digests", "size")

    def __init__(
        self, data: bytes | None, file: IO[bytes] | None, size: int, digests: Mapping[str, bytes]
    ) -> None:
        self.data = data
        self._file = file
        self.size = size
        self.digests = digests

    @property
    def content(self) -> bytes:
        """The digest that identifies it."""
        return self.digests[CONTENT_DIGEST]

    def up(self) -> bytes | AsyncIterator[bytes]:
        """The body for the upstream, once: whole, or piece by piece from the file."""
        return self._pieces(self._file) if self._file is not None else self.data or b""

    async def _pieces(self, file: IO[bytes]) -> AsyncIterator[bytes]:
        await asyncio.to_thread(file.seek, 0)
        while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
            yield piece

    def close(self) -> None:
        """Forget it. Nothing of it stays on disk."""
        if self._file is not None:
            # Waits for a read that is going on in a thread: the file has a lock of its own.
            self._file.close()


def of(data: bytes) -> Body:
    """A body that the gateway wrote itself."""
    return Body(data, None, len(data), {CONTENT_DIGEST: hashlib.sha256(data).digest()})


def _no_room() -> Problem:
    return Problem(
        "dependency_unavailable",
        "There is no room for this body right now; nothing was charged.",
        headers={"Retry-After": "5", "Connection": "close"},
    )


async def _one(body: bytes, limit: int) -> AsyncIterator[bytes]:
    if len(body) > limit:
        raise too_large(limit)
    yield body


async def read(
    receive: Receive,
    headers: Sequence[tuple[bytes, bytes]],
    *,
    limit: int,
    memory: int,
    algorithms: Iterable[str] = (),
    came: bytes | None = None,
) -> Body:
    """Read a body of at most ``limit`` bytes, of which ``memory`` stay in memory.

    ``algorithms``: what to hash it with besides ``CONTENT_DIGEST`` (names of RFC 9530). ``came``:
    the whole of it, if it is here already. Raises what ``stream_body`` raises, and ``Problem``
    when the disk is full.
    """
    if not has_body(headers):
        return Body(b"", None, 0, _OF_NOTHING)
    if came is not None and len(came) <= limit and len(came) <= memory:
        digests = {CONTENT_DIGEST: hashlib.sha256(came).digest()}
        for name in algorithms:
            if name not in digests:
                digests[name] = DIGESTS[name](came).digest()
        return Body(came, None, len(came), digests)
    pieces_of = stream_body(receive, headers, limit) if came is None else _one(came, limit)
    hashes = {name: DIGESTS[name]() for name in {CONTENT_DIGEST, *algorithms}}
    pieces: list[bytes] = []
    size = waiting = 0
    file: IO[bytes] | None = None
    try:
        async for piece in pieces_of:
            for each in hashes.values():
                each.update(piece)
            pieces.append(piece)
            size += len(piece)
            waiting += len(piece)
            if size > memory and (file is None or waiting >= PIECE_BYTES):
                if file is None:
                    file = tempfile.TemporaryFile()  # noqa: SIM115  (closed below or by Body)
                await asyncio.to_thread(file.write, b"".join(pieces))
                pieces.clear()
                waiting = 0
        if file is not None:
            await asyncio.to_thread(file.write, b"".join(pieces))
    except BaseException as failure:
        if file is not None:
            file.close()
        if isinstance(failure, OSError):
            raise _no_room() from failure
        raise
    data = None if file is not None else (pieces[0] if len(pieces) == 1 else b"".join(pieces))
    return Body(data, file, size, {name: each.digest() for name, each in hashes.items()})
