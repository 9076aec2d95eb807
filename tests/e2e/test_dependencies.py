"""What the gateway needs goes away: nothing is free, nothing is lost, and it says so."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from urllib.parse import urlsplit, urlunsplit

import httpx
import pytest

from anvil.devnet import running
from gateway.db import sqlite_path
from tests import servers
from tests.e2e.stage import PRICE_UNITS, Api, Background, Gateway
from tests.e2e.wallet import Wallet, buy, code_of, offers, problem
from tests.fixtures_chain import FaultyNode
from tests.servers import eventually

Launch = Callable[..., Gateway]
PURCHASE = "/farebox/v1/credits/purchase"
BODY = b'{"amount_usd": "1"}'


async def until_ready_is(
    http: httpx.AsyncClient, status: int, chain: str | None = None
) -> httpx.Response:
    """Its answer is kept for a second. ``chain`` is what it says of the chain."""

    def so(ready: httpx.Response) -> bool:
        said = ready.json()["checks"]["eip155:84532"]
        return ready.status_code == status and chain in (None, said)

    return await until_answered(lambda: http.get("/readyz"), so)


async def until_answered(
    ask: Callable[[], Awaitable[httpx.Response]], so: Callable[[httpx.Response], bool]
) -> httpx.Response:
    """The first answer that is so; it is asked for again until then."""
    async with asyncio.timeout(60):
        while not so(answer := await ask()):
            await asyncio.sleep(0.1)
    return answer


def not_503(answer: httpx.Response) -> bool:
    return answer.status_code != 503


class Wire:
    """A TCP connection to somewhere that can be cut, and mended."""

    def __init__(self, background: Background, host: str, port: int) -> None:
        self._background = background
        self._target = (host, port)
        self._open = True
        self._fatal: list[bytes] = []
        self._writers: set[asyncio.StreamWriter] = set()
        self._server = background.run(asyncio.start_server(self._accepted, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._open:
            writer.transport.abort()
            return
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        self._writers |= {writer, far_writer}
        try:
            await asyncio.gather(
                self._pump(reader, far_writer, watched=True), self._pump(far_reader, writer)
            )
        finally:
            self._writers -= {writer, far_writer}
            for each in (writer, far_writer):
                each.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, watched: bool = False
    ) -> None:
        passed = 0
        with contextlib.suppress(ConnectionError):
            # What comes after the cut goes nowhere, the answer to a COMMIT for one.
            while (data := await reader.read(65_536)) and self._open:
                writer.write(data)
                if watched and passed < len(self._fatal) and self._fatal[passed] in data:
                    passed += 1
                    if passed == len(self._fatal):
                        self._fatal = []
                        await self._sever()
                await writer.drain()
            writer.close()

    async def _sever(self) -> None:
        self._open = False
        for writer in list(self._writers):
            writer.close()  # what was written still goes out: the other side gets its COMMIT

    def cut(self) -> None:
        """Every connection is closed, and new ones are refused."""
        self._background.run(self._sever())

    def cut_after(self, *words: bytes) -> None:
        """Be cut once these have passed in this order on one connection, before the answer."""
        self._fatal = list(words)

    def mend(self) -> None:
        self._open = True

    def close(self) -> None:
        async def close() -> None:
            self._server.close()

        self.cut()
        self._background.run(close())


@pytest.fixture
def wire(background: Background) -> Iterator[Wire]:
    """A wire to this run's PostgreSQL."""
    parts = urlsplit(servers.postgres_url())
    wire = Wire(background, parts.hostname or "", parts.port or 0)
    yield wire
    wire.close()


