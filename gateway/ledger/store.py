"""Fill a book from the database under lock, and write it back. The only SQL of a ledger step.

PostgreSQL locks account rows in id order in one statement and reads the guards in a later one: a
guard read together with the lock would be from before the wait for it. SQLite's BEGIN IMMEDIATE
has locked everything already.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Final

from gateway.db import Row, Tx
from gateway.ledger.book import AccountState, Book, LedgerFault, LotState, PinState
from gateway.ledger.steps import NEVER, Close, Hold, HoldRow, Mint, Step, TransferRow

HOLD: Final = tuple(f.name for f in fields(HoldRow))
TRANSFER: Final = tuple(f.name for f in fields(TransferRow))
ACCOUNT: Final = tuple(f.name for f in fields(AccountState) if f.name != "touched")
LOT: Final = tuple(f.name for f in fields(LotState) if f.name not in ("new", "touched"))
PIN: Final = ("hold_id", "lot_id", "amount_units", "captured_units")


def columns(names: Sequence[str], table: str = "") -> str:
    """``a.x, a.y`` for a SELECT."""
    dot = f"{table}." if table else ""
    return ", ".join(dot + name for name in names)


def insert(table: str, names: Sequence[str]) -> str:
    """An INSERT of all columns, in their order."""
    marks = ", ".join(f"${i + 1}" for i in range(len(names)))
    return f"INSERT INTO {table} ({columns(names)}) VALUES ({marks})"  # noqa: S608


def hold_row(row: Row) -> HoldRow:
    return HoldRow(**{name: row[name] for name in HOLD})


def transfer_row(row: Row) -> TransferRow:
    return TransferRow(**{name: row[name] for name in TRANSFER})


async def load(tx: Tx, steps: Sequence[Step], now_ms: int) -> Book:
    """Everything these steps may look at, under lock. Ids are given to the book afterwards."""
    book = Book(now_ms, iter(()))
    ids = {s.hold.account_id if isinstance(s, Close) else s.account_id for s in steps}
    await _load_accounts(tx, book, sorted(ids))
    await _load_guards(tx, book, [s for s in steps if isinstance(s, Hold)])
    await _load_closes(tx, book, [s for s in steps if isinstance(s, Close)])
    await _load_mints(tx, book, [s for s in steps if isinstance(s, Mint)])
    for account in book.accounts.values():
        mine = [s for s in steps if _account_of(s) == account.id]
        await _load_lots(tx, book, account, mine)
    return book


def _account_of(step: Step) -> int:
    return step.hold.account_id if isinstance(step, Close) else step.account_id


async def _load_accounts(tx: Tx, book: Book, ids: Sequence[int]) -> None:
    rows = await tx.fetch_any(
        f"SELECT {columns(ACCOUNT)} FROM account WHERE id {{any}} ORDER BY id{tx.for_update}",  # noqa: S608
        ids,
    )
    for row in rows:
        book.accounts[row["id"]] = AccountState(**{name: row[name] for name in ACCOUNT})


async def _load_guards(tx: Tx, book: Book, steps: Sequence[Hold]) -> None:
    if not steps:
        return
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
    await _load_transfers(tx, book, list(known))


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
    found: list[Row] = []
    for key in keys:
        found += await tx.fetch(
            f"SELECT {columns(HOLD)} FROM hold WHERE request_id = $1 AND principal = $2"  # noqa: S608
            " AND scheme = $3 AND account_id = $4",
            *key,
        )
    return found


async def _load_transfers(tx: Tx, book: Book, ids: Sequence[int]) -> None:
    for row in await tx.fetch_any(
        f"SELECT {columns(TRANSFER)} FROM transfer WHERE id {{any}}",  # noqa: S608
        ids,
    ):
        book.closes[row["id"]] = transfer_row(row)


async def _load_closes(tx: Tx, book: Book, steps: Sequence[Close]) -> None:
    if not steps:
        return
    await _load_transfers(tx, book, [s.hold.id for s in steps])
    lapsing = [s.hold.id for s in steps if s.if_lapsed]
    if lapsing:
        for row in await tx.fetch_any(
            "SELECT hold_id, lease_ms FROM open_hold WHERE hold_id {any}", lapsing
        ):
            book.leases[row["hold_id"]] = row["lease_ms"]
    older = [s.hold.id for s in steps if s.hold.epoch != book.account(s.hold.account_id).epoch]
    if older:
        await _load_pins(tx, book, older)


async def _load_pins(tx: Tx, book: Book, hold_ids: Sequence[int]) -> None:
    for row in await tx.fetch_any(
        f"SELECT {columns(PIN, 'p')}, l.expires_ms FROM pin p JOIN lot l ON l.id = p.lot_id"  # noqa: S608
        " WHERE p.hold_id {any}",
        hold_ids,
    ):
        pin = PinState(*(row[name] for name in (*PIN, "expires_ms")))
        book.pins.setdefault(pin.hold_id, []).append(pin)


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
            book.mints[step.network, step.ref, step.n] = _lot(row)


def _lot(row: Row) -> LotState:
    return LotState(**{name: row[name] for name in LOT})


async def _load_lots(tx: Tx, book: Book, account: AccountState, steps: Sequence[Step]) -> None:
    """The live lots that are due, those the fold may reach, and the first one it leaves."""
    book.lots[account.id] = []
    mints = [s for s in steps if isinstance(s, Mint)]
    # A mint may come later than its own expiry: a payment whose outcome was unknown for long.
    due = min(account.next_expiry_ms, *(s.expires_ms for s in mints), NEVER) <= book.now_ms
    if not due and not mints:
        return
    reach = account.pos - account.folded
    reach += sum(s.amount_units for s in steps if isinstance(s, Close))
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
    book.lots[account.id] = [_lot(row) for row in rows]
    if due:
        await _load_open_holds(tx, book, account)


async def _load_open_holds(tx: Tx, book: Book, account: AccountState) -> None:
    """Open holds by age: the old ones stand in ``open_hold``, the young above the watermark."""
    rows = await tx.fetch(
        f"SELECT {columns(HOLD, 'h')} FROM hold h LEFT JOIN transfer t ON t.id = h.id"  # noqa: S608
        " WHERE h.account_id = $1 AND t.id IS NULL AND (h.id >="
        " (SELECT next FROM sequence WHERE name = 'swept')"
        " OR h.id IN (SELECT hold_id FROM open_hold WHERE account_id = $1))"
        " ORDER BY h.id",
        account.id,
    )
    book.open_holds[account.id] = [hold_row(row) for row in rows]
    # The pins of those that are being closed may be here already.
    await _load_pins(tx, book, [h.id for h in book.open_holds[account.id] if h.id not in book.pins])


async def save(tx: Tx, book: Book, writer: int) -> None:
    """Write the book back. Raises ``LedgerFault`` if a row is not as we read it."""
    if book.new_holds:
        await tx.executemany(
            insert("hold", HOLD), [[getattr(h, n) for n in HOLD] for h in book.new_holds]
        )
    if book.new_aliases:
        await tx.executemany(
            insert("request_alias", ("account_id", "principal", "alias", "hold_id")),
            [(*key, hold_id) for key, hold_id in book.new_aliases],
        )
    if book.new_transfers:
        await tx.executemany(
            insert("transfer", TRANSFER),
            [[getattr(t, n) for n in TRANSFER] for t in book.new_transfers],
        )
    await _save_lots(tx, book)
    await _save_pins(tx, book)
    if book.new_answers:
        await tx.executemany(
            insert("answer", ("hold_id", "status", "headers", "body", "at_ms")),
            [
                (hold_id, a.status, json.dumps(a.headers), a.body, book.now_ms)
                for hold_id, a in book.new_answers
            ],
        )
    await _save_accounts(tx, book)
    await _save_house(tx, book, writer)


async def _save_lots(tx: Tx, book: Book) -> None:
    every = [lot for line in book.lots.values() for lot in line]
    new = [lot for lot in every if lot.new]
    changed = [lot for lot in every if lot.touched and not lot.new]
    if new:
        await tx.executemany(insert("lot", LOT), [[getattr(x, n) for n in LOT] for x in new])
    if changed:
        await tx.executemany(
            "UPDATE lot SET remaining_units = $2, state = $3 WHERE id = $1",
            [(lot.id, lot.remaining_units, lot.state) for lot in changed],
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
            insert("pin", PIN),
            [[getattr(p, name) for name in PIN] for p in new],
        )
    if changed:
        await tx.executemany(
            "UPDATE pin SET captured_units = $3 WHERE hold_id = $1 AND lot_id = $2",
            [(p.hold_id, p.lot_id, p.captured_units) for p in changed],
        )


_CHANGING: Final = tuple(n for n in ACCOUNT if n not in ("id", "frozen", "ver"))


async def _save_accounts(tx: Tx, book: Book) -> None:
    touched = [a for a in book.accounts.values() if a.touched]
    if not touched:
        return
    # Absolute values are safe only because the row is still the one we read: ver says so.
    if tx.dialect == "postgres":
        arrays = ", ".join(f"${i + 1}::bigint[]" for i in range(len(_CHANGING) + 2))
        names = ("id", "ver", *_CHANGING)
        sets = ", ".join(f"{n} = n.{n}" for n in _CHANGING)
        count = await tx.execute(
            f"UPDATE account a SET {sets}, ver = a.ver + 1 FROM unnest({arrays})"  # noqa: S608
            f" AS n({columns(names)}) WHERE a.id = n.id AND a.ver = n.ver",
            *([getattr(a, n) for a in touched] for n in names),
        )
    else:
        sets = ", ".join(f"{n} = ${i + 3}" for i, n in enumerate(_CHANGING))
        sql = f"UPDATE account SET {sets}, ver = ver + 1 WHERE id = $1 AND ver = $2"  # noqa: S608
        count = 0
        for a in touched:
            count += await tx.execute(sql, a.id, a.ver, *(getattr(a, n) for n in _CHANGING))
    if count != len(touched):
        raise LedgerFault("an account changed under our lock")


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
