"""Which route a request is, and so what it costs.

Upstreams hang at mounts; the longest mount that is a prefix of the path (by whole segments)
takes the request, and only its routes are asked, in the order they are listed: the first that
matches wins. What matches nothing never reaches an upstream: 404, or 405 where another method
would match. HEAD is the GET route. CONNECT and TRACE are never forwarded (TRACE would show the
credentials that are added on the way up).

**One resource, one price.** Many upstreams ignore letter case and a final slash. If only
``/v1/report`` is priced and ``/*`` is free, ``/V1/Report`` and ``/v1/report/`` would be the
report for nothing. So a request that is not spelled as a literal route is also matched loosely;
if that finds an earlier and dearer route, the request is refused with 404: the spelling in the
price list is the one that is sold. To sell another spelling, list it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from gateway.config_rules import RESERVED
from gateway.discovery import bazaar
from gateway.forms import Member, Price, RateLimit
from gateway.payments.wire import DECLARED
from gateway.pricing.quote import PriceRequest, PriceRule, Quote, quote
from gateway.pricing.rules import compile_price
from gateway.proxy.outcome import Rules, rules_of
from gateway.proxy.patterns import Pattern, compile_pattern, covers, loosened
from gateway.proxy.target import Target
from gateway.settings import Route as RouteSettings
from gateway.settings import Upstream

_RESERVED: Final = frozenset(own.encode() for own in RESERVED)
_RESERVED_ABOVE: Final = tuple(own.encode() + b"/" for own in RESERVED)
NEVER_FORWARDED: Final = frozenset({"CONNECT", "TRACE"})
_METHOD: Final = re.compile(r"[A-Z][A-Z-]{0,19}")
_USUAL: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


class RouteError(ValueError):
    """The routes cannot be compiled; ``faults`` names every reason."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(faults))


@dataclass(frozen=True, slots=True)
class Route:
    """One priced route. ``id`` stays the same when the list around it changes."""

    id: str
    upstream: str
    mount: str
    method: str
    pattern: str
    price: PriceRule
    form: Price
    """The price as it was configured."""
    rate_limit: RateLimit | None
    charge: str
    failed_if: Rules
    amount_from: str
    retry_safe: bool
    timeout_s: int | None
    description: str
    fixed: Quote | None = None
    """The quote of every request, where no request can change it."""
    extensions: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)
    """What its 402s declare, by method: members of ``extensions`` as JSON text."""
    metered: bool = False
    """Whether an answer can change what its call comes to."""
    needs_body: bool = False
    """Whether a body can change what its call costs."""
    upto: bool = False
    """Whether it is paid for what a call came to, after it."""

    @property
    def public_pattern(self) -> str:
        """The pattern as callers see it, below the gateway's origin."""
        return self.mount.rstrip("/") + self.pattern

    @property
    def free(self) -> bool:
        """True if no request of this route can cost anything."""
        return self.price.fixed_units == 0


@dataclass(frozen=True, slots=True)
class McpMount:
    """The request is for an MCP server; its tools are priced, not its paths.

    ``tools`` by name, ``*`` for those not named; ``free`` is the route of everything else.
    """

    upstream: str
    mount: str
    tools: Mapping[str, Route]
    free: Route


@dataclass(frozen=True, slots=True)
class MethodNotAllowed:
    """The path is known with other methods: 405 with these in ``Allow``."""

    allow: tuple[str, ...]


Match = Route | McpMount | MethodNotAllowed | None


@dataclass(frozen=True, slots=True)
class _Alternatives:
    """The routes one method can reach in a mount, as one regex: the group that matched is it."""

    routes: tuple[Route, ...]
    literals: tuple[bytes | None, ...]
    exact: re.Pattern[bytes]
    loose: re.Pattern[bytes]


@dataclass(frozen=True, slots=True)
class _Mount:
    """One upstream's place. ``by_method`` has the methods that are named; ``other`` the rest."""

    upstream: str
    mount: str
    mcp: McpMount | None
    prefix: bytes
    compiled: tuple[tuple[Route, Pattern], ...]
    by_method: dict[str, _Alternatives] = field(repr=False)
    other: _Alternatives = field(repr=False)


