"""Credentials: what a bare payment is given to spend the rest of its credits with.

A payment proves a payer and no login, and so does what it is given: it spends the one lot that the
payment became, for at most an hour, and reads nothing else. It is told once, to the request that
had the payment settled, and only its hash is kept: whoever shows the payment again, which anybody
can who reads the chain, gets none.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass
from typing import Final

from gateway.db import Database, Tx

PREFIX: Final = "fbx_c_"
SCHEME: Final = "credential"
"""``Guard.scheme`` of the calls that one pays for."""
_FORM: Final = re.compile(r"fbx_c_[A-Za-z0-9_-]{43}")  # 256 bits


@dataclass(frozen=True, slots=True)
class Credential:
    """One that was shown and is good. ``name`` tells it apart and says nothing of it."""

    name: str
    account_id: int
    lot_id: int
    payer: str


async def issue(tx: Tx, payment_id: str, lot_id: int, payer: str, expires_ms: int) -> str | None:
    """A new credential for a payment's lot. None: the payment has, or had, one."""
    text = PREFIX + secrets.token_urlsafe(32)
    done = await tx.execute(
        "INSERT INTO credential (digest, payment_id, account_id, lot_id, payer, expires_ms)"
        " SELECT $1, $2, account_id, id, $3, $4 FROM lot WHERE id = $5"
        " ON CONFLICT (payment_id) DO NOTHING",
        _digest(text),
        payment_id,
        payer,
        expires_ms,
        lot_id,
    )
    return text if done == 1 else None


async def find(tx: Tx, text: str) -> Credential | None:
    """The credential, if this is one and its time is not over."""
    if not _FORM.fullmatch(text):
        return None
    digest = _digest(text)
    row = await tx.fetchrow(
        "SELECT account_id, lot_id, payer, expires_ms FROM credential WHERE digest = $1", digest
    )
    if row is None or row["expires_ms"] <= await tx.now_ms():
        return None
    name = f"credential:{digest.hex()[:32]}"
    return Credential(name, row["account_id"], row["lot_id"], row["payer"])


async def purge(db: Database, before_ms: int) -> int:
    """Forget those that ended before. A payment that was given one gets no other all the same:
    it was settled long ago."""
    async with db.write() as tx:
        return await tx.execute("DELETE FROM credential WHERE expires_ms < $1", before_ms)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
