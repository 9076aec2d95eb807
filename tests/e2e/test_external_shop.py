"""The wallet API beyond its worked examples: prices by usage, a catalogue that changes, purchases
in two posts, wallets that are made, and the balance under our own prefix."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
from eth_account import Account

from anvil.devnet import Devnet
from gateway.demo import mcp_server
from gateway.demo.upstreams import SampleApi
from tests.e2e.stage import Gateway
from tests.e2e.test_external import API, Agent
from tests.e2e.wallet import Wallet, decode, new_wallet, offers, outcome, problem
from tests.gateway.proxy import misbehave

Launch = Callable[..., Gateway]
RATES = '{ tokens_in = "$1 / 1M", tokens_out = "$100 per 1M tokens" }'
TERMS = f'max = "$0.05", fixed = "$0.0005", when_unknown = "$0.02", rates = {RATES}'
SIZES = 'default = "$0.01", cases = [{ body = { size = "large" }, price = "$0.04" }]'
METERED = f"""[
  {{ match = "POST /chat", price = {{ rule = "metered", {TERMS} }} }},
  {{ match = "POST /image", price = {{ rule = "by_params", {SIZES} }} }},
  {{ match = "POST /forecast", price = "$0.05", slug = "forecast" }},
]"""
MAX_UNITS, UNKNOWN_UNITS = 50_000, 20_000


async def _chat(_up: Any, request: misbehave.Request, writer: Any) -> bool:
    """Says so many words, and what that came to, unless it is asked to keep it to itself."""
    asked = json.loads(request.body)
    said: dict[str, Any] = {"words": ["word"] * asked["words"]}
    if asked.get("usage", True):
        said["usage"] = {"prompt_tokens": 100, "completion_tokens": asked["words"]}
    if asked.get("status"):
        writer.write(misbehave.answer(json.dumps(said).encode(), status=b"400 Bad Request"))
    elif asked.get("stream"):
        told = b"data: " + json.dumps(said).encode() + b"\n\ndata: [DONE]\n\n"
        writer.write(misbehave.answer(told, b"Content-Type: text/event-stream"))
    else:
        told = json.dumps(said).encode()
        writer.write(misbehave.answer(told, b"Content-Type: application/json"))
    return True


async def _image(_up: Any, _request: misbehave.Request, writer: Any) -> bool:
    writer.write(misbehave.answer(b"{}", b"Content-Type: application/json"))
    return True


@pytest.fixture(autouse=True)
def _upstream() -> Iterator[None]:
    behaviours = {b"/chat": _chat, b"/image": _image, b"/forecast": _image, b"/new": _image}
    misbehave.BEHAVIOURS.update(behaviours)
    yield
    for path in behaviours:
        del misbehave.BEHAVIOURS[path]


@pytest.fixture
def shop(launch: Launch) -> Gateway:
    return launch("sqlite", routes=METERED, server={"settle_wait_s": 1})


@pytest.fixture
async def agent(shop: Gateway, chain_session: Devnet) -> AsyncIterator[Agent]:
    """An agent with five dollars of credits and a session."""
    async with shop.client() as http:
        made = Agent(http, new_wallet(chain_session, 20_000_000), chain_session)
        await made.begin()
        await made.buy()
        yield made


# -- prices by usage ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "units"),
    [
        ({"words": 10}, 500 + 100 + 1_000),
        ({"words": 10, "stream": True}, 500 + 100 + 1_000),
        ({"words": 10_000}, MAX_UNITS),
        ({"words": 10, "usage": False}, UNKNOWN_UNITS),
        ({"words": 10, "status": 400}, 0),
    ],
    ids=["json", "stream", "more than was held", "unknown", "refused"],
)
async def test_a_metered_action_costs_what_it_used(
    shop: Gateway, agent: Agent, asked: dict[str, Any], units: int
) -> None:
    body = agent.invoke_body("m-1", asked, "chat")
    path = f"{API}/tools/api/actions/chat/invoke"
    quoted = await agent.http.post(path, json=body, headers={"Farebox-Quote": "x"})
    problem(quoted, "quote_mismatch")  # of an invoke there is none
    done = await agent.invoke(body, "chat")
    assert done.status_code == 200, done.text
    told = done.json()
    assert (told["price_credits"], told["charged_credits"]) == (5, units / 10_000)
    assert told["balance_credits"] == 500 - units / 10_000
    assert told["success"] is (units > 0)
    again = (await agent.invoke(body, "chat")).json()
    assert (again["charged_credits"], again["replayed"]) == (0, True)
    assert shop.balance(agent.wallet.address) == (5_000_000 - units, 0)
    # Its breakdown, which adds up, is told to who signs for the wallet.
    (hold,) = shop.rows("SELECT request_id FROM hold WHERE route LIKE '%/chat'")
    path = f"/farebox/v1/requests/{hold['request_id']}"
    read = await agent.http.get(path, headers=agent.wallet.sign("GET", shop.url + path))
    assert read.json()["charged_units"] == units
    assert sum(line["units"] for line in read.json()["breakdown"] or ()) == units


async def test_a_metered_action_is_paid_at_its_maximum_and_the_rest_stays(
    shop: Gateway, chain_session: Devnet
) -> None:
    wallet, path = new_wallet(chain_session), f"{API}/tools/api/actions/chat/invoke"
    asked = {"words": 10}
    async with shop.client() as http:
        offer = offers(await http.post(path, json=asked))[0]
        assert int(offer["amount"]) == MAX_UNITS
        done = await http.post(path, json=asked, headers={"X-PAYMENT": wallet.pay(offer)})
        assert done.status_code == 200, done.text
        assert done.json()["x402"]["payment"]["amount_base_units"] == str(MAX_UNITS)
        assert "charged_credits" not in done.json()
    assert shop.balance(wallet.address) == (MAX_UNITS - 1_600, 0)


async def test_a_price_by_parameters_is_that_of_the_signed_ones(
    shop: Gateway, agent: Agent
) -> None:
    for n, (parameters, charged) in enumerate([({"size": "large"}, 4), ({"size": "small"}, 1)]):
        body = agent.invoke_body(f"p-{n}", parameters, "image")
        told = (await agent.invoke(body, "image")).json()
        assert (told["price_credits"], told["charged_credits"]) == (charged, charged), told
    # The signature of the cheap one carries no dear one.
    body = agent.invoke_body("p-9", {"size": "small"}, "image") | {"parameters": {"size": "large"}}
    problem(await agent.invoke(body, "image"), "EXTERNAL_SIGNATURE_WALLET_MISMATCH")
    # Nor does the offer of the cheap one pay for the dear one.
    path = f"{API}/tools/api/actions/image/invoke"
    offer = offers(await agent.http.post(path, json={"size": "small"}))[0]
    header = {"X-PAYMENT": agent.wallet.pay(offer)}
    wrong = await agent.http.post(path, json={"size": "large"}, headers=header)
    problem(wrong, "invalid_payment_requirements")
    assert shop.balance(agent.wallet.address) == (4_950_000, 0)


async def test_a_metered_tool_costs_what_it_used(launch: Launch, chain_session: Devnet) -> None:
    by_call = '{ rule = "metered", max = "$0.05", when_unknown = "max", '
    by_call += 'rates = { bytes_out = "$0.001 / 1" } }'
    with SampleApi(make=mcp_server.build) as tools:
        shop = launch("sqlite", running=False, server={"settle_wait_s": 1})
        shop.chain_extra = f"""
