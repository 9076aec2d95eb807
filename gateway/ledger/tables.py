"""The ledger's tables. What each money column is for stands beside it.

Append-only (a trigger says so): ``hold``, ``transfer``, ``segment``, ``mint_key``, ``refund``,
``refund_part``, ``payout``, ``payout_end``, ``operator_action``, ``batch``, ``hold_limit``,
``breakdown``. What else may change, changes only under the row's lock and guarded by ``ver``
(design: the lots are off the hot path, so a spend touches ``hold``, ``transfer`` and one
``account`` row).
"""

from __future__ import annotations

import sqlalchemy as sa

from gateway.db import Id, metadata

BIG = sa.BigInteger()

meta = sa.Table(
    "meta",
    metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)

sequence = sa.Table(
    "sequence",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("next", BIG, nullable=False),
)

# A stretch of ids a process may use for a few seconds. The sweeper takes the oldest live one as
# the bound below which every id is used, or never will be.
id_block = sa.Table(
    "id_block",
    metadata,
    sa.Column("start", Id, primary_key=True, autoincrement=False),
    sa.Column("at_ms", BIG, nullable=False),
)

account = sa.Table(
    "account",
    metadata,
    sa.Column("id", Id, primary_key=True, autoincrement=False),
    sa.Column("created_at_ms", BIG, nullable=False),
    sa.Column("available", BIG, nullable=False),  # can be spent now
    sa.Column("held", BIG, nullable=False),  # promised to open holds, still the customer's
    sa.Column("pinned", BIG, nullable=False),  # the part of held that stands on dead lots
    sa.Column("debt", BIG, nullable=False),  # owed after a reversal; while > 0 nothing is spent
    sa.Column("added", BIG, nullable=False),  # all units ever minted to it
    sa.Column("spent", BIG, nullable=False),  # all units ever captured, less refunds
    sa.Column("pos", BIG, nullable=False),  # the tape: units ever captured from live lots
    sa.Column("folded", BIG, nullable=False),  # the part of pos already booked on lots
    sa.Column("next_expiry_ms", BIG, nullable=False),  # no live lot expires before this
    sa.Column("epoch", BIG, nullable=False),  # rises when a lot dies under open holds
    sa.Column("seq", BIG, nullable=False),  # number of transfers
    sa.Column("last_id", BIG, nullable=False),  # newest transfer: head of the statement list
    sa.Column("frozen", sa.Integer, nullable=False),  # 1: an operator stopped spending
    sa.Column("ver", BIG, nullable=False),  # every update names the version it read
    sa.CheckConstraint("available >= 0", name="available"),
    sa.CheckConstraint("held >= 0", name="held"),
    sa.CheckConstraint("pinned >= 0 AND pinned <= held", name="pinned"),
    sa.CheckConstraint("debt >= 0", name="debt"),
    sa.CheckConstraint("pos >= folded AND folded >= 0", name="folded"),
    # Accounts on which nothing ever expires (NEVER) do not stand in it.
    sa.Index(
        "ix_account_expiring",
        "next_expiry_ms",
        sqlite_where=sa.text("next_expiry_ms < 4611686018427387904"),
        postgresql_where=sa.text("next_expiry_ms < 4611686018427387904"),
    ),
)

house_balance = sa.Table(
    "house_balance",
    metadata,
    sa.Column("account_id", Id, primary_key=True, autoincrement=False),
    sa.Column("writer", Id, primary_key=True, autoincrement=False),
    # Credits less debits this writer made; the house account's balance is the sum over writers.
    sa.Column("balance", BIG, nullable=False),
)

hold = sa.Table(
    "hold",
    metadata,
    sa.Column("id", Id, primary_key=True, autoincrement=False),
    sa.Column("account_id", BIG, nullable=False),
    sa.Column("principal", sa.Text, nullable=False),  # the wallet or key that proved itself
    sa.Column("scheme", sa.Text, nullable=False),  # how it proved itself
    sa.Column("request_id", sa.Text, nullable=False),  # the one-time value of that proof
    sa.Column("content", sa.LargeBinary, nullable=False),  # hash of what was asked
    sa.Column("max_units", BIG, nullable=False),  # reserved: the most the call may cost
    sa.Column("at_ms", BIG, nullable=False),
    sa.Column("lease_ms", BIG, nullable=False),  # until when its owner has spoken for it
    # The account's epoch when it was taken; -1: it stands on the lots of its hold_limit.
    sa.Column("epoch", BIG, nullable=False),
    sa.Column("owner", BIG, nullable=False),  # the process that runs the call
    sa.Column("route", sa.Text, nullable=False),
    sa.Column("method", sa.Text, nullable=False),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("price", sa.Text),  # the version of the price; null: from before they were noted
    sa.Column("run", sa.Text),
    sa.Column("payment_id", sa.Text),  # the payment that came with this very call
    # In this order: clients that put time first insert sequentially (ledger figures).
    sa.UniqueConstraint("request_id", "principal", "scheme", "account_id"),
    sa.CheckConstraint("max_units >= 0", name="max_units"),
    # Only calls of a run stand in it: the others do not pay for it.
    sa.Index(
        "ix_hold_run",
        "account_id",
        "run",
        "id",
        sqlite_where=sa.text("run IS NOT NULL"),
        postgresql_where=sa.text("run IS NOT NULL"),
    ),
)

