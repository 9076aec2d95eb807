"""What a request signature covers, and the bytes that come of it (RFC 9421 sections 2 and 2.5).

Used by the verifier and by the signing half alike; tests hold it against two other makers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Final

from wallet_auth.errors import AuthError
from wallet_auth.request import Lines, SignedRequest, has_body

MUST_COVER: Final = {
    "farebox-max": "ceiling_not_covered",
    "idempotency-key": "idempotency_key_not_covered",
}
"""Fields that decide about money or repeats: sent beside a signature, they must be part of it."""
MAY_COVER: Final = ("farebox-run", "farebox-quote", "farebox-mandate")
"""Fields whose meaning is stronger when covered; sent once at most, like the ones above."""
_ONCE: Final = tuple(name.encode() for name in (*MUST_COVER, *MAY_COVER))
_ALWAYS: Final = ("@authority", "@method", "@path")
_METHOD: Final = re.compile(r"[A-Z0-9!#$%&'*+\-.^_`|~]+")
_TARGET: Final = re.compile(rb"/[!\"$-~]*")


def required_components(request: SignedRequest, lines: Lines) -> list[str]:
    """What a signature of this request must cover, in the order ERC-8128 lists it."""
    required = list(_ALWAYS)
    if b"?" in request.target:
        required.append("@query")
    if has_body(request, lines):
        required.append("content-digest")
    return required


def check_request(request: SignedRequest, lines: Lines) -> None:
    """Refuse requests whose parts could be read in two ways (``invalid_*``)."""
    if not _METHOD.fullmatch(request.method):
        raise AuthError("invalid_request", "The method is not an upper-case token.")
    if not _TARGET.fullmatch(request.target):
        raise AuthError(
            "invalid_target", "The request target must be a path of visible ASCII characters."
        )
    for name in _ONCE:
        if len(lines.get(name, ())) > 1:
            raise AuthError("invalid_request", f"{name.decode()} may be sent only once.")


def signature_base(
    request: SignedRequest,
    components: Iterable[str],
    params: str,
    lines: Lines,
    *,
    authority: str | None = None,
) -> bytes:
    """The bytes that are signed (RFC 9421 2.5).

    One line a component; no value can hold a line break and no name a quote, so two different
    requests, component lists or parameters never give the same bytes. Raises ``AuthError``
    ``signature_invalid`` for a component that is unknown, absent or not plain ASCII.
    """
    rows = []
    for name in components:
        if name[0] == "@":
            value = _derived(name, request, authority or request.authority)
        else:
            value = _field(name, lines)
        rows.append(f'"{name}": {value}\n')
    return ("".join(rows) + f'"@signature-params": {params}').encode("ascii")


def _derived(name: str, request: SignedRequest, authority: str) -> str:
    if name == "@query":
        if request.query is None:
            # RFC 9421 2.2.7 gives a lone "?" for no query and for an empty one; then one
            # signature would be good for two targets. Here the component needs a query.
            raise _refused(name, "The request has no query, yet @query is covered.")
        return "?" + request.query.decode("ascii")
    make = _DERIVED.get(name)
    if make is None:
        raise _refused(name, f"The component {name} is not known here.")
    return make(request, authority)


_DERIVED: Final[dict[str, Callable[[SignedRequest, str], str]]] = {
    "@authority": lambda _, authority: authority,
    "@method": lambda request, _: request.method,
    "@path": lambda request, _: request.path.decode("ascii"),
    "@scheme": lambda request, _: request.scheme,
    "@request-target": lambda request, _: request.target.decode("ascii"),
    "@target-uri": lambda request, authority: (
        f"{request.scheme}://{authority}{request.target.decode('ascii')}"
    ),
}


def _field(name: str, lines: Lines) -> str:
    values = lines.get(name.encode())
    if values is None:
        raise _refused(name, f"The request has no {name} field, yet it is covered.")
    text = ", ".join([value.strip(b" \t").decode("latin-1") for value in values])
    # RFC 9421 allows tabs inside; implementations disagree on what becomes of them.
    if not (text.isascii() and text.isprintable()):
        raise _refused(name, f"The field {name} holds more than visible ASCII.")
    return text


def _refused(component: str, detail: str) -> AuthError:
    return AuthError("signature_invalid", detail, params={"component": component})
