"""What the caller can do about a refusal, where the refusal itself does not say.

Most problems are raised where the address of the request is not known. At the front it is: the
same request, changed in the one way that its code asks for. A problem that brings its own
``next_actions`` keeps them.
"""

from __future__ import annotations

from typing import Final

from gateway.errors import NextAction, Problem

SIGN: Final = {
    "Signature-Input": 'sig1=("@method" "@authority" "@path" "@query" "content-digest");'
    'created=<now>;expires=<now + 60>;nonce="<new>";keyid="erc8128:<chain id>:<wallet>"',
    "Signature": "sig1=:<base64>:",
}
"""A signed request (ERC-8128), to be filled in; what the request does not have is left out."""

_SAME: Final = {
    "invalid_request": ("change", "the same request with what the detail names put right"),
    "invalid_target": ("change", "the same request with its target in the form the detail names"),
    "invalid_payload": (
        "change",
        "the same request with the payment header encoded as x402 says",
    ),
    "invalid_eip2612_extension_format": (
        "change",
        "the same request with a permit as x402's eip2612GasSponsoring says, or without one",
    ),
    "identity_conflict": (
        "change",
        "the same request with one identity and at most one payment",
    ),
    "ceiling_not_covered": (
        "change",
        "the same request without Farebox-Max, or signed (ERC-8128) with it among what is covered",
    ),
    "price_unknown": ("change", "the same request with one of the values the answer lists"),
    "invalid_amount": ("change", "the same request for an amount that is sold"),
    "api_key_required": ("change", "the same request with Authorization: Bearer and the API key"),
    "credential_invalid": (
        "sign",
        "the same request signed by the wallet (ERC-8128), without Authorization",
    ),
    "identity_unsupported": ("sign", "the same request signed by a wallet (ERC-8128) instead"),
    "payer_mismatch": ("change", "the same request, signed and paid by one wallet"),
    "payment_already_used": (
        "sign",
        "this request signed by the wallet, which spends its credits; the payment belongs to "
        "another request",
    ),
    "request_id_conflict": (
        "sign",
        "the same request signed anew, with a nonce that was not used before",
    ),
    "EXTERNAL_SIGNATURE_REQUEST_REPLAY": (
        "change",
        "the same body signed anew, with a request_id that was not used before",
    ),
    "session_limit_reached": (
        "change",
        "the same body signed anew, with the session_nonce of a new session",
    ),
    "request_in_progress": ("repeat", "the same request again, after Retry-After"),
    "upto_in_progress": ("repeat", "the same request again, after Retry-After"),
    "upto_unsettled": (
        "sign",
        "the same request signed by the wallet and without the payment, which spends its credits",
    ),
    "outcome_unknown": (
        "decide",
        "the same request signed anew, with a fresh nonce, if it may be done twice",
    ),
    "price_above_ceiling": (
        "decide",
        "the same request signed anew with a higher Farebox-Max, or without it",
    ),
    "refund_not_final": ("repeat", "the same request again, once the payment is final"),
    "body_too_large": ("change", "the same request with a smaller body"),
    "unsupported_media_type": ("change", "the same request with another Content-Type"),
    "headers_too_large": ("change", "the same request with smaller header fields"),
    "rate_limited": ("repeat", "the same request, after Retry-After"),
    "dependency_unavailable": ("repeat", "the same request, after Retry-After"),
    "settlement_paused": ("repeat", "the same request, after Retry-After"),
    "refund_unavailable": ("repeat", "the same request, after Retry-After"),
    "upstream_error": ("decide", "the same request signed anew: this one is over, uncharged"),
    "upstream_timeout": ("decide", "the same request signed anew: this one is over, uncharged"),
}
_TRANSFERS: Final = frozenset(
    ("transaction_failed", "transfer_not_found", "transfer_too_old", "transfer_too_small")
)
_QUOTES: Final = frozenset(("invalid_quote", "quote_mismatch", "quote_expired"))
_LATER_S: Final = 2
_FINAL_S: Final = 60


def complete(problem: Problem, method: str, url: str, base: str) -> None:
    """Give a refusal its ``next_actions`` if it has none. ``base``: the public origin."""
    if problem.code == "settlement_pending":
        again = "the very same request: it is never taken twice, and is answered once it is final"
        same = NextAction(method, url, again, "repeat", after_s=_after_s(problem))
        problem.next_actions = (same, *problem.next_actions)
    if problem.next_actions:
        return
    if problem.code == "method_not_allowed":
        allowed = [name.strip() for name in problem.headers.get("Allow", "").split(",")]
        problem.next_actions = tuple(
            NextAction(name, url, "the request as this method has it") for name in allowed if name
        )
    elif problem.code == "not_found":
        prices = f"{base}/farebox/v1/prices"
        send = "nothing: what is sold here"
        problem.next_actions = (NextAction("GET", prices, send, "read"),)
    elif problem.code in ("account_frozen", "not_refundable", "refund_not_offered"):
        balance = f"{base}/farebox/v1/credits/balance"
        send = (
            "nothing, signed by the wallet: what is there, owed or frozen; credits that are bought "
            "pay what is owed first"
        )
        problem.next_actions = (NextAction("GET", balance, send, "read", SIGN),)
    elif problem.code in _QUOTES:
        send = "the method, url, content_type and body of the request; then it with the new quote"
        body = {"method": method, "url": url, "body": "<its body, if it has one>"}
        ask = NextAction("POST", f"{base}/farebox/v1/quotes", send, "read", body=body)
        problem.next_actions = (ask,)
    elif problem.code == "PERMIT2_ALLOWANCE_REQUIRED":
        approve = (
            "the very same request, once the paying wallet has called approve(spender, amount) at "
            "the token: nothing was taken, and its payment is good until it expires"
        )
        offers = "the same request without a payment: what is offered by EIP-3009 needs no approval"
        problem.next_actions = (
            NextAction(method, url, approve, "change"),
            NextAction(method, url, offers, "read"),
        )
    elif problem.code in _TRANSFERS:
        send = "the same with another transaction, or without one: the answer says how to pay"
        problem.next_actions = (NextAction(method, url, send),)
    elif problem.code in _SAME:
        do, send = _SAME[problem.code]
        fields = SIGN if do == "sign" else None
        after_s = _after_s(problem) if do == "repeat" else None
        problem.next_actions = (NextAction(method, url, send, do, fields, after_s=after_s),)


def _after_s(problem: Problem) -> int:
    told = problem.headers.get("Retry-After", "")
    if told.isdigit():
        return int(told)
    return _FINAL_S if problem.code == "refund_not_final" else _LATER_S
