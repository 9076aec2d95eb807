"""Cross-origin requests of browsers: preflights answered here, our headers made readable.

A preflight (Fetch standard, section 4.8) carries no identity and no payment, so it is answered by
the gateway and never forwarded. What browser x402 clients send and read is listed in x402.md 1.1:
payment headers, and oddly ``Access-Control-Expose-Headers`` on the paid retry. Answers allow any
origin, without credentials: nothing here is decided by a cookie.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

from gateway.fields import by_name

Headers = list[tuple[bytes, bytes]]

ALLOWED: Final = (
    "PAYMENT-SIGNATURE, X-PAYMENT, PAYMENT, SIGN-IN-WITH-X, Access-Control-Expose-Headers, "
    "Authorization, Signature, Signature-Input, Content-Digest, Content-Type, Idempotency-Key, "
    "Farebox-Max, Farebox-Prefer, Farebox-Mandate, Farebox-Run"
)
EXPOSED: Final = (
    "PAYMENT-REQUIRED, PAYMENT-RESPONSE, X-PAYMENT-RESPONSE, Farebox-Request-Id, "
    "Farebox-Paid-From, Farebox-Charged, Farebox-Held, Farebox-Balance, Farebox-Replayed, "
    "Farebox-Credential, RateLimit, RateLimit-Policy, Retry-After, WWW-Authenticate, "
    "Accept-Signature"
)
MAX_AGE_S: Final = 600
_ASKED: Final = re.compile(
    rb"[A-Za-z0-9!#$%&'*+.^_`|~-]+(?:[ \t]*,[ \t]*[A-Za-z0-9!#$%&'*+.^_`|~-]+)*"
)


def is_preflight(method: str, headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """OPTIONS with ``Origin`` and ``Access-Control-Request-Method``."""
    if method != "OPTIONS":
        return False
    names = by_name(headers)
    return b"origin" in names and b"access-control-request-method" in names


def preflight_headers(methods: Sequence[str], headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """The headers of the 204 to a preflight for a path that takes ``methods``.

    Header names the browser asks for are allowed too (the upstream may want its own), if the
    list is well formed and short.
    """
    allowed = ALLOWED.encode()
    for name, value in headers:
        asked = name == b"access-control-request-headers" and len(value) <= 2_000
        if asked and _ASKED.fullmatch(value):
            allowed += b", " + value
    return [
        (b"access-control-allow-origin", b"*"),
        (b"access-control-allow-methods", ", ".join(methods).encode()),
        (b"access-control-allow-headers", allowed),
        (b"access-control-max-age", str(MAX_AGE_S).encode()),
        (b"vary", b"Access-Control-Request-Headers"),
    ]


ALLOW_ORIGIN: Final = b"access-control-allow-origin"
OPEN_TO_ALL: Final = (
    b"access-control-allow-origin: *\r\naccess-control-expose-headers: "
    + EXPOSED.encode()
    + b"\r\n"
)
"""What ``expose`` adds where nothing names an origin, as it goes on the wire."""


def expose(headers: Headers) -> Headers:
    """An answer's headers with ours made readable to a page of any origin.

    An upstream that answers cross-origin requests itself keeps its ``Access-Control-Allow-Origin``
    (it may name one origin); only the list of readable headers grows.
    """
    listed = (b"access-control-expose-headers", EXPOSED.encode())
    if any(name == ALLOW_ORIGIN for name, _ in headers):
        return [*headers, listed]
    return [*headers, (b"access-control-allow-origin", b"*"), listed]
