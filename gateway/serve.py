"""``farebox serve``: the process that listens, or the parent of several (``workers.py``)."""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Final

from gateway import admin, reload, work
from gateway.app import build, closing, open_node
from gateway.forms import Listen
from gateway.node import Node
from gateway.observe import log, set_up
from gateway.payments import in_hand, worth
from gateway.proxy import leases
from gateway.settings import Server, Settings

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

_BACKLOG: Final = 2_048


def serve(settings: Settings, *, as_json: bool = False) -> None:
    """Until it is told to stop. Raises ``OSError`` if the port is in use."""
    set_up(settings.server.log_level)
    with _admin(settings.server) as door:
        if settings.server.workers > 1:
            from gateway import workers

            workers.run(settings, door, lambda: announce(settings, door, as_json=as_json))
            return
        if settings.source is not None:
            # One that comes before it can be heard waits, as in workers, and does not end us.
            signal.pthread_sigmask(signal.SIG_BLOCK, (reload.SIGNAL,))
        # Taken before anything else, so that a second gateway says so at once. And whoever reads
        # that we are ready may connect at once: the kernel keeps it until we accept.
        sock = bind(settings.server.listen)
        sock.listen(_BACKLOG)
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(_alone(settings, sock, door, as_json=as_json))


@contextmanager
def _admin(server: Server) -> Iterator[socket.socket | None]:
    """A socket at ``server.admin_listen`` that takes connections; None without one.

    Of several workers the first answers there; the parent keeps the socket while that one is
    started again. Raises ``OSError`` if an address that was asked for is in use; the default one
    is done without.
    """
    door = None
    if server.admin_listen is not None:
        try:
            door = bind(server.admin_listen)
        except OSError as error:
            if "admin_listen" in server.model_fields_set:
                raise
            log.warning("no metrics: %s; set server.admin_listen", error)
    with door or nullcontext():
        if door is not None:
            door.listen(_BACKLOG)
        yield door


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop is part of the dependencies where it exists; Windows has only asyncio's own loop."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def bind(listen: Listen, *, port: int | None = None, shared: bool = False) -> socket.socket:
    """A socket at an address. ``shared``: others of ours may take the same port. Raises ``OSError``
    that names it as its ``filename``."""
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((listen.host, listen.port if port is None else port))
    except OSError as error:
        sock.close()
        error.filename = str(listen)
        raise
    return sock


async def _alone(
    settings: Settings, sock: socket.socket, door: socket.socket | None, *, as_json: bool
) -> None:
    node = await open_node(settings)
    async with closing(node):
        server = uvicorn_server(node, build(node))
        _stop_on_signals(server)
        announce(settings, door, as_json=as_json)
        await run(node, server, sock, door, again=reload.reader(settings))


async def as_worker(
    settings: Settings, port: int, orders: Orders, door: socket.socket | None, *, first: bool
) -> None:
    """One of several processes: with its own writer, pools, loop and socket.

    The socket exists only while this process can accept: with SO_REUSEPORT the kernel shares new
    connections out among the sockets that listen, and those of a dead process are gone.
    """
    node = await open_node(settings)
    async with closing(node):
        server = uvicorn_server(node, build(node))
        orders.obey(server)
        sock = bind(settings.server.listen, port=port, shared=True)
        sock.listen(_BACKLOG)
        orders.ready()
        await run(node, server, sock, door, audits=first, again=reload.reader(settings))


class Orders:
    """How a worker and its parent talk: SIGTERM, and two pipes."""

    def __init__(self, status: int, lifeline: int) -> None:
        self._status = status
        self._lifeline = lifeline

    def ready(self) -> None:
        """Tell the parent that requests are taken."""
        self.say({"ready": True})

    def say(self, what: object) -> None:
        """Tell the parent something, on one line."""
        import os

        os.write(self._status, json.dumps(what).encode() + b"\n")

    def obey(self, server: uvicorn.Server) -> None:
        """Stop at a SIGTERM, at once at a second one; and when the parent is gone."""
        server.capture_signals = nullcontext  # type: ignore[assignment, method-assign]  # see below
        loop = asyncio.get_running_loop()

        def stop() -> None:
            server.handle_exit(signal.SIGINT if server.should_exit else signal.SIGTERM, None)

        def orphaned() -> None:
            loop.remove_reader(self._lifeline)
            log.warning("the parent process is gone: stopping")
            stop()

        loop.add_signal_handler(signal.SIGTERM, stop)
        loop.add_reader(self._lifeline, orphaned)


def uvicorn_server(node: Node, app: ASGIApp) -> uvicorn.Server:
    """The HTTP server for an application of an open node."""
    import uvicorn

    from gateway.proxy import wire

    config = uvicorn.Config(
        app,
        http=wire.protocol(),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=True,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=node.settings.server.stop_s,
    )
    return uvicorn.Server(config)


async def run(
    node: Node,
    server: uvicorn.Server,
    sock: socket.socket,
    door: socket.socket | None = None,
    *,
    audits: bool = True,
    again: reload.Read | None = None,
) -> None:
    """Serve until the server is told to stop; on ``door`` what is for the operator alone. ``again``
    reads the settings at a SIGHUP."""
    _settle_memory()
    tasks = [
        asyncio.create_task(leases.renewing(node)),
        asyncio.create_task(in_hand.renewing(node.rails, node.stopping)),
        asyncio.create_task(worth.following(node.rails, node.stopping)),
    ]
    if again is not None:
        tasks.append(asyncio.create_task(reload.at_signals(node, again)))
    if node.settings.server.work:
        tasks.append(asyncio.create_task(work.loop(node, audits=audits)))
    try:
        async with _beside(node, door):
            await server.serve(sockets=[sock])
    finally:
        node.stopping.set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def _beside(node: Node, door: socket.socket | None) -> AsyncIterator[None]:
    """The second listener, from before the first one serves until it has stopped."""
    if door is None:
        yield
        return
    server = uvicorn_server(node, admin.build(node))
    server.capture_signals = nullcontext  # type: ignore[assignment, method-assign]  # the first's
    serving = asyncio.create_task(server.serve(sockets=[door]))
    try:
        yield
    finally:
        server.should_exit = True
        await asyncio.gather(serving, return_exceptions=True)


def _settle_memory() -> None:
    """Take what the start left behind out of the collector's sight, and let it look less often.

    Nearly all that a request makes is freed by its last reference. What the collector walks
    instead are the caches, a hundred thousand rows at a time, in the middle of somebody's request.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)
    # A commit or checkpoint that is done in a thread waits so long for its turn to say so.
    sys.setswitchinterval(0.0005)


def _stop_on_signals(server: uvicorn.Server) -> None:
    """SIGTERM and SIGINT end the serving, a second SIGINT at once; the rest is ours to close.

    uvicorn's own way raises the signal again when it has stopped serving, which would end the
    process before the ledger's writer has finished and the connections are closed.
    """
    server.capture_signals = nullcontext  # type: ignore[assignment, method-assign]  # as said
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, server.handle_exit, number, None)


def announce(settings: Settings, door: socket.socket | None = None, *, as_json: bool) -> None:
    """One line that says it is there; for programs as JSON."""
    url = settings.server.public_url
    if as_json:
        told = {"ready": True, "url": url, "listen": str(settings.server.listen)}
        if door is not None:
            host, port, *_ = door.getsockname()
            told["admin"] = str(Listen(host, port))
        print(json.dumps(told), flush=True)  # noqa: T201  (the command's own output)
    else:
        log.info("Farebox is at %s", url)
