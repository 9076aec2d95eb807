"""Calls of an upstream: what is sent is what was given, what is broken is named, and exactly one
request is ever started."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import Problem
from gateway.proxy import client as client_module
from gateway.proxy import target as targets
from gateway.proxy.client import Origin, UpstreamClient, parse_origin, request_head
from gateway.proxy.upstream import Answer, Timeouts, open_upstream
from tests.gateway.proxy.misbehave import Upstream, misbehaving, until
from tests.gateway.proxy.test_target import ACCEPTED

QUICK = Timeouts(connect_s=5, first_byte_s=5, idle_s=5, total_s=20)


@pytest.fixture
async def up() -> AsyncIterator[Upstream]:
    async with misbehaving() as server:
        yield server


@pytest.fixture
async def client() -> AsyncIterator[UpstreamClient]:
    made = UpstreamClient()
    yield made
    await made.close()


def calling(
    client: UpstreamClient,
    up: Upstream,
    target: bytes,
    method: str = "GET",
    *,
    headers: list[tuple[bytes, bytes]] | None = None,
    body: Any = None,
    timeouts: Timeouts = QUICK,
    **more: Any,
) -> open_upstream:
    origin = parse_origin(up.url)
    fields = [(b"host", origin.authority), *(headers or [])]
    return open_upstream(
        client, origin, method, target, headers=fields, body=body, timeouts=timeouts, **more
    )


async def whole(answer: Answer) -> bytes:
    return b"".join([chunk async for chunk in answer.chunks()])


# --- what goes out ------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", ACCEPTED)
async def test_every_accepted_target_arrives_unchanged(
    raw: bytes, up: Upstream, client: UpstreamClient
) -> None:
    async with calling(client, up, targets.parse(raw).raw) as answer:
        await whole(answer)
    assert [r.target for r in up.requests] == [raw]


async def test_nothing_is_added_and_bytes_are_kept(up: Upstream, client: UpstreamClient) -> None:
    fields = [(b"x-a", b"1"), (b"x-a", b"2"), (b"x-utf8", "é".encode()), (b"x-raw", b"caf\xe9\x80")]
    async with calling(client, up, b"/echo", headers=fields) as answer:
        assert answer.status == 200
        sent = await whole(answer)
    authority = parse_origin(up.url).authority
    assert sent == (
        b"GET /echo HTTP/1.1\r\nhost: " + authority + b"\r\nx-a: 1\r\nx-a: 2\r\n"
        b"x-utf8: \xc3\xa9\r\nx-raw: caf\xe9\x80\r\n\r\n"
    )


@pytest.mark.parametrize(
    ("method", "body", "framing"),
    [
        ("GET", None, []),
        ("GET", b"", []),
        ("GET", b"x", [(b"content-length", b"1")]),
        ("DELETE", None, []),
        ("POST", None, [(b"content-length", b"0")]),
        ("POST", b"", [(b"content-length", b"0")]),
        ("POST", b"abc", [(b"content-length", b"3")]),
        ("PUT", None, [(b"content-length", b"0")]),
        ("QUERY", b"q", [(b"content-length", b"1")]),
    ],
)
async def test_framing_of_whole_bodies(
    method: str,
    body: bytes | None,
    framing: list[tuple[bytes, bytes]],
    up: Upstream,
    client: UpstreamClient,
) -> None:
    async with calling(client, up, b"/echo", method, body=body) as answer:
        await whole(answer)
    (request,) = up.requests
    assert list(request.headers[1:]) == framing
    assert request.body == (body or b"")


async def pieces(*parts: bytes | Exception) -> AsyncIterator[bytes]:
    for part in parts:
        await asyncio.sleep(0)
        if isinstance(part, Exception):
            raise part
        yield part


@pytest.mark.parametrize(
    ("length", "framing"),
    [(None, (b"transfer-encoding", b"chunked")), (11, (b"content-length", b"11"))],
)
async def test_a_streamed_body(
    length: int | None, framing: tuple[bytes, bytes], up: Upstream, client: UpstreamClient
) -> None:
    body = pieces(b"hello", b"", b" world")
    async with calling(client, up, b"/echo", "POST", body=body, length=length) as answer:
        await whole(answer)
    (request,) = up.requests
    assert request.body == b"hello world"
    assert list(request.headers[1:]) == [framing]


async def test_a_large_streamed_body_both_ways(up: Upstream, client: UpstreamClient) -> None:
    parts = [bytes([i % 256]) * 100_000 for i in range(50)]
    async with calling(client, up, b"/echo", "POST", body=pieces(*parts)) as answer:
        assert (await whole(answer)).endswith(b"".join(parts))


@pytest.mark.parametrize("length", [None, 100])
async def test_a_body_that_fails_is_never_finished_upstream(
    length: int | None, up: Upstream, client: UpstreamClient
) -> None:
    """A digest that turns out wrong at the end, or a caller that hangs up."""

    class GoneError(Exception):
        pass

    body = pieces(b"hello", GoneError())
    with pytest.raises(GoneError):
        async with calling(client, up, b"/echo", "POST", body=body, length=length):
            pytest.fail("an answer to half a request")
    await until(lambda: up.open_connections == 0)
    assert (up.begun, up.requests) == (1, [])


@pytest.mark.parametrize("parts", [[b"hello"], [b"hello", b" world!"]])
async def test_a_body_of_another_length_than_said_is_a_fault(
    parts: list[bytes], up: Upstream, client: UpstreamClient
) -> None:
    with pytest.raises(RuntimeError, match="Content-Length"):
        async with calling(client, up, b"/echo", "POST", body=pieces(*parts), length=11):
            pytest.fail("an answer to a request that lies")
    await until(lambda: up.open_connections == 0)
    assert up.requests == []


@pytest.mark.parametrize(
    ("method", "target", "headers"),
    [
        ("GET", b"/a\r\nX: 1", []),
        ("GET", b"/a b", []),
        ("GET\r\n", b"/a", []),
        ("GET /x HTTP/1.1\r\n", b"/a", []),
        ("GET", b"/a", [(b"x", b"1\r\ny: 2")]),
        ("GET", b"/a", [(b"x", b"1\ny: 2")]),
        ("GET", b"/a", [(b"x", b"1\0")]),
        ("GET", b"/a", [(b"x\r\ny", b"1")]),
    ],
)
def test_a_second_request_cannot_be_written(
    method: str, target: bytes, headers: list[tuple[bytes, bytes]]
) -> None:
    with pytest.raises(ValueError):
        request_head(method, target, headers)


# --- what comes back ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (b"/500", (500, b"broken", 6)),
        (b"/402", (402, b"{}", 2)),
        (b"/204", (204, b"", None)),
        (b"/304", (304, b"", None)),
        (b"/redirect", (302, b"", 0)),
        (b"/gzip", (200, b"\x1f\x8bnot really", 12)),
        (b"/chunked", (200, b"hello world", None)),
        (b"/interim", (200, b"done", 4)),
        (b"/until-close", (200, b"all of it", None)),
        (b"/http10", (200, b"all of it", None)),
    ],
)
async def test_good_answers(
    target: bytes, expected: tuple[int, bytes, int | None], up: Upstream, client: UpstreamClient
) -> None:
    async with calling(client, up, target) as answer:
        assert (answer.status, await whole(answer), answer.content_length) == expected
        assert answer.complete
    assert up.count(target) == 1


async def test_headers_come_raw(up: Upstream, client: UpstreamClient) -> None:
    async with calling(client, up, b"/cookie") as answer:
        cookies = [v for n, v in answer.headers if n.lower() == b"set-cookie"]
        assert cookies == [b"a=1", b"b=2"]
    async with calling(client, up, b"/latin") as answer:
        assert (b"X-Name", b"caf\xe9") in list(answer.headers)
    async with calling(client, up, b"/cookie") as answer:
        await whole(answer)
    assert up.requests[-1].header(b"cookie") == []  # no jar
    async with calling(client, up, b"/chunked") as answer:
        await whole(answer)
        assert not any(n.lower() == b"x-t" for n, _ in answer.headers)  # no trailers
    async with calling(client, up, b"/interim") as answer:
        assert [n for n, _ in answer.headers] == [b"X-Final", b"Content-Length"]


async def test_head_has_a_length_and_no_body(up: Upstream, client: UpstreamClient) -> None:
    for _ in range(2):
        async with calling(client, up, b"/echo", "HEAD") as answer:
            assert (answer.status, answer.content_length) == (200, 42)
            assert await whole(answer) == b""
    assert up.connections == 1


async def test_read_stops_at_the_limit_and_the_rest_streams(
    up: Upstream, client: UpstreamClient
) -> None:
    async with calling(client, up, b"/chunked") as answer:
        assert await answer.read(100) == (b"hello world", True)
    big = b"x" * 2_000_000
    async with calling(client, up, b"/echo", "POST", body=big) as answer:
        first, complete = await answer.read(65_536)
        assert not complete and len(first) > 65_536
        assert (first + await whole(answer)).endswith(big)
    async with calling(client, up, b"/204") as answer:
        assert await answer.read(0) == (b"", True)


async def test_a_flood_is_not_collected(up: Upstream, client: UpstreamClient) -> None:
    """The upstream is held back while nobody reads."""
    async with calling(client, up, b"/flood") as answer:
        connection = client_module.Connection
        assert isinstance(answer._connection, connection)
        await until(lambda: answer._connection._paused)
        for _ in range(50):
            await asyncio.sleep(0)
        assert answer._connection._buffered < 4 * client_module.HIGH_WATER_BYTES
        taken = 0
        async for chunk in answer.chunks():
            taken += len(chunk)
            if taken > 5_000_000:
                break
    await until(lambda: up.open_connections == 0)


# --- what is broken -----------------------------------------------------------------------------

BROKEN_HEADS = [
    b"/reset",
    b"/close",
    b"/truncate-head",
    b"/garbage",
    b"/two-lengths",
    b"/both-framings",
    b"/coding",
    b"/switch",
    b"/status-999",
    b"/many-interims",
    b"/huge-head",
    b"/endless-head",
]
BROKEN_BODIES = [b"/truncate", b"/truncate-chunked", b"/truncate-in-chunk", b"/bad-chunk"]


@pytest.mark.parametrize("target", BROKEN_HEADS)
async def test_no_answer(target: bytes, up: Upstream, client: UpstreamClient) -> None:
    with pytest.raises(Problem) as raised:
        async with calling(client, up, target):
            pytest.fail("an answer was made of nothing")
    assert raised.value.code == "upstream_error"
    assert up.count(target) == 1


@pytest.mark.parametrize("target", BROKEN_BODIES)
async def test_a_cut_answer_is_not_a_whole_one(
    target: bytes, up: Upstream, client: UpstreamClient
) -> None:
    with pytest.raises(Problem) as raised:
        async with calling(client, up, target) as answer:
            assert answer.status == 200
            await whole(answer)
    assert raised.value.code == "upstream_error"
    with pytest.raises(Problem):
        async with calling(client, up, target) as answer:
            await answer.read(1_000_000)


async def test_a_reset_within_the_answer(up: Upstream, client: UpstreamClient) -> None:
    with pytest.raises(Problem) as raised:
        async with calling(client, up, b"/reset-mid") as answer:
            read = b""
            async for chunk in answer.chunks():
                read += chunk
                up.released.set()
            pytest.fail("the end of the answer was invented")
    assert (raised.value.code, read) == ("upstream_error", b"first")


async def test_nobody_listens(client: UpstreamClient) -> None:
    async with misbehaving() as gone:
        pass
    with pytest.raises(Problem) as raised:
        async with calling(client, gone, b"/"):
            pytest.fail("connected to nothing")
    assert raised.value.code == "upstream_error"
    assert str(gone.port) not in raised.value.detail  # callers learn nothing of the inside


async def test_no_such_host(client: UpstreamClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The resolver is replaced: tests have no network to ask."""

    def nothing(*args: Any, **kwargs: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nothing)
    with pytest.raises(Problem) as raised:
        async with to(client, "http://no-such-host.invalid"):
            pytest.fail("connected to nothing")
    assert raised.value.code == "upstream_error"


