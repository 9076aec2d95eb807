"""Several worker processes that serve one port: the parent that starts and watches them.

The parent migrates the database, forks, restarts workers that die, passes SIGTERM on and waits. It
serves nothing, holds no connection and has no event loop, so that there is nothing a fork could
share by mistake. A worker whose parent is gone stops by itself.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, NoReturn

from gateway import observe, reload, serve
from gateway.app import BadToken
from gateway.db import Database, DatabaseUnavailable
from gateway.migrations.run import NewerDatabase, migrate
from gateway.observe import log, set_up
from gateway.settings import Settings

# A worker that lived this long before it died is started again at once, and its past forgotten.
SETTLED_S: Final = 10.0
FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 30.0
# With every worker down, so many failed starts of each in a row end the parent: whoever supervises
# it shall know.
MOST_FAILURES: Final = 6
# Beyond server.stop_s: what closing the ledger's writer and the connections may take.
_CLOSING_S: Final = 15.0
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_TOLD: Final = (*_SIGNALS, reload.SIGNAL)
_FAULTS: Final[dict[str, type[Exception]]] = {
    kind.__name__: kind for kind in (BadToken, DatabaseUnavailable, NewerDatabase)
}


class WorkersFailed(Exception):  # noqa: N818  (the outcome, not a mistake of a caller)
    """The workers cannot be started, or not be kept running."""


def run(settings: Settings, door: socket.socket | None, announce: Callable[[], None]) -> None:
    """Serve with ``server.workers`` processes until told to stop; ``announce`` when all are up.

    ``door`` listens for the operator: the first worker answers there, whichever process it is.

    Raises ``OSError`` if the port is in use, what ``open_node`` raises, and ``WorkersFailed``.
    """
    if not hasattr(os, "fork") or not hasattr(socket, "SO_REUSEPORT"):
        raise WorkersFailed("server.workers above 1 needs a system with fork and SO_REUSEPORT")
    set_up(settings.server.log_level, process=True)
    with _reserved(settings) as port:
        asyncio.run(_migrate(settings))
        observe.share(settings.server.workers)
        _load()
        with _woken_by_signals() as wake:
            _Crew(settings, port, wake, announce, door).run()


@contextmanager
def _reserved(settings: Settings) -> Iterator[int]:
    """The port, kept for the workers by a socket that is bound and does not listen."""
    # SO_REUSEPORT alone would share the port with another gateway of the same user unnoticed.
    listen = settings.server.listen
    with serve.bind(listen) as alone:
        port: int = alone.getsockname()[1]
    with serve.bind(listen, port=port, shared=True):
        yield port


async def _migrate(settings: Settings) -> None:
    db = await Database.connect(settings.server.database)
    try:
        await migrate(db)
    finally:
        await db.close()


def _load() -> None:
    """What every worker needs in memory, once for all of them."""
    import uvicorn  # noqa: F401  (for its side effect)

    from gateway.proxy import wire

    wire.protocol()
    serve.loop_factory()
    gc.collect()
    gc.freeze()  # else the first collection in each worker would copy every page


@contextmanager
def _woken_by_signals() -> Iterator[int]:
    """A descriptor from which the numbers of arriving signals can be read."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    before = {n: signal.signal(n, lambda *_: None) for n in (*_TOLD, signal.SIGCHLD)}
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        yield read
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(read)
        os.close(write)


@dataclass(slots=True)
class _Worker:
    """A place for a worker process, and the process that has it now."""

    number: int
    pid: int = 0  # 0: none
    status: int = -1  # what it says comes from here; -1: it has ended
    said: bytes = b""
    ready: bool = False
    started_s: float = 0.0
    start_at_s: float = 0.0
    failures: int = 0


