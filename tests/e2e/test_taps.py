"""The crash sweep's own parts: what it takes for a change, where it kills, what is wrong to it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from gateway.db import CommitUnknown, Database
from tests import servers
from tests.e2e import sweep, taps
from tests.e2e.disk import Disk, messages_of
from tests.e2e.flows import Attempt, Site
from tests.e2e.stage import Api, Background, Gateway
from tests.e2e.sweep import Swept, Verdict
from tests.e2e.taps import AFTER, BEFORE, Message, Point, Record, Tap
from tests.e2e.wire import Http, JsonRpc, Postgres, Said


@pytest.fixture
def process(run: Callable[..., servers.Process]) -> servers.Process:
    """Stands for the gateway: all that happens to it is that it is killed."""
    return run("sleep", "600")


@pytest.fixture
def books(postgres_server: str) -> Iterator[str]:
    """A database with a table of one column and a row, 1."""
    url = servers.create_database(postgres_server)

    async def make() -> None:
        connection = await asyncpg.connect(url)
        await connection.execute("CREATE TABLE t (n int PRIMARY KEY); INSERT INTO t VALUES (1)")
        await connection.close()

    servers.in_thread(make())
    yield url
    servers.drop_database(url)


@asynccontextmanager
async def tapped(background: Background, url: str) -> AsyncIterator[tuple[Record, Tap, str]]:
    """A record of all that is said to a database, the tap, and where that is."""
    record = Record(every=False)
    tap = await asyncio.to_thread(Tap, background, record, "postgres", url, Postgres)
    parts = urlsplit(url)
    try:
        at = f"{parts.username}@127.0.0.1:{tap.port}"
        yield record, tap, urlunsplit(parts._replace(netloc=at))
    finally:
        await asyncio.to_thread(tap.close)
    assert record.faults == []


async def rows(url: str) -> list[int]:
    connection = await asyncpg.connect(url)
    try:
        return [each["n"] for each in await connection.fetch("SELECT n FROM t ORDER BY n")]
    finally:
        await connection.close()


async def insert(db: Database, n: int) -> None:
    async with db.write() as tx:
        await tx.execute("INSERT INTO t VALUES ($1)", n)


async def everything(db: Database, connection: asyncpg.Connection) -> None:
    """One of each kind that a gateway says, in order."""
    await insert(db, 2)
    async with db.write() as tx:
        assert await tx.execute("UPDATE t SET n = 9 WHERE n = $1", 77) == 0
    async with db.read() as tx:
        await tx.fetch("SELECT n FROM t WHERE n > $1", 0)
    async with db.write() as tx:
        await tx.fetch(f"SELECT n FROM t WHERE n = $1{tx.for_update}", 1)
    with suppress(ZeroDivisionError):
        async with db.write() as tx:
            await tx.execute("DELETE FROM t WHERE n = $1", 1)
            raise ZeroDivisionError
    async with db.write() as tx:
        await tx.executemany("UPDATE t SET n = $1 WHERE n = $2", [(20, 2), (21, 20)])
        await tx.fetch("WITH gone AS (DELETE FROM t WHERE n = 1 RETURNING n) SELECT n FROM gone")
    await connection.execute("INSERT INTO t VALUES (3)")
    await connection.execute("INSERT INTO t VALUES ($1)", 4)
    assert await connection.fetchval("SELECT count(*) FROM t") == 3


async def test_what_changes_a_database_is_what_it_says_it_wrote(
    background: Background, books: str, process: servers.Process
) -> None:
    async with tapped(background, books) as (record, _, url):
        db, connection = await Database.connect(url), await asyncpg.connect(url)
        record.arm(process, None)
        await everything(db, connection)
        record.disarm()
        await connection.close()
        await db.close()
    changes = [each.said.words for each in record.messages if each.said.changes]
    assert changes == ["COMMIT insert t", "COMMIT update t, delete t", "insert t", "insert t"]
    said = [each.said.words for each in record.messages]
    assert said.count("COMMIT") == 2 + 1  # of two that found nothing to write, of one that read
    assert said.count("ROLLBACK") == 1
    assert record.classes(record.messages) == 5
    assert await rows(books) == [3, 4, 21]
    assert process.running


@pytest.mark.parametrize(("side", "stands"), [(BEFORE, [1]), (AFTER, [1, 2])])
async def test_killed_on_one_side_of_a_commit(
    background: Background, books: str, process: servers.Process, side: str, stands: list[int]
) -> None:
    """Before: nothing stands. After: it does, and nobody was told."""
    async with tapped(background, books) as (record, tap, url):
        db, other = await Database.connect(url), await asyncpg.connect(url)
        record.arm(process, Point("postgres", 1, side, "COMMIT insert t"))
        task = asyncio.create_task(insert(db, 2))
        await asyncio.to_thread(process.wait_end, 30)
        assert (record.fired, record.last.said.words) == (True, "COMMIT insert t")
        late = asyncio.create_task(other.execute("INSERT INTO t VALUES (5)"))
        await servers.eventually(lambda: record.held)
        assert not task.done()
        record.disarm()
        await asyncio.to_thread(tap.close)
        with pytest.raises(CommitUnknown):
            await task
        with pytest.raises(asyncpg.PostgresConnectionError):
            await late
        await db.close()
    assert await rows(books) == stands


async def test_what_is_to_be_killed_is_dead_when_nobody_looks_any_more(
    background: Background, process: servers.Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flow may end while a message in the background, the point, is still to be answered."""
    monkeypatch.setattr(taps, "_ANSWER_S", 1)
    record = Record(every=True)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        tap = await asyncio.to_thread(Tap, background, record, "upstream", url, Http)
        record.arm(process, Point("upstream", 1, AFTER))
        with socket.create_connection(("127.0.0.1", tap.port)) as line:
            line.sendall(b"GET / HTTP/1.1\r\n\r\n")
            await servers.eventually(lambda: record.fired)
            await asyncio.to_thread(record.disarm)
        assert not process.running
        await asyncio.to_thread(tap.close)


