"""uvicorn's two HTTP/1.1 protocols, with what they lose or leave unbounded put back.

- The request target exactly as it came, under ``RAW_TARGET`` in the ASGI state. uvicorn 0.54
  drops a lone ``?`` under both parsers and, with httptools, a fragment and the origin of an
  absolute-form target (``gateway/proxy/target.py`` says why that matters).
- A limit on the bytes of a head that has not ended: httptools collects them without end.
- A limit on the time a head may take, from the first byte of a request, or from the connection
  being made for the first one. uvicorn has one only between requests.
- A limit on the time a caller may take nothing of its answer: it keeps a connection to the
  upstream, and for as long as it likes if nobody cuts it. uvicorn waits for ever.
- A caller that leaves is noticed also while nothing is read from it, because it has sent more than
  is wanted now (the next request, the rest of a body). uvicorn notices when it reads again.

``uvicorn.Config(app, http=wire.protocol(), ws="none", proxy_headers=False)`` uses them. The limits
here only bound memory and time; the answer a well-behaved client reads (431 as problem+json) comes
from ``gateway/middleware.py``, which sees every head that fits one read.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import random
import select
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from gateway.errors import Problem
from gateway.proxy.target import RAW_TARGET

HEAD_BYTES: Final = 64 * 1024
HEAD_TIMEOUT_S: Final = 20
STALL_S: Final = 60
_LOOK_EVERY_S: Final = 2

_TOO_LARGE: Final = Problem(
    "headers_too_large", f"The head of a request is at most {HEAD_BYTES} bytes."
)
_TOO_SLOW: Final = Problem("invalid_request", "The head did not arrive in time.", status=408)
_NO_HTTP: Final = Problem("invalid_request", "What came is no HTTP/1.1 request.")


def _answer(refusal: Problem) -> bytes:
    """The whole answer to what never became a request, in the form of every other refusal."""
    body = json.dumps(refusal.body(f"{random.getrandbits(64):016x}"), separators=(",", ":"))
    head = (
        f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}\r\n"
        "content-type: application/problem+json\r\ncache-control: no-store\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return (head + body).encode("ascii")


class _Watch:
    """Calls back when a moment is reached that has not been put off or called off.

    One timer stands for all waits of a connection, and looks every other second whether the
    moment has come: setting and cancelling one for every request would cost more than its head.
    """

    __slots__ = ("_call", "_deadline_s", "_loop", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._deadline_s: float | None = None
        self._call: Callable[[], None] | None = None

    def within(self, seconds: float, call: Callable[[], None]) -> None:
        self._deadline_s = self._loop.time() + seconds
        self._call = call
        if self._timer is None:
            self._timer = self._loop.call_later(min(seconds, _LOOK_EVERY_S), self._look)

    def off(self) -> None:
        """Nothing is waited for; the timer ends when it looks next."""
        self._deadline_s = None

    def end(self) -> None:
        """The connection is gone."""
        self._deadline_s = self._call = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if self._deadline_s is None:
            return
        left_s = self._deadline_s - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(min(left_s, _LOOK_EVERY_S), self._look)
        elif self._call is not None:
            self._deadline_s = None
            self._call()


class Head:
    """How much of the head being read has come, and until when the rest may."""

    __slots__ = ("bytes_read", "number", "open", "owner", "watch")

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.watch = _Watch(owner.loop)
        self.bytes_read = 0
        self.number = 0
        self.open = False

    def begin(self) -> None:
        if not self.open:
            self.open = True
            self.number += 1
            self.bytes_read = 0
            self.watch.within(HEAD_TIMEOUT_S, self._late)

    def end(self) -> None:
        self.open = False
        self.watch.off()

    def count(self, more: int) -> None:
        """Called after a read in which this head neither began nor ended: all of it was head."""
        self.bytes_read += more
        if self.bytes_read > HEAD_BYTES:
            self._refuse(_TOO_LARGE)

    def _late(self) -> None:
        if self._answering():
            # A pipelined head must not cut off the answer before it.
            self.watch.within(HEAD_TIMEOUT_S, self._late)
        else:
            self._refuse(_TOO_SLOW)

    def _answering(self) -> bool:
        cycle = self.owner.cycle
        return cycle is not None and not cycle.response_complete

    def _refuse(self, refusal: Problem) -> None:
        self.end()
        transport = self.owner.transport
        if transport.is_closing():
            return
        if not self._answering():
            transport.write(_answer(refusal))
        transport.close()


class Stall:
    """A caller that does not read: its connection is cut when that has lasted.

    The transport says when its buffer is full, and when most of that has been taken again. So a
    caller has to take some sixty kilobytes a minute, which is no measure of any network.
    """

    __slots__ = ("owner", "watch")

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.watch: _Watch | None = None

    def begin(self) -> None:
        if self.watch is None:
            self.watch = _Watch(self.owner.loop)
        # Not close(): that would wait for what is not read.
        self.watch.within(STALL_S, self.owner.transport.abort)

    def over(self) -> None:
        if self.watch is not None:
            self.watch.off()

    def end(self) -> None:
        if self.watch is not None:
            self.watch.end()


class Flow(FlowControl):
    """uvicorn's flow control, which asks the socket for the caller's end while it is not read."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(transport)
        self._loop = loop
        self._watch: _Watch | None = None

    def pause_reading(self) -> None:
        super().pause_reading()
        if self._watch is None:
            self._watch = _Watch(self._loop)
        self._watch.within(_LOOK_EVERY_S, self._look)

    def resume_reading(self) -> None:
        super().resume_reading()
        if self._watch is not None:
            self._watch.off()

    def end(self) -> None:
        """The connection is gone."""
        if self._watch is not None:
            self._watch.end()

    def _look(self) -> None:
        if _left(self._transport):
            self._transport.abort()
        elif self._watch is not None:
            self._watch.within(_LOOK_EVERY_S, self._look)


