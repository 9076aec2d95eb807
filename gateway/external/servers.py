"""MCP servers as an invoke finds them: the session that some want first, and what tools they have.

**An invoke has a session of its own.** A server may keep by its session what a caller did there, so
no session is shared between two calls: it is begun under the hold of the call, and ended after the
answer. Whether a server gives sessions is learned when one is begun, and forgotten when it refuses
a call; one that gives none is called straight away.

**The list of tools** is the server's own word: asked for at most every few minutes, by one at a
time. Who lists tools waits a moment for it the first time, and then has what was known before.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final, NamedTuple

from gateway.errors import Problem
from gateway.external.catalog import ANYTHING, Server, Tool
from gateway.fields import Fields
from gateway.node import Node
from gateway.observe import log
from gateway.proxy import events, forward, headers, mcp_answers, outcome
from gateway.proxy import target as targets
from gateway.proxy.forward import HeldCall, Incoming
from gateway.proxy.mcp_messages import LIST
from gateway.proxy.routes_table import upstream_target
from gateway.proxy.upstream import Answer, Timeouts, open_upstream

SESSION: Final = b"mcp-session-id"
VERSION: Final = b"mcp-protocol-version"
OF_MCP: Final = frozenset((SESSION, VERSION, b"mcp-method", b"mcp-name", b"last-event-id"))
"""Fields of the transport, which an invoke sets itself."""
PROTOCOL: Final = "2025-06-18"
FRESH_S: Final = 300
AGAIN_S: Final = 10
"""How soon a server that did not tell its tools is asked for them again."""
PATIENCE_S: Final = 2
"""How long a list of actions waits for a server that nothing is known of."""
_WITHIN_S: Final = 10
_END_S: Final = 2
_PAGES: Final = 20
_MOST_TOOLS: Final = 2_000
_MOST_SCHEMA: Final = 32 * 1024
_MOST_WORDS: Final = 2_000
_ID: Final = re.compile(rb"[!-~]{1,1024}")
_DATE: Final = re.compile(r"20[0-9]{2}-[0-9]{2}-[0-9]{2}")
_UP: Final = (
    (b"content-type", b"application/json"),
    (b"accept", b"application/json, text/event-stream"),
    (b"accept-encoding", b"identity"),
)
# -- sessions -----------------------------------------------------------------------------------


@asynccontextmanager
async def in_session(server: Server, call: HeldCall, incoming: Incoming) -> AsyncIterator[Answer]:
    """The call of a tool, in a session of its own if the server gives any. Raises ``Problem``."""
    node, session = call.node, Fields()
    if server.stateful is not False:
        session = await _begin(node, server, _WITHIN_S)
    try:
        fields = Fields([*incoming.headers, *session])
        async with forward.open_call(call, incoming._replace(headers=fields)) as answer:
            if answer.status in (400, 404):
                server.stateful = None  # it may want one after all
            yield answer
    finally:
        await _end(node, server, session)


async def _begin(node: Node, server: Server, within_s: float) -> Fields:
    """Begin a session: the fields that name it, or none where there are no sessions. Raises
    ``Problem``."""
    params = {
        "protocolVersion": PROTOCOL,
        "capabilities": {},
        "clientInfo": {"name": "farebox", "version": "1"},
    }
    told = await _ask(node, server, "initialize", params, Fields(), within_s)
    server.stateful = told.result is not None and told.session is not None
    if told.result is None or told.session is None:
        return Fields()
    version = told.result.get("protocolVersion")
    if not isinstance(version, str) or not _DATE.fullmatch(version):
        version = PROTOCOL
    session = Fields([(SESSION, told.session), (VERSION, version.encode())])
    await _ask(node, server, "notifications/initialized", None, session, within_s)
    return session


async def _end(node: Node, server: Server, session: Fields) -> None:
    """End a session. A server that does not hear of it, or does not do it, forgets it by itself."""
    if not session:
        return
    try:
        async with _open(node, server, "DELETE", b"", session, _END_S) as answer:
            await answer.read(1024)
    except Problem as problem:
        log.info("a session at %s was not ended: %s", server.mount.upstream, problem.detail)


# -- tools --------------------------------------------------------------------------------------


async def tools_of(node: Node, server: Server) -> Mapping[str, Tool]:
    """The server's tools by name, as far as they are known now."""
    if server.looking is None and time.monotonic() >= server.look_at_s:
        server.looking = asyncio.create_task(_look(node, server))
    if server.tools is None and server.looking is not None:
        await asyncio.wait((server.looking,), timeout=PATIENCE_S)
    return server.tools or {}


