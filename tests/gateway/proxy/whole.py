"""A whole gateway in this process, in front of the misbehaving upstream, and a wallet with credits.

For what hangs on the order of events: both ends of every connection are on the test's own loop,
and a limit can be set to nothing. No chain answers, so nothing can be bought.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from gateway import ledger
from gateway.accounts import wallets
from gateway.app import build, close_node, open_node
from gateway.ledger import read
from gateway.node import Node
from tests.e2e.stage import new_account
from tests.e2e.wallet import Wallet
from tests.gateway.payments.parts import settings_for
from tests.gateway.proxy.misbehave import Request, Upstream, Writer, closed, misbehaving
from tests.gateway.proxy.serving import serving

PRICE_UNITS = 10_000
CREDITS_UNITS = 100_000
ROUTES = [
    {"match": "GET /free/*", "price": "free"},
    {"match": "POST /free/*", "price": "free"},
    {"match": "* /*", "price": "$0.01"},
]
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Whole:
    """The gateway, its upstream, and who has ``CREDITS_UNITS`` there."""

    node: Node
    port: int
    up: Upstream
    wallet: Wallet
    account_id: int

    def signed(self, method: str, target: str, body: bytes = b"") -> bytes:
        """A signed request as it goes on the wire."""
        url = self.node.settings.server.public_url + target
        fields = self.wallet.sign(method, url, body or None, headers={"Accept": "*/*"})
        return self.request(method, target, body, **fields)

    @staticmethod
    def request(method: str, target: str, body: bytes = b"", **fields: str) -> bytes:
        """A request as it goes on the wire, with the length of its body."""
        lines = {"Host": "shop.test", "Content-Length": str(len(body)), **fields}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        return f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode() + body

    @asynccontextmanager
    async def caller(
        self,
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A connection to the gateway."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            yield reader, writer
        finally:
            writer.close()

    async def available_units(self) -> int:
        """What the wallet's account can spend now."""
        async with self.node.db.read() as tx:
            view = await read.account(tx, self.account_id)
        assert view is not None
        return view.available_units

    async def ended(self) -> list[tuple[str, str | None]]:
        """How the account's calls ended, oldest first: kind and reason."""
        async with self.node.db.read() as tx:
            rows = await tx.fetch(
                "SELECT kind, reason FROM transfer WHERE account_id = $1"
                " AND kind IN ('capture', 'void') ORDER BY seq",
                self.account_id,
            )
        return [(row["kind"], row["reason"]) for row in rows]


@asynccontextmanager
async def whole(database: str, parser: str = "httptools", **server: Any) -> AsyncIterator[Whole]:
    """The gateway until the block ends. ``server``: settings of that section."""
    async with misbehaving() as up:
        settings = settings_for(
            server={"database": database, **server},
            upstreams={
                "api": {"url": up.url, "routes": ROUTES},
                "tools": {"kind": "mcp", "url": f"{up.url}/mcp", "mount": "/mcp"}
                | {"tools": {"*": "$0.01"}},
            },
        )
        node = await open_node(settings)
        try:
            wallet = Wallet(new_account())
            async with node.db.write() as tx:
                now_ms = await tx.now_ms()
                account_id = await wallets.ensure(tx, wallet.address, now_ms)
                mint = ledger.Mint(account_id, CREDITS_UNITS, "grant", "g", 0, "grant")
                await ledger.apply(tx, [mint], now_ms)
            async with serving(build(node), parser) as port:
                yield Whole(node, port, up, wallet, account_id)
        finally:
            await close_node(node)


def until_cut(first: bytes, cut: asyncio.Event) -> Callable[..., Awaitable[bool]]:
    """A behaviour: ``first``, then silence; ``cut`` is set when the gateway has ended the call."""

    async def behave(up: Upstream, _request: Request, writer: Writer) -> bool:
        writer.write(first)
        while not closed(writer) and not up.released.is_set():
            await asyncio.sleep(0.01)
        if not up.released.is_set():
            cut.set()
        return False

    return behave
