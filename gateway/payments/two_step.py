"""Credits bought in two posts of bare JSON, by clients that know nothing of x402's envelopes.

The first post is answered with a ``purchase_id``; the second is ``{purchase_id, authorization,
signature}``. The id is the token of the offer (``offers.py``): amount, token, network and recipient
follow from its MAC, so it needs no row, and a client that would pay anything else names no purchase
of ours. From there on it is the payment that it would be in a header field.
"""

from __future__ import annotations

from json import loads
from typing import Any, Final

from chain.errors import Rejected
from chain.schemes import eip3009
from gateway.errors import Problem
from gateway.money import format_usd
from gateway.payments import offers
from gateway.payments.rails import Rails

ID: Final = "purchase_id"
MEMBERS: Final = frozenset((ID, "authorization", "signature"))
PAYLOAD: Final = "paymentPayload"
"""A payment in the body, as the body of a facilitator's verify and settle names it."""
_LONGEST: Final = 200


def as_payment(rails: Rails, wanted: dict[str, Any], asked: offers.Asked) -> dict[str, Any]:
    """A second post as a purchase with its payment in the body. Others stay as they are.

    Whether the offer has expired is not asked here: a payment that was taken may be shown again.
    Raises ``Problem``.
    """
    named = sorted(MEMBERS & wanted.keys())
    if not named:
        return wanted
    if len(named) < len(MEMBERS) or PAYLOAD in wanted:
        raise Problem(
            "invalid_request", f"{', '.join(sorted(MEMBERS))} belong together, and stand alone."
        )
    token, signature = wanted[ID], wanted["signature"]
    payload = {"authorization": wanted["authorization"], "signature": signature}
    try:
        units = eip3009.parse(payload).value_units
    except Rejected as error:
        raise Problem("invalid_payload", error.detail) from None
    terms = _terms(rails, token, asked, units)
    accepted = loads(offers.requirements(terms, token))
    rest = {name: value for name, value in wanted.items() if name not in MEMBERS}
    if "credits" not in rest:
        rest.setdefault("amount_usd", format_usd(units))
    return {**rest, PAYLOAD: {"x402Version": 2, "accepted": accepted, "payload": payload}}


def _terms(rails: Rails, token: object, asked: offers.Asked, units: int) -> offers.Terms:
    if isinstance(token, str) and token.isascii() and len(token) <= _LONGEST:
        on_offer = offers.by_eip3009(rails.settings, units)
        try:
            return offers.unseal(rails.keys, token, asked, on_offer, 0).terms
        except Problem:
            pass  # the words of a payment in a header field would not help
    raise Problem(
        "invalid_request",
        "purchase_id is of no purchase that was begun here, or the authorization is for another "
        "amount than it.",
    )
