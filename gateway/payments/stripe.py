"""Cards through Stripe Checkout: open a session, read a signed event, ask Stripe what is true.

The only module that imports the Stripe SDK, and only when it is used. It holds no state and
touches no database: ``card.py`` commits the payment, calls ``create_checkout``, stores the
session, and applies what ``stripe_facts.fold`` says.

    Refused    Stripe said no; nothing exists there, and asking again will not help
    Unknown    it may or may not have been done; call again with the same payment id

Keys and signing secrets stay out of ``repr``, errors and logs.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any, Final

from gateway.errors import Problem
from gateway.payments.stripe_facts import (
    CURRENCY,
    EVENT_TYPES,
    METADATA_KEY,
    UNITS_PER_CENT,
    Event,
    Fact,
    session_facts,
)
from wallet_auth.strict import json_object

TIMEOUT_S: Final = 20
TOLERANCE_S: Final = 300  # Stripe's own default for the age of a webhook signature
SESSION_S: Final = 3600  # how long a person has to pay; Stripe takes 30 minutes to 24 hours
LEAST_CENTS: Final = 50  # Stripe takes no smaller card payment in USD
MOST_CENTS: Final = 99_999_999
MAX_EVENTS: Final = 10_000


class CardError(Exception):
    """A call to Stripe that gave no session. ``code``: Stripe's code, or ours."""

    def __init__(self, code: str, detail: str) -> None:
        self.code = code
        self.detail = detail
        super().__init__(f"{code}: {detail}")


class Refused(CardError):  # noqa: N818  (the house's words for outcomes)
    """Stripe said no and did nothing."""


class Unknown(CardError):  # noqa: N818
    """No usable answer: it may have been done. The same call with the same id is safe."""


@dataclass(frozen=True, slots=True)
class Client:
    """A connection to one Stripe account in one mode. Make it with ``connect``."""

    livemode: bool
    sdk: Any = field(repr=False)  # stripe.StripeClient; untyped here, the import is lazy
    http: Any = field(repr=False)
    timeout_s: int = TIMEOUT_S


@dataclass(frozen=True, slots=True)
class Checkout:
    """An open Checkout Session: where the person pays."""

    session_id: str
    url: str


def connect(
    secret_key: str, *, api_base: str = "", timeout_s: int = TIMEOUT_S, retries: int = 2
) -> Client:
    """A client for a secret or restricted key. ``api_base``: another Stripe, tests only.

    Raises ``ValueError`` for a live key together with ``api_base``. Opens no connection.
    """
    livemode = secret_key.startswith(("sk_live_", "rk_live_"))
    if livemode and api_base:
        raise ValueError("a live Stripe key is never sent to another address")
    import stripe

    http = stripe.HTTPXClient(timeout=timeout_s)
    sdk = stripe.StripeClient(
        secret_key,
        base_addresses={"api": api_base} if api_base else None,
        max_network_retries=retries,
        http_client=http,
    )
    return Client(livemode, sdk, http, timeout_s)


async def close(client: Client) -> None:
    """Close the connections."""
    await client.http.close_async()


def cents_of(amount_units: int) -> int:
    """The cents of an amount; ``Problem("invalid_amount")`` if a card cannot pay exactly it."""
    cents, rest = divmod(amount_units, UNITS_PER_CENT)
    if rest or not LEAST_CENTS <= cents <= MOST_CENTS:
        raise Problem("invalid_amount", "a card pays whole cents, from $0.50 up to $999,999.99")
    return cents


async def create_checkout(
    client: Client,
    *,
    payment_id: str,
    created_s: int,
    amount_units: int,
    title: str,
    detail: str,
    success_url: str,
    cancel_url: str,
    email: str | None = None,
    three_d_secure: bool = False,
) -> Checkout:
    """Open the Checkout Session of a payment, or get the one that was opened before.

    The payment id is the idempotency key, so all arguments must be those of the first call
    (``created_s`` is the payment's own time, in seconds). The session ends an hour after that:
    Stripe forgets keys after a day, and by then this call is refused instead of opening a second
    session. ``title`` and ``detail`` are shown to the person; ``{CHECKOUT_SESSION_ID}`` in
    ``success_url`` is filled in by Stripe. ``three_d_secure``: ask the bank to check who pays.

    Raises ``Problem`` for an amount cards cannot pay, ``Refused`` or ``Unknown``.
    """
    cents = cents_of(amount_units)
    params: dict[str, Any] = {
        "mode": "payment",
        "client_reference_id": payment_id,
        "metadata": {METADATA_KEY: payment_id},
        # copied by Stripe to the payment intent and its charge: refunds are found by it
        "payment_intent_data": {"metadata": {METADATA_KEY: payment_id}, "description": title},
        "line_items": [
            {
                "quantity": 1,
                "price_data": {
                    "currency": CURRENCY,
                    "unit_amount": cents,
                    "product_data": {"name": title, "description": detail},
                },
            }
        ],
        "adaptive_pricing": {"enabled": False},  # what is paid is what is minted: dollars
        "success_url": success_url,
        "cancel_url": cancel_url,
        "expires_at": created_s + SESSION_S,
    }
    if email:
        params["customer_email"] = email
    if three_d_secure:
        params["payment_method_options"] = {"card": {"request_three_d_secure": "any"}}
    call = client.sdk.v1.checkout.sessions.create_async(params, {"idempotency_key": payment_id})
    session = await _ask(client, call)
    url, total, currency = session.get("url"), session.get("amount_total"), session.get("currency")
    if not url or total != cents or currency != CURRENCY:
        raise Unknown("unexpected_answer", "Stripe opened a session other than the one asked for")
    return Checkout(session["id"], url)