def _left(transport: asyncio.Transport) -> bool:
    """Whether the other side has closed, perhaps behind bytes that have not been read. False
    where the system cannot tell."""
    sock = transport.get_extra_info("socket")
    if sock is None or not hasattr(select, "poll") or sock.fileno() < 0:
        return False
    poll = select.poll()
    poll.register(sock.fileno(), getattr(select, "POLLRDHUP", 0))  # errors and HUP always
    return bool(poll.poll(0))


class _TargetKeeper(h11.Connection):
    """An h11 server connection that hands each request's target to its protocol."""

    owner: RawH11

    def next_event(self) -> Any:
        event = super().next_event()
        owner = self.owner
        if isinstance(event, h11.Request):
            owner.head.end()
            # uvicorn copies this into scope["state"] while it handles the event returned here.
            owner.app_state = {**owner.app_state, RAW_TARGET: bytes(event.target)}
        elif event is h11.NEED_DATA and self.their_state is h11.IDLE and self.trailing_data[0]:
            owner.head.begin()
        return event


class Kept(asyncio.Protocol):
    """What both protocols add to uvicorn's: stands before it among the bases."""

    loop: Any
    transport: Any
    flow: Any

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.head = Head(self)
        self.stall = Stall(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.flow = Flow(self.transport, self.loop)
        self.head.begin()

    def connection_lost(self, exc: Exception | None) -> None:
        self.head.watch.end()
        self.stall.end()
        self.flow.end()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """uvicorn's answer to what it cannot parse, in our form. ``msg`` names nothing we say."""
        self.transport.write(_answer(_NO_HTTP))
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stall.begin()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.stall.over()


class RawH11(Kept, H11Protocol):
    """uvicorn's protocol on h11, which itself bounds the size of an unfinished head."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        keeper = _TargetKeeper(h11.SERVER, config.h11_max_incomplete_event_size or HEAD_BYTES)
        keeper.owner = self
        self.conn = keeper


def protocol(name: str = "auto") -> type[asyncio.Protocol]:
    """The protocol class for ``uvicorn.Config(http=…)``: ``httptools``, ``h11`` or the better."""
    if name == "auto":
        name = "httptools" if importlib.util.find_spec("httptools") else "h11"
    if name == "httptools":
        from gateway.proxy.wire_httptools import RawHttpTools

        return RawHttpTools
    if name == "h11":
        return RawH11
    raise ValueError(f"there is no HTTP protocol {name!r}")
