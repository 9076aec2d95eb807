"""Requests signed with ``personal_sign`` (EIP-191): a session nonce and a request id in the body.

Two published shapes, which clients of another wallet API sign already, and a strong one. All three
are lines of text joined by one line feed; no field may hold one, or any character that would need
an escape, so that every text has one reading. The published shapes say neither whom a message is
for, nor what it may cost, nor for how long it is good: they are worth no more than a payment. The
strong shape begins with a line of its own and says all of it.

    scoped (published)      path-bound (published)   strong
    agentpmt-external       agentpmt-external        farebox-external-1
    wallet:0x…              wallet:0x…               audience:https://api.example
    session:…               session:…                wallet:0x…
    request:…               request:…                session:…
    action:balance          method:POST              request:…
    product:-               path:/external/…         method:POST
    payload:                payload:…                path:/api/external/…
                                                     ceiling:$0.05
                                                     expires:1790000000
                                                     payload:…

A session nonce needs no row: it is its expiry, some random bits and a MAC over them and the wallet,
in the form of a UUID. Nothing here is burnt; that is the ledger's unique key.
"""

from __future__ import annotations

import hmac
import re
import secrets
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from coincurve import PrivateKey

from wallet_auth import keys, mac
from wallet_auth.canonical import Form
from wallet_auth.errors import AuthError
from wallet_auth.request import Signer
from wallet_auth.siwx import Keys

SCHEME: Final = "personal"
"""Of both kinds: a pair of session and request id is one call, however it was signed."""
PUBLISHED: Final = "agentpmt-external"
STRONG: Final = "farebox-external-1"
SESSION_S: Final = 900
EMPTY: Final = Form("empty", b"", "")
"""The payload of a call that hashes none."""

WRAPPER: Final = frozenset(("wallet_address", "session_nonce", "request_id", "signature"))
TERMS: Final = frozenset(("audience", "ceiling", "expires_at"))
"""Members that only the strong shape has."""

_ADDRESS: Final = re.compile(r"0x[0-9a-fA-F]{40}")
_UUID4: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._~=-]{1,128}")
"""Characters that need no escape in a line, a path, a header or a table."""
_SIGNATURE: Final = re.compile(r"0x[0-9a-fA-F]{130}")
_CEILING: Final = re.compile(r"\$(?:0|[1-9][0-9]{0,8})(?:\.[0-9]{1,6})?")
_RANDOM_BYTES: Final = 4
_MAC_MASK: Final = (1 << 62) - 1
NO_CEILING: Final = "-"


class Signed(NamedTuple):
    """What a body says of who signed it, in form checked. ``signature`` is still as it was sent.

    ``expires_s`` None: one of the published shapes.
    """

    wallet: str
    session: str
    request_id: str
    signature: object
    audience: str = ""
    ceiling: str = NO_CEILING
    expires_s: int | None = None

    @property
    def strong(self) -> bool:
        return self.expires_s is not None


class Call(NamedTuple):
    """What the message has to be about. ``paths``: how the path may be spelled, the preferred one
    first; none, and the scoped shape is asked for."""

    action: str
    product: str
    paths: tuple[str, ...] = ()


# -- session nonces -----------------------------------------------------------------------------


def session_nonce(mac_keys: Keys, wallet: str, now_s: int) -> tuple[str, int]:
    """A nonce for ``wallet`` (lower case), and when it ends in Unix seconds."""
    expiry_s = now_s + SESSION_S
    drawn = int.from_bytes(secrets.token_bytes(_RANDOM_BYTES)) & (1 << 28) - 1
    head = expiry_s << 28 | drawn
    tag = _tag(mac_keys.secrets[mac_keys.current], mac_keys.deployment, wallet, head)
    # RFC 9562: version 4 in bits 48 to 51, variant 2 in bits 64 and 65.
    high = head >> 12 << 16 | 4 << 12 | head & 0xFFF
    return str(uuid.UUID(int=high << 64 | 2 << 62 | tag)), expiry_s


