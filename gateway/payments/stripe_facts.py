"""What Stripe's events say about one payment of ours. Pure: no clock, no network, no database.

``facts`` reads an event; ``fold`` turns all facts known about a payment into one ``Picture`` of
what it should be. Stripe delivers at least once and in any order, so nothing here depends on the
order: ``fold`` is a function of the *set* of facts, and a fact counted twice counts once. The
caller stores each fact once under its event id and folds all of them every time.

Amounts and currency come from Stripe's objects only; ``metadata`` and ``client_reference_id``
carry our payment id to find the row, nothing else.

Sources: Stripe documentation "Fulfil orders", "Refunds", "How disputes work"; API reference for
the objects checkout.session, payment_intent, charge, refund, dispute.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from gateway.errors import Problem

METADATA_KEY: Final = "farebox_payment"
CURRENCY: Final = "usd"
UNITS_PER_CENT: Final = 10_000

Kind = Literal["paid", "processing", "expired", "failed", "refund", "refund_total", "dispute"]

# Every event type that ``facts`` understands; what a webhook endpoint should subscribe to.
EVENT_TYPES: Final[tuple[str, ...]] = (
    "charge.dispute.closed",
    "charge.dispute.created",
    "charge.dispute.funds_reinstated",
    "charge.dispute.funds_withdrawn",
    "charge.dispute.updated",
    "charge.refund.updated",
    "charge.refunded",
    "checkout.session.async_payment_failed",
    "checkout.session.async_payment_succeeded",
    "checkout.session.completed",
    "checkout.session.expired",
    "payment_intent.succeeded",
    "refund.created",
    "refund.failed",
    "refund.updated",
)

_REFUND_TYPES: Final = frozenset(
    {"refund.created", "refund.updated", "refund.failed", "charge.refund.updated"}
)


@dataclass(frozen=True, slots=True)
class Event:
    """A message of Stripe whose signature was verified, in plain types."""

    id: str
    type: str
    created_s: int
    livemode: bool
    account: str | None  # only on events of connected accounts
    object: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing Stripe said. ``amount_cents`` is in the smallest unit of ``currency``.

    ``object_id``: the refund or dispute it is about. ``state``: the refund's status, or what
    happened to the dispute.
    """

    kind: Kind
    created_s: int
    livemode: bool
    account: str | None
    payment_id: str | None
    session_id: str | None
    payment_intent: str | None
    charge: str | None
    object_id: str
    amount_cents: int
    currency: str
    state: str

    def dump(self) -> str:
        """As JSON text, for a column."""
        return json.dumps(asdict(self), separators=(",", ":"))


def load(text: str) -> Fact:
    """A fact out of ``Fact.dump``."""
    return Fact(**json.loads(text))


def facts(event: Event) -> tuple[Fact, ...]:
    """The facts in an event; none for a type that does not concern us.

    Raises ``Problem("invalid_payload")`` for an object that lacks what its type must have.
    """
    kind, _, rest = event.type.partition(".")
    if kind == "checkout":
        return _of_session(event, rest)
    if event.type == "charge.refunded":
        return (_fact(event, "refund_total", "charge", amount="amount_refunded"),)
    if event.type == "payment_intent.succeeded":
        return (_fact(event, "paid", "payment_intent", amount="amount_received"),)
    status = _text(event.object, "status") or ""
    if event.type in _REFUND_TYPES:
        return (_fact(event, "refund", "refund", state=status or "pending"),)
    if event.type.startswith("charge.dispute."):
        state = _dispute_state(rest.removeprefix("dispute."), status)
        return (_fact(event, "dispute", "dispute", state=state),)
    return ()


def session_facts(session: Mapping[str, Any]) -> tuple[Fact, ...]:
    """The facts in a Checkout Session that was read, with its payment intent expanded.

    For the return page and for reconciling: the same facts as the events would bring.
    """
    intent = session.get("payment_intent")
    failed = isinstance(intent, dict) and intent.get("status") == "requires_payment_method"
    name = {"complete": "completed", "expired": "expired"}.get(str(session.get("status")), "")
    if name == "completed" and session.get("payment_status") == "unpaid" and failed:
        name = "async_payment_failed"
    created_s, livemode = _whole(session, "created"), session.get("livemode") is True
    event = Event("", f"checkout.session.{name}", created_s, livemode, None, session)
    return _of_session(event, f"session.{name}")


