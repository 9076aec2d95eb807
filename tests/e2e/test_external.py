"""The published wallet API against a running gateway, by its worked examples: only the base URL is
another one. Messages are put together here from what is published, not by the program's own code.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import datetime
from typing import Any

import httpx
import pytest
from eth_account import Account
from eth_account.messages import encode_defunct

from anvil.devnet import Devnet
from gateway.demo import mcp_server
from gateway.demo.upstreams import SampleApi
from tests import servers
from tests.e2e.stage import Api, Gateway, new_account
from tests.e2e.wallet import Wallet, buy, decode, encode, new_wallet, offers, outcome, problem
from tests.gateway.proxy import misbehave

API = "/api/external"
FORECAST = "/tools/api/actions/forecast/invoke"
ROUTES = """[
  { match = "POST /forecast", price = "$0.05", description = "Weather.", slug = "forecast" },
  { match = "POST /other", price = "$0.05" },
  { match = "GET /look", price = "$0.01" },
  { match = "POST /fails", price = "$0.05" },
  { match = "POST /dear", price = "$3" },
  { match = "GET /free/*", price = "free" },
  { match = "POST /*", price = "$0.01" },
]"""


ECHO = (b"/forecast", b"/other", b"/look", b"/dear")


async def _echo(_up: Any, request: misbehave.Request, writer: Any) -> bool:
    """The upstream says what it was asked."""
    told = {"body": request.body.decode(), "target": request.target.decode()}
    writer.write(misbehave.answer(json.dumps(told).encode(), b"Content-Type: application/json"))
    return True


async def _fail(_up: Any, _request: misbehave.Request, writer: Any) -> bool:
    writer.write(misbehave.answer(b'{"error":"no"}', status=b"404 Not Found"))
    return True


@pytest.fixture(scope="module")
def external(
    chain_session: Devnet, api: Api, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Gateway]]:
    """A gateway with actions to invoke, on each kind of database."""
    running: dict[str, tuple[Gateway, str]] = {}
    for path in ECHO:
        misbehave.BEHAVIOURS[path] = _echo
    misbehave.BEHAVIOURS[b"/fails"] = _fail

    def get(dialect: str) -> Gateway:
        if dialect not in running:
            folder = tmp_path_factory.mktemp(f"external-{dialect}")
            database = f"sqlite:///{folder / 'farebox.db'}"
            if dialect == "postgres":
                database = servers.create_database(servers.postgres_url())
            made = Gateway(
                *(folder, database, chain_session, chain_session.rpc_url, api.url),
                server={"settle_wait_s": 1, "reconcile_s": 1},
                routes=ROUTES,
            )
            running[dialect] = (made.start(), database)
        return running[dialect][0]

    yield get
    for gateway, database in running.values():
        gateway.stop()
        assert gateway.broken() == {}
        if database.startswith("postgres"):
            servers.drop_database(database)
    for path in (*ECHO, b"/fails"):
        del misbehave.BEHAVIOURS[path]


@pytest.fixture
def gate(dialect: str, external: Callable[[str], Gateway]) -> Iterator[Gateway]:
    gateway = external(dialect)
    yield gateway
    assert gateway.broken() == {}
    faults = [line for line in gateway.log.splitlines() if "unexpected error" in line]
    assert not faults, gateway.log[-3000:]


class Agent:
    """A client of the published API, by its documentation alone."""

    def __init__(self, http: httpx.AsyncClient, wallet: Wallet, net: Devnet) -> None:
        self.http = http
        self.wallet = wallet
        self.net = net
        self.session = ""

    async def begin(self) -> None:
        body = {"wallet_address": self.wallet.address}
        told = await self.http.post(f"{API}/auth/session", json=body)
        assert told.status_code == 200, told.text
        self.session = told.json()["session_nonce"]

    def personal_sign(self, *lines: str) -> str:
        text = encode_defunct(text="\n".join(lines))
        return "0x" + bytes(Account.sign_message(text, self.wallet.key).signature).hex()

    def wrapper(self, request_id: str, *lines: str, **more: Any) -> dict[str, Any]:
        head = (
            "agentpmt-external",
            f"wallet:{self.wallet.address.lower()}",
            f"session:{self.session}",
            f"request:{request_id}",
        )
        return {
            "wallet_address": self.wallet.address,
            "session_nonce": self.session,
            "request_id": request_id,
            "signature": self.personal_sign(*head, *lines),
            **more,
        }

    def balance_body(self, request_id: str) -> dict[str, Any]:
        return self.wrapper(request_id, "action:balance", "product:-", "payload:")

    async def balance(self, request_id: str = "bal-01") -> dict[str, Any]:
        told = await self.http.post(f"{API}/credits/balance", json=self.balance_body(request_id))
        assert told.status_code == 200, told.text
        found: dict[str, Any] = told.json()
        return found

    def invoke_body(
        self,
        request_id: str,
        parameters: dict[str, Any],
        action: str = "forecast",
        *,
        ascii_only: bool = True,
        path: str = "/external/tools/api/actions/{}/invoke",
    ) -> dict[str, Any]:
        text = json.dumps(
            parameters, sort_keys=True, separators=(",", ":"), ensure_ascii=ascii_only
        )
        return self.wrapper(
            request_id,
            "method:POST",
            "path:" + path.format(action),
            "payload:" + hashlib.sha256(text.encode()).hexdigest(),
            parameters=parameters,
        )

    async def invoke(
        self, body: dict[str, Any], action: str = "forecast", **options: Any
    ) -> httpx.Response:
        return await self.http.post(
            f"{API}/tools/api/actions/{action}/invoke", json=body, **options
        )

    async def buy(self, credit_count: int = 500, **more: Any) -> httpx.Response:
        body = {
            "wallet_address": self.wallet.address,
            "credits": credit_count,
            "payment_method": "x402",
            "request_id": "buy-7f3c",
            **more,
        }
        asked = await self.http.post(f"{API}/credits/purchase", json=body)
        header = self.wallet.pay(offers(asked)[0])
        for _ in range(20):  # more than a wallet gets at once waits for deeper blocks
            done = await self.http.post(
                f"{API}/credits/purchase", json=body, headers={"X-PAYMENT": header}
            )
            if done.status_code != 202:
                break
            self.net.mine(9)
        assert done.status_code == 200, done.text
        return done


@pytest.fixture
async def agent(gate: Gateway, chain_session: Devnet) -> AsyncIterator[Agent]:
    """An agent with five dollars of credits and a session."""
    async with gate.client() as http:
        made = Agent(http, new_wallet(chain_session, 20_000_000), chain_session)
        await made.begin()
        await made.buy()
        yield made


async def test_the_worked_examples(gate: Gateway, chain_session: Devnet) -> None:
    async with gate.client() as http:
        agent = Agent(http, new_wallet(chain_session), chain_session)
        wrong = {"wallet_address": agent.wallet.address, "credits": 750}
        told = problem(await http.post(f"{API}/credits/purchase", json=wrong), "invalid_amount")
        assert told["suggested_credits"] == 1000
        bought = (await agent.buy(500)).json()
        assert (bought["success"], bought["credits"], bought["minted"]) == (True, 500, 500)
        session = await http.post(
            f"{API}/auth/session", json={"wallet_address": agent.wallet.address}
        )
        assert session.json()["expires_in"] == 900
        assert datetime.fromisoformat(session.json()["expires_at"]).timestamp() > time.time()
        agent.session = session.json()["session_nonce"]
        left = await agent.balance()
        assert (left["balance_credits"], left["balance_usd"], left["expires_in_days"]) == (
            500,
            5,
            364,
        )
        tools = (await http.get(f"{API}/tools")).json()["tools"]
        (product,) = tools
        forecast = next(a for a in product["actions"] if a["action_slug"] == "forecast")
        assert (product["product_slug"], forecast["price_credits"]) == ("api", 5)
        parameters = {"url": "https://example.org", "city": "Zürich"}
        done = await agent.invoke(agent.invoke_body("inv-01", parameters))
        assert done.status_code == 200, done.text
        body = done.json()
        output = body["response"]["data"]["output"]
        assert json.loads(output["body"]) == parameters
        assert body["response"]["status_code"] == 200 and body["success"] is True
        money = ("price_credits", "charged_credits", "balance_credits", "balance_usd")
        assert [body[name] for name in money] == [5, 5, 495, 4.95]
        assert body["credit_source"] == "wallet"
        assert forecast["invoke"]["url"].endswith(API + FORECAST)


async def test_a_repeat_is_answered_from_store(gate: Gateway, api: Api, agent: Agent) -> None:
    before = api.calls("/forecast")
    body = agent.invoke_body("inv-01", {"n": secrets.token_hex(4)})
    answers = [await agent.invoke(body) for _ in range(2)]
    at_once = await asyncio.gather(*(agent.invoke(body) for _ in range(5)))
    assert {a.status_code for a in (*answers, *at_once)} == {200}
    assert api.calls("/forecast") == before + 1
    first, again = (a.json() for a in answers)
    assert again["response"] == first["response"]
    assert (again["charged_credits"], again["replayed"]) == (0, True)
    assert again["balance_credits"] == first["balance_credits"] == 495
    assert answers[1].headers["farebox-replayed"] == "true"
    # Members in another order, or written with escapes: the same parameters.
    same = json.dumps(dict(reversed(body.items())), ensure_ascii=True)
    told = await agent.http.post(API + FORECAST, content=same.encode())
    assert told.json()["replayed"] is True
    assert gate.balance(agent.wallet.address) == (4_950_000, 0)
    other = await agent.invoke(agent.invoke_body("inv-01", {"n": "other"}))
    told = problem(other, "EXTERNAL_SIGNATURE_REQUEST_REPLAY")
    assert told["status"] == 409 and told["next_actions"]
    # Another session, another request.
    await agent.begin()
    done = await agent.invoke(agent.invoke_body("inv-01", {"n": "other"}))
    assert done.json()["charged_credits"] == 5


async def test_both_json_forms_and_both_spellings_of_the_path(gate: Gateway, agent: Agent) -> None:
    parameters = {"city": "Zürich", "q": "café"}
    paths = [
        f"{prefix}/external/tools/api/actions/{{}}/invoke{end}"
        for prefix in ("", "/api")
        for end in ("", "/")
    ]
    for n, path in enumerate(paths):
        for ascii_only in (True, False):
            body = agent.invoke_body(
                f"{n}-{ascii_only}", parameters, path=path, ascii_only=ascii_only
            )
            url = API + FORECAST + ("/" if n % 2 else "")
            done = await agent.http.post(url, json=body)
            assert done.status_code == 200, done.text
            output = done.json()["response"]["data"]["output"]["body"]
            assert json.loads(output) == parameters
            assert ("\\u" in output) is ascii_only  # the very text whose hash was signed
    for path in ("/external/tools/api/actions/other/invoke", "/tools/api/actions/forecast/invoke"):
        problem(
            await agent.invoke(agent.invoke_body("x", parameters, path=path)),
            "EXTERNAL_SIGNATURE_WALLET_MISMATCH",
        )
    assert gate.balance(agent.wallet.address) == (4_600_000, 0)


async def test_one_changed_byte_says_what_was_expected(gate: Gateway, agent: Agent) -> None:
    body = agent.invoke_body("inv-01", {"city": "Oslo", "days": 3})
    body["parameters"]["city"] = "Osl0"
    told = problem(await agent.invoke(body), "EXTERNAL_SIGNATURE_WALLET_MISMATCH")
    assert told["expected_wallet"] == agent.wallet.address
    assert told["recovered_wallet_for_expected_message"] != agent.wallet.address
    assert told["payload_canonical_top_level_keys"] == ["city", "days"]
    digest = hashlib.sha256(b'{"city":"Osl0","days":3}').hexdigest()
    assert told["accepted_payload_hash_forms"] == {"ascii": digest}
    assert "/external/tools/api/actions/forecast/invoke" in told["accepted_path_candidates"]
    assert told["expected_message"].endswith(digest)
    assert gate.balance(agent.wallet.address) == (5_000_000, 0)
    cured = {**body, "signature": agent.personal_sign(told["expected_message"])}
    assert (await agent.invoke(cured)).json()["charged_credits"] == 5


async def test_sessions_that_are_not_this_wallets(gate: Gateway, agent: Agent) -> None:
    other = Agent(agent.http, Wallet(new_account()), agent.net)
    await other.begin()
    agent.session, mine = other.session, agent.session
    told = problem(
        await agent.invoke(agent.invoke_body("a", {})), "EXTERNAL_SIGNATURE_SESSION_NONCE_INVALID"
    )
    (action,) = told["next_actions"]
    assert action["url"] == f"{gate.url}{API}/auth/session"
    agent.session = mine
    body = agent.invoke_body("a", {})
    malformed = await agent.invoke({**body, "signature": "0x12"})
    told = problem(malformed, "EXTERNAL_SIGNATURE_MALFORMED")
    assert told["expected_message"].startswith("agentpmt-external\nwallet:")
    assert gate.balance(agent.wallet.address) == (5_000_000, 0)


# -- what a published signature may spend ---------------------------------------------------------


async def test_it_spends_what_was_bought_with_it_and_nothing_else(
    gate: Gateway, chain_session: Devnet
) -> None:
    async with gate.client() as http:
        agent = Agent(http, new_wallet(chain_session), chain_session)
        await buy(http, agent.wallet, "2")  # under our own prefix
        await agent.begin()
        left = await agent.balance()
        assert (left["balance_credits"], left["expiration"]) == (0, None)
        short = await agent.invoke(agent.invoke_body("a", {}))
        told = problem(short, "insufficient_credits")
        assert (told["balance_credits"], told["suggested_credits"]) == (0, 500)
        assert told["credits"]["balance_units"] == 0  # nothing is said of the rest
        await agent.buy()
        done = await agent.invoke(agent.invoke_body("a", {}))
        assert done.json()["balance_credits"] == 495
        assert "farebox-balance" not in done.headers
        replayed = await agent.invoke(agent.invoke_body("a", {}))
        assert "farebox-balance" not in replayed.headers
        assert gate.balance(agent.wallet.address) == (6_950_000, 0)
        assert (await agent.balance())["balance_credits"] == 495


async def test_a_bound_signature_allows_it_more_once(gate: Gateway, chain_session: Devnet) -> None:
    async with gate.client() as http:
        agent = Agent(http, new_wallet(chain_session), chain_session)
        await buy(http, agent.wallet, "1")
        await agent.begin()
        body = agent.invoke_body("a", {})
        problem(await agent.invoke(body), "insufficient_credits")
        url = "/farebox/v1/auth/external"
        wish = json.dumps({"spends": "all"}).encode()
        problem(await http.post(url, content=wish), "identity_required")
        signed = agent.wallet.sign("POST", gate.url + url, wish)
        assert (await http.post(url, content=wish, headers=signed)).json()["spends"] == "all"
        assert (await agent.invoke(body)).json()["balance_credits"] == 95
        assert (await agent.balance())["balance_credits"] == 95
        back = json.dumps({"spends": "own"}).encode()
        signed = agent.wallet.sign("POST", gate.url + url, back)
        await http.post(url, content=back, headers=signed)
        problem(await agent.invoke(agent.invoke_body("b", {})), "insufficient_credits")
        assert gate.balance(agent.wallet.address) == (950_000, 0)


async def test_five_dollars_a_session(gate: Gateway, agent: Agent) -> None:
    await agent.buy(1000)  # fifteen dollars in all
    first = await agent.invoke(agent.invoke_body("a", {}, "dear"), "dear")
    assert first.json()["charged_credits"] == 300
    told = await asyncio.gather(
        *(agent.invoke(agent.invoke_body(f"b{n}", {}, "dear"), "dear") for n in range(4))
    )
    for answer in told:
        refused = problem(answer, "session_limit_reached")
        assert refused["left_units"] == 2_000_000
        assert refused["next_actions"][0]["url"].endswith("/auth/session")
    await agent.begin()
    again = await agent.invoke(agent.invoke_body("b", {}, "dear"), "dear")
    assert again.json()["balance_credits"] == 900


async def test_a_call_that_fails_costs_nothing(gate: Gateway, agent: Agent) -> None:
    done = (await agent.invoke(agent.invoke_body("a", {}, "fails"), "fails")).json()
    assert (done["success"], done["response"]["status_code"]) == (False, 404)
    assert (done["charged_credits"], done["balance_credits"]) == (0, 500)


async def test_what_is_asked_in_a_query(gate: Gateway, agent: Agent) -> None:
    parameters = {"q": "a b&c", "n": 3, "x": True}
    done = await agent.invoke(agent.invoke_body("a", parameters, "look"), "look")
    target = done.json()["response"]["data"]["output"]["target"]
    assert target == "/look?q=a+b%26c&n=3&x=true"
    nested = await agent.invoke(agent.invoke_body("b", {"q": [1]}, "look"), "look")
    problem(nested, "invalid_request")


async def test_the_upstream_is_told_of_a_payer_and_of_no_identity(
    gate: Gateway, api: Api, agent: Agent
) -> None:
    await agent.invoke(agent.invoke_body("a", {"mine": agent.session}))
    (seen,) = [r for r in api.seen("/forecast") if agent.session.encode() in r.body]
    assert seen.header(b"farebox-auth") == [b"payment"]
    assert seen.header(b"farebox-payer") == [agent.wallet.address.encode()]
    assert not seen.header(b"farebox-wallet") and not seen.header(b"farebox-account")
    assert seen.header(b"content-type") == [b"application/json"]


# -- the older route ------------------------------------------------------------------------------


async def test_the_older_invoke(gate: Gateway, agent: Agent) -> None:
    parameters = {"city": "Oslo"}
    digest = hashlib.sha256(b'{"city":"Oslo"}').hexdigest()
    lines = ("action:invoke", "product:api.forecast", f"payload:{digest}")
    body = agent.wrapper("a", *lines, parameters=parameters)
    done = await agent.http.post(f"{API}/tools/api.forecast/invoke", json=body)
    assert done.json()["charged_credits"] == 5, done.text
    wrong = await agent.http.post(f"{API}/tools/api.other/invoke", json=body)
    problem(wrong, "EXTERNAL_SIGNATURE_WALLET_MISMATCH")
    problem(await agent.http.post(f"{API}/tools/nothing/invoke", json=body), "not_found")


# -- the payment for one call ---------------------------------------------------------------------


async def test_one_call_is_paid_at_the_same_address(gate: Gateway, chain_session: Devnet) -> None:
    wallet = new_wallet(chain_session)
    parameters = json.dumps({"city": "Oslo"}).encode()
    async with gate.client() as http:
        asked = await http.post(API + FORECAST, content=parameters)
        offer = offers(asked)[0]
        assert asked.json()["accepts"] and offer["amount"] == "50000"
        header = {"X-PAYMENT": wallet.pay(offer)}
        done = await http.post(API + FORECAST, content=parameters, headers=header)
        again = await http.post(API + FORECAST, content=parameters, headers=header)
        other = await http.post(API + FORECAST, content=b"{}", headers=header)
    assert done.status_code == 200, done.text
    body = done.json()
    assert json.loads(body["response"]["data"]["output"]["body"]) == {"city": "Oslo"}
    told = body["x402"]
    assert told["transaction"] == outcome(done)["transaction"]
    assert told["resource_url"] == gate.url + API + FORECAST
    assert told["payment"]["amount_base_units"] == "50000"
    assert told["payment"]["amount_usd"] == 0.05
    assert told["payment"]["payer_wallet_address"] == wallet.address
    assert "balance_credits" not in body and "charged_credits" not in body
    assert again.json()["response"] == body["response"] and again.json()["replayed"] is True
    problem(other, "payment_already_used")
    assert gate.transfers(wallet.address) == [("mint", 50_000, "x402"), ("capture", 50_000, None)]


async def test_a_payment_for_one_action_pays_no_other(gate: Gateway, chain_session: Devnet) -> None:
    wallet = new_wallet(chain_session)
    async with gate.client() as http:
        offer = offers(await http.post(API + FORECAST, json={}))[0]
        other = "/tools/api/actions/other/invoke"
        refused = await http.post(API + other, json={}, headers={"X-PAYMENT": wallet.pay(offer)})
        problem(refused, "invalid_payment_requirements")
    assert gate.payments(wallet.address) == []


# -- the strong form ------------------------------------------------------------------------------


def strong_body(agent: Agent, gate: Gateway, path: str, request_id: str, **more: Any) -> Any:
    """A body in the strong form, with the message put together from docs/agent.md."""
    parameters = more.pop("parameters", {"city": "Oslo"})
    terms = {
        "audience": gate.url,
        "ceiling": "$0.05",
        "expires_at": int(time.time()) + 60,
        **more,
    }
    text = json.dumps(parameters, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    signature = agent.personal_sign(
        "farebox-external-1",
        f"audience:{terms['audience']}",
        f"wallet:{agent.wallet.address}",
        f"session:{agent.session}",
        f"request:{request_id}",
        "method:POST",
        f"path:{path}",
        f"ceiling:{terms['ceiling']}",
        f"expires:{terms['expires_at']}",
        "payload:" + hashlib.sha256(text.encode()).hexdigest(),
    )
    return {
        "wallet_address": agent.wallet.address,
        "session_nonce": agent.session,
        "request_id": request_id,
        "signature": signature,
        "parameters": parameters,
        **terms,
    }


async def test_the_strong_form_spends_everything_under_both_prefixes(
    gate: Gateway, api: Api, chain_session: Devnet
) -> None:
    async with gate.client() as http:
        agent = Agent(http, new_wallet(chain_session), chain_session)
        await buy(http, agent.wallet, "1")
        await agent.begin()
        for n, prefix in enumerate((API, "/farebox/v1")):
            path = prefix + FORECAST
            body = strong_body(agent, gate, path, f"s{n}", parameters={"mine": agent.session})
            done = await http.post(path, json=body)
            assert done.status_code == 200, done.text
            assert done.json()["balance_credits"] == 95 - 5 * n
            assert done.headers["farebox-balance"] == str(95 - 5 * n)
            again = await http.post(path, json=body)
            assert (again.json()["replayed"], again.json()["charged_credits"]) == (True, 0)
            elsewhere = (API if n else "/farebox/v1") + FORECAST
            wrong = await http.post(elsewhere, json=body)
            problem(wrong, "EXTERNAL_SIGNATURE_WALLET_MISMATCH")
        seen = [r for r in api.seen("/forecast") if agent.session.encode() in r.body]
        assert [r.header(b"farebox-wallet") for r in seen] == [[agent.wallet.address.encode()]] * 2
        assert {r.header(b"farebox-auth")[0] for r in seen} == {b"bound"}


async def test_the_strong_form_is_bound_to_what_it_says(gate: Gateway, agent: Agent) -> None:
    path = API + FORECAST
    low = await agent.http.post(path, json=strong_body(agent, gate, path, "a", ceiling="$0.049"))
    problem(low, "price_above_ceiling")
    body = strong_body(agent, gate, path, "a")
    for changed, code in (
        ({"ceiling": "-"}, "EXTERNAL_SIGNATURE_WALLET_MISMATCH"),
        ({"audience": "https://elsewhere.example"}, "signature_authority_mismatch"),
        ({"expires_at": int(time.time()) - 1}, "signature_expired"),
        ({"parameters": {"city": "Osl0"}}, "EXTERNAL_SIGNATURE_WALLET_MISMATCH"),
        ({"more": 1}, "invalid_request"),
        ({"parameters": {"n": 2**53}}, "invalid_request"),
    ):
        problem(await agent.http.post(path, json={**body, **changed}), code)
    assert gate.balance(agent.wallet.address) == (5_000_000, 0)
    done = await agent.http.post(path, json=body)
    assert done.json()["charged_credits"] == 5
    assert gate.balance(agent.wallet.address) == (4_950_000, 0)


# -- every signature where it does not belong -----------------------------------------------------


async def test_a_signature_is_good_for_its_own_endpoint_alone(gate: Gateway, agent: Agent) -> None:
    digest = hashlib.sha256(b"{}").hexdigest()
    kinds = {
        "balance": agent.balance_body("k-balance"),
        "forecast": agent.invoke_body("k-forecast", {}),
        "other": agent.invoke_body("k-other", {}, "other"),
        "older": agent.wrapper(
            "k-older", "action:invoke", "product:api.forecast", f"payload:{digest}", parameters={}
        ),
        "strong": strong_body(agent, gate, API + FORECAST, "k-strong", parameters={}),
    }
    other = "/tools/api/actions/other/invoke"
    places = {
        f"{API}/credits/balance": {"balance"},
        API + FORECAST: {"forecast", "strong"},
        API + other: {"other"},
        f"{API}/tools/api.forecast/invoke": {"older"},
        f"{API}/tools/api.other/invoke": set(),
        "/farebox/v1" + FORECAST: set(),
        "/farebox/v1" + other: set(),
        "/farebox/v1/credits/balance": set(),
        "/farebox/v1/auth/external": set(),
        "/farebox/v1/credits/refund": set(),
        "/other": set(),
    }
    for path, good in places.items():
        for kind, body in kinds.items():
            told = await agent.http.post(path, json=body)
            assert (told.status_code == 200) is (kind in good), (path, kind, told.text)
            if kind not in good:
                assert told.status_code in (400, 401, 402), (path, kind, told.text)
    # Three calls of five credits and the strong one; all else cost nothing.
    assert gate.balance(agent.wallet.address) == (4_800_000, 0)


# -- every form of a purchase ---------------------------------------------------------------------


async def test_headers_as_other_clients_write_them(gate: Gateway, chain_session: Devnet) -> None:
    async with gate.client() as http:
        for n, name in enumerate(("X-PAYMENT", "PAYMENT-SIGNATURE", "PAYMENT")):
            wallet = new_wallet(chain_session)
            body = {"wallet_address": wallet.address, "credits": 500, "payment_method": "x402"}
            asked = await http.post(f"{API}/credits/purchase", json=body)
            paid = decode(wallet.pay(offers(asked)[0]))
            if n == 1:  # top-level scheme and network, a bare chain id, no version
                payload = paid["payload"]
                auth = payload["authorization"]
                auth["valid_after"] = auth.pop("validAfter")
                chain_id = paid["accepted"]["network"].removeprefix("eip155:")
                paid = {"scheme": "exact", "network": chain_id, "payload": payload}
            elif n == 2:  # in a wrapper, without a version
                del paid["x402Version"]
                paid = {"paymentPayload": paid}
            header = encode(paid).rstrip("=")
            done = await http.post(f"{API}/credits/purchase", json=body, headers={name: header})
            assert done.status_code == 200, (name, done.text)
            assert done.json()["minted"] == 500
            assert gate.transfers(wallet.address) == [("mint", 5_000_000, "external")]


async def test_a_transaction_hash_buys_what_its_messages_spend(
    gate: Gateway, chain_session: Devnet
) -> None:
    async with gate.client() as http:
        agent = Agent(http, new_wallet(chain_session), chain_session)
        chain_session.rpc("anvil_setBalance", agent.wallet.address, hex(10**18))
        chain_session.rpc("anvil_impersonateAccount", agent.wallet.address)
        sent = chain_session.transfer(agent.wallet.address, gate.pay_to, 5_000_000)
        body = {
            "wallet_address": agent.wallet.address,
            "credits": 500,
            "payment_method": "x402",
            "transaction_hash": sent,
        }
        for _ in range(20):
            done = await http.post(f"{API}/credits/purchase", json=body)
            if done.status_code != 202:
                break
            assert done.json()["transaction_hash"] == sent
            chain_session.mine(9)
        assert done.status_code == 200, done.text
        await agent.begin()
        assert (await agent.balance())["balance_credits"] == 500


async def test_wallets_are_not_made_unless_switched_on(gate: Gateway) -> None:
    async with gate.client() as http:
        problem(await http.post(f"{API}/agentaddress", json={}), "not_found")


async def test_a_sponsor_pays_for_an_agent(gate: Gateway, chain_session: Devnet) -> None:
    """By the published lines; what was bought here for a wallet is its own to spend."""
    sponsor = new_wallet(chain_session)
    async with gate.client() as http:
        agent = Agent(http, Wallet(new_account()), chain_session)
        body = {"wallet_address": agent.wallet.address, "credits": 500, "payment_method": "x402"}
        asked = await http.post(f"{API}/credits/purchase", json=body)
        header = sponsor.pay(offers(asked)[0])
        nonce = decode(header)["payload"]["authorization"]["nonce"]
        lines = (
            "agentpmt-external-sponsor",
            f"payer:{sponsor.address}",
            f"recipient:{agent.wallet.address}",
            "credits:500",
            f"nonce:{nonce}",
        )
        body |= {"payer_wallet_address": sponsor.address}
        headers = {"X-PAYMENT": header}
        wrong = {**body, "sponsor_signature": agent.personal_sign(*lines)}
        refused = await http.post(f"{API}/credits/purchase", json=wrong, headers=headers)
        problem(refused, "payer_signature_required")
        signature = Agent(http, sponsor, chain_session).personal_sign(*lines)
        good = {**body, "sponsor_signature": signature}
        done = await http.post(f"{API}/credits/purchase", json=good, headers=headers)
        assert done.status_code == 200, done.text
        await agent.begin()
        assert (await agent.invoke(agent.invoke_body("a", {}))).json()["balance_credits"] == 495


async def test_a_tool_of_an_mcp_server_is_an_action(
    launch: Callable[..., Gateway], chain_session: Devnet
) -> None:
    with SampleApi(make=mcp_server.build) as tools:
        shop = launch("sqlite", running=False)
        shop.chain_extra = f"""