def check_session(mac_keys: Keys, signed: Signed, now_s: int) -> int:
    """When the session ends. Raises ``AuthError``: expired, or not one of this wallet's."""
    number = uuid.UUID(signed.session).int
    high = number >> 64
    head = high >> 16 << 12 | high & 0xFFF
    for secret in mac_keys.secrets.values():
        tag = _tag(secret, mac_keys.deployment, signed.wallet, head)
        if hmac.compare_digest(tag.to_bytes(8), (number & _MAC_MASK).to_bytes(8)):
            break
    else:
        raise AuthError(
            "EXTERNAL_SIGNATURE_SESSION_NONCE_INVALID",
            "session_nonce is none that was issued here to this wallet.",
        )
    expiry_s = head >> 28
    if now_s >= expiry_s:
        raise AuthError(
            "EXTERNAL_SIGNATURE_SESSION_NONCE_EXPIRED", "session_nonce has expired: take a new one."
        )
    return expiry_s


def _tag(secret: bytes, deployment: str, wallet: str, head: int) -> int:
    begun = mac.begin(secret, mac.sized(b"farebox-session-1", deployment.encode()))
    made = mac.end(begun, mac.sized(wallet.encode(), head.to_bytes(8)))
    return int.from_bytes(made[:8]) & _MAC_MASK


# -- messages -----------------------------------------------------------------------------------


def scoped_message(signed: Signed, call: Call, payload: str) -> str:
    """The published shape of everything but the current tool invoke."""
    return "\n".join(
        (*_who(signed), f"action:{call.action}", f"product:{call.product}", f"payload:{payload}")
    )


def path_message(signed: Signed, path: str, payload: str) -> str:
    """The published shape of the current tool invoke."""
    return "\n".join((*_who(signed), "method:POST", f"path:{path}", f"payload:{payload}"))


def _who(signed: Signed) -> tuple[str, ...]:
    return (
        PUBLISHED,
        f"wallet:{signed.wallet}",
        f"session:{signed.session}",
        f"request:{signed.request_id}",
    )


def strong_message(signed: Signed, method: str, path: str, payload: str) -> str:
    """Farebox's own shape. ``path`` is the raw target of the request; ``payload`` the SHA-256 of
    the parameters in RFC 8785, empty if the call has none."""
    return "\n".join(
        (
            STRONG,
            f"audience:{signed.audience}",
            f"wallet:{signed.wallet}",
            f"session:{signed.session}",
            f"request:{signed.request_id}",
            f"method:{method}",
            f"path:{path}",
            f"ceiling:{signed.ceiling}",
            f"expires:{signed.expires_s}",
            f"payload:{payload}",
        )
    )


def sign(key: PrivateKey, message: str) -> str:
    """``personal_sign``: 65 bytes as hex."""
    return "0x" + keys.sign_digest(key, keys.eip191_hash(message.encode())).hex()


# -- reading and checking -----------------------------------------------------------------------


def read(body: Mapping[str, Any]) -> Signed:
    """The wrapper of a body. Raises ``AuthError``; the signature itself is looked at later."""
    wallet, session, request_id = (
        _text(body, name) for name in ("wallet_address", "session_nonce", "request_id")
    )
    if not _ADDRESS.fullmatch(wallet):
        raise _malformed("wallet_address is not 0x and 40 hex digits.")
    if not REQUEST_ID.fullmatch(request_id):
        raise _malformed("request_id is 1 to 128 characters out of A-Z a-z 0-9 . _ ~ = -")
    if not _UUID4.fullmatch(session):
        raise AuthError(
            "EXTERNAL_SIGNATURE_SESSION_NONCE_INVALID", "session_nonce is none that is issued here."
        )
    found = Signed(wallet.lower(), session, request_id, body.get("signature"))
    return found if TERMS.isdisjoint(body) else _strong(found, body)


def _strong(found: Signed, body: Mapping[str, Any]) -> Signed:
    expires, ceiling = body.get("expires_at"), body.get("ceiling", NO_CEILING)
    if isinstance(expires, bool) or not isinstance(expires, int) or not 0 < expires < 2**40:
        raise _malformed("expires_at is the time in Unix seconds.")
    if ceiling != NO_CEILING and not (isinstance(ceiling, str) and _CEILING.fullmatch(ceiling)):
        raise _malformed('ceiling is an amount such as "$0.05".')
    return found._replace(audience=_text(body, "audience"), ceiling=ceiling, expires_s=expires)


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str):
        raise _malformed(f"{name} is missing or not text.")
    return value


