"""Fill a book from the database under lock. ``save.py`` writes it back.

PostgreSQL locks account rows in id order in one statement and reads the guards in a later one: a
guard read together with the lock would be from before the wait for it. SQLite's BEGIN IMMEDIATE
has locked everything already.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from itertools import chain
from typing import Final

from gateway.db import Row, Tx
from gateway.ledger import rare
from gateway.ledger.book import AccountState, Book, LotState
from gateway.ledger.rows import (
    ACCOUNT,
    HOLD,
    LOT,
    add_lots,
    columns,
    hold_row,
    load_pins,
    load_transfers,
    of_kind,
)
from gateway.ledger.steps import NEVER, Close, Hold, HoldRow, Mint, Step

# Made once: these stand in every batch.
_SELECT_ACCOUNTS: Final = f"SELECT {columns(ACCOUNT)} FROM account WHERE id {{any}} ORDER BY id"  # noqa: S608

_LOCK_ACCOUNTS: Final = (
    f"WITH a AS MATERIALIZED ({_SELECT_ACCOUNTS} FOR UPDATE) SELECT {columns(ACCOUNT)},"  # noqa: S608
    " (extract(epoch FROM clock_timestamp()) * 1000)::bigint FROM a"
)


async def load_accounts(tx: Tx, steps: Sequence[Step], now_ms: int | None) -> Book | None:
    """Only the accounts: no look at what the database knows of these requests.

    Enough where the steps are ordinary spending and every one of them turns out to be new: the
    keys of ``hold`` and ``transfer`` say so when they are written. None: this is not so simple.
    """
    ids = set()
    for step in steps:
        if isinstance(step, Close) and not step.if_lapsed:
            ids.add(step.hold.account_id)
        elif isinstance(step, Hold) and not step.guard.names and step.only is None:
            ids.add(step.account_id)
        else:
            return None
    book = Book(0)
    if tx.dialect == "postgres":
        rows = await tx.fetch_any(_LOCK_ACCOUNTS, sorted(ids))
        book.accounts = {row[0]: AccountState(*row[:-1]) for row in rows}
        # Each row's is from after the wait for it.
        clock_ms = max((row[-1] for row in rows), default=0)
        book.now_ms = clock_ms if now_ms is None else now_ms
    else:
        await _load_accounts(tx, book, ids)
        book.now_ms = await tx.now_ms() if now_ms is None else now_ms
    accounts = book.accounts
    if len(accounts) < len(ids):
        return None
    for account in accounts.values():
        if account.next_expiry_ms <= book.now_ms:
            return None
    for step in steps:
        if isinstance(step, Close) and step.hold.epoch != accounts[step.hold.account_id].epoch:
            return None  # it may stand on pins
    return book


def forget(tx: Tx, book: Book) -> None:
    """What was decided on these rows will not be written."""
    if tx.under_lock is not None:
        for account_id in book.accounts:
            tx.under_lock.pop(account_id, None)


async def load(tx: Tx, steps: Sequence[Step], now_ms: int) -> Book:
    """Everything these steps may look at, under lock. Ids are given to the book afterwards."""
    book = Book(now_ms)
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
    limited = {s.account_id for s in holds if s.only is not None}
    sessions = {s.only.session for s in holds if s.only is not None}
    for session in filter(None, sessions):
        book.sessions[session] = await tx.fetchval(_OF_SESSION, session)
    pinned = {s.hold.account_id for s in closes if s.hold.id in book.pins} if book.pins else set()
    whole = book.rare.whole if book.rare is not None else set()
    for account in book.accounts.values():
        known = account.id in minted or account.id in pinned or account.id in whole
        if known or account.id in limited or account.next_expiry_ms <= now_ms:
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
    aliases = [(s.account_id, s.guard.principal, name) for s in steps for name in s.guard.names]
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
        book.names_of.setdefault(row["hold_id"], set()).add(row["alias"])
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
    """The live lots that are due, those the fold may reach, and the first one it leaves.

    And of those that a hold names, as many as it can need.
    """
    mints = [s for s in steps if isinstance(s, Mint)]
    # A mint may come later than its own expiry: a payment whose outcome was unknown for long.
    due = min(account.next_expiry_ms, *(s.expires_ms for s in mints), NEVER) <= book.now_ms
    reach = account.pos - account.folded
    reach += sum(s.amount_units for s in steps if isinstance(s, Close))
    limited = [s for s in steps if isinstance(s, Hold) and s.only is not None]
    reach += sum(s.max_units for s in limited)  # they may take from the lots in front
    disputed = rare.claims(steps)
    if disputed:  # what is behind a lot that is taken out of the line comes forward
        reach = NEVER
    line = add_lots(book, await tx.fetch(_LINE, account.id, reach, book.now_ms))
    if limited and reach < NEVER:
        every = {lot.id: lot for lot in line}
        onlies = [s.only for s in limited if s.only is not None]
        for named in {(only.lot_id, only.source, only.payer) for only in onlies}:
            rows = await tx.fetch(_NAMED, account.id, reach, book.now_ms, *named)
            every |= {lot.id: lot for lot in add_lots(book, rows)}
        line = sorted(every.values(), key=lambda lot: (lot.expires_ms, lot.id))
    book.lots[account.id] = line
    if due or disputed:
        await _load_open_holds(tx, book, account)


# Open holds with all they may cost, those that ended with what they did.
_OF_SESSION: Final = (
    "SELECT CAST(coalesce(sum(CASE WHEN t.id IS NULL THEN h.max_units ELSE t.amount_units END), 0)"
    " AS BIGINT) FROM hold_limit o JOIN hold h ON h.id = o.hold_id"
    " LEFT JOIN transfer t ON t.id = h.id WHERE o.session = $1"
)

# What is due expires before anything is taken from the lots behind it, so it does not count for how
# far the fold gets.
_BEFORE: Final = (
    "sum(CASE WHEN expires_ms > $3 THEN remaining_units ELSE 0 END)"
    " OVER (ORDER BY expires_ms, id) - remaining_units AS before_it"
)
_LIVE: Final = "account_id = $1 AND state = 'live' AND remaining_units > 0"
_LINE: Final = (
    f"SELECT {columns(LOT)} FROM (SELECT *, {_BEFORE} FROM lot WHERE {_LIVE}) AS line"  # noqa: S608
    " WHERE before_it <= $2 OR expires_ms <= $3 ORDER BY expires_ms, id"
)
_NAMED: Final = (
    f"SELECT {columns(LOT)} FROM (SELECT *, {_BEFORE} FROM lot WHERE {_LIVE}"  # noqa: S608
    f" AND {of_kind(4)}) AS line WHERE before_it <= $2"
)

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
