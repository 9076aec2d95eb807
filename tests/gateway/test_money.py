"""Money as text: exact, strict, and never a float."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import money

UNITS = st.integers(min_value=0, max_value=money.MAX_UNITS)


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("$0.002", 2_000),
        ("0.002", 2_000),
        ("$0", 0),
        ("$0.000001", 1),
        ("$1", 1_000_000),
        ("$1.50", 1_500_000),
        ("$0.10", 100_000),
        ("$20", 20_000_000),
        ("1.000000", 1_000_000),
        ("$1000000000", money.MAX_UNITS),
    ],
)
def test_parse_usd(text: str, units: int) -> None:
    assert money.parse_usd(text) == units


@pytest.mark.parametrize(
    "text",
    [
        "",
        "$",
        ".",
        "$.5",
        "5.",
        "$0.0000001",  # a tenth of a unit
        "$0.0020000",  # exact, but more decimals than a unit has
        "-1",
        "$-1",
        "-$1",
        "+1",
        " 1",
        "1 ",
        "1\n",
        "\n1",
        "01",
        "$00.5",
        "1_000",
        "1,000",
        "1e3",
        "1E-3",
        "0x10",
        "NaN",
        "Infinity",
        "١",
        "１",
        "$$1",
        "1$",
        "€1",
        "1.2.3",
        "$1000000000.000001",
        "9" * 5000,
    ],
)
def test_parse_usd_refuses(text: str) -> None:
    with pytest.raises(ValueError):
        money.parse_usd(text)


def test_the_error_does_not_repeat_a_huge_input() -> None:
    with pytest.raises(ValueError) as raised:
        money.parse_usd("9" * 5000)
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize(
    ("units", "text"),
    [
        (0, "$0"),
        (1, "$0.000001"),
        (2_000, "$0.002"),
        (10_000, "$0.01"),
        (500_000, "$0.50"),
        (1_000_000, "$1"),
        (1_234_500, "$1.2345"),
        (-10_000, "-$0.01"),
        (-5_000_000, "-$5"),
    ],
)
def test_format_usd(units: int, text: str) -> None:
    assert money.format_usd(units) == text


@given(UNITS)
def test_usd_round_trip(units: int) -> None:
    text = money.format_usd(units)
    assert money.parse_usd(text) == units
    assert money.parse_usd(text.removeprefix("$")) == units
    assert Fraction(text.removeprefix("$")) == Fraction(units, 1_000_000)


@pytest.mark.parametrize(
    ("units", "per_usd", "text"),
    [
        (2_000, 100, "0.2"),
        (10_000, 100, "1"),
        (1, 100, "0.0001"),
        (1_000_000, 100, "100"),
        (0, 100, "0"),
        (-2_000, 100, "-0.2"),
        (1, 1_000, "0.001"),
        (1, 10, "0"),  # 0.00001 credits: below what four places show
        (-1, 10, "0"),  # and never "-0"
        (19, 10, "0.0001"),  # cut, not rounded
        (999_999, 1, "0.9999"),
    ],
)
def test_format_credits(units: int, per_usd: int, text: str) -> None:
    assert money.format_credits(units, per_usd) == text


@given(st.integers(-(10**18), 10**18), st.integers(1, 10**6))
def test_credits_are_exact_or_cut_towards_zero(units: int, per_usd: int) -> None:
    text = money.format_credits(units, per_usd)
    assert len(text.partition(".")[2]) <= 4
    assert text not in {"-0", ""} and not text.endswith(".")
    shown, true = Fraction(text), Fraction(units * per_usd, 1_000_000)
    assert abs(shown) <= abs(true) and abs(true - shown) < Fraction(1, 10_000)
    if money.credits_exact(per_usd):
        assert shown == true


@given(st.integers(1, 10**6))
def test_credits_exact_says_the_truth_about_one_unit(per_usd: int) -> None:
    shown = Fraction(money.format_credits(1, per_usd))
    assert money.credits_exact(per_usd) == (shown == Fraction(per_usd, 1_000_000))


@given(st.integers(0, 10**9), st.sampled_from([1, 10, 100, 1_000, 10_000]))
def test_credits_to_units(count: int, per_usd: int) -> None:
    if count * 1_000_000 // per_usd > money.MAX_UNITS:
        with pytest.raises(ValueError):
            money.credits_to_units(count, per_usd)
        return
    units = money.credits_to_units(count, per_usd)
    assert Fraction(units * per_usd, 1_000_000) == count
    assert money.format_credits(units, per_usd) == str(count)


@pytest.mark.parametrize(("count", "per_usd"), [(3, 7), (-1, 100), (1, 0), (10**12, 100)])
def test_credits_to_units_refuses(count: int, per_usd: int) -> None:
    with pytest.raises(ValueError):
        money.credits_to_units(count, per_usd)


@pytest.mark.parametrize("per_usd", [0, -100])
def test_a_rate_must_be_positive(per_usd: int) -> None:
    assert not money.credits_exact(per_usd)
    with pytest.raises(ValueError):
        money.format_credits(1, per_usd)


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("007", 7), ("9" * 78, 10**78 - 1)])
def test_parse_uint(text: str, value: int) -> None:
    assert money.parse_uint(text) == value


@pytest.mark.parametrize(
    "text", ["", " 1", "1\n", "+1", "-1", "1_0", "١", "²", "1.0", "0x1", "9" * 79, "NaN"]
)
def test_parse_uint_refuses(text: str) -> None:
    with pytest.raises(ValueError):
        money.parse_uint(text)


def test_parse_uint_maximum() -> None:
    assert money.parse_uint("10", maximum=10) == 10
    with pytest.raises(ValueError):
        money.parse_uint("11", maximum=10)


@given(st.text(max_size=12))
def test_arbitrary_text_is_parsed_exactly_or_refused(text: str) -> None:
    try:
        units = money.parse_usd(text)
    except ValueError:
        return
    assert text.isascii()
    assert Fraction(text.removeprefix("$")) * 1_000_000 == units
