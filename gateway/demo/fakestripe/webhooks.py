"""Signed webhooks: at least once, retried until 2xx, and on request twice, late or out of order.

Source: Stripe documentation, "Receive Stripe events in your webhook endpoint" and "Verify webhook
signatures": header ``Stripe-Signature: t=<seconds>,v1=<hex HMAC-SHA256 of "t.body">``, a new
timestamp and signature with every attempt, the same event id and body. Stripe gives up after
three days; the fake after the pauses of its mode are used up.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import random
import secrets
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from gateway.demo.fakestripe import forms
from gateway.demo.fakestripe.errors import invalid
from gateway.demo.fakestripe.state import Object, State

RETRY_AFTER_S: Final = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
WORKERS: Final = 16
TIMEOUT_S: Final = 20.0
MAX_DELIVERIES: Final = 20_000
MAX_COPIES: Final = 1000

Order = Literal["fifo", "reversed", "shuffled"]


@dataclass(slots=True)
class Delivery:
    """One event on its way to one endpoint."""

    event_id: str
    event_type: str
    url: str
    secret: str = field(repr=False)
    body: bytes = field(repr=False)
    due: float  # loop time
    attempts: list[int | str] = field(default_factory=list)  # status, or the kind of failure
    state: Literal["held", "pending", "succeeded", "failed"] = "pending"
    in_order: bool = False  # not before the one queued ahead of it was answered


@dataclass(slots=True)
class Mode:
    """How deliveries behave from now on."""

    paused: bool = False  # keep everything until ``flush``
    copies: int = 1  # how many times each event is sent
    delay_s: float = 0.0
    retry_after_s: tuple[float, ...] = RETRY_AFTER_S


@dataclass(slots=True)
class Deliverer:
    """The queue and its workers; lives on the server's event loop."""

    state: State
    mode: Mode = field(default_factory=Mode)
    deliveries: deque[Delivery] = field(default_factory=lambda: deque(maxlen=MAX_DELIVERIES))
    queue: asyncio.Queue[Delivery] = field(default_factory=asyncio.Queue)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    pending: int = 0
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def start(self) -> None:
        """Begin to deliver."""
        from httpx import AsyncClient

        client = AsyncClient(timeout=TIMEOUT_S, follow_redirects=False, trust_env=False)
        for _ in range(WORKERS):
            self._spawn(self._work(client))
        self._spawn(_closing(client))

    async def stop(self) -> None:
        """Stop at once; what is on its way is lost, as when the processor loses the network."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def event(self, event: Object) -> None:
        """A new event: one delivery per endpoint that wants it, times the copies of the mode."""
        for _ in range(self.mode.copies):
            self.deliver(event, held=self.mode.paused, delay_s=self.mode.delay_s)

    def deliver(self, event: Object, *, held: bool = False, delay_s: float = 0.0) -> int:
        """Send an event (again) to every endpoint that wants it; how many that were."""
        body = json.dumps(event, indent=2).encode()
        due = asyncio.get_running_loop().time() + delay_s
        sent = 0
        for endpoint in self.state.tables["webhook_endpoint"].values():
            wanted = endpoint["enabled_events"]
            if endpoint["status"] != "enabled" or not {"*", event["type"]} & set(wanted):
                continue
            one = Delivery(
                event["id"], event["type"], endpoint["url"], endpoint["_secret"], body, due
            )
            one.state = "held" if held else "pending"
            self.deliveries.append(one)
            if not held:
                self._enqueue(one)
            sent += 1
        return sent

    def flush(self, order: Order, seed: int) -> int:
        """Send what was kept while paused, in this order, one by one; how many that were."""
        held = [one for one in self.deliveries if one.state == "held"]
        if order == "reversed":
            held.reverse()
        elif order == "shuffled":
            random.Random(seed).shuffle(held)  # noqa: S311 (a test order, nothing secret)
        now = asyncio.get_running_loop().time()
        for one in held:
            one.state, one.due, one.in_order = "pending", now, True
            self._enqueue(one)
        return len(held)

    async def idle(self, timeout_s: float) -> bool:
        """Wait until nothing is pending, at most so long; False if something still is."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.pending:
                    self.settled.clear()
                    await self.settled.wait()
        except TimeoutError:
            return False
        return True

    def _enqueue(self, delivery: Delivery) -> None:
        self.pending += 1
        self.queue.put_nowait(delivery)

    def _end(self, delivery: Delivery, state: Literal["succeeded", "failed"]) -> None:
        delivery.state = state
        self.pending -= 1
        if self.pending == 0:
            self.settled.set()

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _work(self, client: Any) -> None:
        while True:
            delivery = await self.queue.get()
            wait_s = delivery.due - asyncio.get_running_loop().time()
            if wait_s > 0:  # do not block a worker: others may be due now
                self._spawn(self._later(delivery, wait_s))
                continue
            if delivery.in_order:  # the lock is fair: first taken from the queue, first sent
                async with self.turn:
                    await self._attempt(client, delivery)
            else:
                await self._attempt(client, delivery)

    async def _later(self, delivery: Delivery, wait_s: float) -> None:
        await asyncio.sleep(wait_s)
        self.queue.put_nowait(delivery)

    async def _attempt(self, client: Any, delivery: Delivery) -> None:
        from httpx import HTTPError

        try:
            answer = await client.post(
                delivery.url,
                content=delivery.body,
                headers={
                    "Content-Type": "application/json; charset=utf-8",
                    "Stripe-Signature": signature(delivery.body, delivery.secret),
                    "User-Agent": "Stripe/1.0 (+https://stripe.com/docs/webhooks)",
                },
            )
            delivery.attempts.append(answer.status_code)
        except HTTPError as error:
            delivery.attempts.append(type(error).__name__)
        last = delivery.attempts[-1]
        if isinstance(last, int) and 200 <= last < 300:
            self._end(delivery, "succeeded")
        elif len(delivery.attempts) > len(self.mode.retry_after_s):
            self._end(delivery, "failed")
        else:
            pause_s = self.mode.retry_after_s[len(delivery.attempts) - 1]
            delivery.due = asyncio.get_running_loop().time() + pause_s
            self.queue.put_nowait(delivery)


