"""What the chain says, and making it do one thing exactly once.

The verbs, loaded when first used: nothing of this package is imported by naming it. Errors are in
``chain/errors.py``, the networks in ``chain/networks.py``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chain.errors import ChainError, NodeError, Rejected, Reverted, Unavailable, Unknown
    from chain.networks import NETWORKS, Asset, Network, network
    from chain.receipts import Receipt
    from chain.rpc import Rpc
    from chain.schemes.eip3009 import (
        Authorization,
        account_kind,
        check,
        parse,
        transfer_calldata,
        verify,
    )
    from chain.sender import Fees, Prepared, broadcast, fees, sign, wait
    from chain.tokens import (
        Standing,
        Token,
        read_standing,
        read_token,
        standing_faults,
        token_faults,
    )
    from chain.transfers import (
        Transfer,
        authorization_used,
        find_authorization,
        transfers_in,
        transfers_of,
    )

__all__ = [
    "NETWORKS",
    "Asset",
    "Authorization",
    "ChainError",
    "Fees",
    "Network",
    "NodeError",
    "Prepared",
    "Receipt",
    "Rejected",
    "Reverted",
    "Rpc",
    "Standing",
    "Token",
    "Transfer",
    "Unavailable",
    "Unknown",
    "account_kind",
    "authorization_used",
    "broadcast",
    "check",
    "fees",
    "find_authorization",
    "network",
    "parse",
    "read_standing",
    "read_token",
    "sign",
    "standing_faults",
    "token_faults",
    "transfer_calldata",
    "transfers_in",
    "transfers_of",
    "verify",
    "wait",
]

_HOME = {
    "chain.errors": ("ChainError", "NodeError", "Rejected", "Reverted", "Unavailable", "Unknown"),
    "chain.networks": ("NETWORKS", "Asset", "Network", "network"),
    "chain.receipts": ("Receipt",),
    "chain.rpc": ("Rpc",),
    "chain.schemes.eip3009": (
        "Authorization",
        "account_kind",
        "check",
        "parse",
        "transfer_calldata",
        "verify",
    ),
    "chain.sender": ("Fees", "Prepared", "broadcast", "fees", "sign", "wait"),
    "chain.tokens": (
        "Standing",
        "Token",
        "read_standing",
        "read_token",
        "standing_faults",
        "token_faults",
    ),
    "chain.transfers": (
        "Transfer",
        "authorization_used",
        "find_authorization",
        "transfers_in",
        "transfers_of",
    ),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'chain' has no attribute {name!r}")
    return getattr(import_module(module), name)
