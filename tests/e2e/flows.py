"""The flows of money that the crash sweep (sweep.py) kills the gateway in, one function each.

A flow prepares what may be prepared, undisturbed, and returns its ``step``: what its customer does
over and over until the flow has ended. The sweep kills the gateway somewhere in between, starts it
again and goes on with the same step. To add a flow, write the function and name it in ``FLOWS``.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field

import httpx
from eth_account import Account as Signer
from eth_account.messages import encode_defunct

from tests.e2e.stage import PRICE_UNITS, Api, Gateway, transfers_to
from tests.e2e.taps import Point
from tests.e2e.wallet import Wallet, code_of, encode, new_wallet, offers
from tests.fixtures_permit2 import approve
from tests.fixtures_permit2 import signed as permitted

PURCHASE = "/farebox/v1/credits/purchase"
REFUND = "/farebox/v1/credits/refund"
BODY = json.dumps({"amount_usd": "1"}).encode()
SAFE_BLOCKS = 9  # on a chain with four slots in an epoch all before them are final


class Wronged(Exception):  # noqa: N818
    """A customer was told something that must not be said, such as to pay again."""


@dataclass(frozen=True, slots=True)
class Site:
    """A gateway, its upstream, and what its customers see of it."""

    gateway: Gateway
    api: Api

    def wallet(self, units: int = 10_000_000) -> Wallet:
        return new_wallet(self.gateway.net, units)

    async def send(
        self, method: str, path: str, headers: dict[str, str], body: bytes | None
    ) -> httpx.Response:
        async with self.gateway.client() as http:
            return await http.request(method, path, headers=headers, content=body)

    async def post(self, path: str, asked: object) -> httpx.Response:
        return await self.send("POST", path, {}, json.dumps(asked).encode())

    def move(self, wallet: Wallet, units: int) -> str:
        """The wallet sends USDC by itself; the transaction's hash."""
        net = self.gateway.net
        net.rpc("anvil_setBalance", wallet.address, hex(10**18))
        net.rpc("anvil_impersonateAccount", wallet.address)
        tx_hash = net.transfer(wallet.address, self.gateway.pay_to, units)
        net.receipt(tx_hash)
        return tx_hash

    def moved(self, wallet: Wallet) -> list[int]:
        """What a wallet has moved to the gateway on chain, oldest first."""
        return [
            int(each["data"], 16)
            for each in transfers_to(self.gateway.net, self.gateway.pay_to)
            if each["topics"][1].endswith(wallet.address[2:])
        ]


@dataclass(slots=True)
class Attempt:
    """One run of a flow.

    ``step`` does what the customer does next and says what is still missing, "" at the end; it may
    be cut off anywhere and called again. ``payer`` moves the money, ``owner`` gets the credits.
    ``wrong`` looks at the end and says what is not as it must be, beside the mints.
    """

    step: Callable[[], Awaitable[str]]
    payer: Wallet
    owner: Wallet
    wrong: Callable[[], str] = lambda: ""


Flow = Callable[[Site], Awaitable[Attempt]]


def missing(answer: httpx.Response) -> str:
    """What an answer leaves open; "" if it is the end."""
    if answer.status_code in {200, 201}:
        return ""
    if answer.status_code == 402 and "payment-required" in answer.headers:
        raise Wronged(f"told to pay again: {answer.text[:300]}")
    return f"{answer.status_code} {answer.text[:200]}"


async def purchase(at: Site) -> Attempt:
    """A pack, over x402 (EIP-3009)."""
    payer = at.wallet()
    offer = offers(await at.send("POST", PURCHASE, {}, BODY))[0]
    header = {"PAYMENT-SIGNATURE": payer.pay(offer)}

    async def step() -> str:
        return missing(await at.send("POST", PURCHASE, header, BODY))

    return Attempt(step, payer, payer)


async def permit2_purchase(at: Site) -> Attempt:
    """A pack, over x402 by Permit2."""
    payer = at.wallet()
    await asyncio.to_thread(approve, at.gateway.net, payer.account)
    offer = offers(await at.send("POST", PURCHASE, {}, BODY))[-1]
    assert offer["extra"]["assetTransferMethod"] == "permit2"
    payload = permitted(
        payer.account,
        amount=int(offer["amount"]),
        to=offer["payTo"],
        deadline=int(time.time()) + offer["maxTimeoutSeconds"],
    )
    body = encode({"x402Version": 2, "payload": payload, "accepted": offer})

    async def step() -> str:
        return missing(await at.send("POST", PURCHASE, {"PAYMENT-SIGNATURE": body}, BODY))

    return Attempt(step, payer, payer)


