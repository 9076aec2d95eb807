"""Requests as values: URLs are split and not repaired, bodies are noticed, digests compared."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest

from tests.wallet_auth.support import accepted, refused, signed
from wallet_auth import AuthError, SignedRequest, Signer, check_body, lines_of
from wallet_auth.request import has_body, split_url

Fields = tuple[tuple[bytes, bytes], ...]


@pytest.mark.parametrize(
    ("url", "scheme", "authority", "target"),
    [
        ("https://api.example", "https", "api.example", b"/"),
        ("https://api.example/", "https", "api.example", b"/"),
        ("HTTPS://API.Example:443/A/b", "https", "api.example", b"/A/b"),
        ("http://api.example:80/", "http", "api.example", b"/"),
        ("http://api.example:443/", "http", "api.example:443", b"/"),
        ("http://127.0.0.1:8402/a?b=1&c", "http", "127.0.0.1:8402", b"/a?b=1&c"),
        ("https://x/a?", "https", "x", b"/a?"),
        ("https://x?q", "https", "x", b"/?q"),
        ("https://x/a#frag?no", "https", "x", b"/a"),
        ("https://x/a?b#frag", "https", "x", b"/a?b"),
        ("https://x/%2e%2E/..//a", "https", "x", b"/%2e%2E/..//a"),
        ("https://[::1]:8402/", "https", "[::1]:8402", b"/"),
        ("https://[2001:DB8::1]/", "https", "[2001:db8::1]", b"/"),
        ("https://[::1]:443/", "https", "[::1]", b"/"),
        ("https://x:/", "https", "x", b"/"),
    ],
)
def test_urls_are_split_as_they_stand(url: str, scheme: str, authority: str, target: bytes) -> None:
    assert split_url(url) == (scheme, authority, target)


@pytest.mark.parametrize(
    "url",
    ["", "/a", "ftp://x/", "https:///a", "https://u:p@x/", "https://x/a b", "https://x/ä", "x/a"],
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="absolute"):
        split_url(url)


def _request(
    target: bytes = b"/", headers: Fields = (), body: bytes | None = None
) -> SignedRequest:
    return SignedRequest("POST", target, "x", "https", headers, body)


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"/a", b"/a", None),
        (b"/a?", b"/a", b""),
        (b"/a?b?c", b"/a", b"b?c"),
    ],
)
def test_no_query_and_an_empty_one_differ(target: bytes, path: bytes, query: bytes | None) -> None:
    assert (_request(target).path, _request(target).query) == (path, query)


@pytest.mark.parametrize(
    ("headers", "body", "expected"),
    [
        ((), None, False),
        ((), b"", False),
        ((), b"x", True),
        (((b"content-length", b"0"),), None, False),
        (((b"content-length", b"1"),), None, True),
        (((b"transfer-encoding", b"chunked"),), b"", True),
    ],
)
def test_a_body_is_noticed(headers: Fields, body: bytes | None, expected: bool) -> None:
    request = _request(headers=headers, body=body)
    assert has_body(request, request.lines()) is expected


@pytest.mark.parametrize(
    "lengths", [(b"-1",), (b"1", b"1"), (b"0x1",), (b"",), (b"1, 1",), (b"9" * 20,), (b" 1",)]
)
def test_an_odd_length_is_refused(lengths: tuple[bytes, ...]) -> None:
    request = _request(headers=tuple((b"content-length", value) for value in lengths))
    with pytest.raises(AuthError) as caught:
        has_body(request, request.lines())
    assert caught.value.code == "invalid_request"


def _signer(*digests: tuple[str, bytes]) -> Signer:
    return Signer("erc8128", "0x", 1, "key", "id", 0, 1, digests, None, frozenset())


def test_every_digest_must_hold() -> None:
    good256 = ("sha-256", hashlib.sha256(b"body").digest())
    good512 = ("sha-512", hashlib.sha512(b"body").digest())
    bad512 = ("sha-512", hashlib.sha512(b"other").digest())
    check_body(_signer(good256, good512), b"body")
    for digests, body in (((good256, bad512), b"body"), ((good256,), b"bodY"), ((), b"body")):
        with pytest.raises(AuthError) as caught:
            check_body(_signer(*digests), body)
        assert caught.value.code == "signature_digest_mismatch"


def test_an_empty_body_needs_no_digest_but_must_match_one() -> None:
    check_body(_signer(), b"")
    check_body(_signer(("sha-256", hashlib.sha256(b"").digest())), b"")
    with pytest.raises(AuthError):
        check_body(_signer(("sha-256", hashlib.sha256(b"x").digest())), b"")


def test_the_body_is_not_shown() -> None:
    assert "secret" not in repr(_request(body=b"secret"))


def test_fields_are_grouped_by_name_in_order() -> None:
    headers = ((b"a", b"1"), (b"b", b"2"), (b"a", b"3"), (b"a", b""))
    assert lines_of(headers) == {b"a": [b"1", b"3", b""], b"b": [b"2"]}
    assert _request(headers=headers).lines() == lines_of(headers)


async def test_a_request_may_bring_its_fields_grouped() -> None:
    """The caller's own mapping is used as it is, and left as it was."""
    sent = signed("POST", body=b"x", headers=[("x-a", "1"), ("x-a", "2")], components=["x-a"])
    index = lines_of(sent.headers)
    kept = {name: list(values) for name, values in index.items()}
    grouped = dataclasses.replace(sent, headers=(), index=index)
    assert grouped.lines() is index
    assert await accepted(grouped) == await accepted(sent)
    assert index == kept
    index[b"x-a"].reverse()
    await refused(grouped, "signature_invalid")
