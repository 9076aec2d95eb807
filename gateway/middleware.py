"""The edge: the outermost ASGI layer, and how a body is read.

Every request gets an id for logs. Heads that are too large or whose framing is ambiguous are
refused before anything looks at them. A ``Problem`` raised anywhere below becomes its RFC 9457
answer here and nowhere else; any other exception is logged once, with the id, and answered with
``internal_error`` and nothing about itself. When an answer has already begun it is cut off instead,
so that no caller takes a part for the whole.

Under it belongs a ``starlette.routing.Router`` or a plain function, not the ``Starlette`` class,
whose own error handling would answer first.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, MutableMapping
from itertools import chain
from typing import Any, Final, cast

from gateway.errors import Problem
from gateway.fields import EXCHANGE, first, values
from gateway.proxy import advice, cors
from gateway.proxy.target import check_framing

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]
App = Callable[[Scope, Receive, "Outgoing"], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

REQUEST_ID: Final = "farebox.log_id"
MAX_HEADERS_BYTES: Final = 32 * 1024
BODY_IDLE_S: Final = 30.0
BODY_TOTAL_S: Final = 300.0
# Per field: ": " and CRLF, so that many empty fields count too.
_FIELD_OVERHEAD: Final = 4

log = logging.getLogger("farebox")


class CallerGoneError(Exception):
    """The caller hung up; there is nobody to answer."""


def log_id(scope: Scope) -> str:
    """The id under which this request is logged; members of problems call it ``request_id``.

    Made when it is first asked for: most requests have nothing to say in the log.
    """
    state = scope.setdefault("state", {})
    found: str | None = state.get(REQUEST_ID)
    if found is None:
        found = state[REQUEST_ID] = f"{random.getrandbits(64):016x}"
    return found


def edge(app: App, *, max_headers_bytes: int = MAX_HEADERS_BYTES, base: str = "") -> Asgi:
    """``app`` with the edge around it. ``base``: the origin of the addresses in its answers."""

    async def outermost(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await _not_http(app, scope, receive, send)
            return
        answered = Outgoing(scope, send)
        try:
            headers = scope["headers"]
            _check_size(headers, max_headers_bytes)
            check_framing(headers, scope["http_version"])
            await app(scope, receive, answered)
        except Problem as problem:
            if problem.status >= 500:
                log.warning("%s %s%s", log_id(scope), problem, _because(problem))
            if not problem.next_actions:  # refused before its address was looked at
                advice.complete(problem, scope["method"], base + _path(scope), base)
            await _refuse(answered, problem, log_id(scope))
        except CallerGoneError:
            log.debug("%s the caller hung up", log_id(scope))
        except Exception:
            log.exception("%s unexpected error", log_id(scope))
            await _refuse(answered, Problem("internal_error", _INTERNAL), log_id(scope))

    return outermost


def _because(problem: Problem) -> str:
    """What a problem of ours came from. One line: while a dependency is away every request has
    one, and where it was raised says nothing new."""
    cause = problem.__cause__
    return "" if cause is None else f" ({type(cause).__name__}: {cause})"


def _path(scope: Scope) -> str:
    raw: bytes = scope.get("raw_path") or b""
    return raw.decode("latin-1")


_INTERNAL: Final = "Something went wrong here. It was logged under this request_id."


async def _not_http(app: App, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await app(scope, receive, cast(Outgoing, send))
    elif scope["type"] == "websocket":  # nothing here speaks it; uvicorn runs with ws="none"
        await receive()
        await send({"type": "websocket.close", "code": 1000})


class Outgoing:
    """``send``, remembering whether an answer has begun; without a body for HEAD.

    ``also``: fields that whatever is answered carries as well.
    """

    __slots__ = ("_exchange", "_head_only", "_scope", "_send", "also", "begun")

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._send = send
        self._head_only = scope["method"] == "HEAD"
        state = scope.get("state")
        self._exchange = None if state is None else state.get(EXCHANGE)
        self.begun = False
        self.also: Headers = []

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            if self.also:
                message = {**message, "headers": [*message["headers"], *self.also]}
        elif self._head_only and message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await self._send(message)

    async def whole(self, status: int, fields: Headers, lines: bytes, body: bytes) -> None:
        """A whole answer in one piece, where the server takes one.

        ``lines`` are more fields, as they go on the wire; they or ``fields`` hold the length of
        the body. Nobody else may send anything for this request.
        """
        if self.also:
            fields = [*fields, *self.also]
        if self._head_only:
            body = b""
        self.begun = True
        if self._exchange is not None:
            await self._exchange.answer(status, fields, lines, body)
            return
        named = [line.partition(b": ") for line in lines.split(b"\r\n") if line]
        headers = [*fields, *((name, value) for name, _, value in named)]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    @property
    def log_id(self) -> str:
        """The id under which the request is logged."""
        return log_id(self._scope)

    def body_that_came(self) -> bytes | None:
        """The request's whole body if it is here already; None: it is to be received."""
        found: bytes | None = None
        if self._exchange is not None:
            found = self._exchange.whole_body()
        return found


