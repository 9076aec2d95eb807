"""Our own sales by Permit2, as an agent meets them: a call, a purchase, a crash at its worst."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx
import pytest

from anvil.devnet import Devnet
from chain.schemes import permit2
from tests.e2e.stage import PRICE_UNITS, Api, Gateway, transfers_to
from tests.e2e.wallet import Wallet, encode, new_wallet, offers, outcome, problem
from tests.fixtures_chain import USDC, FaultyNode
from tests.fixtures_permit2 import approve, plant, settle_by_stranger, signed
from tests.servers import eventually

Launch = Callable[..., Gateway]
PURCHASE = "/farebox/v1/credits/purchase"
BODY = json.dumps({"amount_usd": "1"}).encode()


@pytest.fixture(autouse=True)
def _planted(chain_session: Devnet) -> None:
    plant(chain_session)


def opened(launch: Launch, dialect: str, **options: Any) -> Gateway:
    gateway = launch(dialect, running=False, **options)
    gateway.chain_extra = "permit2 = true"
    return gateway.start()


def by_permit2(answer: httpx.Response) -> dict[str, Any]:
    """The offer by Permit2 for what was asked: the last one."""
    offer = offers(answer)[-1]
    assert offer["extra"]["assetTransferMethod"] == "permit2"
    assert [o["extra"].get("assetTransferMethod") for o in offers(answer)].count("permit2") == 1
    return offer


def payload_of(wallet: Wallet, offer: dict[str, Any], **change: Any) -> dict[str, Any]:
    terms = {
        "amount": int(offer["amount"]),
        "to": offer["payTo"],
        "deadline": int(time.time()) + offer["maxTimeoutSeconds"],
    }
    return signed(wallet.account, **(terms | change))


def header_of(offer: dict[str, Any], payload: dict[str, Any]) -> dict[str, str]:
    body = {"x402Version": 2, "payload": payload, "accepted": offer}
    return {"PAYMENT-SIGNATURE": encode(body)}


async def test_a_call_is_paid_and_answered_once(
    dialect: str, launch: Launch, api: Api, wallet: Wallet, target: str
) -> None:
    gateway = opened(launch, dialect)
    async with gateway.client() as http:
        offer = by_permit2(await http.get(target))
        header = header_of(offer, payload_of(wallet, offer))
        refused = await http.get(target, headers=header)
        told = problem(refused, "PERMIT2_ALLOWANCE_REQUIRED")
        assert refused.status_code == 412
        wanted = (permit2.PERMIT2, USDC.address, str(PRICE_UNITS))
        assert tuple(told[n].lower() for n in ("spender", "token", "amount")) == wanted
        assert [each["do"] for each in told["next_actions"]] == ["change", "read"]
        assert gateway.payments(wallet.address) == []
        approve(gateway.net, wallet.account)
        paid = await http.get(target, headers=header)
        assert paid.status_code == 200, paid.text
        assert outcome(paid)["success"] is True
        again = await http.get(target, headers=header)
        assert again.headers["farebox-replayed"] == "true"
        other = await http.get(target + "x", headers=header)
        assert other.status_code in (402, 409)
    assert api.calls(target) == 1
    assert gateway.transfers(wallet.address) == [
        ("mint", PRICE_UNITS, "x402"),
        ("capture", PRICE_UNITS, None),
    ]
    assert len(transfers_to(gateway.net, gateway.pay_to)) == 1


async def test_changed_payments_are_refused_and_nothing_is_sent(
    launch: Launch, wallet: Wallet, target: str
) -> None:
    approve_all(wallet, gateway := opened(launch, "sqlite"))
    async with gateway.client() as http:
        offer = by_permit2(await http.get(target))
        usual = offers(await http.get(target))[0]
        good = payload_of(wallet, offer)
        cheaper = payload_of(wallet, offer, amount=PRICE_UNITS - 1)
        elsewhere = payload_of(wallet, offer, to="0x" + "0b" * 20)
        body = bytes.fromhex(good["signature"][2:])
        flipped = good | {"signature": "0x" + (bytes((body[0] ^ 1,)) + body[1:]).hex()}
        late = payload_of(wallet, offer, deadline=1_700_000_000)
        for header, code in (
            (header_of(offer, cheaper), "permit2_amount_mismatch"),
            (header_of(offer, elsewhere), "invalid_permit2_recipient_mismatch"),
            (header_of(offer, flipped), "invalid_permit2_signature"),
            (header_of(offer, late), "permit2_deadline_expired"),
            (header_of(usual, good), "invalid_payment_requirements"),
            (header_of(offer | {"amount": "1"}, good), "invalid_payment_requirements"),
        ):
            answer = await http.get(target, headers=header)
            told = problem(answer, code)
            assert told["status"] == 402
            assert by_permit2(answer)
    assert gateway.payments(wallet.address) == []
    assert gateway.rows("SELECT * FROM chain_tx") == []
    assert transfers_to(gateway.net, gateway.pay_to) == []


def approve_all(wallet: Wallet, gateway: Gateway) -> None:
    approve(gateway.net, wallet.account)


async def test_two_nodes_take_one_payment_once(
    launch: Launch, api: Api, wallet: Wallet, target: str
) -> None:
    one = opened(launch, "postgres")
    two = opened(launch, "postgres", beside=one)
    approve_all(wallet, one)
    async with one.client() as first, two.client() as second:
        offer = by_permit2(await first.get(target))
        header = header_of(offer, payload_of(wallet, offer))
        told = await asyncio.gather(
            *(http.get(target, headers=header) for http in (first, second) * 3)
        )
    assert {each.status_code for each in told} <= {200, 409}, [each.text for each in told]
    assert api.calls(target) == 1
    assert len(transfers_to(one.net, one.pay_to)) == 1
    assert one.transfers(wallet.address) == [
        ("mint", PRICE_UNITS, "x402"),
        ("capture", PRICE_UNITS, None),
    ]


async def test_killed_after_the_claim_and_after_the_broadcast(
    dialect: str, launch: Launch, faulty: FaultyNode, chain_session: Devnet
) -> None:
    """One payment is on chain and not minted, one is claimed and not sent. Then SIGKILL."""
    sent, claimed = new_wallet(chain_session), new_wallet(chain_session)
    gateway = opened(launch, dialect, rpc_url=faulty.url, server={"settle_wait_s": 1})
    async with gateway.client() as http:
        offer = by_permit2(await http.post(PURCHASE, content=BODY))
        header = {}
        for wallet in (sent, claimed):
            approve_all(wallet, gateway)
            header[wallet.address] = header_of(offer, payload_of(wallet, offer))
        faulty.fault("eth_getTransactionReceipt", "hang")
        first = asyncio.create_task(pay(http, header[sent.address]))
        await eventually(lambda: "eth_getTransactionReceipt" in faulty.asked)
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
    assert gateway.broken() == {}

    faulty.faults.clear()
    gateway.start()
    for wallet in (sent, claimed):
        gateway.wait(partial(succeeded, gateway, wallet), "the payment to be finished")
    assert len(transfers_to(gateway.net, gateway.pay_to)) == 2
    async with gateway.client() as http:
        for wallet in (sent, claimed):
            again = await pay(http, header[wallet.address])
            assert (again.status_code, again.headers["farebox-replayed"]) == (200, "true")
            assert gateway.transfers(wallet.address) == [("mint", 1_000_000, "x402")]
    assert len(transfers_to(gateway.net, gateway.pay_to)) == 2


def state(gateway: Gateway, wallet: Wallet) -> str:
    rows = gateway.payments(wallet.address)
    assert len(rows) <= 1
    return str(rows[0]["state"]) if rows else ""


def succeeded(gateway: Gateway, wallet: Wallet) -> bool:
    return state(gateway, wallet) == "succeeded"


async def pay(http: httpx.AsyncClient, header: dict[str, str]) -> httpx.Response:
    return await http.post(PURCHASE, content=BODY, headers=header)


async def test_a_stranger_is_faster_while_the_gateway_is_dead(
    dialect: str, launch: Launch, faulty: FaultyNode, wallet: Wallet
) -> None:
    """Claimed here, settled by somebody else, and the watcher sees the transfer too: one mint."""
    gateway = opened(launch, dialect, rpc_url=faulty.url, server={"settle_wait_s": 1})
    approve_all(wallet, gateway)
    async with gateway.client() as http:
        offer = by_permit2(await http.post(PURCHASE, content=BODY))
        payload = payload_of(wallet, offer)
        faulty.fault("eth_sendRawTransaction", "hang")
        paying = asyncio.create_task(pay(http, header_of(offer, payload)))
        await eventually(lambda: "eth_sendRawTransaction" in faulty.asked)
        gateway.kill()
        with pytest.raises(httpx.TransportError):
            await paying
    settle_by_stranger(gateway.net, payload)
    faulty.faults.clear()
    gateway.start()
    gateway.wait(partial(succeeded, gateway, wallet), "the payment to be finished")
    assert gateway.transfers(wallet.address) == [("mint", 1_000_000, "x402")]
    assert len(gateway.payments(wallet.address)) == 1


async def test_one_number_both_ways_is_two_payments(
    launch: Launch, api: Api, wallet: Wallet, target: str
) -> None:
    """The token and Permit2 each burn nonces of their own."""
    gateway = opened(launch, "sqlite")
    approve_all(wallet, gateway)
    nonce = "0x" + "5a" * 32
    async with gateway.client() as http:
        usual = offers(await http.get(target))[0]
        first = await http.get(
            target, headers={"PAYMENT-SIGNATURE": wallet.pay(usual, nonce=nonce)}
        )
        assert first.status_code == 200, first.text
        offer = by_permit2(await http.get(target))
        payload = payload_of(wallet, offer, nonce=int(nonce, 16))
        second = await http.get(target, headers=header_of(offer, payload))
        assert second.status_code == 200, second.text
        assert "farebox-replayed" not in second.headers
    assert api.calls(target) == 2
    assert len(transfers_to(gateway.net, gateway.pay_to)) == 2
