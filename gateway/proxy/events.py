"""Streams of events (WHATWG HTML, server-sent events): where one ends, and what it holds."""

from __future__ import annotations

import json
import re
from typing import Any, Final

from gateway.proxy.outcome import MAX_DEPTH
from wallet_auth.strict import require_shallow

_END: Final = rb"(?:\r\n|\n|\r(?!\n))"  # of a line
_ENDS: Final = re.compile(_END + _END)
_LINE: Final = re.compile(rb"\r\n|\n|\r")
_BOM: Final = b"\xef\xbb\xbf"
MAX_EVENT_BYTES: Final = 1 << 20
"""The beginning of a longer event is not looked at."""


def split(waiting: bytes) -> tuple[bytes, bytes] | None:
    """The first whole event of a stream, and what follows."""
    found = _ENDS.search(waiting)
    return None if found is None else (waiting[: found.end()], waiting[found.end() :])


def lines_of(event: bytes) -> list[bytes]:
    """The lines of an event, without their ends."""
    return _LINE.split(event.removeprefix(_BOM))


def data_lines(event: bytes) -> list[bytes]:
    """What its fields ``data`` say, line by line."""
    return [
        line[5:].removeprefix(b" ")
        for line in lines_of(event)
        if line[:5] == b"data:" or line == b"data"
    ]


def data_of(event: bytes) -> dict[str, Any] | None:
    """The JSON object that an event holds; None if it holds none."""
    return object_of(b"\n".join(data_lines(event)))


def object_of(text: bytes) -> dict[str, Any] | None:
    """A JSON object of an upstream, read as a browser's fetch does; None if it is none."""
    try:
        require_shallow(text, MAX_DEPTH)
        value = json.loads(text.removeprefix(_BOM).decode("utf-8", "replace"))
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


class Scan:
    """The events of a stream as its pieces go by, wherever they are cut.

    ``markers``: an event that holds one of these is parsed, the others are only counted. No more
    is kept than the event that has begun.
    """

    def __init__(self, markers: tuple[bytes, ...], *, counting: bool) -> None:
        # Asked of every piece: one look instead of one for each marker. None: nothing has one.
        either = b"|".join(map(re.escape, markers))
        self._marked = re.compile(either).search if markers else None
        self._counting = counting
        self._begun = bytearray()
        self.events = 0

    @property
    def between(self) -> bool:
        """Whether the last piece ended with an event."""
        return not self._begun

    def feed(self, piece: bytes) -> list[dict[str, Any]]:
        """What the events hold that end in this piece, of those with a marker."""
        begun = self._begun
        if begun:
            seen = len(begun)
            begun += piece
            end = _last_end(begun, max(seen - 3, 0))
            if end < 0:
                if len(begun) > MAX_EVENT_BYTES:
                    begun.clear()
                    begun += b" "  # still within it
                return []
            whole = bytes(begun[:end])
            del begun[:end]
        else:
            end = _last_end(piece, 0)
            if end < 0:
                begun += piece
                return []
            whole = piece[:end]
            if end < len(piece):
                begun += piece[end:]
        return self._read(whole)

    def rest(self) -> list[dict[str, Any]]:
        """The same for what stands at the end of the stream without an empty line behind it."""
        return self._read(bytes(self._begun)) if self._begun.strip() else []

    def _read(self, whole: bytes) -> list[dict[str, Any]]:
        marked = self._marked if self._marked is not None and self._marked(whole) else None
        if marked is None:
            if not self._counting:
                return []
            first = whole.find(b"\n\n")
            if first == len(whole) - 2 and whole[:6] == b"data: " and b"\r" not in whole:
                # Nearly every piece is just one event.
                self.events += whole[6:12] != b"[DONE]"
                return []
        found = []
        for event in _ENDS.split(whole):
            if b"data:" not in event:
                continue
            if b"data: [DONE]" not in event:
                self.events += 1
            if marked is not None and marked(event):
                value = data_of(event)
                if value is not None:
                    found.append(value)
        return found


def _last_end(text: bytes | bytearray, start: int) -> int:
    """Where the last event ends that does; -1: none."""
    end = text.rfind(b"\n\n", start)
    found = end + 2 if end >= 0 else -1
    if b"\r" in text:
        for mark in (b"\r\n\r\n", b"\r\r"):
            end = text.rfind(mark, start)
            if end >= 0:
                found = max(found, end + len(mark))
    return found