def _check_size(headers: Collection[tuple[bytes, bytes]], limit: int) -> None:
    size = sum(map(len, chain.from_iterable(headers))) + _FIELD_OVERHEAD * len(headers)
    if size > limit:
        raise Problem(
            "headers_too_large",
            f"the header fields are larger than {limit} bytes in all",
            headers={"Connection": "close"},
        )


async def _refuse(answered: Outgoing, problem: Problem, request_id: str) -> None:
    """Answer with a problem. Once an answer has begun nothing is sent: ending the application in
    the middle makes the server cut the connection, which is what the caller must see."""
    if answered.begun:
        return
    status, headers, body = problem_answer(problem, request_id)
    await answered({"type": "http.response.start", "status": status, "headers": headers})
    await answered({"type": "http.response.body", "body": body})


def problem_answer(problem: Problem, request_id: str) -> tuple[int, Headers, bytes]:
    """Status, header fields and body of a problem's answer (RFC 9457).

    Never cached. Readable by scripts of any origin, because a browser client must see a 402.
    The raiser's own fields (``WWW-Authenticate``, ``Retry-After``, ``PAYMENT-REQUIRED``) come as
    given and win.
    """
    body = json.dumps(problem.body(request_id), separators=(",", ":")).encode()
    headers: Headers = [
        (name.lower().encode("latin-1"), value.encode("latin-1"))
        for name, value in problem.headers.items()
    ]
    given = {name for name, _ in headers}
    if b"content-type" not in given:
        headers.append((b"content-type", b"application/problem+json"))
    if b"cache-control" not in given:
        headers.append((b"cache-control", b"no-store"))
    headers.append((b"content-length", str(len(body)).encode()))
    return problem.status, cors.expose(headers), body


def content_length(headers: Iterable[tuple[bytes, bytes]]) -> int | None:
    """The length a request states for its body (``check_framing`` has seen it)."""
    stated = first(headers, b"content-length")
    return int(stated) if stated else None


def has_body(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a request says that a body follows (RFC 9112 section 6.3: else there is none)."""
    return bool(values(headers, b"content-length") or values(headers, b"transfer-encoding"))


async def stream_body(
    receive: Receive, headers: Iterable[tuple[bytes, bytes]], limit: int
) -> AsyncIterator[bytes]:
    """A request's body as it comes.

    Raises ``Problem("body_too_large")`` above ``limit`` bytes (before the first piece if the stated
    length is already too much), ``invalid_request`` with 408 when it stops coming, and
    ``CallerGoneError`` when the caller hangs up before its end.
    """
    stated = content_length(headers)
    if stated is not None and stated > limit:
        raise too_large(limit)
    loop = asyncio.get_running_loop()
    last_s = loop.time() + BODY_TOTAL_S
    size = 0
    more = True
    while more:
        try:
            async with asyncio.timeout_at(min(loop.time() + BODY_IDLE_S, last_s)):
                message = await receive()
        except TimeoutError:
            raise Problem(
                "invalid_request",
                "the body did not arrive in time",
                status=408,
                headers={"Connection": "close"},
            ) from None
        if message["type"] == "http.disconnect":
            raise CallerGoneError
        piece: bytes = message.get("body", b"")
        more = message.get("more_body", False)
        size += len(piece)
        if size > limit:
            raise too_large(limit)
        if piece:
            yield piece


async def read_body(
    receive: Receive,
    headers: Iterable[tuple[bytes, bytes]],
    limit: int,
    came: bytes | None = None,
) -> bytes:
    """A request's whole body. Raises what ``stream_body`` raises.

    ``came``: the whole of it, where it is here already (``Outgoing.body_that_came``).
    """
    if came is not None:
        if len(came) > limit:
            raise too_large(limit)
        return came
    if not has_body(headers):
        return b""
    pieces = [piece async for piece in stream_body(receive, headers, limit)]
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def too_large(limit: int) -> Problem:
    """The refusal of a body above ``limit`` bytes."""
    # Closing spares both sides the rest of a body that nobody wants.
    return Problem(
        "body_too_large",
        f"the body is larger than {limit} bytes",
        headers={"Connection": "close"},
    )
