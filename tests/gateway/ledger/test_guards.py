"""A request happens at most once: applied, replayed, conflict (house rules, money rule 7)."""

from __future__ import annotations

import pytest

from gateway.db import Database
from gateway.ledger import Conflict, FreezeAccount, Held, Hold, Minted, MintedBefore, Repeated, read
from tests.gateway.ledger.helpers import (
    capture,
    held,
    hold,
    mint,
    minted,
    one,
    open_account,
    run,
    scalar,
)


async def test_the_same_request_again_is_answered_with_what_it_did(db: Database) -> None:
    account = await open_account(db)
    await minted(db, mint(account, 10, "a"))
    row = await held(db, hold(account, "r1", 10))
    assert await one(db, hold(account, "r1", 10)) == Repeated(row, None)
    await one(db, capture(row, 3))
    async with db.read() as tx:
        close = await read.close_of(tx, row.id)
    assert await one(db, hold(account, "r1", 10)) == Repeated(row, close)
    assert await scalar(db, "SELECT count(*) FROM hold") == 1


async def test_a_repeat_is_known_before_funds_are_looked_at(db: Database) -> None:
    account = await open_account(db)
    await minted(db, mint(account, 10, "a"))
    row = await held(db, hold(account, "r1", 10))
    await one(db, FreezeAccount(account, True, "asked for", "ops"))
    assert await one(db, hold(account, "r1", 10)) == Repeated(row, None)


async def test_the_same_id_with_other_content_is_a_conflict(db: Database) -> None:
    account = await open_account(db)
    row = await held(db, hold(account, "r1", 0))
    assert await one(db, hold(account, "r1", 0, content=b"other")) == Conflict(row)
    assert await one(db, hold(account, "r1", 0)) == Repeated(row, None)


async def test_repeats_within_one_transaction(db: Database) -> None:
    account = await open_account(db)
    await minted(db, mint(account, 10, "a"))
    step = hold(account, "r1", 4, alias="k")
    first, same, other, by_alias, unbound = await run(
        db,
        step,
        step,
        hold(account, "r1", 4, content=b"other"),
        hold(account, "r2", 4, alias="k"),
        hold(account, "r1", 4, alias="another"),
    )
    assert isinstance(first, Held)
    assert same == by_alias == Repeated(first.hold, None)
    assert other == unbound == Conflict(first.hold)
    assert await scalar(db, "SELECT held FROM account WHERE id = $1", account) == 4


@pytest.mark.parametrize("differs", ["account", "principal", "scheme"])
async def test_an_id_counts_for_one_account_principal_and_scheme(
    db: Database, differs: str
) -> None:
    account, other = await open_account(db, 1), await open_account(db, 2)
    await held(db, hold(account, "r1", 0))
    match differs:
        case "account":
            step = hold(other, "r1", 0)
        case "principal":
            step = hold(account, "r1", 0, principal="0xother")
        case _:
            step = hold(account, "r1", 0, scheme="siwx")
    assert isinstance(await one(db, step), Held)


async def test_an_alias_finds_the_call_again_under_another_one_time_value(db: Database) -> None:
    account = await open_account(db)
    row = await held(db, hold(account, "r1", 0, alias="key"))
    assert await one(db, hold(account, "r2", 0, alias="key")) == Repeated(row, None)
    assert await one(db, hold(account, "r3", 0, alias="key", content=b"x")) == Conflict(row)
    # Signed in another way it is still the same principal's alias.
    assert await one(db, hold(account, "r4", 0, alias="key", scheme="siwx")) == Repeated(row, None)


async def test_an_alias_is_its_principals_own(db: Database) -> None:
    account, other = await open_account(db, 1), await open_account(db, 2)
    await held(db, hold(account, "r1", 0, alias="key"))
    theirs = hold(account, "r2", 0, alias="key", principal="0xother", content=b"theirs")
    assert isinstance(await one(db, theirs), Held)
    assert isinstance(await one(db, hold(other, "r3", 0, alias="key")), Held)


