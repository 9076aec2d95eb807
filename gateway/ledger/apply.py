"""``apply``: the one verb that changes the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gateway.db import Tx
from gateway.ledger import rules, store
from gateway.ledger.book import Book, LedgerFault
from gateway.ledger.chain import Chain
from gateway.ledger.ids import IdBlocks, reserve
from gateway.ledger.save import save
from gateway.ledger.steps import Mint, Outcome, Step


async def apply(
    tx: Tx,
    steps: Sequence[Step],
    now_ms: int | None,
    *,
    ids: IdBlocks | None = None,
    writer: int = 0,
    chain: Chain | None = None,
    as_new: bool = False,
) -> list[Outcome]:
    """Apply ``steps`` in order inside ``tx`` and return what became of each.

    All of them stand or fall with the transaction; a refused one changes nothing. Tell nobody an
    outcome before the transaction has been committed. ``now_ms`` is the database's clock; None: it
    is read here, where it costs least.
    ``writer`` owns the rows of the house's balances that are written; 0 is shared by all who
    write rarely. ``chain`` is where the batch is hashed into (``chain.py``); None: the shared one.
    ``as_new``: take it that no request is a repeat, as the keys of the tables will
    say; where one is, the transaction fails with ``WriteConflict`` and is to be run again without.
    Raises ``LedgerFault`` for a mistake of the caller and ``DatabaseUnavailable``.
    """
    if not steps:
        return []
    by = _By(ids, writer, chain)
    try:
        outcomes = await _apply_as_new(tx, steps, now_ms, by) if as_new else None
        if outcomes is None:
            now_ms = await tx.now_ms() if now_ms is None else now_ms
            outcomes = await _apply(tx, steps, now_ms, by)
        return outcomes
    except BaseException:
        # What is in memory is half decided. The caller could go on and commit something else.
        if tx.under_lock is not None:
            tx.under_lock.clear()
        raise


class _By(NamedTuple):
    """Who writes: where the ids come from, whose balances of the house and whose chain move."""

    ids: IdBlocks | None
    writer: int
    chain: Chain | None

    async def take(self, tx: Tx, book: Book, count: int) -> None:
        if self.ids is None:
            book.take(await reserve(tx, count))
        else:
            book.take(await self.ids.take(tx, count, book.now_ms))


async def _apply_as_new(
    tx: Tx, steps: Sequence[Step], now_ms: int | None, by: _By
) -> list[Outcome] | None:
    """None: nothing was written, and whether one of them is a repeat has to be looked up.

    Only what is applied may be answered without that look. A refusal is not: a repeat of a call
    that has emptied the account is a repeat, not a lack of funds.
    """
    book = await store.load_accounts(tx, steps, now_ms)
    if book is None:
        return None
    await by.take(tx, book, len(steps))
    try:
        outcomes = [rules.decide(book, step) for step in steps]
    except LedgerFault:
        store.forget(tx, book)
        return None
    ordinary = len(book.new_holds) + len(book.new_transfers) == len(steps)
    # Less than nothing held: one of them closes a hold that is closed.
    if not ordinary or any(account.held < 0 for account in book.accounts.values()):
        store.forget(tx, book)
        return None
    await save(tx, book, by.writer, by.chain)
    return outcomes


async def _apply(tx: Tx, steps: Sequence[Step], now_ms: int, by: _By) -> list[Outcome]:
    book = await store.load(tx, steps, now_ms)
    await by.take(tx, book, _ids_needed(book, steps))
    outcomes = [rules.decide(book, step) for step in steps]
    await save(tx, book, by.writer, by.chain)
    return outcomes


def _ids_needed(book: Book, steps: Sequence[Step]) -> int:
    """At least as many as these steps can use.

    Every lot may expire once and be pinned once, every pin may leave something unused; a new pin
    fills either a hold or a lot, so there are at most as many as both together.
    """
    lots = sum(len(line) for line in book.lots.values())
    lots += sum(isinstance(step, Mint) for step in steps)
    open_holds = sum(len(line) for line in book.open_holds.values())
    pins = open_holds + sum(len(each) for each in book.pins.values())
    need = len(steps) + 2 * lots + pins
    if book.rare is None and not book.pins:
        return need + lots  # what is minted may pay a debt
    # What comes back to a lot forgives, recovers, repays and lapses: four lines. It may let go of
    # what others repaid: two lines for each of those lots and for each that came back. A claim
    # writes five lines of its own, a refund and a write-off two.
    mine = [each for each in book.lot.values() if each.repaid_units]
    payers = len(mine) + lots
    named = 0 if book.rare is None else len(book.rare.named)
    back = pins + lots + len(steps) * (2 + named)
    return need + lots + 5 * back + 2 * payers + 7 * len(steps)
