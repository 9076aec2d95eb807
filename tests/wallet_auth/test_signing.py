"""The signing half: what it adds, and what it will not sign."""

from __future__ import annotations

from typing import Any

import pytest

from tests.wallet_auth.support import (
    ADDRESS,
    BODY,
    DIGEST,
    KEY,
    NOW,
    URL,
    accepted,
    request_of,
)
from wallet_auth.signing import sign_request


def test_signing_is_deterministic_and_adds_only_what_is_needed() -> None:
    arguments: dict[str, Any] = {"now_s": NOW, "nonce": "n"}
    once = sign_request(KEY, "GET", URL, [], None, **arguments)
    assert once == sign_request(KEY, "GET", URL, [], None, **arguments)
    assert list(once) == ["Signature-Input", "Signature"]
    posted = sign_request(KEY, "POST", URL, [], BODY, **arguments)
    assert posted["Content-Digest"] == DIGEST
    given = sign_request(KEY, "POST", URL, [("Content-Digest", DIGEST)], BODY, **arguments)
    assert "Content-Digest" not in given
    assert given["Signature"] == posted["Signature"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"nonce": "a b"}, "nonce"),
        ({"nonce": ""}, "nonce"),
        ({"window_s": 0}, "window"),
        ({"window_s": 301}, "window"),
        ({"components": ["x-not-there"]}, "x-not-there"),
        ({"components": ["X-Upper"]}, "plain component names"),
        ({"components": ["@query"]}, "query"),
        ({"method": "get"}, "method"),
        ({"url": "https://u@x/"}, "absolute"),
        ({"headers": [("Signature-Input", "eth=()"), ("Signature", "eth=:AAAA:")]}, "already"),
        (
            {"headers": [("Signature-Input", f'a=();keyid="erc8128:1:{ADDRESS}"')]},
            "already",
        ),
        ({"headers": [("Farebox-Max", "1"), ("Farebox-Max", "2")]}, "only once"),
    ],
)
def test_what_the_verifier_would_refuse_is_not_signed(change: dict[str, Any], match: str) -> None:
    arguments: dict[str, Any] = {
        "method": "GET",
        "url": URL,
        "headers": [],
        "body": None,
        "now_s": NOW,
        "nonce": "n",
    }
    with pytest.raises(ValueError, match=match):
        sign_request(KEY, **(arguments | change))


# -- fixed vectors --------------------------------------------------------------------------------


def test_a_vector_of_rfc_9421_for_the_base() -> None:
    """The base of a request like the one in RFC 9421 2.5, byte for byte."""
    from wallet_auth.components import signature_base

    headers = [("content-type", "application/json"), ("content-length", "18")]
    request = request_of("POST", "https://example.com/foo?param=Value&Pet=dog", headers, None)
    params = (
        '("@method" "@authority" "@path" "@query" "content-length" "content-type")'
        ';created=1618884473;keyid="test-key-rsa-pss"'
    )
    covered = ["@method", "@authority", "@path", "@query", "content-length", "content-type"]
    assert signature_base(request, covered, params, request.lines()).decode() == (
        '"@method": POST\n'
        '"@authority": example.com\n'
        '"@path": /foo\n'
        '"@query": ?param=Value&Pet=dog\n'
        '"content-length": 18\n'
        '"content-type": application/json\n'
        f'"@signature-params": {params}'
    )


async def test_a_vector_of_our_own() -> None:
    """A signed request as bytes: what clients in other languages can be built against."""
    url, body = "https://api.example/v1/render?size=2", b'{"a":1}'
    headers = [("farebox-max", "$0.01")]
    added = sign_request(
        KEY,
        "POST",
        url,
        headers,
        body,
        now_s=NOW,
        nonce="0190c8a1-7c00-7abc-8def-012345678901",
        window_s=60,
        chain_id=8453,
    )
    assert added == {
        "Content-Digest": "sha-256=:AVq9f1zFei3ZS3WQ8ErYCEJzkF7jPsXOvq5iJ2qX+GI=:",
        "Signature-Input": 'eth=("@authority" "@method" "@path" "@query" "content-digest" '
        '"farebox-max");created=1900000000;expires=1900000060;'
        'nonce="0190c8a1-7c00-7abc-8def-012345678901";keyid="erc8128:8453:' + ADDRESS + '"',
        "Signature": "eth=:XisM6ke8A8mvMX6zA5T7JG7hkkUwq2xDtUAEEAR5s5By"
        "G1MX6dsITLlKWk/aeu3ffXBbGl1L8vAdffpEpiTfURw=:",
    }
    signer = await accepted(request_of("POST", url, [*headers, *added.items()], body))
    assert signer.ceiling == "$0.01"
