"""Money going back: refunds (also ones that fail later) and disputes.

Source: Stripe API reference, "Refunds" and "Disputes"; documentation "How disputes work".
``amount_refunded`` of a charge is cumulative, and falls again when a refund fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.demo.fakestripe import forms
from gateway.demo.fakestripe.errors import invalid
from gateway.demo.fakestripe.state import Object, State

REASONS = ("duplicate", "fraudulent", "requested_by_customer")
OUTCOMES = ("won", "lost", "warning_closed", "prevented")


def create_refund(state: State, params: Mapping[str, Any]) -> Object:
    """``POST /v1/refunds``"""
    forms.only(params, ("charge", "payment_intent", "amount", "reason", "metadata"))
    charge = _charge_of(state, params)
    if charge["disputed"]:
        raise invalid(f"Charge {charge['id']} has been charged back.", code="charge_disputed")
    left = charge["amount_captured"] - charge["amount_refunded"]
    amount = forms.integer(params, "amount", least=1)
    amount = left if amount is None else amount
    if left == 0:
        raise invalid(
            f"Charge {charge['id']} has already been refunded.", code="charge_already_refunded"
        )
    if amount > left:
        raise invalid(
            f"Refund amount (${amount / 100:.2f}) is greater than unrefunded amount on charge "
            f"(${left / 100:.2f})",
            "amount",
        )
    refund = state.new(
        "refund",
        {
            "amount": amount,
            "balance_transaction": None,
            "charge": charge["id"],
            "currency": charge["currency"],
            "metadata": forms.metadata(params),
            "payment_intent": charge["payment_intent"],
            "reason": forms.one_of(params, "reason", REASONS),
            "receipt_number": None,
            "status": "succeeded",
        },
    )
    charge["amount_refunded"] += amount
    charge["refunded"] = charge["amount_refunded"] == charge["amount_captured"]
    state.emit("refund.created", refund)
    state.emit("charge.refunded", charge)
    return refund


def fail_refund(state: State, refund_id: str) -> Object:
    """The customer's bank sends a refund back (a control, not an API call)."""
    refund = state.get("refund", refund_id)
    if refund["status"] != "succeeded":
        raise invalid(f"This refund is {refund['status']}.")
    charge = state.get("charge", refund["charge"])
    refund.update(status="failed", failure_reason="expired_or_canceled_card")
    charge["amount_refunded"] -= refund["amount"]
    charge["refunded"] = False
    state.emit("refund.updated", refund)
    state.emit("refund.failed", refund)
    return refund


def open_dispute(
    state: State, charge_id: str, amount: int | None, reason: str, *, inquiry: bool
) -> Object:
    """The cardholder's bank disputes a charge (a control). An inquiry moves no money."""
    charge = state.get("charge", charge_id)
    if charge["status"] != "succeeded" or charge["disputed"]:
        raise invalid("This charge cannot be disputed.")
    charge["disputed"] = True
    dispute = state.new(
        "dispute",
        {
            "amount": charge["amount"] if amount is None else amount,
            "balance_transactions": [],
            "charge": charge_id,
            "currency": charge["currency"],
            "evidence": {},
            "evidence_details": {"due_by": state.now_s() + 7 * 86400, "submission_count": 0},
            "is_charge_refundable": inquiry,
            "metadata": {},
            "payment_intent": charge["payment_intent"],
            "reason": reason,
            "status": "warning_needs_response" if inquiry else "needs_response",
        },
    )
    state.emit("charge.dispute.created", dispute)
    if not inquiry:
        state.emit("charge.dispute.funds_withdrawn", dispute)
    return dispute


def end_dispute(state: State, dispute_id: str, outcome: str) -> Object:
    """The bank's decision: ``won`` brings the money back, ``lost`` does not."""
    dispute = state.get("dispute", dispute_id, "dispute")
    if dispute["status"] in OUTCOMES:
        raise invalid("This dispute is already closed.", code="dispute_closed")
    if outcome not in OUTCOMES:
        raise invalid(f"A dispute ends in one of: {', '.join(OUTCOMES)}.", "status")
    if (outcome == "warning_closed") != dispute["status"].startswith("warning"):
        raise invalid("Only an inquiry ends in warning_closed.", "status")
    dispute["status"] = outcome
    state.emit("charge.dispute.closed", dispute)
    if outcome == "won":
        state.emit("charge.dispute.funds_reinstated", dispute)
    return dispute


def close_dispute(state: State, dispute_id: str, params: Mapping[str, Any]) -> Object:
    """``POST /v1/disputes/{id}/close``: the merchant gives in."""
    forms.only(params, ())
    return end_dispute(state, dispute_id, "lost")


def submit_evidence(state: State, dispute_id: str, params: Mapping[str, Any]) -> Object:
    """``POST /v1/disputes/{id}``"""
    forms.only(params, ("evidence", "metadata", "submit"))
    dispute = state.get("dispute", dispute_id, "dispute")
    if dispute["status"] in OUTCOMES:
        raise invalid("This dispute is already closed.", code="dispute_closed")
    dispute["evidence"] = {**dispute["evidence"], **forms.mapping(params, "evidence")}
    dispute["metadata"] = {**dispute["metadata"], **forms.metadata(params)}
    if params.get("submit", "true") == "true" and dispute["evidence"]:
        warning = dispute["status"].startswith("warning")
        dispute["status"] = "warning_under_review" if warning else "under_review"
        dispute["evidence_details"]["submission_count"] += 1
    state.emit("charge.dispute.updated", dispute)
    return dispute


def _charge_of(state: State, params: Mapping[str, Any]) -> Object:
    charge_id = forms.text(params, "charge")
    intent_id = forms.text(params, "payment_intent")
    if charge_id is None and intent_id is None:
        raise invalid("One of the following params should be provided: payment_intent or charge.")
    if charge_id is None and intent_id is not None:
        intent = state.get("payment_intent", intent_id, "payment_intent")
        charge_id = intent["latest_charge"]
        if intent["status"] != "succeeded":
            raise invalid("This PaymentIntent does not have a successful charge to refund.")
    charge = state.get("charge", charge_id or "", "charge")
    if charge["status"] != "succeeded":
        raise invalid(f"Charge {charge['id']} has not succeeded.", "charge")
    return charge
