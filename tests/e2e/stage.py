"""A whole deployment for one test: chain, upstream, database and the real ``farebox serve``.

The gateway is a process of its own, started from a configuration file as an operator would. The
upstream and the node in front of the chain run in a thread, so that tests may block.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

import httpx

from anvil.devnet import Account, Devnet
from gateway import config, hands
from gateway.check import judge
from gateway.db import Database
from gateway.settings import Settings
from tests import servers
from tests.gateway.proxy import misbehave
from tests.gateway.proxy.misbehave import Request, Upstream, Writer

T = TypeVar("T")
CHEAP_UNITS = 2_000
PRICE_UNITS = 10_000


class Background:
    """An event loop in a thread, for the servers that a test plays against."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._stack = AsyncExitStack()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there to its end."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def enter(self, context: Any) -> Any:
        """Enter an asynchronous context manager, until ``close``."""
        return self.run(self._stack.enter_async_context(context))

    def set(self, event: asyncio.Event) -> None:
        """Set an event of that loop from here."""
        self.loop.call_soon_threadsafe(event.set)

    def close(self) -> None:
        self.run(self._stack.aclose())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


class Api:
    """The upstream: what it was asked, and how it behaves on a path (tests/…/misbehave.py)."""

    def __init__(self, background: Background) -> None:
        self._background = background
        self._up: Upstream = background.enter(misbehave.misbehaving())
        self.url = self._up.url

    def seen(self, target: str) -> list[Request]:
        """The requests that arrived whole for this very target."""
        return [r for r in self._up.requests if r.target == target.encode()]

    def calls(self, target: str) -> int:
        return len(self.seen(target))

    def begun(self) -> int:
        """Heads read so far, of all targets."""
        return self._up.begun

    def faults(self) -> list[Exception]:
        """What went wrong in behaviours since this was asked last."""
        found, self._up.faults[:] = list(self._up.faults), []
        return found

    def behave(self, path: str, behaviour: Callable[[Writer, Gate], Awaitable[bool]]) -> Gate:
        """Answer a path of the test's own in its own way; the gate is the test's to open."""
        gate = Gate(self._background)

        async def run(_up: Upstream, _request: Request, writer: Writer) -> bool:
            gate.arrived += 1
            return await behaviour(writer, gate)

        misbehave.BEHAVIOURS[path.encode()] = run
        return gate


class Gate:
    """Holds a call of the upstream until the test opens it."""

    def __init__(self, background: Background) -> None:
        self._background = background
        self.arrived = 0
        self.opened = False
        self._event = asyncio.Event()

    async def wait(self) -> None:
        await self._event.wait()

    def open(self) -> None:
        self.opened = True
        self._background.set(self._event)


async def answer_when_open(writer: Writer, gate: Gate) -> bool:
    """A behaviour: an ordinary answer, once the gate is open."""
    await gate.wait()
    writer.write(misbehave.answer(b"late but whole"))
    return True


ROUTES = """[
  { match = "GET /free/*", price = "free" },
  { match = "POST /free/*", price = "free" },
  { match = "GET /stall", price = "$0.01", timeout_s = 1 },
  { match = "GET /stall-mid", price = "$0.01", timeout_s = 1 },
  { match = "GET /drip", price = "$0.01", timeout_s = 1 },
  { match = "GET /cheap/*", price = "$0.002" },
  { match = "POST /cheap/*", price = "$0.002" },
  { match = "GET /*", price = "$0.01" },
  { match = "POST /*", price = "$0.01" },
]"""


