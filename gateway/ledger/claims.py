"""Disputes and reversals: somebody else lays claim to the units of a lot.

The claim on a lot is all of it while it is frozen, else what was reversed. A step says what the
claim is now, and only the difference moves; so the same fact told twice changes nothing, and a
fact that is undone undoes what it did.

    FUNDING   gets what was reversed       reverse, and restore when that is undone
    SUSPENSE  gets the rest of the claim   freeze, and unfreeze when the dispute ends
    DEBT      lends what the lot is short  debt, and forgive when the lot gives it after all
    LOSSES    bears what is written off    loss, and recover when it comes in after all

The claim is paid out in full at once. Where open holds still need the lot, that part is pinned to
them and lent meanwhile: a hold that lets go of it pays the loan back (``lots.give_back``), one
that captures it leaves the loan standing. That is the debt for what has been spent.

A debt that nobody will pay is written off: the house gives the account what it owes, and that pays
the loan. What comes back to the lot later pays the customers' part first, then the house's. Its
money may also come back as another lot (another transaction of the same payment): then the debt is
opened again before that one is minted, which pays it.
"""

from __future__ import annotations

from gateway.ledger import lots
from gateway.ledger.book import AccountState, Action, Book, LedgerFault, LotState
from gateway.ledger.loss_steps import LOSSES, Reopen, WriteOff
from gateway.ledger.steps import (
    DEBT,
    EXPIRED,
    FUNDING,
    SUSPENSE,
    Freeze,
    LotIs,
    Reverse,
    Unfreeze,
)


def claim(book: Book, step: Freeze | Unfreeze | Reverse) -> LotIs:
    """Freeze, unfreeze or reverse a lot."""
    lot = book.lot_of(step.lot_id)
    account = book.account(lot.account_id)
    reversed_units = lot.reversed_units
    frozen = lot.state == "frozen"
    match step:
        case Freeze():
            frozen = True
        case Unfreeze():
            frozen = False
        case Reverse():
            reversed_units = step.total_units
    if not 0 <= reversed_units <= lot.minted_units:
        raise LedgerFault(f"lot {lot.id}: {reversed_units} is not within {lot.minted_units}")
    lots.expire_due(book, account)
    changed = (frozen, reversed_units) != (lot.state == "frozen", lot.reversed_units)
    if changed:
        lots.fold(book, account)
        _change(book, account, lot, frozen=frozen, reversed_units=reversed_units, why=step.reason)
    return LotIs(lot.id, changed, account.debt, account.balance)


def write_off(book: Book, step: WriteOff) -> LotIs:
    """Let the house bear what the account owes for a lot. Nothing, if it owes nothing for it."""
    if book.rare is None:
        raise LedgerFault("this step was not prepared for")
    lot = book.lot_of(step.lot_id)
    account = book.account(lot.account_id)
    lots.expire_due(book, account)
    # Of what the lot is short others of the account's lots may have paid a part.
    units = 0 if lot.state == "frozen" else min(lot.short_units, account.debt)
    if units:
        lot.short_units -= units
        lot.lost_units += units
        lot.touched = True
        account.available += units
        sides = (LOSSES, account.id)
        line = book.post(account, "loss", sides, units, lot.id, reason=step.reason)
        account.available -= units
        account.debt -= units
        book.post(account, "forgive", (account.id, DEBT), units, lot.id)
        action = Action(account.id, "write_off", line.id, step.by, step.reason)
        book.rare.new_actions.append(action)
    return LotIs(lot.id, units > 0, account.debt, account.balance)


def reopen(book: Book, step: Reopen) -> LotIs:
    """Take a write-off back: what was lost with the lot is the account's debt again."""
    lot = book.lot_of(step.lot_id)
    account = book.account(lot.account_id)
    lots.expire_due(book, account)
    units = lot.lost_units
    if units:
        lot.lost_units -= units
        lot.short_units += units
        lot.touched = True
        account.available += units
        account.debt += units
        book.post(account, "debt", (DEBT, account.id), units, lot.id, reason=step.reason)
        account.available -= units
        book.post(account, "recover", (account.id, LOSSES), units, lot.id)
    return LotIs(lot.id, units > 0, account.debt, account.balance)


def _change(
    book: Book,
    account: AccountState,
    lot: LotState,
    *,
    frozen: bool,
    reversed_units: int,
    why: str | None,
) -> None:
    before, reversed_before = lot.claim_units, lot.reversed_units
    after = lot.minted_units if frozen else reversed_units
    to_funding = reversed_units - reversed_before
    to_suspense = after - before - to_funding
    if after > before:
        _raise(book, account, lot, after - before)
    lot.reversed_units = reversed_units
    if frozen:
        lot.state = "frozen"
    elif lot.state == "frozen":
        lot.state = "live"  # or expired: what comes back to it finds that out
    lot.touched = account.touched = True
    # What comes in before what goes out: the lines of the statement never go below zero.
    moves = [
        (to_suspense, "freeze", "unfreeze", SUSPENSE),
        (to_funding, "reverse", "restore", FUNDING),
    ]
    for units, out, back, house in sorted(moves, key=lambda move: move[0]):
        account.available -= units
        if units > 0:
            book.post(account, out, (account.id, house), units, lot.id, reason=why)
        elif units < 0:
            book.post(account, back, (house, account.id), -units, lot.id, reason=why)
    if after < before:
        lots.give_back(book, account, lot, before - after)
    account.next_expiry_ms = lots.next_expiry(book.lots[account.id])


def _raise(book: Book, account: AccountState, lot: LotState, units: int) -> None:
    """Have ``units`` more of a lot in ``available``, to be paid out at once."""
    at_hand = min(units, lot.remaining_units)
    free = min(at_hand, account.available)
    lot.remaining_units -= at_hand
    if at_hand > free:
        lots.pin(book, account, lot, at_hand - free)
        account.epoch += 1
    units -= free
    back = min(units, lot.expired_units)
    if back:  # the house gives up what it got for nothing
        account.available += back
        lot.expired_units -= back
        book.post(account, "unexpire", (EXPIRED, account.id), back, lot.id)
        units -= back
    back = min(units, lot.repaid_units)
    if back:  # a debt it had paid is open again
        account.available += back
        account.debt += back
        lot.repaid_units -= back
        book.post(account, "unrepay", (DEBT, account.id), back, lot.id)
        units -= back
    if units:
        account.available += units
        account.debt += units
        lot.short_units += units
        book.post(account, "debt", (DEBT, account.id), units, lot.id)