open_hold = sa.Table(
    "open_hold",
    metadata,
    sa.Column("hold_id", Id, primary_key=True, autoincrement=False),
    sa.Column("account_id", BIG, nullable=False),
    sa.Column("lease_ms", BIG, nullable=False),  # renewed by the owner of a long call
    sa.Index("ix_open_hold_account_id", "account_id"),
)

request_alias = sa.Table(
    "request_alias",
    metadata,
    sa.Column("account_id", Id, primary_key=True, autoincrement=False),
    sa.Column("principal", sa.Text, primary_key=True),
    sa.Column("alias", sa.Text, primary_key=True),  # Idempotency-Key or payment-identifier
    sa.Column("hold_id", BIG, nullable=False),
    sa.Index("ix_request_alias_hold_id", "hold_id"),
)

transfer = sa.Table(
    "transfer",
    metadata,
    # The close of a hold has the hold's own id: the key closes it at most once.
    sa.Column("id", Id, primary_key=True, autoincrement=False),
    # mint capture void expire unexpire refund freeze unfreeze reverse restore debt forgive repay
    # unrepay loss recover withhold release payout: what each moves is said in lots, claims and
    # payouts.py
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("debit", BIG, nullable=False),
    sa.Column("credit", BIG, nullable=False),
    sa.Column("amount_units", BIG, nullable=False),
    sa.Column("account_id", BIG, nullable=False),  # the customer's side of it
    sa.Column("seq", BIG, nullable=False),  # position in that account's statement
    sa.Column("prev_id", BIG, nullable=False),  # the line before it, 0 at the beginning
    sa.Column("balance_units", BIG, nullable=False),  # available + held after it
    sa.Column("pos", BIG, nullable=False),  # capture: where its stretch of the tape begins
    sa.Column("tape_units", BIG, nullable=False),  # capture: how long it is (rest came from pins)
    sa.Column("ref", BIG, nullable=False),  # capture, void, refund: the hold; the others: the lot
    sa.Column("reason", sa.Text),  # void: why nothing was charged; others: what it was for
    sa.Column("at_ms", BIG, nullable=False),
    sa.CheckConstraint("amount_units >= 0", name="amount_units"),
    sa.CheckConstraint("debit <> credit", name="sides"),
)

lot = sa.Table(
    "lot",
    metadata,
    sa.Column("id", Id, primary_key=True, autoincrement=False),  # the mint transfer's id
    sa.Column("account_id", BIG, nullable=False),
    sa.Column("source", sa.Text, nullable=False),  # x402 card grant …
    sa.Column("payer", sa.Text),  # the wallet whose money it was; refunds go nowhere else
    sa.Column("payment_id", sa.Text),
    sa.Column("expires_ms", BIG, nullable=False),  # NEVER: it does not
    sa.Column("minted_units", BIG, nullable=False),
    sa.Column("remaining_units", BIG, nullable=False),  # as of the account's last fold
    sa.Column("state", sa.Text, nullable=False),  # live expired frozen
    # What lapsed unused and has not been claimed since.
    sa.Column("expired_units", BIG, nullable=False, server_default="0"),
    # The money behind it that was taken back from us, in all.
    sa.Column("reversed_units", BIG, nullable=False, server_default="0"),
    # The part of the claim (all of a frozen lot, else reversed_units) it could not give: lent.
    sa.Column("short_units", BIG, nullable=False, server_default="0"),
    # What it paid of the account's debt. account.debt = sum(short_units) - sum(repaid_units).
    sa.Column("repaid_units", BIG, nullable=False, server_default="0"),
    # Withheld for payouts that have not ended; what was paid out of it.
    sa.Column("outgoing_units", BIG, nullable=False, server_default="0"),
    sa.Column("paid_out_units", BIG, nullable=False, server_default="0"),
    # The part of the claim that it could not give and that was written off: the house bears it.
    sa.Column("lost_units", BIG, nullable=False, server_default="0"),
    sa.CheckConstraint("remaining_units >= 0 AND remaining_units <= minted_units", name="rest"),
    sa.CheckConstraint("expired_units >= 0 AND expired_units <= minted_units", name="expired"),
    sa.CheckConstraint("reversed_units >= 0 AND reversed_units <= minted_units", name="reversed"),
    sa.CheckConstraint("short_units >= 0 AND short_units <= minted_units", name="short"),
    sa.CheckConstraint("repaid_units >= 0 AND repaid_units <= minted_units", name="repaid"),
    sa.CheckConstraint("outgoing_units >= 0 AND outgoing_units <= minted_units", name="outgoing"),
    sa.CheckConstraint("paid_out_units >= 0 AND paid_out_units <= minted_units", name="paid_out"),
    sa.CheckConstraint("lost_units >= 0 AND lost_units <= minted_units", name="lost"),
    # The few that were written off: found again when their payment comes in after all.
    sa.Index(
        "ix_lot_lost",
        "payment_id",
        sqlite_where=sa.text("lost_units > 0"),
        postgresql_where=sa.text("lost_units > 0"),
    ),
    # The few that paid a debt: they get it back first when the debt was none.
    sa.Index(
        "ix_lot_repaid",
        "account_id",
        sqlite_where=sa.text("repaid_units > 0"),
        postgresql_where=sa.text("repaid_units > 0"),
    ),
    # Spending order. Emptied lots drop out, so a walk never meets the dead.
    sa.Index(
        "ix_lot_spending",
        "account_id",
        "expires_ms",
        "id",
        sqlite_where=sa.text("state = 'live' AND remaining_units > 0"),
        postgresql_where=sa.text("state = 'live' AND remaining_units > 0"),
    ),
)

