"""ERC-8128 (draft): HTTP requests signed by Ethereum accounts, in Farebox's profile of it.

RFC 9421 says what is signed (the signature base), EIP-191 how a wallet signs it, ERC-8128 what
must be covered and that ``keyid`` names the account. The profile is the strict end of all three:
bound to this very request (method, authority, path, query, body), used once (nonce), valid for
minutes, without flags, algorithms or a second wallet beside it.

The checks run from cheap to dear: form, coverage, nonce, times, then the curve, then (only for
contract wallets) the chain, and the body's digest last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from wallet_auth import keys, structured
from wallet_auth.claims import Claim, claim_of
from wallet_auth.components import (
    check_coverage,
    check_request,
    planned_base,
    required_components,
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


@dataclass(frozen=True, slots=True)
class Policy:
    """How long a signature may be good for, and how wrong a client's clock may be."""

    window_s: int = 300
    skew_s: int = 30


POLICY: Final = Policy()


async def verify(
    request: SignedRequest, now_s: int, call: Call | None, *, policy: Policy = POLICY
) -> Signer | None:
    """Check the ERC-8128 signature of a request.

    ``None``: it carries none (a signature of another kind belongs to the upstream). ``call`` asks
    contract wallets (ERC-1271); without it they are refused. Raises ``AuthError`` with the codes
    of ``wallet_auth.errors``. The nonce is not burnt here: that is the ledger's unique key.
    """
    lines = request.lines()
    claim = claim_of(lines)
    if claim is None:
        return None
    plan = claim.plan
    check_request(request, lines)
    check_coverage(plan, request, lines)
    _check_times(claim, now_s, policy)
    digest = keys.eip191_hash(planned_base(plan, request, claim.params, lines))
    kind = "key"
    if keys.recover(digest, claim.signature) != claim.address:
        await _check_contract(claim, request, lines, digest, call)
        kind = "contract"
    ceiling = lines.get(b"farebox-max")
    signer = Signer(
        SCHEME,
        claim.address,
        claim.chain_id,
        kind,
        claim.nonce,
        claim.created_s,
        claim.expires_s,
        _digests(lines) if "content-digest" in plan.covered else (),
        ceiling[0].decode("ascii").strip(" \t") if ceiling else None,
        plan.covered,
    )
    if request.body is not None:
        check_body(signer, request.body)
    return signer


def accept_signature(request: SignedRequest) -> str:
    """The ``Accept-Signature`` value (RFC 9421 5.1) that asks for a good signature."""
    covered = structured.serialize_names(required_components(request, request.lines()))
    return f"{LABEL}={covered};created;expires;nonce;keyid"


def _check_times(claim: Claim, now_s: int, policy: Policy) -> None:
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


async def _check_contract(
    claim: Claim, request: SignedRequest, lines: Lines, digest: bytes, call: Call | None
) -> None:
    """Not the key's own signature: a contract wallet may take it for its own (ERC-1271)."""
    _blame_authority(claim, request, lines)
    by_key = len(claim.signature) == 65
    if call is None and not by_key:
        raise AuthError(
            "identity_unsupported", "Signatures of this kind of wallet are not accepted here."
        )
    wrong = AuthError(
        "signature_invalid",
        "The signature was not made by the account of keyid over this request."
        if not claim.signature.endswith(keys.ERC6492_SUFFIX)
        else "The wallet of keyid does not take the signature, or is not deployed yet (ERC-6492).",
    )
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


def _blame_authority(claim: Claim, request: SignedRequest, lines: Lines) -> None:
    """Say so if the signature would hold for the name the client called us by.

    ``Host`` helps to word a refusal; it never helps a request in.
    """
    hosts = lines.get(b"host", ())
    if len(hosts) != 1 or not (hosts[0].isascii() and hosts[0].decode("ascii").isprintable()):
        return
    host = normal_authority(hosts[0].decode("ascii").strip(), request.scheme)
    if host == request.authority:
        return
    base = planned_base(claim.plan, request, claim.params, lines, authority=host)
    if keys.recover(keys.eip191_hash(base), claim.signature) == claim.address:
        raise AuthError(
            "signature_authority_mismatch",
            "The signature is for another host than this service's public address.",
            params={"expected": request.authority, "signed": host},
        )


def _digests(lines: Lines) -> tuple[tuple[str, bytes], ...]:
    """The known algorithms of ``Content-Digest`` (RFC 9530); at least one must be known."""
    values = lines[b"content-digest"]
    if len(values) == 1:
        digest = structured.only_bytes(values[0], b"sha-256", DIGEST_BYTES["sha-256"])
        if digest is not None:  # what nearly all send
            return (("sha-256", digest),)
    try:
        found = structured.members(structured.text_of(b", ".join(values)))
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
