"""Two nodes on one PostgreSQL and one Redis, and several workers on one port.

What is decided once is decided in the database, so it stands whatever Redis does; Redis only
shares counts. After each test the books of every deployment are verified (``launch``).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from gateway import workers
from gateway.app import BadToken
from tests import servers
from tests.e2e.stage import PRICE_UNITS, ROUTES, Api, Gateway, answer_when_open
from tests.e2e.wallet import Wallet, buy, problem
from tests.servers import eventually

Launch = Callable[..., Gateway]

LIMITED = ROUTES.replace(
    "[", '[\n  { match = "GET /limited/*", price = "$0.002", rate_limit = "20/h" },', 1
)
PATIENT = {"redis_timeout_ms": 10_000}  # for what must be exact on however busy a machine


class OwnRedis:
    """A Redis of one test, which may be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("redis-server") or shutil.which("valkey-server")
        if program is None:
            servers.missing("Redis", "install redis-server")
        self._folder = folder
        self.port = servers.free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        self._command = [program, *options, "--appendonly", "no"]
        self.start()

    def start(self) -> None:
        self.process = servers.Process(self._command, self._folder, servers.child_env())
        self.process.wait_port(self.port)

    def flush(self) -> None:
        import redis

        with redis.Redis.from_url(self.url) as client:
            client.flushall()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[OwnRedis]:
    made = OwnRedis(tmp_path)
    yield made
    made.process.signal(signal.SIGCONT)
    made.process.kill()


def pair(launch: Launch, url: str, **server: object) -> tuple[Gateway, Gateway]:
    """Two nodes of one deployment, under one public URL."""
    options = {"redis": url, **server}
    one = launch("postgres", server=options, routes=LIMITED)
    two = launch("postgres", server={**options, "public_url": one.url}, routes=LIMITED, beside=one)
    return one, two


def limited() -> str:
    return f"/limited/{os.urandom(8).hex()}"


async def ask(nodes: list[httpx.AsyncClient], wallet: Wallet, url: str, count: int) -> Counter[int]:
    """``count`` different signed requests at once, to the nodes in turn."""
    path = httpx.URL(url).path
    answers = await asyncio.gather(
        *(nodes[i % len(nodes)].get(path, headers=wallet.sign("GET", url)) for i in range(count))
    )
    for answer in answers:
        if answer.status_code == 429:
            told = problem(answer, "rate_limited")
            assert told["retryable"] is True and int(answer.headers["retry-after"]) > 0
    return Counter(answer.status_code for answer in answers)


# --- what the database decides --------------------------------------------------------------------


async def test_one_request_a_hundred_times_at_once(
    launch: Launch, redis_url: str, api: Api, wallet: Wallet, target: str
) -> None:
    one, two = pair(launch, redis_url)
    gate = api.behave(target, answer_when_open)
    async with one.client() as a, two.client() as b:
        await buy(a, wallet)
        headers = wallet.sign("GET", one.url + target)
        asked = [
            asyncio.create_task((a, b)[i % 2].get(target, headers=headers)) for i in range(100)
        ]
        await eventually(lambda: sum(task.done() for task in asked) == 99)
        gate.open()
        answers = await asyncio.gather(*asked)
        for answer in answers:
            if answer.status_code != 200:
                problem(answer, "request_in_progress")
        assert Counter(answer.status_code for answer in answers) == {200: 1, 409: 99}
        late = [await http.get(target, headers=headers) for http in (a, b)]
        assert [answer.headers["farebox-replayed"] for answer in late] == ["true", "true"]
        assert {answer.content for answer in late} == {b"late but whole"}
    assert gate.arrived == 1
    assert one.transfers(wallet.address)[1:] == [("capture", PRICE_UNITS, None)]


async def test_a_hundred_spends_on_credits_for_ten(
    launch: Launch, redis_url: str, api: Api, wallet: Wallet, target: str
) -> None:
    one, two = pair(launch, redis_url)
    async with one.client() as a, two.client() as b:
        await buy(a, wallet, "0.1")
        counted = await ask([a, b], wallet, one.url + target, 100)
    assert counted == {200: 10, 402: 90}
    assert api.calls(target) == 10
    assert one.balance(wallet.address) == (0, 0)
    assert one.transfers(wallet.address)[1:] == [("capture", PRICE_UNITS, None)] * 10


# --- what Redis shares ----------------------------------------------------------------------------


async def test_a_limit_is_exact_over_two_nodes(
    launch: Launch, redis_url: str, api: Api, wallet: Wallet
) -> None:
    one, two = pair(launch, redis_url, **PATIENT)
    path = limited()
    async with one.client() as a, two.client() as b:
        await buy(a, wallet)
        assert await ask([a, b], wallet, one.url + path, 60) == {200: 20, 429: 40}
        # A limit is the route's: the same account is over it on its other paths too.
        assert await ask([a, b], wallet, one.url + limited(), 2) == {429: 2}
    assert api.calls(path) == 20
    assert "every process counts for itself" not in one.log + two.log


