"""The sample HTTP API of the demo and the tests: a small weather, rendering and
chat service.

It knows nothing of payment: that is the point. It counts the calls that really arrive, so that a
test can hold "charged" against "done". Answers depend on the request only, never on the time.
"""

from __future__ import annotations

import hashlib
import html
import json
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gateway.demo import chat
from gateway.demo.served import Served

MAX_TEXT: Final = 200
_SKIES: Final = ("clear", "clouds", "rain", "snow", "fog")


class Calls:
    """What arrived, by ``"METHOD /path"`` and by ``Farebox-Request-Id``. Safe between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_call: Counter[str] = Counter()
        self._by_id: Counter[str] = Counter()

    def note(self, method: str, path: str, request_id: str | None) -> None:
        with self._lock:
            self._by_call[f"{method} {path}"] += 1
            if request_id is not None:
                self._by_id[request_id] += 1

    def count(self, call: str | None = None) -> int:
        """Calls of ``"GET /v1/forecast/oslo"``, or of everything but ``/health``."""
        with self._lock:
            if call is not None:
                return self._by_call[call]
            return sum(n for c, n in self._by_call.items() if not c.endswith(" /health"))

    def of_request(self, request_id: str) -> int:
        """How often a request with this ``Farebox-Request-Id`` arrived. More than 1 is a fault."""
        with self._lock:
            return self._by_id[request_id]

    def clear(self) -> None:
        with self._lock:
            self._by_call.clear()
            self._by_id.clear()


def build(calls: Calls) -> Starlette:
    """The API as an ASGI application that counts in ``calls``."""
    app = Starlette(
        routes=[
            Route("/health", _health, methods=["GET"]),
            Route("/v1/forecast/{city}", _forecast, methods=["GET"]),
            Route("/v1/render", _render, methods=["POST"]),
            Route("/v1/echo", _echo, methods=["POST"]),
            Route("/v1/chat/completions", _chat, methods=["POST"]),
        ]
    )
    app.state.calls = calls
    return app


def _note(request: Request) -> None:
    calls: Calls = request.app.state.calls
    calls.note(request.method, request.url.path, request.headers.get("farebox-request-id"))


async def _health(request: Request) -> Response:
    _note(request)
    return JSONResponse({"status": "ok"})


async def _forecast(request: Request) -> Response:
    _note(request)
    city = request.path_params["city"]
    seed = hashlib.sha256(city.lower().encode()).digest()
    days = [
        {
            "day": day,
            "celsius": seed[day] % 45 - 15,
            "sky": _SKIES[seed[day + 8] % len(_SKIES)],
        }
        for day in range(3)
    ]
    return JSONResponse({"city": city, "days": days})


async def _render(request: Request) -> Response:
    """``{"text": "…"}`` as an SVG picture; 422 for anything else."""
    _note(request)
    text = _text_of(await request.body())
    if text is None:
        wanted = f'send {{"text": "…"}} with 1 to {MAX_TEXT} characters'
        return JSONResponse({"error": wanted}, status_code=422)
    picture = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="640" height="120">'
        '<rect width="640" height="120" fill="#123"/>'
        f'<text x="20" y="70" font-size="28" fill="#fff">{html.escape(text)}</text></svg>'
    )
    return Response(picture, media_type="image/svg+xml")


def _text_of(body: bytes) -> str | None:
    try:
        sent: Any = json.loads(body)
    except ValueError:
        return None
    text = sent.get("text") if isinstance(sent, dict) else None
    return text if isinstance(text, str) and 0 < len(text) <= MAX_TEXT else None


async def _echo(request: Request) -> Response:
    """The body as it came, under its own type."""
    _note(request)
    body = await request.body()
    kind = request.headers.get("content-type", "application/octet-stream")
    return Response(body, headers={"content-type": kind})


async def _chat(request: Request) -> Response:
    _note(request)
    return chat.complete(await request.body())


class SampleApi(Served):
    """``with SampleApi() as api: …`` serves it in a thread on a free port."""

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        make: Callable[[Calls], Starlette] = build,
    ) -> None:
        self.calls = Calls()
        super().__init__(make(self.calls), "the sample API", host=host, port=port, lifespan=False)
