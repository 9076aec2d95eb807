"""A consumable with an allowance: first what the payer's plan includes, the rest at a tier's rate.

The rule counts calls, or a meter that the answer states. It is pure: what a plan still gives comes
with the request (``PriceRequest.allowance``); who has no plan has no allowance, and the rate of the
tier ``*``. Before the call the most that it can use beyond the allowance is held.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from gateway.errors import Problem
from gateway.money import MAX_UNITS
from gateway.pricing import options
from gateway.pricing.metered import BYTES, EVERY, PLACES
from gateway.pricing.quote import Line, PriceRequest, Quote, Reads, Usage
from gateway.pricing.rates import MAX_COUNT, METER, Rate, countable, lines_of, rates_of, shown

NAME: Final = "overage"
CALLS: Final = "calls"


@dataclass(frozen=True, slots=True)
class Overage:
    """The rule. ``most`` is the largest count of one call, ``unknown`` what counts if the answer
    does not state it."""

    consumable: str
    meter: str
    most: int
    unknown: int
    tiers: tuple[tuple[str, Rate], ...]
    reads: Reads | None
    version: str

    name = NAME
    fixed_units = None
    needs_body = False

    @property
    def metered(self) -> bool:
        return self.reads is not None

    def quote(self, request: PriceRequest) -> Quote:
        plan = request.allowance
        by_tier = dict(self.tiers)
        rate = by_tier.get(EVERY if plan is None else plan.tier, by_tier.get(EVERY))
        if rate is None:
            raise Problem("price_unknown", f"There is no price of {self.consumable} for this plan.")
        left = 0 if plan is None else max(plan.left.get(self.consumable, 0), 0)
        bound = Bound(self, rate, left)
        lines = bound.lines(self.most)
        units = sum(line.units for line in lines)
        return Quote(units, bound, lines, self.version, exact=not self.metered)

    def charge(self, quote: Quote, usage: Usage | None) -> tuple[Line, ...]:
        raise RuntimeError("a quote with an allowance charges by what was left of it")

    def so_far(self, counts: Mapping[str, int]) -> int:
        return 0

    def describe(self) -> dict[str, Any]:
        return {
            "rule": NAME,
            "price": f"beyond the allowance {self.tiers[-1][1].text}",
            "consumable": self.consumable,
            "meter": self.meter,
            "most": self.most,
            "when_unknown": self.unknown,
            "tiers": shown(self.tiers),
        }


@dataclass(frozen=True, slots=True)
class Bound:
    """The rule of one quote: the rate of the payer's tier, and what was left to it then."""

    rule: Overage
    rate: Rate
    left: int

    name = NAME
    fixed_units = None
    needs_body = False

    @property
    def version(self) -> str:
        return self.rule.version

    @property
    def metered(self) -> bool:
        return self.rule.metered

    @property
    def reads(self) -> Reads | None:
        return self.rule.reads

    def quote(self, request: PriceRequest) -> Quote:
        return self.rule.quote(request)

    def charge(self, quote: Quote, usage: Usage | None) -> tuple[Line, ...]:
        counts = {} if usage is None else dict(usage.counts)
        stated = counts.get(self.rule.meter, -1)
        count = stated if countable(stated) else self.rule.unknown
        # A call is a call, whatever anybody says of it.
        return self.lines(1 if self.rule.reads is None else count)

    def so_far(self, counts: Mapping[str, int]) -> int:
        beyond = max(counts.get(self.rule.meter, 0) - self.left, 0)
        exact = self.rate.each * beyond
        return -(-exact.numerator // exact.denominator)

    def lines(self, count: int) -> tuple[Line, ...]:
        """So many of it, the allowance first."""
        free = min(count, self.left)
        included = (Line(f"{self.rule.consumable}, included", 0, free),) if free else ()
        beyond = ((f"{self.rule.consumable}, beyond", count - free, self.rate),)
        return (*included, *(lines_of(0, beyond) if count > free else ()))

    def describe(self) -> dict[str, Any]:
        return self.rule.describe()


def compile_overage(given: Mapping[str, Any]) -> Overage:
    """The rule for the options of a price. Raises ``ValueError``."""
    options.only(given, ("consumable", "meter", "most", "when_unknown", "tiers", "usage"))
    consumable = given.get("consumable")
    if not isinstance(consumable, str) or METER.fullmatch(consumable) is None:
        raise ValueError('consumable is a name such as "messages"')
    tiers = rates_of(_star_last(given.get("tiers")), "tiers", every=EVERY)
    meter = given.get("meter", CALLS)
    reads, most, unknown = None, 1, 1
    if meter == CALLS:
        for name in ("most", "when_unknown", "usage"):
            if name in given:
                raise ValueError(f"{name} is for a meter: a call counts one")
    else:
        reads = _reads(meter, given.get("usage"))
        most, unknown = _count(given, "most"), _count(given, "when_unknown")
        if not 0 <= unknown <= most:
            raise ValueError("when_unknown is not between 0 and most")
    version = options.version(
        NAME, {**given, "tiers": shown(tiers), "usage": given.get("usage", ())}
    )
    made = Overage(consumable, str(meter), most, unknown, tiers, reads, version)
    if any(rate.each * most > MAX_UNITS for _, rate in tiers):
        raise ValueError("most costs more than any amount can be")
    return made


def _star_last(tiers: object) -> object:
    """The tiers with ``*``, the rate of all others, at the end."""
    if not isinstance(tiers, Mapping) or not tiers:
        raise ValueError('tiers is a table of rates by tier, such as { "*" = "$0.002 per call" }')
    return dict(sorted(tiers.items(), key=lambda item: item[0] == EVERY))


def _count(given: Mapping[str, Any], name: str) -> int:
    value = given.get(name)
    if not isinstance(value, int) or not countable(value):
        raise ValueError(f"{name} is missing: a whole number up to {MAX_COUNT}")
    return value


def _reads(meter: object, places: object) -> Reads:
    if not isinstance(meter, str) or METER.fullmatch(meter) is None:
        raise ValueError('meter is "calls" or a name such as "tokens_out"')
    if meter in BYTES:
        return Reads((), frozenset((meter,)))
    stated = places if places is not None else PLACES.get(meter, ())
    every = (stated,) if isinstance(stated, str) else stated
    if not isinstance(every, tuple | list) or not every:
        raise ValueError("usage is missing: the place in an answer's JSON where the count stands")
    return Reads(
        ((meter, tuple(options.path(place, "usage") for place in every)),), frozenset((meter,))
    )
