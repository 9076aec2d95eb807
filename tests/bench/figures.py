"""The figures of one gateway on SQLite: spend, proxy, 402, one hot account, start."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from gateway.db import Database
from gateway.payments.offers import Keys, load_keys
from tests.bench import requests, run
from tests.bench.report import Run, row
from tests.bench.run import LOAD_CORE, Load, median
from tests.servers import free_port

MOST_PER_S = 14_000  # requests that are signed for a second of load; running out is a fault
ACCOUNTS = 256


def floor_round(folder: Path, seconds: int) -> Load:
    """FLOOR: Starlette echoing the same body."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    file = requests.write(folder / "floor.bin", requests.plain(url) + b"\0")
    with run.server("floor", port, "--port", str(port)) as pid:
        return run.load(url, file, pid, seconds=seconds)


def gateway_round(
    folder: Path,
    gateway: run.Gateway,
    seconds: int,
    *,
    kind: str = "spend",
    connections: int = 32,
    random_ids: bool = False,
    ceiling: str = "",
) -> Load:
    """Signed spends against a gateway that has been set up. ``kind``: of ``servers.py``."""
    file, first = signed_file(folder, gateway, seconds, random_ids=random_ids, ceiling=ceiling)
    with run.server(kind, gateway.port, "--config", str(gateway.config)) as pid:
        run.warm(gateway.port, first)
        return run.load(gateway.url, file, pid, seconds=seconds, connections=connections, once=True)


def signed_file(
    folder: Path, gateway: run.Gateway, seconds: int, *, random_ids: bool = False, ceiling: str = ""
) -> tuple[Path, list[bytes]]:
    """Enough signed requests for a round, and one of every wallet to warm up with."""
    count = MOST_PER_S * seconds
    signed = requests.signed(
        gateway.url, gateway.wallets, count, random_ids=random_ids, ceiling=ceiling
    )
    file = requests.write(folder / f"spend-{gateway.port}.bin", signed)
    first = requests.signed(gateway.url, gateway.wallets, len(gateway.wallets))
    return file, first.split(b"\0")[:-1]


def spend_round(
    folder: Path,
    seconds: int,
    accounts: int = ACCOUNTS,
    connections: int = 32,
    ceiling: str = "",
) -> Load:
    """P-spend: a fresh database, the upstream answers in the process."""
    gateway = run.gateway(folder, f"sqlite:///{folder}/bench.db", 1, accounts)
    return gateway_round(folder, gateway, seconds, connections=connections, ceiling=ceiling)


def ceiling(given: Run) -> None:
    """P-ceiling: what a ceiling under the signature adds to a spend."""
    without, under = [], []
    for _ in range(given.rounds):
        with run.scratch() as folder:
            without.append(spend_round(folder, given.seconds))
        with run.scratch() as folder:
            under.append(spend_round(folder, given.seconds, ceiling="$0.05"))
    found, against = median(under), median(without)
    added = 100 * (found.cpu_us / against.cpu_us - 1)
    given.put("P-ceiling", added, "% CPU added", goal=5, most=True, peer=row(against), **row(found))


def spend(given: Run) -> None:
    """FLOOR and P-spend in alternating rounds; P-tail from the same."""
    floors, spends = [], []
    for _ in range(given.rounds):
        with run.scratch() as folder:
            floors.append(floor_round(folder, given.seconds))
            spends.append(spend_round(folder, given.seconds))
    floor, found = median(floors), median(spends)
    given.put("FLOOR", floor.per_s, "requests/s", **row(floor))
    ratio = found.per_s / floor.per_s
    given.put("P-spend", ratio, "x FLOOR", goal=0.45, then=0.6, floor=row(floor), **row(found))
    given.put("P-tail", found.p99_ms, "ms", goal=10, most=True, floor_p99_ms=round(floor.p99_ms, 2))
    tails = found.p99_ms / floor.p99_ms
    given.put("P-tail.floor", tails, "x FLOOR's p99", goal=3, most=True)


def personal(given: Run) -> None:
    """P-personal: an invoke through the wallet API, signed in the strong form of personal-sign with
    a ceiling, against the same invoke signed by ERC-8128 with one. P-invoke: what the arrangement
    of that API costs whoever signs, against the route itself."""
    form, http, spends = [], [], []
    for _ in range(given.rounds):
        with run.scratch() as folder:
            spends.append(spend_round(folder, given.seconds, ceiling="$0.05"))
        with run.scratch() as folder:
            http.append(_invoke_round(folder, given.seconds, personal=False))
        with run.scratch() as folder:
            form.append(_invoke_round(folder, given.seconds, personal=True))
    found, against, spend = median(form), median(http), median(spends)
    added = 100 * (found.cpu_us / against.cpu_us - 1)
    given.put(
        "P-personal", added, "% CPU added", goal=10, most=True, peer=row(against), **row(found)
    )
    added = 100 * (against.cpu_us / spend.cpu_us - 1)
    given.put("P-invoke", added, "% CPU added", peer=row(spend), **row(against))


