"""Lots off the hot path: fold, expiry, pins.

An account's captures form a tape: ``pos`` counts all units ever captured from live lots,
``folded`` the part already booked on lots. Live lots stand in spending order (expiry, id).
Between two folds the live lots do not change and a capture only moves ``pos``, so booking the
whole unbooked stretch at once, lot by lot from the front, equals booking every capture when it
happened. Hence a spend reads and writes no lot.

Invariant: sum(live remaining) - (pos - folded) = available + held - pinned.

When a lot dies (expires) while holds are open, the part of it that the holds may still need is
pinned to them, oldest hold first: a hold that was taken before a lot expired survives until the
hold ends. What is pinned and then not captured expires at once.
"""

from __future__ import annotations

from gateway.ledger.book import AccountState, Book, LedgerFault, LotState, PinState, Segment
from gateway.ledger.steps import EXPIRED, NEVER, HoldRow


def fold(book: Book, account: AccountState) -> None:
    """Book the unbooked stretch of the tape on the lots, front lot first."""
    rest = account.pos - account.folded
    if rest == 0:
        return
    for lot in book.lots[account.id]:
        if rest == 0:
            break
        part = min(rest, lot.remaining_units)
        if part == 0:
            continue
        start = account.folded
        book.new_segments.append(Segment(account.id, start, start + part, lot.id))
        lot.remaining_units -= part
        lot.touched = True
        account.folded += part
        rest -= part
    if rest:
        raise LedgerFault(f"account {account.id}: {rest} units were spent that no lot holds")
    account.touched = True


def expire_due(book: Book, account: AccountState) -> None:
    """Expire the lots whose time is over. Does nothing before ``next_expiry_ms``."""
    if book.now_ms < account.next_expiry_ms:
        return
    fold(book, account)
    pinned_any = False
    for lot in book.lots[account.id]:
        if lot.expires_ms > book.now_ms:
            break
        if lot.state != "live" or lot.remaining_units == 0:
            continue
        left = lot.remaining_units
        pinned = min(left, account.held - account.pinned)
        if pinned:
            _pin(book, account, lot, pinned)
            pinned_any = True
        lot.remaining_units = 0
        lot.state = "expired"
        lot.touched = True
        if left > pinned:
            account.available -= left - pinned
            book.post(account, "expire", (account.id, EXPIRED), left - pinned, lot.id)
    if pinned_any:
        account.epoch += 1
    account.next_expiry_ms = next_expiry(book.lots[account.id])
    account.touched = True


def next_expiry(lots: list[LotState]) -> int:
    """When the first lot that still holds something expires."""
    return min(
        (lot.expires_ms for lot in lots if lot.state == "live" and lot.remaining_units),
        default=NEVER,
    )


def _pin(book: Book, account: AccountState, lot: LotState, amount_units: int) -> None:
    """Let open holds stand on ``amount_units`` of a dying lot, oldest hold first."""
    account.pinned += amount_units
    for hold in book.open_holds.get(account.id, []):
        if amount_units == 0:
            return
        on_hold = book.pins.setdefault(hold.id, [])
        free = hold.max_units - sum(pin.amount_units for pin in on_hold)
        part = min(free, amount_units)
        if part:
            on_hold.append(PinState(hold.id, lot.id, part, None, lot.expires_ms, new=True))
            amount_units -= part
    if amount_units:
        raise LedgerFault(f"account {account.id}: {amount_units} held units have no open hold")


def release_pins(book: Book, hold: HoldRow, captured_units: int) -> tuple[int, list[PinState]]:
    """Spend up to ``captured_units`` from the hold's pins, in the order their lots expired.

    Returns how much of the capture they covered and all pins of the hold. The pins are final
    after this; the caller expires what they did not give.
    """
    pins = sorted(book.pins.get(hold.id, []), key=lambda pin: (pin.expires_ms, pin.lot_id))
    covered = 0
    for pin in pins:
        pin.captured_units = min(pin.amount_units, captured_units - covered)
        pin.touched = True
        covered += pin.captured_units
    return covered, pins