class Gateway:
    """``farebox serve`` as a process, and a look into its books."""

    def __init__(  # noqa: PLR0917  (a deployment has that many parts)
        self,
        folder: Path,
        database: str,
        net: Devnet,
        rpc_url: str,
        upstream_url: str,
        server: Mapping[str, Any] | None = None,
        routes: str = ROUTES,
        pay_to: str = "",
        settler: Account | None = None,
        port: int = 0,
    ) -> None:
        self.folder = folder
        self.database = database
        self.net = net
        self.rpc_url = rpc_url
        self.upstream_url = upstream_url
        self.server = dict(server or {})
        self.routes = routes
        self.chain_extra = ""
        # Where ``rows`` looks into them, if not over the gateway's own line.
        self.books = ""
        # Addresses of its own: what moves there came through this deployment.
        self.pay_to = pay_to or "0x" + secrets.token_hex(20)
        self.settler = settler or new_account()
        net.rpc("anvil_setBalance", self.settler.address, hex(10**18))
        self.port = port or servers.free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: servers.Process | None = None

    @property
    def config(self) -> Path:
        return self.folder / "farebox.toml"

    def write_config(self) -> None:
        """The configuration file, as it is described now."""
        (self.folder / "settler.key").write_text(self.settler.private_key)
        server = {
            "listen": f"127.0.0.1:{self.port}",
            "admin_listen": "",
            "database": self.database,
            "sweep_s": 1,
            "settle_wait_s": 20,
            **self.server,
        }
        lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in server.items())
        self.config.write_text(
            f"""[server]
{lines}

[chains.base-sepolia]
rpc = ["{self.rpc_url}"]
pay_to = "{self.pay_to}"
settler_key_file = "settler.key"
rpc_timeout_s = 10
{self.chain_extra}

[upstreams.api]
url = "{self.upstream_url}"
routes = {self.routes}
"""
        )

    def spawn(self) -> servers.Process:
        """Start the process without waiting for it."""
        self.write_config()
        self.process = servers.Process(
            servers.own_program(["farebox", "serve", "--config", str(self.config), "--json"]),
            self.folder,
            servers.child_env(),
        )
        return self.process

    def start(self) -> Gateway:
        """Start it and return when it says that it is ready."""
        self.spawn().wait_for(r'"ready": true')
        return self

    def kill(self) -> None:
        """The end without warning: SIGKILL."""
        assert self.process is not None
        self.process.signal(signal.SIGKILL)
        self.process.wait_end(10)

    def stop(self) -> None:
        """SIGTERM, if it runs; an exit code other than 0 is a failure."""
        if self.process is not None and self.process.running:
            code = self.process.stop()
            assert code == 0, (code, self.process.text[-2000:])

    def memory_kib(self, what: str = "VmRSS") -> int:
        """Memory of the process now; ``VmHWM``: the most it ever had."""
        assert self.process is not None
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(what)).split()[1])

    def unnamed_files(self) -> int:
        """Open files that stand in no folder."""
        assert self.process is not None
        files = 0
        for entry in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                files += str(entry.readlink()).endswith("(deleted)")
        return files

    @property
    def log(self) -> str:
        assert self.process is not None
        return self.process.text

    def client(self, **options: Any) -> httpx.AsyncClient:
        """An HTTP client with room for many calls at once."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx.AsyncClient(
            base_url=self.url, timeout=30, limits=limits, trust_env=False, **options
        )

    # -- the books -------------------------------------------------------------------------------

    def settings(self) -> Settings:
        return config.load(self.config, judge=judge, env={})

    def broken(self) -> dict[str, Any]:
        """What ``farebox ledger verify`` finds; empty if the books are in order."""
        with ThreadPoolExecutor(1) as pool:  # it brings a loop of its own
            return pool.submit(hands.verify, self.settings()).result()

    def freeze(self, wallet: str) -> None:
        """``farebox account freeze``, beside the running gateway."""
        with ThreadPoolExecutor(1) as pool:  # as above
            pool.submit(hands.freeze, self.settings(), wallet, frozen=True, why="a test").result()

    def rows(self, sql: str, *params: Any) -> list[dict[str, Any]]:
        """Look into the database."""

        async def read() -> list[dict[str, Any]]:
            db = await Database.connect(self.books or self.settings().server.database)
            try:
                async with db.read() as tx:
                    return [dict(row) for row in await tx.fetch(sql, *params)]
            finally:
                await db.close()

        return servers.in_thread(read())

    def change(self, sql: str, *params: Any) -> None:
        """Change the database by hand: what only a fault could do."""

        async def write() -> None:
            db = await Database.connect(self.settings().server.database)
            try:
                async with db.write() as tx:
                    assert await tx.execute(sql, *params), f"nothing was changed by {sql}"
            finally:
                await db.close()

        servers.in_thread(write())

    def payments(self, payer: str) -> list[dict[str, Any]]:
        return self.rows("SELECT * FROM payment WHERE payer = $1 ORDER BY created_at_ms", payer)

    def transfers(self, wallet: str) -> list[tuple[str, int, str | None]]:
        """Every entry of a wallet's account, oldest first: kind, units, reason."""
        rows = self.rows(
            "SELECT t.kind, t.amount_units, t.reason FROM transfer t JOIN wallet w"
            " ON w.account_id = t.account_id WHERE w.address = $1 ORDER BY t.seq",
            wallet,
        )
        return [(r["kind"], r["amount_units"], r["reason"]) for r in rows]

    def balance(self, wallet: str) -> tuple[int, int]:
        """Units available and held."""
        rows = self.rows(
            "SELECT a.available, a.held FROM account a JOIN wallet w ON w.account_id = a.id"
            " WHERE w.address = $1",
            wallet,
        )
        return (rows[0]["available"], rows[0]["held"]) if rows else (0, 0)

    # -- the chain -------------------------------------------------------------------------------

    def received(self) -> int:
        """USDC that lies at ``pay_to``, in units."""
        return self.net.balance_units(self.pay_to)

    def sent(self) -> int:
        """Transactions of the settler that the chain has counted, those in its pool included."""
        count: str = self.net.rpc("eth_getTransactionCount", self.settler.address, "pending")
        return int(count, 16)

    def wait(self, condition: Callable[[], T], what: str, timeout_s: float = 60) -> T:
        """Poll until it is true, while the gateway lives."""
        process = self.process
        assert process is not None
        end = time.monotonic() + timeout_s
        while not (value := condition()):
            assert process.running, self.log[-3000:]
            assert time.monotonic() < end, f"waited in vain for {what}:\n{self.log[-3000:]}"
            time.sleep(0.05)
        return value


def new_account() -> Account:
    """A key that nobody else uses."""
    from eth_account import Account as Maker

    made = Maker.from_key(secrets.token_bytes(32))
    return Account(made.address.lower(), "0x" + made.key.hex().removeprefix("0x"), 0)


def transfers_to(net: Devnet, pay_to: str) -> Sequence[dict[str, Any]]:
    """Every USDC Transfer to an address since the chain began."""
    topics = [
        "0xddf252ad1be2c89b69c2b068fc378daa952ba7f163c4a11628f55a4df523b3ef",
        None,
        "0x" + pay_to[2:].rjust(64, "0"),
    ]
    logs: Sequence[dict[str, Any]] = net.rpc(
        "eth_getLogs", {"address": net.usdc, "topics": topics, "fromBlock": "0x0"}
    )
    return logs
