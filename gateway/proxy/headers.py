"""Which header fields pass, in both directions.

Upwards the caller's fields pass except those that could change the framing, name another
identity, carry a payment or a secret of ours, or make the upstream see another method or path than
the one that was priced; then come ours, then the operator's ``inject``, and nothing from the
caller may stand beside either. Downwards the upstream's fields pass except those through which it
could speak for the gateway (design: the upstream is not trusted with prices, payments or pages).

Fields are lists of ``(name, value)`` byte pairs with lower-case names, as ASGI has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final

from gateway import observe
from gateway.fields import by_name
from gateway.pricing.meters import FOREIGN

Headers = list[tuple[bytes, bytes]]

# RFC 9110 section 7.6.1 and its older relatives.
HOP_BY_HOP: Final = frozenset(
    b"connection keep-alive proxy-connection te trailer trailers transfer-encoding upgrade"
    b" http2-settings".split()
)
_REQUEST_NAMES: Final = HOP_BY_HOP | frozenset(
    # framing, made anew for the upstream's connection; the body is already on its way
    b"content-length expect host"
    # x402's and ours
    b" payment sign-in-with-x settlement-overrides extension-responses"
    # who is calling, in the words of one proxy or another
    b" forwarded via x-real-ip x-client-ip x-cluster-client-ip true-client-ip cf-connecting-ip"
    b" fastly-client-ip client-ip"
    # frameworks that obey these see another method or path than the one that was priced
    b" x-http-method x-http-method-override x-method-override x-original-method x-original-uri"
    b" x-original-url x-rewrite-url".split()
)
_REQUEST_PREFIXES: Final = (
    b"proxy-",
    b"payment-",
    b"x-payment",
    b"x-forwarded-",
    b"x-wallet",
    b"farebox-",
    b"x-farebox-",
)
_RESPONSE_NAMES: Final = HOP_BY_HOP | frozenset(
    # framing is made anew; date and server are our server's own
    b"content-length date server"
    b" payment sign-in-with-x settlement-overrides extension-responses"
    # reach beyond this answer into the gateway's own origin
    b" alt-svc clear-site-data service-worker-allowed"
    # obeyed by a front server, which would serve a file or another place of its own
    b" x-sendfile x-lighttpd-send-file x-reproxy-url x-reproxy-file".split()
)
_RESPONSE_PREFIXES: Final = (
    b"proxy-",
    b"payment-",
    b"x-payment",
    b"farebox-",
    b"ratelimit",
    b"x-accel-",
)
_STATEMENTS: Final = frozenset((b"farebox-usage", b"farebox-amount"))
_OURS: Final = b"farebox-"
_LOOKED_AT: Final = frozenset((b"authorization", b"cookie", b"signature", b"signature-input"))
_COOKIE_PREFIX: Final = b"farebox"
_BEARER: Final = b"bearer"
_KEY_PREFIX: Final = b"fbx_"
_IDENTITY: Final = (
    b"Authorization, Signature, Signature-Input, Payment-Signature, X-Payment, Sign-In-With-X"
)
_SHARED_CACHES: Final = frozenset(b"public s-maxage proxy-revalidate".split())


# What is to be done with a field on its way up.
_PASS: Final = 0
_DROP: Final = 1
_LOOK: Final = 2  # its value decides
# On its way down: it does not pass, and where nobody reads it it is told of.
_TOLD: Final = 3


# Names come from callers: no more of them are kept than this, and none that is longer. Most
# requests use the same few dozen.
_REMEMBERED: Final = 2_048
_LONGEST: Final = 64


def _look_up(name: bytes) -> tuple[int, bytes]:
    """What to do with a caller's field, and its name as WSGI and CGI servers see it: they make
    HTTP_X_WALLET of x-wallet and x_wallet alike."""
    plain = name.replace(b"_", b"-")
    if plain in _REQUEST_NAMES or plain.startswith(_REQUEST_PREFIXES):
        return _DROP, plain
    return (_LOOK if name in _LOOKED_AT else _PASS), plain


_up: Final = lru_cache(maxsize=_REMEMBERED)(_look_up)


def _drops_down(name: bytes) -> int:
    plain = name.replace(b"_", b"-")
    if plain in _STATEMENTS:
        return _TOLD
    return _DROP if plain in _RESPONSE_NAMES or plain.startswith(_RESPONSE_PREFIXES) else _PASS


_dropped_down: Final = lru_cache(maxsize=_REMEMBERED)(_drops_down)


@lru_cache(maxsize=1_024)
def _plain_names(pairs: tuple[tuple[bytes, bytes], ...]) -> frozenset[bytes]:
    return frozenset(name.replace(b"_", b"-") for name, _ in pairs)


def is_our_key(authorization: bytes) -> bool:
    """Whether an ``Authorization`` value is a key of this gateway (``Bearer fbx_…``).

    A tab separates as well as a space does: some servers take it, so our key must not pass so.
    """
    scheme, *rest = authorization.split(None, 1)[:2] or [b""]
    return scheme.lower() == _BEARER and bool(rest) and rest[0].startswith(_KEY_PREFIX)


def _nominated(connection: Iterable[bytes]) -> set[bytes]:
    """The names that ``Connection`` fields declare to be for this hop only."""
    return {token.strip(b" \t").lower() for value in connection for token in value.split(b",")}


def request_headers(
    incoming: Iterable[tuple[bytes, bytes]],
    *,
    host: bytes,
    ours: Sequence[tuple[bytes, bytes]] = (),
    inject: Sequence[tuple[bytes, bytes]] = (),
    signature_is_ours: bool = False,
) -> Headers:
    """The fields for the upstream.

    ``host`` is the authority of its configured URL. ``ours`` are the gateway's own statements
    (``farebox-auth`` and so on), ``inject`` the operator's; a name in ``inject`` stands alone, a
    name in ``ours`` has only our value. ``signature_is_ours``: the RFC 9421 signature is an
    identity for this gateway; another one belongs to the upstream and passes. Content-Length is
    not set here: it follows from the body.
    """
    listed = incoming if isinstance(incoming, list) else list(incoming)
    gone = _nominated(by_name(listed).get(b"connection", ()))
    # Of ours only those that do not begin with "farebox-" can stand in a caller's fields.
    taken = _plain_names(tuple(inject))
    kept_ours = [name for name, _ in ours if not name.startswith(_OURS)]
    if kept_ours:
        taken = taken.union(kept_ours)
    out: Headers = [(b"host", host)]
    for field in listed:
        name, value = field
        what, plain = (_up if len(name) <= _LONGEST else _look_up)(name)
        if what == _DROP or plain in taken or name in gone:
            continue
        if what == _PASS:
            out.append(field)
        elif name == b"authorization":
            if not is_our_key(value):
                out.append(field)
        elif name == b"cookie":
            kept = _without_our_cookies(value)
            if kept:
                out.append((name, kept))
        elif not signature_is_ours:
            out.append(field)
    injected = {name for name, _ in inject}
    out.extend([pair for pair in ours if pair[0] not in injected] if injected else ours)
    out.extend(inject)
    return out


def _without_our_cookies(value: bytes) -> bytes:
    if _COOKIE_PREFIX not in value.lower():
        return value
    kept = [pair.strip() for pair in value.split(b";") if not _our_cookie(pair)]
    return b"; ".join(filter(None, kept))


def _our_cookie(pair: bytes) -> bool:
    name = pair.partition(b"=")[0].strip().lower()
    return name.removeprefix(b"__host-").removeprefix(b"__secure-").startswith(_COOKIE_PREFIX)


def response_headers(
    incoming: Iterable[tuple[bytes, bytes]],
    *,
    length: int | None = None,
    private: bool = False,
    metered: bool = False,
) -> Headers:
    """The fields for the caller.

    ``length`` is the whole length of the body if it is known (for HEAD, what it would be).
    ``private``: the answer was paid for or belongs to one caller, so no shared cache may keep it:
    ``Cache-Control: private`` is added, what invites shared caches is taken out (RFC 9111
    section 5.2.2, RFC 9213), and ``Vary`` names the identity fields. ``metered``: what the
    upstream says of an amount was looked at; elsewhere it is an oddity.
    """
    listed = [(name.lower(), value) for name, value in incoming]
    gone = _nominated([value for name, value in listed if name == b"connection"])
    out: Headers = []
    directives: list[bytes] = []
    for name, value in listed:
        what = (_dropped_down if len(name) <= _LONGEST else _drops_down)(name)
        if what or name in gone:
            if what == _TOLD and not metered:
                observe.count("oddity", kind=FOREIGN)
            continue
        if name == b"set-cookie" and _our_cookie(value):
            continue
        if private and name == b"cache-control":
            directives.append(value)
        elif private and (name.endswith(b"cdn-cache-control") or name == b"surrogate-control"):
            continue
        else:
            out.append((name, value))
    if private:
        out.append((b"cache-control", _private(directives)))
        out.append((b"vary", _IDENTITY))
    if length is not None:
        out.append((b"content-length", str(length).encode()))
    return out


def _private(values: Sequence[bytes]) -> bytes:
    """The directives that stay, with ``private`` first. Quoted commas only split more finely."""
    kept = [b"private"]
    for directive in b",".join(values).split(b","):
        text = directive.strip(b" \t")
        name = text.partition(b"=")[0].strip(b" \t").lower()
        if text and name != b"private" and name not in _SHARED_CACHES:
            kept.append(text)
    return b", ".join(kept)
