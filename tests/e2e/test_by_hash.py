"""USDC that was sent without asking first: claimed by its transaction, seen by the watcher."""

from __future__ import annotations

import asyncio
import json
import secrets
import subprocess
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from eth_account import Account as Signer
from eth_account.messages import encode_defunct

from anvil.devnet import Devnet
from chain.eth import selector, uint_word
from tests import servers
from tests.e2e.stage import Gateway
from tests.e2e.wallet import Wallet, new_wallet, outcome, problem
from tests.fixtures_chain import USDC
from wallet_auth.keys import address_word

PURCHASE = "/farebox/v1/credits/purchase"


def move(net: Devnet, wallet: Wallet, units: int, to: str) -> str:
    """The wallet moves USDC by itself."""
    net.rpc("anvil_setBalance", wallet.address, hex(10**18))
    net.rpc("anvil_impersonateAccount", wallet.address)
    tx_hash = net.transfer(wallet.address, to, units)
    net.receipt(tx_hash)
    return tx_hash


def send(gateway: Gateway, wallet: Wallet, units: int) -> str:
    return move(gateway.net, wallet, units, gateway.pay_to)


async def claim(http: httpx.AsyncClient, tx_hash: str, **more: Any) -> httpx.Response:
    return await http.post(PURCHASE, json={"transaction_hash": tx_hash, **more})


def sign(wallet: Wallet, text: str) -> str:
    signed = Signer.sign_message(encode_defunct(text=text), wallet.key)
    return "0x" + signed.signature.hex().removeprefix("0x")


async def test_a_transfer_is_credited_to_its_sender_once(gateway: Gateway, wallet: Wallet) -> None:
    tx_hash = send(gateway, wallet, 1_000_000)
    async with gateway.client() as http:
        first = await claim(http, tx_hash)
        said = await asyncio.gather(*(claim(http, tx_hash) for _ in range(5)))
        upper = await claim(http, "0x" + tx_hash[2:].upper(), wallet_address=wallet.address)
    assert first.status_code == 200, first.text
    body = first.json()
    assert (body["success"], body["state"], body["minted_units"]) == (True, "succeeded", 1_000_000)
    assert (body["wallet_address"], body["transaction"]) == (wallet.address, tx_hash)
    assert outcome(first)["amount"] == "1000000"
    for again in (*said, upper):
        assert again.status_code == 200, again.text
        assert again.json() == body
        assert again.headers["farebox-replayed"] == "true"
    assert gateway.transfers(wallet.address) == [("mint", 1_000_000, "deposit")]


@pytest.mark.parametrize(
    ("usd", "paid", "difference"),
    [("1", "exact", 0), ("1.50", "underpaid", -500_000), ("0.40", "overpaid", 600_000)],
)
async def test_what_the_log_says_is_credited_whatever_was_asked(
    gateway: Gateway, wallet: Wallet, usd: str, paid: str, difference: int
) -> None:
    tx_hash = send(gateway, wallet, 1_000_000)
    async with gateway.client() as http:
        answer = await claim(http, tx_hash, amount_usd=usd)
    body = answer.json()
    assert answer.status_code == 200, answer.text
    assert (body["minted_units"], body["paid"]) == (1_000_000, paid)
    assert body["difference_units"] == difference
    assert gateway.balance(wallet.address) == (1_000_000, 0)


