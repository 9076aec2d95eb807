"""A real gateway on SQLite beside the local Stripe, and a real browser to buy with."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from gateway.app import build, close_node, open_node
from gateway.config import load
from gateway.errors import Problem
from gateway.node import Node
from gateway.payments import challenge, offers
from gateway.settings import Settings
from tests.gateway.demo.stripes import KEY, SECRET

WALLET = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"  # a vector of EIP-55 itself
OPERATOR = "Weather & Co"

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@dataclass
class Shop:
    """A running gateway that sells credits."""

    url: str
    settings: Settings


def configured(
    folder: Path,
    database: str,
    port: int,
    stripe_url: str,
    **change: Mapping[str, Any] | None,
) -> Settings:
    """Settings with cards on the local Stripe and one chain (which nobody answers for).

    ``change`` adds to a section, or leaves it out (None).
    """
    file = folder / "farebox.toml"
    file.write_text("")
    sections: dict[str, dict[str, Any]] = {
        "server": {
            "listen": f"127.0.0.1:{port}",
            "public_url": f"http://127.0.0.1:{port}",
            "database": database,
            "operator": OPERATOR,
            "work": False,
        },
        "credits": {"packs": ["$0.10", "$1", "$5", "$20"]},
        "stripe": {"secret_key": KEY, "webhook_secret": SECRET, "api_base": stripe_url},
        "chains": {
            "base-sepolia": {
                "rpc": ["http://127.0.0.1:1"],
                "pay_to": "0x" + "ab" * 20,
                "settler_key": "0x" + "11" * 32,
            }
        },
        "upstreams": {
            "weather": {
                "url": "http://127.0.0.1:9",
                "routes": [{"match": "GET /v1/forecast/*", "price": "$0.002"}],
            }
        },
    }
    for name, values in change.items():
        if values is None:
            del sections[name]
        else:
            sections[name] |= values
    return load(file, env={}, overrides=sections)


def running(settings: Settings) -> Iterator[Shop]:
    """The gateway in a thread with its own loop, until the generator is closed."""
    ready, stop = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    async def serve() -> None:
        node = await open_node(settings)
        try:
            await _serve(node, settings, ready, stop)
        finally:
            await close_node(node)

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:  # handed to the test's own thread
            failures.append(error)
        ready.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        assert ready.wait(30)
        if failures:
            raise failures[0]
        yield Shop(settings.server.public_url, settings)
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


async def _serve(
    node: Node, settings: Settings, ready: threading.Event, stop: threading.Event
) -> None:
    server = uvicorn.Server(
        uvicorn.Config(
            build(node),
            host=settings.server.listen.host,
            port=settings.server.listen.port,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=1,
        )
    )
    task = asyncio.create_task(server.serve())
    while not server.started:
        if task.done():
            task.result()
        await asyncio.sleep(0.005)
    ready.set()
    await asyncio.to_thread(stop.wait)
    server.should_exit = True
    await task


def required(settings: Settings, target: str = "/v1/forecast/oslo") -> Problem:
    """The 402 of a call that costs $0.002."""
    keys = offers.Keys("d", {b"\0\0\0\1": b"k" * 32}, b"\0\0\0\1")
    asked = offers.Asked("GET", target.encode(), 2_000)
    return challenge.for_call(settings, keys, asked, 1_800_000_000)
