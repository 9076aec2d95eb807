"""One payment, from the 402 to the credits."""

from __future__ import annotations

import pytest

from tests.e2e.stage import PRICE_UNITS, Api, Gateway
from tests.e2e.wallet import Wallet, offers, outcome, problem


async def test_a_call_is_paid_and_answered(
    gateway: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    before = gateway.received()
    async with gateway.client() as http:
        asked = await http.get(target)
        problem(asked, "payment_required")
        assert api.calls(target) == 0
        paid = await http.get(target, headers={"PAYMENT-SIGNATURE": wallet.pay(offers(asked)[0])})
    assert paid.status_code == 200, paid.text
    assert target in paid.text
    assert api.calls(target) == 1
    told = outcome(paid)
    assert told["success"] is True
    assert told["payer"] == wallet.address
    assert gateway.net.receipt(told["transaction"])["status"] == "0x1"
    assert gateway.received() == before + PRICE_UNITS
    assert gateway.transfers(wallet.address) == [
        ("mint", PRICE_UNITS, "x402"),
        ("capture", PRICE_UNITS, None),
    ]


@pytest.mark.parametrize("until_s", [2**62 + 1, 2**255, 2**256 - 1])
async def test_an_authorization_may_hold_for_ever(
    gateway: Gateway, api: Api, wallet: Wallet, target: str, until_s: int
) -> None:
    """validBefore is a uint256, and no column is."""
    async with gateway.client() as http:
        offer = offers(await http.get(target))[0]
        header = {"PAYMENT-SIGNATURE": wallet.pay(offer, valid_before_s=until_s)}
        paid = await http.get(target, headers=header)
        again = await http.get(target, headers=header)
    assert paid.status_code == 200, paid.text
    assert (again.status_code, again.headers["farebox-replayed"]) == (200, "true")
    assert api.calls(target) == 1
    assert [p["valid_before_s"] for p in gateway.payments(wallet.address)] == [2**62]
    assert gateway.balance(wallet.address) == (0, 0)
