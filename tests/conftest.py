"""What every test can ask for: databases, Redis, ports, processes. The network is closed."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests import netguard, servers

netguard.close_network()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background of a shell. What the tests start must hear a Ctrl-C all the same.
    signal.signal(signal.SIGINT, signal.default_int_handler)


# --- the run --------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sweep-every", type=int, help="of the crash sweep's points; without it a few of each"
    )
    parser.addoption("--sweep-part", type=_part, default=(1, 1), help="2/5: every fifth of them")
    parser.addoption("--sweep-log", type=Path, help="JSON lines; what stands there is not redone")


def _part(text: str) -> tuple[int, int]:
    part, of = (int(each) for each in text.split("/"))
    if not 1 <= part <= of:
        raise ValueError(text)
    return part, of


def pytest_configure(config: pytest.Config) -> None:
    """The run's own process makes the folder that its xdist workers inherit."""
    if not hasattr(config, "workerinput"):
        os.environ["TEST_RUN_PID"] = str(os.getpid())
        servers.remove_dead_runs()
        os.environ["TEST_RUN_DIR"] = tempfile.mkdtemp(prefix=f"{servers.RUN_PREFIX}{os.getpid()}-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput") and "TEST_RUN_DIR" in os.environ:
        servers.end_keepers()
        shutil.rmtree(os.environ.pop("TEST_RUN_DIR"), ignore_errors=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which real parts took part, so that nobody has to guess what a green run means."""
    terminalreporter.section("real parts of this run")
    parts = servers.noted()
    for part, version in parts:
        terminalreporter.write_line(f"{part:<12} {version}")
    if not parts:
        terminalreporter.write_line("none: no test that ran needs a server")
    swept = servers.run_dir() / "crash-sweep.json"
    if swept.exists():
        from tests.e2e.sweep import summary

        terminalreporter.section("crash sweep")
        summary(swept, terminalreporter.write_line)


@pytest.fixture(autouse=True)
def _network_closed() -> Iterator[None]:
    """Fail a test that tried to leave this machine, even if the error was swallowed."""
    netguard.refused.clear()
    yield
    if netguard.refused:
        pytest.fail(f"the test tried to leave this machine: {netguard.refused}", pytrace=False)


def _worker_number() -> int:
    return int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))


# --- databases ------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def postgres_server() -> str:
    """The address of a real PostgreSQL, its maintenance database. Shared by the whole run."""
    return servers.postgres_url()


@pytest.fixture(params=["sqlite", "postgres"])
def dialect(request: pytest.FixtureRequest) -> str:
    """Runs the test once on each database."""
    return str(request.param)


@pytest.fixture
def empty_db_url(dialect: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a database without any table, once on SQLite and once on PostgreSQL."""
    yield from _database(dialect, tmp_path, request, migrated=False)


@pytest.fixture
def db_url(dialect: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a fresh, migrated database, once on SQLite and once on PostgreSQL."""
    yield from _database(dialect, tmp_path, request, migrated=True)


@pytest.fixture
def sqlite_url(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """A fresh, migrated SQLite database, for what has nothing to do with the database."""
    yield from _database("sqlite", tmp_path, request, migrated=True)


@pytest.fixture
def postgres_url(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """A fresh, migrated PostgreSQL database, for what only that one has (several processes)."""
    yield from _database("postgres", tmp_path, request, migrated=True)


def _database(
    dialect: str, tmp_path: Path, request: pytest.FixtureRequest, *, migrated: bool
) -> Iterator[str]:
    if dialect == "sqlite":
        servers.note("SQLite", sqlite3.sqlite_version)
        file = tmp_path / "farebox.db"
        if migrated:
            shutil.copyfile(servers.shared("sqlite-template", _sqlite_template)["file"], file)
        yield f"sqlite:///{file}"
        return
    server: str = request.getfixturevalue("postgres_server")
    template = (
        servers.shared("postgres-template", lambda: _postgres_template(server))["name"]
        if migrated
        else None
    )
    url = servers.create_database(server, template)
    yield url
    servers.drop_database(url)


async def _migrate(url: str) -> None:
    from gateway.db import Database
    from gateway.migrations.run import migrate

    db = await Database.connect(url)
    try:
        await migrate(db)
    finally:
        await db.close()


def _sqlite_template() -> dict[str, Any]:
    file = servers.run_dir() / "template.db"
    servers.in_thread(_migrate(f"sqlite:///{file}"))
    with sqlite3.connect(file) as connection:  # everything into the one file that is copied
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    return {"file": str(file)}


def _postgres_template(server: str) -> dict[str, Any]:
    url = servers.create_database(server)
    servers.in_thread(_migrate(url))
    return {"name": urlsplit(url).path.lstrip("/")}


@pytest.fixture
def redis_url() -> str:
    """An emptied database of a real Redis; each xdist worker has its own number."""
    return servers.redis_url(_worker_number())


# --- ports and processes --------------------------------------------------------------------


@pytest.fixture
def free_port() -> Callable[[], int]:
    """Call it for a port of the loopback address that is free."""
    return servers.free_port


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., servers.Process]]:
    """Start a command in the test's folder: ``run("farebox", "serve", env={…})``.

    ``farebox`` and ``python`` are those of this environment. At the end of the test everything
    that still runs is stopped with SIGTERM; what lives on after that fails the test.
    """
    started: list[servers.Process] = []

    def start(
        *command: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> servers.Process:
        process = servers.Process(
            servers.own_program(command), cwd or tmp_path, servers.child_env(env)
        )
        started.append(process)
        return process

    yield start
    late: list[str] = []
    for process in reversed(started):
        try:
            process.stop()
        except AssertionError as error:
            late.append(str(error))
    if late:
        pytest.fail("\n".join(late), pytrace=False)


@pytest.fixture
def farebox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., servers.Done]:
    """Run ``farebox …`` to its end in the test's folder and look at what it printed.

    In this process, which saves a second a call; ``run`` is for what must be a process.
    """

    def call(
        *arguments: str, env: Mapping[str, str] | None = None, stdin: str = ""
    ) -> servers.Done:
        from click.testing import CliRunner

        from gateway.cli import main

        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            for name in [name for name in os.environ if name.startswith("FAREBOX_")]:
                patch.delenv(name)
            done = CliRunner(env=dict(env or {})).invoke(main, arguments, input=stdin)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return servers.Done(done.exit_code, done.stdout, done.stderr)

    return call
