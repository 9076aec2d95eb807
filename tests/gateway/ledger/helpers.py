"""Short names for what the ledger's tests do all the time."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from gateway import db_postgres, db_sqlite
from gateway.accounts import wallets
from gateway.db import Database, Tx
from gateway.ledger import Call, Close, Guard, Hold, HoldRow, Mint, Outcome, Step, apply, audit
from gateway.ledger.steps import NEVER, Closed, Held, Minted

T0 = 1_700_000_000_000  # a clock of the tests' own
CALL = Call("GET /paid", "GET", "/paid?x=1", "flat:2000")


@dataclass
class Clock:
    """The time of the database and of the process, moved by the test."""

    now_ms: int = T0

    def install(self, patch: pytest.MonkeyPatch) -> None:
        async def now_ms(_tx: Tx) -> int:
            return self.now_ms

        patch.setattr(db_sqlite._SqliteTx, "now_ms", now_ms)
        patch.setattr(db_postgres._PostgresTx, "now_ms", now_ms)


def address(n: int) -> str:
    """A wallet, different for every ``n``."""
    return f"0x{n:040x}"


def hold(
    account_id: int,
    request_id: str,
    max_units: int,
    *,
    content: bytes = b"content",
    alias: str | None = None,
    payment: str | None = None,
    principal: str = "0xprincipal",
    scheme: str = "erc8128",
    lease_ms: int = 60_000,
) -> Hold:
    guard = Guard(principal, scheme, request_id, alias, payment)
    return Hold(account_id, guard, content, max_units, lease_ms, CALL)


def mint(
    account_id: int, amount_units: int, ref: str, *, expires_ms: int = NEVER, n: int = 0
) -> Mint:
    return Mint(account_id, amount_units, "test", ref, n, "grant", expires_ms)


def capture(row: HoldRow, amount_units: int) -> Close:
    return Close(row, amount_units)


def void(row: HoldRow, reason: str = "upstream_error") -> Close:
    return Close(row, void_reason=reason)


async def run(db: Database, *steps: Step, at_ms: int = T0) -> list[Outcome]:
    """Apply steps together in one transaction."""
    async with db.write() as tx:
        return await apply(tx, steps, at_ms)


async def one(db: Database, step: Step, at_ms: int = T0) -> Outcome:
    return (await run(db, step, at_ms=at_ms))[0]


async def held(db: Database, step: Hold, at_ms: int = T0) -> HoldRow:
    """Apply a hold that must succeed."""
    outcome = await one(db, step, at_ms)
    assert isinstance(outcome, Held), outcome
    return outcome.hold


async def minted(db: Database, step: Mint, at_ms: int = T0) -> int:
    """Apply a mint that must succeed; the lot's id."""
    outcome = await one(db, step, at_ms)
    assert isinstance(outcome, Minted), outcome
    return outcome.lot_id


async def open_account(db: Database, n: int = 1) -> int:
    async with db.write() as tx:
        return await wallets.ensure(tx, address(n), T0)


async def faults(db: Database, now_ms: int = 0) -> list[str]:
    """The names of the audit queries that found something. ``now_ms`` 0: no hold is overdue."""
    async with db.read() as tx:
        return [broken.name for broken in await audit.verify(tx, now_ms)]


async def scalar(db: Database, sql: str, *params: object) -> object:
    async with db.read() as tx:
        return await tx.fetchval(sql, *params)


async def funded(db: Database, units: int, n: int = 1) -> int:
    """An account with one lot that never expires."""
    account = await open_account(db, n)
    await minted(db, mint(account, units, "a"))
    return account


async def charged(
    db: Database, account: int, name: str, units: int, *, of: int | None = None, at_ms: int = T0
) -> HoldRow:
    """A call that was charged ``units`` of the ``of`` it had held."""
    row = await held(db, hold(account, name, units if of is None else of), at_ms)
    closed = await one(db, capture(row, units), at_ms)
    assert isinstance(closed, Closed)
    return row
