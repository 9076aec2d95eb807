"""Quotes and charges: the two questions every price rule answers.

Before the upstream is called: the most this request can cost, and why (``quote``). Afterwards:
what it did cost, and why (``charge``), which is never less than nothing and never more than was
quoted, whatever a rule or an upstream says. Amounts are units (micro-USD).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from gateway.money import MAX_UNITS

BEYOND: Final = "beyond what was held"


@dataclass(frozen=True, slots=True)
class Allowance:
    """What the payer's plan still gives: its tier, and what is left of each consumable."""

    tier: str
    left: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class PriceRequest:
    """What a rule may look at.

    ``path`` is decoded and below the route's mount. ``body`` is None when it has not been read:
    then a quote is for the dearest body. ``allowance`` None: the payer has no plan. ``now_s`` is
    the time it is about; ``since_s``, when the caller may last have read the price (None: now).
    """

    method: str
    path: bytes
    query: bytes | None
    content_type: bytes
    body: bytes | None
    allowance: Allowance | None = None
    now_s: int = 0
    since_s: int | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a breakdown: what for, how many of it at which rate, and how many units."""

    label: str
    units: int
    count: int | None = None
    rate: str = ""

    def shown(self) -> dict[str, Any]:
        """As JSON."""
        told: dict[str, Any] = {"for": self.label, "units": self.units}
        if self.count is not None:
            told["count"] = self.count
        if self.rate:
            told["rate"] = self.rate
        return told


@dataclass(frozen=True, slots=True)
class Usage:
    """What was used, by meter; or the amount an upstream stated.

    ``amount_units`` is set only on a route that lets its upstream say so, after the statement was
    found genuine (``Farebox-Amount`` with this request's random value).
    """

    counts: tuple[tuple[str, int], ...] = ()
    amount_units: int | None = None


@dataclass(frozen=True, slots=True)
class Reads:
    """What has to be read of an answer before it can be charged.

    ``places``: for each meter the places of an answer's JSON where its count may stand, the first
    that holds one wins. ``events``: the meter that each event of a stream counts one for, until
    the stream itself says better. ``meters``: every meter an upstream may state.
    """

    places: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...]
    meters: frozenset[str]
    events: str | None = None


class PriceRule(Protocol):
    """A price policy, compiled from the config. One value serves all requests of a route."""

    @property
    def name(self) -> str:
        """Its key in ``RULES``."""

    @property
    def version(self) -> str:
        """A digest of the terms: equal exactly when the price is the same."""

    @property
    def fixed_units(self) -> int | None:
        """The price if no request can change it, else None."""

    @property
    def needs_body(self) -> bool:
        """Whether ``quote`` must see the body."""

    @property
    def metered(self) -> bool:
        """Whether what an answer says can change the charge, for some request."""

    @property
    def reads(self) -> Reads | None:
        """What to read of the answer to a request that this rule itself quoted; None: nothing."""

    def quote(self, request: PriceRequest) -> Quote:
        """The most this request can cost. Raises ``Problem`` if it cannot be priced."""

    def charge(self, quote: Quote, usage: Usage | None) -> tuple[Line, ...]:
        """What this usage costs, no line below 0; None: nothing is known about it."""

    def so_far(self, counts: Mapping[str, int]) -> int:
        """What a call that still runs comes to, by what is known to have been used, in units: less
        than its charge may be, and without any maximum."""

    def describe(self) -> dict[str, Any]:
        """The terms as JSON, for price lists."""


@dataclass(frozen=True, slots=True)
class Quote:
    """The most one request can cost. The lines add up to ``max_units``."""

    max_units: int
    rule: PriceRule
    breakdown: tuple[Line, ...]
    price_version: str
    exact: bool = field(default=True)
    """Whether the call costs just this; else at most."""


@dataclass(frozen=True, slots=True)
class Charge:
    """What one request cost. The lines add up to ``units``; ``beyond``: more had been used."""

    units: int
    breakdown: tuple[Line, ...]
    beyond: bool = False


def quote(rule: PriceRule, request: PriceRequest) -> Quote:
    """The quote of ``rule`` for ``request``, checked.

    Raises ``Problem`` when the request cannot be priced, ``RuntimeError`` when the rule itself is
    wrong: an amount out of range, or lines that do not add up to it.
    """
    made = rule.quote(request)
    if not 0 <= made.max_units <= MAX_UNITS:
        raise RuntimeError(f"price rule {rule.name} quoted {made.max_units} units")
    if sum(line.units for line in made.breakdown) != made.max_units:
        raise RuntimeError(f"price rule {rule.name}: the breakdown is not the quote")
    return made


def charge(quoted: Quote, usage: Usage | None, held_units: int | None = None) -> Charge:
    """What the request cost: between 0 and what was quoted and held, always.

    More than that is cut, with a line that says so, because no more was agreed. ``held_units``:
    less may have been held than was quoted (an earlier offer held the price). A negative amount is
    a fault of the rule and raises ``RuntimeError``.
    """
    most = quoted.max_units if held_units is None else min(held_units, quoted.max_units)
    if usage is not None and usage.amount_units is not None:
        lines: tuple[Line, ...] = (Line("stated by the upstream", usage.amount_units),)
    else:
        lines = quoted.rule.charge(quoted, usage)
    if any(line.units < 0 for line in lines):
        raise RuntimeError(f"price rule {quoted.rule.name} charged less than nothing")
    units = sum(line.units for line in lines)
    if units <= most:
        return Charge(units, lines)
    return Charge(most, (*lines, Line(BEYOND, most - units)), beyond=True)
