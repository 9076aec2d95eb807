"""Holds that may be taken from certain lots only.

An ordinary hold floats: it stands on no lot until it is captured, and then takes what expires
first. One with ``Only`` stands on its lots from the beginning, by pins like those of a dying lot
(``lots.py``): its units leave the line when it is taken, so nobody else spends them, and what is
not captured goes back to the lots it came from. No other hold or close learns anything of it.

Its row has no epoch (``PINNED``): whatever the account's is, its close looks for its pins.
"""

from __future__ import annotations

from gateway.ledger.book import AccountState, Book, LotState, PinState
from gateway.ledger.steps import Capped, HoldRow, Only, Short

Part = tuple[LotState, int]


def choose(
    book: Book, account: AccountState, only: Only, units: int
) -> list[Part] | Short | Capped:
    """Of which lots ``units`` would be held, the first to expire first. Changes nothing.

    Also at most what is available: open holds that float may need the rest of these lots.
    """
    if only.session is not None:
        more = max(only.most_units - book.sessions[only.session], 0)
        if units > more:
            return Capped(more, units)
    unbooked, left = account.pos - account.folded, 0
    found: list[Part] = []
    for lot in book.lots[account.id]:
        spent = min(unbooked, lot.remaining_units)
        unbooked -= spent
        free = lot.remaining_units - spent
        if free == 0 or not allowed(only, lot):
            continue
        part = min(free, units - left)
        if part > 0:
            found.append((lot, part))
        left += free
    left = min(left, account.available)
    return found if left >= units else Short(left, units)


def allowed(only: Only, lot: LotState) -> bool:
    return (
        only.lot_id in (None, lot.id)
        and only.source in (None, lot.source)
        and only.payer in (None, lot.payer)
    )


def pin(book: Book, account: AccountState, row: HoldRow, only: Only, parts: list[Part]) -> None:
    """Let a new hold stand on its lots.

    No fold is needed: what was spent and is not booked yet stands in the line before these units.
    """
    for lot, units in parts:
        lot.remaining_units -= units
        lot.touched = True
        account.pinned += units
        pins = book.pins.setdefault(row.id, [])
        pins.append(PinState(row.id, lot.id, units, None, lot.expires_ms, new=True))
    if only.session is not None:
        book.sessions[only.session] += row.max_units
    book.new_limits.append((row.id, only.lot_id, only.source, only.payer, only.session))
