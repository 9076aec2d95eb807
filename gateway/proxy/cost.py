"""What a request can cost at most, where that hangs on the request itself.

A price that hangs on the body is quoted from the very bytes that are hashed and sent up; then an
offer is for that body and no other: else somebody could take the offer for a cheap one, and send
the dear one with it.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Final, NamedTuple

from gateway.errors import Problem
from gateway.fields import Fields, values
from gateway.money import format_usd, parse_usd
from gateway.pricing.quote import PriceRequest, Quote, quote
from gateway.proxy import price_changes
from gateway.proxy.identity import Caller, Headers
from gateway.proxy.routes_table import Route
from gateway.proxy.target import Target
from gateway.settings import Settings
from wallet_auth.erc8128 import SCHEME as ERC8128

MAX: Final = b"farebox-max"
MOST_BYTES: Final = 1 << 20
"""A body that decides a price is no longer than this: it is read whole, by us and at once."""


class When(NamedTuple):
    """The time a price is asked for, and since when the caller may have read one (None: now)."""

    now_s: int
    since_s: int | None = None


def shown(now_s: int) -> When:
    """For the price that is shown: the one that holds now."""
    return When(now_s)


def held(settings: Settings, now_s: int) -> When:
    """For the price that is held: the lowest that the caller may have read when it signed."""
    return When(now_s, now_s - price_changes.grace_s(settings))


def quote_of(  # noqa: PLR0917  (the parts of a request)
    route: Route,
    method: str,
    target: Target,
    headers: Headers | Fields,
    body: bytes | None,
    when: When,
) -> Quote:
    """The quote of a request. ``body`` None: it has not been read. Raises ``Problem``."""
    if route.fixed is not None:
        return route.fixed
    return quote(route.price, asked_of(route, method, target, headers, body, when))


def asked_of(  # noqa: PLR0917  (as quote_of)
    route: Route,
    method: str,
    target: Target,
    headers: Headers | Fields,
    body: bytes | None,
    when: When,
) -> PriceRequest:
    """A request as the price rule of its route may look at it. Raises ``Problem``."""
    kind = b""
    if route.needs_body and body is not None:
        kind = b",".join(values(headers, b"content-type"))  # of two nobody knows which one counts
        coded = (value.lower() for value in values(headers, b"content-encoding"))
        if any(value != b"identity" for value in coded):
            raise Problem(
                "unsupported_media_type",
                "The price of this call depends on its body: send it without a content encoding.",
            )
    path = target.decoded[len(route.mount.rstrip("/")) :] or b"/"
    return PriceRequest(
        method, path, target.query, kind, body, now_s=when.now_s, since_s=when.since_s
    )


def bound(route: Route, body: bytes) -> bytes:
    """What an offer says of the body it is for; nothing where the body does not matter."""
    return b"#body/" + sha256(body).digest() if route.needs_body else b""


def within_ceiling(caller: Caller, price: Quote, headers: Headers) -> None:
    """Nobody pays more than they signed for. A ceiling that nobody signed is refused: to ignore it
    would charge more than was said."""
    signer = caller.signer
    # Beside ERC-8128 it is covered, or has been refused already.
    if (signer is None or signer.scheme != ERC8128) and values(headers, MAX):
        raise Problem(
            "ceiling_not_covered",
            "Only an ERC-8128 signature can cover Farebox-Max: a payment is its own ceiling, and "
            "the other proofs name theirs themselves.",
        )
    if signer is None or signer.ceiling is None:
        return
    try:
        ceiling_units = parse_usd(signer.ceiling)
    except ValueError as error:
        raise Problem("invalid_request", f"Farebox-Max: {error}.") from None
    if price.max_units > ceiling_units:
        raise Problem(
            "price_above_ceiling",
            f"This call can cost {format_usd(price.max_units)}, more than the signed ceiling of "
            f"{format_usd(ceiling_units)}.",
            members={"price_units": price.max_units, "ceiling_units": ceiling_units},
        )