def to(client: UpstreamClient, url: str, timeouts: Timeouts = QUICK) -> open_upstream:
    origin = parse_origin(url)
    fields = [(b"host", origin.authority)]
    return open_upstream(
        client, origin, "GET", b"/echo", headers=fields, body=None, timeouts=timeouts
    )


async def test_tls_to_a_plain_port(client: UpstreamClient) -> None:
    def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(plain, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(Problem) as raised:
            async with to(client, f"https://127.0.0.1:{port}"):
                pytest.fail("TLS with a plain server")
    assert raised.value.code == "upstream_error"


def _certificate(folder: Path) -> ssl.SSLContext:
    """A server context with a certificate that only itself vouches for, for 127.0.0.1."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "upstream")])
    now = datetime.now(UTC)
    local = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(local, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(certificate.public_bytes(pem))
    (folder / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context


async def test_tls(client: UpstreamClient, tmp_path: Path) -> None:
    """An upstream nobody vouches for is refused; one we were told to trust is called, twice over
    one connection."""
    async with misbehaving(_certificate(tmp_path)) as secure:
        url = f"https://127.0.0.1:{secure.port}"
        with pytest.raises(Problem) as raised:
            async with to(client, url):
                pytest.fail("an unknown certificate was trusted")
        assert raised.value.code == "upstream_error"
        assert secure.begun == 0
        trusting = UpstreamClient(tls=ssl.create_default_context(cafile=tmp_path / "cert.pem"))
        for _ in range(2):
            async with to(trusting, url) as answer:
                assert (await whole(answer)).startswith(b"GET /echo")
        assert secure.connections == 1
        await trusting.close()


@pytest.mark.parametrize(
    ("target", "timeouts"),
    [
        (b"/stall", Timeouts(first_byte_s=0.05)),
        (b"/stall", Timeouts(total_s=0.05)),
        (b"/stall-mid", Timeouts(idle_s=0.05)),
        (b"/stall-mid", Timeouts(total_s=0.05)),
        (b"/drip", Timeouts(total_s=0.2)),
    ],
)
async def test_timeouts(
    target: bytes, timeouts: Timeouts, up: Upstream, client: UpstreamClient
) -> None:
    with pytest.raises(Problem) as raised:
        async with calling(client, up, target, timeouts=timeouts) as answer:
            await whole(answer)
    assert raised.value.code == "upstream_timeout"
    up.released.set()
    await until(lambda: up.open_connections == 0)  # the connection was cut, not kept
    assert up.count(target) == 1


async def test_a_connection_that_cannot_be_made_in_time(client: UpstreamClient) -> None:
    """A listener whose queue is full and that accepts nothing."""
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        port = deaf.getsockname()[1]
        queued = []
        for _ in range(4):
            s = socket.socket()
            s.setblocking(False)
            s.connect_ex(("127.0.0.1", port))
            queued.append(s)
        with pytest.raises(Problem) as raised:
            async with to(client, f"http://127.0.0.1:{port}", Timeouts(connect_s=0.1)):
                pytest.fail("connected to a full queue")
        assert raised.value.code == "upstream_timeout"
        for s in queued:
            s.close()


async def test_a_slow_reader_does_not_time_the_upstream_out(
    up: Upstream, client: UpstreamClient
) -> None:
    """Time the caller takes does not count: otherwise reading slowly would make a call free."""
    big = b"x" * 3_000_000
    limits = Timeouts(first_byte_s=5, idle_s=5, total_s=0.3)
    async with calling(client, up, b"/echo", "POST", body=big, timeouts=limits) as answer:
        read = 0
        async for chunk in answer.chunks():
            read += len(chunk)
            if read < 1_200_000:
                await asyncio.sleep(0.1)
    assert read > len(big)


async def test_an_upload_that_goes_on_is_not_timed_out(
    up: Upstream, client: UpstreamClient
) -> None:
    """The wait for the answer begins with the last piece sent."""

    async def slowly() -> AsyncIterator[bytes]:
        for _ in range(6):
            await asyncio.sleep(0.1)
            yield b"x"

    limits = Timeouts(first_byte_s=0.4)
    async with calling(client, up, b"/echo", "POST", body=slowly(), timeouts=limits) as answer:
        assert (await whole(answer)).endswith(b"xxxxxx")


async def test_an_answer_before_the_body_was_sent(up: Upstream, client: UpstreamClient) -> None:
    ended = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        try:
            while True:
                await asyncio.sleep(0)
                yield b"x" * 65_536
        finally:
            ended.set()

    async with calling(client, up, b"/early", "POST", body=endless()) as answer:
        assert (answer.status, await whole(answer)) == (413, b"too much")
    await asyncio.wait_for(ended.wait(), 5)
    up.released.set()
    await until(lambda: up.open_connections == 0)


# --- connections --------------------------------------------------------------------------------


async def test_connections_are_used_again(up: Upstream, client: UpstreamClient) -> None:
    for target in (b"/echo", b"/500", b"/204", b"/304", b"/chunked", b"/interim", b"/echo"):
        async with calling(client, up, target) as answer:
            await whole(answer)
    async with calling(client, up, b"/echo", "POST", body=pieces(b"a", b"b")) as answer:
        await whole(answer)
    assert (up.connections, len(up.requests)) == (1, 8)


@pytest.mark.parametrize("target", [b"/extra", b"/until-close", b"/http10"])
async def test_connections_that_cannot_be_used_again_are_not(
    target: bytes, up: Upstream, client: UpstreamClient
) -> None:
    async with calling(client, up, target) as answer:
        body = await whole(answer)
    assert body in (b"body", b"all of it")
    async with calling(client, up, b"/echo") as answer:
        assert (await whole(answer)).startswith(b"GET /echo")
    assert up.connections == 2


async def test_an_answer_left_half_read_costs_its_connection(
    up: Upstream, client: UpstreamClient
) -> None:
    async with calling(client, up, b"/stall-mid"):
        pass
    async with calling(client, up, b"/echo") as answer:
        assert (await whole(answer)).startswith(b"GET /echo")
    assert up.connections == 2


async def test_an_unread_but_whole_answer_keeps_its_connection(
    up: Upstream, client: UpstreamClient
) -> None:
    big = b"x" * 300_000  # above the high-water mark, so reading was paused
    async with calling(client, up, b"/echo", "POST", body=big) as answer:
        await answer.read(200_000)
        await until(lambda: answer.complete or answer._connection._paused)
    for _ in range(2):
        async with calling(client, up, b"/echo") as answer:
            assert (await whole(answer)).startswith(b"GET /echo")


async def test_a_connection_that_was_closed_meanwhile_is_not_used(
    up: Upstream, client: UpstreamClient
) -> None:
    """Without giving the event loop a turn to notice: the socket itself is asked."""
    for i in range(20):
        async with calling(client, up, b"/close-after") as answer:
            await whole(answer)
        if i % 2:
            await until(lambda: up.open_connections == 0)
    assert up.count(b"/close-after") == 20


async def test_a_request_is_never_sent_twice(up: Upstream, client: UpstreamClient) -> None:
    """The connection worked before, the method is idempotent, and still: one request, one error."""
    async with calling(client, up, b"/echo") as answer:
        await whole(answer)
    for target in (b"/close", b"/reset"):
        with pytest.raises(Problem):
            async with calling(client, up, target):
                pytest.fail("an answer was made of nothing")
        assert up.count(target) == 1
        async with calling(client, up, b"/echo") as answer:
            await whole(answer)


async def test_old_connections_are_not_used(
    up: Upstream, client: UpstreamClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "KEEP_IDLE_S", 0.0)
    for _ in range(3):
        async with calling(client, up, b"/echo") as answer:
            await whole(answer)
    assert up.connections == 3


async def test_the_number_of_connections_is_bounded(
    up: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "MAX_CONNECTIONS", 2)
    client = UpstreamClient()
    slow = Timeouts(connect_s=0.1)
    async with calling(client, up, b"/stall-mid"), calling(client, up, b"/stall-mid"):
        with pytest.raises(Problem) as raised:
            async with calling(client, up, b"/echo", timeouts=slow):
                pytest.fail("a third connection")
        assert raised.value.code == "upstream_timeout"
    async with calling(client, up, b"/echo") as answer:
        await whole(answer)
    await client.close()


async def test_cancelling_a_call_frees_its_place(
    up: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "MAX_CONNECTIONS", 1)
    client = UpstreamClient()

    async def call(body: Any = None) -> None:
        async with calling(client, up, b"/stall", "POST", body=body):
            pytest.fail("a stalled upstream answered")

    for body in (None, pieces(b"x")):
        task = asyncio.create_task(call(body))
        await until(lambda: up.count(b"/stall") > 0)
        up.requests.clear()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    async with calling(client, up, b"/echo") as answer:
        await whole(answer)
    await client.close()


async def test_a_closed_client_makes_no_connections(up: Upstream, client: UpstreamClient) -> None:
    async with calling(client, up, b"/echo") as answer:
        await whole(answer)
    await client.close()
    await until(lambda: up.open_connections == 0)
    with pytest.raises(Problem):
        async with calling(client, up, b"/echo"):
            pytest.fail("a closed client called")


async def test_many_at_once(up: Upstream, client: UpstreamClient) -> None:
    async def one(i: int) -> None:
        async with calling(client, up, b"/n?%d" % i, "POST", body=b"%d" % i) as answer:
            got = await whole(answer)
        assert got.startswith(b"POST /n?%d " % i) and got.endswith(b"\r\n\r\n%d" % i)

    await asyncio.gather(*(one(i) for i in range(200)))
    assert len(up.requests) == 200


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("http://a.example", Origin(False, "a.example", 80, b"a.example", b"")),
        ("https://a.example/", Origin(True, "a.example", 443, b"a.example", b"")),
        (
            "http://127.0.0.1:9000/api/",
            Origin(False, "127.0.0.1", 9000, b"127.0.0.1:9000", b"/api"),
        ),
        ("http://[::1]:9", Origin(False, "::1", 9, b"[::1]:9", b"")),
    ],
)
def test_origins(url: str, origin: Origin) -> None:
    assert parse_origin(url) == origin


@pytest.mark.parametrize(
    "url",
    [
        "ftp://a",
        "http://",
        "a.example",
        "http://u:p@a",
        "http://a?x",
        "http://a#x",
        "http://a/../b",
        "http://a/b//c",
    ],
)
def test_urls_that_are_no_origin(url: str) -> None:
    with pytest.raises(ValueError):
        parse_origin(url)


def test_tls_is_checked_by_default() -> None:
    client = UpstreamClient()
    context = client._context()
    assert context.verify_mode is ssl.CERT_REQUIRED and context.check_hostname
