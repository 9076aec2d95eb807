"""What must not be forgotten about a payment, written before and after every call outside.

A payment is claimed under the unique key of its authorization together with the signed raw
transaction (nonces.py), in one transaction, before anything is sent. From then on whoever finds
the row can finish it: this process, another node, or the next start. The mint and the end of the
payment are one transaction too, keyed by the Transfer log, so finishing twice finishes once.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Final

from chain.transfers import Transfer
from gateway import ledger
from gateway.db import Row, Tx
from gateway.payments import inbound, upto_rows

# Provider of the payments that are settled for other people's sellers (gateway/facilitator).
FACILITATOR: Final = "facilitator"
PAYOUT: Final = "payout"  # of those that go out (payout.py)
TAKEN: Final = "taken"  # authorization_use.decision of a transfer (``take``)
NOTHING: Final = "nothing"  # of a payment by ``upto`` that came to 0: there is no payment row
EXTERNAL: Final = "external"
"""Door of what is bought through ``/api/external``, and source of the lots it becomes."""


@dataclass(frozen=True, slots=True)
class Payment:
    """A payment row. Column meanings: ``tables.py``."""

    id: str
    provider: str
    state: str
    purpose: str
    payer: str | None
    recipient: str | None
    recipient_chain: str
    network: str | None
    asset: str | None
    amount_units: int
    expires_ms: int | None
    auth_nonce: str | None
    valid_before_s: int | None
    from_block: int | None
    tx_hash: str | None
    external_ref: str | None
    external_url: str | None
    lot_id: int | None
    error_code: str | None
    error_detail: str | None
    created_at_ms: int
    updated_at_ms: int
    lease_ms: int
    method: str = "eip3009"
    pay_to: str | None = None
    door: str = ""

    @property
    def owed(self) -> bool:
        """Whether what it pays for is done already."""
        return self.door == upto_rows.DOOR


COLUMNS: Final = tuple(f.name for f in fields(Payment))
_LIST: Final = ", ".join(COLUMNS)


def new_id() -> str:
    """A payment id: time first, so that they sort, then 80 random bits."""
    return f"pay_{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"


def _payment(row: Row) -> Payment:
    return Payment(**{name: row[name] for name in COLUMNS})


async def insert(tx: Tx, payment: Payment) -> None:
    marks = ", ".join(f"${i + 1}" for i in range(len(COLUMNS)))
    await tx.execute(
        f"INSERT INTO payment ({_LIST}) VALUES ({marks})",  # noqa: S608
        *(getattr(payment, name) for name in COLUMNS),
    )


async def by_id(tx: Tx, payment_id: str, *, lock: bool = False) -> Payment | None:
    """The payment; ``lock`` keeps others from finishing it until this transaction ends."""
    row = await tx.fetchrow(
        f"SELECT {_LIST} FROM payment WHERE id = $1{tx.for_update if lock else ''}",  # noqa: S608
        payment_id,
    )
    return None if row is None else _payment(row)


@dataclass(frozen=True, slots=True)
class AuthKey:
    """What makes an EIP-3009 authorization unique: the token burns its nonce once."""

    network: str
    asset: str
    payer: str
    nonce: str


@dataclass(frozen=True, slots=True)
class Claim:
    """What an authorization is used for, once and for one request.

    ``decision`` is ``settle``, or ``credits`` (from_credits.py); then ``payment_id`` is the hold's.
    """

    payment_id: str
    content: bytes
    offer: bytes | None
    decision: str = "settle"


async def claim_of(tx: Tx, key: AuthKey) -> Claim | None:
    row = await tx.fetchrow(
        "SELECT payment_id, content, offer, decision FROM authorization_use"
        " WHERE network = $1 AND asset = $2 AND payer = $3 AND nonce = $4",
        key.network,
        key.asset,
        key.payer,
        key.nonce,
    )
    if row is None:
        return None
    offer = row["offer"]
    return Claim(
        row["payment_id"],
        bytes(row["content"]),
        None if offer is None else bytes(offer),
        row["decision"],
    )


async def claim(tx: Tx, key: AuthKey, new: Claim, now_ms: int) -> bool:
    """Take the authorization for one use. False: somebody has it already."""
    return (
        await tx.execute(
            "INSERT INTO authorization_use (network, asset, payer, nonce, decision, payment_id,"
            " content, offer, at_ms) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)"
            " ON CONFLICT (network, asset, payer, nonce) DO NOTHING",
            key.network,
            key.asset,
            key.payer,
            key.nonce,
            new.decision,
            new.payment_id,
            new.content,
            new.offer,
            now_ms,
        )
        == 1
    )


async def take(
    tx: Tx, payment: Payment, candidates: Sequence[Transfer], now_ms: int
) -> Transfer | None:
    """The transfer among ``candidates`` that is this payment's, from now on and nobody else's.

    A token marks an EIP-3009 authorization in its logs. Permit2 marks nothing, and a transaction
    can carry the nonces of many payments beside one transfer: each is taken once, by whoever comes
    first; but what one of our own transactions moved is of the payment it was made for. None:
    others have them all.
    """
    if payment.method != "permit2":
        return candidates[0] if candidates else None
    await by_id(tx, payment.id, lock=True)  # before its transfer, as everybody does
    owners = [await owner_of(tx, each) for each in candidates]
    mine = [each for each, owner in zip(candidates, owners, strict=True) if owner == payment.id]
    free = [each for each, owner in zip(candidates, owners, strict=True) if owner is None]
    for each in (*mine, *free):
        new = Claim(payment.id, b"", None, TAKEN)
        if await claim(tx, _place(each), new, now_ms) or each in mine:
            return each
    return None


def _place(transfer: Transfer) -> AuthKey:
    """The key under which a transfer is taken: no nonce looks like this."""
    place = f"{transfer.to}:{transfer.tx_hash}:{transfer.n}"
    return AuthKey(transfer.network, transfer.asset, transfer.from_, place)


async def owner_of(tx: Tx, transfer: Transfer) -> str | None:
    """The payment by Permit2 that has a transfer, or that our own transaction was made for."""
    taken = await claim_of(tx, _place(transfer))
    if taken is not None:
        return taken.payment_id
    # Such a payment is always alone in its transaction.
    owner: str | None = await tx.fetchval(
        "SELECT p.id FROM chain_tx t JOIN chain_member m ON m.network = t.network"
        " AND m.sender = t.sender AND m.nonce = t.nonce JOIN payment p ON p.id = m.payment_id"
        " WHERE t.network = $1 AND t.tx_hash = $2 AND p.method = 'permit2' LIMIT 1",
        transfer.network,
        transfer.tx_hash,
    )
    return owner


async def finish(
    tx: Tx,
    payment_id: str,
    transfer: Transfer,
    now_ms: int,
    hold: Callable[[int], ledger.Hold] | None = None,
) -> tuple[Payment, ledger.Outcome | None]:
    """The transfer is on chain: mint what the log says and end the payment, in one transaction.

    What may not be minted before its block is deeper waits; the payment then stays ``processing``.

    ``hold`` makes the hold of the call this payment came with, of the payer's account: taken in
    the same step, so that a parallel call of the same wallet cannot spend what was just paid.
    Safe to run any number of times; the mint's key and the row's state decide.
    """
    payment = await by_id(tx, payment_id, lock=True)
    if payment is not None and payment.provider == FACILITATOR:
        return await _finish_for_others(tx, payment, transfer, now_ms), None
    if payment is None or payment.recipient is None:
        raise ledger.LedgerFault(f"payment {payment_id} cannot be finished: it has no recipient")
    source = payment.door or "x402"
    whose = inbound.For(
        payment.recipient, payment.recipient_chain, source, payment_id, payment.expires_ms
    )
    placed = await inbound.place(tx, transfer, whose, now_ms, hold)
    if placed.taken:
        await fail(
            tx, payment_id, "payment_already_used", "its transfer was claimed before", now_ms
        )
    else:
        # One that waits to be safe keeps its state: it is looked at again.
        new = await tx.execute(
            "UPDATE payment SET state = $5, tx_hash = $2, lot_id = $3, updated_at_ms = $4,"
            " error_code = NULL, error_detail = NULL WHERE id = $1 AND state <> 'succeeded'",
            payment_id,
            transfer.tx_hash,
            placed.row.lot_id,
            now_ms,
            "succeeded" if placed.row.state == "minted" else "processing",
        )
        if new and placed.row.state == "minted":
            inbound.count_ended(tx, "succeeded")
    done = await by_id(tx, payment_id)
    if done is None:
        raise ledger.LedgerFault(f"payment {payment_id} vanished")
    return done, placed.extra


async def _finish_for_others(tx: Tx, payment: Payment, transfer: Transfer, now_ms: int) -> Payment:
    """The money went to somebody else's seller: nothing is minted here."""
    new = await tx.execute(
        "UPDATE payment SET state = 'succeeded', tx_hash = $2, updated_at_ms = $3,"
        " error_code = NULL, error_detail = NULL WHERE id = $1 AND state <> 'succeeded'",
        payment.id,
        transfer.tx_hash,
        now_ms,
    )
    if new:
        inbound.count_ended(tx, "succeeded")
    return await by_id(tx, payment.id) or payment


