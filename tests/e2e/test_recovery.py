"""Programs get out of refusals by what those say (Z17), and stop where a person has to decide.

``Follower`` is a client of the tests' own that knows no code of any error: it reads
``next_actions`` and nothing else.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from tests.e2e.stage import PRICE_UNITS, Api, Gate, Gateway, answer_when_open
from tests.e2e.wallet import Wallet, buy, code_of, decode, encode, new_wallet, offers
from tests.gateway.proxy.misbehave import Writer
from wallet_auth import agent
from wallet_auth.agent import WalletAuth

Headers = dict[str, str]


class Follower:
    """Sends a request and goes on as its answers say; ``stopped`` is why it did not get through."""

    def __init__(self, http: httpx.AsyncClient, wallet: Wallet, base: str) -> None:
        self.http, self.wallet, self.base = http, wallet, base
        self.steps: list[str] = []
        self.stopped = ""

    async def go(self, method: str, target: str, headers: Headers, body: bytes) -> httpx.Response:
        skew_s = 0
        for _ in range(6):
            answer = await self.http.request(method, target, headers=headers, content=body)
            if answer.status_code < 400:
                return answer
            told = answer.json()
            chosen = next(
                (a for a in told["next_actions"] if a["do"] in ("repeat", "sign", "pay")), None
            )
            if chosen is None:
                self.stopped = told["detail"]
                return answer
            assert (chosen["method"], chosen["url"]) == (method, self.base + target)
            self.steps.append(chosen["do"])
            skew_s = told.get("now_s", int(time.time())) - int(time.time())
            if chosen["do"] == "repeat":
                await asyncio.sleep(min(chosen["after_s"], 3))
            elif chosen["do"] == "sign":
                assert set(chosen["headers"]) == {"Signature-Input", "Signature"}
                headers = self.signed(method, target, body, now_s=int(time.time()) + skew_s)
            else:
                (name,) = chosen["headers"]
                headers = self.signed(
                    method, target, body, headers={name: self.wallet.pay(offers(answer)[0])}
                )
        raise AssertionError(f"no way out: {self.steps}, {answer.text}")

    def signed(self, method: str, target: str, body: bytes, **options: Any) -> Headers:
        return self.wallet.sign(method, self.base + target, body or None, **options)


Make = Callable[[Follower, str], Awaitable[tuple[str, Headers, bytes]]]


async def stale(follower: Follower, target: str) -> tuple[str, Headers, bytes]:
    old = int(time.time()) - 900
    return "GET", follower.signed("GET", target, b"", now_s=old), b""


async def early(follower: Follower, target: str) -> tuple[str, Headers, bytes]:
    soon = int(time.time()) + 900
    return "GET", follower.signed("GET", target, b"", now_s=soon), b""


async def tampered(follower: Follower, target: str) -> tuple[str, Headers, bytes]:
    return "POST", follower.signed("POST", target, b"signed"), b"sent"


async def uncovered(follower: Follower, target: str) -> tuple[str, Headers, bytes]:
    return "GET", follower.signed("GET", target, b"") | {"Farebox-Max": "$1"}, b""


async def used_id(follower: Follower, target: str) -> tuple[str, Headers, bytes]:
    nonce = secrets.token_urlsafe(16)
    first = follower.signed("GET", target, b"", nonce=nonce)
    assert (await follower.http.get(target, headers=first)).status_code == 200
    return "POST", follower.signed("POST", target, b"x", nonce=nonce), b"x"


async def used_payment(follower: Follower, target: str) -> tuple[str, Headers, bytes]:
    paid = follower.wallet.pay(offers(await follower.http.get(target + "/first"))[0])
    headers = {"PAYMENT-SIGNATURE": paid}
    assert (await follower.http.get(target + "/first", headers=headers)).status_code == 200
    return "GET", headers, b""


async def no_money(follower: Follower, target: str) -> tuple[str, Headers, bytes]:
    follower.wallet = new_wallet_of(follower)
    return "GET", follower.signed("GET", target, b""), b""


async def nobody(follower: Follower, target: str) -> tuple[str, Headers, bytes]:
    return "GET", {}, b""


async def old_offer(follower: Follower, target: str) -> tuple[str, Headers, bytes]:
    offer = offers(await follower.http.get(target))[0]
    offer["extra"]["offer"] = offer["extra"]["offer"][:-4] + "AAAA"
    return "GET", {"PAYMENT-SIGNATURE": follower.wallet.pay(offer)}, b""


async def bearer(follower: Follower, target: str) -> tuple[str, Headers, bytes]:
    return "GET", {"Authorization": "Bearer fbx_nothing"}, b""


def resigned(pattern: str, new: str) -> Make:
    """A signed request whose Signature-Input was changed by hand."""

    async def make(follower: Follower, target: str) -> tuple[str, Headers, bytes]:
        headers = follower.signed("GET", target, b"")
        changed = re.sub(pattern, new, headers["Signature-Input"])
        assert changed != headers["Signature-Input"]
        return "GET", headers | {"Signature-Input": changed}, b""

    return make


def mispaid(*path: str, value: Any) -> Make:
    """A payment with one member changed; None as a value: the first character of what is there."""

    async def make(follower: Follower, target: str) -> tuple[str, Headers, bytes]:
        offer = offers(await follower.http.get(target))[0]
        payload = decode(follower.wallet.pay(offer))
        place = payload
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value(place[path[-1]]) if callable(value) else value
        return "GET", {"PAYMENT-SIGNATURE": encode(payload)}, b""

    return make


def flipped(signature: str) -> str:
    return signature[:10] + ("0" if signature[10] != "0" else "1") + signature[11:]


AUTHORIZATION = ("payload", "authorization")


def new_wallet_of(follower: Follower) -> Wallet:
    return new_wallet(NETS[follower.base])


NETS: dict[str, Any] = {}
CURABLE: dict[str, tuple[Make, list[str]]] = {
    "signature_expired": (stale, ["sign"]),
    "signature_not_yet_valid": (early, ["sign"]),
    "signature_digest_mismatch": (tampered, ["sign"]),
    "ceiling_not_covered": (uncovered, ["sign"]),
    "request_id_conflict": (used_id, ["sign"]),
    "payment_already_used": (used_payment, ["sign"]),
    "insufficient_credits": (no_money, ["pay"]),
    "payment_required": (nobody, ["pay"]),
    "invalid_payment_requirements": (old_offer, ["pay"]),
    "identity_unsupported": (bearer, ["sign"]),
    "signature_missing_component": (resigned('"@path" ?', ""), ["sign"]),
    "signature_nonce_missing": (resigned(';nonce="[^"]*"', ""), ["sign"]),
    "signature_window_too_long": (resigned(r"expires=\d+", "expires=9999999999"), ["sign"]),
    "signature_invalid": (resigned("erc8128:", "erc8128:1"), ["sign"]),
    "invalid_x402_version": (mispaid("x402Version", value=3), ["pay"]),
    "invalid_scheme": (mispaid("accepted", "scheme", value="upto"), ["pay"]),
    "invalid_network": (mispaid("accepted", "network", value="eip155:1"), ["pay"]),
    "invalid_exact_evm_payload_signature": (
        mispaid("payload", "signature", value=flipped),
        ["pay"],
    ),
    "invalid_exact_evm_payload_recipient_mismatch": (
        mispaid(*AUTHORIZATION, "to", value="0x" + "11" * 20),
        ["pay"],
    ),
    "invalid_exact_evm_payload_authorization_value_mismatch": (
        mispaid(*AUTHORIZATION, "value", value="1"),
        ["pay"],
    ),
    "invalid_exact_evm_payload_authorization_valid_before": (
        mispaid(*AUTHORIZATION, "validBefore", value="1"),
        ["pay"],
    ),
    "invalid_exact_evm_payload_authorization_valid_after": (
        mispaid(*AUTHORIZATION, "validAfter", value="9999999999"),
        ["pay"],
    ),
}


@pytest.mark.parametrize("code", CURABLE)
async def test_a_program_gets_out_by_what_it_is_told(
    sqlite_gateway: Gateway, wallet: Wallet, api: Api, target: str, code: str
) -> None:
    gateway = sqlite_gateway
    NETS[gateway.url] = gateway.net
    make, steps = CURABLE[code]
    async with gateway.client() as http:
        await buy(http, wallet)
        follower = Follower(http, wallet, gateway.url)
        method, headers, body = await make(follower, target)
        refused = await http.request(method, target, headers=headers, content=body)
        assert code_of(refused) == code, refused.text
        before = api.calls(target)
        answer = await follower.go(method, target, headers, body)
    assert answer.status_code == 200, (follower.stopped, answer.text)
    assert follower.steps == steps
    assert api.calls(target) == before + 1


async def test_a_program_waits_for_a_call_that_runs(
    sqlite_gateway: Gateway, wallet: Wallet, api: Api, target: str
) -> None:
    gateway = sqlite_gateway
    gate = api.behave(target, answer_when_open)
    async with gateway.client() as http:
        await buy(http, wallet)
        follower = Follower(http, wallet, gateway.url)
        headers = follower.signed("GET", target, b"")
        first = asyncio.create_task(http.get(target, headers=headers))
        while not gate.arrived:
            await asyncio.sleep(0.02)
        second = asyncio.create_task(follower.go("GET", target, headers, b""))
        while not follower.steps:
            await asyncio.sleep(0.02)
        gate.open()
        assert (await first).status_code == (await second).status_code == 200
    assert set(follower.steps) == {"repeat"}
    assert api.calls(target) == 1
    assert gateway.balance(wallet.address) == (1_000_000 - PRICE_UNITS, 0)


STOPS: dict[str, tuple[str, str, Headers, bytes]] = {
    "price_above_ceiling": ("GET", "", {"Farebox-Max": "$0.000001"}, b""),
    "invalid_request": ("GET", "", {"Farebox-Run": "no/slash"}, b""),
    "method_not_allowed": ("DELETE", "", {}, b""),
    "invalid_target": ("GET", "//x", {}, b""),
}


@pytest.mark.parametrize("code", STOPS)
async def test_a_program_stops_with_the_reason(
    sqlite_gateway: Gateway, wallet: Wallet, api: Api, target: str, code: str
) -> None:
    gateway = sqlite_gateway
    method, suffix, headers, body = STOPS[code]
    async with gateway.client() as http:
        await buy(http, wallet)
        follower = Follower(http, wallet, gateway.url)
        if code != "invalid_target":
            headers = follower.signed(method, target + suffix, body, headers=headers)
        answer = await follower.go(method, target + suffix, headers, body)
    assert code_of(answer) == code
    assert answer.json()["next_actions"], "even so it says what can be done"
    assert follower.stopped == answer.json()["detail"] != ""
    assert follower.steps == []
    assert api.calls(target) == 0
    assert gateway.balance(wallet.address) == (1_000_000, 0)


# --- the client of this project ------------------------------------------------------------------


async def asked(gateway: Gateway, auth: WalletAuth, target: str) -> httpx.Response:
    async with httpx.AsyncClient(base_url=gateway.url, auth=auth, trust_env=False) as http:
        return await http.get(target)


async def test_a_clock_that_is_wrong_is_set_right_once(
    sqlite_gateway: Gateway, wallet: Wallet, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway, true_time = sqlite_gateway, time.time
    events: list[str] = []
    auth = WalletAuth(wallet.key, on_event=lambda kind, _: events.append(kind))
    async with gateway.client() as http:
        await buy(http, wallet)
    monkeypatch.setattr(agent.time, "time", lambda: true_time() - 3_600)
    assert (await asked(gateway, auth, target)).status_code == 200
    assert events == ["signed", "recovering", "signed"]
    assert (await asked(gateway, auth, target)).status_code == 200
    assert events[3:] == ["signed"]
    left = await asked(gateway, WalletAuth(wallet.key, recover=False), target)
    assert code_of(left) == "signature_expired"


async def test_a_used_id_is_left_and_a_ceiling_is_not_raised(
    sqlite_gateway: Gateway, wallet: Wallet, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = sqlite_gateway
    async with gateway.client() as http:
        await buy(http, wallet)
    ids = iter(["the-same-id-twice-1", "the-same-id-twice-1", "another-id-of-its-own"])
    monkeypatch.setattr(agent, "new_request_id", lambda: next(ids))
    auth = WalletAuth(wallet.key)
    assert (await asked(gateway, auth, target)).status_code == 200
    assert (await asked(gateway, auth, target + "/other")).status_code == 200
    monkeypatch.undo()
    async with httpx.AsyncClient(base_url=gateway.url, auth=auth, trust_env=False) as http:
        low = await http.get(target, headers={"Farebox-Max": "$0.000001"})
    assert code_of(low) == "price_above_ceiling"
    assert gateway.balance(wallet.address) == (1_000_000 - 2 * PRICE_UNITS, 0)


async def test_an_api_behind_the_gateway_cannot_make_a_client_go_on_for_ever(
    sqlite_gateway: Gateway, wallet: Wallet, api: Api, target: str
) -> None:
    """An upstream's own 4xx is passed on: one that imitates our refusals gets a few requests."""
    gateway = sqlite_gateway
    url = gateway.url + target
    told = {"code": "x", "next_actions": [{"do": "sign", "method": "GET", "url": url, "send": ""}]}
    body = json.dumps(told).encode()
    head = b"HTTP/1.1 409 Conflict\r\nContent-Type: application/problem+json\r\n"

    async def imitate(writer: Writer, _gate: Gate) -> bool:
        writer.write(head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        return True

    api.behave(target, imitate)
    async with gateway.client() as http:
        await buy(http, wallet)
    answer = await asked(gateway, WalletAuth(wallet.key), target)
    assert answer.status_code == 409
    assert api.calls(target) == 1 + agent.SIGN_TRIES
    assert gateway.balance(wallet.address) == (1_000_000, 0)