async def read_session(client: Client, session_id: str) -> tuple[Fact, ...]:
    """What Stripe says about a session now. Raises ``Refused`` (there is none) or ``Unknown``."""
    call = client.sdk.v1.checkout.sessions.retrieve_async(
        session_id, {"expand": ["payment_intent"]}
    )
    return session_facts(await _ask(client, call))


async def expire_session(client: Client, session_id: str) -> None:
    """Close an open session so that it cannot be paid any more. Raises as ``read_session``."""
    await _ask(client, client.sdk.v1.checkout.sessions.expire_async(session_id))


async def events_since(client: Client, created_s: int) -> list[Event]:
    """Every event of the types we understand since a time, oldest first, for reconciling.

    Stripe keeps events for 30 days. Raises ``Unknown`` beyond ``MAX_EVENTS`` or ``Refused``.
    """
    events: list[Event] = []
    after: dict[str, str] = {}
    while len(events) < MAX_EVENTS:
        params = {"limit": 100, "created": {"gte": created_s}, "types": EVENT_TYPES, **after}
        page = await _ask(client, client.sdk.v1.events.list_async(params))
        events += [_event(found) for found in page["data"]]
        if not page["has_more"]:
            return events[::-1]
        after = {"starting_after": events[-1].id}
    raise Unknown("too_many_events", f"more than {MAX_EVENTS} events: ask for a shorter time")


async def _ask(client: Client, call: Any) -> dict[str, Any]:
    """Await an SDK call within the deadline; its answer as plain types."""
    import stripe

    try:
        async with asyncio.timeout(client.timeout_s):
            answer = await call
    except TimeoutError:
        raise Unknown("timeout", "Stripe did not answer in time") from None
    except (stripe.AuthenticationError, stripe.PermissionError):
        # Stripe's message repeats parts of the key
        raise Refused("stripe_key_refused", "Stripe does not accept our key for this") from None
    except (stripe.InvalidRequestError, stripe.CardError) as error:
        detail = error.user_message or "Stripe refused the request"
        raise Refused(error.code or "invalid_request", detail) from None
    except stripe.StripeError as error:
        # Timeouts, 5xx, 429, 409 (the same key still runs). Also an idempotency error: the key
        # was used with other parameters, so a session exists that could still be paid.
        raise Unknown(error.code or _snake(error), "Stripe gave no usable answer") from None
    plain: dict[str, Any] = answer.to_dict()
    return plain


def _snake(error: Exception) -> str:
    name = type(error).__name__
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


# --- webhooks -------------------------------------------------------------------------------


def parse_event(
    payload: bytes, header: str | None, secret: str, tolerance_s: int = TOLERANCE_S
) -> Event:
    """The event in a webhook's body, its signature and age verified on the raw bytes.

    Raises ``Problem("invalid_webhook_signature")`` for a wrong, missing, old or future signature
    and ``Problem("invalid_payload")`` for a signed body that is no snapshot event.
    """
    import stripe

    if tolerance_s <= 0:
        raise ValueError("the SDK checks no age at all with a tolerance of 0")
    wrong = Problem("invalid_webhook_signature", "the signature is wrong, missing or too old")
    try:
        stripe.WebhookSignature.verify_header(payload, header, secret, tolerance_s)
    except (stripe.SignatureVerificationError, UnicodeError):
        raise wrong from None
    # verified, so the header has a timestamp; the SDK looks only for one that is too old
    stamps = [part[2:] for part in (header or "").split(",") if part.startswith("t=")]
    if len(stamps) != 1 or int(stamps[0]) > time.time() + tolerance_s:
        raise wrong
    try:
        found = json_object(payload)
    except ValueError as error:
        raise Problem("invalid_payload", f"the event is {error}") from None
    return _event(found)


def _event(found: dict[str, Any]) -> Event:
    if found.get("object") != "event":
        raise Problem("invalid_payload", "this is not a snapshot event")
    data = found.get("data")
    about = data.get("object") if isinstance(data, dict) else None
    created, account = found.get("created"), found.get("account")
    shapes = (
        isinstance(found.get("id"), str) and 0 < len(found["id"]) <= 255,
        isinstance(found.get("type"), str),
        isinstance(created, int) and not isinstance(created, bool) and created >= 0,
        isinstance(found.get("livemode"), bool),
        account is None or isinstance(account, str),
    )
    if not isinstance(about, dict) or not all(shapes):
        raise Problem("invalid_payload", "the event lacks what every event has")
    return Event(found["id"], found["type"], found["created"], found["livemode"], account, about)
