"""Refunds, disputes and reversals of lots, debt, and what operators do by hand.

Only adds: a release before this one can still write to the tables it knows.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

BIG = sa.BigInteger()
ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

LOT_COLUMNS = ("expired", "reversed", "short", "repaid")
APPEND_ONLY = ("refund", "refund_part", "operator_action")


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
    op.execute(
        "UPDATE lot SET expired_units = t.units FROM (SELECT ref, sum(amount_units) AS units"
        " FROM transfer WHERE kind = 'expire' GROUP BY ref) AS t WHERE t.ref = lot.id"
    )
    op.create_index(
        "ix_lot_repaid",
        "lot",
        ["account_id"],
        unique=False,
        sqlite_where=sa.text("repaid_units > 0"),
        postgresql_where=sa.text("repaid_units > 0"),
    )

    op.create_table(
        "refund",
        sa.Column("id", ID, autoincrement=False, nullable=False),
        sa.Column("account_id", BIG, nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("charge_id", BIG, nullable=False),
        sa.Column("asked_units", BIG, nullable=True),
        sa.Column("amount_units", BIG, nullable=False),
        sa.Column("at_ms", BIG, nullable=False),
        sa.CheckConstraint("amount_units > 0", name=op.f("ck_refund_amount_units")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_refund")),
        sa.UniqueConstraint("account_id", "key", name=op.f("uq_refund_account_id_key")),
    )
    op.create_index("ix_refund_charge_id", "refund", ["charge_id"], unique=False)
    op.create_table(
        "refund_part",
        sa.Column("refund_id", ID, autoincrement=False, nullable=False),
        sa.Column("lot_id", BIG, autoincrement=False, nullable=False),
        sa.Column("amount_units", BIG, nullable=False),
        sa.CheckConstraint("amount_units > 0", name=op.f("ck_refund_part_amount_units")),
        sa.PrimaryKeyConstraint("refund_id", "lot_id", name=op.f("pk_refund_part")),
    )
    op.create_index("ix_refund_part_lot_id", "refund_part", ["lot_id"], unique=False)
    op.create_table(
        "operator_action",
        sa.Column("id", ID, autoincrement=False, nullable=False),
        sa.Column("account_id", BIG, nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("ref", BIG, nullable=False),
        sa.Column("by", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("at_ms", BIG, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_operator_action")),
    )
    op.create_index(
        "ix_operator_action_account_id", "operator_action", ["account_id"], unique=False
    )
    _triggers()


def downgrade() -> None:
    for table in reversed(APPEND_ONLY):
        op.drop_table(table)
    op.drop_index("ix_lot_repaid", table_name="lot")
    for name in reversed(LOT_COLUMNS):
        if op.get_bind().dialect.name != "sqlite":
            op.execute(f"ALTER TABLE lot DROP CONSTRAINT ck_lot_{name}")
        op.execute(f"ALTER TABLE lot DROP COLUMN {name}_units")