def _of_session(event: Event, name: str) -> tuple[Fact, ...]:
    if event.object.get("mode") != "payment":  # setup and subscription are somebody else's
        return ()
    kinds: dict[str, Kind] = {
        "session.completed": "processing",
        "session.async_payment_succeeded": "paid",
        "session.async_payment_failed": "failed",
        "session.expired": "expired",
    }
    kind = kinds.get(name)
    if kind is None:
        return ()
    if name == "session.completed" and event.object.get("payment_status") == "paid":
        kind = "paid"
    return (_fact(event, kind, "checkout.session", amount="amount_total"),)


def _dispute_state(name: str, status: str) -> str:
    """What happened: inquiry, opened, withdrawn, reinstated, won, lost or closed."""
    if name in {"funds_withdrawn", "funds_reinstated"}:
        return name.removeprefix("funds_")
    if status in {"won", "lost"}:
        return status
    if status in {"warning_closed", "prevented"}:
        return "closed"
    return "inquiry" if status.startswith("warning") else "opened"


def _fact(event: Event, kind: Kind, about: str, *, amount: str = "amount", state: str = "") -> Fact:
    found = event.object
    if found.get("object") != about:
        raise Problem("invalid_payload", f"{event.type} does not hold a {about}")
    own = _text(found, "id")
    if not own:
        raise Problem("invalid_payload", f"{event.type} holds a {about} without an id")
    metadata = found.get("metadata")
    payment_id = metadata.get(METADATA_KEY) if isinstance(metadata, dict) else None
    if about == "checkout.session":
        payment_id = payment_id or found.get("client_reference_id")
    return Fact(
        kind=kind,
        created_s=event.created_s,
        livemode=event.livemode,
        account=event.account,
        payment_id=payment_id if isinstance(payment_id, str) else None,
        session_id=own if about == "checkout.session" else None,
        payment_intent=own if about == "payment_intent" else _text(found, "payment_intent"),
        charge=own if about == "charge" else _text(found, "charge"),
        object_id=own if about in {"refund", "dispute"} else "",
        amount_cents=_whole(found, amount),
        currency=(_text(found, "currency") or "").lower(),
        state=state,
    )


def _text(found: Mapping[str, Any], name: str) -> str | None:
    """A string member, or the id of the object that was expanded in its place."""
    value = found.get(name)
    if isinstance(value, dict):
        value = value.get("id")
    return value if isinstance(value, str) else None


def _whole(found: Mapping[str, Any], name: str) -> int:
    value = found.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 10**12:
        raise Problem("invalid_payload", f"{name} is not a whole number")
    return value


# --- all facts of one payment ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Expected:
    """Our payment row and our Stripe account: what a fact must fit to count."""

    payment_id: str
    session_id: str | None  # None: the answer that named it was lost
    amount_units: int
    livemode: bool
    account: str | None = None


@dataclass(frozen=True, slots=True)
class Picture:
    """What a payment should be now.

    ``state``: a state of the payment table. ``reason`` of a failure: ``expired`` or ``declined``.
    ``paid_units``: what Stripe received, the amount to mint, once, under ``payment_intent``.
    ``reversed_units``: how much of it must be taken back in all (refunds and lost disputes), never
    more than was paid. ``frozen``: a dispute is open, the rest of the lot must not be spent.
    ``notes``: what does not fit and wants an operator's eye; such facts were not counted.
    """

    state: Literal["created", "processing", "succeeded", "failed", "refunded", "disputed"]
    reason: str
    payment_intent: str | None
    paid_units: int
    reversed_units: int
    frozen: bool
    notes: tuple[str, ...]


def fold(known: Iterable[Fact], expected: Expected) -> Picture:
    """One picture out of all facts about a payment, whatever their order and number.

    Everything below takes a maximum, a minimum or an "any" over facts, by the id they are about:
    that is what makes order and repetition irrelevant.
    """
    notes: set[str] = set()
    fitting = []
    for fact in known:
        odd = _misfit(fact, expected)
        if odd:
            notes.add(odd)
        else:
            fitting.append(fact)
    intent, paid_cents = _paid(fitting, expected, notes)
    # without a payment intent of our own, a refund or dispute has nothing it could belong to
    after = [fact for fact in fitting if intent and fact.payment_intent == intent]
    if any(fact.kind in _AFTER and fact not in after for fact in fitting):
        notes.add("refund_or_dispute_without_payment")
    refunded = _refunded(after)
    taken, frozen = _disputed(after)
    back = refunded + taken
    if any(fact.kind in _AFTER and fact.currency != CURRENCY for fact in after):
        notes.add("reversal_in_other_currency")
        back = paid_cents  # the amount cannot be compared: take back everything, and say so
    paid_units = paid_cents * UNITS_PER_CENT
    reversed_units = min(back * UNITS_PER_CENT, paid_units)
    state, reason = _state(fitting, paid_units, reversed_units, disputed=frozen or taken > 0)
    return Picture(state, reason, intent, paid_units, reversed_units, frozen, tuple(sorted(notes)))


