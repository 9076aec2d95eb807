"""What a charge was made of: its lines, kept beside the transfer that they add up to.

Only charges that hang on what was used have them; any other is one line, its price.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gateway.db import Tx
from gateway.ledger.book import LedgerFault
from gateway.ledger.steps import TransferRow


def text_of(lines: Sequence[Mapping[str, Any]]) -> str:
    """Lines as ``Close.breakdown`` keeps them: ``for`` and ``units``, ``count`` and ``rate``."""
    return json.dumps(lines, separators=(",", ":"), ensure_ascii=False)


def require_sum(text: str, units: int, hold_id: int) -> None:
    """Raises ``LedgerFault`` if the lines of such a text do not add up to the charge."""
    if sum(line["units"] for line in json.loads(text)) != units:
        raise LedgerFault(f"hold {hold_id}: the breakdown is not the charge of {units}")


async def of_call(tx: Tx, close: TransferRow | None) -> list[dict[str, Any]]:
    """The lines of a charge, which add up to it; none for a call that cost nothing or still
    runs."""
    if close is None or close.kind != "capture":
        return []
    text = await tx.fetchval("SELECT lines FROM breakdown WHERE hold_id = $1", close.id)
    if text is None:
        return [{"for": "call", "units": close.amount_units}] if close.amount_units else []
    lines: list[dict[str, Any]] = json.loads(text)
    return lines
