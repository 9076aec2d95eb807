"""One soak on one database: set up, load and faults, recovery, judgement."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp

from anvil.devnet import Devnet, running
from gateway.db import Database
from tests import servers
from tests.e2e.stage import Gateway
from tests.e2e.wallet import Wallet, new_wallet
from tests.soak import chaos, clients, upstream
from tests.soak.postgres import Cluster, cluster
from tests.soak.promises import Broken, Ended, Facts, broken, charges, uncharged

ROOT = Path(__file__).parent.parent.parent
WALLET_UNITS = 50_000_000_000
RECOVERY_S = 60  # everything has ended by then, without a human
RECOVERY_SLOW_S = 180  # for how long it is looked at before it is called lost
PAGE = 20_000
ROUTES = """[
  { match = "GET /stall/*", price = "$0.01", timeout_s = 1 },
  { match = "GET /long/*", price = "$0.01", timeout_s = 20 },
  { match = "GET /cheap/*", price = "$0.002", timeout_s = 20 },
  { match = "POST /cheap/*", price = "$0.002", timeout_s = 20 },
  { match = "GET /*", price = "$0.01", timeout_s = 20 },
  { match = "POST /*", price = "$0.01", timeout_s = 20 },
]"""


@dataclass(frozen=True, slots=True)
class Plan:
    """One soak. The same seed makes the same choices; what the machine does between is its own."""

    dialect: str  # "sqlite" or "postgres"
    seed: str
    seconds: float
    clients: int = 32
    wallets: int = 16
    workers: int = 1
    kill_every_s: float = 5
    stop_every_s: float = 20
    pause_s: float = 0.1  # the longest a client waits between two requests
    lease_s: int = 2

    @property
    def nodes(self) -> int:
        return 2 if self.dialect == "postgres" else 1


@dataclass(frozen=True, slots=True)
class Report:
    """What a soak found."""

    plan: Plan
    broken: Sequence[Broken]
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Parts:
    """What the gateways stand on."""

    net: Devnet
    postgres: Cluster | None
    upstream_url: str
    redis_url: str


def soak(plan: Plan) -> Report:
    """Run it to its end. Leaves nothing behind."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="farebox-soak-")))
        net = stack.enter_context(running())
        postgres = stack.enter_context(cluster()) if plan.dialect == "postgres" else None
        record = folder / "upstream.record"
        record.touch()
        port = servers.free_port()
        up = servers.Process(
            servers.own_program(
                [
                    *("python", "-m", "tests.soak.upstream", "--port", str(port)),
                    *("--record", str(record), "--seed", plan.seed),
                ]
            ),
            folder,
            servers.child_env({"PYTHONPATH": str(ROOT)}),
        )
        stack.callback(up.kill)
        up.wait_port(port)
        parts = Parts(net, postgres, f"http://127.0.0.1:{port}", "")
        if plan.workers > 1:
            parts = replace(parts, redis_url=_redis(folder, stack))
        gateways = _gateways(plan, folder, parts)
        for gateway in gateways:
            stack.callback(_end, gateway)
        return asyncio.run(_soak(plan, net, postgres, gateways, record))


def _end(gateway: Gateway) -> None:
    if gateway.process is not None:
        gateway.process.kill()


