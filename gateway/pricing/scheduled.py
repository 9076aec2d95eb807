"""Prices that follow one another at stated times, and what is owed to who saw the one before.

A price list, a 402 and a quote say what holds now. A signed call without a ceiling was perhaps
made after reading them some time ago, so it is charged the lowest of the prices that were in force
since then (``PriceRequest.since_s``): nobody pays more than they saw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from gateway.forms import Price
from gateway.forms import price as read_price
from gateway.pricing import options, several
from gateway.pricing.quote import Line, PriceRequest, PriceRule, Quote, Usage

NAME: Final = "scheduled"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

Make = Callable[[Price], PriceRule]


@dataclass(frozen=True, slots=True)
class Step:
    """A price, and the second from which it holds (0 for the first)."""

    from_s: int
    price: PriceRule

    def shown(self) -> dict[str, Any]:
        """As JSON."""
        told: dict[str, Any] = {"price": self.price.describe()}
        if self.from_s:
            at = _EPOCH + timedelta(seconds=self.from_s)
            told = {"from": at.isoformat().replace("+00:00", "Z"), **told}
        return told


@dataclass(frozen=True, slots=True)
class Scheduled:
    """The rule: prices by the time from which they hold, in that order."""

    steps: tuple[Step, ...]
    version: str

    name = NAME
    fixed_units = None
    reads = None

    @property
    def needs_body(self) -> bool:
        return any(step.price.needs_body for step in self.steps)

    @property
    def metered(self) -> bool:
        return any(step.price.metered for step in self.steps)

    def at(self, now_s: int) -> PriceRule:
        """The price that holds at a time."""
        return self._during(now_s, now_s)[0]

    def quote(self, request: PriceRequest) -> Quote:
        since_s = request.now_s if request.since_s is None else request.since_s
        made = [each.quote(request) for each in self._during(since_s, request.now_s)]
        return several.lowest(made)

    def charge(self, quote: Quote, usage: Usage | None) -> tuple[Line, ...]:
        raise RuntimeError("a scheduled quote charges by the price it chose")

    def so_far(self, counts: Mapping[str, int]) -> int:
        return 0

    def describe(self) -> dict[str, Any]:
        terms = [step.price.describe() for step in self.steps]
        return {
            "rule": NAME,
            "price": terms[0].get("price", terms[0]["rule"]),
            "prices": [step.shown() for step in self.steps],
        }

    def _during(self, since_s: int, now_s: int) -> list[PriceRule]:
        """The prices in force at any moment of a stretch, the newest first."""
        found = []
        for step in reversed(self.steps):
            if step.from_s <= now_s:
                found.append(step.price)
                if step.from_s <= since_s:
                    break
        return found or [self.steps[0].price]


def in_force(rule: PriceRule, now_s: int) -> PriceRule:
    """Of a schedule the price that holds at a time: what a list shows, and a quote is of."""
    return rule.at(now_s) if isinstance(rule, Scheduled) else rule


def after(before: PriceRule, since_s: int, now: PriceRule) -> Scheduled:
    """A price that was changed without notice: ``before`` held until ``since_s``."""
    first = before.steps if isinstance(before, Scheduled) else (Step(0, before),)
    then = now.steps if isinstance(now, Scheduled) else (Step(0, now),)
    began = [step for step in first if step.from_s < since_s]
    # What was to hold by now of the new one holds from the change on.
    held = [step for step in then if step.from_s <= since_s][-1:]
    steps = (*began, *(Step(since_s, step.price) for step in held))
    return _made((*steps, *(step for step in then if step.from_s > since_s)))


def forms(price: Price) -> list[Price]:
    """The prices within a configured one, as they are configured; none if it has none."""
    if price.rule != NAME:
        return []
    return [read_price(each["price"]) for each in price.options["prices"]]


def compile_scheduled(given: Mapping[str, Any], make: Make) -> Scheduled:
    """The rule for the options of a price. Raises ``ValueError``."""
    options.only(given, ("prices",))
    prices = given.get("prices")
    if not isinstance(prices, list | tuple) or not 2 <= len(prices) <= 100:
        raise ValueError(
            'prices is a list such as [{ price = "$0.02" }, '
            '{ from = "2027-01-01T00:00:00Z", price = "$0.03" }]'
        )
    return _made(tuple(_step(each, i, make) for i, each in enumerate(prices)))


def _made(steps: tuple[Step, ...]) -> Scheduled:
    times = [step.from_s for step in steps]
    if times != sorted(set(times)):
        raise ValueError("prices stand in the order of their times, each later than the one before")
    terms = [[step.from_s, step.price.version] for step in steps]
    return Scheduled(steps, options.version(NAME, {"prices": terms}))


def _step(given: object, i: int, make: Make) -> Step:
    where = f"prices[{i}]"
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} is a table with a price")
    options.only(given, ("from", "price"), f"{where}.")
    if i == 0 and "from" in given:
        raise ValueError(f"{where}.from: the first price holds until the second one does")
    from_s = _time(given.get("from"), f"{where}.from") if i else 0
    try:
        price = read_price(given.get("price"))
        if price.rule in ("free", NAME):
            raise ValueError("is an amount, or a price with a rule of its own")
        return Step(from_s, make(price))
    except ValueError as error:
        raise ValueError(f"{where}.price {error}") from None


def _time(value: object, where: str) -> int:
    """Seconds since 1970. A time without an offset means another one on each machine."""
    at = value if isinstance(value, datetime) else None
    if isinstance(value, str):
        try:
            at = datetime.fromisoformat(value)
        except ValueError:
            at = None
    if at is None or at.tzinfo is None or at <= _EPOCH or at.microsecond:
        raise ValueError(f'{where} is a time in whole seconds such as "2027-01-01T00:00:00Z"')
    return (at - _EPOCH) // timedelta(seconds=1)
