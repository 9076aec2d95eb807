"""A gateway dies in the middle of a call whose route says that it may be done again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.e2e.stage import PRICE_UNITS, Api, Gate, Gateway
from tests.e2e.wallet import Wallet, buy, offers, problem
from tests.gateway.proxy import misbehave
from tests.gateway.proxy.misbehave import Writer
from tests.servers import eventually

Launch = Callable[..., Gateway]
MINTED = 1_000_000
LEASE = {"hold_lease_s": 1}
ROUTES = """[
  { match = "* /again/*", price = "$0.01", retry_safe = true },
  { match = "* /*", price = "$0.01" },
]"""


async def the_nth_answer(writer: Writer, gate: Gate) -> bool:
    """A behaviour: says which call it was, once the gate is open."""
    number = gate.arrived
    await gate.wait()
    writer.write(misbehave.answer(b"call %d" % number))
    return True


async def die_during(
    gateway: Gateway, wallet: Wallet, target: str, headers: dict[str, str], gate: Gate
) -> None:
    """Ask, and kill the gateway while the upstream works. Nobody speaks for the hold any more."""
    before = gate.arrived
    async with gateway.client() as http:
        asking = asyncio.create_task(http.get(target, headers=headers))
        await eventually(lambda: gate.arrived == before + 1, "the call")
        gateway.kill()
        with pytest.raises(httpx.TransportError):
            await asking
    assert gateway.balance(wallet.address)[1] == PRICE_UNITS


def lapsed(gateway: Gateway, wallet: Wallet) -> Callable[[], bool]:
    return lambda: gateway.balance(wallet.address)[1] == 0


async def test_the_same_request_runs_again(
    dialect: str, launch: Launch, api: Api, wallet: Wallet
) -> None:
    gateway = launch(dialect, server=LEASE, routes=ROUTES)
    target = "/again/" + wallet.address
    gate = api.behave(target, the_nth_answer)
    async with gateway.client() as http:
        await buy(http, wallet)
    headers = wallet.sign("GET", gateway.url + target)
    for _ in range(2):  # it dies in the second run, too
        await die_during(gateway, wallet, target, headers, gate)
        gateway.start()
        gateway.wait(lapsed(gateway, wallet), "the hold to be void")
    gate.open()
    async with gateway.client() as http:
        answer = await http.get(target, headers=headers)
        assert (answer.status_code, answer.content) == (200, b"call 3")
        assert answer.headers["farebox-charged"] == "1"
        again = await http.get(target, headers=headers)
        assert (again.content, again.headers["farebox-replayed"]) == (b"call 3", "true")
        other = {**headers, "Content-Type": "text/plain"}
        problem(await http.get(target, headers=other), "request_id_conflict")
        request_id = answer.headers["farebox-request-id"]
        url = f"/farebox/v1/requests/{request_id}"
        told = (await http.get(url, headers=wallet.sign("GET", gateway.url + url))).json()
    assert [call["state"] for call in told["calls"]] == ["charged", "not_charged", "not_charged"]
    assert [call["reason"] for call in told["calls"]] == [None, "interrupted", "interrupted"]
    assert (told["state"], told["charged_units"]) == ("charged", PRICE_UNITS)
    assert {r.header(b"farebox-request-id")[0].decode() for r in api.seen(target)} == {request_id}
    assert gate.arrived == 3
    assert gateway.transfers(wallet.address)[1:] == [
        ("void", 0, "interrupted"),
        ("void", 0, "interrupted"),
        ("capture", PRICE_UNITS, None),
    ]


async def test_until_its_lease_is_over_it_may_still_be_running(
    launch: Launch, api: Api, wallet: Wallet
) -> None:
    """For all another process knows. (On SQLite a start ends the leases of the dead.)"""
    gateway = launch("postgres", routes=ROUTES)
    target = "/again/" + wallet.address
    gate = api.behave(target, the_nth_answer)
    async with gateway.client() as http:
        await buy(http, wallet)
    headers = wallet.sign("GET", gateway.url + target)
    await die_during(gateway, wallet, target, headers, gate)
    gateway.start()
    async with gateway.client() as http:
        problem(await http.get(target, headers=headers), "request_in_progress")
    assert gate.arrived == 1
    gate.open()


async def test_repeats_on_two_nodes_start_it_once(launch: Launch, api: Api, wallet: Wallet) -> None:
    # One origin for all: a signature is for the gateway, not for one of its nodes.
    server: dict[str, Any] = {**LEASE, "public_url": "http://farebox.test"}
    dying = launch("postgres", server=server, routes=ROUTES)
    left = launch("postgres", server=server, routes=ROUTES, beside=dying)
    right = launch("postgres", server=server, routes=ROUTES, beside=dying)
    target = "/again/" + wallet.address
    gate = api.behave(target, the_nth_answer)
    async with left.client() as http:
        await buy(http, wallet)
    headers = wallet.sign("GET", server["public_url"] + target)
    await die_during(dying, wallet, target, headers, gate)
    left.wait(lapsed(left, wallet), "the hold to be void")
    async with left.client() as one, right.client() as other:
        asking = [
            asyncio.create_task((one, other)[n % 2].get(target, headers=headers)) for n in range(30)
        ]
        await eventually(lambda: gate.arrived == 2, "the second run")
        await eventually(lambda: sum(task.done() for task in asking) == 29, "the refusals")
        gate.open()
        answers = await asyncio.gather(*asking)
        (ran,) = [answer for answer in answers if answer.status_code == 200]
        assert ran.content == b"call 2"
        for answer in answers:
            if answer is not ran:
                problem(answer, "request_in_progress")
        for http in (one, other):
            again = await http.get(target, headers=headers)
            assert (again.content, again.headers["farebox-replayed"]) == (b"call 2", "true")
    assert gate.arrived == 2
    assert left.transfers(wallet.address)[1:] == [
        ("void", 0, "interrupted"),
        ("capture", PRICE_UNITS, None),
    ]


async def test_a_payment_pays_for_the_run_that_ends(
    dialect: str, launch: Launch, api: Api, wallet: Wallet
) -> None:
    """The first presenter's payment is taken once, whatever becomes of the gateway."""
    gateway = launch(dialect, server=LEASE, routes=ROUTES)
    target = "/again/" + wallet.address
    gate = api.behave(target, the_nth_answer)
    async with gateway.client() as http:
        paid = {"PAYMENT-SIGNATURE": wallet.pay(offers(await http.get(target))[0])}
    await die_during(gateway, wallet, target, paid, gate)
    gateway.start()
    gateway.wait(lapsed(gateway, wallet), "the hold to be void")
    gate.open()
    async with gateway.client() as http:
        answer = await http.get(target, headers=paid)
        assert (answer.status_code, answer.content) == (200, b"call 2")
    assert gateway.sent() == 1
    assert gateway.transfers(wallet.address) == [
        ("mint", PRICE_UNITS, "x402"),
        ("void", 0, "interrupted"),
        ("capture", PRICE_UNITS, None),
    ]


async def test_other_routes_say_that_the_outcome_is_unknown(
    launch: Launch, api: Api, wallet: Wallet, target: str
) -> None:
    gateway = launch("sqlite", server=LEASE, routes=ROUTES)
    gate = api.behave(target, the_nth_answer)
    async with gateway.client() as http:
        await buy(http, wallet)
    headers = wallet.sign("GET", gateway.url + target)
    await die_during(gateway, wallet, target, headers, gate)
    gateway.start()
    gateway.wait(lapsed(gateway, wallet), "the hold to be void")
    gate.open()
    async with gateway.client() as http:
        told = problem(await http.get(target, headers=headers), "outcome_unknown")
        (action,) = told["next_actions"]
        assert (action["method"], action["url"]) == ("GET", gateway.url + target)
        fresh = await http.get(target, headers=wallet.sign("GET", gateway.url + target))
    assert fresh.content == b"call 2"
    assert gate.arrived == 2
