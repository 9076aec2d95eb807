"""What a charge was made of, where it was not simply the price.

Only adds: a release before this one can still write to the tables it knows.
"""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "breakdown",
        sa.Column("hold_id", ID, autoincrement=False, nullable=False),
        sa.Column("amount_units", sa.BigInteger(), nullable=False),
        sa.Column("lines", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("hold_id", name=op.f("pk_breakdown")),
    )
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER breakdown_no_{verb.lower()} BEFORE {verb} ON breakdown "
                "BEGIN SELECT RAISE(ABORT, 'breakdown is append-only'); END"
            )
    else:
        op.execute(
            "CREATE TRIGGER breakdown_append_only BEFORE UPDATE OR DELETE OR TRUNCATE "
            "ON breakdown FOR EACH STATEMENT EXECUTE FUNCTION farebox_append_only()"
        )


def downgrade() -> None:
    op.drop_table("breakdown")
