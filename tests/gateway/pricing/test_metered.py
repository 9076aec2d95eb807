"""Prices by usage: exact sums, rounded up once, and lines that add up."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import Problem
from gateway.forms import Price
from gateway.money import parse_usd
from gateway.pricing.quote import BEYOND, Charge, Line, PriceRequest, Usage, charge, quote
from gateway.pricing.rates import parse_rate
from gateway.pricing.rules import compile_price

JSON = b"application/json"
CHAT: dict[str, Any] = {
    "max": "$0.50",
    "when_unknown": "max",
    "rates": {"tokens_in": "$0.15 per 1M tokens", "tokens_out": "$0.60 / 1M"},
}


def asked(body: bytes | None = b"{}", content_type: bytes = JSON) -> PriceRequest:
    return PriceRequest("POST", b"/v1/chat", None, content_type, body)


def cost(options: dict[str, Any], usage: Usage | None, body: bytes | None = b"{}") -> Charge:
    return charge(quote(compile_price(Price("metered", 0, options)), asked(body)), usage)


def used(**counts: int) -> Usage:
    return Usage(tuple(counts.items()))


def test_tokens_cost_their_rate() -> None:
    made = cost({**CHAT, "fixed": "$0.001"}, used(tokens_in=2_000_000, tokens_out=500_000))
    assert made.units == 1_000 + 300_000 + 300_000 - 101_000
    assert made.beyond
    made = cost({**CHAT, "fixed": "$0.001"}, used(tokens_in=1_000_000, tokens_out=500))
    assert made.breakdown == (
        Line("call", 1_000),
        Line("tokens_in", 150_000, 1_000_000, "$0.15 per 1M tokens"),
        Line("tokens_out", 300, 500, "$0.60 / 1M"),
    )
    assert made.units == 151_300
    assert not made.beyond


@given(st.integers(0, 10**6), st.integers(0, 10**5))
def test_the_sum_is_rounded_up_once(tokens_in: int, tokens_out: int) -> None:
    made = cost(CHAT, used(tokens_in=tokens_in, tokens_out=tokens_out))
    exact = Fraction(150_000 * tokens_in, 10**6) + Fraction(600_000 * tokens_out, 10**6)
    assert exact <= made.units < exact + 1
    assert sum(line.units for line in made.breakdown) == made.units


def test_a_part_of_a_unit_costs_a_whole_one_once() -> None:
    assert cost(CHAT, used(tokens_in=1, tokens_out=0)).units == 1
    # 0.15 + 0.6 units, not one and one.
    made = cost(CHAT, used(tokens_in=1, tokens_out=1))
    assert [line.units for line in made.breakdown] == [1, 0]
    assert cost(CHAT, used(tokens_in=0, tokens_out=0)).units == 0


@pytest.mark.parametrize(
    ("unknown", "units"), [("max", 500_000), ("min", 2_000), ("$0.01", 10_000)]
)
def test_what_is_not_known_costs_what_was_said(unknown: str, units: int) -> None:
    options = {**CHAT, "min": "$0.002", "when_unknown": unknown}
    assert cost(options, None).units == units
    assert cost(options, used(tokens_in=10)).units == units
    # No count at all is a number that a rule believes.
    for odd in (-1, -(10**30), 10**15 + 1, 10**80):
        assert cost(options, used(tokens_in=odd, tokens_out=1)).units == units
    assert cost(options, used(tokens_in=0, tokens_out=10**40)).units == units


def test_what_is_known_is_paid_in_any_case() -> None:
    options = {**CHAT, "min": "$0.002", "when_unknown": "min"}
    made = cost(options, used(tokens_out=100_000))
    assert made.units == 60_000
    assert cost(options, used(tokens_in=1, tokens_out=1)).breakdown[-1] == Line(
        "least a call costs", 1_999
    )


def test_more_than_the_maximum_is_cut_and_said() -> None:
    made = cost(CHAT, used(tokens_in=10**9, tokens_out=0))
    assert made.units == 500_000
    assert made.beyond
    assert made.breakdown[-1] == Line(BEYOND, 500_000 - 150_000_000)


MODELS: dict[str, Any] = {
    "max": "$0.10",
    "when_unknown": "max",
    "models": {
        "small": {"rates": {"tokens_out": "$0.60 / 1M"}},
        "Big": {"max": "$1", "rates": {"tokens_out": "$6 / 1M"}},
    },
}


def test_the_model_chooses_the_rates() -> None:
    assert cost(MODELS, used(tokens_out=1_000), b'{"model": "small"}').units == 600
    assert cost(MODELS, used(tokens_out=1_000), b'{"model": "Big"}').units == 6_000
    # An upstream may take it for the same model: so it is the same price.
    assert cost(MODELS, used(tokens_out=1_000), b'{"model": " bIG"}').units == 6_000
    rule = compile_price(Price("metered", 0, MODELS))
    assert quote(rule, asked(b'{"model": "small"}')).max_units == 100_000
    assert quote(rule, asked(b'{"model": "Big"}')).max_units == 1_000_000
    assert quote(rule, asked(None)).max_units == 1_000_000


def test_a_model_in_another_spelling_costs_the_dearer_of_what_it_may_be() -> None:
    every = {**MODELS["models"], "*": {"min": "$0.001", "rates": {"tokens_out": "$3 / 1M"}}}
    by_model = {**MODELS, "models": every}
    for odd in (b'{"model": "SMALL"}', b'{"model": ["small"]}', b'{"model": "small\\u0000"}'):
        assert cost(by_model, used(tokens_out=1_000), odd).units == 3_000
    assert cost(by_model, used(tokens_out=1_000), b'{"model": "BIG"}').units == 6_000
    assert cost(by_model, used(tokens_out=0), b'{"model": "BIG"}').units == 1_000
    assert cost(by_model, used(tokens_out=1_000), b'{"model": "small"}').units == 600
    assert cost(by_model, used(tokens_out=1_000), b'{"model": null}').units == 3_000
    rule = compile_price(Price("metered", 0, by_model))
    quoted = quote(rule, asked(b'{"model": "BIG"}'))
    assert (quoted.max_units, quoted.price_version) == (1_000_000, rule.version)
    assert quoted.rule.reads == rule.reads
    assert quoted.rule.so_far({"tokens_out": 1_000}) == 6_000


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"model": "other"}', "price_unknown"),
        (b'{"model": 3}', "price_unknown"),
        (b"{}", "price_unknown"),
        (b'{"model": "small", "model": "Big"}', "invalid_request"),
        (b'{"model": "small", "Model": "Big"}', "invalid_request"),
        (b'{"model": "small", "model ": "Big"}', "invalid_request"),
        (b'{"model": "small", "n": NaN}', "invalid_request"),
        (b'["model"]', "invalid_request"),
        (b"model=small", "invalid_request"),
        (b"", "invalid_request"),
        (b"\xef\xbb\xbf{}", "invalid_request"),
        (b'{"model": "\\ud800"}', "invalid_request"),
    ],
)
def test_a_body_two_readers_may_read_differently_is_refused(body: bytes, code: str) -> None:
    rule = compile_price(Price("metered", 0, MODELS))
    with pytest.raises(Problem) as refused:
        quote(rule, asked(body))
    assert refused.value.code == code


@pytest.mark.parametrize("kind", [b"", b"text/plain", b"application/jsonp", b"multipart/form-data"])
def test_a_body_that_says_it_is_something_else_is_refused(kind: bytes) -> None:
    with pytest.raises(Problem) as refused:
        quote(compile_price(Price("metered", 0, MODELS)), asked(b'{"model": "small"}', kind))
    assert refused.value.code == "unsupported_media_type"


@pytest.mark.parametrize(
    ("text", "each"),
    [
        ("$0.15 / 1M", Fraction(150_000, 10**6)),
        ("$0.15/1M", Fraction(150_000, 10**6)),
        ("$0.15 per 1M tokens", Fraction(150_000, 10**6)),
        ("$3 per 1K", Fraction(3_000)),
        ("$0.002 per call", Fraction(2_000)),
        ("$0.01 per MiB", Fraction(10_000, 1 << 20)),
        ("$1 / 3", Fraction(1_000_000, 3)),
        ("$0 / 1M", Fraction(0)),
    ],
)
def test_rates_are_exact(text: str, each: Fraction) -> None:
    assert parse_rate(text).each == each


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0.15",
        "$0.15",
        "$0.15 /",
        "$-1 / 1M",
        "$0.15 / 0",
        "$1e3 / 1M",
        "$0.15 / 1 000",
        0.15,
        "$0.15 / -1M",
        "$0.0000001 / 1",
        "$0,15 / 1M",
        "$١ / 1M",
        "$1 / ١",
        " $1 / 1M",
        "$1 / 1M\n",
    ],
)
def test_what_is_no_rate_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r"rate is written|dollar amount"):
        parse_rate(text)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max": None}, "max is missing"),
        ({"max": "$0"}, "above zero"),
        ({"max": 1}, "in quotes"),
        ({"when_unknown": None}, "when_unknown is missing"),
        ({"when_unknown": "often"}, "when_unknown"),
        ({"when_unknown": "$0.51"}, "between min and max"),
        ({"when_unknown": "$0.01", "min": "$0.02"}, "between min and max"),
        ({"fixed": "$0.6"}, "in this order"),
        ({"fixed": "$0.02", "min": "$0.01"}, "in this order"),
        ({"rates": {}}, "rates is missing"),
        ({"rates": {"Tokens": "$1 / 1M"}}, "not a name"),
        ({"rates": {"*": "$1 / 1M"}}, "not a name"),
        ({"rates": {"pages": "$1 / 1M"}}, "usage.pages is missing"),
        ({"usage": {"bytes_in": "x"}}, "bytes_in"),
        ({"usage": {"tokens_in": ""}}, "a place in JSON"),
        ({"usage": {"tokens_in": 3}}, "a place in JSON"),
        ({"events": 3}, "events"),
        ({"model": "model"}, "models is missing"),
        ({"models": {}}, "models is a table"),
        ({"models": {"a": 1}}, "models.a is a table"),
        ({"models": {"a": {"when": 1}}}, "models.a.when is not an option"),
        ({"models": {"a": {}, "A ": {}}}, "twice"),
        ({"models": {"a": {"max": "$0"}}}, "models.a: max is above zero"),
        ({"prize": 1}, "prize is not an option"),
    ],
)
def test_terms_that_do_not_hold_together_are_refused(change: dict[str, Any], says: str) -> None:
    options = {k: v for k, v in {**CHAT, **change}.items() if v is not None}
    with pytest.raises(ValueError, match=says):
        compile_price(Price("metered", 0, options))


def test_the_terms_are_shown_as_they_were_written() -> None:
    told = compile_price(Price("metered", 0, CHAT)).describe()
    assert told["price"] == "up to $0.50"
    assert told["max_units"] == parse_usd("$0.50")
    assert told["rates"] == CHAT["rates"]
    assert told["when_unknown_units"] == told["max_units"]
