"""Lots off the hot path: fold, expiry, pins.

An account's captures form a tape: ``pos`` counts all units ever captured from live lots,
``folded`` the part already booked on lots. Live lots stand in spending order (expiry, id).
Between two folds the live lots do not change and a capture only moves ``pos``, so booking the
whole unbooked stretch at once, lot by lot from the front, equals booking every capture when it
happened. Hence a spend reads and writes no lot.

Invariant: sum(live remaining) - (pos - folded) = available + held - pinned.

When a lot dies (expires, is frozen or reversed) while holds are open, the part of it that the
holds may still need is pinned to them, oldest hold first: a hold that was taken before survives
until it ends. What is pinned and then not captured goes where the lot says at that moment
(``give_back``).

What becomes of the units of a lot, at any time:

    minted = remaining + pinned + spent + expired + repaid + outgoing + paid out
             + (claim - short - lost)

claim is what others have a right to: all of a frozen lot, else what was reversed. It is paid out
at once and in full, to the house's SUSPENSE or FUNDING; what the lot itself cannot give of it is
short, and lent by the house's DEBT, or lost, and borne by its LOSSES. The account owes what all its
lots are short of, less what has been repaid:

    debt = sum(short) - sum(repaid)
"""

from __future__ import annotations

from gateway.ledger.book import AccountState, Book, LedgerFault, LotState, PinState, Segment
from gateway.ledger.loss_steps import LOSSES
from gateway.ledger.steps import DEBT, EXPIRED, NEVER, HoldRow


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
            pin(book, account, lot, pinned)
            pinned_any = True
        lot.remaining_units = 0
        lot.state = "expired"
        lot.touched = True
        if left > pinned:
            _lapse(book, account, lot, left - pinned)
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


def _lapse(book: Book, account: AccountState, lot: LotState, units: int) -> None:
    """Available units of a lot whose time is over become the house's."""
    account.available -= units
    lot.expired_units += units
    lot.touched = True
    book.post(account, "expire", (account.id, EXPIRED), units, lot.id)


def pin(book: Book, account: AccountState, lot: LotState, amount_units: int) -> None:
    """Let open holds stand on ``amount_units`` of a dying lot, oldest hold first."""
    account.pinned += amount_units
    for hold in book.open_holds.get(account.id, []):
        if amount_units == 0:
            return
        on_hold = book.pins.setdefault(hold.id, [])
        free = hold.max_units - sum(each.amount_units for each in on_hold)
        part = min(free, amount_units)
        if part == 0:
            continue
        amount_units -= part
        # It may stand on this lot already, from an earlier dispute.
        before = next((each for each in on_hold if each.lot_id == lot.id), None)
        if before is None:
            on_hold.append(PinState(hold.id, lot.id, part, None, lot.expires_ms, new=True))
        else:
            before.amount_units += part
            before.touched = True
    if amount_units:
        raise LedgerFault(f"account {account.id}: {amount_units} held units have no open hold")


def release_pins(book: Book, hold: HoldRow, captured_units: int) -> tuple[int, list[PinState]]:
    """Spend up to ``captured_units`` from the hold's pins, in the order their lots expired.

    Returns how much of the capture they covered and all pins of the hold. The pins are final
    after this; the caller gives back what they did not give.
    """
    pins = sorted(book.pins.get(hold.id, []), key=lambda each: (each.expires_ms, each.lot_id))
    covered = 0
    for each in pins:
        each.captured_units = min(each.amount_units, captured_units - covered)
        each.touched = True
        covered += each.captured_units
    return covered, pins


def insert(book: Book, lot: LotState) -> None:
    """Put a live lot into its account's line, in spending order; it may stand there already."""
    book.lot[lot.id] = lot
    line = book.lots.setdefault(lot.account_id, [])
    if not any(each is lot for each in line):
        line.append(lot)
        line.sort(key=lambda each: (each.expires_ms, each.id))


def give_back(book: Book, account: AccountState, lot: LotState, units: int) -> None:
    """Units that came back to a lot (refunded, unused, out of a dispute) find their place.

    They are in ``available`` already, and the account is folded. What the lot is short of comes
    first: it pays for itself what the house had lent it, or what other lots had repaid for it,
    which then goes back to those. Then what the house has lost with it. What is still left goes
    home.
    """
    own = min(units, lot.short_units)
    if own:
        account.available -= own
        lot.short_units -= own
        lot.touched = True
        book.post(account, "forgive", (account.id, DEBT), own, lot.id)
        owed = min(own, account.debt)
        account.debt -= owed
        unrepay(book, account, own - owed)
    lost = min(units - own, lot.lost_units)
    if lost:
        account.available -= lost
        lot.lost_units -= lost
        lot.touched = True
        book.post(account, "recover", (account.id, LOSSES), lost, lot.id)
    _go_home(book, account, lot, units - own - lost)


def unrepay(book: Book, account: AccountState, units: int) -> None:
    """A debt that was repaid is none any more: who paid it gets it back, the newest lot first."""
    payers = [each for each in book.lot.values() if each.account_id == account.id]
    for payer in sorted(payers, key=lambda each: -each.id):
        part = min(units, payer.repaid_units)
        if part:
            units -= part
            payer.repaid_units -= part
            account.available += part
            book.post(account, "unrepay", (DEBT, account.id), part, payer.id)
            _go_home(book, account, payer, part)
    if units:
        raise LedgerFault(f"account {account.id}: {units} units were repaid by no lot")


def _go_home(book: Book, account: AccountState, lot: LotState, units: int) -> None:
    """What comes in pays the account's debt; the rest is the lot's again, or has lapsed."""
    units -= repay(book, account, lot, units)
    if units == 0:
        return
    if lot.state == "frozen":
        raise LedgerFault(f"lot {lot.id} is frozen: {units} units have no place on it")
    lot.touched = True
    if lot.state == "expired" or lot.expires_ms <= book.now_ms:
        lot.state = "expired"  # an emptied lot is not looked at when its time comes
        _lapse(book, account, lot, units)
        return
    lot.remaining_units += units
    account.next_expiry_ms = min(account.next_expiry_ms, lot.expires_ms)
    insert(book, lot)


def repay(book: Book, account: AccountState, lot: LotState, units: int) -> int:
    """Pay the account's debt with up to ``units`` of a lot; returns how much that took."""
    paid = min(units, account.debt)
    if paid:
        account.available -= paid
        account.debt -= paid
        lot.repaid_units += paid
        lot.touched = True
        book.post(account, "repay", (account.id, DEBT), paid, lot.id)
    return paid
