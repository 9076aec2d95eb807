"""An upstream in the manner of OpenAI's chat completions: JSON and events, with and without usage.

What it answers is asked for in the request, beside ``model`` and ``stream``:

    words       how many words the answer has, one a token and one an event
    usage       false: nothing is said of usage (as without ``stream_options``)
    counts      what stands as ``usage`` instead of the truth
    break_at    the connection breaks after so many words
    gate_at     the answer waits for the test's gate after so many words
    say         header fields of the answer; ``{t}`` is the value of Farebox-Meter
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from tests.e2e.stage import Api, Gate
from tests.gateway.proxy import misbehave
from tests.gateway.proxy.misbehave import Request, Upstream, Writer

PROMPT_TOKENS = 1_000


class Chat:
    """The upstream at a path of the test's own."""

    def __init__(self, api: Api, path: str) -> None:
        self.requests: list[Request] = []
        self.before: Callable[[], object] = lambda: None  # called while a request waits
        self.gate = Gate(api._background)
        misbehave.BEHAVIOURS[path.encode()] = self._answer

    async def _answer(self, _up: Upstream, request: Request, writer: Writer) -> bool:
        self.requests.append(request)
        await asyncio.to_thread(self.before)
        asked = json.loads(request.body)
        token = b"".join(request.header(b"farebox-meter")).decode()
        said = "".join(
            f"{name}: {value.replace('{t}', token)}\r\n" for name, value in asked.get("say", [])
        )
        if asked.get("stream"):
            return await self._events(asked, said, writer)
        usage = self._usage(asked, asked["words"])
        body = {"id": "chat-1", "choices": [{"message": {"content": "word " * asked["words"]}}]}
        text = json.dumps({**body, **({} if usage is None else {"usage": usage})}).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n{said}"
        if asked.get("break_at") is not None:
            writer.write(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text[:-20])
            await writer.drain()
            misbehave.reset(writer)
            return False
        writer.write(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
        return True

    def _usage(self, asked: dict[str, Any], words: int) -> Any:
        if asked.get("usage") is False:
            return None
        true = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": words}
        return asked.get("counts", {**true, "total_tokens": PROMPT_TOKENS + words})

    async def _events(self, asked: dict[str, Any], said: str, writer: Writer) -> bool:
        head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked"
        writer.write(f"{head}\r\n{said}\r\n".encode())
        for n in range(asked["words"]):
            _chunk(writer, {"choices": [{"delta": {"content": f"word {n}"}}], "usage": None})
            try:
                await writer.drain()
            except ConnectionError:
                return False
            if asked.get("break_at") == n + 1:
                await asyncio.sleep(0)
                misbehave.reset(writer)
                return False
            if asked.get("gate_at") == n + 1:
                await self.gate.wait()
        usage = self._usage(asked, asked["words"])
        if usage is not None:
            _chunk(writer, {"choices": [], "usage": usage})
        _write(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        return True


def _chunk(writer: Writer, value: dict[str, Any]) -> None:
    _write(writer, b"data: " + json.dumps({"object": "chunk", **value}).encode() + b"\n\n")


def _write(writer: Writer, data: bytes) -> None:
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))
