"""Runs: what a named group of calls cost, and the list of an account's calls."""

from __future__ import annotations

import asyncio
import csv
import io
import secrets
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.e2e.stage import CHEAP_UNITS, PRICE_UNITS, Api, Gateway, answer_when_open
from tests.e2e.wallet import Wallet, buy, new_wallet, offers, problem

MINTED = 1_000_000


async def ask(
    http: httpx.AsyncClient, gateway: Gateway, wallet: Wallet, target: str, run: str = ""
) -> httpx.Response:
    named = {"Farebox-Run": run} if run else {}
    return await http.get(target, headers=wallet.sign("GET", gateway.url + target, headers=named))


async def read(
    http: httpx.AsyncClient, gateway: Gateway, wallet: Wallet, path: str
) -> httpx.Response:
    url = "/farebox/v1/" + path
    return await http.get(url, headers=wallet.sign("GET", gateway.url + url))


async def test_a_run_is_what_its_calls_are(
    gateway: Gateway, api: Api, wallet: Wallet, target: str, cheap: str
) -> None:
    """The sum of the rows is the total of the run, and both are what the balance lost."""
    run = "nightly:" + secrets.token_hex(4)
    gate = api.behave(target + "/open", answer_when_open)
    async with gateway.client() as http:
        await buy(http, wallet)
        for path in (target, cheap, cheap + "/2"):
            assert (await ask(http, gateway, wallet, path, run)).status_code == 200
        assert (await ask(http, gateway, wallet, "/500", run)).status_code == 502
        assert (await ask(http, gateway, wallet, target + "/none")).status_code == 200
        assert (await ask(http, gateway, wallet, target + "/other", "other")).status_code == 200
        running = asyncio.create_task(ask(http, gateway, wallet, target + "/open", run))
        while not gate.arrived:
            await asyncio.sleep(0.02)

        told = (await read(http, gateway, wallet, f"runs/{run}")).json()
        assert told == {
            "run": run,
            "calls": 5,
            "calls_charged": 3,
            "calls_not_charged": 1,
            "calls_pending": 1,
            "total": "1.4",
            "total_units": PRICE_UNITS + 2 * CHEAP_UNITS,
            "charged": "1.4",
            "charged_units": PRICE_UNITS + 2 * CHEAP_UNITS,
            "refunded": "0",
            "refunded_units": 0,
            "held": "1",
            "held_units": PRICE_UNITS,
            "first_at_ms": told["first_at_ms"],
            "last_at_ms": told["last_at_ms"],
        }
        gate.open()
        assert (await running).status_code == 200
        rows = (await read(http, gateway, wallet, f"requests?run={run}")).json()["requests"]
        told = (await read(http, gateway, wallet, f"runs/{run}")).json()
        assert {row["run"] for row in rows} == {run}
        assert [row["state"] for row in rows].count("charged") == told["calls_charged"] == 4
        assert sum(row["charged_units"] for row in rows) == told["total_units"]
        spent = told["total_units"] + 2 * PRICE_UNITS
        assert gateway.balance(wallet.address) == (MINTED - spent, 0)
        failed = next(row for row in rows if row["state"] == "not_charged")
        assert (failed["reason"], failed["target"]) == ("upstream_status_500", "/500")
        assert failed["duration_ms"] >= 0


async def test_pages_and_tables_of_calls(gateway: Gateway, wallet: Wallet, target: str) -> None:
    run = secrets.token_hex(4)
    async with gateway.client() as http:
        await buy(http, wallet)
        for n in range(5):
            named = run if n % 2 == 0 else ""
            assert (await ask(http, gateway, wallet, f"{target}/{n}", named)).status_code == 200

        async def pages(query: str) -> list[Any]:
            found, cursor = [], ""
            while True:
                page = (
                    await read(http, gateway, wallet, f"requests?limit=2{query}{cursor}")
                ).json()
                found += page["requests"]
                if page["next_cursor"] is None:
                    return found
                cursor = f"&cursor={page['next_cursor']}"

        every = await pages("")
        assert [row["target"][-1] for row in every] == ["4", "3", "2", "1", "0"]
        mine = await pages(f"&run={run}")
        assert [row["target"][-1] for row in mine] == ["4", "2", "0"]
        assert mine == [row for row in every if row["run"] == run]

        table = await read(http, gateway, wallet, f"requests?run={run}&limit=2&format=csv")
        assert table.headers["content-type"].startswith("text/csv")
        rows = list(csv.DictReader(io.StringIO(table.text)))
        for row in rows:  # one that begins with a hyphen would be run as a formula
            row["request_id"] = row["request_id"].removeprefix("'")
        shown = [{name: "" if v is None else str(v) for name, v in row.items()} for row in mine[:2]]
        assert rows == shown
        link = table.headers["link"]
        assert link.endswith('>; rel="next"')
        rest = link.removeprefix(f"<{gateway.url}/farebox/v1/").removesuffix('>; rel="next"')
        last = list(csv.DictReader(io.StringIO((await read(http, gateway, wallet, rest)).text)))
        assert [row["target"] for row in last] == [mine[2]["target"]]


