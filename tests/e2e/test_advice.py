"""Every refusal that a caller can do something about says what (Z17)."""

from __future__ import annotations

import asyncio
import json
import secrets
import time

import httpx

from gateway.errors import DO
from tests.e2e.stage import Gateway
from tests.e2e.wallet import Wallet, buy, new_wallet, offers

PURCHASE = "/farebox/v1/credits/purchase"


def told(answer: httpx.Response, code: str) -> list[dict[str, str]]:
    body = answer.json()
    assert (body["code"], 400 <= answer.status_code < 500) == (code, True), answer.text
    actions: list[dict[str, str]] = body["next_actions"]
    assert actions, code
    for action in actions:
        assert {"do", "method", "url", "send"} <= action.keys(), action
        assert action["do"] in DO and all(action.values()), action
        assert action["url"].startswith("http://127.0.0.1:"), action
    return actions


async def test_what_to_do_after_each_refusal_of_a_call(
    sqlite_gateway: Gateway, wallet: Wallet, target: str
) -> None:
    gateway, url = sqlite_gateway, sqlite_gateway.url + target
    other = new_wallet(gateway.net, 0)

    async with gateway.client() as http:

        async def get(**headers: str) -> httpx.Response:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return await http.get(target, headers=named)

        offer = offers(await http.get(target))[0]
        told(await get(), "payment_required")
        told(await get(Payment_Signature="junk"), "invalid_payload")
        told(await get(Authorization="Bearer fbx_1"), "identity_unsupported")
        told(await get(**wallet.sign("GET", url)), "insufficient_credits")
        stale = wallet.sign("GET", url, now_s=int(time.time()) - 900)
        told(await get(**stale), "signature_expired")
        mixed = other.sign("GET", url, headers={"PAYMENT-SIGNATURE": wallet.pay(offer)})
        told(await get(**mixed), "payer_mismatch")
        twice = [("Payment-Signature", "a"), ("X-Payment", "b")]
        told(await http.get(target, headers=twice), "identity_conflict")
        await buy(http, wallet)
        run = wallet.sign("GET", url, headers={"Farebox-Run": "no/slash"})
        told(await get(**run), "invalid_request")
        low = wallet.sign("GET", url, headers={"Farebox-Max": "$0.000001"})
        told(await get(**low), "price_above_ceiling")
        nonce = secrets.token_urlsafe(16)
        assert (await get(**wallet.sign("GET", url, nonce=nonce))).status_code == 200
        again = wallet.sign("POST", url, b"x", nonce=nonce)
        (action,) = told(
            await http.post(target, content=b"x", headers=again), "request_id_conflict"
        )
        assert (action["method"], action["url"]) == ("POST", url)
        told(await http.delete(target), "method_not_allowed")
        # A head that announces too much; its body never comes.
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        length = {"Host": "x", "Content-Length": str(11 << 20)}
        fields = wallet.sign("POST", url, b"x") | length
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        writer.write(f"POST {target} HTTP/1.1\r\n{lines}\r\n".encode())
        status, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        assert status.startswith(b"HTTP/1.1 413 ")
        assert json.loads(body)["next_actions"][0]["url"] == url


async def test_what_to_do_after_a_refusal_of_our_own_pages(
    sqlite_gateway: Gateway, wallet: Wallet
) -> None:
    async with sqlite_gateway.client() as http:

        async def post(value: object) -> httpx.Response:
            return await http.post(PURCHASE, content=json.dumps(value).encode())

        told(await post({"amount_usd": "1", "price": "0"}), "invalid_request")
        told(await post({"credits": 499}), "invalid_amount")
        told(await http.get("/farebox/v1/credits/balance"), "identity_required")
        # Not sent on: it would be to the Host of the request, with the payment.
        told(await http.post(f"{PURCHASE}/", headers={"Host": "evil.example"}), "not_found")
        (action,) = told(await http.get(PURCHASE), "method_not_allowed")
        assert action["method"] == "POST"
