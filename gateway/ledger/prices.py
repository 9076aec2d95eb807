"""The terms behind a price version, kept for ever: a past charge is derived from them again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gateway.db import Database, Tx


@dataclass(frozen=True, slots=True)
class Terms:
    """What a version says, as price lists show it, and since when it was first in force."""

    version: str
    terms: Mapping[str, Any]
    since_ms: int


async def remember(db: Database, terms: Mapping[str, Mapping[str, Any]]) -> None:
    """Keep the terms of these versions. Those that are known stay as they are: a version is a
    digest of its terms."""
    async with db.write() as tx:
        now_ms = await tx.now_ms()
        for version in sorted(terms):
            await tx.execute(
                "INSERT INTO price_version (version, terms, since_ms) VALUES ($1, $2, $3)"
                " ON CONFLICT (version) DO NOTHING",
                version,
                json.dumps(terms[version], separators=(",", ":"), sort_keys=True),
                now_ms,
            )


async def terms_of(tx: Tx, version: str) -> Terms | None:
    """The terms of a version; None: it was never in force here."""
    row = await tx.fetchrow(
        "SELECT version, terms, since_ms FROM price_version WHERE version = $1", version
    )
    if row is None:
        return None
    return Terms(row["version"], json.loads(row["terms"]), row["since_ms"])
