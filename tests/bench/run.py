"""Run servers and load on cores of their own, in alternating rounds, and take medians."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gateway import ledger
from gateway.accounts import wallets
from gateway.db import Database
from gateway.ledger import audit
from gateway.migrations.run import migrate
from tests.bench import requests
from tests.servers import free_port, port_open, until

HERE = Path(__file__).parent
SERVER_CORE, LOAD_CORE = 0, 1
START_S = 60
PAY_TO = "0x" + "11" * 20


@dataclass(frozen=True, slots=True)
class Load:
    """What one run of the load generator saw."""

    per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us: float
    """CPU time of the server process for one request."""
    p95_ms: float = 0


class BenchFault(Exception):  # noqa: N818
    """A run that measures nothing: errors, or answers that are not 2xx."""


def need_wrk() -> None:
    """Raises ``BenchFault`` where the load generator is missing."""
    if shutil.which("wrk") is None:
        raise BenchFault("wrk is missing: install it (apt-get install wrk), nothing was measured")


def prefix(core: int | None) -> list[str]:
    """What pins a command to a core, where the machine has it. None: it may run anywhere."""
    if core is None or shutil.which("taskset") is None or core not in os.sched_getaffinity(0):
        return []
    return ["taskset", "-c", str(core)]


@contextmanager
def process(
    command: Sequence[str], port: int, core: int | None = SERVER_CORE, *, web: bool = True
) -> Iterator[int]:
    """A server on its core; its process id, once it answers on ``port`` (a gateway listens before
    it is ready). Ended at the end, whatever happens."""
    started = subprocess.Popen(
        [*prefix(core), *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    name = " ".join(command[-4:])
    try:
        up = _answers if web else port_open
        until(lambda: up(port) or started.poll() is not None, START_S, f"{name} is up")
        if started.poll() is not None:
            raise BenchFault(f"{name} ended: {started.communicate()[1].decode()[-2000:]}")
        yield started.pid
    finally:
        started.send_signal(signal.SIGTERM)
        try:
            started.wait(15)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
        if started.stderr is not None:
            started.stderr.close()


def _answers(port: int) -> bool:
    """Whether any HTTP answer comes. Waits for it as long as the connection is taken."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_S)
    try:
        connection.request("GET", "/healthz")
        connection.getresponse().read()
    except OSError:
        return False
    finally:
        connection.close()
    return True


@contextmanager
def server(
    kind: str, port: int, *arguments: str, core: int | None = SERVER_CORE, module: str = "servers"
) -> Iterator[int]:
    """One of ``servers.py`` (or of another ``module`` here) as a process."""
    command = [sys.executable, "-m", f"tests.bench.{module}", kind, *arguments]
    with process(command, port, core) as pid:
        yield pid


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def warm(port: int, requests_: Sequence[bytes]) -> None:
    """Send these one after the other, unmeasured, so that what is remembered of a wallet after
    its first request is there. Raises ``BenchFault`` unless all are answered 2xx."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as line:
        file = line.makefile("rb")
        for one in requests_:
            line.sendall(one)
            status = file.readline().split(b" ")
            length = 0
            while (field := file.readline()) not in (b"\r\n", b""):
                name, _, value = field.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
            body = file.read(length)
            if len(status) < 2 or not status[1].startswith(b"2"):
                raise BenchFault(f"the server answered {status}: {body[:500]!r}")


def load(
    url: str,
    file: Path,
    pid: int,
    *,
    seconds: int,
    connections: int = 32,
    once: bool = False,
    want: int | None = None,
    core: int | None = LOAD_CORE,
) -> Load:
    """Drive a server with the requests of a file. Raises ``BenchFault`` unless all were 2xx
    (``want``: the status all must have instead)."""
    before = cpu_s(pid)
    command = [
        *("wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s"),
        *("-s", str(HERE / "load.lua"), url, "--", str(file), "once" if once else "again"),
    ]
    out = subprocess.run(
        [*prefix(core), *command], capture_output=True, text=True, check=True, timeout=seconds + 60
    ).stdout
    spent = cpu_s(pid) - before
    seen: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    bad = seen["non_2xx"] if want is None else seen["requests"] - seen["non_2xx"]
    if bad or seen["errors"] or seen["ran_out"] or not seen["requests"]:
        raise BenchFault(f"not a clean run: {seen}")
    return Load(
        per_s=seen["requests"] / (seen["duration_us"] / 1e6),
        p50_ms=seen["p50_us"] / 1000,
        p99_ms=seen["p99_us"] / 1000,
        cpu_us=spent / seen["requests"] * 1e6,
        p95_ms=seen["p95_us"] / 1000,
    )


def median(loads: Sequence[Load]) -> Load:
    return Load(
        *(
            statistics.median(getattr(one, name) for one in loads)
            for name in ("per_s", "p50_ms", "p99_ms", "cpu_us", "p95_ms")
        )
    )


@dataclass(frozen=True, slots=True)
class Gateway:
    """A gateway's files: configuration, funded wallets, and its address."""

    config: Path
    url: str
    port: int
    wallets: list[bytes]
    database: str
    upstream_port: int


def gateway(folder: Path, database: str, upstream_port: int, accounts: int) -> Gateway:
    """Write a configuration and give ``accounts`` wallets credits that do not run out."""
    funded = [secrets.token_bytes(32) for _ in range(accounts)]
    asyncio.run(_fund(database, [requests.address_of(s) for s in funded]))
    return another(Gateway(folder / "", "", 0, funded, database, upstream_port), folder)


def another(of: Gateway, folder: Path) -> Gateway:
    """The configuration of one more process on the same database, with an address of its own."""
    port = free_port()
    config = folder / f"farebox-{port}.toml"
    config.write_text(
        f"""
[server]
listen = "127.0.0.1:{port}"
database = "{of.database}"
work = false
log_level = "error"
[chains.base-sepolia]
rpc = ["http://127.0.0.1:1"]
pay_to = "{PAY_TO}"
settler_key = "0x{secrets.token_hex(32)}"
[upstreams.bench]
url = "http://127.0.0.1:{of.upstream_port}"
routes = [ {{ match = "POST {requests.PATH}", price = "$0.0001", slug = "echo" }} ]
"""
    )
    return replace(of, config=config, url=f"http://127.0.0.1:{port}", port=port)


async def _fund(database: str, addresses: list[str]) -> None:
    db = await Database.connect(database)
    await migrate(db)
    async with db.write() as tx:
        now_ms = await tx.now_ms()
        for address in addresses:
            account_id = await wallets.ensure(tx, address, now_ms)
            mint = ledger.Mint(account_id, 10**12, "grant", f"bench-{address}", 0, "grant")
            await ledger.apply(tx, [mint], now_ms)
    await db.close()


def check_books(database: str) -> None:
    """Run every audit. Raises ``BenchFault`` if one finds something."""

    async def run() -> list[audit.Broken]:
        db = await Database.connect(database)
        try:
            async with db.read() as tx:
                return await audit.verify(tx, await tx.now_ms())
        finally:
            await db.close()

    broken = asyncio.run(run())
    if broken:
        raise BenchFault(f"the books are wrong: {[(b.name, b.rows[:1]) for b in broken]}")


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder on the disk the project is on: fsync on a memory disk would measure nothing."""
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=Path.cwd()) as folder:
        yield Path(folder)
