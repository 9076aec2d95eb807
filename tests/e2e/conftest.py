"""Deployments for the end-to-end tests.

``gateway`` is shared by the tests of a worker, once on SQLite and once on PostgreSQL; each test
brings wallets and targets of its own. ``launch`` starts one for a test that breaks something.
After every test the books of whatever ran must be in order.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pytest

from anvil.devnet import Devnet, Options, running
from tests import servers
from tests.e2e import sweep as sweeps
from tests.e2e.disk import Disk
from tests.e2e.flows import FLOWS, Entry, Site, short_form
from tests.e2e.stage import Api, Background, Gateway, new_account
from tests.e2e.sweep import Swept
from tests.e2e.taps import AFTER, BEFORE, Line, Record, Tap
from tests.e2e.wallet import Wallet, new_wallet
from tests.e2e.wire import Http, JsonRpc, Postgres
from tests.fixtures_chain import FaultyNode, chain_session
from tests.fixtures_permit2 import plant

__all__ = ["chain_session"]

Launch = Callable[..., Gateway]


@pytest.fixture(scope="session")
def background() -> Iterator[Background]:
    loop = Background()
    yield loop
    loop.close()


@pytest.fixture(scope="session")
def api(background: Background) -> Api:
    """The upstream of all deployments of this worker."""
    return Api(background)


@pytest.fixture(autouse=True)
def _behaviours_hold(request: pytest.FixtureRequest) -> Iterator[None]:
    """A behaviour that fails leaves its test waiting for what never comes: say why."""
    yield
    if "api" in request.fixturenames:
        faults = request.getfixturevalue("api").faults()
        assert not faults, faults


@pytest.fixture(scope="session")
def deployments(
    chain_session: Devnet, api: Api, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Gateway]]:
    """One running gateway for each kind of database, started when it is first asked for."""
    running: dict[str, Gateway] = {}

    def get(dialect: str) -> Gateway:
        if dialect not in running:
            folder = tmp_path_factory.mktemp(f"gateway-{dialect}")
            running[dialect] = Gateway(
                folder, _database(dialect, folder), chain_session, chain_session.rpc_url, api.url
            ).start()
        return running[dialect]

    yield get
    for gateway in running.values():
        gateway.stop()
        told = subprocess.run(
            servers.own_program(
                ["farebox", "ledger", "verify", "--json", "--config", str(gateway.config)]
            ),
            capture_output=True,
            text=True,
            env=servers.child_env(),
            check=False,
        )
        _drop(gateway.database)
        assert json.loads(told.stdout) == {"ok": True, "broken": {}}, told


def _database(dialect: str, folder: Path) -> str:
    if dialect == "postgres":
        return servers.create_database(servers.postgres_url())
    return f"sqlite:///{folder / 'farebox.db'}"


def _drop(database: str) -> None:
    if database.startswith("postgres"):
        servers.drop_database(database)


@pytest.fixture
def gateway(dialect: str, deployments: Callable[[str], Gateway]) -> Iterator[Gateway]:
    """A running gateway, on SQLite and on PostgreSQL in turn."""
    yield from _kept_in_order(deployments(dialect))


@pytest.fixture
def sqlite_gateway(deployments: Callable[[str], Gateway]) -> Iterator[Gateway]:
    """A running gateway, for what has nothing to do with the database."""
    yield from _kept_in_order(deployments("sqlite"))


def _kept_in_order(gateway: Gateway) -> Iterator[Gateway]:
    yield gateway
    assert gateway.process is not None and gateway.process.running, gateway.log[-3000:]
    assert gateway.broken() == {}
    faults = [line for line in gateway.log.splitlines() if "unexpected error" in line]
    assert not faults, gateway.log[-3000:]


@pytest.fixture
def launch(chain_session: Devnet, api: Api, tmp_path: Path) -> Iterator[Launch]:
    """``launch("sqlite", server={…}, net=…, rpc_url=…)``: a gateway of the test's own.

    ``beside=`` another one shares its database, its receiving address and its settler. The books
    are checked at the end, whether it still runs or not.
    """
    made: list[Gateway] = []
    databases: list[str] = []

    def start(
        dialect: str = "sqlite",
        *,
        net: Devnet | None = None,
        rpc_url: str | None = None,
        beside: Gateway | None = None,
        database: str | None = None,
        running: bool = True,
        **options: Any,
    ) -> Gateway:
        net = net or chain_session
        folder = tmp_path / f"gateway-{secrets.token_hex(4)}"
        folder.mkdir()
        if beside is not None:
            options |= {"pay_to": beside.pay_to, "settler": beside.settler}
            database = beside.database
        elif database is None:
            database = _database(dialect, folder)
            databases.append(database)
        gateway = Gateway(folder, database, net, rpc_url or net.rpc_url, api.url, **options)
        made.append(gateway)
        return gateway.start() if running else gateway

    yield start
    faults: list[str] = []
    for gateway in made:
        try:
            gateway.stop()
        except AssertionError as error:
            faults.append(str(error))
        if gateway.process is not None and "unexpected error" in gateway.log:
            faults.append(gateway.log[-3000:])
    for database in databases:
        broken = next(g for g in made if g.database == database).broken()
        _drop(database)
        if broken:
            faults.append(json.dumps(broken, default=str))
    if faults:
        pytest.fail("\n".join(faults), pytrace=False)


@pytest.fixture
def wallet(chain_session: Devnet) -> Wallet:
    """A new wallet with ten USDC."""
    return new_wallet(chain_session)


@pytest.fixture
def target() -> str:
    """A priced target that no other test asks for; ten USDC cents of nothing: $0.01."""
    return f"/v1/{secrets.token_hex(8)}"


@pytest.fixture
def cheap() -> str:
    """A target that costs less than the smallest settlement: $0.002."""
    return f"/cheap/{secrets.token_hex(8)}"


@pytest.fixture
def faulty(background: Background, chain_session: Devnet) -> Iterator[FaultyNode]:
    """A node in front of the chain that can be told to misbehave."""
    yield from _in_front_of(background, chain_session)


def _in_front_of(background: Background, net: Devnet) -> Iterator[FaultyNode]:
    async def make() -> FaultyNode:
        node = FaultyNode(net)
        await node.start()
        return node

    node = background.run(make())
    yield node
    background.run(node.stop())


@pytest.fixture(scope="session")
def shallow() -> Iterator[Devnet]:
    """A chain whose blocks are final after 8 more."""
    with running(options=Options(slots_in_an_epoch=4)) as net:
        yield net


# --- the crash sweep (sweep.py) ---------------------------------------------------------------

# Leases end soon, so that a sweep does not consist of waiting.
QUICK = {"settle_wait_s": 1, "hold_lease_s": 3, "takeover_s": 2}


@pytest.fixture
def swept(
    request: pytest.FixtureRequest, launch: Launch, background: Background, api: Api
) -> Callable[..., Awaitable[Swept]]:
    """``await swept("purchase", "sqlite")``: kill a gateway everywhere in a flow.

    ``disk``: at the system calls that write, not at the messages. Each ``--sweep-every``-th point,
    or without that the few of the short form.
    """
    shallow: Devnet = request.getfixturevalue("shallow")
    every: int | None = request.config.getoption("--sweep-every")
    part: tuple[int, int] = request.config.getoption("--sweep-part")
    log: Path | None = request.config.getoption("--sweep-log")

    async def sweep(name: str, dialect: str, *, disk: bool = False) -> Swept:
        entry = FLOWS[name]
        record = Record(every=dialect == "sqlite")
        taps = [Tap(background, record, "chain", shallow.rpc_url, JsonRpc)]
        if "upstream" in entry.messages:
            taps.append(Tap(background, record, "upstream", api.url, Http))
        database = ""
        if dialect == "postgres":
            database = servers.create_database(servers.postgres_url())
            taps.append(Tap(background, record, "postgres", database, Postgres))
        gateway = _tapped(launch, dialect, database, taps, entry, shallow)
        line: Line = Disk(gateway.folder) if disk else record
        short = every is None and not disk
        found = Swept(name, "disk" if disk else dialect, short, log)
        try:
            gateway.start()
            site = Site(gateway, api)
            if short:
                points = short_form(entry, (BEFORE, AFTER), {each.name for each in taps})
                await sweeps.some(site, entry.flow, line, found, points)
            else:
                await sweeps.sweep(site, entry.flow, line, found, every=every or 1, part=part)
        finally:
            gateway.stop()
            found.note()
            for each in taps:
                await asyncio.to_thread(each.close)
            if database:
                servers.drop_database(database)
        return found

    return sweep


def _tapped(  # noqa: PLR0917
    launch: Launch, dialect: str, database: str, taps: list[Tap], entry: Entry, net: Devnet
) -> Gateway:
    """A gateway behind its taps, not yet started. Its books are looked at past them."""
    port = {each.name: each.port for each in taps}
    options: dict[str, Any] = {"server": QUICK, "net": net, "running": False}
    if database:
        parts = urlsplit(database)
        at = f"{parts.username}@127.0.0.1:{port['postgres']}"
        options["database"] = urlunsplit(parts._replace(netloc=at))
    gateway: Gateway = launch(dialect, rpc_url=f"http://127.0.0.1:{port['chain']}", **options)
    gateway.books = database
    if "upstream" in port:
        gateway.upstream_url = f"http://127.0.0.1:{port['upstream']}"
    if entry.refunds:
        till = new_account()
        net.transfer(net.accounts[0].address, till.address, 900_000_000)
        (gateway.folder / "refund.key").write_text(till.private_key)
        gateway.chain_extra = 'refund_key_file = "refund.key"\nrefund_min = "$0.01"'
    if entry.permit2:
        plant(net)
        gateway.chain_extra = "permit2 = true"
    return gateway
