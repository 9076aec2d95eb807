"""The 402: every way to pay, for x402 v2 and v1 clients at once.

v2 clients read the PAYMENT-REQUIRED header, v1 clients the body, programs the problem members
beside it. Building one writes nothing: no row, no Stripe session, no call to a chain.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Sequence
from json import dumps, loads
from typing import Any, Final

from gateway.errors import NextAction, Problem
from gateway.money import format_credits, format_usd
from gateway.payments import offers, payout, receipts, two_step
from gateway.payments.wire import DECLARED, DECLARED_PERMITS
from gateway.settings import Settings

_AFTERWARDS: Final = (
    " Sign for that (x402 upto): what it comes to is transferred after it, and no more. Or sign "
    "the request, and it is taken from your credits."
)


def for_call(
    settings: Settings,
    keys: offers.Keys,
    asked: offers.Asked,
    now_s: int,
    *,
    balance_units: int | None = None,
    needed_units: int | None = None,
    at_most: bool = False,
    description: str = "",
    refusal: Problem | None = None,
    extensions: str = "",
    floors: offers.Floors = (),
) -> Problem:
    """The 402 of a priced route.

    ``balance_units`` is what the identified caller has (None: nobody is identified), and
    ``needed_units`` what the call may cost, if that is more than its price now. ``at_most``: the
    price is the most it can cost, and what it does not use stays the payer's. ``refusal`` is a
    payment that was just refused: its code and words are kept, and the offers come anew.
    ``extensions``: those of x402 v2, as JSON text. ``floors``: below which nothing is offered now.
    """
    needed = needed_units if needed_units is not None else asked.price_units
    shortfall = max(needed - (balance_units or 0), 0)
    terms = offers.terms_for_asked(settings, asked, needed, shortfall, floors)
    usual = offers.terms_for_asked(settings, asked, needed, shortfall) if floors else terms
    cost = f"This call costs {'at most ' if at_most else ''}{_both(settings, needed)}."
    if asked.upto:
        cost += _AFTERWARDS
    elif at_most:
        cost += " So much is held before it; what it does not use stays the payer's credits."
    if balance_units is None:
        code = "payment_required"
        words = cost
        if not asked.upto:
            words += (
                " Pay with one of the offers, or sign the request. Credits of the paying wallet "
                "that cover it are used first: then nothing is transferred."
            )
        if any(each.method == offers.PERMIT2 for each in terms):
            words += " What is signed for Permit2 is always transferred."
    else:
        code = "insufficient_credits"
        words = f"{cost} The balance is {_both(settings, balance_units)}."
    if terms and terms[0].amount_units > needed:
        change = terms[0].amount_units - needed
        words += (
            f" The smallest payment settled is {format_usd(terms[0].amount_units)}: what the call "
            f"leaves of it, {_both(settings, change)}, stays as the payer's credits."
        )
    withheld = _withheld(usual, floors)
    words += _dear(settings, withheld)
    problem = _challenge(
        settings, keys, asked, now_s, terms, code, words, description, refusal, extensions
    )
    if withheld:
        problem.members |= {"withheld": withheld, "pay": _ways(settings, usual)}
    problem.members["credits"] = {
        "price": format_credits(needed, settings.credits.per_usd),
        "price_units": needed,
        "balance": format_credits(balance_units or 0, settings.credits.per_usd),
        "balance_units": balance_units or 0,
        "shortfall": format_credits(shortfall, settings.credits.per_usd),
        "shortfall_units": shortfall,
        "at_most": at_most,
        "per_usd": settings.credits.per_usd,
    }
    return problem


def for_credits(
    settings: Settings,
    keys: offers.Keys,
    asked: offers.Asked,
    now_s: int,
    amount_units: int,
    *,
    refusal: Problem | None = None,
    floors: offers.Floors = (),
) -> Problem:
    """The 402 of ``credits/purchase``: exactly the amount that was asked for.

    Its body has all of it, for clients that neither read nor set header fields. ``floors``: below
    which nothing is offered now.
    """
    usual = offers.terms_for_credits(settings, amount_units)
    terms = offers.terms_for_credits(settings, amount_units, floors) if floors else usual
    withheld = _withheld(usual, floors)
    words = f"{_both(settings, amount_units)} to buy: pay with one of the offers."
    permits = any(each.method == offers.PERMIT2 and each.chain.eip2612 for each in terms)
    words += _dear(settings, withheld)
    problem = _challenge(
        settings,
        keys,
        asked,
        now_s,
        terms,
        "payment_required",
        words,
        "Credits",
        refusal,
        f"{{{DECLARED},{DECLARED_PERMITS}}}" if permits else f"{{{DECLARED}}}",
    )
    problem.members["refund_policy"] = payout.policy(settings)
    if withheld:
        problem.members |= {"withheld": withheld, "pay": _ways(settings, usual)}
    required = loads(b64decode(problem.headers["PAYMENT-REQUIRED"]))
    problem.members["payment_required"] = required
    if required["accepts"]:  # each offer's own token is one too (two_step.py)
        problem.members[two_step.ID] = required["accepts"][0]["extra"]["offer"]
    with_header = problem.next_actions[0]
    in_body = (
        "the same JSON with that payment as the object paymentPayload beside it: no header field "
        "is needed, and the offers of x402 v2 are in payment_required too"
    )
    payload = {"paymentPayload": "<the signed payment>"}
    by_body = NextAction("POST", with_header.url, in_body, with_header.do, body=payload)
    problem.next_actions = (with_header, by_body)
    return problem


def _withheld(usual: Sequence[offers.Terms], floors: offers.Floors) -> list[dict[str, Any]]:
    """What is not offered now although it usually is, because of what gas costs. A transfer that
    the payer sends itself (``pay.usdc``) is taken all the same: its gas is the payer's."""
    dear = {
        each.chain.caip2
        for each in usual
        if each.amount_units < offers.floor_units(floors, each.chain.caip2, each.method)
    }
    return [
        {
            "network": caip2,
            "reason": "gas_price",
            "below_usd": format_usd(units),
            "below_units": units,
        }
        for caip2, units in floors
        if caip2 in dear
    ]


