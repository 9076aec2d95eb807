"""Random histories of the ledger, run against the model of ``tests/oracle``.

A history is a list of plain tuples, so that it can be printed, repeated from its seed and made
smaller: what an entry points at ("the k-th hold") is looked up only when it is run.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from gateway.db import Database, Tx, transact
from gateway.ledger import (
    AlreadyClosed,
    Close,
    Closed,
    Conflict,
    Current,
    Expire,
    Frozen,
    Guard,
    Held,
    Hold,
    HoldRow,
    LedgerFault,
    Mint,
    Minted,
    MintedBefore,
    Only,
    Outcome,
    Repeated,
    Short,
    Step,
    StillLeased,
    apply,
    ids,
    sweep,
)
from tests.gateway.ledger import rare_entries
from tests.gateway.ledger.helpers import CALL, T0, Clock, faults
from tests.oracle.ledger_model import FOR_EVER, Model

Entry = tuple[Any, ...]
History = list[Entry]
ACCOUNTS = 3
BATCH = 20
MARGIN_MS = 1_000


_KINDS = (
    *("hold", "close", "mint", "wait", "commit", "rehold", "reclose", "expire", "sweep", "renew"),
)
_WEIGHTS = (30, 26, 9, 8, 14, 7, 3, 3, 4, 2)
_SOURCES = ("x402", "grant")
_PAYERS = (None, "0xa", "0xb")


def make(seed: int, length: int) -> History:
    """A history of ``length`` entries; the same for the same seed."""
    rng = random.Random(seed)
    rare = seed % 3 != 0  # without disputes accounts are never stopped, and more is spent
    return [_entry(rng, rare=rare) for _ in range(length)]


def _entry(rng: random.Random, *, rare: bool) -> Entry:  # noqa: PLR0911  (a table)
    kinds = [*_KINDS, *(rare_entries.KINDS if rare else ())]
    weights = [*_WEIGHTS, *(rare_entries.WEIGHTS if rare else ())]
    kind = rng.choices(kinds, weights)[0]
    account = rng.randrange(ACCOUNTS)
    which = rng.randrange(1_000)
    match kind:
        case "hold":
            alias = f"alias{rng.randrange(60)}" if rng.random() < 0.2 else None
            payment = f"pay{which}" if which < 60 else None
            names = (alias, payment)
            lease_ms = rng.choice((5, 100, 60_000))
            only = _only(rng, which) if rng.random() < 0.25 else None
            return (kind, account, rng.choice((0, 1, 2, 3, 5, 8, 13, 30)), names, lease_ms, only)
        case "close":
            return (kind, which, rng.choice((0, 0.2, 0.5, 0.8, 1, 1, 1)), rng.random() < 0.15)
        case "reclose":
            return (kind, which, rng.random(), rng.random() < 0.3)
        case "mint":
            # 0 and below: it has expired before it could be minted
            ttl_ms = rng.choice((None, None, 3, 10, 10, 40, 200, 90_000, 0, -7))
            fact = None if rng.random() < 0.9 else which
            whose = (rng.choice(_SOURCES), rng.choice(_PAYERS))
            return (kind, account, rng.choice((1, 4, 10, 25, 60)), ttl_ms, fact, whose)
        case "wait":
            return (kind, rng.choice((1, 2, 5, 10, 30, 100, 7_000, 20_000, 70_000)))
        case "rehold":
            if rng.random() < 0.5:  # a moment ago, so perhaps in this very batch
                which = -rng.randrange(1, 5)
            change = rng.choice(("nothing", "nothing", "content", "alias", "value", "account"))
            return (kind, which, change)
        case "expire":
            return (kind, account)
        case "renew":
            return (kind, which, rng.choice((5, 1_000, 30_000)))
        case "refund" | "freeze" | "unfreeze" | "reverse" | "stop" | "write off" | "reopen":
            return rare_entries.entry(rng, kind, account, which)
    return (kind,)


def _only(rng: random.Random, which: int) -> tuple[int | None, str | None, str | None]:
    """Which lots a hold may be taken from: the k-th newest, or a kind."""
    if rng.random() < 0.5:
        return (which % 7, None, None)
    source = rng.choice((None, *_SOURCES))
    return (None, source, rng.choice(_PAYERS) if source else _PAYERS[1])


@dataclass
class Run:
    """One history being run on one database and on the model.

    ``other`` is another process's connection to the same database. Before some batches the same
    steps are applied in a transaction that is rolled back, or together with a faulty one: neither
    may leave a trace, in the database or in anybody's memory.
    """

    db: Database
    other: Database
    clock: Clock
    open_account: Callable[[], Awaitable[int]]
    rng: random.Random
    model: Model = field(default_factory=Model)
    accounts: list[int] = field(default_factory=list)
    rows: list[HoldRow] = field(default_factory=list)
    requests: list[Hold] = field(default_factory=list)
    facts: list[tuple[str, str, int]] = field(default_factory=list)
    batch: list[Step] = field(default_factory=list)
    blocks: ids.IdBlocks = field(default_factory=ids.IdBlocks)
    steps: int = 0
    swept: int = 0
    limited: int = 0  # holds that were taken from certain lots only
    seen: set[str] = field(default_factory=set)

    async def all(self, history: History) -> None:
        """Run it to its end, compare on the way, audit at the end."""
        self.accounts = [await self.open_account() for _ in range(ACCOUNTS)]
        self.model.at(self.clock.now_ms)
        for entry in history:
            await self._entry(entry)
        await self._flush()
        await self._compare()
        assert await faults(self.db) == []

    async def _entry(self, entry: Entry) -> None:  # noqa: PLR0912  (a table)
        match entry:
            case ("hold", account, units, names, lease_ms, limit):
                value = f"{self.accounts[0]}-{len(self.requests)}"
                guard = Guard("0xp", "erc8128", value, *names)
                only = self._limit(account, limit)
                step = Hold(
                    self.accounts[account], guard, b"asked", units, lease_ms, CALL, only=only
                )
                self.requests.append(step)
                self.batch.append(step)
            case ("rehold", which, change) if self.requests:
                self.batch.append(self._changed(self.requests[which % len(self.requests)], change))
            case ("close", which, part, is_void) if self.rows:
                running = [row for row in self.rows if not self.model.holds[row.id].closed]
                if running:
                    self._close(running[which % len(running)], part, is_void)
            case ("reclose", which, part, is_void) if self.rows:
                self._close(self.rows[which % len(self.rows)], part, is_void)
            case ("mint", account, units, ttl_ms, which, (source, payer)):
                expires_ms = FOR_EVER if ttl_ms is None else self.clock.now_ms + ttl_ms
                fact = ("test", f"fact-{self.accounts[0]}", len(self.facts))
                if which is not None and self.facts:
                    fact = self.facts[which % len(self.facts)]
                self.facts.append(fact)
                self.batch.append(
                    Mint(self.accounts[account], units, *fact, source, expires_ms, payer)
                )
            case ("expire", account):
                self.batch.append(Expire(self.accounts[account]))
            case ("commit",):
                await self._flush()
                await self._compare()
            case ("wait", ms):
                await self._flush()
                self.clock.now_ms += ms
            case ("sweep",):
                await self._flush()
                await self._sweep()
            case ("renew", which, ms) if self.rows:
                await self._flush()
                row = self.rows[which % len(self.rows)]
                now_ms = self.clock.now_ms
                if now_ms - row.at_ms >= (row.lease_ms - row.at_ms) // 4:  # younger: not yet
                    self.model.holds[row.id].lease_ms = now_ms + ms
                await sweep.renew(self.db, [row], ms)
            case _:
                holds = [row.id for row in self.rows]
                found = rare_entries.step(self.model, self.accounts, holds, entry)
                if found is not None:
                    self.batch.append(found)
        if len(self.batch) == BATCH:
            await self._flush()

    def _limit(
        self, account: int, limit: tuple[int | None, str | None, str | None] | None
    ) -> Only | None:
        if limit is None:
            return None
        newest, source, payer = limit
        if newest is None:
            return Only(None, source, payer)
        lots = self.model.of(self.accounts[account])
        # One that is nobody's, if there are not so many yet.
        return Only(lots[-1 - newest].name if newest < len(lots) else 1, source, payer)

    def _close(self, row: HoldRow, part: float, is_void: bool) -> None:
        units = 0 if is_void else int(row.max_units * part)
        self.batch.append(Close(row, units, "upstream_error" if is_void else None))

    def _changed(self, step: Hold, change: str) -> Hold:
        guard, account, content = step.guard, step.account_id, step.content
        match change:
            case "content":
                content = b"something else"
            case "alias":
                guard = replace(guard, alias="alias7")
            case "value":
                value = f"again-{guard.request_id}"
                guard = replace(guard, request_id=value)
            case "account":
                at = (self.accounts.index(account) + 1) % ACCOUNTS
                account = self.accounts[at]
        return replace(step, account_id=account, guard=guard, content=content)

    async def _flush(self) -> None:
        """Commit what has been collected and hold every outcome against the model's."""
        batch, self.batch = self.batch, []
        if not batch:
            return
        self.steps += len(batch)
        now_ms = self.clock.now_ms
        blocks = self.blocks if self.rng.random() < 0.5 else None
        db = self.db if self.rng.random() < 0.7 else self.other
        trouble = self.rng.choice(("none", "none", "none", "rolled back", "fault"))
        if trouble == "rolled back":
            with suppress(_Back):
                async with db.write() as tx:
                    await apply(tx, batch, now_ms)
                    raise _Back
        as_new = self.rng.random() < 0.7

        async def work(tx: Tx) -> list[Outcome]:
            nonlocal as_new, trouble
            first, as_new, bad, trouble = as_new, False, trouble == "fault", "none"
            if bad:
                zero = Mint(self.accounts[0], 0, "", "", 0, "")
                with pytest.raises(LedgerFault):
                    await apply(tx, [*batch, zero], now_ms, as_new=first)
            writer = self.rng.randrange(2)
            return await apply(tx, batch, now_ms, ids=blocks, writer=writer, as_new=first)

        outcomes = await transact(db, work)
        self.model.at(now_ms)
        for step, outcome in zip(batch, outcomes, strict=True):
            expected = self._expected(step, outcome)
            told = self._told(outcome)
            self.seen.add(str(told[0]))
            assert told == expected, f"{step} at {now_ms - T0}: {told}, the model says {expected}"

    def _expected(self, step: Step, outcome: Outcome) -> tuple[object, ...]:
        """What the model makes of it. The ledger's answer is only asked for a new name."""
        match step:
            case Hold():
                g = step.guard
                guard = (g.principal, g.scheme, g.request_id, g.alias, g.payment)
                name = outcome.hold.id if isinstance(outcome, Held) else 0
                return self.model.hold(
                    name,
                    step.account_id,
                    guard,
                    content=step.content,
                    units=step.max_units,
                    lease_ms=step.lease_ms,
                    only=_told_of(step.only),
                )
            case Close():
                is_void = step.void_reason is not None
                return self.model.close(step.hold.id, step.amount_units, void=is_void)
            case Mint():
                fact = (step.network, step.ref, step.n)
                name = outcome.lot_id if isinstance(outcome, Minted) else 0
                return self.model.mint(
                    name,
                    step.account_id,
                    step.amount_units,
                    fact,
                    step.expires_ms,
                    source=step.source,
                    payer=step.payer,
                )
            case Expire():
                return self.model.look(step.account_id)
            case _:
                return rare_entries.expected(self.model, step)

    def _told(self, outcome: Outcome) -> tuple[object, ...]:  # noqa: PLR0911  (a table)
        match outcome:
            case Held(hold, balance):
                self.rows.append(hold)
                self.limited += hold.epoch < 0
                return ("held", hold.id, balance.available_units, balance.held_units)
            case Repeated(hold, close):
                ended = None if close is None else (close.kind, close.amount_units)
                return ("repeated", hold.id, ended)
            case Conflict(hold):
                assert hold is not None
                return ("conflict", hold.id)
            case Short(available, needed):
                return ("short", available, needed)
            case Frozen(debt):
                return ("frozen", debt)
            case Closed(transfer, balance):
                amounts = (transfer.amount_units, balance.available_units, balance.held_units)
                return ("closed", transfer.kind, *amounts)
            case AlreadyClosed(transfer):
                return ("already closed", transfer.kind, transfer.amount_units)
            case StillLeased():
                return ("still leased",)
            case Minted(lot_id, balance):
                return ("minted", lot_id, balance.available_units, balance.held_units)
            case MintedBefore(lot_id, account_id, units):
                return ("minted before", lot_id, account_id, units)
            case Current(balance):
                return ("current", balance.available_units, balance.held_units)
            case _:
                return rare_entries.told(outcome)

    async def _sweep(self) -> None:
        """Every hold whose lease is over is voided, except those too young to be looked at."""
        now_ms = self.clock.now_ms
        self.model.at(now_ms)
        before = -1
        while before != (before := await _watermark(self.db)):
            await sweep.note_open_holds(self.db)
        # Histories that were run before this one in the same database may have left some, too.
        swept = await sweep.void_lapsed(self.db, MARGIN_MS)
        swept = [row for row in swept if row.id in self.model.holds]
        for row in swept:
            outcome = self.model.close(row.id, 0, void=True, if_lapsed=True)
            assert outcome[0] == "closed", f"hold {row.id} was swept: {outcome}"
        self.swept += len(swept)
        settled_ms = now_ms - ids.SETTLED_AFTER_MS - ids.BLOCK_LIFE_MS
        left = [
            row.id
            for row in self.rows
            if not self.model.holds[row.id].closed
            and self.model.holds[row.id].lease_ms < now_ms - MARGIN_MS
            and row.at_ms < settled_ms
        ]
        assert left == [], "lapsed holds were not swept"

    async def _compare(self) -> None:
        """Account by account, lot by lot, pin by pin, as if everything due had been noticed.

        It is noticed in a transaction that is thrown away, so that the history itself goes on
        with expiries that nobody has found yet.
        """
        self.model.at(self.clock.now_ms)
        with suppress(_Back):
            async with self.db.write() as tx:
                await apply(tx, [Expire(a) for a in self.accounts], self.clock.now_ms)
                for account in self.accounts:
                    told = await _stored(tx, account)
                    said = self._modelled(account)
                    assert told == said, f"account {account}: {told}, the model says {said}"
                raise _Back

    def _modelled(self, account: int) -> dict[str, object]:
        lots = {
            lot.name: (
                *(lot.remaining, lot.captured, lot.expired, lot.frozen),
                *(lot.reversed, lot.short, lot.repaid, lot.lost),
            )
            for lot in self.model.of(account)
        }
        pins: Counter[tuple[int, int]] = Counter()
        for hold in self.model.open(account):
            for lot, units in hold.pins:
                pins[hold.name, lot.name] += units
        return {
            "balance": self.model.balance(account),
            "debt": self.model.debt(account),
            "spent": self.model.spent(account),
            "lots": lots,
            "pins": dict(pins),
        }


