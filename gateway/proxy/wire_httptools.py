"""uvicorn's protocol on httptools (llhttp), the one used in production: see ``wire.py``.

Besides what that file promises it does less for each request: header fields are found by name as
they are read (``gateway/fields.py``), one timer a connection stands for all its waits, and an
answer that is whole leaves in one piece (``Exchange.answer``).

And it closes three ways in which uvicorn's own lets a request be more than it says:

- Trailer fields are read away, and no more of them than a head may have. uvicorn takes them for
  header fields of a request that has been looked at already.
- An ``Upgrade`` that nobody here takes up does not end HTTP on the connection. httptools hands out
  such a request without its body, and what was its body would be the next request.
- When a connection is lost, whoever is being answered hears of it, also if another request of the
  same connection waits behind.

An answer that ends the connection before its request has come whole is not taken back: what is
still being sent is read away for a moment.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final, cast
from urllib.parse import unquote_to_bytes

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.server import ServerState

from gateway.fields import EXCHANGE, Fields
from gateway.proxy.target import RAW_TARGET
from gateway.proxy.wire import HEAD_BYTES, Kept

LINGER_S: Final = 10


class Exchange(RequestResponseCycle):
    """uvicorn's request and answer, with a way to take and to give each of them whole."""

    def whole_body(self) -> bytes | None:
        """The request's body if all of it has come; else it is to be received."""
        if self.more_body or self.waiting_for_100_continue or self.disconnected:
            return None
        body, self.body = bytes(self.body), bytearray()
        self.message_event.clear()
        return body

    async def answer(
        self, status: int, fields: Sequence[tuple[bytes, bytes]], lines: bytes, body: bytes
    ) -> None:
        """Send a whole answer at once.

        ``lines`` are more header fields as they go on the wire. They or ``fields`` hold the
        length of the body, and none of them is ``Connection``.
        """
        if self.response_started:
            raise RuntimeError("the answer has begun already")
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        named = [b"%b: %b\r\n" % field for field in (*self.default_headers, *fields)]
        head = b"".join(named)
        # Whoever wrote a line break into a field would write the next answer as well.
        if head.count(b"\n") != len(named) or head.count(b"\r") != len(named) or b"\0" in head:
            self.transport.close()
            raise RuntimeError("a line break or NUL in a header field")
        self.response_started = self.response_complete = True
        self.waiting_for_100_continue = False
        close = b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n"
        self.transport.write(b"".join((STATUS_LINE[status], head, lines, close, body)))
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()


class _Line:
    """The transport as exchanges have it: what closes it may have to wait."""

    __slots__ = ("close", "is_closing", "write")

    def __init__(self, owner: RawHttpTools, transport: asyncio.Transport) -> None:
        self.write = transport.write
        self.is_closing = transport.is_closing
        self.close = owner.end_after_answer


class RawHttpTools(Kept, HttpToolsProtocol):
    """uvicorn's protocol on httptools (llhttp), the one used in production."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.running: Exchange | None = None  # the others wait in the pipeline
        self.in_body = False  # between the end of a head and the end of its request
        self.body_came = False
        self.framing_bytes = 0
        self.again = b""  # the head of a request that is to be read without its Upgrade
        self.deaf = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.line = cast(asyncio.Transport, _Line(self, self.transport))

    def connection_lost(self, exc: Exception | None) -> None:
        running = self.running
        if running is not None and not running.response_complete:
            running.disconnected = True
            running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.deaf:
            return
        head = self.head
        number, in_head, in_body = head.number, head.open, self.in_body
        self.body_came = False
        self._feed(data)
        if head.number != number:
            return
        if in_head and head.open:
            head.count(len(data))
        elif in_body and self.in_body and not self.body_came:
            # Sizes of chunks, and trailer fields: however many, none of them is looked at.
            self.framing_bytes += len(data)
            if self.framing_bytes > HEAD_BYTES:
                self.deaf = True
                self.transport.close()

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                rest = data[upgrade.args[0] :]
                if not self.again:  # CONNECT: what follows is in no language we speak
                    self.deaf = True
                    return
                head, self.again = self.again, b""
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                data = head + rest  # shorter by the Upgrade each time
            except httptools.HttpParserError:
                self.deaf = True
                self._refuse()
                return

    def _refuse(self) -> None:
        """What came is no HTTP. An answer that is being given is not written into."""
        running = self.running
        if running is not None and running.response_started and not running.response_complete:
            self.transport.close()
        else:
            self.send_400_response("Invalid HTTP request received.")

    def on_message_begin(self) -> None:
        self.url = b""
        self.expect_100_continue = False
        self.headers = Fields()
        self.head.begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.in_body:  # a trailer
            return
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        cast(Fields, self.headers).add(name, value)

    def on_headers_complete(self) -> None:
        parser, url = self.parser, self.url
        version = parser.get_http_version()
        upgrades = parser.should_upgrade()
        if upgrades and parser.get_method() != b"CONNECT":
            fields = [b"%b: %b" % field for field in self.headers if field[0] != b"upgrade"]
            line = b"%b %b HTTP/%b" % (parser.get_method(), url, version.encode())
            self.again = b"\r\n".join((line, *fields, b"", b""))
            return
        self.head.end()
        self.in_body = True
        self.framing_bytes = 0
        raw_path, _, query = url.partition(b"?")
        path = unquote_to_bytes(raw_path) if b"%" in raw_path else raw_path
        state = {**self.app_state, RAW_TARGET: url}
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": version,
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,
            "root_path": self.root_path,
            "method": parser.get_method().decode("ascii"),
            # For the framework's own routing only, which sees no target that
            # ``gateway/proxy/target.py`` has not accepted.
            "path": path.decode("utf-8", "replace"),
            "raw_path": raw_path,
            "query_string": query,
            "headers": self.headers,
            "state": state,
        }
        self.scope = cast(Any, scope)
        before = self.cycle
        cycle = self.cycle = Exchange(
            scope=self.scope,
            transport=self.line,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=version != "1.0" and parser.should_keep_alive() and not upgrades,
            on_response=self.on_response_complete,
        )
        state[EXCHANGE] = cycle
        if before is None or before.response_complete:
            self.running = cycle
            self._start_asgi_task(cycle, self.app)
        else:  # pipelined
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, self.app))

    def on_body(self, body: bytes) -> None:
        self.body_came = True
        if not self.cycle.response_complete:
            self.cycle.body += body
            if len(self.cycle.body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()
            self.cycle.message_event.set()

    def on_message_complete(self) -> None:
        if self.again:
            return
        self.in_body = False
        if not self.cycle.response_complete:
            self.cycle.more_body = False
            self.cycle.message_event.set()

    def end_after_answer(self) -> None:
        """Close the connection, as an exchange wants it.

        If the caller still sends, not at once: for what comes to a closed socket the system
        resets the connection, and the caller loses an answer it has not read (RFC 9112, 9.6).
        """
        running = self.running
        if self.deaf or running is None or not (running.response_complete and running.more_body):
            self.transport.close()
            return
        self.deaf = True
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.head.watch.within(LINGER_S, self.transport.abort)

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.deaf:
            return
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self.running = cast(Exchange, cycle)
            self._start_asgi_task(cycle, app)
        elif not self.head.open:
            self.head.watch.within(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _unset_keepalive_if_required(self) -> None:
        """The next head's own limit takes the place of this one."""
