"""Tables of money that comes in: one row per attempt, and what must not be forgotten about it."""

from __future__ import annotations

import sqlalchemy as sa

from gateway.db import Id, metadata

BIG = sa.BigInteger()

payment = sa.Table(
    "payment",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    # x402 stripe facilitator; payout: it goes out
    sa.Column("provider", sa.Text, nullable=False),
    # created processing succeeded failed refunded disputed reversed
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("purpose", sa.Text, nullable=False),  # "call" leaves change, "credits" buys a pack
    sa.Column("payer", sa.Text),  # the wallet that pays; cards have none
    sa.Column("recipient", sa.Text),  # the wallet that gets the credits
    # "" for a key, which is the same wallet on all chains; a contract wallet's own chain.
    sa.Column("recipient_chain", sa.Text, nullable=False, server_default=""),
    sa.Column("network", sa.Text),
    sa.Column("asset", sa.Text),
    sa.Column("amount_units", BIG, nullable=False),  # what was asked; the mint is what was seen
    sa.Column("expires_ms", BIG),  # of the credits it buys; null: never
    sa.Column("auth_nonce", sa.Text),  # x402: of the authorization; with payer and asset its key
    sa.Column("valid_before_s", BIG),  # x402: after this the token refuses the authorization
    sa.Column("from_block", BIG),  # x402: the authorization was unused at this block
    sa.Column("tx_hash", sa.Text),
    sa.Column("external_ref", sa.Text),  # Stripe: Checkout Session id
    sa.Column("external_url", sa.Text),  # Stripe: where the person pays
    sa.Column("lot_id", BIG),  # what it minted
    sa.Column("error_code", sa.Text),
    sa.Column("error_detail", sa.Text),
    sa.Column("created_at_ms", BIG, nullable=False),
    sa.Column("updated_at_ms", BIG, nullable=False),
    sa.Column("lease_ms", BIG, nullable=False),  # until then a live request is working on it
    # x402: how the money is moved, and so how its transfer is told on chain (methods.py).
    sa.Column("method", sa.Text, nullable=False, server_default="eip3009"),
    sa.Column("pay_to", sa.Text),  # x402: whom it pays; null: the network's configured address
    # "external": bought through /api/external, whose weaker signatures may spend it. "upto": for
    # a call that was done before (upto_call). Else "".
    sa.Column("door", sa.Text, nullable=False, server_default=""),
    sa.CheckConstraint("amount_units > 0", name="amount_units"),
    sa.Index(
        "ix_payment_unfinished",
        "lease_ms",
        sqlite_where=sa.text("state = 'processing'"),
        postgresql_where=sa.text("state = 'processing'"),
    ),
    sa.Index("ix_payment_external_ref", "external_ref"),
    sa.Index(
        "ix_payment_failed",
        "payer",
        "updated_at_ms",
        sqlite_where=sa.text("state = 'failed'"),
        postgresql_where=sa.text("state = 'failed'"),
    ),
)

# Claimed before anything is sent; whoever holds the row decides what the signature is used for.
# "taken" rows are of transfers, not authorizations: which payment by Permit2 has it (journal.py);
# "permit" rows of EIP-2612 permits: which payment was last sent with it (permits.py).
authorization_use = sa.Table(
    "authorization_use",
    metadata,
    sa.Column("network", sa.Text, primary_key=True),
    sa.Column("asset", sa.Text, primary_key=True),
    sa.Column("payer", sa.Text, primary_key=True),
    sa.Column("nonce", sa.Text, primary_key=True),
    sa.Column("decision", sa.Text, nullable=False),  # settle credits taken nothing permit upto
    # With "credits": the id of the call's hold; with "nothing": empty; with "upto": of upto_call.
    sa.Column("payment_id", sa.Text, nullable=False),
    sa.Column("content", sa.LargeBinary, nullable=False),  # hash of what was presented with it
    sa.Column("offer", sa.LargeBinary),  # hash of the offer token: tells the first presenter apart
    sa.Column("at_ms", BIG, nullable=False),
)