async def test_uncharged_calls_are_counted_over_two_nodes(
    launch: Launch, redis_url: str, api: Api, wallet: Wallet
) -> None:
    one, two = pair(launch, redis_url, **PATIENT, uncharged_per_min=10)
    async with one.client() as a, two.client() as b:
        await buy(a, wallet)
        for i in range(10):
            http = (a, b)[i % 2]
            path = "/500"
            answer = await http.get(path, headers=wallet.sign("GET", one.url + path))
            assert answer.status_code == 502, answer.text
        # Each has heard of the other's with its own last one: one more gets through at most.
        for _ in range(2):
            await ask([a, b], wallet, one.url + "/500", 2)
        begun = api.begun()
        assert await ask([a, b], wallet, one.url + "/v1/anything", 10) == {429: 10}
    assert api.begun() == begun
    kinds = Counter(kind for kind, _, _ in one.transfers(wallet.address))
    assert kinds["capture"] == 0 and 10 <= kinds["void"] <= 12


async def test_redis_flushed_and_stopped_under_traffic(
    launch: Launch, redis: OwnRedis, api: Api, wallet: Wallet, target: str
) -> None:
    """No caller notices, and nothing is let through twice: that is not Redis' to say."""
    one, two = pair(launch, redis.url)
    answers: list[httpx.Response] = []
    stop = asyncio.Event()

    async def traffic(http: httpx.AsyncClient, number: int) -> None:
        while not stop.is_set():
            path = f"/limited/{number}"
            for name in (target, path):
                signed = wallet.sign("GET", one.url + name)
                answers.append(await http.get(name, headers=signed))

    async def same_request_to_both() -> None:
        headers = wallet.sign("GET", one.url + target)
        both = await asyncio.gather(*(http.get(target, headers=headers) for http in (a, b)))
        fresh = [r for r in both if r.status_code == 200 and "farebox-replayed" not in r.headers]
        assert len(fresh) == 1
        for answer in both:
            if answer.status_code != 200:
                problem(answer, "request_in_progress")

    async with one.client() as a, two.client() as b:
        await buy(a, wallet, "5")
        tasks = [asyncio.create_task(traffic((a, b)[i % 2], i)) for i in range(4)]
        same = 0
        for disturb in (
            redis.flush,
            lambda: redis.process.signal(signal.SIGSTOP),
            lambda: redis.process.signal(signal.SIGCONT),
            redis.process.kill,
            redis.start,
        ):
            seen = len(answers)
            disturb()
            for _ in range(5):
                await same_request_to_both()
                same += 1
            await eventually(lambda seen=seen: len(answers) >= seen + 20)
        stop.set()
        await asyncio.gather(*tasks)
    assert {answer.status_code for answer in answers} <= {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            problem(answer, "rate_limited")
    paid = [answer for answer in answers if answer.status_code == 200]
    assert all("farebox-replayed" not in answer.headers for answer in paid)
    captures = [entry for entry in one.transfers(wallet.address) if entry[0] == "capture"]
    assert len(captures) == len(paid) + same
    assert api.calls(target) == same + sum(r.url.path == target for r in paid)
    for node in (one, two):
        assert "every process counts for itself" in node.log
        assert "Traceback" not in node.log


# --- several workers ------------------------------------------------------------------------------


def workers_of(gateway: Gateway) -> set[int]:
    """The processes that serve: children of the one that was started."""
    assert gateway.process is not None
    pid = gateway.process.pid
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    return {int(child) for child in text.split()}


def team(launch: Launch, url: str, count: int = 3, **server: object) -> Gateway:
    options = {"workers": count, "redis": url, "hold_lease_s": 1, **server}
    return launch("postgres", server=options, routes=LIMITED)


async def test_workers_share_limits_and_balances(
    launch: Launch, redis_url: str, api: Api, wallet: Wallet, target: str
) -> None:
    gateway = team(launch, redis_url, **PATIENT)
    assert len(workers_of(gateway)) == 3
    path = limited()
    # A connection for each request, so that every worker gets some.
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(
        base_url=gateway.url, timeout=30, limits=limits, trust_env=False
    ) as http:
        await buy(http, wallet, "0.14")
        assert await ask([http], wallet, gateway.url + path, 60) == {200: 20, 429: 40}
        assert await ask([http], wallet, gateway.url + target, 60) == {200: 10, 402: 50}
        assert (api.calls(path), api.calls(target)) == (20, 10)
        # The kernel deals connections by their ports, and one worker may have been quicker than
        # the others thirty times. Not for ever.
        await buy(http, wallet, "1")
        for _ in range(20):
            if len(gateway.rows("SELECT DISTINCT owner FROM hold")) > 1:
                break
            await ask([http], wallet, gateway.url + target, 5)
        else:
            pytest.fail("one worker served every call")
    gateway.stop()
    assert workers_of_nobody(gateway)


def workers_of_nobody(gateway: Gateway) -> bool:
    """The port is free again: no worker outlived its parent."""
    return not servers.port_open(gateway.port)


async def test_a_worker_killed_under_traffic(
    launch: Launch, redis_url: str, api: Api, wallet: Wallet, target: str
) -> None:
    gateway = team(launch, redis_url)
    before = workers_of(gateway)
    answers: list[httpx.Response] = []
    cut: list[httpx.TransportError] = []
    stop = asyncio.Event()
    limits = httpx.Limits(max_keepalive_connections=0)

    async def traffic(http: httpx.AsyncClient) -> None:
        while not stop.is_set():
            try:
                headers = wallet.sign("GET", gateway.url + target)
                answers.append(await http.get(target, headers=headers))
            except httpx.TransportError as error:
                cut.append(error)

    async with httpx.AsyncClient(
        base_url=gateway.url, timeout=30, limits=limits, trust_env=False
    ) as http:
        await buy(http, wallet, "5")
        tasks = [asyncio.create_task(traffic(http)) for _ in range(6)]
        await eventually(lambda: len(answers) >= 20)
        victim = min(before)
        os.kill(victim, signal.SIGKILL)
        seen = len(answers)
        await eventually(lambda: len(answers) >= seen + 20)  # the others go on
        await eventually(lambda: len(workers_of(gateway) - {victim}) == 3)
        seen = len(answers)
        await eventually(lambda: len(answers) >= seen + 20)
        stop.set()
        await asyncio.gather(*tasks)
    assert workers_of(gateway) & before == before - {victim}
    assert {answer.status_code for answer in answers} == {200}
    assert len(cut) <= 6  # at most one for each that had a call there
    gateway.wait(lambda: gateway.balance(wallet.address)[1] == 0, "the dead worker's holds")
    charged = [entry for entry in gateway.transfers(wallet.address) if entry[0] == "capture"]
    # Whoever has an answer has paid. A call that was cut off may have been charged, or not.
    assert len(answers) <= len(charged) <= len(answers) + len(cut)
    assert f"worker {victim} ended with -9" in gateway.log


async def test_stopped_in_the_middle_of_calls(
    launch: Launch, redis_url: str, api: Api, wallet: Wallet
) -> None:
    """SIGTERM reaches every worker, and calls in flight end as they would have."""
    gateway = team(launch, redis_url)
    gate = api.behave(path := f"/v1/{os.urandom(8).hex()}", answer_when_open)
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(
        base_url=gateway.url, timeout=30, limits=limits, trust_env=False
    ) as http:
        await buy(http, wallet)
        url = gateway.url + path
        calls = [
            asyncio.create_task(http.get(path, headers=wallet.sign("GET", url))) for _ in range(12)
        ]
        await eventually(lambda: gate.arrived == 12)
        assert gateway.process is not None
        gateway.process.popen.send_signal(signal.SIGTERM)
        await eventually(lambda: not servers.port_open(gateway.port))
        gate.open()
        answers = await asyncio.gather(*calls)
    assert {answer.status_code for answer in answers} == {200}
    assert await asyncio.to_thread(gateway.process.wait_end) == 0
    assert len(gateway.transfers(wallet.address)) == 13


async def test_without_their_parent_workers_leave(launch: Launch, redis_url: str) -> None:
    gateway = team(launch, redis_url)
    assert gateway.process is not None
    os.kill(gateway.process.pid, signal.SIGKILL)  # it alone, not its group
    gateway.process.wait_end(10)
    await eventually(lambda: not servers.port_open(gateway.port))
    await eventually(lambda: not gateway.process._group_lives())
    assert "the parent process is gone" in gateway.log


def test_a_second_gateway_does_not_share_the_port(launch: Launch, redis_url: str) -> None:
    gateway = team(launch, redis_url, count=2)
    options = {"workers": 2, "redis": redis_url}
    second = launch(server=options, beside=gateway, port=gateway.port, running=False)
    assert second.spawn().wait_end(60) == 4
    assert "cannot listen on" in second.log
    assert len(workers_of(gateway)) == 2


def test_workers_that_cannot_start(launch: Launch, redis_url: str) -> None:
    """The parent says why and ends; it does not go on trying."""
    gateway = team(launch, redis_url, count=2)
    gateway.stop()
    servers._sql(gateway.database, "ALTER TABLE sequence RENAME TO elsewhere")
    try:
        assert gateway.spawn().wait_end(60) == 4
    finally:
        servers._sql(gateway.database, "ALTER TABLE elsewhere RENAME TO sequence")
    assert "a worker could not start: UndefinedTableError" in gateway.log
    assert '"ready": true' not in gateway.log
    gateway.start()
    assert len(workers_of(gateway)) == 2


def test_a_workers_fault_is_its_parents() -> None:
    """So that it has the exit code and the words it has with one process."""
    told = workers._fault("BadToken", "USDC is not what it should be")
    assert type(told) is BadToken and str(told) == "USDC is not what it should be"
    assert type(workers._fault("OSError", "x")) is workers.WorkersFailed
