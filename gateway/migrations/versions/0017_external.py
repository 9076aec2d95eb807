"""Which door a payment came through, and whose weaker signatures may spend everything.

Only adds: a release before this one can still write to the tables it knows.
"""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("hold_limit", sa.Column("session", sa.Text(), nullable=True))
    op.create_index(
        "ix_hold_limit_session",
        "hold_limit",
        ["session"],
        unique=False,
        sqlite_where=sa.text("session IS NOT NULL"),
        postgresql_where=sa.text("session IS NOT NULL"),
    )
    op.add_column("payment", sa.Column("door", sa.Text(), server_default="", nullable=False))
    op.add_column(
        "wallet",
        sa.Column("external_all", sa.BigInteger(), server_default="0", nullable=False),
    )


def downgrade() -> None:
    op.drop_column("wallet", "external_all")
    op.drop_column("payment", "door")
    op.drop_index("ix_hold_limit_session", table_name="hold_limit")
    op.drop_column("hold_limit", "session")
