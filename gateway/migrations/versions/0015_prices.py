"""A call keeps the version of the price it was held at, and a version keeps its terms.

From a lot to the fact of the outside that made it there is a way back now.

Only adds: a release before this one can still write to the tables it knows.
"""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("hold", sa.Column("price", sa.Text(), nullable=True))
    op.create_table(
        "price_version",
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("terms", sa.Text(), nullable=False),
        sa.Column("since_ms", sa.BigInteger(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("version", name=op.f("pk_price_version")),
    )
    op.create_table(
        "route_price",
        sa.Column("route", sa.Text(), nullable=False),
        sa.Column("since_ms", sa.BigInteger(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("route", "since_ms", name=op.f("pk_route_price")),
    )
    op.create_index("ix_mint_key_lot_id", "mint_key", ["lot_id"], unique=False)


def downgrade() -> None:
    op.drop_index("ix_mint_key_lot_id", table_name="mint_key")
    op.drop_table("route_price")
    op.drop_table("price_version")
    op.drop_column("hold", "price")
