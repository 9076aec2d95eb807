"""A line to PostgreSQL that a test breaks at a COMMIT."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from gateway.db import Database


@dataclass
class Ends:
    """Both ends of one connection, and the task that passes on what the server says."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    up_reader: asyncio.StreamReader
    up_writer: asyncio.StreamWriter
    down: asyncio.Task[None]

    async def hold_back(self) -> None:
        """From now on nothing the server says is passed on."""
        self.down.cancel()
        await asyncio.gather(self.down, return_exceptions=True)

    def go_on(self) -> None:
        """Pass it on again."""
        self.down = asyncio.create_task(_pump(self.up_reader, self.writer))


class Line:
    """Passes everything on, until ``commit`` says otherwise."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self.target = parts.hostname, parts.port or 5432
        self.closed = False
        """Nobody gets through."""
        self.running: set[asyncio.Task[None]] = set()

    async def commit(self, ends: Ends, data: bytes) -> bool:
        """A COMMIT is about to go up. True: this has dealt with it, and the line goes on or ends
        as ``ends.writer`` is open or closed."""
        raise NotImplementedError

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.running.add(asyncio.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.closed:
            writer.close()
            return
        up_reader, up_writer = await asyncio.open_connection(*self.target)
        down = asyncio.create_task(_pump(up_reader, writer))
        ends = Ends(reader, writer, up_reader, up_writer, down)
        try:
            while data := await reader.read(65_536):
                if not (b"COMMIT" in data and await self.commit(ends, data)):
                    up_writer.write(data)
                elif writer.is_closing():
                    break
        except ConnectionError:  # one of the two ends was killed
            pass
        finally:
            await ends.hold_back()
            for each in (writer, up_writer):
                each.close()
                with contextlib.suppress(ConnectionError):
                    await each.wait_closed()

    async def end(self) -> None:
        """Cut whoever is on it, and wait for that."""
        for task in self.running:
            task.cancel()
        await asyncio.gather(*self.running, return_exceptions=True)
        self.running.clear()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
    writer.close()  # the server has ended it


@asynccontextmanager
async def through(line: Line, url: str, *, wait_s: float = 10) -> AsyncIterator[Database]:
    """The database as it is reached over the line."""
    server = await asyncio.start_server(line.accept, "127.0.0.1", 0)
    parts = urlsplit(url)
    where = f"{parts.username}@127.0.0.1:{server.sockets[0].getsockname()[1]}"
    db = await Database.connect(urlunsplit(parts._replace(netloc=where)), wait_s=wait_s)
    try:
        yield db
    finally:
        await db.close()
        server.close()
