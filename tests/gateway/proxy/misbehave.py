"""An upstream that does what upstreams should not, and remembers exactly what it was sent.

A raw asyncio server, because no HTTP library lets one break HTTP. What it does is chosen by the
path; every request is in ``requests`` with its bytes as they came, so a test can ask how many
calls really arrived.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Request:
    """A request as it stood on the wire."""

    method: str
    target: bytes
    head: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    def header(self, name: bytes) -> list[bytes]:
        return [v for n, v in self.headers if n.lower() == name]


@dataclass
class Upstream:
    """The server and what it has seen. ``connections`` counts those ever accepted."""

    port: int = 0
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    open_connections: int = 0
    begun: int = 0  # heads read; more than requests if a body never came whole
    released: asyncio.Event = field(default_factory=asyncio.Event)  # lets /stall… go on
    faults: list[Exception] = field(default_factory=list)  # ours, not those of whoever calls

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def count(self, target: bytes) -> int:
        return sum(r.target == target for r in self.requests)


Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter
Behaviour = Callable[[Upstream, Request, Writer], Awaitable[bool]]  # True: keep the connection


def answer(body: bytes, *fields: bytes, status: bytes = b"200 OK") -> bytes:
    head = b"".join(f + b"\r\n" for f in (*fields, b"Content-Length: %d" % len(body)))
    return b"HTTP/1.1 " + status + b"\r\n" + head + b"\r\n" + body


def reset(writer: Writer) -> None:
    """Close with RST instead of FIN."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def closed(writer: Writer) -> bool:
    """Whether the other side has closed its connection, by FIN or by RST.

    After a RST that our own loop has seen there is no socket left to ask; a FIN leaves the
    transport open for writing, and only the socket tells.
    """
    if writer.is_closing():
        return True
    with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as mine:
        try:
            return mine.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except ConnectionError:
            return True


async def _echo(up: Upstream, request: Request, writer: Writer) -> bool:
    writer.write(answer(request.head + request.body))
    return True


async def _reset(up: Upstream, request: Request, writer: Writer) -> bool:
    reset(writer)
    return False


async def _reset_mid(up: Upstream, request: Request, writer: Writer) -> bool:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nfirst")
    await writer.drain()
    await up.released.wait()
    reset(writer)
    return False


async def _close(up: Upstream, request: Request, writer: Writer) -> bool:
    return False


async def _stall(up: Upstream, request: Request, writer: Writer) -> bool:
    await up.released.wait()
    return False


async def _stall_mid(up: Upstream, request: Request, writer: Writer) -> bool:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nfirst")
    await up.released.wait()
    return False


async def _drip(up: Upstream, request: Request, writer: Writer) -> bool:
    """Never idle for long, never done."""
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while not writer.is_closing():
        writer.write(b"1\r\nx\r\n")
        await asyncio.sleep(0.01)
    return False


async def _endless_head(up: Upstream, request: Request, writer: Writer) -> bool:
    writer.write(b"HTTP/1.1 200 OK\r\n" + b"X-A: " + b"a" * 400_000)
    await up.released.wait()
    return False


async def _flood(up: Upstream, request: Request, writer: Writer) -> bool:
    """Bytes for as long as anybody takes them."""
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    while not writer.is_closing():
        writer.write(piece)
        await writer.drain()
    return False


async def _close_after(up: Upstream, request: Request, writer: Writer) -> bool:
    """A whole answer that promises to stay, and goes."""
    writer.write(answer(b"bye"))
    return False


