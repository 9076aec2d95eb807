"""A block with a payment leaves the chain while a real gateway runs."""

from __future__ import annotations

import asyncio

from tests.e2e.stage import PRICE_UNITS, Gateway
from tests.e2e.wallet import Wallet, offers, problem


async def test_what_was_bought_and_spent_is_owed_until_it_is_in_the_chain_again(
    gateway: Gateway, wallet: Wallet, target: str
) -> None:
    net, before = gateway.net, gateway.received()
    async with gateway.client() as http:
        paid = await http.get(
            target,
            headers={"PAYMENT-SIGNATURE": wallet.pay(offers(await http.get(target))[0])},
        )
        assert paid.status_code == 200, paid.text
        assert gateway.received() == before + PRICE_UNITS

        net.rpc("evm_setAutomine", False)
        try:
            net.rpc("anvil_reorg", 1, [])
            assert gateway.received() == before

            def owed() -> bool:
                return "debt" in [kind for kind, *_ in gateway.transfers(wallet.address)]

            await asyncio.to_thread(gateway.wait, owed, "the reversal")
            signed = wallet.sign("GET", gateway.url + target)
            problem(await http.get(target, headers=signed), "account_frozen")

            def sent_again() -> bool:
                return bool(net.rpc("txpool_content")["pending"])

            await asyncio.to_thread(gateway.wait, sent_again, "the same bytes again")
            net.mine()
        finally:
            net.rpc("evm_setAutomine", True)

        def restored() -> bool:
            return gateway.payments(wallet.address)[0]["state"] == "succeeded"

        await asyncio.to_thread(gateway.wait, restored, "the payment")
        signed = wallet.sign("GET", gateway.url + target)
        problem(await http.get(target, headers=signed), "insufficient_credits")
    assert gateway.received() == before + PRICE_UNITS
    kinds = [kind for kind, *_ in gateway.transfers(wallet.address)]
    assert kinds.count("mint") == kinds.count("reverse") == kinds.count("restore") == 1
    assert gateway.balance(wallet.address) == (0, 0)
    assert len(gateway.payments(wallet.address)) == 1
