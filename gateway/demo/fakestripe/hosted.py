"""The pages a person sees: Checkout, the 3-D Secure step, the receipt. No script, own style."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from gateway.demo.fakestripe import checkout
from gateway.demo.fakestripe.errors import StripeError
from gateway.demo.fakestripe.state import Object, State

_PAGES: Final = Path(__file__).parent / "pages"

HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@lru_cache(maxsize=1)
def _templates() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(loader=FileSystemLoader(_PAGES), autoescape=True, undefined=StrictUndefined)
    made.filters["money"] = money
    return made


def money(amount: int, currency: str) -> str:
    """``1234, "usd"`` -> ``$12.34`` (cents in, text out)."""
    sign = {"usd": "$", "eur": "€", "gbp": "£"}.get(currency, "")
    whole = f"{amount // 100:,}.{amount % 100:02d}" if currency != "jpy" else f"{amount:,}"
    return f"{sign}{whole}" if sign else f"{whole} {currency.upper()}"


def _page(name: str, status: int = 200, **context: Any) -> Response:
    text = _templates().get_template(name).render(**context)
    return Response(text, status, headers=HEADERS, media_type="text/html")


def style(_request: Request) -> Response:
    """``GET /static/checkout.css``"""
    return Response(
        (_PAGES / "checkout.css").read_bytes(),
        headers={"X-Content-Type-Options": "nosniff"},
        media_type="text/css",
    )


async def session_page(state: State, request: Request) -> Response:
    """``GET`` and ``POST /c/pay/{id}``"""
    try:
        session = state.get("checkout.session", request.path_params["id"])
    except StripeError as error:
        return _page("message.html", 404, title="Not found", text=error.message, back=None)
    checkout.sweep(state)
    if session["status"] == "expired":
        return _page(
            "message.html",
            410,
            title="This page has expired",
            text="The time to pay is over. Nothing was charged.",
            back=session["cancel_url"],
        )
    if session["status"] == "complete":
        return _done(session)
    if request.method != "POST":
        return _form(session, {}, None)
    form = dict(parse_qsl((await request.body()).decode("utf-8", "replace"), max_num_fields=20))
    try:
        return _submit(state, session, form)
    except StripeError as error:
        return _form(session, form, error.message, 402)


def _submit(state: State, session: Object, form: dict[str, str]) -> Response:
    email = form.get("email", "").strip()
    if "@" not in email:
        return _form(session, form, "Enter your email address.", 400)
    if form.get("method") == "bank":
        checkout.pay_by_bank(state, session, form.get("account_number", "").strip(), email)
        return _done(session)
    number = "".join(form.get("card_number", "").split())
    if not number or not form.get("expiry") or not form.get("cvc"):
        return _form(session, form, "Your card details are incomplete.", 400)
    intent = checkout.pay_by_card(state, session, number, email)
    if intent["status"] == "requires_action":
        return RedirectResponse(f"/authenticate/{intent['id']}", 303, headers=HEADERS)
    return _done(session)


def _form(
    session: Object, form: dict[str, str], problem: str | None, status: int = 200
) -> Response:
    # card fields are not shown back: a person who is declined types another card
    kept = {"email": form.get("email") or session["customer_email"] or ""}
    kept["method"] = form.get("method", "card")
    return _page("checkout.html", status, session=session, form=kept, problem=problem)


def _done(session: Object) -> Response:
    """Back to the seller, as Checkout does."""
    url = session["success_url"].replace("{CHECKOUT_SESSION_ID}", session["id"])
    return RedirectResponse(url, 303, headers=HEADERS)


async def authenticate_page(state: State, request: Request) -> Response:
    """``GET`` and ``POST /authenticate/{intent}``: the bank asks whether it is really you."""
    try:
        intent = state.get("payment_intent", request.path_params["id"])
        session = checkout.session_of(state, intent["id"])
        if intent["status"] != "requires_action":
            if session is not None and session["status"] == "complete":
                return _done(session)
            raise StripeError(400, "invalid_request_error", "This step is over.")
        if request.method != "POST":
            return _page("authenticate.html", intent=intent)
        form = dict(parse_qsl((await request.body()).decode("utf-8", "replace"), max_num_fields=5))
        passed = form.get("answer") == "complete"
        session = checkout.finish_authentication(state, intent, passed=passed)
    except StripeError as error:
        return _page("message.html", error.status, title="Sorry", text=error.message, back=None)
    if session is None:
        return _page("message.html", title="Thank you", text="You can close this page.", back=None)
    if session["status"] == "complete":
        return _done(session)
    return _form(session, {}, intent["last_payment_error"]["message"], 402)


def receipt_page(state: State, request: Request) -> Response:
    """``GET /receipts/{intent}``"""
    try:
        intent = state.get("payment_intent", request.path_params["id"])
    except StripeError as error:
        return _page("message.html", 404, title="Not found", text=error.message, back=None)
    paid = money(intent["amount_received"], intent["currency"])
    return _page("message.html", title="Receipt", text=f"Paid {paid} (test).", back=None)
