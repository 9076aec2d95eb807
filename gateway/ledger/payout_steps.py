"""What can be asked of the ledger about credits that are paid back outside, and the answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from gateway.ledger.steps import Balance

OUTGOING: Final = 6  # withheld from customers, on its way back to who had paid
PAID_OUT: Final = 7  # what was paid back outside


@dataclass(frozen=True, slots=True)
class PayOut:
    """Withhold ``amount_units`` of a lot, or all that can be, before they are paid out.

    ``payment_id``: the payment that carries them out, of which there is one. Less than
    ``least_units`` is not withheld.
    """

    lot_id: int
    payment_id: str
    amount_units: int | None = None
    least_units: int = 1


@dataclass(frozen=True, slots=True)
class EndPayOut:
    """What was withheld was paid out, or never will be: then it is the lot's again."""

    payout_id: int
    paid: bool
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class PayoutRow:
    """A payout as stored. Immutable; ``id`` is that of the transfer that withheld it.

    ``ordinal`` counts the payouts of a lot, from 1: with the lot's mint key it names one for ever.
    """

    id: int
    account_id: int
    lot_id: int
    ordinal: int
    amount_units: int
    payment_id: str
    at_ms: int


@dataclass(frozen=True, slots=True)
class PayoutEndRow:
    """How a payout ended. Immutable; ``transfer_id`` is the line that says so."""

    payout_id: int
    paid: int
    transfer_id: int
    at_ms: int


@dataclass(frozen=True, slots=True)
class Withheld:
    """Applied: these units are nobody's to spend until the payout has ended."""

    payout: PayoutRow
    balance: Balance


@dataclass(frozen=True, slots=True)
class NotPayable:
    """Refused: of this lot only so much can be paid out now. Nothing was stored."""

    left_units: int


@dataclass(frozen=True, slots=True)
class PayoutEnded:
    """The payout has ended; ``changed`` False: it had before."""

    paid: bool
    changed: bool
    balance: Balance
