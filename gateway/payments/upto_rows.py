"""Calls paid by ``upto``, as rows: what stands before the work, and what must not be forgotten.

    open       the call runs, under a hold that reserves nothing: the money is still the payer's
    due        it came to so much; in the transaction that ends the hold
    sent       the payment is signed and stored; in the transaction that does so
    settled    the transfer is minted and charged, in one transaction
    nothing    it came to nothing, or failed, or its gateway died: nothing is sent
    unsettled  it was done and cannot be settled: the house's loss, until somebody pays or forgives

A wallet has one that has not ended, which the table's index says; what all of them may come to
counts into the exposure limit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Final

from gateway import ledger
from gateway.db import Row, Tx
from gateway.ledger import read
from gateway.observe import log

DOOR: Final = "upto"
"""``payment.door`` of such a payment, and the source of the lot it becomes."""
UPTO: Final = "upto"
"""``authorization_use.decision``: settled for what its call came to."""


@dataclass(frozen=True, slots=True)
class UptoCall:
    """A row. Column meanings: ``tables.py``."""

    payment_id: str
    hold_id: int
    network: str
    asset: str
    payer: str
    payer_chain: str
    pay_to: str
    nonce: str
    valid_before_s: int
    most_units: int
    data: bytes
    state: str
    units: int | None
    breakdown: str | None
    answer_status: int | None
    answer_headers: str | None
    answer_body: bytes | None
    error: str | None
    at_ms: int
    updated_at_ms: int
    look_ms: int

    @property
    def answer(self) -> ledger.Answer | None:
        """What was answered and is kept until it is paid."""
        if self.answer_status is None or self.answer_headers is None:
            return None
        headers = tuple((name, value) for name, value in json.loads(self.answer_headers))
        return ledger.Answer(self.answer_status, headers, self.answer_body)


COLUMNS: Final = tuple(f.name for f in fields(UptoCall))
_LIST: Final = ", ".join(COLUMNS)
UNENDED: Final = "state IN ('open', 'due', 'sent', 'unsettled')"
"""As the table's index says it: asked for in these words, it is used."""


def _row(row: Row) -> UptoCall:
    made = {name: row[name] for name in COLUMNS}
    body = made["answer_body"]
    made["answer_body"] = None if body is None else bytes(body)
    return UptoCall(**{**made, "data": bytes(made["data"])})


async def insert(tx: Tx, call: UptoCall) -> bool:
    """False: this wallet has one that has not ended."""
    marks = ", ".join(f"${i + 1}" for i in range(len(COLUMNS)))
    return (
        await tx.execute(
            f"INSERT INTO upto_call ({_LIST}) VALUES ({marks})"  # noqa: S608
            f" ON CONFLICT (payer, payer_chain) WHERE {UNENDED} DO NOTHING",
            *(getattr(call, name) for name in COLUMNS),
        )
        == 1
    )


async def by_id(tx: Tx, payment_id: str) -> UptoCall | None:
    row = await tx.fetchrow(
        f"SELECT {_LIST} FROM upto_call WHERE payment_id = $1",  # noqa: S608
        payment_id,
    )
    return None if row is None else _row(row)


async def unended_of(tx: Tx, payer: str, payer_chain: str) -> UptoCall | None:
    """The one of this wallet that has not ended."""
    row = await tx.fetchrow(
        f"SELECT {_LIST} FROM upto_call WHERE payer = $1 AND payer_chain = $2"  # noqa: S608
        f" AND {UNENDED}",
        payer,
        payer_chain,
    )
    return None if row is None else _row(row)


async def move(
    tx: Tx,
    payment_id: str,
    before: Sequence[str],
    state: str,
    now_ms: int,
    *,
    units: int | None = None,
    breakdown: str | None = None,
) -> bool:
    """From one of the states ``before`` to ``state``. False: it is in none of them."""
    marks = ", ".join(f"${i + 7}" for i in range(len(before)))
    return (
        await tx.execute(
            "UPDATE upto_call SET state = $2, updated_at_ms = $3, look_ms = $3,"  # noqa: S608
            " units = coalesce($4, units), breakdown = coalesce($5, breakdown),"
            # What is never handed in need not lie about, signed.
            " data = CASE WHEN $2 = 'nothing' THEN $6 ELSE data END"
            f" WHERE payment_id = $1 AND state IN ({marks})",
            payment_id,
            state,
            now_ms,
            units,
            breakdown,
            b"",
            *before,
        )
        == 1
    )


async def keep_answer(tx: Tx, payment_id: str, answer: ledger.Answer | None) -> None:
    """Keep what was answered, and nowhere else: a stored answer of the call's hold would go out to
    whoever repeats the request, paid or not. None: forget it."""
    await tx.execute(
        "UPDATE upto_call SET answer_status = $2, answer_headers = $3, answer_body = $4"
        " WHERE payment_id = $1",
        payment_id,
        None if answer is None else answer.status,
        None if answer is None else json.dumps(answer.headers),
        None if answer is None else answer.body,
    )


async def note(tx: Tx, payment_id: str, error: str | None, look_ms: int) -> None:
    """It could not be settled now, for this reason; when to look again."""
    await tx.execute(
        "UPDATE upto_call SET error = $2, look_ms = $3 WHERE payment_id = $1 AND state = 'due'",
        payment_id,
        None if error is None else error[:500],
        look_ms,
    )


