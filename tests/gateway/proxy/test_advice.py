"""What is added to a refusal, and what is left as it was."""

from __future__ import annotations

import pytest

from gateway.errors import CODES, DO, NextAction, Problem
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


# Raised with actions of their own, because only there is known what has to be signed or paid.
OWN = {code for code, meaning in CODES.items() if meaning.status in (401, 402)} - {
    "api_key_required",
    "credential_invalid",
    "identity_unsupported",
} | {"idempotency_key_not_covered"}
# Their askers are no callers of ours: Stripe, and scripts of browsers.
NOBODYS = {"invalid_webhook_signature"}


@pytest.mark.parametrize(
    "code", [code for code, meaning in CODES.items() if 400 <= meaning.status < 500]
)
def test_every_refusal_says_what_to_do(code: str) -> None:
    headers = {"Allow": "GET"} if code == "method_not_allowed" else {}
    actions = completed(Problem(code, "…", headers=headers))
    if code in NOBODYS or (code in OWN and code != "settlement_pending"):
        assert actions == ()
    else:
        assert actions
    for action in actions:
        assert action.do in DO
        assert action.url.startswith(BASE)
        assert (action.after_s is not None) == (action.do == "repeat")


def test_a_pending_payment_is_asked_for_by_the_same_request() -> None:
    own = NextAction("GET", BASE + "/payments/1", "nothing", "read")
    headers = {"Retry-After": "7"}
    first, second = completed(
        Problem("settlement_pending", "…", headers=headers, next_actions=[own])
    )
    assert (first.do, first.method, first.url, first.after_s) == ("repeat", "POST", URL, 7)
    assert second == own


def test_nothing_is_advised_where_nobody_can_do_anything() -> None:
    assert completed(Problem("internal_error", "…")) == ()


def test_methods_that_are_offered() -> None:
    refused = Problem("method_not_allowed", "…", headers={"Allow": "GET, HEAD"})
    assert [action.method for action in completed(refused)] == ["GET", "HEAD"]


def test_every_code_that_is_named_exists() -> None:
    assert set(advice._SAME) | advice._TRANSFERS <= set(CODES)
