"""Free routes: nobody pays for them, so nobody may keep them busy who is not there."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.e2e.stage import Api, Gate, Gateway
from tests.gateway.proxy.misbehave import Writer, closed

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b"7\r\ndata:1\n\r\n"


@pytest.fixture
def path(target: str) -> str:
    return "/free" + target


def caller(gateway: Gateway, request: bytes) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", gateway.port), 10) as sock:
        sock.sendall(request)
        yield sock


@pytest.mark.parametrize("how", ["never silent", "silent", "no answer yet"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_call_ends_when_its_caller_leaves(
    how: str, method: str, sqlite_gateway: Gateway, api: Api, path: str
) -> None:
    ended = threading.Event()

    async def behave(writer: Writer, gate: Gate) -> bool:
        if how != "no answer yet":
            writer.write(HEAD + EVENT)
        while not closed(writer) and not gate.opened:
            if how == "never silent":
                writer.write(EVENT)
            await asyncio.sleep(0.02)
        ended.set()
        return False

    gate = api.behave(path, behave)
    body = b"Content-Length: 3\r\n\r\nabc" if method == "POST" else b"\r\n"
    request = f"{method} {path} HTTP/1.1\r\nHost: a\r\n".encode() + body
    for sock in caller(sqlite_gateway, request):
        sqlite_gateway.wait(lambda: gate.arrived == 1, "the call")
        if how != "no answer yet":
            assert sock.recv(12) == b"HTTP/1.1 200"
    try:
        sqlite_gateway.wait(ended.is_set, "the end of the call")
    finally:
        gate.open()
