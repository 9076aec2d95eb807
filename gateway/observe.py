"""What the process says about itself: one log, on stderr, set up once at the edge.

Log lines name payments, routes and request ids, never keys, signatures, payloads or bodies.
"""

from __future__ import annotations

import logging
from typing import Final

log: Final = logging.getLogger("farebox")


def set_up(level: str) -> None:
    """One line an event on stderr. Libraries speak from warnings upwards."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)-7s %(name)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    log.setLevel(level.upper())
