"""P-sse: a stream of 10,000 events through the gateway, metered, against the upstream alone."""

from __future__ import annotations

import re
import socket
import statistics
import time
from pathlib import Path
from typing import Final

from tests.bench import requests, run
from tests.bench.report import Run
from tests.bench.run import LOAD_CORE, BenchFault
from tests.servers import free_port

EVENTS: Final = 10_000
# Of servers.py: so many events at once, so often. As many a second as fifty chats have.
BURST, PAUSE_S = 5, 0.001
_METERED: Final = (
    '{ rule = "metered", max = "$5", when_unknown = "max", events = "tokens_out",'
    ' rates = { tokens_in = "$0.15 / 1M", tokens_out = "$0.60 / 1M" } }'
)
_COSTS: Final = b"Farebox-Prefer: cost-events\r\n"


def streams(given: Run) -> None:
    """Time added to a stream that is paced as an API would, and to one as fast as it goes; and
    what the gateway's memory grows by while ten times as many events pass."""
    paced: dict[str, list[float]] = {"alone": [], "metered": [], "costs": []}
    rushed: dict[str, list[float]] = {"alone": [], "metered": []}
    grown = []
    for _ in range(given.rounds):
        with run.scratch() as folder:
            port = free_port()
            with run.server("events", port, "--port", str(port), core=LOAD_CORE):
                gateway = _gateway(folder, port)
                first, *signed = _signed(gateway)
                with run.server("through", gateway.port, "--config", str(gateway.config)) as pid:
                    _read(gateway.port, first)  # once unmeasured
                    before = _resident_kib(pid)
                    for kind, target in ((paced, b"?"), (rushed, b"?rush")):
                        kind["alone"].append(_read(port, _plain(port, target)))
                    paced["metered"].append(_read(gateway.port, signed[0]))
                    paced["costs"].append(_read(gateway.port, _asking(signed[1])))
                    rushed["metered"].append(_read(gateway.port, signed[2]))
                    for request in signed[3:]:
                        _read(gateway.port, request)
                    grown.append(_resident_kib(pid) - before)
            run.check_books(gateway.database)
    alone = statistics.median(paced["alone"])
    for name, figure in (("metered", "P-sse"), ("costs", "P-sse.costs")):
        added = 100 * (statistics.median(paced[name]) / alone - 1)
        given.put(figure, added, "% added", goal=5, most=True, alone_s=round(alone, 3))
    times = statistics.median(rushed["metered"]) / statistics.median(rushed["alone"])
    given.put("P-sse.rush", times, "x alone", alone_s=round(statistics.median(rushed["alone"]), 3))
    given.put("P-sse.memory", statistics.median(grown), "KiB", goal=2_048, most=True)


def _gateway(folder: Path, upstream_port: int) -> run.Gateway:
    gateway = run.gateway(folder, f"sqlite:///{folder}/bench.db", upstream_port, accounts=1)
    text = gateway.config.read_text()
    changed = re.sub(r'price = "[^"]+"', lambda _: f"price = {_METERED}", text)
    gateway.config.write_text(changed)
    return gateway


def _signed(gateway: run.Gateway) -> list[bytes]:
    paced = requests.signed(gateway.url, gateway.wallets, 3).split(b"\0")[:-1]
    rushed = requests.signed(gateway.url, gateway.wallets, 9, query="?rush").split(b"\0")[:-1]
    return [*paced, *rushed]


def _plain(port: int, target: bytes) -> bytes:
    request = requests.plain(f"http://127.0.0.1:{port}")
    return request.replace(b" HTTP/1.1", target + b" HTTP/1.1", 1)


def _asking(request: bytes) -> bytes:
    return request.replace(b"\r\nHost:", b"\r\n" + _COSTS + b"Host:", 1)


def _read(port: int, request: bytes) -> float:
    """How long a stream takes until its end, in seconds. Raises ``BenchFault`` if it has not all
    of its events."""
    with socket.create_connection(("127.0.0.1", port), timeout=120) as line:
        begun = time.perf_counter()
        line.sendall(request)
        seen, last = 0, b""
        while not last.endswith(b"0\r\n\r\n"):
            piece = line.recv(1 << 16)
            if not piece:
                raise BenchFault(f"the stream broke off after {seen} events: {last[-200:]!r}")
            both = last[-32:] + piece
            seen += both.count(b'{"choices"') - last[-32:].count(b'{"choices"')
            last = both
        took_s = time.perf_counter() - begun
    if seen != EVENTS:
        raise BenchFault(f"the stream had {seen} events: {last[-200:]!r}")
    return took_s


def _resident_kib(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(text.split("VmRSS:")[1].split()[0])
