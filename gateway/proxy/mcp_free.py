"""Answers of an MCP server that cost nothing, passed on without what it says about money.

An answer in one piece is read whole, a stream event by event; both come without a coding.
"""

from __future__ import annotations

import json

from gateway.errors import Problem
from gateway.middleware import Outgoing
from gateway.proxy import events
from gateway.proxy import mcp_answers as answers
from gateway.proxy.free import FieldsOf
from gateway.proxy.mcp_call import require_readable
from gateway.proxy.outcome import streams
from gateway.proxy.upstream import Answer


async def relay(
    answer: Answer, fields: FieldsOf, send: Outgoing, show: answers.Show = answers.unchanged
) -> None:
    """Pass an answer on. ``show``: what is made of a response. Raises ``Problem``."""
    if answer.status < 300:
        require_readable(answer)
    if streams(answer.headers):
        await _events(answer, fields, send, show)
        return
    body, whole = await answer.read(answers.MAX_RESULT_BYTES)
    if not whole:
        raise Problem("upstream_error", "The upstream's answer is too long.")
    found = events.object_of(body)
    if found is not None:
        body = json.dumps(answers.cleaned(found, show)).encode()
    elif body and b"json" in b",".join(answer.values(b"content-type")).lower():
        raise Problem("upstream_error", "The upstream's answer is no JSON-RPC message.")
    await _start(answer, fields(len(body)), send)
    await send({"type": "http.response.body", "body": body})


async def _events(answer: Answer, fields: FieldsOf, send: Outgoing, show: answers.Show) -> None:
    await _start(answer, fields(None), send)
    waiting = b""
    async for piece in answer.chunks():
        waiting += piece
        while (parts := events.split(waiting)) is not None:
            event, waiting = parts
            passed = answers.shown(event, show)
            if passed:
                await send({"type": "http.response.body", "body": passed, "more_body": True})
        if len(waiting) > answers.MAX_RESULT_BYTES:
            raise Problem("upstream_error", "An event of the upstream is too long.")
    # What is left is no whole event, which its readers discard (WHATWG HTML).
    await send({"type": "http.response.body", "body": b""})


async def _start(answer: Answer, fields: list[tuple[bytes, bytes]], send: Outgoing) -> None:
    start = {"type": "http.response.start", "status": answer.status}
    await send({**start, "headers": fields})
