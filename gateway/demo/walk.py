"""The walk of the demo: each step does one thing over the network and checks what came of it.

    1 nobody pays        402 with offers           5 a tool of an MCP server, one round trip
    2 an agent buys      EIP-3009 over x402        6 a cold wallet, stock x402, two round trips
    3 the agent spends   one round trip            7 a person pays by card
    4 the same again     stored, charge 0          8 the books are in order

A step raises ``Broken`` at the first thing that is not as it should be. Every HTTP exchange of a
step is taped as it went over the wire, so that a program can see what was sent and received.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

from gateway.demo.stage import Stage, Wallet, brief, ledger_verify
from wallet_auth.agent import WalletAuth, new_request_id, pay, sign_request
from wallet_auth.offers import read_header

CALL: Final = "/v1/forecast/oslo"
TOOLS: Final = "/mcp"
PURCHASE: Final = "/farebox/v1/credits/purchase"
CARD: Final = "4242 4242 4242 4242"

PRICE_UNITS: Final = 2_000  # $0.002, as in the gateway's file
LEAST_UNITS: Final = 10_000  # min_onchain, likewise
PACK_UNITS: Final = 1_000_000
CARD_UNITS: Final = 5_000_000
_TEXT: Final = 2_000  # characters of a body that is not JSON

# Of every message, and of no interest to who reads what was sent and received.
_DULL: Final = frozenset(
    ("host", "accept", "accept-encoding", "connection", "user-agent", "content-length", "date")
)


class Broken(Exception):  # noqa: N818  (what a step found, not a mistake of the program)
    """A step did not hold: what was looked at, what was expected and what came."""

    def __init__(self, what: str, expected: object, came: object) -> None:
        self.what, self.expected, self.came = what, expected, came
        super().__init__(f"{what}: expected {expected!r}, came {came!r}")


def expect(what: str, came: object, expected: object) -> None:
    """Raise ``Broken`` unless ``came`` is what was expected."""
    if came != expected:
        raise Broken(what, expected, came)


@dataclass(slots=True)
class Tape:
    """What was sent and received, in order. ``cut`` takes it and begins anew."""

    sent: list[dict[str, Any]] = field(default_factory=list)
    received: list[dict[str, Any]] = field(default_factory=list)

    async def request(self, request: httpx.Request) -> None:
        """For httpx: a request is about to be sent."""
        body = await request.aread()
        message: dict[str, Any] = {"method": request.method, "url": str(request.url)}
        self.sent.append(message | _content(request.headers, body))

    async def response(self, response: httpx.Response) -> None:
        """For httpx: the head of a response has come."""
        body = await response.aread()
        self.received.append({"status": response.status_code} | _content(response.headers, body))

    def cut(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Everything since the last cut."""
        cut = (self.sent, self.received)
        self.sent, self.received = [], []
        return cut


def _content(headers: httpx.Headers, body: bytes) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "headers": {n: v for n, v in headers.items() if n.lower() not in _DULL}
    }
    if body:
        text = body.decode("utf-8", "replace")
        try:
            shown["body"] = json.loads(text)
        except ValueError:
            shown["body"] = text[:_TEXT]
    return shown


@dataclass(slots=True)
class Walk:
    """What the steps work with, and what one leaves for the next."""

    stage: Stage
    http: httpx.AsyncClient
    tape: Tape
    agent: Wallet
    stranger: Wallet
    human: Wallet
    once: bool
    signed: dict[str, str] = field(default_factory=dict)  # the headers of step 3
    answer: bytes = b""  # and what came

    @property
    def buy_url(self) -> str:
        """The page where the person buys $5 of credits."""
        return f"{self.stage.url}/farebox/buy?wallet={self.human.shown}&usd=5"

    @property
    def url(self) -> str:
        """The priced resource."""
        return self.stage.url + CALL

    def upstream_calls(self, path: str = CALL) -> int:
        """How often the sample API was really called."""
        return self.stage.api.calls.count(f"GET {path}")

    async def get_signed(self, wallet: Wallet, url: str) -> httpx.Response:
        """One GET with an ERC-8128 signature."""
        return await self.http.get(url, headers=self.sign(wallet, url))

    def sign(self, wallet: Wallet, url: str, body: bytes | None = None) -> dict[str, str]:
        """The headers that sign a GET of ``url``, or a POST of ``body``."""
        return sign_request(
            wallet.private_key,
            "GET" if body is None else "POST",
            url,
            [] if body is None else [("content-length", str(len(body)))],
            body,
            now_s=int(time.time()),
            nonce=new_request_id(),
            chain_id=self.stage.chain.chain_id,
        )

    async def credits_of(self, wallet: Wallet) -> str:
        """The credits a wallet can spend, asked for with its signature."""
        answer = await self.get_signed(wallet, f"{self.stage.url}/farebox/v1/credits/balance")
        return str(answered(answer, 200)["available"])


