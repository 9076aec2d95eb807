"""Many pay at once: few transactions, everybody served, every chain nonce used."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable

import httpx
import pytest

from anvil.devnet import Devnet, running
from gateway.db import Database
from tests import servers
from tests.e2e.stage import PRICE_UNITS, Gateway, transfers_to
from tests.e2e.wallet import Wallet, buy, new_wallet, offers, outcome, problem
from tests.fixtures_chain import FaultyNode, deploy, wallet_artifact
from wallet_auth.keys import address_word

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
        assert {answer.status_code for answer in answers} == {200}, {
            (answer.json()["code"], answer.json()["detail"])
            for answer in answers
            if answer.status_code != 200
        }
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


async def test_contract_wallets_and_keys_pay_at_once(launch: Launch, chain_session: Devnet) -> None:
    """Whoever has code goes alone; everybody is served."""
    gateway = launch("sqlite")
    keys = [new_wallet(chain_session) for _ in range(5)]
    owner = new_wallet(chain_session, 0)
    code = wallet_artifact("MockERC1271Wallet")["bytecode"] + address_word(owner.address).hex()
    contract = deploy(chain_session, chain_session.operator.address, code)
    chain_session.mint(contract, PRICE_UNITS)
    async with gateway.client() as http:
        offer = offers(await http.get("/v1/code"))[0]
        paid = [each.pay(offer) for each in keys] + [owner.pay(offer, from_=contract)]
        answers = await asyncio.gather(
            *(http.get("/v1/code", headers={"PAYMENT-SIGNATURE": each}) for each in paid)
        )
    assert [answer.status_code for answer in answers] == [200] * 6
    hashes = [outcome(answer)["transaction"] for answer in answers]
    assert hashes[-1] not in hashes[:-1]
    assert gateway.received() == 6 * PRICE_UNITS


@pytest.mark.parametrize("at", ["eth_sendRawTransaction", "eth_getTransactionReceipt"])
async def test_a_node_dies_with_a_whole_batch(
    at: str, dialect: str, launch: Launch, faulty: FaultyNode, chain_session: Devnet
) -> None:
    """Claimed and not sent, or sent and not minted: the next start finishes every one, once."""
    gateway = launch(dialect, rpc_url=faulty.url, server={"settle_wait_s": 1})
    wallets = [new_wallet(chain_session) for _ in range(6)]
    async with gateway.client() as http:
        offer = offers(await http.post(PURCHASE, content=BODY))[0]
        headers = [{"PAYMENT-SIGNATURE": each.pay(offer)} for each in wallets]
        faulty.fault(at, "hang")
        paying = [
            asyncio.create_task(http.post(PURCHASE, content=BODY, headers=each)) for each in headers
        ]
        while len(gateway.rows("SELECT id FROM payment")) < 6:
            await asyncio.sleep(0.05)
        gateway.kill()
        for told in await asyncio.gather(*paying, return_exceptions=True):
            if isinstance(told, httpx.Response):  # its wait was over before the others were claimed
                assert told.status_code == 202 and "payment-required" not in told.headers
            else:
                assert isinstance(told, httpx.TransportError)
    faulty.faults.clear()
    gateway.start()
    gateway.wait(
        lambda: (
            [row["state"] for row in gateway.rows("SELECT state FROM payment")] == ["succeeded"] * 6
        ),
        "all payments to be finished",
    )
    assert len(transfers_to(gateway.net, gateway.pay_to)) == 6
    for each in wallets:
        assert gateway.transfers(each.address) == [("mint", 1_000_000, "x402")]
    async with gateway.client() as http:
        again = [await http.post(PURCHASE, content=BODY, headers=each) for each in headers]
    assert [answer.headers["farebox-replayed"] for answer in again] == ["true"] * 6


async def test_without_gas_only_settlements_pause(
    launch: Launch, chain_session: Devnet, wallet: Wallet, target: str
) -> None:
    """Purchases are 503 and say when to come back; credits are spent on; refilled, it goes on."""
    gateway = launch("sqlite")
    async with gateway.client() as http:
        await buy(http, wallet)
        chain_session.rpc("anvil_setBalance", gateway.settler.address, "0x1")
        gas = f"gas {chain_session.caip2} {gateway.settler.address}"
        servers.in_thread(look_at_gas_soon(gateway.database))
        await until_ready_says(http, gas, "empty", gateway)
        offer = offers(await http.post(PURCHASE, content=BODY))[0]
        bought = {"PAYMENT-SIGNATURE": wallet.pay(offer)}
        answer = await http.post(PURCHASE, content=BODY, headers=bought)
        told = problem(answer, "settlement_paused")
        assert told["status"] == 503 and int(answer.headers["retry-after"]) > 0
        assert "payment-required" not in answer.headers
        assert (await http.get("/readyz")).status_code == 200
        signed = wallet.sign("GET", gateway.url + target)
        assert (await http.get(target, headers=signed)).status_code == 200
        chain_session.rpc("anvil_setBalance", gateway.settler.address, hex(10**18))
        await until_ready_says(http, gas, None, gateway)
        answer = await http.post(PURCHASE, content=BODY, headers=bought)
        assert answer.status_code == 200, answer.text


async def look_at_gas_soon(database: str) -> None:
    """As if a minute had gone by since the last look."""
    db = await Database.connect(database)
    async with db.write() as tx:
        await tx.execute("UPDATE gas_account SET noted_ms = 0")
    await db.close()


async def until_ready_says(
    http: httpx.AsyncClient, check: str, what: str | None, gateway: Gateway
) -> None:
    """The background loop looks at gas accounts once a minute, at a short one more often."""
    end = time.monotonic() + 90
    while (await http.get("/readyz")).json()["checks"].get(check) != what:
        assert time.monotonic() < end, gateway.log[-2000:]
        await asyncio.sleep(0.2)
