"""What a call comes to, where that hangs on its answer: metered on its way to the caller.

    an answer in JSON        its usage, from the whole of it, up to 4 MiB
    a stream of events       its usage, from whichever events hold it, the last word counts
    Farebox-Usage, -Amount   the upstream's own word, on routes that take it, and nothing else there

Bodies are counted as they go by. Nothing that is odd is believed: it is counted (``observe``), and
the usage is as good as not known. No answer can cost more than was held. A stream of events that
comes to more while it runs is cut there.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Final

from gateway import observe
from gateway.fields import values
from gateway.ledger import breakdowns
from gateway.money import format_credits
from gateway.pricing import meters
from gateway.pricing.metered import BYTES
from gateway.pricing.quote import Charge, Quote, Reads, Usage, charge
from gateway.proxy import events, outcome
from gateway.proxy.outcome import UNCOMPRESSED
from gateway.proxy.upstream import Answer

METER: Final = b"farebox-meter"
JSON_BYTES: Final = 4 << 20
"""How much of an answer is kept to be read for its usage."""
PREFER: Final = b"cost-events"
"""In ``Farebox-Prefer``: tell what it costs so far, in events of the stream."""
TOLD_S: Final = 0.25
"""At most so often."""
_IN, _OUT = BYTES
_NOTHING: Final = Reads((), frozenset())

Fields = list[tuple[bytes, bytes]]


class Metering:
    """One call as it is metered. ``price`` is its quote, ``held_units`` what it may come to."""

    def __init__(self, price: Quote, held_units: int, per_usd: int, *, by_upstream: bool) -> None:
        self._price = price
        self._held_units = held_units
        self._per_usd = per_usd
        self._reads = price.rule.reads or _NOTHING
        self._token = secrets.token_urlsafe(16) if by_upstream else ""
        # The upstream's own word is the only one there; else what is read and counted.
        self._events = None if by_upstream else self._reads.events
        self._amount_units: int | None = None
        self._counts: dict[str, int] = {_IN: 0, _OUT: 0}
        self._wishes = b""
        self._odd = False
        self._scan: events.Scan | None = None
        self._kept: list[bytes] | None = None
        self._kept_bytes = 0
        self._asked_at_s: float | None = None
        self._shown_units = -1
        self.cut = False
        self.stream = False
        self._coded = False  # compressed, though asked not to: nothing of ours can stand in it

    def ours(self, sent_bytes: int, wishes: bytes) -> Fields:
        """The header fields for the upstream; ``sent_bytes``: the body that goes up with them,
        ``wishes``: the caller's ``Farebox-Prefer``."""
        self._counts[_IN] = sent_bytes
        self._wishes = wishes.lower()
        if not self._token:
            return [UNCOMPRESSED]
        return [UNCOMPRESSED, (METER, self._token.encode())]

    def begin(self, answer: Answer) -> None:
        """Look at the head of the answer."""
        said = [(name.lower(), value) for name, value in answer.headers]
        own = self._statement(values(said, b"farebox-usage"), values(said, b"farebox-amount"))
        if own is not None:
            self._amount_units = own.amount_units
            # Bodies are counted here, whatever is said of them.
            self._counts = {**dict(own.counts), _IN: self._counts[_IN]}
        self._counts[_OUT] = 0
        self.stream = outcome.streams(said)
        if self.stream:
            marks = () if self._token else meters.markers(self._reads)
            self._scan = events.Scan(marks, counting=self._events is not None)
            self._coded = outcome.coded(said)
            if PREFER in self._wishes and not self._coded:
                self._asked_at_s = 0.0
        elif self._reads.places and not self._token and _may_be_json(said):
            self._kept = []

    def _statement(self, usages: Sequence[bytes], amounts: Sequence[bytes]) -> Usage | None:
        if not self._token:
            if usages or amounts:
                observe.count("oddity", kind=meters.FOREIGN)
            return None
        try:
            said = meters.stated(usages, amounts, self._token, self._reads)
            if said is not None and charge(self._price, said, self._held_units).beyond:
                raise meters.OddStatement(meters.ABOVE)
        except meters.OddStatement as odd:
            observe.count("oddity", kind=odd.kind)
            return None
        return said

    @property
    def with_costs(self) -> bool:
        """Whether the caller is told within the stream what it costs."""
        return self._asked_at_s is not None

    def whole(self, body: bytes) -> None:
        """The answer in one piece."""
        self.passed(body)

    def message(self, value: dict[str, Any], length: int) -> None:
        """The answer as JSON that somebody has read already, in so many bytes that did not go by
        in pieces."""
        self._counts[_OUT] += length
        self._kept = None
        self._read(value)

    async def pieces(self, answer: Answer, first: bytes) -> AsyncGenerator[bytes, None]:
        """The answer's body as the caller may have it: ``first``, which has been read already, and
        what comes. Ends early where it comes to more than was held (``cut``)."""
        async with aclosing(answer.chunks()) as rest:
            piece = first or await anext(rest, b"")
            while piece:
                self.passed(piece)
                if self._scan is not None:
                    so_far = self._price.rule.so_far(self._used())
                    self.cut = so_far > self._held_units
                    if self.cut:
                        yield piece
                        return
                    if self._asked_at_s is not None and self._scan.between:
                        piece += self._running(so_far)
                yield piece
                piece = await anext(rest, b"")

    def passed(self, piece: bytes) -> None:
        """A piece of the answer's body goes by."""
        self._counts[_OUT] += len(piece)
        if self._scan is not None:
            for value in self._scan.feed(piece):
                self._read(value)
        elif self._kept is not None:
            self._kept_bytes += len(piece)
            if self._kept_bytes > JSON_BYTES:
                self._kept = None
            else:
                self._kept.append(piece)

    def _read_rest(self) -> None:
        """What is known only at the end. Of an answer that broke off it is nothing."""
        found = [] if self._scan is None else self._scan.rest()
        if self._kept is not None:
            whole = events.object_of(b"".join(self._kept))
            found = [] if whole is None else [whole]
            self._kept = None
        for value in found:
            self._read(value)

    def _read(self, value: dict[str, Any]) -> None:
        if self._token:
            return
        counts, odd = meters.counts_in(value, self._reads)
        self._counts.update(counts)
        self._odd = self._odd or odd

    def _used(self) -> dict[str, int]:
        """What is known to have been used so far."""
        if self._scan is None or self._events is None or self._events in self._counts:
            return self._counts
        return {**self._counts, self._events: self._scan.events}

    def _running(self, so_far: int) -> bytes:
        now_s = asyncio.get_running_loop().time()
        if so_far == self._shown_units or now_s - (self._asked_at_s or 0.0) < TOLD_S:
            return b""
        self._asked_at_s, self._shown_units = now_s, so_far
        return _event({**self._amount("so_far", so_far), **self._amount("held", self._held_units)})

    def _amount(self, name: str, units: int) -> dict[str, Any]:
        return {name: format_credits(units, self._per_usd), f"{name}_units": units}

    def charge(self) -> Charge:
        """What the call comes to, once its answer has ended. Asked once."""
        self._read_rest()
        if self._odd:
            observe.count("oddity", kind=meters.MALFORMED)
        usage = Usage(tuple(self._used().items()), self._amount_units)
        made = charge(self._price, usage, self._held_units)
        if made.beyond and not self.cut:
            observe.count("oddity", kind=meters.ABOVE)
        return made

    def lines_of(self, made: Charge) -> str:
        """A charge's breakdown as the ledger keeps it."""
        return breakdowns.text_of([line.shown() for line in made.breakdown])

    def farewell(self, request_id: str, charged_units: int, available_units: int | None) -> bytes:
        """The last events of a stream, once its charge is durable; empty where there are none.

        ``available_units`` None: the caller is not told (a credential).
        """
        said = b""
        if self.cut and not self._coded:
            words = (
                "The answer has used what was held for it and was cut here. What it costs is at "
                f"v1/requests/{request_id}."
            )
            told = {"error": {"code": "cut_at_hold", "message": words, "request_id": request_id}}
            # The event that had begun ends here, whatever it was.
            begun = self._scan is not None and not self._scan.between
            said += (b"\n\n" if begun else b"") + b"event: error\ndata: "
            said += json.dumps(told).encode() + b"\n\n"
        if self.with_costs:
            said += _event(
                {
                    "final": True,
                    "request_id": request_id,
                    "cut": self.cut,
                    **self._amount("charged", charged_units),
                    **({} if available_units is None else self._amount("balance", available_units)),
                }
            )
        return said


def _may_be_json(headers: Fields) -> bool:
    kinds = values(headers, b"content-type")
    return not kinds or any(b"json" in kind.lower() for kind in kinds)


def _event(told: dict[str, Any]) -> bytes:
    return b"event: farebox.cost\ndata: " + json.dumps(told).encode() + b"\n\n"