def _redis(folder: Path, stack: contextlib.ExitStack) -> str:
    """Several processes of a node count their rate limits together."""
    port = servers.free_port()
    options = ("--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder))
    redis = servers.Process(["redis-server", *options], folder, servers.child_env())
    stack.callback(redis.kill)
    redis.wait_port(port)
    return f"redis://127.0.0.1:{port}/0"


def _gateways(plan: Plan, folder: Path, parts: Parts) -> list[Gateway]:
    """Nodes that share a database, a receiving address, a gas account and an origin."""
    postgres, net = parts.postgres, parts.net
    database = postgres.url if postgres is not None else f"sqlite:///{folder / 'farebox.db'}"
    server: dict[str, Any] = {"hold_lease_s": plan.lease_s, "settle_wait_s": 3}
    server["uncharged_per_min"] = 1_000_000  # the upstream fails on purpose
    if plan.workers > 1:
        server |= {"workers": plan.workers, "redis": parts.redis_url}
    made: list[Gateway] = []
    for n in range(plan.nodes):
        own = folder / f"node-{n}"
        own.mkdir()
        shared: dict[str, Any] = {}
        if made:
            shared = {"pay_to": made[0].pay_to, "settler": made[0].settler}
        gateway = Gateway(
            own, database, net, net.rpc_url, parts.upstream_url, server, ROUTES, **shared
        )
        gateway.server["public_url"] = made[0].url if made else gateway.url
        made.append(gateway)
    return made


async def _soak(
    plan: Plan, net: Devnet, postgres: Cluster | None, gateways: list[Gateway], record: Path
) -> Report:
    faults = chaos.Faults()
    for gateway in gateways:
        await chaos.start(gateway)
    wallets = [new_wallet(net, WALLET_UNITS) for _ in range(plan.wallets)]
    # From here on a block a second, as on a real chain: payments are in flight when kills come.
    net.rpc("evm_setIntervalMining", 1)
    notes = clients.Notes()
    began_s = time.monotonic()
    await _load(plan, gateways, postgres, wallets, notes, faults)
    load_s = time.monotonic() - began_s
    began_s = time.monotonic()
    unfinished = await _recover(gateways[0])
    recovery_s = time.monotonic() - began_s
    if not unfinished and recovery_s > RECOVERY_S:
        unfinished = [f"it took {recovery_s:.0f} s, more than {RECOVERY_S}"]
    facts = await _facts(gateways, notes, faults, record, unfinished)
    return Report(
        plan,
        broken(facts),
        {
            **_figures(facts, notes, faults),
            "load_s": round(load_s, 1),
            "recovery_s": round(recovery_s, 1),
            "audit_s": round(time.monotonic() - began_s - recovery_s, 1),
        },
    )


async def _load(  # noqa: PLR0917  (one caller)
    plan: Plan,
    gateways: Sequence[Gateway],
    postgres: Cluster | None,
    wallets: Sequence[Wallet],
    notes: clients.Notes,
    faults: chaos.Faults,
) -> None:
    """Clients and faults side by side, until every fault is repaired. Raises ``NotReady``."""
    rng = random.Random(f"{plan.seed}:chaos")
    over = asyncio.Event()
    async with _session() as http:
        urls = [gateway.url for gateway in gateways]
        world = clients.World(urls, urls[0], http, over, plan.pause_s)
        customers = [
            clients.Client(world, wallets[n % len(wallets)], f"c{n}", plan.seed, notes)
            for n in range(plan.clients)
        ]
        working = asyncio.gather(*(each.run() for each in customers))
        end_s = time.monotonic() + plan.seconds
        try:
            trouble = [chaos.kill_gateways(gateways, rng, plan.kill_every_s, end_s, faults)]
            if postgres is not None:
                trouble.append(chaos.stop_postgres(postgres, rng, plan.stop_every_s, end_s, faults))
            await asyncio.gather(*trouble)
            await chaos.kill_all(gateways, over, faults)
            await working
        finally:
            over.set()
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)


@contextlib.asynccontextmanager
async def _session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=clients.ANSWER_S),
    ) as http:
        yield http


# --- afterwards -----------------------------------------------------------------------------------

_OPEN = (
    "SELECT h.request_id FROM hold h LEFT JOIN transfer t ON t.id = h.id"
    " WHERE t.id IS NULL LIMIT 20"
)
_PENDING = "SELECT id FROM payment WHERE state IN ('created', 'processing') LIMIT 20"


async def _recover(gateway: Gateway) -> list[str]:
    """Wait until every hold and every payment has ended; what has not, if some do not."""
    end_s = time.monotonic() + RECOVERY_SLOW_S
    while True:
        left = [f"hold {r['request_id']}" for r in await _rows(gateway, _OPEN)]
        left += [f"payment {r['id']}" for r in await _rows(gateway, _PENDING)]
        if not left or time.monotonic() > end_s:
            return left
        await asyncio.sleep(0.5)


async def _rows(gateway: Gateway, sql: str, *params: Any) -> list[dict[str, Any]]:
    db = await Database.connect(gateway.database)
    try:
        async with db.read() as tx:
            return [dict(row) for row in await tx.fetch(sql, *params)]
    finally:
        await db.close()


