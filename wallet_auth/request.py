"""A request as the signature schemes see it, and what a good signature says.

Both are frozen values. Nothing here reads a clock, a socket or a setting.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from wallet_auth.errors import AuthError

Call = Callable[[str, str, bytes], Awaitable[bytes]]
"""``(caip2, to, data) -> return data``: an ``eth_call`` on the network ``caip2``.

A call that reverts, runs out of its gas or hits an address without code returns ``b""``. A network
that is not served raises ``LookupError``. Whatever is raised because the chain could not be asked
passes through ``verify`` unchanged. The implementation bounds gas and time.
"""

Lines = Mapping[bytes, list[bytes]]
"""Field values by lower-case name, one item a field line, in order."""

DIGESTS: Final = {"sha-256": hashlib.sha256, "sha-512": hashlib.sha512}
DIGEST_BYTES: Final = {"sha-256": 32, "sha-512": 64}

_LENGTH_DIGITS: Final = 19
_DEFAULT_PORTS: Final = {"http": "80", "https": "443"}
_URL: Final = re.compile(
    r"(?P<scheme>[Hh][Tt][Tt][Pp][Ss]?)://(?P<authority>[^/?#@\\\x00-\x20\x7f-\U0010ffff]+)"
    r"(?P<target>(?:[/?][^#\x00-\x20\x7f-\U0010ffff]*)?)(?:#.*)?",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class SignedRequest:
    """One HTTP request, as received, with the origin it was meant for.

    ``body`` is the whole body if it has been read, ``None`` if not: then the digests of the body
    are handed out in ``Signer.digests`` and ``check_body`` is the caller's to call. Under framings
    other than HTTP/1.1 (a body without a length) the body must be passed here.
    """

    method: str
    """Upper case, as received."""
    target: bytes
    """Raw path and query exactly as on the wire; no fragment, no absolute form."""
    authority: str
    """From the configured public URL: lower case, default port left out. Never from ``Host``."""
    scheme: str
    """``http`` or ``https``, of the configured public URL."""
    headers: Sequence[tuple[bytes, bytes]] = ()
    """As received, in order; names in lower case. Not looked at when ``index`` is given."""
    body: bytes | None = field(default=None, repr=False)
    index: Lines | None = field(default=None, repr=False)
    """The same fields by name, from a caller that has grouped them already (``lines_of``)."""

    @property
    def path(self) -> bytes:
        """The target up to the first ``?``."""
        return self.target.partition(b"?")[0]

    @property
    def query(self) -> bytes | None:
        """What follows the first ``?``; ``b""`` for an empty query, ``None`` without one."""
        _, mark, query = self.target.partition(b"?")
        return query if mark else None

    def lines(self) -> Lines:
        """Field values by name, one item a field line, in order. To be read only: it may be the
        caller's own ``index``."""
        return lines_of(self.headers) if self.index is None else self.index


class Signer(NamedTuple):  # made for every signed request: a frozen dataclass costs three times it
    """Who signed a request, and what the signature fixes."""

    scheme: str
    """The name of the row in ``wallet_auth.SCHEMES``."""
    address: str
    """Lower case, ``0x`` and 40 digits."""
    chain_id: int
    """Of the key id. It means something only for contract wallets."""
    kind: str
    """``key``: the address on all chains. ``contract``: (chain_id, address) only."""
    request_id: str
    """Made by the client, used once (house rules: replay guard and idempotency key in one)."""
    created_s: int
    expires_s: int
    digests: tuple[tuple[str, bytes], ...]
    """``(algorithm, digest)`` of the body, known algorithms only; empty if not covered."""
    ceiling: str | None
    """The value of ``Farebox-Max``, which is covered whenever it is there."""
    covered: frozenset[str]
    """Names of all covered components."""
    any_body: bool = False
    """The proof says nothing of the body, on purpose: it was too long to be looked at."""


def lines_of(headers: Iterable[tuple[bytes, bytes]]) -> dict[bytes, list[bytes]]:
    """Header fields by name: what ``SignedRequest.index`` takes, made in one pass."""
    found: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        if name in found:
            found[name].append(value)
        else:
            found[name] = [value]
    return found


def has_body(request: SignedRequest, lines: Lines) -> bool:
    """Whether the request has content: by its framing, or because bytes were read.

    Raises ``AuthError`` ``invalid_request`` on a ``Content-Length`` that is not one plain number.
    """
    if request.body or b"transfer-encoding" in lines:
        return True
    lengths = lines.get(b"content-length")
    if lengths is None:
        return False
    # isdigit of bytes knows ASCII digits only; the empty text has none.
    if len(lengths) != 1 or not lengths[0].isdigit() or len(lengths[0]) > _LENGTH_DIGITS:
        raise AuthError("invalid_request", "Content-Length must be one decimal number.")
    return int(lengths[0]) > 0


def check_body(signer: Signer, body: bytes) -> None:
    """Hold the bytes received against every digest the signature covers (RFC 9530).

    A body that no digest covers is refused too: headers can announce none and bytes still come.
    Raises ``AuthError`` ``signature_digest_mismatch``.
    """
    found = {name: DIGESTS[name](body).digest() for name, _ in signer.digests}
    check_digests(signer, len(body), found)


def check_digests(signer: Signer, size: int, found: Mapping[str, bytes]) -> None:
    """``check_body`` for a body of ``size`` bytes that was hashed while it came.

    ``found`` has the digests of what was received, for every algorithm in ``signer.digests``.
    """
    if size and not signer.digests and not signer.any_body:
        raise AuthError(
            "signature_digest_mismatch",
            "The request has a body, and the signature covers no digest of it.",
            params={"missing": ["content-digest"]},
        )
    for algorithm, digest in signer.digests:
        if not hmac.compare_digest(found[algorithm], digest):
            raise AuthError(
                "signature_digest_mismatch",
                f"The {algorithm} digest in Content-Digest is not that of the body received.",
                params={"algorithm": algorithm},
            )


def split_url(url: str) -> tuple[str, str, bytes]:
    """``(scheme, authority, raw target)`` of an absolute http(s) URL, nothing decoded or repaired.

    The authority is in lower case without a default port, an empty path is ``/`` (RFC 9421
    2.2.3, 2.2.6), a fragment is dropped, user information refused. An empty query stays: ``/a?``.
    Raises ``ValueError``.
    """
    match = _URL.fullmatch(url)
    if match is None:
        raise ValueError("an absolute http or https URL of plain ASCII is needed")
    scheme = match["scheme"].lower()
    target = match["target"]
    if not target.startswith("/"):
        target = "/" + target
    return scheme, normal_authority(match["authority"], scheme), target.encode()


def normal_authority(authority: str, scheme: str) -> str:
    """Lower case, default port left out (RFC 9421 2.2.3)."""
    host, colon, port = authority.lower().rpartition(":")
    if colon and (not port or port == _DEFAULT_PORTS.get(scheme)):
        return host
    return authority.lower()
