"""What the 402s of a route say for catalogs: read with the official SDKs, which do catalog it."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Iterator
from typing import Any

import pytest
from x402.extensions import bazaar as official
from x402.extensions.bazaar.facilitator import extract_discovery_info

from gateway.discovery import bazaar
from gateway.payments import challenge
from gateway.payments.offers import Asked
from gateway.proxy.routes_table import Route, RouteError, compile_routes
from tests.gateway.payments.parts import KEYS, settings_for
from tests.wallet_auth.support import KEY, Peer

NOW_S = 1_800_000_000
FULL = {
    "match": "POST /v1/users/[id]/render/*",
    "price": "$0.01",
    "description": "Renders.",
    "bazaar": {
        "path": {"id": "u-7"},
        "query": {"size": 2, "wide": True},
        "query_schema": {"properties": {"size": {"type": "integer"}}},
        "body": {"city": "Oslo", "at": [1.5, None]},
        "body_schema": {"type": "object", "required": ["city"]},
        "output": {"url": "https://x.test/é.png"},
        "output_schema": {"type": "object", "properties": {"url": {"type": "string"}}},
    },
}


def routes_of(*routes: dict[str, Any], **upstream: Any) -> dict[str, Route]:
    table = {"url": "http://127.0.0.1:9", "mount": "/api", "routes": list(routes), **upstream}
    found = compile_routes(settings_for(upstreams={"api": table}).upstreams)
    return {route.id.removeprefix("api "): route for route in found.routes}


def required(route: Route, method: str, path: str) -> dict[str, Any]:
    """PAYMENT-REQUIRED of a 402 of this route."""
    problem = challenge.for_call(
        settings_for(),
        KEYS,
        Asked(method, path.encode(), 10_000),
        NOW_S,
        description=route.description,
        extensions=f"{{{route.extensions[method]}}}",
    )
    found: dict[str, Any] = json.loads(b64decode(problem.headers["PAYMENT-REQUIRED"]))
    return found


@pytest.fixture(scope="module")
def sdk() -> Iterator[Peer]:
    peer = Peer("read_402.mjs")
    yield peer
    peer.close()


SHOWN = [
    ("GET /v1/forecast/*", "GET", "/api/v1/forecast/oslo?day=1", "/api/v1/forecast/:rest"),
    ("GET /v1/forecast/*", "HEAD", "/api/v1/forecast/oslo", "/api/v1/forecast/:rest"),
    ("DELETE /v1/[a]/x", "DELETE", "/api/v1/7/x", "/api/v1/:a/x"),
    ("POST /v1/plain", "POST", "/api/v1/plain?a=b", "/api/v1/plain"),
    ("* /v1/any", "PATCH", "/api/v1/any", "/api/v1/any"),
]


@pytest.mark.parametrize(("match", "method", "path", "listed"), SHOWN)
def test_a_route_of_which_nothing_is_told_is_cataloged(
    sdk: Peer, match: str, method: str, path: str, listed: str
) -> None:
    route = routes_of({"match": match, "price": "$0.01", "description": "About."})[match]
    told = required(route, method, path)
    got = sdk.ask({"key": KEY, "required": told})
    assert got["spec"] == {"valid": True}, got
    assert got["listed"]["resourceUrl"] == f"http://shop.test{listed}"
    assert (got["listed"]["method"], got["listed"]["description"]) == (method, "About.")
    # The client gives back what it was given, unchanged.
    assert got["payload"]["extensions"]["bazaar"] == told["extensions"]["bazaar"]
    found = extract_discovery_info(got["payload"], got["payload"]["accepted"])
    assert found is not None
    assert (found.resource_url, found.method) == (f"http://shop.test{listed}", method)
    assert len(route.extensions[method]) < 300  # it stands in every 402


def test_examples_and_schemas_of_the_operator(sdk: Peer) -> None:
    route = routes_of(FULL)["POST /v1/users/[id]/render/*"]
    told = required(route, "POST", "/api/v1/users/9/render/a/b")
    got = sdk.ask({"key": KEY, "required": told})
    assert got["listed"]["resourceUrl"] == "http://shop.test/api/v1/users/:id/render/:rest"
    info = got["listed"]["discoveryInfo"]
    assert info == {
        "input": {
            "type": "http",
            "method": "POST",
            "pathParams": {"id": "u-7"},
            "queryParams": {"size": 2, "wide": True},
            "bodyType": "json",
            "body": {"city": "Oslo", "at": [1.5, None]},
        },
        "output": {"type": "json", "example": {"url": "https://x.test/é.png"}},
    }
    found = extract_discovery_info(got["payload"], got["payload"]["accepted"])
    assert isinstance(found.discovery_info if found else None, official.BodyDiscoveryInfo)


@pytest.mark.parametrize(
    ("member", "wrong"),
    [("query", {"size": "two"}), ("body", {}), ("output", {"url": 1})],
)
def test_an_example_is_held_against_its_schema(sdk: Peer, member: str, wrong: Any) -> None:
    """By whoever catalogs it, so the schemas stand where they are looked for."""
    entry = {**FULL, "bazaar": {**FULL["bazaar"], member: wrong}}  # type: ignore[dict-item]  # a table
    told = required(routes_of(entry)["POST /v1/users/[id]/render/*"], "POST", "/api/v1/users/9/a")
    assert sdk.ask({"key": KEY, "required": told})["listed"] is None


def test_a_tool_is_cataloged_by_its_name(sdk: Peer) -> None:
    table = {"kind": "mcp", "url": "http://127.0.0.1:9/mcp", "mount": "/mcp", "routes": []}
    tools = {'say "é"': "$0.01", "free": "free", "*": "$0.01"}
    found = compile_routes(settings_for(upstreams={"t": {**table, "tools": tools}}).upstreams)
    mount = found.match("POST", b"/mcp")
    declared = {name: route.extensions for name, route in mount.tools.items()}  # type: ignore[union-attr]  # it is a mount
    assert declared["*"] == {}
    told = required(mount.tools['say "é"'], "POST", "/mcp")  # type: ignore[union-attr]  # it is a mount
    got = sdk.ask({"key": KEY, "required": told})
    assert (got["spec"], got["listed"]["toolName"]) == ({"valid": True}, 'say "é"')


def test_it_can_be_left_out_and_is_for_what_is_sold() -> None:
    found = routes_of(
        {"match": "GET /a", "price": "$0.01", "bazaar": False},
        {"match": "GET /b", "price": "free"},
        {"match": "OPTIONS /c", "price": "$0.01"},
    )
    assert [route.extensions for route in found.values()] == [{}, {}, {}]


FAULTS = [
    ({"body": {}}, "body is for POST"),
    ({"path": {"nobody": 1}}, "no [nobody]"),
    ({"query": {"long": "x" * bazaar.MOST_BYTES}}, "more than 2048"),
    ({"query_schema": {"allOf": [{"$ref": "https://x.test/"}]}}, "leads out of it"),
    ({"output_schema": {"$id": "file:///etc"}}, "leads out of it"),
]


@pytest.mark.parametrize(("about", "words"), FAULTS)
def test_what_no_catalog_would_take_is_a_fault(about: dict[str, Any], words: str) -> None:
    with pytest.raises(RouteError, match=r"GET /v1/\[id\]") as caught:
        routes_of({"match": "GET /v1/[id]", "price": "$0.01", "bazaar": about})
    assert words in str(caught.value)
    inside = {
        "match": "GET /v1/[id]",
        "price": "$0.01",
        "bazaar": {"query_schema": {"$ref": "#/a"}},
    }
    assert routes_of(inside)
