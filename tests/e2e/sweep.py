"""The crash sweep: a gateway is killed at every message it exchanges with what it depends on.

A ``Tap`` stands in front of a dependency (the chain's node, PostgreSQL) and counts what the gateway
sends there. At message ``k`` the gateway gets SIGKILL, before the message reaches the other side or
after the other side has answered and before the gateway hears of it. Then it is started again, and
whoever paid asks again until there is an answer. One payment must be one mint, always.

The same for SQLite, whose boundaries are system calls: strace kills the gateway at its k-th write
or fsync.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from tests.e2e.stage import Background, Gateway, transfers_to
from tests.e2e.wallet import Wallet, code_of, new_wallet, offers

PURCHASE = "/farebox/v1/credits/purchase"
BODY = json.dumps({"amount_usd": "1"}).encode()
BEFORE, AFTER = "before", "after"
CONVERGE_S = 60
MOST_POINTS = 400


class Tap:
    """A line to a dependency that counts what passes, and kills at one message.

    A message is what the gateway sends until the other side has answered: an HTTP request to a
    node, a round trip with PostgreSQL.
    """

    def __init__(self, background: Background, url: str) -> None:
        parts = urlsplit(url)
        self._background = background
        self._target = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._lines: set[asyncio.StreamWriter] = set()
        self._kill: Callable[[], None] = lambda: None
        self._at: tuple[int, str] | None = None
        self.passed = 0
        self.fired = False
        self._server = background.run(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    def arm(self, at: int, side: str, kill: Callable[[], None]) -> None:
        """Count from 1 again; at message ``at``, on that side of it, call ``kill``. 0: never."""
        self.passed, self.fired = 0, False
        self._at, self._kill = (at, side) if at else None, kill

    def disarm(self) -> None:
        self._at = None

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._lines.add(writer)
        try:
            await self._serve(reader, writer)
        except ConnectionError:
            pass  # one of the two ends was killed
        finally:
            self._lines.discard(writer)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        asking = asyncio.Event()  # a message is on its way and has not been answered
        dying = False

        async def down() -> None:
            while data := await far_reader.read(1 << 20):
                if dying:
                    continue  # the other side did it, and nobody hears of it
                asking.clear()
                writer.write(data)
                await writer.drain()
            writer.close()

        pump = asyncio.create_task(down())
        try:
            while data := await reader.read(1 << 20):
                if not asking.is_set():
                    asking.set()
                    self.passed += 1
                    if not self.fired and self._at in (
                        (self.passed, BEFORE),
                        (self.passed, AFTER),
                    ):
                        self.fired = dying = True
                        if self._at == (self.passed, AFTER):
                            far_writer.write(data)
                            await far_writer.drain()
                            await asyncio.sleep(0.15)  # the other side gets it done
                        self._kill()
                        return
                far_writer.write(data)
                await far_writer.drain()
        finally:
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)
            far_writer.transport.abort()

    def close(self) -> None:
        async def close() -> None:
            self._server.close()
            for line in list(self._lines):
                line.transport.abort()
            while self._lines:
                await asyncio.sleep(0.01)

        self._background.run(close())


class Strace:
    """Kills a gateway at its n-th write or fsync, counted from now."""

    def __init__(self, pid: int, at: int) -> None:
        calls = "pwrite64,fdatasync,fsync"
        self._process = subprocess.Popen(
            [
                *("strace", "-f", "-q", "-o", "/dev/null", "-p", str(pid)),
                *("-e", f"trace={calls}", "-e", f"inject={calls}:signal=SIGKILL:when={at}"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        status = Path(f"/proc/{pid}/status")
        end_s = time.monotonic() + 10
        while "TracerPid:\t0" in status.read_text():
            assert time.monotonic() < end_s and self._process.poll() is None, "strace cannot attach"
            time.sleep(0.01)

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        self._process.wait(10)


@dataclass(frozen=True, slots=True)
class Paying:
    """A request that pays, as bytes that can be sent any number of times."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes | None

    async def send(self, gateway: Gateway) -> httpx.Response:
        async with gateway.client() as http:
            return await http.request(
                self.method, self.path, headers=self.headers, content=self.body
            )


Flow = Callable[[Gateway, Wallet], Awaitable[Paying]]


async def purchase(gateway: Gateway, wallet: Wallet) -> Paying:
    """A pack, over x402 (EIP-3009)."""
    async with gateway.client() as http:
        offer = offers(await http.post(PURCHASE, content=BODY))[0]
    return Paying("POST", PURCHASE, {"PAYMENT-SIGNATURE": wallet.pay(offer)}, BODY)