def test_the_points_are_both_sides_of_a_change_and_the_middle_between_two() -> None:
    def message(line: str, words: str, changes: bool = False) -> Message:
        return Message(line, Said(words, changes))

    asked, sent = message("customer", "asks", True), message("chain", "send", True)
    read, wrote = message("postgres", "SELECT"), message("postgres", "COMMIT x", True)
    run = [read, asked, read, read, read, wrote, sent, wrote, read]
    assert Record(every=False).points([run]) == [
        Point("", 0, AFTER, "", 1),
        Point("customer", 1, AFTER, "asks", 2),
        *(Point("postgres", 1, side, "COMMIT x") for side in (BEFORE, AFTER)),
        *(Point("chain", 1, side, "send") for side in (BEFORE, AFTER)),
        *(Point("postgres", 2, side, "COMMIT x") for side in (BEFORE, AFTER)),
        Point("postgres", 2, AFTER, "COMMIT x", 1),
    ]
    assert Record(every=False).classes(run) == 5
    assert len(Record(every=False).points([run, [read, read, *run]])) == 9
    every = Record(every=True)
    assert len(every.points([run, run])) == 2 * 8
    assert every.classes(run) == 9


def test_a_point_beyond_another_is_counted_over_all_lines(process: servers.Process) -> None:
    record = Record(every=False)
    record.arm(process, Point("postgres", 2, AFTER, "COMMIT x", 2))
    wrote = Message("postgres", Said("COMMIT x", changes=True))
    asked = Message("chain", Said("eth_call", changes=False))
    assert [record.passes(each) for each in (wrote, asked, wrote, asked)] == [""] * 4
    record.act()
    assert record.passes(asked) == BEFORE
    assert record.passes(asked) == ""
    record.arm(process, Point("", 0, AFTER, "", 1))
    record.act()
    assert record.passes(asked) == BEFORE


