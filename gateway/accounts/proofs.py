"""One-time values of proofs that no hold burns: whoever only reads has none."""

from __future__ import annotations

from gateway.db import Database


async def spend(db: Database, scheme: str, value: str, expires_ms: int) -> bool:
    """Use a one-time value up. False: it was used before, here or on another node."""
    async with db.write() as tx:
        done = await tx.execute(
            "INSERT INTO spent_proof (scheme, value, expires_ms) VALUES ($1, $2, $3)"
            " ON CONFLICT (scheme, value) DO NOTHING",
            scheme,
            value,
            expires_ms,
        )
    return done == 1


async def purge(db: Database, before_ms: int) -> int:
    """Forget those that ended before: they are refused by their own time."""
    async with db.write() as tx:
        return await tx.execute("DELETE FROM spent_proof WHERE expires_ms < $1", before_ms)
