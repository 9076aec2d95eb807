"""One transaction settles many payments; chain nonces are counted in one row per gas account.

Only adds: a release before this one can still write to the tables it knows.
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

BIG = sa.BigInteger()


def upgrade() -> None:
    method = sa.Column("method", sa.Text(), nullable=False, server_default="eip3009")
    op.add_column("payment", method)
    op.add_column("payment", sa.Column("pay_to", sa.Text(), nullable=True))
    op.create_table(
        "gas_account",
        sa.Column("network", sa.Text(), nullable=False),
        sa.Column("sender", sa.Text(), nullable=False),
        sa.Column("next_nonce", BIG, nullable=False),
        sa.Column("tended_ms", BIG, nullable=False, server_default="0"),
        sa.Column("noted_ms", BIG, nullable=False, server_default="0"),
        sa.Column("stuck_ms", BIG, nullable=True),
        sa.Column("balance_gwei", BIG, nullable=True),
        sa.Column("need_gwei", BIG, nullable=True),
        sa.PrimaryKeyConstraint("network", "sender", name=op.f("pk_gas_account")),
    )
    op.execute(
        "INSERT INTO gas_account (network, sender, next_nonce)"
        " SELECT network, sender, max(nonce) + 1 FROM chain_nonce GROUP BY network, sender"
    )
    op.create_table(
        "chain_member",
        sa.Column("network", sa.Text(), nullable=False),
        sa.Column("sender", sa.Text(), nullable=False),
        sa.Column("nonce", BIG, autoincrement=False, nullable=False),
        sa.Column("payment_id", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), nullable=True),
        sa.Column("data", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint(
            "network", "sender", "nonce", "payment_id", name=op.f("pk_chain_member")
        ),
    )
    op.create_index("ix_chain_member_payment_id", "chain_member", ["payment_id"], unique=False)
    op.execute(
        "INSERT INTO chain_member (network, sender, nonce, payment_id)"
        " SELECT network, sender, nonce, payment_id FROM chain_nonce"
    )
    op.add_column("chain_nonce", sa.Column("at_ms", BIG, nullable=False, server_default="0"))
    op.add_column("chain_nonce", sa.Column("done_ms", BIG, nullable=True))
    op.add_column("chain_nonce", sa.Column("cost_gwei", BIG, nullable=False, server_default="0"))
    op.create_index("ix_chain_nonce_at_ms", "chain_nonce", ["network", "at_ms"], unique=False)
    op.create_index(
        "ix_chain_nonce_open",
        "chain_nonce",
        ["network", "sender", "nonce"],
        unique=False,
        sqlite_where=sa.text("done_ms IS NULL"),
        postgresql_where=sa.text("done_ms IS NULL"),
    )
    op.create_index("ix_chain_tx_nonce", "chain_tx", ["network", "sender", "nonce"], unique=False)
    op.create_index(
        "ix_payment_failed",
        "payment",
        ["payer", "updated_at_ms"],
        unique=False,
        sqlite_where=sa.text("state = 'failed'"),
        postgresql_where=sa.text("state = 'failed'"),
    )


def downgrade() -> None:
    op.drop_index("ix_payment_failed", table_name="payment")
    op.drop_index("ix_chain_tx_nonce", table_name="chain_tx")
    op.drop_index("ix_chain_nonce_open", table_name="chain_nonce")
    op.drop_index("ix_chain_nonce_at_ms", table_name="chain_nonce")
    for name in ("cost_gwei", "done_ms", "at_ms"):
        op.drop_column("chain_nonce", name)
    op.drop_table("chain_member")
    op.drop_table("gas_account")
    for name in ("pay_to", "method"):
        op.drop_column("payment", name)
