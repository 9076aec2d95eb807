"""Holds of certain lots only, credentials that spend one lot, and proofs that were used once.

Only adds: a release before this one can still write to the tables it knows.
"""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

BIG = sa.BigInteger()
ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "hold_limit",
        sa.Column("hold_id", ID, autoincrement=False, nullable=False),
        sa.Column("lot_id", BIG, nullable=True),
        sa.Column("source", sa.Text(), nullable=True),
        sa.Column("payer", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("hold_id", name=op.f("pk_hold_limit")),
    )
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER hold_limit_no_{verb.lower()} BEFORE {verb} ON hold_limit "
                "BEGIN SELECT RAISE(ABORT, 'hold_limit is append-only'); END"
            )
    else:
        op.execute(
            "CREATE TRIGGER hold_limit_append_only BEFORE UPDATE OR DELETE OR TRUNCATE "
            "ON hold_limit FOR EACH STATEMENT EXECUTE FUNCTION farebox_append_only()"
        )
    op.create_table(
        "credential",
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("payment_id", sa.Text(), nullable=False),
        sa.Column("account_id", BIG, nullable=False),
        sa.Column("lot_id", BIG, nullable=False),
        sa.Column("payer", sa.Text(), nullable=False),
        sa.Column("expires_ms", BIG, nullable=False),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_credential")),
        sa.UniqueConstraint("payment_id", name=op.f("uq_credential_payment_id")),
    )
    op.create_index(op.f("ix_credential_expires_ms"), "credential", ["expires_ms"])
    op.create_table(
        "spent_proof",
        sa.Column("scheme", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.Column("expires_ms", BIG, nullable=False),
        sa.PrimaryKeyConstraint("scheme", "value", name=op.f("pk_spent_proof")),
    )
    op.create_index(op.f("ix_spent_proof_expires_ms"), "spent_proof", ["expires_ms"])


def downgrade() -> None:
    for table in ("spent_proof", "credential", "hold_limit"):
        op.drop_table(table)
