"""Who owns which account."""

from __future__ import annotations

import sqlalchemy as sa

from gateway.db import Id, metadata

# A key's address is one wallet on every chain (chain = ""); a contract wallet is only itself on
# its own chain, because another chain may have another owner at the same address.
wallet = sa.Table(
    "wallet",
    metadata,
    sa.Column("address", sa.Text, primary_key=True),
    sa.Column("chain", sa.Text, primary_key=True),
    sa.Column("account_id", Id, nullable=False, index=True),
    sa.Column("linked_at_ms", sa.BigInteger(), nullable=False),
    # 1: it once allowed its weaker signatures (/api/external) to spend all its credits.
    sa.Column("external_all", sa.BigInteger, nullable=False, server_default="0"),
)

# What a bare payment may be given to spend the rest of its credits with (proofs, section 1).
credential = sa.Table(
    "credential",
    metadata,
    sa.Column("digest", sa.LargeBinary, primary_key=True),  # sha256 of it; it is kept nowhere
    sa.Column("payment_id", sa.Text, nullable=False),  # one for each payment, ever
    sa.Column("account_id", sa.BigInteger, nullable=False),
    sa.Column("lot_id", sa.BigInteger, nullable=False),  # it spends nothing else
    sa.Column("payer", sa.Text, nullable=False),  # whose money it was
    sa.Column("expires_ms", sa.BigInteger, nullable=False),
    sa.UniqueConstraint("payment_id"),
    sa.Index("ix_credential_expires_ms", "expires_ms"),
)

# One-time values of proofs that no hold has burnt, until long after nobody could show them again.
spent_proof = sa.Table(
    "spent_proof",
    metadata,
    sa.Column("scheme", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, primary_key=True),
    sa.Column("expires_ms", sa.BigInteger, nullable=False),
    sa.Index("ix_spent_proof_expires_ms", "expires_ms"),
)