async def _facts(
    gateways: Sequence[Gateway],
    notes: clients.Notes,
    faults: chaos.Faults,
    record: Path,
    unfinished: list[str],
) -> Facts:
    first = gateways[0]
    ledger = await _ledger(first)
    lots: dict[str, list[int]] = {}
    for row in await _rows(
        first, "SELECT payment_id, minted_units FROM lot WHERE source = 'x402' ORDER BY id"
    ):
        lots.setdefault(row["payment_id"], []).append(row["minted_units"])
    said = [*faults.said, *(gateway.log for gateway in gateways)]
    surprises = [*notes.faults, *_surprises(said)]
    for gateway in gateways:
        try:
            gateway.stop()
        except AssertionError as error:
            surprises.append(f"{gateway.url} was told to stop: {error}")
    begun, done = upstream.counts(record)
    return Facts(
        begun=begun,
        done=done,
        told=notes.told,
        bought=notes.bought,
        ledger=ledger,
        lots=lots,
        on_chain_units=first.received(),
        audits=_verify(first),
        unfinished=unfinished,
        faults=surprises,
    )


async def _ledger(gateway: Gateway) -> dict[str, list[Ended]]:
    """Every hold by request id, in pages: there may be a million."""
    found: dict[str, list[Ended]] = {}
    after = 0
    while True:
        rows = await _rows(
            gateway,
            "SELECT h.id, h.request_id, t.kind, t.amount_units, t.reason FROM hold h"
            f" LEFT JOIN transfer t ON t.id = h.id WHERE h.id > $1 ORDER BY h.id LIMIT {PAGE}",
            after,
        )
        for row in rows:
            ended = Ended(row["kind"] or "", row["amount_units"] or 0, row["reason"] or "")
            found.setdefault(row["request_id"], []).append(ended)
        if len(rows) < PAGE:
            return found
        after = rows[-1]["id"]


def _surprises(logs: Sequence[str]) -> Iterator[str]:
    """Log lines of a fault that has no name."""
    for log in logs:
        for line in log.splitlines():
            if "unexpected error" in line or "failed; it is tried again" in line:
                yield line[:300]


def _verify(gateway: Gateway) -> dict[str, object]:
    """``farebox ledger verify``, as an operator would run it."""
    told = subprocess.run(
        servers.own_program(
            ["farebox", "ledger", "verify", "--json", "--config", str(gateway.config)]
        ),
        capture_output=True,
        text=True,
        env=servers.child_env(),
        check=False,
    )
    try:
        said = json.loads(told.stdout)
    except ValueError:
        return {"it did not run": told.stderr[-1000:]}
    found: dict[str, object] = dict(said["broken"])
    if not found and (told.returncode != 0 or said["ok"] is not True):
        found["exit code"] = told.returncode
    return found


def _figures(facts: Facts, notes: clients.Notes, faults: chaos.Faults) -> dict[str, Any]:
    """What a person wants to see beside the promises."""
    outside = [each for each in notes.tries if not _inside(each, faults.windows)]
    answered = sum(each.answered for each in outside)
    return {
        "requests": len(notes.tries),
        "operations": dict(sorted(notes.kinds.items())),
        "kills": faults.kills,
        "postgres_stops": faults.stops,
        "upstream_begun": len(facts.begun),
        "upstream_done": len(facts.done),
        "charges": len(charges(facts)),
        "uncharged": uncharged(facts),
        "answers_whole": len(facts.told),
        "replays": sum(each.replayed for each in facts.told),
        "purchases_minted": len(facts.lots),
        "minted_units": sum(sum(units) for units in facts.lots.values()),
        "availability_requests": len(outside),
        "availability": round(answered / len(outside), 5) if outside else None,
    }


def _inside(each: clients.Try, windows: Sequence[chaos.Window]) -> bool:
    return any(
        window.node in (None, each.node)
        and each.began_s < window.ended_s
        and each.ended_s > window.began_s
        for window in windows
    )


def tell(report: Report) -> None:
    """One line of figures, and one a broken promise."""
    ok = not report.broken
    line = {"soak": report.plan.dialect, "seed": report.plan.seed, "ok": ok, **report.figures}
    print(json.dumps(line), flush=True)
    for each in report.broken:
        print(f"BROKEN {report.plan.dialect} (seed {report.plan.seed}): {each}", file=sys.stderr)
