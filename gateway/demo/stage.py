"""Everything the demo needs, started on loopback and taken down again, whatever happens.

Chain, sample API and local Stripe first, then the gateway: a real ``farebox serve`` with a file
of its own. The usual ports are taken when they are free, others when they are not. Starting a
process is one synchronous step, so that no cancellation can fall between a start and its note.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

import httpx

from anvil.devnet import Devnet, DevnetError, Options, devnet
from anvil.process import tied
from gateway.config import ConfigError, environ
from gateway.demo import mcp_server
from gateway.demo.fakestripe import FakeStripe
from gateway.demo.upstreams import SampleApi
from wallet_auth.keys import address_of, checksum, private_key

CHAIN_PORT: Final = 8545
GATEWAY_PORT: Final = 8402
ADMIN_PORT: Final = 8403
API_PORT: Final = 9000
MCP_PORT: Final = 9100
STRIPE_PORT: Final = 9200

CONFIG: Final = "farebox.toml"
DATABASE: Final = "farebox.db"
KEY: Final = "settler.key"
CHAT: Final = (
    '{ match = "POST /v1/chat/completions", description = "What you said, by the word",'
    ' price = { rule = "metered", max = "$0.05", when_unknown = "$0.01", events = "tokens_out",'
    ' rates = { tokens_in = "$0.40 / 1K", tokens_out = "$0.60 / 1K" } } }'
)
LOG: Final = "gateway.log"
CHAIN_STATE: Final = "chain.json"

START_S: Final = 30
STOP_S: Final = 10
_TRIES: Final = 3
_PORT_IN_USE: Final = 4  # of `farebox serve`: something it needs is not to be had
_LOG_LINES: Final = 12

T = TypeVar("T")
Tell = Callable[[str, str, float], None]
"""Told of each part that is up: its name, what a person should know, seconds it took."""


class StageError(Exception):
    """A part of the demo did not start. One line for a person."""


@dataclass(frozen=True, slots=True)
class Wallet:
    """A wallet made for this demo."""

    address: str  # lower case
    private_key: str = field(repr=False)

    @property
    def shown(self) -> str:
        """The address in its mixed-case form."""
        return checksum(self.address)


def new_wallet() -> Wallet:
    """A fresh wallet that nobody has ever used."""
    key = "0x" + secrets.token_hex(32)
    return Wallet(address_of(private_key(key)), key)


@dataclass(frozen=True, slots=True)
class Stage:
    """What is running, and where."""

    folder: Path
    chain: Devnet
    chain_version: str
    api: SampleApi
    mcp: SampleApi
    stripe: FakeStripe
    pay_to: str
    url: str  # of the gateway
    gateway: subprocess.Popen[bytes] = field(repr=False)

    def log_tail(self) -> list[str]:
        """The last lines the gateway wrote."""
        return log_tail(self.folder)


def log_tail(folder: Path) -> list[str]:
    """The last lines of the gateway's log in ``folder``."""
    try:
        text = (folder / LOG).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return text.splitlines()[-_LOG_LINES:]


@contextmanager
def folder_of(keep: Path | None) -> Iterator[Path]:
    """Where the demo's files go: a folder that vanishes at the end, or ``keep``.

    Raises ``ConfigError`` if ``keep`` cannot be used: a ledger belongs to one chain and address
    for ever, so the files of an earlier demo are not taken up again.
    """
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="farebox-demo-") as name:
            yield Path(name)
        return
    try:
        keep.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError([f"{keep}: no folder can be made there: {error.strerror}"]) from None
    there = [n for n in (CONFIG, DATABASE, KEY, LOG, CHAIN_STATE) if (keep / n).exists()]
    if there:
        raise ConfigError([f"{keep} holds {', '.join(there)} already: choose an empty folder"])
    yield keep.resolve()