async def test_a_run_belongs_to_its_account(
    sqlite_gateway: Gateway, wallet: Wallet, target: str
) -> None:
    gateway, other = sqlite_gateway, new_wallet(sqlite_gateway.net)
    async with gateway.client() as http:
        await buy(http, wallet)
        await buy(http, other)
        for each in (wallet, wallet, other):
            await ask(http, gateway, each, target, "shared-name")
        mine = (await read(http, gateway, wallet, "runs/shared-name")).json()
        theirs = (await read(http, gateway, other, "runs/shared-name")).json()
        assert (mine["calls"], theirs["calls"]) == (2, 1)
        nobody = new_wallet(gateway.net, 0)
        told = problem(await read(http, gateway, nobody, "runs/shared-name"), "not_found")
        assert told["next_actions"]
        assert (await read(http, gateway, nobody, "requests")).json() == {
            "requests": [],
            "next_cursor": None,
        }
        for path in ("runs/shared-name", "requests", "requests?run=shared-name"):
            problem(await http.get("/farebox/v1/" + path), "identity_required")


async def test_a_covered_run_is_fixed_an_uncovered_one_is_a_label(
    sqlite_gateway: Gateway, wallet: Wallet, target: str
) -> None:
    gateway, url = sqlite_gateway, sqlite_gateway.url + target
    async with gateway.client() as http:
        await buy(http, wallet)
        covered = wallet.sign("GET", url, headers={"Farebox-Run": "mine"})
        moved = {**covered, "Farebox-Run": "theirs"}
        problem(await http.get(target, headers=moved), "signature_invalid")
        dropped = {name: v for name, v in covered.items() if name != "Farebox-Run"}
        problem(await http.get(target, headers=dropped), "signature_invalid")
        assert (await http.get(target, headers=covered)).status_code == 200
        label = wallet.sign("GET", url) | {"Farebox-Run": "label"}
        assert (await http.get(target, headers=label)).status_code == 200
        # As everything else that was asked, it is part of what a request id stands for.
        problem(
            await http.get(target, headers={**label, "Farebox-Run": "b"}), "request_id_conflict"
        )
        for run in ("mine", "label"):
            assert (await read(http, gateway, wallet, f"runs/{run}")).json()["calls"] == 1
        for run in ("theirs", "b"):
            problem(await read(http, gateway, wallet, f"runs/{run}"), "not_found")


async def test_a_paid_call_may_be_of_a_run_and_a_bad_name_costs_nothing(
    gateway: Gateway, wallet: Wallet, target: str
) -> None:
    async with gateway.client() as http:
        offer = offers(await http.get(target))[0]
        paid = {"PAYMENT-SIGNATURE": wallet.pay(offer)}
        for bad in ("", "a b", "a/b", "-a", "x" * 129, "ä"):
            named = [(b"Farebox-Run", bad.encode())]
            named += [(name.encode(), value.encode()) for name, value in paid.items()]
            problem(await http.get(target, headers=named), "invalid_request")
        twice = [*paid.items(), ("Farebox-Run", "a"), ("Farebox-Run", "b")]
        problem(await http.get(target, headers=twice), "invalid_request")
        assert gateway.payments(wallet.address) == []  # refused before any money moved
        assert (await http.get(target, headers={**paid, "Farebox-Run": "once"})).status_code == 200
        told = (await read(http, gateway, wallet, "runs/once")).json()
    assert (told["calls"], told["total_units"]) == (1, PRICE_UNITS)


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "cursor=x", "format=xml", "run=a%20b"])
async def test_a_list_that_cannot_be_asked_for(
    query: str, sqlite_gateway: Gateway, wallet: Wallet
) -> None:
    async with sqlite_gateway.client() as http:
        answer = await read(http, sqlite_gateway, wallet, f"requests?{query}")
    assert problem(answer, "invalid_request")["next_actions"]