def _applies(route: Route, method: str) -> bool:
    return route.method in ("*", method) or (method == "HEAD" and route.method == "GET")


def _alternatives(compiled: Iterable[tuple[Route, Pattern]], method: str) -> _Alternatives:
    chosen = [(r, p) for r, p in compiled if _applies(r, method)]
    never = b"(?!)"
    return _Alternatives(
        tuple(r for r, _ in chosen),
        tuple(p.literal for _, p in chosen),
        re.compile(b"|".join(b"(" + p.regex + b")" for _, p in chosen) or never, re.DOTALL),
        re.compile(b"|".join(b"(" + p.loose_regex + b")" for _, p in chosen) or never, re.DOTALL),
    )


def _dearer(other: Route, than: Route) -> bool:
    """Whether ``other`` may cost more than ``than``, for some request."""
    if other.price.version == than.price.version:
        return False
    a, b = other.price.fixed_units, than.price.fixed_units
    return a is None or b is None or a > b


class RouteTable:
    """All routes of a configuration, compiled. Immutable; a reload makes a new one."""

    __slots__ = ("_literal", "_mounts", "routes")

    def __init__(self, mounts: Sequence[_Mount]) -> None:
        self._mounts = tuple(sorted(mounts, key=lambda m: -len(m.prefix)))
        self.routes = tuple(route for m in mounts for route, _ in m.compiled)
        # Most requests are for a path that is written out: one look-up instead of a regex. The
        # entries are made by the slow way, so both ways agree.
        self._literal: dict[tuple[str, bytes], Route] = {}
        for m in mounts:
            for route, pattern in m.compiled:
                path = pattern.literal
                if path is not None:
                    self._remember(route, m.prefix + path)

    def _remember(self, route: Route, path: bytes) -> None:
        named = {"*": _USUAL, "GET": ("GET", "HEAD")}
        for method in named.get(route.method, (route.method,)):
            found = self._search(method, path)
            if isinstance(found, Route):
                self._literal[method, path] = found

    def every(self) -> tuple[Route, ...]:
        """The routes, and the tools of MCP servers."""
        tools = [route for m in self._mounts if m.mcp is not None for route in m.mcp.tools.values()]
        return (*self.routes, *tools)

    def warnings(self) -> tuple[str, ...]:
        """What the operator surely did not mean, in words, for ``farebox check``."""
        return tuple(_warnings(self._mounts))

    def match(self, method: str, path: bytes) -> Match:
        """The route for a method and a decoded path (``Target.decoded``).

        None is 404. The caller has answered the gateway's own paths (``RESERVED``) and CORS
        preflights already.
        """
        found = self._literal.get((method, path))
        return found if found is not None else self._search(method, path)

    def _search(self, method: str, path: bytes) -> Match:
        if is_reserved(path):
            return None
        for mount in self._mounts:
            rest = path[len(mount.prefix) :]
            if path.startswith(mount.prefix) and (not rest or rest.startswith(b"/")):
                if mount.mcp is not None:
                    return mount.mcp if rest in (b"", b"/") else None
                return _match_in(mount, method, rest or b"/")
        return None

    def methods(self, path: bytes) -> tuple[str, ...]:
        """The methods a path can be asked with, for ``Allow`` and for CORS; empty if it is not
        there."""
        for mount in self._mounts:
            rest = path[len(mount.prefix) :]
            if path.startswith(mount.prefix) and (not rest or rest.startswith(b"/")):
                if mount.mcp is not None:
                    return ("GET", "POST", "DELETE") if rest in (b"", b"/") else ()
                return _methods_in(mount, rest or b"/")
        return ()