@asynccontextmanager
async def running(folder: Path, *, keep: bool, tell: Tell) -> AsyncIterator[Stage]:
    """All parts for the length of an ``async with`` block.

    Raises ``DevnetError`` and ``StageError``.
    """
    async with AsyncExitStack() as parts:
        began_s = time.monotonic()
        chain = await _chain(parts, folder, keep=keep)
        version = str(chain.rpc("web3_clientVersion")).removeprefix("anvil/v")
        token = checksum(chain.usdc)
        what = f"Anvil {version}, {chain.rpc_url}, id {chain.chain_id}, USDC {brief(token)}"
        tell("chain", what, time.monotonic() - began_s)

        began_s = time.monotonic()
        api = _at(API_PORT, lambda port: SampleApi(port=port).start())
        parts.callback(api.stop)
        mcp = _at(MCP_PORT, lambda port: SampleApi(port=port, make=mcp_server.build).start())
        parts.callback(mcp.stop)
        stripe = _at(STRIPE_PORT, lambda port: FakeStripe(port=port).start())
        parts.callback(stripe.stop)
        what = f"sample weather API {api.url}, MCP server {mcp.url}, test Stripe {stripe.url}"
        tell("upstream", what, time.monotonic() - began_s)

        began_s = time.monotonic()
        settings = _Settings(folder, chain, api.url, mcp.url, stripe.url, new_wallet().address)
        _write(folder / KEY, chain.settler.private_key + "\n")
        url, gateway = await _gateway(parts, settings)
        await _connect_stripe(stripe.url, url, settings.webhook_secret)
        what = f"{url}, paid to {brief(checksum(settings.pay_to))}"
        tell("gateway", what, time.monotonic() - began_s)
        yield Stage(folder, chain, version, api, mcp, stripe, settings.pay_to, url, gateway)


def brief(text: str) -> str:
    """``0x15d34A…9aB2``: an address or a hash as people recognise it."""
    return f"{text[:6]}…{text[-4:]}"


# --- ports ----------------------------------------------------------------------------------


def port_or_free(port: int) -> int:
    """``port`` if nobody listens there now, else one that is free."""
    for wanted in (port, 0):
        try:
            with socket.create_server(("127.0.0.1", wanted)) as probe:
                found: int = probe.getsockname()[1]
                return found
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise StageError("no port of 127.0.0.1 is free")


def _at(port: int, start: Callable[[int], T]) -> T:
    """Start a server at its usual port, or at a free one."""
    try:
        return start(port)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return start(0)


async def _chain(parts: AsyncExitStack, folder: Path, *, keep: bool) -> Devnet:
    extra = ("--dump-state", str(folder / CHAIN_STATE)) if keep else ()
    try:
        return await parts.enter_async_context(devnet(CHAIN_PORT, Options(extra=extra)))
    except DevnetError as error:
        if "is in use" not in str(error):
            raise
        return await parts.enter_async_context(devnet(0, Options(extra=extra)))


# --- the gateway ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Settings:
    """What the gateway's file is made of."""

    folder: Path
    chain: Devnet
    api_url: str
    mcp_url: str
    stripe_url: str
    pay_to: str
    stripe_key: str = field(default_factory=lambda: f"sk_test_{secrets.token_hex(12)}", repr=False)
    webhook_secret: str = field(
        default_factory=lambda: f"whsec_{secrets.token_hex(16)}", repr=False
    )

    def text(self, port: int, admin_port: int) -> str:
        """``farebox.toml``, as a person would write it."""
        return f"""\
# Written by `farebox demo`: a local chain, no real money.

[server]
listen = "127.0.0.1:{port}"
public_url = "http://127.0.0.1:{port}"
admin_listen = "127.0.0.1:{admin_port}"
database = "sqlite:///{DATABASE}"
stop_s = 2

[credits]
per_usd = 100
packs = ["$1", "$5", "$20"]
min_onchain = "$0.01"

[chains.base-sepolia]
rpc = ["{self.chain.rpc_url}"]
pay_to = "{checksum(self.pay_to)}"
settler_key_file = "{KEY}"

[stripe]
secret_key = "{self.stripe_key}"
webhook_secret = "{self.webhook_secret}"
api_base = "{self.stripe_url}"

[upstreams.weather]
url = "{self.api_url}"
mount = "/"
routes = [
  {{ match = "GET /health", price = "free" }},
  {{ match = "GET /v1/forecast/*", price = "$0.002", description = "Three days of weather" }},
  {{ match = "POST /v1/render", price = "$0.01", description = "A text as a picture" }},
  {CHAT},
]

[upstreams.tools]
kind = "mcp"
url = "{self.mcp_url}/mcp"
mount = "/mcp"
tools = {{ search = "$0.005", "*" = "$0.001" }}
"""