async def fail(tx: Tx, payment_id: str, code: str, detail: str, now_ms: int) -> None:
    """The payment can never succeed: nothing moved, and nothing will."""
    ended = await tx.fetchrow(
        # One that had minted once and left the chain was not just refused.
        "UPDATE payment SET state = CASE WHEN lot_id IS NULL THEN 'failed' ELSE 'reversed' END,"
        " error_code = $2, error_detail = $3,"
        " updated_at_ms = $4 WHERE id = $1 AND state IN ('created', 'processing')"
        " RETURNING provider, door",
        payment_id,
        code,
        # Other parties' words; what no text column takes must not keep a payment open.
        detail[:500].encode("utf-8", "replace").decode("utf-8").replace("\0", "?"),
        now_ms,
    )
    if ended is None:
        return
    if ended["provider"] != "stripe":
        inbound.count_ended(tx, "failed")
    if ended["door"] == upto_rows.DOOR:
        await upto_rows.unsettled(tx, payment_id, "sent", f"{code}: {detail}", now_ms)


async def doubt(tx: Tx, payment_id: str, code: str, now_ms: int) -> None:
    """Ours is in a block and moved nothing. Whether the payment has failed takes longer to prove,
    but it cost us gas (``budget.payer_is_blocked``)."""
    await tx.execute(
        "UPDATE payment SET error_code = $2, updated_at_ms = $3 WHERE id = $1"
        " AND state = 'processing' AND error_code IS NULL",
        payment_id,
        code,
        now_ms,
    )


