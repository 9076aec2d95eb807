"""The gateway dies, the node lies down, somebody is faster: a payment ends once, and right."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Iterator
from functools import partial

import httpx
import pytest
from eth_account import Account as Maker

from anvil.devnet import Devnet, Options, running
from chain.eth import selector, uint_word
from chain.schemes import eip3009
from tests.e2e.stage import (
    CHEAP_UNITS,
    PRICE_UNITS,
    Api,
    Background,
    Gateway,
    answer_when_open,
    transfers_to,
)
from tests.e2e.wallet import Wallet, buy, decode, new_wallet, offers, outcome, problem
from tests.fixtures_chain import NETWORK, USDC, FaultyNode, typed_data
from tests.servers import eventually
from wallet_auth.keys import address_word

Launch = Callable[..., Gateway]
PURCHASE = "/farebox/v1/credits/purchase"
BODY = json.dumps({"amount_usd": "1"}).encode()


def state(gateway: Gateway, wallet: Wallet) -> str:
    rows = gateway.payments(wallet.address)
    assert len(rows) <= 1
    return str(rows[0]["state"]) if rows else ""


def succeeded(gateway: Gateway, wallet: Wallet) -> bool:
    return state(gateway, wallet) == "succeeded"


def broadcast(net: Devnet, header: str) -> None:
    """Somebody else hands in the authorization of a payment header."""
    auth = eip3009.parse(decode(header)["payload"])
    data = "0x" + eip3009.transfer_calldata(auth).hex()
    assert int(net.receipt(net.send(net.operator.address, USDC.address, data))["status"], 16) == 1


def cancel(net: Devnet, wallet: Wallet, header: str) -> None:
    """The payer takes the authorization back, on chain (EIP-3009 cancelAuthorization)."""
    nonce = decode(header)["payload"]["authorization"]["nonce"]
    data = typed_data(wallet.address, wallet.address, 1, nonce=nonce)
    fields = [{"name": "authorizer", "type": "address"}, {"name": "nonce", "type": "bytes32"}]
    kinds = {"EIP712Domain": data["types"]["EIP712Domain"], "CancelAuthorization": fields}
    signed = Maker.sign_typed_data(
        wallet.key,
        full_message={
            "types": kinds,
            "primaryType": "CancelAuthorization",
            "domain": data["domain"],
            "message": {"authorizer": wallet.address, "nonce": nonce},
        },
    )
    call = selector("cancelAuthorization(address,bytes32,uint8,bytes32,bytes32)")
    call += address_word(wallet.address) + bytes.fromhex(nonce[2:])
    call += uint_word(signed.v) + uint_word(signed.r) + uint_word(signed.s)
    net.send(net.operator.address, USDC.address, "0x" + call.hex())


# --- kill -9 at the two worst moments -------------------------------------------------------------


async def test_killed_between_the_claim_and_the_mint(
    dialect: str, launch: Launch, faulty: FaultyNode, chain_session: Devnet
) -> None:
    """One payment is on chain and not minted, one is claimed and not sent. Then SIGKILL."""
    sent, claimed = new_wallet(chain_session), new_wallet(chain_session)
    gateway = launch(dialect, rpc_url=faulty.url, server={"settle_wait_s": 1})
    async with gateway.client() as http:
        offer = offers(await http.post(PURCHASE, content=BODY))[0]
        header = {w.address: wallet_header(w, offer) for w in (sent, claimed)}
        faulty.fault("eth_getTransactionReceipt", "hang")
        first = asyncio.create_task(pay(http, header[sent.address]))
        await eventually(lambda: "eth_getTransactionReceipt" in faulty.asked)
        # Anvil answers with the hash first, and makes the block then.
        await eventually(lambda: len(transfers_to(gateway.net, gateway.pay_to)) == 1, "the block")
        faulty.fault("eth_sendRawTransaction", "hang")
        count = faulty.asked.count("eth_sendRawTransaction")
        second = asyncio.create_task(pay(http, header[claimed.address]))
        await eventually(lambda: faulty.asked.count("eth_sendRawTransaction") > count)
        gateway.kill()
        for task in (first, second):
            with pytest.raises(httpx.TransportError):
                await task
    for wallet in (sent, claimed):
        assert state(gateway, wallet) == "processing"
        assert gateway.transfers(wallet.address) == []
    assert len(transfers_to(gateway.net, gateway.pay_to)) == 1
    assert gateway.broken() == {}

    faulty.faults.clear()
    gateway.start()
    for wallet in (sent, claimed):
        gateway.wait(partial(succeeded, gateway, wallet), "the payment to be finished")
        assert gateway.transfers(wallet.address) == [("mint", 1_000_000, "x402")]
    assert len(transfers_to(gateway.net, gateway.pay_to)) == 2
    async with gateway.client() as http:
        for wallet in (sent, claimed):
            again = await pay(http, header[wallet.address])
            assert again.status_code == 200
            assert again.headers["farebox-replayed"] == "true"
            assert outcome(again)["transaction"] == gateway.payments(wallet.address)[0]["tx_hash"]
            assert gateway.transfers(wallet.address) == [("mint", 1_000_000, "x402")]
    assert len(transfers_to(gateway.net, gateway.pay_to)) == 2


def wallet_header(wallet: Wallet, offer: dict[str, object]) -> str:
    return wallet.pay(offer)


async def pay(http: httpx.AsyncClient, header: str) -> httpx.Response:
    return await http.post(PURCHASE, content=BODY, headers={"PAYMENT-SIGNATURE": header})


async def test_a_call_paid_before_the_crash_is_run_after_it(
    launch: Launch, faulty: FaultyNode, api: Api, wallet: Wallet, cheap: str
) -> None:
    """The first presenter comes back: its call runs, once, at the price it was promised."""
    gateway = launch("sqlite", rpc_url=faulty.url)
    async with gateway.client() as http:
        header = {"PAYMENT-SIGNATURE": wallet.pay(offers(await http.get(cheap))[0])}
        faulty.fault("eth_getTransactionReceipt", "hang")
        paying = asyncio.create_task(http.get(cheap, headers=header))
        await eventually(lambda: "eth_getTransactionReceipt" in faulty.asked)
        gateway.kill()
        with pytest.raises(httpx.TransportError):
            await paying
    assert api.calls(cheap) == 0
    faulty.faults.clear()
    gateway.routes = gateway.routes.replace('"$0.002"', '"$0.009"')
    gateway.start()
    gateway.wait(partial(succeeded, gateway, wallet), "the payment to be finished")
    async with gateway.client() as http:
        answer = await http.get(cheap, headers=header)
        assert answer.status_code == 200, answer.text
        assert "farebox-replayed" not in answer.headers
        again = await http.get(cheap, headers=header)
        assert again.headers["farebox-replayed"] == "true"
    assert api.calls(cheap) == 1
    assert gateway.balance(wallet.address) == (PRICE_UNITS - CHEAP_UNITS, 0)


async def test_killed_during_a_call(
    dialect: str, launch: Launch, api: Api, wallet: Wallet, target: str
) -> None:
    """Nobody knows whether the upstream did the work: not charged, and not done twice."""
    # On SQLite the next start knows that nobody is left to speak for the call.
    gateway = launch(dialect, server={"hold_lease_s": 1 if dialect == "postgres" else 3600})
    gate = api.behave(target, answer_when_open)
    async with gateway.client() as http:
        await buy(http, wallet)
        headers = wallet.sign("GET", gateway.url + target)
        calling = asyncio.create_task(http.get(target, headers=headers))
        await eventually(lambda: gate.arrived == 1)
        assert gateway.balance(wallet.address) == (1_000_000 - PRICE_UNITS, PRICE_UNITS)
        gateway.kill()
        with pytest.raises(httpx.TransportError):
            await calling
    gate.open()
    gateway.start()
    async with gateway.client() as http:
        early = await http.get(target, headers=headers)
        assert early.json()["code"] in ("request_in_progress", "outcome_unknown")
        gateway.wait(
            lambda: gateway.balance(wallet.address) == (1_000_000, 0), "the hold to be void"
        )
        told = problem(await http.get(target, headers=headers), "outcome_unknown")
        assert told["status"] == 409
        assert told["receipt"]["reason"] == "interrupted"
        assert told["receipt"]["charged_units"] == 0
        fresh = await http.get(target, headers=wallet.sign("GET", gateway.url + target))
        assert fresh.status_code == 200
    assert gate.arrived == 2
    assert gateway.transfers(wallet.address)[1:] == [
        ("void", 0, "interrupted"),
        ("capture", PRICE_UNITS, None),
    ]


async def test_a_call_longer_than_its_lease_is_not_interrupted(
    dialect: str, launch: Launch, api: Api, wallet: Wallet, target: str
) -> None:
    gateway = launch(dialect, server={"hold_lease_s": 1})
    gate = api.behave(target, answer_when_open)
    async with gateway.client() as http:
        await buy(http, wallet)
        headers = wallet.sign("GET", gateway.url + target)
        calling = asyncio.create_task(http.get(target, headers=headers))
        await eventually(lambda: gate.arrived == 1)
        # Long enough for the sweeper to have voided it: its lease, its margin and two rounds.
        await asyncio.sleep(5.5)
        gate.open()
        answer = await calling
    assert (answer.status_code, answer.content) == (200, b"late but whole")
    assert gateway.transfers(wallet.address)[1:] == [("capture", PRICE_UNITS, None)]


# --- a chain that does not do as it is told -------------------------------------------------------


@pytest.fixture
def slow_chain() -> Iterator[Devnet]:
    """A chain that makes blocks only when it is told to."""
    with running(options=Options(mining=False)) as net:
        yield net


def funded(net: Devnet) -> Wallet:
    wallet = new_wallet(net)
    net.mine()
    return wallet


async def test_a_dropped_transaction_is_sent_again(
    launch: Launch, slow_chain: Devnet, api: Api, target: str
) -> None:
    wallet = funded(slow_chain)
    gateway = launch("sqlite", net=slow_chain, server={"settle_wait_s": 1})
    async with gateway.client() as http:
        header = {"PAYMENT-SIGNATURE": wallet.pay(offers(await http.get(target))[0])}
        answer = await http.get(target, headers=header)
        told = problem(answer, "settlement_pending")
        assert answer.status_code == 402
        assert "payment-required" not in answer.headers
        assert int(answer.headers["retry-after"]) >= 1
        said = outcome(answer)
        assert (said["success"], said["errorReason"]) == (False, "settlement_pending")
        assert said["transaction"] == told["transaction"]
        urls = [action["url"] for action in told["next_actions"]]
        asked = await http.get(next(url for url in urls if "/v1/payments/" in url))
        assert asked.json().get("state") == "processing", asked.text

        slow_chain.rpc("anvil_dropTransaction", said["transaction"])
        slow_chain.mine(2)
        assert gateway.received() == 0
        gateway.wait(
            lambda: slow_chain.rpc("eth_getTransactionByHash", said["transaction"]) is not None,
            "the transaction to be sent again",
        )
        slow_chain.mine()
        gateway.wait(partial(succeeded, gateway, wallet), "the mint")
        assert gateway.received() == PRICE_UNITS
        assert api.calls(target) == 0
        late = await http.get(target, headers=header)
        assert late.status_code == 200 and "farebox-replayed" not in late.headers
        assert outcome(late)["transaction"] == said["transaction"]
    assert api.calls(target) == 1
    assert gateway.transfers(wallet.address) == [
        ("mint", PRICE_UNITS, "x402"),
        ("capture", PRICE_UNITS, None),
    ]


async def test_an_outsider_is_faster_than_our_transaction(
    launch: Launch, slow_chain: Devnet, target: str
) -> None:
    """Ours is dropped, somebody else's moves the money: minted once, to the payer."""
    wallet = funded(slow_chain)
    gateway = launch("sqlite", net=slow_chain, server={"settle_wait_s": 1})
    async with gateway.client() as http:
        header = wallet.pay(offers(await http.get(target))[0])
        answer = await http.get(target, headers={"PAYMENT-SIGNATURE": header})
        ours = outcome(answer)["transaction"]
        slow_chain.rpc("anvil_dropTransaction", ours)
        slow_chain.rpc("evm_setAutomine", True)
        broadcast(slow_chain, header)
        gateway.wait(partial(succeeded, gateway, wallet), "the mint")
        (payment,) = gateway.payments(wallet.address)
        assert payment["tx_hash"] != ours
        again = await http.get(target, headers={"PAYMENT-SIGNATURE": header})
        assert again.status_code == 200
        assert outcome(again)["transaction"] == payment["tx_hash"]
    assert gateway.received() == PRICE_UNITS
    assert [entry for entry in gateway.transfers(wallet.address) if entry[0] == "mint"] == [
        ("mint", PRICE_UNITS, "x402")
    ]


