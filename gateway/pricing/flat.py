"""One price for every request of a route; nothing at all on a free one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from gateway.money import MAX_UNITS, format_usd
from gateway.pricing.quote import Line, PriceRequest, Quote, Usage

FREE: Final = "free"


@dataclass(frozen=True, slots=True)
class Flat:
    """A fixed price in units. 0 is the rule ``free``, which takes no hold at all."""

    fixed_units: int
    _quote: Quote = field(init=False, repr=False, compare=False)

    needs_body = False
    metered = False
    reads = None

    def __post_init__(self) -> None:
        if not 0 <= self.fixed_units <= MAX_UNITS:
            raise ValueError(f"a price must be between $0 and {format_usd(MAX_UNITS)}")
        lines = (Line("call", self.fixed_units),) if self.fixed_units else ()
        # The one quote of this rule, made once: it stands in the hot path.
        object.__setattr__(self, "_quote", Quote(self.fixed_units, self, lines, self.version))

    @property
    def name(self) -> str:
        return "flat" if self.fixed_units else FREE

    @property
    def version(self) -> str:
        return f"flat:{self.fixed_units}"

    def quote(self, request: PriceRequest) -> Quote:
        return self._quote

    def charge(self, quote: Quote, usage: Usage | None) -> tuple[Line, ...]:
        return self._quote.breakdown

    def so_far(self, counts: Mapping[str, int]) -> int:
        return 0

    def describe(self) -> dict[str, Any]:
        return {
            "rule": self.name,
            "price": format_usd(self.fixed_units),
            "price_units": self.fixed_units,
        }
