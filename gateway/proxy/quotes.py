"""Quotes that lock a price: ``POST v1/quotes``, and the ``Farebox-Quote`` of a request.

A quote is a text under the deployment's MAC, so it needs no row and any node knows it again. It
says which request it was made for (method and raw target, and the body where one was shown), the
most that costs, by which price version, and until when. Who sends it with the request pays by that
price or by the present one, whichever comes to less.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.errors import Problem
from gateway.fields import values
from gateway.node import Node
from gateway.own import amount, answer, body_of, node_of, object_of
from gateway.payments.offers import Keys
from gateway.pricing import several
from gateway.pricing.quote import Line, PriceRequest, Quote, quote
from gateway.pricing.scheduled import in_force
from gateway.proxy import price_changes
from gateway.proxy.cost import When, asked_of
from gateway.proxy.identity import Headers
from gateway.proxy.routes_table import Route as PricedRoute
from gateway.proxy.target import Target, parse
from wallet_auth.mac import sized

HEADER: Final = b"farebox-quote"
_HEAD: Final = struct.Struct(">4sQQ16s16s")  # key id, expiry in seconds, units, request, body
_MAC_BYTES: Final = 16
_MOST_BYTES: Final = 1_024
_ANY_BODY: Final = bytes(16)
_METHOD: Final = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"))


class Opened(NamedTuple):
    """A quote that is ours."""

    max_units: int
    expiry_s: int
    version: str


def seal(keys: Keys, quoted: Opened, method: str, target: bytes, body: bytes | None) -> str:
    """The text of a quote. ``body`` is the SHA-256 of the body it holds for, None: of any."""
    head = _HEAD.pack(
        keys.current,
        quoted.expiry_s,
        quoted.max_units,
        _request(method, target),
        _ANY_BODY if body is None else _body(body),
    )
    text = head + quoted.version.encode()
    made = base64.urlsafe_b64encode(text + _mac(keys, keys.current, text)).decode()
    return made.rstrip("=")


class Use(NamedTuple):
    """The request a quote is used for: its raw target, the SHA-256 of its body, and when it was
    made."""

    target: bytes
    body: bytes
    at_s: int


def unseal(keys: Keys, token: bytes, method: str, use: Use) -> Opened:
    """The quote a text stands for.

    Raises ``Problem``: ``invalid_quote``, ``quote_expired``, and ``quote_mismatch`` for another
    request.
    """
    try:
        if len(token) > _MOST_BYTES:
            raise ValueError
        raw = base64.b64decode(token + b"=" * (-len(token) % 4), b"-_", True)
        if base64.urlsafe_b64encode(raw).rstrip(b"=") != token:
            raise ValueError  # spare bits: the same quote in another spelling
        key_id, expiry_s, units, request, asked = _HEAD.unpack(raw[: _HEAD.size])
        text, made = raw[:-_MAC_BYTES], raw[-_MAC_BYTES:]
        version = text[_HEAD.size :].decode()
    except (ValueError, struct.error):
        raise Problem("invalid_quote", "Farebox-Quote is not a quote of this gateway.") from None
    if key_id not in keys.secrets or not hmac.compare_digest(_mac(keys, key_id, text), made):
        raise Problem("invalid_quote", "Farebox-Quote is not a quote of this gateway.")
    if request != _request(method, use.target):
        raise Problem("quote_mismatch", "This quote was made for another method or target.")
    if asked not in (_ANY_BODY, _body(use.body)):
        raise Problem("quote_mismatch", "This quote was made for another body.")
    if expiry_s < use.at_s:
        raise Problem("quote_expired", "This quote has expired: ask for a new one.")
    return Opened(units, expiry_s, version)


def _request(method: str, target: bytes) -> bytes:
    return hashlib.sha256(sized(method.encode(), target)).digest()[:16]


def _body(content: bytes) -> bytes:
    return hashlib.sha256(b"body" + content).digest()[:16]


def _mac(keys: Keys, key_id: bytes, text: bytes) -> bytes:
    said = sized(b"farebox-quote-1", keys.deployment.encode(), text)
    return hmac.digest(keys.secrets[key_id], said, "sha256")[:_MAC_BYTES]


def none_here(headers: Headers) -> None:
    """Where no quote can hold: of a tool, or of an invoke. Raises ``Problem`` for one."""
    if values(headers, HEADER):
        raise Problem("quote_mismatch", "Quotes are for requests to a route, and not for tools.")


async def apply(
    node: Node, texts: Sequence[bytes], use: Use, asked: PriceRequest, price: Quote
) -> Quote:
    """The price of a request that brings a quote. Raises ``Problem``."""
    if len(texts) > 1:
        raise Problem("invalid_quote", "Farebox-Quote is there twice.")
    opened = unseal(node.rails.keys, texts[0], asked.method, use)
    return await _locked(node, price, opened, asked)


async def _locked(node: Node, price: Quote, opened: Opened, asked: PriceRequest) -> Quote:
    """``price``, or what the quote's own version comes to if that is less, and at most the
    quote."""
    if opened.version != price.price_version:
        rule = await price_changes.rule_of(node.db, opened.version)
        if rule is None:
            raise Problem("quote_expired", "The price of this quote is not known any more.")
        with suppress(Problem):  # else it needs more of the request than is read now: at most this
            price = several.lowest([price, quote(rule, asked)])
    if price.max_units <= opened.max_units:
        return price
    lines = (Line("as quoted", opened.max_units),)
    return replace(price, max_units=opened.max_units, breakdown=lines, exact=False)


# --- POST v1/quotes -------------------------------------------------------------------------------

_MEMBERS: Final = frozenset(("method", "url", "content_type", "body"))


async def ask(request: Request) -> Response:
    """``POST v1/quotes``: what a request would cost at most, and why, locked for a while.

    ``{"method": "POST", "url": "/v1/x?y=1", "content_type": "…", "body": "…"}``: the URL may be
    whole; ``body`` is the very text that will be sent. Without it a price that depends on the body
    is that of the dearest one.
    """
    node = node_of(request)
    wanted = object_of(await body_of(request), _MEMBERS)
    method = wanted.get("method", "GET")
    if not isinstance(method, str) or method not in _METHOD:
        raise Problem("invalid_request", "method is the method of a request, in capitals.")
    body, kind = wanted.get("body"), wanted.get("content_type", "application/json")
    if not isinstance(kind, str) or not kind.isascii() or not isinstance(body, str | None):
        raise Problem("invalid_request", "body and content_type are texts.")
    target = _target(node, wanted.get("url"))
    route = _route(node, method, target)
    sent = None if body is None else body.encode()
    headers = [(b"content-type", kind.encode())]
    asked = asked_of(route, method, target, headers, sent, When(node.now_s()))
    made = quote(in_force(route.price, asked.now_s), asked)
    return answer(200, _told(node, route, made, asked, target))


def _target(node: Node, url: Any) -> Target:
    if not isinstance(url, str) or not url.isascii():
        raise Problem("invalid_request", "url is the URL, or the path and query, of a request.")
    base = node.settings.server.public_url
    if not url.startswith("/"):
        if urlsplit(url)._replace(path="", query="", fragment="").geturl() != base:
            raise Problem("invalid_request", f"url is one of this gateway: {base}/…")
        url = url[len(base) :] or "/"
    return parse(url.encode())


def _route(node: Node, method: str, target: Target) -> PricedRoute:
    found = node.routes.match(method, target.decoded)
    if not isinstance(found, PricedRoute):
        raise Problem("not_found", "No route with a price of its own takes this request.")
    return found


def _told(
    node: Node, route: PricedRoute, made: Quote, asked: PriceRequest, target: Target
) -> dict[str, Any]:
    expiry_s = asked.now_s + node.settings.server.quote_timeout_s
    opened = Opened(made.max_units, expiry_s, made.price_version)
    content = None if asked.body is None else hashlib.sha256(asked.body).digest()
    return {
        "quote": seal(node.rails.keys, opened, asked.method, target.raw, content),
        "header": "Farebox-Quote",
        "method": asked.method,
        "url": node.settings.server.public_url + target.raw.decode("ascii"),
        "route": route.id,
        **amount(node, "price", made.max_units),
        "exact": made.exact,
        "breakdown": [line.shown() for line in made.breakdown],
        "price_version": made.price_version,
        "terms": in_force(route.price, asked.now_s).describe(),
        "expires_at_ms": expiry_s * 1000,
    }


ROUTES = [Route("/farebox/v1/quotes", ask, methods=["POST"])]
