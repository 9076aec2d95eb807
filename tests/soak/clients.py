"""The customers of the soak: they spend, repeat themselves, buy, pay for single calls, and note
every answer they got whole.

Everything they choose is drawn from the seed. Each waits a bounded time for an answer and then
goes on; what they could not find out they leave to the audit.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import aiohttp

from tests.e2e.wallet import Wallet, decode
from tests.soak.promises import Told

UNITS_PER_CREDIT = 10_000
REMEMBERED = 48  # requests of each client that it may repeat
ANSWER_S = 20
TRIES = 5  # for a payment, which no customer gives up lightly
REPEAT_FOR_S = 60  # signatures are good for longer
_PASSING = (aiohttp.ClientError, TimeoutError, ConnectionError)


@dataclass(frozen=True, slots=True)
class Ask:
    """A request as it goes out, to be sent again byte for byte."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes | None
    made_s: float
    kept: bool = True  # its answer is short enough to be stored


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer that came whole."""

    status: int
    headers: Any
    body: bytes

    def problem(self) -> str:
        """The code of a problem, "" for other answers."""
        if "problem+json" not in self.headers.get("content-type", ""):
            return ""
        return str(json.loads(self.body).get("code", ""))


@dataclass(frozen=True, slots=True)
class Try:
    """One request as it went, for the availability: when, to which node, and whether it was
    answered (an upstream's failure counts as an answer)."""

    began_s: float
    ended_s: float
    node: int
    answered: bool


@dataclass
class Notes:
    """What all clients saw."""

    told: list[Told] = field(default_factory=list)
    bought: dict[str, int] = field(default_factory=dict)
    tries: list[Try] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def count(self, kind: str) -> None:
        self.kinds[kind] = self.kinds.get(kind, 0) + 1


@dataclass(frozen=True, slots=True)
class World:
    """Where the clients are: the nodes, the origin that signatures are bound to, whether it is
    over, and the longest they wait between two requests."""

    nodes: Sequence[str]
    origin: str
    http: aiohttp.ClientSession
    over: asyncio.Event
    pause_s: float


class Client:
    """One customer. Several may use one wallet at the same time."""

    def __init__(self, world: World, wallet: Wallet, name: str, seed: str, notes: Notes) -> None:
        self._world = world
        self._wallet = wallet
        self._name = name
        self._rng = random.Random(f"{seed}:{name}")
        self._notes = notes
        self._number = 0
        self._asked: deque[Ask] = deque(maxlen=REMEMBERED)
        self._paid: deque[Ask] = deque(maxlen=REMEMBERED)

    async def run(self) -> None:
        """Until the time is over."""
        await self._buy()
        verbs = (self._spend, self._repeat, self._race, self._buy, self._pay_for_call, self._show)
        weights = (60, 14, 6, 3, 6, 5)
        while not self._world.over.is_set():
            verb = self._rng.choices(verbs, weights)[0]
            self._notes.count(verb.__name__.strip("_"))
            await verb()
            await asyncio.sleep(self._rng.random() * self._world.pause_s)

    # -- what it does ----------------------------------------------------------------------------

    async def _spend(self) -> None:
        """A fresh signature. Short of credits: it buys."""
        ask = self._signed()
        self._asked.append(ask)
        reply = await self._send(ask)
        if reply is not None and reply.status == 402:
            await self._buy()

    async def _repeat(self) -> None:
        """An earlier request again, whatever became of it."""
        ask = self._earlier(self._asked)
        if ask is not None:
            await self._send(ask)

    async def _race(self) -> None:
        """One request several times at once, to any node: at most one of them runs."""
        ask = self._signed()
        self._asked.append(ask)
        await asyncio.gather(*(self._send(ask) for _ in range(self._rng.randrange(2, 4))))

    async def _buy(self) -> None:
        """Credits over x402. The same payment again until its outcome is known."""
        body = json.dumps({"amount_usd": "1"}).encode()
        plain = Ask("POST", "/farebox/v1/credits/purchase", {}, body, time.monotonic())
        for _ in range(TRIES):
            offered = await self._send(plain, priced=False)
            if offered is not None and offered.status == 402:
                break
        else:
            return
        offer = decode(offered.headers["payment-required"])["accepts"][0]
        header = {"PAYMENT-SIGNATURE": self._wallet.pay(offer)}
        paying = Ask("POST", plain.target, header, body, time.monotonic())
        self._paid.append(paying)
        await self._insist(paying)

    async def _pay_for_call(self) -> None:
        """No identity but the payment itself; what it leaves over is change."""
        method, body = ("GET", None) if self._rng.random() < 0.5 else ("POST", b'{"q": 1}')
        plain = Ask(method, f"/cheap/{self._next()}", {}, body, time.monotonic())
        offered = await self._send(plain)
        if offered is None or offered.status != 402:
            return
        offer = decode(offered.headers["payment-required"])["accepts"][0]
        header = {"PAYMENT-SIGNATURE": self._wallet.pay(offer)}
        paying = Ask(method, plain.target, header, body, time.monotonic())
        self._paid.append(paying)
        await self._insist(paying)

    async def _show(self) -> None:
        """A payment of earlier again, perhaps on another request: never paid or charged twice."""
        ask = self._earlier(self._paid)
        if ask is None:
            return
        if self._rng.random() < 0.3:
            ask = Ask(ask.method, f"/cheap/{self._next()}", ask.headers, ask.body, ask.made_s)
        await self._send(ask, priced=not ask.target.startswith("/farebox/"))

    # -- how it does it --------------------------------------------------------------------------

    def _next(self) -> str:
        self._number += 1
        return f"{self._name}-{self._number}"

    def _earlier(self, asked: deque[Ask]) -> Ask | None:
        fresh = [ask for ask in asked if time.monotonic() - ask.made_s < REPEAT_FOR_S]
        return self._rng.choice(fresh) if fresh else None

    def _signed(self) -> Ask:
        place = self._rng.choices(("v1", "long", "stall"), (88, 9, 3))[0]
        target = f"/{place}/{self._rng.randrange(1_000)}"
        method, body = "GET", None
        if place == "v1" and self._rng.random() < 0.5:
            method, body = "POST", json.dumps({"q": self._rng.random()}).encode()
        request_id = f"{time.time_ns():016x}{self._rng.getrandbits(64):016x}"
        headers = self._wallet.sign(
            method, self._world.origin + target, body, nonce=request_id, window_s=300
        )
        headers.pop("content-length", None)
        return Ask(method, target, headers, body, time.monotonic(), kept=place != "long")

    async def _insist(self, ask: Ask) -> None:
        priced = not ask.target.startswith("/farebox/")
        for _ in range(TRIES):
            reply = await self._send(ask, priced=priced)
            if reply is not None:
                pending = reply.status == 202 or reply.problem() == "settlement_pending"
                if not pending and reply.status < 500:
                    return
            await asyncio.sleep(self._rng.random())

    async def _send(self, ask: Ask, *, priced: bool = True) -> Reply | None:
        """One try, on a node drawn for it. None: no whole answer came."""
        node = self._rng.randrange(len(self._world.nodes))
        began_s = time.monotonic()
        reply = None
        cut = False
        try:
            async with self._world.http.request(
                ask.method,
                self._world.nodes[node] + ask.target,
                headers=ask.headers,
                data=ask.body,
                allow_redirects=False,
            ) as answer:
                cut = True
                reply = Reply(answer.status, answer.headers, await answer.read())
        except _PASSING:
            pass  # a fault: what became of the request is for the audit to find out
        answered = (reply is None and cut) if reply is None else reply.status not in (500, 503)
        self._notes.tries.append(Try(began_s, time.monotonic(), node, answered))
        if reply is not None:
            self._note(ask, reply, priced)
        return reply

    def _note(self, ask: Ask, reply: Reply, priced: bool) -> None:
        code = reply.problem()
        if reply.status == 500 or (code == "" and reply.status in (401, 402, 409, 503)):
            self._notes.faults.append(f"{ask.method} {ask.target}: {reply.status} {code}")
        headers = reply.headers
        if not priced:
            if reply.status == 200:
                said = json.loads(reply.body)
                self._notes.bought[said["payment_id"]] = said["minted_units"]
            return
        if "farebox-charged" not in headers and "farebox-held" not in headers:
            return  # refused, or a payment's receipt: no call stands behind it
        charged = headers.get("farebox-charged")
        receipt = b'"receipt"' in reply.body[:20]
        self._notes.told.append(
            Told(
                headers["farebox-request-id"],
                reply.status,
                headers.get("farebox-replayed") == "true",
                None if charged is None else int(Decimal(charged) * UNITS_PER_CREDIT),
                hashlib.sha256(reply.body).digest()[:12],
                ask.kept and not receipt,
                code,
            )
        )
