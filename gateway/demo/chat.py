"""A chat completion in OpenAI's form, for the sample API: in one piece and as a stream of events.

It repeats what it was asked, a word a token. As with the true ones, a stream says what was used
only if it is asked for (``stream_options.include_usage``).
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, Final

from starlette.responses import JSONResponse, Response, StreamingResponse

MOST_WORDS: Final = 1_000
_DONE: Final = "data: [DONE]\n\n"


def complete(body: bytes) -> Response:
    """The answer to ``{"model": …, "messages": [{"content": "…"}]}``; 422 for anything else."""
    asked = _asked(body)
    if asked is None:
        wanted = f"send messages whose contents have 1 to {MOST_WORDS} words"
        return JSONResponse({"error": {"message": wanted}}, status_code=422)
    request, words = asked
    usage = {
        "prompt_tokens": len(words),
        "completion_tokens": len(words),
        "total_tokens": 2 * len(words),
    }
    head = {"id": "chatcmpl-sample", "created": 0, "model": str(request.get("model", "sample"))}
    if request.get("stream") is True:
        options = request.get("stream_options")
        told = isinstance(options, dict) and options.get("include_usage") is True
        stream = _events(head, words, usage if told else None)
        return StreamingResponse(stream, media_type="text/event-stream")
    message = {"role": "assistant", "content": " ".join(words)}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage})


def _asked(body: bytes) -> tuple[dict[str, Any], list[str]] | None:
    try:
        request: Any = json.loads(body)
        contents = [message["content"] for message in request["messages"]]
        words = " ".join(contents).split()
    except (ValueError, TypeError, KeyError):
        return None
    return (request, words) if 1 <= len(words) <= MOST_WORDS else None


async def _events(
    head: dict[str, Any], words: list[str], usage: dict[str, int] | None
) -> AsyncIterator[str]:
    chunk = {**head, "object": "chat.completion.chunk"}
    for n, word in enumerate(words):
        delta = {"content": word if n == 0 else f" {word}"}
        yield _event({**chunk, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
    end = {"index": 0, "delta": {}, "finish_reason": "stop"}
    yield _event({**chunk, "choices": [end]})
    if usage is not None:
        yield _event({**chunk, "choices": [], "usage": usage})
    yield _DONE


def _event(value: object) -> str:
    return f"data: {json.dumps(value)}\n\n"