def _malformed(detail: str) -> AuthError:
    return AuthError("invalid_request", detail)


def check_published(
    mac_keys: Keys, signed: Signed, call: Call, payloads: Iterable[Form], now_s: int
) -> tuple[Signer, Form]:
    """Who signed one of the published shapes, and the form of the payload that was hashed.

    Raises ``AuthError``, which says what should have been signed.
    """
    expiry_s = check_session(mac_keys, signed, now_s)
    signature = _signature(signed)
    tried: list[Form] = []
    for payload in payloads:
        tried.append(payload)
        if signature is None:
            continue
        for message in _published(signed, call, payload.digest):
            if keys.recover(keys.eip191_hash(message.encode()), signature) == signed.wallet:
                return _signer(signed, expiry_s), payload
    raise refused(signed, _published(signed, call, tried[0].digest)[0], signature, call, tried)


def _published(signed: Signed, call: Call, payload: str) -> Sequence[str]:
    if not call.paths:
        return (scoped_message(signed, call, payload),)
    return [path_message(signed, path, payload) for path in call.paths]


def check_strong(  # noqa: PLR0917  (all parts of one text)
    mac_keys: Keys,
    signed: Signed,
    audience: str,
    method: str,
    path: str,
    payload: Form,
    now_s: int,
) -> Signer:
    """Who signed the strong shape, for this very request. Raises ``AuthError``."""
    session_s = check_session(mac_keys, signed, now_s)
    expiry_s = signed.expires_s or 0
    if signed.audience != audience:
        raise AuthError(
            "signature_authority_mismatch",
            f"The message is for another gateway; this one is {audience}.",
            params={"expected_audience": audience},
        )
    if now_s >= expiry_s:
        raise AuthError("signature_expired", "expires_at has passed.")
    signature = _signature(signed)
    message = strong_message(signed, method, path, payload.digest)
    if signature is None or keys.recover(keys.eip191_hash(message.encode()), signature) != (
        signed.wallet
    ):
        raise refused(signed, message, signature, Call("", "", (path,)), [payload])
    return _signer(signed, min(session_s, expiry_s))


def _signature(signed: Signed) -> bytes | None:
    text = signed.signature
    if not isinstance(text, str) or not _SIGNATURE.fullmatch(text):
        return None
    return bytes.fromhex(text[2:])


def _signer(signed: Signed, expiry_s: int) -> Signer:
    return Signer(
        scheme=SCHEME,
        address=signed.wallet,
        chain_id=0,
        kind="key",
        # A session's nonce has one length, so no two pairs give one text.
        request_id=f"{signed.session}:{signed.request_id}",
        created_s=expiry_s - SESSION_S,
        expires_s=expiry_s,
        digests=(),
        ceiling=None if signed.ceiling == NO_CEILING else signed.ceiling,
        covered=frozenset(),
        any_body=True,  # of the body only the parameters are signed, and they have been checked
    )


def refused(
    signed: Signed, expected: str, signature: bytes | None, call: Call, payloads: Sequence[Form]
) -> AuthError:
    """The refusal that says what should have been signed, and who signed what was."""
    found = None
    if signature is not None:
        found = keys.recover(keys.eip191_hash(expected.encode()), signature)
    if found is None:
        return AuthError(
            "EXTERNAL_SIGNATURE_MALFORMED",
            "signature is not 0x and the 65 bytes of a personal_sign signature.",
            params={"expected_message": expected},
        )
    return AuthError(
        "EXTERNAL_SIGNATURE_WALLET_MISMATCH",
        "The signature is of another wallet, or of other words than expected_message.",
        params={
            "expected_message": expected,
            "expected_wallet": signed.wallet,
            "recovered_wallet_for_expected_message": found,
            "accepted_path_candidates": list(call.paths),
            "accepted_payload_hash_forms": {each.name: each.digest for each in payloads},
        },
    )
