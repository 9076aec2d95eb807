"""Batches: a hash chain over holds and transfers, and the mark by which a commit is known.

Only adds, but a release before this one writes rows that stand in no batch, which
``farebox ledger verify`` reports: stop it before this one starts.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

BIG = sa.BigInteger()
ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _triggers() -> None:
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER batch_no_{verb.lower()} BEFORE {verb} ON batch "
                "BEGIN SELECT RAISE(ABORT, 'batch is append-only'); END"
            )
    else:
        op.execute(
            "CREATE TRIGGER batch_append_only BEFORE UPDATE OR DELETE OR TRUNCATE "
            "ON batch FOR EACH STATEMENT EXECUTE FUNCTION farebox_append_only()"
        )


def upgrade() -> None:
    op.create_table(
        "batch",
        sa.Column("writer", ID, autoincrement=False, nullable=False),
        sa.Column("n", BIG, autoincrement=False, nullable=False),
        sa.Column("first_id", BIG, nullable=False),
        sa.Column("end_id", BIG, nullable=False),
        sa.Column("closed", sa.LargeBinary(), nullable=False),
        sa.Column("at_ms", BIG, nullable=False),
        sa.Column("prev", sa.LargeBinary(), nullable=False),
        sa.Column("hash", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("writer", "n", name=op.f("pk_batch")),
        sqlite_with_rowid=False,
    )
    # What was written before there were batches stands in none.
    for table in ("hold", "transfer"):
        op.execute(
            f"INSERT INTO meta (key, value) SELECT 'unchained_{table}s',"  # noqa: S608
            f" CAST(count(*) AS TEXT) FROM {table}"
        )
    _triggers()


def downgrade() -> None:
    op.execute("DELETE FROM meta WHERE key IN ('unchained_holds', 'unchained_transfers')")
    op.drop_table("batch")