async def test_postgres_goes_away_and_comes_back(
    launch: Launch, wire: Wire, api: Api, wallet: Wallet, target: str
) -> None:
    database = servers.create_database(servers.postgres_url())
    parts = urlsplit(database)
    through = urlunsplit(parts._replace(netloc=f"{parts.username}@127.0.0.1:{wire.port}"))
    gateway = launch("postgres", database=through)
    try:
        async with gateway.client() as http:
            await buy(http, wallet)
            assert (await http.get("/readyz")).status_code == 200
            offer = offers(await http.get(target))[0]
            wire.cut()
            ready = await until_ready_is(http, 503)
            assert ready.json()["checks"]["database"] == "unreachable"
            assert (await http.get("/healthz")).status_code == 200
            url = gateway.url + target
            header = {"PAYMENT-SIGNATURE": wallet.pay(offer)}
            sent = gateway.sent()
            balance = gateway.url + "/farebox/v1/credits/balance"
            for answer in (
                await http.get(target, headers=wallet.sign("GET", url)),
                await http.get(target, headers=header),
                await http.post(PURCHASE, content=BODY, headers=header),
                await http.get(balance, headers=wallet.sign("GET", balance)),
            ):
                told = problem(answer, "dependency_unavailable")
                assert told["status"] == 503 and int(answer.headers["retry-after"]) >= 1
            assert api.calls(target) == 0
            assert gateway.sent() == sent
            wire.mend()
            signed = wallet.sign("GET", url)
            answer = await until_answered(lambda: http.get(target, headers=signed), not_503)
            assert answer.status_code == 200, answer.text
            await until_ready_is(http, 200)
        assert api.calls(target) == 1
        assert gateway.balance(wallet.address) == (1_000_000 - PRICE_UNITS, 0)
        assert gateway.broken() == {}
    finally:
        gateway.stop()
        servers.drop_database(database)


async def test_the_database_goes_away_during_a_call(
    launch: Launch, wire: Wire, api: Api, wallet: Wallet, target: str
) -> None:
    """What cannot be charged is not delivered; whatever became of it, the books are right."""
    from tests.e2e.stage import answer_when_open

    database = servers.create_database(servers.postgres_url())
    parts = urlsplit(database)
    through = urlunsplit(parts._replace(netloc=f"{parts.username}@127.0.0.1:{wire.port}"))
    gateway = launch("postgres", database=through, server={"hold_lease_s": 1})
    gate = api.behave(target, answer_when_open)
    try:
        async with gateway.client() as http:
            await buy(http, wallet)
            signed = wallet.sign("GET", gateway.url + target)
            calling = asyncio.create_task(http.get(target, headers=signed))
            await eventually(lambda: gate.arrived == 1, "the call")
            wire.cut()
            gate.open()
            answer = await calling
            told = problem(answer, "dependency_unavailable")
            assert b"late but whole" not in answer.content and told["status"] == 503
            assert "farebox-charged" not in answer.headers  # nobody knows it now
            wire.mend()
            gateway.wait(
                lambda: gateway.balance(wallet.address) == (1_000_000, 0), "the hold to be void"
            )
            problem(await http.get(target, headers=signed), "outcome_unknown")
        assert gate.arrived == 1
        assert gateway.broken() == {}
    finally:
        gateway.stop()
        servers.drop_database(database)


@pytest.mark.parametrize("what", ["hold", "claim", "purchase"])
async def test_the_answer_to_commit_is_lost(  # noqa: PLR0917  (fixtures)
    what: str, launch: Launch, wire: Wire, api: Api, wallet: Wallet, target: str
) -> None:
    """Whether it stands is not known. Nothing runs on a guess, nothing is taken twice."""
    database = servers.create_database(servers.postgres_url())
    parts = urlsplit(database)
    through = urlunsplit(parts._replace(netloc=f"{parts.username}@127.0.0.1:{wire.port}"))
    server = {"hold_lease_s": 1, "settle_wait_s": 1, "sweep_s": 3600, "work": False}
    gateway = launch("postgres", database=through, server=server)
    try:
        async with gateway.client() as http:
            await buy(http, wallet)
            request = http.build_request(
                "GET", target, headers=wallet.sign("GET", gateway.url + target)
            )
            if what == "claim":
                header = {"PAYMENT-SIGNATURE": wallet.pay(offers(await http.get(target))[0])}
                header["Farebox-Prefer"] = "settle"  # it has credits, which are used first
                request = http.build_request("GET", target, headers=header)
            elif what == "purchase":
                offer = offers(await http.post(PURCHASE, content=BODY))[0]
                header = {"PAYMENT-SIGNATURE": wallet.pay(offer)}
                request = http.build_request("POST", PURCHASE, content=BODY, headers=header)
            sent = gateway.sent()
            wire.cut_after(b"BEGIN\0", b"COMMIT")  # of a write: a read begins with its isolation
            problem(await http.send(request), "dependency_unavailable")
            assert api.calls(target) == 0
            assert gateway.sent() == sent
            wire.mend()
            answer = await until_answered(lambda: http.send(request), not_503)
            expected = "request_in_progress" if what == "hold" else "settlement_pending"
            told = problem(answer, expected)
            assert "payment-required" not in answer.headers, told
        gateway.stop()
        gateway.server |= {"work": True, "sweep_s": 1}
        gateway.start()
        async with gateway.client() as http:
            going_on = (expected, "dependency_unavailable")
            answer = await until_answered(
                lambda: http.send(request), lambda answer: code_of(answer) not in going_on
            )
            if what == "hold":
                problem(answer, "outcome_unknown")
            else:
                assert answer.status_code == 200, answer.text
        assert api.calls(target) == (1 if what == "claim" else 0)
        mints = [entry for entry in gateway.transfers(wallet.address) if entry[0] == "mint"]
        assert len(mints) == (1 if what == "hold" else 2)
        assert gateway.broken() == {}
    finally:
        gateway.stop()
        servers.drop_database(database)


