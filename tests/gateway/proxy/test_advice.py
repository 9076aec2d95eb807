"""What is added to a refusal, and what is left as it was."""

from __future__ import annotations

from gateway.errors import CODES, NextAction, Problem
from gateway.proxy import advice

URL, BASE = "https://api.example/v1/x", "https://api.example"


def completed(problem: Problem) -> tuple[NextAction, ...]:
    advice.complete(problem, "POST", URL, BASE)
    return problem.next_actions


def test_the_same_request_changed_in_one_way() -> None:
    (action,) = completed(Problem("request_id_conflict", "…"))
    assert (action.method, action.url) == ("POST", URL)
    assert "nonce" in action.send


def test_what_brings_its_own_keeps_it() -> None:
    own = NextAction("GET", "https://elsewhere.example/", "this")
    assert completed(Problem("invalid_request", "…", next_actions=[own])) == (own,)


def test_nothing_is_advised_where_the_caller_is_not_at_fault() -> None:
    assert completed(Problem("internal_error", "…")) == ()
    assert completed(Problem("upstream_error", "…")) == ()
    late = Problem("invalid_request", "…", status=503)
    assert completed(late) == ()


def test_methods_that_are_offered() -> None:
    refused = Problem("method_not_allowed", "…", headers={"Allow": "GET, HEAD"})
    assert [action.method for action in completed(refused)] == ["GET", "HEAD"]


def test_every_code_that_is_named_exists() -> None:
    assert set(advice._SEND) <= set(CODES)
