"""What a client may do by itself after a refusal, and what it must leave to whoever asked."""

from __future__ import annotations

import json
from typing import Any

import pytest

from wallet_auth.recovery import MAX_SKEW_S, Advice, advice_of, skew_s

URL = "http://127.0.0.1:8402/v1/x?y=1"
PROBLEM = "application/problem+json"


def said(*actions: Any, **members: Any) -> bytes:
    return json.dumps({"code": "c", "next_actions": list(actions), **members}).encode()


def action(do: str = "sign", **changes: Any) -> dict[str, Any]:
    return {"do": do, "method": "GET", "url": URL, "send": "…"} | changes


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (said(action()), Advice("sign", "c", 0, None)),
        (said(action("repeat", after_s=3)), Advice("repeat", "c", 3, None)),
        (said(action("read"), action("repeat")), Advice("repeat", "c", 0, None)),
        (said(action(), now_s=5), Advice("sign", "c", 0, None)),
        (said(action("repeat", after_s=-3)), Advice("repeat", "c", 0, None)),
        (said(action("repeat", after_s=True)), Advice("repeat", "c", 0, None)),
        (said(action("repeat", after_s="9")), Advice("repeat", "c", 0, None)),
        (said(action(), now_s="5"), Advice("sign", "c", 0, None)),
        (said(), None),
        (said(action("pay"), action("decide"), action("change")), None),
        (said(action(method="POST")), None),
        (said(action(url="http://127.0.0.1:8403/v1/x?y=1")), None),
        (said(action(url="http://127.0.0.1:8402/v1/x?y=2")), None),
        (said(action(url=None)), None),
        (said("sign", None, 1), None),
        (b'{"code": 1, "next_actions": []}', None),
        (b'{"code": "c", "next_actions": {}}', None),
        (b'{"code": "c"}', None),
        (b"[]", None),
        (b"{", None),
        (b'{"code":"c","code":"d","next_actions":[]}', None),
        (said(action(), more="x" * 300_000), None),
    ],
)
def test_what_is_followed(body: bytes, expected: Advice | None) -> None:
    assert advice_of(401, PROBLEM, body, "GET", URL) == expected


def test_only_problems_are_read() -> None:
    body = said(action())
    assert advice_of(401, "application/problem+json; charset=utf-8", body, "GET", URL) is not None
    assert advice_of(401, "application/json", body, "GET", URL) is None
    assert advice_of(401, "", body, "GET", URL) is None


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (401, "signature_expired", 5),
        (401, "signature_not_yet_valid", 5),
        (401, "signature_invalid", None),
        (401, "identity_unsupported", None),
        (403, "signature_expired", None),
        (409, "signature_expired", None),
        (500, "signature_not_yet_valid", None),
    ],
)
def test_only_what_speaks_of_time_tells_the_time(
    status: int, code: str, expected: int | None
) -> None:
    body = said(action(), now_s=5, code=code)
    assert advice_of(status, PROBLEM, body, "GET", URL) == Advice("sign", code, 0, expected)


NOW_S = 10**9
EXPIRED, EARLY = "signature_expired", "signature_not_yet_valid"


@pytest.mark.parametrize(
    ("code", "told_s", "signed_s", "expected"),
    [
        (EXPIRED, NOW_S + 60, NOW_S, 60),
        (EARLY, NOW_S - 60, NOW_S, -60),
        # Our clock was ahead by what we had been told before, and is set back.
        (EARLY, NOW_S, NOW_S + 900, 0),
        (EXPIRED, NOW_S, NOW_S - 900, 0),
        # A refusal that its own clock does not bear out.
        (EXPIRED, NOW_S - 60, NOW_S, None),
        (EARLY, NOW_S + 60, NOW_S, None),
        (EXPIRED, NOW_S + MAX_SKEW_S, NOW_S, MAX_SKEW_S),
        (EXPIRED, NOW_S + MAX_SKEW_S + 1, NOW_S, None),
        (EARLY, NOW_S - MAX_SKEW_S, NOW_S, -MAX_SKEW_S),
        (EARLY, NOW_S - MAX_SKEW_S - 1, NOW_S, None),
        (EXPIRED, None, NOW_S, None),
    ],
)
def test_a_clock_is_set_within_bounds_and_for_a_reason(
    code: str, told_s: int | None, signed_s: int, expected: int | None
) -> None:
    assert skew_s(Advice("sign", code, 0, told_s), signed_s, NOW_S) == expected