# A call whose payment permits a maximum, and is settled once it is known what it came to. It is
# here before the work begins, so that one wallet has one of them at most, and whoever dies leaves
# it to somebody else (upto_rows.py).
upto_call = sa.Table(
    "upto_call",
    metadata,
    sa.Column("payment_id", sa.Text, primary_key=True),  # its payment row comes when it is sent
    sa.Column("hold_id", BIG, nullable=False, unique=True),  # of the call; it reserves nothing
    sa.Column("network", sa.Text, nullable=False),
    sa.Column("asset", sa.Text, nullable=False),
    sa.Column("payer", sa.Text, nullable=False),
    sa.Column("payer_chain", sa.Text, nullable=False),  # as payment.recipient_chain
    sa.Column("pay_to", sa.Text, nullable=False),
    sa.Column("nonce", sa.Text, nullable=False),
    sa.Column("valid_before_s", BIG, nullable=False),  # from then on Permit2 refuses it
    sa.Column("most_units", BIG, nullable=False),
    sa.Column("data", sa.LargeBinary, nullable=False),  # the call that moves most_units
    # open: the call runs. due: it came to ``units``, and nothing is sent. sent: its payment is
    # under way. settled, nothing: it has ended. unsettled: done, and it can never be settled.
    # forgiven: an operator said that this is the end of it.
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("units", BIG),
    sa.Column("breakdown", sa.Text),  # of the charge
    # What was answered, until it is paid: then it is the charge's, for whoever repeats the request.
    sa.Column("answer_status", BIG),
    sa.Column("answer_headers", sa.Text),  # JSON
    sa.Column("answer_body", sa.LargeBinary),
    sa.Column("error", sa.Text),  # why it could not be settled at the last look
    sa.Column("at_ms", BIG, nullable=False),
    sa.Column("updated_at_ms", BIG, nullable=False),
    sa.Column("look_ms", BIG, nullable=False),  # the background loop leaves it alone until then
    sa.CheckConstraint("units IS NULL OR (units >= 0 AND units <= most_units)", name="units"),
    sa.CheckConstraint("state IN ('open', 'nothing') OR units > 0", name="state"),
    sa.Index(
        "ix_upto_call_unended",
        "payer",
        "payer_chain",
        unique=True,
        sqlite_where=sa.text("state IN ('open', 'due', 'sent', 'unsettled')"),
        postgresql_where=sa.text("state IN ('open', 'due', 'sent', 'unsettled')"),
    ),
)

# The identifier a payment for credits came with: whoever signs again under it pays nothing again.
payment_alias = sa.Table(
    "payment_alias",
    metadata,
    sa.Column("payer", sa.Text, primary_key=True),
    # As payment.recipient_chain: "" for a key, a contract wallet's own chain.
    sa.Column("payer_chain", sa.Text, primary_key=True),
    sa.Column("alias", sa.Text, primary_key=True),
    sa.Column("payment_id", sa.Text, nullable=False),
    sa.Column("content", sa.LargeBinary, nullable=False),  # hash of what was asked with it
    sa.Column("at_ms", BIG, nullable=False),
    sa.UniqueConstraint("payment_id"),
)

# One row for each gas account: who updates it holds the counter of its chain nonces.
gas_account = sa.Table(
    "gas_account",
    metadata,
    sa.Column("network", sa.Text, primary_key=True),
    sa.Column("sender", sa.Text, primary_key=True),
    sa.Column("next_nonce", BIG, nullable=False),
    sa.Column("tended_ms", BIG, nullable=False, server_default="0"),  # somebody looks after it
    sa.Column("noted_ms", BIG, nullable=False, server_default="0"),  # when the rest was looked at
    sa.Column("stuck_ms", BIG),  # since when its lowest transaction is overdue; null: it is not
    sa.Column("balance_gwei", BIG),  # as of the last look
    sa.Column("need_gwei", BIG),  # what one settlement may cost at the last look
)

