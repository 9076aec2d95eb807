"""One price table: the list, the 402, the receipt and the command say the same, also when it is
read again."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Callable
from typing import Any

import httpx

from gateway.money import format_usd
from tests import servers
from tests.e2e.chat import Chat
from tests.e2e.stage import Api, Gateway
from tests.e2e.test_nodes import workers_of
from tests.e2e.wallet import Wallet, buy, offers, problem

Launch = Callable[..., Gateway]
METERED = (
    'rule = "metered", max = "MAX", when_unknown = "max",'
    ' rates = { tokens_in = "$1 / 1M", tokens_out = "$100 per 1M tokens" }'
)


def routes(cheap: str, most: str) -> str:
    metered = METERED.replace("MAX", most)
    return f"""[
  {{ match = "GET /free/*", price = "free" }},
  {{ match = "GET /cheap/*", price = "{cheap}", description = "cheap things" }},
  {{ match = "POST /chat/*", price = {{ {metered} }} }},
]"""


def told_by_command(gateway: Gateway) -> list[dict[str, Any]]:
    """What ``farebox routes --json`` says."""
    told = subprocess.run(
        servers.own_program(["farebox", "routes", "--json", "--config", str(gateway.config)]),
        capture_output=True,
        text=True,
        env=servers.child_env(),
        check=True,
    )
    return [json.loads(line) for line in told.stdout.splitlines()]


async def listed(http: httpx.AsyncClient) -> dict[str, Any]:
    answer = await http.get("/farebox/v1/prices")
    assert answer.status_code == 200
    body: dict[str, Any] = answer.json()
    assert "127.0.0.1" not in answer.text  # where it comes from is nobody's business
    return {row["path"]: row for row in body["prices"]} | {"packs": body["packs"]}


async def same_everywhere(  # noqa: PLR0917  (what is shown, what is asked, what is held)
    http: httpx.AsyncClient,
    gateway: Gateway,
    wallet: Wallet,
    chat: Chat,
    shown: tuple[int, int],
    held: tuple[int, int],
) -> None:
    """``shown`` and ``held``: the flat price and the most of the metered one. Just after a raise
    they differ: a signed call was perhaps made after reading the prices before."""
    cheap, most = shown
    rows = await listed(http)
    assert rows["/cheap/*"]["usd"] == format_usd(cheap)
    assert (rows["/cheap/*"]["units"], rows["/cheap/*"]["at_most"]) == (cheap, False)
    assert rows["/cheap/*"]["description"] == "cheap things"
    assert (rows["/chat/*"]["units"], rows["/chat/*"]["at_most"]) == (most, True)
    assert rows["/free/*"]["price_text"] == "free"
    by_command = told_by_command(gateway)
    assert [row["price"] for row in by_command] == [
        rows[path]["price"] for path in ("/free/*", "/cheap/*", "/chat/*")
    ]
    unpaid = await http.get("/cheap/x")
    assert problem(unpaid, "payment_required")["credits"]["price_units"] == cheap
    assert offers(await http.post("/chat/x"))[0]["amount"] == str(max(most, 10_000))
    path = f"/cheap/{wallet.address}{cheap}"
    paid = await http.get(path, headers=wallet.sign("GET", gateway.url + path))
    assert paid.headers["farebox-charged"] == f"{held[0] / 10_000:g}"
    body = b'{"words": 3}'
    kind = {"content-type": "application/json"}
    signed = wallet.sign("POST", gateway.url + "/chat/x", body, headers=kind)
    asked = await http.post("/chat/x", content=body, headers=signed)
    target = f"/farebox/v1/requests/{asked.headers['farebox-request-id']}"
    receipt = (await http.get(target, headers=wallet.sign("GET", gateway.url + target))).json()
    assert receipt["held_units"] == held[1]
    assert receipt["charged_units"] == 1_300
    price = receipt["audit"]["price"]
    assert receipt["price_version"] == price["version"]
    if shown == held:
        assert price["version"] == rows["/chat/*"]["price_version"]
        assert price["terms"] == rows["/chat/*"]["price"]
    else:
        now, before = price["lowest_of"]
        assert (now["terms"]["max_units"], before["terms"]["max_units"]) == (most, held[1])
        assert now["version"] == rows["/chat/*"]["price_version"]
    assert len(chat.requests) > 0


async def test_prices_change_everywhere_at_once(
    dialect: str, launch: Launch, api: Api, wallet: Wallet
) -> None:
    gateway = launch(dialect, routes=routes("$0.002", "$0.05"))
    chat = Chat(api, "/chat/x")
    async with gateway.client() as http:
        await buy(http, wallet)
        await same_everywhere(http, gateway, wallet, chat, (2_000, 50_000), (2_000, 50_000))
        offer = offers(await http.get("/cheap/kept"))[0]
        gateway.routes = routes("$0.003", "$0.06")
        gateway.write_config()
        await reloaded(http, gateway, 3_000)
        await same_everywhere(http, gateway, wallet, chat, (3_000, 60_000), (2_000, 50_000))
        # What was offered before is payable as it was offered.
        headers = {"PAYMENT-SIGNATURE": wallet.pay(offer), "farebox-prefer": "settle"}
        kept = await http.get("/cheap/kept", headers=headers)
        assert kept.headers["farebox-charged"] == "0.2"


async def test_a_raise_is_shown_at_once_by_the_wallet_api(launch: Launch) -> None:
    """While those who may have read the price before still pay that."""
    gateway = launch(routes='[{ match = "GET /one", price = "$0.01" }]')
    gateway.routes = '[{ match = "GET /one", price = "$0.03" }]'
    gateway.write_config()
    async with gateway.client() as http:
        await reloaded(http, gateway, 30_000)  # at once after the start, and it lives
        told = await http.get("/api/external/tools")
        assert told.headers["cache-control"] == "no-cache"
        (action,) = told.json()["tools"][0]["actions"]
        assert action["price_credits"] == 3
        assert action["price"] == (await listed(http))["/one"]["price"]


async def reloaded(http: httpx.AsyncClient, gateway: Gateway, cheap: int) -> None:
    assert gateway.process is not None
    gateway.process.signal(signal.SIGHUP)

    def now() -> bool:
        asked = httpx.get(f"{gateway.url}/farebox/v1/prices", trust_env=False).json()
        return any(row.get("units") == cheap for row in asked["prices"])

    gateway.wait(now, "the new prices")


async def test_a_configuration_with_a_fault_changes_nothing(
    launch: Launch, api: Api, wallet: Wallet
) -> None:
    gateway = launch("sqlite", routes=routes("$0.002", "$0.05"))
    async with gateway.client() as http:
        before = await listed(http)
        for fault in (
            routes("$0.002", "$0"),
            routes("0.0000001", "$1"),
            "[ nonsense",
        ):
            told = gateway.log.count("was not read again")
            gateway.routes = fault
            gateway.write_config()
            assert gateway.process is not None
            gateway.process.signal(signal.SIGHUP)
            gateway.wait(lambda n=told: gateway.log.count("was not read again") > n, "the refusal")
            assert await listed(http) == before
        # What needs a restart is said, and the rest is taken.
        gateway.routes = routes("$0.004", "$0.05")
        gateway.server = {"stop_s": 3}
        gateway.write_config()
        await reloaded(http, gateway, 4_000)
        assert "only in force after a restart: ['server']" in gateway.log


async def test_every_worker_has_the_new_prices(
    launch: Launch, redis_url: str, wallet: Wallet
) -> None:
    server = {"workers": 3, "redis": redis_url}
    gateway = launch("postgres", routes=routes("$0.002", "$0.05"), server=server)
    first = workers_of(gateway)
    gateway.routes = routes("$0.003", "$0.05")
    gateway.write_config()
    assert gateway.process is not None
    os.kill(gateway.process.pid, signal.SIGHUP)  # the parent alone, as an operator would
    gateway.wait(lambda: gateway.log.count("was read again") == 3, "three workers")
    # One that takes the place of a dead one begins with them.
    victim = min(first)
    os.kill(victim, signal.SIGKILL)
    gateway.wait(
        lambda: len(workers_of(gateway)) == 3 and victim not in workers_of(gateway), "another one"
    )
    for _ in range(30):
        async with gateway.client() as http:
            assert (await listed(http))["/cheap/*"]["units"] == 3_000


async def test_a_call_that_has_begun_goes_on_where_it_was_matched(
    launch: Launch, api: Api, wallet: Wallet
) -> None:
    gateway = launch("sqlite", routes=routes("$0.002", "$0.05"))
    Chat(api, "/chat/x")
    body = b'{"words": 3}'
    async with gateway.client() as http:
        await buy(http, wallet)
        kind = {"content-type": "application/json"}
        signed = wallet.sign("POST", gateway.url + "/chat/x", body, headers=kind)
        signed |= {"content-length": str(len(body)), "connection": "close", "host": "x"}
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        head = "".join(f"{name}: {value}\r\n" for name, value in signed.items())
        writer.write(f"POST /chat/x HTTP/1.1\r\n{head}\r\n".encode() + body[:5])
        await writer.drain()
        assert (await http.get("/free/begun")).status_code == 200  # its head has been read by now
        gateway.routes = routes("$0.003", "$0.05")
        gateway.write_config()
        text = gateway.config.read_text().replace("[upstreams.api]", "[upstreams.new]")
        gateway.config.write_text(text)
        await reloaded(http, gateway, 3_000)
        writer.write(body[5:])
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        assert answer.startswith(b"HTTP/1.1 200"), answer
        assert b"farebox-charged: 0.13\r\n" in answer
