"""Strict readers for what comes from outside.

Python's own are lenient where two programs could disagree about what was said: ``json.loads``
takes NaN and the last of two equal keys, ``b64decode`` skips what it does not know. These refuse.
"""

from __future__ import annotations

import base64
import json
import re
from typing import Any, Final

MAX_DEPTH: Final = 32
_BASE64: Final = re.compile(rb"[A-Za-z0-9+/]+={0,2}")
_BRACKET: Final = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


def json_object(raw: bytes) -> dict[str, Any]:
    """A JSON object (RFC 8259) without duplicate keys, NaN, lone surrogates or deep nesting.

    Raises ``ValueError`` for everything else.
    """
    depth = 0
    for found in _BRACKET.finditer(raw):
        mark = found.group()
        depth += (mark in (b"[", b"{")) - (mark in (b"]", b"}"))
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
        # A lone surrogate parses, and then cannot be stored, hashed or answered.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not strict JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


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
