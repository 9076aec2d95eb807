"""What a client may do by itself after a refusal, and what it must leave to whoever asked."""

from __future__ import annotations

import json
from typing import Any

import pytest

from wallet_auth.recovery import Advice, advice_of, skew_s

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
        (said(action(), now_s=5), Advice("sign", "c", 0, 5)),
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
    assert advice_of(PROBLEM, body, "GET", URL) == expected


def test_only_problems_are_read() -> None:
    body = said(action())
    assert advice_of("application/problem+json; charset=utf-8", body, "GET", URL) is not None
    assert advice_of("application/json", body, "GET", URL) is None
    assert advice_of("", body, "GET", URL) is None


def test_a_clock_is_set_by_at_most_a_day() -> None:
    assert (skew_s(100, 40), skew_s(40, 100)) == (60, -60)
    assert skew_s(10**9 + 86_400, 10**9) == 86_400
    assert skew_s(10**9 + 86_401, 10**9) == 0