async def test_the_payer_cancels_before_our_transaction(
    launch: Launch, slow_chain: Devnet, api: Api, target: str
) -> None:
    wallet = funded(slow_chain)
    gateway = launch("sqlite", net=slow_chain, server={"settle_wait_s": 1})
    async with gateway.client() as http:
        header = wallet.pay(offers(await http.get(target))[0])
        answer = await http.get(target, headers={"PAYMENT-SIGNATURE": header})
        slow_chain.rpc("anvil_dropTransaction", outcome(answer)["transaction"])
        cancel(slow_chain, wallet, header)
        slow_chain.mine()
        gateway.wait(lambda: state(gateway, wallet) == "failed", "the payment to fail")
        answer = await http.get(target, headers={"PAYMENT-SIGNATURE": header})
        problem(answer, "invalid_transaction_state")
        assert offers(answer)  # now it is safe to pay anew
        assert outcome(answer)["success"] is False
        # But not at once: each such payment costs the gateway gas.
        nonces = "SELECT nonce FROM chain_nonce"  # what frees the dropped one's nonce has the same
        allotted = gateway.rows(nonces)
        fresh = await http.get(target, headers={"PAYMENT-SIGNATURE": wallet.pay(offers(answer)[0])})
        assert problem(fresh, "rate_limited")["status"] == 429
        assert gateway.rows(nonces) == allotted
        assert len(gateway.payments(wallet.address)) == 1
    assert gateway.received() == 0
    assert gateway.transfers(wallet.address) == []
    assert api.calls(target) == 0


