"""How much is bought: dollars and credits, their bounds, and what is suggested instead."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import Problem
from gateway.money import UNITS_PER_USD, format_usd
from gateway.payments import offers
from gateway.payments.purchase import MAX_PURCHASE_UNITS, amount_of, shown
from gateway.settings import Settings
from tests.gateway.payments.parts import PAY_TO, SETTLER_KEY, blank, settings_for

SHOP = settings_for()  # 100 credits to the dollar, in multiples of 500, from one cent


def refused(shop: Settings, asked: dict[str, Any]) -> Problem:
    with pytest.raises(Problem) as problem:
        amount_of(shop, asked)
    assert problem.value.status == 400
    return problem.value


# --- dollars --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("usd", "units"),
    [
        ("1", 1_000_000),
        ("$1", 1_000_000),
        ("2.50", 2_500_000),
        ("0.01", 10_000),
        ("0.010001", 10_001),
        ("100000", 100_000_000_000),
    ],
)
def test_dollars_are_exact(usd: str, units: int) -> None:
    assert amount_of(SHOP, {"amount_usd": usd}) == units


@given(st.integers(10_000, MAX_PURCHASE_UNITS))
@settings(max_examples=100, deadline=None)
def test_any_amount_within_the_bounds_can_be_bought(units: int) -> None:
    assert amount_of(SHOP, {"amount_usd": format_usd(units)}) == units
    assert offers.terms_for_credits(SHOP, units)


@pytest.mark.parametrize(
    "usd",
    [
        "", " 1", "1 ", "-1", "+1", "1,000", "1e3", "0x1", "1.", ".5", "1.0000001", "01", "NaN",
        "１", "$$1", "1$", "one", "9" * 40, "0", "0.000001", "0.009999", "100000.000001",
    ],
)  # fmt: skip
def test_odd_dollars_are_refused(usd: str) -> None:
    assert refused(SHOP, {"amount_usd": usd}).code == "invalid_amount"


@pytest.mark.parametrize("usd", [1, 1.5, True, [], {}, ["1"], b"1"], ids=repr)
def test_dollars_are_text(usd: object) -> None:
    """A JSON number would pass through a float at one of the two ends."""
    assert refused(SHOP, {"amount_usd": usd}).code == "invalid_request"


def test_out_of_bounds_says_the_bounds() -> None:
    problem = refused(SHOP, {"amount_usd": "0.001"})
    assert "$0.01" in problem.detail and "$100000" in problem.detail
    assert problem.members["packs_usd"] == ["$1", "$5", "$20"]


# --- credits --------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "units"), [(500, 5_000_000), (10_000_000, 100_000_000_000)])
def test_credits_are_converted(count: int, units: int) -> None:
    assert amount_of(SHOP, {"credits": count}) == units


@pytest.mark.parametrize(
    ("count", "suggested"),
    [
        (1, 500),
        (499, 500),
        (501, 1_000),
        (0, 500),
        (-1, 500),
        (-500, 500),
        (-(10**30), 500),
        (9_999_999, 10_000_000),
        (10_000_001, 10_000_000),
        (10_000_500, 10_000_000),
        (10**12, 10_000_000),
        (10**15, 10_000_000),
        (10**30, 10_000_000),
        (10**4_299, 10_000_000),
    ],
    ids=lambda n: str(n)[:12],
)
def test_a_number_that_is_not_sold_is_answered_with_one_that_is(count: int, suggested: int) -> None:
    problem = refused(SHOP, {"credits": count})
    assert problem.code == "invalid_amount"
    assert problem.members == {"suggested_credits": suggested, "pack_multiple": 500}
    assert amount_of(SHOP, {"credits": suggested}) > 0


RATES = [n for n in range(1, 1_000_001) if 1_000_000 % n == 0]


@given(
    per_usd=st.sampled_from(RATES),
    multiple=st.sampled_from([1, 7, 100, 500, 12_345]),
    least=st.sampled_from(["$0.000001", "$0.01", "$0.77", "$1"]),
    count=st.integers(-10, 10**12) | st.integers(),
)
@settings(max_examples=200, deadline=None)
def test_what_is_suggested_can_be_bought_at_every_rate(
    per_usd: int, multiple: int, least: str, count: int
) -> None:
    shop = settings_for(
        credits={
            "per_usd": per_usd,
            "pack_multiple": multiple,
            "min_onchain": least,
            "packs": ["$1"],
        }
    )
    try:
        units = amount_of(shop, {"credits": count})
    except Problem as problem:
        assert problem.code == "invalid_amount"
        suggested = problem.members["suggested_credits"]
        assert suggested % multiple == 0
        units = amount_of(shop, {"credits": suggested})
        assert units == suggested * UNITS_PER_USD // per_usd
        # The nearest upwards, unless that is more than is sold at once.
        if suggested < count:
            assert units + multiple * UNITS_PER_USD // per_usd > MAX_PURCHASE_UNITS
        elif suggested - multiple >= max(count, 1):
            refused(shop, {"credits": suggested - multiple})
    else:
        assert units * per_usd == count * UNITS_PER_USD
    # Whatever is sold is offered by some network.
    assert offers.terms_for_credits(shop, units)


@pytest.mark.parametrize("count", ["500", 500.0, True, [500], {}], ids=repr)
def test_credits_are_a_whole_number(count: object) -> None:
    assert refused(SHOP, {"credits": count}).code == "invalid_request"


# --- both, neither, and where ---------------------------------------------------------------


@pytest.mark.parametrize(
    "asked", [{}, {"amount_usd": "1", "credits": 500}, {"amount_usd": None, "credits": None}]
)
def test_one_of_the_two_is_said(asked: dict[str, Any]) -> None:
    assert refused(SHOP, asked).code == "invalid_request"


def test_null_is_not_said() -> None:
    assert amount_of(SHOP, {"amount_usd": None, "credits": 500}) == 5_000_000
    assert amount_of(SHOP, {"amount_usd": "5", "credits": None}) == 5_000_000


def test_the_bound_is_that_of_a_network_that_settles() -> None:
    """Below it a 402 would have no offer in it."""

    def row(least: str, **more: str) -> dict[str, Any]:
        return {"rpc": ["http://x.test"], "pay_to": PAY_TO, "min_onchain": least, **more}

    shop = settings_for(
        chains={"base-sepolia": row("$0.01"), "base": row("$0.05", settler_key=SETTLER_KEY)}
    )
    assert refused(shop, {"amount_usd": "0.049999"}).code == "invalid_amount"
    assert offers.terms_for_credits(shop, amount_of(shop, {"amount_usd": "0.05"}))


# --- what is shown --------------------------------------------------------------------------


def test_a_payment_as_its_owner_sees_it() -> None:
    view = shown(SHOP, blank("pay_1", tx_hash="0x01", amount_units=2_500_000), None)
    assert view == {
        "payment_id": "pay_1",
        "state": "processing",
        "provider": "x402",
        "amount_usd": "$2.50",
        "amount_units": 2_500_000,
        "credits": "250",
        "created_at_ms": 1_700_000_000_000,
        "updated_at_ms": 1_700_000_000_000,
        "error": None,
        "network": "eip155:84532",
        "transaction": "0x01",
    }
    minted = shown(SHOP, blank("pay_1", state="succeeded", expires_ms=9), 2_499_999)
    assert (minted["minted"], minted["minted_units"]) == ("249.9999", 2_499_999)
    assert minted["expires_at_ms"] == 9
    card = shown(SHOP, blank("pay_1", provider="stripe", error_code="expired"), None)
    assert "transaction" not in card and card["error"] == "expired"
