"""One quote that stands for several, for any usage: the least of them, or the dearest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gateway.pricing.quote import Line, PriceRequest, Quote, Reads, Usage

OR: Final = "|"
"""Between the versions of the prices."""


@dataclass(frozen=True, slots=True)
class _Several:
    """The rule of such a quote. ``choose`` is ``min`` or ``max``."""

    name: str
    choose: Callable[..., Any]
    quotes: tuple[Quote, ...]

    fixed_units = None
    needs_body = False

    @property
    def version(self) -> str:
        return OR.join(dict.fromkeys(quote.price_version for quote in self.quotes))

    @property
    def metered(self) -> bool:
        return any(quote.rule.metered for quote in self.quotes)

    @property
    def reads(self) -> Reads | None:
        return _both([quote.rule.reads for quote in self.quotes])

    def quote(self, request: PriceRequest) -> Quote:
        raise RuntimeError("this is the rule of one quote")

    def charge(self, quote: Quote, usage: Usage | None) -> tuple[Line, ...]:
        charged = [each.rule.charge(each, usage) for each in self.quotes]
        made: tuple[Line, ...] = self.choose(charged, key=_units)
        return made

    def so_far(self, counts: Mapping[str, int]) -> int:
        return int(self.choose(quote.rule.so_far(counts) for quote in self.quotes))

    def describe(self) -> dict[str, Any]:
        return {"rule": self.name, "of": [quote.rule.describe() for quote in self.quotes]}


def lowest(quotes: Sequence[Quote]) -> Quote:
    """The quote under which nobody pays more than under any of these, for any usage."""
    least = min(quotes, key=lambda each: each.max_units)
    if all(each.exact for each in quotes) or len({each.price_version for each in quotes}) == 1:
        return least
    rule = _Several("lowest", min, tuple(quotes))
    return Quote(least.max_units, rule, least.breakdown, rule.version, exact=False)


def dearest(quotes: Sequence[Quote]) -> Quote:
    """The quote under which nobody pays less than under any of these, for any usage."""
    most = max(quotes, key=lambda each: each.max_units)
    if len(quotes) == 1 or all(each.exact for each in quotes):
        return most
    rule = _Several("dearest", max, tuple(quotes))
    return Quote(most.max_units, rule, most.breakdown, rule.version, exact=False)


def _units(lines: Sequence[Line]) -> int:
    return sum(line.units for line in lines)


def _both(every: Sequence[Reads | None]) -> Reads | None:
    """Everything that any of them reads: each counts its own meters."""
    known = [reads for reads in every if reads is not None]
    if not known:
        return None
    places: dict[str, list[tuple[str, ...]]] = {}
    for reads in known:
        for meter, found in reads.places:
            places.setdefault(meter, []).extend(found)
    return Reads(
        tuple((meter, tuple(dict.fromkeys(found))) for meter, found in places.items()),
        frozenset().union(*(reads.meters for reads in known)),
        next((reads.events for reads in known if reads.events is not None), None),
    )
