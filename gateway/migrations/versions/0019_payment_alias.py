"""The identifiers that payments for credits came with.

Only adds: a release before this one can still write to the tables it knows.
"""

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "payment_alias",
        sa.Column("payer", sa.Text(), nullable=False),
        sa.Column("payer_chain", sa.Text(), nullable=False),
        sa.Column("alias", sa.Text(), nullable=False),
        sa.Column("payment_id", sa.Text(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.Column("at_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("payer", "payer_chain", "alias", name=op.f("pk_payment_alias")),
        sa.UniqueConstraint("payment_id", name=op.f("uq_payment_alias_payment_id")),
    )


def downgrade() -> None:
    op.drop_table("payment_alias")
