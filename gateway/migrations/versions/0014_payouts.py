"""Credits that go back on chain to who had paid.

Only adds: a release before this one can still write to the tables it knows.
"""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0010"
branch_labels = None
depends_on = None

BIG = sa.BigInteger()
ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

LOT_COLUMNS = ("outgoing", "paid_out")
APPEND_ONLY = ("payout", "payout_end")


def _triggers() -> None:
    for table in APPEND_ONLY:
        if op.get_bind().dialect.name == "sqlite":
            for verb in ("UPDATE", "DELETE"):
                op.execute(
                    f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
                    f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
                )
        else:
            op.execute(
                f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE "
                f"ON {table} FOR EACH STATEMENT EXECUTE FUNCTION farebox_append_only()"
            )


def upgrade() -> None:
    for name in LOT_COLUMNS:
        # As text: SQLite would have to copy the table to add a constraint in any other way.
        op.execute(
            f"ALTER TABLE lot ADD COLUMN {name}_units BIGINT DEFAULT '0' NOT NULL"
            f" CONSTRAINT ck_lot_{name} CHECK"
            f" ({name}_units >= 0 AND {name}_units <= minted_units)"
        )
    op.create_table(
        "payout",
        sa.Column("id", ID, autoincrement=False, nullable=False),
        sa.Column("account_id", BIG, nullable=False),
        sa.Column("lot_id", BIG, nullable=False),
        sa.Column("ordinal", BIG, nullable=False),
        sa.Column("amount_units", BIG, nullable=False),
        sa.Column("payment_id", sa.Text(), nullable=False),
        sa.Column("at_ms", BIG, nullable=False),
        sa.CheckConstraint("amount_units > 0", name=op.f("ck_payout_amount_units")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_payout")),
        sa.UniqueConstraint("lot_id", "ordinal", name=op.f("uq_payout_lot_id_ordinal")),
        sa.UniqueConstraint("payment_id", name=op.f("uq_payout_payment_id")),
    )
    op.create_table(
        "payout_end",
        sa.Column("payout_id", ID, autoincrement=False, nullable=False),
        sa.Column("paid", sa.Integer(), nullable=False),
        sa.Column("transfer_id", BIG, nullable=False),
        sa.Column("at_ms", BIG, nullable=False),
        sa.PrimaryKeyConstraint("payout_id", name=op.f("pk_payout_end")),
        sa.UniqueConstraint("transfer_id", name=op.f("uq_payout_end_transfer_id")),
    )
    op.create_table(
        "payout_request",
        sa.Column("account_id", ID, autoincrement=False, nullable=False),
        sa.Column("principal", sa.Text(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.Column("payment_ids", sa.Text(), nullable=False),
        sa.Column("at_ms", BIG, nullable=False),
        sa.PrimaryKeyConstraint(
            "account_id", "principal", "request_id", name=op.f("pk_payout_request")
        ),
    )
    _triggers()


def downgrade() -> None:
    for table in ("payout_request", *reversed(APPEND_ONLY)):
        op.drop_table(table)
    for name in reversed(LOT_COLUMNS):
        if op.get_bind().dialect.name != "sqlite":
            op.execute(f"ALTER TABLE lot DROP CONSTRAINT ck_lot_{name}")
        op.execute(f"ALTER TABLE lot DROP COLUMN {name}_units")
