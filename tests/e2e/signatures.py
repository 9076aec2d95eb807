"""Every endpoint a running gateway has, and every kind of signature that it knows.

Endpoints come from the program's own tables (``gateway.app.own_routes``, the priced routes, the
tools and the actions of the configuration): one that is added later is tried without a word here.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
from eth_account import Account
from eth_account.messages import encode_defunct
from starlette.routing import Route

from gateway.app import own_routes
from gateway.external import catalog
from gateway.proxy.routes_table import compile_routes
from tests.e2e.stage import Gateway
from tests.e2e.test_credits_first import challenge, sign_in
from tests.e2e.test_external import API, FORECAST, Agent, strong_body
from tests.e2e.wallet import Wallet, decode, encode, offers
from wallet_auth.recipient import sponsor_lines

PURCHASE = "/farebox/v1/credits/purchase"
ELSEWHERE = "/look?made=elsewhere"
"""What most of the signatures are made for: it differs from a route's own example by its query."""
_PARAMETER = re.compile(r"\{(\w+)(?::path)?\}")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One method of one path, and a body that it would take. ``sells``: it is asked for money."""

    method: str
    path: str
    body: bytes
    sells: bool = False

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}"


def endpoints(gateway: Gateway, known: dict[str, str], bodies: dict[str, Any]) -> list[Endpoint]:
    """All of them. ``known``: what stands for the parameters of paths, such as the id of a call
    that the wallet has made; ``bodies`` by the path as it is routed."""
    found = [
        *_own(gateway, known, bodies),
        *_actions(gateway),
        *_priced(gateway),
    ]
    # With a slash at the end it is the same handler, and no path of what is sold.
    return list({each.name.rstrip("/"): each for each in reversed(found)}.values())


def _own(gateway: Gateway, known: dict[str, str], bodies: dict[str, Any]) -> Iterator[Endpoint]:
    for route in own_routes(gateway.settings().server):
        assert isinstance(route, Route)
        names = set(_PARAMETER.findall(route.path))
        if names & {"product", "action"}:
            continue  # one for each action, below
        assert names <= known.keys(), f"say what stands for {names - known.keys()}"
        path = _PARAMETER.sub(lambda found: known[found[1]], route.path)
        body = json.dumps(bodies.get(route.path.rstrip("/"), {})).encode()
        for method in sorted(route.methods or {"GET", "POST"}):
            yield Endpoint(method, path, b"" if method in ("GET", "HEAD") else body)


def _actions(gateway: Gateway) -> Iterator[Endpoint]:
    settings = gateway.settings()
    actions = catalog.build(settings.upstreams, compile_routes(settings.upstreams)).actions
    for route in own_routes(settings.server):
        assert isinstance(route, Route)
        if not {"product", "action"} & set(_PARAMETER.findall(route.path)):
            continue
        for action in actions:
            named = {"product": action.product, "action": action.slug}
            if "action" not in route.path:
                named["product"] = action.id
            path = _PARAMETER.sub(lambda found, named=named: named[found[1]], route.path)  # type: ignore[misc]  # mypy does not infer lambdas with defaults
            yield Endpoint("POST", path, b"{}", sells=True)


def _priced(gateway: Gateway) -> Iterator[Endpoint]:
    settings = gateway.settings()
    for route in compile_routes(settings.upstreams).routes:
        methods = ("GET", "POST") if route.method == "*" else (route.method,)
        for method in methods:
            path = route.public_pattern.replace("*", "anything")
            body = b"" if method == "GET" else b"{}"
            yield Endpoint(method, path, body, sells=not route.free)
    for upstream in settings.upstreams:
        for tool, _ in upstream.tools:
            params = {"name": tool, "arguments": {"q": "x"}}
            message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
            yield Endpoint("POST", upstream.mount, json.dumps(message).encode(), sells=True)


# -- kinds of signatures ------------------------------------------------------------------------

Sent = tuple[dict[str, str], dict[str, Any] | None]
"""Header fields, and a body; None: the endpoint's own."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Something signed, as it is presented. ``good``: where it is meant for."""

    name: str
    make: Callable[[Endpoint], Awaitable[Sent]]
    good: Callable[[Endpoint], bool]


