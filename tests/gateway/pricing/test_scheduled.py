"""Prices that follow one another: nobody pays more than they saw."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.forms import Price
from gateway.pricing.flat import Flat
from gateway.pricing.metered import Metered
from gateway.pricing.quote import PriceRequest, PriceRule, Usage, charge, quote
from gateway.pricing.rules import compile_price
from gateway.pricing.scheduled import Scheduled, Step, after
from gateway.pricing.several import OR, lowest

ASKED = PriceRequest("GET", b"/", None, b"", None)


def at(now_s: int, since_s: int | None = None) -> PriceRequest:
    return replace(ASKED, now_s=now_s, since_s=since_s)


def metered(most: str, tokens: str) -> PriceRule:
    terms = {"max": most, "rates": {"tokens_out": tokens}, "when_unknown": "max"}
    return compile_price(Price("metered", 0, terms))


def scheduled(*prices: dict[str, Any]) -> PriceRule:
    return compile_price(Price("scheduled", 0, {"prices": list(prices)}))


TWO = scheduled({"price": "$0.01"}, {"from": "1970-01-01T00:16:40Z", "price": "$0.02"})


@pytest.mark.parametrize(
    ("now_s", "since_s", "units"),
    [
        (0, None, 10_000),
        (999, None, 10_000),
        (1_000, None, 20_000),
        (1_000, 999, 10_000),
        (1_400, 999, 10_000),
        (1_400, 1_000, 20_000),
        (5_000, 4_000, 20_000),
        (999, 500, 10_000),
    ],
)
def test_a_raise_is_charged_once_nobody_can_have_seen_the_price_before(
    now_s: int, since_s: int | None, units: int
) -> None:
    quoted = quote(TWO, at(now_s, since_s))
    assert (quoted.max_units, quoted.price_version) == (units, f"flat:{units}")
    assert quoted.exact
    assert charge(quoted, None).units == units


def test_a_lower_price_holds_at_once() -> None:
    rule = scheduled({"price": "$0.02"}, {"from": "1970-01-01T00:16:40Z", "price": "$0.01"})
    assert quote(rule, at(1_000, 0)).max_units == 10_000
    assert quote(rule, at(999, 0)).max_units == 20_000


def test_a_price_that_came_and_went_was_seen_too() -> None:
    rule = scheduled(
        {"price": "$0.03"},
        {"from": "1970-01-01T00:16:40Z", "price": "$0.01"},
        {"from": "1970-01-01T00:16:41Z", "price": "$0.02"},
    )
    assert quote(rule, at(1_100, 900)).max_units == 10_000
    assert quote(rule, at(1_100, 1_001)).max_units == 20_000


@given(
    tokens=st.one_of(st.none(), st.integers(0, 100_000)),
    maxima=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    rates=st.tuples(st.integers(1, 50), st.integers(1, 50)),
)
def test_the_lowest_of_two_meters_is_neithers_more(
    tokens: int | None, maxima: tuple[int, int], rates: tuple[int, int]
) -> None:
    rules = [
        metered(f"${most / 1000:.3f}", f"${rate / 1000:.3f} / 1K")
        for most, rate in zip(maxima, rates, strict=True)
    ]
    quotes = [quote(rule, ASKED) for rule in rules]
    both = lowest(quotes)
    usage = None if tokens is None else Usage((("tokens_out", tokens),))
    charged = [charge(each, usage).units for each in quotes]
    assert charge(both, usage).units == min(charged)
    assert both.max_units == min(each.max_units for each in quotes)
    if rules[0].version == rules[1].version:
        assert both.price_version == rules[0].version
    else:
        assert both.price_version == OR.join(rule.version for rule in rules)
        assert both.rule.reads is not None and both.rule.metered


def test_a_meter_beside_a_flat_price_still_reads_its_usage() -> None:
    quotes = [quote(Flat(10_000), ASKED), quote(metered("$0.05", "$1 / 1K"), ASKED)]
    both = lowest(quotes)
    assert both.max_units == 10_000
    assert both.rule.reads is not None and "tokens_out" in both.rule.reads.meters
    assert charge(both, Usage((("tokens_out", 3),))).units == 3_000
    assert charge(both, Usage((("tokens_out", 30),))).units == 10_000


def test_a_change_without_notice_keeps_what_was_seen() -> None:
    changed = after(Flat(10_000), 1_000, Flat(20_000))
    assert [quote(changed, at(now, now - 100)).max_units for now in (999, 1_000, 1_100)] == [
        10_000,
        10_000,
        20_000,
    ]
    # Of a schedule that was replaced only what had begun was seen, and the new one goes on.
    new = scheduled({"price": "$0.04"}, {"from": "1970-01-01T00:50:00Z", "price": "$0.05"})
    again = after(TWO, 2_000, new)
    seen = [step.from_s for step in again.steps]
    assert seen == [0, 1_000, 2_000, 3_000]
    assert [quote(again, at(s)).max_units for s in (0, 1_500, 2_000, 3_000)] == [
        10_000,
        20_000,
        40_000,
        50_000,
    ]
    early = after(TWO, 500, Flat(30_000))  # before its raise began
    assert [step.from_s for step in early.steps] == [0, 500]


def test_what_is_shown() -> None:
    assert TWO.describe() == {
        "rule": "scheduled",
        "price": "$0.01",
        "prices": [
            {"price": Flat(10_000).describe()},
            {"from": "1970-01-01T00:16:40Z", "price": Flat(20_000).describe()},
        ],
    }
    assert isinstance(TWO, Scheduled)
    assert (TWO.at(999), TWO.at(1_000)) == (Flat(10_000), Flat(20_000))
    assert not TWO.needs_body and not TWO.metered
    assert isinstance(metered("$1", "$1 / 1K"), Metered)
    assert Scheduled((Step(0, metered("$1", "$1 / 1K")),), "x").metered


def test_a_time_may_be_one_of_toml() -> None:
    when = datetime(1970, 1, 1, 0, 16, 40, tzinfo=UTC)
    assert scheduled({"price": "$0.01"}, {"from": when, "price": "$0.02"}) == TWO


@pytest.mark.parametrize(
    ("prices", "says"),
    [
        ([{"price": "$1"}], "a list such as"),
        ("$1", "a list such as"),
        ([{"price": "$1"}, {"price": "$2"}], "from is a time"),
        ([{"price": "$1"}, {"from": "2027-01-01", "price": "$2"}], "from is a time"),
        ([{"price": "$1"}, {"from": "2027-01-01T00:00:00", "price": "$2"}], "from is a time"),
        ([{"price": "$1"}, {"from": "2027-01-01T00:00:00.5Z", "price": "$2"}], "whole seconds"),
        ([{"price": "$1"}, {"from": 5, "price": "$2"}], "from is a time"),
        (
            [{"from": "2027-01-01T00:00:00Z", "price": "$1"}, {"price": "$2"}],
            "holds until the second",
        ),
        (
            [
                {"price": "$1"},
                {"from": "2027-01-02T00:00:00Z", "price": "$2"},
                {"from": "2027-01-01T00:00:00Z", "price": "$3"},
            ],
            "in the order of their times",
        ),
        (
            [{"price": "free"}, {"from": "2027-01-01T00:00:00Z", "price": "$2"}],
            r"prices\[0\].price is an amount",
        ),
        ([{"price": "$1"}, {"from": "2027-01-01T00:00:00Z", "price": "$2", "x": 1}], "not an opt"),
        ([{"price": "$1"}, "x"], "is a table"),
    ],
)
def test_a_schedule_that_is_none_is_refused(prices: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        compile_price(Price("scheduled", 0, {"prices": prices}))
