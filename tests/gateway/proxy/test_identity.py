"""A signature and a payment in one request are of one wallet, and a contract's on one chain."""

from __future__ import annotations

import json
from base64 import b64encode
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gateway.errors import Problem
from gateway.limits import Limits
from gateway.node import Node
from gateway.proxy.identity import guard_of, identify
from gateway.proxy.target import parse
from tests.e2e.stage import new_account
from tests.fixtures_chain import NETWORK, payment
from wallet_auth.keys import ERC1271_YES
from wallet_auth.signing import sign_request

NOW_S = 1_000_000
HERE = NETWORK.chain_id
KEY, OWNER, CONTRACT = new_account(), new_account(), "0x" + "c0" * 20


async def _yes(caip2: str, to: str, data: bytes) -> bytes:
    return ERC1271_YES if to == CONTRACT else b""


# A stand-in: of a node only this much is asked, and a real one would need two chains with a
# contract on each to say it.
_CHAIN = SimpleNamespace(caip2=NETWORK.caip2, network=NETWORK)
NODE = cast(
    Node,
    SimpleNamespace(
        authority="a.example",
        scheme="https",
        eth_call=_yes,
        limits=Limits(None, deployment="test", uncharged_per_min=60),
        rails=SimpleNamespace(chain_of=lambda presented: _CHAIN),
        settings=SimpleNamespace(
            server=SimpleNamespace(public_url="https://a.example"),
            takes_permit2=False,
            takes_upto=False,
        ),
    ),
)


def signed(chain_id: int, address: str) -> dict[str, str]:
    """Signed by ``OWNER`` for the contract, or by ``KEY`` itself."""
    key = OWNER if address == CONTRACT else KEY
    url = "https://a.example/x"
    made = sign_request(
        key.private_key, "GET", url, [], None, now_s=NOW_S, nonce="n", chain_id=chain_id
    )
    made["Signature-Input"] = made["Signature-Input"].replace(key.address, address)
    return made


def paid(address: str) -> str:
    payer = OWNER if address == CONTRACT else KEY
    payload = payment(payer, "0x" + "aa" * 20, 10_000, from_=address, valid_before_s=NOW_S + 60)
    body = {"x402Version": 1, "scheme": "exact", "network": NETWORK.v1_name, "payload": payload}
    return b64encode(json.dumps(body).encode()).decode()


async def caller(chain_id: int, signer: str, payer: str) -> Any:
    fields = {**signed(chain_id, signer), "X-PAYMENT": paid(payer)}
    headers = [(name.lower().encode(), value.encode()) for name, value in fields.items()]
    return await identify(NODE, "GET", parse(b"/x"), headers, NOW_S)


@pytest.mark.parametrize("chain_id", [1, HERE])
async def test_a_key_is_one_wallet_on_every_chain(chain_id: int) -> None:
    found = await caller(chain_id, KEY.address, KEY.address)
    assert found.wallet == (KEY.address, "")


async def test_a_contract_pays_where_it_signs() -> None:
    found = await caller(HERE, CONTRACT, CONTRACT)
    assert found.wallet == (CONTRACT, NETWORK.caip2)
    # What its payment burns is found again when the payment is shown alone.
    beside = guard_of(NODE, found)
    alone = guard_of(NODE, found._replace(signer=None))
    assert (beside.principal, beside.payment) == (alone.principal, alone.payment)


@pytest.mark.parametrize(
    ("chain_id", "signer", "payer"),
    [(1, CONTRACT, CONTRACT), (HERE, CONTRACT, KEY.address), (HERE, KEY.address, CONTRACT)],
    ids=["of another chain", "contract and key", "key and contract"],
)
async def test_another_wallet_pays(chain_id: int, signer: str, payer: str) -> None:
    with pytest.raises(Problem, match="payer_mismatch"):
        await caller(chain_id, signer, payer)
