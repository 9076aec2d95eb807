"""One wallet pays and another gets the credits: only by the payer's own word."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from eth_account import Account as Signer
from eth_account.messages import encode_defunct

from anvil.devnet import Devnet
from chain.schemes import eip3009
from tests.e2e.stage import Gateway, transfers_to
from tests.e2e.wallet import Wallet, decode, new_wallet, offers, outcome, problem
from tests.fixtures_chain import USDC, FaultyNode, deploy, wallet_artifact
from wallet_auth.keys import address_word
from wallet_auth.recipient import sponsor_lines

PURCHASE = "/farebox/v1/credits/purchase"
Launch = Callable[..., Gateway]


def sign(wallet: Wallet, text: str) -> str:
    signed = Signer.sign_message(encode_defunct(text=text), wallet.key)
    return "0x" + signed.signature.hex().removeprefix("0x")


@pytest.fixture
def agent(gateway: Gateway) -> Wallet:
    return new_wallet(gateway.net, 0)


async def paid(http: httpx.AsyncClient, payer: Wallet, **wanted: Any) -> tuple[str, str]:
    """A payment for what is wanted: the header, and the authorization's nonce."""
    offer = offers(await http.post(PURCHASE, json=wanted))[0]
    header = payer.pay(offer, valid_before_s=int(time.time()) + offer["maxTimeoutSeconds"])
    return header, decode(header)["payload"]["authorization"]["nonce"]


async def post(http: httpx.AsyncClient, header: str, **wanted: Any) -> httpx.Response:
    return await http.post(PURCHASE, json=wanted, headers={"PAYMENT-SIGNATURE": header})


async def test_an_address_with_a_typing_error_is_told_before_anything_is_signed(
    sqlite_gateway: Gateway, agent: Wallet
) -> None:
    from wallet_auth.keys import checksum

    right = checksum(agent.address)
    wrong = right[:2] + right[2:].swapcase()
    async with sqlite_gateway.client() as http:
        for named in ("wallet_address", "payer_wallet_address"):
            wanted = {"amount_usd": "1", named: right}
            assert (await http.post(PURCHASE, json=wanted)).status_code == 402
            for odd in (wrong, right[:-1], 7, "0x" + "00" * 20):
                told = problem(
                    await http.post(PURCHASE, json={**wanted, named: odd}), "invalid_request"
                )
                assert named in told["detail"]


async def test_the_payers_word_credits_another_wallet_once(
    gateway: Gateway, wallet: Wallet, agent: Wallet
) -> None:
    thief = new_wallet(gateway.net, 0)
    before = len(transfers_to(gateway.net, gateway.pay_to))
    wanted = {"amount_usd": "1", "wallet_address": agent.address}
    async with gateway.client() as http:
        header, nonce = await paid(http, wallet, **wanted)
        told = problem(await post(http, header, **wanted), "payer_mismatch")
        text = told["message"]
        assert told["payer"] == wallet.address
        assert agent.address in text and nonce in text and "eip155:84532" in text
        good = sign(wallet, text)
        for wrong in (
            sign(agent, text),
            sign(wallet, text.replace(agent.address, thief.address)),
            sign(wallet, text.replace(nonce, "0x" + "12" * 32)),
            sign(wallet, text + "\n"),
            "0x" + "00" * 65,
            "0x12",
        ):
            answer = await post(http, header, **wanted, payer_signature=wrong)
            problem(answer, "payer_signature_required")
        stolen = {**wanted, "wallet_address": thief.address, "payer_signature": good}
        problem(await post(http, header, **stolen), "payer_signature_required")
        assert gateway.payments(wallet.address) == []
        assert len(transfers_to(gateway.net, gateway.pay_to)) == before

        answers = await asyncio.gather(
            *(post(http, header, **wanted, payer_signature=good) for _ in range(8))
        )
        in_body = await http.post(
            PURCHASE,
            json={**wanted, "payer_signature": good, "paymentPayload": decode(header)},
        )
        assert {a.status_code for a in (*answers, in_body)} == {200}, answers[0].text
        first = next(a for a in answers if "farebox-replayed" not in a.headers)
        body = first.json()
        assert all(a.json() == body for a in (*answers, in_body))
        assert (body["wallet_address"], body["minted_units"]) == (agent.address, 1_000_000)
        assert "balance" not in body  # who gives learns nothing about the account
        assert outcome(first)["payer"] == wallet.address

        problem(await post(http, header, **stolen), "payment_already_used")
        problem(await post(http, header, amount_usd="1"), "payment_already_used")
        claim = {"transaction_hash": body["transaction"], "wallet_address": wallet.address}
        problem(await http.post(PURCHASE, json=claim), "payment_already_used")
    assert len(transfers_to(gateway.net, gateway.pay_to)) == before + 1
    assert gateway.transfers(agent.address) == [("mint", 1_000_000, "x402")]
    assert gateway.balance(wallet.address) == (0, 0)