def _match_in(mount: _Mount, method: str, rest: bytes) -> Route | MethodNotAllowed | None:
    if method not in NEVER_FORWARDED and _METHOD.fullmatch(method):
        options = mount.by_method.get(method, mount.other)
        found = options.exact.fullmatch(rest)
        if found is not None and found.lastindex is not None:
            route = options.routes[found.lastindex - 1]
            loosely = options.loose.fullmatch(loosened(rest))
            if loosely is None or loosely.lastindex is None or loosely.lastindex == found.lastindex:
                return route
            rival = options.routes[loosely.lastindex - 1]
            listed = options.literals[found.lastindex - 1] == rest
            if listed or not _dearer(rival, route):
                return route
            return None
    allow = _methods_in(mount, rest)
    return MethodNotAllowed(allow) if allow else None


def _methods_in(mount: _Mount, rest: bytes) -> tuple[str, ...]:
    found: list[str] = []
    for method in dict.fromkeys((*_USUAL, *mount.by_method)):
        options = mount.by_method.get(method, mount.other)
        if options.exact.fullmatch(rest) is not None:
            found.append(method)
    return tuple(found)


def is_reserved(path: bytes) -> bool:
    """Whether a path is the gateway's own and never an upstream's."""
    return path in _RESERVED or path.startswith(_RESERVED_ABOVE)


def upstream_target(route: Route | McpMount, base_path: bytes, target: Target) -> bytes:
    """The bytes for the request line towards the upstream: the mount is replaced by the path of
    the upstream's URL (``base_path``, without a slash at its end), the rest is as received.

    A mount holds only characters that are refused in encoded form, so it is spelled the same in
    the raw path.
    """
    path = base_path + target.path[len(route.mount.rstrip("/")) :]
    return (path or b"/") + (b"" if target.query is None else b"?" + target.query)


def compile_routes(
    upstreams: Sequence[Upstream], prices: Mapping[str, PriceRule] | None = None
) -> RouteTable:
    """The table for the configured upstreams. Raises ``RouteError`` with every fault.

    ``prices``: for these routes, by their id, another price than the configured one.
    """
    faults: list[str] = []
    mounts: list[_Mount] = []
    taken: dict[str, str] = {}
    for upstream in upstreams:
        if upstream.mount in taken:
            faults.append(
                f"upstreams.{upstream.name} and upstreams.{taken[upstream.mount]} share the mount "
                f"{upstream.mount}"
            )
        taken[upstream.mount] = upstream.name
        if is_reserved(upstream.mount.encode()):
            faults.append(f"upstreams.{upstream.name}.mount is one of the gateway's own paths")
        mounts.append(_compile_mount(upstream, prices or {}, faults))
    if faults:
        raise RouteError(faults)
    return RouteTable(mounts)


def _compile_mount(
    upstream: Upstream, prices: Mapping[str, PriceRule], faults: list[str]
) -> _Mount:
    compiled: list[tuple[Route, Pattern]] = []
    ids: set[str] = set()
    for settings in upstream.routes:
        route_id = f"{upstream.name} {settings.match}"
        try:
            if route_id in ids:
                raise ValueError("is listed twice")
            ids.add(route_id)
            if settings.method in NEVER_FORWARDED:
                raise ValueError(f"{settings.method} is never forwarded")
            compiled.append(_compile_route(upstream, settings, route_id, prices))
        except ValueError as fault:
            faults.append(f"upstreams.{upstream.name}.routes, {settings.match!r}: {fault}")
    named = {route.method for route, _ in compiled} - {"*"}
    if "GET" in named:
        named.add("HEAD")
    return _Mount(
        upstream.name,
        upstream.mount,
        _compile_tools(upstream, prices, faults) if upstream.kind == "mcp" else None,
        upstream.mount.rstrip("/").encode(),
        tuple(compiled),
        {method: _alternatives(compiled, method) for method in sorted(named)},
        _alternatives(compiled, "*"),
    )


