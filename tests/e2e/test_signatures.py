"""A signature is good for what it was made for, and for nothing else.

Every kind of signature the gateway knows is shown at every endpoint it has (``signatures.py``),
and each stands once in the place of each other. What is not made for an endpoint is refused there
or has no effect: nothing is charged, minted, burnt or opened, no upstream is asked, and nothing is
told that nobody could have asked for.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from anvil.devnet import Devnet
from gateway.demo import mcp_server
from gateway.demo.upstreams import SampleApi
from tests.e2e.signatures import (
    ELSEWHERE,
    PURCHASE,
    Endpoint,
    Kind,
    Victim,
    endpoints,
    in_erc8128,
    in_header,
    of_erc8128,
)
from tests.e2e.stage import Api, Gateway, new_account
from tests.e2e.test_by_hash import move
from tests.e2e.test_credits_first import challenge, sign_in
from tests.e2e.test_external import API, FORECAST, ROUTES, Agent, strong_body
from tests.e2e.wallet import Wallet, decode, new_wallet, offers, problem
from wallet_auth.recipient import sponsor_lines

Launch = Callable[..., Gateway]
BOTH = {"Accept": "application/json, text/event-stream", "Content-Type": "application/json"}
SERVER = {"uncharged_per_min": 100_000, "settle_wait_s": 5}
TABLES = [
    "account",
    "wallet",
    "transfer",
    "lot",
    "hold",
    "payment",
    "authorization_use",
    "credential",
    "payout_request",
    "answer",
    "refund",
    "spent_proof",
    "request_alias",
    "provider_event",
]


@pytest.fixture
def tools() -> Iterator[SampleApi]:
    with SampleApi(make=mcp_server.build) as server:
        yield server


@pytest.fixture
def shop(launch: Launch, chain_session: Devnet, tools: SampleApi) -> Gateway:
    """A gateway with everything switched on that takes a signature, and no limits in the way."""
    shop = launch("sqlite", running=False, routes=ROUTES, server=SERVER)
    (shop.folder / "admin.token").write_text(secrets.token_hex(32))
    till = new_account()
    chain_session.transfer(chain_session.accounts[0].address, till.address, 100_000_000)
    (shop.folder / "refund.key").write_text(till.private_key)
    shop.chain_extra = f"""
refund_key_file = "refund.key"
refund_min = "$0.01"

[facilitator]
api_key = "{secrets.token_hex(32)}"

[external]
sessions_per_min = 100000

[upstreams.tools]
kind = "mcp"
url = "{tools.url}/mcp"
mount = "/mcp"
tools = {{ search = "$0.005", "*" = "$0.01" }}
"""
    return shop.start()


@pytest.fixture
async def victim(shop: Gateway, chain_session: Devnet) -> AsyncIterator[Victim]:
    """Twenty dollars, of which five and a bit are credits."""
    async with shop.client() as http:
        agent = Agent(http, new_wallet(chain_session, 20_000_000), chain_session)
        await agent.begin()
        await agent.buy()
        yield Victim(shop, http, agent)


async def known_of(victim: Victim) -> dict[str, str]:
    """A call that the wallet made, its run, and its payment: what stands in paths."""
    run = f"run-{secrets.token_hex(8)}"
    nonce = secrets.token_urlsafe(16)
    url = victim.gateway.url + "/look"
    headers = victim.wallet.sign("GET", url, headers={"Farebox-Run": run}, nonce=nonce)
    done = await victim.http.get("/look", headers=headers)
    assert done.status_code == 200, done.text
    (payment,) = victim.gateway.payments(victim.wallet.address)
    return {
        "request_id": nonce,
        "run": run,
        "payment_id": payment["id"],
        "name": "farebox.css",
    }


def effects(gateway: Gateway, wallet: Wallet) -> dict[str, Any]:
    """All that could have become of a signature."""
    counts = ", ".join(f"(SELECT count(*) FROM {name}) AS {name}" for name in TABLES)
    (row,) = gateway.rows(f"SELECT {counts}, (SELECT sum(external_all) FROM wallet) AS allowed")
    return {
        **row,
        "balance": gateway.balance(wallet.address),
        "received": gateway.received(),
        "sent": gateway.sent(),
    }


def without_effect(endpoint: Endpoint, answer: httpx.Response) -> bool:
    """Whether an answer of what costs something is a refusal, in MCP's words too."""
    if answer.status_code >= 400:
        return True
    if endpoint.path != "/mcp":
        return False
    if not answer.content:
        return True  # a message that calls no tool; the server is asked afterwards whether it was
    told = json.loads(answer.text.partition("data: ")[2] or answer.text)
    return "error" in told or told["result"].get("isError") is True


