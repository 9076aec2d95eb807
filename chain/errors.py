"""What the chain side can say when it does not simply succeed.

    ChainError
      Rejected            the rules or the chain say no; final, nothing to retry
        Reverted          a call was run and reverted; carries the reason and the raw data
      Unavailable         nothing was sent; ask again later
        NodeError         a node answered with a JSON-RPC error that is not a revert
      Unknown             something was sent and its outcome is not known; carries the hash

``Rejected.code`` is an x402 reason code in the spelling of the specification's core list, where
it has one, or one of ours: ``asset_paused``, ``payer_blocked`` (the token's own switches),
``nonce_taken`` (the chain nonce of a raw transaction was used by another one) and
``transaction_refused`` (a raw transaction that no block can ever hold).
``Unavailable.code`` begins with ``rpc_``, or is ``gas_account_empty``, ``underpriced``,
``gas_price_too_high`` or one of chain/rollup.py. ``detail`` is for people and never holds a key or
a whole RPC address.
"""

from __future__ import annotations

from typing import Final

# What USDC (FiatTokenV2_2) says when it reverts, by the code a payer is answered with.
TOKEN_REASONS: Final[dict[str, str]] = {
    "FiatTokenV2: authorization is used or canceled": "invalid_transaction_state",
    "FiatTokenV2: authorization is not yet valid": (
        "invalid_exact_evm_payload_authorization_valid_after"
    ),
    "FiatTokenV2: authorization is expired": (
        "invalid_exact_evm_payload_authorization_valid_before"
    ),
    "FiatTokenV2: invalid signature": "invalid_exact_evm_payload_signature",
    "ECRecover: invalid signature": "invalid_exact_evm_payload_signature",
    "ECRecover: invalid signature length": "invalid_exact_evm_payload_signature",
    "ECRecover: invalid signature 's' value": "invalid_exact_evm_payload_signature",
    "ECRecover: invalid signature 'v' value": "invalid_exact_evm_payload_signature",
    "ERC20: transfer amount exceeds balance": "insufficient_funds",
    "Blacklistable: account is blacklisted": "payer_blocked",
    "FiatTokenV2_2: Account is blacklisted": "payer_blocked",
    "Pausable: paused": "asset_paused",
}


class ChainError(Exception):
    """Base of everything this package raises on purpose."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


class Rejected(ChainError):  # noqa: N818  (the design's own word)
    """The rules or the chain say no, for good."""


class Reverted(Rejected):
    """A call reverted. ``reason`` is the text of ``Error(string)``, empty for anything else."""

    def __init__(self, reason: str, data: bytes) -> None:
        code = TOKEN_REASONS.get(reason, "invalid_transaction_state")
        super().__init__(code, reason or "the call reverted without a reason")
        self.reason = reason
        self.data = data


class Unavailable(ChainError):  # noqa: N818
    """Nothing was sent. The same question may be asked again later."""


class NodeError(Unavailable):
    """A node answered with an error object. ``rpc_code`` is the JSON-RPC error code."""

    def __init__(self, rpc_code: int, message: str) -> None:
        super().__init__("rpc_error", message[:300])
        self.rpc_code = rpc_code
        self.message = message


class Unknown(ChainError):  # noqa: N818
    """A transaction was sent, and whether it will be included is not known."""

    def __init__(self, code: str, detail: str, tx_hash: str) -> None:
        super().__init__(code, detail)
        self.tx_hash = tx_hash
