"""What can be asked of the ledger, and what it can answer.

A step is one hold, close or mint, or one of the rare ones (refund, freeze, reversal). Steps that
are applied together share one database transaction; a refused step changes nothing and stores
nothing, so it can be asked again. Every repeat has one of three outcomes: applied, replayed (same
id, same content) or conflict.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from gateway.ledger.loss_steps import Reopen, WriteOff
from gateway.ledger.payout_steps import EndPayOut, NotPayable, PayOut, PayoutEnded, Withheld

# The house's own accounts. Their ids are below every customer's; 6, 7: payout_steps.py, 8:
# loss_steps.py.
FUNDING: Final = 1  # where minted credits come from: money that came in from outside
REVENUE: Final = 2  # what customers were charged
EXPIRED: Final = 3  # what lapsed unused
SUSPENSE: Final = 4  # what is in dispute: neither the customer's nor the house's until it ends
DEBT: Final = 5  # what customers owe after a reversal, lent by the house: at most 0
FIRST_ID: Final = 1_000

NEVER: Final = 2**62  # expires_ms of a lot that does not expire
PINNED: Final = -1  # epoch of a hold that stands on certain lots from the beginning


@dataclass(frozen=True, slots=True)
class Guard:
    """What makes a request happen at most once (docs: proofs, request ids).

    ``principal`` is the wallet or key that proved itself, ``scheme`` how, ``request_id`` the
    one-time value of the proof. ``alias`` is an Idempotency-Key or payment-identifier: it finds a
    request again that came with another one-time value. ``payment`` is the one-time value of a
    payment that came with it, and finds it again in the same way: both are burnt.
    """

    principal: str
    scheme: str
    request_id: str
    alias: str | None = None
    payment: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Under which the request is found, besides its own one-time value."""
        if self.alias is None and self.payment is None:  # nearly every call
            return ()
        return tuple(name for name in (self.payment, self.alias) if name is not None)


@dataclass(frozen=True, slots=True)
class Call:
    """What the activity shows of a request. ``price``: the version of the price it was held at."""

    route: str
    method: str
    target: str
    price: str | None = None
    run: str | None = None
    payment_id: str | None = None


@dataclass(frozen=True, slots=True)
class Only:
    """Which lots a hold may be taken from: those that are all that is named here.

    For proofs that are worth less than the whole account: one lot, what was bought in one way
    (``source``), what one wallet paid for (``payer``). With a ``session``, all holds that name it
    may hold and capture ``most_units`` together. ``owed``: what is charged is done already, so an
    account that was frozen meanwhile is charged all the same.
    """

    lot_id: int | None = None
    source: str | None = None
    payer: str | None = None
    session: str | None = None
    most_units: int = 0
    owed: bool = False


@dataclass(frozen=True, slots=True)
class Hold:
    """Reserve ``max_units`` for a call and burn its request id, both or neither.

    ``content`` is a hash of everything the caller asked: the same id with other content is a
    conflict. ``lease_ms`` is how long the owner may take before it has to renew. ``only``: from
    these lots and no others (``limits.py``); None: from the account.
    """

    account_id: int
    guard: Guard
    content: bytes
    max_units: int
    lease_ms: int
    call: Call
    owner: int = 0
    only: Only | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What was answered, kept so that a repeat gets the same. ``body`` None: too long to keep."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes | None


class HoldRow(NamedTuple):
    """A hold as stored. Immutable; whether it is open is told by its transfer."""

    id: int
    account_id: int
    principal: str
    scheme: str
    request_id: str
    content: bytes
    max_units: int
    at_ms: int
    lease_ms: int
    epoch: int
    owner: int
    route: str
    method: str
    target: str
    price: str | None
    run: str | None
    payment_id: str | None


@dataclass(frozen=True, slots=True)
class Close:
    """End a hold: capture ``amount_units`` of it, or void it for ``void_reason``.

    ``if_lapsed`` is the sweeper's form: only when nobody holds the lease any more. ``breakdown``:
    what the charge is made of (``breakdowns.py``); None: it is the price.
    """

    hold: HoldRow
    amount_units: int = 0
    void_reason: str | None = None
    answer: Answer | None = None
    if_lapsed: bool = False
    breakdown: str | None = None


@dataclass(frozen=True, slots=True)
class Mint:
    """Credit ``amount_units`` for the outside fact ``(network, ref, n)``, once for ever."""

    account_id: int
    amount_units: int
    network: str
    ref: str
    n: int
    source: str
    expires_ms: int = NEVER
    payer: str | None = None
    payment_id: str | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Expire:
    """Let what is due lapse now, so that a balance that is shown is the true one."""

    account_id: int


@dataclass(frozen=True, slots=True)
class Refund:
    """Give back ``amount_units`` of a charge, or all that is left of it, once for each ``key``.

    ``charge_id`` is the hold's id. What comes back goes to the lots that paid, from the end of
    the charge: with the expiry they had. ``by``: the operator who does it, kept with the reason.
    """

    charge_id: int
    key: str
    amount_units: int | None = None
    reason: str | None = None
    by: str | None = None