def _compile_route(
    upstream: Upstream,
    settings: RouteSettings,
    route_id: str,
    prices: Mapping[str, PriceRule],
) -> tuple[Route, Pattern]:
    pattern = compile_pattern(settings.path)
    price = prices.get(route_id) or compile_price(settings.price)
    fixed = price.fixed_units is not None
    metered = price.metered or settings.amount_from == "upstream"
    if settings.upto and not metered:
        raise ValueError("upto is for metered prices: this one is known before the call")
    public = upstream.mount.rstrip("/") + settings.path
    about = None if price.fixed_units == 0 else settings.bazaar
    cataloged = bazaar.of_route(settings.method, public, about)
    route = Route(
        id=route_id,
        upstream=upstream.name,
        mount=upstream.mount,
        method=settings.method,
        pattern=settings.path,
        price=price,
        form=settings.price,
        fixed=quote(price, PriceRequest("", b"", None, b"", None)) if fixed else None,
        metered=metered,
        upto=settings.upto,
        needs_body=price.needs_body,
        rate_limit=settings.rate_limit,
        charge=settings.charge,
        failed_if=rules_of(settings.failed_if),
        amount_from=settings.amount_from,
        retry_safe=settings.retry_safe,
        timeout_s=settings.timeout_s or upstream.timeout_s,
        description=settings.description,
        extensions={method: f"{DECLARED},{text}" for method, text in cataloged.items()},
    )
    return route, pattern


def _compile_tools(
    upstream: Upstream, prices: Mapping[str, PriceRule], faults: list[str]
) -> McpMount:
    """The tools of an MCP server as routes. An answer that is an error is never charged."""
    base = {"match": "POST /", "timeout_s": upstream.timeout_s}
    failed_if = Rules(
        statuses=((201, 499),),
        having=(Member(("error",)), Member(("result", "isError"), equals=True)),
    )
    tools: dict[str, Route] = {}
    for name, price in upstream.tools:
        try:
            settings = RouteSettings.model_validate({**base, "price": price})
            route, _ = _compile_route(upstream, settings, f"{upstream.name} tool {name}", prices)
            declared = {} if name == "*" else {"POST": f"{DECLARED},{bazaar.of_tool(name)}"}
            tools[name] = replace(route, failed_if=failed_if, extensions=declared)
        except ValueError as fault:
            faults.append(f"upstreams.{upstream.name}.tools, {name!r}: {fault}")
    settings = RouteSettings.model_validate({**base, "price": "free"})
    free, _ = _compile_route(upstream, settings, f"{upstream.name} free", prices)
    return McpMount(upstream.name, upstream.mount, tools, free)


def _warnings(mounts: Sequence[_Mount]) -> Iterable[str]:
    for mount in mounts:
        for i, (route, pattern) in enumerate(mount.compiled):
            yield from _shadows(mounts, mount, route, pattern)
            if route.free and (route.failed_if != Rules() or route.retry_safe):
                yield f"{route.id} is free: its failed_if and retry_safe have no effect"
            for earlier, wide in mount.compiled[:i]:
                if earlier.method in ("*", route.method) and covers(wide, pattern):
                    yield f"{route.id} is never reached: {earlier.id} stands before it"
                    break
            for earlier, narrow in mount.compiled[:i]:
                if (
                    ("*" in (route.method, earlier.method) or route.method == earlier.method)
                    and covers(pattern, narrow)
                    and _dearer(earlier, route)
                ):
                    yield (
                        f"{route.id} is cheaper than {earlier.id} and takes every spelling of its "
                        "path that the upstream may treat as the same (a suffix such as .json): "
                        "price it no lower, or list what is meant"
                    )
                    break


def _shadows(
    mounts: Sequence[_Mount], mount: _Mount, route: Route, pattern: Pattern
) -> Iterable[str]:
    """Whether the whole of a route lies in the gateway's own paths or in a longer mount."""
    others = [
        (f"the mount {m.mount}", m.mount) for m in mounts if len(m.prefix) > len(mount.prefix)
    ]
    others += [(f"the gateway's own {own}", own) for own in RESERVED]
    whole = compile_pattern(mount.mount.rstrip("/") + pattern.text)
    for name, place in others:
        if covers(compile_pattern(place), whole) or covers(compile_pattern(f"{place}/*"), whole):
            yield f"{route.id} is never reached: {name} takes its path"
