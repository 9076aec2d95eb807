"""Accounts on which something is due are found by an index. Spending does not touch it.

Only adds: a release before this one can still write to the tables it knows.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(
        "ix_account_expiring",
        "account",
        ["next_expiry_ms"],
        unique=False,
        sqlite_where=sa.text("next_expiry_ms < 4611686018427387904"),
        postgresql_where=sa.text("next_expiry_ms < 4611686018427387904"),
    )


def downgrade() -> None:
    op.drop_index("ix_account_expiring", table_name="account")