# From which lots a hold may be taken, where it is not from all: those that are everything named
# here. Its pins say from which it was.
hold_limit = sa.Table(
    "hold_limit",
    metadata,
    sa.Column("hold_id", Id, primary_key=True, autoincrement=False),
    sa.Column("lot_id", BIG),
    sa.Column("source", sa.Text),
    sa.Column("payer", sa.Text),
    # Of the proof: what all holds of one may take is limited too.
    sa.Column("session", sa.Text),
    sa.Index(
        "ix_hold_limit_session",
        "session",
        sqlite_where=sa.text("session IS NOT NULL"),
        postgresql_where=sa.text("session IS NOT NULL"),
    ),
)

segment = sa.Table(
    "segment",
    metadata,
    sa.Column("account_id", Id, primary_key=True, autoincrement=False),
    sa.Column("from_pos", BIG, primary_key=True, autoincrement=False),
    sa.Column("to_pos", BIG, nullable=False),
    sa.Column("lot_id", BIG, nullable=False),
    sa.CheckConstraint("to_pos > from_pos", name="length"),
    sa.Index("ix_segment_lot_id", "lot_id"),
)

pin = sa.Table(
    "pin",
    metadata,
    sa.Column("hold_id", Id, primary_key=True, autoincrement=False),
    sa.Column("lot_id", BIG, primary_key=True, autoincrement=False),
    # What of the hold stands on this lot; may grow while the hold is open.
    sa.Column("amount_units", BIG, nullable=False),
    sa.Column("captured_units", BIG),  # null while the hold is open
    sa.Index("ix_pin_lot_id", "lot_id"),
)

# One row per fact of the outside world that made money here: the same fact never mints again.
mint_key = sa.Table(
    "mint_key",
    metadata,
    sa.Column("network", sa.Text, primary_key=True),  # CAIP-2 id, or "stripe", "grant"
    sa.Column("ref", sa.Text, primary_key=True),  # transaction hash, payment intent, …
    sa.Column("n", BIG, primary_key=True, autoincrement=False),  # ordinal inside it
    sa.Column("lot_id", BIG, nullable=False, index=True),
)

# The terms of every price that calls were held at, kept for ever: a past charge is derived from
# them again.
price_version = sa.Table(
    "price_version",
    metadata,
    sa.Column("version", sa.Text, primary_key=True),
    sa.Column("terms", sa.Text, nullable=False),  # JSON, as the price list shows them
    sa.Column("since_ms", BIG, nullable=False),  # when it was first in force
    sa.Column("source", sa.Text, nullable=False),  # JSON, as it was configured: makes the rule
)

# Which price a route was given when: who read the one before is not charged more for a while.
route_price = sa.Table(
    "route_price",
    metadata,
    sa.Column("route", sa.Text, primary_key=True),
    sa.Column("since_ms", BIG, primary_key=True, autoincrement=False),
    sa.Column("version", sa.Text, nullable=False),
)

