"""The local Stripe, a client of its control doors, and a webhook receiver, for tests."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import stripe
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.demo.fakestripe import FakeStripe

KEY = "sk_test_farebox"
SECRET = "whsec_of_the_tests"


@dataclass
class Stripes:
    """A running fake and both doors to it."""

    fake: FakeStripe
    http: httpx.Client
    sdk_http: stripe.RequestsClient

    @property
    def url(self) -> str:
        return self.fake.url

    def client(self) -> stripe.StripeClient:
        """The real SDK, synchronous."""
        return stripe.StripeClient(
            KEY,
            base_addresses={"api": self.url},
            max_network_retries=0,
            http_client=self.sdk_http,
        )

    def tell(self, door: str, /, **values: Any) -> dict[str, Any]:
        """``POST /_fake/…``"""
        answer = self.http.post(f"{self.url}/_fake/{door}", json=values)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def ask(self, path: str) -> dict[str, Any]:
        """``GET /_fake/…``"""
        answer = self.http.get(f"{self.url}/_fake/{path}")
        assert answer.status_code == 200, answer.text
        told: dict[str, Any] = answer.json()
        return told

    def settled(self) -> list[dict[str, Any]]:
        """Wait until every delivery has ended; all of them."""
        answer = self.ask("deliveries?wait_s=60")
        assert answer["idle"], answer
        found: list[dict[str, Any]] = answer["deliveries"]
        return found


@pytest.fixture
def stripes() -> Iterator[Stripes]:
    """A fresh local Stripe."""
    with (
        FakeStripe() as fake,
        httpx.Client(timeout=70, trust_env=False) as http,
        closing(stripe.RequestsClient()) as sdk_http,
    ):
        yield Stripes(fake, http, sdk_http)


@dataclass
class Receiver:
    """A webhook endpoint that verifies with the SDK and answers what it is told to."""

    url: str = ""
    events: list[stripe.Event] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    refusals: int = 0  # how many of the next deliveries get a 500

    def types(self) -> list[str]:
        return [event.type for event in self.events]


@pytest.fixture
def receiver(stripes: Stripes) -> Iterator[Receiver]:
    """Registered at the fake for all events."""
    got = Receiver()

    async def hook(request: Request) -> Response:
        if got.refusals > 0:
            got.refusals -= 1
            return Response(status_code=500)
        body = await request.body()
        header = request.headers["stripe-signature"]
        got.events.append(stripe.Webhook.construct_event(body, header, SECRET))
        got.headers.append(header)
        got.bodies.append(body)
        return Response()

    with served(Starlette(routes=[Route("/hook", hook, methods=["POST"])])) as url:
        got.url = f"{url}/hook"
        stripes.tell("webhooks", url=got.url, secret=SECRET)
        yield got


@contextmanager
def served(app: Any) -> Iterator[str]:
    """Serve an application from a thread on a free port; gives its origin."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="auto",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=1,
        )
    )
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def until(true: Callable[[], bool], timeout_s: float = 20) -> None:
    """Poll a condition; fail if it does not come true in time."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.005)


def session_params(**more: Any) -> dict[str, Any]:
    """What is needed to open a Checkout Session for $5."""
    return {
        "mode": "payment",
        "success_url": "http://127.0.0.1/back?session={CHECKOUT_SESSION_ID}",
        "cancel_url": "http://127.0.0.1/cancel",
        "client_reference_id": "pay_1",
        "metadata": {"payment": "pay_1"},
        "payment_intent_data": {"metadata": {"payment": "pay_1"}},
        "line_items": [one_item(500)],
        **more,
    }


def one_item(cents: int, currency: str = "usd") -> dict[str, Any]:
    """A line item of Checkout."""
    return {
        "quantity": 1,
        "price_data": {
            "currency": currency,
            "unit_amount": cents,
            "product_data": {"name": f"{cents} credits"},
        },
    }