async def _claims(shop: Gateway, http: httpx.AsyncClient, thief: Wallet) -> tuple[str, str, str]:
    """Two transfers of a wallet without an account: of the first it said who gets it."""
    giver = new_wallet(shop.net)
    first, silent = (move(shop.net, giver, 5_000_000, shop.pay_to) for _ in range(2))
    wanted = {"transaction_hash": first, "wallet_address": thief.address}
    told = problem(await http.post(PURCHASE, json=wanted), "payer_signature_required")
    lines = sponsor_lines(giver.address, thief.address, 500, "tx", first)
    sign = Victim.personal_sign
    agent = Victim(shop, http, Agent(http, giver, shop.net))
    return silent, sign(agent, told["message"]), sign(agent, lines)


async def test_what_is_signed_for_one_endpoint_is_worth_nothing_at_another(
    shop: Gateway, victim: Victim, api: Api, tools: SampleApi
) -> None:
    http, thief = victim.http, Wallet(new_account())
    known = await known_of(victim)
    to_thief = {"amount_usd": "1", "wallet_address": thief.address}
    bodies = {
        PURCHASE: {"amount_usd": "1"},
        f"{API}/credits/purchase": {"credits": 500, "wallet_address": thief.address},
        "/farebox/v1/credits/refund": {"all": True},
        "/farebox/v1/auth/external": {"spends": "all"},
        f"{API}/auth/session": {"wallet_address": thief.address},
        "/farebox/v1/auth/session": {"wallet_address": thief.address},
        "/farebox/v1/quotes": {"method": "POST", "url": "/other"},
        "/farebox/v1/card/checkout": to_thief,
    }
    places = endpoints(shop, known, bodies)
    names = {place.name for place in places}
    for expected in (
        "GET /metrics",
        "POST /farebox/x402/settle",
        "POST /farebox/v1/credits/refund",
        f"POST {API}{FORECAST}",
        f"POST {API}/tools/api.forecast/invoke",
        "GET /look",
        "POST /mcp",
    ):
        assert expected in names
    assert len(places) > 50
    claims = await _claims(shop, http, thief)

    async def kinds() -> AsyncIterator[Kind]:
        """Each group is made when its turn comes, so that none is refused for its age alone."""
        for kind in victim.signed_requests([place for place in places if _signs(place)]):
            yield kind
        for kind in (*await victim.signed_challenges(), *victim.bodies()):
            yield kind
        for kind in (*await victim.payments(), *victim.gifts(thief, claims)):
            yield kind

    nobodys: dict[str, httpx.Response] = {}
    for place in places:
        nobodys[place.name] = await show(http, place, {}, None)
        assert not place.sells or without_effect(place, nobodys[place.name]), place.name
    secret = [known["request_id"], known["run"], str(shop.balance(victim.wallet.address)[0])]
    before, asked = effects(shop, victim.wallet), api.begun()
    tried = 0
    async for kind in kinds():
        tried += 1
        for place in places:
            if not kind.good(place):
                await _refused_at(victim, kind, place, nobodys[place.name], secret)
                if not place.sells and not place.path.startswith(("/farebox", "/api/")):
                    asked = api.begun()  # a free route is asked by whoever wants
            assert api.begun() == asked, (kind.name, place.name)
        assert effects(shop, victim.wallet) == before, kind.name
    assert tools.calls.count("TOOL search") == 0
    # And each is good where it was made for, or the whole table would say nothing.
    assert tried > 30
    for kind in victim.bodies():
        for place in places:
            if kind.good(place):
                headers, body = await kind.make(place)
                done = await show(http, place, headers, body)
                assert done.status_code == 200, (kind.name, place.name, done.text)


def _signs(place: Endpoint) -> bool:
    """Our own paths; of what is sold there one action."""
    ours = place.path.startswith("/farebox/v1/") and place.method != "HEAD"
    return ours and ("/tools/" not in place.path or FORECAST in place.path)


async def _refused_at(
    victim: Victim, kind: Kind, place: Endpoint, nobodys: httpx.Response, secret: list[str]
) -> None:
    headers, body = await kind.make(place)
    if body is not None and place.method in ("GET", "HEAD") and not headers:
        return  # it has no place in such a request
    answer = await show(victim.http, place, headers, body)
    where = (kind.name, place.name, answer.status_code, answer.text[:300])
    assert answer.status_code < 500 or answer.status_code == nobodys.status_code, where
    if place.sells:
        assert without_effect(place, answer), where
    else:
        assert answer.status_code >= 400 or nobodys.status_code < 400, where
    known = nobodys.text + place.path + json.dumps([headers, body])
    assert [each for each in secret if each in answer.text and each not in known] == [], where
    for name in ("farebox-credential", "farebox-balance", "farebox-charged"):
        assert name not in answer.headers, where


