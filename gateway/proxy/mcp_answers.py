"""What an MCP server says, and what of it a caller gets to see.

Of x402's words there is none left but our own, in answers to priced calls and in all others: a
result that asks for payment would have the client pay whoever it names. What cannot be read is not
passed where a client might read it.
"""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from gateway.errors import Problem
from gateway.money import format_credits, format_usd
from gateway.pricing.quote import PriceRule
from gateway.pricing.scheduled import in_force
from gateway.proxy import events
from gateway.proxy.mcp_messages import EXTENSION, RESPONSE, price_of
from gateway.proxy.routes_table import Route

INTERNAL_ERROR: Final = -32603
MAX_RESULT_BYTES: Final = 4 << 20
_ASKING: Final = (402, -32402)  # codes of JSON-RPC errors that ask for payment
_OURS: Final = ("x402/", "farebox/")
Show = Callable[[dict[str, Any]], dict[str, Any]]


def why_not_charged(response: Mapping[str, Any]) -> str | None:
    """The reason on the row; None for a result. Raises ``Problem`` if it asks for payment."""
    error, result = response.get("error"), response.get("result")
    if error is not None:
        if isinstance(error, dict) and error.get("code") in _ASKING:
            raise _wants_payment()
        return "answer_with:error"
    if not isinstance(result, dict):
        return "answer_without:result"
    kind = result.get("resultType")
    if kind == "payment_required" or "paymentRequired" in result:
        raise _wants_payment()
    if kind == "input_required":  # it is asked again, with what it wants to know
        return "answer_with:result.resultType"
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
    return {**response, "result": {**result, "_meta": {**_theirs(result), **ours}}}


def _theirs(result: Mapping[str, Any]) -> dict[str, Any]:
    """``_meta`` without what only we say."""
    meta = result.get("_meta")
    found = meta.items() if isinstance(meta, dict) else ()
    return {name: value for name, value in found if not name.startswith(_OURS)}


def unchanged(response: dict[str, Any]) -> dict[str, Any]:
    """What most free answers are made into."""
    return response


def cleaned(message: dict[str, Any], show: Show = unchanged) -> dict[str, Any]:
    """A message as the caller may see it where nothing is charged. ``show``: what else is made of
    its result."""
    if "result" not in message and "error" not in message:
        return message  # a notice, or a question
    try:
        why_not_charged(message)
    except Problem as problem:
        error = {"code": INTERNAL_ERROR, "message": problem.detail, "data": {"code": problem.code}}
        return {"jsonrpc": "2.0", "id": message.get("id"), "error": error}
    result = message.get("result")
    return show(
        with_meta(message, {}) if isinstance(result, dict) and "_meta" in result else message
    )


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


def listed(
    response: dict[str, Any], tools: Mapping[str, Route], per_usd: int, now_s: int
) -> dict[str, Any]:
    """A list of tools with the prices that hold now, without those that are not sold."""
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
        sold.append(_priced(tool, in_force(route.price, now_s), per_usd))
    return {**response, "result": {**result, "tools": sold}}


def _priced(tool: dict[str, Any], rule: PriceRule, per_usd: int) -> dict[str, Any]:
    units, price = rule.fixed_units, dict[str, Any]()
    words = "Price: {usd} a call." if units else "Free."
    if units is None:
        price["rule"] = rule.describe()
        units, words = price["rule"].get("max_units"), "The price depends on the call."
        if units is not None:
            price["at_most"], words = True, "Price: {usd} a call at most."
    if units is not None:
        price |= {"units": units, "usd": format_usd(units)}
        price["credits"] = format_credits(units, per_usd)
    words = words.format_map(price)
    about = f"{tool.get('description') or ''} {words}".strip()
    return {**tool, "description": about, "_meta": {**_theirs(tool), "farebox/price": price}}


def advertised(response: dict[str, Any]) -> dict[str, Any]:
    """What a server says it can do, and that it is paid by x402's extension."""
    result = response.get("result")
    found = result.get("capabilities") if isinstance(result, dict) else None
    if not isinstance(found, dict) or not isinstance(result, dict):
        return response
    known = found.get("extensions")
    extensions = {**(known if isinstance(known, dict) else {}), EXTENSION: {}}
    return {**response, "result": {**result, "capabilities": {**found, "extensions": extensions}}}


# -- events -------------------------------------------------------------------------------------


def shown(event: bytes, show: Show = unchanged) -> bytes:
    """An event as the caller may see it. One with data that is no message is left out."""
    if not events.data_lines(event):
        return event
    found = events.data_of(event)
    if found is None:
        return b""
    kept = [line for line in events.lines_of(event) if line and line[:4] != b"data"]
    data = b"data: " + json.dumps(cleaned(found, show)).encode()
    return b"\n".join([*kept, data, b"", b""])


def event(value: object) -> bytes:
    """An event that holds a message."""
    return b"event: message\ndata: " + json.dumps(value).encode() + b"\n\n"


def answers(value: Mapping[str, Any] | None, message_id: Any) -> bool:
    """Whether a message is the response to ours."""
    return value is not None and "method" not in value and value.get("id") == message_id
