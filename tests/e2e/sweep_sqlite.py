"""The crash sweep at SQLite's boundaries, which are system calls. Part of ``make soak`` only: it
needs strace, and the right to trace."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests import servers
from tests.e2e.disk import Disk
from tests.e2e.flows import FLOWS
from tests.e2e.sweep import Swept
from tests.e2e.taps import BEFORE, Point

pytestmark = pytest.mark.timeout(14_400)

# Writes 1, 2, 3… to a file, one a millisecond, with other threads beside it, as a gateway has them.
WRITER = """
import os, sys, threading, time
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
for _ in range(60):
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
print("ready", flush=True)
for n in range(1, 255):
    while not os.path.exists(sys.argv[1] + "-go"):
        time.sleep(0.001)
    os.pwrite(file, bytes((n,)), n - 1)
time.sleep(600)
"""


@pytest.mark.parametrize("flow", FLOWS)
async def test_killed_at_every_write(flow: str, swept: Callable[..., Awaitable[Swept]]) -> None:
    found = await swept(flow, "sqlite", disk=True)
    found.check()


def test_killed_before_the_write_it_is_told(
    tmp_path: Path, run: Callable[..., servers.Process]
) -> None:
    wal = tmp_path / "farebox.db-wal"
    disk = Disk(tmp_path)
    for at in (1, 2, 200):
        wal.unlink(missing_ok=True)
        process = run("python", "-c", WRITER, str(wal))
        process.wait_for("ready")
        disk.arm(process, Point("disk", at, BEFORE, "pwrite64 farebox.db-wal"))
        (tmp_path / "farebox.db-wal-go").touch()
        assert process.wait_end(30) == -signal.SIGKILL
        (tmp_path / "farebox.db-wal-go").unlink()
        disk.disarm()
        assert wal.read_bytes() == bytes(range(1, at))


def test_a_process_that_is_dying_does_not_keep_strace(
    tmp_path: Path, run: Callable[..., servers.Process]
) -> None:
    """Asked to detach just then, strace may wait for ever."""
    disk = Disk(tmp_path)
    for _ in range(10):
        process = run("python", "-c", WRITER, str(tmp_path / "farebox.db-wal"))
        process.wait_for("ready")
        disk.arm(process, None)
        (tmp_path / "farebox.db-wal-go").touch()
        process.signal(signal.SIGKILL)
        disk.disarm()
        assert process.wait_end(30) == -signal.SIGKILL
