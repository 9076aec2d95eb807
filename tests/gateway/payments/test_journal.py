"""What is written about a payment: one claim, one chain nonce, one mint, one lease."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest

from chain.transfers import Transfer
from gateway import ledger
from gateway.accounts import wallets
from gateway.db import Database, Tx, transact
from gateway.ledger import read
from gateway.payments import journal
from gateway.payments.journal import AuthKey, Claim, Payment
from tests.fixtures_chain import NETWORK, USDC
from tests.gateway.ledger import helpers
from tests.gateway.payments.parts import PAY_TO, blank

T0 = 1_700_000_000_000
LEASE_MS = 15_000
PAYER = "0x" + "aa" * 20
SENDER = "0x" + "5e" * 20
KEY = AuthKey(NETWORK.caip2, USDC.address, PAYER, "0x" + "01" * 32)

Connect = Callable[[], Any]


@pytest.fixture
async def connect(db_url: str) -> AsyncIterator[Connect]:
    """Opens connections of their own to one database, as the nodes of a deployment have."""
    async with AsyncExitStack() as stack:

        async def open_one() -> Database:
            db = await Database.connect(db_url, wait_s=20)
            stack.push_async_callback(db.close)
            return db

        yield open_one


@pytest.fixture
async def db(connect: Connect) -> AsyncIterator[Database]:
    database: Database = await connect()
    yield database
    assert await helpers.faults(database) == []


def transfer(payment: Payment, *, n: int = 0, tx: int = 1, units: int | None = None) -> Transfer:
    return Transfer(
        network=NETWORK.caip2,
        tx_hash=f"0x{tx:064x}",
        n=n,
        asset=USDC.address,
        from_=payment.payer or "",
        to=PAY_TO,
        value_units=payment.amount_units if units is None else units,
        block_number=7,
        block_hash="0x" + "bb" * 32,
        auth_nonce=payment.auth_nonce,
        authorizer=payment.payer,
    )


async def inserted(db: Database, *payments: Payment) -> None:
    async with db.write() as tx:
        for each in payments:
            await journal.insert(tx, each)


async def stored(db: Database, payment_id: str) -> Payment:
    async with db.read() as tx:
        found = await journal.by_id(tx, payment_id)
    assert found is not None
    return found


async def finish(db: Database, payment: Payment, moved: Transfer) -> Payment:
    async def work(tx: Tx) -> Payment:
        return (await journal.finish(tx, payment.id, moved, T0))[0]

    return await transact(db, work)


async def fail(db: Database, payment: Payment, detail: str = "it expired") -> None:
    async with db.write() as tx:
        await journal.fail(tx, payment.id, "settlement_failed", detail, T0 + 1)


async def available(db: Database, wallet: str = PAYER, chain: str = "") -> int:
    async with db.read() as tx:
        account_id = await wallets.find(tx, wallet, chain)
        seen = None if account_id is None else await read.account(tx, account_id)
    return 0 if seen is None else seen.available_units


# --- rows -----------------------------------------------------------------------------------


async def test_a_row_comes_back_as_it_went_in(db: Database) -> None:
    full = blank(
        "pay_1",
        recipient_chain="eip155:84532",
        expires_ms=2**62,
        tx_hash="0x1",
        external_ref="cs_1",
        external_url="https://pay.test/1",
        lot_id=2**53 + 1,
        error_code="settlement_failed",
        error_detail="λ ' \" \\ 🙂",
        amount_units=2**62,
    )
    empty = blank(
        "pay_2", payer=None, recipient=None, network=None, asset=None, from_block=None,
        auth_nonce=None, valid_before_s=None, provider="stripe",
    )  # fmt: skip
    await inserted(db, full, empty)
    assert await stored(db, "pay_1") == full
    assert await stored(db, "pay_2") == empty
    async with db.read() as tx:
        assert await journal.by_id(tx, "pay_3") is None


def test_ids_are_different_and_sort_by_time() -> None:
    ids = [journal.new_id() for _ in range(500)]
    assert len(set(ids)) == 500
    assert [each[:16] for each in ids] == sorted(each[:16] for each in ids)
    assert {len(each) for each in ids} == {36}


# --- one claim ------------------------------------------------------------------------------


async def test_of_many_that_claim_at_once_one_has_it(connect: Connect) -> None:
    nodes = [await connect() for _ in range(4)]

    async def claim(node: Database, n: int) -> bool:
        async with node.write() as tx:
            return await journal.claim(tx, KEY, Claim(f"pay_{n}", b"%d" % n, None), T0)

    won = await asyncio.gather(*(claim(nodes[n % 4], n) for n in range(12)))
    assert won.count(True) == 1
    async with nodes[0].read() as tx:
        n = won.index(True)
        assert await journal.claim_of(tx, KEY) == Claim(f"pay_{n}", b"%d" % n, None)


@pytest.mark.parametrize("first_ends", ["commits", "rolls back"])
async def test_a_claim_waits_for_the_one_before_it(connect: Connect, first_ends: str) -> None:
    one, two = await connect(), await connect()
    second_began = asyncio.Event()

    async def second() -> bool:
        second_began.set()
        async with two.write() as tx:
            return await journal.claim(tx, KEY, Claim("pay_2", b"2", b"offer"), T0)

    async def first() -> None:
        async with one.write() as tx:
            assert await journal.claim(tx, KEY, Claim("pay_1", b"1", None), T0)
            task = asyncio.create_task(second())
            waiting.append(task)
            await second_began.wait()
            await asyncio.sleep(0.05)
            assert not task.done()
            if first_ends == "rolls back":
                raise KeyError

    waiting: list[asyncio.Task[bool]] = []
    if first_ends == "commits":
        await first()
    else:
        with pytest.raises(KeyError):
            await first()
    assert await waiting[0] is (first_ends == "rolls back")
    async with one.read() as tx:
        claim = await journal.claim_of(tx, KEY)
    assert claim is not None
    assert claim.payment_id == ("pay_1" if first_ends == "commits" else "pay_2")
    assert claim.offer == (None if first_ends == "commits" else b"offer")


@pytest.mark.parametrize("part", ["network", "asset", "payer", "nonce"])
async def test_every_part_of_the_key_counts(db: Database, part: str) -> None:
    change: dict[str, Any] = {part: "other"}
    async with db.write() as tx:
        assert await journal.claim(tx, KEY, Claim("pay_1", b"1", None), T0)
        assert await journal.claim(tx, replace(KEY, **change), Claim("pay_2", b"1", None), T0)
        assert not await journal.claim(tx, KEY, Claim("pay_3", b"1", None), T0)


# --- one mint -------------------------------------------------------------------------------


async def test_finished_twice_is_finished_once(db: Database) -> None:
    new = blank("pay_1")
    await inserted(db, new)
    first = await finish(db, new, transfer(new))
    assert (first.state, first.tx_hash) == ("succeeded", transfer(new).tx_hash)
    assert first.lot_id is not None
    assert await finish(db, new, transfer(new)) == first == await stored(db, "pay_1")
    assert await available(db) == new.amount_units


async def test_finished_by_two_nodes_at_once_is_minted_once(connect: Connect) -> None:
    """A new wallet, so that the nodes race for its account too."""
    nodes = [await connect() for _ in range(3)]
    new = blank("pay_1")
    await inserted(nodes[0], new)
    done = await asyncio.gather(*(finish(nodes[n % 3], new, transfer(new)) for n in range(6)))
    assert {each.lot_id for each in done} == {done[0].lot_id}
    assert await available(nodes[0]) == new.amount_units
    assert await helpers.faults(nodes[0]) == []


async def test_the_log_says_what_is_minted_not_the_request(db: Database) -> None:
    new = blank("pay_1", amount_units=10_000)
    await inserted(db, new)
    await finish(db, new, transfer(new, units=9_999))
    assert await available(db) == 9_999


async def test_two_transfers_of_one_transaction_are_two_mints(db: Database) -> None:
    one, two = blank("pay_1"), blank("pay_2", auth_nonce="0x02")
    await inserted(db, one, two)
    first = await finish(db, one, transfer(one, n=0))
    second = await finish(db, two, transfer(two, n=1))
    assert first.lot_id != second.lot_id
    assert await available(db) == 20_000


async def test_a_payment_that_failed_is_minted_when_its_transfer_shows_up(db: Database) -> None:
    new = blank("pay_1")
    await inserted(db, new)
    await fail(db, new)
    failed = await stored(db, "pay_1")
    assert (failed.state, failed.error_code) == ("failed", "settlement_failed")
    done = await finish(db, new, transfer(new))
    assert (done.state, done.error_code, done.error_detail) == ("succeeded", None, None)
    assert await available(db) == new.amount_units


async def test_what_succeeded_does_not_fail(db: Database) -> None:
    new = blank("pay_1")
    await inserted(db, new)
    done = await finish(db, new, transfer(new))
    await fail(db, new)
    assert await stored(db, "pay_1") == done


@pytest.mark.parametrize("said", ["nul \0 inside", "half a pair \ud83d", "x" * 5_000])
async def test_a_reason_in_anybodys_words_can_be_written(db: Database, said: str) -> None:
    """Reasons come from nodes and card providers; one that cannot be stored would keep the payment
    open for ever."""
    new = blank("pay_1")
    await inserted(db, new)
    await fail(db, new, said)
    after = await stored(db, "pay_1")
    assert after.state == "failed"
    assert after.error_detail is not None and said[:4] in after.error_detail
    assert len(after.error_detail) <= 500


async def test_the_hold_of_the_call_is_taken_with_the_mint(db: Database) -> None:
    new = blank("pay_1")
    await inserted(db, new)
    asked: list[int] = []

    def hold(account_id: int) -> ledger.Hold:
        asked.append(account_id)
        return helpers.hold(account_id, "0x01", new.amount_units)

    async with db.write() as tx:
        _, held = await journal.finish(tx, new.id, transfer(new), T0, hold)
    assert isinstance(held, ledger.Held)
    assert await available(db) == 0
    async with db.write() as tx:
        _, again = await journal.finish(tx, new.id, transfer(new), T0, hold)
    assert not isinstance(again, ledger.Held)  # the guard: one call, one hold
    assert len(set(asked)) == 1
    await helpers.one(db, helpers.void(held.hold))
    assert await available(db) == new.amount_units


async def test_a_contract_wallets_credits_are_its_own_chains(db: Database) -> None:
    new = blank("pay_1", recipient_chain=NETWORK.caip2)
    await inserted(db, new)
    await finish(db, new, transfer(new))
    assert await available(db, chain=NETWORK.caip2) == new.amount_units
    assert await available(db) == 0


@pytest.mark.parametrize("payment", [None, blank("pay_1", recipient=None)])
async def test_a_mint_for_nobody_is_a_fault(db: Database, payment: Payment | None) -> None:
    if payment is not None:
        await inserted(db, payment)
    with pytest.raises(ledger.LedgerFault):
        await finish(db, blank("pay_1"), transfer(blank("pay_1")))
    async with db.read() as tx:
        assert await tx.fetchval("SELECT count(*) FROM mint_key") == 0


# --- one lease ------------------------------------------------------------------------------


async def take(db: Database, now_ms: int = T0, limit: int = 10) -> list[str]:
    async with db.write() as tx:
        return [p.id for p in await journal.take_unfinished(tx, now_ms, LEASE_MS, limit)]


async def test_unfinished_payments_are_leased_longest_waiting_first(db: Database) -> None:
    await inserted(
        db,
        blank("later", lease_ms=T0 - 1),
        blank("first", lease_ms=0),
        blank("due now", lease_ms=T0),
        blank("leased", lease_ms=T0 + 1),
        blank("over", state="succeeded"),
        blank("failed", state="failed"),
        blank("card", provider="stripe"),
        blank("not begun", state="created"),
    )
    assert await take(db, limit=2) == ["first", "later"]
    assert await take(db) == ["due now"]
    assert await take(db) == []
    assert await take(db, T0 + 1) == ["leased"]
    assert (await stored(db, "first")).lease_ms == T0 + LEASE_MS
    assert await take(db, T0 + LEASE_MS - 1) == []
    assert sorted(await take(db, T0 + LEASE_MS)) == ["due now", "first", "later"]
    assert (await stored(db, "card")).lease_ms == 0


async def test_workers_at_once_never_get_the_same_payment(connect: Connect) -> None:
    nodes = [await connect() for _ in range(3)]
    ids = [f"pay_{n:03}" for n in range(120)]
    await inserted(nodes[0], *(blank(each) for each in ids))

    async def work(node: Database) -> list[str]:
        mine: list[str] = []
        while got := await take(node, limit=7):
            mine += got
            await asyncio.sleep(0)
        return mine

    taken = await asyncio.gather(*(work(node) for node in nodes for _ in range(2)))
    assert sorted(each for mine in taken for each in mine) == ids


async def test_on_postgres_a_worker_passes_over_what_another_is_taking(postgres_url: str) -> None:
    one = await Database.connect(postgres_url)
    two = await Database.connect(postgres_url)
    await inserted(one, *(blank(f"pay_{n}", lease_ms=n) for n in range(4)))
    async with one.write() as tx:
        first = await journal.take_unfinished(tx, T0, LEASE_MS, 2)
        assert await asyncio.wait_for(take(two), 10) == ["pay_2", "pay_3"]
    assert [each.id for each in first] == ["pay_0", "pay_1"]
    # Rolled back: whoever was to work on them is gone, and they are to be had again.
    with pytest.raises(KeyError):
        async with one.write() as tx:
            await journal.take_unfinished(tx, T0 + LEASE_MS, LEASE_MS, 10)
            raise KeyError
    assert len(await take(two, T0 + LEASE_MS)) == 4
    await one.close()
    await two.close()


async def test_a_lease_is_given_back_only_while_there_is_something_to_do(db: Database) -> None:
    await inserted(db, blank("open", lease_ms=T0 + 99), blank("over", lease_ms=5, state="failed"))
    async with db.write() as tx:
        await journal.release(tx, "open", T0 + 1)
        await journal.release(tx, "over", T0 + 1)
        await journal.release(tx, "none", T0 + 1)
    assert (await stored(db, "open")).lease_ms == T0 + 1
    assert (await stored(db, "over")).lease_ms == 5
    assert await take(db) == []
    assert await take(db, T0 + 1) == ["open"]


async def test_at_the_start_of_the_only_process_no_lease_is_anybodys(db: Database) -> None:
    await inserted(db, blank("open", lease_ms=T0 + 99), blank("over", lease_ms=5, state="failed"))
    async with db.write() as tx:
        await journal.drop_leases(tx)
    assert await take(db, 0) == ["open"]
    assert (await stored(db, "over")).lease_ms == 5
