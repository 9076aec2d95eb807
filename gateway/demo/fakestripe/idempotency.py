"""The table behind ``Idempotency-Key``: same key and parameters, same answer.

Source: Stripe API reference, "Idempotent requests". A key is kept for 24 hours; the stored answer
is the first one whether it succeeded or failed, unless the parameters failed validation; the same
key with other parameters is an ``idempotency_error`` 400; a key whose first request still runs is
a 409.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Final

from gateway.demo.fakestripe.errors import StripeError

KEEP_S: Final = 24 * 3600
MAX_KEYS: Final = 50_000


@dataclass(slots=True)
class Answer:
    """What was answered the first time."""

    status: int
    body: bytes
    request_id: str


@dataclass(slots=True)
class Entry:
    path: str
    fingerprint: bytes
    created_s: int
    answer: Answer | None = None


@dataclass(slots=True)
class Table:
    """Keys per API key. Bounded: the oldest keys go first."""

    entries: dict[tuple[str, str], Entry] = field(default_factory=dict)

    def begin(self, api_key: str, key: str, path: str, encoded: bytes, now_s: int) -> Answer | None:
        """Claim the key, or return the stored answer; ``StripeError`` on conflict."""
        if len(key) > 255:
            raise StripeError(
                400, "idempotency_error", "Idempotency keys have at most 255 characters."
            )
        self._forget(now_s)
        fingerprint = hashlib.sha256(encoded).digest()
        entry = self.entries.get((api_key, key))
        if entry is None:
            self.entries[(api_key, key)] = Entry(path, fingerprint, now_s)
            return None
        if entry.path != path:
            raise StripeError(
                400,
                "idempotency_error",
                "Keys for idempotent requests can only be used for the same endpoint they were "
                f"first used for ('{path}' vs '{entry.path}'). Try using a key other than '{key}' "
                "if you meant to execute a different request.",
            )
        if entry.fingerprint != fingerprint:
            raise StripeError(
                400,
                "idempotency_error",
                "Keys for idempotent requests can only be used with the same parameters they were "
                f"first used with. Try using a key other than '{key}' if you meant to execute a "
                "different request.",
            )
        if entry.answer is None:
            raise StripeError(
                409,
                "idempotency_error",
                "There is currently another in-progress request using this Idempotent Key (that "
                "probably means you submitted twice, and the other request is still going "
                f"through): {key}. Please try again later.",
                code="idempotency_key_in_use",
            )
        return entry.answer

    def finish(self, api_key: str, key: str, answer: Answer) -> None:
        """Keep the first answer (unless the key was forgotten meanwhile)."""
        entry = self.entries.get((api_key, key))
        if entry is not None:
            entry.answer = answer

    def drop(self, api_key: str, key: str) -> None:
        """Free a key whose request was refused before it began."""
        self.entries.pop((api_key, key), None)

    def _forget(self, now_s: int) -> None:
        while self.entries:
            oldest = next(iter(self.entries))
            entry = self.entries[oldest]
            if entry.created_s > now_s - KEEP_S and len(self.entries) < MAX_KEYS:
                return
            del self.entries[oldest]
