"""``apply``: the one verb that changes the ledger."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.db import Tx
from gateway.ledger import rules, store
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
    # Every lot may expire once and be pinned once, every pin may leave something unused; a new pin
    # fills either a hold or a lot, so there are at most as many as both together.
    lots = sum(len(line) for line in book.lots.values())
    lots += sum(isinstance(step, Mint) for step in steps)
    open_holds = sum(len(line) for line in book.open_holds.values())
    need = len(steps) + 2 * lots + open_holds + sum(len(pins) for pins in book.pins.values())
    book.ids = iter(await reserve(tx, need)) if ids is None else await ids.take(tx, need, now_ms)
    outcomes = [rules.decide(book, step) for step in steps]
    await store.save(tx, book, writer)
    return outcomes
