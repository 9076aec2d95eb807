"""What can be asked of the ledger about debts that nobody will pay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

LOSSES: Final = 8  # the house's own: what it bears for customers who owe it no more; at most 0


@dataclass(frozen=True, slots=True)
class WriteOff:
    """An operator gives up what the account owes for a lot: the house bears it from now on.

    Not while the lot is frozen: its dispute may still end well. What comes back to the lot after
    all is the house's first.
    """

    lot_id: int
    reason: str
    by: str


@dataclass(frozen=True, slots=True)
class Reopen:
    """What was written off of a lot is owed again, because its money is coming in another way."""

    lot_id: int
    reason: str
