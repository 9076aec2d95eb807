"""Stripe's request encoding (``a[b][0][c]=v``) and strict readers for what it decodes to.

Decoding gives nested ``dict``, ``list`` and ``str``. Depth, number of fields and list positions
are bounded: the fake may stand on a port that others can reach.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final
from urllib.parse import parse_qsl

from gateway.demo.fakestripe.errors import StripeError, invalid

MAX_FIELDS: Final = 500
MAX_DEPTH: Final = 8
MAX_POSITION: Final = 200

_KEY = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)")
_PART = re.compile(r"\[([^\[\]]*)\]")
_INTEGER = re.compile(r"-?[0-9]{1,15}")

Params = dict[str, Any]


def decode(encoded: bytes) -> Params:
    """The nested parameters of a form body or a query string; ``StripeError`` 400 if malformed."""
    try:
        pairs = parse_qsl(
            encoded.decode("utf-8"),
            keep_blank_values=True,
            strict_parsing=bool(encoded),
            errors="strict",
            max_num_fields=MAX_FIELDS,
        )
    except ValueError as error:  # UnicodeDecodeError is one
        raise invalid("Invalid request: the parameters could not be decoded.") from error
    root: Params = {}
    for key, value in pairs:
        _place(root, key, value)
    return {key: _lists(value, key) for key, value in root.items()}


def _place(root: Params, key: str, value: str) -> None:
    match = _KEY.fullmatch(key)
    parts = [match[1], *_PART.findall(match[2])] if match else []
    if not parts or len(parts) > MAX_DEPTH:
        raise invalid(f"Invalid parameter name: {key[:100]}", key[:100])
    here = root
    for part in parts[:-1]:
        name = part or str(len(here))
        below = here.setdefault(name, {})
        if not isinstance(below, dict):
            raise invalid(f"Invalid nested parameter: {key[:100]}", key[:100])
        here = below
    last = parts[-1] or str(len(here))
    if isinstance(here.get(last), dict):
        raise invalid(f"Invalid nested parameter: {key[:100]}", key[:100])
    here[last] = value


def _lists(value: Any, name: str) -> Any:
    """Turn ``{"0": …, "1": …}`` into a list; metadata keeps its keys whatever they look like."""
    if not isinstance(value, dict) or name == "metadata":
        return value
    below = {key: _lists(item, key) for key, item in value.items()}
    if below and all(key.isascii() and key.isdigit() and len(key) < 4 for key in below):
        positions = sorted(below, key=int)
        if int(positions[-1]) > MAX_POSITION:
            raise invalid(f"Invalid array: {name}", name)
        return [below[position] for position in positions]
    return below


def only(params: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse parameters that the endpoint does not know, as Stripe does."""
    allowed = {"expand", *names}
    for name in params:
        if name not in allowed:
            raise invalid(f"Received unknown parameter: {name}", name, "parameter_unknown")


def required(name: str) -> StripeError:
    """400 ``parameter_missing``."""
    return invalid(f"Missing required param: {name}.", name, "parameter_missing")


def text(params: Mapping[str, Any], name: str, label: str = "") -> str | None:
    """A string parameter; None if absent or empty (empty unsets a value at Stripe)."""
    value = params.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise invalid(f"Invalid string: {label or name}", label or name)
    return value


def integer(
    params: Mapping[str, Any], name: str, label: str = "", *, least: int | None = None
) -> int | None:
    """An integer parameter; None if absent."""
    value = text(params, name, label)
    if value is None:
        return None
    if not _INTEGER.fullmatch(value):
        raise invalid(f"Invalid integer: {value[:50]}", label or name, "parameter_invalid_integer")
    number = int(value)
    if least is not None and number < least:
        raise invalid(
            f"This value must be greater than or equal to {least}.",
            label or name,
            "parameter_invalid_integer",
        )
    return number


def boolean(params: Mapping[str, Any], name: str) -> bool:
    """A boolean parameter; False if absent."""
    value = text(params, name)
    if value not in {None, "true", "false"}:
        raise invalid(f"Invalid boolean: {value}", name)
    return value == "true"


def mapping(params: Mapping[str, Any], name: str, label: str = "") -> Params:
    """A nested object; empty if absent."""
    value = params.get(name)
    if value is None or value == "":
        return {}
    if not isinstance(value, dict):
        raise invalid(f"Invalid object: {label or name}", label or name)
    return value


def listing(params: Mapping[str, Any], name: str) -> list[Any]:
    """A nested array; empty if absent."""
    value = params.get(name)
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        raise invalid(f"Invalid array: {name}", name)
    return value


def metadata(params: Mapping[str, Any], label: str = "metadata") -> dict[str, str]:
    """Key-value pairs within Stripe's bounds: 50 keys of 40 characters, values of 500."""
    pairs = mapping(params, "metadata", label)
    if len(pairs) > 50:
        raise invalid("Metadata can have at most 50 keys.", label)
    for key, value in pairs.items():
        if not isinstance(value, str) or len(key) > 40 or len(value) > 500:
            raise invalid("Metadata keys have 40 characters, values 500, at most.", label)
    return {key: value for key, value in pairs.items() if value != ""}


def one_of(
    params: Mapping[str, Any], name: str, choices: Iterable[str], label: str = ""
) -> str | None:
    """A string out of a fixed set; None if absent."""
    value = text(params, name, label)
    known = list(choices)
    if value is not None and value not in known:
        listed = ", ".join(known[:-1]) + (" or " if len(known) > 1 else "") + known[-1]
        raise invalid(f"Invalid {label or name}: must be one of {listed}", label or name)
    return value