# A chain nonce, for ever the number of one transaction and its replacements.
chain_nonce = sa.Table(
    "chain_nonce",
    metadata,
    sa.Column("network", sa.Text, primary_key=True),
    sa.Column("sender", sa.Text, primary_key=True),
    sa.Column("nonce", BIG, primary_key=True, autoincrement=False),
    sa.Column("payment_id", sa.Text, nullable=False),  # the first of its members
    sa.Column("at_ms", BIG, nullable=False, server_default="0"),
    sa.Column("done_ms", BIG),  # when a block was seen to have used it; null: open
    # What its transaction is expected to cost, then what it did: counts against the gas budget.
    sa.Column("cost_gwei", BIG, nullable=False, server_default="0"),
    sa.Index("ix_chain_nonce_at_ms", "network", "at_ms"),
    sa.Index(
        "ix_chain_nonce_open",
        "network",
        "sender",
        "nonce",
        sqlite_where=sa.text("done_ms IS NULL"),
        postgresql_where=sa.text("done_ms IS NULL"),
    ),
)

# The payments that one chain nonce settles. A payment has more than one only if the first is
# known to have moved nothing for it.
chain_member = sa.Table(
    "chain_member",
    metadata,
    sa.Column("network", sa.Text, primary_key=True),
    sa.Column("sender", sa.Text, primary_key=True),
    sa.Column("nonce", BIG, primary_key=True, autoincrement=False),
    sa.Column("payment_id", sa.Text, primary_key=True),
    # The call of this payment alone; null in rows of a release before 0006, whose transactions
    # are that call.
    sa.Column("target", sa.Text),
    sa.Column("data", sa.LargeBinary),
    sa.Index("ix_chain_member_payment_id", "payment_id"),
)

# Signed and stored before it is sent: after a crash the very same bytes are sent again.
chain_tx = sa.Table(
    "chain_tx",
    metadata,
    sa.Column("network", sa.Text, primary_key=True),
    sa.Column("tx_hash", sa.Text, primary_key=True),
    sa.Column("sender", sa.Text, nullable=False),
    sa.Column("nonce", BIG, nullable=False),
    sa.Column("raw", sa.LargeBinary, nullable=False),
    sa.Column("payment_id", sa.Text, nullable=False),
    sa.Column("at_ms", BIG, nullable=False),
    sa.Index("ix_chain_tx_payment_id", "payment_id"),
    sa.Index("ix_chain_tx_nonce", "network", "sender", "nonce"),
)

# Given to somebody else's facilitator: the call by which we settle it ourselves if that fails.
remote_settlement = sa.Table(
    "remote_settlement",
    metadata,
    sa.Column("payment_id", sa.Text, primary_key=True),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("data", sa.LargeBinary, nullable=False),
    sa.Column("at_ms", BIG, nullable=False),
)

