"""Structured field values (RFC 8941), as far as request signatures need them. Strict.

``Signature-Input`` and ``Signature`` are dictionaries that other people's signatures may share, so
any well-formed member is stepped over; only the member of a wallet is read in full. A general
parser costs more than the elliptic curve does, hence patterns: every repetition is possessive or
begins with its own character, so each text is read once, whatever it holds.
"""

from __future__ import annotations

import base64
import re
from binascii import a2b_base64
from typing import Final

MAX_FIELD: Final = 8192
"""Characters of one field value. A plain wallet signature is about 300."""

_KEY: Final = r"[a-z*][a-z0-9_\-.*]*+"
_STRING: Final = r'"(?:[ !#-\[\]-~]|\\["\\])*+"'
_BYTES: Final = r":[A-Za-z0-9+/]*+={0,2}:"
_BARE: Final = (
    rf"(?:{_STRING}|{_BYTES}"
    r"|-?[0-9]{1,12}\.[0-9]{1,3}|-?[0-9]{1,15}"
    r"|[A-Za-z*][!#$%&'*+\-.^_`|~0-9A-Za-z:/]*+"
    r"|\?[01]|@-?[0-9]{1,15}"  # the last one and the next are RFC 9651's
    r'|%"(?:[ !#$&-~]|%[0-9a-f]{2})*+")'
)
_PARAMS: Final = rf"(?:; *+{_KEY}(?:={_BARE})?+)*+"
_ITEM: Final = _BARE + _PARAMS
_INNER: Final = rf"\( *+(?:{_ITEM}(?: ++{_ITEM})*+ *+)?+\)"
_MEMBER: Final = re.compile(rf"({_KEY})(?:=({_INNER}{_PARAMS}|{_ITEM})|{_PARAMS})")
_COMMA: Final = re.compile(r"[ \t]*+,[ \t]*+")
_LIST: Final = re.compile(_INNER)
_PARAM: Final = re.compile(rf"; *+({_KEY})(?:=({_BARE}))?+")
_NAME: Final = r"\"(@?[a-z0-9!#$%&'*+\-.^_`|~]++)\""
_NAMES: Final = re.compile(rf"\( *+(?:{_NAME}(?: ++{_NAME})*+ *+)?+\)")
_EACH_NAME: Final = re.compile(_NAME)
_BYTES_ITEM: Final = re.compile(_BYTES)


def text_of(value: bytes) -> str:
    """A field value as text: visible ASCII and spaces, no more than ``MAX_FIELD``.

    Raises ``ValueError``; a tab, a control character or a folded line is one too.
    """
    if len(value) > MAX_FIELD:
        raise ValueError(f"is longer than {MAX_FIELD} characters")
    text = value.decode("latin-1").strip(" \t")
    if not (text.isascii() and text.isprintable()):
        raise ValueError("holds characters other than visible ASCII")
    return text


def members(text: str) -> dict[str, str]:
    """The members of a dictionary, each value as it stands. Raises ``ValueError``.

    A member without a value (boolean true) has the value ``""``. RFC 8941 lets a repeated key
    overwrite the earlier one; here it is an error, because two readers may disagree on it.
    """
    found: dict[str, str] = {}
    at = 0
    while True:
        member = _MEMBER.match(text, at)
        if member is None:
            raise ValueError("is no structured dictionary")
        if member[1] in found:
            raise ValueError(f"has the key {member[1]!r} twice")
        found[member[1]] = member[2] or ""
        if member.end() == len(text):
            return found
        comma = _COMMA.match(text, member.end())
        if comma is None:
            raise ValueError("is no structured dictionary")
        at = comma.end()


def inner_list(member: str) -> tuple[str, list[tuple[str, str | None]]] | None:
    """``(list, parameters)`` of a member that is an inner list, as texts; ``None`` otherwise."""
    head = _NAMES.match(member) or _LIST.match(member)  # the first is the usual, and quicker
    if head is None:
        return None
    return head[0], [(p[1], p[2]) for p in _PARAM.finditer(member, head.end())]


def names(inner: str) -> list[str]:
    """The component names in an inner list of plain strings. Raises ``ValueError``.

    Flags (``;req``, ``;bs``, ``;key=``…), other types and upper case are refused.
    """
    if not _NAMES.fullmatch(inner):
        raise ValueError("lists something other than plain component names")
    return _EACH_NAME.findall(inner)


def string(bare: str | None) -> str | None:
    """The value of a string, ``None`` if it is something else."""
    if bare is None or bare[0] != '"':
        return None
    inside = bare[1:-1]
    return re.sub(r"\\(.)", r"\1", inside) if "\\" in inside else inside


def integer(bare: str | None) -> int | None:
    """The value of an integer, ``None`` if it is something else."""
    if bare is None or not bare.lstrip("-").isdigit():
        return None
    return int(bare)


def byte_sequence(bare: str) -> bytes | None:
    """The bytes of ``:…:``, padding optional; ``None`` if it is something else."""
    if not _BYTES_ITEM.fullmatch(bare):
        return None
    digits = bare[1:-1].rstrip("=")
    if len(digits) % 4 == 1:
        return None
    return base64.b64decode(digits + "=" * (-len(digits) % 4))


def only_bytes(value: bytes, key: bytes, size: int) -> bytes | None:
    """The ``size`` bytes of a dictionary that is written ``key=:…:`` and nothing else.

    ``None`` says nothing about the value: ``members`` and ``byte_sequence`` read every form.
    """
    begin, end = len(key) + 2, len(value) - 1
    if end - begin != (size + 2) // 3 * 4 or value[end:] != b":" or value[:begin] != key + b"=:":
        return None
    try:
        found = a2b_base64(value[begin:end], strict_mode=True)
    except ValueError:
        return None
    return found if len(found) == size else None


def serialize_names(components: list[str] | tuple[str, ...]) -> str:
    """An inner list of plain names, in canonical form (RFC 8941 4.1.1.1)."""
    return "(" + " ".join(f'"{name}"' for name in components) + ")"
