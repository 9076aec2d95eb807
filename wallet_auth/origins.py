"""What a client remembers of the servers it talks to, each by itself.

A server may be an attacker's, or have a clock that is wrong: what it says of the time counts for
its own origin (scheme, host and port) and for no other, and so does a credential it gave.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

MAX_ORIGINS: Final = 256
CREDENTIAL_S: Final = 3_600
"""The longest that a credential can be good for; servers may forget it sooner."""
_CREDENTIAL: Final = re.compile(r"fbx_c_[A-Za-z0-9_-]{43}", re.ASCII)


@dataclass(slots=True)
class _Known:
    skew_s: int = 0
    credential: str = ""
    until_s: float = 0.0


class Origins:
    """Bounded: of those asked longest ago the first is forgotten. For use by several threads."""

    def __init__(self, most: int = MAX_ORIGINS) -> None:
        self._most = most
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def skew_s(self, origin: str) -> int:
        """Seconds to add to our own clock there."""
        with self._lock:
            known = self._seen(origin)
            return 0 if known is None else known.skew_s

    def set_skew(self, origin: str, skew_s: int) -> None:
        """What the origin's clock is ahead of ours."""
        with self._lock:
            if skew_s or origin in self._known:
                self._of(origin).skew_s = skew_s

    def credential(self, origin: str, at_s: float) -> str:
        """What was given there and may still be good; empty if there is none. ``at_s``: a clock
        that nobody sets."""
        with self._lock:
            known = self._seen(origin)
            if known is None or known.until_s <= at_s:
                return ""
            return known.credential

    def keep_credential(self, origin: str, text: str, at_s: float) -> bool:
        """Remember one; False for something that is none."""
        if not _CREDENTIAL.fullmatch(text):
            return False
        with self._lock:
            known = self._of(origin)
            known.credential, known.until_s = text, at_s + CREDENTIAL_S
        return True

    def drop_credential(self, origin: str, text: str) -> None:
        """Forget this one: it is spent or over. Another that came meanwhile stays."""
        with self._lock:
            known = self._known.get(origin)
            if known is not None and known.credential == text:
                known.credential = ""

    def _seen(self, origin: str) -> _Known | None:
        known = self._known.get(origin)
        if known is not None:
            self._known.move_to_end(origin)
        return known

    def _of(self, origin: str) -> _Known:
        known = self._seen(origin)
        if known is None:
            known = self._known[origin] = _Known()
            while len(self._known) > self._most:
                self._known.popitem(last=False)
        return known
