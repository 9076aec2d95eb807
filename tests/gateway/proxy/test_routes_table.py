"""Routes: the first listed wins, nothing unlisted passes, no spelling has a lower price."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import Problem
from gateway.proxy import target
from gateway.proxy.patterns import compile_pattern, covers
from gateway.proxy.routes_table import (
    McpMount,
    MethodNotAllowed,
    Route,
    RouteError,
    RouteTable,
    compile_routes,
    is_reserved,
    upstream_target,
)
from gateway.settings import Upstream


def upstream(
    *routes: tuple[str, str] | dict[str, Any], name: str = "api", mount: str = "/", **more: Any
) -> Upstream:
    listed = [{"match": r[0], "price": r[1]} if isinstance(r, tuple) else r for r in routes]
    return Upstream.model_validate(
        {"name": name, "url": "http://127.0.0.1:1", "mount": mount, "routes": listed, **more}
    )


def table(*routes: tuple[str, str] | dict[str, Any], **more: Any) -> RouteTable:
    return compile_routes([upstream(*routes, **more)])


FREE = {"match": "GET /f", "price": "free"}


def found(routes: RouteTable, method: str, path: str) -> str | None:
    """The match of the route that takes the request, "405" or None."""
    match = routes.match(method, target.parse(path.encode()).decoded)
    if isinstance(match, Route):
        return f"{match.method} {match.pattern}"
    return "405" if isinstance(match, MethodNotAllowed) else None


WEATHER = table(
    ("GET /health", "free"),
    ("GET /v1/forecast/*", "$0.002"),
    ("POST /v1/render", "$0.01"),
    ("GET /v1/users/[id]/posts", "$0.003"),
    ("* /v1/any/*", "$0.004"),
)


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/health", "GET /health"),
        ("HEAD", "/health", "GET /health"),
        ("GET", "/v1/forecast/oslo", "GET /v1/forecast/*"),
        ("HEAD", "/v1/forecast/oslo", "GET /v1/forecast/*"),
        ("GET", "/v1/forecast/a/b/c", "GET /v1/forecast/*"),
        ("GET", "/v1/forecast/", "GET /v1/forecast/*"),
        ("GET", "/v1/forecast/caf%C3%A9", "GET /v1/forecast/*"),
        ("GET", "/v1/forecast/oslo?x=1", "GET /v1/forecast/*"),
        ("GET", "/v1/forecast", None),
        ("GET", "/v1/forecasts/oslo", None),
        ("GET", "/V1/forecast/oslo", None),
        ("GET", "/health/", None),
        ("GET", "/Health", None),
        ("GET", "/", None),
        ("GET", "/v1", None),
        ("POST", "/v1/render", "POST /v1/render"),
        ("GET", "/v1/render", "405"),
        ("HEAD", "/v1/render", "405"),
        ("OPTIONS", "/v1/render", "405"),
        ("POST", "/health", "405"),
        ("get", "/health", "405"),
        ("GET", "/v1/users/7/posts", "GET /v1/users/[id]/posts"),
        ("GET", "/v1/users/a%40b/posts", "GET /v1/users/[id]/posts"),
        ("GET", "/v1/users/7/8/posts", None),
        ("GET", "/v1/users/posts", None),
        ("DELETE", "/v1/any/x", "* /v1/any/*"),
        ("QUERY", "/v1/any/x", "* /v1/any/*"),
        ("OPTIONS", "/v1/any/x", "* /v1/any/*"),
        ("TRACE", "/v1/any/x", "405"),
        ("CONNECT", "/v1/any/x", "405"),
        ("delete", "/v1/any/x", "405"),
        ("*", "/v1/any/x", "405"),
        ("G\x00T", "/v1/any/x", "405"),
    ],
)
def test_match(method: str, path: str, expected: str | None) -> None:
    assert found(WEATHER, method, path) == expected


def test_405_names_the_methods_that_work() -> None:
    match = WEATHER.match("DELETE", b"/health")
    assert match == MethodNotAllowed(("GET", "HEAD"))
    assert WEATHER.methods(b"/v1/render") == ("POST",)
    assert WEATHER.methods(b"/nothing") == ()
    assert set(WEATHER.methods(b"/v1/any/x")) == {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"}


def test_the_first_that_matches_wins() -> None:
    assert found(table(("GET /a/*", "$1"), ("GET /*", "$2")), "GET", "/a/b") == "GET /a/*"
    assert found(table(("GET /*", "$2"), ("GET /a/*", "$1")), "GET", "/a/b") == "GET /*"
    assert found(table(("* /a", "$2"), ("GET /a", "$1")), "GET", "/a") == "* /a"
    # An explicit HEAD route comes first only if it is listed first.
    assert found(table(("HEAD /a", "free"), ("GET /a", "$1")), "HEAD", "/a") == "HEAD /a"
    assert found(table(("GET /a", "$1"), ("HEAD /a", "free")), "HEAD", "/a") == "GET /a"


DEAR = (("GET /v1/report", "$1"), ("GET /v1/deep/[id]", "$1"), ("GET /v1/tree/*", "$1"))


@pytest.mark.parametrize(
    "path",
    [
        "/V1/report",
        "/v1/REPORT",
        "/v1/report/",
        "/V1/Report/",
        "/v1/report.",
        "/v1/report%20",
        "/v1/Report./",
        "/v1/Deep/7",
        "/v1/deep/7/",
        "/v1/TREE/a",
        "/v1/tree",
        "/V1/tree/",
    ],
)
@pytest.mark.parametrize("cheap", ["free", "$0.50"])
def test_another_spelling_is_not_a_cheaper_price(path: str, cheap: str) -> None:
    routes = table(*DEAR, ("GET /*", cheap))
    assert found(routes, "GET", path) is None
    assert found(routes, "HEAD", path) is None
    assert found(routes, "GET", "/other/Path/") == "GET /*"


def test_case_is_folded_beyond_ascii() -> None:
    routes = table(("GET /v1/key", "$1"), ("GET /caf%C3%89", "$1"), ("GET /*", "free"))
    assert found(routes, "GET", "/v1/%E2%84%AAey") is None  # the Kelvin sign
    assert found(routes, "GET", "/CAF%C3%A9") is None
    assert found(routes, "GET", "/v1/%C3%BCber") == "GET /*"


def test_another_spelling_at_the_same_or_a_higher_price_is_sold() -> None:
    for price in ("$1", "$2"):
        routes = table(*DEAR, ("GET /*", price))
        assert found(routes, "GET", "/V1/Report/") == "GET /*"


def test_a_spelling_that_is_listed_is_sold_as_listed() -> None:
    routes = table(*DEAR, ("GET /v1/report/", "free"), ("GET /v1/Tree", "free"), ("GET /*", "free"))
    assert found(routes, "GET", "/v1/report/") == "GET /v1/report/"
    assert found(routes, "GET", "/v1/Tree") == "GET /v1/Tree"
    assert found(routes, "GET", "/v1/report") == "GET /v1/report"
    escaped = table(("GET /caf%C3%89", "$1"), ("GET /caf%C3%89/", "free"))
    assert found(escaped, "GET", "/caf%c3%89/") == "GET /caf%C3%89/"


def test_encoded_spellings_of_one_path_have_one_price() -> None:
    routes = table(("GET /a:b/x", "$1"), ("GET /*", "free"))
    assert found(routes, "GET", "/a:b/x") == "GET /a:b/x"
    assert found(routes, "GET", "/a%3Ab/x") == "GET /a:b/x"
    assert found(routes, "GET", "/a%3ab/x") == "GET /a:b/x"
    for path in (b"/%61:b/x", b"/a:b%2Fx", b"/./a:b/x", b"/y/../a:b/x", b"//a:b/x", b"/a:b/x;y"):
        with pytest.raises(Problem):
            target.parse(path)


def _express(path: str) -> str:
    """How a lenient upstream reads a path: decoded, any case, final slash ignored."""
    return target.parse(path.encode()).decoded.decode().lower().rstrip("/")


SEGMENT = st.sampled_from(["a", "A", "b", "a%3Ab", "a:b", "%C3%A9", "%c3%a9", "x"])
PATHS = st.tuples(st.lists(SEGMENT, max_size=3), st.booleans()).map(
    lambda t: "/" + "/".join(t[0]) + ("/" if t[1] and t[0] else "")
)
PATTERNS = st.tuples(
    st.lists(st.sampled_from(["a", "b", "a:b", "[id]"]), max_size=2),
    st.sampled_from(["", "/", "/*"]),
).map(lambda t: "/" + "/".join(t[0]) + (t[1] if t[0] else t[1].removeprefix("/")))
PRICES = st.sampled_from(["free", "$0.01", "$0.02"])


@given(
    st.lists(st.tuples(PATTERNS, PRICES), min_size=1, max_size=5, unique_by=lambda r: r[0]),
    st.lists(PATHS, min_size=2, max_size=8),
)
def test_no_spelling_undercuts_a_price(rules: list[tuple[str, str]], paths: list[str]) -> None:
    """For an upstream that reads paths leniently: if one spelling of a resource is refused or
    dear, no other one that is not itself listed is cheaper."""
    routes = table(*((f"GET {pattern}", price) for pattern, price in rules))
    literals = {r.pattern for r in routes.routes if compile_pattern(r.pattern).literal}
    for one in paths:
        for two in paths:
            if _express(one) != _express(two):
                continue
            first = routes.match("GET", target.parse(one.encode()).decoded)
            second = routes.match("GET", target.parse(two.encode()).decoded)
            if not (isinstance(first, Route) and isinstance(second, Route)):
                continue
            if {first.pattern, second.pattern} & literals:
                continue  # sold as listed
            # Both were matched by wildcards; the later rule may only be dearer or equal.
            order = {r.id: i for i, r in enumerate(routes.routes)}
            early, late = sorted((first, second), key=lambda r: order[r.id])
            assert early.price.fixed_units is not None and late.price.fixed_units is not None
            assert late.price.fixed_units >= early.price.fixed_units


@given(st.lists(st.tuples(PATTERNS, PRICES), min_size=1, max_size=6), PATHS)
def test_the_fast_path_agrees_with_the_list(rules: list[tuple[str, str]], path: str) -> None:
    """An independent reading of the list, segment by segment, finds the same route or refuses."""
    unique = list(dict(rules).items())
    routes = table(*((f"GET {pattern}", price) for pattern, price in unique))
    decoded = target.parse(path.encode()).decoded
    match = routes.match("GET", decoded)
    naive = next((p for p, _ in unique if _naive(p, decoded.decode())), None)
    if isinstance(match, Route):
        assert match.pattern == naive
    if naive is None:
        assert match is None


def _naive(pattern: str, path: str) -> bool:
    ours, theirs = pattern.split("/"), path.split("/")
    if ours[-1] == "*":
        ours, theirs = ours[:-1], theirs[: len(ours) - 1] if len(theirs) >= len(ours) else ["?"]
    return len(ours) == len(theirs) and all(
        (t != "" if o == "[id]" else o == t) for o, t in zip(ours, theirs, strict=True)
    )


def test_mounts() -> None:
    routes = compile_routes(
        [
            upstream(("GET /*", "$1"), name="root"),
            upstream(("GET /x", "$2"), ("GET /", "$3"), name="deep", mount="/a/b"),
            upstream(name="tools", mount="/mcp", kind="mcp", tools={"*": "$0.001"}),
        ]
    )

    def owner(path: bytes, method: str = "GET") -> str | None:
        match = routes.match(method, path)
        return match.upstream if isinstance(match, Route | McpMount) else None

    assert owner(b"/") == owner(b"/a") == owner(b"/a/bc") == owner(b"/a/c") == "root"
    assert owner(b"/a/b/x") == owner(b"/a/b") == owner(b"/a/b/") == "deep"
    assert owner(b"/a/b/y") is None  # the longer mount has it; it does not fall to the root
    assert owner(b"/mcp", "POST") == owner(b"/mcp/", "GET") == "tools"
    assert owner(b"/mcp/x") is None
    assert owner(b"/mcpx") == "root"
    assert routes.methods(b"/mcp") == ("GET", "POST", "DELETE")


@pytest.mark.parametrize(
    ("mount", "base", "raw", "sent"),
    [
        ("/", b"", b"/a?b", b"/a?b"),
        ("/", b"", b"/a?", b"/a?"),
        ("/", b"/api", b"/a%20b", b"/api/a%20b"),
        ("/m", b"", b"/m", b"/"),
        ("/m", b"", b"/m/", b"/"),
        ("/m", b"/api", b"/m", b"/api"),
        ("/m", b"/api", b"/m/x?y", b"/api/x?y"),
    ],
)
def test_the_mount_is_replaced_and_the_rest_untouched(
    mount: str, base: bytes, raw: bytes, sent: bytes
) -> None:
    routes = table(("GET /*", "$1"), mount=mount)
    parsed = target.parse(raw)
    route = routes.match("GET", parsed.decoded)
    assert isinstance(route, Route)
    assert upstream_target(route, base, parsed) == sent


def test_the_gateways_own_paths_never_reach_an_upstream() -> None:
    routes = table(("* /*", "$1"))
    for path in (b"/farebox", b"/farebox/v1/prices", b"/healthz", b"/readyz", b"/metrics"):
        assert is_reserved(path) and routes.match("GET", path) is None
    assert isinstance(routes.match("GET", b"/fareboxes"), Route)
    assert isinstance(routes.match("GET", b"/api/externals"), Route)


def test_what_a_route_carries() -> None:
    routes = table(
        {
            "match": "POST /v1/render",
            "price": "$0.01",
            "rate_limit": "60/min",
            "retry_safe": True,
            "timeout_s": 9,
        },
        mount="/w",
        timeout_s=5,
    )
    (route,) = routes.routes
    assert route.id == "api POST /v1/render"
    assert route.public_pattern == "/w/v1/render"
    assert route.price.fixed_units == 10_000 and not route.free
    assert route.rate_limit is not None and route.rate_limit.count == 60
    assert (route.retry_safe, route.timeout_s, route.charge) == (True, 9, "on_success")


@pytest.mark.parametrize(
    ("routes", "says"),
    [
        ([("GET /a*", "$1")], "stands alone"),
        ([("GET /*/a", "$1")], "stands alone"),
        ([("GET /a[id]", "$1")], "percent-encoded"),
        ([("GET /[i-d]", "$1")], "percent-encoded"),
        ([("GET /a;b", "$1")], "percent-encoded"),
        ([("GET /%61", "$1")], "not accepted"),
        ([("GET /%2F", "$1")], "not accepted"),
        ([("GET /%FF", "$1")], "UTF-8"),
        ([("TRACE /a", "$1")], "never forwarded"),
        ([("GET /a", "$1"), ("GET /a", "$2")], "listed twice"),
        ([{"match": "GET /a", "price": {"rule": "flatt"}}], "did you mean"),
    ],
)
def test_faults(routes: Sequence[Any], says: str) -> None:
    with pytest.raises(RouteError, match=says):
        table(*routes)


def test_all_faults_at_once() -> None:
    with pytest.raises(RouteError) as raised:
        compile_routes(
            [
                upstream(("GET /a*", "$1"), ("GET /*/b", "$1"), name="one"),
                upstream(name="two"),
                upstream(name="three", mount="/farebox"),
            ]
        )
    assert len(raised.value.faults) == 4


@pytest.mark.parametrize(
    ("routes", "says"),
    [
        ([("GET /*", "$1"), ("GET /a", "$1")], ["api GET /a is never reached: api GET /*"]),
        ([("* /a/*", "$1"), ("POST /a/[id]", "$1")], ["is never reached"]),
        ([("GET /a/[id]", "$1"), ("GET /a/b", "$1")], ["is never reached"]),
        ([("GET /healthz", "$1")], ["gateway's own /healthz"]),
        ([("GET /farebox/v1/x", "$1")], ["gateway's own /farebox"]),
        ([("GET /v1/report", "$1"), ("GET /*", "free")], ["is cheaper than"]),
        ([("GET /v1/report", "$1"), ("GET /*", "$1")], []),
        ([("GET /v1/report", "$1"), ("POST /*", "free")], []),
        ([{**FREE, "retry_safe": True}], ["api GET /f is free: its failed_if and retry_safe"]),
        ([{**FREE, "failed_if": {"empty": True}}], ["is free"]),
        ([{**FREE, "failed_if": {"status": ["4xx"]}, "retry_safe": False}], []),
        ([{**FREE, "price": "$1", "failed_if": {"empty": True}, "retry_safe": True}], []),
        ([("GET /a", "$1"), ("POST /a", "$1"), ("GET /a/", "$1"), ("GET /a/*", "$1")], []),
        ([("GET /*", "$1"), ("* /*", "$1")], []),
    ],
)
def test_warnings(routes: Sequence[Any], says: list[str]) -> None:
    given_warnings = table(*routes).warnings()
    assert len(given_warnings) == len(says)
    for warning, expected in zip(given_warnings, says, strict=True):
        assert expected in warning


def test_a_route_below_a_longer_mount_is_reported() -> None:
    routes = compile_routes(
        [
            upstream(("GET /mcp/x", "$1"), ("GET /mcp", "$1"), ("GET /mcq", "$1"), name="root"),
            upstream(("GET /*", "$1"), name="deep", mount="/mcp"),
        ]
    )
    assert [w.split(" is ")[0] for w in routes.warnings()] == ["root GET /mcp/x", "root GET /mcp"]


@given(PATTERNS, PATTERNS, st.lists(PATHS, min_size=1, max_size=20))
def test_covers_is_what_it_says(wide: str, narrow: str, paths: list[str]) -> None:
    a, b = compile_pattern(wide), compile_pattern(narrow)
    if covers(a, b):
        for path in paths:
            decoded = target.parse(path.encode()).decoded.decode()
            assert _naive(wide, decoded) or not _naive(narrow, decoded)
