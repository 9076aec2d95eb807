"""What gas may be spent on: so much money an hour, and nothing on payers whose payments fail.

Gas money is counted by ``chain_nonce``: what a transaction is expected to cost from the moment it
is signed, what it did cost once a block has it. What is settled for others has a budget of its own
(gateway/facilitator).
"""

from __future__ import annotations

from typing import Final

from chain.errors import Unavailable
from gateway.db import Tx
from gateway.payments import journal, worth
from gateway.settings import Chain

HOUR_MS: Final = 3_600_000


async def require(tx: Tx, chain: Chain, now_ms: int, *, counted: bool = False) -> None:
    """``Unavailable("gas_budget_spent")`` where no more may be spent in this hour.

    ``counted``: what is about to be sent is in the books already, by this very transaction of the
    database. Whoever signs for the same gas account waits for that one's row, so only different
    accounts can pass the limit together: each by one transaction.
    """
    most_gwei = chain.gas_per_hour_gwei
    if most_gwei is None:
        return
    spent = await spent_gwei(tx, chain, now_ms)
    if spent > most_gwei or (spent == most_gwei and not counted):
        said = f"{spent} of {most_gwei} gwei" + (" with this transaction" if counted else "")
        raise Unavailable("gas_budget_spent", f"{chain.name}: gas_per_hour is used up: {said}")


async def is_spent(tx: Tx, chain: Chain, now_ms: int) -> bool:
    """Whether not even one payment fits any more, at the price of the last look: what ``require``
    is going to say of the next one. A reservation is by the gas limit, which is above the cost."""
    if chain.gas_per_hour_gwei is None:
        return False
    one_gwei = max(1, 3 * (await worth.noted_gwei(tx, chain) or 0) // 2)
    return await spent_gwei(tx, chain, now_ms) + one_gwei > chain.gas_per_hour_gwei


async def spent_gwei(tx: Tx, chain: Chain, now_ms: int) -> int:
    """Gas money of the last hour, what is under way included."""
    spent: int = await tx.fetchval(
        "SELECT CAST(coalesce(sum(cost_gwei), 0) AS BIGINT) FROM chain_nonce WHERE network = $1"
        " AND at_ms > $2 AND NOT EXISTS (SELECT 1 FROM payment p"
        " WHERE p.id = chain_nonce.payment_id AND p.provider = $3)",
        chain.caip2,
        now_ms - HOUR_MS,
        journal.FACILITATOR,
    )
    return spent


async def payer_is_blocked(tx: Tx, chain: Chain, payer: str, now_ms: int) -> bool:
    """Whether settlements of this payer failed too often lately: each cost us gas. Those count too
    whose failure is not proven yet (``journal.doubt``).

    What expired without being included is not the payer's fault and does not count.
    """
    failed: int = await tx.fetchval(
        # Two looks, because each state has an index of its own.
        "SELECT (SELECT count(*) FROM payment WHERE payer = $1 AND state = 'failed'"
        " AND network = $2 AND error_code = 'invalid_transaction_state' AND updated_at_ms > $3)"
        " + (SELECT count(*) FROM payment WHERE payer = $1 AND state = 'processing'"
        " AND network = $2 AND error_code = 'invalid_transaction_state' AND updated_at_ms > $3)",
        payer,
        chain.caip2,
        now_ms - HOUR_MS,
    )
    return failed >= chain.failed_per_hour
