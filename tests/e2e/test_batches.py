"""Many pay at once: few transactions, everybody served, every chain nonce used."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

from anvil.devnet import running
from tests.e2e.stage import PRICE_UNITS, Gateway, transfers_to
from tests.e2e.wallet import new_wallet, offers, outcome

Launch = Callable[..., Gateway]
PURCHASE = "/farebox/v1/credits/purchase"
BODY = json.dumps({"amount_usd": "1"}).encode()
MANY = 200


async def test_two_hundred_payments_at_two_nodes_with_one_gas_key(launch: Launch) -> None:
    """Every one is minted, no caller sees an error, and the gas account's numbers have no gap."""
    with running() as net:
        one = launch("postgres", net=net, server={"settle_wait_s": 30})
        two = launch(beside=one, net=net, server={"settle_wait_s": 30})
        wallets = [new_wallet(net, PRICE_UNITS) for _ in range(MANY)]
        async with one.client() as first, two.client() as second:
            offer = offers(await first.get("/v1/batch"))[0]
            paid = [each.pay(offer) for each in wallets]
            answers = await asyncio.gather(
                *(
                    (first, second)[n % 2].get("/v1/batch", headers={"PAYMENT-SIGNATURE": header})
                    for n, header in enumerate(paid)
                )
            )
        assert {answer.status_code for answer in answers} == {200}
        assert all(outcome(answer)["success"] for answer in answers)
        assert one.received() == MANY * PRICE_UNITS
        assert len(transfers_to(net, one.pay_to)) == MANY
        minted = one.rows("SELECT ref, n FROM mint_key")
        assert len(minted) == len({(row["ref"], row["n"]) for row in minted}) == MANY
        sent = one.sent()
        assert sent < MANY // 4  # batches
        used = one.rows("SELECT nonce, done_ms FROM chain_nonce ORDER BY nonce")
        assert [row["nonce"] for row in used] == list(range(sent))
        assert len({outcome(answer)["transaction"] for answer in answers}) == sent
        members = one.rows("SELECT payment_id FROM chain_member")
        assert len(members) == len({row["payment_id"] for row in members}) == MANY
