"""Calls that are paid after the work, in the books: what may be due, and what a transfer ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from chain.transfers import Transfer
from gateway import ledger
from gateway.accounts import wallets
from gateway.db import Database
from gateway.ledger import read, sweep
from gateway.payments import exposure, inbound, journal, upto_rows
from gateway.payments.inbound import For
from gateway.payments.upto_rows import DOOR, UptoCall
from tests.fixtures_chain import NETWORK, USDC
from tests.gateway.ledger import helpers
from tests.gateway.ledger.helpers import T0
from tests.gateway.payments.parts import PAY_TO, blank

PAYER = "0x" + "aa" * 20
MOST = 1_000


@pytest.fixture
async def db(db_url: str) -> AsyncIterator[Database]:
    database = await Database.connect(db_url, wait_s=20)
    yield database
    assert await helpers.faults(database) == []
    await database.close()


async def opened(db: Database, name: str = "pay_1", payer: str = PAYER, **change: Any) -> bool:
    """A call that is under way, if its wallet may have one."""
    async with db.write() as tx:
        account_id = await wallets.ensure(tx, payer, T0)
        step = helpers.hold(account_id, f"request of {name}", 0)
        (held,) = await ledger.apply(tx, [step], T0)
        assert isinstance(held, ledger.Held)
        call = UptoCall(
            payment_id=name,
            hold_id=held.hold.id,
            network=NETWORK.caip2,
            asset=USDC.address,
            payer=payer,
            payer_chain="",
            pay_to=PAY_TO,
            nonce="0x" + "07" * 32,
            valid_before_s=2**40,
            most_units=MOST,
            data=b"data",
            state="open",
            units=None,
            breakdown=None,
            answer_status=None,
            answer_headers=None,
            answer_body=None,
            error=None,
            at_ms=T0,
            updated_at_ms=T0,
            look_ms=T0,
        )
        return await upto_rows.insert(tx, replace(call, **change))


async def call_of(db: Database, name: str = "pay_1") -> UptoCall:
    async with db.read() as tx:
        found = await upto_rows.by_id(tx, name)
    assert found is not None
    return found


async def owing(db: Database, units: int = 400) -> None:
    """Its payment is sent: done, and due so much."""
    assert await opened(db)
    call = await call_of(db)
    async with db.write() as tx:
        hold = await read.hold_by_id(tx, call.hold_id)
        assert hold is not None
        await ledger.apply(tx, [helpers.void(hold, "paid_after")], T0)
        assert await upto_rows.move(tx, "pay_1", ("open",), "due", T0, units=units)
        assert await upto_rows.move(tx, "pay_1", ("due",), "sent", T0)
        await journal.insert(
            tx,
            replace(
                blank("pay_1"),
                payer=PAYER,
                recipient=PAYER,
                amount_units=units,
                method="permit2",
                door=DOOR,
            ),
        )


async def arrives(db: Database, units: int = 400) -> inbound.Placed:
    transfer = Transfer(
        network=NETWORK.caip2,
        tx_hash=f"0x{1:064x}",
        n=0,
        asset=USDC.address,
        from_=PAYER,
        to=PAY_TO,
        value_units=units,
        block_number=7,
        block_hash="0x" + "b1" * 32,
        auth_nonce=None,
        authorizer=None,
    )
    async with db.write() as tx:
        return await inbound.place(tx, transfer, For(PAYER, "", DOOR, "pay_1"), T0)


async def account(db: Database) -> read.AccountView:
    async with db.read() as tx:
        account_id = await wallets.find(tx, PAYER)
        seen = None if account_id is None else await read.account(tx, account_id)
    assert seen is not None
    return seen


async def captured(db: Database) -> list[int]:
    async with db.read() as tx:
        rows = await tx.fetch(
            "SELECT amount_units FROM transfer WHERE kind = 'capture' AND amount_units > 0"
        )
    return [row["amount_units"] for row in rows]


async def test_what_comes_is_charged_with_its_mint_and_once(db: Database) -> None:
    await owing(db)
    for _ in range(2):
        placed = await arrives(db)
        assert placed.row.state == "minted"
    assert await captured(db) == [400]
    assert (await call_of(db)).state == "settled"
    assert (await account(db)).available_units == 0


async def test_it_is_charged_to_what_it_brought(db: Database) -> None:
    """Other credits of the account stay, also those that lapse sooner."""
    async with db.write() as tx:
        account_id = await wallets.ensure(tx, PAYER, T0)
    await helpers.minted(db, helpers.mint(account_id, 90, "older", expires_ms=T0 + 10_000))
    await owing(db)
    placed = await arrives(db)
    async with db.read() as tx:
        rows = await tx.fetch("SELECT id, remaining_units FROM lot ORDER BY id")
    left = {row["id"]: row["remaining_units"] for row in rows}
    assert left.pop(placed.row.lot_id) == 0
    assert list(left.values()) == [90]
    assert (await account(db)).available_units == 90


async def test_a_debt_is_paid_first_and_not_charged_once_more(db: Database) -> None:
    await owing(db)
    async with db.write() as tx:
        account_id = await wallets.ensure(tx, PAYER, T0)
    lot = await helpers.minted(db, helpers.mint(account_id, 300, "gone"))
    await helpers.charged(db, account_id, "spent", 300)
    await helpers.one(db, ledger.Reverse(lot, 300, "its money went back"))
    assert (await account(db)).debt_units == 300
    await arrives(db)
    seen = await account(db)
    assert (seen.debt_units, seen.available_units) == (0, 100)
    assert await captured(db) == [300]  # the one of before
    assert (await call_of(db)).state == "settled"


async def test_an_account_that_was_frozen_meanwhile_is_charged(db: Database) -> None:
    """Of what the call brought, and of nothing else."""
    async with db.write() as tx:
        account_id = await wallets.ensure(tx, PAYER, T0)
    await helpers.minted(db, helpers.mint(account_id, 90, "older"))
    await owing(db)
    await helpers.one(db, ledger.FreezeAccount(account_id, True, "a test", "somebody"))
    await arrives(db)
    assert await captured(db) == [400]
    seen = await account(db)
    assert (seen.frozen, seen.available_units) == (True, 90)


@pytest.mark.parametrize("state", ["unsettled", "forgiven"])
async def test_what_comes_late_is_charged_all_the_same(db: Database, state: str) -> None:
    await owing(db)
    async with db.write() as tx:
        await journal.fail(tx, "pay_1", "invalid_transaction_state", "it was taken back", T0)
    call = await call_of(db)
    assert call.state == "unsettled"
    assert "taken back" in (call.error or "")
    if state == "forgiven":
        async with db.write() as tx:
            assert await upto_rows.forgive(tx, "pay_1", "for peace", T0)
            assert not await upto_rows.forgive(tx, "pay_1", "twice", T0)
    await arrives(db)
    assert await captured(db) == [400]
    assert (await call_of(db)).state == "settled"


async def test_a_wallet_has_one_that_has_not_ended(db: Database) -> None:
    assert await opened(db, "pay_1")
    assert not await opened(db, "pay_2")
    assert await opened(db, "pay_3", "0x" + "bb" * 20)
    for state in ("due", "sent", "unsettled"):
        async with db.write() as tx:
            before = (await call_of(db)).state
            assert await upto_rows.move(tx, "pay_1", (before,), state, T0, units=5)
        assert not await opened(db, f"pay_{state}")
    async with db.write() as tx:
        assert await upto_rows.move(tx, "pay_1", ("unsettled",), "settled", T0)
    assert await opened(db, "pay_4")


async def test_two_at_once_are_one(db_url: str, db: Database) -> None:
    other = await Database.connect(db_url, wait_s=20)
    try:
        made = await asyncio.gather(
            *(opened(each, f"pay_{n}") for n, each in enumerate((db, other) * 3)),
            return_exceptions=True,
        )
        assert [each for each in made if each is True] == [True]
    finally:
        await other.close()


async def exposed(db: Database, but: str = "") -> int:
    async with db.read() as tx:
        return await exposure.exposed_units(tx, NETWORK.caip2, but)


async def test_what_may_be_lost_counts_until_it_is_paid_or_lost(db: Database) -> None:
    assert await opened(db)
    assert await exposed(db) == MOST
    assert await exposed(db, but="pay_1") == 0
    for state, units in (("due", 400), ("sent", 400), ("unsettled", 0)):
        async with db.write() as tx:
            before = (await call_of(db)).state
            assert await upto_rows.move(tx, "pay_1", (before,), state, T0, units=400)
        assert await exposed(db) == units
    async with db.write() as tx:
        usual = 200_000_000
        assert await exposure.has_room(tx, NETWORK.caip2, usual)
        assert not await exposure.has_room(tx, NETWORK.caip2, usual + 1)


async def test_what_is_minted_counts_as_before(db: Database) -> None:
    await owing(db)
    assert await exposed(db) == 400
    await arrives(db)
    assert await exposed(db) == 400  # its block is not safe


async def test_swept_calls_are_let_go_and_no_others(db: Database) -> None:
    assert await opened(db, "pay_1")
    assert await opened(db, "pay_2", "0x" + "bb" * 20)
    async with db.write() as tx:
        assert await upto_rows.free_interrupted(tx, T0) == 0
        hold = await read.hold_by_id(tx, (await call_of(db, "pay_1")).hold_id)
        assert hold is not None
        await ledger.apply(tx, [helpers.void(hold, sweep.INTERRUPTED)], T0)
    async with db.write() as tx:
        assert await upto_rows.free_interrupted(tx, T0) == 1
    assert (await call_of(db, "pay_1")).state == "nothing"
    assert (await call_of(db, "pay_2")).state == "open"


async def test_due_ones_are_taken_by_one_at_a_time(db: Database) -> None:
    await owing(db)
    async with db.write() as tx:
        assert await upto_rows.take_due(tx, T0, 1_000, 10) == []  # it is sent
        assert await upto_rows.move(tx, "pay_1", ("sent",), "due", T0)
    for at_ms, found in ((T0, ["pay_1"]), (T0 + 999, []), (T0 + 1_000, ["pay_1"])):
        async with db.write() as tx:
            assert await upto_rows.take_due(tx, at_ms, 1_000, 10) == found


async def test_what_somebody_has_sent_is_not_given_up_by_another(db: Database) -> None:
    await owing(db)
    async with db.write() as tx:
        assert not await upto_rows.unsettled(tx, "pay_1", "due", "it was late", T0)
        assert await upto_rows.unsettled(tx, "pay_1", "sent", "it was late", T0)
    async with db.read() as tx:
        (line,) = (each for each in await upto_rows.standing(tx) if each.state == "unsettled")
        assert (line.calls, line.units) == (1, 400)
        assert [each.payment_id for each in await upto_rows.not_paid(tx)] == ["pay_1"]
        assert await upto_rows.not_paid(tx, "0x" + "bb" * 20) == []
