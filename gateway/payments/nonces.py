"""What was signed for a gas account: its chain nonces, the transactions of each, whom they settle.

A chain nonce is allotted in the transaction that stores what is signed with it, before anything
is sent. It belongs for ever to the same payments; a replacement has the same nonce, and is stored
before it is sent too. So whatever happens, a node can only ever have bytes that stand here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chain import sender
from chain.sender import Prepared
from gateway import observe
from gateway.db import Row, Tx


@dataclass(frozen=True, slots=True)
class Call:
    """What one payment is settled by: a call that anybody may send."""

    payment_id: str
    to: str
    data: bytes


async def allot(  # noqa: PLR0917  (of which account, since when, for whom)
    tx: Tx,
    network: str,
    gas_account: str,
    floor: int,
    calls: Sequence[Call],
    now_ms: int,
    cost_gwei: int = 0,
) -> int:
    """The next chain nonce of a gas account, for these payments for ever.

    ``floor`` is what the nodes count, including transactions this ledger does not know. Whoever
    comes second waits for the row of the account, so no two ever get the same number, on however
    many nodes. ``cost_gwei`` is what its transaction is expected to cost.
    """
    # What a node of the release before this one allotted stands only here.
    last: int | None = await tx.fetchval(
        "SELECT max(nonce) FROM chain_nonce WHERE network = $1 AND sender = $2",
        network,
        gas_account,
    )
    least = floor if last is None else max(floor, last + 1)
    nonce: int = await tx.fetchval(
        "INSERT INTO gas_account AS a (network, sender, next_nonce)"
        " VALUES ($1, $2, CAST($3 AS BIGINT) + 1) ON CONFLICT (network, sender) DO UPDATE"
        " SET next_nonce = CASE WHEN a.next_nonce >= excluded.next_nonce THEN a.next_nonce + 1"
        " ELSE excluded.next_nonce END"
        " RETURNING next_nonce - 1",
        network,
        gas_account,
        least,
    )
    await tx.execute(
        "INSERT INTO chain_nonce (network, sender, nonce, payment_id, at_ms, cost_gwei)"
        " VALUES ($1, $2, $3, $4, $5, $6)",
        network,
        gas_account,
        nonce,
        calls[0].payment_id,
        now_ms,
        cost_gwei,
    )
    await tx.executemany(
        "INSERT INTO chain_member (network, sender, nonce, payment_id, target, data)"
        " VALUES ($1, $2, $3, $4, $5, $6)",
        [(network, gas_account, nonce, each.payment_id, each.to, each.data) for each in calls],
    )
    return nonce


async def oldest_open_ms(tx: Tx, network: str, gas_account: str) -> int | None:
    """Since when the longest of its chain nonces waits that no block is known to have used."""
    oldest: int | None = await tx.fetchval(
        "SELECT min(at_ms) FROM chain_nonce WHERE network = $1 AND sender = $2 AND done_ms IS NULL",
        network,
        gas_account,
    )
    return oldest


async def taken_from(
    tx: Tx, network: str, gas_account: str, first: int, limit: int
) -> Sequence[tuple[int, int]]:
    """The lowest numbers from ``first`` on that were allotted, and when (ms)."""
    rows = await tx.fetch(
        "SELECT nonce, at_ms FROM chain_nonce WHERE network = $1 AND sender = $2 AND nonce >= $3"
        " ORDER BY nonce LIMIT $4",
        network,
        gas_account,
        first,
        limit,
    )
    return [(row["nonce"], row["at_ms"]) for row in rows]


async def fill(tx: Tx, nothing: Prepared, now_ms: int, cost_gwei: int) -> bool:
    """Take a number below others that was never allotted, for no payment. False: it was."""
    new = await tx.execute(
        "INSERT INTO chain_nonce (network, sender, nonce, payment_id, at_ms, cost_gwei)"
        " VALUES ($1, $2, $3, '', $4, $5) ON CONFLICT DO NOTHING",
        nothing.network,
        nothing.sender,
        nothing.nonce,
        now_ms,
        cost_gwei,
    )
    if new:
        await store(tx, nothing, now_ms)
    return bool(new)


async def store(tx: Tx, prepared: Prepared, now_ms: int) -> None:
    """Keep the signed bytes before they are sent: after a crash the very same are sent again.

    Its nonce must have been allotted. Its payments show this transaction from now on.
    """
    first = await tx.fetchval(
        "SELECT payment_id FROM chain_nonce WHERE network = $1 AND sender = $2 AND nonce = $3",
        prepared.network,
        prepared.sender,
        prepared.nonce,
    )
    await tx.execute(
        "INSERT INTO chain_tx (network, tx_hash, sender, nonce, raw, payment_id, at_ms)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT DO NOTHING",
        prepared.network,
        prepared.tx_hash,
        prepared.sender,
        prepared.nonce,
        prepared.raw,
        first,
        now_ms,
    )
    await tx.execute(
        "UPDATE payment SET tx_hash = $4, updated_at_ms = $5 WHERE state = 'processing' AND id IN"
        " (SELECT payment_id FROM chain_member WHERE network = $1 AND sender = $2 AND nonce = $3)",
        prepared.network,
        prepared.sender,
        prepared.nonce,
        prepared.tx_hash,
        now_ms,
    )


async def replace(tx: Tx, fresh: Prepared, instead_of: str, now_ms: int, cost_gwei: int) -> bool:
    """Keep what replaces the newest transaction of a chain nonce, before it is sent.

    False: another one has replaced it meanwhile, or a block has used the nonce. Whoever comes
    second waits for the row of the nonce, so of two that saw the same one only one is stored. The
    dearer it is, the more of the hour's gas money it takes.
    """
    key = (fresh.network, fresh.sender, fresh.nonce)
    open_still = await tx.fetchval(
        "SELECT 1 FROM chain_nonce WHERE network = $1 AND sender = $2 AND nonce = $3"  # noqa: S608
        f" AND done_ms IS NULL{tx.for_update}",
        *key,
    )
    if open_still is None or (await versions(tx, *key))[0].tx_hash != instead_of:
        return False
    await tx.execute(
        "UPDATE chain_nonce SET cost_gwei = $4"
        " WHERE network = $1 AND sender = $2 AND nonce = $3 AND cost_gwei < $4",
        *key,
        cost_gwei,
    )
    await store(tx, fresh, now_ms)
    return True


_TX = "t.network, t.sender, t.nonce, t.raw, t.tx_hash"


async def sent_for(tx: Tx, payment_id: str) -> Sequence[Prepared]:
    """Every transaction signed for a payment: the newest chain nonce first, and of one nonce the
    newest replacement."""
    rows = await tx.fetch(
        f"SELECT {_TX} FROM chain_tx t WHERE t.payment_id = $1 OR EXISTS (SELECT 1"  # noqa: S608
        " FROM chain_member m WHERE m.payment_id = $1 AND m.network = t.network"
        " AND m.sender = t.sender AND m.nonce = t.nonce) ORDER BY t.at_ms DESC, t.nonce DESC",
        payment_id,
    )
    found = [_prepared(row) for row in rows]
    newest: dict[tuple[str, int], int] = {}
    for place, each in enumerate(found):
        newest.setdefault((each.sender, each.nonce), place)
    return sorted(found, key=lambda each: newest[each.sender, each.nonce])


async def versions(tx: Tx, network: str, gas_account: str, nonce: int) -> Sequence[Prepared]:
    """Everything that was signed with one chain nonce, newest first."""
    rows = await tx.fetch(
        f"SELECT {_TX} FROM chain_tx t WHERE t.network = $1 AND t.sender = $2"  # noqa: S608
        " AND t.nonce = $3 ORDER BY t.at_ms DESC, t.tx_hash",
        network,
        gas_account,
        nonce,
    )
    return [_prepared(row) for row in rows]


async def members(tx: Tx, of: Prepared) -> Sequence[str]:
    """The payments that a transaction settles."""
    rows = await tx.fetch(
        "SELECT payment_id FROM chain_member WHERE network = $1 AND sender = $2 AND nonce = $3"
        " ORDER BY payment_id",
        of.network,
        of.sender,
        of.nonce,
    )
    return [row["payment_id"] for row in rows]


async def call_for(tx: Tx, payment_id: str, sent: Prepared) -> Call:
    """The call that settles one payment by itself, however it was first sent."""
    row = await tx.fetchrow(
        "SELECT target, data FROM chain_member WHERE network = $1 AND sender = $2 AND nonce = $3"
        " AND payment_id = $4",
        sent.network,
        sent.sender,
        sent.nonce,
        payment_id,
    )
    if row is None or row["target"] is None:
        return Call(payment_id, *sender.call_of(sent.raw))
    return Call(payment_id, row["target"], bytes(row["data"]))


@dataclass(frozen=True, slots=True)
class Open:
    """A chain nonce that no block is known to have used. ``newest`` is what was signed last for
    it, at ``newest_ms``; ``wanted``: one of its payments has not ended."""

    nonce: int
    at_ms: int
    newest: Prepared
    newest_ms: int
    wanted: bool


async def open_of(tx: Tx, network: str, gas_account: str, limit: int) -> Sequence[Open]:
    """The lowest open chain nonces of a gas account."""
    rows = await tx.fetch(
        "SELECT n.nonce, n.at_ms AS since_ms, t.at_ms AS newest_ms, t.network, t.sender, t.raw,"
        " t.tx_hash, (EXISTS (SELECT 1 FROM payment p WHERE p.id = n.payment_id"
        " AND p.state = 'processing') OR EXISTS (SELECT 1 FROM chain_member m JOIN payment p"
        " ON p.id = m.payment_id WHERE m.network = n.network AND m.sender = n.sender"
        " AND m.nonce = n.nonce AND p.state = 'processing')) AS wanted"
        " FROM chain_nonce n JOIN chain_tx t ON t.network = n.network AND t.sender = n.sender"
        " AND t.nonce = n.nonce WHERE n.network = $1 AND n.sender = $2 AND n.done_ms IS NULL"
        " AND NOT EXISTS (SELECT 1 FROM chain_tx u WHERE u.network = t.network"
        " AND u.sender = t.sender AND u.nonce = t.nonce AND (u.at_ms > t.at_ms"
        " OR (u.at_ms = t.at_ms AND u.tx_hash < t.tx_hash)))"
        " ORDER BY n.nonce LIMIT $3",
        network,
        gas_account,
        limit,
    )
    return [
        Open(row["nonce"], row["since_ms"], _prepared(row), row["newest_ms"], bool(row["wanted"]))
        for row in rows
    ]


async def close(tx: Tx, of: Prepared, cost_gwei: int | None, now_ms: int) -> None:
    """A block has used this nonce. ``cost_gwei``: what it cost, where that is known."""
    key = (of.network, of.sender, of.nonce)
    first = await tx.execute(
        "UPDATE chain_nonce SET done_ms = $4, cost_gwei = coalesce($5, cost_gwei)"
        " WHERE network = $1 AND sender = $2 AND nonce = $3 AND done_ms IS NULL",
        *key,
        now_ms,
        cost_gwei,
    )
    if cost_gwei is None:
        return
    if first:
        tx.after_commit(lambda: observe.count("gas_spent_gwei", cost_gwei, network=of.network))
    else:
        await tx.execute(
            "UPDATE chain_nonce SET cost_gwei = $4"
            " WHERE network = $1 AND sender = $2 AND nonce = $3",
            *key,
            cost_gwei,
        )


async def reopen(tx: Tx, network: str, gas_account: str, mined: int) -> None:
    """The chain has used no nonce from ``mined`` on, whatever it said before."""
    await tx.execute(
        "UPDATE chain_nonce SET done_ms = NULL WHERE network = $1 AND sender = $2 AND nonce >= $3"
        " AND done_ms IS NOT NULL",
        network,
        gas_account,
        mined,
    )


def _prepared(row: Row) -> Prepared:
    return Prepared(row["network"], row["sender"], row["nonce"], bytes(row["raw"]), row["tx_hash"])
