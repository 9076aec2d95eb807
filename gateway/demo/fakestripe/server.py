"""Run the fake under uvicorn: in a thread of this process, or alone."""

from __future__ import annotations

import socket
import threading
import time
from types import TracebackType
from typing import Final

from gateway.demo.fakestripe.app import build
from gateway.demo.fakestripe.state import State

START_S: Final = 20.0
STOP_S: Final = 10.0


class FakeStripe:
    """One fake Stripe. ``with FakeStripe() as fake: …`` runs it in a thread on a free port.

    A thread of its own, so that callers may be synchronous or asynchronous. Only its own loop
    touches ``state``; from outside use the API and ``/_fake/`` (``control.py``).
    ``settle_bank_s``: bank debits settle by themselves after so long; None: only on request.
    """

    def __init__(
        self, *, host: str = "127.0.0.1", port: int = 0, settle_bank_s: float | None = None
    ) -> None:
        import uvicorn

        self.state = State(settle_bank_s=settle_bank_s)
        self.app = build(self.state)
        self._address = (host, port)
        self._server = uvicorn.Server(
            uvicorn.Config(
                self.app,
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="on",
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=1,
            )
        )
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where it listens, for ``base_addresses={"api": url}``. Known once started."""
        return self.state.base_url

    def start(self) -> FakeStripe:
        """Listen and serve in a thread; returns when it answers. ``RuntimeError`` if it cannot."""
        listener = self._listen()
        self._thread = threading.Thread(
            target=self._server.run, args=([listener],), name="fakestripe", daemon=True
        )
        self._thread.start()
        deadline = time.monotonic() + START_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the local Stripe did not start")
            time.sleep(0.005)
        return self

    def stop(self) -> None:
        """Stop serving and wait until the thread has ended."""
        if self._thread is None:
            return
        self._server.should_exit = True
        self._thread.join(STOP_S)
        if self._thread.is_alive():
            raise RuntimeError("the local Stripe did not stop")
        self._thread = None

    def serve(self) -> None:
        """Serve in this thread until interrupted."""
        self._server.run([self._listen()])

    def _listen(self) -> socket.socket:
        listener = socket.create_server(self._address)
        host, port = listener.getsockname()[:2]
        self.state.base_url = f"http://{host}:{port}"
        return listener

    def __enter__(self) -> FakeStripe:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
