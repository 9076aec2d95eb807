"""Customers and payment methods, and what each of Stripe's published test cards does.

Source: Stripe documentation, "Test card numbers". Numbers never leave this module: a payment
method keeps brand, last four digits and behaviour.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from gateway.demo.fakestripe import forms
from gateway.demo.fakestripe.errors import StripeError, invalid
from gateway.demo.fakestripe.state import Object, State


@dataclass(frozen=True, slots=True)
class Card:
    """A test card. ``decline``: (code, decline_code or None) when a charge is tried."""

    brand: str
    decline: tuple[str, str | None] | None = None
    three_d_secure: bool = False


GENERIC: Final = ("card_declined", "generic_decline")

CARDS: Final[dict[str, Card]] = {
    "4242424242424242": Card("visa"),
    "4000056655665556": Card("visa"),
    "5555555555554444": Card("mastercard"),
    "378282246310005": Card("amex"),
    "4000000000000002": Card("visa", GENERIC),
    "4000000000000341": Card("visa", GENERIC),
    "4000000000009995": Card("visa", ("card_declined", "insufficient_funds")),
    "4000000000009987": Card("visa", ("card_declined", "lost_card")),
    "4000000000000069": Card("visa", ("expired_card", None)),
    "4000000000000127": Card("visa", ("incorrect_cvc", None)),
    "4000000000000119": Card("visa", ("processing_error", None)),
    "4000002760003184": Card("visa", three_d_secure=True),
    "4000002500003155": Card("visa", three_d_secure=True),
    "4000008400001629": Card("visa", GENERIC, three_d_secure=True),
}

# ids that stand for a card, usable in place of a payment method
SHORTHANDS: Final[dict[str, str]] = {
    "pm_card_visa": "4242424242424242",
    "pm_card_mastercard": "5555555555554444",
    "pm_card_amex": "378282246310005",
    "pm_card_visa_chargeDeclined": "4000000000000002",
    "pm_card_chargeCustomerFail": "4000000000000341",
    "pm_card_visa_chargeDeclinedInsufficientFunds": "4000000000009995",
    "pm_card_authenticationRequired": "4000002760003184",
    "pm_card_threeDSecure2Required": "4000002760003184",
    "tok_visa": "4242424242424242",
    "tok_chargeDeclined": "4000000000000002",
}

# US bank account numbers: what happens to the debit days later
BANK_ACCOUNTS: Final[dict[str, str]] = {
    "000123456789": "succeeded",
    "000111111116": "failed",
}

MESSAGES: Final[dict[str, str]] = {
    "card_declined": "Your card was declined.",
    "expired_card": "Your card has expired.",
    "incorrect_cvc": "Your card's security code is incorrect.",
    "processing_error": "An error occurred while processing your card. Try again in a little bit.",
    "incorrect_number": "Your card number is incorrect.",
    "authentication_required": "Your card was declined. This transaction requires authentication.",
}


def card_of(number: str) -> Card:
    """The behaviour of a card number; ``StripeError`` 402 for one that is no test card."""
    card = CARDS.get(number)
    if card is not None:
        return card
    if not _luhn(number):
        raise StripeError(
            402,
            "card_error",
            MESSAGES["incorrect_number"],
            code="incorrect_number",
            param="number",
            started=True,
        )
    raise StripeError(
        402,
        "card_error",
        "Your card was declined. Your request was in test mode, but used a non test card. For a "
        "list of valid test cards, visit: https://stripe.com/docs/testing.",
        code="card_declined",
        decline_code="test_mode_live_card",
        started=True,
    )


def _luhn(number: str) -> bool:
    if not (number.isascii() and number.isdigit() and 12 <= len(number) <= 19):
        return False
    total = 0
    for position, digit in enumerate(reversed(number)):
        value = int(digit) * (2 if position % 2 else 1)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def new_card(state: State, number: str, customer: str | None = None) -> Object:
    """A payment method for a card number."""
    card = card_of(number)
    made = state.new(
        "payment_method",
        {
            "type": "card",
            "billing_details": {"address": None, "email": None, "name": None, "phone": None},
            "card": {
                "brand": card.brand,
                "country": "US",
                "exp_month": 12,
                "exp_year": 2034,
                "fingerprint": f"fp{number[-4:]}{card.brand}",
                "funding": "credit",
                "last4": number[-4:],
                "three_d_secure_usage": {"supported": True},
            },
            "customer": customer,
            "metadata": {},
        },
    )
    made["_number"] = number
    return made


def new_bank_account(state: State, number: str) -> Object:
    """A payment method for a US bank account (settles later)."""
    if number not in BANK_ACCOUNTS:
        raise invalid("This is not one of the test bank accounts.", "account_number")
    made = state.new(
        "payment_method",
        {
            "type": "us_bank_account",
            "billing_details": {"address": None, "email": None, "name": None, "phone": None},
            "us_bank_account": {"bank_name": "STRIPE TEST BANK", "last4": number[-4:]},
            "customer": None,
            "metadata": {},
        },
    )
    made["_number"] = number
    return made


def resolve(state: State, reference: str, param: str = "payment_method") -> Object:
    """A payment method by id or by shorthand (a shorthand makes a fresh one)."""
    if reference in SHORTHANDS:
        return new_card(state, SHORTHANDS[reference])
    return state.get("payment_method", reference, param)


def create_payment_method(state: State, params: Mapping[str, Any]) -> Object:
    """``POST /v1/payment_methods``"""
    forms.only(params, ("type", "card", "billing_details", "metadata"))
    forms.one_of(params, "type", ("card",))
    card = forms.mapping(params, "card")
    token = forms.text(card, "token", "card[token]")
    number = SHORTHANDS.get(token) if token else forms.text(card, "number", "card[number]")
    if number is None:
        raise forms.required("card[number]")
    made = new_card(state, number)
    made["metadata"] = forms.metadata(params)
    return made


def attach(state: State, method_id: str, params: Mapping[str, Any]) -> Object:
    """``POST /v1/payment_methods/{id}/attach``"""
    forms.only(params, ("customer",))
    customer = forms.text(params, "customer")
    if customer is None:
        raise forms.required("customer")
    state.get("customer", customer, "customer")
    method = resolve(state, method_id, "payment_method")
    method["customer"] = customer
    state.emit("payment_method.attached", method)
    return method


def detach(state: State, method_id: str, params: Mapping[str, Any]) -> Object:
    """``POST /v1/payment_methods/{id}/detach``"""
    forms.only(params, ())
    method = state.get("payment_method", method_id, "payment_method")
    method["customer"] = None
    state.emit("payment_method.detached", method)
    return method


def create_customer(state: State, params: Mapping[str, Any]) -> Object:
    """``POST /v1/customers``"""
    made = state.new("customer", _customer_values(state, params, {}))
    state.emit("customer.created", made)
    return made


def update_customer(state: State, customer_id: str, params: Mapping[str, Any]) -> Object:
    """``POST /v1/customers/{id}``"""
    customer = state.get("customer", customer_id, "customer")
    customer.update(_customer_values(state, params, customer))
    state.emit("customer.updated", customer)
    return customer


def delete_customer(state: State, customer_id: str) -> Object:
    """``DELETE /v1/customers/{id}``"""
    customer = state.get("customer", customer_id, "customer")
    del state.tables["customer"][customer_id]
    state.emit("customer.deleted", customer)
    return {"id": customer_id, "object": "customer", "deleted": True}


def _customer_values(state: State, params: Mapping[str, Any], before: Object) -> Object:
    names = ("email", "name", "description", "phone")
    forms.only(params, (*names, "metadata", "payment_method", "invoice_settings"))
    values: Object = {
        name: forms.text(params, name) if name in params else before.get(name) for name in names
    }
    values["metadata"] = {**before.get("metadata", {}), **forms.metadata(params)}
    settings = dict(before.get("invoice_settings") or {"default_payment_method": None})
    chosen = forms.text(forms.mapping(params, "invoice_settings"), "default_payment_method")
    if chosen is not None:
        settings["default_payment_method"] = state.get("payment_method", chosen)["id"]
    values["invoice_settings"] = settings
    return values