async def test_sqlite_cannot_be_written(
    launch: Launch, api: Api, wallet: Wallet, target: str
) -> None:
    gateway = launch("sqlite")
    async with gateway.client() as http:
        await buy(http, wallet)
        signed = wallet.sign("GET", gateway.url + target)
        with contextlib.closing(sqlite3.connect(sqlite_path(gateway.database))) as other:
            other.execute("BEGIN IMMEDIATE")
            answer = await http.get(target, headers=signed)
            assert problem(answer, "dependency_unavailable")["retryable"] is True
            other.execute("ROLLBACK")
        assert api.calls(target) == 0
        assert (await http.get(target, headers=signed)).status_code == 200
    assert api.calls(target) == 1
    assert gateway.balance(wallet.address) == (1_000_000 - PRICE_UNITS, 0)


async def test_the_chain_goes_away(
    launch: Launch, faulty: FaultyNode, api: Api, wallet: Wallet, target: str
) -> None:
    """Purchases are 503; spending goes on; readiness says which."""
    gateway = launch("sqlite", rpc_url=faulty.url)
    everything = (
        *("eth_chainId", "eth_call", "eth_getCode", "eth_blockNumber", "eth_estimateGas"),
        *("eth_getBlockByNumber", "eth_maxPriorityFeePerGas", "eth_getTransactionCount"),
        *("eth_sendRawTransaction", "eth_getTransactionReceipt", "eth_getLogs"),
    )
    async with gateway.client() as http:
        await buy(http, wallet)
        offer = offers(await http.get(target))[0]
        for method in everything:
            faulty.fault(method, "drop")
        header = {"PAYMENT-SIGNATURE": wallet.pay(offer), "Farebox-Prefer": "settle"}
        purchase = offers(await http.post(PURCHASE, content=BODY))[0]
        bought = {"PAYMENT-SIGNATURE": wallet.pay(purchase)}
        for answer in (
            await http.get(target, headers=header),
            await http.post(PURCHASE, content=BODY, headers=bought),
        ):
            told = problem(answer, "dependency_unavailable")
            assert told["status"] == 503 and told["retryable"] is True
            assert "retry-after" in answer.headers
            assert "payment-required" not in answer.headers
        assert [p["state"] for p in gateway.payments(wallet.address)] == ["succeeded"]
        await until_ready_is(http, 200, "rpc_no_answer")  # spending works
        signed = wallet.sign("GET", gateway.url + target)
        assert (await http.get(target, headers=signed)).status_code == 200
        faulty.faults.clear()
        # What was refused for want of a chain may be sent again as it is.
        answer = await until_answered(lambda: http.get(target, headers=header), not_503)
        assert answer.status_code == 200, answer.text
        await until_ready_is(http, 200, "ok")
    assert api.calls(target) == 2


