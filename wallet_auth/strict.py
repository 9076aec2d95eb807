"""Strict readers for JSON and base64 that come from outside; every layer uses these. Pure.

Python's own are lenient where two programs could disagree about what was said: ``json.loads``
takes NaN, the last of two equal keys and half a surrogate pair, ``b64decode`` skips what it does
not know. These refuse, and take time in proportion to the input whatever it holds.
"""

from __future__ import annotations

import base64
import json
import math
import re
from typing import Any, Final

MAX_DEPTH: Final = 32
_BASE64: Final = re.compile(rb"[A-Za-z0-9+/]+={0,2}")
# A string or a bracket. The closing quote may be missing: were it needed, each quote of a string
# that never ends would be tried as a beginning, up to the end of the input every time.
_BRACKET: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)
# An escape that may be half a pair; in UTF-8 itself a lone one cannot be written.
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


def json_object(raw: bytes, *, floats: bool = True) -> dict[str, Any]:
    """A JSON object (RFC 8259) in UTF-8 without a byte order mark.

    Refused with ``ValueError``: anything but an object, nesting deeper than ``MAX_DEPTH``,
    duplicate keys, NaN and the infinities, numbers past a double, lone surrogates; with
    ``floats=False`` every number with a fraction or an exponent. The text of the error continues
    a sentence: "the body is …".
    """
    require_shallow(raw)
    try:
        value = (_ANY_NUMBER if floats else _WHOLE_NUMBERS).decode(raw.decode("utf-8"))
        # A lone surrogate parses, and then cannot be stored, hashed or answered.
        if _SURROGATE.search(raw) is not None:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except ValueError as error:
        raise ValueError(f"not strict JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def base64_bytes(text: bytes) -> bytes:
    """Standard base64 (RFC 4648 section 4); padding may be missing, nothing else may be odd.

    Raises ``ValueError``.
    """
    if _BASE64.fullmatch(text) is None:
        raise ValueError("not base64")
    bare = text.rstrip(b"=")
    if len(bare) % 4 == 1 or (text != bare and len(text) % 4):
        raise ValueError("not base64: wrong length")
    return base64.b64decode(bare + b"=" * (-len(bare) % 4), validate=True)


def require_shallow(raw: bytes, most: int = MAX_DEPTH) -> None:
    """Before it is parsed: nested deep enough, Python's own parser can crash.

    Raises ``ValueError``.
    """
    if raw.count(b"[") + raw.count(b"{") <= most:
        return  # not even if all of them were open at once
    depth = 0
    for found in _BRACKET.finditer(raw):
        mark = found.group()
        depth += (mark in (b"[", b"{")) - (mark in (b"]", b"}"))
        if depth > most:
            raise ValueError(f"nested deeper than {most}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is past all bounds")
    return number


def _refuse(text: str) -> Any:
    raise ValueError(f"{text[:40]} is no number here")


_ANY_NUMBER: Final = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite
)
_WHOLE_NUMBERS: Final = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_refuse
)
