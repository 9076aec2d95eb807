"""What requests cost by an earlier price list, wherever their route stands now."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.pricing.quote import PriceRequest, PriceRule
from gateway.proxy.past_lists import before, places, source_of, table_of, versions_in
from gateway.proxy.patterns import compile_pattern, meet
from gateway.proxy.routes_table import Route, RouteTable, compile_routes
from gateway.settings import Upstream

MODEL = {
    "rule": "by_params",
    "cases": [{"body": {"model": "big"}, "price": "$0.09"}],
    "default": "$0.03",
}


def upstreams(*routes: tuple[str, Any], name: str = "api", mount: str = "/") -> list[Upstream]:
    listed = [{"match": match, "price": price} for match, price in routes]
    made = {"name": name, "url": "http://127.0.0.1:1", "mount": mount, "routes": listed}
    return [Upstream.model_validate(made)]


def tools(name: str = "tools", **prices: str) -> list[Upstream]:
    made = {"name": name, "url": "http://127.0.0.1:1", "mount": "/mcp", "kind": "mcp"}
    return [Upstream.model_validate({**made, "tools": {**prices}})]


def cost(then: RouteTable, now: RouteTable, method: str, path: str) -> int | None:
    """What a request costs that may have been signed by the earlier list; None: the route that has
    it now always had it."""
    route = now.match(method, path.encode())
    assert isinstance(route, Route)
    had = places(then, now).get(route.id)
    if had is None:
        return None
    rule = before("v", then, had, route)
    below = path[len(route.mount.rstrip("/")) :].encode() or b"/"
    return rule.quote(PriceRequest(method, below, None, b"", None)).max_units


THEN = compile_routes(
    upstreams(("GET /cheap", "$0.001"), ("GET /free/*", "free"), ("* /*", "$0.01"))
)


@pytest.mark.parametrize(
    ("now", "path", "units"),
    [
        # the same list with other prices
        ([("GET /cheap", "$1"), ("GET /free/*", "$1"), ("* /*", "$1")], "/x", None),
        ([("GET /cheap", "$1"), ("GET /free/*", "$1"), ("* /*", "$1")], "/cheap", None),
        # a route in front
        ([("GET /new/*", "$1"), ("GET /cheap", "$0.001"), ("* /*", "$1")], "/new/x", 10_000),
        ([("GET /new/*", "$1"), ("GET /cheap", "$0.001"), ("* /*", "$1")], "/cheap", None),
        ([("GET /free/x", "$1"), ("GET /free/*", "free"), ("* /*", "$1")], "/free/x", 0),
        # one that is gone
        ([("GET /free/*", "free"), ("* /*", "$1")], "/cheap", 1_000),
        ([("GET /free/*", "free"), ("* /*", "$1")], "/x", 10_000),
        # another order
        ([("* /*", "$1"), ("GET /cheap", "$0.001")], "/cheap", 1_000),
        # another form of the same
        ([("GET /[name]", "$1")], "/cheap", 1_000),
        ([("GET /[name]", "$1")], "/x", 10_000),
        # of another method nothing was taken
        ([("GET /cheap", "$0.001"), ("POST /cheap", "$1"), ("* /*", "$1")], "/cheap", None),
    ],
)
def test_a_request_costs_what_it_did_where_it_stood(now: Any, path: str, units: int | None) -> None:
    assert cost(THEN, compile_routes(upstreams(*now)), "GET", path) == units


def test_an_upstream_of_another_name_or_mount() -> None:
    then = compile_routes(upstreams(("GET /v1/*", "$0.01"), name="old", mount="/api"))
    now = compile_routes(upstreams(("GET /api/v1/*", "$0.05"), name="new"))
    assert cost(then, now, "GET", "/api/v1/x") == 10_000
    assert cost(then, now, "HEAD", "/api/v1/x") == 10_000
    # What was not sold had no price: it is the present one.
    then = compile_routes(upstreams(("GET /v1/a", "$0.01"), name="old", mount="/api"))
    assert cost(then, now, "GET", "/api/v1/x") == 50_000


def test_a_price_that_hung_on_the_body_is_read_from_it() -> None:
    then = compile_routes(upstreams(("POST /*", MODEL)))
    now = compile_routes(upstreams(("POST /chat", "$0.05"), ("POST /*", MODEL)))
    (route, _) = now.routes
    rule = before("v", then, places(then, now)[route.id], route)
    assert (rule.needs_body, rule.metered) == (True, False)

    def units(body: bytes, kind: bytes = b"application/json") -> int:
        return rule.quote(PriceRequest("POST", b"/chat", None, kind, body)).max_units

    assert (units(b"{}"), units(b'{"model": "big"}')) == (30_000, 90_000)
    # Of what could not be priced then nobody has read a price.
    assert units(b"nonsense") == units(b"{}", b"text/plain") == 50_000


def test_a_tool_that_got_a_price_of_its_own() -> None:
    then = compile_routes(tools(**{"search": "$0.001", "*": "$0.002"}))
    now = compile_routes(tools(**{"search": "$1", "find": "$1", "*": "$1"}))
    found = {
        key: [route.price.fixed_units for route in had] for key, had in places(then, now).items()
    }
    assert found == {"tools tool find": [2_000]}
    renamed = compile_routes(tools("other", search="$1", find="$1"))
    found = {
        key: [route.price.fixed_units for route in had]
        for key, had in places(then, renamed).items()
    }
    assert found == {"other tool search": [1_000], "other tool find": [2_000]}
    route = renamed.every()[0]
    assert before("v", then, places(then, renamed)[route.id], route).fixed_units == 1_000


def test_a_list_is_made_again_from_what_is_kept_of_it() -> None:
    given = [
        *upstreams(("GET /a/[b]", "$0.01"), ("POST /*", MODEL)),
        *tools(**{"search": "$0.001", "*": "$0.002"}),
    ]
    table = compile_routes(given)
    version, source = source_of(given, table)
    rules: dict[str, PriceRule] = {route.price.version: route.price for route in table.every()}
    assert versions_in(source) == rules.keys()
    again = table_of(source, rules)
    assert [(r.id, r.mount, r.price) for r in again.every()] == [
        (r.id, r.mount, r.price) for r in table.every()
    ]
    assert source_of(given, again) == (version, source)
    other = upstreams(("GET /a/[b]", "$0.02"), ("POST /*", MODEL))
    assert source_of(other, compile_routes(other))[0] != version


@pytest.mark.parametrize(
    ("one", "other", "met"),
    [
        ("/a", "/a", True),
        ("/a", "/b", False),
        ("/[x]", "/b", True),
        ("/*", "/a/b", True),
        ("/a/*", "/a", True),  # a path may be asked with a final slash
        ("/a/*", "/b/*", False),
        ("/a/b", "/a", False),
        ("/a/[x]/c", "/a/b/*", True),
        ("/a/[x]/c", "/a/b/d", False),
        ("/*", "/*", True),
    ],
)
def test_two_patterns_meet(one: str, other: str, met: bool) -> None:
    pair = compile_pattern(one), compile_pattern(other)
    assert meet(*pair) is met
    assert meet(*reversed(pair)) is met
