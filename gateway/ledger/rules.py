"""What each step does to a book. Pure: no clock, no database, no waiting.

Every function decides completely before it changes anything, so a refused step leaves the book as
it was and its neighbours in the same transaction do not notice it.
"""

from __future__ import annotations

from bisect import insort

from gateway.ledger import breakdowns, claims, limits, lots, payouts, refunds
from gateway.ledger.book import Action, Book, LedgerFault, LotState
from gateway.ledger.loss_steps import Reopen, WriteOff
from gateway.ledger.payout_steps import EndPayOut, PayOut
from gateway.ledger.steps import (
    FUNDING,
    PINNED,
    REVENUE,
    AccountIs,
    AlreadyClosed,
    Balance,
    Capped,
    Close,
    Closed,
    CloseOutcome,
    Conflict,
    Current,
    Expire,
    Freeze,
    FreezeAccount,
    Frozen,
    Held,
    Hold,
    HoldOutcome,
    HoldRow,
    Mint,
    Minted,
    MintedBefore,
    MintOutcome,
    Outcome,
    Refund,
    Repeated,
    Reverse,
    Short,
    Step,
    StillLeased,
    Unfreeze,
)


def decide(book: Book, step: Step) -> Outcome:  # noqa: PLR0911  (a table)
    """Apply one step to the book, or refuse it."""
    match step:
        case Hold():
            return hold(book, step)
        case Close():
            return close(book, step)
        case Mint():
            return mint(book, step)
        case Expire():
            account = book.account(step.account_id)
            lots.expire_due(book, account)
            return Current(account.balance)
        case Refund():
            return refunds.refund(book, step)
        case Freeze() | Unfreeze() | Reverse():
            return claims.claim(book, step)
        case WriteOff():
            return claims.write_off(book, step)
        case Reopen():
            return claims.reopen(book, step)
        case FreezeAccount():
            return freeze_account(book, step)
        case PayOut():
            return payouts.withhold(book, step)
        case EndPayOut():
            return payouts.end(book, step)


def hold(book: Book, step: Hold) -> HoldOutcome:
    """Reserve and burn the request id. A known id is answered before funds are looked at."""
    account_id, guard, units = step.account_id, step.guard, step.max_units
    key = (account_id, guard.principal, guard.scheme, guard.request_id)
    by_id = book.holds.get(key)
    names = guard.names
    if by_id is not None or names:
        known = _known(book, step, by_id)
        if known is not None:
            return known
    if units < 0:
        raise LedgerFault("a hold cannot be of less than nothing")
    account = book.account(account_id)
    if account.next_expiry_ms <= book.now_ms:
        lots.expire_due(book, account)
    if (account.frozen or account.debt) and not (step.only is not None and step.only.owed):
        return Frozen(account.debt)
    parts: list[limits.Part] | None = None
    if step.only is not None:
        found = limits.choose(book, account, step.only, units)
        if isinstance(found, Short | Capped):
            return found
        parts = found
    elif account.available < units:
        return Short(account.available, units)
    call, now_ms = step.call, book.now_ms
    row = HoldRow(  # by position, in the order of its fields: this is every call's way
        next(book.ids),
        *key,
        step.content,
        units,
        now_ms,
        now_ms + step.lease_ms,
        account.epoch if parts is None else PINNED,
        step.owner,
        call.route,
        call.method,
        call.target,
        call.price,
        call.run,
        call.payment_id,
    )
    account.available -= units
    account.held += units
    account.touched = True
    if step.only is not None and parts is not None:
        limits.pin(book, account, row, step.only, parts)
    book.new_holds.append(row)
    book.holds[key] = row
    if account_id in book.open_holds:
        insort(book.open_holds[account_id], row, key=lambda each: each.id)
    for name in names:
        alias = (account_id, guard.principal, name)
        book.aliases[alias] = row
        book.names_of.setdefault(row.id, set()).add(name)
        book.new_aliases.append((alias, row.id))
    return Held(row, Balance(account.available, account.held))


def _known(book: Book, step: Hold, by_id: HoldRow | None) -> HoldOutcome | None:
    """Applied before? The one-time values decide first, then the alias."""
    guard, known = step.guard, by_id
    said = guard.alias or guard.payment
    if by_id is not None and said is not None:
        # A one-time value already bound to another alias.
        bound = book.names_of.get(by_id.id)
        if bound and said not in bound:
            return Conflict(by_id)
    for name in guard.names:
        by_name = book.aliases.get((step.account_id, guard.principal, name))
        known = known or by_name
        if known is not None and by_name is not None and by_name.id != known.id:
            return Conflict(known)  # one of them means another call
    if known is None:
        return None
    if known.content != step.content:
        return Conflict(known)
    return Repeated(known, book.closes.get(known.id))


