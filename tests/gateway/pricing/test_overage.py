"""A consumable with an allowance: what is included first, the rest at the rate of the tier."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import Problem
from gateway.forms import Price
from gateway.pricing.quote import Allowance, Line, PriceRequest, Usage, charge, quote
from gateway.pricing.rules import compile_price

CALLS: dict[str, Any] = {
    "consumable": "messages",
    "tiers": {"*": "$0.003 per call", "pro": "$0.001 per call"},
}
PAGES: dict[str, Any] = {
    "consumable": "pages",
    "meter": "pages",
    "usage": "result.pages",
    "most": 100,
    "when_unknown": 10,
    "tiers": {"*": "$0.003 / 1", "pro": "$0.001 / 3"},
}


def request(tier: str | None = None, left: int = 0, what: str = "pages") -> PriceRequest:
    plan = None if tier is None else Allowance(tier, {what: left})
    return PriceRequest("GET", b"/", None, b"", None, plan)


def test_a_call_is_included_or_costs_the_tier() -> None:
    rule = compile_price(Price("overage", 0, CALLS))
    assert not rule.metered
    for plan, units in [
        (request(), 3_000),
        (request("pro", 1, "messages"), 0),
        (request("pro", 0, "messages"), 1_000),
        (request("pro", -5, "messages"), 1_000),
        (request("basic", 0, "messages"), 3_000),
        (request("pro", 50, "pages"), 1_000),
    ]:
        quoted = quote(rule, plan)
        assert quoted.max_units == units
        assert charge(quoted, None).units == units
        assert charge(quoted, Usage((("calls", 7),))).units == units


@given(left=st.integers(-10, 200), used=st.integers(0, 200), pro=st.booleans())
def test_the_allowance_goes_first(left: int, used: int, pro: bool) -> None:
    rule = compile_price(Price("overage", 0, PAGES))
    quoted = quote(rule, request("pro" if pro else "basic", left))
    beyond = max(used - max(left, 0), 0)
    exact = -(-beyond * 1_000 // 3) if pro else beyond * 3_000
    made = charge(quoted, Usage((("pages", used),)))
    assert made.units == min(exact, quoted.max_units)
    assert made.beyond == (exact > quoted.max_units)


def test_what_is_not_known_counts_as_stated() -> None:
    quoted = quote(compile_price(Price("overage", 0, PAGES)), request("x", 4))
    assert quoted.max_units == 96 * 3_000
    assert charge(quoted, None).breakdown == (
        Line("pages, included", 0, 4),
        Line("pages, beyond", 18_000, 6, "$0.003 / 1"),
    )
    assert charge(quoted, Usage((("pages", -3),))).units == 18_000


def test_a_tier_without_a_rate_is_refused() -> None:
    rule = compile_price(Price("overage", 0, {**CALLS, "tiers": {"pro": "$1 per call"}}))
    with pytest.raises(Problem) as refused:
        quote(rule, request("basic"))
    assert refused.value.code == "price_unknown"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"consumable": ""}, "consumable is a name"),
        ({"tiers": {}}, "tiers is a table"),
        ({"tiers": {"*": "free"}}, "a rate is written"),
        ({"most": None}, "most is missing"),
        ({"most": True}, "most is missing"),
        ({"most": -1}, "most is missing"),
        ({"when_unknown": None}, "when_unknown is missing"),
        ({"when_unknown": 101}, "between 0 and most"),
        ({"usage": None}, "usage is missing"),
        ({"meter": "calls"}, "is for a meter"),
        ({"meter": "P"}, "meter is"),
        ({"most": 10**15}, "costs more"),
        ({"per": 1}, "not an option"),
    ],
)
def test_terms_that_do_not_hold_together_are_refused(change: dict[str, Any], says: str) -> None:
    options = {k: v for k, v in {**PAGES, **change}.items() if v is not None}
    with pytest.raises(ValueError, match=says):
        compile_price(Price("overage", 0, options))
