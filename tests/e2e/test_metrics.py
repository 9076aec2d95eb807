"""``/metrics``: true numbers for the operator alone, and nothing in them that is anybody's."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import signal
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from gateway import serve
from gateway.forms import Listen
from gateway.settings import Server
from tests import servers
from tests.e2e.stage import Gateway, answer_when_open
from tests.e2e.test_nodes import workers_of
from tests.e2e.wallet import Wallet, buy, new_wallet

Launch = Callable[..., Gateway]
TOKEN = "what-only-the-operator-of-it-knows"
ANY_PORT = {"admin_listen": "127.0.0.1:0"}
_LINE = re.compile(r"(?P<name>farebox_[a-z_0-9]+)(?:\{(?P<labels>[^{}]*)\})? (?P<value>-?[0-9]+)")
_LABEL = re.compile(r'([a-z_]+)="((?:[^"\\]|\\.)*)"')


def read(text: str) -> dict[str, dict[frozenset[tuple[str, str]], int]]:
    """The exposition, by name and labels. Fails on anything that Prometheus would not take."""
    found: dict[str, dict[frozenset[tuple[str, str]], int]] = {}
    kinds: dict[str, str] = {}
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# HELP "):
            assert line.split(" ", 3)[3]
        elif line.startswith("# TYPE "):
            name, kind = line.split()[2:]
            assert name not in kinds and kind in ("counter", "gauge"), line
            assert (kind == "counter") == name.endswith("_total"), line
            kinds[name] = kind
        else:
            match = _LINE.fullmatch(line)
            assert match is not None, line
            assert match["name"] in kinds, line
            labels = frozenset(_LABEL.findall(match["labels"] or ""))
            values = found.setdefault(match["name"], {})
            assert labels not in values, line
            values[labels] = int(match["value"])
    return found


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.05)


class Door:
    """The operator's listener of a gateway."""

    def __init__(self, gateway: Gateway, token: str | None = None) -> None:
        assert gateway.process is not None
        line = gateway.process.wait_for(r'\{"ready": true.*\}').group(0)
        self.url = f"http://{json.loads(line)['admin']}/metrics"
        self.token = token

    def get(self, **options: Any) -> httpx.Response:
        headers = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        return httpx.get(self.url, headers=headers, trust_env=False, timeout=30, **options)

    def text(self) -> str:
        answer = self.get()
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        return answer.text

    def value(self, name: str, **labels: str) -> int:
        return read(self.text())[f"farebox_{name}"][frozenset(labels.items())]


async def becomes(door: Door, wanted: int, name: str, **labels: str) -> None:
    """Answers are kept for a second."""
    await until(lambda: door.value(name, **labels) == wanted)


@pytest.mark.parametrize("dialect", ["sqlite", "postgres"])
async def test_what_happened_is_told(launch: Launch, api: Any, dialect: str) -> None:
    gateway = launch(dialect, server=ANY_PORT, running=False)
    gateway.chain_extra = 'gas_per_hour = "1"'
    gateway.start()
    door, wallet = Door(gateway), new_wallet(gateway.net)
    path = f"/v1/{secrets.token_hex(8)}"
    gate = api.behave(f"/v1/{(slow := secrets.token_hex(8))}", answer_when_open)
    async with gateway.client() as http:
        assert (await http.get(path)).status_code == 402
        await buy(http, wallet)
        headers = wallet.sign("GET", gateway.url + path)
        assert (await http.get(path, headers=headers)).status_code == 200
        assert (await http.get(path, headers=headers)).headers["farebox-replayed"] == "true"
        assert (await http.get(f"{path}/other", headers=headers)).status_code == 401
        asks = wallet.sign("GET", gateway.url + "/402")
        assert (await http.get("/402", headers=asks)).status_code == 502
        fails = wallet.sign("GET", gateway.url + "/reset")
        assert (await http.get("/reset", headers=fails)).status_code == 502
        running = http.get(
            f"/v1/{slow}", headers=wallet.sign("GET", f"{gateway.url}/v1/{slow}"), timeout=60
        )
        task = asyncio.create_task(running)
        await until(lambda: gate.arrived == 1)
        await becomes(door, 1, "holds_open")
        gate.open()
        assert (await task).status_code == 200
    await becomes(door, 0, "holds_open")
    for outcome, number in (("paid", 2), ("unpaid", 1), ("replayed", 1), ("uncharged", 2)):
        assert door.value("requests_total", outcome=outcome) == number, outcome
    assert door.value("requests_total", outcome="refused") == 1
    assert door.value("oddity_total", kind="upstream_wants_payment") == 1
    assert door.value("settlements_total", outcome="succeeded") == 1
    network = "eip155:84532"
    assert door.value("gas_spent_gwei_total", network=network) > 0
    assert door.value("gas_last_hour_gwei", network=network) > 0
    assert door.value("gas_per_hour_gwei", network=network) == 10**9
    assert door.value("payments_pending", provider="x402") == 0
    assert door.value("gas_account_state", network=network, account="1", state="ok") == 1
    assert door.value("rpc_breaker_open", network=network, provider="1") == 0
    assert door.value("database_up") == 1