@dataclass(slots=True)
class _Crew:
    settings: Settings
    port: int
    wake: int
    announce: Callable[[], None]
    door: socket.socket | None = None
    workers: list[_Worker] = field(default_factory=list)
    lifeline: tuple[int, int] = (-1, -1)
    announced: bool = False
    stopping: bool = False
    kill_at_s: float = float("inf")
    fault: Exception | None = None

    def run(self) -> None:
        self.workers = [_Worker(number) for number in range(self.settings.server.workers)]
        self.lifeline = os.pipe()
        try:
            while not (self.stopping and all(worker.pid == 0 for worker in self.workers)):
                self._start_due()
                self._wait()
                self._reap()
        finally:
            for worker in self.workers:
                if worker.pid:
                    os.kill(worker.pid, signal.SIGKILL)
                    os.waitpid(worker.pid, 0)
            for end in self.lifeline:
                os.close(end)
        if self.fault is not None:
            raise self.fault

    def _wait(self) -> None:
        """Until a signal comes, a worker says something, or it is time for something."""
        now_s = time.monotonic()
        due_s = [w.start_at_s for w in self.workers if w.pid == 0 and not self.stopping]
        timeout_s = max(min([*due_s, self.kill_at_s, now_s + 60.0]) - now_s, 0.0)
        talking = {worker.status: worker for worker in self.workers if worker.status >= 0}
        ready, _, _ = select.select([self.wake, *talking], [], [], timeout_s)
        for number in _read(self.wake) if self.wake in ready else b"":
            if number in _SIGNALS:
                self._stop(number)
            elif number == reload.SIGNAL:
                self._reload()
        for each in ready:
            if each in talking:
                self._hear(talking[each])
        if time.monotonic() >= self.kill_at_s:
            self.kill_at_s = float("inf")
            log.error("workers did not stop in time: they are killed")
            self.fault = self.fault or WorkersFailed("workers did not stop in time")
            self._signal(signal.SIGKILL)

    def _stop(self, number: int) -> None:
        """Pass a wish to stop on; a second SIGINT means at once."""
        if not self.stopping:
            self.stopping = True
            self.kill_at_s = time.monotonic() + self.settings.server.stop_s + _CLOSING_S
            self._signal(signal.SIGTERM)
        elif number == signal.SIGINT:
            self._signal(signal.SIGTERM)

    def _reload(self) -> None:
        """Read the settings again: for workers to come, and those that run do so themselves."""
        read = reload.reader(self.settings)
        settings = None if read is None else reload.merged(self.settings, read)
        if settings is not None:
            self.settings = settings
            self._signal(reload.SIGNAL)

    def _signal(self, number: int) -> None:
        for worker in self.workers:
            if worker.pid:
                os.kill(worker.pid, number)  # not reaped yet, so the number is still its own

    def _hear(self, worker: _Worker) -> None:
        heard = _read(worker.status)
        if not heard:
            os.close(worker.status)
            worker.status = -1
            return
        *lines, worker.said = (worker.said + heard).split(b"\n")
        for line in lines:
            told = json.loads(line)
            if "ready" in told:
                worker.ready = True
            elif not self.announced:
                self.fault = self.fault or _fault(*told["fault"])
            else:
                log.error("worker %d: %s", worker.pid, ": ".join(told["fault"]))
        if not self.announced and all(each.ready for each in self.workers):
            self.announced = True
            self.announce()

    def _reap(self) -> None:
        for worker in self.workers:
            if worker.pid and (ended := os.waitpid(worker.pid, os.WNOHANG))[0]:
                while worker.status >= 0:  # what it said last
                    self._hear(worker)
                self._died(worker, os.waitstatus_to_exitcode(ended[1]))

    def _died(self, worker: _Worker, code: int) -> None:
        pid, worker.pid = worker.pid, 0
        ready, worker.ready = worker.ready, False
        if self.stopping:
            if code not in (0, -signal.SIGTERM):
                self.fault = self.fault or WorkersFailed(f"worker {pid} ended with {code}")
            return
        if not self.announced:
            self.fault = self.fault or WorkersFailed(f"worker {pid} ended with {code} at its start")
            self._stop(signal.SIGTERM)
            return
        now_s = time.monotonic()
        settled = ready and now_s - worker.started_s >= SETTLED_S
        worker.failures = 0 if settled else worker.failures + 1
        pause_s = 0.0
        if worker.failures:
            pause_s = min(FIRST_PAUSE_S * 2 ** min(worker.failures - 1, 10), LONGEST_PAUSE_S)
        worker.start_at_s = now_s + pause_s
        log.error("worker %d ended with %d; the next one starts in %.1f s", pid, code, pause_s)
        if all(each.pid == 0 and each.failures >= MOST_FAILURES for each in self.workers):
            self.fault = WorkersFailed(f"no worker runs, each failed {MOST_FAILURES} times")
            self._stop(signal.SIGTERM)

    def _start_due(self) -> None:
        for worker in self.workers:
            if not self.stopping and worker.pid == 0 and worker.start_at_s <= time.monotonic():
                self._start(worker)

    def _start(self, worker: _Worker) -> None:
        status, tell = os.pipe()
        # A signal between the fork and the child's own handlers must not be taken by a handler
        # that the child has only inherited.
        signal.pthread_sigmask(signal.SIG_BLOCK, _TOLD)
        try:
            pid = os.fork()
            if pid == 0:
                os.close(status)
                self._become(worker, tell)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _TOLD)
        os.close(tell)
        worker.pid, worker.status, worker.said = pid, status, b""
        worker.started_s = time.monotonic()

    def _become(self, worker: _Worker, tell: int) -> NoReturn:
        """The child's whole life."""
        code = 1
        orders = serve.Orders(tell, self.lifeline[0])
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # until there is a server to stop
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, who says so
            # Stays blocked, and so waits, until the worker has settings it can read again.
            signal.signal(reload.SIGNAL, signal.SIG_DFL)
            os.close(self.lifeline[1])
            for other in self.workers:
                if other.status >= 0:
                    os.close(other.status)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            observe.be_process(worker.number)
            first = worker.number == 0
            if self.door is not None and not first:
                self.door.close()
            door = self.door if first else None
            with asyncio.Runner(loop_factory=serve.loop_factory()) as runner:
                runner.run(serve.as_worker(self.settings, self.port, orders, door, first=first))
            code = 0
        except Exception as error:
            if type(error).__name__ not in _FAULTS:
                log.exception("a worker failed")
            orders.say({"fault": [type(error).__name__, str(error)]})
        finally:
            logging.shutdown()
            os._exit(code)


def _fault(kind: str, text: str) -> Exception:
    """A worker's reason as its parent's own."""
    if kind in _FAULTS:
        return _FAULTS[kind](text)
    return WorkersFailed(f"a worker could not start: {kind}: {text}")


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65_536)
    except BlockingIOError:
        return b""
