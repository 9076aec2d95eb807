"""The servers that are measured, each a process of its own: ``python -m tests.bench.servers KIND``.

``floor``   Starlette under uvicorn echoing a JSON body: what the framework alone can do.
``spend``   the gateway with its real ledger; the upstream answers inside the process, so that the
            figure is the gateway's own work (the in-process upstream is the one thing that is not
            real here: P-proxy measures with a real one).
"""

from __future__ import annotations

import argparse
import asyncio
import re
from pathlib import Path
from typing import Any

ANSWER = b'{"ok":true,"result":"' + b"x" * 200 + b'"}'


class _Inside:
    """An upstream connection that answers at once: the pool and the connection in one."""

    status = 200
    headers = ((b"content-type", b"application/json"),)
    content_length = len(ANSWER)
    complete = True
    reusable = True

    def pool(self, origin: Any) -> _Inside:
        return self

    async def acquire(self, timeout_s: float) -> _Inside:
        return _Inside()

    def release(self, connection: Any) -> None:
        """Nothing is held."""

    def begin(self, data: bytes, *, head_only: bool) -> None:
        self.rest = ANSWER

    async def wait_head(self, timeout_s: float) -> None:
        """It is there."""

    def take(self, limit: int) -> bytes:
        return self.rest

    async def read(self, timeout_s: float) -> bytes:
        data, self.rest = self.rest, b""
        return data

    async def close(self) -> None:
        """Nothing is open."""


def floor(port: int) -> None:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    async def echo(request: Request) -> Response:
        return Response(await request.body(), media_type="application/json")

    uvicorn.run(
        Starlette(routes=[Route("/v1/echo", echo, methods=["POST"])]),
        port=port,
        log_level="error",
        access_log=False,
        loop="uvloop",
        http="httptools",
    )


def spend(config: Path, *, inside: bool) -> None:
    from gateway import app, cli

    if inside:
        app.UpstreamClient = _Inside  # type: ignore[assignment, attr-defined]  # the same verbs
    cli.main(["serve", "--config", str(config), "--json"])


def upstream(port: int) -> None:
    """A real upstream that costs little: a bare asyncio protocol."""

    class Protocol(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport, self.data = transport, b""

        def data_received(self, data: bytes) -> None:
            self.data += data
            while b"\r\n\r\n" in self.data:
                head, _, rest = self.data.partition(b"\r\n\r\n")
                length = 0
                for line in head.lower().split(b"\r\n"):
                    if line.startswith(b"content-length:"):
                        length = int(line[15:])
                if len(rest) < length:
                    return
                self.data = rest[length:]
                self.transport.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
                    b"content-length: %d\r\n\r\n%b" % (len(ANSWER), ANSWER)
                )

    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(Protocol, "127.0.0.1", port)
        await server.serve_forever()

    import uvloop

    uvloop.run(main())


def events(port: int) -> None:
    """An upstream that answers with a stream of events, paced, or with ``?rush`` as fast as it is
    read."""
    from tests.bench.streams import BURST, EVENTS, PAUSE_S

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = re.search(rb"content-length: *([0-9]+)", head.lower())
                await reader.readexactly(int(length.group(1)) if length else 0)
                await stream(writer, b"?rush" in head.partition(b"\r\n")[0])
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def stream(writer: asyncio.StreamWriter, rush: bool) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        for n in range(EVENTS):
            event = b'data: {"choices":[{"delta":{"content":"word %05d"}}]}\n\n' % n
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
            if n % BURST == BURST - 1:
                await (writer.drain() if rush else asyncio.sleep(PAUSE_S))
        end = b'data: {"usage":{"prompt_tokens":9,"completion_tokens":%d}}\n\n' % EVENTS
        writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(end), end))
        await writer.drain()

    async def main() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", port)
        await server.serve_forever()

    import uvloop

    uvloop.run(main())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["floor", "spend", "through", "upstream", "events"])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--config", type=Path)
    given = parser.parse_args()
    if given.kind == "floor":
        floor(given.port)
    elif given.kind == "upstream":
        upstream(given.port)
    elif given.kind == "events":
        events(given.port)
    else:
        spend(given.config, inside=given.kind == "spend")
