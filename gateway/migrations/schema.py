"""The whole schema: imports every tables.py, so that ``metadata`` is complete."""

import gateway.accounts.tables
import gateway.ledger.tables
import gateway.payments.tables  # noqa: F401
from gateway.db import metadata

__all__ = ["metadata"]
