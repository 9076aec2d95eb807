"""A price by what was used: so much for each token, byte or sub-call, and for the call itself.

Before the call its stated maximum is held; afterwards what was used is charged, never more than the
maximum. What a request's ``model`` costs may stand in a table. Where the usage is not known, or not
all of it, the call costs ``when_unknown``, and never less than what is known of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import lcm
from typing import Any, Final

from gateway.errors import Problem
from gateway.money import MAX_UNITS, format_usd
from gateway.pricing import asked, options
from gateway.pricing.fitting import fit
from gateway.pricing.quote import Line, PriceRequest, Quote, Reads, Usage
from gateway.pricing.rates import METER, Rate, countable, lines_of, rates_of, shown
from gateway.pricing.several import dearest

NAME: Final = "metered"
EVERY: Final = "*"
BYTES: Final = ("bytes_in", "bytes_out")
"""Meters the gateway counts itself: the bodies of request and answer, as they went by."""
# Where the common APIs say it (OpenAI's chat completions and responses, Anthropic's messages).
PLACES: Final[dict[str, tuple[str, ...]]] = {
    "tokens_in": (
        "usage.prompt_tokens",
        "usage.input_tokens",
        "message.usage.input_tokens",
        "response.usage.input_tokens",
    ),
    "tokens_out": (
        "usage.completion_tokens",
        "usage.output_tokens",
        "message.usage.output_tokens",
        "response.usage.output_tokens",
    ),
    "sub_calls": ("usage.sub_calls",),
}
_TERMS: Final = ("max", "min", "fixed", "rates")
_OPTIONS: Final = (*_TERMS, "when_unknown", "usage", "events", "model", "models")


@dataclass(frozen=True, slots=True)
class Terms:
    """What one model costs: ``min`` is the least a success costs, ``max`` the most of any call."""

    model: str
    max_units: int
    min_units: int
    fixed_units: int
    unknown_units: int
    rates: tuple[tuple[str, Rate], ...]
    reads: Reads
    # The rates as whole numbers over one denominator: they are asked for with every event.
    _scale: int = field(init=False, repr=False, compare=False)
    _scaled: tuple[tuple[str, int], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        scale = lcm(*(rate.each.denominator for _, rate in self.rates))
        scaled = tuple((meter, int(rate.each * scale)) for meter, rate in self.rates)
        object.__setattr__(self, "_scale", scale)
        object.__setattr__(self, "_scaled", scaled)

    def shown(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "max": format_usd(self.max_units),
            "max_units": self.max_units,
            "min": format_usd(self.min_units),
            "min_units": self.min_units,
            "fixed": format_usd(self.fixed_units),
            "fixed_units": self.fixed_units,
            "rates": shown(self.rates),
            "when_unknown": format_usd(self.unknown_units),
            "when_unknown_units": self.unknown_units,
        }

    def so_far(self, counts: Mapping[str, int]) -> int:
        exact = 0
        for meter, each in self._scaled:
            exact += each * counts.get(meter, 0)
        return self.fixed_units - (-exact // self._scale)

    def lines(self, usage: Usage | None) -> tuple[Line, ...]:
        counts = {} if usage is None else dict(usage.counts)
        counted = [(m, counts[m], r) for m, r in self.rates if countable(counts.get(m))]
        lines = lines_of(self.fixed_units, counted)
        units = sum(line.units for line in lines)
        known = len(counted) == len(self.rates)
        least = self.min_units if known else self.unknown_units
        if units >= least:
            return lines
        label = "least a call costs" if known else "usage not known"
        return (*lines, Line(label, least - units))


@dataclass(frozen=True, slots=True)
class Metered:
    """The rule: one ``Terms`` for every call, or one for each model."""

    version: str
    model: tuple[str, ...]
    models: tuple[tuple[str, Terms], ...]

    name = NAME
    fixed_units = None
    metered = True

    @property
    def needs_body(self) -> bool:
        return bool(self.model)

    @property
    def reads(self) -> Reads:
        return self.models[0][1].reads

    def quote(self, request: PriceRequest) -> Quote:
        return dearest([self._quote(terms) for terms in self._may_be(request)])

    def charge(self, quote: Quote, usage: Usage | None) -> tuple[Line, ...]:
        raise RuntimeError("a metered quote charges by the terms it chose")

    def so_far(self, counts: Mapping[str, int]) -> int:
        return 0

    def describe(self) -> dict[str, Any]:
        most = max(terms.max_units for _, terms in self.models)
        told: dict[str, Any] = {
            "rule": NAME,
            "price": f"up to {format_usd(most)}",
            "max_units": most,
        }
        if not self.model:
            return {**told, **self.models[0][1].shown()}
        by_model = {name: terms.shown() for name, terms in self.models}
        return {**told, "model": ".".join(self.model), "models": by_model}

    def _quote(self, terms: Terms) -> Quote:
        label = f"at most, {terms.model}" if terms.model else "at most"
        lines = (Line(label, terms.max_units),)
        return Quote(terms.max_units, _Chosen(self, terms), lines, self.version, exact=False)

    def _may_be(self, request: PriceRequest) -> list[Terms]:
        """The terms of a request; several, if readers may differ about its model."""
        if not self.model:
            return [self.models[0][1]]
        if request.body is None:
            return [max((terms for _, terms in self.models), key=lambda terms: terms.max_units)]
        name = asked.member(asked.json_body(request.body, request.content_type), self.model)
        by_name = dict(self.models)
        every = by_name.pop(EVERY, None)
        if isinstance(name, str) and name in by_name:
            return [by_name[name]]
        found = [terms for each, terms in by_name.items() if fit(name, (each,))]
        if every is not None:
            found.append(every)
        if not found:
            raise Problem(
                "price_unknown",
                f"There is no price for this {'.'.join(self.model)}.",
                members={"known": [each for each, _ in self.models]},
            )
        return found


@dataclass(frozen=True, slots=True)
class _Chosen:
    """The rule of one quote: the terms that its request chose."""

    rule: Metered
    terms: Terms

    name = NAME
    fixed_units = None
    metered = True
    needs_body = False

    @property
    def version(self) -> str:
        return self.rule.version

    @property
    def reads(self) -> Reads:
        return self.terms.reads

    def quote(self, request: PriceRequest) -> Quote:
        return self.rule.quote(request)

    def charge(self, quote: Quote, usage: Usage | None) -> tuple[Line, ...]:
        return self.terms.lines(usage)

    def so_far(self, counts: Mapping[str, int]) -> int:
        return self.terms.so_far(counts)

    def describe(self) -> dict[str, Any]:
        return self.rule.describe()


def compile_metered(given: Mapping[str, Any]) -> Metered:
    """The rule for the options of a price. Raises ``ValueError``."""
    options.only(given, _OPTIONS)
    if "when_unknown" not in given:
        raise ValueError(
            'when_unknown is missing: what a call costs whose usage is not known, "min", "max" '
            "or an amount"
        )
    models = given.get("models")
    if models is None:
        if "model" in given:
            raise ValueError("model is where the name of a model stands: models is missing")
        made: tuple[tuple[str, Terms], ...] = ((EVERY, _terms(given, given, "")),)
        path: tuple[str, ...] = ()
    else:
        path = options.path(given.get("model", "model"), "model")
        made = _models(given, models)
    version = options.version(
        NAME,
        {
            "model": path,
            "models": [[name, terms.shown(), repr(terms.reads.places)] for name, terms in made],
            "events": given.get("events"),
        },
    )
    return Metered(version, path, made)


def _models(given: Mapping[str, Any], models: object) -> tuple[tuple[str, Terms], ...]:
    if not isinstance(models, dict) or not 1 <= len(models) <= 200:
        raise ValueError('models is a table such as { "small" = { rates = { … } }, "*" = { … } }')
    if len({asked.plain(name) for name in models}) != len(models):
        raise ValueError("models names one model twice")
    made = []
    for name, own in models.items():
        where = f"models.{name}"
        if not isinstance(own, dict):
            raise ValueError(f"{where} is a table such as {{ rates = {{ … }} }}")
        options.only(own, _TERMS, f"{where}.")
        merged = {**given, **own}
        try:
            made.append((name, _terms(given, merged, name)))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return tuple(made)


def _terms(every: Mapping[str, Any], given: Mapping[str, Any], model: str) -> Terms:
    """``every`` has what is the same for all models, ``given`` that and what this one says."""
    fixed_units = options.amount(given, "fixed", 0)
    max_units = options.amount(given, "max")
    min_units = options.amount(given, "min", fixed_units)
    rates = rates_of(given.get("rates", {}), "rates")
    if not 0 < max_units <= MAX_UNITS:
        raise ValueError("max is above zero: it is held before every call")
    if not fixed_units <= min_units <= max_units:
        raise ValueError("fixed, min and max do not stand in this order")
    if not rates:
        raise ValueError('rates is missing: a table such as { tokens_out = "$0.60 / 1M" }')
    unknown = given["when_unknown"]
    chosen = {"min": min_units, "max": max_units}
    unknown_units = (
        chosen[unknown] if unknown in ("min", "max") else options.amount(given, "when_unknown")
    )
    if not min_units <= unknown_units <= max_units:
        raise ValueError("when_unknown is not between min and max")
    reads = _reads(every, frozenset(meter for meter, _ in rates))
    return Terms(model, max_units, min_units, fixed_units, unknown_units, rates, reads)


def _reads(given: Mapping[str, Any], meters: frozenset[str]) -> Reads:
    """Where the usage of these meters stands in an answer."""
    own = given.get("usage", {})
    if not isinstance(own, dict):
        raise ValueError('usage is a table such as { tokens_in = "usage.prompt_tokens" }')
    for meter in own:
        if METER.fullmatch(meter) is None or meter in BYTES:
            raise ValueError(f"usage.{meter[:40]} is not a meter that an answer can state")
    places = []
    for meter in sorted(meters - set(BYTES)):
        stated = own.get(meter, PLACES.get(meter, ()))
        every = (stated,) if isinstance(stated, str) else stated
        if not isinstance(every, tuple | list):
            raise ValueError(f"usage.{meter} is a place in JSON, or a list of them")
        if not every and given.get("events") != meter:
            raise ValueError(f"usage.{meter} is missing: where in an answer its count stands")
        where = f"usage.{meter}"
        places.append((meter, tuple(options.path(place, where) for place in every)))
    events = given.get("events")
    if events is not None and (not isinstance(events, str) or METER.fullmatch(events) is None):
        raise ValueError("events is the meter that each event of a stream counts one for")
    return Reads(tuple(places), meters, events if events in meters else None)
