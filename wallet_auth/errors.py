"""The one exception of this package, and every code it may carry.

    400  identity_conflict, idempotency_key_not_covered, ceiling_not_covered,
         invalid_request, invalid_target
    401  signature_*, identity_unsupported, EXTERNAL_SIGNATURE_* (names of another wallet API)
    402  invalid_siwx_*: answered with a fresh challenge and fresh offers

The status and the words for people stand in ``gateway/errors.py``; a test holds both tables
together. None of these is retryable as it is: the request must be signed anew, or differently.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

CODES: Final[frozenset[str]] = frozenset(
    {
        "EXTERNAL_SIGNATURE_MALFORMED",
        "EXTERNAL_SIGNATURE_SESSION_NONCE_EXPIRED",
        "EXTERNAL_SIGNATURE_SESSION_NONCE_INVALID",
        "EXTERNAL_SIGNATURE_WALLET_MISMATCH",
        "ceiling_not_covered",
        "idempotency_key_not_covered",
        "identity_conflict",
        "identity_unsupported",
        "invalid_request",
        "invalid_siwx_expired",
        "invalid_siwx_header",
        "invalid_siwx_nonce",
        "invalid_siwx_signature",
        "invalid_target",
        "signature_authority_mismatch",
        "signature_digest_mismatch",
        "signature_expired",
        "signature_invalid",
        "signature_missing_component",
        "signature_nonce_missing",
        "signature_not_yet_valid",
        "signature_window_too_long",
    }
)


class AuthError(Exception):
    """The request carries a wallet identity, and it does not hold.

    ``code`` is one of ``CODES``; ``detail`` is one sentence for a person and repeats nothing
    secret; ``params`` are facts a program can act on, for instance
    ``{"required": ["@authority", …], "missing": ["@query"]}``.
    """

    def __init__(self, code: str, detail: str, *, params: Mapping[str, Any] | None = None) -> None:
        if code not in CODES:
            raise ValueError(f"not a code of this package: {code!r}")
        self.code = code
        self.detail = detail
        self.params: dict[str, Any] = dict(params or {})
        super().__init__(f"{code}: {detail}")
