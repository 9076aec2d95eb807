"""x402 on the wire: payment headers in, PAYMENT-REQUIRED and PAYMENT-RESPONSE out.

The payload's ``x402Version`` decides how it is read, not the name of the header it came in.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from chain.errors import Rejected
from chain.schemes import eip2612, eip3009, exact, upto
from gateway.errors import Problem
from gateway.fields import by_name
from wallet_auth.strict import base64_bytes, json_object

PAYMENT_HEADERS: Final = (b"payment-signature", b"x-payment", b"payment")
MAX_HEADER_BYTES: Final = 24_000
IDENTIFIER: Final = "payment-identifier"
DECLARED: Final = f'"{IDENTIFIER}":{{"info":{{"required":false}},"schema":{{}}}}'
"""That identifiers are taken, as a member of a 402's ``extensions`` (JSON text)."""
DECLARED_PERMITS: Final = (
    f'"{eip2612.KEY}":{{"info":{{"description":"The approval of Permit2 may be signed (EIP-2612); '
    f'its gas is paid here.","version":"{eip2612.VERSION}"}},"schema":{{"type":"object",'
    '"required":["from","asset","spender","amount","nonce","deadline","signature","version"]}}'
)
"""That EIP-2612 permits are taken beside what is signed for Permit2, likewise."""
_ID: Final = re.compile(r"[A-Za-z0-9_-]{16,128}")


@dataclass(frozen=True, slots=True)
class Presented:
    """A payment as it was presented, parsed; nothing about it has been checked yet.

    ``network`` and ``scheme`` as the payer wrote them (v1: the short network name). ``asset``,
    ``pay_to`` and ``amount`` are what the payer says it accepted (v2 only), ``offer`` the token of
    that offer.
    """

    version: int
    scheme: str
    network: str
    authorization: exact.Permission
    asset: str | None = None
    pay_to: str | None = None
    amount: str | None = None
    timeout_s: int | None = None
    offer: str | None = None
    identifier: str | None = None  # of the payment-identifier extension; signed by nobody


def payment_header(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The one payment header of a request, or None. Raises ``Problem("identity_conflict")``."""
    named = by_name(headers)
    found = [value for name in PAYMENT_HEADERS for value in named.get(name, ())]
    if len(found) > 1:
        raise Problem("identity_conflict", "The request carries more than one payment.")
    return found[0].strip() if found and found[0].strip() else None


def decode(header: bytes, *, permit2: bool = False, by_upto: bool = False) -> Presented:
    """Read a payment header. ``permit2``: some network here takes it, in version 2; ``by_upto``:
    some route is paid so.

    Raises ``Problem``: 400 for what is malformed, 402 for what is well-formed and not spoken here.
    """
    if len(header) > MAX_HEADER_BYTES:
        raise Problem("invalid_payload", "The payment header is too long.")
    try:
        body = json_object(base64_bytes(header))
    except ValueError as error:
        raise Problem("invalid_payload", f"The payment header is {error}.") from None
    return decode_object(body, permit2=permit2, by_upto=by_upto)


def decode_object(
    body: dict[str, Any], *, permit2: bool = False, by_upto: bool = False
) -> Presented:
    """Read a payment payload that is JSON already. Raises as ``decode`` does."""
    version = body.get("x402Version")
    if isinstance(version, bool) or not isinstance(version, int):
        raise Problem("invalid_payload", "x402Version is missing or not a number.")
    if version == 1:
        return _decode_v1(body)
    if version == 2:
        return _decode_v2(body, permit2, by_upto)
    raise Problem("invalid_x402_version", f"x402 version {version} is not spoken here: 1 or 2.")


def _decode_v1(body: dict[str, Any]) -> Presented:
    scheme, network = _text(body, "scheme"), _text(body, "network")
    return Presented(1, scheme, network, _authorization(scheme, body))


def _decode_v2(body: dict[str, Any], permit2: bool, by_upto: bool) -> Presented:
    accepted = body.get("accepted")
    if not isinstance(accepted, dict):
        raise Problem("invalid_payload", "accepted is missing: the offer that is being paid.")
    scheme = _text(accepted, "scheme")
    extra = accepted.get("extra")
    offer = extra.get("offer") if isinstance(extra, dict) else None
    if offer is not None and not (isinstance(offer, str) and offer.isascii() and len(offer) < 512):
        raise Problem("invalid_payload", "accepted.extra.offer is not a token.")
    timeout = accepted.get("maxTimeoutSeconds")
    return Presented(
        version=2,
        scheme=scheme,
        network=_text(accepted, "network"),
        authorization=_authorization(scheme, body, permit2, by_upto),
        asset=_text(accepted, "asset").lower(),
        pay_to=_text(accepted, "payTo").lower(),
        amount=_text(accepted, "amount"),
        timeout_s=timeout if isinstance(timeout, int) and not isinstance(timeout, bool) else None,
        offer=offer,
        identifier=_identifier(body.get("extensions")),
    )


def _identifier(extensions: Any) -> str | None:
    found = extensions
    for name in (IDENTIFIER, "info", "id"):
        found = found.get(name) if isinstance(found, dict) else None
    if found is None:
        return None
    if not isinstance(found, str) or not _ID.fullmatch(found):
        raise Problem(
            "invalid_payload",
            "The payment identifier is 16 to 128 letters, digits, hyphens and underscores.",
        )
    return found


def _text(table: dict[str, Any], name: str) -> str:
    value = table.get(name)
    if not isinstance(value, str) or not value or len(value) > 200:
        raise Problem("invalid_payload", f"{name} is missing or not text.")
    return value


def _authorization(
    scheme: str, body: dict[str, Any], permit2: bool = False, by_upto: bool = False
) -> exact.Permission:
    payload = body.get("payload")
    by_upto = by_upto and scheme == "upto"
    if scheme != "exact" and not by_upto:
        raise Problem("invalid_scheme", f"The scheme {scheme[:40]!r} is not accepted: exact.")
    if not (permit2 or by_upto) and isinstance(payload, dict) and "permit2Authorization" in payload:
        raise Problem("invalid_scheme", "Permit2 is not accepted here: sign with EIP-3009.")
    try:
        if by_upto:
            return upto.parse(payload)
        if not permit2:
            return eip3009.parse(payload)
        return exact.parse(payload, body.get("extensions"))
    except Rejected as error:
        # Malformed is 400; a well-formed signature that cannot be right is the payment's fault.
        raise Problem(error.code, error.detail) from None


def encode(value: object) -> str:
    """A JSON value as x402 puts it in a header: compact, base64 with padding."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return base64.b64encode(text.encode()).decode()


def response_headers(
    *,
    success: bool,
    network: str,
    payer: str,
    transaction: str = "",
    amount_units: int | None = None,
    error: tuple[str, str] | None = None,
    v1_name: str | None = None,
    extra: dict[str, Any] | None = None,
    extensions: dict[str, Any] | None = None,
) -> list[tuple[str, str]]:
    """PAYMENT-RESPONSE (x402 v2) and X-PAYMENT-RESPONSE (v1), both: each client reads its own."""
    body: dict[str, Any] = {
        "success": success,
        "transaction": transaction,
        "network": network,
        "payer": payer,
    }
    if error is not None:
        body["errorReason"], body["errorMessage"] = error
    old = {**body, "network": v1_name or network}
    if amount_units is not None:
        body["amount"] = str(amount_units)
    if extra is not None:
        body["extra"] = extra
    if extensions is not None:
        body["extensions"] = extensions
    return [("PAYMENT-RESPONSE", encode(body)), ("X-PAYMENT-RESPONSE", encode(old))]
