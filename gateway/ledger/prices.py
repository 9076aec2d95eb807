"""The terms behind a price version, kept for ever, and which version a route had when.

A past charge is derived from the terms again. A version can be made a rule again from what was
configured, so that a quote holds over a change of the configuration and a restart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.db import Database, Tx


@dataclass(frozen=True, slots=True)
class Terms:
    """What a version says, as price lists show it; since when it was first in force; and how it
    was configured."""

    version: str
    terms: Mapping[str, Any]
    since_ms: int
    source: Mapping[str, Any]


async def remember(
    db: Database, terms: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> None:
    """Keep terms and source of these versions. Those that are known stay as they are: a version is
    a digest of its terms."""
    async with db.write() as tx:
        now_ms = await tx.now_ms()
        for version, (shown, source) in sorted(terms.items()):
            await tx.execute(
                "INSERT INTO price_version (version, terms, since_ms, source)"
                " VALUES ($1, $2, $3, $4) ON CONFLICT (version) DO NOTHING",
                version,
                _text(shown),
                now_ms,
                _text(source),
            )


def _text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True)


async def terms_of(tx: Tx, version: str) -> Terms | None:
    """The terms of a version; None: it was never in force here."""
    row = await tx.fetchrow(
        "SELECT version, terms, since_ms, source FROM price_version WHERE version = $1", version
    )
    if row is None:
        return None
    known = (row["version"], json.loads(row["terms"]), row["since_ms"])
    return Terms(*known, json.loads(row["source"]))


async def note(
    db: Database, versions: Mapping[str, str], for_ms: int
) -> dict[str, Sequence[tuple[int, str]]]:
    """Note the price of each route, and tell of those that changed within ``for_ms`` what was in
    force since then: (when in milliseconds, version), the oldest first, the present one last.

    Nodes that start together may both note the same change; it is one.
    """
    told: dict[str, Sequence[tuple[int, str]]] = {}
    async with db.write() as tx:
        now_ms = await tx.now_ms()
        for route, version in sorted(versions.items()):
            rows = await tx.fetch(
                "SELECT since_ms, version FROM route_price WHERE route = $1"
                " ORDER BY since_ms DESC LIMIT 50",
                route,
            )
            history = [(row["since_ms"], row["version"]) for row in rows]
            if not history or history[0][1] != version:
                await tx.execute(
                    "INSERT INTO route_price (route, since_ms, version) VALUES ($1, $2, $3)"
                    " ON CONFLICT (route, since_ms) DO UPDATE SET version = excluded.version",
                    route,
                    now_ms,
                    version,
                )
                history.insert(0, (now_ms, version))
            recent = sum(at_ms > now_ms - for_ms for at_ms, _ in history)
            oldest = min(recent, len(history) - 1)  # the one before those, if there is one
            if recent and oldest:
                told[route] = history[oldest::-1]
    return told