_AFTER: Final = frozenset({"refund", "refund_total", "dispute"})


def _misfit(fact: Fact, expected: Expected) -> str:
    """Why a fact is not about this payment; empty if it is."""
    if fact.livemode != expected.livemode:
        return "other_mode"
    if fact.account is not None and fact.account != expected.account:
        return "other_account"
    if fact.payment_id is not None and fact.payment_id != expected.payment_id:
        return "other_payment"
    if fact.session_id and expected.session_id and fact.session_id != expected.session_id:
        return "other_session"
    return ""


def _paid(fitting: list[Fact], expected: Expected, notes: set[str]) -> tuple[str | None, int]:
    """The payment intent that brought the money and its cents; (None, 0) if none did."""
    paid = [fact for fact in fitting if fact.kind == "paid" and fact.amount_cents > 0]
    if any(fact.currency != CURRENCY for fact in paid):
        notes.add("other_currency")
    paid = [f for f in paid if f.currency == CURRENCY and f.payment_intent and f.payment_id]
    if not paid:
        return None, 0
    intents = sorted({fact.payment_intent or "" for fact in paid})
    if len(intents) > 1:  # one session has one intent that succeeds; count one, show the rest
        notes.add("second_payment_intent")
    amounts = {fact.amount_cents for fact in paid if fact.payment_intent == intents[0]}
    if amounts != {expected.amount_units // UNITS_PER_CENT}:
        notes.add("amount_differs")
    return intents[0], min(amounts)


def _refunded(after: list[Fact]) -> int:
    """Cents refunded and not sent back by the customer's bank.

    Single refunds are exact: each has an id, and failed or cancelled is its last word. A charge's
    ``amount_refunded`` is cumulative and falls again when a refund fails, so it only fills in for
    refunds whose own event has not come yet.
    """
    refunds: dict[str, tuple[bool, int]] = {}  # id -> (failed, cents)
    totals = [fact.amount_cents for fact in after if fact.kind == "refund_total"]
    for fact in after:
        if fact.kind == "refund":
            failed, cents = refunds.get(fact.object_id, (False, 0))
            failed = failed or fact.state in {"failed", "canceled"}
            refunds[fact.object_id] = (failed, max(cents, fact.amount_cents))
    standing = sum(cents for failed, cents in refunds.values() if not failed)
    seen = sum(cents for _, cents in refunds.values())
    return standing + max(0, max(totals, default=0) - seen)


def _disputed(after: list[Fact]) -> tuple[int, bool]:
    """Cents that disputes took and did not give back; whether one is open."""
    disputes: dict[str, list[Fact]] = {}
    for fact in after:
        if fact.kind == "dispute":
            disputes.setdefault(fact.object_id, []).append(fact)
    taken, frozen = 0, False
    for about in disputes.values():
        out = max((f.created_s for f in about if f.state in {"withdrawn", "lost"}), default=-1)
        back = max((f.created_s for f in about if f.state == "reinstated"), default=-1)
        over = any(f.state in {"won", "lost", "closed", "reinstated"} for f in about)
        if out > back:  # within one second the money is back: it can only come after it went
            taken += max(fact.amount_cents for fact in about)
        elif not over and any(fact.state == "opened" for fact in about):
            frozen = True
    return taken, frozen


def _state(
    fitting: list[Fact], paid_units: int, reversed_units: int, *, disputed: bool
) -> tuple[Literal["created", "processing", "succeeded", "failed", "refunded", "disputed"], str]:
    kinds = {fact.kind for fact in fitting}
    if paid_units:
        if disputed:
            return "disputed", ""
        return ("refunded", "") if reversed_units == paid_units else ("succeeded", "")
    if "failed" in kinds:
        return "failed", "declined"
    if "expired" in kinds:
        return "failed", "expired"
    return ("processing", "") if kinds & {"processing", "paid"} else ("created", "")