async def call(gateway: Gateway, wallet: Wallet) -> Paying:
    """A call that is paid for with it: what it leaves stays as credits."""
    path = f"/v1/{secrets.token_hex(8)}"
    async with gateway.client() as http:
        offer = offers(await http.get(path))[0]
    return Paying("GET", path, {"PAYMENT-SIGNATURE": wallet.pay(offer)}, None)


FLOWS: dict[str, Flow] = {"purchase": purchase, "call": call}


@dataclass(slots=True)
class Swept:
    """What a sweep found. ``faults`` must be empty."""

    name: str
    kills: int = 0
    recovery_s: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def line(self) -> str:
        slow = sorted(self.recovery_s) or [0.0]
        figures = {
            "sweep": self.name,
            "points": self.kills,
            "recovery_p50_s": round(slow[len(slow) // 2], 1),
            "recovery_p95_s": round(slow[min(int(len(slow) * 0.95), len(slow) - 1)], 1),
            "recovery_max_s": round(slow[-1], 1),
            "faults": self.faults,
        }
        return json.dumps(figures)

    def check(self) -> None:
        """Say what was found; fail if it is not what was promised."""
        sys.stderr.write(self.line() + "\n")
        assert self.kills > 0
        assert self.faults == []


Arm = Callable[[Gateway, int], tuple[Callable[[], bool], Callable[[], None]]]
"""Sets a gateway up to be killed at a point: gives whether it was, and what ends the set-up."""


def tapped(tap: Tap, side: str) -> Arm:
    """At a message of this line, on this side of it."""

    def arm(gateway: Gateway, at: int) -> tuple[Callable[[], bool], Callable[[], None]]:
        assert gateway.process is not None
        process = gateway.process
        tap.arm(at, side, lambda: process.signal(signal.SIGKILL))
        return (lambda: tap.fired), tap.disarm

    return arm


def straced(gateway: Gateway, at: int) -> tuple[Callable[[], bool], Callable[[], None]]:
    """At a system call that writes."""
    assert gateway.process is not None
    process = gateway.process
    strace = Strace(process.pid, at)
    return (lambda: not process.running), strace.end


async def sweep(gateway: Gateway, flow: Flow, arm: Arm, found: Swept, every: int = 1) -> None:
    """Walk through the points of a flow, each ``every``-th, until one lies behind its end.

    ``gateway`` runs, and runs at the end.
    """
    for point in range(1, MOST_POINTS + 1, every):
        wallet = await asyncio.to_thread(new_wallet, gateway.net)
        paying = await flow(gateway, wallet)
        killed, end = await asyncio.to_thread(arm, gateway, point)
        try:
            with contextlib.suppress(httpx.TransportError):
                await paying.send(gateway)
        finally:
            await asyncio.to_thread(end)
        if not killed():
            return
        assert gateway.process is not None
        await asyncio.to_thread(gateway.process.wait_end, 10)
        found.kills += 1
        await _recover(gateway, wallet, paying, found, f"{found.name} at {point}")
    raise AssertionError(f"a flow of more than {MOST_POINTS} points")


async def _recover(
    gateway: Gateway, wallet: Wallet, paying: Paying, found: Swept, where: str
) -> None:
    """Start again; the payer asks until it is told. One payment is one mint."""
    gateway.start()  # in this thread: a child is ended with the thread that made it
    began_s = time.monotonic()
    answer = await paying.send(gateway)
    while answer.status_code != 200 and time.monotonic() < began_s + CONVERGE_S:
        if code_of(answer) == "outcome_unknown":
            break  # a call whose gateway died is not run again: its money is there as credits
        if answer.status_code == 402 and "payment-required" in answer.headers:
            break  # never: it would be told to pay again
        await asyncio.sleep(0.1)
        answer = await paying.send(gateway)
    found.recovery_s.append(time.monotonic() - began_s)
    mints = [each[1] for each in gateway.transfers(wallet.address) if each[0] == "mint"]
    moved = [int(each["data"], 16) for each in paid_by(gateway, wallet)]
    told = answer.status_code == 200 or code_of(answer) == "outcome_unknown"
    if not told or len(mints) != 1 or mints != moved:
        found.faults.append(f"{where}: {answer.status_code} {answer.text[:200]}; {mints}, {moved}")


def paid_by(gateway: Gateway, wallet: Wallet) -> list[dict[str, Any]]:
    """What this wallet has moved to the gateway on chain."""
    return [
        each
        for each in transfers_to(gateway.net, gateway.pay_to)
        if each["topics"][1].endswith(wallet.address[2:])
    ]