[upstreams.tools]
kind = "mcp"
url = "{tools.url}/mcp"
mount = "/mcp"
tools = {{ search = "$0.05", count = "$0.05", fail = "$0.05" }}
"""
        shop.start()
        async with shop.client() as http:
            agent = Agent(http, new_wallet(chain_session), chain_session)
            await agent.buy()
            await agent.begin()
            for n, (tool, parameters, charged) in enumerate(
                [("search", {"q": "fare"}, 5), ("count", {"to": 3}, 5), ("fail", {}, 0)]
            ):
                path = f"/external/tools/tools/actions/{tool}/invoke"
                body = agent.invoke_body(f"t{n}", parameters, path=path)
                for repeat in (False, True):
                    done = await http.post(f"/api{path}", json=body)
                    assert done.status_code == 200, done.text
                    told = done.json()
                    assert told["charged_credits"] == (0 if repeat else charged)
                    assert told["success"] is (charged > 0)
                output = told["response"]["data"]["output"]
                assert output["content"][0]["type"] == "text"
        assert shop.balance(agent.wallet.address) == (4_900_000, 0)


async def test_a_payment_beside_a_signed_body(gate: Gateway, agent: Agent) -> None:
    """A published body is worth a payment itself, and one is enough; the strong form is a login."""
    offer = offers(await agent.http.post(API + FORECAST, json={}))[0]
    headers = {"X-PAYMENT": agent.wallet.pay(offer)}
    both = await agent.invoke(agent.invoke_body("a", {}), headers=headers)
    problem(both, "identity_conflict")
    body = strong_body(agent, gate, API + FORECAST, "b", parameters={})
    stranger = new_wallet(agent.net)
    mixed = {"X-PAYMENT": stranger.pay(offer)}
    problem(await agent.http.post(API + FORECAST, json=body, headers=mixed), "payer_mismatch")
    assert gate.payments(stranger.address) == []
    assert gate.balance(agent.wallet.address) == (5_000_000, 0)
    signed = agent.wallet.sign("POST", gate.url + API + FORECAST, json.dumps(body).encode())
    content = json.dumps(body).encode()
    twice = await agent.http.post(API + FORECAST, content=content, headers=signed)
    problem(twice, "identity_conflict")