def _write(path: Path, text: str) -> None:
    """A file only its owner can read: test keys, but a good example."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


def farebox(*arguments: str) -> list[str]:
    """The command line of ``farebox …`` under this Python, ended by the kernel if we die.

    ``-P``: what lies in the working folder is not imported.
    """
    return tied([sys.executable, "-P", "-m", "gateway.cli", *arguments])


def child_env() -> dict[str, str]:
    """Our environment without what would change the demo's own settings or leave loopback."""
    return {
        name: value
        for name, value in environ().items()
        if not name.startswith("FAREBOX_") and not name.lower().endswith("_proxy")
    }


async def _gateway(
    parts: AsyncExitStack, settings: _Settings
) -> tuple[str, subprocess.Popen[bytes]]:
    """Start the gateway. Somebody may take its port between our look and its start: again then."""
    wanted, admin = GATEWAY_PORT, ADMIN_PORT
    for _ in range(_TRIES):
        port, admin = port_or_free(wanted), port_or_free(admin)
        _write(settings.folder / CONFIG, settings.text(port, admin))
        child = _spawn(settings.folder)
        parts.callback(stop, child)
        url = f"http://127.0.0.1:{port}"
        try:
            async with asyncio.timeout(START_S):
                up = await _ready(child, url, settings.pay_to)
        except TimeoutError:
            raise StageError(f"the gateway was not ready within {START_S} s") from None
        if up:
            return url, child
        if child.returncode != _PORT_IN_USE:
            tail = "".join(f"\n  {line}" for line in log_tail(settings.folder))
            raise StageError(f"the gateway ended at once, status {child.returncode}:{tail}")
        wanted = admin = 0
    raise StageError(f"the gateway found no free port in {_TRIES} tries")


def _spawn(folder: Path) -> subprocess.Popen[bytes]:
    with (folder / LOG).open("ab") as log:
        # A session of its own: Ctrl-C in the terminal reaches us alone, and we stop the child.
        return subprocess.Popen(  # noqa: S603  (our own program, no shell)
            farebox("serve", "--config", CONFIG),
            cwd=folder,
            env=child_env(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


async def _ready(child: subprocess.Popen[bytes], url: str, pay_to: str) -> bool:
    """True once our gateway answers at ``url``; False if it ended.

    Another demo may have got the port first, so what answers must name our own address.
    """
    async with httpx.AsyncClient(trust_env=False, timeout=5) as http:
        while child.poll() is None:
            try:
                answer = await http.get(f"{url}/v1/forecast/oslo")
            except httpx.TransportError:
                await asyncio.sleep(0.02)
                continue
            if answer.status_code == 402 and pay_to in answer.text.lower():
                return True
            await asyncio.sleep(0.1)
    return False


def stop(child: subprocess.Popen[bytes]) -> None:
    """End a child, kill it if it stays. Blocks: it must run to its end also while cancelled."""
    child.terminate()
    try:
        child.wait(STOP_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


async def _connect_stripe(stripe: str, gateway: str, secret: str) -> None:
    """Tell the local Stripe where its messages go and how to sign them."""
    body = {"url": f"{gateway}/farebox/webhooks/stripe", "secret": secret}
    async with httpx.AsyncClient(trust_env=False, timeout=10) as http:
        (await http.post(f"{stripe}/_fake/webhooks", json=body)).raise_for_status()


async def ledger_verify(folder: Path) -> tuple[int, dict[str, object]]:
    """``farebox ledger verify`` on the demo's books: its exit code and what it said."""
    child = subprocess.Popen(  # noqa: S603, ASYNC220  (our own program; one step, nothing lost)
        farebox("ledger", "verify", "--config", CONFIG, "--json"),
        cwd=folder,
        env=child_env(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        said, _ = await asyncio.to_thread(child.communicate)
    finally:
        stop(child)
    try:
        found = json.loads(said)
    except ValueError:
        found = {"output": said.decode(errors="replace")[-2000:]}
    return child.returncode, found if isinstance(found, dict) else {"output": found}
