"""Where a gateway can be killed: at each message on its lines to what it depends on.

A ``Tap`` stands in front of a dependency (the chain's node, PostgreSQL, the upstream). All taps of
a gateway share a ``Record``, which holds what passed in one order and kills the gateway at one
message: before it reaches the other side, or after the other side has answered and before the
gateway hears of it. From then on nothing passes on any line. SQLite's boundaries are in disk.py.

Which points are enough. Nothing outlives a gateway but what the others have: PostgreSQL what was
committed, the node its chain, the upstream its calls, the customer its answers. So a kill leaves
nothing behind but the effect of the messages that *change* something: a COMMIT of a transaction
that wrote a row, a statement outside a transaction, eth_sendRawTransaction, a request to the
upstream. Between two of these a kill is the same wherever it falls: open transactions are rolled
back and their locks end with their sessions, and reads leave no trace. Each such stretch is a
class. The sweep kills before and after each message that changes something, which is at both ends
of each class, and at one message in the middle. What the customer does next ends a class too: a
block that is mined changes what a read finds.

None of that is known of SQLite, which writes between two messages unseen. There each message is a
class of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol
from urllib.parse import urlsplit

from tests import servers
from tests.e2e.stage import Background
from tests.e2e.wire import Said, Talk

BEFORE, AFTER = "before", "after"
CUSTOMER = "customer"
_ANSWER_S = 5  # how long the other side may take with what the gateway never hears of


@dataclass(frozen=True, slots=True)
class Message:
    """What passed a line."""

    line: str
    said: Said


NOTHING = Message("", Said("", changes=False))


@dataclass(frozen=True, slots=True)
class Point:
    """Where a gateway is killed: at the ``at``-th message of a line that says so (``words`` "": any
    that it says), on one side of it; or ``beyond`` so many more, of all lines. ``line`` "": counted
    from the beginning."""

    line: str
    at: int
    side: str
    words: str = ""
    beyond: int = 0

    def of(self, message: Message) -> bool:
        return message.line == self.line and self.words in {"", message.said.words}

    @property
    def place(self) -> Point:
        """The same for all points of one stretch: which message of it is all the same."""
        return replace(self, beyond=min(self.beyond, 1))

    def __str__(self) -> str:
        where = f"{self.side} {self.line} {self.at} {self.words}".rstrip()
        return where + (f" + {self.beyond}" if self.beyond else "")


class Line(Protocol):
    """What can be counted and killed at. ``messages``: those since the last ``arm``."""

    messages: list[Message]
    fired: bool
    last: Message
    faults: list[Exception]

    def arm(self, process: servers.Process, point: Point | None) -> None:
        """Count from 1 again, and kill there. None: only count."""

    def act(self) -> None:
        """The customer does something."""

    def disarm(self) -> None:
        """Neither count nor kill any more."""

    def points(self, runs: Iterable[Sequence[Message]]) -> list[Point]:
        """All that it is worth killing at, after some runs that were only counted."""

    def classes(self, run: Sequence[Message]) -> int:
        """How many stretches of a run leave different things behind."""


class Record:
    """What passes all lines of a gateway, in one order. Used on the taps' own loop but for ``arm``,
    ``act`` and ``disarm``."""

    def __init__(self, *, every: bool) -> None:
        """``every``: each message is a class of its own."""
        self._every = every
        self._process: servers.Process | None = None
        self._point: Point | None = None
        self._met = 0
        self._left = 0  # messages to the point, once what it is counted from has passed
        self.messages: list[Message] = []
        self.fired = False
        self.last = NOTHING  # the message at which it was killed
        self.held = 0  # what came after the kill, and was not passed on
        self.faults: list[Exception] = []

    @property
    def frozen(self) -> bool:
        """Nothing may pass any more: the gateway is as good as dead."""
        return self.fired and self._process is not None

    def arm(self, process: servers.Process, point: Point | None) -> None:
        self.messages, self.fired, self.last = [], False, NOTHING
        self._point, self._met = point, 0
        self._left = point.beyond if point is not None and not point.line else 0
        self._process = process

    def act(self) -> None:
        self.passes(Message(CUSTOMER, Said("asks", changes=True)))

    def disarm(self) -> None:
        if self._process is not None and self.fired:
            # What it is killed at may be something in the background, still to be answered.
            self._process.wait_end(30)
        self._process = None

    def passes(self, message: Message) -> str:
        """One more message; the side on which the gateway is to be killed, if it is at this one."""
        if self._process is None or self.fired:
            return ""
        self.messages.append(message)
        point = self._point
        if point is None or not self._reached(point, message):
            return ""
        self.fired, self.last = True, message
        return BEFORE if point.beyond else point.side

    def _reached(self, point: Point, message: Message) -> bool:
        if self._left and message.line != CUSTOMER:
            self._left -= 1
            return not self._left
        if not point.of(message):
            return False
        self._met += 1
        if self._met != point.at:
            return False
        self._left = point.beyond
        return not point.beyond

    def kill(self) -> None:
        if self._process is not None:
            self._process.signal(signal.SIGKILL)

    def points(self, runs: Iterable[Sequence[Message]]) -> list[Point]:
        places = self._each if self._every else self._ends
        found: dict[Point, Point] = {}
        for run in runs:
            for point in places(run):
                found.setdefault(point.place, point)
        return list(found.values())

    def _each(self, run: Sequence[Message]) -> Iterator[Point]:
        """Both sides of each message."""
        for message, at in _numbered(run):
            if message.line != CUSTOMER:
                for side in (BEFORE, AFTER):
                    yield Point(message.line, at, side, message.said.words)

    def _ends(self, run: Sequence[Message]) -> Iterator[Point]:
        """Both sides of each message that changes something, and the middle between two."""
        anchor, quiet = Point("", 0, AFTER), 0
        for message, at in _numbered(run):
            if not message.said.changes:
                quiet += 1
                continue
            if quiet:
                yield _beyond(anchor, (quiet + 1) // 2)
            anchor, quiet = Point(message.line, at, AFTER, message.said.words), 0
            if message.line != CUSTOMER:
                yield Point(message.line, at, BEFORE, message.said.words)
                yield anchor
        if quiet:
            yield _beyond(anchor, (quiet + 1) // 2)

    def classes(self, run: Sequence[Message]) -> int:
        if self._every:
            return 1 + sum(message.line != CUSTOMER for message in run)
        return 1 + sum(message.said.changes for message in run)


def _beyond(anchor: Point, messages: int) -> Point:
    return Point(anchor.line, anchor.at, AFTER, anchor.words, messages)


def _numbered(run: Sequence[Message]) -> Iterator[tuple[Message, int]]:
    """Each message, and how many like it there are up to there."""
    seen: Counter[Message] = Counter()
    for message in run:
        seen[message] += 1
        yield message, seen[message]


class Tap:
    """A line to a dependency on which a record counts what passes, and kills at one message."""

    def __init__(
        self, background: Background, record: Record, name: str, url: str, talk: Callable[[], Talk]
    ) -> None:
        parts = urlsplit(url)
        self.name = name
        self._background = background
        self._record = record
        self._target = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._talk = talk
        self._lines: set[asyncio.StreamWriter] = set()
        self._server = background.run(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._lines.add(writer)
        try:
            await self._serve(reader, writer)
        except ConnectionError:
            pass  # one of the two ends was killed
        except Exception as error:
            self._record.faults.append(error)
        finally:
            self._lines.discard(writer)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        talk, answered = self._talk(), asyncio.Event()

        async def down() -> None:
            while data := await far_reader.read(1 << 20):
                if talk.heard(data):
                    answered.set()
                if not self._record.frozen:  # or else it was done, and nobody hears of it
                    writer.write(data)
                    await writer.drain()
            writer.close()

        async def up() -> None:
            while data := await reader.read(1 << 20):
                for part, said in talk.sent(data):
                    if self._record.frozen:
                        self._record.held += 1
                        continue
                    answered.clear()
                    side = self._record.passes(Message(self.name, said)) if said else ""
                    if side != BEFORE:
                        far_writer.write(part)
                        await far_writer.drain()
                    if side == AFTER:
                        with contextlib.suppress(TimeoutError):
                            await asyncio.wait_for(answered.wait(), _ANSWER_S)
                    if side:
                        self._record.kill()

        try:
            await _both(up(), down())
        finally:
            far_writer.transport.abort()

    def close(self) -> None:
        async def close() -> None:
            self._server.close()
            for line in list(self._lines):
                line.transport.abort()
            while self._lines:
                await asyncio.sleep(0.01)

        self._background.run(close())


async def _both(up: Coroutine[Any, Any, None], down: Coroutine[Any, Any, None]) -> None:
    """Both ways, until the gateway has said all, or one of the two fails."""
    asking, pump = asyncio.ensure_future(up), asyncio.ensure_future(down)
    try:
        await asyncio.wait({asking, pump}, return_when=asyncio.FIRST_COMPLETED)
        if pump.done():
            pump.result()
        await asking
    finally:
        for each in (asking, pump):
            each.cancel()
        await asyncio.gather(asking, pump, return_exceptions=True)
