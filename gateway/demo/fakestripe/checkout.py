"""Checkout Sessions in payment mode: open, complete (paid or unpaid), expired.

Source: Stripe API reference, "Checkout Sessions"; documentation "Fulfil orders". As since API
2022-08-01 a session has no payment intent until somebody pays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from gateway.demo.fakestripe import forms
from gateway.demo.fakestripe.errors import StripeError, invalid
from gateway.demo.fakestripe.methods import new_bank_account, new_card
from gateway.demo.fakestripe.payments import (
    authenticated,
    check_amount,
    confirm,
    new_intent,
    settle,
)
from gateway.demo.fakestripe.state import Object, State

LEAST_S: Final = 30 * 60
MOST_S: Final = 24 * 3600

_NAMES: Final = (
    "adaptive_pricing",
    "allow_promotion_codes",
    "automatic_tax",
    "billing_address_collection",
    "branding_settings",
    "cancel_url",
    "client_reference_id",
    "consent_collection",
    "currency",
    "custom_text",
    "customer",
    "customer_creation",
    "customer_email",
    "expires_at",
    "invoice_creation",
    "line_items",
    "locale",
    "metadata",
    "mode",
    "payment_intent_data",
    "payment_method_configuration",
    "payment_method_options",
    "payment_method_types",
    "phone_number_collection",
    "submit_type",
    "success_url",
    "ui_mode",
)


def create_session(state: State, params: Mapping[str, Any]) -> Object:
    """``POST /v1/checkout/sessions``"""
    forms.only(params, _NAMES)
    mode = forms.one_of(params, "mode", ("payment", "setup", "subscription"))
    if mode is None:
        raise forms.required("mode")
    if mode != "payment" or forms.text(params, "ui_mode") not in {None, "hosted_page"}:
        raise invalid("The local Stripe knows only hosted pages in payment mode.", "mode")
    success_url = forms.text(params, "success_url")
    if success_url is None:
        raise forms.required("success_url")
    for name in ("success_url", "cancel_url"):
        _check_url(forms.text(params, name), name)
    items, amount, currency = _line_items(params)
    expires_at = forms.integer(params, "expires_at")
    now = state.now_s()
    if expires_at is not None and not now + LEAST_S <= expires_at <= now + MOST_S:
        raise invalid(
            "The `expires_at` timestamp must be between 30 minutes and 24 hours from Checkout "
            "Session creation.",
            "expires_at",
        )
    customer = forms.text(params, "customer")
    if customer is not None:
        state.get("customer", customer, "customer")
    email = forms.text(params, "customer_email")
    if email is not None and "@" not in email:
        raise invalid(f"Invalid email address: {email[:100]}", "customer_email", "email_invalid")
    intent_data = forms.mapping(params, "payment_intent_data")
    types = forms.listing(params, "payment_method_types") or ["card", "us_bank_account"]
    if not set(types) <= {"card", "us_bank_account"}:
        raise invalid("The local Stripe knows card and us_bank_account.", "payment_method_types")
    session = state.new(
        "checkout.session",
        {
            "amount_subtotal": amount,
            "amount_total": amount,
            "automatic_tax": {"enabled": False, "liability": None, "status": None},
            "cancel_url": forms.text(params, "cancel_url"),
            "client_reference_id": forms.text(params, "client_reference_id"),
            "currency": currency,
            "customer": customer,
            "customer_creation": None if customer else "if_required",
            "customer_details": None,
            "customer_email": email,
            "expires_at": now + MOST_S if expires_at is None else expires_at,
            "locale": forms.text(params, "locale"),
            "metadata": forms.metadata(params),
            "mode": mode,
            "payment_intent": None,
            "payment_method_options": forms.mapping(params, "payment_method_options"),
            "payment_method_types": types,
            "payment_status": "unpaid",
            "status": "open",
            "submit_type": forms.text(params, "submit_type"),
            "success_url": success_url,
            "total_details": {"amount_discount": 0, "amount_shipping": 0, "amount_tax": 0},
            "ui_mode": "hosted_page",
            "_items": items,
            "_intent_metadata": forms.metadata(intent_data, "payment_intent_data[metadata]"),
            "_description": forms.text(intent_data, "description"),
        },
    )
    session["url"] = f"{state.base_url}/c/pay/{session['id']}"
    return session


def _check_url(url: str | None, name: str) -> None:
    if url is not None and not url.startswith(("http://", "https://")):
        raise invalid("Not a valid URL", name, "url_invalid")


def _line_items(params: Mapping[str, Any]) -> tuple[list[Object], int, str]:
    entries = forms.listing(params, "line_items")
    if not entries:
        raise forms.required("line_items")
    items: list[Object] = []
    for position, entry in enumerate(entries):
        label = f"line_items[{position}]"
        if not isinstance(entry, dict):
            raise invalid(f"Invalid object: {label}", label)
        price = forms.mapping(entry, "price_data", f"{label}[price_data]")
        if not price:
            raise invalid("The local Stripe has no stored prices: send price_data.", label)
        product = forms.mapping(price, "product_data", f"{label}[price_data][product_data]")
        name = forms.text(product, "name")
        unit = forms.integer(price, "unit_amount", f"{label}[price_data][unit_amount]", least=0)
        currency = forms.text(price, "currency")
        quantity = forms.integer(entry, "quantity", f"{label}[quantity]", least=1)
        if name is None or unit is None or currency is None or quantity is None:
            raise forms.required(f"{label}[price_data] name, unit_amount, currency, quantity")
        items.append(
            {
                "amount_total": unit * quantity,
                "currency": currency.lower(),
                "description": name,
                "detail": forms.text(product, "description"),
                "quantity": quantity,
            }
        )
    if len({item["currency"] for item in items}) > 1:
        raise invalid("All line items must have the same currency.", "line_items")
    total = sum(item["amount_total"] for item in items)
    amount, currency = check_amount(total, items[0]["currency"], "line_items")
    return items, amount, currency


def expire_session(state: State, session_id: str, params: Mapping[str, Any]) -> Object:
    """``POST /v1/checkout/sessions/{id}/expire``"""
    forms.only(params, ())
    session = state.get("checkout.session", session_id, "session")
    if session["status"] != "open":
        raise invalid(
            'Only Checkout Sessions with a status in ["open"] can be expired. This Checkout '
            f"Session has a status of {session['status']}."
        )
    _expire(state, session)
    return session


def sweep(state: State) -> None:
    """Expire every open session whose time is over on the fake's clock."""
    now = state.now_s()
    for session in list(state.tables["checkout.session"].values()):
        if session["status"] == "open" and session["expires_at"] <= now:
            _expire(state, session)


