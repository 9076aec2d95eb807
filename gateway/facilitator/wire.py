"""What official x402 clients of a facilitator send and parse.

``{"x402Version", "paymentPayload", "paymentRequirements"}``, of version 1 or 2 as the payload
says. What is not that shape is malformed (400); everything else that is wrong about a payment is a
verdict, answered with 200 and a reason code in the spelling of the specification.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from chain.errors import Rejected
from chain.eth import is_address
from gateway.errors import Problem
from wallet_auth.strict import json_object

_NUMBER: Final = re.compile(r"[0-9]{1,78}")
_MOST_UNITS: Final = 2**63 - 1
UPTO: Final = "upto"  # the scheme


@dataclass(frozen=True, slots=True)
class Asked:
    """One payment and what its seller wants for it. Only the shape has been looked at.

    ``stated``: the version beside the payload. ``payer`` as the payload spells it, "" where it
    names none. ``chosen``: scheme and network as the payer wrote them.
    """

    version: int
    stated: object
    payload: object
    extensions: object
    requirements: dict[str, Any]
    chosen: tuple[object, object]
    payer: str

    @property
    def network(self) -> str:
        """The network as the seller wrote it; "" if it is no text."""
        network = self.requirements.get("network")
        return network if isinstance(network, str) else ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a seller wants, read. Addresses in lower case. The amount is above 0, but by ``upto``:
    a call may come to nothing."""

    scheme: str
    network: str
    asset: str
    pay_to: str
    amount_units: int
    token: tuple[object, object]  # EIP-712 name and version
    extra: dict[str, Any]


def read(body: bytes) -> Asked:
    """Raises ``Problem("invalid_payload")`` for what is no such request at all."""
    try:
        whole = json_object(body)
    except ValueError as error:
        raise Problem("invalid_payload", f"The body is {error}.") from None
    payment, wanted = whole.get("paymentPayload"), whole.get("paymentRequirements")
    if not isinstance(payment, dict) or not isinstance(wanted, dict):
        raise Problem(
            "invalid_payload", "paymentPayload and paymentRequirements should be objects."
        )
    version = payment.get("x402Version")
    if isinstance(version, bool) or not isinstance(version, int):
        raise Problem("invalid_payload", "paymentPayload.x402Version should be a number.")
    accepted = payment.get("accepted")
    said = payment if version == 1 else accepted if isinstance(accepted, dict) else {}
    chosen = (said.get("scheme"), said.get("network"))
    return Asked(
        version=version,
        # Some clients send no version beside the payload's.
        stated=whole.get("x402Version", version),
        payload=payment.get("payload"),
        extensions=payment.get("extensions"),
        requirements=wanted,
        chosen=chosen,
        payer=_payer(payment.get("payload")),
    )


def _payer(payload: object) -> str:
    if isinstance(payload, dict):
        for name in ("authorization", "permit2Authorization"):
            inner = payload.get(name)
            if isinstance(inner, dict) and is_address(inner.get("from")):
                return str(inner["from"])
    return ""


def wanted(asked: Asked) -> Wanted:
    """The requirements, strictly. ``Rejected`` with the code of what is wrong with them."""
    if asked.stated != asked.version:
        raise Rejected("invalid_x402_version", "x402Version is not that of the payload")
    if asked.version not in (1, 2):
        raise Rejected("invalid_x402_version", f"x402 version {asked.version} is not spoken here")
    given = asked.requirements
    scheme, network, extra = given.get("scheme"), given.get("network"), given.get("extra")
    if not isinstance(scheme, str) or not isinstance(network, str):
        raise _odd("scheme and network should be text")
    if asked.chosen[0] != scheme:
        raise Rejected("invalid_scheme", "the payment is for another scheme than is wanted")
    if asked.chosen[1] != network:
        raise Rejected("invalid_network", "the payment is for another network than is wanted")
    for name in ("asset", "payTo"):
        if not is_address(given.get(name)):
            raise _odd(f"{name} is not an address")
    if not isinstance(extra, dict):
        raise _odd("extra should name the token's EIP-712 domain")
    if scheme == UPTO and asked.version != 2:
        raise Rejected("unsupported_scheme", "upto is of x402 version 2")
    amount = given.get("amount" if asked.version == 2 else "maxAmountRequired")
    return Wanted(
        scheme=scheme,
        network=network,
        asset=given["asset"].lower(),
        pay_to=given["payTo"].lower(),
        amount_units=_amount(amount, least=0 if scheme == UPTO else 1),
        token=(extra.get("name"), extra.get("version")),
        extra=extra,
    )


def _amount(text: object, least: int) -> int:
    if not isinstance(text, str) or _NUMBER.fullmatch(text) is None:
        raise _odd("the amount is not a string of decimal digits")
    if not least <= int(text) <= _MOST_UNITS:
        raise _odd("the amount is nothing, or too much")
    return int(text)


def _odd(detail: str) -> Rejected:
    return Rejected("invalid_payment_requirements", detail)


# -- answers ---------------------------------------------------------------------------------------


def verdict(asked: Asked, refusal: tuple[str, str] | None) -> dict[str, Any]:
    """VerifyResponse. Members without a value are left out, as the specification wants it."""
    said: dict[str, Any] = {"isValid": refusal is None}
    if refusal is not None:
        said["invalidReason"], said["invalidMessage"] = refusal
    if asked.payer:
        said["payer"] = asked.payer
    return said


def settled(
    asked: Asked,
    *,
    tx_hash: str = "",
    failure: tuple[str, str] | None = None,
    units: int | None = None,
) -> dict[str, Any]:
    """SettleResponse. ``tx_hash`` also with ``settlement_pending``, so that one can look for it.
    ``units``: what was moved, where that is not the amount of the offer (``upto``)."""
    said: dict[str, Any] = {
        "success": failure is None,
        "transaction": tx_hash,
        "network": asked.network,
    }
    if failure is not None:
        said["errorReason"], said["errorMessage"] = failure
    if units is not None:
        said["amount"] = str(units)
    if asked.payer:
        said["payer"] = asked.payer
    return said
