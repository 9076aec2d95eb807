"""What an operator does about calls that were done and not paid (x402 ``upto``)."""

from __future__ import annotations

from typing import Any

from gateway.db import Database
from gateway.forms import address
from gateway.hands import Refused, operator, with_database
from gateway.money import format_usd
from gateway.payments import upto_rows
from gateway.payments.upto_rows import UptoCall
from gateway.settings import Settings


def unpaid(settings: Settings, wallet: str | None) -> list[dict[str, Any]]:
    """Calls that were done and are not paid, oldest first; of one wallet, or of all. Those in state
    ``unsettled`` never will be. Raises ``ValueError`` for a malformed address."""
    payer = None if wallet is None else address(wallet)

    async def work(db: Database) -> list[UptoCall]:
        async with db.read() as tx:
            return await upto_rows.not_paid(tx, payer)

    return [_shown(call) for call in with_database(settings, work)]


def _shown(call: UptoCall) -> dict[str, Any]:
    units = call.most_units if call.units is None else call.units
    return {
        "payment_id": call.payment_id,
        "wallet": call.payer,
        "network": call.network,
        "state": call.state,
        "units": units,
        "usd": format_usd(units),
        "why": call.error,
        "at_ms": call.at_ms,
    }


def forgive(settings: Settings, payment_id: str, *, why: str) -> dict[str, Any]:
    """Take the loss of one call: its wallet may have another. Who did it and why is kept. Raises
    ``Refused`` if it is not ``unsettled``."""

    async def work(db: Database) -> UptoCall | None:
        async with db.write() as tx:
            said = f"forgiven by {operator()}: {why}"
            done = await upto_rows.forgive(tx, payment_id, said, await tx.now_ms())
            return await upto_rows.by_id(tx, payment_id) if done else None

    call = with_database(settings, work)
    if call is None:
        raise Refused(f"{payment_id} is no call that was done and can never be paid")
    return _shown(call)
