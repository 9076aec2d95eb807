"""What ``Signature-Input`` and ``Signature`` say, before anything of it is believed.

There are two readers. ``claim_of`` takes every form that RFC 8941 and the profile allow and words
every refusal. In front of it ``_usual`` reads, with one pattern, the one form that clients write:
one member, canonical, its parameters in ERC-8128's order, a key's signature of 65 bytes. It only
ever says what the first would say, or nothing: then the first is asked. A test holds the two
against each other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Final, NamedTuple

from wallet_auth import structured
from wallet_auth.components import Plan, plan_of
from wallet_auth.errors import AuthError
from wallet_auth.request import Lines

PREFIX: Final = "erc8128:"
_KEYID: Final = re.compile(r"erc8128:([1-9][0-9]{0,18}):(0x[0-9a-fA-F]{40})")
NONCE: Final = re.compile(r"[A-Za-z0-9._~:=-]{1,128}")
"""Characters that need no escape in a path, a header, a log line or a table."""
_PARAMETERS: Final = frozenset({"created", "expires", "keyid", "nonce", "tag"})

# Shorter than structured.MAX_FIELD as a whole, and so is what _usual_list remembers.
_NUMBER: Final = r"(0|[1-9][0-9]{0,14}+)"
_USUAL: Final = re.compile(
    r"([a-z*][a-z0-9_\-.*]{0,63}+)="
    rf"((\([ -'*-~]{{0,400}}+\));created={_NUMBER};expires={_NUMBER}"
    rf';nonce="({NONCE.pattern})";keyid="{_KEYID.pattern}")'
)
_KEY_SIGNATURE: Final = 65


class Claim(NamedTuple):  # made for every request: a frozen dataclass costs four times as much
    """The one wallet's member, and the signature under its label."""

    plan: Plan
    """Of the covered components."""
    params: str
    """The ``@signature-params`` value: list and parameters in canonical form."""
    address: str
    chain_id: int
    created_s: int
    expires_s: int
    nonce: str
    signature: bytes


def claim_of(lines: Lines) -> Claim | None:
    """What the request claims, ``None`` if no wallet signed it. Raises ``AuthError``."""
    inputs = lines.get(b"signature-input")
    if inputs is None:
        return None
    return _usual(inputs, lines) or _any(inputs, lines)


def _usual(inputs: list[bytes], lines: Lines) -> Claim | None:
    """The usual form; ``None`` says nothing about the request."""
    signatures = lines.get(b"signature", ())
    if len(inputs) != 1 or len(signatures) != 1:
        return None
    found = _USUAL.fullmatch(inputs[0].decode("latin-1"))
    if found is None:
        return None
    label, params, inner, created, expires, nonce, chain_id, address = found.groups()
    plan = _usual_list(inner)
    signature = structured.only_bytes(signatures[0], label.encode(), _KEY_SIGNATURE)
    created_s, expires_s = int(created), int(expires)
    if plan is None or signature is None or created_s >= expires_s:
        return None
    return Claim(
        plan, params, address.lower(), int(chain_id), created_s, expires_s, nonce, signature
    )


@lru_cache(maxsize=256)  # as _remembered in components.py
def _usual_list(inner: str) -> Plan | None:
    try:
        plan = _listed(inner)
    except ValueError:
        return None
    return plan if plan.listed == inner else None


def _any(inputs: list[bytes], lines: Lines) -> Claim | None:
    """Every form."""
    if b"erc8128:" not in b"\n".join(inputs).lower():
        return None
    if len(inputs) > 1 or len(lines.get(b"signature", ())) > 1:
        raise AuthError(
            "identity_conflict", "Signature-Input and Signature may be sent only once each."
        )
    parts = _member(inputs[0])
    return None if parts is None else _claim(parts, lines)


def _invalid(detail: str, **params: object) -> AuthError:
    return AuthError("signature_invalid", detail, params=params)


_Parts = tuple[str, str, list[tuple[str, str | None]]]
"""Label, component list and parameters of a member of Signature-Input, still as texts."""


def _member(value: bytes) -> _Parts | None:
    """The one member with an ERC-8128 key id."""
    try:
        found = structured.members(structured.text_of(value))
    except ValueError as fault:
        raise _invalid(f"Signature-Input {fault}.") from fault
    wallets: list[_Parts] = []
    for label, member in found.items():
        parts = structured.inner_list(member)
        if parts is None:
            continue
        for name, bare in parts[1]:
            # A key id of the wrong type is still somebody's attempt at this scheme: it is refused
            # below and not passed over.
            if name == "keyid" and (bare or "").lstrip('"').lower().startswith(PREFIX):
                wallets.append((label, parts[0], parts[1]))
                break
    if len(wallets) > 1:
        raise AuthError("identity_conflict", "Only one wallet may sign a request.")
    return wallets[0] if wallets else None


def _claim(parts: _Parts, lines: Lines) -> Claim:
    label, inner, pairs = parts
    try:
        plan = _listed(inner)
    except ValueError as fault:
        raise _invalid(f"Signature-Input {fault}.") from fault
    params = dict(pairs)
    if len(params) != len(pairs):
        raise _invalid("A signature parameter is given twice.")
    if not params.keys() <= _PARAMETERS:
        unknown = sorted(params.keys() - _PARAMETERS)
        raise _invalid("Signature parameters that are not known here.", parameters=unknown)
    if "tag" in params and structured.string(params["tag"]) is None:
        raise _invalid("The parameter tag must be a string.")
    keyid = _KEYID.fullmatch(structured.string(params["keyid"]) or "")
    if keyid is None:
        raise _invalid('keyid must be "erc8128:<chain id>:<0x address>".')
    created, expires = (structured.integer(params.get(n)) for n in ("created", "expires"))
    if created is None or expires is None or not 0 <= created < expires:
        raise _invalid("created and expires must be integers, expires the later one.")
    canonical = "".join(
        f";{name}={created if name == 'created' else expires if name == 'expires' else bare}"
        for name, bare in pairs
    )
    return Claim(
        plan=plan,
        params=plan.listed + canonical,
        address=keyid[2].lower(),
        chain_id=int(keyid[1]),
        created_s=created,
        expires_s=expires,
        nonce=_nonce(params),
        signature=_signature(label, lines),
    )


def _listed(inner: str) -> Plan:
    """What the list means. Raises ``ValueError``."""
    found = tuple(structured.names(inner))
    if len(set(found)) != len(found):
        raise ValueError("covers a component twice")
    return plan_of(found)


def _nonce(params: Mapping[str, str | None]) -> str:
    nonce = structured.string(params["nonce"]) if "nonce" in params else None
    if nonce is None or not NONCE.fullmatch(nonce):
        raise AuthError(
            "signature_nonce_missing",
            "The signature needs a nonce of 1 to 128 characters out of A-Z a-z 0-9 . _ ~ : = -",
        )
    return nonce


def _signature(label: str, lines: Lines) -> bytes:
    values = lines.get(b"signature")
    if not values:
        raise _invalid("There is a Signature-Input and no Signature.")
    try:
        found = structured.members(structured.text_of(values[0]))
    except ValueError as fault:
        raise _invalid(f"Signature {fault}.") from fault
    signature = structured.byte_sequence(found.get(label, ""))
    if not signature:
        raise _invalid(f"Signature has no byte sequence under the label {label}.")
    return signature
