"""What counts as failed: the operator's rules, and what a caller cannot do with them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.proxy.outcome import Ended, Rules, reason, rules_of, status_reason, streams
from gateway.settings import FailedIf

GOOD = {"result": {"items": [{"id": 7}], "name": None}, "status": "ok", "done": True, "n": 1}


def rules(**configured: Any) -> Rules:
    return rules_of(FailedIf.model_validate(configured))


def ended(value: object = GOOD, *fields: tuple[bytes, bytes], **options: Any) -> Ended:
    body = value if value is None or isinstance(value, bytes) else json.dumps(value).encode()
    given: dict[str, Any] = {"method": "GET", "status": 200, "waited_s": 0.1} | options
    return Ended(headers=[(b"content-type", b"application/json"), *fields], body=body, **given)


def test_without_rules_everything_from_400_on_is_not_charged() -> None:
    plain = rules()
    for status in (200, 201, 204, 302, 304, 399):
        assert status_reason(plain, status) is None
    for status in (400, 404, 429, 499, 500, 503, 599):
        assert status_reason(plain, status) == f"upstream_status_{status}"
    assert reason(plain, ended(b"no json at all")) is None
    assert reason(plain, ended(b"")) is None
    assert reason(plain, ended(waited_s=10_000.0)) is None


def test_statuses_and_classes() -> None:
    some = rules(status=["3xx", 404, "410", 204])
    for status in (204, 300, 399, 404, 410):
        assert status_reason(some, status) == f"upstream_status_{status}"
    for status in (200, 203, 205, 400, 403, 405, 411):
        assert status_reason(some, status) is None
    # A 5xx is never a success, whatever is listed.
    assert status_reason(rules(status=[]), 500) == "upstream_status_500"
    assert status_reason(rules(status=[]), 400) is None


@pytest.mark.parametrize(
    ("path", "there"),
    [
        ("result", True),
        ("result.items", True),
        ("result.items.0.id", True),
        ("result.items.1", False),
        ("result.items.x", False),
        ("result.name", False),  # null is as good as nothing
        ("result.name.first", False),
        ("status.first", False),
        ("error", False),
        ("n", True),
        ({"path": "status", "equals": "ok"}, True),
        ({"path": "status", "equals": "OK"}, False),
        ({"path": "done", "equals": True}, True),
        ({"path": "n", "equals": True}, False),  # one is not true
        ({"path": "n", "equals": 1}, True),
        ({"path": "done", "equals": 1}, False),
        ({"path": "result.items.0.id", "equals": 7}, True),
        ({"path": "error", "equals": "x"}, False),
    ],
)
def test_members(path: Any, there: bool) -> None:
    name = path if isinstance(path, str) else path["path"]
    without = reason(rules(answer_without=[path]), ended())
    having = reason(rules(answer_with=[path]), ended())
    assert without == (None if there else f"answer_without:{name}")
    assert having == (f"answer_with:{name}" if there else None)


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"null", b'{"a":', b"[" * 199, b"\xff"])
def test_what_is_no_object_lacks_every_member(body: bytes) -> None:
    assert reason(rules(answer_without=["a"]), ended(body)) == "answer_without:a"
    assert reason(rules(answer_with=["a"]), ended(body)) is None


def test_an_empty_answer() -> None:
    empty = rules(empty=True)
    assert reason(empty, ended(b"")) == "answer_empty"
    assert reason(empty, ended(b"", status=204)) == "answer_empty"
    assert reason(empty, ended(b" ")) is None


def test_too_slow() -> None:
    slow = rules(slower_than="2s")
    assert reason(slow, ended(waited_s=2.01)) == "too_slow"
    assert reason(slow, ended(waited_s=2.0)) is None
    assert reason(slow, ended(None, waited_s=3.0)) == "too_slow"  # a long one is judged by time
    assert reason(slow, ended(waited_s=3.0, caller_was_slow=True)) is None
    both = rules(slower_than=1, answer_without=["x"])
    assert reason(both, ended(waited_s=2.0)) == "answer_without:x"


def test_nothing_the_caller_asks_for_makes_an_answer_free() -> None:
    """Its head only, a part of it, its confirmation, a coding or a stream cannot be judged."""
    strict = rules(empty=True, answer_without=["never"])
    for unjudged in (
        ended(b"", method="HEAD"),
        ended(b'{"resu', status=206),
        ended(b"", status=304),
        ended(b"\x1f\x8b", (b"Content-Encoding", b"gzip")),
        Ended("GET", 200, [(b"Content-Type", b"text/event-stream; charset=utf-8")], b"", 0.1),
        ended(None),
        ended(b"[" * 100_000 + b"]" * 100_000),  # as deep as what the caller sent, say
    ):
        assert reason(strict, unjudged) is None
    plainly = ended(GOOD, (b"content-encoding", b"identity"))
    assert reason(strict, plainly) == "answer_without:never"


def test_a_stream_of_events_is_told_by_its_type() -> None:
    assert streams([(b"Content-Type", b"Text/Event-Stream;charset=utf-8")])
    assert not streams([(b"content-type", b"application/json")])
    assert not streams([(b"x-type", b"text/event-stream")])


def test_only_rules_about_content_look_at_it() -> None:
    assert not rules(status=[404], slower_than=5).by_content
    assert rules(empty=True).by_content
    assert rules(answer_with=["error"]).by_content
    assert rules(answer_without=["result"]).by_content


@pytest.mark.parametrize(
    ("configured", "fault"),
    [
        ({"status": ["6xx"]}, "status such as 404"),
        ({"status": [99]}, "status such as 404"),
        ({"status": [True]}, "status such as 404"),
        ({"status": ["4XX"]}, "status such as 404"),
        ({"answer_without": [""]}, "path such as"),
        ({"answer_without": ["a..b"]}, "path such as"),
        ({"answer_with": [{"path": "a"}]}, "path such as"),
        ({"answer_with": [{"path": "a", "equals": 1.5}]}, "compares with something"),
        ({"answer_with": [{"path": "a", "equals": [1]}]}, "compares with something"),
        ({"slower_than": 0}, "greater than or equal to 1"),
        ({"slow": 1}, "Extra inputs"),
    ],
)
def test_what_cannot_be_configured(configured: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        FailedIf.model_validate(configured)
