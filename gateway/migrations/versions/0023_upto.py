"""Calls whose payment permits a maximum and is settled after the work (x402 upto).

Only adds: a release before this one can still write to the tables it knows.
"""

import sqlalchemy as sa
from alembic import op

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None

_UNENDED = sa.text("state IN ('open', 'due', 'sent', 'unsettled')")


def upgrade() -> None:
    op.create_table(
        "upto_call",
        sa.Column("payment_id", sa.Text(), nullable=False),
        sa.Column("hold_id", sa.BigInteger(), nullable=False),
        sa.Column("network", sa.Text(), nullable=False),
        sa.Column("asset", sa.Text(), nullable=False),
        sa.Column("payer", sa.Text(), nullable=False),
        sa.Column("payer_chain", sa.Text(), nullable=False),
        sa.Column("pay_to", sa.Text(), nullable=False),
        sa.Column("nonce", sa.Text(), nullable=False),
        sa.Column("valid_before_s", sa.BigInteger(), nullable=False),
        sa.Column("most_units", sa.BigInteger(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("units", sa.BigInteger(), nullable=True),
        sa.Column("breakdown", sa.Text(), nullable=True),
        sa.Column("answer_status", sa.BigInteger(), nullable=True),
        sa.Column("answer_headers", sa.Text(), nullable=True),
        sa.Column("answer_body", sa.LargeBinary(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("at_ms", sa.BigInteger(), nullable=False),
        sa.Column("updated_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("look_ms", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "units IS NULL OR (units >= 0 AND units <= most_units)", name=op.f("ck_upto_call_units")
        ),
        sa.CheckConstraint(
            "state IN ('open', 'nothing') OR units > 0", name=op.f("ck_upto_call_state")
        ),
        sa.PrimaryKeyConstraint("payment_id", name=op.f("pk_upto_call")),
        sa.UniqueConstraint("hold_id", name=op.f("uq_upto_call_hold_id")),
    )
    op.create_index(
        "ix_upto_call_unended",
        "upto_call",
        ["payer", "payer_chain"],
        unique=True,
        sqlite_where=_UNENDED,
        postgresql_where=_UNENDED,
    )


def downgrade() -> None:
    op.drop_table("upto_call")
