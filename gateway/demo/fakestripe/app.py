"""The fake put together as one Starlette application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.demo.fakestripe import api, checkout, control, hosted
from gateway.demo.fakestripe.idempotency import Table
from gateway.demo.fakestripe.state import State
from gateway.demo.fakestripe.webhooks import Deliverer

Endpoint = Callable[[Request], Awaitable[Response]]


def build(state: State) -> Starlette:
    """The application around one memory. Deliveries run while its lifespan does."""
    deliverer = Deliverer(state)
    doors = api.Api(state, Table(), asyncio.Event())
    controls = control.Control(doors, deliverer)
    settling: set[asyncio.TimerHandle] = set()

    def settle_later(intent_id: str) -> None:
        if state.settle_bank_s is not None:
            loop = asyncio.get_running_loop()
            settling.add(loop.call_later(state.settle_bank_s, _settle, state, intent_id))

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        deliverer.start()
        state.on_event = deliverer.event
        state.on_processing = settle_later
        try:
            yield
        finally:
            for timer in settling:
                timer.cancel()
            await deliverer.stop()

    async def v1(request: Request) -> Response:
        return await api.handle(doors, request)

    async def fake(request: Request) -> Response:
        return await control.handle(controls, request)

    async def pay(request: Request) -> Response:
        return await hosted.session_page(state, request)

    async def authenticate(request: Request) -> Response:
        return await hosted.authenticate_page(state, request)

    async def receipt(request: Request) -> Response:
        return hosted.receipt_page(state, request)

    async def style(request: Request) -> Response:
        return hosted.style(request)

    both = ["GET", "POST"]
    return Starlette(
        routes=[
            Route("/v1/{path:path}", v1, methods=[*both, "DELETE"]),
            Route("/_fake/{path:path}", fake, methods=both),
            Route("/c/pay/{id}", pay, methods=both),
            Route("/authenticate/{id}", authenticate, methods=both),
            Route("/receipts/{id}", receipt, methods=["GET"]),
            Route("/static/checkout.css", style, methods=["GET"]),
        ],
        lifespan=lifespan,
    )


def _settle(state: State, intent_id: str) -> None:
    if state.tables["payment_intent"][intent_id]["status"] == "processing":
        checkout.settle_intent(state, intent_id, None)
