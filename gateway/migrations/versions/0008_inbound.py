"""Transfers to us as they stand on chain, what may be minted before it is safe, and leases.

Only adds: a release before this one can still write to the tables it knows.
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0006"
branch_labels = None
depends_on = None

BIG = sa.BigInteger()
FOLLOWED = "depth <> 'final' AND state <> 'gone'"


def upgrade() -> None:
    op.create_table(
        "mint_policy",
        sa.Column("network", sa.Text, nullable=False),
        sa.Column("instant_limit_units", BIG, nullable=False),
        sa.Column("exposure_limit_units", BIG, nullable=False),
        sa.Column("at_inclusion", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("network", name="pk_mint_policy"),
    )
    op.create_table(
        "inbound",
        sa.Column("network", sa.Text, nullable=False),
        sa.Column("tx_hash", sa.Text, nullable=False),
        sa.Column("n", BIG, nullable=False, autoincrement=False),
        sa.Column("asset", sa.Text, nullable=False),
        sa.Column("pay_to", sa.Text, nullable=False),
        sa.Column("from_address", sa.Text, nullable=False),
        sa.Column("value_units", BIG, nullable=False),
        sa.Column("block_number", BIG, nullable=False),
        sa.Column("block_hash", sa.Text, nullable=False),
        sa.Column("authorizer", sa.Text),
        sa.Column("auth_nonce", sa.Text),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("depth", sa.Text, nullable=False),
        sa.Column("agreed", sa.Integer, nullable=False),
        sa.Column("recipient", sa.Text),
        sa.Column("recipient_chain", sa.Text, nullable=False, server_default=""),
        sa.Column("source", sa.Text),
        sa.Column("payment_id", sa.Text),
        sa.Column("expires_ms", BIG),
        sa.Column("lot_id", BIG),
        sa.Column("seen_at_ms", BIG, nullable=False),
        sa.Column("updated_at_ms", BIG, nullable=False),
        sa.CheckConstraint("value_units > 0", name=op.f("ck_inbound_value_units")),
        sa.CheckConstraint(
            "state <> 'minted' OR lot_id IS NOT NULL", name=op.f("ck_inbound_minted")
        ),
        sa.PrimaryKeyConstraint("network", "tx_hash", "n", name="pk_inbound"),
    )
    op.create_index(
        "ix_inbound_followed",
        "inbound",
        ["network", "block_number"],
        unique=False,
        sqlite_where=sa.text(FOLLOWED),
        postgresql_where=sa.text(FOLLOWED),
    )
    op.create_index("ix_inbound_lot_id", "inbound", ["lot_id"], unique=False)
    op.create_index("ix_inbound_payment_id", "inbound", ["payment_id"], unique=False)
    op.create_table(
        "watched",
        sa.Column("network", sa.Text, nullable=False),
        sa.Column("asset", sa.Text, nullable=False),
        sa.Column("pay_to", sa.Text, nullable=False),
        sa.Column("first_block", BIG, nullable=False),
        sa.Column("read_to", BIG, nullable=False),
        sa.Column("compared_to", BIG, nullable=False),
        sa.Column("at_ms", BIG, nullable=False),
        sa.PrimaryKeyConstraint("network", "asset", "pay_to", name="pk_watched"),
    )
    op.create_table(
        "lease",
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("holder", sa.Text, nullable=False),
        sa.Column("fence", BIG, nullable=False),
        sa.Column("until_ms", BIG, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_lease"),
    )


def downgrade() -> None:
    for table in ("lease", "watched", "inbound", "mint_policy"):
        op.drop_table(table)
