"""Credits back on chain, through the real gateway: asked over HTTP, killed anywhere, paid once.

On a chain of its own whose blocks are final after 8 more.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from anvil.devnet import Account, Devnet
from gateway import hands
from tests.e2e.conftest import _in_front_of
from tests.e2e.stage import Background, Gateway, new_account, transfers_to
from tests.e2e.wallet import Wallet, buy, new_wallet, offers, problem
from tests.fixtures_chain import FaultyNode
from tests.servers import eventually

Launch = Callable[..., Gateway]
REFUND = "/farebox/v1/credits/refund"


@pytest.fixture
def node(background: Background, shallow: Devnet) -> Iterator[FaultyNode]:
    yield from _in_front_of(background, shallow)


@pytest.fixture
def till(shallow: Devnet) -> Account:
    made = new_account()
    shallow.transfer(shallow.accounts[0].address, made.address, 10_000_000)
    return made


@pytest.fixture
def payer(shallow: Devnet) -> Wallet:
    return new_wallet(shallow)


def opened(
    launch: Launch, dialect: str, net: Devnet, node: FaultyNode, till: Account, **more: Any
) -> Gateway:
    server = {"settle_wait_s": 1}
    gateway = launch(dialect, net=net, rpc_url=node.url, server=server, running=False, **more)
    (gateway.folder / "refund.key").write_text(till.private_key)
    gateway.chain_extra = 'refund_key_file = "refund.key"\nrefund_min = "$0.01"'
    return gateway.start()


async def bought(gateway: Gateway, http: httpx.AsyncClient, payer: Wallet) -> None:
    """A dollar of credits, their payment final."""
    await buy(http, payer)
    gateway.net.mine(9)

    def final() -> bool:
        rows = gateway.rows("SELECT depth FROM inbound WHERE from_address = $1", payer.address)
        return [row["depth"] for row in rows] == ["final"]

    gateway.wait(final, "the payment to be final")


async def ask(
    gateway: Gateway, http: httpx.AsyncClient, payer: Wallet, asked: object, **signed: Any
) -> httpx.Response:
    body = json.dumps(asked).encode()
    headers = payer.sign("POST", gateway.url + REFUND, body, **signed)
    return await http.post(REFUND, content=body, headers=headers)


def payout_state(gateway: Gateway) -> str:
    rows = gateway.rows("SELECT state FROM payment WHERE provider = 'payout'")
    assert len(rows) <= 1
    return str(rows[0]["state"]) if rows else ""


def ended(gateway: Gateway) -> None:
    """The refund ends as paid, with one transfer on chain."""

    def paid() -> bool:
        gateway.net.mine()
        return payout_state(gateway) == "succeeded"

    gateway.wait(paid, "the refund to end", timeout_s=60)


# --- over HTTP ------------------------------------------------------------------------------


async def test_a_wallet_has_its_credits_back(  # noqa: PLR0917
    dialect: str, launch: Launch, shallow: Devnet, node: FaultyNode, till: Account, payer: Wallet
) -> None:
    gateway = opened(launch, dialect, shallow, node, till)
    async with gateway.client() as http:
        challenge = await http.post("/farebox/v1/credits/purchase", json={"amount_usd": "1"})
        assert problem(challenge, "payment_required")["refund_policy"]["refundable"] is True
        await buy(http, payer)
        problem(await ask(gateway, http, payer, {"all": True}), "refund_not_final")
        gateway.net.mine(9)
        gateway.wait(
            lambda: gateway.rows("SELECT 1 AS x FROM inbound WHERE depth = 'final'"), "finality"
        )
        assert shallow.balance_units(payer.address) == 9_000_000

        body = json.dumps({"all": True}).encode()
        payment = payer.pay(offers(challenge)[0])
        bare = await http.post(REFUND, content=body, headers={"PAYMENT-SIGNATURE": payment})
        problem(bare, "identity_required")  # a payer is not a login
        thief = new_wallet(shallow, 0)
        problem(await ask(gateway, http, thief, {"all": True}), "not_refundable")
        for wrong in ({}, {"all": False}, {"lot": "1"}, {"lot": 1, "all": True}, {"to": "0x1"}):
            problem(await ask(gateway, http, payer, wrong), "invalid_request")
        for wrong in ({"amount_usd": "0"}, {"amount_usd": "1e3"}, {"amount_usd": 1}):
            problem(await ask(gateway, http, payer, wrong), "invalid_amount")

        first = await ask(gateway, http, payer, {"amount_usd": "0.4"}, nonce="a-nonce-of-mine")
        assert first.status_code == 202, first.text
        (entry,) = first.json()["refunds"]
        assert (entry["amount_units"], entry["to"]) == (400_000, payer.address)
        assert entry["state"] == "processing"
        assert first.json()["balance_units"] == 600_000
        again = await ask(gateway, http, payer, {"amount_usd": "0.4"}, nonce="a-nonce-of-mine")
        assert again.headers["farebox-replayed"] == "true"
        assert [e["payment_id"] for e in again.json()["refunds"]] == [entry["payment_id"]]
        other = await ask(gateway, http, payer, {"amount_usd": "0.5"}, nonce="a-nonce-of-mine")
        problem(other, "request_id_conflict")
        problem(await ask(gateway, http, payer, {"amount_usd": "0.7"}), "not_refundable")

        ended(gateway)
        assert shallow.balance_units(payer.address) == 9_400_000
        assert shallow.balance_units(till.address) == 9_600_000
        told = (await http.get(f"/farebox/v1/payments/{entry['payment_id']}")).json()
        assert (told["state"], told["provider"]) == ("paid", "payout")
        assert told["transaction"] == transfers_to(shallow, payer.address)[-1]["transactionHash"]
        done = await ask(gateway, http, payer, {"amount_usd": "0.4"}, nonce="a-nonce-of-mine")
        assert (done.status_code, done.json()["refunds"][0]["state"]) == (200, "paid")
    assert gateway.transfers(payer.address)[1:] == [
        ("withhold", 400_000, None),
        ("release", 400_000, told["transaction"]),
        ("payout", 400_000, told["transaction"]),
    ]
    exported: list[dict[str, Any]] = []
    with ThreadPoolExecutor(1) as pool:  # it brings a loop of its own
        pool.submit(hands.export, gateway.settings(), exported.append).result()
    found = {r["row"]: r for r in exported if r["row"].startswith("payout")}
    assert found["payout"]["amount_units"] == 400_000
    assert found["payout_end"]["paid"] == 1
    assert till.private_key[2:] not in json.dumps(exported) + gateway.log


async def test_where_it_is_not_switched_on(
    launch: Launch, shallow: Devnet, node: FaultyNode, payer: Wallet
) -> None:
    gateway = launch("sqlite", net=shallow, rpc_url=node.url)
    async with gateway.client() as http:
        bought = await buy(http, payer)
        assert bought.json()["refund_policy"]["refundable"] is False
        problem(await ask(gateway, http, payer, {"all": True}), "refund_not_offered")
    assert gateway.balance(payer.address) == (1_000_000, 0)


# --- kill -9 --------------------------------------------------------------------------------

# Where the gateway stands when it is killed: a question that is not answered, and whether the
# question before it got through.
KILLED = {
    "before anything is withheld": ("eth_blockNumber", None),
    "withheld, nothing signed": ("eth_estimateGas", None),
    "signed and stored, not sent": ("eth_sendRawTransaction", None),
    "sent, the answer lost": ("eth_getTransactionReceipt", "eth_sendRawTransaction"),
    "in a block, not seen": ("eth_getTransactionReceipt", None),
}


@pytest.mark.parametrize("point", KILLED)
async def test_killed_anywhere_it_is_paid_once(  # noqa: PLR0917
    dialect: str,
    launch: Launch,
    shallow: Devnet,
    node: FaultyNode,
    till: Account,
    payer: Wallet,
    point: str,
) -> None:
    stop_at, lost = KILLED[point]
    gateway = opened(launch, dialect, shallow, node, till)
    async with gateway.client() as http:
        await bought(gateway, http, payer)
        node.asked.clear()
        if lost is not None:
            node.fault(lost, "lose")
        node.fault(stop_at, "hang")
        asking = asyncio.create_task(ask(gateway, http, payer, {"all": True}, nonce="once-only-1"))
        await eventually(lambda: _asked_by_refund(node, stop_at, gateway), stop_at)
        gateway.kill()
        with pytest.raises(httpx.TransportError):
            await asking
    assert gateway.broken() == {}
    withheld = gateway.balance(payer.address) == (0, 0)
    assert withheld is (stop_at != "eth_blockNumber")
    node.faults.clear()
    gateway.start()
    async with gateway.client() as http:
        again = await ask(gateway, http, payer, {"all": True}, nonce="once-only-1")
        assert again.status_code in {200, 202}, again.text
        assert ("farebox-replayed" in again.headers) is withheld
    ended(gateway)
    assert shallow.balance_units(payer.address) == 10_000_000
    assert shallow.balance_units(till.address) == 9_000_000
    assert gateway.balance(payer.address) == (0, 0)
    kinds = [kind for kind, *_ in gateway.transfers(payer.address)]
    assert kinds == ["mint", "withhold", "release", "payout"]


def _asked_by_refund(node: FaultyNode, method: str, gateway: Gateway) -> bool:
    """The background loop asks some of these too: only what comes after the withholding counts."""
    if method not in node.asked:
        return False
    if method == "eth_blockNumber":
        return True
    return payout_state(gateway) == "processing" and (
        method != "eth_getTransactionReceipt" or "eth_sendRawTransaction" in node.asked
    )


async def test_killed_while_the_end_is_looked_at(  # noqa: PLR0917
    dialect: str, launch: Launch, shallow: Devnet, node: FaultyNode, till: Account, payer: Wallet
) -> None:
    gateway = opened(launch, dialect, shallow, node, till)
    async with gateway.client() as http:
        await bought(gateway, http, payer)
        assert (await ask(gateway, http, payer, {"all": True})).status_code == 202
    assert shallow.balance_units(payer.address) == 10_000_000
    node.fault("eth_getTransactionReceipt", "hang")
    node.asked.clear()
    shallow.mine(9)
    gateway.wait(lambda: "eth_getTransactionReceipt" in node.asked, "a look")
    gateway.kill()
    assert payout_state(gateway) == "processing"
    assert gateway.broken() == {}
    node.faults.clear()
    gateway.start()
    ended(gateway)
    assert shallow.balance_units(till.address) == 9_000_000


# --- two nodes ------------------------------------------------------------------------------


async def test_two_nodes_and_twenty_requests_pay_one_lot_once(
    launch: Launch, shallow: Devnet, node: FaultyNode, till: Account, payer: Wallet
) -> None:
    first = opened(launch, "postgres", shallow, node, till)
    second = opened(launch, "", shallow, node, till, beside=first)
    async with first.client() as http, second.client() as beside:
        await bought(first, http, payer)
        (lot,) = first.rows("SELECT id FROM lot")
        wanted = {"lot": lot["id"]}
        answers = await asyncio.gather(
            *(
                ask(gateway, client, payer, wanted)
                for gateway, client in ((first, http), (second, beside)) * 10
            )
        )
        codes = sorted(each.status_code for each in answers)
        assert codes == [202] + [409] * 19, [each.text for each in answers]
        ended(first)
    assert shallow.balance_units(till.address) == 9_000_000
    assert shallow.balance_units(payer.address) == 10_000_000
