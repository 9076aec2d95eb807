"""The ledger, payments and wallets.

Tables as in the three ``tables.py`` of this release, and the triggers that make the append-only
ones so.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

BIG = sa.BigInteger()
ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

APPEND_ONLY = ("hold", "transfer", "segment", "mint_key")


def _triggers() -> None:
    """Nobody rewrites history: not the program, not a hand on the database."""
    if op.get_bind().dialect.name == "sqlite":
        for table in APPEND_ONLY:
            for verb in ("UPDATE", "DELETE"):
                op.execute(
                    f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
                    f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
                )
        return
    op.execute(
        "CREATE FUNCTION farebox_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION '% is append-only', TG_TABLE_NAME; END $$"
    )
    for table in APPEND_ONLY:
        op.execute(
            f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION farebox_append_only()"
        )


def _seed() -> None:
    """Ids begin above the house's own accounts; nothing has been swept."""
    op.execute("INSERT INTO sequence (name, next) VALUES ('id', 1000)")
    op.execute("INSERT INTO sequence (name, next) VALUES ('swept', 1000)")
    op.execute("INSERT INTO sequence (name, next) VALUES ('writer', 1)")


def upgrade() -> None:
    op.create_table(
        "account",
        sa.Column("id", ID, autoincrement=False, nullable=False),
        sa.Column("created_at_ms", BIG, nullable=False),
        sa.Column("available", BIG, nullable=False),
        sa.Column("held", BIG, nullable=False),
        sa.Column("pinned", BIG, nullable=False),
        sa.Column("debt", BIG, nullable=False),
        sa.Column("added", BIG, nullable=False),
        sa.Column("spent", BIG, nullable=False),
        sa.Column("pos", BIG, nullable=False),
        sa.Column("folded", BIG, nullable=False),
        sa.Column("next_expiry_ms", BIG, nullable=False),
        sa.Column("epoch", BIG, nullable=False),
        sa.Column("seq", BIG, nullable=False),
        sa.Column("last_id", BIG, nullable=False),
        sa.Column("frozen", sa.Integer(), nullable=False),
        sa.Column("ver", BIG, nullable=False),
        sa.CheckConstraint("available >= 0", name=op.f("ck_account_available")),
        sa.CheckConstraint("debt >= 0", name=op.f("ck_account_debt")),
        sa.CheckConstraint("held >= 0", name=op.f("ck_account_held")),
        sa.CheckConstraint("pinned >= 0 AND pinned <= held", name=op.f("ck_account_pinned")),
        sa.CheckConstraint("pos >= folded AND folded >= 0", name=op.f("ck_account_folded")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_account")),
    )
    op.create_table(
        "answer",
        sa.Column("hold_id", ID, autoincrement=False, nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("headers", sa.Text(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=True),
        sa.Column("at_ms", BIG, nullable=False),
        sa.PrimaryKeyConstraint("hold_id", name=op.f("pk_answer")),
    )
    op.create_index("ix_answer_at_ms", "answer", ["at_ms"], unique=False)

    op.create_table(
        "authorization_use",
        sa.Column("network", sa.Text(), nullable=False),
        sa.Column("asset", sa.Text(), nullable=False),
        sa.Column("payer", sa.Text(), nullable=False),
        sa.Column("nonce", sa.Text(), nullable=False),
        sa.Column("decision", sa.Text(), nullable=False),
        sa.Column("payment_id", sa.Text(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.Column("offer", sa.LargeBinary(), nullable=True),
        sa.Column("at_ms", BIG, nullable=False),
        sa.PrimaryKeyConstraint(
            "network", "asset", "payer", "nonce", name=op.f("pk_authorization_use")
        ),
    )
    op.create_table(
        "chain_nonce",
        sa.Column("network", sa.Text(), nullable=False),
        sa.Column("sender", sa.Text(), nullable=False),
        sa.Column("nonce", BIG, autoincrement=False, nullable=False),
        sa.Column("payment_id", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("network", "sender", "nonce", name=op.f("pk_chain_nonce")),
    )
    op.create_table(
        "chain_tx",
        sa.Column("network", sa.Text(), nullable=False),
        sa.Column("tx_hash", sa.Text(), nullable=False),
        sa.Column("sender", sa.Text(), nullable=False),
        sa.Column("nonce", BIG, nullable=False),
        sa.Column("raw", sa.LargeBinary(), nullable=False),
        sa.Column("payment_id", sa.Text(), nullable=False),
        sa.Column("at_ms", BIG, nullable=False),
        sa.PrimaryKeyConstraint("network", "tx_hash", name=op.f("pk_chain_tx")),
    )
    op.create_index("ix_chain_tx_payment_id", "chain_tx", ["payment_id"], unique=False)

    op.create_table(
        "hold",
        sa.Column("id", ID, autoincrement=False, nullable=False),
        sa.Column("account_id", BIG, nullable=False),
        sa.Column("principal", sa.Text(), nullable=False),
        sa.Column("scheme", sa.Text(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.Column("max_units", BIG, nullable=False),
        sa.Column("at_ms", BIG, nullable=False),
        sa.Column("lease_ms", BIG, nullable=False),
        sa.Column("epoch", BIG, nullable=False),
        sa.Column("owner", BIG, nullable=False),
        sa.Column("route", sa.Text(), nullable=False),
        sa.Column("method", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("run", sa.Text(), nullable=True),
        sa.Column("payment_id", sa.Text(), nullable=True),
        sa.CheckConstraint("max_units >= 0", name=op.f("ck_hold_max_units")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_hold")),
        sa.UniqueConstraint(
            "request_id",
            "principal",
            "scheme",
            "account_id",
            name=op.f("uq_hold_request_id_principal_scheme_account_id"),
        ),
    )
    op.create_table(
        "house_balance",
        sa.Column("account_id", ID, autoincrement=False, nullable=False),
        sa.Column("writer", ID, autoincrement=False, nullable=False),
        sa.Column("balance", BIG, nullable=False),
        sa.PrimaryKeyConstraint("account_id", "writer", name=op.f("pk_house_balance")),
    )
    op.create_table(
        "id_block",
        sa.Column("start", ID, autoincrement=False, nullable=False),
        sa.Column("at_ms", BIG, nullable=False),
        sa.PrimaryKeyConstraint("start", name=op.f("pk_id_block")),
    )
    op.create_table(
        "lot",
        sa.Column("id", ID, autoincrement=False, nullable=False),
        sa.Column("account_id", BIG, nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("payer", sa.Text(), nullable=True),
        sa.Column("payment_id", sa.Text(), nullable=True),
        sa.Column("expires_ms", BIG, nullable=False),
        sa.Column("minted_units", BIG, nullable=False),
        sa.Column("remaining_units", BIG, nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.CheckConstraint(
            "remaining_units >= 0 AND remaining_units <= minted_units", name=op.f("ck_lot_rest")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_lot")),
    )
    op.create_index(
        "ix_lot_spending",
        "lot",
        ["account_id", "expires_ms", "id"],
        unique=False,
        sqlite_where=sa.text("state = 'live' AND remaining_units > 0"),
        postgresql_where=sa.text("state = 'live' AND remaining_units > 0"),
    )

    op.create_table(
        "mac_key",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("secret", sa.LargeBinary(), nullable=False),
        sa.Column("created_at_ms", BIG, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_mac_key")),
    )
    op.create_table(
        "meta",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_meta")),
    )
    op.create_table(
        "mint_key",
        sa.Column("network", sa.Text(), nullable=False),
        sa.Column("ref", sa.Text(), nullable=False),
        sa.Column("n", BIG, autoincrement=False, nullable=False),
        sa.Column("lot_id", BIG, nullable=False),
        sa.PrimaryKeyConstraint("network", "ref", "n", name=op.f("pk_mint_key")),
    )
    op.create_table(
        "open_hold",
        sa.Column("hold_id", ID, autoincrement=False, nullable=False),
        sa.Column("account_id", BIG, nullable=False),
        sa.Column("lease_ms", BIG, nullable=False),
        sa.PrimaryKeyConstraint("hold_id", name=op.f("pk_open_hold")),
    )
    op.create_index("ix_open_hold_account_id", "open_hold", ["account_id"], unique=False)

    op.create_table(
        "payment",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("payer", sa.Text(), nullable=True),
        sa.Column("recipient", sa.Text(), nullable=True),
        sa.Column("recipient_chain", sa.Text(), nullable=False, server_default=""),
        sa.Column("network", sa.Text(), nullable=True),
        sa.Column("asset", sa.Text(), nullable=True),
        sa.Column("amount_units", BIG, nullable=False),
        sa.Column("expires_ms", BIG, nullable=True),
        sa.Column("auth_nonce", sa.Text(), nullable=True),
        sa.Column("valid_before_s", BIG, nullable=True),
        sa.Column("from_block", BIG, nullable=True),
        sa.Column("tx_hash", sa.Text(), nullable=True),
        sa.Column("external_ref", sa.Text(), nullable=True),
        sa.Column("external_url", sa.Text(), nullable=True),
        sa.Column("lot_id", BIG, nullable=True),
        sa.Column("error_code", sa.Text(), nullable=True),
        sa.Column("error_detail", sa.Text(), nullable=True),
        sa.Column("created_at_ms", BIG, nullable=False),
        sa.Column("updated_at_ms", BIG, nullable=False),
        sa.Column("lease_ms", BIG, nullable=False),
        sa.CheckConstraint("amount_units > 0", name=op.f("ck_payment_amount_units")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_payment")),
    )
    op.create_index("ix_payment_external_ref", "payment", ["external_ref"], unique=False)
    op.create_index(
        "ix_payment_unfinished",
        "payment",
        ["lease_ms"],
        unique=False,
        sqlite_where=sa.text("state = 'processing'"),
        postgresql_where=sa.text("state = 'processing'"),
    )

    op.create_table(
        "pin",
        sa.Column("hold_id", ID, autoincrement=False, nullable=False),
        sa.Column("lot_id", BIG, autoincrement=False, nullable=False),
        sa.Column("amount_units", BIG, nullable=False),
        sa.Column("captured_units", BIG, nullable=True),
        sa.PrimaryKeyConstraint("hold_id", "lot_id", name=op.f("pk_pin")),
    )
    op.create_index("ix_pin_lot_id", "pin", ["lot_id"], unique=False)

    op.create_table(
        "provider_event",
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("event_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("payment_id", sa.Text(), nullable=True),
        sa.Column("intent", sa.Text(), nullable=True),
        sa.Column("facts", sa.Text(), nullable=False),
        sa.Column("at_ms", BIG, nullable=False),
        sa.PrimaryKeyConstraint("provider", "event_id", name=op.f("pk_provider_event")),
    )
    op.create_index("ix_provider_event_payment_id", "provider_event", ["payment_id"], unique=False)
    op.create_index("ix_provider_event_intent", "provider_event", ["intent"], unique=False)
    op.create_table(
        "request_alias",
        sa.Column("account_id", ID, autoincrement=False, nullable=False),
        sa.Column("principal", sa.Text(), nullable=False),
        sa.Column("alias", sa.Text(), nullable=False),
        sa.Column("hold_id", BIG, nullable=False),
        sa.PrimaryKeyConstraint("account_id", "principal", "alias", name=op.f("pk_request_alias")),
    )
    op.create_index("ix_request_alias_hold_id", "request_alias", ["hold_id"], unique=False)

    op.create_table(
        "segment",
        sa.Column("account_id", ID, autoincrement=False, nullable=False),
        sa.Column("from_pos", BIG, autoincrement=False, nullable=False),
        sa.Column("to_pos", BIG, nullable=False),
        sa.Column("lot_id", BIG, nullable=False),
        sa.CheckConstraint("to_pos > from_pos", name=op.f("ck_segment_length")),
        sa.PrimaryKeyConstraint("account_id", "from_pos", name=op.f("pk_segment")),
    )
    op.create_index("ix_segment_lot_id", "segment", ["lot_id"], unique=False)

    op.create_table(
        "sequence",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("next", BIG, nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_sequence")),
    )
    op.create_table(
        "transfer",
        sa.Column("id", ID, autoincrement=False, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("debit", BIG, nullable=False),
        sa.Column("credit", BIG, nullable=False),
        sa.Column("amount_units", BIG, nullable=False),
        sa.Column("account_id", BIG, nullable=False),
        sa.Column("seq", BIG, nullable=False),
        sa.Column("prev_id", BIG, nullable=False),
        sa.Column("balance_units", BIG, nullable=False),
        sa.Column("pos", BIG, nullable=False),
        sa.Column("tape_units", BIG, nullable=False),
        sa.Column("ref", BIG, nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("at_ms", BIG, nullable=False),
        sa.CheckConstraint("amount_units >= 0", name=op.f("ck_transfer_amount_units")),
        sa.CheckConstraint("debit <> credit", name=op.f("ck_transfer_sides")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_transfer")),
    )
    op.create_table(
        "wallet",
        sa.Column("address", sa.Text(), nullable=False),
        sa.Column("chain", sa.Text(), nullable=False),
        sa.Column("account_id", ID, nullable=False),
        sa.Column("linked_at_ms", BIG, nullable=False),
        sa.PrimaryKeyConstraint("address", "chain", name=op.f("pk_wallet")),
    )
    op.create_index("ix_wallet_account_id", "wallet", ["account_id"], unique=False)

    _triggers()
    _seed()


def downgrade() -> None:
    for table in (
        "wallet",
        "transfer",
        "sequence",
        "segment",
        "request_alias",
        "provider_event",
        "pin",
        "payment",
        "open_hold",
        "mint_key",
        "meta",
        "mac_key",
        "lot",
        "id_block",
        "house_balance",
        "hold",
        "chain_tx",
        "chain_nonce",
        "authorization_use",
        "answer",
        "account",
    ):
        op.drop_table(table)
    if op.get_bind().dialect.name != "sqlite":
        op.execute("DROP FUNCTION farebox_append_only()")
