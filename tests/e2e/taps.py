"""Where a gateway can be killed: on its lines to what it depends on, and at its writes to disk.

A ``Tap`` stands in front of a dependency (the chain's node, PostgreSQL, the upstream) and counts
what the gateway sends there. At one message the gateway gets SIGKILL: before the message reaches
the other side, or after the other side has answered and before the gateway hears of it. SQLite's
boundaries are system calls: ``Disk`` has strace kill at one write or fsync.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from tests import servers
from tests.e2e.stage import Background

BEFORE, AFTER = "before", "after"
_ANSWER_S = 5  # how long the other side may take with what the gateway never hears of
_NEVER = 65_535  # the most that strace counts


class Line(Protocol):
    """What can be counted and killed at. ``passed``: since the last ``arm``."""

    name: str
    sides: tuple[str, ...]
    passed: int
    fired: bool
    last: str

    def arm(self, process: servers.Process, at: int, side: str) -> None:
        """Count from 1 again, and kill at message ``at``, on that side of it. 0: only count."""

    def disarm(self) -> None:
        """Neither count nor kill any more."""


class Tap:
    """A line to a dependency that counts what passes, and kills at one message.

    A message is what the gateway sends until the other side has answered: an HTTP request to a
    node, a round trip with PostgreSQL.
    """

    sides: tuple[str, ...] = (BEFORE, AFTER)

    def __init__(self, background: Background, name: str, url: str) -> None:
        parts = urlsplit(url)
        self.name = name
        self._background = background
        self._target = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._lines: set[asyncio.StreamWriter] = set()
        self._process: servers.Process | None = None
        self._at: tuple[int, str] = (0, "")
        self.passed = 0
        self.fired = False
        self.last = ""  # what the message said at which it was killed
        self._server = background.run(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    def arm(self, process: servers.Process, at: int, side: str) -> None:
        self.passed, self.fired, self.last = 0, False, ""
        self._at, self._process = (at, side), process

    def disarm(self) -> None:
        self._process = None

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._lines.add(writer)
        try:
            await self._serve(reader, writer)
        except ConnectionError:
            pass  # one of the two ends was killed
        finally:
            self._lines.discard(writer)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        asking = asyncio.Event()  # a message is on its way and has not been answered
        answered = asyncio.Event()
        dying = False

        async def down() -> None:
            while data := await far_reader.read(1 << 20):
                asking.clear()
                answered.set()
                if dying:
                    continue  # the other side did it, and nobody hears of it
                writer.write(data)
                await writer.drain()
            writer.close()

        pump = asyncio.create_task(down())
        try:
            while data := await reader.read(1 << 20):
                if not asking.is_set():
                    asking.set()
                    process = self._process
                    side = self._count(data)
                    if side and process is not None:
                        dying = True
                        answered.clear()
                        if side == AFTER:
                            far_writer.write(data)
                            await far_writer.drain()
                            with contextlib.suppress(TimeoutError):
                                await asyncio.wait_for(answered.wait(), _ANSWER_S)
                        process.signal(signal.SIGKILL)
                        return
                far_writer.write(data)
                await far_writer.drain()
        finally:
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)
            far_writer.transport.abort()

    def _count(self, data: bytes) -> str:
        """One more message; the side on which the gateway is to be killed, if it is at this one."""
        if self._process is None or self.fired:
            return ""
        self.passed += 1
        at, side = self._at
        if at != self.passed:
            return ""
        self.fired, self.last = True, _said(data)
        return side

    def close(self) -> None:
        async def close() -> None:
            self._server.close()
            for line in list(self._lines):
                line.transport.abort()
            while self._lines:
                await asyncio.sleep(0.01)

        self._background.run(close())


def _said(data: bytes) -> str:
    """A message in a few words: the method, the statement."""
    method = re.search(rb'"method"\s*:\s*"(\w+)"', data)
    if method is not None:
        return method[1].decode()
    words = re.findall(rb"[ -~\n]{5,}", data)
    return " ".join(words[0].decode().split())[:80] if words else repr(data[:20])


class Disk:
    """Kills a gateway at its n-th write or fsync: SIGKILL on entering the system call, so that
    "after" is before the next one."""

    name = "disk"
    sides: tuple[str, ...] = (BEFORE,)
    _CALLS = "pwrite64,fdatasync,fsync,ftruncate,unlink"

    def __init__(self, folder: Path) -> None:
        self._trace = folder / "strace"
        self._process: servers.Process | None = None
        self._strace: subprocess.Popen[bytes] | None = None
        self.passed = 0
        self.fired = False
        self.last = "write or fsync"

    def arm(self, process: servers.Process, at: int, side: str) -> None:
        self._process, self.fired, self.passed = process, False, 0
        inject = f"inject={self._CALLS}:signal=SIGKILL:when={at or _NEVER}"
        self._strace = subprocess.Popen(
            [
                *("strace", "-f", "-q", "-o", str(self._trace), "-p", str(process.pid)),
                *("-e", f"trace={self._CALLS}", "-e", inject),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        status = Path(f"/proc/{process.pid}/status")
        end_s = time.monotonic() + 10
        while "TracerPid:\t0" in status.read_text():
            assert time.monotonic() < end_s and self._strace.poll() is None, "strace cannot attach"
            time.sleep(0.01)

    def disarm(self) -> None:
        if self._strace is None or self._process is None:
            return
        if self._strace.poll() is None:
            self._strace.send_signal(signal.SIGINT)
        self._strace.wait(10)
        self.fired = not self._process.running
        self.passed = sum("(" in line for line in self._trace.read_text().splitlines())
        self._strace = self._process = None
