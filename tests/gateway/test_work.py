"""The background loop: no piece stops another, no row keeps the rest waiting, and it stops."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anvil.devnet import Devnet
from chain.errors import Rejected, Unavailable, Unknown
from gateway import work
from gateway.app import close_node, open_node
from gateway.db import CommitUnknown, Database, DatabaseUnavailable
from gateway.ledger import LedgerFault, sweep
from gateway.node import Node
from gateway.payments import journal, stripe, watcher
from gateway.payments import recover as recovering
from tests.gateway.demo.stripes import KEY, SECRET, Stripes, stripes
from tests.gateway.ledger import helpers
from tests.gateway.payments.parts import PAY_TO, Desk, blank, settings_for

__all__ = ["stripes"]

Piece = Callable[[Node], Awaitable[None]]


@asynccontextmanager
async def opened(database: str, net: Devnet | None = None, **change: Any) -> AsyncIterator[Node]:
    if net is not None:
        change["chains"] = {
            "base-sepolia": {
                "rpc": [net.rpc_url],
                "pay_to": PAY_TO,
                "settler_key": net.settler.private_key,
            }
        }
    server = {"database": database, "sweep_s": 1, **change.pop("server", {})}
    node = await open_node(settings_for(server=server, **change))
    try:
        yield node
    finally:
        await close_node(node)


@pytest.fixture
async def node(sqlite_url: str) -> AsyncIterator[Node]:
    """A gateway that does nothing else, with a chain that nobody answers for."""
    async with opened(sqlite_url) as made:
        yield made


def desk_of(node: Node, net: Devnet) -> Desk:
    (rpc,) = node.rails.rpcs.values()
    return Desk(net, node.rails, rpc)


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await true():
            await asyncio.sleep(0.02)


def about(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Which payments the log names, and how loudly."""
    return [
        (str(record.args[0]), record.levelname)
        for record in caplog.records
        if isinstance(record.args, tuple)
    ]


async def ended(task: asyncio.Task[None]) -> None:
    """Soon: not after a period of any piece."""
    await asyncio.wait_for(task, 10)


# --- one piece ------------------------------------------------------------------------------

PASSING = [
    Unavailable("rpc_unreachable", "no node"),
    Unknown("rpc_no_answer", "lost", "0x01"),
    Rejected("transaction_refused", "no"),
    stripe.Unknown("timeout", "slow"),
    DatabaseUnavailable("gone"),
    CommitUnknown("cut"),
    TimeoutError("late"),
]
FAULTS = [LedgerFault("the books"), KeyError("row"), RuntimeError("bug"), ValueError("odd")]


async def test_a_piece_that_fails_runs_again(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    errors: list[Exception] = [*PASSING, *FAULTS]
    ran = 0

    async def piece(_node: Node) -> None:
        nonlocal ran
        ran += 1
        if ran <= len(errors):
            raise errors[ran - 1]
        node.stopping.set()

    with caplog.at_level(logging.WARNING, "farebox"):
        await ended(asyncio.create_task(work._every(node, 0.001, piece)))
    assert ran == len(errors) + 1
    told = [(record.levelname, record.exc_info is not None) for record in caplog.records]
    # What passes by itself is a line; what should not happen has its traceback.
    assert told == [("WARNING", False)] * len(PASSING) + [("ERROR", True)] * len(FAULTS)
    assert all("piece" in record.message for record in caplog.records)


async def test_a_waiting_piece_stops_at_once(node: Node) -> None:
    began = asyncio.Event()

    async def piece(_node: Node) -> None:
        began.set()

    task = asyncio.create_task(work._every(node, 3_600, piece))
    await began.wait()
    await asyncio.sleep(0)
    node.stopping.set()
    await ended(task)


async def test_a_piece_does_not_begin_when_it_is_stopping(node: Node) -> None:
    node.stopping.set()

    async def piece(_node: Node) -> None:
        pytest.fail("it began")

    await ended(asyncio.create_task(work._every(node, 0.001, piece)))


async def test_being_cancelled_is_not_a_failure_to_try_again(node: Node) -> None:
    """``serve`` ends the loop so, in whatever a piece is waiting for."""
    began = asyncio.Event()

    async def piece(_node: Node) -> None:
        began.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(work._every(node, 0.001, piece))
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 10)