async def test_one_call_is_audited_down_to_the_chain(
    gateway: Gateway, wallet: Wallet, cheap: str
) -> None:
    async with gateway.client() as http:
        offer = offers(await http.get(cheap))[0]
        await http.get(cheap, headers={"PAYMENT-SIGNATURE": wallet.pay(offer)})
        signed = await ask(http, gateway, wallet, cheap)
        request_id = signed.headers["farebox-request-id"]
        told = (await read(http, gateway, wallet, f"requests/{request_id}")).json()
        (payment,) = gateway.payments(wallet.address)
        lot = (await read(http, gateway, wallet, "credits/lots")).json()["lots"][0]["id"]
    audit = told["audit"]
    assert told["calls"][0]["audit"] == audit
    assert (told["wallet"], told["scheme"]) == (wallet.address, "erc8128")
    assert told["price_version"] == f"flat:{CHEAP_UNITS}"
    since_ms = audit["price"].pop("since_ms")
    assert since_ms <= told["started_at_ms"]
    assert audit["price"] == {
        "version": f"flat:{CHEAP_UNITS}",
        "terms": {"rule": "flat", "price": "$0.002", "price_units": CHEAP_UNITS},
    }
    (entry,) = audit["entries"]
    assert (entry["kind"], entry["amount_units"]) == ("capture", CHEAP_UNITS)
    assert entry["balance_units"] == PRICE_UNITS - 2 * CHEAP_UNITS
    assert audit["paid_with"] == [
        {
            "lot": lot,
            "source": "x402",
            "payer": wallet.address,
            "amount": "0.2",
            "amount_units": CHEAP_UNITS,
            "refunded": "0",
            "refunded_units": 0,
            "payment_id": payment["id"],
            "network": "eip155:84532",
            "reference": payment["tx_hash"],
            "explorer": f"https://sepolia.basescan.org/tx/{payment['tx_hash']}",
        }
    ]
    assert gateway.net.receipt(payment["tx_hash"])["status"] == "0x1"


async def test_filters_and_the_statement_as_a_table(
    gateway: Gateway, wallet: Wallet, target: str
) -> None:
    async with gateway.client() as http:
        await buy(http, wallet)
        assert (await ask(http, gateway, wallet, target)).status_code == 200
        assert (await ask(http, gateway, wallet, "/500")).status_code == 502

        async def rows(path: str, name: str) -> list[Any]:
            found: list[Any] = (await read(http, gateway, wallet, path)).json()[name]
            return found

        every = await rows("requests", "requests")
        failed, paid = every
        assert await rows("requests?state=not_charged", "requests") == [failed]
        route = quote(paid["route"])
        assert await rows(f"requests?state=charged&route={route}", "requests") == [paid]
        assert await rows(f"requests?wallet={wallet.address.upper()}", "requests") == every
        assert await rows("requests?wallet=0x" + "0" * 40, "requests") == []
        started = paid["started_at_ms"]
        assert paid in await rows(f"requests?from={started}", "requests")
        assert paid not in await rows(f"requests?to={started}", "requests")
        assert await rows("requests?from=2026-01-01T00:00:00Z", "requests") == every
        lines = await rows("credits/transactions", "transactions")
        assert [line["type"] for line in lines] == ["usage", "usage", "purchase"]
        assert lines[1]["description"] == f"GET {target}"
        assert await rows("credits/transactions?type=purchase", "transactions") == lines[2:]
        table = await read(http, gateway, wallet, "credits/transactions?format=csv&limit=2")
        got = list(csv.DictReader(io.StringIO(table.text)))
        assert [(row["type"], row["amount_units"]) for row in got] == [
            ("usage", "0"),
            ("usage", str(-PRICE_UNITS)),
        ]
        assert 'rel="next"' in table.headers["link"]


@pytest.mark.parametrize(
    "query",
    [
        *("requests?state=paid", "requests?from=yesterday", "requests?to=2026-01-01T00:00:00"),
        *("requests?color=red", "requests?limit=1&limit=2", "credits/transactions?type=x"),
        *("credits/transactions?form=csv", "credits/transactions?from=-1", "requests?to=1e3"),
    ],
)
async def test_a_filter_that_is_not_one_is_refused(
    query: str, sqlite_gateway: Gateway, wallet: Wallet
) -> None:
    """Answered as if it were not there, it would be taken for applied."""
    async with sqlite_gateway.client() as http:
        problem(await read(http, sqlite_gateway, wallet, query), "invalid_request")
