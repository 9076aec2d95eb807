"""P-flat: P-spend on a ledger that is full already, against an empty one.

The full one has a million ended calls and an account of 10,000 lots that takes part in the load.
Accounts, credits and one call are made by the ledger's own verbs; the other calls are copies of
that one, made by one statement a table, with ids, balances and places on the tape as if they had
happened. The audits say whether they could have. Stored answers are left out: they are kept for a
day, and their table grows at its end.
"""

from __future__ import annotations

import asyncio
import secrets
import sqlite3
from pathlib import Path

from gateway import ledger
from gateway.accounts import wallets
from gateway.db import Database, sqlite_path
from gateway.migrations.run import migrate
from tests.bench import requests, run
from tests.bench.figures import ACCOUNTS, floor_round, gateway_round, spend_round
from tests.bench.report import Run, row
from tests.bench.run import BenchFault, Load, median

LIVED_IN = 1_000  # accounts the calls are spread over
LOTS = 10_000
UNITS = 100
PLENTY = 10**12
GOALS = {"time": 0.9, "random": 0.75}
_MINTS_AT_ONCE = 500


def flat(given: Run) -> None:
    """Empty, full with time-ordered ids, full with random ids, in alternating rounds."""
    with run.scratch() as folder:
        full = {ids: filled(folder / ids, given.holds, ids == "random") for ids in GOALS}
        floors, empty = [], []
        found: dict[str, list[Load]] = {ids: [] for ids in GOALS}
        for _ in range(given.rounds):
            with run.scratch() as fresh:
                floors.append(floor_round(fresh, given.seconds))
                empty.append(spend_round(fresh, given.seconds))
            for ids, gateway in full.items():
                is_random = ids == "random"
                load = gateway_round(folder / ids, gateway, given.seconds, random_ids=is_random)
                found[ids].append(load)
        for gateway in full.values():
            run.check_books(gateway.database)
    floor, against = median(floors), median(empty)
    for ids, goal in GOALS.items():
        mid = median(found[ids])
        given.put(
            f"P-flat.{ids}-ordered" if ids == "time" else f"P-flat.{ids}",
            mid.per_s / against.per_s,
            "x empty",
            goal=goal,
            holds=given.holds,
            lots=LOTS,
            empty=row(against),
            floor=row(floor),
            **row(mid),
        )


def filled(folder: Path, holds: int, random_ids: bool, lots: int = LOTS) -> run.Gateway:
    """A database with ``holds`` ended calls, audited, and a gateway's configuration for it."""
    folder.mkdir()
    database = f"sqlite:///{folder}/bench.db"
    secrets_ = requests.new_wallets(LIVED_IN)
    addresses = [requests.address_of(secret) for secret in secrets_]
    template = asyncio.run(_lived_in(database, addresses, lots))
    _multiply(sqlite_path(database), template, holds - holds % LIVED_IN, random_ids)
    run.check_books(database)
    spending = run.Gateway(folder / "", "", 0, secrets_[:ACCOUNTS], database, 1)
    return run.another(spending, folder)


async def _lived_in(database: str, addresses: list[str], lots: int) -> int:
    """Accounts with credits, the first one with ``lots`` lots, and one call; its hold's id."""
    db = await Database.connect(database)
    try:
        await migrate(db)
        async with db.write() as tx:
            now_ms = await tx.now_ms()
            accounts = [await wallets.ensure(tx, each, now_ms) for each in addresses]
            mints = [
                ledger.Mint(account, PLENTY, "grant", f"plenty-{account}", 0, "grant")
                for account in accounts
            ]
            # One a minute for a week, the first a year from now.
            year_ms = now_ms + 365 * 86_400_000
            mints += [
                ledger.Mint(accounts[0], 10**6, "grant", "lot", n, "grant", year_ms + n * 60_000)
                for n in range(lots - 1)
            ]
            for at in range(0, len(mints), _MINTS_AT_ONCE):
                await ledger.apply(tx, mints[at : at + _MINTS_AT_ONCE], now_ms)
            made = await wallets.ensure(tx, f"0x{secrets.token_hex(20)}", now_ms)
            mint = ledger.Mint(made, UNITS, "grant", "template", 0, "grant")
            guard = ledger.Guard(addresses[0], "erc8128", requests.time_id())
            call = ledger.Call("bench", "POST", requests.PATH)
            hold = ledger.Hold(made, guard, secrets.token_bytes(32), UNITS, 60_000, call)
            _, held = await ledger.apply(tx, [mint, hold], now_ms)
            if not isinstance(held, ledger.Held):
                raise BenchFault(f"the call that is copied was refused: {held}")
            await ledger.apply(tx, [ledger.Close(held.hold, UNITS)], now_ms)
            return held.hold.id
    finally:
        await db.close()


