"""Answers that come bit by bit: passed on at once, in flat memory, charged before they end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx
import pytest

from tests.e2e.stage import PRICE_UNITS, Api, Gate, Gateway
from tests.e2e.wallet import Wallet, buy
from tests.gateway.proxy.misbehave import Writer

MINTED = 1_000_000
EVENTS = 10_000
KINDS = {
    "events": b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked",
    "lines": b"Content-Type: application/x-ndjson\r\nTransfer-Encoding: chunked",
    "measured": b"Content-Type: text/event-stream\r\nContent-Length: 8",
    "until-close": b"Content-Type: text/plain\r\nConnection: close",
}
PLAIN = ("measured", "until-close")  # no chunks


def chunk(kind: str, data: bytes) -> bytes:
    return data if kind in PLAIN else b"%x\r\n%b\r\n" % (len(data), data)


def stream(kind: str, events: list[bytes]) -> Callable[[Writer, Gate], object]:
    """A behaviour: the first event, and when the gate is open the others and the end."""

    async def behave(writer: Writer, gate: Gate) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\n" + KINDS[kind] + b"\r\n\r\n")
        for n, event in enumerate(events):
            writer.write(chunk(kind, event))
            await writer.drain()
            if n == 0:
                await gate.wait()
        if kind == "until-close":
            return False
        if kind not in PLAIN:
            writer.write(b"0\r\n\r\n")
        return True

    return behave


@asynccontextmanager
async def asking(
    http: httpx.AsyncClient, gateway: Gateway, wallet: Wallet, target: str
) -> AsyncIterator[tuple[httpx.Response, dict[str, str]]]:
    headers = wallet.sign("GET", gateway.url + target)
    async with http.stream("GET", target, headers=headers) as answer:
        yield answer, headers


@pytest.mark.parametrize("kind", KINDS)
async def test_each_event_passes_when_it_comes(
    kind: str, gateway: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    gate = api.behave(target, stream(kind, [b"one\n", b"two\n"]))  # type: ignore[arg-type]  # is
    async with gateway.client() as http:
        await buy(http, wallet)
        async with asking(http, gateway, wallet, target) as (answer, headers):
            pieces = answer.aiter_raw()
            assert await anext(pieces) == b"one\n"  # the second does not exist yet
            assert answer.headers["farebox-held"] == "1"
            assert "farebox-charged" not in answer.headers
            assert gateway.balance(wallet.address) == (MINTED - PRICE_UNITS, PRICE_UNITS)
            gate.open()
            assert b"".join([piece async for piece in pieces]) == b"two\n"
            # Whoever has seen the end is charged.
            assert gateway.balance(wallet.address) == (MINTED - PRICE_UNITS, 0)
        again = await http.get(target, headers=headers)
    assert again.headers["farebox-replayed"] == "true"
    assert again.content == b"one\ntwo\n"  # short enough to have been kept
    assert gate.arrived == 1


async def test_a_short_chunked_answer_is_no_stream(sqlite_gateway: Gateway, wallet: Wallet) -> None:
    async with sqlite_gateway.client() as http:
        await buy(http, wallet)
        signed = wallet.sign("GET", sqlite_gateway.url + "/chunked")
        answer = await http.get("/chunked", headers=signed)
    assert (answer.text, answer.headers["farebox-charged"]) == ("hello world", "1")
    assert answer.headers["content-length"] == "11"


async def test_ten_thousand_events_in_flat_memory(
    sqlite_gateway: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    gateway = sqlite_gateway
    event = b"data: " + b"x" * 4_000 + b"\n\n"
    gate = api.behave(target, stream("events", [event] * EVENTS))  # type: ignore[arg-type]  # is
    gate.open()
    async with gateway.client() as http:
        await buy(http, wallet)
        before, got = gateway.memory_kib("VmHWM"), 0
        async with asking(http, gateway, wallet, target) as (answer, headers):
            async for piece in answer.aiter_raw():
                got += len(piece)
            assert gateway.balance(wallet.address) == (MINTED - PRICE_UNITS, 0)
        again = await http.get(target, headers=headers)
    assert got == EVENTS * len(event)
    assert gateway.memory_kib("VmHWM") < before + 12 * 1024  # of 40 MB that passed
    assert again.json()["receipt"]["state"] == "charged"  # too long to have been kept


async def test_a_stream_that_breaks_off_is_cut_and_not_charged(
    gateway: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    async def breaks(writer: Writer, gate: Gate) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\n" + KINDS["events"] + b"\r\n\r\n")
        writer.write(chunk("events", b"data: 1\n\n"))
        await writer.drain()
        await gate.wait()
        return False  # closed without the last chunk

    gate = api.behave(target, breaks)
    async with gateway.client() as http:
        await buy(http, wallet)
        with pytest.raises(httpx.RemoteProtocolError):
            async with asking(http, gateway, wallet, target) as (answer, _):
                pieces = answer.aiter_raw()
                assert await anext(pieces) == b"data: 1\n\n"
                gate.open()
                async for _ in pieces:
                    raise AssertionError("there was nothing more")
    gateway.wait(lambda: gateway.balance(wallet.address) == (MINTED, 0), "the void")
    assert gateway.transfers(wallet.address)[1:] == [("void", 0, "upstream_error")]
