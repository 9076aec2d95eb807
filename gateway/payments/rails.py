"""What every x402 payment needs, once per process, and what all steps of one share."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from chain.errors import ChainError, Rejected
from chain.rpc import Rpc
from chain.schemes import permit2
from gateway.db import Database
from gateway.errors import CODES, Problem
from gateway.payments import offers
from gateway.payments.journal import AuthKey
from gateway.payments.lane import Lane
from gateway.payments.together import Together
from gateway.payments.wire import Presented
from gateway.settings import Chain, Settings


@dataclass(slots=True)
class Remote:
    """How somebody else's facilitator did lately; times of the event loop's clock."""

    good_until_s: float = float("-inf")
    rest_until_s: float = float("-inf")
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(slots=True)
class DataPrice:
    """What a rollup takes for a byte on L1, by the last answer that was believed, and until when
    (of the event loop's clock) it is. ``fault``: why the last question has no answer."""

    byte_wei: int = 0
    until_s: float = float("-inf")
    fault: str | None = None


@dataclass(slots=True)
class Rails:
    """What payments need, once per process. Nothing in it is ever replaced but its settings and
    the two ``Floors``."""

    settings: Settings  # by others when the configuration is read again (gateway/reload.py)
    db: Database
    keys: offers.Keys
    rpcs: Mapping[str, Rpc]  # by CAIP-2
    # What waits for its transaction in this process, by CAIP-2; made when first used.
    lanes: dict[str, Lane] = field(default_factory=dict)
    # Payments that end at the same time are written at the same time.
    endings: Together = field(default_factory=Together)
    # Facilitators of others, by CAIP-2; made when first used.
    remotes: dict[str, Remote] = field(default_factory=dict)
    # Payments being settled by this process, so that a repeat waits for the one that runs.
    settling: dict[AuthKey, asyncio.Future[None]] = field(default_factory=dict)
    # Payments this process works on, whose leases it renews (in_hand.py).
    in_hand: set[str] = field(default_factory=set)
    # What is offered now, and the lowest of what was while an offer lives (worth.py).
    floors: offers.Floors = ()
    lately: offers.Floors = ()
    # What rollups take for data on L1, by CAIP-2; made when first used.
    data_prices: dict[str, DataPrice] = field(default_factory=dict)

    def chain_of(self, presented: Presented) -> Chain:
        """The configured network a payment is for. Raises ``Problem``: ``invalid_network``, or
        ``invalid_scheme`` for Permit2 where it is not taken."""
        for chain in self.settings.chains:
            name = chain.caip2 if presented.version == 2 else chain.network.v1_name
            if name == presented.network and chain.settler_key is not None:
                if not chain.permit2 and isinstance(presented.authorization, permit2.Authorization):
                    raise Problem(
                        "invalid_scheme",
                        f"Permit2 is not accepted on {chain.name}: sign with EIP-3009.",
                    )
                return chain
        raise Problem(
            "invalid_network",
            f"Payments on {presented.network[:60]!r} are not accepted here.",
        )


# Why this gateway sends nothing at the moment although the chain can be reached.
PAUSES = frozenset(
    {"gas_account_empty", "gas_budget_spent", "gas_price_too_high", "gas_accounts_stuck"}
)


def refused(error: ChainError) -> Problem:
    """The answer to a payment that was not sent, or cannot be looked at."""
    if isinstance(error, Rejected):
        code = error.code if error.code in CODES else "invalid_transaction_state"
        return Problem(code, f"The payment was refused: {error.detail}.")
    if error.code in PAUSES:
        return Problem(
            "settlement_paused",
            "Payments over x402 are not settled here right now; nothing was sent.",
            headers={"Retry-After": "60"},
        )
    return Problem(
        "dependency_unavailable",
        "The chain cannot be reached right now; nothing was sent.",
        headers={"Retry-After": "5"},
    )


def content_hash(*parts: bytes) -> bytes:
    """SHA-256 over parts with their lengths, so that no two different requests hash alike."""
    return hashlib.sha256(
        b"".join([len(part).to_bytes(8, "big") + part for part in parts])
    ).digest()