def _says(data: bytes, keep: bool = False) -> Behaviour:
    async def behave(up: Upstream, request: Request, writer: Writer) -> bool:
        writer.write(data)
        return keep

    return behave


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
BEHAVIOURS: dict[bytes, Behaviour] = {
    b"/reset": _reset,
    b"/reset-mid": _reset_mid,
    b"/close": _close,
    b"/stall": _stall,
    b"/stall-mid": _stall_mid,
    b"/drip": _drip,
    b"/flood": _flood,
    b"/close-after": _close_after,
    b"/500": _says(answer(b"broken", status=b"500 Internal Server Error"), keep=True),
    b"/402": _says(
        answer(b"{}", b"PAYMENT-REQUIRED: e30=", status=b"402 Payment Required"), keep=True
    ),
    b"/204": _says(b"HTTP/1.1 204 No Content\r\n\r\n", keep=True),
    b"/304": _says(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", keep=True),
    b"/redirect": _says(answer(b"", b"Location: /echo", status=b"302 Found"), keep=True),
    b"/gzip": _says(answer(b"\x1f\x8bnot really", b"Content-Encoding: gzip"), keep=True),
    b"/cookie": _says(answer(b"", b"Set-Cookie: a=1", b"Set-Cookie: b=2"), keep=True),
    b"/latin": _says(answer(b"", b"X-Name: caf\xe9"), keep=True),
    b"/chunked": _says(CHUNKED + b"5;ext=1\r\nhello\r\n6\r\n world\r\n0\r\nX-T: 1\r\n\r\n", True),
    b"/interim": _says(
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
        + answer(b"done", b"X-Final: 1"),
        keep=True,
    ),
    b"/until-close": _says(b"HTTP/1.1 200 OK\r\n\r\nall of it"),
    b"/http10": _says(b"HTTP/1.0 200 OK\r\n\r\nall of it"),
    b"/extra": _says(answer(b"body") + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", True),
    b"/extra-empty": _says(answer(b"body") + answer(b""), True),
    b"/truncate": _says(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello"),
    b"/truncate-chunked": _says(CHUNKED + b"5\r\nhello\r\n"),
    b"/truncate-in-chunk": _says(CHUNKED + b"a\r\nhello"),
    b"/truncate-head": _says(b"HTTP/1.1 200 OK\r\nContent-Le"),
    b"/garbage": _says(b"\x00\x01 this is no HTTP\r\n\r\n"),
    b"/bad-chunk": _says(CHUNKED + b"zz\r\nhello\r\n"),
    b"/two-lengths": _says(
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!"
    ),
    b"/both-framings": _says(
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    ),
    b"/coding": _says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nhello"),
    b"/switch": _says(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\nhello"),
    b"/status-999": _says(answer(b"", status=b"999 What")),
    b"/many-interims": _says(b"HTTP/1.1 100 Continue\r\n\r\n" * 50 + answer(b"late")),
    b"/huge-head": _says(b"HTTP/1.1 200 OK\r\n" + b"X-A: " + b"a" * 200_000 + b"\r\n\r\n"),
    b"/endless-head": _endless_head,
}


async def _head(reader: Reader) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head[:-4].split(b"\r\n")
    fields = [(n, v.strip(b" \t")) for n, _, v in (line.partition(b":") for line in lines[1:])]
    return head, fields


async def _body(reader: Reader, fields: list[tuple[bytes, bytes]]) -> bytes:
    names = {n.lower(): v for n, v in fields}
    if names.get(b"transfer-encoding") == b"chunked":
        body = b""
        while size := int((await reader.readuntil(b"\r\n"))[:-2], 16):
            body += await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readexactly(2)
        return body
    return await reader.readexactly(int(names.get(b"content-length", b"0")))


async def _serve(up: Upstream, reader: Reader, writer: Writer) -> None:
    up.connections += 1
    up.open_connections += 1
    try:
        keep = True
        while keep:
            head, head_fields = await _head(reader)
            up.begun += 1
            method, target, _ = head.split(b" ", 2)
            path = target.split(b"?")[0]
            if path in (b"/early", b"/early-keep"):  # answers before the body and reads none
                fields = [b"Connection: close"] if path == b"/early" else []
                writer.write(answer(b"too much", *fields, status=b"413 Large"))
                await writer.drain()
                await up.released.wait()
                return
            body = await _body(reader, head_fields)
            request = Request(method.decode(), target, head, tuple(head_fields), body)
            up.requests.append(request)
            if method == b"HEAD":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 42\r\n\r\n")
                continue
            keep = await BEHAVIOURS.get(path, _echo)(up, request, writer)
            await writer.drain()
    except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        pass  # the other side went away; what it sent is in ``requests``
    except Exception as fault:
        up.faults.append(fault)  # else whoever waits for this behaviour waits in vain
    finally:
        up.open_connections -= 1
        writer.close()


@asynccontextmanager
async def misbehaving(tls: ssl.SSLContext | None = None) -> AsyncIterator[Upstream]:
    """The server, until the block ends. Nothing of it stays behind, and no fault of a behaviour
    stays unseen."""
    up = Upstream()
    tasks: set[asyncio.Task[None]] = set()

    def accepted(reader: Reader, writer: Writer) -> None:
        task = asyncio.ensure_future(_serve(up, reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accepted, "127.0.0.1", 0, limit=1 << 20, ssl=tls)
    up.port = server.sockets[0].getsockname()[1]
    try:
        yield up
    finally:
        up.released.set()
        server.close()
        for task in list(tasks):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)
    if up.faults:
        raise ExceptionGroup("an upstream's behaviour failed", up.faults)