async def _closing(client: Any) -> None:
    """Hold the HTTP client open until the deliverer is stopped."""
    async with client:
        await asyncio.Event().wait()


def create_endpoint(state: State, params: Mapping[str, Any], secret: str | None = None) -> Object:
    """``POST /v1/webhook_endpoints``; the signing secret is shown once, as at Stripe."""
    forms.only(params, ("url", "enabled_events", "description", "metadata", "api_version"))
    url = forms.text(params, "url")
    if url is None or not url.startswith(("http://", "https://")):
        raise invalid("Invalid URL: an explicit scheme (such as https) must be provided.", "url")
    events = forms.listing(params, "enabled_events")
    if not events:
        raise forms.required("enabled_events")
    secret = secret or "whsec_" + secrets.token_hex(16)
    made = state.new(
        "webhook_endpoint",
        {
            "api_version": None,
            "description": forms.text(params, "description"),
            "enabled_events": events,
            "metadata": forms.metadata(params),
            "status": "enabled",
            "url": url,
            "_secret": secret,
        },
    )
    return {**made, "secret": secret}


def delete_endpoint(state: State, endpoint_id: str) -> Object:
    """``DELETE /v1/webhook_endpoints/{id}``"""
    endpoint = state.get("webhook_endpoint", endpoint_id)
    del state.tables["webhook_endpoint"][endpoint["id"]]
    return {"id": endpoint["id"], "object": "webhook_endpoint", "deleted": True}


def signature(body: bytes, secret: str, at_s: int | None = None) -> str:
    """The ``Stripe-Signature`` header. Real time, not the fake's clock: receivers judge the age."""
    at_s = int(time.time()) if at_s is None else at_s
    mac = hmac.new(secret.encode(), f"{at_s}.".encode() + body, hashlib.sha256)
    return f"t={at_s},v1={mac.hexdigest()}"
