"""The signing half of ERC-8128: pure, like the verifier. ``agent`` adds the clock and HTTP."""

from __future__ import annotations

import base64
from collections.abc import Iterable

from coincurve import PrivateKey

from wallet_auth import keys, structured
from wallet_auth.claims import NONCE, PREFIX
from wallet_auth.components import (
    MAY_COVER,
    MUST_COVER,
    check_request,
    required_components,
    signature_base,
)
from wallet_auth.erc8128 import LABEL, POLICY
from wallet_auth.errors import AuthError
from wallet_auth.request import DIGESTS, Lines, SignedRequest, has_body, lines_of, split_url


def sign_request(
    key: str | bytes | PrivateKey,
    method: str,
    url: str,
    headers: Iterable[tuple[str, str]],
    body: bytes | None,
    *,
    now_s: int,
    nonce: str,
    window_s: int = 120,
    components: Iterable[str] = (),
    chain_id: int = 1,
    label: str = LABEL,
) -> dict[str, str]:
    """The headers that sign a request, to be set on it (they replace those of the same name).

    Covered are the components ERC-8128 asks for, ``components``, and every ``Farebox-*`` and
    ``Idempotency-Key`` field that takes part in a decision. ``Content-Digest`` is made when there
    is a body and none is given. A signature of another scheme that is already there is kept.
    ``window_s`` is how long it is valid; ``nonce`` is the request id. Raises ``ValueError`` for
    anything the verifier would refuse.
    """
    scheme, authority, target = split_url(url)
    wire = tuple((n.lower().encode("ascii"), v.encode("latin-1")) for n, v in headers)
    request = SignedRequest(method, target, authority, scheme, wire, body or b"")
    lines = lines_of(wire)
    if not NONCE.fullmatch(nonce) or not 0 < window_s <= POLICY.window_s:
        raise ValueError("the nonce or the window is one the verifier would refuse")
    added: dict[str, str] = {}
    if has_body(request, lines) and b"content-digest" not in lines:
        digest = base64.b64encode(DIGESTS["sha-256"](body or b"").digest()).decode()
        added["Content-Digest"] = f"sha-256=:{digest}:"
        lines[b"content-digest"] = [added["Content-Digest"].encode()]
    present = [name for name in (*MUST_COVER, *MAY_COVER) if name.encode() in lines]
    covered = list(dict.fromkeys([*required_components(request, lines), *present, *components]))
    account = keys.private_key(key)
    params = (
        f"{structured.serialize_names(covered)};created={now_s};expires={now_s + window_s}"
        f';nonce="{nonce}";keyid="{PREFIX}{chain_id}:{keys.address_of(account)}"'
    )
    try:
        check_request(request, lines)
        structured.names(structured.serialize_names(covered))
        base = signature_base(request, covered, params, lines)
    except AuthError as fault:
        raise ValueError(fault.detail) from fault
    signature = base64.b64encode(keys.sign_digest(account, keys.eip191_hash(base))).decode()
    added["Signature-Input"] = _beside(lines, "signature-input", label, params)
    added["Signature"] = _beside(lines, "signature", label, f":{signature}:")
    return added


def _beside(lines: Lines, name: str, label: str, value: str) -> str:
    """Our member after those of other schemes, in one field line."""
    others = b", ".join(lines.get(name.encode(), ()))
    if not others:
        return f"{label}={value}"
    text = structured.text_of(others)
    if label in structured.members(text) or PREFIX in text.lower():
        raise ValueError("the request is already signed by a wallet")
    return f"{text}, {label}={value}"
