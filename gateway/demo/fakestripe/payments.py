"""Payment intents and charges: confirm, authenticate, settle later, decline.

Source: Stripe API reference, "PaymentIntents" and "Charges". The order of events is Stripe's:
the charge's event before the payment intent's.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, Final

from gateway.demo.fakestripe import forms
from gateway.demo.fakestripe.errors import StripeError, invalid
from gateway.demo.fakestripe.methods import (
    BANK_ACCOUNTS,
    MESSAGES,
    card_of,
    resolve,
)
from gateway.demo.fakestripe.state import Object, State, public

# least amount in the currency's smallest unit that Stripe takes
LEAST: Final[dict[str, int]] = {"usd": 50, "eur": 50, "gbp": 30, "jpy": 50}
MOST: Final = 99_999_999

_NAMES: Final = (
    "amount",
    "automatic_payment_methods",
    "confirm",
    "currency",
    "customer",
    "description",
    "error_on_requires_action",
    "metadata",
    "off_session",
    "payment_method",
    "payment_method_types",
    "receipt_email",
    "return_url",
    "setup_future_usage",
    "statement_descriptor_suffix",
)


def check_amount(amount: int | None, currency: str | None, what: str = "amount") -> tuple[int, str]:
    """Amount and currency within Stripe's bounds; ``StripeError`` 400 otherwise."""
    if amount is None:
        raise forms.required(what)
    if currency is None:
        raise forms.required("currency")
    currency = currency.lower()
    if currency not in LEAST:
        raise invalid(f"Invalid currency: {currency[:10]}.", "currency")
    if amount < LEAST[currency]:
        raise invalid(
            "Amount must convert to at least 50 cents. Learn more about minimum charge amounts.",
            what,
            "amount_too_small",
        )
    if amount > MOST:
        raise invalid("Amount must be no more than $999,999.99.", what, "amount_too_large")
    return amount, currency


def new_intent(
    state: State,
    amount: int,
    currency: str,
    *,
    metadata: dict[str, str],
    description: str | None = None,
    customer: str | None = None,
    method_types: list[str] | None = None,
) -> Object:
    """A payment intent that waits for a payment method; emits ``payment_intent.created``."""
    intent = state.new(
        "payment_intent",
        {
            "amount": amount,
            "amount_capturable": 0,
            "amount_received": 0,
            "canceled_at": None,
            "cancellation_reason": None,
            "capture_method": "automatic",
            "client_secret": None,
            "confirmation_method": "automatic",
            "currency": currency,
            "customer": customer,
            "description": description,
            "last_payment_error": None,
            "latest_charge": None,
            "metadata": metadata,
            "next_action": None,
            "payment_method": None,
            "payment_method_types": method_types or ["card"],
            "setup_future_usage": None,
            "status": "requires_payment_method",
        },
    )
    intent["client_secret"] = f"{intent['id']}_secret_{secrets.token_hex(12)}"
    state.emit("payment_intent.created", intent)
    return intent


def create_intent(state: State, params: Mapping[str, Any]) -> Object:
    """``POST /v1/payment_intents``"""
    forms.only(params, _NAMES)
    amount, currency = check_amount(forms.integer(params, "amount"), forms.text(params, "currency"))
    customer = forms.text(params, "customer")
    if customer is not None:
        state.get("customer", customer, "customer")
    reference = forms.text(params, "payment_method")
    method = resolve(state, reference) if reference else None
    if method and method["customer"] not in {None, customer}:
        raise invalid("The provided PaymentMethod belongs to another customer.", "payment_method")
    intent = new_intent(
        state,
        amount,
        currency,
        metadata=forms.metadata(params),
        description=forms.text(params, "description"),
        customer=customer,
    )
    if method is not None:
        intent["payment_method"] = method["id"]
        intent["status"] = "requires_confirmation"
    if forms.boolean(params, "confirm"):
        confirm(state, intent, off_session=forms.boolean(params, "off_session"))
    return intent


def confirm_intent(state: State, intent_id: str, params: Mapping[str, Any]) -> Object:
    """``POST /v1/payment_intents/{id}/confirm``"""
    forms.only(params, ("payment_method", "off_session", "return_url", "receipt_email"))
    intent = state.get("payment_intent", intent_id, "intent")
    reference = forms.text(params, "payment_method")
    if reference is not None:
        intent["payment_method"] = resolve(state, reference)["id"]
    confirm(state, intent, off_session=forms.boolean(params, "off_session"))
    return intent


def cancel_intent(state: State, intent_id: str, params: Mapping[str, Any]) -> Object:
    """``POST /v1/payment_intents/{id}/cancel``"""
    forms.only(params, ("cancellation_reason",))
    intent = state.get("payment_intent", intent_id, "intent")
    _expect(intent, {"requires_payment_method", "requires_confirmation", "requires_action"})
    intent.update(
        status="canceled",
        canceled_at=state.now_s(),
        cancellation_reason=forms.text(params, "cancellation_reason"),
        next_action=None,
    )
    state.emit("payment_intent.canceled", intent)
    return intent


