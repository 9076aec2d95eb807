"""A body is hashed as it comes, and its file is closed however it ends (warnings are errors)."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from gateway.errors import Problem
from gateway.middleware import CallerGoneError
from gateway.proxy import body

DATA = bytes(range(256)) * 4_000  # about a million
LENGTH = [(b"content-length", str(len(DATA)).encode())]
CHUNKED = [(b"transfer-encoding", b"chunked")]


def coming(*pieces: bytes, gone: bool = False) -> Callable[[], Awaitable[Any]]:
    """An ASGI ``receive``; ``gone``: the caller hangs up behind the pieces."""
    messages = [{"type": "http.request", "body": p, "more_body": True} for p in pieces]
    if gone:
        messages.append({"type": "http.disconnect"})
    else:
        messages[-1]["more_body"] = False

    async def receive() -> Any:
        return messages.pop(0)

    return receive


async def sent(made: body.Body) -> bytes:
    up = made.up()
    if isinstance(up, bytes):
        return up
    assert isinstance(up, AsyncIterator)
    return b"".join([piece async for piece in up])


@pytest.mark.parametrize("memory", [0, 1, 300_000, len(DATA) - 1, len(DATA), len(DATA) + 1])
@pytest.mark.parametrize("size", [100_000, len(DATA)])
async def test_it_comes_out_as_it_went_in(memory: int, size: int) -> None:
    pieces = [DATA[i : i + size] for i in range(0, len(DATA), size)]
    made = await body.read(
        coming(*pieces), CHUNKED, limit=len(DATA), memory=memory, algorithms=["sha-512"]
    )
    try:
        assert (made.data is None) == (memory < len(DATA))
        assert await sent(made) == DATA
        assert made.size == len(DATA)
        assert made.content == hashlib.sha256(DATA).digest()
        assert made.digests["sha-512"] == hashlib.sha512(DATA).digest()
    finally:
        made.close()


async def test_nothing_announced_is_nothing_read() -> None:
    made = await body.read(coming(b"x"), [], limit=10, memory=0, algorithms=["sha-512"])
    assert (made.data, made.size, await sent(made)) == (b"", 0, b"")
    assert made.content == hashlib.sha256(b"").digest()
    assert made.digests["sha-512"] == hashlib.sha512(b"").digest()
    made.close()


async def test_a_file_is_closed_when_the_caller_leaves_or_sends_too_much() -> None:
    half = DATA[: len(DATA) // 2]
    with pytest.raises(CallerGoneError):
        await body.read(coming(half, gone=True), LENGTH, limit=len(DATA), memory=0)
    with pytest.raises(Problem, match="body_too_large"):
        await body.read(coming(half, half), CHUNKED, limit=len(half) + 1, memory=0)
