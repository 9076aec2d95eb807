"""The tests' own tools: what they promise about the network, processes and databases."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import netguard, servers
from tests.servers import Process


@pytest.fixture
def forgiven() -> Iterator[None]:
    """These tests try what is forbidden, on purpose."""
    yield
    netguard.refused.clear()


def test_the_network_is_closed(forgiven: None) -> None:
    with socket.socket() as one, pytest.raises(netguard.NetworkClosedError):
        one.connect(("192.0.2.1", 80))
    with pytest.raises(netguard.NetworkClosedError):
        socket.getaddrinfo("example.com", 80)
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one,
        pytest.raises(netguard.NetworkClosedError),
    ):
        one.sendto(b"x", ("192.0.2.1", 53))
    assert len(netguard.refused) == 3


async def test_the_network_is_closed_to_asyncio(forgiven: None) -> None:
    import asyncio

    with pytest.raises(netguard.NetworkClosedError):
        await asyncio.open_connection("192.0.2.1", 80)


def test_this_machine_can_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert servers.port_open(port)
        with socket.create_connection(("localhost", port), timeout=5):
            pass


def test_a_process_is_waited_for_and_stopped(run: Callable[..., Process]) -> None:
    process = run("python", "-c", "print('ready 7'); import time; time.sleep(600)")
    assert process.wait_for(r"^ready (\d)$").group(1) == "7"
    assert process.stop() == -signal.SIGTERM


def test_a_process_that_ends_too_early_is_told_with_its_output(run: Callable[..., Process]) -> None:
    process = run("python", "-c", "print('no')")
    with pytest.raises(AssertionError, match="it printed:\nno"):
        process.wait_for("^ready$")


def test_a_process_that_lives_on_is_killed_and_told(run: Callable[..., Process]) -> None:
    program = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready')"
    process = run("python", "-c", f"{program}; time.sleep(600)")
    process.wait_for("^ready$")
    with pytest.raises(AssertionError, match="lived on"):
        process.stop(timeout_s=0.2)
    assert not process.running


def test_a_child_that_is_left_behind_is_told(run: Callable[..., Process]) -> None:
    child = "import time; time.sleep(600)"
    program = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{child}'])"
    process = run("python", "-c", f"{program}; print('ready')")
    assert process.wait_end() == 0
    with pytest.raises(AssertionError, match="lived on"):
        process.stop(children_s=0.2)


def test_a_kept_server_ends_with_the_run(tmp_path: Path) -> None:
    """Even when the run is killed: the keeper sees it, ends the server and removes its folder."""
    run = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    folder = tmp_path / "server"
    folder.mkdir()
    program = "print(__import__('os').getpid(), flush=True); import time; time.sleep(600)"
    script = str(Path(servers.__file__).with_name("keeper.py"))
    keeper = subprocess.Popen(
        [sys.executable, script, str(run.pid), str(folder), "--", sys.executable, "-c", program],
        env={**os.environ, "TEST_RUN_DIR": str(tmp_path / "shared")},
    )
    try:
        log = folder / "log"
        pid = servers.until(
            lambda: int(log.read_text() or 0) if log.exists() else 0, 20, "the server to start"
        )
        run.kill()
        run.wait()
        assert keeper.wait(20) == 0
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert not folder.exists()
    finally:
        run.kill()
        keeper.kill()
        run.wait()
        keeper.wait()


async def test_every_database_is_fresh_and_migrated(db_url: str) -> None:
    from gateway.db import Database

    db = await Database.connect(db_url)
    async with db.write() as tx:
        assert await tx.fetchval("SELECT count(*) FROM account") == 0
        await tx.execute("INSERT INTO meta (key, value) VALUES ('seen', '1')")
    await db.close()


async def test_an_empty_database_is_empty(empty_db_url: str) -> None:
    from gateway.db import Database
    from gateway.migrations.run import current_revision

    db = await Database.connect(empty_db_url)
    assert await current_revision(db) is None
    await db.close()


@pytest.mark.parametrize("_time", [1, 2])
def test_redis_is_emptied_for_every_test(redis_url: str, _time: int) -> None:
    import redis

    with redis.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0
        client.set("a", "b")
