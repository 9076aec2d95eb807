"""Which account a wallet belongs to."""

from __future__ import annotations

from gateway.db import Tx
from gateway.ledger.ids import reserve
from gateway.ledger.steps import NEVER

# A key's address is the same wallet on every chain.
ANY_CHAIN = ""


async def find(tx: Tx, address: str, chain: str = ANY_CHAIN) -> int | None:
    """The account of a wallet; None if it never had one. ``address`` in lower case."""
    account_id: int | None = await tx.fetchval(
        "SELECT account_id FROM wallet WHERE address = $1 AND chain = $2", address, chain
    )
    return account_id


async def ensure(tx: Tx, address: str, now_ms: int, chain: str = ANY_CHAIN) -> int:
    """The account of a wallet, opened if it has none."""
    known = await find(tx, address, chain)
    if known is not None:
        return known
    account_id = (await reserve(tx, 1))[0]
    # Two payments of a new wallet may arrive together: the key lets one of them open it.
    won = await tx.execute(
        "INSERT INTO wallet (address, chain, account_id, linked_at_ms) VALUES ($1, $2, $3, $4)"
        " ON CONFLICT (address, chain) DO NOTHING",
        address,
        chain,
        account_id,
        now_ms,
    )
    if not won:
        existing: int = await tx.fetchval(
            "SELECT account_id FROM wallet WHERE address = $1 AND chain = $2", address, chain
        )
        return existing
    await tx.execute(
        "INSERT INTO account (id, created_at_ms, available, held, pinned, debt, added, spent, pos,"
        " folded, next_expiry_ms, epoch, seq, last_id, frozen, ver)"
        " VALUES ($1, $2, 0, 0, 0, 0, 0, 0, 0, 0, $3, 0, 0, 0, 0, 0)",
        account_id,
        now_ms,
        NEVER,
    )
    return account_id


async def wallets_of(tx: Tx, account_id: int) -> list[str]:
    """The addresses that can sign for an account."""
    rows = await tx.fetch(
        "SELECT address FROM wallet WHERE account_id = $1 ORDER BY linked_at_ms", account_id
    )
    return [row["address"] for row in rows]
