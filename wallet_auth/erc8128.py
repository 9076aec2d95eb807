"""ERC-8128 (draft): HTTP requests signed by Ethereum accounts, in Farebox's profile of it.

RFC 9421 says what is signed (the signature base), EIP-191 how a wallet signs it, ERC-8128 what
must be covered and that ``keyid`` names the account. The profile is the strict end of all three:
bound to this very request (method, authority, path, query, body), used once (nonce), valid for
minutes, without flags, algorithms or a second wallet beside it.

The checks run from cheap to dear: form, coverage, nonce, times, then the curve, then (only for
contract wallets) the chain, and the body's digest last.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

from wallet_auth import keys, structured
from wallet_auth.components import (
    MUST_COVER,
    check_request,
    required_components,
    signature_base,
)
from wallet_auth.errors import AuthError
from wallet_auth.request import (
    DIGEST_BYTES,
    DIGESTS,
    Call,
    Lines,
    SignedRequest,
    Signer,
    check_body,
    normal_authority,
)

SCHEME: Final = "erc8128"
LABEL: Final = "eth"
PREFIX: Final = "erc8128:"
_KEYID: Final = re.compile(r"erc8128:([1-9][0-9]{0,18}):(0x[0-9a-fA-F]{40})")
NONCE: Final = re.compile(r"[A-Za-z0-9._~:=-]{1,128}")
"""Characters that need no escape in a path, a header, a log line or a table."""
_PARAMETERS: Final = frozenset({"created", "expires", "keyid", "nonce", "tag"})


@dataclass(frozen=True, slots=True)
class Policy:
    """How long a signature may be good for, and how wrong a client's clock may be."""

    window_s: int = 300
    skew_s: int = 30


POLICY: Final = Policy()


class _Claim(NamedTuple):  # made for every request: a frozen dataclass costs four times as much
    """What the two header fields say, before anything of it is believed."""

    components: tuple[str, ...]
    params: str
    """The ``@signature-params`` value: list and parameters in canonical form."""
    address: str
    chain_id: int
    created_s: int
    expires_s: int
    nonce: str
    signature: bytes


async def verify(
    request: SignedRequest, now_s: int, call: Call | None, *, policy: Policy = POLICY
) -> Signer | None:
    """Check the ERC-8128 signature of a request.

    ``None``: it carries none (a signature of another kind belongs to the upstream). ``call`` asks
    contract wallets (ERC-1271); without it they are refused. Raises ``AuthError`` with the codes
    of ``wallet_auth.errors``. The nonce is not burnt here: that is the ledger's unique key.
    """
    lines = request.lines()
    inputs = lines.get(b"signature-input", [])
    if b"erc8128:" not in b"\n".join(inputs).lower():
        return None
    if len(inputs) > 1 or len(lines.get(b"signature", ())) > 1:
        raise AuthError(
            "identity_conflict", "Signature-Input and Signature may be sent only once each."
        )
    parts = _member(inputs[0])
    if parts is None:
        return None
    claim = _claim(parts, lines)
    check_request(request, lines)
    _check_coverage(claim, request, lines)
    _check_times(claim, now_s, policy)
    base = signature_base(request, claim.components, claim.params, lines)
    kind = await _check_signature(claim, request, lines, base, call)
    digests = _digests(lines) if "content-digest" in claim.components else ()
    ceiling = lines.get(b"farebox-max")
    signer = Signer(
        scheme=SCHEME,
        address=claim.address,
        chain_id=claim.chain_id,
        kind=kind,
        request_id=claim.nonce,
        created_s=claim.created_s,
        expires_s=claim.expires_s,
        digests=digests,
        ceiling=ceiling[0].decode("ascii").strip(" \t") if ceiling else None,
        covered=frozenset(claim.components),
    )
    if request.body is not None:
        check_body(signer, request.body)
    return signer


def accept_signature(request: SignedRequest) -> str:
    """The ``Accept-Signature`` value (RFC 9421 5.1) that asks for a good signature."""
    covered = structured.serialize_names(required_components(request, request.lines()))
    return f"{LABEL}={covered};created;expires;nonce;keyid"


# -- reading ------------------------------------------------------------------------------------


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


def _claim(parts: _Parts, lines: Lines) -> _Claim:
    label, inner, pairs = parts
    try:
        components, covered = _components(inner)
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
    return _Claim(
        components=components,
        params=covered + canonical,
        address=keyid[2].lower(),
        chain_id=int(keyid[1]),
        created_s=created,
        expires_s=expires,
        nonce=_nonce(params),
        signature=_signature(label, lines),
    )