async def show(
    http: httpx.AsyncClient, place: Endpoint, headers: dict[str, str], body: Any
) -> httpx.Response:
    content = place.body if body is None else json.dumps(body).encode()
    if place.method in ("GET", "HEAD"):
        content = b""
    fields = {**BOTH, **headers} if content else {"Accept": BOTH["Accept"], **headers}
    return await http.request(place.method, place.path, headers=fields, content=content)


async def settled(
    shop: Gateway, send: Callable[[str], Awaitable[httpx.Response]], text: str
) -> httpx.Response:
    """The answer, once a payment in it is as deep in the chain as its amount asks for."""
    done = await send(text)
    for _ in range(20):
        if done.status_code != 202:
            break
        shop.net.mine(9)
        done = await send(text)
    return done


# -- one in the place of another ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Slot:
    """A request that is whole but for one signature, and the one that belongs there."""

    name: str
    send: Callable[[str], Awaitable[httpx.Response]]
    true: str


def _in_body(name: str, http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Slot:
    async def send(signature: str) -> httpx.Response:
        return await http.post(path, json={**body, "signature": signature})

    return Slot(name, send, str(body["signature"]))


async def _slots(victim: Victim, thief: Wallet) -> list[Slot]:
    http, agent, wallet, url = victim.http, victim.agent, victim.wallet, victim.gateway.url
    signed = wallet.sign("GET", url + "/look?slot=1")
    asked = sign_in(wallet, challenge(await http.get("/look?slot=2")))
    dollar = {"amount_usd": "1"}
    told = await http.post(PURCHASE, json=dollar)
    paid = {"PAYMENT-SIGNATURE": wallet.pay(offers(told)[0])}
    given = {"PAYMENT-SIGNATURE": wallet.pay(offers(told)[0])}
    second = decode(wallet.pay(offers(told)[0]))["payload"]
    second["purchase_id"] = told.json()["purchase_id"]
    gift = {**dollar, "wallet_address": thief.address}
    refused = await http.post(PURCHASE, json=gift, headers=given)
    gift["payer_signature"] = victim.personal_sign(problem(refused, "payer_mismatch")["message"])
    lines = ("action:invoke", "product:api.forecast", f"payload:{_DIGEST_OF_NOTHING}")
    older = agent.wrapper("t-old", *lines, parameters={})
    strong = strong_body(agent, victim.gateway, API + FORECAST, "t-strong", parameters={})

    async def erc8128(signature: str) -> httpx.Response:
        return await http.get("/look?slot=1", headers=in_erc8128(signed, signature))

    async def siwx(signature: str) -> httpx.Response:
        headers = in_header("SIGN-IN-WITH-X", asked, signature)
        return await http.get("/look?slot=2", headers=headers)

    async def payment(signature: str) -> httpx.Response:
        headers = in_header("PAYMENT-SIGNATURE", paid, signature, "payload")
        return await http.post(PURCHASE, json=dollar, headers=headers)

    async def gives(signature: str) -> httpx.Response:
        wanted = {**gift, "payer_signature": signature}
        return await http.post(PURCHASE, json=wanted, headers=given)

    return [
        Slot("erc8128", erc8128, of_erc8128(signed)),
        Slot("siwx", siwx, decode(asked["SIGN-IN-WITH-X"])["signature"]),
        Slot("payment", payment, decode(paid["PAYMENT-SIGNATURE"])["payload"]["signature"]),
        Slot("recipient", gives, gift["payer_signature"]),
        _in_body("second post", http, PURCHASE, second),
        _in_body("balance", http, f"{API}/credits/balance", agent.balance_body("t-balance")),
        _in_body("invoke", http, API + FORECAST, agent.invoke_body("t-invoke", {})),
        _in_body("older invoke", http, f"{API}/tools/api.forecast/invoke", older),
        _in_body("strong", http, API + FORECAST, strong),
    ]


_DIGEST_OF_NOTHING = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


async def test_no_signature_stands_for_another(shop: Gateway, victim: Victim, api: Api) -> None:
    """The very bytes of each signature in the place of each other, all of one wallet; then the one
    that belongs there."""
    thief = Wallet(new_account())
    slots = await _slots(victim, thief)
    nonce = "0x" + "ab" * 32
    others = {
        "a sponsor's lines": victim.personal_sign(
            sponsor_lines(victim.wallet.address, thief.address, 100, "nonce", nonce)
        ),
        **{slot.name: slot.true for slot in slots},
    }
    assert len({slot.true for slot in slots}) == len(slots)
    for n in range(len(slots)):
        slot = (await _slots(victim, thief))[n]  # made anew: nothing of it has run out
        before, asked = effects(shop, victim.wallet), api.begun()
        for name, signature in others.items():
            if name == slot.name:
                continue
            answer = await slot.send(signature)
            assert 400 <= answer.status_code < 500, (slot.name, name, answer.text)
        assert effects(shop, victim.wallet) == before, slot.name
        assert api.begun() == asked
        done = await settled(shop, slot.send, slot.true)
        assert done.status_code == 200, (slot.name, done.text)


class Seals:
    """Requests that bring something the gateway itself has sealed, each with any such text."""

    def __init__(self, victim: Victim, begun: httpx.Response, told: httpx.Response) -> None:
        self.http = victim.http
        self.agent = victim.agent
        self.wallet = victim.wallet
        self.url = victim.gateway.url
        self.begun = offers(begun)[0]  # of a purchase
        self.offer = offers(told)[0]  # of a call
        self.asked = challenge(told)
        self.path = told.request.url.raw_path.decode()
        # One payment for the purchase, however often it is shown.
        self.payload = decode(self.wallet.pay(self.begun))["payload"]

    async def offer_of(self, token: str) -> httpx.Response:
        terms = {**self.offer, "extra": {**self.offer["extra"], "offer": token}}
        headers = {"PAYMENT-SIGNATURE": self.wallet.pay(terms)}
        return await self.http.get(self.path, headers=headers)

    async def purchase(self, token: str) -> httpx.Response:
        return await self.http.post(PURCHASE, json={"purchase_id": token, **self.payload})

    async def session(self, token: str) -> httpx.Response:
        held, self.agent.session = self.agent.session, token
        body = self.agent.balance_body("u-balance")
        self.agent.session = held
        return await self.http.post(f"{API}/credits/balance", json=body)

    async def challenge(self, token: str) -> httpx.Response:
        headers = sign_in(self.wallet, self.asked, nonce=token)
        return await self.http.get(self.path, headers=headers)

    async def request(self, token: str) -> httpx.Response:
        headers = sign_in(self.wallet, self.asked, requestId=token)
        return await self.http.get(self.path, headers=headers)

    async def quote(self, token: str) -> httpx.Response:
        named = {"Farebox-Quote": token}
        headers = self.wallet.sign("GET", self.url + self.path, headers=named)
        return await self.http.get(self.path, headers=headers)

    async def credential(self, token: str) -> httpx.Response:
        return await self.http.get(self.path, headers={"Authorization": f"Bearer {token}"})


Sealed = tuple[Callable[[str], Awaitable[httpx.Response]], str]


async def _credential(victim: Victim) -> str:
    """What a payment is given that settles while its request waits."""
    dollar = {"amount_usd": "1"}
    for _ in range(5):
        payer = new_wallet(victim.gateway.net)
        offer = offers(await victim.http.post(PURCHASE, json=dollar))[0]
        paid = {"PAYMENT-SIGNATURE": payer.pay(offer)}
        bought = await victim.http.post(PURCHASE, json=dollar, headers=paid)
        if "farebox-credential" in bought.headers:
            return bought.headers["farebox-credential"]
    raise AssertionError(f"no payment settled in its time: {bought.text}")


async def _sealed(victim: Victim, path: str) -> dict[str, Sealed]:
    """By the kind of what is sealed: what takes it, and one of it."""
    http = victim.http
    begun = await http.post(PURCHASE, json={"amount_usd": "1"})
    quoted = await http.post("/farebox/v1/quotes", json={"method": "GET", "url": path})
    seals = Seals(victim, begun, await http.get(path))
    other = await http.get(ELSEWHERE)
    return {
        "offer": (seals.offer_of, offers(other)[0]["extra"]["offer"]),
        "purchase": (seals.purchase, begun.json()["purchase_id"]),
        "session": (seals.session, victim.agent.session),
        "challenge": (seals.challenge, seals.asked["info"]["nonce"]),
        "request": (seals.request, challenge(other)["info"]["requestId"]),
        "quote": (seals.quote, quoted.json()["quote"]),
        "credential": (seals.credential, await _credential(victim)),
    }


async def test_no_token_stands_for_another(shop: Gateway, victim: Victim, api: Api) -> None:
    """What the gateway itself seals: offers, sessions, challenges, quotes, credentials."""
    path = "/look?tokens=1"
    places = await _sealed(victim, path)
    before, seen = effects(shop, victim.wallet), api.begun()
    for place, (send, _) in places.items():
        for name, (_, token) in places.items():
            if name == place and place not in ("offer", "request"):
                continue  # those two are of another call, and no good here either
            answer = await send(token)
            assert 400 <= answer.status_code < 500, (place, name, answer.text)
        assert effects(shop, victim.wallet) == before, place
    assert api.begun() == seen
    for place in ("purchase", "session", "challenge", "quote", "credential"):
        send, own = (await _sealed(victim, path))[place]  # made anew: none has run out
        done = await settled(shop, send, own)
        assert done.status_code == 200, (place, done.text)