@dataclass(frozen=True, slots=True)
class Freeze:
    """Put a whole lot in dispute: what is left of it into suspense, what is not is owed."""

    lot_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class Unfreeze:
    """End the dispute of a lot. What was in suspense returns to it with the expiry it had."""

    lot_id: int
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Reverse:
    """The money behind ``total_units`` of a lot, in all, was taken back from us.

    The total, not the change: the same fact told twice changes nothing, and one that is undone
    is told with a smaller total. What is left of the lot goes first, the shortage is owed.
    """

    lot_id: int
    total_units: int
    reason: str


@dataclass(frozen=True, slots=True)
class FreezeAccount:
    """An operator stops an account's spending, or lets it spend again."""

    account_id: int
    frozen: bool
    reason: str
    by: str


Step = (
    Hold
    | Close
    | Mint
    | Expire
    | Refund
    | Freeze
    | Unfreeze
    | Reverse
    | WriteOff
    | Reopen
    | FreezeAccount
    | PayOut
    | EndPayOut
)


class Balance(NamedTuple):
    """An account after a step: what can be spent, and what is promised to open calls."""

    available_units: int
    held_units: int


class TransferRow(NamedTuple):
    """A transfer as stored. Immutable."""

    id: int
    kind: str
    debit: int
    credit: int
    amount_units: int
    account_id: int
    seq: int
    prev_id: int
    balance_units: int
    pos: int
    tape_units: int
    ref: int
    at_ms: int
    reason: str | None


class Held(NamedTuple):
    """Applied: the request may run now, once."""

    hold: HoldRow
    balance: Balance


@dataclass(frozen=True, slots=True)
class Repeated:
    """Replayed: this request is known. ``close`` None: it still runs."""

    hold: HoldRow
    close: TransferRow | None


@dataclass(frozen=True, slots=True)
class Conflict:
    """The id is known with other content (or the alias with another one-time value)."""

    hold: HoldRow | None


@dataclass(frozen=True, slots=True)
class Short:
    """Refused: the account cannot cover it. Nothing was stored."""

    available_units: int
    needed_units: int


@dataclass(frozen=True, slots=True)
class Capped:
    """Refused: the session of its proof may spend only so much more. Nothing was stored."""

    left_units: int
    needed_units: int


@dataclass(frozen=True, slots=True)
class Frozen:
    """Refused: the account is frozen or in debt. Nothing was stored."""

    debt_units: int


class Closed(NamedTuple):
    """Applied: the hold has ended with this transfer."""

    transfer: TransferRow
    balance: Balance


@dataclass(frozen=True, slots=True)
class AlreadyClosed:
    """Replayed: the hold had ended before, with this transfer."""

    transfer: TransferRow


@dataclass(frozen=True, slots=True)
class StillLeased:
    """The sweeper came too early: the owner has renewed its lease."""


@dataclass(frozen=True, slots=True)
class Minted:
    """Applied: the credits exist now."""

    lot_id: int
    balance: Balance


@dataclass(frozen=True, slots=True)
class MintedBefore:
    """Replayed: this fact minted these credits before."""

    lot_id: int
    account_id: int
    amount_units: int


@dataclass(frozen=True, slots=True)
class Current:
    """The account with everything expired that is due."""

    balance: Balance


@dataclass(frozen=True, slots=True)
class RefundRow:
    """A refund as stored. Immutable; ``id`` is its transfer's. ``asked_units`` None: the rest."""

    id: int
    account_id: int
    key: str
    charge_id: int
    asked_units: int | None
    amount_units: int
    at_ms: int


@dataclass(frozen=True, slots=True)
class Refunded:
    """Applied: the units are back with the lots that paid them."""

    refund: RefundRow
    balance: Balance


@dataclass(frozen=True, slots=True)
class RefundedBefore:
    """Replayed: this key gave this back before."""

    refund: RefundRow


@dataclass(frozen=True, slots=True)
class RefundConflict:
    """The key was used for another charge or amount."""

    refund: RefundRow


@dataclass(frozen=True, slots=True)
class NotRefundable:
    """Refused: of this charge only so much is left, perhaps nothing. Nothing was stored."""

    left_units: int


@dataclass(frozen=True, slots=True)
class LotIs:
    """The lot is as it was asked for; ``changed`` False: it was so before."""

    lot_id: int
    changed: bool
    debt_units: int
    balance: Balance


@dataclass(frozen=True, slots=True)
class AccountIs:
    """The account is as it was asked for; ``changed`` False: it was so before."""

    frozen: bool
    changed: bool


HoldOutcome = Held | Repeated | Conflict | Short | Capped | Frozen
CloseOutcome = Closed | AlreadyClosed | StillLeased
MintOutcome = Minted | MintedBefore
RefundOutcome = Refunded | RefundedBefore | RefundConflict | NotRefundable
PayoutOutcome = Withheld | NotPayable | PayoutEnded
Outcome = (
    HoldOutcome
    | CloseOutcome
    | MintOutcome
    | Current
    | RefundOutcome
    | LotIs
    | AccountIs
    | PayoutOutcome
)
