"""``apply``: the one verb that changes the ledger."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.db import Tx
from gateway.ledger import rules, store
from gateway.ledger.book import Book
from gateway.ledger.ids import IdBlocks, reserve
from gateway.ledger.steps import Mint, Outcome, Step


async def apply(
    tx: Tx,
    steps: Sequence[Step],
    now_ms: int,
    *,
    ids: IdBlocks | None = None,
    writer: int = 0,
) -> list[Outcome]:
    """Apply ``steps`` in order inside ``tx`` and return what became of each.

    All of them stand or fall with the transaction; a refused one changes nothing. Tell nobody an
    outcome before the transaction has been committed. ``now_ms`` is the database's clock.
    ``writer`` owns the rows of the house's balances that are written; 0 is shared by all who
    write rarely. Raises ``LedgerFault`` for a mistake of the caller and
    ``DatabaseUnavailable``.
    """
    if not steps:
        return []
    try:
        return await _apply(tx, steps, now_ms, ids, writer)
    except BaseException:
        # What is in memory is half decided. The caller could go on and commit something else.
        if tx.under_lock is not None:
            tx.under_lock.clear()
        raise


async def _apply(
    tx: Tx, steps: Sequence[Step], now_ms: int, ids: IdBlocks | None, writer: int
) -> list[Outcome]:
    book = await store.load(tx, steps, now_ms)
    need = _ids_needed(book, steps)
    book.ids = iter(await reserve(tx, need)) if ids is None else await ids.take(tx, need, now_ms)
    outcomes = [rules.decide(book, step) for step in steps]
    await store.save(tx, book, writer)
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
    # What comes back to a lot forgives, repays and lapses: three lines. It may let go of what
    # others repaid: two lines for each of those lots and for each that came back. A claim writes
    # five lines of its own, a refund two.
    mine = [each for each in book.lot.values() if each.repaid_units]
    payers = len(mine) + lots
    named = 0 if book.rare is None else len(book.rare.named)
    back = pins + lots + len(steps) * (2 + named)
    return need + lots + 5 * back + 2 * payers + 7 * len(steps)
