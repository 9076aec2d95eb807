"""Credits that go back outside: withheld first, then paid out for good, or the lot's again.

    OUTGOING  has what is on its way     withhold, and release when that has ended
    PAID_OUT  gets what was paid out     payout, in the same step as its release

Withheld units are of no lot's line: they cannot be spent, do not expire and are no part of a
claim. A lot that is frozen or reversed meanwhile is short of them (``claims.py``), which the
account owes; if they come back after all they pay for that first (``lots.give_back``).
"""

from __future__ import annotations

from gateway.ledger import lots
from gateway.ledger.book import Book, LedgerFault, Rare
from gateway.ledger.payout_steps import (
    OUTGOING,
    PAID_OUT,
    EndPayOut,
    NotPayable,
    PayOut,
    PayoutEnded,
    PayoutEndRow,
    PayoutRow,
    Withheld,
)
from gateway.ledger.steps import Frozen


def withhold(book: Book, step: PayOut) -> Withheld | NotPayable | Frozen:
    """Take units out of a lot, before anything is signed that could pay them out."""
    if step.amount_units is not None and step.amount_units <= 0:
        raise LedgerFault("a payout must be of at least one unit")
    rare = _rare(book)
    lot = book.lot_of(step.lot_id)
    account = book.account(lot.account_id)
    lots.expire_due(book, account)
    if account.frozen or account.debt:
        return Frozen(account.debt)
    lots.fold(book, account)
    # Open holds may need the lot too: what is available is certainly nobody else's.
    left = min(lot.remaining_units, account.available) if lot.state == "live" else 0
    units = left if step.amount_units is None else step.amount_units
    if units > left or units < step.least_units:
        return NotPayable(left)
    account.available -= units
    lot.remaining_units -= units
    lot.outgoing_units += units
    lot.touched = True
    line = book.post(account, "withhold", (account.id, OUTGOING), units, lot.id)
    ordinal = 1 + sum(row.lot_id == lot.id for row in rare.payouts.values())
    row = PayoutRow(line.id, account.id, lot.id, ordinal, units, step.payment_id, book.now_ms)
    rare.payouts[row.id] = row
    rare.new_payouts.append(row)
    return Withheld(row, account.balance)


def end(book: Book, step: EndPayOut) -> PayoutEnded:
    """End a payout, once. A repeat changes nothing; the opposite is a fault."""
    rare = _rare(book)
    row = rare.payouts[step.payout_id]
    lot = book.lot_of(row.lot_id)
    account = book.account(row.account_id)
    before = rare.payout_ends.get(row.id)
    if before is not None:
        if bool(before.paid) != step.paid:
            raise LedgerFault(f"payout {row.id} had ended otherwise")
        return PayoutEnded(step.paid, changed=False, balance=account.balance)
    lots.expire_due(book, account)
    lots.fold(book, account)
    units = row.amount_units
    lot.outgoing_units -= units
    lot.touched = True
    account.available += units
    line = book.post(account, "release", (OUTGOING, account.id), units, lot.id, reason=step.reason)
    if step.paid:
        account.available -= units
        lot.paid_out_units += units
        line = book.post(
            account, "payout", (account.id, PAID_OUT), units, lot.id, reason=step.reason
        )
    else:
        lots.give_back(book, account, lot, units)
    ended = PayoutEndRow(row.id, int(step.paid), line.id, book.now_ms)
    rare.payout_ends[row.id] = ended
    rare.new_payout_ends.append(ended)
    return PayoutEnded(step.paid, changed=True, balance=account.balance)


def _rare(book: Book) -> Rare:
    if book.rare is None:
        raise LedgerFault("this step was not prepared for")
    return book.rare