def test_a_request_is_a_message_when_it_is_whole() -> None:
    head = b"POST / HTTP/1.1\r\nHost: node\r\nContent-Length: 26\r\n\r\n"
    body = b'{"method":"eth_blockNumb"}'
    talk = JsonRpc()
    assert list(talk.sent(head)) == list(talk.sent(body[:9])) == []
    assert list(talk.sent(body[9:])) == [(head + body, Said("eth_blockNumb", changes=False))]
    assert talk.heard(b"HTTP/1.1 200 OK")
    sending = head.replace(b"26", b"35") + b'{"method":"eth_sendRawTransaction"}'
    assert [said for _, said in talk.sent(sending)] == [Said("eth_sendRawTransaction", True)]
    upstream = Http()
    chunked = b"PUT /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert list(upstream.sent(chunked)) == [(chunked, Said("PUT", changes=True))]
    assert list(upstream.sent(b"1\r\nx\r\n")) == [(b"1\r\nx\r\n", None)]


TRACE = """\
11 pwrite64(9</t/farebox.db-wal>, ""..., 24, 0) = 24
11 pwrite64(9</t/farebox.db-wal>, ""..., 4096, 24) = 4096
12 pwrite64(8</t/farebox.db>, ""..., 4096, 0) = 4096
11 pwrite64(9</t/farebox.db-wal>, ""..., 24, 4120 <unfinished ...>
12 fdatasync(8</t/farebox.db>) = 0
11 <... pwrite64 resumed>) = 24
11 fdatasync(9</t/farebox.db-wal>) = 0
12 fdatasync(9</t/farebox.db-wal>) = 0
"""


def test_of_a_commit_on_disk_the_middle_the_last_and_the_fsync(tmp_path: Path) -> None:
    disk, run = Disk(tmp_path), messages_of(TRACE)
    assert len(run) == 7
    assert disk.points([run]) == [
        *(Point("disk", 1, BEFORE, f"{call} farebox.db") for call in ("pwrite64", "fdatasync")),
        *(Point("disk", n, BEFORE, "pwrite64 farebox.db-wal") for n in (2, 3)),
        Point("disk", 1, BEFORE, "fdatasync farebox.db-wal"),
    ]
    assert disk.classes(run) == 2


async def test_what_is_not_minted_is_lost_and_what_did_not_come_is_double(
    sqlite_gateway: Gateway, api: Api
) -> None:
    site = Site(sqlite_gateway, api)
    payer, stranger = site.wallet(), site.wallet()

    async def ended() -> str:
        return ""

    tx_hash = await asyncio.to_thread(site.move, payer, 1_000_000)
    minted = await site.post("/farebox/v1/credits/purchase", {"transaction_hash": tx_hash})
    assert minted.status_code == 200, minted.text

    async def judged(payer: object, owner: object, stood: str = "") -> Verdict:
        attempt = Attempt(ended, payer, owner, lambda: "")  # type: ignore[arg-type]
        return await sweep._judge(site, attempt, stood, "here")

    assert await judged(payer, payer) == Verdict(0, 0, "")
    lost, double = await judged(payer, stranger), await judged(stranger, payer)
    assert (lost.lost, lost.duplicated, double.lost, double.duplicated) == (1, 0, 0, 1)
    assert lost.fault and double.fault
    assert "202" in (await judged(payer, payer, "202")).fault


def test_what_the_log_has_is_counted_and_not_done_again(tmp_path: Path) -> None:
    log = tmp_path / "kills.jsonl"
    point = {"line": "chain", "at": 1, "side": BEFORE, "words": "eth_call", "beyond": 0}
    row = {"point": point, "line": "chain", "said": "eth_call", "recovered_s": 2.5, "load": 1.0}
    first = Swept("purchase", "sqlite", log=log)
    first.record({**row, "verdict": Verdict(0, 0, "")._asdict()})
    first.record({**row, "verdict": Verdict(1, 0, "gone")._asdict()})
    again, other = Swept("purchase", "sqlite", log=log), Swept("refund", "sqlite", log=log)
    again.resume()
    other.resume()
    assert (again.kills.total(), again.lost, again.faults) == (2, 1, ["gone"])
    assert again.done == {Point(**point)}
    assert other.kills.total() == 0
    with pytest.raises(AssertionError):
        again.check()
