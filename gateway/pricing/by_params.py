"""A price by what is asked: cases of path, query and JSON body, of which the first that fits wins.

A case fits if everything it names is there (a subset match): the rest of the request does not
matter. What no case fits costs the stated default, or is refused. Each case's price is a price of
its own, also a metered one.

What is written otherwise than a case has it, so that some upstreams take it for the same and others
do not (``fitting``), costs the dearest of what it may be.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from gateway.errors import Problem
from gateway.forms import Price
from gateway.forms import price as read_price
from gateway.money import format_usd
from gateway.pricing import asked, options
from gateway.pricing.fitting import Fit, fit
from gateway.pricing.quote import Line, PriceRequest, PriceRule, Quote, Usage
from gateway.pricing.several import dearest

NAME: Final = "by_params"
REFUSE: Final = "refuse"
_CASE: Final = ("path", "query", "body", "price")
_NO_REQUEST: Final = PriceRequest("", b"", None, b"", None)

Make = Callable[[Price], PriceRule]


@dataclass(frozen=True, slots=True)
class Case:
    """One case. ``body``: places with the values that fit there, ``*`` for anything at all."""

    path: str
    query: tuple[tuple[str, tuple[Any, ...]], ...]
    body: tuple[tuple[tuple[str, ...], tuple[Any, ...]], ...]
    price: PriceRule

    def fit(self, request: PriceRequest, body: dict[str, Any] | None) -> Fit:
        found = _path_fit(self.path, request.path) if self.path else Fit.YES
        for name, fitting in self.query:
            if found is Fit.NO:
                return found
            found = min(found, fit(asked.query_value(request.query, name), fitting))
        for place, fitting in self.body:
            if found is Fit.NO:
                return found
            found = min(found, fit(asked.member(body or {}, place), fitting))
        return found

    def shown(self) -> dict[str, Any]:
        """As JSON."""
        told: dict[str, Any] = {"path": self.path} if self.path else {}
        if self.query:
            told["query"] = {name: _one(fitting) for name, fitting in self.query}
        if self.body:
            told["body"] = {".".join(place): _one(fitting) for place, fitting in self.body}
        return {**told, "price": self.price.describe()}


@dataclass(frozen=True, slots=True)
class ByParams:
    """The rule: cases in their order, and what all else costs (None: it is refused)."""

    cases: tuple[Case, ...]
    default: PriceRule | None
    version: str

    name = NAME
    fixed_units = None
    reads = None

    @property
    def needs_body(self) -> bool:
        return any(case.body for case in self.cases) or any(p.needs_body for p in self._prices)

    @property
    def metered(self) -> bool:
        return any(price.metered for price in self._prices)

    @property
    def _prices(self) -> tuple[PriceRule, ...]:
        own = tuple(case.price for case in self.cases)
        return own if self.default is None else (*own, self.default)

    def quote(self, request: PriceRequest) -> Quote:
        if request.body is None and self.needs_body:
            every = (price.quote(request) for price in self._prices)
            made = replace(max(every, key=lambda each: each.max_units), exact=False)
        else:
            made = dearest([price.quote(request) for price in self._may_be(request)])
        # The quote's own rule charges; what it is a version of is the whole table.
        return replace(made, price_version=self.version)

    def charge(self, quote: Quote, usage: Usage | None) -> tuple[Line, ...]:
        raise RuntimeError("a quote by parameters charges by the price it chose")

    def so_far(self, counts: Mapping[str, int]) -> int:
        return 0

    def describe(self) -> dict[str, Any]:
        least, most = self._span()
        told = {
            "rule": NAME,
            "price": f"{format_usd(least)} to {format_usd(most)}",
            "max_units": most,
            "cases": [case.shown() for case in self.cases],
        }
        return {**told, "default": REFUSE if self.default is None else self.default.describe()}

    def _span(self) -> tuple[int, int]:
        quotes = [price.quote(_NO_REQUEST).max_units for price in self._prices]
        return min(quotes), max(quotes)

    def _may_be(self, request: PriceRequest) -> list[PriceRule]:
        """The price of a request; several, if readers may differ about what it asks for."""
        body = None
        if request.body is not None and any(case.body for case in self.cases):
            body = asked.json_body(request.body, request.content_type)
        may_be: list[PriceRule] = []
        for case in self.cases:
            found = case.fit(request, body)
            if found is not Fit.NO:
                may_be.append(case.price)
            if found is Fit.YES:
                return may_be
        if self.default is None:
            raise Problem(
                "price_unknown",
                "There is no price for a request with these parameters.",
                members={"cases": [case.shown() for case in self.cases]},
            )
        return [*may_be, self.default]


def compile_by_params(given: Mapping[str, Any], make: Make) -> ByParams:
    """The rule for the options of a price. Raises ``ValueError``."""
    options.only(given, ("cases", "default"))
    cases = given.get("cases")
    if not isinstance(cases, list | tuple) or not 1 <= len(cases) <= 200:
        raise ValueError('cases is a list such as [{ body = { size = "large" }, price = "$0.05" }]')
    made = tuple(_case(case, f"cases[{i}]", make) for i, case in enumerate(cases))
    if "default" not in given:
        raise ValueError(f'default is missing: what all else costs, or "{REFUSE}"')
    default = given["default"]
    rule = None if default == REFUSE else _priced(default, "default", make)
    terms = [[case.shown(), case.price.version] for case in made]
    version = options.version(NAME, {"cases": terms, "default": rule and rule.version})
    return ByParams(made, rule, version)


def _case(given: object, where: str, make: Make) -> Case:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} is a table with a price")
    options.only(given, _CASE, f"{where}.")
    path = given.get("path", "")
    if path and (not isinstance(path, str) or not re.fullmatch(r"/[!-~]*", path)):
        raise ValueError(f'{where}.path is a path such as "/v1/images/*"')
    query = tuple(
        (name, _fitting(value, f"{where}.query.{name}", text=True))
        for name, value in _table(given.get("query", {}), f"{where}.query")
    )
    body = tuple(_places(given.get("body", {}), (), f"{where}.body"))
    if not (path or query or body):
        raise ValueError(f"{where} names nothing that could fit: path, query or body")
    return Case(path, query, body, _priced(given.get("price"), f"{where}.price", make))


def _priced(value: object, where: str, make: Make) -> PriceRule:
    try:
        price = read_price(value)
        if price.rule in ("free", NAME, "scheduled"):
            raise ValueError(
                "is an amount or a metered price here; what is free is a route, as is a schedule"
            )
        return make(price)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from None


def _table(value: object, where: str) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping) or len(value) > 50:
        raise ValueError(f"{where} is a table")
    return list(value.items())


def _places(value: object, above: tuple[str, ...], where: str) -> list[tuple[Any, Any]]:
    """A table of a body, with tables within it, as places."""
    found: list[tuple[Any, Any]] = []
    for name, inner in _table(value, where):
        place = (*above, name)
        if isinstance(inner, Mapping):
            if len(place) > 10 or not inner:
                raise ValueError(f"{where}.{name} is no value")
            found += _places(inner, place, f"{where}.{name}")
        else:
            found.append((place, _fitting(inner, f"{where}.{name}", text=False)))
    return found


def _fitting(value: object, where: str, *, text: bool) -> tuple[Any, ...]:
    every = value if isinstance(value, list | tuple) else (value,)
    for each in every:
        if not isinstance(each, str | int) or (text and isinstance(each, bool)):
            raise ValueError(f"{where} is a text, a whole number, a boolean or a list of them")
    if not every:
        raise ValueError(f"{where} names no value")
    return tuple(str(each) if text else each for each in every)


def _one(fitting: tuple[Any, ...]) -> Any:
    return fitting[0] if len(fitting) == 1 else list(fitting)


def _path_fit(pattern: str, path: bytes) -> Fit:
    """``[name]`` is one segment, ``*`` at the end all that follows. Case and a slash, dot
    or blank at the end do not count for sure, since many upstreams ignore them."""
    if _path(pattern).fullmatch(path):
        return Fit.YES
    folded = path.decode("utf-8", "replace").casefold().rstrip("/. ").encode()
    loosely = _path(pattern.rstrip("/. ").casefold()).fullmatch(folded)
    return Fit.PERHAPS if loosely else Fit.NO


def _path(pattern: str) -> re.Pattern[bytes]:
    # ``re`` keeps what it has compiled.
    parts = pattern.split("/")[1:]
    tail = parts[-1:] == ["*"]
    made = "".join(
        "/" + ("[^/]+" if re.fullmatch(r"\[[A-Za-z0-9_]+\]", part) else re.escape(part))
        for part in (parts[:-1] if tail else parts)
    )
    return re.compile((made + ("(?:/.*)?" if tail else "")).encode(), re.DOTALL)
