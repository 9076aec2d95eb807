"""Everything the fake remembers: objects by kind and id, events, clock, faults, calls seen."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from gateway.demo.fakestripe.errors import missing

Object = dict[str, Any]

API_VERSION: Final = "2026-10-28.endive"

# object kind -> prefix of its ids, as at Stripe
PREFIXES: Final[dict[str, str]] = {
    "charge": "ch_",
    "checkout.session": "cs_test_",
    "customer": "cus_",
    "dispute": "du_",
    "event": "evt_",
    "payment_intent": "pi_",
    "payment_method": "pm_",
    "refund": "re_",
    "webhook_endpoint": "we_",
}


@dataclass(slots=True)
class Fault:
    """One planned misbehaviour of the API, used up by ``times`` calls.

    ``kind``: ``error_before`` (500, nothing done), ``error_after`` (done and kept under the
    idempotency key, but the caller sees 500), ``hold_before`` (waits before it does anything, the
    idempotency key is in use), ``hold_after`` (done, the answer waits). Held calls go on when
    released, or after a minute.
    """

    kind: str
    method: str
    path_prefix: str
    times: int


@dataclass(slots=True)
class State:
    """The whole memory of one fake. Only the server's own event loop touches it."""

    account: str = "acct_1FakeFarebox"
    base_url: str = ""
    clock: Callable[[], float] = time.time
    advanced_s: int = 0
    settle_bank_s: float | None = None
    tables: dict[str, dict[str, Object]] = field(
        default_factory=lambda: {kind: {} for kind in PREFIXES}
    )
    on_event: Callable[[Object], None] = lambda _event: None
    on_processing: Callable[[str], None] = lambda _payment_intent: None
    faults: list[Fault] = field(default_factory=list)
    calls: deque[Object] = field(default_factory=lambda: deque(maxlen=5000))
    request: Object | None = None  # the API call being served: id and idempotency key, for events

    def now_s(self) -> int:
        """Seconds since 1970 on the fake's own clock, which tests can move forward."""
        return int(self.clock()) + self.advanced_s

    def new(self, kind: str, values: Object) -> Object:
        """Store a new object with id, object, created and livemode."""
        made: Object = {
            "id": PREFIXES[kind] + secrets.token_hex(12),
            "object": kind,
            "created": self.now_s(),
            "livemode": False,
            **values,
        }
        self.tables[kind][made["id"]] = made
        return made

    def get(self, kind: str, object_id: str, param: str = "id") -> Object:
        """One object; ``StripeError`` 404 if there is none."""
        found = self.tables[kind].get(object_id)
        if found is None:
            raise missing(kind.replace("checkout.session", "checkout session"), object_id, param)
        return found

    def emit(self, event_type: str, about: Object) -> Object:
        """Record an event that holds ``about`` as it is now, and hand it to the deliverer."""
        event = self.new(
            "event",
            {
                "api_version": API_VERSION,
                "data": {"object": public(about)},
                "pending_webhooks": 0,
                "request": dict(self.request or {"id": None, "idempotency_key": None}),
                "type": event_type,
            },
        )
        self.on_event(event)
        return event

    def take_fault(self, method: str, path: str) -> str | None:
        """The kind of the first planned fault for this call, counted down; None without one."""
        for fault in self.faults:
            if fault.times > 0 and fault.method == method and path.startswith(fault.path_prefix):
                fault.times -= 1
                return fault.kind
        return None


def public(value: Any) -> Any:
    """A deep copy without the fake's own notes (members whose names begin with ``_``)."""
    if isinstance(value, dict):
        return {key: public(item) for key, item in value.items() if not key.startswith("_")}
    if isinstance(value, list):
        return [public(item) for item in value]
    return value