@lru_cache(maxsize=1024)  # a client sends the same list each time; nothing of a caller is in it
def _components(inner: str) -> tuple[tuple[str, ...], str]:
    """The covered names, and their list in canonical form. Raises ``ValueError``."""
    found = tuple(structured.names(inner))
    if len(set(found)) != len(found):
        raise ValueError("covers a component twice")
    return found, structured.serialize_names(found)


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


def _digests(lines: Lines) -> tuple[tuple[str, bytes], ...]:
    """The known algorithms of ``Content-Digest`` (RFC 9530); at least one must be known."""
    try:
        found = structured.members(structured.text_of(b", ".join(lines[b"content-digest"])))
    except ValueError as fault:
        raise AuthError("signature_digest_mismatch", f"Content-Digest {fault}.") from fault
    known = []
    for algorithm, bare in found.items():
        digest = structured.byte_sequence(bare)
        size = DIGEST_BYTES.get(algorithm)
        if digest is None or (size is not None and len(digest) != size):
            raise AuthError("signature_digest_mismatch", f"The {algorithm} digest is malformed.")
        if size is not None:
            known.append((algorithm, digest))
    if not known:
        raise AuthError(
            "signature_digest_mismatch",
            "Content-Digest has no algorithm that is known here.",
            params={"algorithms": sorted(DIGESTS)},
        )
    return tuple(known)


# -- deciding -----------------------------------------------------------------------------------


def _check_coverage(claim: _Claim, request: SignedRequest, lines: Lines) -> None:
    required = required_components(request, lines)
    missing = [name for name in required if name not in claim.components]
    if missing:
        raise AuthError(
            "signature_missing_component",
            f"The signature must also cover {', '.join(missing)}.",
            params={"required": required, "missing": missing},
        )
    for name, code in MUST_COVER.items():
        if name.encode() in lines and name not in claim.components:
            raise AuthError(
                code,
                f"The signature does not cover the {name} that was sent with it.",
                params={"required": [*required, name], "missing": [name]},
            )


def _check_times(claim: _Claim, now_s: int, policy: Policy) -> None:
    if (
        claim.expires_s - claim.created_s <= policy.window_s
        and claim.created_s - policy.skew_s <= now_s <= claim.expires_s + policy.skew_s
    ):
        return
    facts = {"created": claim.created_s, "expires": claim.expires_s, "now": now_s}
    if claim.expires_s - claim.created_s > policy.window_s:
        raise AuthError(
            "signature_window_too_long",
            f"expires may be at most {policy.window_s} s after created.",
            params=facts | {"max_window_s": policy.window_s},
        )
    if claim.created_s > now_s + policy.skew_s:
        raise AuthError("signature_not_yet_valid", "created lies in the future.", params=facts)
    raise AuthError("signature_expired", "expires has passed.", params=facts)


async def _check_signature(
    claim: _Claim,
    request: SignedRequest,
    lines: Lines,
    base: bytes,
    call: Call | None,
) -> str:
    """``key`` or ``contract``. The key is tried first: it needs no chain."""
    digest = keys.eip191_hash(base)
    if keys.recover(digest, claim.signature) == claim.address:
        return "key"
    _blame_authority(claim, request, lines)
    by_key = len(claim.signature) == 65
    if claim.signature.endswith(keys.ERC6492_SUFFIX) or (call is None and not by_key):
        raise AuthError(
            "identity_unsupported", "Signatures of this kind of wallet are not accepted here."
        )
    wrong = _invalid("The signature was not made by the account of keyid over this request.")
    if call is None:
        raise wrong
    caip2 = f"eip155:{claim.chain_id}"
    try:
        agreed = await keys.contract_signed(call, caip2, claim.address, digest, claim.signature)
    except LookupError as unknown:
        if by_key:
            raise wrong from unknown
        raise AuthError(
            "identity_unsupported", f"Contract wallets of {caip2} are not accepted here."
        ) from unknown
    if not agreed:
        raise wrong
    return "contract"


def _blame_authority(claim: _Claim, request: SignedRequest, lines: Lines) -> None:
    """Say so if the signature would hold for the name the client called us by.

    ``Host`` helps to word a refusal; it never helps a request in.
    """
    hosts = lines.get(b"host", ())
    if len(hosts) != 1 or not (hosts[0].isascii() and hosts[0].decode("ascii").isprintable()):
        return
    host = normal_authority(hosts[0].decode("ascii").strip(), request.scheme)
    if host == request.authority:
        return
    base = signature_base(request, claim.components, claim.params, lines, authority=host)
    if keys.recover(keys.eip191_hash(base), claim.signature) == claim.address:
        raise AuthError(
            "signature_authority_mismatch",
            "The signature is for another host than this service's public address.",
            params={"expected": request.authority, "signed": host},
        )
