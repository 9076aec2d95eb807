"""Every error Farebox answers with: code, status, retryable, title.

One table and one exception. A code is stable once published; the same table is what the
documentation and the tests read. ``Problem`` is turned into an RFC 9457 answer in one place
(``gateway/middleware.py``). An exception that is not a ``Problem`` becomes ``internal_error``
and leaks nothing.

    401  who are you          the identity is missing or wrong; paying does not help
    402  money                a payment or more credits are needed, or a payment was refused
    403  policy               known, but not allowed
    409  conflict             an id or a payment is being used for something else, or still runs
    4xx  the request          malformed, too large, not there
    5xx  us and the upstream  nothing was charged unless the answer says so
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class Code:
    """What a stable error code means to a caller."""

    status: int
    retryable: bool
    title: str


CODES: Final[dict[str, Code]] = {
    # 400: the request itself
    "invalid_request": Code(400, False, "The request is malformed"),
    "invalid_target": Code(400, False, "The request target has a form that is not accepted"),
    "invalid_payload": Code(400, False, "The payment payload is malformed"),
    "invalid_eip2612_extension_format": Code(400, False, "The EIP-2612 permit is malformed"),
    "identity_conflict": Code(400, False, "The request carries more than one identity"),
    "idempotency_key_not_covered": Code(
        400, False, "Idempotency-Key is sent beside a signature that does not cover it"
    ),
    "price_unknown": Code(400, False, "There is no price for what this request asks"),
    "ceiling_not_covered": Code(400, False, "Farebox-Max is sent and no signature covers it"),
    "invalid_quote": Code(400, False, "Farebox-Quote is not a quote of this gateway"),
    "quote_mismatch": Code(400, False, "The quote was made for another request"),
    "quote_expired": Code(400, False, "The quote has expired"),
    "invalid_amount": Code(400, False, "The amount is not one that can be bought"),
    "invalid_webhook_signature": Code(400, False, "The webhook signature is wrong or stale"),
    # 401: identity
    "identity_required": Code(401, False, "This needs a signed request"),
    "signature_missing_component": Code(401, False, "The signature covers too little"),
    "signature_expired": Code(401, False, "The signature has expired"),
    "signature_not_yet_valid": Code(401, False, "The signature is not valid yet"),
    "signature_window_too_long": Code(401, False, "The signature is valid for too long"),
    "signature_nonce_missing": Code(401, False, "The signature has no nonce"),
    "signature_digest_mismatch": Code(401, False, "The body is not the one that was signed"),
    "signature_authority_mismatch": Code(401, False, "The signature is for another host"),
    "signature_invalid": Code(401, False, "The signature is wrong"),
    "credential_invalid": Code(401, False, "The credential is unknown, or its time is over"),
    "api_key_required": Code(401, False, "This needs an API key"),
    "identity_unsupported": Code(401, False, "This kind of identity is not accepted here"),
    "payer_signature_required": Code(
        401, False, "The wallet that paid has to say who gets the credits"
    ),
    "EXTERNAL_SIGNATURE_SESSION_NONCE_INVALID": Code(401, False, "The session nonce is unknown"),
    "EXTERNAL_SIGNATURE_SESSION_NONCE_EXPIRED": Code(401, False, "The session nonce has expired"),
    "EXTERNAL_SIGNATURE_MALFORMED": Code(401, False, "The signature cannot be read"),
    "EXTERNAL_SIGNATURE_WALLET_MISMATCH": Code(
        401, False, "The signature is of another wallet or other words"
    ),
    # 402: money
    "payment_required": Code(402, False, "Payment is required"),
    "insufficient_credits": Code(402, False, "There are not enough credits"),
    "invalid_siwx_header": Code(402, False, "The sign-in-with-x proof is malformed"),
    "invalid_siwx_nonce": Code(402, False, "The sign-in-with-x proof is for another request"),
    "invalid_siwx_expired": Code(402, False, "The sign-in-with-x challenge has expired"),
    "invalid_siwx_signature": Code(402, False, "The sign-in-with-x signature is wrong"),
    "invalid_network": Code(402, False, "The payment is for a network that is not accepted"),
    "invalid_scheme": Code(402, False, "The payment scheme is not accepted"),
    "invalid_x402_version": Code(402, False, "The x402 version is not accepted"),
    "invalid_payment_requirements": Code(
        402, False, "The payment answers an offer that is not ours"
    ),
    "offer_expired": Code(402, False, "The offer this payment answers has expired"),
    "insufficient_funds": Code(402, False, "The paying wallet does not hold enough"),
    "invalid_transaction_state": Code(402, False, "The chain would refuse this payment"),
    "asset_paused": Code(402, False, "The token is paused"),
    "payer_blocked": Code(402, False, "The token refuses this payer or payee"),
    "invalid_exact_evm_payload_signature": Code(402, False, "The payment signature is wrong"),
    "invalid_exact_evm_payload_undeployed_smart_wallet": Code(
        402, False, "The paying wallet is not deployed yet"
    ),
    "invalid_exact_evm_payload_recipient_mismatch": Code(
        402, False, "The payment is made out to somebody else"
    ),
    "invalid_exact_evm_payload_authorization_value_mismatch": Code(
        402, False, "The payment is not for the amount asked"
    ),
    "invalid_exact_evm_payload_authorization_valid_before": Code(
        402, False, "The payment authorization has expired or is about to"
    ),
    "invalid_exact_evm_payload_authorization_valid_after": Code(
        402, False, "The payment authorization is not valid yet"
    ),
    "invalid_permit2_spender": Code(402, False, "The payment permits another spender than x402's"),
    "invalid_permit2_recipient_mismatch": Code(
        402, False, "The payment is made out to somebody else"
    ),
    "invalid_permit2_signature": Code(402, False, "The payment signature is wrong"),
    "permit2_deadline_expired": Code(
        402, False, "The payment authorization has expired or is about to"
    ),
    "permit2_not_yet_valid": Code(402, False, "The payment authorization is not valid yet"),
    "permit2_amount_mismatch": Code(402, False, "The payment is not for the amount asked"),
    "permit2_token_mismatch": Code(402, False, "The payment permits another token"),
    "permit2_invalid_nonce": Code(402, False, "The nonce of the payment is used"),
    "permit2_insufficient_balance": Code(402, False, "The paying wallet does not hold enough"),
    "permit2_simulation_failed": Code(402, False, "The chain would refuse this payment"),
    "eip2612_from_mismatch": Code(402, False, "The EIP-2612 permit is of another wallet"),
    "eip2612_asset_mismatch": Code(402, False, "The EIP-2612 permit is for another token"),
    "eip2612_spender_not_permit2": Code(402, False, "The EIP-2612 permit is not for Permit2"),
    "eip2612_deadline_expired": Code(402, False, "The EIP-2612 permit has expired or is about to"),
    "permit2_2612_amount_mismatch": Code(402, False, "The EIP-2612 permit is for another amount"),
    "permit2_proxy_not_deployed": Code(402, False, "This network cannot settle by Permit2"),
    "upto_facilitator_mismatch": Code(
        402, False, "The payment names another facilitator than the offer"
    ),
    "upto_not_settled": Code(402, True, "The call is done, and its payment cannot be settled now"),
    "settlement_pending": Code(402, True, "The payment was sent and is not final yet"),
    "settlement_failed": Code(402, False, "The payment could not be settled"),
    # 403, 404, 405: policy and place
    "session_limit_reached": Code(403, False, "The session has spent what it may"),
    "upto_unsettled": Code(403, False, "A call of this wallet was done and not paid"),
    "account_frozen": Code(403, False, "The account is frozen or in debt"),
    "refund_not_offered": Code(403, False, "Credits are not paid back here"),
    "not_found": Code(404, False, "There is nothing here"),
    "method_not_allowed": Code(405, False, "This method is not offered here"),
    # 409: conflict
    "payer_mismatch": Code(409, False, "The payment comes from another wallet than the identity"),
    "payment_already_used": Code(409, False, "This payment was already used for something else"),
    "request_id_conflict": Code(409, False, "This request id was used with other content"),
    "EXTERNAL_SIGNATURE_REQUEST_REPLAY": Code(
        409, False, "This request id was used with other content"
    ),
    "upto_in_progress": Code(409, True, "This wallet's last call is not settled yet"),
    "request_in_progress": Code(409, True, "The first request with this id still runs"),
    "outcome_unknown": Code(409, False, "The gateway stopped during this call; it was not charged"),
    "refund_not_final": Code(409, True, "The payment behind these credits is not final yet"),
    "not_refundable": Code(409, False, "These credits cannot be paid back"),
    "PERMIT2_ALLOWANCE_REQUIRED": Code(
        412, False, "The paying wallet has to approve Permit2 for this token first"
    ),
    "price_above_ceiling": Code(412, False, "The call may cost more than the signed ceiling"),
    # 413, 415, 429, 431: size and pace
    "body_too_large": Code(413, False, "The body is larger than this gateway takes"),
    "unsupported_media_type": Code(415, False, "The body has a type that is not accepted"),
    "rate_limited": Code(429, True, "Too many requests"),
    "headers_too_large": Code(431, False, "The header fields are larger than this gateway takes"),
    # 422: a transaction that was named, and cannot be credited
    "transaction_failed": Code(422, False, "The transaction failed on chain"),
    "transfer_not_found": Code(422, False, "The transaction moved nothing that is taken here"),
    "transfer_too_old": Code(422, False, "The transaction is older than these books"),
    "transfer_too_small": Code(422, False, "The transaction moved too little to be credited"),
    # 5xx: us and the upstream
    "internal_error": Code(500, True, "Something went wrong here"),
    "upstream_error": Code(502, True, "The upstream failed; nothing was charged"),
    "card_refused": Code(502, False, "The card provider refused to open a payment"),
    "upstream_wants_payment": Code(502, False, "The upstream itself asks for payment"),
    "dependency_unavailable": Code(503, True, "A part this needs is not reachable"),
    "settlement_paused": Code(503, True, "Payments are not settled on chain at the moment"),
    "refund_unavailable": Code(503, True, "Refunds cannot be paid at the moment"),
    "upstream_timeout": Code(504, True, "The upstream did not answer in time; nothing was charged"),
}


DO: Final = {
    "repeat": "send the very same bytes again, after `after_s` seconds",
    "sign": "send the same request, signed anew with a nonce that was not used before",
    "pay": "send the same request with a payment for one of the offers of this answer",
    "buy": "send the request that is written out, pay for it, then send yours again",
    "read": "send the request that is written out, and read what it says",
    "change": "put right what the detail names; the request as it was will not be accepted",
    "decide": "it can be done, but only the caller can know whether it should",
}
"""What a next action is, in a word that programs follow. Whoever finds neither repeat nor sign nor
pay among them stops and tells the reason."""


@dataclass(frozen=True, slots=True)
class NextAction:
    """One thing the caller can do now: a request it can make, and what to send with it.

    ``do`` is a word of ``DO``, ``send`` the same for people and models. ``body`` and ``headers``
    are templates: what stands in ``<…>`` is to be filled in.
    """

    method: str
    url: str
    send: str
    do: str = "change"
    headers: Mapping[str, str] | None = None
    body: Mapping[str, Any] | None = None
    after_s: int | None = None

    def told(self) -> dict[str, Any]:
        """As answers show it: no members without a value."""
        shown: dict[str, Any] = {
            "do": self.do,
            "method": self.method,
            "url": self.url,
            "send": self.send,
        }
        if self.headers is not None:
            shown["headers"] = dict(self.headers)
        if self.body is not None:
            shown["body"] = dict(self.body)
        if self.after_s is not None:
            shown["after_s"] = self.after_s
        return shown


class Problem(Exception):  # noqa: N818  (RFC 9457's own word)
    """An answer of status 4xx or 5xx. ``code`` must be in ``CODES``.

    ``members`` are added to the problem object beside the standard ones; ``headers`` to the
    answer. Raise it anywhere above the ledger; nothing may be half done when it is raised.
    """

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        headers: Mapping[str, str] | None = None,
        members: Mapping[str, Any] | None = None,
        next_actions: Sequence[NextAction] = (),
        status: int | None = None,
    ) -> None:
        self.code = code
        self.meaning = CODES[code]
        self.status = status or self.meaning.status
        self.detail = detail
        self.headers = dict(headers or {})
        self.members = dict(members or {})
        self.next_actions = tuple(next_actions)
        super().__init__(f"{code}: {detail}")

    def body(self, request_id: str) -> dict[str, Any]:
        """The RFC 9457 object, our extension members included."""
        return {
            "type": f"urn:farebox:problem:{self.code}",
            "title": self.meaning.title,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
            "retryable": self.meaning.retryable,
            "request_id": request_id,
            "next_actions": [action.told() for action in self.next_actions],
            **self.members,
        }
