"""Price lists that were in force until just now: what a request cost by them, wherever it stood.

A price is raised, too, where another route takes a request than before: one that was put in front,
the next one after a route that is gone, or the same under an upstream of another name. So the list
as a whole has versions, as each price has, and for a while a request is looked for in the ones
before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from gateway.errors import Problem
from gateway.pricing import options
from gateway.pricing.quote import Line, PriceRequest, PriceRule, Quote, Usage
from gateway.proxy.patterns import Pattern, compile_pattern, meet
from gateway.proxy.routes_table import Route, RouteTable, compile_routes
from gateway.settings import Upstream

LIST: Final = "*"
"""Where the versions of the whole list stand among those of routes: no route has this id."""
Source = Mapping[str, Any]


def source_of(upstreams: Sequence[Upstream], table: RouteTable) -> tuple[str, Source]:
    """The version of a list, and what makes it a list again."""
    versions = {route.id: route.price.version for route in table.every()}
    told = [
        {
            "name": each.name,
            "kind": each.kind,
            "mount": each.mount,
            "routes": [[own.match, versions[f"{each.name} {own.match}"]] for own in each.routes],
            "tools": [[name, versions[f"{each.name} tool {name}"]] for name, _ in each.tools],
        }
        for each in upstreams
    ]
    source = {"upstreams": told}
    return options.version("list", source), source


def versions_in(source: Source) -> set[str]:
    """The versions of prices that a list is made of."""
    every = [pair for each in source["upstreams"] for pair in (*each["routes"], *each["tools"])]
    return {version for _, version in every}


def table_of(source: Source, rules: Mapping[str, PriceRule]) -> RouteTable:
    """The list again. ``rules`` by their version. Raises ``ValueError``."""
    made: list[Upstream] = []
    prices: dict[str, PriceRule] = {}
    for each in source["upstreams"]:
        name = each["name"]
        prices |= {f"{name} {match}": rules[version] for match, version in each["routes"]}
        prices |= {f"{name} tool {tool}": rules[version] for tool, version in each["tools"]}
        known = {key: each[key] for key in ("name", "kind", "mount")}
        routes = [{"match": match, "price": "free"} for match, _ in each["routes"]]
        tools = {tool: "free" for tool, _ in each["tools"]}
        url = "http://127.0.0.1"  # nothing is sent by this table
        made.append(
            Upstream.model_validate({**known, "url": url, "routes": routes, "tools": tools})
        )
    return compile_routes(made, prices)


@dataclass(frozen=True, slots=True)
class Before:
    """What the requests of a route cost by an earlier list; ``now`` where they had no price."""

    table: RouteTable
    mount: str
    now: PriceRule
    version: str
    needs_body: bool
    metered: bool

    name = "before"
    fixed_units = None
    reads = None

    def quote(self, request: PriceRequest) -> Quote:
        path = self.mount.rstrip("/").encode() + request.path
        found = self.table.match(request.method, path)
        if isinstance(found, Route):
            below = path[len(found.mount.rstrip("/")) :] or b"/"
            try:
                return found.price.quote(replace(request, path=below))
            except Problem:
                return self.now.quote(request)  # so nobody has read a price for it
        return self.now.quote(request)

    def charge(self, quote: Quote, usage: Usage | None) -> tuple[Line, ...]:
        raise RuntimeError("a quote by an earlier list charges by the price it found there")

    def so_far(self, counts: Mapping[str, int]) -> int:
        return 0

    def describe(self) -> dict[str, Any]:
        return {"rule": self.name, "now": self.now.describe()}


Places = Mapping[str, Sequence[Route]]
"""By the id of a route the routes of an earlier list that may have had its requests."""


def places(then: RouteTable, now: RouteTable) -> Places:
    """Where the requests of the routes of ``now`` stood. A route that had all of its own is not
    there."""
    order, before = _in_order(now), _in_order(then)
    at = {_key(route): i for i, (route, _) in enumerate(order)}
    found: dict[str, Sequence[Route]] = {}
    if [_key(route) for route, _ in before] != list(at):
        for i, (route, pattern) in enumerate(order):
            had = _had(route, pattern, before)
            # Not those in front that still take what they took.
            if any(at.get(_key(each), len(at)) > i for each in had):
                found[route.id] = had
    tools = {(tool.mount, _tool(tool)): tool for tool in _tools(then)}
    for route in _tools(now):
        was = tools.get((route.mount, _tool(route))) or tools.get((route.mount, "*"))
        if was is not None and was.id != route.id:
            found[route.id] = [was]
    return found


def before(version: str, then: RouteTable, had: Sequence[Route], route: Route) -> PriceRule:
    """The price of the requests of ``route`` in an earlier list of this version."""
    now = route.price
    if had and _tool(route):
        return had[0].price
    return Before(
        then,
        route.mount,
        now,
        f"{version}:{route.mount}:{now.version}",
        now.needs_body or any(each.needs_body for each in had),
        now.metered or any(each.metered for each in had),
    )


def _in_order(table: RouteTable) -> list[tuple[Route, Pattern]]:
    """The routes as they are asked: those of the longest mount first."""
    by_mount = sorted(table.routes, key=lambda route: -len(route.mount.rstrip("/")))
    return [(route, compile_pattern(route.public_pattern)) for route in by_mount]


def _had(
    route: Route, pattern: Pattern, before: Sequence[tuple[Route, Pattern]]
) -> Sequence[Route]:
    """Which routes may have taken the requests of ``route``: none behind its own place."""
    found = []
    for each, its in before:
        if _same_method(each, route) and meet(its, pattern):
            found.append(each)
        if _key(each) == _key(route):
            break
    return found


def _key(route: Route) -> tuple[str, str]:
    return route.id, route.mount


def _same_method(one: Route, other: Route) -> bool:
    named = {one.method, other.method}
    return len(named) == 1 or "*" in named or named == {"GET", "HEAD"}


def _tools(table: RouteTable) -> Sequence[Route]:
    return table.every()[len(table.routes) :]


def _tool(route: Route) -> str:
    """The name of a tool; empty for another route."""
    return route.id.partition(" tool ")[2]
