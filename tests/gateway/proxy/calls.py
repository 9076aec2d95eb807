"""Calls of the misbehaving upstream, in few words."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from gateway.proxy.client import UpstreamClient, parse_origin
from gateway.proxy.upstream import Answer, Timeouts, open_upstream
from tests.gateway.proxy.misbehave import Upstream

QUICK = Timeouts(connect_s=5, first_byte_s=5, idle_s=5, total_s=20)


def calling(
    client: UpstreamClient,
    up: Upstream,
    target: bytes,
    method: str = "GET",
    *,
    headers: list[tuple[bytes, bytes]] | None = None,
    body: Any = None,
    timeouts: Timeouts = QUICK,
    **more: Any,
) -> open_upstream:
    origin = parse_origin(up.url)
    fields = [(b"host", origin.authority), *(headers or [])]
    return open_upstream(
        client, origin, method, target, headers=fields, body=body, timeouts=timeouts, **more
    )


async def whole(answer: Answer) -> bytes:
    return b"".join([chunk async for chunk in answer.chunks()])


def to(client: UpstreamClient, url: str, timeouts: Timeouts = QUICK) -> open_upstream:
    origin = parse_origin(url)
    fields = [(b"host", origin.authority)]
    return open_upstream(
        client, origin, "GET", b"/echo", headers=fields, body=None, timeouts=timeouts
    )


async def pieces(*parts: bytes | Exception) -> AsyncIterator[bytes]:
    for part in parts:
        await asyncio.sleep(0)
        if isinstance(part, Exception):
            raise part
        yield part