async def free_interrupted(tx: Tx, now_ms: int) -> int:
    """Calls whose hold the sweeper has ended (``ledger/sweep.py``) came to nothing: whoever ends a
    hold otherwise says in the same transaction what came of it."""
    return await tx.execute(
        "UPDATE upto_call SET state = 'nothing', updated_at_ms = $1, data = $2"  # noqa: S608
        f" WHERE {UNENDED} AND state = 'open' AND EXISTS (SELECT 1 FROM transfer t"
        " WHERE t.id = upto_call.hold_id)",
        now_ms,
        b"",
    )


async def take_due(tx: Tx, now_ms: int, again_ms: int, limit: int) -> list[str]:
    """Payments that are due and that nobody has looked at lately, oldest first."""
    skip = " FOR UPDATE SKIP LOCKED" if tx.dialect == "postgres" else ""
    rows = await tx.fetch(
        "SELECT payment_id FROM upto_call WHERE"  # noqa: S608
        f" {UNENDED} AND state = 'due' AND look_ms <= $1 ORDER BY look_ms LIMIT $2{skip}",
        now_ms,
        limit,
    )
    found = [row["payment_id"] for row in rows]
    await tx.executemany(
        "UPDATE upto_call SET look_ms = $2 WHERE payment_id = $1",
        [(each, now_ms + again_ms) for each in found],
    )
    return found


async def unsettled(tx: Tx, payment_id: str, before: str, why: str, now_ms: int) -> bool:
    """It can never be settled. False: it is in another state than ``before`` by now."""
    if not await move(tx, payment_id, (before,), "unsettled", now_ms):
        return False
    await tx.execute("UPDATE upto_call SET error = $2 WHERE payment_id = $1", payment_id, why[:500])
    log.error("upto %s was delivered and cannot be settled: %s", payment_id, why)
    return True


@dataclass(frozen=True, slots=True)
class Standing:
    """How many calls of one state there are, and what they may come to, or did."""

    state: str
    calls: int
    units: int


async def standing(tx: Tx) -> list[Standing]:
    """Those that have not ended, by state; one line for each state, also for none."""
    rows = await tx.fetch(
        "SELECT state, count(*) AS calls, sum(coalesce(units, most_units)) AS units"  # noqa: S608
        f" FROM upto_call WHERE {UNENDED} GROUP BY state"
    )
    found = {row["state"]: row for row in rows}
    return [
        Standing(state, int(found[state]["calls"]), int(found[state]["units"]))
        if state in found
        else Standing(state, 0, 0)
        for state in ("open", "due", "sent", "unsettled")
    ]


async def not_paid(tx: Tx, payer: str | None = None) -> list[UptoCall]:
    """Calls that were done and are not paid, oldest first; of one wallet, or of all."""
    rows = await tx.fetch(
        f"SELECT {_LIST} FROM upto_call WHERE {UNENDED} AND state <> 'open'"  # noqa: S608
        " AND ($1 = '' OR payer = $1) ORDER BY at_ms, payment_id",
        payer or "",
    )
    return [_row(row) for row in rows]


async def forgive(tx: Tx, payment_id: str, why: str, now_ms: int) -> bool:
    """An operator says that this loss is the end of it. False: it is not ``unsettled``."""
    if not await move(tx, payment_id, ("unsettled",), "forgiven", now_ms):
        return False
    await tx.execute("UPDATE upto_call SET error = $2 WHERE payment_id = $1", payment_id, why[:500])
    return True


def scheme_of(payment_id: str) -> str:
    """``scheme`` of the hold that is the charge of a call."""
    return f"{DOOR}:{payment_id}"


async def charge_of(
    tx: Tx, call: UptoCall, hold: ledger.HoldRow
) -> tuple[ledger.HoldRow, ledger.TransferRow] | None:
    """The charge of a call that is paid, found from the call's own hold: its hold, and its entry.
    It has the answer. None: it was not charged."""
    for each in await read.holds_of_request(tx, hold.account_id, hold.request_id):
        close = await read.close_of(tx, each.id)
        if each.scheme == scheme_of(call.payment_id) and close is not None:
            return each, close
    return None


async def charge(tx: Tx, payment_id: str, lot_id: int, now_ms: int) -> None:
    """Charge the call that a transfer was made for, from the lot that it has just become.

    In the transaction of the mint, so nothing of it can be spent otherwise. What paid a debt of the
    account instead is not charged once more.
    """
    call = await by_id(tx, payment_id)
    if call is None or call.units is None:
        raise ledger.LedgerFault(f"payment {payment_id} is of no call that came to anything")
    if not await move(tx, payment_id, ("sent", "unsettled", "forgiven"), "settled", now_ms):
        return
    first = await read.hold_by_id(tx, call.hold_id)
    if first is None:
        raise ledger.LedgerFault(f"hold {call.hold_id} vanished")
    await keep_answer(tx, payment_id, None)
    guard = ledger.Guard(first.principal, scheme_of(payment_id), first.request_id)
    hold = ledger.Hold(
        account_id=first.account_id,
        guard=guard,
        content=first.content,
        max_units=call.units,
        lease_ms=0,
        call=ledger.Call(
            route=first.route,
            method=first.method,
            target=first.target,
            price=first.price,
            run=first.run,
            payment_id=payment_id,
        ),
        only=ledger.Only(lot_id=lot_id, owed=True),
    )
    (held,) = await ledger.apply(tx, [hold], now_ms)
    if not isinstance(held, ledger.Held):
        log.warning("payment %s was not charged for its call: %s", payment_id, held)
        return
    close = ledger.Close(held.hold, call.units, answer=call.answer, breakdown=call.breakdown)
    await ledger.apply(tx, [close], now_ms)
