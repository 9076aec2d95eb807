"""What the upstream or the caller does wrong: who is charged, what arrives, what it costs us."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from gateway.proxy.streaming import NOT_READING_S
from tests import servers
from tests.e2e.stage import PRICE_UNITS, Api, Gate, Gateway, answer_when_open
from tests.e2e.wallet import Wallet, buy, offers, outcome, problem
from tests.gateway.proxy import misbehave
from tests.gateway.proxy.misbehave import Writer
from tests.servers import eventually

Launch = Callable[..., Gateway]
MINTED = 1_000_000
LONG = 300_000


# --- not charged ----------------------------------------------------------------------------------

FAULTS = {
    "/500": "upstream_error",
    "/reset": "upstream_error",
    "/close": "upstream_error",
    "/truncate": "upstream_error",
    "/truncate-chunked": "upstream_error",
    "/truncate-in-chunk": "upstream_error",
    "/truncate-head": "upstream_error",
    "/bad-chunk": "upstream_error",
    "/garbage": "upstream_error",
    "/two-lengths": "upstream_error",
    "/endless-head": "upstream_error",
    "/switch": "upstream_error",
    "/stall": "upstream_timeout",
    "/stall-mid": "upstream_timeout",
    "/402": "upstream_wants_payment",
}
REASONS = {"/500": "upstream_status_500"}  # elsewhere the code


@pytest.mark.parametrize("path", FAULTS)
async def test_a_call_that_fails_is_not_charged(
    path: str, sqlite_gateway: Gateway, api: Api, wallet: Wallet
) -> None:
    gateway, code = sqlite_gateway, FAULTS[path]
    before = api.calls(path)
    async with gateway.client() as http:
        await buy(http, wallet)
        headers = wallet.sign("GET", gateway.url + path)
        answer = await http.get(path, headers=headers)
        told = problem(answer, code)
        assert told["status"] in (502, 504)
        assert answer.headers["farebox-charged"] == "0"
        assert answer.headers["farebox-balance"] == "100"
        assert answer.headers["farebox-request-id"] in headers["Signature-Input"]
        assert "payment-required" not in answer.headers
        again = await http.get(path, headers=headers)
        assert (again.status_code, again.content) == (answer.status_code, answer.content)
        assert again.headers["farebox-replayed"] == "true"
    assert api.calls(path) == before + 1  # nothing is tried twice
    assert gateway.balance(wallet.address) == (MINTED, 0)
    assert gateway.transfers(wallet.address)[1:] == [("void", 0, REASONS.get(path, code))]


async def test_a_stream_that_takes_too_long_is_cut_and_not_charged(
    sqlite_gateway: Gateway, wallet: Wallet
) -> None:
    gateway, got = sqlite_gateway, b""
    async with gateway.client() as http:
        await buy(http, wallet)
        signed = wallet.sign("GET", gateway.url + "/drip")
        with pytest.raises(httpx.RemoteProtocolError):
            async with http.stream("GET", "/drip", headers=signed) as answer:
                async for piece in answer.aiter_raw():
                    got += piece
        assert set(got) == set(b"x")
    await eventually(lambda: gateway.balance(wallet.address) == (MINTED, 0), "the void")
    assert gateway.transfers(wallet.address)[1:] == [("void", 0, "upstream_timeout")]


async def test_a_paid_call_that_fails_leaves_credits(
    gateway: Gateway, api: Api, wallet: Wallet
) -> None:
    async with gateway.client() as http:
        header = {"PAYMENT-SIGNATURE": wallet.pay(offers(await http.get("/500"))[0])}
        answer = await http.get("/500", headers=header)
        problem(answer, "upstream_error")
        assert outcome(answer)["success"] is True  # the money has moved, and is the payer's
        assert answer.headers["farebox-paid-from"] == "settlement"
        assert answer.headers["farebox-charged"] == "0"
        assert gateway.balance(wallet.address) == (PRICE_UNITS, 0)
        url = gateway.url + "/v1/instead"
        assert (await http.get("/v1/instead", headers=wallet.sign("GET", url))).status_code == 200
    assert gateway.balance(wallet.address) == (0, 0)


async def test_nobody_listens_at_the_upstream(launch: Launch, wallet: Wallet, target: str) -> None:
    gateway = launch("sqlite", running=False)
    gateway.upstream_url = f"http://127.0.0.1:{servers.free_port()}"
    gateway.start()
    async with gateway.client() as http:
        await buy(http, wallet)
        answer = await http.get(target, headers=wallet.sign("GET", gateway.url + target))
        problem(answer, "upstream_error")
        problem(await http.get("/free/x"), "upstream_error")
    assert gateway.balance(wallet.address) == (MINTED, 0)


async def test_what_the_upstream_refuses_is_passed_on_and_not_charged(
    sqlite_gateway: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    async def refuse(writer: Writer, gate: Gate) -> bool:
        fields = (b"Content-Type: text/plain", b"PAYMENT-REQUIRED: e30=", b"Set-Cookie: a=1")
        writer.write(misbehave.answer(b"no such city", *fields, status=b"404 Not Found"))
        return True

    gate = api.behave(target, refuse)
    async with sqlite_gateway.client() as http:
        await buy(http, wallet)
        headers = wallet.sign("GET", sqlite_gateway.url + target)
        answer = await http.get(target, headers=headers)
        assert (answer.status_code, answer.text) == (404, "no such city")
        assert answer.headers["farebox-charged"] == "0"
        assert answer.headers["set-cookie"] == "a=1"
        assert "payment-required" not in answer.headers
        http.cookies.clear()
        again = await http.get(target, headers=headers)
        assert (again.status_code, again.text) == (404, "no such city")
        assert again.headers["content-type"] == "text/plain"
        assert "set-cookie" not in again.headers  # it was the first one's
        assert again.headers["access-control-allow-origin"] == "*"
    assert gate.arrived == 1
    assert sqlite_gateway.transfers(wallet.address)[1:] == [("void", 0, "upstream_status_404")]


# --- charged --------------------------------------------------------------------------------------


async def test_answers_of_other_kinds_are_charged_and_passed_on(
    sqlite_gateway: Gateway, api: Api, wallet: Wallet
) -> None:
    async with sqlite_gateway.client() as http:
        await buy(http, wallet)

        async def get(path: str) -> httpx.Response:
            return await http.get(path, headers=wallet.sign("GET", sqlite_gateway.url + path))

        followed = api.calls("/echo")
        moved = await get("/redirect")
        assert (moved.status_code, moved.headers["location"]) == (302, "/echo")
        assert api.calls("/echo") == followed  # the gateway follows nobody
        assert (await get("/204")).status_code == 204
        assert (await get("/304")).status_code == 304
        assert (await get("/chunked")).text == "hello world"
        assert (await get("/interim")).text == "done"
    charged = [("capture", PRICE_UNITS, None)]
    assert sqlite_gateway.transfers(wallet.address)[1:] == charged * 5


async def test_a_redirect_leads_to_the_public_address(
    launch: Launch, api: Api, wallet: Wallet, target: str
) -> None:
    """Paid or free, the upstream's own origin is not shown."""
    gateway = launch(
        "sqlite",
        routes=f"""[
      {{ match = "GET {target}/free", price = "free" }},
      {{ match = "GET /*", price = "$0.01" }},
    ]
mount = "/shop\"""",
    )
    gone = f"{api.url}/a?b=1".encode()

    async def moves(writer: Writer, gate: Gate) -> bool:
        field = b"Location: " + gone
        writer.write(misbehave.answer(b"", field, status=b"307 Temporary Redirect"))
        return True

    api.behave(target, moves)
    api.behave(target + "/free", moves)
    async with gateway.client() as http:
        await buy(http, wallet)
        for path in ("/shop" + target, f"/shop{target}/free"):
            answer = await http.get(path, headers=wallet.sign("GET", gateway.url + path))
            assert answer.status_code == 307
            assert answer.headers["location"] == f"{gateway.url}/shop/a?b=1"
    assert gateway.transfers(wallet.address)[1:] == [("capture", PRICE_UNITS, None)]