def confirm(state: State, intent: Object, *, off_session: bool) -> None:
    """Try the payment. ``StripeError`` 402 on a decline, the intent inside, as Stripe does.

    Ends in ``succeeded``, ``processing`` (bank) or ``requires_action`` (3-D Secure).
    """
    _expect(intent, {"requires_payment_method", "requires_confirmation", "requires_action"})
    if intent["payment_method"] is None:
        raise invalid(
            "You cannot confirm this PaymentIntent because it's missing a payment method.",
            code="payment_intent_unexpected_state",
        )
    method = state.get("payment_method", intent["payment_method"])
    if method["type"] == "us_bank_account":
        charge = _charge(state, intent, method, "pending")
        intent.update(status="processing", latest_charge=charge["id"], last_payment_error=None)
        state.emit("charge.pending", charge)
        state.emit("payment_intent.processing", intent)
        state.on_processing(intent["id"])
        return
    card = card_of(method["_number"])
    if card.three_d_secure:
        if off_session:
            _declined(state, intent, method, "authentication_required", "authentication_required")
        intent.update(
            status="requires_action",
            next_action={
                "type": "redirect_to_url",
                "redirect_to_url": {
                    "url": f"{state.base_url}/authenticate/{intent['id']}",
                    "return_url": None,
                },
            },
        )
        state.emit("payment_intent.requires_action", intent)
        return
    charge_card(state, intent, method)


def authenticated(state: State, intent: Object, *, passed: bool) -> None:
    """The end of the 3-D Secure step: charge the card, or decline."""
    _expect(intent, {"requires_action"})
    method = state.get("payment_method", intent["payment_method"])
    intent["next_action"] = None
    if not passed:
        intent.update(
            status="requires_payment_method",
            payment_method=None,
            last_payment_error={
                "type": "invalid_request_error",
                "code": "payment_intent_authentication_failure",
                "message": "We are unable to authenticate your payment method. Please choose a "
                "different payment method and try again.",
            },
        )
        state.emit("payment_intent.payment_failed", intent)
        return
    charge_card(state, intent, method)


def charge_card(state: State, intent: Object, method: Object) -> None:
    """Charge now; ``StripeError`` 402 on a decline."""
    card = card_of(method["_number"])
    if card.decline is not None:
        _declined(state, intent, method, *card.decline)
    charge = _charge(state, intent, method, "succeeded")
    state.emit("charge.succeeded", charge)
    _succeed(state, intent, charge)


def settle(state: State, intent: Object, outcome: str | None = None) -> str:
    """The bank's answer to a debit that was ``processing``: ``succeeded`` or ``failed``."""
    _expect(intent, {"processing"})
    method = state.get("payment_method", intent["payment_method"])
    outcome = outcome or BANK_ACCOUNTS[method["_number"]]
    charge = state.get("charge", intent["latest_charge"])
    if outcome == "succeeded":
        charge.update(status="succeeded", paid=True, amount_captured=charge["amount"])
        state.emit("charge.succeeded", charge)
        _succeed(state, intent, charge)
        return outcome
    message = "The customer's bank account could not be debited."
    charge.update(status="failed", failure_code="account_closed", failure_message=message)
    intent.update(
        status="requires_payment_method",
        payment_method=None,
        last_payment_error={"type": "card_error", "code": "account_closed", "message": message},
    )
    state.emit("charge.failed", charge)
    state.emit("payment_intent.payment_failed", intent)
    return "failed"


def _succeed(state: State, intent: Object, charge: Object) -> None:
    intent.update(
        status="succeeded",
        amount_received=intent["amount"],
        latest_charge=charge["id"],
        last_payment_error=None,
        next_action=None,
    )
    state.emit("payment_intent.succeeded", intent)


def _declined(
    state: State, intent: Object, method: Object, code: str, decline_code: str | None
) -> None:
    message = MESSAGES[code]
    charge = _charge(state, intent, method, "failed")
    charge.update(failure_code=code, failure_message=message)
    problem = {"type": "card_error", "code": code, "message": message}
    if decline_code is not None:
        problem["decline_code"] = decline_code
    intent.update(
        status="requires_payment_method",
        payment_method=None,
        latest_charge=charge["id"],
        last_payment_error={**problem, "payment_method": public(method)},
        next_action=None,
    )
    state.emit("charge.failed", charge)
    state.emit("payment_intent.payment_failed", intent)
    raise StripeError(
        402,
        "card_error",
        message,
        code=code,
        decline_code=decline_code,
        charge=charge["id"],
        payment_intent=public(intent),
        payment_method=public(method),
        started=True,
    )


def _charge(state: State, intent: Object, method: Object, status: str) -> Object:
    paid = status == "succeeded"
    details: Object = {"type": method["type"], method["type"]: dict(method[method["type"]])}
    return state.new(
        "charge",
        {
            "amount": intent["amount"],
            "amount_captured": intent["amount"] if paid else 0,
            "amount_refunded": 0,
            "balance_transaction": None,
            "billing_details": dict(method["billing_details"]),
            "captured": status != "failed",
            "currency": intent["currency"],
            "customer": intent["customer"],
            "description": intent["description"],
            "disputed": False,
            "failure_code": None,
            "failure_message": None,
            "metadata": dict(intent["metadata"]),
            "paid": paid,
            "payment_intent": intent["id"],
            "payment_method": method["id"],
            "payment_method_details": details,
            "receipt_url": f"{state.base_url}/receipts/{intent['id']}" if paid else None,
            "refunded": False,
            "status": status,
        },
    )


def _expect(intent: Object, allowed: set[str]) -> None:
    if intent["status"] not in allowed:
        raise invalid(
            f"This PaymentIntent's status is {intent['status']}; the operation needs one of "
            f"{', '.join(sorted(allowed))}.",
            code="payment_intent_unexpected_state",
        )