def always(sent: Sent) -> Callable[[Endpoint], Awaitable[Sent]]:
    async def make(_endpoint: Endpoint) -> Sent:
        return sent

    return make


def only(*names: str) -> Callable[[Endpoint], bool]:
    return lambda endpoint: endpoint.name in names


class Victim:
    """A wallet with credits, and all that it ever signed for other purposes."""

    def __init__(self, gateway: Gateway, http: httpx.AsyncClient, agent: Agent) -> None:
        self.gateway = gateway
        self.http = http
        self.agent = agent
        self.wallet = agent.wallet

    def personal_sign(self, text: str, wallet: Wallet | None = None) -> str:
        key = (wallet or self.wallet).key
        return "0x" + bytes(Account.sign_message(encode_defunct(text=text), key).signature).hex()

    def signed_requests(self, places: list[Endpoint]) -> Iterator[Kind]:
        """ERC-8128, made for each of these endpoints."""
        for place in places:
            url = self.gateway.url + place.path
            headers = self.wallet.sign(place.method, url, place.body or None)
            yield Kind(f"erc8128 of {place.name}", always((headers, None)), only(place.name))
        headers = self.wallet.sign("GET", self.gateway.url + ELSEWHERE)
        yield Kind("erc8128", always((headers, None)), only())

    async def signed_challenges(self) -> list[Kind]:
        """Sign-in-with-x: of a priced route, and of what is read."""
        priced = sign_in(self.wallet, challenge(await self.http.get(ELSEWHERE)))
        path = "/farebox/v1/credits/balance"
        asked = (await self.http.get(path)).json()["extensions"]["sign-in-with-x"]
        return [
            Kind("siwx", always((priced, None)), only()),
            Kind("siwx to read", always((sign_in(self.wallet, asked), None)), only(f"GET {path}")),
        ]

    def bodies(self) -> list[Kind]:
        """Personal-sign: the published messages, in both forms of JSON, and the strong one."""
        agent, odd = self.agent, {"city": "Zürich"}
        here = f"POST {API}{FORECAST}"
        old = f"POST {API}/tools/api.forecast/invoke"
        text = json.dumps(odd, separators=(",", ":"))
        digest = _sha256(text)
        lines = ("action:invoke", "product:api.forecast", f"payload:{digest}")
        ours = "/farebox/v1" + FORECAST
        made: dict[str, tuple[dict[str, Any], str]] = {
            "balance": (agent.balance_body("s-balance"), f"POST {API}/credits/balance"),
            "invoke ascii": (agent.invoke_body("s-ascii", odd), here),
            "invoke raw": (agent.invoke_body("s-raw", odd, ascii_only=False), here),
            "older invoke": (agent.wrapper("s-old", *lines, parameters=odd), old),
            "strong": (self._strong(API + FORECAST), here),
            "strong of ours": (self._strong(ours), f"POST {ours}"),
        }
        kinds = [Kind(n, always(({}, body)), only(good)) for n, (body, good) in made.items()]
        alone = {"wallet_address": self.wallet.address, "session_nonce": agent.session}
        guess = {**alone, "request_id": "s-none", "signature": "0x" + "11" * 64 + "1b"}
        kinds.append(Kind("session alone", always(({}, alone)), only()))
        kinds.append(Kind("session and no signature of it", always(({}, guess)), only()))
        return kinds

    def _strong(self, path: str) -> dict[str, Any]:
        body: dict[str, Any] = strong_body(self.agent, self.gateway, path, "s-strong")
        return body

    async def payments(self) -> list[Kind]:
        """Payments of x402 for something else: a call, a purchase, and one under way in bodies."""
        call = self.wallet.pay(offers(await self.http.get(ELSEWHERE))[0])
        kinds = [
            Kind(f"payment of a call, {name}", always(({name: call}, None)), only())
            for name in ("PAYMENT-SIGNATURE", "X-PAYMENT", "PAYMENT")
        ]
        in_body = {"amount_usd": "0.01", "paymentPayload": decode(call)}
        kinds.append(Kind("payment of a call, in the body", always(({}, in_body)), only()))
        offer = decode(call)["accepted"]
        asks = {"x402Version": 2, "paymentPayload": decode(call), "paymentRequirements": offer}
        kinds.append(Kind("payment for a facilitator", always(({}, asks)), only()))
        for path in (PURCHASE, f"{API}/credits/purchase"):
            wanted = {"credits": 500, "wallet_address": self.wallet.address}
            told = await self.http.post(path, json=wanted)
            paid = self.wallet.pay(offers(told)[0])
            good = only(f"POST {path}")
            headers = {"PAYMENT-SIGNATURE": paid}
            kinds.append(Kind(f"payment of {path}", always((headers, wanted)), good))
            second = {"purchase_id": told.json()["purchase_id"], **decode(paid)["payload"]}
            second["wallet_address"] = self.wallet.address
            kinds.append(Kind(f"second post of {path}", always(({}, second)), good))
        return kinds

    def gifts(self, thief: Wallet, claims: tuple[str, str, str]) -> list[Kind]:
        """A payer's word for one payment, shown beside another. ``claims``: the hash of a transfer
        of somebody who said nothing about it, and who signed for the thief about another one."""
        nonce = "0x" + "ab" * 32
        lines = sponsor_lines(self.wallet.address, thief.address, 500, "nonce", nonce)
        tied = sponsor_lines(self.wallet.address, thief.address, 500, "tx", nonce)
        silent, statement, sponsor = claims
        to_thief = {"credits": 500, "wallet_address": thief.address}
        said = {
            "sponsor line": {"sponsor_signature": self.personal_sign(lines)},
            "sponsor line of a transaction": {"sponsor_signature": self.personal_sign(tied)},
            "recipient statement": {"payer_signature": statement},
        }

        def beside(more: dict[str, Any]) -> Callable[[Endpoint], Awaitable[Sent]]:
            async def make(endpoint: Endpoint) -> Sent:
                path = endpoint.path if endpoint.path.endswith("/credits/purchase") else PURCHASE
                offer = offers(await self.http.post(path, json=to_thief))[0]
                headers = {"PAYMENT-SIGNATURE": self.wallet.pay(offer)}
                return headers, {**to_thief, "payer_wallet_address": self.wallet.address, **more}

            return make

        claim = {"transaction_hash": silent, "wallet_address": thief.address}
        by_hash = [
            Kind("claim of another transfer", always(({}, {**claim, **each})), only())
            for each in ({"payer_signature": statement}, {"sponsor_signature": sponsor})
        ]
        return [*(Kind(n, beside(more), only()) for n, more in said.items()), *by_hash]


def _sha256(text: str) -> str:
    from hashlib import sha256

    return sha256(text.encode()).hexdigest()


# -- one signature in the place of another --------------------------------------------------------


def in_erc8128(headers: dict[str, str], signature: str) -> dict[str, str]:
    """A signed request whose signature is another one."""
    coded = base64.b64encode(bytes.fromhex(signature[2:])).decode()
    return {**headers, "Signature": re.sub(r"=:.*:", f"=:{coded}:", headers["Signature"])}


def of_erc8128(headers: dict[str, str]) -> str:
    coded = headers["Signature"].partition("=:")[2].rstrip(":")
    return "0x" + base64.b64decode(coded).hex()


def in_header(name: str, headers: dict[str, str], signature: str, *path: str) -> dict[str, str]:
    """A header of base64 JSON with another signature at ``path``."""
    told = decode(headers[name])
    place = told
    for member in path:
        place = place[member]
    place["signature"] = signature
    return {**headers, name: encode(told)}
