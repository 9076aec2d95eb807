"""Reading the options of a price rule: what is there, what it means, and nothing else.

Every function raises ``ValueError`` with the name of the option in front.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from gateway.money import parse_usd


def only(options: Mapping[str, Any], known: Iterable[str], where: str = "") -> None:
    """No option but the known ones."""
    names = set(known)
    for name in options:
        if name not in names:
            raise ValueError(
                f"{where}{name} is not an option; known are {', '.join(sorted(names))}"
            )


def amount(options: Mapping[str, Any], name: str, default_units: int | None = None) -> int:
    """An amount of money, in units. Without a default it has to be there."""
    value = options.get(name)
    if value is None:
        if default_units is None:
            raise ValueError(f'{name} is missing: an amount such as "$0.50"')
        return default_units
    if not isinstance(value, str):
        raise ValueError(f'{name} is a dollar amount in quotes, such as "$0.50"')
    try:
        return parse_usd(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def path(value: object, name: str) -> tuple[str, ...]:
    """A place in JSON such as ``usage.prompt_tokens``."""
    if not isinstance(value, str) or not 1 <= len(value) <= 200 or "" in value.split("."):
        raise ValueError(f'{name} is a place in JSON such as "usage.prompt_tokens"')
    return tuple(value.split("."))


def version(rule: str, terms: Mapping[str, Any]) -> str:
    """A digest of the terms of a rule."""
    text = json.dumps(terms, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return f"{rule}:{hashlib.sha256(text.encode()).hexdigest()[:16]}"
