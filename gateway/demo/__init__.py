"""Things for trying Farebox without the outside world: the walk, sample services, a local Stripe.

``farebox demo`` is ``main``: ``stage.py`` starts everything, ``walk.py`` is the list of steps,
``play.py`` runs them, ``show.py`` prints.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["main"]


def main(*, once: bool, as_json: bool, keep: Path | None) -> int:
    """The whole of ``farebox demo``; its exit code, 0 only if every step held.

    Raises ``DevnetError`` if the local chain is not installed or does not start, ``ConfigError``
    if ``keep`` holds another demo.
    """
    from gateway.demo.play import run

    return run(once=once, as_json=as_json, keep=keep)