def _dear(settings: Settings, withheld: Sequence[dict[str, Any]]) -> str:
    """The same in words, for whoever is shown the offers that are left."""
    return "".join(
        f" Gas is dear on {settings.chain(each['network']).name} now: payments below "
        f"{each['below_usd']} are not settled there until it is cheaper."
        for each in withheld
    )


def _both(settings: Settings, units: int) -> str:
    return f"{format_credits(units, settings.credits.per_usd)} credits ({format_usd(units)})"


def _challenge(  # noqa: PLR0917  (one call site each, all parts of one answer)
    settings: Settings,
    keys: offers.Keys,
    asked: offers.Asked,
    now_s: int,
    terms: Sequence[offers.Terms],
    code: str,
    words: str,
    description: str,
    refusal: Problem | None,
    extensions: str = "",
) -> Problem:
    expiry_s = now_s + settings.server.offer_timeout_s
    url = settings.server.public_url + asked.target.decode("ascii")
    error = words if refusal is None else f"{refusal.code}: {refusal.detail}"
    tokens = offers.seal(keys, asked, terms, expiry_s)
    accepts = ",".join(map(offers.requirements, terms, tokens))
    if settings.server.sign_offers:
        extensions = _with_signed(keys, url, terms, expiry_s, extensions)
    extended = f',"extensions":{extensions}' if extensions else ""
    required = (
        f'{{"x402Version":2,"error":{dumps(error)},"resource":{{"url":{dumps(url)},'
        f'"description":{dumps(description)},"mimeType":"application/json"}},'
        f'"accepts":[{accepts}]{extended}}}'
    )
    # What is paid after the call does not exist in v1.
    v1s = (each for each in terms if each.chain.network.v1_name and each.method != offers.UPTO)
    v1 = next(v1s, None)
    members: dict[str, Any] = {
        "x402Version": 1,
        "error": error,
        "accepts": [offers.requirements_v1(v1, url, description)] if v1 is not None else [],
        "pay": _ways(settings, terms),
    }
    if refusal is None:
        problem = Problem(code, words)
    else:
        problem = Problem(refusal.code, refusal.detail, headers=refusal.headers)
        members = {**refusal.members, **members}
    problem.members.update(members)
    problem.headers["PAYMENT-REQUIRED"] = b64encode(required.encode()).decode()
    problem.next_actions = _next(settings, asked, refusal)
    return problem


def _with_signed(
    keys: offers.Keys, url: str, terms: Sequence[offers.Terms], expiry_s: int, extensions: str
) -> str:
    """``extensions`` with the signed form of the offers for what is asked; packs beside a call are
    left out, since all of it is header."""
    found = [
        (
            index,
            receipts.Offer(
                url,
                each.chain.caip2,
                each.asset,
                each.pay_to,
                each.amount_units,
                expiry_s,
                each.scheme,
            ),
        )
        for index, each in enumerate(terms)
        if each.purpose == terms[0].purpose
    ]
    if not found:
        return extensions
    made = dumps(receipts.signed_offers(keys, found), separators=(",", ":"))
    return f"{extensions[:-1]},{made[1:]}" if extensions else made


def _ways(settings: Settings, terms: Sequence[offers.Terms]) -> dict[str, Any]:
    """Where else to pay: for people, and for programs that read JSON instead of headers."""
    base = settings.server.public_url
    ways: dict[str, Any] = {"purchase": f"{base}/farebox/v1/credits/purchase"}
    if settings.stripe.enabled:
        ways["card"] = f"{base}/farebox/buy"
    if terms:
        first = terms[0]
        ways["usdc"] = {
            "network": first.chain.caip2,
            "asset": first.asset,
            "pay_to": first.pay_to,
            "amount_units": first.amount_units,
        }
    return ways


# Another payment of the same wallet would be refused for the same reason.
_FOR_NOW: Final = frozenset(("insufficient_funds", "payer_blocked", "asset_paused"))


def _next(
    settings: Settings, asked: offers.Asked, refusal: Problem | None
) -> tuple[NextAction, ...]:
    base = settings.server.public_url
    url = base + asked.target.decode("ascii")
    do = "decide" if refusal is not None and refusal.code in _FOR_NOW else "pay"
    return (
        NextAction(
            asked.method,
            url,
            "the same request with PAYMENT-SIGNATURE: a signed payment for one of the offers in "
            "PAYMENT-REQUIRED (x402 v2), or X-PAYMENT for the one in this body (v1)",
            do,
            {"PAYMENT-SIGNATURE": "<base64 of the signed payment>"},
        ),
        NextAction(
            "POST",
            f"{base}/farebox/v1/credits/purchase",
            'buy credits first: {"amount_usd": "1"}, then sign this request (ERC-8128)',
            "buy",
            body={"amount_usd": "1"},
        ),
    )
