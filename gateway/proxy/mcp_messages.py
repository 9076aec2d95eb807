"""JSON-RPC messages of MCP, read strictly and written anew, and what they say about money.

What goes up is written anew from what was read here: an upstream that reads JSON more loosely (the
last of two equal keys, keys in any case) sees no other message than the one that was priced. A
payment in ``params._meta`` does not go up.

What comes down is the upstream's; of x402's words in it none is left but our own: a result that
asks for payment would have the client pay whoever it names.
"""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from gateway.errors import Problem
from gateway.money import format_credits, format_usd
from gateway.proxy.routes_table import Route
from wallet_auth.strict import json_object

PAYMENT: Final = "x402/payment"
RESPONSE: Final = "x402/payment-response"
CALL: Final = "tools/call"
LIST: Final = "tools/list"
EVERY: Final = "*"
INTERNAL_ERROR: Final = -32603
_MEMBERS: Final = frozenset({"jsonrpc", "method", "params", "id", "result", "error"})
_PARAMS: Final = frozenset({"name", "arguments", "_meta"})


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a client. ``tool`` and ``payment`` are of a ``tools/call`` only."""

    value: dict[str, Any]
    method: str
    tool: str = ""
    payment: dict[str, Any] | None = None

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
        asked = self.value["params"].get("arguments")
        return json.dumps(asked, separators=(",", ":"), sort_keys=True).encode()


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
    if method != CALL:
        return Message(value, method)
    params = value.get("params")
    if not isinstance(params, dict) or not isinstance(params.get("name"), str):
        raise Problem("invalid_request", "tools/call needs params with the name of a tool.")
    if not isinstance(value.get("id"), str | int) or isinstance(value.get("id"), bool):
        raise Problem("invalid_request", "tools/call needs an id: text or a whole number.")
    _require_plain(params, _PARAMS)
    return Message(value, method, params["name"], _payment(params))


def _require_plain(value: Mapping[str, Any], known: Iterable[str]) -> None:
    """No key that some reader takes for another one."""
    for key in value:
        if key not in known and key.strip().casefold() in known:
            raise Problem("invalid_request", f"The member {key[:40]!r} is misspelled.")


def _payment(params: dict[str, Any]) -> dict[str, Any] | None:
    """The payment of a call, taken out of it."""
    meta = params.get("_meta")
    if not isinstance(meta, dict) or PAYMENT not in meta:
        return None
    found = meta.pop(PAYMENT)
    if not meta:
        del params["_meta"]
    if isinstance(found, str):
        try:
            found = json_object(found.encode())
        except ValueError as error:
            raise Problem("invalid_payload", f"The payment is {error}.") from None
    if not isinstance(found, dict):
        raise Problem("invalid_payload", "The payment is not an object.")
    return found


def price_of(tools: Mapping[str, Route], name: str) -> Route:
    """The route of a tool. Raises ``Problem("not_found")``."""
    found = tools.get(name)
    if found is None:
        # A server may read names loosely: another spelling of a priced one is not sold as "*".
        loose = name.strip().casefold()
        if not any(known.casefold() == loose for known in tools if known != EVERY):
            found = tools.get(EVERY)
    if found is None:
        raise Problem("not_found", f"There is no tool {name[:60]!r} here.")
    return found


# -- answers ------------------------------------------------------------------------------------


def problem_result(problem: Problem, tool: str, log_id: str) -> dict[str, Any]:
    """A refusal as the result of a tool (x402's MCP transport, tool-result binding)."""
    header = problem.headers.get("PAYMENT-REQUIRED")
    told = problem.body(log_id)
    if header is not None:
        told = json.loads(b64decode(header))
        told["resource"]["url"] = f"mcp://tool/{tool}"
    result: dict[str, Any] = {
        "content": [{"type": "text", "text": json.dumps(told)}],
        "structuredContent": told,
        "isError": True,
    }
    response = problem.headers.get("PAYMENT-RESPONSE")
    if response is not None:
        result["_meta"] = {RESPONSE: json.loads(b64decode(response))}
    return result


def answer(message_id: Any, member: str, value: object) -> bytes:
    """A JSON-RPC response."""
    return json.dumps({"jsonrpc": "2.0", "id": message_id, member: value}).encode()


def why_not_charged(response: Mapping[str, Any]) -> str | None:
    """The reason on the row; None for a result. Raises ``Problem`` if it asks for payment."""
    error, result = response.get("error"), response.get("result")
    if error is not None:
        if isinstance(error, dict) and error.get("code") == 402:
            raise _wants_payment()
        return "answer_with:error"
    if not isinstance(result, dict):
        return "answer_without:result"
    if result.get("isError") is not True:
        return None
    if _asks(result.get("structuredContent")) or any(map(_asks_in_text, _texts(result))):
        raise _wants_payment()
    return "answer_with:result.isError"


def _wants_payment() -> Problem:
    return Problem("upstream_wants_payment", "The tool itself asks for payment.")


def _asks(value: object) -> bool:
    return isinstance(value, dict) and bool(value.keys() & {"x402Version", "x402_version"})


def _asks_in_text(text: str) -> bool:
    return "x402" in text and "accepts" in text


def _texts(result: Mapping[str, Any]) -> Iterable[str]:
    content = result.get("content")
    for item in content if isinstance(content, list) else ():
        if isinstance(item, dict) and isinstance(item.get("text"), str):
            yield item["text"]


def with_meta(response: dict[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """A response whose result says what we say about money, and nothing the upstream says."""
    result = response.get("result")
    if not isinstance(result, dict):
        return response
    theirs = result.get("_meta")
    kept = {
        name: value
        for name, value in (theirs.items() if isinstance(theirs, dict) else ())
        if not name.startswith(("x402/", "farebox/"))
    }
    return {**response, "result": {**result, "_meta": {**kept, **ours}}}


def money(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Header fields of a receipt as members of ``_meta``."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        lower = name.lower()
        if lower == "payment-response":
            found[RESPONSE] = json.loads(b64decode(value))
        elif lower.startswith("farebox-"):
            found["farebox/" + lower.removeprefix("farebox-")] = value
    return found


def listed(response: dict[str, Any], tools: Mapping[str, Route], per_usd: int) -> dict[str, Any]:
    """A list of tools with their prices, without those that are not sold."""
    result = response.get("result")
    found = result.get("tools") if isinstance(result, dict) else None
    if not isinstance(found, list) or not isinstance(result, dict):
        return response
    sold = []
    for tool in found:
        try:
            route = price_of(tools, tool["name"])
        except (Problem, TypeError, KeyError, AttributeError):
            continue
        sold.append(_priced(tool, route, per_usd))
    return {**response, "result": {**result, "tools": sold}}


def _priced(tool: dict[str, Any], route: Route, per_usd: int) -> dict[str, Any]:
    units = route.price.fixed_units
    price: dict[str, Any]
    if units == 0:
        words, price = "Free.", {"units": 0}
    elif units is None:
        words, price = "The price depends on the arguments.", {"rule": route.price.describe()}
    else:
        both = {"usd": format_usd(units), "credits": format_credits(units, per_usd)}
        words, price = f"Price: {both['usd']} a call.", {"units": units, **both}
    about = f"{tool.get('description') or ''} {words}".strip()
    meta = tool.get("_meta")
    kept = meta if isinstance(meta, dict) else {}
    return {**tool, "description": about, "_meta": {**kept, "farebox/price": price}}


# -- events -------------------------------------------------------------------------------------


def event(value: object) -> bytes:
    """An event that holds a message."""
    return b"event: message\ndata: " + json.dumps(value).encode() + b"\n\n"


def answers(value: Mapping[str, Any] | None, message_id: Any) -> bool:
    """Whether a message is the response to ours."""
    return value is not None and "method" not in value and value.get("id") == message_id
