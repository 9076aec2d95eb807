"""Debts that nobody will pay: given up by an operator, and borne by the house.

A transfer that vanished may come back at any time as far as anybody knows. So nothing hangs on
when a debt is given up: what comes in for its payment later pays the house first
(``inbound.credit``). It is only too early while we send that payment again ourselves, or while a
dispute over its card is not decided.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway import ledger
from gateway.db import Tx
from gateway.ledger import read


class TooEarly(Exception):  # noqa: N818  (the answer is no, and nothing was done)
    """The debt may still be cured; the text says by what."""


@dataclass(frozen=True, slots=True)
class Given:
    """``units`` are the house's loss now; ``left_units`` are still owed, for disputes."""

    units: int
    left_units: int


async def write_off(tx: Tx, account_id: int, *, why: str, by: str) -> Given:
    """Give up what an account owes, as far as that is certain. Raises ``TooEarly``."""
    now_ms = await tx.now_ms()
    # Takes the account's lock: what is read from here on is as it stays until the end.
    await ledger.apply(tx, [ledger.Expire(account_id)], now_ms)
    seen = await read.account(tx, account_id)
    if seen is None or not seen.debt_units:
        return Given(0, 0)
    rows = await tx.fetch(
        "SELECT l.id, l.state, p.id AS payment, p.state AS payment_state FROM lot l"
        " LEFT JOIN payment p ON p.id = l.payment_id"
        " WHERE l.account_id = $1 AND l.short_units > 0 ORDER BY l.id",
        account_id,
    )
    for row in rows:
        if row["payment_state"] == "processing":
            raise TooEarly(f"payment {row['payment']} is being sent again: wait how that ends")
    steps = [ledger.WriteOff(row["id"], why, by) for row in rows if row["state"] != "frozen"]
    if not steps:
        raise TooEarly("what it owes is in dispute: wait how that ends")
    last = (await ledger.apply(tx, steps, now_ms))[-1]
    if not isinstance(last, ledger.LotIs):
        raise ledger.LedgerFault(f"a write-off was answered with {last}")
    return Given(seen.debt_units - last.debt_units, last.debt_units)
