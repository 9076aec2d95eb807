"""The official seller for Express with this gateway as its facilitator, and official clients."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx
import pytest

from anvil.devnet import Devnet
from tests import servers
from tests.e2e.stage import PRICE_UNITS, Gateway
from tests.e2e.test_clients import pay
from tests.e2e.wallet import Wallet, decode
from tests.wallet_auth.support import CLIENTS, node

API_KEY = "a-key-that-is-long-enough-123"
PAY_TO = "0x" + "e5" * 20


@pytest.fixture
def facilitator(launch: Callable[..., Gateway]) -> Gateway:
    made = launch("sqlite", running=False)
    made.chain_extra = f'[facilitator]\napi_key = "{API_KEY}"'
    return made.start()


@pytest.fixture
def seller(facilitator: Gateway, run: Callable[..., servers.Process]) -> Iterator[str]:
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
