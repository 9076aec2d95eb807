"""New prices without a restart: the configuration is read again at a SIGHUP.

What is sold, for how much and where it comes from changes as a whole, between two requests; a
request that has begun goes on as it was quoted. Everything else (addresses, database, chains,
keys) needs a restart, and is said so if it was changed. A configuration with a fault changes
nothing. What was offered stays payable as it was offered.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Final

from gateway.check import judge
from gateway.config import ConfigError, load
from gateway.db import CommitUnknown, DatabaseUnavailable
from gateway.external import catalog
from gateway.node import Behind, Node
from gateway.observe import log
from gateway.proxy.client import parse_origin
from gateway.proxy.price_changes import open_routes
from gateway.settings import Settings, Upstream

SIGNAL: Final = signal.SIGHUP
CHANGES: Final = ("upstreams", "credits")
"""The sections that are taken over."""

Read = Callable[[], Settings]


def reader(settings: Settings) -> Read | None:
    """What reads the settings again; None: they came from no file."""
    source = settings.source
    return None if source is None else lambda: load(source, judge=judge)


def merged(old: Settings, read: Read) -> Settings | None:
    """The settings with what may change as it stands in the file now; None: it has a fault."""
    try:
        new = read()
    except (ConfigError, OSError) as error:
        log.error("the configuration was not read again, nothing changes: %s", error)
        return None
    kept = sorted(
        name
        for name in Settings.model_fields
        if name not in (*CHANGES, "source") and getattr(new, name) != getattr(old, name)
    )
    if kept:
        log.warning("changed in the configuration, and only in force after a restart: %s", kept)
    return old.model_copy(update={name: getattr(new, name) for name in CHANGES})


async def apply(node: Node, settings: Settings) -> None:
    """Put settings in force. Raises ``DatabaseUnavailable`` and ``CommitUnknown`` before anything
    has changed."""
    node.routes = await open_routes(node.db, settings)
    node.catalog = catalog.build(settings.upstreams, node.routes)
    # A request that was matched before may still ask for an upstream that is gone.
    node.upstreams = {**node.upstreams, **behind(settings.upstreams)}
    node.settings = node.rails.settings = settings
    if node.cards is not None:
        node.cards.settings = settings


def behind(upstreams: tuple[Upstream, ...]) -> dict[str, Behind]:
    """Upstreams as calls need them, by name."""
    return {
        upstream.name: Behind(
            upstream,
            parse_origin(upstream.url),
            tuple(
                (name.lower().encode(), secret.get_secret_value().encode())
                for name, secret in upstream.inject
            ),
        )
        for upstream in upstreams
    }


async def at_signals(node: Node, read: Read) -> None:
    """Read the settings again whenever the process is told to; for ever."""
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(SIGNAL, told.set)
    # It has waited since the start, so that none is lost.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (SIGNAL,))
    while True:
        await told.wait()
        told.clear()
        settings = await asyncio.to_thread(merged, node.settings, read)
        if settings is None:
            continue
        try:
            await apply(node, settings)
        except (DatabaseUnavailable, CommitUnknown) as error:
            log.error("the configuration was read again and is not in force: %s", error)
            continue
        log.info("the configuration was read again: %d routes", len(node.routes.routes))
