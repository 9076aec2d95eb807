"""What a refusal says a program can do about it: pure, and from the answer alone.

A refusal of the gateway is a problem (RFC 9457) with ``next_actions``; each has a word ``do`` for
programs. Two of them need nobody's judgement: *repeat* the very same bytes, and *sign* the same
request anew. Paying has rules of its own (``offers``); everything else is for whoever wrote the
request, who gets the answer with its reason.

The body may come from an API behind the gateway, so it is believed in nothing that costs: what is
followed is bounded by the caller (``agent``), stays at the origin that was asked, and changes
neither method nor target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from wallet_auth.strict import json_object

_MAX_BYTES: Final = 256 * 1024
_FOLLOWED: Final = ("repeat", "sign")
_CLOCKS: Final = frozenset(("signature_expired", "signature_not_yet_valid"))
"""The refusals, all 401, that speak of time. No other tells a client what time it is."""
MAX_SKEW_S: Final = 6 * 3_600
"""A signature made so far ahead of the true time may be shown again that much later: further than
this a clock is for its owner to set."""


@dataclass(frozen=True, slots=True)
class Advice:
    """One step. ``now_s``: the other side's clock in seconds, where it says that ours is wrong."""

    do: str
    code: str
    after_s: int
    now_s: int | None


def advice_of(status: int, content_type: str, body: bytes, method: str, url: str) -> Advice | None:
    """The first step a program can take by itself; None: there is none, or this is no problem of
    the gateway's. ``url`` is the one that was asked."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/problem+json" or len(body) > _MAX_BYTES:
        return None
    try:
        said = json_object(body)
    except ValueError:
        return None
    code, actions = said.get("code"), said.get("next_actions")
    if not isinstance(code, str) or not isinstance(actions, list):
        return None
    for action in actions:
        if not isinstance(action, dict) or action.get("do") not in _FOLLOWED:
            continue
        if action.get("method") == method and _same(action.get("url"), url):
            now_s = _clock(said) if status == 401 and code in _CLOCKS else None
            return Advice(action["do"], code, _whole(action.get("after_s")) or 0, now_s)
    return None


def _same(told: Any, asked: str) -> bool:
    """An action for another address is for a person: a signature is bound to its target."""
    return isinstance(told, str) and told.partition("#")[0] == asked.partition("#")[0]


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _clock(said: dict[str, Any]) -> int | None:
    return _whole(said.get("now_s"))


def skew_s(advice: Advice, signed_s: int, now_s: int) -> int | None:
    """How much to add to one's own clock ``now_s`` for the origin that advised so; None: nothing
    to go by, or a clock that cannot be meant. ``signed_s``: the time that the refused signature
    had; a clock that does not bear out the refusal is no reason for it."""
    if advice.now_s is None:
        return None
    late = advice.now_s > signed_s
    if late != (advice.code == "signature_expired"):
        return None
    skew = advice.now_s - now_s
    return skew if abs(skew) <= MAX_SKEW_S else None
