"""What is written off of a lot: the house bears it.

Only adds: a release before this one can still write to the tables it knows.
"""

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # As text: SQLite would have to copy the table to add a constraint in any other way.
    op.execute(
        "ALTER TABLE lot ADD COLUMN lost_units BIGINT DEFAULT '0' NOT NULL"
        " CONSTRAINT ck_lot_lost CHECK (lost_units >= 0 AND lost_units <= minted_units)"
    )
    op.create_index(
        "ix_lot_lost",
        "lot",
        ["payment_id"],
        unique=False,
        sqlite_where=sa.text("lost_units > 0"),
        postgresql_where=sa.text("lost_units > 0"),
    )


def downgrade() -> None:
    op.drop_index("ix_lot_lost", table_name="lot")
    if op.get_bind().dialect.name != "sqlite":
        op.execute("ALTER TABLE lot DROP CONSTRAINT ck_lot_lost")
    op.execute("ALTER TABLE lot DROP COLUMN lost_units")
