"""Amounts of money as text, and back. Integers only.

One unit is one micro-USD, which is one base unit of USDC. "Credits" are a display rate, not a
second currency: with the default of 100 credits to the dollar one credit is 10,000 units. All
arithmetic is on ``int``; no float and no ``Decimal`` takes part, so nothing can be rounded
without this file saying so.
"""

from __future__ import annotations

import re
from typing import Final

UNITS_PER_USD: Final = 1_000_000
USD_PLACES: Final = 6
CREDIT_PLACES: Final = 4
CREDITS_PER_USD: Final = 100

# One thousand million dollars. Far above any price, and small enough that sums of thousands of
# such amounts fit a signed 64-bit column and one amount fits a JSON number exactly (2**53).
MAX_UNITS: Final = 10**15

# [0-9] and not \d: \d takes digits of every script. fullmatch and not $: $ lets "\n" through.
_USD: Final = re.compile(r"\$?(0|[1-9][0-9]{0,9})(?:\.([0-9]{1,6}))?")
_UINT: Final = re.compile(r"[0-9]{1,78}")


def parse_usd(text: str) -> int:
    """The units of a dollar amount such as ``$0.002``, ``0.002`` or ``$5``.

    Grammar: an optional ``$``, a whole part without leading zeros, and at most six decimals. No
    sign, blank, exponent or thousands separator. Raises ``ValueError`` for any other form, for
    an amount that is not a whole number of units, and above ``MAX_UNITS``.
    """
    found = _USD.fullmatch(text)
    if found is None:
        raise ValueError(
            f"{text[:40]!r} is not a dollar amount with at most six decimals, such as '$0.002'"
        )
    whole, fraction = found.group(1), found.group(2) or ""
    units = int(whole) * UNITS_PER_USD + int(fraction.ljust(USD_PLACES, "0"))
    if units > MAX_UNITS:
        raise ValueError(f"{text!r} is more than {format_usd(MAX_UNITS)}")
    return units


def format_usd(units: int) -> str:
    """The exact dollar amount: ``$0.002``, ``$0.50``, ``$5``, ``-$0.01``.

    A fraction has at least two decimals, as people write cents. ``parse_usd`` takes every
    non-negative answer back to the same units.
    """
    sign = "-" if units < 0 else ""
    whole, fraction = divmod(abs(units), UNITS_PER_USD)
    if not fraction:
        return f"{sign}${whole}"
    return f"{sign}${whole}.{f'{fraction:06d}'.rstrip('0').ljust(2, '0')}"


def credits_exact(per_usd: int) -> bool:
    """Whether four decimals show every unit amount exactly at this display rate.

    They do if and only if ``per_usd`` is a multiple of 100: one unit is ``per_usd / 1,000,000``
    credits, and the smallest step shown is ``1 / 10,000``.
    """
    return per_usd > 0 and per_usd % (UNITS_PER_USD // 10**CREDIT_PLACES) == 0


def format_credits(units: int, per_usd: int = CREDITS_PER_USD) -> str:
    """Units as a decimal string of credits with at most four places: ``0.2``, ``100``.

    Exact for every amount when ``credits_exact(per_usd)``, as with the default. At another rate
    digits beyond the fourth place are cut off (towards zero), so that a balance is never shown
    larger than it is. Wherever credits are shown the exact ``*_units`` stand beside them, and no
    amount is ever computed from this text.
    """
    if per_usd <= 0:
        raise ValueError("per_usd must be a positive whole number")
    sign = "-" if units < 0 else ""
    scaled = abs(units) * per_usd * 10**CREDIT_PLACES // UNITS_PER_USD
    whole, fraction = divmod(scaled, 10**CREDIT_PLACES)
    if not fraction:
        return f"{sign}{whole}" if whole else "0"
    return f"{sign}{whole}.{f'{fraction:04d}'.rstrip('0')}"


def credits_to_units(count: int, per_usd: int = CREDITS_PER_USD) -> int:
    """The units of a whole number of credits, bought by name ("500 credits").

    Raises ``ValueError`` when the count is negative, beyond ``MAX_UNITS``, or not a whole number
    of units at this rate (3 credits at 7 to the dollar).
    """
    if per_usd <= 0:
        raise ValueError("per_usd must be a positive whole number")
    if count < 0:
        raise ValueError("a number of credits cannot be negative")
    units, rest = divmod(count * UNITS_PER_USD, per_usd)
    if rest:
        raise ValueError(f"{count} credits are not a whole number of units at {per_usd} per USD")
    if units > MAX_UNITS:
        raise ValueError(f"{count} credits are more than {format_usd(MAX_UNITS)}")
    return units


def parse_uint(text: str, *, maximum: int | None = None) -> int:
    """A whole number from outside: 1 to 78 ASCII digits and nothing else.

    78 digits hold every uint256. Stricter than ``int()``, which also takes ``" 12 "``, ``+5``,
    ``1_000`` and the digits of other scripts. Raises ``ValueError``.
    """
    if _UINT.fullmatch(text) is None:
        raise ValueError(f"{text[:40]!r} is not a whole number in plain digits")
    value = int(text)
    if maximum is not None and value > maximum:
        raise ValueError(f"{text[:40]} is more than {maximum}")
    return value
