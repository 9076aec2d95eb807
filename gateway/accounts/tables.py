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
)
