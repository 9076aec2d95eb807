"""What the caller can do about a refusal, where the refusal itself does not say.

Most problems are raised where the address of the request is not known. At the front it is: the
same request, changed in the one way that its code asks for. A problem that brings its own
``next_actions`` keeps them.
"""

from __future__ import annotations

from typing import Final

from gateway.errors import NextAction, Problem

_SEND: Final = {
    "invalid_request": "the same request with what the detail names put right",
    "invalid_payload": "the same request with the payment header encoded as x402 says",
    "identity_conflict": "the same request with one identity and at most one payment",
    "invalid_amount": "the same request for an amount that is sold",
    "identity_unsupported": "the same request signed by a wallet (ERC-8128) instead",
    "payer_mismatch": "the same request, signed and paid by one wallet",
    "payment_already_used": "the request this payment was made for, or this one with a new payment",
    "request_id_conflict": "the same request signed anew, with a nonce that was not used before",
    "request_in_progress": "the same request again, after Retry-After",
    "outcome_unknown": "the same request signed anew, with a fresh nonce, if it may be done twice",
    "price_above_ceiling": "the same request signed anew with a higher Farebox-Max, or without it",
    "body_too_large": "the same request with a smaller body",
    "unsupported_media_type": "the same request with another Content-Type",
    "rate_limited": "the same request, after Retry-After",
}


def complete(problem: Problem, method: str, url: str, base: str) -> None:
    """Give a 4xx its ``next_actions`` if it has none. ``base``: the gateway's public origin."""
    if problem.next_actions or not 400 <= problem.status < 500:
        return
    if problem.code == "method_not_allowed":
        allowed = [name.strip() for name in problem.headers.get("Allow", "").split(",")]
        problem.next_actions = tuple(
            NextAction(name, url, "the request as this method has it") for name in allowed if name
        )
    elif problem.code == "account_frozen":
        balance = f"{base}/farebox/v1/credits/balance"
        problem.next_actions = (
            NextAction("GET", balance, "nothing, signed by the wallet: what is owed or frozen"),
        )
    elif problem.code in _SEND:
        problem.next_actions = (NextAction(method, url, _SEND[problem.code]),)
