"""Browsers: preflights are recognised and answered, our headers are readable."""

from __future__ import annotations

import pytest

from gateway.proxy import cors

PREFLIGHT = [(b"origin", b"https://a.example"), (b"access-control-request-method", b"POST")]


def test_what_a_preflight_is() -> None:
    assert cors.is_preflight("OPTIONS", PREFLIGHT)
    assert not cors.is_preflight("GET", PREFLIGHT)
    assert not cors.is_preflight("OPTIONS", PREFLIGHT[:1])
    assert not cors.is_preflight("OPTIONS", PREFLIGHT[1:])


def test_the_answer_allows_what_x402_clients_send() -> None:
    headers = dict(cors.preflight_headers(("GET", "HEAD"), PREFLIGHT))
    assert headers[b"access-control-allow-methods"] == b"GET, HEAD"
    allowed = headers[b"access-control-allow-headers"].decode().lower()
    for name in (
        "payment-signature",
        "x-payment",
        "sign-in-with-x",
        "access-control-expose-headers",
        "signature-input",
    ):
        assert name in allowed
    assert b"access-control-allow-credentials" not in headers


@pytest.mark.parametrize(
    ("asked", "allowed"),
    [
        (b"x-own, x-other", True),
        (b"x-own", True),
        (b"", False),
        (b"x own", False),
        (b"x-own\r\nset-cookie: a", False),
        (b"a" * 3_000, False),
    ],
)
def test_only_names_are_echoed(asked: bytes, allowed: bool) -> None:
    headers = dict(
        cors.preflight_headers(("GET",), [*PREFLIGHT, (b"access-control-request-headers", asked)])
    )
    plain = cors.ALLOWED.encode()
    expected = plain + b", " + asked if allowed else plain
    assert headers[b"access-control-allow-headers"] == expected


def test_exposed_headers() -> None:
    ours = cors.expose([(b"content-type", b"text/plain")])
    assert (b"access-control-allow-origin", b"*") in ours
    theirs = cors.expose([(b"access-control-allow-origin", b"https://a.example")])
    origins = [v for n, v in theirs if n == b"access-control-allow-origin"]
    assert origins == [b"https://a.example"]
    for headers in (ours, theirs):
        listed = dict(headers)[b"access-control-expose-headers"].decode()
        for name in ("PAYMENT-REQUIRED", "PAYMENT-RESPONSE", "X-PAYMENT-RESPONSE"):
            assert name in listed