@dataclass(frozen=True, slots=True)
class Held:
    """A step that held: the line for people, and the facts of it for programs."""

    line: str
    facts: dict[str, Any] = field(default_factory=dict)


def answered(response: httpx.Response, status: int) -> dict[str, Any]:
    """The JSON object of a response that must have this status. Raises ``Broken``."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if response.status_code != status:
        told = f"{response.status_code} {response.text[:200]}"
        if isinstance(body, dict) and "code" in body:
            told = f"{response.status_code} {body['code']}: {body.get('detail', '')}"
        where = f"{response.request.method} {response.request.url.path}"
        raise Broken(f"the answer to {where}", status, told.strip())
    if not isinstance(body, dict):
        raise Broken("the body", "a JSON object", response.text[:200])
    return body


def _charged(response: httpx.Response, charged: str, balance: str, paid_from: str) -> None:
    """The receipt headers of a paid answer."""
    expect("Farebox-Charged", response.headers.get("farebox-charged"), charged)
    expect("Farebox-Balance", response.headers.get("farebox-balance"), balance)
    expect("Farebox-Paid-From", response.headers.get("farebox-paid-from"), paid_from)


def _settled(walk: Walk, response: httpx.Response, payer: Wallet) -> tuple[str, int]:
    """The transaction PAYMENT-RESPONSE names, found on the chain itself: its hash, its block."""
    receipt = read_header(response.headers.get("payment-response", ""))
    expect("success in PAYMENT-RESPONSE", receipt.get("success"), True)
    expect("payer in PAYMENT-RESPONSE", str(receipt.get("payer")).lower(), payer.address)
    tx_hash = str(receipt.get("transaction"))
    found = walk.stage.chain.receipt(tx_hash)
    expect("status of the transaction", found["status"], "0x1")
    return tx_hash, int(found["blockNumber"], 16)


# --- the steps ------------------------------------------------------------------------------


async def unpaid(walk: Walk) -> Held:
    """Without payment: 402, offers for x402 clients, and the upstream is not asked."""
    response = await walk.http.get(walk.url)
    body = answered(response, 402)
    expect("code", body.get("code"), "payment_required")
    offers = read_header(response.headers.get("payment-required", ""))["accepts"]
    first = offers[0]
    expect("network of the first offer", first["network"], walk.stage.chain.caip2)
    expect("asset of the first offer", first["asset"].lower(), walk.stage.chain.usdc)
    expect("payee of the first offer", first["payTo"].lower(), walk.stage.pay_to)
    amounts = [int(offer["amount"]) for offer in offers]
    expect("amounts offered", amounts, [LEAST_UNITS, PACK_UNITS, 5_000_000, 20_000_000])
    expect("price", body["credits"]["price_units"], PRICE_UNITS)
    expect("calls that reached the upstream", walk.upstream_calls(), 0)
    return Held(
        "402  price $0.002; offers: $0.01 (the rest stays as credits) · packs $1, $5, $20",
        {"offers_units": amounts, "price_units": PRICE_UNITS},
    )


async def buy(walk: Walk) -> Held:
    """The agent buys a pack: 402, one signed authorization, credits; the money has moved."""
    chain, began = walk.stage.chain, len(walk.tape.sent)
    before = [chain.balance_units(a) for a in (walk.agent.address, walk.stage.pay_to)]
    auth = WalletAuth(walk.agent.private_key, networks=[chain.caip2])
    response = await walk.http.post(walk.stage.url + PURCHASE, json={"amount_usd": "1"}, auth=auth)
    body = answered(response, 200)
    expect("round trips", len(walk.tape.sent) - began, 2)
    tx_hash, block = _settled(walk, response, walk.agent)
    expect("minted units", body.get("minted_units"), PACK_UNITS)
    expect("credits", body.get("balance"), "100")
    after = [chain.balance_units(a) for a in (walk.agent.address, walk.stage.pay_to)]
    moved = [after[0] - before[0], after[1] - before[1]]
    expect("USDC units moved (payer, payee)", moved, [-PACK_UNITS, PACK_UNITS])
    return Held(
        f"200  EIP-3009 over x402, tx {brief(tx_hash)} in block {block}, +100 credits",
        {"transaction": tx_hash, "block": block, "usdc_moved_units": PACK_UNITS, "round_trips": 2},
    )


async def spend(walk: Walk) -> Held:
    """One signed request: no payment, no chain, no session."""
    began, calls = len(walk.tape.sent), walk.upstream_calls()
    walk.signed = walk.sign(walk.agent, walk.url)
    response = await walk.http.get(walk.url, headers=walk.signed)
    answered(response, 200)
    expect("round trips", len(walk.tape.sent) - began, 1)
    _charged(response, "0.2", "99.8", "credits")
    expect("calls that reached the upstream", walk.upstream_calls() - calls, 1)
    walk.answer = response.content
    return Held(
        "200  −0.2 credits, 99.8 left, one round trip",
        {"charged": "0.2", "balance": "99.8", "round_trips": 1},
    )


async def repeat(walk: Walk) -> Held:
    """The very same request: the stored answer. With one byte changed: refused."""
    calls = walk.upstream_calls()
    again = await walk.http.get(walk.url, headers=walk.signed)
    answered(again, 200)
    expect("Farebox-Replayed", again.headers.get("farebox-replayed"), "true")
    _charged(again, "0", "99.8", "credits")
    expect("the stored answer", again.content, walk.answer)
    expect("calls that reached the upstream", walk.upstream_calls() - calls, 0)
    changed = await walk.http.get(walk.url[:-1] + "a", headers=walk.signed)
    refused = answered(changed, 401)
    expect("calls for the changed request", walk.upstream_calls(CALL[:-1] + "a"), 0)
    return Held(
        "200  stored answer, charge 0, upstream not asked; one byte changed → 401",
        {"charged": "0", "upstream_calls": 0, "changed": refused["code"]},
    )


async def tool(walk: Walk) -> Held:
    """A tool of an MCP server, sold by its name: one signed message."""
    url, calls = walk.stage.url + TOOLS, walk.stage.mcp.calls.count("TOOL search")
    message = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "tools/call",
        "params": {"name": "search", "arguments": {"q": "oslo"}},
    }
    body = json.dumps(message).encode()
    accept = {"content-type": "application/json", "accept": "application/json, text/event-stream"}
    headers = accept | walk.sign(walk.agent, url, body)
    response = await walk.http.post(url, content=body, headers=headers)
    result = answered(response, 200)["result"]
    expect("isError", result["isError"], False)
    expect("text", result["content"][0]["text"], "oslo: found in the sample")
    _charged(response, "0.5", "99.3", "credits")
    expect("calls of the tool", walk.stage.mcp.calls.count("TOOL search") - calls, 1)
    return Held("ok   −0.5 credits, 99.3 left", {"charged": "0.5", "balance": "99.3"})


async def cold(walk: Walk) -> Held:
    """A wallet nobody knows pays for one call: stock x402, nothing else, two round trips."""
    chain, began = walk.stage.chain, len(walk.tape.sent)
    before = chain.balance_units(walk.stranger.address)
    unpaid_ = await walk.http.get(walk.url)
    answered(unpaid_, 402)
    required = unpaid_.headers.get("payment-required", "")
    payment = pay(walk.stranger.private_key, required, networks=[chain.caip2])
    paid = await walk.http.get(walk.url, headers={"PAYMENT-SIGNATURE": payment.header})
    answered(paid, 200)
    expect("round trips", len(walk.tape.sent) - began, 2)
    tx_hash, block = _settled(walk, paid, walk.stranger)
    _charged(paid, "0.2", "0.8", "settlement")
    moved = before - chain.balance_units(walk.stranger.address)
    expect("USDC units paid on chain", moved, LEAST_UNITS)
    expect("credits that stay", await walk.credits_of(walk.stranger), "0.8")
    return Held(
        f"200  two round trips, tx {brief(tx_hash)} of $0.01, 0.8 credits stay",
        {"transaction": tx_hash, "block": block, "balance": "0.8", "round_trips": 2},
    )


async def card(walk: Walk) -> Held:
    """A person buys credits by card. ``once``: the demo goes the way of the browser itself."""
    page = await walk.http.get(walk.buy_url)
    expect("status of the buy page", page.status_code, 200)
    expect("the wallet on the buy page", walk.human.shown in page.text, True)
    facts: dict[str, Any] = {"buy_url": walk.buy_url}
    if not walk.once:
        return Held("the buy page is ready, its link is below", facts)
    wanted = {"amount_usd": "5", "wallet_address": walk.human.shown}
    opened = await walk.http.post(f"{walk.stage.url}/farebox/v1/card/checkout", json=wanted)
    body = answered(opened, 200)
    checkout, status = str(body["checkout_url"]), str(body["status_url"])
    shown = await walk.http.get(checkout)
    expect("status of the checkout page", shown.status_code, 200)
    form = {"email": "human@example.com", "method": "card", "card_number": CARD}
    sent = await walk.http.post(checkout, data=form | {"expiry": "12 / 40", "cvc": "123"})
    expect("status of the card payment", sent.status_code, 303)
    # Before the return page, which would ask the local Stripe itself: the message was enough.
    await _webhook_taken(walk)
    state = answered(await walk.http.get(status), 200)
    expect("state of the payment", state.get("state"), "succeeded")
    expect("minted units", state.get("minted_units"), CARD_UNITS)
    expect("credits of the wallet", await walk.credits_of(walk.human), "500")
    back = await walk.http.get(sent.headers.get("location", ""))
    expect("status of the page one comes back to", back.status_code, 200)
    return Held(
        "paid with 4242…, signed webhook taken, +500 credits",
        {**facts, "payment_id": body["payment_id"], "minted_units": CARD_UNITS},
    )


async def _webhook_taken(walk: Walk) -> None:
    told = await walk.http.get(f"{walk.stage.stripe.url}/_fake/deliveries?wait_s=10")
    body = answered(told, 200)
    expect("all webhooks delivered", body.get("idle"), True)
    done = {d["event_type"]: d["state"] for d in body["deliveries"]}
    expect("webhook of the payment", done.get("checkout.session.completed"), "succeeded")


async def books(walk: Walk) -> Held:
    """``farebox ledger verify``: every invariant, over all that was done."""
    walk.tape.sent.append({"command": "farebox ledger verify --json"})
    status, said = await ledger_verify(walk.stage.folder)
    walk.tape.received.append({"exit": status, "body": said})
    expect("broken invariants", said, {"ok": True, "broken": {}})
    expect("exit code", status, 0)
    return Held("the books are in order: every invariant holds")


@dataclass(frozen=True, slots=True)
class Step:
    """One step: its number and name, how it is announced, what it does."""

    number: int
    name: str
    title: Callable[[Walk], str]
    run: Callable[[Walk], Awaitable[Held]]


STEPS: Final = (
    Step(1, "unpaid", lambda _: f"GET {CALL}", unpaid),
    Step(2, "buy", lambda w: f"agent {brief(w.agent.shown)} buys the $1 pack", buy),
    Step(3, "spend", lambda _: "GET again, ERC-8128 signature", spend),
    Step(4, "repeat", lambda _: "the same request again", repeat),
    Step(5, "tool", lambda _: "MCP tools/call search", tool),
    Step(6, "cold", lambda w: f"cold wallet {brief(w.stranger.shown)}, one call", cold),
    Step(7, "card", lambda _: "human buys $5 by test card", card),
    Step(8, "books", lambda _: "farebox ledger verify", books),
)