def long_answer(pieces: int = 30) -> Callable[[Writer, Gate], object]:
    """A behaviour: a long answer whose last byte waits for the gate."""

    async def behave(writer: Writer, gate: Gate) -> bool:
        size = LONG // pieces
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {pieces * size + 1}\r\n\r\n".encode())
        for n in range(pieces):
            writer.write(bytes([65 + n % 26]) * size)
            await writer.drain()
        await gate.wait()
        writer.write(b"!")
        return True

    return behave


async def test_a_long_answer_is_charged_before_its_last_bytes(
    gateway: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    gate = api.behave(target, long_answer())  # type: ignore[arg-type]  # it is one
    got = b""
    async with gateway.client() as http:
        await buy(http, wallet)
        headers = wallet.sign("GET", gateway.url + target)
        async with http.stream("GET", target, headers=headers) as answer:
            assert answer.status_code == 200
            assert answer.headers["farebox-held"] == "1"
            assert "farebox-charged" not in answer.headers
            assert answer.headers["content-length"] == str(LONG + 1)
            async for piece in answer.aiter_raw():
                got += piece
                if len(got) > LONG // 2 and gate.arrived == 1 and not gate.opened:
                    assert gateway.balance(wallet.address) == (MINTED - PRICE_UNITS, PRICE_UNITS)
                    gate.open()
            assert len(got) == LONG + 1 and got.endswith(b"!")
        # Whoever has the last byte is charged already.
        assert gateway.balance(wallet.address) == (MINTED - PRICE_UNITS, 0)
        again = await http.get(target, headers=headers)
        assert again.headers["farebox-replayed"] == "true"
        assert again.json()["receipt"]["charged_units"] == PRICE_UNITS
    assert gate.arrived == 1


async def test_a_long_answer_that_breaks_off_is_cut_and_not_charged(
    gateway: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    async def breaks(writer: Writer, gate: Gate) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + b"x" * LONG)
        await writer.drain()
        await gate.wait()
        misbehave.reset(writer)
        return False

    gate = api.behave(target, breaks)
    async with gateway.client() as http:
        await buy(http, wallet)
        headers = wallet.sign("GET", gateway.url + target)
        with pytest.raises(httpx.RemoteProtocolError):
            async with http.stream("GET", target, headers=headers) as answer:
                async for _ in answer.aiter_raw():
                    gate.open()
    await eventually(lambda: gateway.balance(wallet.address) == (MINTED, 0), "the void")
    assert gateway.transfers(wallet.address)[1:] == [("void", 0, "upstream_error")]


# --- the caller leaves ----------------------------------------------------------------------------


class Caller:
    """A bare connection: it can stop reading, and leave."""

    def __init__(self, gateway: Gateway) -> None:
        self.socket = socket.create_connection(("127.0.0.1", gateway.port))
        self.socket.settimeout(10)

    def ask(self, target: str, headers: dict[str, str]) -> None:
        fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.socket.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\n{fields}\r\n".encode())

    def leave(self) -> None:
        """Close with RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


async def test_the_caller_leaves_before_a_short_answer(
    gateway: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    """The upstream did the work: charged, and the answer waits for the same request."""
    gate = api.behave(target, answer_when_open)
    async with gateway.client() as http:
        await buy(http, wallet)
        headers = wallet.sign("GET", gateway.url + target)
        caller = Caller(gateway)
        caller.ask(target, headers)
        await eventually(lambda: gate.arrived == 1, "the call")
        caller.leave()
        gate.open()
        await eventually(lambda: gateway.balance(wallet.address) == (MINTED - PRICE_UNITS, 0), "it")
        again = await http.get(target, headers=headers)
    assert again.content == b"late but whole"
    assert again.headers["farebox-replayed"] == "true"
    assert gate.arrived == 1


async def test_the_caller_leaves_in_the_middle_of_a_long_answer(
    gateway: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    gate = api.behave(target, long_answer())  # type: ignore[arg-type]  # it is one
    async with gateway.client() as http:
        await buy(http, wallet)
        caller = Caller(gateway)
        caller.ask(target, wallet.sign("GET", gateway.url + target))
        assert caller.socket.recv(1_000).startswith(b"HTTP/1.1 200 ")
        caller.leave()
        gate.open()
        await eventually(lambda: gateway.balance(wallet.address)[1] == 0, "the end of the hold")
    assert gateway.transfers(wallet.address)[1:] == [("capture", PRICE_UNITS, None)]


async def test_leaving_does_not_make_a_broken_answer_free(
    gateway: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    """Else a caller could take what it wants, leave, and wait for the upstream to give up."""

    async def breaks(writer: Writer, gate: Gate) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + b"x" * LONG)
        await gate.wait()
        misbehave.reset(writer)
        return False

    gate = api.behave(target, breaks)
    async with gateway.client() as http:
        await buy(http, wallet)
        caller = Caller(gateway)
        caller.ask(target, wallet.sign("GET", gateway.url + target))
        mine, got = caller.socket.getsockname()[1], 0
        while got < LONG // 2:
            got += len(caller.socket.recv(65_536))
        caller.leave()
        await eventually(lambda: not open_at(gateway, mine), "the gateway to notice")
        gate.open()
        await eventually(lambda: gateway.balance(wallet.address)[1] == 0, "the end of the hold")
    assert gateway.transfers(wallet.address)[1:] == [("capture", PRICE_UNITS, None)]


def open_at(gateway: Gateway, peer_port: int) -> bool:
    """Whether the gateway still holds its end of a connection."""
    assert gateway.process is not None
    lines = Path(f"/proc/{gateway.process.pid}/net/tcp").read_text().splitlines()[1:]
    ends = {(line.split()[1][-5:], line.split()[2][-5:]) for line in lines}
    return (f":{gateway.port:04X}", f":{peer_port:04X}") in ends


async def test_a_flood_that_nobody_reads(sqlite_gateway: Gateway, api: Api, wallet: Wallet) -> None:
    """Bounded in memory while the caller does not read, and cut soon after it has left."""
    gateway = sqlite_gateway
    before = gateway.memory_kib()
    async with gateway.client() as http:
        await buy(http, wallet)
        caller = Caller(gateway)
        caller.ask("/flood", wallet.sign("GET", gateway.url + "/flood"))
        assert caller.socket.recv(1_000).startswith(b"HTTP/1.1 200 ")
        for _ in range(20):  # other requests are served meanwhile
            assert (await http.get("/v1/x")).status_code == 402
        assert gateway.memory_kib() < before + 32 * 1024
        assert gateway.balance(wallet.address)[1] == PRICE_UNITS
        caller.leave()
        await eventually(lambda: gateway.balance(wallet.address)[1] == 0, "the end of the hold")
    assert gateway.memory_kib() < before + 32 * 1024
    assert gateway.transfers(wallet.address)[1:] == [("capture", PRICE_UNITS, None)]


async def test_reading_slowly_does_not_make_a_broken_answer_free(
    sqlite_gateway: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    """The caller takes the first part and then nothing, until the upstream gives up."""
    stuck = threading.Event()

    async def gives_up(writer: Writer, gate: Gate) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        while True:
            writer.write(piece)
            draining = asyncio.ensure_future(writer.drain())
            done, _ = await asyncio.wait([draining], timeout=0.5)
            if not done:  # nobody takes anything: all buffers on the way are full
                stuck.set()
                await gate.wait()
                draining.cancel()
                misbehave.reset(writer)
                return False

    gate = api.behave(target, gives_up)
    async with sqlite_gateway.client() as http:
        await buy(http, wallet)
        caller = Caller(sqlite_gateway)
        caller.ask(target, wallet.sign("GET", sqlite_gateway.url + target))
        await eventually(stuck.is_set, "a full pipe")
        await asyncio.sleep(NOT_READING_S + 0.5)  # the slowness itself
        gate.open()
        with contextlib.suppress(ConnectionError):
            while caller.socket.recv(1 << 20):
                pass
        await eventually(lambda: sqlite_gateway.balance(wallet.address)[1] == 0, "the end")
        caller.leave()
    assert sqlite_gateway.transfers(wallet.address)[1:] == [("capture", PRICE_UNITS, None)]


async def test_bodies_on_the_way_up(sqlite_gateway: Gateway, api: Api, wallet: Wallet) -> None:
    """Large ones arrive whole, too large ones are refused before anything is held."""
    gateway = sqlite_gateway
    target = "/v1/upload"
    async with gateway.client() as http:
        await buy(http, wallet)
        body = json.dumps({"text": "x" * 2_000_000}).encode()
        signed = wallet.sign("POST", gateway.url + target, body)
        answer = await http.post(target, headers=signed, content=body)
        assert answer.status_code == 200
        assert api.seen(target)[-1].body == body
        body = b"x" * (11 << 20)
        signed = wallet.sign("POST", gateway.url + target, body)
        # It answers and closes; a client that still sends may see only the second.
        with contextlib.suppress(httpx.WriteError, httpx.ReadError):
            problem(await http.post(target, headers=signed, content=body), "body_too_large")
    assert gateway.balance(wallet.address) == (MINTED - PRICE_UNITS, 0)


async def test_a_free_route_is_free(sqlite_gateway: Gateway, api: Api, wallet: Wallet) -> None:
    before = sqlite_gateway.rows("SELECT count(*) AS n FROM hold")
    async with sqlite_gateway.client() as http:
        answer = await http.get("/free/thing?q=1", headers={"Payment-Signature": "junk"})
    assert answer.status_code == 200
    assert "GET /free/thing?q=1" in answer.text
    assert "junk" not in answer.text
    assert sqlite_gateway.rows("SELECT count(*) AS n FROM hold") == before