async def paid_call(at: Site) -> Attempt:
    """A call and the payment for it in one request (EIP-3009)."""
    payer, path = at.wallet(), f"/v1/{secrets.token_hex(8)}"
    offer = offers(await at.send("GET", path, {}, None))[0]
    header = {"PAYMENT-SIGNATURE": payer.pay(offer)}
    return _calling(at, payer, path, header)


async def call(at: Site) -> Attempt:
    """A signed call that is paid from credits: no money moves, but some is held and taken."""
    payer, path = at.wallet(), f"/v1/{secrets.token_hex(8)}"
    offer = offers(await at.send("POST", PURCHASE, {}, BODY))[0]
    bought = await at.send("POST", PURCHASE, {"PAYMENT-SIGNATURE": payer.pay(offer)}, BODY)
    assert bought.status_code == 200, bought.text
    return _calling(at, payer, path, payer.sign("GET", at.gateway.url + path))


def _calling(at: Site, payer: Wallet, path: str, header: dict[str, str]) -> Attempt:
    """A priced call, over and over: it runs at most once, and is charged if it ended well."""
    ends: list[str] = []

    async def step() -> str:
        answer = await at.send("GET", path, header, None)
        # A call whose gateway died is not run again: what was paid for it is there as credits.
        end = "interrupted" if code_of(answer) == "outcome_unknown" else ""
        left = "" if end else missing(answer)
        if not left:
            ends.append(end or "answered")
        return left

    def wrong() -> str:
        calls, end = at.api.calls(path), ends[-1]
        closed = [each for each in at.gateway.transfers(payer.address) if each[0] != "mint"]
        if end == "answered":
            right = closed == [("capture", PRICE_UNITS, None)] and calls == 1
        else:
            right = closed == [("void", 0, "interrupted")] and calls <= 1
        held = at.gateway.balance(payer.address)[1]
        return "" if right and not held else f"{end}: {calls} calls, {closed}, {held} held"

    return Attempt(step, payer, payer, wrong)


async def by_hash(at: Site) -> Attempt:
    """USDC that was sent without asking, claimed by the transaction's hash: at once."""
    return await _claimed(at, 1_000_000)


async def by_hash_when_safe(at: Site) -> Attempt:
    """The same with an amount that waits until its block is safe."""
    return await _claimed(at, 9_000_000, waits=True)


async def _claimed(at: Site, units: int, *, waits: bool = False) -> Attempt:
    payer = at.wallet()
    tx_hash = await asyncio.to_thread(at.move, payer, units)

    async def step() -> str:
        answer = await at.post(PURCHASE, {"transaction_hash": tx_hash})
        left = missing(answer)
        if left and waits and answer.status_code == 202:
            await asyncio.to_thread(at.gateway.net.mine, SAFE_BLOCKS)
        return left

    return Attempt(step, payer, payer)


async def known_deposit(at: Site) -> Attempt:
    """USDC from a wallet that is known here: the watcher sees it and credits it."""
    payer = at.wallet()
    first = await asyncio.to_thread(at.move, payer, 20_000)
    known = await at.post(PURCHASE, {"transaction_hash": first})
    assert known.status_code == 200, known.text
    sent = Once(lambda: at.move(payer, 30_000))

    async def step() -> str:
        await sent.do()
        await asyncio.to_thread(at.gateway.net.mine)
        units = await asyncio.to_thread(at.gateway.balance, payer.address)
        return "" if units == (50_000, 0) else f"a balance of {units}"

    return Attempt(step, payer, payer)


async def suspense_claim(at: Site) -> Attempt:
    """USDC from a stranger is kept in suspense; the stranger signs whose it is to be."""
    payer, owner = at.wallet(), at.wallet(0)
    sent = Once(lambda: at.move(payer, 1_000_000))
    seen: list[bool] = []

    async def step() -> str:
        tx_hash = await sent.do()
        if not seen:
            await asyncio.to_thread(at.gateway.net.mine)
            rows = await asyncio.to_thread(
                at.gateway.rows, "SELECT state, depth FROM inbound WHERE tx_hash = $1", tx_hash
            )
            if not rows or rows[0]["depth"] == "included":
                return f"in suspense: {rows}"
            seen.append(True)
        asked = {"transaction_hash": tx_hash, "wallet_address": owner.address}
        answer = await at.post(PURCHASE, asked)
        if code_of(answer) == "payer_signature_required":
            text = encode_defunct(text=answer.json()["message"])
            signed = Signer.sign_message(text, payer.key).signature.hex().removeprefix("0x")
            answer = await at.post(PURCHASE, {**asked, "payer_signature": "0x" + signed})
        return missing(answer)

    return Attempt(step, payer, owner)