async def test_a_one_time_value_is_bound_to_its_alias(db: Database) -> None:
    account = await open_account(db)
    row = await held(db, hold(account, "r1", 0, alias="key"))
    other = await held(db, hold(account, "r2", 0, alias="key2"))
    assert await one(db, hold(account, "r1", 0, alias="unused")) == Conflict(row)
    assert await one(db, hold(account, "r1", 0, alias="key2")) == Conflict(row)
    assert await one(db, hold(account, "r1", 0, alias="key")) == Repeated(row, None)
    # Without the alias the one-time value alone says which call it is.
    assert await one(db, hold(account, "r1", 0)) == Repeated(row, None)
    plain = await held(db, hold(account, "r3", 0))
    assert await one(db, hold(account, "r3", 0, alias="key2")) == Conflict(plain)
    assert await one(db, hold(account, "r2", 0, alias="key2")) == Repeated(other, None)


async def test_a_payment_and_an_alias_find_the_same_call(db: Database) -> None:
    account = await open_account(db)
    row = await held(db, hold(account, "r1", 0, alias="key", payment="p"))
    again = Repeated(row, None)
    assert await one(db, hold(account, "p", 0, scheme="x402", payment="p")) == again
    assert await one(db, hold(account, "r2", 0, payment="p")) == again
    assert await one(db, hold(account, "r3", 0, alias="key")) == again
    assert await one(db, hold(account, "r4", 0, alias="key", payment="p")) == again
    assert await one(db, hold(account, "r5", 0, alias="new", payment="p")) == again
    assert await one(db, hold(account, "r6", 0, alias="key", payment="new")) == again
    assert await one(db, hold(account, "r7", 0, payment="p", content=b"x")) == Conflict(row)
    assert await one(db, hold(account, "r1", 0)) == again
    assert await one(db, hold(account, "r1", 0, payment="p")) == again
    assert await scalar(db, "SELECT count(*) FROM hold") == 1


async def test_a_payment_for_one_call_and_an_alias_of_another(db: Database) -> None:
    account = await open_account(db)
    row = await held(db, hold(account, "r1", 0, payment="p"))
    other = await held(db, hold(account, "r2", 0, alias="key"))
    assert await one(db, hold(account, "r3", 0, alias="key", payment="p")) == Conflict(row)
    assert await one(db, hold(account, "r2", 0, alias="key", payment="p")) == Conflict(other)
    assert await one(db, hold(account, "r1", 0, alias="key", payment="p")) == Conflict(row)


async def test_ids_are_compared_byte_by_byte(db: Database) -> None:
    account = await open_account(db)
    spellings = ["Straße", "STRASSE", "strasse", "e\u0301", "\u00e9", "a", "a ", " a", "A", ""]
    steps: list[Hold] = [hold(account, text, 0, content=text.encode()) for text in spellings]
    assert all(isinstance(outcome, Held) for outcome in await run(db, *steps))
    for step in steps:
        assert isinstance(await one(db, step), Repeated)


async def test_one_fact_mints_once(db: Database) -> None:
    account, other = await open_account(db, 1), await open_account(db, 2)
    lot = await minted(db, mint(account, 10, "0xtx"))
    again = MintedBefore(lot, account, 10)
    assert await one(db, mint(account, 10, "0xtx")) == again
    assert await one(db, mint(other, 99, "0xtx")) == again
    first, second, third = await run(db, *(mint(other, 7, "0xnew") for _ in range(3)))
    assert isinstance(first, Minted)
    assert second == third == MintedBefore(first.lot_id, other, 7)


async def test_facts_differ_by_network_reference_and_ordinal(db: Database) -> None:
    account = await open_account(db)
    step = mint(account, 1, "0xtx")
    other_network = type(step)(account, 1, "eip155:1", "0xtx", 0, "x402")
    outcomes = await run(
        db, step, mint(account, 1, "0xtx", n=1), mint(account, 1, "0xTX"), other_network
    )
    assert [type(outcome) for outcome in outcomes] == [Minted] * 4


async def test_the_calls_of_a_request_id_or_alias(db: Database) -> None:
    account, other = await open_account(db, 1), await open_account(db, 2)
    by_id = await held(db, hold(account, "name", 0))
    by_alias = await held(db, hold(account, "r2", 0, alias="name", principal="0xother"))
    await held(db, hold(other, "name", 0))
    await held(db, hold(account, "r3", 0, alias="something"))
    async with db.read() as tx:
        found = await read.holds_of_request(tx, account, "name")
    assert list(found) == sorted([by_id, by_alias], key=lambda row: -row.id)
