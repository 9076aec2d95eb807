"""Passing on an answer that is too long, or too slow, to be kept back: piece by piece.

Nothing is held back but its end, which waits for the charge. A copy of what passes is kept as long
as it is short, so that a repeat can be given the same answer and the operator's rules can be held
against it; the memory a stream takes does not grow with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final

from gateway.proxy.metering import Metering
from gateway.proxy.upstream import Answer

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

# How far an upstream is heard out when the caller has left: then it is cut, and charged.
DRAIN_BYTES: Final = 16 << 20
DRAIN_S: Final = 15
# A caller who took this long over one piece was not reading: if the upstream gives up after that,
# it is the caller's doing. (What waits in buffers is taken at once when it reads again.)
NOT_READING_S: Final = 3


class Caller:
    """The one who takes a long answer, or does not."""

    def __init__(self, receive: Receive, send: Send, answer: Answer) -> None:
        self._send = send
        # None: its connection may serve somebody else by now.
        self._answer: Answer | None = answer
        self._left = asyncio.ensure_future(until_hung_up(receive))
        self._left.add_done_callback(self._hurry)
        self._loop = asyncio.get_running_loop()
        self._took_s = 0.0
        self._took_in_all_s = 0.0
        self._drained = 0

    @property
    def absent(self) -> bool:
        """It has hung up, or has let a piece wait for long."""
        return self._left.done() or self._took_s > NOT_READING_S

    @property
    def slow(self) -> bool:
        """It has left, or kept the upstream waiting: the upstream's time is not its own then."""
        return self._left.done() or self._took_in_all_s > NOT_READING_S

    async def take(self, piece: bytes) -> bool:
        """Give it a piece. False: it has left, and the upstream has said enough since."""
        if not self._left.done():
            began_s = self._loop.time()
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})
            took_s = self._loop.time() - began_s
            self._took_s = max(self._took_s, took_s)
            self._took_in_all_s += took_s
            return True
        self._drained += len(piece)
        return self._drained <= DRAIN_BYTES

    def _hurry(self, _: object) -> None:
        """It has left, perhaps while the upstream is silent."""
        if self._answer is not None:
            self._answer.hear_out(DRAIN_S)

    def forget(self) -> None:
        """Stop watching."""
        self._answer = None
        self._left.cancel()


async def until_hung_up(receive: Receive) -> None:
    """Return when the caller has hung up. The request's body has been read before."""
    while (await receive())["type"] != "http.disconnect":
        continue


@dataclass(frozen=True, slots=True)
class Rest:
    """What is left of an answer. ``last``: the piece that makes it whole, not given out yet.

    ``copy`` is the whole body, if it came to its end and was short.
    """

    last: bytes
    copy: bytes | None


class _Copy:
    """The beginning of what passes, until it is too long."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pieces: list[bytes] | None = []
        self._size = 0

    def add(self, piece: bytes) -> None:
        if self._pieces is None:
            return
        self._size += len(piece)
        if self._size > self._limit:
            self._pieces = None
        else:
            self._pieces.append(piece)

    def whole(self) -> bytes | None:
        return None if self._pieces is None else b"".join(self._pieces)


async def all_but_the_end(
    answer: Answer,
    first: bytes,
    caller: Caller,
    keep_bytes: int,
    metering: Metering | None = None,
) -> Rest:
    """Pass on what leaves the answer incomplete; give what makes it whole.

    ``first`` has been read already. With a length the last piece is kept back. Without one every
    piece goes at once (an event of a stream must not wait for the next one), and what is left is
    the end itself. When the caller has left, the upstream is heard out for a while and cut, and
    nothing is left. Raises ``Problem`` if the upstream breaks off.
    """
    left = answer.content_length
    copy = _Copy(keep_bytes)
    chunks = answer.chunks()
    if metering is not None:
        chunks, first = metering.pieces(answer, first), b""
        if metering.stream:
            left = None  # more may stand in it for the caller than came
    async with aclosing(chunks) as pieces:
        piece = first or await anext(pieces, b"")
        while piece:
            copy.add(piece)
            if left is not None:
                left -= len(piece)
                if left <= 0:
                    break
            if not await caller.take(piece):
                return Rest(b"", None)
            piece = await anext(pieces, b"")
    return Rest(piece, copy.whole() if answer.complete else None)
