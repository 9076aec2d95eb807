"""Reading the ledger: balance, statement, what became of a request. Nothing here changes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.db import Row, Tx
from gateway.ledger.book import LotState
from gateway.ledger.rows import HOLD, LOT, TRANSFER, columns, hold_row, of_kind, transfer_row
from gateway.ledger.steps import NEVER, Answer, HoldRow, Only, TransferRow


@dataclass(frozen=True, slots=True)
class AccountView:
    """An account as its owner sees it. Units; ``next_expiry_ms`` None: nothing expires."""

    id: int
    available_units: int
    held_units: int
    debt_units: int
    added_units: int
    spent_units: int
    next_expiry_ms: int | None
    frozen: bool


async def account(tx: Tx, account_id: int) -> AccountView | None:
    """The account as stored; ``Expire`` it first where the shown balance must be exact."""
    row = await tx.fetchrow("SELECT * FROM account WHERE id = $1", account_id)
    if row is None:
        return None
    return AccountView(
        id=row["id"],
        available_units=row["available"],
        held_units=row["held"],
        debt_units=row["debt"],
        added_units=row["added"],
        spent_units=row["spent"],
        next_expiry_ms=None if row["next_expiry_ms"] >= NEVER else row["next_expiry_ms"],
        frozen=bool(row["frozen"]),
    )


async def statement(
    tx: Tx, account_id: int, limit: int, before_id: int | None = None
) -> Sequence[TransferRow]:
    """Transfers of an account, newest first. ``before_id``: go on behind that line."""
    if before_id is None:
        head = await tx.fetchval("SELECT last_id FROM account WHERE id = $1", account_id)
    else:
        head = await tx.fetchval(
            "SELECT prev_id FROM transfer WHERE id = $1 AND account_id = $2", before_id, account_id
        )
    rows = await tx.fetch(
        f"WITH RECURSIVE line AS (SELECT * FROM transfer WHERE id = $1 AND account_id = $2"  # noqa: S608
        " UNION ALL SELECT t.* FROM transfer t JOIN line ON t.id = line.prev_id)"
        f" SELECT {columns(TRANSFER)} FROM line LIMIT $3",
        head or 0,
        account_id,
        limit,
    )
    return [transfer_row(row) for row in rows]


async def lots(tx: Tx, account_id: int, limit: int, only: int | None = None) -> Sequence[LotState]:
    """An account's newest lots, or ``only`` that one, with what truly remains of each.

    What was spent since the last fold is not booked on the lots yet; it is taken off here in the
    order in which the fold will take it.
    """
    unbooked: int = await tx.fetchval("SELECT pos - folded FROM account WHERE id = $1", account_id)
    left: dict[int, int] = {}
    for row in await _line(tx, account_id):
        part = min(unbooked, row["remaining_units"])
        unbooked -= part
        left[row["id"]] = row["remaining_units"] - part
    newest = await tx.fetch(
        f"SELECT {columns(LOT)} FROM lot WHERE account_id = $1 AND id = coalesce($3, id)"  # noqa: S608
        " ORDER BY id DESC LIMIT $2",
        account_id,
        limit,
        only,
    )
    found = [LotState(**{name: row[name] for name in LOT}) for row in newest]
    for lot in found:
        lot.remaining_units = left.get(lot.id, lot.remaining_units)
    return found


async def left_of(tx: Tx, account_id: int, only: Only) -> int:
    """How much of certain lots can be held now: a look, not yet a decision.

    What is due to expire is still counted, and what open holds that float will take of it.
    """
    row = await tx.fetchrow(
        "SELECT available, pos - folded AS unbooked FROM account WHERE id = $1", account_id
    )
    if row is None:
        return 0
    units: int = await tx.fetchval(
        "SELECT coalesce(sum(CASE WHEN before_it >= $2 THEN remaining_units"  # noqa: S608
        " WHEN before_it + remaining_units > $2 THEN before_it + remaining_units - $2"
        " ELSE 0 END), 0) FROM (SELECT *, sum(remaining_units) OVER (ORDER BY expires_ms, id)"
        " - remaining_units AS before_it FROM lot WHERE account_id = $1 AND state = 'live'"
        f" AND remaining_units > 0) AS line WHERE {of_kind(3)}",
        account_id,
        row["unbooked"],
        only.lot_id,
        only.source,
        only.payer,
    )
    available: int = row["available"]
    return min(int(units), available)


async def next_expiry_of(tx: Tx, account_id: int, only: Only | None) -> int | None:
    """When the first of certain lots expires of which anything is left; None: never."""
    unbooked: int = await tx.fetchval("SELECT pos - folded FROM account WHERE id = $1", account_id)
    named = Only() if only is None else only
    expires_ms: int | None = await tx.fetchval(
        "SELECT min(expires_ms) FROM (SELECT *, sum(remaining_units)"  # noqa: S608
        " OVER (ORDER BY expires_ms, id) AS after_it FROM lot WHERE account_id = $1"
        " AND state = 'live' AND remaining_units > 0) AS line"
        f" WHERE after_it > $2 AND {of_kind(3)}",
        account_id,
        unbooked,
        named.lot_id,
        named.source,
        named.payer,
    )
    return None if expires_ms is None or expires_ms >= NEVER else expires_ms


@dataclass(frozen=True, slots=True)
class LotUse:
    """A call that was charged ``units`` of a lot, of which some may have been given back."""

    hold: HoldRow
    units: int
    refunded_units: int


async def calls_of_lot(tx: Tx, lot_id: int, limit: int) -> Sequence[LotUse]:
    """Which calls a lot paid for, the newest first.

    Walks the statement back to the mint, since no index leads from the tape to its captures: for
    an operator and for disputes, not for a request's way.
    """
    lot = await tx.fetchrow("SELECT account_id FROM lot WHERE id = $1", lot_id)
    if lot is None:
        return []
    stretches = await _stretches(tx, lot["account_id"], lot_id)
    pins = {
        row["hold_id"]: row["captured_units"]
        for row in await tx.fetch(
            "SELECT hold_id, captured_units FROM pin WHERE lot_id = $1 AND captured_units > 0",
            lot_id,
        )
    }
    rows = await tx.fetch(
        "WITH RECURSIVE line AS (SELECT * FROM transfer"
        "   WHERE id = (SELECT last_id FROM account WHERE id = $1)"
        " UNION ALL SELECT t.* FROM transfer t JOIN line ON t.id = line.prev_id"
        "   WHERE line.id <> $2)"
        " SELECT id, pos, tape_units FROM line WHERE kind = 'capture' AND amount_units > 0"
        " ORDER BY seq DESC",
        lot["account_id"],
        lot_id,
    )
    used: dict[int, int] = {}
    for row in rows:
        end = row["pos"] + row["tape_units"]
        units = pins.get(row["id"], 0) + sum(
            max(min(high, end) - max(low, row["pos"]), 0) for low, high in stretches
        )
        if units:
            used[row["id"]] = units
        if len(used) == limit:
            break
    return await _uses(tx, lot_id, used)


@dataclass(frozen=True, slots=True)
class LotPart:
    """What a call was charged of one lot, and how much of that was given back. Units.

    ``network`` and ``ref`` are the outside fact the lot was minted for: a chain and its
    transaction, "stripe" and a payment intent.
    """

    lot_id: int
    source: str
    payer: str | None
    payment_id: str | None
    network: str | None
    ref: str | None
    units: int
    refunded_units: int


async def lots_of_call(tx: Tx, close: TransferRow) -> Sequence[LotPart]:
    """Which lots a charge was paid from, in the order in which they were spent.

    What was spent since the account's last fold is not booked on lots yet, and is told here as
    the fold will book it: until then a lot that arrives and expires sooner may take its place.
    """
    if close.kind != "capture" or not close.amount_units:
        return []
    used: dict[int, int] = {}
    for row in await tx.fetch(
        "SELECT lot_id, captured_units FROM pin WHERE hold_id = $1 AND captured_units > 0"
        " ORDER BY lot_id",
        close.id,
    ):
        used[row["lot_id"]] = row["captured_units"]
    start, end = close.pos, close.pos + close.tape_units
    for low, high, lot_id in await _booked(tx, close.account_id, start, end):
        units = min(high, end) - max(low, start)
        if units > 0:
            used[lot_id] = used.get(lot_id, 0) + units
    if not used:
        return []
    back = {
        row["lot_id"]: int(row["units"])
        for row in await tx.fetch(
            "SELECT p.lot_id, sum(p.amount_units) AS units FROM refund r"
            " JOIN refund_part p ON p.refund_id = r.id WHERE r.charge_id = $1 GROUP BY p.lot_id",
            close.id,
        )
    }
    lots = {
        row["id"]: row
        for row in await tx.fetch_any(
            "SELECT l.id, l.source, l.payer, l.payment_id, k.network, k.ref FROM lot l"
            " LEFT JOIN mint_key k ON k.lot_id = l.id WHERE l.id {any}",
            list(used),
        )
    }
    return [
        LotPart(
            lot_id,
            lots[lot_id]["source"],
            lots[lot_id]["payer"],
            lots[lot_id]["payment_id"],
            lots[lot_id]["network"],
            lots[lot_id]["ref"],
            units,
            back.get(lot_id, 0),
        )
        for lot_id, units in used.items()
    ]


async def _booked(tx: Tx, account_id: int, start: int, end: int) -> list[tuple[int, int, int]]:
    """Stretches of the tape that meet ``start`` to ``end``, with their lots."""
    rows = await tx.fetch(
        "SELECT from_pos, to_pos, lot_id FROM segment WHERE account_id = $1 AND from_pos < $3"
        " AND from_pos >= coalesce((SELECT max(from_pos) FROM segment"
        "   WHERE account_id = $1 AND from_pos <= $2), 0) ORDER BY from_pos",
        account_id,
        start,
        end,
    )
    found = [(row["from_pos"], row["to_pos"], row["lot_id"]) for row in rows]
    at: int = await tx.fetchval("SELECT folded FROM account WHERE id = $1", account_id)
    if at < end:
        for row in await _line(tx, account_id):
            found.append((at, at + row["remaining_units"], row["id"]))
            at += row["remaining_units"]
    return found


async def _stretches(tx: Tx, account_id: int, lot_id: int) -> list[tuple[int, int]]:
    """What a lot paid of the tape: what is booked, and what the next fold will book."""
    rows = await tx.fetch("SELECT from_pos, to_pos FROM segment WHERE lot_id = $1", lot_id)
    found = [(row["from_pos"], row["to_pos"]) for row in rows]
    start: int = await tx.fetchval("SELECT folded FROM account WHERE id = $1", account_id)
    end: int = await tx.fetchval("SELECT pos FROM account WHERE id = $1", account_id)
    for row in await _line(tx, account_id):
        part = min(end - start, row["remaining_units"])
        if row["id"] == lot_id and part:
            found.append((start, start + part))
        start += part
    return found


async def _line(tx: Tx, account_id: int) -> Sequence[Row]:
    """The live lots in the order in which they are spent."""
    return await tx.fetch(
        "SELECT id, remaining_units FROM lot WHERE account_id = $1 AND state = 'live'"
        " AND remaining_units > 0 ORDER BY expires_ms, id",
        account_id,
    )


async def _uses(tx: Tx, lot_id: int, used: dict[int, int]) -> list[LotUse]:
    if not used:
        return []
    holds = {
        row["id"]: hold_row(row)
        for row in await tx.fetch_any(
            f"SELECT {columns(HOLD)} FROM hold WHERE id {{any}}",  # noqa: S608
            list(used),
        )
    }
    back = {
        row["charge_id"]: int(row["units"])
        for row in await tx.fetch_any(
            "SELECT r.charge_id, sum(p.amount_units) AS units FROM refund r"
            " JOIN refund_part p ON p.refund_id = r.id WHERE p.lot_id = $1 AND r.charge_id {any}"
            " GROUP BY r.charge_id",
            list(used),
            lot_id,
        )
    }
    return [LotUse(holds[i], units, back.get(i, 0)) for i, units in used.items()]


async def minted_units(tx: Tx, lot_id: int) -> int | None:
    """How many units a lot began with."""
    units: int | None = await tx.fetchval("SELECT minted_units FROM lot WHERE id = $1", lot_id)
    return units


async def hold_by_id(tx: Tx, hold_id: int) -> HoldRow | None:
    row = await tx.fetchrow(f"SELECT {columns(HOLD)} FROM hold WHERE id = $1", hold_id)  # noqa: S608
    return None if row is None else hold_row(row)


async def holds_of_request(tx: Tx, account_id: int, request_id: str) -> Sequence[HoldRow]:
    """The calls of an account with this request id or alias; ids are unique per principal."""
    rows = await tx.fetch(
        f"SELECT {columns(HOLD)} FROM hold WHERE request_id = $1 AND account_id = $2"  # noqa: S608
        f" UNION SELECT {columns(HOLD, 'h')} FROM request_alias a JOIN hold h ON h.id = a.hold_id"
        " WHERE a.account_id = $2 AND a.alias = $1 ORDER BY id DESC LIMIT 20",
        request_id,
        account_id,
    )
    return [hold_row(row) for row in rows]


async def close_of(tx: Tx, hold_id: int) -> TransferRow | None:
    """How a hold ended; None while it is open."""
    row = await tx.fetchrow(f"SELECT {columns(TRANSFER)} FROM transfer WHERE id = $1", hold_id)  # noqa: S608
    return None if row is None else transfer_row(row)


@dataclass(frozen=True, slots=True)
class Charge:
    """What became of a call. ``close`` None: it still runs."""

    close: TransferRow | None
    refunded_units: int

    @property
    def state(self) -> str:
        """pending, charged, not_charged or refunded (in part or whole: see the units)."""
        if self.close is None:
            return "pending"
        if self.refunded_units:
            return "refunded"
        return "charged" if self.close.kind == "capture" else "not_charged"


async def charge_of(tx: Tx, hold_id: int) -> Charge:
    """How a call ended, and what was given back of it since."""
    return Charge(await close_of(tx, hold_id), await refunded_units(tx, hold_id))


async def refunded_units(tx: Tx, hold_id: int) -> int:
    """How much of a charge was given back."""
    units: int = await tx.fetchval(
        "SELECT coalesce(sum(amount_units), 0) FROM refund WHERE charge_id = $1", hold_id
    )
    return int(units)


async def refunds_of_call(tx: Tx, hold_id: int) -> Sequence[TransferRow]:
    """The lines that gave parts of a charge back, in their order."""
    rows = await tx.fetch(
        f"SELECT {columns(TRANSFER, 't')} FROM refund r JOIN transfer t ON t.id = r.id"  # noqa: S608
        " WHERE r.charge_id = $1 ORDER BY t.seq",
        hold_id,
    )
    return [transfer_row(row) for row in rows]


async def answer_of(tx: Tx, hold_id: int) -> Answer | None:
    """The stored answer, if there is one and it has not been purged."""
    row = await tx.fetchrow("SELECT status, headers, body FROM answer WHERE hold_id = $1", hold_id)
    if row is None:
        return None
    headers = tuple((name, value) for name, value in json.loads(row["headers"]))
    body = row["body"]
    return Answer(row["status"], headers, None if body is None else bytes(body))
