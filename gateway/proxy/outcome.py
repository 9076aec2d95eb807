"""What counts as success, and so is charged: the operator's rules, and the reason on the row.

A 5xx of the upstream, an answer that breaks off and one that does not come in time are never
charged. What else is not, each route says in ``failed_if``; unless it does, every answer from 400
on. The reasons are stable and stand on the row that ended the hold:

    upstream_status_503             its status
    upstream_error                  it refused, reset or broke HTTP
    upstream_timeout                it did not answer in time
    upstream_wants_payment          it answered 402 itself
    too_slow                        slower_than
    answer_empty                    empty
    answer_without:result           answer_without
    answer_with:error               answer_with
    gateway_error, interrupted      our own fault; the gateway died (gateway/ledger/sweep.py)

**What the caller can choose must not make a call free.** A part of the answer (206), its head only
(HEAD), its confirmation (304), a compressed one, a stream of events and one nested too deep to be
read are not judged by their content; towards the upstream such a route asks for no part and no
compression. The time is what the gateway waited for the upstream, and counts only if the caller was
not slow itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from gateway.forms import Member
from gateway.settings import FailedIf
from wallet_auth.strict import require_shallow

TOO_SLOW: Final = "too_slow"
EMPTY: Final = "answer_empty"
_NOT_JUDGED_BY_CONTENT: Final = frozenset((206, 304))
_PARTS: Final = frozenset((b"range", b"if-range"))
# Deeper than any schema and well below where the parser fails.
MAX_DEPTH: Final = 200
UNCOMPRESSED: Final = (b"accept-encoding", b"identity")
"""Asked of the upstream where its answer's content decides."""

Fields = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Rules:
    """``failed_if`` of one route. ``statuses`` are first and last of each class; 5xx is implied."""

    statuses: tuple[tuple[int, int], ...] = ((400, 499),)
    slower_than_s: int | None = None
    empty: bool = False
    without: tuple[Member, ...] = ()
    having: tuple[Member, ...] = ()

    by_content: bool = field(init=False)
    """Whether an answer's body can decide."""
    by_status_alone: bool = field(init=False)
    """Whether nothing but an answer's status can decide."""

    def __post_init__(self) -> None:
        by_content = self.empty or bool(self.without or self.having)
        object.__setattr__(self, "by_content", by_content)
        alone = not by_content and self.slower_than_s is None
        object.__setattr__(self, "by_status_alone", alone)


def rules_of(settings: FailedIf) -> Rules:
    """The rules as configured."""
    return Rules(
        statuses=settings.status,
        slower_than_s=settings.slower_than_s,
        empty=settings.empty,
        without=settings.answer_without,
        having=settings.answer_with,
    )


@dataclass(frozen=True, slots=True)
class Ended:
    """An upstream's answer that came to its end. ``body`` None: longer than what is kept."""

    method: str
    status: int
    headers: Fields
    body: bytes | None = field(repr=False)
    waited_s: float
    caller_was_slow: bool = False


def status_reason(rules: Rules, status: int) -> str | None:
    """Why an answer of this status is not charged, whatever it holds; None if it may be."""
    if status >= 500:
        return f"upstream_status_{status}"
    for first, last in rules.statuses:
        if first <= status <= last:
            return f"upstream_status_{status}"
    return None


def reason(rules: Rules, answer: Ended) -> str | None:
    """Why this answer is not charged; None for success."""
    found = status_reason(rules, answer.status)
    if found is None and rules.by_content and answer.body is not None and _can_be_judged(answer):
        found = _of_content(rules, answer.body)
    if found is None and rules.slower_than_s is not None and not answer.caller_was_slow:
        found = TOO_SLOW if answer.waited_s > rules.slower_than_s else None
    return found


def streams(headers: Fields) -> bool:
    """Whether an answer is a stream of events (WHATWG HTML, server-sent events)."""
    for name, value in headers:
        if name.lower() == b"content-type" and _is(value, b"text/event-stream"):
            return True
    return False


def without_parts(headers: Fields) -> Fields:
    """The caller's fields without those that ask for a part (RFC 9110 section 14)."""
    return [(name, value) for name, value in headers if name not in _PARTS]


def coded(headers: Fields) -> bool:
    """Whether an answer is compressed (RFC 9110 section 8.4)."""
    return any(not _is(v, b"identity") for v in _values(headers, b"content-encoding"))


def _can_be_judged(answer: Ended) -> bool:
    return not (
        answer.method == "HEAD"
        or answer.status in _NOT_JUDGED_BY_CONTENT
        or coded(answer.headers)
        or streams(answer.headers)
    )


def _values(headers: Fields, wanted: bytes) -> Iterable[bytes]:
    return (value for name, value in headers if name.lower() == wanted)


def _is(value: bytes, what: bytes) -> bool:
    return value.partition(b";")[0].strip(b" \t").lower() == what


def _of_content(rules: Rules, body: bytes) -> str | None:
    if rules.empty and not body:
        return EMPTY
    if not (rules.without or rules.having):
        return None
    try:
        require_shallow(body, MAX_DEPTH)
    except ValueError:
        return None
    try:
        value = json.loads(body)
    except ValueError:
        value = None  # what is no JSON has no members
    for member in rules.without:
        if not _has(value, member):
            return f"answer_without:{member.name}"
    for member in rules.having:
        if _has(value, member):
            return f"answer_with:{member.name}"
    return None


def _has(value: Any, member: Member) -> bool:
    """Whether the place is there and holds what it should. A null is as good as nothing there."""
    for name in member.path:
        if isinstance(value, dict):
            value = value.get(name)
        elif isinstance(value, list) and name.isascii() and name.isdigit() and len(name) < 10:
            value = value[int(name)] if int(name) < len(value) else None
        else:
            return False
    if member.equals is None:
        return value is not None
    return type(value) is type(member.equals) and bool(value == member.equals)
