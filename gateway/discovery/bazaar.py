"""The ``bazaar`` extension of x402: how a route is called, for whoever catalogs it.

It stands in the 402s of a route and comes back in the payments for it, so it is kept small: method
and path always, examples and schemas only where the operator gives them, and none of it is made
for a request. A facilitator checks ``info`` against ``schema`` (JSON Schema 2020-12) and then lists
the route under its origin and ``routeTemplate``.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from gateway.sections import Bazaar

EXTENSION: Final = "bazaar"
MOST_BYTES: Final = 2_048
"""Of one route's extension. Proxies refuse headers beyond 8 KB, and with the other extensions and
base64 around it this is what is left."""
_QUERY: Final = ("GET", "HEAD", "DELETE")
_BODY: Final = ("POST", "PUT", "PATCH")
_NAMED: Final = re.compile(r"\[(\w+)\]")


def of_route(method: str, public_pattern: str, about: Bazaar | None) -> dict[str, str]:
    """The extension as a member of ``extensions`` (JSON text), for each method of a route.

    ``method``: as in the route's ``match``. Empty if the operator does not want it, and without the
    methods that the extension has no word for. Raises ``ValueError`` with what is wrong.
    """
    if about is None:
        return {}
    named = {"*": (*_QUERY, *_BODY), "GET": ("GET", "HEAD")}.get(method, (method,))
    with_body = about.body is not None or about.body_schema is not None
    if with_body and not set(named) & set(_BODY):
        raise ValueError(f"bazaar.body is for {', '.join(_BODY)}")
    return {
        each: _member(_http(each, public_pattern, about))
        for each in named
        if each in (*_QUERY, *_BODY)
    }


def of_tool(name: str) -> str:
    """The same for a tool of an MCP server, whose own list has the schema of its arguments."""
    call: dict[str, Any] = {
        "type": "mcp",
        "toolName": name,
        "transport": "streamable-http",
        "inputSchema": {"type": "object"},
    }
    return _member({"info": {"input": call}, "schema": _schema(("type", "toolName"), {})})


def _http(method: str, pattern: str, about: Bazaar) -> dict[str, Any]:
    call: dict[str, Any] = {"type": "http", "method": method}
    schemas: dict[str, Any] = {}
    required = ["type", "method"]
    if about.path:
        call["pathParams"] = _of_pattern(about.path, pattern)
    if about.query:
        call["queryParams"] = about.query
    if about.query_schema is not None:
        schemas["queryParams"] = about.query_schema
    if method in _BODY:
        call["bodyType"] = about.body_type
        call["body"] = {} if about.body is None else about.body
        required.append("bodyType")
        if about.body_schema is not None:
            schemas["body"] = about.body_schema
    info: dict[str, Any] = {"input": call}
    if about.output is not None:
        info["output"] = {"type": about.output_type, "example": about.output}
    made: dict[str, Any] = {"info": info, "schema": _schema(required, schemas)}
    if about.output_schema is not None:
        made["schema"]["properties"]["output"] = {"properties": {"example": about.output_schema}}
    template = _template(pattern)
    if template != pattern:
        made["routeTemplate"] = template
    return made


def _of_pattern(examples: dict[str, Any], pattern: str) -> dict[str, Any]:
    names = _NAMED.findall(pattern)
    for name in examples:
        if name not in names:
            raise ValueError(f"bazaar.path names {name!r}, and the path has no [{name}]")
    return examples


def _template(pattern: str) -> str:
    """``/users/[id]/*`` as catalogs write it: ``/users/:id/:rest``."""
    named = _NAMED.sub(r":\1", pattern)
    return f"{named[:-1]}:rest" if named.endswith("/*") else named


def _schema(required: list[str] | tuple[str, ...], of_input: dict[str, Any]) -> dict[str, Any]:
    of_call: dict[str, Any] = {"required": list(required)}
    if of_input:
        of_call["properties"] = of_input
    return {"required": ["input"], "properties": {"input": of_call}}


def _member(made: dict[str, Any]) -> str:
    if _leads_outside(made["schema"]):
        raise ValueError("bazaar: a schema has a $ref or $id that leads out of it")
    text = json.dumps(made, separators=(",", ":"), allow_nan=False)
    if len(text) > MOST_BYTES:
        raise ValueError(
            f"bazaar has {len(text)} bytes as JSON, more than {MOST_BYTES}: it stands in every "
            "402 and in every payment"
        )
    return f'"{EXTENSION}":{text}'


def _leads_outside(schema: Any) -> bool:
    """Whether a schema would be fetched from somewhere: catalogs refuse such a one."""
    if isinstance(schema, list):
        return any(map(_leads_outside, schema))
    if not isinstance(schema, dict):
        return False
    return any(
        (name in {"$ref", "$id"} and not str(value).startswith("#")) or _leads_outside(value)
        for name, value in schema.items()
    )