async def test_the_published_lines_are_taken(
    gateway: Gateway, wallet: Wallet, agent: Wallet
) -> None:
    wanted = {
        "credits": 500,
        "wallet_address": agent.address,
        "payer_wallet_address": wallet.address,
    }
    async with gateway.client() as http:
        header, nonce = await paid(http, wallet, **wanted)
        other = new_wallet(gateway.net, 0)
        for wrong in (
            sponsor_lines(wallet.address, agent.address, 501, "nonce", nonce),
            sponsor_lines(wallet.address, agent.address, 500, "tx", nonce),
            sponsor_lines(wallet.address, other.address, 500, "nonce", nonce),
            sponsor_lines(wallet.address, agent.address, 500, "nonce", "0x" + "12" * 32),
        ):
            answer = await post(http, header, **wanted, sponsor_signature=sign(wallet, wrong))
            problem(answer, "payer_signature_required")
        good = sign(wallet, sponsor_lines(wallet.address, agent.address, 500, "nonce", nonce))
        named = {**wanted, "payer_wallet_address": other.address, "sponsor_signature": good}
        problem(await post(http, header, **named), "payer_mismatch")
        twice = {**wanted, "sponsor_signature": good, "payer_signature": good}
        problem(await post(http, header, **twice), "invalid_request")
        assert gateway.payments(wallet.address) == []
        # Above the instant limit it may wait for its block: then it waits for the same wallet.
        done = await post(http, header, **wanted, sponsor_signature=good)
        assert done.status_code in (200, 202), done.text
        gateway.net.mine(40)

        def credited() -> bool:
            return gateway.balance(agent.address) == (5_000_000, 0)

        await asyncio.to_thread(gateway.wait, credited, "the credits")
    assert gateway.balance(wallet.address) == (0, 0)


async def test_lines_for_another_number_of_credits_are_not_for_these(
    gateway: Gateway, wallet: Wallet, agent: Wallet
) -> None:
    """An amount that is no whole number of credits has no such lines."""
    wanted = {"amount_usd": "1.005", "wallet_address": agent.address}
    async with gateway.client() as http:
        header, nonce = await paid(http, wallet, **wanted)
        for count in (100, 101):
            text = sponsor_lines(wallet.address, agent.address, count, "nonce", nonce)
            answer = await post(http, header, **wanted, sponsor_signature=sign(wallet, text))
            problem(answer, "payer_signature_required")
    assert gateway.payments(wallet.address) == []


@pytest.mark.parametrize(("units", "good"), [(1_000_000, True), (1_000_001, False)])
async def test_published_lines_for_a_transfer_need_its_exact_value(
    gateway: Gateway, wallet: Wallet, agent: Wallet, units: int, good: bool
) -> None:
    net = gateway.net
    net.rpc("anvil_setBalance", wallet.address, hex(10**18))
    net.rpc("anvil_impersonateAccount", wallet.address)
    tx_hash = net.transfer(wallet.address, gateway.pay_to, units)
    net.receipt(tx_hash)
    text = sponsor_lines(wallet.address, agent.address, 100, "tx", tx_hash)
    wanted = {
        "transaction_hash": tx_hash,
        "wallet_address": agent.address,
        "payer_wallet_address": wallet.address,
        "sponsor_signature": sign(wallet, text),
    }
    async with gateway.client() as http:
        # They name no transfer: said of one, they are not taken.
        problem(
            await http.post(PURCHASE, json={**wanted, "transfer": 0}), "payer_signature_required"
        )
        answer = await http.post(PURCHASE, json=wanted)
        if good:
            assert answer.status_code == 200, answer.text
            assert answer.json()["wallet_address"] == agent.address
        else:
            problem(answer, "payer_signature_required")
    assert gateway.balance(agent.address) == (units if good else 0, 0)
    assert gateway.balance(wallet.address) == (0, 0)


