"""The whole way of a payment: parse, check, verify, sign, broadcast, wait, read the transfer."""

from __future__ import annotations

import time

import pytest

from anvil.devnet import Devnet
from chain import sender, transfers
from chain.errors import Rejected
from chain.rpc import Rpc
from chain.schemes import eip3009
from tests.fixtures_chain import NETWORK, USDC, payment

PAY_TO = "0x00000000000000000000000000000000000feeed"


async def test_a_payment_is_settled_once_and_proved_by_its_log(chain_net: Devnet, rpc: Rpc) -> None:
    payer = chain_net.accounts[0]
    auth = eip3009.parse(payment(payer, PAY_TO, 250_000))
    now_s = int(time.time())
    eip3009.check(auth, pay_to=PAY_TO, amount_units=250_000, now_s=now_s)
    assert await eip3009.verify(rpc, USDC, auth, now_s) == "key"

    data = eip3009.transfer_calldata(auth)
    fees = await sender.fees(rpc, chain_net.settler.address, USDC.address, data)
    key = chain_net.settler.private_key
    prepared = sender.sign(key, chain_net.chain_id, fees.nonce, USDC.address, data, fees)
    assert prepared.sender == chain_net.settler.address
    assert await transfers.transfers_of(rpc, prepared.tx_hash, USDC, PAY_TO) is None

    await sender.broadcast(rpc, prepared.raw)
    receipt = await sender.wait(rpc, prepared.tx_hash, 10)
    assert receipt is not None and receipt.succeeded
    assert receipt.gas_used <= fees.gas_limit

    found = await transfers.transfers_of(rpc, prepared.tx_hash, USDC, PAY_TO)
    assert found == [
        transfers.Transfer(
            network=NETWORK.caip2,
            tx_hash=prepared.tx_hash,
            n=0,
            asset=USDC.address,
            from_=payer.address,
            to=PAY_TO,
            value_units=250_000,
            block_number=receipt.block_number,
            block_hash=receipt.block_hash,
            auth_nonce=auth.nonce,
            authorizer=payer.address,
        )
    ]
    assert chain_net.balance_units(PAY_TO) == 250_000

    await sender.broadcast(rpc, prepared.raw)  # the same bytes again: no harm, no error
    assert chain_net.balance_units(PAY_TO) == 250_000
    with pytest.raises(Rejected) as refused:
        await eip3009.verify(rpc, USDC, auth, now_s)
    assert refused.value.code == "invalid_transaction_state"
    assert await transfers.authorization_used(rpc, USDC, payer.address, auth.nonce)
    assert (
        await transfers.find_authorization(rpc, USDC, payer.address, auth.nonce, 0)
        == prepared.tx_hash
    )
