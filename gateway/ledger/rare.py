"""What refunds, freezes and reversals read and write besides the rest (``store.py``).

They name a lot or a charge, which tells the account to lock: both are immutable, so that is looked
up before the lock. Everything else is read under it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from gateway.db import Tx
from gateway.ledger.book import Book, LedgerFault, Rare, Segment
from gateway.ledger.loss_steps import Reopen, WriteOff
from gateway.ledger.payout_steps import EndPayOut, PayOut, PayoutEndRow, PayoutRow
from gateway.ledger.rows import (
    HOLD,
    LOT,
    PAYOUT,
    PAYOUT_END,
    REFUND,
    add_lots,
    columns,
    hold_row,
    insert,
    load_pins,
    load_transfers,
)
from gateway.ledger.steps import (
    Expire,
    Freeze,
    FreezeAccount,
    Mint,
    Refund,
    RefundRow,
    Reverse,
    Step,
    Unfreeze,
)

_CLAIMS: Final = (Freeze, Unfreeze, Reverse, WriteOff, Reopen)
_OF_A_LOT: Final = (*_CLAIMS, PayOut)
_MOVING: Final = (*_OF_A_LOT, EndPayOut)


def claims(steps: Sequence[Step]) -> bool:
    """Whether one of them may take a lot out of the line, or pin it."""
    return any(isinstance(step, _MOVING) for step in steps)


async def find_accounts(tx: Tx, book: Book, steps: Sequence[Step]) -> None:
    """Whose lots and charges these are. Raises ``LedgerFault`` for one that does not exist."""
    lots = {s.lot_id for s in steps if isinstance(s, _OF_A_LOT)}
    charges = {s.charge_id for s in steps if isinstance(s, Refund)}
    ended = {s.payout_id for s in steps if isinstance(s, EndPayOut)}
    of_account = any(isinstance(s, FreezeAccount) for s in steps)
    if not lots and not charges and not ended and not of_account:
        return
    book.rare = rare = Rare()
    if ended:
        for row in await tx.fetch_any(
            f"SELECT {columns(PAYOUT)} FROM payout WHERE id {{any}}",  # noqa: S608
            list(ended),
        ):
            rare.payouts[row["id"]] = PayoutRow(*row)
        if ended - rare.payouts.keys():
            raise LedgerFault(f"there is no payout {min(ended - rare.payouts.keys())}")
        lots |= {row.lot_id for row in rare.payouts.values()}
    if lots:
        for row in await tx.fetch_any("SELECT id, account_id FROM lot WHERE id {any}", list(lots)):
            rare.account_of_lot[row["id"]] = row["account_id"]
    if charges:
        for row in await tx.fetch_any(
            f"SELECT {columns(HOLD)} FROM hold WHERE id {{any}}",  # noqa: S608
            list(charges),
        ):
            rare.charges[row["id"]] = hold_row(row)
    unknown = (lots - rare.account_of_lot.keys()) | (charges - rare.charges.keys())
    if unknown:
        raise LedgerFault(f"there is no lot or charge {min(unknown)}")


def account_of(book: Book, step: Step) -> int:
    """The account a step is about, other than a hold or a close."""
    if isinstance(step, Mint | Expire | FreezeAccount):
        return step.account_id
    if book.rare is None:
        raise LedgerFault(f"{step} was not prepared for")
    if isinstance(step, Refund):
        return book.rare.charges[step.charge_id].account_id
    if isinstance(step, EndPayOut):
        return book.rare.payouts[step.payout_id].account_id
    if isinstance(step, _OF_A_LOT):
        return book.rare.account_of_lot[step.lot_id]
    raise LedgerFault(f"{step} has no account of its own")


async def load(tx: Tx, book: Book, steps: Sequence[Step]) -> None:
    """What was refunded before, and the pins and segments of the charges."""
    rare = book.rare
    if rare is None:
        return
    rare.whole |= {account_of(book, s) for s in steps if isinstance(s, (*_MOVING, Refund))}
    rare.named |= rare.account_of_lot.keys()
    await _load_payouts(tx, rare, [s for s in steps if isinstance(s, PayOut)])
    if not rare.charges:
        return
    for step in steps:
        if isinstance(step, Refund):
            await _load_key(tx, rare, account_of(book, step), step.key)
    ids = list(rare.charges)
    for row in await tx.fetch_any(
        f"SELECT {columns(REFUND)} FROM refund WHERE charge_id {{any}} ORDER BY id",  # noqa: S608
        ids,
    ):
        rare.refunds.setdefault(row["charge_id"], []).append(RefundRow(*row))
    await load_transfers(tx, book, ids)
    await load_pins(tx, book, ids)
    for charge_id in ids:
        await _load_segments(tx, book, rare, charge_id)


async def _load_payouts(tx: Tx, rare: Rare, steps: Sequence[PayOut]) -> None:
    """What was ever paid out of the lots that are withheld from, and how what ends now has ended.

    Under the account's lock: so the ordinals of a lot have no two takers.
    """
    if steps:
        for row in await tx.fetch_any(
            f"SELECT {columns(PAYOUT)} FROM payout WHERE lot_id {{any}}",  # noqa: S608
            sorted({step.lot_id for step in steps}),
        ):
            rare.payouts[row["id"]] = PayoutRow(*row)
    if rare.payouts:
        for row in await tx.fetch_any(
            f"SELECT {columns(PAYOUT_END)} FROM payout_end WHERE payout_id {{any}}",  # noqa: S608
            list(rare.payouts),
        ):
            rare.payout_ends[row["payout_id"]] = PayoutEndRow(*row)


async def _load_key(tx: Tx, rare: Rare, account_id: int, key: str) -> None:
    row = await tx.fetchrow(
        f"SELECT {columns(REFUND)} FROM refund WHERE account_id = $1 AND key = $2",  # noqa: S608
        account_id,
        key,
    )
    if row is not None:
        rare.keys[account_id, key] = RefundRow(*row)


async def _load_segments(tx: Tx, book: Book, rare: Rare, charge_id: int) -> None:
    """The booked segments under a charge's stretch of the tape. They have no gaps."""
    close = book.closes.get(charge_id)
    if close is None or close.tape_units == 0:
        return
    rows = await tx.fetch(
        "SELECT account_id, from_pos, to_pos, lot_id FROM segment WHERE account_id = $1"
        " AND from_pos >= coalesce((SELECT max(from_pos) FROM segment WHERE account_id = $1"
        " AND from_pos <= $2), 0) AND from_pos < $3",
        close.account_id,
        close.pos,
        close.pos + close.tape_units,
    )
    rare.segments |= {Segment(*row) for row in rows}
    rare.named |= {row["lot_id"] for row in rows}


