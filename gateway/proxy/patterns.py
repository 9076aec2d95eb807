"""Path patterns of priced routes, and which of two covers the other.

    /v1/forecast          exactly this path
    /v1/users/[id]/posts  [name] is one segment, not empty
    /v1/forecast/*        everything below /v1/forecast/, and /v1/forecast/ itself
    /*                    everything

``*`` stands alone and last. A literal is compared with the decoded path (``Target.decoded``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from gateway.errors import Problem
from gateway.proxy import target

_AT_END: Final = b"/. "
_NAMED: Final = re.compile(r"\[[A-Za-z_][A-Za-z0-9_]{0,63}\]")


@dataclass(frozen=True, slots=True)
class Pattern:
    """A compiled path pattern: its segments (None for ``[name]``) and whether ``/*`` follows."""

    text: str
    segments: tuple[bytes | None, ...]
    tail: bool

    @property
    def literal(self) -> bytes | None:
        """The one path this matches, or None if there are many."""
        if self.tail or None in self.segments:
            return None
        return b"/" + b"/".join(s for s in self.segments if s is not None)

    @property
    def regex(self) -> bytes:
        """For ``fullmatch`` on a decoded path."""
        return self._regex(self.segments) + (b"/.*" if self.tail else b"")

    @property
    def loose_regex(self) -> bytes:
        """Matches in ``loosened`` form every path that an upstream may take for one of ours."""
        kept = self.segments[:-1] if self.segments[-1:] == (b"",) else self.segments
        folded = [s if s is None else folded_case(s) for s in kept]
        if folded and folded[-1] is not None and not self.tail:
            folded[-1] = folded[-1].rstrip(_AT_END)
        return self._regex(folded) + (b"(?:/.*)?" if self.tail else b"")

    @staticmethod
    def _regex(segments: Iterable[bytes | None]) -> bytes:
        return b"".join(b"/" + (b"[^/]+" if s is None else re.escape(s)) for s in segments)


def loosened(path: bytes) -> bytes:
    """A path as an upstream sees it that ignores case and what ends it: a slash (Express), a dot or
    a blank (IIS)."""
    return folded_case(path.rstrip(_AT_END))


def folded_case(path: bytes) -> bytes:
    """Without case, also beyond ASCII: to some readers the Kelvin sign is a k."""
    return path.lower() if path.isascii() else path.decode().casefold().encode()


def compile_pattern(text: str) -> Pattern:
    """Raises ``ValueError`` with what is wrong."""
    if not text.startswith("/"):
        raise ValueError("a path pattern begins with '/'")
    parts = text[1:].split("/")
    tail = parts[-1] == "*"
    if tail:
        parts.pop()
    return Pattern(text, tuple(_segment(part) for part in _checked(parts)), tail)


def _checked(parts: list[str]) -> list[str]:
    if "" in parts[:-1]:
        raise ValueError("a path pattern has no empty segments")
    if any("*" in part for part in parts):
        raise ValueError("'*' stands alone and last, as in '/v1/*'; one segment is '[id]'")
    return parts


def _segment(part: str) -> bytes | None:
    if _NAMED.fullmatch(part):
        return None
    if not part:
        return b""
    try:
        # The same rules as for requests: a pattern that no accepted request can match is a fault.
        return target.parse(b"/" + part.encode()).decoded[1:]
    except Problem as problem:
        raise ValueError(f"segment {part!r}: {problem.detail}") from None


def meet(one: Pattern, other: Pattern) -> bool:
    """Whether some path may be matched by both."""
    if any(
        a is not None and b is not None and a != b
        for a, b in zip(one.segments, other.segments, strict=False)
    ):
        return False
    longer = len(one.segments) - len(other.segments)
    return longer == 0 or (other.tail if longer > 0 else one.tail)


def covers(wide: Pattern, narrow: Pattern) -> bool:
    """Whether every path that ``narrow`` matches is matched by ``wide`` too."""
    count = len(wide.segments)
    if wide.tail:
        enough = len(narrow.segments) >= count + (not narrow.tail)
    else:
        enough = len(narrow.segments) == count and not narrow.tail
    return enough and all(
        ours == theirs if ours is not None else theirs != b""
        for ours, theirs in zip(wide.segments, narrow.segments, strict=False)
    )