def _expire(state: State, session: Object) -> None:
    session.update(status="expired", url=None)
    state.emit("checkout.session.expired", session)


def pay_by_card(state: State, session: Object, number: str, email: str | None) -> Object:
    """A person sends the card form. The session completes, or its intent waits for 3-D Secure.

    ``StripeError`` 402 on a decline: the session stays open and the person may try again.
    """
    intent = _intent(state, session, email)
    intent["payment_method"] = new_card(state, number)["id"]
    confirm(state, intent, off_session=False)
    if intent["status"] == "succeeded":
        _complete(state, session, "paid")
    return intent


def pay_by_bank(state: State, session: Object, number: str, email: str | None) -> Object:
    """A person sends the bank form: the session completes unpaid, the debit settles later."""
    if "us_bank_account" not in session["payment_method_types"]:
        raise invalid("This session does not take bank accounts.", "payment_method_types")
    intent = _intent(state, session, email)
    intent["payment_method"] = new_bank_account(state, number)["id"]
    confirm(state, intent, off_session=False)
    _complete(state, session, "unpaid")
    return intent


def finish_authentication(state: State, intent: Object, *, passed: bool) -> Object | None:
    """The 3-D Secure page was answered; the session of this intent, if it has one."""
    session = session_of(state, intent["id"])
    if session is not None and session["status"] != "open":
        raise invalid("This Checkout Session is no longer open.")
    authenticated(state, intent, passed=passed)
    if session is not None and intent["status"] == "succeeded":
        _complete(state, session, "paid")
    return session


def settle_intent(state: State, intent_id: str, outcome: str | None) -> Object:
    """The bank answers: also the session's ``async_payment_succeeded`` or ``…_failed``."""
    intent = state.get("payment_intent", intent_id)
    result = settle(state, intent, outcome)
    session = session_of(state, intent_id)
    if session is not None:
        if result == "succeeded":
            session["payment_status"] = "paid"
        state.emit(f"checkout.session.async_payment_{result}", session)
    return intent


def session_of(state: State, intent_id: str) -> Object | None:
    """The session that this payment intent belongs to."""
    for session in state.tables["checkout.session"].values():
        if session["payment_intent"] == intent_id or session.get("_intent") == intent_id:
            return session
    return None


def _intent(state: State, session: Object, email: str | None) -> Object:
    sweep(state)
    if session["status"] != "open":
        raise StripeError(
            400, "invalid_request_error", f"This Checkout Session is {session['status']}."
        )
    session["_email"] = email or session["customer_email"]
    if session.get("_intent"):  # a second try after a decline uses the same payment intent
        return state.get("payment_intent", session["_intent"])
    intent = new_intent(
        state,
        session["amount_total"],
        session["currency"],
        metadata=dict(session["_intent_metadata"]),
        description=session["_description"],
        customer=session["customer"],
        method_types=list(session["payment_method_types"]),
    )
    session["_intent"] = intent["id"]
    return intent


def _complete(state: State, session: Object, payment_status: str) -> None:
    session.update(
        status="complete",
        payment_status=payment_status,
        payment_intent=session["_intent"],
        url=None,
        customer_details={"email": session["_email"], "name": None, "address": None, "phone": None},
    )
    state.emit("checkout.session.completed", session)


def line_items(state: State, session_id: str) -> list[Object]:
    """``GET /v1/checkout/sessions/{id}/line_items``"""
    session = state.get("checkout.session", session_id, "session")
    return [
        {
            "id": f"li_{session_id[8:]}{position}",
            "object": "item",
            **{key: value for key, value in item.items() if key != "detail"},
        }
        for position, item in enumerate(session["_items"])
    ]
