"""Fill a book from the database under lock, and write it back. The only SQL of a ledger step.

PostgreSQL locks account rows in id order in one statement and reads the guards in a later one: a
guard read together with the lock would be from before the wait for it. SQLite's BEGIN IMMEDIATE
has locked everything already.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from itertools import chain
from operator import attrgetter
from typing import Final

from gateway.db import Row, Tx
from gateway.ledger import rare
from gateway.ledger.book import AccountState, Book, LedgerFault, LotState
from gateway.ledger.rows import (
    ACCOUNT,
    HOLD,
    LOT,
    PIN,
    TRANSFER,
    add_lots,
    columns,
    hold_row,
    insert,
    load_pins,
    load_transfers,
)
from gateway.ledger.steps import NEVER, Close, Hold, HoldRow, Mint, Step

# Made once: these stand in every batch.
_SELECT_ACCOUNTS: Final = f"SELECT {columns(ACCOUNT)} FROM account WHERE id {{any}} ORDER BY id"  # noqa: S608
_INSERT_HOLD: Final = insert("hold", HOLD)
_INSERT_TRANSFER: Final = insert("transfer", TRANSFER)
_INSERT_ANSWER: Final = insert("answer", ("hold_id", "status", "headers", "body", "at_ms"))
_INSERT_LOT: Final = insert("lot", LOT)
_INSERT_PIN: Final = insert("pin", PIN)
_CHANGING_LOT: Final = (
    *("id", "remaining_units", "state", "expired_units"),
    *("reversed_units", "short_units", "repaid_units"),
)
_UPDATE_LOT: Final = (
    f"UPDATE lot SET {', '.join(f'{n} = ${i + 1}' for i, n in enumerate(_CHANGING_LOT) if i)}"  # noqa: S608
    " WHERE id = $1"
)
_changing_lot: Final = attrgetter(*_CHANGING_LOT)
_hold_values: Final = attrgetter(*HOLD)
_transfer_values: Final = attrgetter(*TRANSFER)


async def load(tx: Tx, steps: Sequence[Step], now_ms: int) -> Book:
    """Everything these steps may look at, under lock. Ids are given to the book afterwards."""
    book = Book(now_ms, iter(()))
    holds = [s for s in steps if isinstance(s, Hold)]
    closes = [s for s in steps if isinstance(s, Close)]
    mints = [s for s in steps if isinstance(s, Mint)]
    if len(holds) + len(closes) + len(mints) < len(steps):
        await rare.find_accounts(tx, book, steps)
    await _load_accounts(tx, book, {_account_of(book, step) for step in steps})
    if holds:
        await _load_guards(tx, book, holds)
    if closes:
        await _load_closes(tx, book, closes)
    if mints:
        await _load_mints(tx, book, mints)
    if book.rare is not None:
        await rare.load(tx, book, steps)
    minted = {s.account_id for s in mints}
    pinned = {s.hold.account_id for s in closes if s.hold.id in book.pins} if book.pins else set()
    whole = book.rare.whole if book.rare is not None else set()
    for account in book.accounts.values():
        known = account.id in minted or account.id in pinned or account.id in whole
        if known or account.next_expiry_ms <= now_ms:
            mine = [s for s in steps if _account_of(book, s) == account.id]
            await _load_lots(tx, book, account, mine)
    if pinned or whole:
        await rare.load_named_lots(tx, book, pinned | whole)
    return book


def _account_of(book: Book, step: Step) -> int:
    if isinstance(step, Close):
        return step.hold.account_id
    if isinstance(step, Hold):
        return step.account_id
    return rare.account_of(book, step)


async def _load_accounts(tx: Tx, book: Book, ids: Collection[int]) -> None:
    known: dict[int, AccountState] | None = tx.under_lock
    if known is None:
        rows = await tx.fetch_any(_SELECT_ACCOUNTS + tx.for_update, sorted(ids))
        book.accounts = {row[0]: AccountState(*row) for row in rows}
        return
    missing = [account_id for account_id in ids if account_id not in known]
    if missing:
        for row in await tx.fetch_any(_SELECT_ACCOUNTS, missing):
            known[row[0]] = AccountState(*row)
    for account_id in ids:
        state = known.get(account_id)
        if state is not None:
            book.accounts[account_id] = state


async def _load_guards(tx: Tx, book: Book, steps: Sequence[Hold]) -> None:
    keys = [(s.guard.request_id, s.guard.principal, s.guard.scheme, s.account_id) for s in steps]
    aliases = [
        (s.account_id, s.guard.principal, s.guard.alias) for s in steps if s.guard.alias is not None
    ]
    known: dict[int, HoldRow] = {}
    for row in await _holds_by_guard(tx, keys):
        hold = hold_row(row)
        known[hold.id] = hold
        book.holds[hold.account_id, hold.principal, hold.scheme, hold.request_id] = hold
    for account_id, principal, alias in aliases:
        found = await tx.fetchrow(
            f"SELECT {columns(HOLD, 'h')} FROM request_alias a JOIN hold h ON h.id = a.hold_id"  # noqa: S608
            " WHERE a.account_id = $1 AND a.principal = $2 AND a.alias = $3",
            account_id,
            principal,
            alias,
        )
        if found is not None:
            hold = hold_row(found)
            known[hold.id] = hold
            book.aliases[account_id, principal, alias] = hold
    if not known:
        return
    for row in await tx.fetch_any(
        "SELECT hold_id, alias FROM request_alias WHERE hold_id {any}", list(known)
    ):
        book.alias_of[row["hold_id"]] = row["alias"]
    await load_transfers(tx, book, list(known))


async def _holds_by_guard(tx: Tx, keys: Sequence[tuple[str, str, str, int]]) -> Iterable[Row]:
    if tx.dialect == "postgres":
        # One look-up by key per row of the array, also when the planner's statistics are stale.
        return await tx.fetch(
            f"SELECT {columns(HOLD, 'h')} FROM unnest($1::text[], $2::text[], $3::text[],"  # noqa: S608
            " $4::bigint[]) AS k(request_id, principal, scheme, account_id),"
            " LATERAL (SELECT * FROM hold x WHERE x.request_id = k.request_id"
            " AND x.principal = k.principal AND x.scheme = k.scheme"
            " AND x.account_id = k.account_id LIMIT 1) h",
            *(list(column) for column in zip(*keys, strict=True)),
        )
    # As many rows as the next power of two, so that a few statements serve all batches.
    rows = 1 << (len(keys) - 1).bit_length()
    padded = [*keys, *([keys[-1]] * (rows - len(keys)))]
    return await tx.fetch(_guards_of(rows), *chain.from_iterable(padded))


@lru_cache(maxsize=16)
def _guards_of(rows: int) -> str:
    values = ", ".join(
        f"(${4 * i + 1}, ${4 * i + 2}, ${4 * i + 3}, ${4 * i + 4})" for i in range(rows)
    )
    return (
        f"WITH k (request_id, principal, scheme, account_id) AS (VALUES {values})"  # noqa: S608
        f" SELECT DISTINCT {columns(HOLD, 'h')} FROM k CROSS JOIN hold h"
        " ON h.request_id = k.request_id AND h.principal = k.principal"
        " AND h.scheme = k.scheme AND h.account_id = k.account_id"
    )


async def _load_closes(tx: Tx, book: Book, steps: Sequence[Close]) -> None:
    await load_transfers(tx, book, [s.hold.id for s in steps])
    lapsing = [s.hold.id for s in steps if s.if_lapsed]
    if lapsing:
        for row in await tx.fetch_any(
            "SELECT hold_id, lease_ms FROM open_hold WHERE hold_id {any}", lapsing
        ):
            book.leases[row["hold_id"]] = row["lease_ms"]
    older = [s.hold.id for s in steps if s.hold.epoch != book.account(s.hold.account_id).epoch]
    if older:
        await load_pins(tx, book, older)


async def _load_mints(tx: Tx, book: Book, steps: Sequence[Mint]) -> None:
    for step in steps:
        row = await tx.fetchrow(
            f"SELECT {columns(LOT, 'l')} FROM mint_key k JOIN lot l ON l.id = k.lot_id"  # noqa: S608
            " WHERE k.network = $1 AND k.ref = $2 AND k.n = $3",
            step.network,
            step.ref,
            step.n,
        )
        if row is not None:
            book.mints[step.network, step.ref, step.n] = LotState(*row)


async def _load_lots(tx: Tx, book: Book, account: AccountState, steps: Sequence[Step]) -> None:
    """The live lots that are due, those the fold may reach, and the first one it leaves."""
    mints = [s for s in steps if isinstance(s, Mint)]
    # A mint may come later than its own expiry: a payment whose outcome was unknown for long.
    due = min(account.next_expiry_ms, *(s.expires_ms for s in mints), NEVER) <= book.now_ms
    reach = account.pos - account.folded
    reach += sum(s.amount_units for s in steps if isinstance(s, Close))
    disputed = rare.claims(steps)
    if disputed:  # what is behind a lot that is taken out of the line comes forward
        reach = NEVER
    rows = await tx.fetch(
        # What is due expires before anything is taken from the lots behind it, so it does not
        # count for how far the fold gets.
        f"SELECT {columns(LOT)} FROM (SELECT *, sum(CASE WHEN expires_ms > $3"  # noqa: S608
        " THEN remaining_units ELSE 0 END) OVER (ORDER BY expires_ms, id) - remaining_units"
        " AS before_it FROM lot"
        " WHERE account_id = $1 AND state = 'live' AND remaining_units > 0) AS line"
        " WHERE before_it <= $2 OR expires_ms <= $3 ORDER BY expires_ms, id",
        account.id,
        reach,
        book.now_ms,
    )
    book.lots[account.id] = add_lots(book, rows)
    if due or disputed:
        await _load_open_holds(tx, book, account)


# By age: the old ones stand in open_hold, the young ones above the watermark. As one condition
# with OR it would read every hold there ever was.
OPEN_HOLDS: Final = (
    f"SELECT {columns(HOLD, 'h')} FROM (SELECT hold_id AS id FROM open_hold WHERE account_id = $1"  # noqa: S608
    " UNION SELECT id FROM hold WHERE account_id = $1"
    " AND id >= (SELECT next FROM sequence WHERE name = 'swept')) AS o"
    " JOIN hold h ON h.id = o.id LEFT JOIN transfer t ON t.id = h.id"
    " WHERE t.id IS NULL ORDER BY h.id"
)


async def _load_open_holds(tx: Tx, book: Book, account: AccountState) -> None:
    rows = await tx.fetch(OPEN_HOLDS, account.id)
    book.open_holds[account.id] = [hold_row(row) for row in rows]
    await load_pins(tx, book, [h.id for h in book.open_holds[account.id]])


async def save(tx: Tx, book: Book, writer: int) -> None:
    """Write the book back. Raises ``LedgerFault`` if a row is not as we read it."""
    if book.new_holds:
        await tx.executemany(_INSERT_HOLD, map(_hold_values, book.new_holds))
    if book.new_aliases:
        await tx.executemany(
            insert("request_alias", ("account_id", "principal", "alias", "hold_id")),
            [(*key, hold_id) for key, hold_id in book.new_aliases],
        )
    if book.new_transfers:
        await tx.executemany(_INSERT_TRANSFER, map(_transfer_values, book.new_transfers))
    if book.lots or book.pins or book.new_mints:
        await _save_lots(tx, book)
        await _save_pins(tx, book)
    if book.rare is not None:
        await rare.save(tx, book, book.rare)
    if book.new_answers:
        await tx.executemany(
            _INSERT_ANSWER,
            [
                (hold_id, a.status, _headers_text(a.headers), a.body, book.now_ms)
                for hold_id, a in book.new_answers
            ],
        )
    await _save_accounts(tx, book)
    await _save_house(tx, book, writer)


@lru_cache(maxsize=1_024)
def _headers_text(headers: tuple[tuple[str, str], ...]) -> str:
    return json.dumps(headers)


async def _save_lots(tx: Tx, book: Book) -> None:
    new = [lot for lot in book.lot.values() if lot.new]
    changed = [lot for lot in book.lot.values() if lot.touched and not lot.new]
    if new:
        await tx.executemany(_INSERT_LOT, [[getattr(x, n) for n in LOT] for x in new])
    if changed:
        await tx.executemany(
            _UPDATE_LOT,
            [_changing_lot(lot) for lot in changed],
        )
    if book.new_segments:
        await tx.executemany(
            insert("segment", ("account_id", "from_pos", "to_pos", "lot_id")),
            [(s.account_id, s.from_pos, s.to_pos, s.lot_id) for s in book.new_segments],
        )
    if book.new_mints:
        await tx.executemany(
            insert("mint_key", ("network", "ref", "n", "lot_id")),
            [(*key, lot_id) for key, lot_id in book.new_mints],
        )


async def _save_pins(tx: Tx, book: Book) -> None:
    every = [pin for pins in book.pins.values() for pin in pins]
    new = [pin for pin in every if pin.new]
    changed = [pin for pin in every if pin.touched and not pin.new]
    if new:
        await tx.executemany(
            _INSERT_PIN,
            [[getattr(p, name) for name in PIN] for p in new],
        )
    if changed:
        await tx.executemany(
            "UPDATE pin SET captured_units = $3, amount_units = $4"
            " WHERE hold_id = $1 AND lot_id = $2",
            [(p.hold_id, p.lot_id, p.captured_units, p.amount_units) for p in changed],
        )


_CHANGING: Final = tuple(n for n in ACCOUNT if n not in ("id", "ver"))
_GUARDED: Final = ("id", "ver", *_CHANGING)
_guarded_values: Final = attrgetter(*_GUARDED)
_UPDATE_POSTGRES: Final = (
    f"UPDATE account a SET {', '.join(f'{n} = n.{n}' for n in _CHANGING)}, ver = a.ver + 1"  # noqa: S608
    f" FROM unnest({', '.join(f'${i + 1}::bigint[]' for i in range(len(_GUARDED)))})"
    f" AS n({columns(_GUARDED)}) WHERE a.id = n.id AND a.ver = n.ver"
)
_UPDATE_SQLITE: Final = (
    f"UPDATE account SET {', '.join(f'{n} = ${i + 3}' for i, n in enumerate(_CHANGING))},"  # noqa: S608
    " ver = ver + 1 WHERE id = $1 AND ver = $2"
)


async def _save_accounts(tx: Tx, book: Book) -> None:
    touched = [a for a in book.accounts.values() if a.touched]
    if not touched:
        return
    # Absolute values are safe only because the row is still the one we read: ver says so.
    values = [_guarded_values(a) for a in touched]
    if tx.dialect == "postgres":
        count = await tx.execute(_UPDATE_POSTGRES, *map(list, zip(*values, strict=True)))
    else:
        count = await tx.executemany(_UPDATE_SQLITE, values)
    if count != len(touched):
        raise LedgerFault("an account changed under our lock")
    for account in touched:
        account.touched = False
        account.ver += 1


async def _save_house(tx: Tx, book: Book, writer: int) -> None:
    for account_id, gained in sorted(book.house.items()):
        if gained:
            await tx.execute(
                "INSERT INTO house_balance (account_id, writer, balance) VALUES ($1, $2, $3)"
                " ON CONFLICT (account_id, writer)"
                " DO UPDATE SET balance = house_balance.balance + excluded.balance",
                account_id,
                writer,
                gained,
            )