async def _look(node: Node, server: Server) -> None:
    again_s: float = AGAIN_S
    try:
        session = await _begin(node, server, _WITHIN_S)
        try:
            server.tools = await _listed(node, server, session)
            again_s = FRESH_S
        finally:
            await _end(node, server, session)
    except Problem as problem:
        log.info("%s does not tell its tools: %s", server.mount.upstream, problem.detail)
    finally:
        server.look_at_s = time.monotonic() + again_s
        server.looking = None


async def _listed(node: Node, server: Server, session: Fields) -> dict[str, Tool]:
    found: dict[str, Tool] = {}
    params: dict[str, Any] | None = None
    for _ in range(_PAGES):
        told = await _ask(node, server, LIST, params, session, _WITHIN_S)
        if told.result is None:
            raise Problem("upstream_error", "it has no list of tools")
        listed = told.result.get("tools")
        for tool in listed if isinstance(listed, list) else ():
            if isinstance(tool, dict) and isinstance(tool.get("name"), str):
                found[tool["name"]] = Tool(_schema(tool), _words(tool))
        cursor = told.result.get("nextCursor")
        if not isinstance(cursor, str) or len(found) >= _MOST_TOOLS:
            break
        params = {"cursor": cursor}
    return found


def _schema(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    schema = tool.get("inputSchema")
    if not isinstance(schema, dict) or len(json.dumps(schema)) > _MOST_SCHEMA:
        return ANYTHING
    return schema


def _words(tool: Mapping[str, Any]) -> str:
    words = tool.get("description")
    return words[:_MOST_WORDS] if isinstance(words, str) else ""


# -- messages -----------------------------------------------------------------------------------


class _Told(NamedTuple):
    """The result of a request (None: an error, or no JSON-RPC at all), and the session it began."""

    result: dict[str, Any] | None
    session: bytes | None


async def _ask(  # noqa: PLR0917  (a message and where it goes)
    node: Node,
    server: Server,
    method: str,
    params: Mapping[str, Any] | None,
    session: Fields,
    within_s: float,
) -> _Told:
    """Send a message of our own. A notification is answered with nothing. Raises ``Problem``."""
    message: dict[str, Any] = {"jsonrpc": "2.0", "method": method}
    if not method.startswith("notifications/"):
        message["id"] = 1
    if params is not None:
        message["params"] = params
    body = json.dumps(message).encode()
    async with _open(node, server, "POST", body, session, within_s) as answer:
        named = answer.values(SESSION)
        if answer.status >= 500:
            raise Problem("upstream_error", f"the upstream answered {answer.status} to {method}")
        if answer.status >= 300 or "id" not in message:
            await answer.read(mcp_answers.MAX_RESULT_BYTES)
            return _Told(None, None)
        found = await _response(answer)
    if len(named) > 1 or (named and not _ID.fullmatch(named[0])):
        raise Problem("upstream_error", "the upstream's session has no name that can be sent")
    result = None if found is None else found.get("result")
    return _Told(result if isinstance(result, dict) else None, named[0] if named else None)


def _open(  # noqa: PLR0917  (a request)
    node: Node, server: Server, method: str, body: bytes, session: Fields, within_s: float
) -> open_upstream:
    mount = server.mount
    behind = node.upstreams[mount.upstream]
    usual = forward.timeouts_of(node, behind, mount.free)
    most_s = min(within_s, usual.total_s)
    return open_upstream(
        node.client,
        behind.origin,
        method,
        upstream_target(mount, behind.origin.base_path, targets.parse(mount.mount.encode())),
        headers=headers.request_headers(
            [*_UP, *session], host=behind.origin.authority, inject=behind.inject
        ),
        body=body if method == "POST" else None,
        timeouts=Timeouts(min(usual.connect_s, most_s), most_s, most_s, most_s),
    )


async def _response(answer: Answer) -> dict[str, Any] | None:
    """The response to our message, alone or among the events of a stream."""
    if not outcome.streams(answer.headers):
        body, whole = await answer.read(mcp_answers.MAX_RESULT_BYTES)
        found = events.object_of(body) if whole else None
        return found if mcp_answers.answers(found, 1) else None
    waiting = b""
    async with aclosing(answer.chunks()) as pieces:
        async for piece in pieces:
            waiting += piece
            while (parts := events.split(waiting)) is not None:
                event, waiting = parts
                found = events.data_of(event)
                if mcp_answers.answers(found, 1):
                    return found
            if len(waiting) > mcp_answers.MAX_RESULT_BYTES:
                break
    return None
