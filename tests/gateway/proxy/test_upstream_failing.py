"""Upstreams that fail: every way has its name, and a cut answer is never a whole one."""

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
from gateway.proxy.client import UpstreamClient
from gateway.proxy.upstream import Timeouts
from tests.gateway.proxy.calls import calling, to, whole
from tests.gateway.proxy.misbehave import Upstream, misbehaving
from tests.servers import eventually

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
    await eventually(lambda: up.open_connections == 0)  # the connection was cut, not kept
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
    async with calling(client, up, b"/echo", "POST", body=big) as answer:
        read = 0
        async for chunk in answer.chunks():
            read += len(chunk)
            waited_s = answer.waited_s
            await asyncio.sleep(0.01)
            assert answer.waited_s == waited_s
    assert read > len(big)


async def test_an_upload_that_goes_on_is_not_timed_out(
    up: Upstream, client: UpstreamClient
) -> None:
    """The wait for the answer begins anew with each piece sent."""
    until_s: list[float] = []

    async def slowly() -> AsyncIterator[bytes]:
        for _ in range(6):
            yield b"x"
            assert call._connection is not None
            until_s.append(call._connection._deadline)
            await asyncio.sleep(0.01)

    call = calling(client, up, b"/echo", "POST", body=slowly())
    async with call as answer:
        assert (await whole(answer)).endswith(b"xxxxxx")
    assert len(until_s) == 6 and until_s == sorted(set(until_s))


@pytest.mark.parametrize("target", [b"/early", b"/early-keep"])
async def test_an_answer_before_the_body_was_sent(
    target: bytes, up: Upstream, client: UpstreamClient
) -> None:
    """The rest of the body is not sent, and its connection never carries another request."""
    ended = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        try:
            while True:
                await asyncio.sleep(0)
                yield b"x" * 65_536
        finally:
            ended.set()

    async with calling(client, up, target, "POST", body=endless()) as answer:
        assert (answer.status, await whole(answer)) == (413, b"too much")
    await asyncio.wait_for(ended.wait(), 30)
    async with calling(client, up, b"/echo") as answer:
        assert (await whole(answer)).startswith(b"GET /echo")
    assert up.connections == 2
    up.released.set()
    await client.close()
    await eventually(lambda: up.open_connections == 0)


async def test_a_place_in_the_pool_comes_back_whenever_a_call_is_cancelled(
    up: Upstream, client: UpstreamClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while it waits for a body that takes its time to end."""
    monkeypatch.setattr("gateway.proxy.client.MAX_CONNECTIONS", 1)
    ending, ended = asyncio.Event(), asyncio.Event()

    async def slow_to_end() -> AsyncIterator[bytes]:
        try:
            while True:
                await asyncio.sleep(0)
                yield b"x" * 65_536
        finally:
            ending.set()
            await ended.wait()

    async def call() -> None:
        async with calling(client, up, b"/early-keep", "POST", body=slow_to_end()):
            pass

    calls = asyncio.create_task(call())
    await ending.wait()
    calls.cancel()
    await asyncio.wait([calls])
    ended.set()
    async with calling(client, up, b"/echo") as answer:
        assert (await whole(answer)).startswith(b"GET /echo")
    up.released.set()