def close(book: Book, step: Close) -> CloseOutcome:
    """Capture or void. The hold's id is the transfer's id, so a hold ends once."""
    row, units, why = step.hold, step.amount_units, step.void_reason
    hold_id = row.id
    before = book.closes.get(hold_id)
    if before is not None:
        return AlreadyClosed(before)
    if step.if_lapsed and book.leases.get(hold_id, row.lease_ms) > book.now_ms:
        return StillLeased()
    if not 0 <= units <= row.max_units:
        raise LedgerFault(f"hold {hold_id}: {units} is not within {row.max_units}")
    if why is not None and units:
        raise LedgerFault(f"hold {hold_id}: a void moves nothing")
    account = book.account(row.account_id)
    if account.next_expiry_ms <= book.now_ms:
        lots.expire_due(book, account)
    from_pins, pins = lots.release_pins(book, row, units) if book.pins else (0, [])
    tape = units - from_pins
    start = account.pos
    account.held -= row.max_units
    # What the pins do not give is still the customer's on this line; the lines below take it.
    account.available += row.max_units - units
    account.pos += tape
    account.spent += units
    for pin in pins:
        account.pinned -= pin.amount_units
    kind = "capture" if why is None else "void"
    transfer = book.post(
        account,
        kind,
        (account.id, REVENUE),
        units,
        hold_id,
        transfer_id=hold_id,
        pos=start,
        tape_units=tape,
        reason=why,
    )
    for pin in pins:
        unused = pin.amount_units - (pin.captured_units or 0)
        if unused:
            lots.fold(book, account)
            lots.give_back(book, account, book.lot_of(pin.lot_id), unused)
    if account.available < 0:
        raise LedgerFault(f"hold {hold_id}: its pins exceed it")
    book.closes[hold_id] = transfer
    if account.id in book.open_holds:
        still = [each for each in book.open_holds[account.id] if each.id != hold_id]
        book.open_holds[account.id] = still
    if step.answer is not None:
        book.new_answers.append((hold_id, step.answer))
    if step.breakdown is not None:
        breakdowns.require_sum(step.breakdown, units, hold_id)
        book.new_breakdowns.append((hold_id, units, step.breakdown))
    return Closed(transfer, Balance(account.available, account.held))


def mint(book: Book, step: Mint) -> MintOutcome:
    """Create credits for an outside fact; the same fact is answered with what it made before."""
    if step.amount_units <= 0:
        raise LedgerFault("a mint must be of at least one unit")
    key = (step.network, step.ref, step.n)
    before = book.mints.get(key)
    if before is not None:
        return MintedBefore(before.id, before.account_id, before.minted_units)
    account = book.account(step.account_id)
    lots.expire_due(book, account)
    # Past spending is booked on the lots of its time before a lot that expires earlier arrives.
    lots.fold(book, account)
    account.available += step.amount_units
    account.added += step.amount_units
    account.next_expiry_ms = min(account.next_expiry_ms, step.expires_ms)
    lot_id = next(book.ids)
    book.post(
        account,
        "mint",
        (FUNDING, account.id),
        step.amount_units,
        lot_id,
        transfer_id=lot_id,
        reason=step.reason or step.source,
    )
    lot = LotState(
        id=lot_id,
        account_id=account.id,
        source=step.source,
        payer=step.payer,
        payment_id=step.payment_id,
        expires_ms=step.expires_ms,
        minted_units=step.amount_units,
        remaining_units=step.amount_units,
        state="live",
        new=True,
    )
    # What comes in pays the account's debt first.
    lot.remaining_units -= lots.repay(book, account, lot, step.amount_units)
    lots.insert(book, lot)
    book.mints[key] = lot
    book.new_mints.append((key, lot_id))
    lots.expire_due(book, account)  # it may have come later than its own expiry
    return Minted(lot_id, account.balance)


def freeze_account(book: Book, step: FreezeAccount) -> AccountIs:
    """Stop an account's spending or allow it again; what was done is kept with who and why."""
    account = book.account(step.account_id)
    if bool(account.frozen) == step.frozen:
        return AccountIs(step.frozen, changed=False)
    if book.rare is None:
        raise LedgerFault("this step was not prepared for")
    account.frozen = int(step.frozen)
    account.touched = True
    action = "freeze" if step.frozen else "unfreeze"
    book.rare.new_actions.append(Action(account.id, action, 0, step.by, step.reason))
    return AccountIs(step.frozen, changed=True)
