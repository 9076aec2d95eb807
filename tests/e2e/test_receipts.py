"""A payment's receipt verifies with nothing but the published address (Z13)."""

from __future__ import annotations

from gateway.payments.receipts import signer_of
from tests.e2e.stage import Api, Gateway
from tests.e2e.wallet import Wallet, buy, decode, offers


async def test_a_receipt_verifies_offline(
    gateway: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    async with gateway.client() as http:
        keys = (await http.get("/farebox/v1/receipts/keys")).json()
        header = {"PAYMENT-SIGNATURE": wallet.pay(offers(await http.get(target))[0])}
        paid = await http.get(target, headers=header)
        again = await http.get(target, headers=header)
        bought = await buy(http, wallet)
    for answer, where in ((paid, target), (bought, "/farebox/v1/credits/purchase")):
        told = decode(answer.headers["payment-response"])
        receipt = told["extensions"]["offer-receipt"]["info"]["receipt"]
        assert receipt["format"] == "eip712"
        assert receipt["payload"]["resourceUrl"] == gateway.url + where
        assert receipt["payload"]["payer"] == wallet.address
        assert receipt["payload"]["transaction"] == told["transaction"]
        assert receipt["payload"]["network"] == told["network"]
        assert signer_of(receipt) == keys["addresses"][0].lower()
    # The same whenever it is shown, and not in the words of v1.
    assert again.headers["payment-response"] == paid.headers["payment-response"]
    assert "extensions" not in decode(paid.headers["x-payment-response"])
