"""Serve an application in a thread of this process, on a port of its own."""

from __future__ import annotations

import socket
import threading
import time
from types import TracebackType
from typing import Any, Final, Self

START_S: Final = 20.0
STOP_S: Final = 10.0


class Served:
    """``with Served(app, "the sample API") as api: …`` serves ``app`` at ``api.url``.

    A thread of its own, so that callers may be synchronous or asynchronous. ``port`` 0: a free one.
    """

    def __init__(
        self, app: Any, name: str, *, host: str, port: int, lifespan: bool, http: str = "auto"
    ) -> None:
        import uvicorn

        self.url = ""
        self._name = name
        self._address = (host, port)
        self._thread: threading.Thread | None = None
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                loop="asyncio",
                http=http,
                ws="none",
                lifespan="on" if lifespan else "off",
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=1,
            )
        )

    def start(self) -> Self:
        """Listen and serve in a thread; returns when it answers. ``RuntimeError`` if it cannot."""
        listener = self.listen()
        self._thread = threading.Thread(
            target=self._server.run, args=([listener],), name=self._name, daemon=True
        )
        self._thread.start()
        deadline_s = time.monotonic() + START_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline_s:
                raise RuntimeError(f"{self._name} did not start")
            time.sleep(0.005)
        return self

    def stop(self) -> None:
        """Stop serving and wait until the thread has ended."""
        if self._thread is None:
            return
        self._server.should_exit = True
        self._thread.join(STOP_S)
        if self._thread.is_alive():
            raise RuntimeError(f"{self._name} did not stop")
        self._thread = None

    def serve(self) -> None:
        """Serve in this thread until interrupted."""
        self._server.run([self.listen()])

    def listen(self) -> socket.socket:
        """Take the port; from then on ``url`` is known."""
        listener = socket.create_server(self._address)
        host, port = listener.getsockname()[:2]
        self.url = f"http://{host}:{port}"
        return listener

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
