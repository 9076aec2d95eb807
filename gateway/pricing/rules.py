"""The table of price rules: how each is made from the config."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Final

from gateway.forms import Price
from gateway.pricing import by_params, metered, overage, scheduled
from gateway.pricing.flat import FREE, Flat
from gateway.pricing.quote import PriceRule


def _flat(price: Price) -> PriceRule:
    if price.options:
        raise ValueError("a flat price has no options")
    if price.units <= 0:
        raise ValueError('a flat price must be above zero: write "free" for a route without one')
    return Flat(price.units)


def _free(price: Price) -> PriceRule:
    if price.options or price.units:
        raise ValueError("a free route has no amount and no options")
    return Flat(0)


def _by_params(price: Price) -> PriceRule:
    return by_params.compile_by_params(price.options, compile_price)


def _metered(price: Price) -> PriceRule:
    return metered.compile_metered(price.options)


def _overage(price: Price) -> PriceRule:
    return overage.compile_overage(price.options)


def _scheduled(price: Price) -> PriceRule:
    return scheduled.compile_scheduled(price.options, compile_price)


RULES: Final[dict[str, Callable[[Price], PriceRule]]] = {
    FREE: _free,
    "flat": _flat,
    by_params.NAME: _by_params,
    metered.NAME: _metered,
    overage.NAME: _overage,
    scheduled.NAME: _scheduled,
}


def compile_price(price: Price) -> PriceRule:
    """The rule for a configured price. Raises ``ValueError`` with what is wrong with it."""
    make = RULES.get(price.rule)
    if make is None:
        near = get_close_matches(price.rule, RULES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(RULES)}"
        raise ValueError(f"there is no price rule {price.rule!r}{hint}")
    return make(price)
