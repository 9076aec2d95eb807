"""What can be invoked by name: products and their actions, made of the route table.

A product is an upstream, an action one of its priced routes or tools. Of the routes those that have
one path (no ``*``, no ``[id]``): the parameters become the JSON body of the call, or its query for
a route of GET. Slugs are the names in lower case with hyphens; a route may bring its own.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple
from urllib.parse import quote, urlencode

from gateway.errors import Problem
from gateway.proxy import target as targets
from gateway.proxy.mcp_messages import EVERY
from gateway.proxy.routes_table import McpMount, Route, RouteTable
from gateway.proxy.target import Target
from gateway.settings import Upstream

_NOT_IN_SLUG: Final = re.compile(r"[^a-z0-9]+")
_IN_QUERY: Final = ("GET", "DELETE")
# Methods that stand for "every": parameters are sent as JSON.
_POSTED: Final = "POST"


ANYTHING: Final[Mapping[str, Any]] = {"type": "object"}
"""A schema that says no more than that parameters are an object."""


class Tool(NamedTuple):
    """What a server says of a tool: the JSON schema of its arguments, and words for people."""

    schema: Mapping[str, Any]
    description: str


@dataclass(slots=True, eq=False)
class Server:
    """What is known of an MCP server since the configuration was read (``servers.py``)."""

    mount: McpMount
    stateful: bool | None = None
    """Whether it gives sessions; None: it was not asked, or what was known is wrong."""
    tools: Mapping[str, Tool] | None = None
    look_at_s: float = 0.0
    looking: asyncio.Task[None] | None = None


@dataclass(frozen=True, slots=True)
class Action:
    """One thing that is sold. ``server``: ``name`` is a tool there; else ``path`` is asked."""

    product: str
    slug: str
    name: str
    upstream: str
    route: Route
    path: bytes
    server: Server | None = None

    @property
    def method(self) -> str:
        """The method towards the upstream."""
        return _POSTED if self.route.method == "*" else self.route.method

    @property
    def asks_in_query(self) -> bool:
        """Whether parameters go up in the query and not in a body."""
        return self.method in _IN_QUERY

    @property
    def id(self) -> str:
        """What the older invoke route calls it."""
        return f"{self.product}.{self.slug}"

    def target(self, parameters: Mapping[str, Any]) -> Target:
        """What is asked of the upstream, as if it were asked below its mount.

        Raises ``Problem("invalid_request")`` for parameters that no query can hold.
        """
        query = _query(parameters) if self.asks_in_query else ""
        return targets.parse(self.path + (b"?" + query.encode() if query else b""))


def _query(parameters: Mapping[str, Any]) -> str:
    pairs = []
    for name, value in parameters.items():
        if isinstance(value, dict | list) or value is None:
            raise Problem(
                "invalid_request",
                f"The parameter {name[:40]!r} is sent in a query: text, a number, true or false.",
            )
        pairs.append((name, value if isinstance(value, str) else json.dumps(value)))
    return urlencode(pairs)


class Catalog:
    """All actions, and how a request names one. Immutable but for what is known of servers; a
    reload makes a new one."""

    __slots__ = ("_by_id", "_by_name", "actions")

    def __init__(self, actions: Iterable[Action]) -> None:
        self.actions = tuple(actions)
        self._by_name: dict[tuple[str, str], Action] = {}
        self._by_id: dict[str, Action] = {}
        for action in self.actions:
            for product in (action.product, action.upstream):
                for name in (action.slug, action.name):
                    self._by_name.setdefault((product, name), action)
        for action in self.actions:
            self._by_id[action.id] = action
            same = [each for each in self.actions if each.product == action.product]
            if len(same) == 1:
                self._by_id.setdefault(action.product, action)

    def find(self, product: str, action: str) -> Action:
        """By slugs, or by the names they are made of. Raises ``Problem("not_found")``."""
        found = self._by_name.get((product, action))
        if found is None:
            raise Problem("not_found", f"There is no action {action[:60]!r} of {product[:60]!r}.")
        return found

    def of_id(self, product_id: str) -> Action:
        """By the id of the older route. Raises ``Problem("not_found")``."""
        found = self._by_id.get(product_id)
        if found is None:
            raise Problem("not_found", f"There is no product {product_id[:60]!r}.")
        return found


def build(upstreams: Iterable[Upstream], routes: RouteTable) -> Catalog:
    """Everything that has a price and can be asked with parameters alone."""
    found: list[Action] = []
    products: set[str] = set()
    for upstream in upstreams:
        product = _free(_slug(upstream.name), products)
        taken: set[str] = set()
        for name, slug, route, path, server in _sold(upstream, routes):
            unique = _free(slug or _slug(name) or "call", taken)
            found.append(Action(product, unique, name, upstream.name, route, path, server))
    return Catalog(found)


_Sold = tuple[str, str, Route, bytes, Server | None]


def _sold(upstream: Upstream, routes: RouteTable) -> Iterator[_Sold]:
    """Name, the slug that was given, and where it is asked."""
    if upstream.kind == "mcp":
        below = upstream.mount.encode()
        mount = routes.match("POST", below)
        if isinstance(mount, McpMount):
            server = Server(mount)
            for name, tool in mount.tools.items():
                if name != EVERY and not tool.free:
                    yield name, "", tool, below, server
        return
    for settings in upstream.routes:
        # The pattern is compared with the decoded path; what is sent is spelled like a request.
        path = quote(upstream.mount.rstrip("/") + settings.path, safe="/!$&'()*+,=:@~").encode()
        if "*" in settings.path or "[" in settings.path:
            continue
        try:
            asked = targets.parse(path)
        except Problem:
            continue
        method = _POSTED if settings.method == "*" else settings.method
        route = routes.match(method, asked.decoded)
        # An earlier route may take this very request: then that one is what is sold.
        own = isinstance(route, Route) and route.id == f"{upstream.name} {settings.match}"
        if isinstance(route, Route) and own and not route.free and method != "HEAD":
            yield settings.path.strip("/") or method.lower(), settings.slug, route, path, None


def _slug(name: str) -> str:
    return _NOT_IN_SLUG.sub("-", name.lower()).strip("-")[:64]


def _free(slug: str, taken: set[str]) -> str:
    """The slug, with a number if it is taken."""
    unique, n = slug, 1
    while unique in taken:
        n += 1
        unique = f"{slug}-{n}"
    taken.add(unique)
    return unique