async def test_another_wallet_needs_the_senders_word(gateway: Gateway, wallet: Wallet) -> None:
    other = new_wallet(gateway.net, 0)
    thief = new_wallet(gateway.net, 0)
    tx_hash = send(gateway, wallet, 1_000_000)
    async with gateway.client() as http:
        unsigned = await claim(http, tx_hash, wallet_address=other.address)
        told = problem(unsigned, "payer_signature_required")
        text = told["message"]
        assert told["payer"] == wallet.address
        assert other.address in text and tx_hash in text and "eip155:84532" in text
        wrong = [
            sign(thief, text),
            sign(wallet, text.replace(other.address, thief.address)),
            sign(wallet, text + "\n"),
            "0x" + "00" * 65,
            "0x12",
        ]
        for each in wrong:
            answer = await claim(http, tx_hash, wallet_address=other.address, payer_signature=each)
            problem(answer, "payer_signature_required")
        good = sign(wallet, text)
        stolen = await claim(http, tx_hash, wallet_address=thief.address, payer_signature=good)
        problem(stolen, "payer_signature_required")
        assert gateway.balance(other.address) == (0, 0)
        done = await claim(http, tx_hash, wallet_address=other.address, payer_signature=good)
        assert done.status_code == 200, done.text
        assert done.json()["wallet_address"] == other.address
        problem(await claim(http, tx_hash, wallet_address=wallet.address), "payment_already_used")
        late = await claim(http, tx_hash, wallet_address=thief.address, payer_signature=good)
        problem(late, "payment_already_used")
    assert gateway.balance(other.address) == (1_000_000, 0)
    assert gateway.balance(wallet.address) == (0, 0)


async def test_what_cannot_be_credited_says_why(gateway: Gateway, wallet: Wallet) -> None:
    net = gateway.net
    small = send(gateway, wallet, 9_999)
    elsewhere = move(net, wallet, 20_000, "0x" + secrets.token_hex(20))
    call = selector("transfer(address,uint256)") + address_word(gateway.pay_to)
    too_much = "0x" + (call + uint_word(10**15)).hex()
    failed = net.rpc(
        "eth_sendTransaction",
        {"from": wallet.address, "to": USDC.address, "data": too_much, "gas": "0x30d40"},
    )
    assert net.receipt(failed)["status"] == "0x0"
    async with gateway.client() as http:
        problem(await claim(http, small), "transfer_too_small")
        told = problem(await claim(http, elsewhere), "transfer_not_found")
        assert told["reason"] == "no_transfer"
        problem(await claim(http, failed), "transaction_failed")
        unknown = await claim(http, "0x" + secrets.token_hex(32))
        assert unknown.status_code == 202
        assert unknown.json()["state"] == "not_found"
        assert int(unknown.headers["retry-after"]) > 0
        for odd in (None, 7, "", "0x12", "0x" + "zz" * 32, [small], {"a": 1}):
            problem(await http.post(PURCHASE, json={"transaction_hash": odd}), "invalid_request")
        for more in (
            {"network": "base"},
            {"transfer": -1},
            {"transfer": True},
            {"payer_signature": "0xz"},
            {"payment_method": "card"},
            {"wallet_address": "0x1"},
        ):
            problem(await claim(http, small, **more), "invalid_request")
        bare = await http.post(PURCHASE, json={"amount_usd": "1", "transfer": 0})
        problem(bare, "invalid_request")
    assert gateway.transfers(wallet.address) == []


async def test_a_transfer_that_is_not_in_it_is_not_called_another_token(
    gateway: Gateway, wallet: Wallet
) -> None:
    """The first transfer is ours and counts from 0; one of nothing is none."""
    tx_hash = send(gateway, wallet, 20_000)
    async with gateway.client() as http:
        for named, what in ((tx_hash, 1), (send(gateway, wallet, 0), None)):
            more = {} if what is None else {"transfer": what}
            told = problem(await claim(http, named, **more), "transfer_not_found")
            assert told["reason"] == "no_transfer" and USDC.address not in told["detail"]


async def test_a_token_that_is_not_taken_is_named(gateway: Gateway, wallet: Wallet) -> None:
    """A contract that says it moved something to us, as a token would."""
    net, fake = gateway.net, "0x" + secrets.token_hex(20)
    topic = "ddf252ad1be2c89b69c2b068fc378daa952ba7f163c4a11628f55a4df523b3ef"
    # PUSH the data to memory, then LOG3 Transfer(caller, pay_to, 10^6).
    code = "620f42405f52" + "73" + gateway.pay_to[2:] + "33" + "7f" + topic + "60205fa3" + "00"
    net.rpc("anvil_setCode", fake, "0x" + code)
    net.rpc("anvil_setBalance", wallet.address, hex(10**18))
    net.rpc("anvil_impersonateAccount", wallet.address)
    tx_hash = net.send(wallet.address, fake, "0x")
    assert net.receipt(tx_hash)["logs"][0]["address"] == fake
    async with gateway.client() as http:
        told = problem(await claim(http, tx_hash), "transfer_not_found")
    assert told["reason"] == "wrong_token" and fake in told["detail"]


