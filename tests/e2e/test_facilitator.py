"""The official seller for Express with this gateway as its facilitator, and official clients."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx
import pytest

from anvil.devnet import Devnet
from tests import servers
from tests.e2e.stage import PRICE_UNITS, Gateway
from tests.e2e.test_clients import pay
from tests.e2e.wallet import Wallet, buy, decode
from tests.fixtures_chain import FaultyNode
from tests.fixtures_permit2 import approve, plant
from tests.wallet_auth.support import CLIENTS, node

API_KEY = "a-key-that-is-long-enough-123"
PAY_TO = "0x" + "e5" * 20


@pytest.fixture
def facilitator(launch: Callable[..., Gateway]) -> Gateway:
    made = launch("sqlite", running=False)
    made.chain_extra = f'[facilitator]\napi_key = "{API_KEY}"'
    return made.start()


@pytest.fixture
def planted(chain_session: Devnet) -> Devnet:
    """With Permit2 and the proxies: the seller has a route with upto, and starts only if that is
    supported."""
    plant(chain_session)
    return chain_session


@pytest.fixture
def seller(
    planted: Devnet, facilitator: Gateway, run: Callable[..., servers.Process]
) -> Iterator[str]:
    port = servers.free_port()
    script = str(CLIENTS / "bench" / "facilitated.mjs")
    url = facilitator.url + "/farebox/x402"
    process = run(node(), script, str(port), url, API_KEY, PAY_TO)
    process.wait_port(port)
    yield f"http://127.0.0.1:{port}"


@pytest.mark.parametrize("client", ["v2-js", "v2-py"])
def test_a_stock_seller_is_paid_by_a_stock_client(
    client: str, facilitator: Gateway, seller: str, chain_session: Devnet, wallet: Wallet
) -> None:
    before, sent = chain_session.balance_units(PAY_TO), facilitator.sent()
    held = chain_session.balance_units(wallet.address)
    (got,) = pay(client, f"{seller}/paid", wallet.key)
    assert got["status"] == 200, (got, facilitator.log[-2000:])
    told = decode(got["headers"]["payment-response"])
    assert told["success"] is True
    assert chain_session.receipt(told["transaction"])["status"] == "0x1"
    assert chain_session.balance_units(PAY_TO) == before + PRICE_UNITS
    assert chain_session.balance_units(wallet.address) == held - PRICE_UNITS
    assert facilitator.sent() == sent + 1
    (row,) = facilitator.payments(wallet.address)
    assert (row["provider"], row["state"]) == ("facilitator", "succeeded")
    # Nothing of it is ours.
    assert facilitator.transfers(wallet.address) == []
    assert facilitator.received() == 0


def test_a_used_payment_buys_nothing_more(
    facilitator: Gateway, seller: str, wallet: Wallet
) -> None:
    """Over a seller that verifies first: one payment, one answer, however often it is sent."""
    with httpx.Client(base_url=seller, timeout=30, trust_env=False) as http:
        required = decode(http.get("/paid").headers["payment-required"])
        header = {"PAYMENT-SIGNATURE": wallet.pay(required["accepts"][0])}
        assert http.get("/paid", headers=header).status_code == 200
        sent = facilitator.sent()
        again = http.get("/paid", headers=header)
        assert again.status_code == 402, again.text
        assert http.get("/served").json() == {"served": 1}
        assert facilitator.sent() == sent


def test_a_poor_client_gets_nothing(
    facilitator: Gateway, seller: str, chain_session: Devnet, wallet: Wallet
) -> None:
    chain_session.rpc("anvil_impersonateAccount", wallet.address)
    chain_session.rpc("anvil_setBalance", wallet.address, hex(10**18))
    chain_session.transfer(wallet.address, PAY_TO, chain_session.balance_units(wallet.address))
    sent = facilitator.sent()
    (got,) = pay("v2-js", f"{seller}/paid", wallet.key)
    assert got["status"] == 402
    assert facilitator.sent() == sent
    assert facilitator.payments(wallet.address) == []


# --- a maximum, and what the call came to ---------------------------------------------------------

UPTO = {"v2-js": "pay_upto.mjs", "v2-py": "pay_upto.py"}


@pytest.mark.parametrize(("client", "units"), [(c, u) for c in UPTO for u in (1_234, 0)])
def test_a_stock_seller_is_paid_what_a_call_came_to(
    client: str, units: int, facilitator: Gateway, seller: str, wallet: Wallet
) -> None:
    net = facilitator.net
    approve(net, wallet.account)
    before, held = net.balance_units(PAY_TO), net.balance_units(wallet.address)
    (got,) = pay(client, f"{seller}/metered/{units}", wallet.key, script=UPTO[client])
    assert got["status"] == 200, (got, facilitator.log[-2000:])
    told = decode(got["headers"]["payment-response"])
    assert (told["success"], told["amount"]) == (True, str(units))
    assert net.balance_units(PAY_TO) == before + units
    assert net.balance_units(wallet.address) == held - units
    rows = facilitator.payments(wallet.address)
    if units:
        assert net.receipt(told["transaction"])["status"] == "0x1"
        assert [(row["state"], row["amount_units"]) for row in rows] == [("succeeded", units)]
    else:
        assert (told["transaction"], rows, facilitator.sent()) == ("", [], 0)
    assert facilitator.transfers(wallet.address) == []


# --- one gateway settles for another --------------------------------------------------------------


@pytest.fixture
def selling(facilitator: Gateway, launch: Callable[..., Gateway]) -> Gateway:
    """A shop whose payments the other gateway is asked to settle first."""
    made = launch("sqlite", running=False)
    url = f"{facilitator.url}/farebox/x402"
    made.chain_extra = (
        f'facilitator = "{url}"\nfacilitator_key = "{API_KEY}"\nfacilitator_wait_s = 2'
    )
    return made.start()


def says(gateway: Gateway) -> str:
    answer = httpx.get(f"{gateway.url}/readyz", timeout=30, trust_env=False)
    assert answer.status_code == 200
    found: str = answer.json()["checks"]["eip155:84532 facilitator"]
    return found


async def test_one_gateway_settles_for_another_until_it_is_gone(
    facilitator: Gateway, selling: Gateway, wallet: Wallet
) -> None:
    """And again when it is back: each payment one mint, whoever sent it."""
    async with selling.client() as http:
        await buy(http, wallet)
        assert (facilitator.sent(), selling.sent()) == (1, 0)
        assert says(selling) == "ok"
        facilitator.kill()
        await buy(http, wallet)
        assert selling.sent() == 1
        selling.wait(lambda: says(selling) == "passed over", "the end of an answer that is kept")
        facilitator.start()
        selling.wait(lambda: says(selling) == "ok", "the other one's return", 60)
        await buy(http, wallet)
        assert (facilitator.sent(), selling.sent()) == (2, 1)
    assert selling.received() == 3_000_000
    assert [units for kind, units, _ in selling.transfers(wallet.address)] == [1_000_000] * 3
    assert facilitator.transfers(wallet.address) == []


async def test_it_has_sent_and_dies_before_it_says_so(
    launch: Callable[..., Gateway], faulty: FaultyNode, wallet: Wallet
) -> None:
    """Its transaction moves the money, and ours would move nothing more: one mint (Z11)."""
    other = launch("sqlite", rpc_url=faulty.url, running=False)
    other.chain_extra = f'[facilitator]\napi_key = "{API_KEY}"'
    other.start()
    shop = launch("sqlite", running=False)
    shop.chain_extra = (
        f'facilitator = "{other.url}/farebox/x402"\nfacilitator_key = "{API_KEY}"\n'
        "facilitator_wait_s = 2"
    )
    shop.start()
    # The transaction is passed on to the chain; what the node says of it never comes, so it
    # says nothing to the shop within its time.
    faulty.fault("eth_sendRawTransaction", "lose")
    faulty.fault("eth_getTransactionReceipt", "hang")
    held = shop.net.balance_units(wallet.address)
    async with shop.client() as http:
        await buy(http, wallet)
    assert other.sent() == 1
    assert shop.received() == 1_000_000
    assert shop.net.balance_units(wallet.address) == held - 1_000_000
    assert [units for _, units, _ in shop.transfers(wallet.address)] == [1_000_000]
    assert says(shop) == "passed over"
