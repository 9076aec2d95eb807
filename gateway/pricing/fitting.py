"""Whether a value is the one that a price names: surely, perhaps, or not.

An upstream reads the same value with a reader of its own, and many are loose: they take "4" for 4,
"yes" for true, "Large " for large. ``PERHAPS`` is whatever some reader takes for the value although
it is written otherwise. Neither answer would be safe alone: counted as fitting, it would be a cheap
price for what a strict upstream reads as the dear thing; counted as another value, the same the
other way round.
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import Any, Final

from gateway.pricing.asked import plain

ANY: Final = "*"
_NUMBER: Final = re.compile(r"-?(?:0|[1-9][0-9]{0,38})")
_BOOLEANS: Final = {
    "true": frozenset(("true", "t", "yes", "y", "on", "1")),
    "false": frozenset(("false", "f", "no", "n", "off", "0")),
}
_OTHER: Final = {"true": "false", "false": "true"}


class Fit(IntEnum):
    """How sure it is that a value fits."""

    NO = 0
    PERHAPS = 1
    YES = 2


def fit(value: Any, fitting: tuple[Any, ...]) -> Fit:
    """Whether a value of JSON or of a query is one of ``fitting``. A null is nothing."""
    if value is None:
        return Fit.NO
    return max(_one(value, each) for each in fitting)


def _one(value: Any, wanted: str | int | bool) -> Fit:
    if wanted == ANY or _same(value, wanted):
        return Fit.YES
    if isinstance(value, list):
        # JavaScript's == takes a list of one for the one.
        return Fit.PERHAPS if any(_one(each, wanted) for each in value) else Fit.NO
    if isinstance(value, dict):
        return Fit.NO
    if isinstance(value, bool) and isinstance(wanted, bool):
        return Fit.NO
    return Fit.PERHAPS if _loosely(_text(value), _text(wanted)) else Fit.NO


def _same(value: Any, wanted: str | int | bool) -> bool:
    """True is 1 in Python, and is not here. 4.0 is 4, as in JavaScript."""
    if isinstance(value, bool) or isinstance(wanted, bool):
        return value is wanted
    return bool(value == wanted)


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _loosely(text: str, wanted: str) -> bool:
    text, wanted = plain(text), plain(wanted)
    if text == wanted:
        return True
    if wanted in _BOOLEANS:
        # Many take every text that is not one of these for true, and some a flag without a value.
        return text not in _BOOLEANS[_OTHER[wanted]]
    if _NUMBER.fullmatch(wanted) is None:
        return False
    if text in _BOOLEANS["true"]:
        return wanted == "1"
    if not any(map(str.isnumeric, text)):
        return wanted == "0"  # "abc" is 0 in PHP, "" in JavaScript
    # 04, +4, 4.9, 4px, 0x4, 4e0, ٤: some reader makes some number of it.
    return _NUMBER.fullmatch(text) is None
