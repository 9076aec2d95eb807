"""The calls of a run are found by an index of their own.

Only adds: a release before this one can still write to the tables it knows.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(
        "ix_hold_run",
        "hold",
        ["account_id", "run", "id"],
        unique=False,
        sqlite_where=sa.text("run IS NOT NULL"),
        postgresql_where=sa.text("run IS NOT NULL"),
    )


def downgrade() -> None:
    op.drop_index("ix_hold_run", table_name="hold")
