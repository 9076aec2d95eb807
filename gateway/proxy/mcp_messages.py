"""JSON-RPC messages of MCP as a client sends them, read strictly, and how they are refused.

What goes up is written anew from what was read here: an upstream that reads JSON more loosely (the
last of two equal keys, keys in any case) sees no other message than the one that was priced. A
payment in ``params._meta`` does not go up, and neither does it say there that the caller can pay:
it is we who are paid (x402's MCP transport, both of its bindings). What comes down: mcp_answers.py.
"""

from __future__ import annotations

import json
import re
from base64 import b64decode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from gateway.errors import Problem
from gateway.pricing.asked import plain
from gateway.proxy.routes_table import Route
from wallet_auth.strict import json_object

PAYMENT: Final = "x402/payment"
RESPONSE: Final = "x402/payment-response"
EXTENSION: Final = "org.x402/payment"
CALL: Final = "tools/call"
LIST: Final = "tools/list"
DISCOVER: Final = "server/discover"
EVERY: Final = "*"
_OF_MCP: Final = "io.modelcontextprotocol/"
_CAPABILITIES: Final = f"{_OF_MCP}clientCapabilities"
_REVISION: Final = f"{_OF_MCP}protocolVersion"
_WITH_RESULT_TYPES: Final = "2026-07-28"  # from this revision on every result names its type
_MEMBERS: Final = frozenset({"jsonrpc", "method", "params", "id", "result", "error"})
_PARAMS: Final = frozenset({"name", "arguments", "_meta"})
_REVISIONS: Final = re.compile(r"20[0-9]{2}-[0-9]{2}-[0-9]{2}")
_CODED: Final = re.compile(r"=\?base64\?([A-Za-z0-9+/]*={0,2})\?=")


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a client. ``tool`` and ``payment`` are of a ``tools/call`` only.

    ``extension``: the caller takes ``payment_required`` for an answer; ``typed``: its revision of
    MCP wants every result to name its type.
    """

    value: dict[str, Any]
    method: str
    tool: str = ""
    payment: dict[str, Any] | None = None
    extension: bool = False
    typed: bool = False

    @property
    def id(self) -> Any:
        return self.value.get("id")

    @property
    def up(self) -> bytes:
        """The message for the upstream."""
        return json.dumps(self.value, separators=(",", ":")).encode()

    @property
    def arguments(self) -> bytes:
        """What a tool is asked, the same for the same question."""
        return _plain(self.value["params"].get("arguments"))

    @property
    def content(self) -> bytes:
        """What makes a call this one: with what an earlier answer of the tool asked for."""
        params = self.value["params"]
        if params.keys() <= _PARAMS:
            return self.arguments
        return _plain({name: params[name] for name in params if name not in {"name", "_meta"}})


def _plain(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def read(body: bytes) -> Message:
    """The message of a request. Raises ``Problem("invalid_request")``."""
    if body.lstrip(b" \t\r\n").startswith(b"["):
        raise Problem("invalid_request", "Send one JSON-RPC message a request, no batch.")
    try:
        value = json_object(body)
    except ValueError as error:
        raise Problem("invalid_request", f"The message is {error}.") from None
    _require_plain(value, _MEMBERS)
    method = value.get("method", "")
    if not isinstance(method, str):
        raise Problem("invalid_request", "method is not text.")
    if method != CALL and plain(method) == CALL:
        raise Problem("invalid_request", f"The method {CALL} is misspelled.")
    params = value.get("params")
    payment, extension, typed = _said(params)
    if method != CALL:
        return Message(value, method, extension=extension, typed=typed)
    if not isinstance(params, dict) or not isinstance(params.get("name"), str):
        raise Problem("invalid_request", "tools/call needs params with the name of a tool.")
    if not isinstance(value.get("id"), str | int) or isinstance(value.get("id"), bool):
        raise Problem("invalid_request", "tools/call needs an id: text or a whole number.")
    _require_plain(params, _PARAMS)
    return Message(value, method, params["name"], _payment(payment), extension, typed)


def _require_plain(value: Mapping[str, Any], known: Iterable[str]) -> None:
    """No key that some reader takes for another one."""
    for key in value:
        if key not in known and plain(key) in known:
            raise Problem("invalid_request", f"The member {key[:40]!r} is misspelled.")


_NONE: Final = object()


def _said(params: Any) -> tuple[object, bool, bool]:
    """What ``params._meta`` says about paying, taken out of it, and what it says about the caller:
    its payment, whether it speaks the extension, and whether it wants results to name their type.
    """
    meta = params.get("_meta") if isinstance(params, dict) else None
    if not isinstance(meta, dict):
        return _NONE, False, False
    payment = meta.pop(PAYMENT, _NONE)
    capabilities = meta.get(_CAPABILITIES)
    known = capabilities.get("extensions") if isinstance(capabilities, dict) else None
    extension = isinstance(known, dict) and isinstance(known.pop(EXTENSION, None), dict)
    revision = meta.get(_REVISION)
    typed = (
        isinstance(revision, str)
        and _REVISIONS.fullmatch(revision) is not None
        and revision >= _WITH_RESULT_TYPES
    )
    if not meta:
        del params["_meta"]
    return payment, extension, typed


def _payment(found: object) -> dict[str, Any] | None:
    """The payment of a call."""
    if found is _NONE:
        return None
    if isinstance(found, str):
        try:
            found = json_object(found.encode())
        except ValueError as error:
            raise Problem("invalid_payload", f"The payment is {error}.") from None
    if not isinstance(found, dict):
        raise Problem("invalid_payload", "The payment is not an object.")
    return found


def require_same(incoming: Iterable[tuple[bytes, bytes]], message: Message) -> None:
    """The header fields that repeat a message (MCP 2026-07-28, streamable HTTP) say the same: an
    upstream that goes by them would else run another tool than the one that was priced."""
    told = {b"mcp-method": message.method}
    if message.method == CALL:
        told[b"mcp-name"] = message.tool
    for name, value in incoming:
        wanted = told.get(name.lower())
        if wanted is not None and _decoded(value) != wanted:
            raise Problem("invalid_request", f"{name.decode()} does not say what the message does.")


def _decoded(value: bytes) -> str | None:
    """A header field's text, which may be coded; None if it is not what it seems to be."""
    text = value.decode("latin-1").strip(" \t")
    coded = _CODED.fullmatch(text)
    try:
        return text if coded is None else b64decode(coded[1], validate=True).decode()
    except ValueError:
        return None


