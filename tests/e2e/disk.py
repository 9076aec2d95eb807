"""Where a gateway on SQLite can be killed: at its system calls on the database's files.

strace kills with SIGKILL on entering one of them, so that "after" is before the next. It counts
calls of one name, in each thread for itself. SQLite appends the pages of a transaction to the WAL,
the last one with a mark, then waits for the disk; what comes before the last is not there for
whoever opens the file next (https://www.sqlite.org/walformat.html). So of each commit these are
killed at: one of its writes in the middle, the last, and the fsync after it. A checkpoint copies
what the WAL has; killed in the middle and at its fsync, the WAL has it still.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tests import servers
from tests.e2e.taps import BEFORE, NOTHING, Message, Point
from tests.e2e.wire import Said

_CALLS = "pwrite64,fdatasync,fsync,ftruncate"
_SYNCS = ("fdatasync", "fsync")
_NEVER = 65_535  # the most that strace counts
_LINE = re.compile(r"^(\d+) +(\w+)\(\d+<[^>]*/([^/>]+)>", re.MULTILINE)


class Disk:
    """The writes and fsyncs of one gateway, as strace sees them. A message's line is a thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._trace = folder / "strace"
        self._strace: subprocess.Popen[bytes] | None = None
        self.messages: list[Message] = []
        self.fired = False  # it may have killed
        self.last = NOTHING
        self.faults: list[Exception] = []

    def arm(self, process: servers.Process, point: Point | None) -> None:
        call, name = point.words.split() if point else ("pwrite64", "")
        self.messages, self.fired = [], point is not None
        self.last = Message("disk", Said(f"{call} {name}", changes=False))
        files = [name] if name else ["farebox.db", "farebox.db-wal"]
        strace = self._strace = subprocess.Popen(
            [
                *("strace", "-f", "-q", "-y", "-s", "0", "-o", str(self._trace)),
                *(word for each in files for word in ("-P", str(self._folder / each))),
                *("-e", f"trace={_CALLS}", "-p", str(process.pid)),
                *("-e", f"inject={call}:signal=SIGKILL:when={point.at if point else _NEVER}"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        servers.until(
            lambda: _traced(process.pid), 30, "strace to attach", lambda: strace.poll() is None
        )

    def act(self) -> None:
        """What the customer does is nothing to the files."""

    def disarm(self) -> None:
        """End strace. It is not asked to: it would detach from the first thread before the others,
        which waits for ever if the process has just been killed. The kernel lets go of them all."""
        if self._strace is None:
            return
        self._strace.kill()
        self._strace.wait(30)
        self.messages = messages_of(self._trace.read_text(errors="replace"))
        self._strace = None

    def points(self, runs: Iterable[Sequence[Message]]) -> list[Point]:
        """Of each commit and each checkpoint a write in the middle, the last, and the fsync."""
        found: dict[Point, None] = {}
        for run in runs:
            for writes, sync in _synced(run):
                few = dict.fromkeys((*writes[len(writes) // 2 :][:1], *writes[-1:], sync))
                found.update(few)
        return list(found)

    def classes(self, run: Sequence[Message]) -> int:
        return 1 + sum(
            sync.words.endswith("-wal") and bool(writes) for writes, sync in _synced(run)
        )


def messages_of(trace: str) -> list[Message]:
    """The calls of a trace, in order. A fsync ends what changes something."""
    return [
        Message(thread, Said(f"{call} {file}", changes=call in _SYNCS))
        for thread, call, file in _LINE.findall(trace)
    ]


def _synced(run: Sequence[Message]) -> Iterator[tuple[list[Point], Point]]:
    """The writes to a file by one thread, and the fsync that ended them."""
    seen: Counter[Message] = Counter()
    writes: defaultdict[tuple[str, str], list[Point]] = defaultdict(list)
    for message in run:
        seen[message] += 1
        words = message.said.words
        point = Point("disk", seen[message], BEFORE, words)
        key = (message.line, words.split()[1])
        if message.said.changes:
            yield writes.pop(key, []), point
        else:
            writes[key].append(point)


def _traced(pid: int) -> bool:
    """Whether every thread of a process has its tracer."""
    threads = list(Path(f"/proc/{pid}/task").iterdir())
    return all("TracerPid:\t0\n" not in (each / "status").read_text() for each in threads)