async def release(tx: Tx, payment_id: str, at_ms: int) -> None:
    """Nobody is working on this payment any more: the background loop may take it from then on."""
    await tx.execute(
        "UPDATE payment SET lease_ms = $2 WHERE id = $1 AND state = 'processing'",
        payment_id,
        at_ms,
    )


async def take_unfinished(
    tx: Tx, now_ms: int, lease_ms: int, limit: int, *, going_out: bool = False
) -> Sequence[Payment]:
    """Lease payments on chain that nobody is working on, oldest first: those that come in, or
    those that go out."""
    # What moved before it was told of has nothing to be finished: it only waits for its block to
    # be deep enough (confirm.py).
    which = "= $3" if going_out else "NOT IN ('stripe', 'deposits', $3)"
    skip = " FOR UPDATE SKIP LOCKED" if tx.dialect == "postgres" else ""
    rows = await tx.fetch(
        f"SELECT {_LIST} FROM payment WHERE state = 'processing' AND provider {which}"  # noqa: S608
        f" AND lease_ms <= $1 ORDER BY lease_ms LIMIT $2{skip}",
        now_ms,
        limit,
        PAYOUT,
    )
    await tx.executemany(
        "UPDATE payment SET lease_ms = $2 WHERE id = $1",
        [(row["id"], now_ms + lease_ms) for row in rows],
    )
    return [_payment(row) for row in rows]


async def renew(tx: Tx, payment_ids: Sequence[str], lease_ms: int) -> None:
    """Whoever works on these payments speaks for them until ``lease_ms``. One that somebody is
    writing at this moment is passed over: it is being finished."""
    if tx.dialect == "postgres":
        await tx.execute(
            "UPDATE payment SET lease_ms = $1 WHERE id IN (SELECT id FROM payment"
            " WHERE id = ANY($2) AND state = 'processing' ORDER BY id FOR UPDATE SKIP LOCKED)",
            lease_ms,
            list(payment_ids),
        )
        return
    await tx.executemany(
        "UPDATE payment SET lease_ms = $1 WHERE id = $2 AND state = 'processing'",
        [(lease_ms, each) for each in payment_ids],
    )


async def drop_leases(tx: Tx) -> None:
    """Whoever held the lease of a payment is dead."""
    await tx.execute("UPDATE payment SET lease_ms = 0 WHERE state = 'processing'")