async def test_lines_for_another_amount_than_was_sent_give_nothing_away(
    gateway: Gateway, wallet: Wallet, agent: Wallet
) -> None:
    """Signed by the sender, for this transaction, and of other credits: they are the sender's."""
    net = gateway.net
    net.rpc("anvil_setBalance", wallet.address, hex(10**18))
    net.rpc("anvil_impersonateAccount", wallet.address)
    tx_hash = net.transfer(wallet.address, gateway.pay_to, 4_000_000)
    net.receipt(tx_hash)
    text = sponsor_lines(wallet.address, agent.address, 500, "tx", tx_hash)
    wanted = {"transaction_hash": tx_hash, "wallet_address": agent.address, "credits": 500}
    async with gateway.client() as http:
        for wrong in (sign(agent, text), sign(wallet, text + "\n")):
            answer = await http.post(PURCHASE, json={**wanted, "sponsor_signature": wrong})
            problem(answer, "payer_signature_required")
        good = {**wanted, "sponsor_signature": sign(wallet, text)}
        problem(
            await http.post(PURCHASE, json={**good, "credits": 1_000}), "payer_signature_required"
        )
        answers = [await http.post(PURCHASE, json=good) for _ in range(2)]
        for answer in answers:
            body = answer.json()
            assert answer.status_code == 200, answer.text
            assert (body["wallet_address"], body["paid"]) == (wallet.address, "underpaid")
        problem(await http.post(PURCHASE, json=wanted), "payment_already_used")
    assert gateway.balance(wallet.address) == (4_000_000, 0)
    assert gateway.balance(agent.address) == (0, 0)


async def test_lines_for_an_authorization_that_somebody_else_sent(
    gateway: Gateway, wallet: Wallet, agent: Wallet
) -> None:
    """The nonce form names the authorization, and so its transfer, whoever broadcast it."""
    net = gateway.net
    async with gateway.client() as http:
        header, nonce = await paid(http, wallet, amount_usd="1")
        authorization = eip3009.parse(decode(header)["payload"])
        data = "0x" + eip3009.transfer_calldata(authorization).hex()
        tx_hash = net.send(net.operator.address, net.usdc, data)
        wanted = {"transaction_hash": tx_hash, "wallet_address": agent.address}
        other = "0x" + "12" * 32
        for count, value in ((101, nonce), (100, other)):
            text = sponsor_lines(wallet.address, agent.address, count, "nonce", value)
            signed = {**wanted, "sponsor_signature": sign(wallet, text)}
            problem(await http.post(PURCHASE, json=signed), "payer_signature_required")
        text = sponsor_lines(wallet.address, agent.address, 100, "nonce", nonce)
        done = await http.post(PURCHASE, json={**wanted, "sponsor_signature": sign(wallet, text)})
        assert done.status_code == 200, done.text
        assert done.json()["wallet_address"] == agent.address
    assert gateway.balance(agent.address) == (1_000_000, 0)
    assert gateway.balance(wallet.address) == (0, 0)


async def test_a_recipient_with_code_is_a_wallet_of_the_network(
    gateway: Gateway, wallet: Wallet
) -> None:
    contract = "0x" + secrets.token_hex(20)
    gateway.net.rpc("anvil_setCode", contract, "0x00")
    wanted = {"amount_usd": "1", "wallet_address": contract}
    async with gateway.client() as http:
        header, _ = await paid(http, wallet, **wanted)
        text = problem(await post(http, header, **wanted), "payer_mismatch")["message"]
        done = await post(http, header, **wanted, payer_signature=sign(wallet, text))
    assert done.status_code == 200, done.text
    rows = gateway.rows("SELECT chain FROM wallet WHERE address = $1", contract)
    assert rows == [{"chain": "eip155:84532"}]


async def test_two_recipients_at_two_nodes_at_once(launch: Launch, chain_session: Devnet) -> None:
    """Both signed for by the payer: whoever is first gets all, the other is told."""
    one = launch("postgres")
    two = launch(beside=one)
    payer = new_wallet(chain_session)
    agents = [new_wallet(chain_session, 0) for _ in range(2)]
    async with one.client() as first, two.client() as second:
        header, _ = await paid(first, payer, amount_usd="1")
        bodies = []
        for agent in agents:
            wanted = {"amount_usd": "1", "wallet_address": agent.address}
            told = problem(await post(first, header, **wanted), "payer_mismatch")
            bodies.append({**wanted, "payer_signature": sign(payer, told["message"])})
        answers = await asyncio.gather(
            *(
                post(http, header, **body)
                for _ in range(3)
                for http in (first, second)
                for body in bodies
            )
        )
    said = {200: 0, 409: 0}
    for answer in answers:
        said[answer.status_code] += 1
    assert said == {200: 6, 409: 6}
    assert sorted(one.balance(agent.address)[0] for agent in agents) == [0, 1_000_000]
    assert len(transfers_to(one.net, one.pay_to)) == 1


