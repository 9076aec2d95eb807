"""Each audit query finds what it is there for: the books are disturbed by hand, in every way."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gateway.db import Database
from gateway.ledger import (
    EndPayOut,
    Expire,
    Freeze,
    FreezeAccount,
    Only,
    PayOut,
    Refund,
    Reverse,
    Withheld,
    WriteOff,
    audit,
    breakdowns,
)
from tests.gateway.ledger.helpers import (
    T0,
    capture,
    faults,
    held,
    hold,
    mint,
    minted,
    one,
    open_account,
    run,
    void,
)

# What is done to the books -> the queries that must notice at least that.
DISTURBED = {
    "UPDATE account SET available = available + 1": {"I1_balance_is_sum", "I8_lots_carry_balance"},
    "UPDATE account SET available = available - 1, held = held + 1 WHERE available > 0": {
        "I3_held_is_open_holds"
    },
    "UPDATE account SET added = added + 1": {"L10_lifetime_sums"},
    "UPDATE account SET spent = spent - 1": {"L10_lifetime_sums"},
    "UPDATE account SET pinned = pinned - 1 WHERE pinned > 0": {"I8_pins_are_of_open_holds"},
    "UPDATE account SET pos = pos + 1": {"I8_tape_is_whole", "I8_lots_carry_balance"},
    "UPDATE account SET folded = folded - 1 WHERE folded > 0": {
        "I8_segments_are_whole",
        "I8_lots_carry_balance",
    },
    "UPDATE account SET seq = seq + 1": {"I2_statement_head"},
    "UPDATE account SET last_id = (SELECT prev_id FROM transfer WHERE id = last_id)": {
        "I2_statement_head"
    },
    "UPDATE account SET next_expiry_ms = next_expiry_ms + 1": {"I8_next_expiry_is_early"},
    "UPDATE house_balance SET balance = balance + 1 WHERE account_id = 2": {"I1_house_is_sum"},
    "DELETE FROM house_balance WHERE account_id = 1": {"I1_house_is_sum"},
    "INSERT INTO house_balance (account_id, writer, balance) VALUES (77, 0, 5)": {
        "I1_house_is_sum"
    },
    "UPDATE transfer SET amount_units = amount_units + 1 WHERE kind = 'capture'": {
        "I1_balance_is_sum",
        "I2_statement_is_whole",
        "I1_house_is_sum",
    },
    "UPDATE transfer SET balance_units = balance_units + 1 WHERE kind = 'capture'": {
        "I2_statement_is_whole"
    },
    "UPDATE transfer SET prev_id = 0": {"I2_statement_is_whole"},
    "UPDATE transfer SET pos = pos + 1 WHERE kind = 'capture'": {"I8_tape_is_whole"},
    "UPDATE transfer SET kind = 'mint', amount_units = 0 WHERE kind = 'void'": {"I5_mint_is_lot"},
    "UPDATE transfer SET debit = 3, credit = 2 WHERE kind = 'capture'": {"I1_sides"},
    "DELETE FROM transfer WHERE kind = 'mint'": {"I5_mint_is_lot", "I2_statement_is_whole"},
    "DELETE FROM transfer WHERE kind = 'capture'": {"I3_held_is_open_holds", "I2_statement_head"},
    "DELETE FROM transfer WHERE kind = 'expire'": {"I8_lot_is_its_transfers"},
    "DELETE FROM hold WHERE id IN (SELECT id FROM transfer)": {"I6_close_is_of_its_hold"},
    "UPDATE hold SET max_units = 0 WHERE id IN (SELECT id FROM transfer WHERE amount_units > 0)": {
        "I6_close_is_of_its_hold"
    },
    "UPDATE transfer SET amount_units = 1 WHERE kind = 'void'": {"I6_close_is_of_its_hold"},
    "DELETE FROM mint_key": {"I4_one_mint_per_fact"},
    "INSERT INTO mint_key (network, ref, n, lot_id) SELECT 'x', 'x', 0, min(id) FROM lot": {
        "I4_one_mint_per_fact"
    },
    "INSERT INTO mint_key (network, ref, n, lot_id) VALUES ('x', 'x', 0, 5)": {
        "I4_one_mint_per_fact"
    },
    "UPDATE lot SET remaining_units = remaining_units - 1 WHERE remaining_units > 0": {
        "I8_lot_adds_up",
        "I8_lots_carry_balance",
    },
    "UPDATE lot SET minted_units = minted_units + 1": {"I5_mint_is_lot", "I8_lot_adds_up"},
    "UPDATE lot SET state = 'expired' WHERE remaining_units > 0": {"I8_lots_carry_balance"},
    "DELETE FROM pin": {"I8_pins_are_of_open_holds", "I8_lot_adds_up"},
    "UPDATE pin SET captured_units = 0": {"I8_pins_are_of_open_holds", "I8_lot_adds_up"},
    "DELETE FROM segment": {"I8_segments_are_whole", "I8_lot_adds_up"},
    "UPDATE segment SET to_pos = to_pos + 1": {"I8_segments_are_whole", "I8_lot_adds_up"},
    "UPDATE account SET debt = debt + 1": {"I1_debt_is_sum"},
    "UPDATE account SET frozen = 1 - frozen": {"I3_freeze_was_decided"},
    "DELETE FROM operator_action": {"I3_freeze_was_decided", "I3_loss_was_decided"},
    "UPDATE operator_action SET ref = ref + 1 WHERE action = 'write_off'": {"I3_loss_was_decided"},
    "UPDATE lot SET lost_units = lost_units - 1 WHERE lost_units > 0": {
        "I8_lot_is_its_transfers",
        "I8_lot_adds_up",
    },
    "UPDATE lot SET repaid_units = 1 WHERE lost_units > 0": {"I8_lot_is_in_one_state"},
    "UPDATE transfer SET debit = 5 WHERE kind = 'loss'": {"I1_house_side_of_kind"},
    "UPDATE transfer SET credit = 3 WHERE kind = 'capture'": {"I1_house_side_of_kind"},
    "UPDATE transfer SET debit = 1 WHERE kind = 'refund'": {"I1_house_side_of_kind"},
    "UPDATE refund SET amount_units = amount_units + 1": {"I6_refund_is_whole"},
    "UPDATE refund SET amount_units = amount_units + 100": {"I6_refund_is_of_its_charge"},
    "UPDATE refund SET account_id = 1000": {"I6_refund_is_of_its_charge", "I6_refund_is_whole"},
    "DELETE FROM refund": {"I6_refund_is_whole"},
    "DELETE FROM refund_part": {"I6_refund_is_whole", "I8_lot_adds_up"},
    "UPDATE refund_part SET refund_id = 5": {"I6_refund_is_whole"},
    "UPDATE refund_part SET lot_id = 5": {"I8_lot_adds_up"},
    "DELETE FROM transfer WHERE kind = 'refund'": {"I6_refund_is_whole", "L10_lifetime_sums"},
    "UPDATE lot SET expired_units = expired_units + 1": {"I8_lot_is_its_transfers"},
    "UPDATE lot SET reversed_units = reversed_units - 1 WHERE reversed_units > 0": {
        "I8_lot_is_its_transfers"
    },
    "UPDATE lot SET short_units = short_units + 1 WHERE short_units < minted_units": {
        "I8_lot_is_its_transfers",
        "I8_lot_is_in_one_state",
        "I1_debt_is_sum",
    },
    "UPDATE lot SET repaid_units = repaid_units + 1 WHERE short_units > 0": {
        "I8_lot_is_its_transfers",
        "I8_lot_is_in_one_state",
        "I1_debt_is_sum",
    },
    "UPDATE lot SET state = 'live' WHERE state = 'frozen'": {
        "I8_lot_is_its_transfers",
        "I8_lot_adds_up",
    },
    "UPDATE lot SET state = 'lost' WHERE state = 'expired'": {"I8_lot_is_in_one_state"},
    "UPDATE lot SET remaining_units = 1 WHERE state = 'frozen'": {"I8_lot_is_in_one_state"},
    "UPDATE transfer SET ref = 5 WHERE kind = 'freeze'": {"I8_lot_is_its_transfers"},
    "DELETE FROM transfer WHERE kind = 'debt'": {
        "I8_lot_is_its_transfers",
        "I2_statement_is_whole",
    },
    "UPDATE lot SET outgoing_units = outgoing_units - 1 WHERE outgoing_units > 0": {
        "I8_lot_is_its_transfers",
        "I8_lot_adds_up",
    },
    "UPDATE lot SET paid_out_units = paid_out_units + 1 WHERE paid_out_units > 0": {
        "I8_lot_is_its_transfers",
        "I8_lot_adds_up",
    },
    "UPDATE transfer SET credit = 6 WHERE kind = 'payout'": {"I1_house_side_of_kind"},
    "UPDATE payout SET amount_units = amount_units + 1": {"I6_payout_is_its_transfers"},
    "DELETE FROM payout": {"I6_payout_is_its_transfers"},
    "DELETE FROM payout_end": {"I6_payout_is_its_transfers"},
    "UPDATE payout_end SET paid = 1 - paid": {"I6_payout_is_its_transfers"},
    "UPDATE payout_end SET payout_id = 5 WHERE paid = 0": {"I6_payout_is_its_transfers"},
    "DELETE FROM transfer WHERE kind = 'withhold'": {"I6_payout_is_its_transfers"},
    "UPDATE payment SET state = 'succeeded' WHERE id = 'going'": {"I6_payout_is_its_payment"},
    "UPDATE payment SET state = 'failed' WHERE id = 'paid'": {"I6_payout_is_its_payment"},
    "UPDATE payment SET amount_units = 6 WHERE id = 'paid'": {"I6_payout_is_its_payment"},
    "UPDATE breakdown SET amount_units = amount_units + 1": {"I1_breakdown_is_the_charge"},
    "UPDATE breakdown SET hold_id = hold_id + 900000": {"I1_breakdown_is_the_charge"},
    "DELETE FROM hold_limit": {"I8_limited_hold_is_of_its_lots"},
    "UPDATE hold_limit SET hold_id = hold_id + 900000": {"I8_limited_hold_is_of_its_lots"},
    "UPDATE hold_limit SET lot_id = lot_id + 1": {"I8_limited_hold_is_of_its_lots"},
    "UPDATE hold_limit SET source = 'x402'": {"I8_limited_hold_is_of_its_lots"},
    "UPDATE hold_limit SET payer = '0xa'": {"I8_limited_hold_is_of_its_lots"},
    "UPDATE hold SET epoch = 0 WHERE epoch < 0": {"I8_limited_hold_is_of_its_lots"},
    "UPDATE pin SET amount_units = amount_units - 1"
    " WHERE hold_id IN (SELECT hold_id FROM hold_limit)": {"I8_limited_hold_is_of_its_lots"},
    "INSERT INTO transfer SELECT id + 900000, kind, debit, credit, amount_units, 424242, seq,"
    " prev_id, balance_units, pos, tape_units, ref, reason, at_ms FROM transfer"
    " WHERE kind = 'void'": {"I2_account_is_known"},
}


async def _books(db: Database) -> None:
    """A little of everything: expired, folded, pinned, open, captured, voided."""
    account = await open_account(db)
    await run(
        db,
        mint(account, 10, "a", expires_ms=T0 + 100),
        mint(account, 30, "b", expires_ms=T0 + 9_000),
    )
    early = await held(db, hold(account, "early", 3))
    await one(db, capture(early, 2))
    await minted(db, mint(account, 5, "c"))
    pinned = await held(db, hold(account, "pinned", 4))
    assert pinned.max_units == 4
    await one(db, Expire(account), T0 + 100)
    row = await held(db, hold(account, "r", 6), T0 + 101)
    lines = breakdowns.text_of([{"for": "call", "units": 7}, {"for": "cut", "units": -1}])
    await one(db, replace(capture(row, 6), breakdown=lines), T0 + 101)
    await one(db, void(await held(db, hold(account, "v", 6), T0 + 101)), T0 + 101)
    await held(db, hold(account, "open", 1), T0 + 101)
    await _disputed(db)
    await _paid_out(db)
    await _limited(db)
    await _written_off(db)
    assert await faults(db) == []


async def _disputed(db: Database) -> None:
    """An account with a refund, a frozen lot, a reversed one, and a debt partly repaid."""
    account = await open_account(db, 2)
    frozen = await minted(db, mint(account, 10, "d"), T0 + 101)
    reversed_ = await minted(db, mint(account, 10, "e"), T0 + 101)
    row = await held(db, hold(account, "r", 15), T0 + 101)
    await run(
        db,
        capture(row, 15),
        Refund(row.id, "k", 2),
        Freeze(frozen, "x"),
        Reverse(reversed_, 10, "x"),
        FreezeAccount(account, True, "x", "ops"),
        mint(account, 4, "f"),
        at_ms=T0 + 101,
    )


async def _paid_out(db: Database) -> None:
    """An account with a payout that was made, one that was not, and one on its way."""
    account = await open_account(db, 3)
    lot = await minted(db, mint(account, 20, "g"), T0 + 101)
    for name, state, ended in (
        ("paid", "succeeded", True),
        ("back", "failed", False),
        ("going", "processing", None),
    ):
        async with db.write() as tx:
            await tx.execute(
                "INSERT INTO payment (id, provider, state, purpose, amount_units, created_at_ms,"
                " updated_at_ms, lease_ms) VALUES ($1, 'payout', $2, 'refund', 5, 0, 0, 0)",
                name,
                state,
            )
        withheld = await one(db, PayOut(lot, name, 5), T0 + 101)
        assert isinstance(withheld, Withheld)
        if ended is not None:
            await one(db, EndPayOut(withheld.payout.id, ended), T0 + 101)


async def _limited(db: Database) -> None:
    """An account with a hold that stands on its lot, beside a lot it may not be taken from."""
    account = await open_account(db, 4)
    lot = await minted(db, mint(account, 5, "limited"), T0 + 101)
    await minted(db, mint(account, 5, "not"), T0 + 101)
    limited = replace(hold(account, "limited", 3), only=Only(lot, "grant", None))
    await held(db, limited, T0 + 101)


async def _written_off(db: Database) -> None:
    """An account whose debt is the house's loss."""
    account = await open_account(db, 5)
    lot = await minted(db, mint(account, 5, "lost"), T0 + 101)
    row = await held(db, hold(account, "lost", 4), T0 + 101)
    steps = (capture(row, 4), Reverse(lot, 5, "x"), WriteOff(lot, "x", "ops"))
    await run(db, *steps, at_ms=T0 + 101)


