"""What an answer says of the payment that was made for it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol

from wallet_auth import offers
from wallet_auth.offers import Payment

PENDING_DELAY_S: Final = 2
MAX_DELAY_S: Final = 10


class Response(Protocol):
    """As much of a client's response as is read here."""

    @property
    def status_code(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]: ...


def facts(payment: Payment) -> dict[str, Any]:
    offer = payment.offer
    return {
        "network": offer.network,
        "asset": offer.token.address,
        "amount_units": offer.amount_units,
        "pay_to": offer.pay_to,
        "nonce": payment.nonce,
    }


def receipt_of(response: Response | None) -> dict[str, Any]:
    value = None if response is None else response.headers.get("payment-response")
    if value is None:
        return {}
    try:
        return offers.read_header(value)
    except ValueError:
        return {"unreadable": True}


def pending_delay(response: Response | None) -> int | None:
    """Seconds to wait before the same payment is presented again; ``None`` if it is decided.

    Pending is a 402 that tells of this payment and asks for no other one. A refusal looks the
    same but for ``Retry-After`` and the reason.
    """
    if response is None or response.status_code != 402:
        return None
    if "payment-required" in response.headers or "payment-response" not in response.headers:
        return None
    after = response.headers.get("retry-after", "")
    if after.isascii() and after.isdigit():
        return min(int(after), MAX_DELAY_S) if len(after) < 10 else MAX_DELAY_S
    pending = receipt_of(response).get("errorReason") == "settlement_pending"
    return PENDING_DELAY_S if pending else None