# A provider's message, stored once by its id before anything is done about it.
provider_event = sa.Table(
    "provider_event",
    metadata,
    sa.Column("provider", sa.Text, primary_key=True),
    sa.Column("event_id", sa.Text, primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("payment_id", sa.Text),  # ours, where the message names it
    sa.Column("intent", sa.Text),  # the provider's own name of the money it is about
    sa.Column("facts", sa.Text, nullable=False),  # JSON list: what it said about that money
    sa.Column("at_ms", BIG, nullable=False),
    sa.Index("ix_provider_event_payment_id", "payment_id"),
    sa.Index("ix_provider_event_intent", "intent"),
)

# Keys of the offer tokens, shared by all nodes of the deployment.
mac_key = sa.Table(
    "mac_key",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("secret", sa.LargeBinary, nullable=False),
    sa.Column("created_at_ms", BIG, nullable=False),
)

# Which payouts a signed request asked for: its repeat is answered with them, and asks for no more.
payout_request = sa.Table(
    "payout_request",
    metadata,
    sa.Column("account_id", Id, primary_key=True, autoincrement=False),
    sa.Column("principal", sa.Text, primary_key=True),  # the wallet that signed
    sa.Column("request_id", sa.Text, primary_key=True),  # its proof's one-time value, or its alias
    sa.Column("content", sa.LargeBinary, nullable=False),  # hash of what was asked
    sa.Column("payment_ids", sa.Text, nullable=False),  # JSON list
    sa.Column("at_ms", BIG, nullable=False),
)

# What a node may mint before its block is safe. In the database, so that the caps over all
# wallets are one number for all nodes; whoever adds to what is provisional locks the row.
mint_policy = sa.Table(
    "mint_policy",
    metadata,
    sa.Column("network", sa.Text, primary_key=True),
    sa.Column("instant_limit_units", BIG, nullable=False),  # of one wallet, not yet safe
    sa.Column("exposure_limit_units", BIG, nullable=False),  # of all wallets, not yet safe
    sa.Column("at_inclusion", sa.Integer, nullable=False),  # 1: above the limit does not wait
)

# Every transfer to us that this ledger knows of, by the key under which it mints.
inbound = sa.Table(
    "inbound",
    metadata,
    sa.Column("network", sa.Text, primary_key=True),
    sa.Column("tx_hash", sa.Text, primary_key=True),
    sa.Column("n", BIG, primary_key=True, autoincrement=False),
    sa.Column("asset", sa.Text, nullable=False),
    sa.Column("pay_to", sa.Text, nullable=False),
    sa.Column("from_address", sa.Text, nullable=False),
    sa.Column("value_units", BIG, nullable=False),  # what the log says
    sa.Column("block_number", BIG, nullable=False),  # where it was seen last
    sa.Column("block_hash", sa.Text, nullable=False),
    sa.Column("authorizer", sa.Text),  # of the authorization it was made by, if one
    sa.Column("auth_nonce", sa.Text),
    # unclaimed: nobody's yet. waiting: somebody's, and not sure enough. minted. gone: its block
    # left the chain; what it had minted is reversed.
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("depth", sa.Text, nullable=False),  # included safe final
    sa.Column("agreed", sa.Integer, nullable=False),  # 1: two providers tell the same
    sa.Column("recipient", sa.Text),  # the wallet that gets the credits
    sa.Column("recipient_chain", sa.Text, nullable=False, server_default=""),
    sa.Column("source", sa.Text),  # of the lot: x402 deposit
    sa.Column("payment_id", sa.Text),
    sa.Column("expires_ms", BIG),  # of the credits; null: never
    sa.Column("lot_id", BIG),  # what it minted; stays when that is reversed
    sa.Column("seen_at_ms", BIG, nullable=False),
    sa.Column("updated_at_ms", BIG, nullable=False),
    sa.CheckConstraint("value_units > 0", name="value_units"),
    sa.CheckConstraint("state <> 'minted' OR lot_id IS NOT NULL", name="minted"),
    # What is still followed. Final rows drop out.
    sa.Index(
        "ix_inbound_followed",
        "network",
        "block_number",
        sqlite_where=sa.text("depth <> 'final' AND state <> 'gone'"),
        postgresql_where=sa.text("depth <> 'final' AND state <> 'gone'"),
    ),
    sa.Index("ix_inbound_lot_id", "lot_id"),
    sa.Index("ix_inbound_payment_id", "payment_id"),
)

# From which block an address counts as this ledger's, and how far its transfers have been read.
watched = sa.Table(
    "watched",
    metadata,
    sa.Column("network", sa.Text, primary_key=True),
    sa.Column("asset", sa.Text, primary_key=True),
    sa.Column("pay_to", sa.Text, primary_key=True),
    sa.Column("first_block", BIG, nullable=False),  # transfers before it are not this ledger's
    sa.Column("read_to", BIG, nullable=False),  # all final transfers up to here are in inbound
    sa.Column("compared_to", BIG, nullable=False),  # up to here chain and books were compared
    sa.Column("at_ms", BIG, nullable=False),
)

# Work that one process does at a time. ``fence`` rises with every holder.
lease = sa.Table(
    "lease",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("holder", sa.Text, nullable=False),
    sa.Column("fence", BIG, nullable=False),
    sa.Column("until_ms", BIG, nullable=False),
)
