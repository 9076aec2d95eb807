"""The 402 as a page: a browser that opens a priced address sees the price and both ways to pay.

The header fields of the 402 stay as they are: agents that drive a browser read those.
"""

from __future__ import annotations

import base64
import json
from typing import Any, Final

from starlette.responses import Response

from gateway.errors import Problem
from gateway.money import format_credits, format_usd
from gateway.settings import Settings
from gateway.web import pages, shop

MAX_URL_SHOWN: Final = 300


def wants_page(accept: str) -> bool:
    """Whether an ``Accept`` field asks for HTML by name, and no less than for JSON.

    ``*/*`` alone is a program. RFC 9110 section 12.5.1; a malformed weight counts as 0.
    """
    if "text/html" not in accept.lower():
        return False
    weights: dict[str, float] = {}
    for part in accept.split(",")[:50]:
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        weights[name] = _weight(parameters)
    html = weights.get("text/html", 0.0)
    return html > 0 and html >= weights.get("application/json", 0.0)


def _weight(parameters: list[str]) -> float:
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                return min(max(float(parameter[2:]), 0.0), 1.0)
            except ValueError:
                return 0.0
    return 1.0


def payment_required(settings: Settings, problem: Problem, method: str, target: str) -> Response:
    """The page of a 402 made by ``payments/challenge.py``, for ``method`` and raw ``target``."""
    found = problem.members.get("credits")
    cost = found if isinstance(found, dict) else {}
    offers = _offers(problem)
    units = cost.get("price_units", offers[0]["units"] if offers else 0)
    url = settings.server.public_url + target
    snippet = (
        "import os, httpx\n"
        "from wallet_auth.agent import WalletAuth\n\n"
        'with httpx.Client(auth=WalletAuth(os.environ["PRIVATE_KEY"])) as agent:\n'
        f"    answer = agent.request({json.dumps(method)}, {json.dumps(url)})\n"
        "    print(answer.text)"
    )
    short = len(url) <= MAX_URL_SHOWN
    page = pages.render(
        "payment_required.html",
        status=problem.status,
        **shop.frame(settings),
        price_usd=format_usd(units),
        price_credits=format_credits(units, settings.credits.per_usd),
        detail=problem.detail,
        method=method,
        url=url if short else url[:MAX_URL_SHOWN] + "…",
        card_url="/farebox/buy" if settings.stripe.enabled else None,
        offers=[{**offer, "network": _name(settings, offer["network"])} for offer in offers],
        snippet=snippet if short else None,
    )
    for name, value in problem.headers.items():
        if name.lower() not in {"content-type", "content-length"}:
            page.headers[name] = value
    page.headers["Vary"] = "Accept"
    return page


def _offers(problem: Problem) -> list[dict[str, Any]]:
    """Amount and network of each offer in our own PAYMENT-REQUIRED header."""
    header = {name.lower(): value for name, value in problem.headers.items()}
    encoded = header.get("payment-required")
    if encoded is None:
        return []
    accepts = json.loads(base64.b64decode(encoded))["accepts"]
    return [
        {"units": int(o["amount"]), "usd": format_usd(int(o["amount"])), "network": o["network"]}
        for o in accepts
    ]


def _name(settings: Settings, caip2: str) -> str:
    for chain in settings.chains:
        if chain.caip2 == caip2:
            symbol = chain.network.usdc.symbol
            test = " (test network)" if chain.network.testnet else ""
            return f"{symbol} on {shop.network_name(chain.name)}{test}"
    return caip2
