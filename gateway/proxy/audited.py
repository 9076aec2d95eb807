"""One call, audited: by which terms it was priced, what it moved, and whose money that was.

From the charge to the lots that paid it, from a lot to the payment that had bought it, and from
there to the transaction on chain. Everything is read from the ledger's own rows, so it says the
same again at any later time.
"""

from __future__ import annotations

from typing import Any

from gateway import ledger
from gateway.db import Tx
from gateway.ledger import prices, read
from gateway.node import Node
from gateway.own import amount
from gateway.pricing.several import OR


async def audited(node: Node, tx: Tx, hold: ledger.HoldRow, charge: read.Charge) -> dict[str, Any]:
    """What stands behind a call. ``paid_with`` is empty while it runs and when it cost nothing."""
    close = charge.close
    parts = [] if close is None else await read.lots_of_call(tx, close)
    return {
        "price": await _price(tx, hold),
        "entries": await _entries(node, tx, hold, close),
        "paid_with": [_part(node, part) for part in parts],
    }


async def _price(tx: Tx, hold: ledger.HoldRow) -> dict[str, Any] | None:
    if hold.price is None:
        return None
    told = [await _terms(tx, version) for version in hold.price.split(OR)]
    return told[0] if len(told) == 1 else {"version": hold.price, "lowest_of": told}


async def _terms(tx: Tx, version: str) -> dict[str, Any]:
    known = await prices.terms_of(tx, version)
    return {
        "version": version,
        "terms": None if known is None else known.terms,
        "since_ms": None if known is None else known.since_ms,
    }


async def _entries(
    node: Node, tx: Tx, hold: ledger.HoldRow, close: ledger.TransferRow | None
) -> list[dict[str, Any]]:
    """The lines it made in the account's statement: how it ended, and what was given back."""
    if close is None:
        return []
    lines = [close, *await read.refunds_of_call(tx, hold.id)]
    return [
        {
            "id": line.id,
            "kind": line.kind,
            **amount(node, "amount", line.amount_units),
            **amount(node, "balance", line.balance_units),
            "reason": line.reason,
            "at_ms": line.at_ms,
        }
        for line in lines
    ]


def _part(node: Node, part: read.LotPart) -> dict[str, Any]:
    """``reference`` is the transaction on chain, or the card provider's payment."""
    chain = next((c for c in node.settings.chains if c.caip2 == part.network), None)
    explorer = None if chain is None else chain.network.explorer_tx or None
    return {
        "lot": part.lot_id,
        "source": part.source,
        "payer": part.payer,
        **amount(node, "amount", part.units),
        **amount(node, "refunded", part.refunded_units),
        "payment_id": part.payment_id,
        "network": part.network,
        "reference": part.ref,
        "explorer": explorer and explorer.replace("{tx}", part.ref or ""),
    }