async def test_what_came_before_the_books_is_refused(launch: Any, chain_session: Devnet) -> None:
    wallet, pay_to = new_wallet(chain_session), "0x" + secrets.token_hex(20)
    old = move(chain_session, wallet, 1_000_000, pay_to)
    gateway = launch(pay_to=pay_to)
    new = send(gateway, wallet, 1_000_000)
    async with gateway.client() as http:
        problem(await claim(http, old), "transfer_too_old")
        assert (await claim(http, new)).status_code == 200
    assert gateway.balance(wallet.address) == (1_000_000, 0)


async def test_a_large_one_is_pending_until_its_block_is_safe(
    gateway: Gateway, wallet: Wallet
) -> None:
    tx_hash = send(gateway, wallet, 9_000_000)
    async with gateway.client() as http:
        for _ in range(3):
            waiting = await claim(http, tx_hash)
            assert waiting.status_code == 202, waiting.text
            body = waiting.json()
            assert (body["code"], body["transaction"]) == ("settlement_pending", tx_hash)
        assert gateway.balance(wallet.address) == (0, 0)
        state = await http.get(f"/farebox/v1/payments/{body['payment_id']}")
        assert state.json()["state"] == "processing"
        gateway.net.mine(40)

        def credited() -> bool:
            return gateway.balance(wallet.address) == (9_000_000, 0)

        await asyncio.to_thread(gateway.wait, credited, "the safe block")
        done = await claim(http, tx_hash)
    assert done.status_code == 200, done.text
    assert done.json()["minted_units"] == 9_000_000
    assert gateway.transfers(wallet.address) == [("mint", 9_000_000, "deposit")]


async def test_a_contract_that_paid_is_a_wallet_of_its_network(gateway: Gateway) -> None:
    net, contract = gateway.net, "0x" + secrets.token_hex(20)
    net.rpc("anvil_setCode", contract, "0x00")
    net.transfer(net.accounts[0].address, contract, 1_000_000)
    net.rpc("anvil_setBalance", contract, hex(10**18))
    net.rpc("anvil_impersonateAccount", contract)
    tx_hash = net.transfer(contract, gateway.pay_to, 1_000_000)
    net.receipt(tx_hash)
    async with gateway.client() as http:
        done = await claim(http, tx_hash)
    assert done.status_code == 200, done.text
    rows = gateway.rows("SELECT chain FROM wallet WHERE address = $1", contract)
    assert rows == [{"chain": "eip155:84532"}]


async def test_the_watcher_credits_a_wallet_it_knows(gateway: Gateway, wallet: Wallet) -> None:
    async with gateway.client() as http:
        assert (await claim(http, send(gateway, wallet, 20_000))).status_code == 200
    send(gateway, wallet, 30_000)
    gateway.net.mine(40)

    def credited() -> bool:
        return gateway.balance(wallet.address) == (50_000, 0)

    await asyncio.to_thread(gateway.wait, credited, "the deposit")


async def test_books_and_chain_agree_and_a_difference_is_an_exit_code(
    dialect: str, launch: Callable[..., Gateway], wallet: Wallet
) -> None:
    gateway = launch(dialect)  # its own: others change lots by hand
    async with gateway.client() as http:
        assert (await claim(http, send(gateway, wallet, 20_000))).status_code == 200

    def run() -> tuple[int, dict[str, Any]]:
        command = ["farebox", "reconcile", "--once", "--json", "--config", str(gateway.config)]
        done = subprocess.run(
            servers.own_program(command),
            capture_output=True,
            text=True,
            cwd=gateway.folder,
            env=servers.child_env(),
            check=False,
            timeout=120,
        )
        return done.returncode, json.loads(done.stdout)

    code, told = await asyncio.to_thread(run)
    assert (code, told["ok"]) == (0, True), json.dumps(told)
    assert {each["where"] for each in told["compared"]} == {"eip155:84532", "stripe"}
    assert told["compared"][0]["units"] >= 20_000