async def test_a_payer_with_code_is_asked_whether_it_signed(
    gateway: Gateway, agent: Wallet
) -> None:
    net, owner, stranger = gateway.net, new_wallet(gateway.net, 0), new_wallet(gateway.net, 0)
    code = wallet_artifact("MockERC1271Wallet")["bytecode"] + address_word(owner.address).hex()
    contract = deploy(net, net.operator.address, code)
    net.mint(contract, 1_000_000)
    wanted = {"amount_usd": "1", "wallet_address": agent.address}
    async with gateway.client() as http:
        offer = offers(await http.post(PURCHASE, json=wanted))[0]
        header = owner.pay(offer, from_=contract)
        told = problem(await post(http, header, **wanted), "payer_mismatch")
        assert told["payer"] == contract
        by_stranger = await post(
            http, header, **wanted, payer_signature=sign(stranger, told["message"])
        )
        problem(by_stranger, "payer_signature_required")
        assert gateway.payments(contract) == []
        done = await post(http, header, **wanted, payer_signature=sign(owner, told["message"]))
    assert done.status_code == 200, done.text
    assert gateway.transfers(agent.address) == [("mint", 1_000_000, "x402")]


async def test_the_key_behind_an_address_with_code_does_not_speak_for_it(
    gateway: Gateway, wallet: Wallet, agent: Wallet
) -> None:
    wanted = {"amount_usd": "1", "wallet_address": agent.address}
    async with gateway.client() as http:
        header, _ = await paid(http, wallet, **wanted)
        text = problem(await post(http, header, **wanted), "payer_mismatch")["message"]
        gateway.net.rpc("anvil_setCode", wallet.address, "0x60006000fd")
        answer = await post(http, header, **wanted, payer_signature=sign(wallet, text))
        problem(answer, "payer_signature_required")
    assert gateway.payments(wallet.address) == []


async def test_a_gift_that_a_stranger_sent_first_is_the_recipients(
    gateway: Gateway, wallet: Wallet, agent: Wallet
) -> None:
    net = gateway.net
    wanted = {"amount_usd": "1", "wallet_address": agent.address}
    async with gateway.client() as http:
        header, _ = await paid(http, wallet, **wanted)
        text = problem(await post(http, header, **wanted), "payer_mismatch")["message"]
        auth = eip3009.parse(decode(header)["payload"])
        data = "0x" + eip3009.transfer_calldata(auth).hex()
        assert net.receipt(net.send(net.operator.address, USDC.address, data))["status"] == "0x1"
        done = await post(http, header, **wanted, payer_signature=sign(wallet, text))
    assert done.status_code == 200, done.text
    assert gateway.transfers(agent.address) == [("mint", 1_000_000, "x402")]
    assert gateway.balance(wallet.address) == (0, 0)


@pytest.mark.parametrize("at", ["eth_sendRawTransaction", "eth_getTransactionReceipt"])
async def test_a_gift_survives_the_gateway(
    at: str, dialect: str, launch: Launch, faulty: FaultyNode, chain_session: Devnet
) -> None:
    """Killed before it is sent, or before it is minted: the next start gives it to the same."""
    payer, agent = new_wallet(chain_session), new_wallet(chain_session, 0)
    gateway = launch(dialect, rpc_url=faulty.url, server={"settle_wait_s": 1})
    wanted = {"amount_usd": "1", "wallet_address": agent.address}
    async with gateway.client() as http:
        header, _ = await paid(http, payer, **wanted)
        text = problem(await post(http, header, **wanted), "payer_mismatch")["message"]
        signed = {**wanted, "payer_signature": sign(payer, text)}
        faulty.fault(at, "hang")
        paying = asyncio.create_task(post(http, header, **signed))
        await asyncio.to_thread(gateway.wait, lambda: at in faulty.asked, "the question")
        gateway.kill()
        with pytest.raises(httpx.TransportError):
            await paying
    assert [row["state"] for row in gateway.payments(payer.address)] == ["processing"]
    faulty.faults.clear()
    gateway.start()

    def credited() -> bool:
        return gateway.transfers(agent.address) == [("mint", 1_000_000, "x402")]

    await asyncio.to_thread(gateway.wait, credited, "the credits")
    async with gateway.client() as http:
        faulty.fault("eth_getCode", "hang")  # what is known is told without asking anybody
        again = await post(http, header, **signed)
        assert again.headers["farebox-replayed"] == "true", again.text
    assert gateway.balance(payer.address) == (0, 0)
    assert len(transfers_to(gateway.net, gateway.pay_to)) == 1