[upstreams.tools]
kind = "mcp"
url = "{tools.url}/mcp"
mount = "/mcp"
tools = {{ search = {by_call} }}
"""
        shop.start()
        async with shop.client() as http:
            agent = Agent(http, new_wallet(chain_session), chain_session)
            await agent.buy()
            await agent.begin()
            path = "/external/tools/tools/actions/search/invoke"
            told = await http.post(
                f"/api{path}", json=agent.invoke_body("t", {"q": "x"}, path=path)
            )
            assert told.status_code == 200, told.text
            assert told.json()["price_credits"] == told.json()["charged_credits"] == 5
        assert shop.balance(agent.wallet.address) == (4_950_000, 0)


# -- the catalogue --------------------------------------------------------------------------------


async def _actions(http: httpx.AsyncClient) -> dict[str, Any]:
    (product,) = (await http.get(f"{API}/tools")).json()["tools"]
    return {action["action_slug"]: action["price_credits"] for action in product["actions"]}


async def test_the_catalogue_is_that_of_the_configuration(shop: Gateway, agent: Agent) -> None:
    http = agent.http
    assert await _actions(http) == {"chat": None, "image": None, "forecast": 5}
    kept = agent.invoke_body("r-kept", {})
    assert (await agent.invoke(kept)).json()["charged_credits"] == 5
    path = f"{API}/tools/api/actions/forecast/invoke"
    payer = new_wallet(shop.net)
    offer = offers(await http.post(path, json={}))[0]
    shop.routes = """[
      { match = "POST /forecast", price = "$0.07", slug = "forecast" },
      { match = "POST /new", price = "$0.02" },
    ]"""
    shop.write_config()
    assert shop.process is not None
    shop.process.signal(signal.SIGHUP)
    end = time.monotonic() + 60
    while await _actions(http) != {"forecast": 7, "new": 2}:
        assert time.monotonic() < end, await _actions(http)
        await asyncio.sleep(0.05)
    # What is new is sold, what is gone is not, and a repeat is one still.
    assert (await agent.invoke(agent.invoke_body("r-new", {}, "new"), "new")).status_code == 200
    problem(await agent.invoke(agent.invoke_body("r-old", {}, "chat"), "chat"), "not_found")
    told = (await agent.invoke(kept)).json()
    assert (told["charged_credits"], told["replayed"]) == (0, True)
    # A signed call pays the price that it may have read, and so does what was offered.
    told = (await agent.invoke(agent.invoke_body("r-after", {}))).json()
    assert told["charged_credits"] == 5
    paid = await http.post(path, json={}, headers={"X-PAYMENT": payer.pay(offer)})
    assert paid.json()["x402"]["payment"]["amount_base_units"] == "50000", paid.text
    assert int(offers(await http.post(path, json={}))[0]["amount"]) == 70_000
    assert shop.balance(agent.wallet.address) == (5_000_000 - 50_000 - 20_000 - 50_000, 0)


# -- purchases in two posts -----------------------------------------------------------------------


async def test_two_posts_of_json_buy_credits(shop: Gateway, chain_session: Devnet) -> None:
    """The same mechanism as that of our own purchase, each with ids of its own."""
    wallet, ours = new_wallet(chain_session), "/farebox/v1/credits/purchase"
    first = {"wallet_address": wallet.address, "credits": 500, "payment_method": "x402direct"}
    async with shop.client() as http:
        told = await http.post(f"{API}/credits/purchase", json=first)
        begun = told.json()
        payload = decode(wallet.pay(offers(told)[0]))["payload"]
        second = {"purchase_id": begun["purchase_id"], **payload}
        problem(await http.post(ours, json=second), "invalid_request")
        other = (await http.post(ours, json={"credits": 500})).json()["purchase_id"]
        wrong = {**second, "purchase_id": other}
        problem(await http.post(f"{API}/credits/purchase", json=wrong), "invalid_request")
        assert shop.payments(wallet.address) == []
        for _ in range(20):
            done = await http.post(f"{API}/credits/purchase", json=second)
            if done.status_code != 202:
                break
            assert done.json()["transaction_hash"].startswith("0x")
            chain_session.mine(9)
        assert done.status_code == 200, done.text
        assert (done.json()["minted"], done.json()["wallet_address"]) == (500, wallet.address)
        again = await http.post(f"{API}/credits/purchase", json=second)
        assert again.headers["farebox-replayed"] == "true"
        assert outcome(again)["transaction"] == outcome(done)["transaction"]
        # They are credits that the published messages spend.
        agent = Agent(http, wallet, chain_session)
        await agent.begin()
        told = await agent.invoke(agent.invoke_body("two-1", {}))
        assert told.json()["balance_credits"] == 495, told.text
    assert shop.transfers(wallet.address)[0] == ("mint", 5_000_000, "external")


# -- wallets that are made ------------------------------------------------------------------------


async def test_a_wallet_is_made_once_and_can_be_used(launch: Launch, chain_session: Devnet) -> None:
    behind = {"settle_wait_s": 1, "trusted_proxies": ["127.0.0.1"]}
    shop = launch("sqlite", running=False, routes=METERED, server=behind)
    shop.chain_extra = "\n[external]\nwallet_maker = true\n"
    shop.start()
    Account.enable_unaudited_hdwallet_features()
    async with shop.client() as http:
        from_one = {"X-Forwarded-For": "203.0.113.7"}
        answers = []
        for _ in range(60):  # five a minute, and a minute may pass meanwhile
            told = await http.post(f"{API}/agentaddress", json={}, headers=from_one)
            if told.status_code == 429:
                break
            answers.append(told)
        problem(told, "rate_limited")
        assert told.headers["retry-after"].isdigit()
        assert len(answers) >= 5
        assert {a.headers["cache-control"] for a in answers} == {"no-store"}
        made = [a.json() for a in answers]
        assert len({each["private_key"] for each in made}) == len(made)
        for each in made:
            assert each["success"] is True and each["address"] == each["wallet_address"]
            assert Account.from_key(each["private_key"]).address == each["address"]
            assert Account.from_mnemonic(each["mnemonic"]).address == each["address"]
            # Told once: neither the books nor the log have it.
            assert each["private_key"][2:] not in shop.log and each["mnemonic"] not in shop.log
        assert shop.rows("SELECT * FROM wallet") == []
        stored = b"".join(p.read_bytes() for p in shop.folder.glob("farebox.db*"))
        assert not any(each["private_key"][2:].encode() in stored for each in made)
        key = made[0]["private_key"]
        chain_session.transfer(
            chain_session.accounts[0].address, made[0]["address"].lower(), 5_000_000
        )
        agent = Agent(http, _wallet(made[0]["address"].lower(), key), chain_session)
        await agent.begin()
        assert (await agent.buy()).json()["minted"] == 500
        told = await agent.invoke(agent.invoke_body("w-1", {}))
        assert told.json()["balance_credits"] == 495, told.text


def _wallet(address: str, key: str) -> Wallet:
    from anvil.devnet import Account as Known

    return Wallet(Known(address, key, 0))


# -- the balance under our own prefix -------------------------------------------------------------


def _read(agent: Agent, shop: Gateway, path: str, request_id: str, **changed: Any) -> Any:
    """A strong body that asks for the balance; the payload of its message is empty."""
    terms = {"audience": shop.url, "ceiling": "-", "expires_at": int(time.time()) + 60, **changed}
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
        "payload:",
    )
    if terms["ceiling"] == "-":
        del terms["ceiling"]
    return {
        "wallet_address": agent.wallet.address,
        "session_nonce": agent.session,
        "request_id": request_id,
        "signature": signature,
        **terms,
    }


async def test_the_strong_form_reads_the_balance_under_both_prefixes(
    shop: Gateway, agent: Agent
) -> None:
    http, ours = agent.http, "/farebox/v1/credits/balance"
    theirs = f"{API}/credits/balance"
    signed = agent.wallet.sign("GET", shop.url + ours)
    expected = (await http.get(ours, headers=signed)).json()
    told = await http.post(ours, json=_read(agent, shop, ours, "b-1"))
    assert told.status_code == 200, told.text
    assert told.json() == expected
    assert expected["available_units"] == 5_000_000
    there = await http.post(theirs, json=_read(agent, shop, theirs, "b-2"))
    assert there.json()["balance_credits"] == 500
    code = "EXTERNAL_SIGNATURE_WALLET_MISMATCH"
    problem(await http.post(ours, json=_read(agent, shop, theirs, "b-3")), code)
    problem(await http.post(theirs, json=_read(agent, shop, ours, "b-4")), code)
    problem(await http.post(ours, json=agent.balance_body("b-5")), "identity_unsupported")
    late = _read(agent, shop, ours, "b-6", expires_at=int(time.time()) - 1)
    problem(await http.post(ours, json=late), "signature_expired")
    body = _read(agent, shop, ours, "b-7")
    problem(await http.post(f"{ours}?more=1", json=body), code)
    stranger = new_wallet(shop.net, 0)
    forged = {**body, "wallet_address": stranger.address}
    refused = await http.post(ours, json=forged)
    assert refused.status_code == 401, refused.text
    content = json.dumps(body).encode()
    both = agent.wallet.sign("POST", shop.url + ours, content)
    problem(await http.post(ours, content=content, headers=both), "identity_conflict")
    problem(await http.post(ours, content=b"{"), "identity_required")
