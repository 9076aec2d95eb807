"""A customer of the tests: signs requests (ERC-8128) and payments (x402), reads the answers.

Payments are signed with eth_account, not with the program's own code.
"""

from __future__ import annotations

import base64
import json
import secrets
import time
from dataclasses import dataclass
from typing import Any

import httpx

from anvil.devnet import Account, Devnet
from gateway.errors import CODES
from tests.e2e.stage import new_account
from tests.fixtures_chain import NETWORK, payment
from wallet_auth.signing import sign_request


@dataclass(frozen=True, slots=True)
class Wallet:
    """A key with some USDC, unknown to every gateway."""

    account: Account

    @property
    def address(self) -> str:
        return self.account.address

    @property
    def key(self) -> str:
        return self.account.private_key

    def sign(
        self,
        method: str,
        url: str,
        body: bytes | None = None,
        *,
        nonce: str | None = None,
        headers: dict[str, str] | None = None,
        **options: Any,
    ) -> dict[str, str]:
        """The headers of a signed request, those that were given included."""
        given = dict(headers or {})
        listed = list(given.items())
        if body:
            listed.append(("content-length", str(len(body))))
        options.setdefault("now_s", int(time.time()))
        nonce = nonce or secrets.token_urlsafe(16)
        added = sign_request(self.key, method, url, listed, body, nonce=nonce, **options)
        return given | added

    def pay(self, offer: dict[str, Any], *, amount: int | None = None, **fields: Any) -> str:
        """PAYMENT-SIGNATURE for one of the offers of a 402 (x402 v2)."""
        fields.setdefault("valid_before_s", int(time.time()) + offer["maxTimeoutSeconds"])
        units = int(offer["amount"]) if amount is None else amount
        payload = payment(self.account, offer["payTo"], units, **fields)
        return encode({"x402Version": 2, "payload": payload, "accepted": offer})

    def pay_v1(self, offer: dict[str, Any], *, amount: int | None = None, **fields: Any) -> str:
        """X-PAYMENT for the offer of a v1 body."""
        units = int(offer["maxAmountRequired"]) if amount is None else amount
        payload = payment(self.account, offer["payTo"], units, **fields)
        return encode(
            {"x402Version": 1, "scheme": "exact", "network": offer["network"], "payload": payload}
        )


def new_wallet(net: Devnet, units: int = 10_000_000) -> Wallet:
    """A wallet that holds some USDC and nothing else."""
    account = new_account()
    if units:
        net.transfer(net.accounts[0].address, account.address, units)
    return Wallet(account)


def encode(value: object) -> str:
    return base64.b64encode(json.dumps(value).encode()).decode()


def decode(header: str) -> Any:
    return json.loads(base64.b64decode(header, validate=True))


def offers(answer: httpx.Response) -> list[dict[str, Any]]:
    """What a 402 offers to x402 v2 clients."""
    assert answer.status_code == 402, answer.text
    required = decode(answer.headers["payment-required"])
    assert required["x402Version"] == 2
    found: list[dict[str, Any]] = required["accepts"]
    return found


def problem(answer: httpx.Response, code: str) -> dict[str, Any]:
    """The answer is the problem of this code, whole and in the form of RFC 9457."""
    body: dict[str, Any] = answer.json()
    assert body["code"] == code, (answer.status_code, body.get("code"), body.get("detail"))
    meaning = CODES[code]
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.status_code == body["status"]
    assert body["retryable"] is meaning.retryable
    assert body["title"] == meaning.title
    assert body["type"] == f"urn:farebox:problem:{code}"
    assert body["detail"] and body["request_id"]
    assert isinstance(body["next_actions"], list)
    return body


def code_of(answer: httpx.Response) -> str | None:
    """The code of a problem, None for every other answer."""
    if answer.headers.get("content-type") != "application/problem+json":
        return None
    return str(answer.json()["code"])


def outcome(answer: httpx.Response) -> dict[str, Any]:
    """PAYMENT-RESPONSE; X-PAYMENT-RESPONSE must say the same in the words of v1."""
    told: dict[str, Any] = decode(answer.headers["payment-response"])
    not_in_v1 = ("amount", "extra", "extensions")
    same = {name: value for name, value in told.items() if name not in not_in_v1}
    if same["network"] == NETWORK.caip2:
        same["network"] = NETWORK.v1_name
    assert decode(answer.headers["x-payment-response"]) == same
    return told


async def buy(http: httpx.AsyncClient, wallet: Wallet, usd: str = "1") -> httpx.Response:
    """Buy credits over x402 as an agent would: ask, pay, get."""
    body = json.dumps({"amount_usd": usd}).encode()
    asked = await http.post("/farebox/v1/credits/purchase", content=body)
    header = wallet.pay(offers(asked)[0])
    paid = await http.post(
        "/farebox/v1/credits/purchase", content=body, headers={"PAYMENT-SIGNATURE": header}
    )
    assert paid.status_code == 200, paid.text
    return paid