async def load_named_lots(tx: Tx, book: Book, accounts: Collection[int]) -> None:
    """Lots that something may come back to, in whatever state, and those that paid a debt."""
    names = {each.lot_id for pins in book.pins.values() for each in pins}
    if book.rare is not None:
        names |= book.rare.named
    missing = names - book.lot.keys()
    if missing:
        sql = f"SELECT {columns(LOT)} FROM lot WHERE id {{any}}"  # noqa: S608
        add_lots(book, await tx.fetch_any(sql, list(missing)))
    sql = f"SELECT {columns(LOT)} FROM lot WHERE repaid_units > 0 AND account_id {{any}}"  # noqa: S608
    add_lots(book, await tx.fetch_any(sql, list(accounts)))


async def save(tx: Tx, book: Book, rare: Rare) -> None:
    """Write what is new; nothing here is ever changed."""
    if rare.new_refunds:
        await tx.executemany(
            insert("refund", REFUND),
            [[getattr(row, name) for name in REFUND] for row in rare.new_refunds],
        )
        await tx.executemany(
            insert("refund_part", ("refund_id", "lot_id", "amount_units")), rare.new_parts
        )
    if rare.new_payouts:
        await tx.executemany(
            insert("payout", PAYOUT),
            [[getattr(row, name) for name in PAYOUT] for row in rare.new_payouts],
        )
    if rare.new_payout_ends:
        await tx.executemany(
            insert("payout_end", PAYOUT_END),
            [[getattr(row, name) for name in PAYOUT_END] for row in rare.new_payout_ends],
        )
    if rare.new_actions:
        await tx.executemany(
            insert(
                "operator_action", ("id", "account_id", "action", "ref", "by", "reason", "at_ms")
            ),
            [
                (next(book.ids), a.account_id, a.action, a.ref, a.by, a.reason, book.now_ms)
                for a in rare.new_actions
            ],
        )
