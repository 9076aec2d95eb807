"""Prices that change: quotes lock them, ceilings bound them, and nobody pays more than they saw."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from datetime import UTC, datetime, timedelta
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Launch
from tests.e2e.stage import Gateway
from tests.e2e.wallet import Wallet, buy, decode, offers, problem

ROUTES = """[
  {{ match = "GET /fixed/*", price = "{fixed}" }},
  {{ match = "POST /sized", price = {{ rule = "by_params", default = "$0.01", cases = [
    {{ body = {{ size = "large" }}, price = "{large}" }},
  ] }} }},
  {{ match = "GET /*", price = "$0.01" }},
]"""
MINTED = 1_000_000


def routes(fixed: str = "$0.02", large: str = "$0.05") -> str:
    return ROUTES.format(fixed=fixed, large=large)


async def quoted(http: httpx.AsyncClient, method: str, url: str, **more: Any) -> dict[str, Any]:
    wanted = {"method": method, "url": url, **more}
    answer = await http.post("/farebox/v1/quotes", content=json.dumps(wanted).encode())
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


async def call(
    http: httpx.AsyncClient, gateway: Gateway, wallet: Wallet, url: str, **headers: str
) -> httpx.Response:
    named = {f"Farebox-{name}": value for name, value in headers.items()}
    return await http.get(url, headers=wallet.sign("GET", gateway.url + url, headers=named))


def spent(gateway: Gateway, wallet: Wallet) -> int:
    available, held = gateway.balance(wallet.address)
    assert held == 0
    return MINTED - available


@pytest.mark.parametrize("dialect", ["sqlite", "postgres"])
async def test_a_raise_is_not_charged_to_who_may_have_read_the_price_before(
    launch: Launch, dialect: str, wallet: Wallet
) -> None:
    """Between two 402s, between quote and call, between signing and capture: over a restart."""
    gateway = launch(dialect, routes=routes("$0.02"), server={"quote_timeout_s": 600})
    async with gateway.client() as http:
        await buy(http, wallet)
        old_offer = offers(await http.get("/fixed/402"))[0]
        lock = await quoted(http, "GET", "/fixed/quoted")
        assert (lock["price_units"], lock["exact"]) == (20_000, True)
        assert lock["price_version"] == "flat:20000"
        early = wallet.sign("GET", gateway.url + "/fixed/early")
    gateway.stop()
    gateway.routes = routes("$0.03")
    gateway.start()
    async with gateway.client() as http:
        # What is shown is the new price ...
        assert (await quoted(http, "GET", "/fixed/quoted"))["price_units"] == 30_000
        shown = offers(await http.get("/fixed/402"))[0]
        assert (shown["amount"], old_offer["amount"]) == ("30000", "20000")
        # ... and what is charged is what may have been read.
        assert (await http.get("/fixed/early", headers=early)).status_code == 200
        assert spent(gateway, wallet) == 20_000
        assert (await call(http, gateway, wallet, "/fixed/later")).status_code == 200
        assert spent(gateway, wallet) == 40_000
        assert (
            await call(http, gateway, wallet, "/fixed/quoted", Quote=lock["quote"])
        ).status_code == 200
        assert spent(gateway, wallet) == 60_000
        paid = {"PAYMENT-SIGNATURE": wallet.pay(old_offer), "Farebox-Prefer": "settle"}
        answer = await http.get("/fixed/402", headers=paid)
        assert answer.status_code == 200
        assert decode(answer.headers["payment-response"])["success"] is True
        assert answer.headers["farebox-charged"] == "2"
        told = await http.get(
            "/farebox/v1/requests?route=api%20GET%20/fixed/*",
            headers=wallet.sign(
                "GET", gateway.url + "/farebox/v1/requests?route=api%20GET%20/fixed/*"
            ),
        )
        versions = {row["price_version"] for row in told.json()["requests"]}
        assert versions == {"flat:20000"}
    # The change becomes old: the books are told that it was made an hour ago.
    gateway.stop()
    gateway.change("UPDATE route_price SET since_ms = since_ms - 3600000")
    gateway.start()
    async with gateway.client() as http:
        before = spent(gateway, wallet)
        assert (await call(http, gateway, wallet, "/fixed/new")).status_code == 200
        assert spent(gateway, wallet) == before + 30_000
        # A quote holds over it.
        locked = await call(http, gateway, wallet, "/fixed/quoted", Quote=lock["quote"])
        assert locked.status_code == 200
        assert spent(gateway, wallet) == before + 50_000
        low = await call(http, gateway, wallet, "/fixed/new", Max="$0.02")
        problem(low, "price_above_ceiling")


async def test_a_quote_outlives_the_rule_it_is_of(launch: Launch, wallet: Wallet) -> None:
    """Its price hung on the body; the present one does not, so nothing of the body is looked at."""
    gateway = launch(routes=routes(), server={"quote_timeout_s": 600})
    body = b'{"size": "large"}'
    async with gateway.client() as http:
        await buy(http, wallet)
        lock = await quoted(http, "POST", "/sized", body=body.decode())
    gateway.stop()
    gateway.routes = '[{ match = "POST /sized", price = "$0.08" }]'
    gateway.start()  # notes the change
    gateway.stop()
    gateway.change("UPDATE route_price SET since_ms = since_ms - 3600000")
    gateway.start()
    async with gateway.client() as http:
        quote = {"Content-Type": "application/json", "Farebox-Quote": lock["quote"]}
        signed = wallet.sign("POST", gateway.url + "/sized", body, headers=quote)
        answer = await http.post("/sized", content=body, headers=signed)
        assert (answer.status_code, answer.headers["farebox-charged"]) == (200, "5"), answer.text


async def test_a_raise_by_another_route_is_a_raise(launch: Launch, wallet: Wallet) -> None:
    """A dearer route in front of the one whose price was read: at a SIGHUP, and over a restart."""
    gateway = launch(routes='[{ match = "GET /*", price = "$0.02" }]')
    paths = ("/new/signed", "/new/restarted", "/else")
    early = {path: wallet.sign("GET", gateway.url + path) for path in paths}
    dearer = """[{ match = "GET /new/*", price = "$0.05" }, { match = "GET /gone", price = "free" },
      { match = "GET /*", price = "$0.02" }]"""
    async with gateway.client() as http:
        await buy(http, wallet)
        assert offers(await http.get("/new/signed"))[0]["amount"] == "20000"
        gateway.routes = dearer
        gateway.write_config()
        assert gateway.process is not None
        gateway.process.signal(signal.SIGHUP)
        gateway.wait(lambda: "was read again" in gateway.log, "the new list")
        assert offers(await http.get("/new/signed"))[0]["amount"] == "50000"
        assert (await quoted(http, "GET", "/new/signed"))["price_units"] == 50_000
        answer = await http.get("/new/signed", headers=early["/new/signed"])
        assert answer.headers["farebox-charged"] == "2"
        told = f"/farebox/v1/requests/{answer.headers['farebox-request-id']}"
        receipt = (await http.get(told, headers=wallet.sign("GET", gateway.url + told))).json()
        assert receipt["price_version"] == "flat:20000"
        assert (await http.get("/else", headers=early["/else"])).headers["farebox-charged"] == "2"
        low = await call(http, gateway, wallet, "/new/low", Max="$0.01")
        problem(low, "price_above_ceiling")
    gateway.stop()
    gateway.start()
    async with gateway.client() as http:
        answer = await http.get("/new/restarted", headers=early["/new/restarted"])
        assert answer.headers["farebox-charged"] == "2"
        assert spent(gateway, wallet) == 60_000
    gateway.stop()
    gateway.change("UPDATE route_price SET since_ms = since_ms - 3600000")
    gateway.start()
    async with gateway.client() as http:
        assert (await call(http, gateway, wallet, "/new/x")).headers["farebox-charged"] == "5"


async def test_a_price_changes_at_its_time(launch: Launch, wallet: Wallet) -> None:
    begun = (datetime.now(UTC) - timedelta(hours=1)).isoformat(timespec="seconds")
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat(timespec="seconds")
    prices = f"""{{ rule = "scheduled", prices = [ {{ price = "$0.01" }},
      {{ from = "{begun}", price = "$0.02" }}, {{ from = {later}, price = "$0.04" }} ] }}"""
    gateway = launch(routes=f'[{{ match = "GET /*", price = {prices} }}]')
    async with gateway.client() as http:
        await buy(http, wallet)
        assert offers(await http.get("/x"))[0]["amount"] == "20000"
        assert (await call(http, gateway, wallet, "/x")).headers["farebox-charged"] == "2"
        (row,) = (await http.get("/farebox/v1/prices")).json()["prices"]
        assert (row["price_text"], row["price_version"]) == ("$0.02", "flat:20000")
        (change,) = row["price_changes"]
        assert change["price"]["price"] == "$0.04"
        assert change["from"] == later.replace("+00:00", "Z")
        told = await quoted(http, "GET", "/x")
        assert told["terms"] == {"rule": "flat", "price": "$0.02", "price_units": 20_000}


async def test_a_quote_is_for_its_request_and_its_time(launch: Launch, wallet: Wallet) -> None:
    gateway = launch(routes=routes(), server={"quote_timeout_s": 10})
    large, small = '{"size": "large"}', '{"size": "small"}'
    async with gateway.client() as http:
        await buy(http, wallet)
        lock = await quoted(http, "POST", "/sized", body=large)
        assert (lock["price_units"], lock["breakdown"]) == (
            50_000,
            [{"for": "call", "units": 50_000}],
        )
        assert (await quoted(http, "POST", "/sized", body=small))["price_units"] == 10_000
        assert (await quoted(http, "POST", "/sized"))["price_units"] == 50_000  # the dearest

        async def post(url: str, body: str, token: str | list[str]) -> httpx.Response:
            tokens = [token] if isinstance(token, str) else token
            headers = {"Content-Type": "application/json"}
            signed = wallet.sign("POST", gateway.url + url, body.encode(), headers=headers)
            pairs = [*signed.items(), *(("Farebox-Quote", each) for each in tokens)]
            return await http.post(url, content=body.encode(), headers=pairs)

        token = lock["quote"]
        assert (await post("/sized", large, token)).status_code == 200
        problem(await post("/sized", small, token), "quote_mismatch")
        problem(await post("/sized?x=1", large, token), "quote_mismatch")
        answer = await http.get("/fixed/x", headers={"Farebox-Quote": token})
        assert answer.status_code == 402  # nobody, so nothing is priced by it
        problem(await call(http, gateway, wallet, "/fixed/x", Quote=token), "quote_mismatch")
        changed = ("A" if token[0] != "A" else "B") + token[1:]
        letters = ascii_uppercase + ascii_lowercase + digits + "-_"
        for bad in (
            changed,
            token[:-1] + letters[letters.index(token[-1]) ^ 1],  # in its spare bits
            token + "=",
            token[:-1],
            token[:20],
            "x",
            "A" * 2_000,
        ):
            problem(await post("/sized", large, bad), "invalid_quote")
        problem(await post("/sized", large, [token, token]), "invalid_request")
        paid = wallet.pay(offers(await http.get("/fixed/twice"))[0])
        twice = [("PAYMENT-SIGNATURE", paid), ("Farebox-Quote", "a"), ("Farebox-Quote", "b")]
        problem(await http.get("/fixed/twice", headers=twice), "invalid_quote")
        assert spent(gateway, wallet) == 50_000
        late = wallet.sign("GET", gateway.url + "/fixed/late")
        lock = await quoted(http, "GET", "/fixed/late")
        end = time.monotonic() + 30
        while True:
            answer = await call(http, gateway, wallet, "/fixed/late", Quote=lock["quote"])
            if answer.status_code == 400 or time.monotonic() > end:
                break
            await asyncio.sleep(0.5)
        told = problem(answer, "quote_expired")
        assert told["next_actions"][0]["url"] == f"{gateway.url}/farebox/v1/quotes"
        # Signed while it held: judged by that.
        on_time = await http.get("/fixed/late", headers={**late, "Farebox-Quote": lock["quote"]})
        assert on_time.status_code == 200


@pytest.mark.parametrize(
    ("wanted", "code"),
    [
        ({}, "invalid_request"),
        ({"url": 5}, "invalid_request"),
        ({"url": "http://elsewhere.example/x"}, "invalid_request"),
        ({"url": "/x", "method": "get"}, "invalid_request"),
        ({"url": "/x", "method": "CONNECT"}, "invalid_request"),
        ({"url": "/x", "body": {"a": 1}}, "invalid_request"),
        ({"url": "/x", "more": 1}, "invalid_request"),
        ({"url": "/a/../b"}, "invalid_target"),
        ({"url": "/farebox/v1/quotes", "method": "POST"}, "not_found"),
    ],
)
async def test_what_cannot_be_quoted(
    sqlite_gateway: Gateway, wanted: dict[str, Any], code: str
) -> None:
    async with sqlite_gateway.client() as http:
        answer = await http.post("/farebox/v1/quotes", content=json.dumps(wanted).encode())
        problem(answer, code)
        whole = {"url": sqlite_gateway.url + "/cheap/x"}
        told = await http.post("/farebox/v1/quotes", content=json.dumps(whole).encode())
        assert told.json()["price_units"] == 2_000
