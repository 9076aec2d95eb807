"""Run servers and load on cores of their own, in alternating rounds, and take medians."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway import ledger
from gateway.accounts import wallets
from gateway.db import Database
from gateway.migrations.run import migrate
from tests.bench import requests
from tests.servers import free_port, port_open, until

HERE = Path(__file__).parent
SERVER_CORE, LOAD_CORE = 0, 1
PAY_TO = "0x" + "11" * 20


@dataclass(frozen=True, slots=True)
class Load:
    """What one run of the load generator saw."""

    per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us: float
    """CPU time of the server process for one request."""


class BenchFault(Exception):  # noqa: N818
    """A run that measures nothing: errors, or answers that are not 2xx."""


def pinned(command: list[str], core: int) -> list[str]:
    cores = os.sched_getaffinity(0)
    return ["taskset", "-c", str(core), *command] if core in cores else command


@contextmanager
def server(kind: str, port: int, *arguments: str, core: int = SERVER_CORE) -> Iterator[int]:
    """A server process on its core; ended at the end, whatever happens."""
    command = [sys.executable, "-m", "tests.bench.servers", kind, *arguments]
    process = subprocess.Popen(
        pinned(command, core), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        until(lambda: port_open(port) or process.poll() is not None, 30, f"{kind} is up")
        if process.poll() is not None:
            raise BenchFault(f"{kind} ended: {process.communicate()[1].decode()[-2000:]}")
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stderr is not None:
            process.stderr.close()


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def load(
    url: str,
    file: Path,
    pid: int,
    *,
    seconds: int,
    connections: int = 32,
    once: bool = False,
    want: int | None = None,
) -> Load:
    """Drive a server with the requests of a file. Raises ``BenchFault`` unless all were 2xx
    (``want``: the status all must have instead)."""
    before = cpu_s(pid)
    command = [
        "wrk",
        "-t1",
        f"-c{connections}",
        f"-d{seconds}s",
        "-s",
        str(HERE / "load.lua"),
        url,
        "--",
        str(file),
        "once" if once else "again",
    ]
    out = subprocess.run(
        pinned(command, LOAD_CORE), capture_output=True, text=True, check=True, timeout=seconds + 60
    ).stdout
    spent = cpu_s(pid) - before
    seen: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    bad = seen["non_2xx"] if want is None else seen["requests"] - seen["non_2xx"]
    if bad or seen["errors"] or seen["ran_out"]:
        raise BenchFault(f"not a clean run: {seen}")
    return Load(
        per_s=seen["requests"] / (seen["duration_us"] / 1e6),
        p50_ms=seen["p50_us"] / 1000,
        p99_ms=seen["p99_us"] / 1000,
        cpu_us=spent / seen["requests"] * 1e6,
    )


def median(loads: list[Load]) -> Load:
    return Load(
        *(
            statistics.median(getattr(one, name) for one in loads)
            for name in ("per_s", "p50_ms", "p99_ms", "cpu_us")
        )
    )


@dataclass(frozen=True, slots=True)
class Gateway:
    """A gateway's files: configuration, funded wallets, and its address."""

    config: Path
    url: str
    port: int
    wallets: list[bytes]


def gateway(folder: Path, database: str, upstream_port: int, accounts: int) -> Gateway:
    """Write a configuration and give ``accounts`` wallets credits that do not run out."""
    port = free_port()
    secrets_ = [secrets.token_bytes(32) for _ in range(accounts)]
    config = folder / "farebox.toml"
    config.write_text(
        f"""
[server]
listen = "127.0.0.1:{port}"
database = "{database}"
work = false
log_level = "error"
[chains.base-sepolia]
rpc = ["http://127.0.0.1:1"]
pay_to = "{PAY_TO}"
settler_key = "0x{secrets.token_hex(32)}"
[upstreams.bench]
url = "http://127.0.0.1:{upstream_port}"
routes = [ {{ match = "POST {requests.PATH}", price = "$0.0001" }} ]
"""
    )
    asyncio.run(_fund(database, [requests.address_of(s) for s in secrets_]))
    return Gateway(config, f"http://127.0.0.1:{port}", port, secrets_)


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


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder on the disk the project is on: fsync on a memory disk would measure nothing."""
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=Path.cwd()) as folder:
        yield Path(folder)
