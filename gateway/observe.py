"""What the process says about itself: one log, on stderr, set up once at the edge.

Log lines name payments, routes and request ids, never keys, signatures, payloads or bodies.
"""

from __future__ import annotations

import logging
from typing import Final

log: Final = logging.getLogger("farebox")


def set_up(level: str, *, process: bool = False) -> None:
    """One line an event on stderr, with ``process`` naming whose it is. Libraries speak from
    warnings upwards."""
    handler = logging.StreamHandler()
    whose = "%(name)s[%(process)d]" if process else "%(name)s"
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s %(levelname)-7s {whose} %(message)s", "%Y-%m-%dT%H:%M:%S")
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    log.setLevel(level.upper())