# --- all pieces -----------------------------------------------------------------------------

PIECES = ("_sweep", "finish_payments", "_look_at_cards", "_purge", "_audit")


@pytest.mark.parametrize("broken", PIECES)
async def test_a_broken_piece_stops_no_other(
    node: Node, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    done: set[str] = set()

    def stand_in(name: str) -> Piece:
        async def piece(_node: Node) -> None:
            done.add(name)
            if name == broken:
                raise RuntimeError(name)

        return piece

    for name in PIECES:
        monkeypatch.setattr(work, name, stand_in(name))
    task = asyncio.create_task(work.loop(node))

    async def all_ran() -> bool:
        return done == set(PIECES)

    await until(all_ran)
    assert not task.done()
    node.stopping.set()
    await ended(task)


@pytest.mark.parametrize("audits", [True, False])
async def test_one_worker_of_several_audits(
    node: Node, monkeypatch: pytest.MonkeyPatch, audits: bool
) -> None:
    ran: list[str] = []

    def stand_in(name: str) -> Piece:
        async def piece(_node: Node) -> None:
            ran.append(name)
            if len(ran) == len(PIECES) - (not audits):
                node.stopping.set()

        return piece

    for name in PIECES:
        monkeypatch.setattr(work, name, stand_in(name))
    await ended(asyncio.create_task(work.loop(node, audits=audits)))
    assert ("_audit" in ran) is audits


async def test_the_whole_loop_finishes_what_was_interrupted_and_stops(
    db_url: str, chain_net: Devnet
) -> None:
    """Everything real: killed before the broadcast, and found by the loop."""
    async with opened(db_url, chain_net) as node:
        desk = desk_of(node, chain_net)
        claimed = [await desk.claim(chain_net.accounts[n]) for n in range(3)]
        task = asyncio.create_task(work.loop(node))

        async def all_minted() -> bool:
            return len(await desk.minted()) == 3

        await until(all_minted)
        node.stopping.set()
        await ended(task)
        for each in claimed:
            assert (await desk.payment(each)).state == "succeeded"
        assert chain_net.balance_units(PAY_TO) == 30_000
        assert await helpers.faults(node.db) == []


async def leased(node: Node) -> list[int]:
    """A payment, two calls and a chain that this node speaks for, for long; the calls' ids."""
    account_id = await helpers.open_account(node.db)
    await helpers.minted(node.db, helpers.mint(account_id, 500, "0x01"))
    async with node.db.write() as tx:
        now_ms = await tx.now_ms()
        await journal.insert(tx, blank("pay_1", lease_ms=now_ms + 3_600_000))
        assert await watcher.take_lease(tx, "watch:a chain", "us", 3_600_000) is not None
    rows = [
        await helpers.held(node.db, helpers.hold(account_id, name, 100, lease_ms=3_600_000), now_ms)
        for name in ("new", "renewed")
    ]
    async with node.db.write() as tx:
        await tx.execute(
            "INSERT INTO open_hold (hold_id, account_id, lease_ms) VALUES ($1, $2, $3)",
            rows[1].id,
            account_id,
            now_ms + 3_600_000,
        )
    return [row.id for row in rows]


async def free_for_others(node: Node, holds: list[int]) -> set[bool]:
    """Whether the payment, the calls and the chain may be taken over now."""
    await work._sweep(node)
    async with node.db.write() as tx:
        now_ms = await tx.now_ms()
        return {
            bool(await journal.take_unfinished(tx, now_ms, 1, 1)),
            *[
                bool(await tx.fetchval("SELECT count(*) FROM transfer WHERE id = $1", each))
                for each in holds
            ],
            await watcher.take_lease(tx, "watch:a chain", "others", 1) is not None,
        }


async def test_what_dead_processes_spoke_for_is_taken_over_at_once_on_sqlite(
    db_url: str, dialect: str
) -> None:
    """Where the kernel says that nobody else is there; on PostgreSQL another one may be."""
    async with opened(db_url) as node:
        holds = await leased(node)
    async with opened(db_url) as node:
        assert await free_for_others(node, holds) == {dialect == "sqlite"}
        assert await helpers.faults(node.db) == []


async def test_what_a_living_process_speaks_for_is_left_to_it(db_url: str) -> None:
    async with opened(db_url) as first:
        holds = await leased(first)
        async with opened(db_url) as second:
            assert await free_for_others(second, holds) == {False}


async def test_nobody_is_alone_where_another_one_has_started(db_url: str) -> None:
    one, two, three = [await Database.connect(db_url) for _ in range(3)]
    async with one.starting() as alone:
        assert alone is (one.dialect == "sqlite")
        other = asyncio.create_task(_start(two))
        await asyncio.sleep(0)
    assert await other is False
    await one.close()  # the second is still there
    assert await _start(three) is False
    await two.close()
    await three.close()


async def _start(db: Database) -> bool:
    async with db.starting() as alone:
        return alone


async def test_broken_books_are_said_loudly(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    account_id = await helpers.open_account(node.db)
    await helpers.minted(node.db, helpers.mint(account_id, 500, "0x01"))
    with caplog.at_level(logging.INFO, "farebox"):
        await work._audit(node)
        assert caplog.records == []
        async with node.db.write() as tx:
            await tx.execute("UPDATE account SET available = 501 WHERE id = $1", account_id)
        await work._audit(node)
    assert {record.levelname for record in caplog.records} == {"ERROR"}
    assert all("the books are wrong" in record.message for record in caplog.records)


async def test_a_call_whose_owner_died_is_void_and_said(
    node: Node, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = helpers.Clock()
    clock.install(monkeypatch)
    account_id = await helpers.open_account(node.db)
    await helpers.minted(node.db, helpers.mint(account_id, 500, "0x01"))
    row = await helpers.held(node.db, helpers.hold(account_id, "id-1", 300, lease_ms=1_000))
    clock.now_ms = row.lease_ms + sweep.LAPSE_MARGIN_MS + 3_600_000
    with caplog.at_level(logging.WARNING, "farebox"):
        # Ids handed out long ago come under the watermark first.
        for _ in range(3):
            await work._sweep(node)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert (
        "id-1" in caplog.records[0].message and "nothing was charged" in caplog.records[0].message
    )
    async with node.db.read() as tx:
        reason = await tx.fetchval("SELECT reason FROM transfer WHERE id = $1", row.id)
    assert reason == sweep.INTERRUPTED


async def test_no_call_that_runs_is_void_when_the_clock_jumps(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor any that may run elsewhere, until its owner could have said so."""
    clock = helpers.Clock()
    clock.install(monkeypatch)
    account_id = await helpers.open_account(node.db)
    await helpers.minted(node.db, helpers.mint(account_id, 500, "0x01"))
    lease_ms = node.settings.server.hold_lease_s * 1_000
    ours, theirs = [
        await helpers.held(node.db, helpers.hold(account_id, name, 100, lease_ms=lease_ms))
        for name in ("ours", "theirs")
    ]
    node.in_flight[ours.id] = ours

    async def void() -> set[int]:
        await work._sweep(node)
        async with node.db.read() as tx:
            return {
                row["id"] for row in await tx.fetch("SELECT id FROM transfer WHERE kind = 'void'")
            }

    for _ in range(4):
        clock.now_ms += 5_000
        assert await void() == set()
    clock.now_ms += 3_600_000
    jumped_ms = clock.now_ms
    while clock.now_ms < jumped_ms + node.patience.grace_ms:
        assert await void() == set()
        clock.now_ms += 1_000
    for _ in range(60):
        assert await void() == {theirs.id}
        clock.now_ms += 1_000
    del node.in_flight[ours.id]


def test_a_killed_call_is_void_within_a_minute() -> None:
    """Whenever it was killed, and whenever the next process starts after that."""
    server = settings_for().server
    lapse_ms = server.hold_lease_s * 1_000 + sweep.LAPSE_MARGIN_MS
    patience = sweep.Patience(server.sweep_s, server.hold_lease_s, others=True)
    assert max(lapse_ms, patience.grace_ms) + 2 * server.sweep_s * 1_000 < 60_000


# --- payments -------------------------------------------------------------------------------


async def test_a_row_that_cannot_be_worked_on_keeps_no_other_waiting(
    sqlite_url: str, chain_net: Devnet, caplog: pytest.LogCaptureFixture
) -> None:
    """Longest waiting first: were it to end the round, the others would wait for ever."""
    async with opened(sqlite_url, chain_net) as node:
        desk = desk_of(node, chain_net)
        claimed = await desk.claim()
        desk.net.receipt(desk.send(claimed))
        async with node.db.write() as tx:
            await journal.insert(tx, blank("no transaction", lease_ms=-4))
            await journal.insert(tx, blank("no authorization", lease_ms=-3, auth_nonce=None))
            await journal.insert(tx, blank("no network", lease_ms=-2, network="eip155:8453"))
            await journal.insert(tx, blank("no token", lease_ms=-1, asset="0x" + "12" * 20))
        caplog.clear()
        with caplog.at_level(logging.INFO, "farebox"):
            await work.finish_payments(node)
        assert (await desk.payment(claimed)).state == "succeeded"
        assert dict(about(caplog)) == {
            "no transaction": "ERROR",
            "no authorization": "ERROR",
            "no network": "WARNING",
            "no token": "WARNING",
            claimed.payment.id: "INFO",
        }


async def test_what_is_not_over_is_looked_at_again_later(
    sqlite_url: str, chain_net: Devnet
) -> None:
    chain_net.rpc("evm_setAutomine", False)
    try:
        async with opened(sqlite_url, chain_net) as node:
            desk = desk_of(node, chain_net)
            claimed = await desk.claim()
            await work.finish_payments(node)
            waiting = await desk.payment(claimed)
            assert waiting.state == "processing"
            async with node.db.read() as tx:
                now_ms = await tx.now_ms()
            # Given back at once, not held for the whole lease of the worker.
            assert now_ms - 5_000 < waiting.lease_ms - 1_000 <= now_ms
            chain_net.mine()
            async with node.db.write() as tx:
                await journal.release(tx, claimed.payment.id, 0)
            await work.finish_payments(node)
            assert (await desk.payment(claimed)).state == "succeeded"
    finally:
        chain_net.rpc("anvil_dropAllTransactions")
        chain_net.rpc("evm_setAutomine", True)


async def test_it_stops_between_two_payments(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty payments at a chain that does not answer would take minutes."""
    seen: list[str] = []

    async def recover(_rails: object, payment: journal.Payment) -> str:
        seen.append(payment.id)
        node.stopping.set()
        return "failed"

    monkeypatch.setattr(recovering, "recover", recover)
    async with node.db.write() as tx:
        for n in range(5):
            await journal.insert(tx, blank(f"pay_{n}", lease_ms=n))
    await work.finish_payments(node)
    assert seen == ["pay_0"]


@given(st.integers(0, 2**50), st.integers(-5_000, 2**50))
def test_looks_become_rarer_up_to_a_bound(created_ms: int, age_ms: int) -> None:
    payment = blank("pay_1", created_at_ms=created_ms)
    pause_ms = work._next_look_ms(payment, created_ms + age_ms)
    assert 1_000 <= pause_ms <= 60_000
    assert pause_ms <= work._next_look_ms(payment, created_ms + age_ms + 1)
    assert pause_ms <= max(age_ms, 0) + 1_000


async def test_a_session_that_cannot_be_read_keeps_no_other_waiting(
    sqlite_url: str, stripes: Stripes, caplog: pytest.LogCaptureFixture
) -> None:
    shop = {"secret_key": KEY, "webhook_secret": SECRET, "api_base": stripes.url}
    async with opened(sqlite_url, stripe=shop) as node:
        async with node.db.write() as tx:
            now_ms = await tx.now_ms()
            for n in range(3):
                await journal.insert(
                    tx,
                    blank(
                        f"pay_{n}",
                        provider="stripe",
                        state="created",
                        external_ref=f"cs_test_none_{n}",
                        created_at_ms=now_ms,
                        lease_ms=n,
                    ),
                )
        caplog.clear()
        with caplog.at_level(logging.WARNING, "farebox"):
            await work._look_at_cards(node)
        asked = [call["path"] for call in stripes.ask("calls")["calls"]]
        for n in range(3):
            assert any(f"cs_test_none_{n}" in path for path in asked)
        assert about(caplog) == [(f"pay_{n}", "WARNING") for n in range(3)]
