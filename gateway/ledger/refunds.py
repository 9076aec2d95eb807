"""Giving back what a call was charged, to the lots that paid for it.

A charge is a line of units: first what was captured from its pins, in their order, then its
stretch of the tape. Refunds take from the end of that line, each where the one before stopped.
"""

from __future__ import annotations

from gateway.ledger import lots
from gateway.ledger.book import Action, Book, LedgerFault, Rare
from gateway.ledger.steps import (
    REVENUE,
    NotRefundable,
    Refund,
    RefundConflict,
    Refunded,
    RefundedBefore,
    RefundOutcome,
    RefundRow,
    TransferRow,
)


def refund(book: Book, step: Refund) -> RefundOutcome:
    """Refund a charge, once for each key. A known key is answered before anything is looked at."""
    rare = book.rare
    if rare is None or step.charge_id not in rare.charges:
        raise LedgerFault(f"charge {step.charge_id} is not in the book")
    hold = rare.charges[step.charge_id]
    known = rare.keys.get((hold.account_id, step.key))
    if known is not None:
        same = (known.charge_id, known.asked_units) == (step.charge_id, step.amount_units)
        return RefundedBefore(known) if same else RefundConflict(known)
    if step.amount_units is not None and step.amount_units <= 0:
        raise LedgerFault("a refund must be of at least one unit")
    close = book.closes.get(hold.id)
    charged = 0 if close is None else close.amount_units
    done = sum(row.amount_units for row in rare.refunds.get(hold.id, []))
    units = charged - done if step.amount_units is None else step.amount_units
    if close is None or units == 0 or units > charged - done:
        return NotRefundable(charged - done)
    account = book.account(hold.account_id)
    lots.expire_due(book, account)
    lots.fold(book, account)
    account.available += units
    account.spent -= units
    sides = (REVENUE, account.id)
    line = book.post(account, "refund", sides, units, hold.id, reason=step.reason)
    row = RefundRow(
        id=line.id,
        account_id=account.id,
        key=step.key,
        charge_id=hold.id,
        asked_units=step.amount_units,
        amount_units=units,
        at_ms=book.now_ms,
    )
    parts = _parts(book, rare, close, done, units)
    sums: dict[int, int] = {}
    for lot_id, part in parts:
        sums[lot_id] = sums.get(lot_id, 0) + part
        lots.give_back(book, account, book.lot_of(lot_id), part)
    rare.refunds.setdefault(hold.id, []).append(row)
    rare.keys[account.id, step.key] = row
    rare.new_refunds.append(row)
    rare.new_parts += [(row.id, lot_id, part) for lot_id, part in sums.items()]
    if step.by is not None:
        action = Action(account.id, "refund", row.id, step.by, step.reason or "")
        rare.new_actions.append(action)
    return Refunded(row, account.balance)


def _parts(
    book: Book, rare: Rare, close: TransferRow, done: int, units: int
) -> list[tuple[int, int]]:
    """Of which lots the next ``units`` from the end are, with ``done`` given back before.

    What was spent last comes first.
    """
    found = []
    for lot_id, length in reversed(_line(book, rare, close)):
        skipped = min(done, length)
        done -= skipped
        part = min(units, length - skipped)
        units -= part
        if part:
            found.append((lot_id, part))
    if units:
        raise LedgerFault(f"charge {close.id}: {units} of its units are on no lot")
    return found


def _line(book: Book, rare: Rare, close: TransferRow) -> list[tuple[int, int]]:
    """The lots of a charge with their lengths, in the order in which they were spent."""
    pins = sorted(book.pins.get(close.id, []), key=lambda each: (each.expires_ms, each.lot_id))
    line = [(each.lot_id, each.captured_units or 0) for each in pins]
    end = close.pos + close.tape_units
    mine = [each for each in book.new_segments if each.account_id == close.account_id]
    stored = [each for each in rare.segments if each.account_id == close.account_id]
    for segment in sorted([*stored, *mine], key=lambda each: each.from_pos):
        length = min(segment.to_pos, end) - max(segment.from_pos, close.pos)
        if length > 0:
            line.append((segment.lot_id, length))
    return line