def _invoke_round(folder: Path, seconds: int, *, personal: bool) -> Load:
    gateway = run.gateway(folder, f"sqlite:///{folder}/bench.db", 1, ACCOUNTS)
    url, wallets = gateway.url, gateway.wallets
    if personal:
        mac_keys = asyncio.run(_mac_keys(gateway.database))
        make = partial(requests.strong, url, mac_keys, wallets)
    else:
        make = partial(requests.signed, url, wallets, ceiling="$0.05", path=requests.INVOKE)
    file = requests.write(folder / f"invoke-{gateway.port}.bin", make(MOST_PER_S * seconds))
    first = make(len(wallets))
    with run.server("spend", gateway.port, "--config", str(gateway.config)) as pid:
        run.warm(gateway.port, first.split(b"\0")[:-1])
        return run.load(gateway.url, file, pid, seconds=seconds, once=True)


async def _mac_keys(database: str) -> Keys:
    db = await Database.connect(database)
    try:
        return await load_keys(db)
    finally:
        await db.close()


def proxy(given: Run) -> None:
    """P-proxy: the same through to a real upstream on loopback (on the load's core)."""
    floors, found = [], []
    for _ in range(given.rounds):
        with run.scratch() as folder:
            floors.append(floor_round(folder, given.seconds))
            port = free_port()
            with run.server("upstream", port, "--port", str(port), core=LOAD_CORE):
                gateway = run.gateway(folder, f"sqlite:///{folder}/bench.db", port, ACCOUNTS)
                found.append(gateway_round(folder, gateway, given.seconds, kind="through"))
    floor, mid = median(floors), median(found)
    ratio = mid.per_s / floor.per_s
    given.put("P-proxy", ratio, "x FLOOR", goal=0.3, then=0.4, floor=row(floor), **row(mid))


def hot(given: Run) -> None:
    """P-hot: one account spent from by 64 connections, against 1,000 accounts."""
    one, many = [], []
    for _ in range(given.rounds):
        with run.scratch() as folder:
            many.append(spend_round(folder, given.seconds, 1_000, connections=64))
        with run.scratch() as folder:
            one.append(spend_round(folder, given.seconds, 1, connections=64))
    found, against = median(one), median(many)
    ratio = found.per_s / against.per_s
    given.put("P-hot", ratio, "x 1,000 accounts", goal=1, peer=row(against), **row(found))


def unpaid(given: Run) -> None:
    """P-402: the full 402 to a request without an identity."""
    floors, found = [], []
    for _ in range(given.rounds):
        with run.scratch() as folder:
            floors.append(floor_round(folder, given.seconds))
            gateway = run.gateway(folder, f"sqlite:///{folder}/bench.db", 1, accounts=1)
            file = requests.write(folder / "402.bin", requests.plain(gateway.url) + b"\0")
            with run.server("spend", gateway.port, "--config", str(gateway.config)) as pid:
                found.append(run.load(gateway.url, file, pid, seconds=given.seconds, want=402))
    floor, mid = median(floors), median(found)
    given.put("P-402", mid.per_s / floor.per_s, "x FLOOR", goal=0.8, floor=row(floor), **row(mid))


def start(given: Run) -> None:
    """P-start: how long ``farebox --help`` takes, and a gateway until it is ready."""
    program = str(Path(sys.executable).parent / "farebox")
    helps = []
    for _ in range(max(given.rounds, 3)):
        begun = time.perf_counter()
        subprocess.run([program, "--help"], check=True, capture_output=True)
        helps.append(time.perf_counter() - begun)
    given.put("P-start.help", sorted(helps)[len(helps) // 2], "s", goal=0.3, most=True)
    with run.scratch() as folder:
        gateway = run.gateway(folder, f"sqlite:///{folder}/bench.db", 1, accounts=1)
        begun = time.perf_counter()
        with run.server("through", gateway.port, "--config", str(gateway.config)) as pid:
            given.put("P-start.ready", time.perf_counter() - begun, "s", goal=2, most=True)
            time.sleep(1)  # the figure is memory at rest
            status = Path(f"/proc/{pid}/status").read_text()
            kib = int(status.split("VmRSS:")[1].split()[0])
            given.put("P-start.memory", kib / 1024, "MB", goal=150, most=True)