# What was given back of a charge, once for each key. The charge itself is never changed.
refund = sa.Table(
    "refund",
    metadata,
    sa.Column("id", Id, primary_key=True, autoincrement=False),  # the refund transfer's id
    sa.Column("account_id", BIG, nullable=False),
    sa.Column("key", sa.Text, nullable=False),  # its repeat changes nothing
    sa.Column("charge_id", BIG, nullable=False),  # the hold, and the capture, it is of
    sa.Column("asked_units", BIG),  # null: all that was left of the charge
    sa.Column("amount_units", BIG, nullable=False),
    sa.Column("at_ms", BIG, nullable=False),
    sa.UniqueConstraint("account_id", "key"),
    sa.Index("ix_refund_charge_id", "charge_id"),
    sa.CheckConstraint("amount_units > 0", name="amount_units"),
)

# To which lots a refund went: those that had paid.
refund_part = sa.Table(
    "refund_part",
    metadata,
    sa.Column("refund_id", Id, primary_key=True, autoincrement=False),
    sa.Column("lot_id", BIG, primary_key=True, autoincrement=False),
    sa.Column("amount_units", BIG, nullable=False),
    sa.CheckConstraint("amount_units > 0", name="amount_units"),
    sa.Index("ix_refund_part_lot_id", "lot_id"),
)

# What goes back outside of a lot. Written before anything is signed that could pay it out.
payout = sa.Table(
    "payout",
    metadata,
    sa.Column("id", Id, primary_key=True, autoincrement=False),  # of the transfer that withheld it
    sa.Column("account_id", BIG, nullable=False),
    sa.Column("lot_id", BIG, nullable=False),
    sa.Column("ordinal", BIG, nullable=False),  # place among the lot's payouts, from 1
    sa.Column("amount_units", BIG, nullable=False),
    sa.Column("payment_id", sa.Text, nullable=False),  # carries it out
    sa.Column("at_ms", BIG, nullable=False),
    sa.UniqueConstraint("lot_id", "ordinal"),
    sa.UniqueConstraint("payment_id"),
    sa.CheckConstraint("amount_units > 0", name="amount_units"),
)

# How it ended. The key ends it at most once.
payout_end = sa.Table(
    "payout_end",
    metadata,
    sa.Column("payout_id", Id, primary_key=True, autoincrement=False),
    sa.Column("paid", sa.Integer, nullable=False),  # 1: it is outside; 0: it is the lot's again
    sa.Column("transfer_id", BIG, nullable=False),  # the line that says so
    sa.Column("at_ms", BIG, nullable=False),
    sa.UniqueConstraint("transfer_id"),
)

# What a person did by hand, who it was and why.
operator_action = sa.Table(
    "operator_action",
    metadata,
    sa.Column("id", Id, primary_key=True, autoincrement=False),
    sa.Column("account_id", BIG, nullable=False),
    sa.Column("action", sa.Text, nullable=False),  # freeze unfreeze refund write_off
    sa.Column("ref", BIG, nullable=False),  # refund, write_off: its transfer; else 0
    sa.Column("by", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("at_ms", BIG, nullable=False),
    sa.Index("ix_operator_action_account_id", "account_id"),
)

# What one transaction wrote, hashed with the one before it (chain.py), and the mark of its commit.
batch = sa.Table(
    "batch",
    metadata,
    sa.Column("writer", Id, primary_key=True, autoincrement=False),  # whose chain; 0: the shared
    sa.Column("n", BIG, primary_key=True, autoincrement=False),  # place in it, from 1
    sa.Column("first_id", BIG, nullable=False),  # its ids: no other batch has any of them
    sa.Column("end_id", BIG, nullable=False),
    sa.Column("closed", sa.LargeBinary, nullable=False),  # the holds it closed, 8 bytes each
    sa.Column("at_ms", BIG, nullable=False),
    sa.Column("prev", sa.LargeBinary, nullable=False),
    sa.Column("hash", sa.LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)

# What a charge was made of, where it was not simply the price: lines that add up to its transfer.
breakdown = sa.Table(
    "breakdown",
    metadata,
    sa.Column("hold_id", Id, primary_key=True, autoincrement=False),
    sa.Column("amount_units", BIG, nullable=False),  # the sum of the lines: that of its transfer
    sa.Column("lines", sa.Text, nullable=False),  # JSON
)

# What was answered, for as long as a repeat may ask. Purged by age; the guard itself stays.
answer = sa.Table(
    "answer",
    metadata,
    sa.Column("hold_id", Id, primary_key=True, autoincrement=False),
    sa.Column("status", sa.Integer, nullable=False),
    sa.Column("headers", sa.Text, nullable=False),  # JSON list of pairs
    sa.Column("body", sa.LargeBinary),  # null: too long to keep, the receipt stands for it
    sa.Column("at_ms", BIG, nullable=False),
    sa.Index("ix_answer_at_ms", "at_ms"),
)