async def _unlock(db: Database) -> None:
    """Take the triggers away: what is not append-only any more is found by the audit."""
    async with db.write() as tx:
        if tx.dialect == "sqlite":
            rows = await tx.fetch("SELECT name FROM sqlite_master WHERE type = 'trigger'")
            for row in rows:
                await tx.execute(f"DROP TRIGGER {row['name']}")
            return
        for table in (
            *("hold", "transfer", "segment", "mint_key"),
            *("refund", "refund_part", "operator_action", "batch"),
            *("payout", "payout_end", "hold_limit", "breakdown"),
        ):
            await tx.execute(f"ALTER TABLE {table} DISABLE TRIGGER USER")


@pytest.mark.parametrize("sql", DISTURBED)
async def test_a_disturbance_is_found(broken_db: Database, sql: str) -> None:
    await _books(broken_db)
    await _unlock(broken_db)
    async with broken_db.write() as tx:
        assert await tx.execute(sql), "nothing was disturbed"
    assert set(await faults(broken_db)) >= DISTURBED[sql]


def test_every_query_is_shown_to_find_something() -> None:
    # A CHECK of the database stands before the one that is left out.
    shown = set().union(*DISTURBED.values())
    assert shown == set(audit.QUERIES) - {"I3_never_negative"}


@pytest.mark.parametrize(
    "change", ["available = -1", "held = -1", "debt = -1", "pinned = held + 1", "folded = pos + 1"]
)
async def test_the_database_itself_refuses_what_is_below_zero(db: Database, change: str) -> None:
    await open_account(db)
    with pytest.raises(Exception, match=r"(?i)check"):
        async with db.write() as tx:
            await tx.execute(f"UPDATE account SET {change}")


async def test_a_finding_says_what_and_where(broken_db: Database) -> None:
    await _books(broken_db)
    async with broken_db.write() as tx:
        await tx.execute("UPDATE account SET added = added + 1")
    async with broken_db.read() as tx:
        (broken,) = await audit.verify(tx, 0)
    assert broken.name == "L10_lifetime_sums"
    assert "lifetime" in broken.meaning
    assert broken.rows[0]["id"] == 1_000
