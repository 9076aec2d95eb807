"""What a request signature covers, and the bytes that come of it (RFC 9421 sections 2 and 2.5).

Used by the verifier and by the signing half alike; tests hold it against two other makers. Clients
send the same component list with every request, so what a list means is worked out once (``Plan``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, NoReturn

from wallet_auth import structured
from wallet_auth.errors import AuthError
from wallet_auth.request import Lines, SignedRequest, has_body

MUST_COVER: Final = {
    "farebox-max": "ceiling_not_covered",
    "idempotency-key": "idempotency_key_not_covered",
}
"""Fields that decide about money or repeats: sent beside a signature, they must be part of it."""
MAY_COVER: Final = ("farebox-run", "farebox-quote", "farebox-mandate")
"""Fields whose meaning is stronger when covered; sent once at most, like the ones above."""
_ONCE_IN_ORDER: Final = tuple(name.encode() for name in (*MUST_COVER, *MAY_COVER))
_ONCE: Final = frozenset(_ONCE_IN_ORDER)
_ALWAYS: Final = ("@authority", "@method", "@path")
_METHOD: Final = re.compile(r"[A-Z0-9!#$%&'*+\-.^_`|~]+")
_TARGET: Final = re.compile(rb"/[!\"$-~]*")

Source = Callable[[SignedRequest, str, Lines], str]
"""The value of one component: of this request, under this authority, with these fields."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a list of components means: which must be there, and where each value comes from."""

    names: tuple[str, ...]
    listed: str
    """The list in canonical form (RFC 8941 4.1.1.1)."""
    covered: frozenset[str]
    sources: tuple[Source, ...] = field(compare=False)  # they follow from the names
    form: str
    """The signature base up to its last line, with ``%s`` for each value."""
    always: bool
    """The components that every request has are all there."""


def plan_of(names: tuple[str, ...]) -> Plan:
    """The plan of a list of components. A component nobody knows is refused when it is asked for
    its value, not here: what else is wrong with the request is said first."""
    return (_remembered if len(names) <= _REMEMBERED_NAMES else _plan)(names)


def _plan(names: tuple[str, ...]) -> Plan:
    return Plan(
        names=names,
        listed=structured.serialize_names(names),
        covered=frozenset(names),
        sources=tuple(map(_source, names)),
        form="".join(f'"{name.replace("%", "%%")}": %s\n' for name in names),
        always=all(name in names for name in _ALWAYS),
    )


# A client sends the same list each time. Bounded in number and in length: lists come from outside.
_REMEMBERED_NAMES: Final = 24
_remembered = lru_cache(maxsize=256)(_plan)


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
    if not _ONCE.isdisjoint(lines):
        for name in _ONCE_IN_ORDER:
            if len(lines.get(name, ())) > 1:
                raise AuthError("invalid_request", f"{name.decode()} may be sent only once.")


def check_coverage(plan: Plan, request: SignedRequest, lines: Lines) -> None:
    """Refuse a signature that leaves out what this request needs covered."""
    body = has_body(request, lines)
    if not (
        plan.always
        and (b"?" not in request.target or "@query" in plan.covered)
        and (not body or "content-digest" in plan.covered)
    ):
        required = required_components(request, lines)
        missing = [name for name in required if name not in plan.covered]
        raise AuthError(
            "signature_missing_component",
            f"The signature must also cover {', '.join(missing)}.",
            params={"required": required, "missing": missing},
        )
    if _ONCE.isdisjoint(lines):
        return
    for name, code in MUST_COVER.items():
        if name not in plan.covered and name.encode() in lines:
            raise AuthError(
                code,
                f"The signature does not cover the {name} that was sent with it.",
                params={
                    "required": [*required_components(request, lines), name],
                    "missing": [name],
                },
            )


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
    return planned_base(plan_of(tuple(components)), request, params, lines, authority=authority)


def planned_base(
    plan: Plan,
    request: SignedRequest,
    params: str,
    lines: Lines,
    *,
    authority: str | None = None,
) -> bytes:
    """``signature_base`` for a list whose plan is known."""
    host = authority or request.authority
    values = tuple([source(request, host, lines) for source in plan.sources])
    return f'{plan.form % values}"@signature-params": {params}'.encode("ascii")


def _source(name: str) -> Source:
    if name[0] != "@":
        return _field(name)
    known = _DERIVED.get(name)
    if known is not None:
        return known

    def unknown(request: SignedRequest, authority: str, lines: Lines) -> NoReturn:
        raise _refused(name, f"The component {name} is not known here.")

    return unknown


def _query(request: SignedRequest, authority: str, lines: Lines) -> str:
    _, mark, query = request.target.partition(b"?")
    if not mark:
        # RFC 9421 2.2.7 gives a lone "?" for no query and for an empty one; then one
        # signature would be good for two targets. Here the component needs a query.
        raise _refused("@query", "The request has no query, yet @query is covered.")
    return "?" + query.decode("ascii")


_DERIVED: Final[dict[str, Source]] = {
    "@authority": lambda request, authority, lines: authority,
    "@method": lambda request, authority, lines: request.method,
    "@path": lambda request, authority, lines: request.target.partition(b"?")[0].decode("ascii"),
    "@query": _query,
    "@scheme": lambda request, authority, lines: request.scheme,
    "@request-target": lambda request, authority, lines: request.target.decode("ascii"),
    "@target-uri": lambda request, authority, lines: (
        f"{request.scheme}://{authority}{request.target.decode('ascii')}"
    ),
}


def _field(name: str) -> Source:
    raw = name.encode()

    def value(request: SignedRequest, authority: str, lines: Lines) -> str:
        values = lines.get(raw)
        if values is None:
            raise _refused(name, f"The request has no {name} field, yet it is covered.")
        joined = (
            values[0].strip(b" \t")
            if len(values) == 1
            else b", ".join([each.strip(b" \t") for each in values])
        )
        text = joined.decode("latin-1")
        # RFC 9421 allows tabs inside; implementations disagree on what becomes of them.
        if not (text.isascii() and text.isprintable()):
            raise _refused(name, f"The field {name} holds more than visible ASCII.")
        return text

    return value


def _refused(component: str, detail: str) -> AuthError:
    return AuthError("signature_invalid", detail, params={"component": component})