def _multiply(file: Path, template: int, count: int, random_ids: bool) -> None:
    """Copy one ended call ``count`` times, in turn over the accounts that have plenty."""
    db = sqlite3.connect(file)
    try:
        db.execute("PRAGMA synchronous=OFF")
        db.execute("PRAGMA cache_size=-2000000")  # the guard's index is filled in any order
        (base,) = db.execute("SELECT next FROM sequence WHERE name = 'id'").fetchone()
        db.execute(
            "CREATE TEMP TABLE lives AS SELECT row_number() OVER (ORDER BY a.id) - 1 AS k,"
            " a.id, w.address, a.seq, a.last_id, a.available AS balance, a.pos FROM account a"
            " JOIN wallet w ON w.account_id = a.id WHERE a.available >= ?",
            (PLENTY,),
        )
        (lives,) = db.execute("SELECT count(*) FROM lives").fetchone()
        db.execute("CREATE UNIQUE INDEX temp.lives_k ON lives (k)")
        each = count // lives
        request_id = (
            "lower(hex(randomblob(16)))"
            if random_ids
            # As the agent's own: sixteen digits of nanoseconds, then chance. All in the past.
            else f"printf('%016x', ({_NOW_NS}) - ({count} - n.i) * 1000000)"
            " || lower(hex(randomblob(8)))"
        )
        turn = f"(n.i / {lives})"
        hold = {"id": f"{base} + n.i", "account_id": "a.id", "principal": "a.address"}
        _copy(db, "hold", template, count, hold | {"request_id": request_id})
        transfer = {
            "id": f"{base} + n.i",
            "ref": f"{base} + n.i",
            "debit": "a.id",
            "account_id": "a.id",
            "seq": f"a.seq + 1 + {turn}",
            "prev_id": f"CASE WHEN {turn} = 0 THEN a.last_id ELSE {base} + n.i - {lives} END",
            "balance_units": f"a.balance - {UNITS} * ({turn} + 1)",
            "pos": f"a.pos + {UNITS} * {turn}",
        }
        _copy(db, "transfer", template, count, transfer)
        db.execute(
            f"UPDATE account SET available = available - {UNITS * each}, pos = pos +"
            f" {UNITS * each}, spent = spent + {UNITS * each}, seq = seq + {each}, ver = ver + 1,"
            f" last_id = {base + count - lives} + (SELECT k FROM lives WHERE lives.id = account.id)"
            " WHERE id IN (SELECT id FROM lives)"
        )
        db.execute(
            f"UPDATE house_balance SET balance = balance + {UNITS * count} WHERE account_id = ?",
            (ledger.REVENUE,),
        )
        db.execute("UPDATE sequence SET next = next + ? WHERE name = 'id'", (count,))
        # The copies stand in no batch, like what was there before the chains began.
        db.execute(
            "UPDATE meta SET value = CAST(CAST(value AS INTEGER) + ? AS TEXT)"
            " WHERE key IN ('unchained_holds', 'unchained_transfers')",
            (count,),
        )
        db.execute(
            "UPDATE sequence SET next = (SELECT next FROM sequence WHERE name = 'id')"
            " WHERE name = 'swept'"
        )
        db.commit()
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        db.close()


_NOW_NS = "CAST(strftime('%s', 'now') AS INTEGER) * 1000000000"


def _copy(
    db: sqlite3.Connection, table: str, template: int, count: int, own: dict[str, str]
) -> None:
    """``count`` copies of a row, all columns but ``own`` as they are in it."""
    names = [name for _, name, *_ in db.execute(f"PRAGMA table_info({table})")]
    values = ", ".join(own.get(name, f"t.{name}") for name in names)
    db.execute(
        f"INSERT INTO {table} ({', '.join(names)})"
        f" WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < {count - 1})"
        f" SELECT {values} FROM n JOIN (SELECT * FROM {table} WHERE id = {template}) t"
        " JOIN lives a ON a.k = n.i % (SELECT count(*) FROM lives)"
    )
