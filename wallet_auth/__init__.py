"""Who signed this request? Pure: no database, no clock, no environment, no network of its own.

``verify`` asks every scheme of the table; ``agent`` (not imported here) is the client half.
"""

from __future__ import annotations

from typing import Final, Protocol

from wallet_auth import erc8128
from wallet_auth.errors import CODES, AuthError
from wallet_auth.request import (
    Call,
    Lines,
    SignedRequest,
    Signer,
    check_body,
    check_digests,
    lines_of,
)

__all__ = [
    "CODES",
    "SCHEMES",
    "AuthError",
    "Call",
    "Lines",
    "Scheme",
    "SignedRequest",
    "Signer",
    "check_body",
    "check_digests",
    "lines_of",
    "verify",
]


class Scheme(Protocol):
    """One way to sign a request: ``None`` if the request is not signed this way."""

    async def __call__(
        self, request: SignedRequest, now_s: int, call: Call | None
    ) -> Signer | None: ...


SCHEMES: Final[dict[str, Scheme]] = {erc8128.SCHEME: erc8128.verify}


async def verify(request: SignedRequest, now_s: int, call: Call | None) -> Signer | None:
    """The wallet that signed ``request``, or ``None`` if it carries no wallet signature.

    ``now_s`` is Unix time by the clock that decides (the database's). ``call`` reads contract
    wallets from the chain; ``None`` refuses them. Raises ``AuthError``: a signature that is
    present and fails ends the request, and so do two.
    """
    found: Signer | None = None
    for scheme in SCHEMES.values():
        signer = await scheme(request, now_s, call)
        if signer is not None and found is not None:
            raise AuthError("identity_conflict", "The request is signed in more than one way.")
        found = signer or found
    return found
