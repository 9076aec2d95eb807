"""Quotes and charges: the two questions every price rule answers.

Before the upstream is called: the most this request can cost, and why (``quote``). Afterwards:
what it did cost (``charge``), which is never less than nothing and never more than was quoted,
whatever a rule or an upstream says. Amounts are units (micro-USD).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from gateway.money import MAX_UNITS


@dataclass(frozen=True, slots=True)
class PriceRequest:
    """What a rule may look at. ``body`` is None when it has not been read."""

    method: str
    path: bytes
    query: bytes | None
    content_type: bytes
    body: bytes | None


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a breakdown: what for, and how many units."""

    label: str
    units: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What was used, by meter; or the amount an upstream stated.

    ``amount_units`` is set only on a route that lets its upstream say so, after the statement was
    found genuine (``Farebox-Amount`` with this request's random value).
    """

    counts: tuple[tuple[str, int], ...] = ()
    amount_units: int | None = None


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

    def quote(self, request: PriceRequest) -> Quote:
        """The most this request can cost. Raises ``Problem`` if it cannot be priced."""

    def charge(self, quote: Quote, usage: Usage | None) -> int:
        """Units for this usage; None: nothing is known about it."""

    def describe(self) -> dict[str, Any]:
        """The terms as JSON, for price lists."""


@dataclass(frozen=True, slots=True)
class Quote:
    """The most one request can cost. The lines add up to ``max_units``."""

    max_units: int
    rule: PriceRule
    breakdown: tuple[Line, ...]
    price_version: str


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


def charge(quoted: Quote, usage: Usage | None) -> int:
    """What the request cost: between 0 and ``quoted.max_units``, always.

    More than was quoted is cut to the quote, because that is what was held and what the caller
    agreed to. A negative amount is a fault of the rule and raises ``RuntimeError``.
    """
    if usage is not None and usage.amount_units is not None:
        units = usage.amount_units
    else:
        units = quoted.rule.charge(quoted, usage)
    if units < 0:
        raise RuntimeError(f"price rule {quoted.rule.name} charged {units} units")
    return min(units, quoted.max_units)
