"""What all price rules owe: a bounded quote that adds up, a charge within it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.forms import Price
from gateway.money import MAX_UNITS
from gateway.pricing.flat import Flat
from gateway.pricing.quote import (
    BEYOND,
    Allowance,
    Line,
    PriceRequest,
    PriceRule,
    Quote,
    Reads,
    Usage,
    charge,
    quote,
)
from gateway.pricing.rules import RULES, compile_price

REQUEST = PriceRequest("GET", b"/v1/forecast/oslo", None, b"", None)
JSON = b"application/json"
METERS = ["tokens_in", "tokens_out", "bytes_in", "bytes_out", "sub_calls", "calls", "pages"]
# Also what no reader lets through: a rule must not depend on its reader.
COUNTS = st.one_of(st.integers(0, 2_000_000), st.integers(-(10**40), 10**40))
USAGES = st.one_of(
    st.none(),
    st.builds(
        Usage,
        counts=st.lists(st.tuples(st.sampled_from(METERS), COUNTS), max_size=9).map(tuple),
        amount_units=st.one_of(st.none(), st.integers(0, 2 * MAX_UNITS)),
    ),
)
REQUESTS = st.builds(
    PriceRequest,
    method=st.sampled_from(["GET", "POST"]),
    path=st.sampled_from([b"/v1/chat", b"/v1/LARGE/", b"/"]),
    query=st.sampled_from([None, b"", b"size=large", b"size=small&x=1"]),
    content_type=st.just(JSON),
    body=st.sampled_from([None, b"{}", b'{"model": "small"}', b'{"model":"big","n":2,"hd":true}']),
    allowance=st.one_of(
        st.none(),
        st.builds(
            Allowance,
            tier=st.sampled_from(["pro", "unknown"]),
            left=st.dictionaries(st.just("pages"), st.integers(-5, 5_000)),
        ),
    ),
    now_s=st.integers(0, 2_000),
    since_s=st.one_of(st.none(), st.integers(0, 2_000)),
)
RATES = {"tokens_in": "$0.15 / 1M", "tokens_out": "$0.60 per 1M tokens"}

# Configured examples of every rule. A rule without one fails the first test below.
EXAMPLES: dict[str, list[Price]] = {
    "free": [Price("free", 0, {})],
    "flat": [Price("flat", 2_000, {})],
    "metered": [
        Price("metered", 0, {"max": "$0.05", "rates": RATES, "when_unknown": "max"}),
        Price(
            "metered",
            0,
            {
                "max": "$0.000007",
                "fixed": "$0.000001",
                "min": "$0.000003",
                "when_unknown": "$0.000004",
                "rates": {"bytes_out": "$0.01 per MiB", "tokens_out": "$1 / 3"},
                "events": "tokens_out",
            },
        ),
        Price(
            "metered",
            0,
            {
                "max": "$0.01",
                "when_unknown": "min",
                "models": {
                    "big": {"max": "$1", "fixed": "$0.002", "rates": {"sub_calls": "$0.1 / 7"}},
                    "*": {"rates": RATES},
                },
            },
        ),
    ],
    "by_params": [
        Price(
            "by_params",
            0,
            {
                "cases": [
                    {"body": {"model": "big", "hd": True}, "price": "$0.5"},
                    {"query": {"size": ["large", "huge"]}, "price": "$0.25"},
                    {
                        "path": "/v1/large",
                        "price": {
                            "rule": "metered",
                            "max": "$1",
                            "rates": RATES,
                            "when_unknown": "max",
                        },
                    },
                ],
                "default": "$0.01",
            },
        ),
    ],
    "overage": [
        Price("overage", 0, {"consumable": "pages", "tiers": {"*": "$0.002 per call"}}),
        Price(
            "overage",
            0,
            {
                "consumable": "pages",
                "meter": "pages",
                "usage": "pages.done",
                "most": 2_000,
                "when_unknown": 7,
                "tiers": {"pro": "$0.01 / 3", "*": "$0.002 / 1"},
            },
        ),
    ],
    "scheduled": [
        Price(
            "scheduled",
            0,
            {
                "prices": [
                    {"price": "$0.01"},
                    {"from": "1970-01-01T00:16:40Z", "price": "$0.02"},
                    {
                        "from": "1970-01-01T00:25:00+00:00",
                        "price": {
                            "rule": "metered",
                            "max": "$0.05",
                            "rates": RATES,
                            "when_unknown": "max",
                        },
                    },
                ]
            },
        ),
    ],
}
EVERY = [(name, i) for name, examples in EXAMPLES.items() for i in range(len(examples))]


def test_every_rule_is_tested_here() -> None:
    assert set(EXAMPLES) == set(RULES)


@pytest.mark.parametrize(("name", "i"), EVERY)
@given(request=REQUESTS, usage=USAGES, held_units=st.one_of(st.none(), st.integers(0, 10**6)))
def test_the_charge_is_never_above_the_quote(
    name: str, i: int, request: PriceRequest, usage: Usage | None, held_units: int | None
) -> None:
    rule = compile_price(EXAMPLES[name][i])
    quoted = quote(rule, request)
    assert rule.name == name
    held = quoted.max_units if held_units is None else min(held_units, quoted.max_units)
    made = charge(quoted, usage, held_units)
    assert 0 <= made.units <= held <= quoted.max_units <= MAX_UNITS
    assert sum(line.units for line in made.breakdown) == made.units
    assert all(line.units >= 0 for line in made.breakdown if line.label != BEYOND)
    assert made.beyond == any(line.label == BEYOND for line in made.breakdown)
    assert sum(line.units for line in quoted.breakdown) == quoted.max_units
    if name != "scheduled":  # whose quotes are of the price they chose
        assert quoted.price_version == rule.version
    if rule.fixed_units is not None:
        assert quoted.max_units == rule.fixed_units
    assert rule.describe()["rule"] == name
    if quoted.rule.reads is None and (usage is None or usage.amount_units is None):
        # What depends on no answer is not changed by one.
        assert made == charge(quoted, None, held_units)
    if quoted.exact and usage is None and held_units is None:
        assert made.units == quoted.max_units


@pytest.mark.parametrize(("name", "i"), EVERY)
@given(request=REQUESTS)
def test_who_has_not_been_read_is_quoted_the_dearest(
    name: str, i: int, request: PriceRequest
) -> None:
    rule = compile_price(EXAMPLES[name][i])
    if rule.needs_body:
        unread = quote(rule, replace(request, body=None))
        assert unread.max_units >= quote(rule, request).max_units


@pytest.mark.parametrize(("name", "i"), EVERY)
def test_a_version_is_made_of_the_terms(name: str, i: int) -> None:
    price = EXAMPLES[name][i]
    version = compile_price(price).version
    assert compile_price(Price(price.rule, price.units, dict(price.options))).version == version
    others = {compile_price(other).version for n, j in EVERY for other in [EXAMPLES[n][j]]}
    assert len(others) == len(EVERY)


@given(st.integers(1, MAX_UNITS), st.integers(1, MAX_UNITS))
def test_a_flat_version_is_its_price(a: int, b: int) -> None:
    assert (Flat(a).version == Flat(b).version) == (a == b)


def test_flat_is_charged_whole_whatever_was_used() -> None:
    quoted = quote(Flat(2_000), REQUEST)
    assert quoted.breakdown == (Line("call", 2_000),)
    assert charge(quoted, None).units == 2_000
    assert charge(quoted, Usage((("tokens", 1),))).units == 2_000


def test_a_stated_amount_counts_up_to_the_quote() -> None:
    quoted = quote(Flat(2_000), REQUEST)
    assert charge(quoted, Usage(amount_units=0)).units == 0
    assert charge(quoted, Usage(amount_units=1_999)).units == 1_999
    assert charge(quoted, Usage(amount_units=2_001)).units == 2_000


@dataclass(frozen=True)
class Broken:
    """A rule that answers whatever the test says. Stands for a future rule with a fault."""

    quoted: Quote | None
    charged: int
    name = "broken"
    version = "1"
    fixed_units = None
    needs_body = False
    metered = False
    reads: Reads | None = None

    def quote(self, request: PriceRequest) -> Quote:
        assert self.quoted is not None
        return self.quoted

    def charge(self, quote: Quote, usage: Usage | None) -> tuple[Line, ...]:
        return (Line("x", self.charged),)

    def describe(self) -> dict[str, Any]:
        return {}


def broken(max_units: int, lines: int, charged: int = 0) -> PriceRule:
    bare = Broken(None, charged)
    return replace(bare, quoted=Quote(max_units, bare, (Line("x", lines),), "1"))


@pytest.mark.parametrize(("most", "lines"), [(-1, -1), (MAX_UNITS + 1, MAX_UNITS + 1), (5, 4)])
def test_a_rule_that_quotes_nonsense_is_stopped(most: int, lines: int) -> None:
    with pytest.raises(RuntimeError):
        quote(broken(most, lines), REQUEST)


def test_a_rule_that_charges_nonsense_is_stopped() -> None:
    assert charge(quote(broken(5, 5, charged=9), REQUEST), None).units == 5
    with pytest.raises(RuntimeError):
        charge(quote(broken(5, 5, charged=-1), REQUEST), None)
    with pytest.raises(RuntimeError):
        charge(quote(Flat(5), REQUEST), Usage(amount_units=-1))


@pytest.mark.parametrize(
    ("price", "says"),
    [
        (Price("flatt", 1, {}), "did you mean 'flat'"),
        (Price("barter", 1, {}), "known are"),
        (Price("flat", 0, {}), "free"),
        (Price("flat", 1, {"max": "$1"}), "no options"),
        (Price("free", 1, {}), "no amount"),
        (Price("flat", MAX_UNITS + 1, {}), "between"),
    ],
)
def test_a_price_that_is_not_one_is_refused(price: Price, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        compile_price(price)
