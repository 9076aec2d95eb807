"""The rows of one transaction in memory: what was loaded, and what is to be written.

The rules (``rules.py``, ``lots.py``) work on these objects and on nothing else, so they are the
same for both databases and for the model tests. ``store.py`` fills a book and writes it back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from gateway.ledger.payout_steps import PayoutEndRow, PayoutRow
from gateway.ledger.steps import Answer, Balance, HoldRow, RefundRow, TransferRow

GuardKey = tuple[int, str, str, str]  # account, principal, scheme, request id
AliasKey = tuple[int, str, str]  # account, principal, alias
MintKey = tuple[str, str, int]  # network, ref, n


class LedgerFault(Exception):  # noqa: N818
    """A rule of the ledger would be broken: a mistake in the program, never in a request."""


@dataclass(slots=True)
class AccountState:
    """An account row under our lock. Column meanings: ``tables.py``."""

    id: int
    available: int
    held: int
    pinned: int
    debt: int
    added: int
    spent: int
    pos: int
    folded: int
    next_expiry_ms: int
    epoch: int
    seq: int
    last_id: int
    frozen: int
    ver: int
    touched: bool = False

    @property
    def balance(self) -> Balance:
        return Balance(self.available, self.held)


@dataclass(slots=True)
class LotState:
    """A lot row. Column meanings: ``tables.py``."""

    id: int
    account_id: int
    source: str
    payer: str | None
    payment_id: str | None
    expires_ms: int
    minted_units: int
    remaining_units: int
    state: str
    expired_units: int = 0
    reversed_units: int = 0
    short_units: int = 0
    repaid_units: int = 0
    outgoing_units: int = 0
    paid_out_units: int = 0
    lost_units: int = 0
    new: bool = False
    touched: bool = False

    @property
    def claim_units(self) -> int:
        """How much of it others lay claim to: all of it in a dispute, else what was reversed."""
        return self.minted_units if self.state == "frozen" else self.reversed_units


@dataclass(slots=True)
class PinState:
    """A stretch of a hold that stands on a lot which died under it."""

    hold_id: int
    lot_id: int
    amount_units: int
    captured_units: int | None
    expires_ms: int  # when the lot did; not a column of the pin
    new: bool = False
    touched: bool = False


@dataclass(frozen=True, slots=True)
class Segment:
    """Which lot paid which stretch of an account's tape."""

    account_id: int
    from_pos: int
    to_pos: int
    lot_id: int


@dataclass(frozen=True, slots=True)
class Action:
    """What an operator did, who it was and why."""

    account_id: int
    action: str
    ref: int
    by: str
    reason: str


@dataclass(slots=True)
class Rare:
    """What only refunds, freezes and reversals look at or write."""

    account_of_lot: dict[int, int] = field(default_factory=dict)
    charges: dict[int, HoldRow] = field(default_factory=dict)
    refunds: dict[int, list[RefundRow]] = field(default_factory=dict)  # by charge
    keys: dict[tuple[int, str], RefundRow] = field(default_factory=dict)  # by account and key
    # Stored ones under the charges' stretches; one may lie under two of them.
    segments: set[Segment] = field(default_factory=set)
    whole: set[int] = field(default_factory=set)  # accounts whose lots may move in the line
    named: set[int] = field(default_factory=set)  # lots the steps are about, or may give back to
    # By id: those that are ended, and all others of the lots that are withheld from.
    payouts: dict[int, PayoutRow] = field(default_factory=dict)
    payout_ends: dict[int, PayoutEndRow] = field(default_factory=dict)  # by payout

    new_refunds: list[RefundRow] = field(default_factory=list)
    new_parts: list[tuple[int, int, int]] = field(default_factory=list)  # refund, lot, units
    new_actions: list[Action] = field(default_factory=list)
    new_payouts: list[PayoutRow] = field(default_factory=list)
    new_payout_ends: list[PayoutEndRow] = field(default_factory=list)


@dataclass(slots=True)
class Book:
    """Everything one application of steps may look at or change."""

    now_ms: int
    taken: range = range(0)  # the ids that are this book's, see ``take``
    ids: Iterator[int] = field(default_factory=lambda: iter(()))
    accounts: dict[int, AccountState] = field(default_factory=dict)
    holds: dict[GuardKey, HoldRow] = field(default_factory=dict)
    aliases: dict[AliasKey, HoldRow] = field(default_factory=dict)
    names_of: dict[int, set[str]] = field(default_factory=dict)  # aliases, by hold
    closes: dict[int, TransferRow] = field(default_factory=dict)
    leases: dict[int, int] = field(default_factory=dict)  # renewed leases, by hold
    mints: dict[MintKey, LotState] = field(default_factory=dict)
    lots: dict[int, list[LotState]] = field(default_factory=dict)  # live, in spending order
    lot: dict[int, LotState] = field(default_factory=dict)  # all that are known, in any state
    # Open holds by age, kept only for accounts on which something is due.
    open_holds: dict[int, list[HoldRow]] = field(default_factory=dict)
    pins: dict[int, list[PinState]] = field(default_factory=dict)  # by hold
    rare: Rare | None = None  # only if there is a rare step

    new_holds: list[HoldRow] = field(default_factory=list)
    # Which lots a hold may be taken from: hold, lot, source, payer.
    new_limits: list[tuple[int, int | None, str | None, str | None, str | None]] = field(
        default_factory=list
    )
    # What the holds of a session have taken, those of this book included.
    sessions: dict[str, int] = field(default_factory=dict)
    new_aliases: list[tuple[AliasKey, int]] = field(default_factory=list)
    new_transfers: list[TransferRow] = field(default_factory=list)
    new_segments: list[Segment] = field(default_factory=list)
    new_mints: list[tuple[MintKey, int]] = field(default_factory=list)
    new_answers: list[tuple[int, Answer]] = field(default_factory=list)
    new_breakdowns: list[tuple[int, int, str]] = field(default_factory=list)
    house: dict[int, int] = field(default_factory=dict)  # house account -> units gained

    def take(self, ids: range) -> None:
        """Use these ids for what is new, and for nothing else in the database."""
        self.taken = ids
        self.ids = iter(ids)

    def lot_of(self, lot_id: int) -> LotState:
        state = self.lot.get(lot_id)
        if state is None:
            raise LedgerFault(f"lot {lot_id} is not in the book")
        return state

    def account(self, account_id: int) -> AccountState:
        """The row, marked as changed: ask for it only to change it."""
        state = self.accounts.get(account_id)
        if state is None:
            raise LedgerFault(f"account {account_id} is not in the book")
        return state

    def post(
        self,
        account: AccountState,
        kind: str,
        sides: tuple[int, int],
        amount_units: int,
        ref: int,
        *,
        transfer_id: int | None = None,
        pos: int = 0,
        tape_units: int = 0,
        reason: str | None = None,
    ) -> TransferRow:
        """Write one line of the statement. The account's amounts must already be changed."""
        debit, credit = sides
        row = TransferRow(  # by position, in the order of its fields: this is every call's way
            next(self.ids) if transfer_id is None else transfer_id,
            kind,
            debit,
            credit,
            amount_units,
            account.id,
            account.seq + 1,
            account.last_id,
            account.available + account.held,
            pos,
            tape_units,
            ref,
            self.now_ms,
            reason,
        )
        account.seq += 1
        account.last_id = row.id
        account.touched = True
        if debit == account.id:
            self.house[credit] = self.house.get(credit, 0) + amount_units
        else:
            self.house[debit] = self.house.get(debit, 0) - amount_units
        self.new_transfers.append(row)
        return row