class _Back(Exception):  # noqa: N818  (not an error: it rolls back)
    pass


def _told_of(only: Only | None) -> tuple[int | None, str | None, str | None]:
    return (None, None, None) if only is None else (only.lot_id, only.source, only.payer)


async def _watermark(db: Database) -> int:
    async with db.read() as tx:
        mark: int = await tx.fetchval("SELECT next FROM sequence WHERE name = 'swept'")
        return mark


async def _stored(tx: Tx, account_id: int) -> dict[str, object]:
    """What the tables say, with the stretch that is not booked yet taken off the lots in order."""
    account = await tx.fetchrow("SELECT * FROM account WHERE id = $1", account_id)
    assert account is not None
    rows = await tx.fetch(
        "SELECT l.*,"
        " (SELECT coalesce(sum(to_pos - from_pos), 0) FROM segment WHERE lot_id = l.id) AS booked,"
        " (SELECT coalesce(sum(captured_units), 0) FROM pin WHERE lot_id = l.id) AS pinned,"
        " (SELECT coalesce(sum(amount_units), 0) FROM refund_part WHERE lot_id = l.id) AS back"
        " FROM lot l WHERE l.account_id = $1 ORDER BY l.expires_ms, l.id",
        account_id,
    )
    unbooked = account["pos"] - account["folded"]
    lots = {}
    for row in rows:
        assert row["state"] == "live" or row["remaining_units"] == 0
        part = min(unbooked, row["remaining_units"])
        unbooked -= part
        captured = int(row["booked"]) + int(row["pinned"]) + part - int(row["back"])
        lots[row["id"]] = (
            *(row["remaining_units"] - part, captured, row["expired_units"]),
            *(row["state"] == "frozen", row["reversed_units"]),
            *(row["short_units"], row["repaid_units"], row["lost_units"]),
        )
    assert unbooked == 0
    pins = await tx.fetch(
        "SELECT p.hold_id, p.lot_id, p.amount_units FROM pin p JOIN hold h ON h.id = p.hold_id"
        " WHERE h.account_id = $1 AND p.captured_units IS NULL",
        account_id,
    )
    return {
        "balance": (account["available"], account["held"]),
        "debt": account["debt"],
        "spent": account["spent"],
        "lots": lots,
        "pins": {(p["hold_id"], p["lot_id"]): p["amount_units"] for p in pins},
    }