async def refund(at: Site) -> Attempt:
    """Unused credits go back on chain to the wallet that paid for them."""
    payer = at.wallet()
    offer = offers(await at.send("POST", PURCHASE, {}, BODY))[0]
    bought = await at.send("POST", PURCHASE, {"PAYMENT-SIGNATURE": payer.pay(offer)}, BODY)
    assert bought.status_code == 200, bought.text
    await asyncio.to_thread(at.gateway.net.mine, SAFE_BLOCKS)
    final = "SELECT depth FROM inbound WHERE from_address = $1"
    await asyncio.to_thread(
        at.gateway.wait,
        lambda: at.gateway.rows(final, payer.address) == [{"depth": "final"}],
        "the payment to be final",
    )
    body = json.dumps({"all": True}).encode()
    signed = payer.sign("POST", at.gateway.url + REFUND, body)
    asked: list[str] = []

    async def step() -> str:
        if not asked:
            answer = await at.send("POST", REFUND, signed, body)
            if answer.status_code not in {200, 202}:
                return missing(answer)
            asked.append(answer.json()["refunds"][0]["payment_id"])
        await asyncio.to_thread(at.gateway.net.mine)
        found = "SELECT state FROM payment WHERE id = $1"
        rows = await asyncio.to_thread(at.gateway.rows, found, asked[0])
        return "" if rows == [{"state": "succeeded"}] else f"the refund is {rows}"

    def wrong() -> str:
        has = at.gateway.net.balance_units(payer.address)
        kinds = [each[0] for each in at.gateway.transfers(payer.address)]
        right = has == 10_000_000 and kinds == ["mint", "withhold", "release", "payout"]
        return "" if right else f"the wallet has {has}, its entries are {kinds}"

    return Attempt(step, payer, payer, wrong)


@dataclass(slots=True)
class Once:
    """What a customer does once, however often the rest is tried."""

    act: Callable[[], str]
    done: list[str] = field(default_factory=list)

    async def do(self) -> str:
        if not self.done:
            self.done.append(await asyncio.to_thread(self.act))
        return self.done[0]


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the table: the flow, and how many messages it sends to each dependency, about.

    That is of use to the short form alone, which takes ``short`` points of it, evenly: the long
    form counts. ``refunds``: it needs a wallet that pays out. ``permit2``: it pays by Permit2.
    """

    flow: Flow
    messages: dict[str, int]
    short: int = 1
    refunds: bool = False
    permit2: bool = False


FLOWS: dict[str, Entry] = {
    "purchase": Entry(purchase, {"chain": 8, "postgres": 80}, short=2),
    "purchase by Permit2": Entry(permit2_purchase, {"chain": 8, "postgres": 80}, permit2=True),
    "paid call": Entry(paid_call, {"chain": 8, "upstream": 1, "postgres": 90}, short=2),
    "call from credits": Entry(call, {"upstream": 1, "postgres": 8}),
    "transaction hash": Entry(by_hash, {"chain": 2, "postgres": 20}),
    "transaction hash, when safe": Entry(by_hash_when_safe, {"chain": 15, "postgres": 100}),
    "deposit of a known wallet": Entry(known_deposit, {"chain": 10, "postgres": 100}),
    "deposit in suspense, claimed": Entry(suspense_claim, {"chain": 12, "postgres": 100}),
    "refund on chain": Entry(refund, {"chain": 25, "postgres": 200}, refunds=True),
}


def short_form(entry: Entry, sides: tuple[str, ...], lines: Collection[str]) -> list[Point]:
    """``entry.short`` points, as far from each other as can be, beginning in the middle of the
    first stretch."""
    points = [
        Point(line, at, side)
        for line, most in entry.messages.items()
        if line in lines
        for at in range(1, most + 1)
        for side in sides
    ]
    every = max(len(points) // entry.short, 1)
    return points[every // 2 :: every][: entry.short]
