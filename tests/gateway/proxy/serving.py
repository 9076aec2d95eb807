"""A real uvicorn on a free port, and raw bytes to send to it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn

from gateway.proxy import wire

PARSERS = ("httptools", "h11")


@asynccontextmanager
async def serving(app: Any, http: Any = "auto", **config: Any) -> AsyncIterator[int]:
    """Serve ``app`` until the block ends; gives the port. ``http``: a parser's name or a class."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    chosen = wire.protocol(http) if isinstance(http, str) else http
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=chosen,
            ws="none",
            lifespan="off",
            proxy_headers=False,
            server_header=False,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=1,
            **config,
        )
    )
    server.capture_signals = _no_signals  # type: ignore[method-assign]  # pytest keeps its own
    running = asyncio.create_task(server.serve([sock]))
    try:
        while not server.started:
            if running.done():
                running.result()
            await asyncio.sleep(0.005)
        yield sock.getsockname()[1]
    finally:
        server.should_exit = True
        await running
        sock.close()


def _no_signals() -> Any:
    from contextlib import nullcontext

    return nullcontext()


async def talk(port: int, request: bytes, *, timeout_s: float = 10) -> bytes:
    """Send bytes, half-close nothing, and read until the server closes the connection.

    A request that leaves the connection open must say ``Connection: close`` itself.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        await writer.drain()
        return await asyncio.wait_for(reader.read(), timeout_s)
    finally:
        writer.close()


def status_of(answer: bytes) -> int:
    """The status of a raw answer."""
    return int(answer.split(b" ", 2)[1])


def body_of(answer: bytes) -> bytes:
    """What follows the head of a raw answer."""
    return answer.split(b"\r\n\r\n", 1)[1]
