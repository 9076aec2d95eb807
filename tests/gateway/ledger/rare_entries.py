"""The rare entries of random histories: refunds, disputes, write-offs, stopped accounts."""

from __future__ import annotations

import random
from typing import Any

from gateway.ledger import (
    AccountIs,
    Freeze,
    FreezeAccount,
    LotIs,
    NotRefundable,
    Outcome,
    Refund,
    RefundConflict,
    Refunded,
    RefundedBefore,
    Reopen,
    Reverse,
    Step,
    Unfreeze,
    WriteOff,
)
from tests.oracle.ledger_model import Lot, Model

KINDS = ("refund", "freeze", "unfreeze", "reverse", "stop", "write off", "reopen")
WEIGHTS = (7, 2, 4, 3, 2, 3, 1)
RECENT = 8  # of so many lots one is chosen: old ones are empty


def entry(rng: random.Random, kind: str, account: int, which: int) -> tuple[Any, ...]:
    match kind:
        case "refund":
            if rng.random() < 0.2:  # the same again, if it came before
                return (kind, which % 5, None, f"again{which % 5}")
            units = rng.choice((None, None, 1, 1, 2, 3, 5, 13))
            return (kind, which, units, f"key{rng.randrange(50)}")
        case "reverse":
            return (kind, which, rng.choice((0, 0, 0.2, 0.5, 1, 1)))
        case "stop":
            return (kind, account, rng.random() < 0.25)
    return (kind, which)


def step(  # noqa: PLR0911  (a table)
    model: Model, accounts: list[int], holds: list[int], what: tuple[Any, ...]
) -> Step | None:
    """The step of an entry; None if there is nothing yet that it could be about."""
    lots = [lot for lot in model.lots if lot.account in accounts][-RECENT:]
    frozen = [lot for lot in lots if lot.frozen]
    match what:
        case ("refund", which, units, key) if holds:
            charged = [hold for hold in holds if model.holds[hold].paid_by]
            if charged and not key.startswith("again"):
                holds = charged
            return Refund(holds[which % len(holds)], key, units, "it failed")
        case ("freeze", which) if lots:
            return Freeze(lots[which % len(lots)].name, "disputed")
        case ("unfreeze", which) if lots:
            some: list[Lot] = frozen or lots
            return Unfreeze(some[which % len(some)].name)
        case ("reverse", which, part) if lots:
            lot = lots[which % len(lots)]
            return Reverse(lot.name, int(lot.minted * part), "charged back")
        case ("write off", which) if lots:
            return _written_off([lot for lot in model.lots if lot.account in accounts], which)
        case ("reopen", which) if lots:
            lost = [lot for lot in lots if lot.lost] or lots
            return Reopen(lost[which % len(lost)].name, "it is in the chain again")
        case ("stop", account, frozen_):
            return FreezeAccount(accounts[account], frozen_, "asked for", "ops")
    return None


def _written_off(lots: list[Lot], which: int) -> Step:
    """Something that is owed; or a reversal, after which something is."""
    owing = [lot for lot in lots if lot.short and not lot.frozen]
    if owing:
        return WriteOff(owing[which % len(owing)].name, "they never came back", "ops")
    spent = [lot for lot in lots if lot.captured and not lot.frozen and not lot.reversed]
    if spent:
        lot = spent[which % len(spent)]
        return Reverse(lot.name, lot.minted, "its block left the chain")
    return WriteOff(lots[which % len(lots)].name, "nothing is owed", "ops")


def expected(model: Model, what: Step) -> tuple[object, ...]:  # noqa: PLR0911  (a table)
    """What the model makes of it."""
    match what:
        case Refund():
            return model.refund(what.charge_id, what.amount_units, what.key)
        case Freeze():
            return model.claim(what.lot_id, frozen=True)
        case Unfreeze():
            return model.claim(what.lot_id, frozen=False)
        case Reverse():
            return model.claim(what.lot_id, total=what.total_units)
        case WriteOff():
            return model.write_off(what.lot_id)
        case Reopen():
            return model.reopen(what.lot_id)
        case FreezeAccount():
            return model.stop(what.account_id, frozen=what.frozen)
    raise AssertionError(f"the model does not know {what}")


def told(outcome: Outcome) -> tuple[object, ...]:
    """An outcome in the model's words."""
    match outcome:
        case Refunded(refund, balance):
            amounts = (balance.available_units, balance.held_units)
            return ("refunded", refund.amount_units, *amounts)
        case RefundedBefore(refund):
            return ("refunded before", refund.amount_units)
        case RefundConflict():
            return ("refund conflict",)
        case NotRefundable(units):
            return ("not refundable", units)
        case LotIs(_, changed, debt, balance):
            return ("lot", changed, debt, balance.available_units, balance.held_units)
        case AccountIs(frozen, changed):
            return ("account", frozen, changed)
    raise AssertionError(f"the model does not know {outcome}")
