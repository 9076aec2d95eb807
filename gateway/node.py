"""The parts of one running process, made once and handed to whoever needs them."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from chain.errors import Rejected
from gateway import ledger, metrics
from gateway.accounts import wallets
from gateway.db import CommitUnknown, Database, DatabaseUnavailable
from gateway.errors import Problem
from gateway.external.catalog import Catalog
from gateway.ledger.sweep import Patience
from gateway.limits import Limits
from gateway.payments.card import Cards
from gateway.payments.rails import Rails
from gateway.proxy.client import Origin, UpstreamClient
from gateway.proxy.routes_table import RouteTable
from gateway.ready import Looks, Readiness, look
from gateway.settings import Settings, Upstream

_REMEMBERED_WALLETS = 100_000
ERC1271_GAS = 300_000


@dataclass(frozen=True, slots=True)
class Behind:
    """An upstream as calls need it: its settings, where it is, and what is set on the way up."""

    settings: Upstream
    origin: Origin
    inject: tuple[tuple[bytes, bytes], ...] = field(repr=False)


@dataclass(slots=True)
class Node:
    """Everything a request can need. Immutable but for what is said to change."""

    settings: Settings
    db: Database
    writer: ledger.Writer
    rails: Rails
    routes: RouteTable
    catalog: Catalog
    upstreams: Mapping[str, Behind]
    client: UpstreamClient
    limits: Limits
    cards: Cards | None
    # Wallet to account, which never changes once it exists. Bounded, oldest out.
    accounts: OrderedDict[tuple[str, str], int] = field(default_factory=OrderedDict)
    # Holds of calls in flight, whose leases this process renews (gateway/proxy/leases.py).
    in_flight: dict[int, ledger.HoldRow] = field(default_factory=dict)
    # The origin that signatures are bound to: of ``public_url``.
    authority: str = field(init=False)
    scheme: str = field(init=False)
    # What the database's clock is ahead of ours, read again every few seconds.
    clock_ahead_ms: int = 0
    # Set when the process has been told to stop.
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    # Whether this process may void what has lapsed (gateway/work.py).
    patience: Patience = field(init=False)

    # What ``/readyz`` and ``/metrics`` say.
    looks: Looks[Readiness] = field(init=False)
    metrics: Looks[str] = field(init=False)

    def __post_init__(self) -> None:
        self.looks = Looks(partial(look, self))
        self.metrics = Looks(partial(metrics.look, self))
        server = self.settings.server
        # On SQLite one process serves, and whether it is alone was settled when it started.
        others = server.on_postgres
        self.patience = Patience(server.sweep_s, server.hold_lease_s, others=others)
        self.authority = self.settings.server.authority
        self.scheme = self.settings.server.scheme

    def now_ms(self) -> int:
        """The clock that decides: the database's, so that several nodes agree. Milliseconds.

        As of the last look at it, so good to a few milliseconds; what a lease or an expiry hangs
        on asks the database itself, inside its transaction.
        """
        return time.time_ns() // 1_000_000 + self.clock_ahead_ms

    def now_s(self) -> int:
        """``now_ms`` in whole seconds."""
        return self.now_ms() // 1000

    async def look_at_clock(self) -> None:
        """Ask the database for the time. Raises ``DatabaseUnavailable``."""
        async with self.db.read() as tx:
            before_ms = time.time_ns() // 1_000_000
            theirs_ms = await tx.now_ms()
            after_ms = time.time_ns() // 1_000_000
        self.clock_ahead_ms = theirs_ms - (before_ms + after_ms) // 2

    async def account_of(self, address: str, chain: str) -> int | None:
        """The account of a wallet; None if it has none yet."""
        known = self.accounts.get((address, chain))
        if known is None:
            async with self.db.read() as tx:
                known = await wallets.find(tx, address, chain)
            if known is not None:
                self.remember(address, chain, known)
        return known

    def remember(self, address: str, chain: str, account_id: int) -> None:
        """Keep a wallet's account, so that the next request does not ask the database."""
        self.accounts[address, chain] = account_id
        if len(self.accounts) > _REMEMBERED_WALLETS:
            self.accounts.popitem(last=False)

    async def eth_call(self, caip2: str, to: str, data: bytes) -> bytes:
        """``wallet_auth.Call``: ask a contract wallet whether a signature is its own."""
        rpc = self.rails.rpcs.get(caip2)
        if rpc is None:
            raise LookupError(caip2)
        try:
            return await rpc.eth_call(to, data, gas=ERC1271_GAS)
        except Rejected:
            return b""  # many wallets revert instead of answering no


def unavailable(error: Exception) -> Problem:
    """The answer when a part this needs does not answer: ask again, with the same request.

    Nothing happened, but for a COMMIT whose answer was lost: then the repeat is told what did.
    """
    if isinstance(error, CommitUnknown):
        words = "The database was lost in between. Send the same request again: it is done once."
    else:
        what = "The database" if isinstance(error, DatabaseUnavailable) else "The chain"
        words = f"{what} cannot be reached right now; nothing was charged."
    return Problem("dependency_unavailable", words, headers={"Retry-After": "2"})
