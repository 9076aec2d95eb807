"""An upstream's redirect leads to the public address, or nowhere."""

from __future__ import annotations

import pytest

from gateway.proxy.client import parse_origin
from gateway.proxy.location import public_address

PUBLIC = "https://api.example"
CASES = [
    # (the upstream's URL, mount, what it says, what the caller sees)
    ("http://10.0.0.7:9000", "/", "http://10.0.0.7:9000/a?b=1#c", "https://api.example/a?b=1#c"),
    ("http://10.0.0.7:9000", "/", "//10.0.0.7:9000/a", "https://api.example/a"),
    ("http://10.0.0.7:9000", "/", "http://10.0.0.7:9000", "https://api.example/"),
    ("http://10.0.0.7:9000", "/", "https://10.0.0.7:9000/a", "https://api.example/a"),
    ("http://internal", "/", "http://INTERNAL:80/a", "https://api.example/a"),
    ("http://internal", "/", "http://user:pw@internal/a", "https://api.example/a"),
    ("http://internal", "/w", "http://internal/a", "https://api.example/w/a"),
    ("http://internal", "/w", "http://internal/", "https://api.example/w/"),
    ("http://internal/v2", "/w", "http://internal/v2/a", "https://api.example/w/a"),
    ("http://internal/v2", "/", "http://internal/v2", "https://api.example/"),
    ("http://[::1]:9000", "/", "http://[::1]:9000/a", "https://api.example/a"),
    # nothing of it is public
    ("http://internal/v2", "/w", "http://internal/admin", None),
    ("http://internal/v2", "/w", "http://internal/v21", None),
    ("http://internal/v2", "/w", "/admin", None),
    ("http://internal", "/", "http://internal:notaport/a", None),
    ("http://internal", "/", "http://[bad/a", None),
    # an absolute path is the upstream's own
    ("http://internal", "/", "/a?b", "/a?b"),
    ("http://internal", "/w", "/a", "/w/a"),
    ("http://internal/v2", "/w", "/v2/a", "/w/a"),
    # others pass
    ("http://internal", "/w", "a/b", "a/b"),
    ("http://internal", "/w", "?page=2", "?page=2"),
    ("http://internal", "/w", "https://elsewhere.example/a", "https://elsewhere.example/a"),
    ("http://internal", "/w", "http://internal:8080/a", "http://internal:8080/a"),
    ("http://internal", "/w", "mailto:a@b.example", "mailto:a@b.example"),
]


@pytest.mark.parametrize(("url", "mount", "said", "seen"), CASES)
def test_where_a_redirect_leads(url: str, mount: str, said: str, seen: str | None) -> None:
    found = public_address(said.encode(), mount, parse_origin(url), PUBLIC)
    assert found == (None if seen is None else seen.encode())
