"""What so many of something cost, exactly: rates as fractions, and lines that add up.

A rate such as $0.15 for a million tokens is less than a unit for one, so costs are summed as
fractions and rounded once, up: against the payer, by less than one unit a call. A line is what the
rounded sum rises by when it is added, so the lines add up to the charge.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

from gateway.money import parse_usd
from gateway.pricing.quote import Line

# More than anything that can be counted in one call; a charge of so many of the dearest is still
# a number that can be handled, and far above every maximum.
MAX_COUNT: Final = 10**15
METER: Final = re.compile(r"[a-z][a-z0-9_]{0,39}")
_RATE: Final = re.compile(
    r"(\$[0-9.]{1,20}) ?(?:/|per) ?([1-9][0-9]{0,14})?"
    r" ?(K|M|B|KB|MB|GB|KiB|MiB|GiB)?( ?[a-z]{2,20})?"
)
_PER: Final = {
    "K": 10**3,
    "M": 10**6,
    "B": 10**9,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
}


@dataclass(frozen=True, slots=True)
class Rate:
    """So many units for each of something. ``text`` is how it was written."""

    each: Fraction
    text: str


def parse_rate(value: object) -> Rate:
    """``"$0.15 / 1M"``, ``"$0.15 per 1M tokens"``, ``"$0.01 per MiB"``, ``"$0.002 per call"``.

    Raises ``ValueError``.
    """
    found = _RATE.fullmatch(value) if isinstance(value, str) else None
    if found is None or not any(found.groups()[1:]):
        raise ValueError('a rate is written "$0.15 / 1M" or "$0.15 per 1M tokens"')
    units = parse_usd(found.group(1))
    per = int(found.group(2) or 1) * _PER.get(found.group(3) or "", 1)
    return Rate(Fraction(units, per), str(value))


def rates_of(value: object, where: str, *, every: str = "") -> tuple[tuple[str, Rate], ...]:
    """A table of rates by name; ``every``: a name for all others. Raises ``ValueError``."""
    if not isinstance(value, dict) or len(value) > 20:
        raise ValueError(f'{where} is a table such as {{ tokens_in = "$0.15 / 1M" }}')
    made = []
    for meter, text in value.items():
        if meter != every and METER.fullmatch(meter) is None:
            raise ValueError(f"{where}: {meter[:40]!r} is not a name such as tokens_in")
        try:
            made.append((meter, parse_rate(text)))
        except ValueError as error:
            raise ValueError(f"{where}.{meter}: {error}") from None
    return tuple(made)


def lines_of(fixed_units: int, counted: Iterable[tuple[str, int, Rate]]) -> tuple[Line, ...]:
    """What was counted as lines whose sum is the exact cost, rounded up once."""
    lines = [Line("call", fixed_units)] if fixed_units else []
    exact, told = Fraction(0), 0
    for meter, count, rate in counted:
        exact += rate.each * count
        rounded = -(-exact.numerator // exact.denominator)
        lines.append(Line(meter, rounded - told, count, rate.text))
        told = rounded
    return tuple(lines)


def countable(count: object) -> bool:
    """Whether this can be a count: a whole number that is none of the odd ones."""
    return type(count) is int and 0 <= count <= MAX_COUNT


def shown(rates: Iterable[tuple[str, Rate]]) -> dict[str, Any]:
    """Rates as JSON, as they were written."""
    return {meter: rate.text for meter, rate in rates}
