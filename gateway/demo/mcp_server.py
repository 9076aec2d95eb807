"""The sample MCP server of the demo and the tests: streamable HTTP, three tools, no payment.

``search`` answers in one piece, ``count`` as a stream with its progress, ``fail`` with an error.
It keeps no sessions, and counts the calls that really arrive.
"""

from __future__ import annotations

import json
from typing import Any, Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gateway.demo.upstreams import Calls

PROTOCOL: Final = "2025-06-18"
MOST: Final = 20
_TEXT: Final = {"type": "string", "maxLength": 200}
TOOLS: Final[list[dict[str, Any]]] = [
    {
        "name": "search",
        "description": "Looks a word up.",
        "inputSchema": {"type": "object", "properties": {"q": _TEXT}, "required": ["q"]},
    },
    {
        "name": "count",
        "description": "Counts up to a number and tells its progress.",
        "inputSchema": {
            "type": "object",
            "properties": {"to": {"type": "integer", "minimum": 1, "maximum": MOST}},
            "required": ["to"],
        },
    },
    {
        "name": "fail",
        "description": "Always fails.",
        "inputSchema": {"type": "object", "properties": {}},
    },
]


def build(calls: Calls) -> Starlette:
    """The server as an ASGI application that counts in ``calls``."""
    app = Starlette(routes=[Route("/mcp", _message, methods=["POST"])])
    app.state.calls = calls
    return app


async def _message(request: Request) -> Response:
    message = await request.json()
    if "id" not in message:
        return Response(status_code=202)
    method, params = message.get("method"), message.get("params") or {}
    if method == "tools/call":
        return _call(request, message["id"], params)
    if method == "initialize":
        info = {"name": "sample", "version": "1"}
        capabilities: dict[str, Any] = {"tools": {}}
        result: dict[str, Any] = {
            "protocolVersion": params.get("protocolVersion", PROTOCOL),
            "capabilities": capabilities,
            "serverInfo": info,
        }
    elif method == "tools/list":
        result = {"tools": TOOLS}
    elif method == "ping":
        result = {}
    else:
        error = {"code": -32601, "message": "There is no such method."}
        return _answer(message["id"], "error", error)
    return _answer(message["id"], "result", result)


def _answer(message_id: Any, member: str, value: object) -> Response:
    return JSONResponse({"jsonrpc": "2.0", "id": message_id, member: value})


def _text(text: str, *, failed: bool = False) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": text}], "isError": failed}


def _call(request: Request, message_id: Any, params: dict[str, Any]) -> Response:
    calls: Calls = request.app.state.calls
    name, arguments = params.get("name"), params.get("arguments") or {}
    calls.note("TOOL", str(name), request.headers.get("farebox-request-id"))
    if name == "search":
        found = _text(f"{arguments.get('q')}: found in the sample")
        return _answer(message_id, "result", found)
    if name == "fail":
        return _answer(message_id, "result", _text("it failed, as always", failed=True))
    if name == "count":
        to = arguments.get("to")
        if not isinstance(to, int) or not 1 <= to <= MOST:
            return _answer(message_id, "result", _text(f"to is from 1 to {MOST}", failed=True))
        token = (params.get("_meta") or {}).get("progressToken", "count")
        return Response(_events(message_id, to, token), media_type="text/event-stream")
    return _answer(message_id, "error", {"code": -32602, "message": "There is no such tool."})


def _events(message_id: Any, to: int, token: object) -> str:
    told: list[dict[str, Any]] = [
        {
            "jsonrpc": "2.0",
            "method": "notifications/progress",
            "params": {"progressToken": token, "progress": n, "total": to},
        }
        for n in range(1, to + 1)
    ]
    told.append({"jsonrpc": "2.0", "id": message_id, "result": _text(f"counted to {to}")})
    return "".join(f"event: message\ndata: {json.dumps(each)}\n\n" for each in told)
