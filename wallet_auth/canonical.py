"""JSON as bytes that can be hashed: the two forms that clients of wallet APIs use, and RFC 8785.

    ascii   keys by code point, everything beyond ASCII escaped     Python, ``ensure_ascii=True``
    utf8    keys by code point, raw UTF-8                           Python, ``ensure_ascii=False``
    jcs     keys by UTF-16 unit, numbers as ECMAScript writes them  JavaScript, RFC 8785
    sent    the very bytes that came

The forms differ only in characters beyond ASCII, in keys beyond U+FFFF and in numbers. What goes on
to an upstream is the text whose hash was signed, so nobody reads another value than was signed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from json.decoder import scanstring  # type: ignore[attr-defined]  # public, and not in the stubs
from json.encoder import encode_basestring
from typing import Any, Final, NamedTuple

MAX_SAFE_INTEGER: Final = 2**53 - 1
_STRING: Final = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"')
# Outside of strings: what Python and ECMAScript may write differently, or not hold at all.
_ODD_NUMBER: Final = re.compile(r"[0-9][.eE]|[0-9]{16}")
_SPACE: Final = re.compile(r"[ \t\r\n]*+")

_ASCII: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)
_UTF8: Final = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False
)


class Form(NamedTuple):
    """One way to write a value, and the SHA-256 of that as lower-case hex."""

    name: str
    text: bytes
    digest: str


def forms_of(value: dict[str, Any], sent: bytes | None = None) -> Iterator[Form]:
    """Every form of ``value`` that is a text of its own, the usual one first.

    ``sent``: the bytes it was parsed from.
    """
    seen = set()
    for name, text in _texts(value, sent):
        if text not in seen:
            seen.add(text)
            yield Form(name, text, sha256(text).hexdigest())


def _texts(value: dict[str, Any], sent: bytes | None) -> Iterator[tuple[str, bytes]]:
    yield "ascii", ascii_form(value)
    yield "utf8", _UTF8.encode(value).encode()
    with suppress(ValueError):  # a number that ECMAScript cannot hold: there is no such form
        yield "jcs", jcs(value)
    if sent is not None:
        yield "sent", sent


def ascii_form(value: object) -> bytes:
    """Keys sorted by code point, no white space, everything beyond ASCII escaped."""
    return _ASCII.encode(value).encode()


def jcs(value: object) -> bytes:
    """RFC 8785 of a parsed JSON value without lone surrogates.

    Raises ``ValueError`` for a whole number beyond 2^53 - 1: a reader that keeps numbers as doubles
    (as RFC 8785 does) would take it for its neighbour.
    """
    text = _UTF8.encode(value)
    # Nearly always the same as RFC 8785, which costs ten times as much to write here.
    if text.isascii() or max(text) <= "\uffff":
        odd = _ODD_NUMBER.search(text) is not None
        if not odd or _ODD_NUMBER.search(_STRING.sub('""', text)) is None:
            return text.encode()
    return "".join(_pieces(value)).encode()


def _pieces(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield encode_basestring(value)
    elif isinstance(value, bool) or value is None:
        yield {True: "true", False: "false", None: "null"}[value]
    elif isinstance(value, int):
        if abs(value) > MAX_SAFE_INTEGER:
            raise ValueError("a whole number beyond 2^53 - 1 is not the same for all readers")
        yield str(value)
    elif isinstance(value, float):
        yield _number(value)
    elif isinstance(value, list):
        yield "["
        for i, item in enumerate(value):
            yield "," if i else ""
            yield from _pieces(item)
        yield "]"
    elif isinstance(value, dict):
        yield "{"
        for i, name in enumerate(sorted(value, key=lambda name: name.encode("utf-16-be"))):
            yield ("," if i else "") + encode_basestring(name) + ":"
            yield from _pieces(value[name])
        yield "}"
    else:
        raise TypeError(f"{type(value)} is not JSON")


def _number(value: float) -> str:
    """ECMAScript's Number::toString (ECMA-262, 6.1.6.1.20) of a finite double.

    Both languages write the shortest digits that read back as the same double; only where they put
    the point and when they write an exponent differs.
    """
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value!r}".lstrip("-").partition("e")
    whole, _, fraction = mantissa.partition(".")
    fraction = "" if fraction == "0" else fraction
    digits = (whole + fraction).lstrip("0")
    point = len(whole) + int(exponent or 0) - (len(whole + fraction) - len(digits))
    digits = digits.rstrip("0")
    count = len(digits)
    if count <= point <= 21:
        text = digits + "0" * (point - count)
    elif 0 < point <= 21:
        text = f"{digits[:point]}.{digits[point:]}"
    elif -6 < point <= 0:
        text = "0." + "0" * -point + digits
    else:
        rest = f".{digits[1:]}" if count > 1 else ""
        text = f"{digits[0]}{rest}e{point - 1:+d}"
    return "-" + text if value < 0 else text


def member_as_sent(body: str, name: str) -> bytes | None:
    """The very bytes of one member's value in a JSON object that is known to be well-formed."""
    decoder = json.JSONDecoder()
    at = _after_space(body, _after_space(body, 0) + 1)
    while body[at] != "}":
        key, at = scanstring(body, at + 1)
        begin = _after_space(body, _after_space(body, at) + 1)
        _, end = decoder.raw_decode(body, begin)
        if key == name:
            return body[begin:end].encode()
        at = _after_space(body, end)
        if body[at] == ",":
            at = _after_space(body, at + 1)
    return None


def _after_space(body: str, at: int) -> int:
    found = _SPACE.match(body, at)
    return at if found is None else found.end()