def price_of(tools: Mapping[str, Route], name: str) -> Route:
    """The route of a tool. Raises ``Problem("not_found")``."""
    found = tools.get(name)
    if found is None:
        # A server may read names loosely: another spelling of a priced one is not sold as "*".
        loose = plain(name)
        if not any(plain(known) == loose for known in tools if known != EVERY):
            found = tools.get(EVERY)
    if found is None:
        raise Problem("not_found", f"There is no tool {name[:60]!r} here.")
    return found


# -- refusals -----------------------------------------------------------------------------------


def refusal(problem: Problem, message: Message, log_id: str) -> dict[str, Any]:
    """A refusal as the result of a call (x402's MCP transport): of type ``payment_required`` for
    who speaks the extension, if it is one to pay; the result of a tool that failed for all others.
    """
    header = problem.headers.get("PAYMENT-REQUIRED")
    told = problem.body(log_id)
    if header is not None:
        told = json.loads(b64decode(header))
        told["resource"]["url"] = f"mcp://tool/{message.tool}"
    if header is not None and message.extension:
        result: dict[str, Any] = {"resultType": "payment_required", "paymentRequired": told}
    else:
        text = {"type": "text", "text": json.dumps(told)}
        result = {"content": [text], "structuredContent": told, "isError": True}
        if message.typed:
            result["resultType"] = "complete"
    response = problem.headers.get("PAYMENT-RESPONSE")
    if response is not None:
        result["_meta"] = {RESPONSE: json.loads(b64decode(response))}
    return result


def answer(message_id: Any, member: str, value: object) -> bytes:
    """A JSON-RPC response."""
    return json.dumps({"jsonrpc": "2.0", "id": message_id, member: value}).encode()
