"""A call keeps the version of the price it was held at, and a version keeps its terms.

Only adds: a release before this one can still write to the tables it knows.
"""

import sqlalchemy as sa
from alembic import op

revision = "0021"
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
        sa.PrimaryKeyConstraint("version", name=op.f("pk_price_version")),
    )


def downgrade() -> None:
    op.drop_table("price_version")
    op.drop_column("hold", "price")
