"""Run the fake under uvicorn: in a thread of this process, or alone."""

from __future__ import annotations

import socket

from gateway.demo.fakestripe.app import build
from gateway.demo.fakestripe.state import State
from gateway.demo.served import Served


class FakeStripe(Served):
    """One fake Stripe. ``with FakeStripe() as fake: …`` runs it in a thread on a free port.

    Only its own loop touches ``state``; from outside use the API and ``/_fake/`` (``control.py``).
    ``url`` is for ``base_addresses={"api": url}``.
    ``settle_bank_s``: bank debits settle by themselves after so long; None: only on request.
    """

    def __init__(
        self, *, host: str = "127.0.0.1", port: int = 0, settle_bank_s: float | None = None
    ) -> None:
        self.state = State(settle_bank_s=settle_bank_s)
        self.app = build(self.state)
        super().__init__(
            self.app, "the local Stripe", host=host, port=port, lifespan=True, http="h11"
        )

    def listen(self) -> socket.socket:
        listener = super().listen()
        self.state.base_url = self.url
        return listener