def test_what_a_comparison_found(launch: Launch) -> None:
    gateway = launch(server={**ANY_PORT, "reconcile_s": 1})
    door = Door(gateway)
    labels = {"comparison": "outside", "where": "stripe"}

    def found() -> int | None:
        known = read(door.text())["farebox_differences"] if "differences{" in door.text() else {}
        return known.get(frozenset(labels.items()))

    gateway.wait(lambda: found() == 0, "a comparison")
    row = "SELECT id FROM payment WHERE id = 'pay_x'"
    gateway.change(
        "INSERT INTO payment (id, provider, state, purpose, amount_units, created_at_ms,"
        " updated_at_ms, lease_ms) VALUES ('pay_x', 'stripe', 'succeeded', 'credits', 5, 0, 0, 0)"
    )
    gateway.wait(lambda: found() == 1, "the difference")
    gateway.change("DELETE FROM payment WHERE id = 'pay_x'")
    gateway.wait(lambda: found() == 0, "the end of it")
    assert gateway.rows(row) == []
    assert door.value("differences_age_seconds", comparison="outside") < 60


async def test_nobody_is_named(launch: Launch) -> None:
    """Not by what they send, and not by what we know of them."""
    gateway = launch(server=ANY_PORT)
    door, wallet = Door(gateway), new_wallet(gateway.net)
    before = {name: set(values) for name, values in read(door.text()).items()}
    async with gateway.client() as http:
        await buy(http, wallet)
        for _ in range(5):
            path = f"/v1/{secrets.token_hex(8)}"
            await http.get(path, headers=wallet.sign("GET", gateway.url + path))
            await http.get(path, headers={"Signature": secrets.token_hex(8)})
    await until(lambda: door.value("requests_total", outcome="paid") == 5)
    text = door.text()
    after = {name: set(values) for name, values in read(text).items()}
    grown = {name for name in after if after[name] - before.get(name, set())}
    assert grown <= {"farebox_gas_account_settlements_left", "farebox_differences"} | {
        "farebox_differences_age_seconds",  # looked at since
        "farebox_settlement_cost_gwei",
    }
    ours = [wallet.address, gateway.pay_to, gateway.settler.address]
    for secret in (*ours, gateway.settler.private_key, gateway.rpc_url, gateway.upstream_url):
        assert secret.lower().removeprefix("0x").removeprefix("http://") not in text.lower()
    assert not re.search(r"[0-9a-f]{16}", text)


def test_where_and_for_whom(launch: Launch) -> None:
    gateway = launch(server=ANY_PORT, running=False)
    (gateway.folder / "admin.token").write_text(f"{TOKEN}\n")
    gateway.start()
    door = Door(gateway, TOKEN)
    assert "farebox_build_info" in door.text()
    for token in (None, "x", TOKEN[:-1], f"{TOKEN}x", "é" * 30):
        headers = {} if token is None else {"Authorization": f"Bearer {token}".encode()}
        answer = httpx.get(door.url, headers=headers, trust_env=False)
        assert (answer.status_code, answer.json()["code"]) == (401, "api_key_required")
        assert answer.headers["www-authenticate"].startswith("Bearer")
    twice = [("Authorization", f"Bearer {TOKEN}")] * 2
    assert httpx.get(door.url, headers=twice, trust_env=False).status_code == 401
    assert httpx.post(door.url, trust_env=False).status_code == 405
    base = door.url.removesuffix("/metrics")
    for path in ("/", "/v1/anything", "/farebox/v1/prices", "/metrics/", "/readyz"):
        assert httpx.get(base + path, trust_env=False).status_code == 404, path
    # And the public port has none of it.
    public = {"Authorization": f"Bearer {TOKEN}"}
    assert httpx.get(f"{gateway.url}/metrics", headers=public, trust_env=False).status_code == 404


def test_on_the_public_port_only_with_a_token(launch: Launch) -> None:
    gateway = launch(server={"admin_listen": ""})
    url = f"{gateway.url}/metrics"
    assert httpx.get(url, trust_env=False).status_code == 404
    gateway.stop()
    (gateway.folder / "admin.token").write_text(TOKEN)
    gateway.start()
    assert httpx.get(url, trust_env=False).status_code == 401
    good = {"Authorization": f"Bearer {TOKEN}"}
    assert httpx.get(url, headers=good, trust_env=False).status_code == 200


def test_an_address_that_was_asked_for_and_is_taken(launch: Launch) -> None:
    other = launch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        gateway = launch(server={"admin_listen": where}, beside=other, running=False)
        assert gateway.spawn().wait_end(60) == 4
        assert f"cannot listen on {where}" in gateway.log
        # The default one is done without: who runs two gateways has not asked for it.
        nobodys = Server.model_construct(
            _fields_set=set(), admin_listen=Listen("127.0.0.1", taken.getsockname()[1])
        )
        with serve._admin(nobodys) as door:
            assert door is None


async def test_workers_are_counted_together(
    launch: Launch, redis_url: str, wallet: Wallet, target: str
) -> None:
    options = {"workers": 2, "redis": redis_url, **ANY_PORT}
    gateway = launch("postgres", server=options)
    door = Door(gateway)
    first = min(workers_of(gateway))
    # A connection for each request, so that both workers get some.
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(
        base_url=gateway.url, timeout=30, limits=limits, trust_env=False
    ) as http:
        await buy(http, wallet)
        for _ in range(20):
            signed = wallet.sign("GET", gateway.url + target)
            assert (await http.get(target, headers=signed)).status_code == 200
        await becomes(door, 20, "requests_total", outcome="paid")
        os.kill(first, signal.SIGKILL)
        await until(lambda: len(workers_of(gateway) - {first}) == 2)
        signed = wallet.sign("GET", gateway.url + target)
        assert (await http.get(target, headers=signed)).status_code == 200
    # Whoever has taken its place answers at the same address, and what the dead one did stands.
    await becomes(door, 21, "requests_total", outcome="paid")
    gateway.stop()
    assert not servers.port_open(int(door.url.split(":")[2].split("/")[0]))
