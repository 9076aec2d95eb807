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
from gateway.pricing.quote import Line, PriceRequest, PriceRule, Quote, Usage, charge, quote
from gateway.pricing.rules import RULES, compile_price

REQUEST = PriceRequest("GET", b"/v1/forecast/oslo", None, b"", None)
USAGES = st.one_of(
    st.none(),
    st.builds(
        Usage,
        counts=st.lists(
            st.tuples(st.sampled_from(["tokens_in", "tokens_out"]), st.integers(0, 10**12)),
            max_size=3,
        ).map(tuple),
        amount_units=st.one_of(st.none(), st.integers(0, 2 * MAX_UNITS)),
    ),
)

# One configured example of every rule. A rule without one fails the first test below.
EXAMPLES: dict[str, Price] = {
    "free": Price("free", 0, {}),
    "flat": Price("flat", 2_000, {}),
}


def test_every_rule_is_tested_here() -> None:
    assert set(EXAMPLES) == set(RULES)


@pytest.mark.parametrize("name", RULES)
@given(usage=USAGES)
def test_the_charge_is_never_above_the_quote(name: str, usage: Usage | None) -> None:
    rule = compile_price(EXAMPLES[name])
    quoted = quote(rule, REQUEST)
    assert rule.name == name
    assert 0 <= charge(quoted, usage) <= quoted.max_units <= MAX_UNITS
    assert sum(line.units for line in quoted.breakdown) == quoted.max_units
    assert quoted.price_version == rule.version
    if rule.fixed_units is not None:
        assert quoted.max_units == rule.fixed_units
    assert rule.describe()["rule"] == name


@given(st.integers(1, MAX_UNITS), st.integers(1, MAX_UNITS))
def test_a_flat_version_is_its_price(a: int, b: int) -> None:
    assert (Flat(a).version == Flat(b).version) == (a == b)


def test_flat_is_charged_whole_whatever_was_used() -> None:
    quoted = quote(Flat(2_000), REQUEST)
    assert quoted.breakdown == (Line("call", 2_000),)
    assert charge(quoted, None) == 2_000
    assert charge(quoted, Usage((("tokens", 1),))) == 2_000


def test_a_stated_amount_counts_up_to_the_quote() -> None:
    quoted = quote(Flat(2_000), REQUEST)
    assert charge(quoted, Usage(amount_units=0)) == 0
    assert charge(quoted, Usage(amount_units=1_999)) == 1_999
    assert charge(quoted, Usage(amount_units=2_001)) == 2_000


@dataclass(frozen=True)
class Broken:
    """A rule that answers whatever the test says. Stands for a future rule with a fault."""

    quoted: Quote | None
    charged: int
    name = "broken"
    version = "1"
    fixed_units = None
    needs_body = False

    def quote(self, request: PriceRequest) -> Quote:
        assert self.quoted is not None
        return self.quoted

    def charge(self, quote: Quote, usage: Usage | None) -> int:
        return self.charged

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
    assert charge(quote(broken(5, 5, charged=9), REQUEST), None) == 5
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
