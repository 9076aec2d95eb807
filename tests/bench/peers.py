"""P-peer: P-spend against what else one could run, in the same run.

``x402-py``       the official Python x402 middleware (FastAPI) and facilitator, scheme exact.
``x402-express``  the official @x402/express middleware and facilitator, scheme exact.
``conventional``  prepaid credits in the conventional way: eth_account, Redis, async SQLAlchemy on
                  PostgreSQL (``sellers.py``).

The first two settle each request on a chain of their own, fresh each round, with the facilitator
inside the seller's process (one HTTP round trip less than usual). Their payments are signed before
the clock starts, as our requests are. coincurve is installed, so that eth_account is fast.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

from anvil.devnet import Devnet, running
from tests.bench import requests, run
from tests.bench.figures import ACCOUNTS, floor_round, spend_round
from tests.bench.report import Run, row
from tests.bench.run import LOAD_CORE, BenchFault, Load, median
from tests.e2e.wallet import decode
from tests.servers import free_port
from tests.soak.postgres import cluster

CLIENTS = Path(__file__).parent.parent / "clients" / "bench"
PAY_TO = "0x" + "22" * 20
PAID_PER_S = 400  # payments signed for a second of load
CREDITS_PER_S = 2_500


def peers(given: Run) -> None:
    """FLOOR, P-spend and every peer that is installed, in alternating rounds."""
    rounds: dict[str, Callable[[Path, int], Load]] = {
        "FLOOR": floor_round,
        "P-spend": spend_round,
        **_installed(),
    }
    found: dict[str, list[Load]] = {name: [] for name in rounds}
    for _ in range(given.rounds):
        for name, measure in rounds.items():
            with run.scratch() as folder:
                folder.chmod(0o711)
                found[name].append(measure(folder, given.seconds))
    ours, floor = median(found["P-spend"]), median(found["FLOOR"])
    goals = {"x402-py": 150.0, "x402-express": 80.0, "conventional": None}
    for name, goal in goals.items():
        if name in found:
            peer = median(found[name])
            given.put(
                f"P-peer.{name}",
                ours.per_s / peer.per_s,
                f"x {name}",
                goal=goal,
                spend=row(ours),
                peer=row(peer),
                floor=row(floor),
                compared=_versions(name),
            )
        else:
            print(json.dumps({"id": f"P-peer.{name}", "skipped": _missing(name)}), flush=True)


def _installed() -> dict[str, Callable[[Path, int], Load]]:
    found: dict[str, Callable[[Path, int], Load]] = {}
    if not _missing("x402-py"):
        found["x402-py"] = _x402_py
    if not _missing("x402-express"):
        found["x402-express"] = _x402_express
    if not _missing("conventional"):
        found["conventional"] = _conventional
    return found


def _missing(name: str) -> str:
    """Why a peer cannot be measured; "" if it can."""
    if name == "x402-py" and importlib.util.find_spec("fastapi") is None:
        return "fastapi is not installed: scripts/system.sh bench"
    if name == "x402-express" and not (CLIENTS / "node_modules" / "@x402" / "express").is_dir():
        return "@x402/express is not installed: scripts/install.sh test"
    if name == "conventional" and shutil.which("redis-server") is None:
        return "redis-server is not installed"
    return ""


def _versions(name: str) -> dict[str, str]:
    """Exactly what was compared with."""
    if name == "x402-express":
        lock = json.loads((CLIENTS / "package-lock.json").read_text())["packages"]
        names = ("@x402/express", "@x402/evm", "express", "viem")
        return {n: lock[f"node_modules/{n}"]["version"] for n in names}
    names = ("x402", "fastapi", "coincurve", "web3")
    if name == "conventional":
        names = ("eth-account", "coincurve", "redis", "sqlalchemy")
    return {n: version(n) for n in names}


# --- settled one by one ---------------------------------------------------------------------------


def _x402_py(folder: Path, seconds: int) -> Load:
    def server(port: int, net: Devnet) -> AbstractContextManager[int]:
        given = ("--port", str(port), "--rpc", net.rpc_url, "--pay-to", PAY_TO)
        key = net.settler.private_key
        return run.server("x402", port, *given, "--key", key, module="sellers")

    return _settling(folder, seconds, server)


def _x402_express(folder: Path, seconds: int) -> Load:
    node = shutil.which("node")
    if node is None:
        raise BenchFault("node is missing")

    def server(port: int, net: Devnet) -> AbstractContextManager[int]:
        script = str(CLIENTS / "seller.mjs")
        key = net.settler.private_key
        return run.process([node, script, str(port), net.rpc_url, key, PAY_TO], port)

    return _settling(folder, seconds, server)


def _settling(
    folder: Path, seconds: int, server: Callable[[int, Devnet], AbstractContextManager[int]]
) -> Load:
    """Payments against a seller on a fresh chain: a chain slows down with its blocks."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with running() as net, server(port, net) as pid:
        offer = _offer(url)
        file = requests.write(
            folder / "paid.bin", requests.paid(url, net.accounts, offer, PAID_PER_S * seconds)
        )
        before = net.balance_units(PAY_TO)
        found = run.load(url, file, pid, seconds=seconds, once=True)
        settled = (net.balance_units(PAY_TO) - before) // int(offer["amount"])
    if settled < found.per_s * seconds * 0.9:
        raise BenchFault(f"answered {found.per_s * seconds:.0f}, settled {settled}")
    return found


def _offer(url: str) -> dict[str, Any]:
    asked = httpx.post(
        url + requests.PATH,
        content=requests.BODY,
        headers={"Content-Type": "application/json"},
        timeout=30,
        trust_env=False,
    )
    if asked.status_code != 402:
        raise BenchFault(f"the peer answered {asked.status_code}: {asked.text[:500]}")
    offer: dict[str, Any] = decode(asked.headers["payment-required"])["accepts"][0]
    return offer


# --- credits, conventionally ----------------------------------------------------------------------


def _conventional(folder: Path, seconds: int) -> Load:
    port, redis_port = free_port(), free_port()
    url, redis = f"http://127.0.0.1:{port}", f"redis://127.0.0.1:{redis_port}"
    settings = (
        "--port",
        str(redis_port),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--dir",
        str(folder),
    )
    wallets = requests.new_wallets(ACCOUNTS)
    with (
        run.process(["redis-server", *settings], redis_port, LOAD_CORE, web=False),
        cluster(run.prefix(LOAD_CORE), folder) as database,
        run.server(
            "conventional",
            port,
            *("--port", str(port), "--database", database.url, "--redis", redis),
            module="sellers",
        ) as pid,
    ):
        addresses = [requests.address_of(each) for each in wallets]
        funded = httpx.post(f"{url}/fund", json=addresses, timeout=60, trust_env=False)
        funded.raise_for_status()
        personal = requests.personal(url, wallets, CREDITS_PER_S * seconds)
        file = requests.write(folder / "personal.bin", personal)
        return run.load(url, file, pid, seconds=seconds, once=True)
