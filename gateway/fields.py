"""A request's header fields: in the order they came, and found by name.

ASGI hands over a list of pairs. Nearly everything that decides about a request asks for fields by
name, so they are also kept by name: as they are read from the wire where our own protocol does it
(``wire.py``), else when they are first asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

Pair = tuple[bytes, bytes]
ByName = Mapping[bytes, list[bytes]]
"""Values in the order they came, by the name in lower case."""

EXCHANGE: Final = "farebox.exchange"
"""Where the ASGI state keeps ``wire.Exchange``; there is none under another server."""
_NONE: Final[Sequence[bytes]] = ()


class Fields(list[Pair]):
    """Header fields as ASGI has them, with ``by_name`` kept beside."""

    __slots__ = ("by_name",)

    def __init__(self, pairs: Iterable[Pair] = ()) -> None:
        super().__init__()
        self.by_name: dict[bytes, list[bytes]] = {}
        for name, value in pairs:
            self.add(name, value)

    def add(self, name: bytes, value: bytes) -> None:
        """One more. ``name`` is lower case."""
        self.append((name, value))
        known = self.by_name.get(name)
        if known is None:
            self.by_name[name] = [value]
        else:
            known.append(value)


def by_name(headers: Iterable[Pair]) -> ByName:
    """The fields by name, made now if they were not kept."""
    if type(headers) is Fields:
        return headers.by_name
    return Fields(headers).by_name


def values(headers: Iterable[Pair], name: bytes) -> Sequence[bytes]:
    """Every value of a field, in order."""
    return by_name(headers).get(name, _NONE)


def first(headers: Iterable[Pair], name: bytes) -> bytes:
    """The first value of a field; empty if there is none."""
    found = by_name(headers).get(name)
    return found[0] if found else b""