async def test_it_starts_without_a_chain_and_sells_when_there_is_one(
    launch: Launch, faulty: FaultyNode, wallet: Wallet, target: str
) -> None:
    for method in ("eth_chainId", "eth_call", "eth_getCode"):
        faulty.fault(method, "drop")
    gateway = launch("sqlite", rpc_url=faulty.url)
    assert "cannot be asked" in gateway.log
    async with gateway.client() as http:
        assert (await http.get("/readyz")).status_code == 200
        offer = offers(await http.get(target))[0]
        header = {"PAYMENT-SIGNATURE": wallet.pay(offer)}
        problem(await http.get(target, headers=header), "dependency_unavailable")
        faulty.faults.clear()
        answer = await until_answered(lambda: http.get(target, headers=header), not_503)
        assert answer.status_code == 200, answer.text


async def test_another_chain_behind_the_address(
    launch: Launch, faulty: FaultyNode, wallet: Wallet, target: str
) -> None:
    """Nothing is sent to it, and readiness is off: this cannot mend itself."""
    gateway = launch("sqlite", rpc_url=faulty.url)
    async with gateway.client() as http:
        assert (await http.get("/readyz")).status_code == 200
        offer = offers(await http.get(target))[0]
        faulty.fault("eth_chainId", "change", lambda _: "0x1")
        await until_ready_is(http, 503, "rpc_wrong_chain")
        header = {"PAYMENT-SIGNATURE": wallet.pay(offer)}
        problem(await http.get(target, headers=header), "dependency_unavailable")
        assert gateway.sent() == 0
        assert gateway.payments(wallet.address) == []
        faulty.faults.clear()
        await until_ready_is(http, 200)


# --- refusing to start ----------------------------------------------------------------------------


def refuses(gateway: Gateway) -> str:
    """The one line it leaves with."""
    process = gateway.spawn()
    assert process.wait_end(30) == 3
    (line,) = [line for line in process.text.splitlines() if line.startswith("farebox: ")]
    assert "Traceback" not in process.text
    return line


def test_a_token_with_another_name(launch: Launch) -> None:
    """Signatures for it would be worthless: say so before anybody signs."""
    with running() as net:
        # FiatToken keeps its name in slot 4: a short string, its doubled length in the last byte.
        name = b"Not USDC"
        slot = "0x" + name.ljust(31, b"\0").hex() + f"{2 * len(name):02x}"
        net.rpc("anvil_setStorageAt", net.usdc, "0x4", slot)
        line = refuses(launch("sqlite", net=net, running=False))
    assert "Not USDC" in line and "USDC" in line and "base-sepolia" in line


def test_a_database_that_is_not_there(launch: Launch) -> None:
    port = servers.free_port()
    gateway = launch("sqlite", running=False)
    kept, gateway.database = gateway.database, f"postgresql://nobody@127.0.0.1:{port}/nothing"
    process = gateway.spawn()
    assert process.wait_end(30) == 4
    assert "the database cannot be reached" in process.text
    assert "Traceback" not in process.text
    gateway.database = kept
    gateway.start()


def test_a_port_that_is_taken(launch: Launch, sqlite_gateway: Gateway) -> None:
    gateway = launch("sqlite", running=False, port=sqlite_gateway.port)
    process = gateway.spawn()
    assert process.wait_end(30) == 4
    assert "in use" in process.text
    gateway.port = servers.free_port()
    gateway.url = f"http://127.0.0.1:{gateway.port}"
    gateway.start()


async def test_it_stops_when_it_is_told_to(launch: Launch, wallet: Wallet, target: str) -> None:
    """SIGTERM: what was captured is in the books, and the exit code is 0."""
    gateway = launch("sqlite")
    async with gateway.client() as http:
        await buy(http, wallet)
        signed = wallet.sign("GET", gateway.url + target)
        assert (await http.get(target, headers=signed)).status_code == 200
    gateway.stop()
    assert "Traceback" not in gateway.log
    assert gateway.balance(wallet.address) == (1_000_000 - PRICE_UNITS, 0)
    gateway.start()
    async with gateway.client() as http:
        again = await http.get(target, headers=signed)
    assert again.headers["farebox-replayed"] == "true"