async def test_an_authorization_that_was_never_included_expires(
    launch: Launch, slow_chain: Devnet, target: str
) -> None:
    wallet = funded(slow_chain)
    gateway = launch("sqlite", net=slow_chain, server={"settle_wait_s": 1})
    async with gateway.client() as http:
        offer = offers(await http.get(target))[0]
        header = wallet.pay(offer, valid_before_s=int(time.time()) + 30)
        answer = await http.get(target, headers={"PAYMENT-SIGNATURE": header})
        slow_chain.rpc("anvil_dropTransaction", outcome(answer)["transaction"])
        slow_chain.rpc("evm_increaseTime", 60)
        slow_chain.mine()
        gateway.wait(lambda: state(gateway, wallet) == "failed", "the payment to fail")
        (payment,) = gateway.payments(wallet.address)
        assert payment["error_code"].endswith("valid_before")
    assert gateway.transfers(wallet.address) == []


# --- already on chain when it is presented --------------------------------------------------------


async def test_an_authorization_that_somebody_broadcast_first(
    gateway: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    """Minted to its payer; but it is public, so the bare header alone buys nobody a call."""
    async with gateway.client() as http:
        header = {"PAYMENT-SIGNATURE": wallet.pay(offers(await http.get(target))[0])}
        broadcast(gateway.net, header["PAYMENT-SIGNATURE"])
        before, sent = gateway.received(), gateway.sent()
        answer = await http.get(target, headers=header)
        assert answer.status_code == 200, answer.text
        assert answer.json()["payment"]["state"] == "succeeded"
        assert "payment-required" not in answer.headers
        assert api.calls(target) == 0
        assert gateway.transfers(wallet.address) == [("mint", PRICE_UNITS, "x402")]
        again = await http.get(target, headers=header)
        assert again.json() == answer.json()
        signed = wallet.sign("GET", gateway.url + target, headers=header)
        mine = await http.get(target, headers=signed)
        assert mine.status_code == 200 and "farebox-replayed" not in mine.headers
    assert (gateway.received(), gateway.sent()) == (before, sent)
    assert api.calls(target) == 1
    assert gateway.balance(wallet.address) == (0, 0)


async def test_a_purchase_that_somebody_broadcast_first(gateway: Gateway, wallet: Wallet) -> None:
    async with gateway.client() as http:
        header = wallet.pay(offers(await http.post(PURCHASE, content=BODY))[0])
        broadcast(gateway.net, header)
        answer = await pay(http, header)
        assert answer.status_code == 200, answer.text
        assert answer.json()["minted_units"] == 1_000_000
    assert gateway.transfers(wallet.address) == [("mint", 1_000_000, "x402")]


async def test_an_authorization_that_was_cancelled_or_went_elsewhere(
    sqlite_gateway: Gateway, wallet: Wallet, chain_session: Devnet, target: str
) -> None:
    gateway = sqlite_gateway
    async with gateway.client() as http:
        offer = offers(await http.get(target))[0]
        cancelled = wallet.pay(offer)
        cancel(gateway.net, wallet, cancelled)
        nonce = "0x" + secrets.token_hex(32)
        elsewhere = wallet.pay({**offer, "payTo": chain_session.accounts[3].address}, nonce=nonce)
        broadcast(gateway.net, elsewhere)
        for header in (cancelled, wallet.pay(offer, nonce=nonce)):
            answer = await http.get(target, headers={"PAYMENT-SIGNATURE": header})
            problem(answer, "invalid_transaction_state")
            assert offers(answer)
    assert gateway.payments(wallet.address) == []
    assert NETWORK.caip2 == gateway.net.caip2


# --- a node that does not answer ------------------------------------------------------------------


async def test_the_answer_to_the_broadcast_is_lost(
    launch: Launch, faulty: FaultyNode, background: Background, wallet: Wallet, target: str
) -> None:
    """It may have arrived, so it is not given up: the receipt decides."""
    gateway = launch("sqlite", rpc_url=faulty.url)
    async with gateway.client() as http:
        header = {"PAYMENT-SIGNATURE": wallet.pay(offers(await http.get(target))[0])}
        faulty.fault("eth_sendRawTransaction", "lose")
        answer = await http.get(target, headers=header)
        assert answer.status_code == 200, answer.text
        assert outcome(answer)["success"] is True
    assert len(transfers_to(gateway.net, gateway.pay_to)) == 1


async def test_the_broadcast_never_arrives(
    launch: Launch, faulty: FaultyNode, wallet: Wallet, target: str
) -> None:
    """Claimed and not sent: pending, never a demand to pay again; sent as soon as it can be."""
    gateway = launch("sqlite", rpc_url=faulty.url, server={"settle_wait_s": 1})
    async with gateway.client() as http:
        header = {"PAYMENT-SIGNATURE": wallet.pay(offers(await http.get(target))[0])}
        faulty.fault("eth_sendRawTransaction", "drop")
        answer = await http.get(target, headers=header)
        problem(answer, "settlement_pending")
        assert "payment-required" not in answer.headers
        assert gateway.received() == 0
        faulty.faults.clear()
        gateway.wait(partial(succeeded, gateway, wallet), "the payment to be finished")
        answer = await http.get(target, headers=header)
        assert answer.status_code == 200
    assert gateway.received() == PRICE_UNITS


async def test_a_chain_nonce_that_was_used_by_another_program(
    launch: Launch, faulty: FaultyNode, wallet: Wallet, target: str
) -> None:
    """The same settler key elsewhere: our transaction is dead, the authorization is not."""
    gateway = launch("sqlite", rpc_url=faulty.url, server={"settle_wait_s": 1})
    async with gateway.client() as http:
        header = {"PAYMENT-SIGNATURE": wallet.pay(offers(await http.get(target))[0])}
        faulty.fault("eth_sendRawTransaction", "drop")
        problem(await http.get(target, headers=header), "settlement_pending")
        settler = Maker.from_key(gateway.settler.private_key)
        tx = {
            "to": settler.address,
            "value": 1,
            "gas": 21_000,
            "maxFeePerGas": 10**10,
            "maxPriorityFeePerGas": 10**9,
            "nonce": 0,
            "chainId": gateway.net.chain_id,
        }
        raw = settler.sign_transaction(tx).raw_transaction.hex().removeprefix("0x")
        gateway.net.receipt(gateway.net.rpc("eth_sendRawTransaction", "0x" + raw))
        faulty.faults.clear()
        gateway.wait(partial(succeeded, gateway, wallet), "the payment to be finished")
    assert gateway.received() == PRICE_UNITS
    nonces = gateway.rows("SELECT nonce FROM chain_nonce ORDER BY nonce")
    assert [row["nonce"] for row in nonces] == [0, 1]
