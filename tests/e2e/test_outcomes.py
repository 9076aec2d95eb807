"""What the operator calls failed ends in not_charged, with its reason on the row (Z15)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.e2e.stage import PRICE_UNITS, Api, Gate, Gateway
from tests.e2e.wallet import Wallet, buy
from tests.gateway.proxy import misbehave
from tests.gateway.proxy.misbehave import Writer

Launch = Callable[..., Gateway]
MINTED = 1_000_000
ROUTES = """[
  { match = "GET /status/*", price = "$0.01", failed_if = { status = ["3xx", 404] } },
  { match = "GET /slow/*", price = "$0.01", failed_if = { slower_than = "1s" } },
  { match = "GET /soon/*", price = "$0.01", failed_if = { slower_than = "30s" } },
  { match = "GET /empty/*", price = "$0.01", failed_if = { empty = true } },
  { match = "GET /schema/*", price = "$0.01", failed_if = { answer_without = ["result.id"] } },
  { match = "GET /error/*", price = "$0.01", failed_if = { answer_with = ERRORS } },
  { match = "GET /stall", price = "$0.01", timeout_s = 1 },
  { match = "GET /*", price = "$0.01" },
]""".replace("ERRORS", '["error", { path = "state", equals = "failed" }]')


def says(body: bytes, *fields: bytes, status: bytes = b"200 OK") -> Any:
    async def behave(writer: Writer, gate: Gate) -> bool:
        writer.write(misbehave.answer(body, *fields, status=status))
        return True

    return behave


def slowly(size: int) -> Any:
    """An answer whose second half takes its time."""

    async def behave(writer: Writer, gate: Gate) -> bool:
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n".encode())
        writer.write(b"x" * (size // 2))
        await writer.drain()
        await asyncio.sleep(1.3)  # the slowness itself: a second is allowed
        writer.write(b"x" * (size - size // 2))
        return True

    return behave


OK = json.dumps({"result": {"id": 7}}).encode()
NO = json.dumps({"result": {}}).encode()
ERROR = json.dumps({"error": "quota"}).encode()
NULL = json.dumps({"error": None, "state": "done"}).encode()
FAILED = json.dumps({"error": None, "state": "failed"}).encode()
NOT_FOUND, MOVED = b"404 Not Found", b"301 Moved Permanently"
CASES: list[tuple[str, Any, int, str | None]] = [
    # (path, how the upstream behaves, status the caller gets, reason; None: charged)
    ("/status/a", says(OK, status=NOT_FOUND), 404, "upstream_status_404"),
    ("/status/b", says(OK, status=MOVED), 301, "upstream_status_301"),
    ("/status/c", says(OK, status=b"410 Gone"), 410, None),
    ("/status/d", says(OK, status=b"500 Oh"), 502, "upstream_status_500"),
    ("/empty/a", says(b""), 200, "answer_empty"),
    ("/empty/b", says(b"x"), 200, None),
    ("/schema/a", says(NO), 200, "answer_without:result.id"),
    ("/schema/b", says(b"<html>oops</html>"), 200, "answer_without:result.id"),
    ("/schema/c", says(OK), 200, None),
    ("/error/a", says(ERROR), 200, "answer_with:error"),
    ("/error/b", says(NULL), 200, None),
    ("/error/c", says(FAILED), 200, "answer_with:state"),
    ("/plain/a", says(OK, status=NOT_FOUND), 404, "upstream_status_404"),
    ("/plain/b", says(b""), 200, None),
    ("/stall", None, 504, "upstream_timeout"),
    ("/reset", None, 502, "upstream_error"),
    ("/402", None, 502, "upstream_wants_payment"),
]


async def test_each_class_of_failure_is_told_on_its_row(
    dialect: str, launch: Launch, api: Api, wallet: Wallet
) -> None:
    gateway = launch(dialect, routes=ROUTES)
    charged = 0
    async with gateway.client() as http:
        await buy(http, wallet)
        for path, behaviour, status, reason in CASES:
            if behaviour is not None:
                api.behave(path, behaviour)
            headers = wallet.sign("GET", gateway.url + path)
            answer = await http.get(path, headers=headers)
            assert answer.status_code == status, (path, answer.text)
            cost = 0 if reason else PRICE_UNITS
            charged += cost
            assert answer.headers["farebox-charged"] == ("0" if reason else "1"), path
            url = f"/farebox/v1/requests/{answer.headers['farebox-request-id']}"
            asked = await http.get(url, headers=wallet.sign("GET", gateway.url + url))
            row = asked.json()
            assert row["state"] == ("not_charged" if reason else "charged"), path
            assert (row["reason"], row["charged_units"]) == (reason, cost), path
            again = await http.get(path, headers=headers)  # final: the same answer, no new charge
            assert (again.status_code, again.content) == (answer.status_code, answer.content)
            assert again.headers["farebox-replayed"] == "true"
    assert gateway.balance(wallet.address) == (MINTED - charged, 0)


@pytest.mark.parametrize("size", [1_000, 300_000])
async def test_too_slow_is_delivered_and_not_charged(
    size: int, launch: Launch, api: Api, wallet: Wallet
) -> None:
    gateway = launch("sqlite", routes=ROUTES)
    api.behave("/slow/late", slowly(size))
    api.behave("/soon/a", says(b"x" * size))
    async with gateway.client() as http:
        await buy(http, wallet)
        for path in ("/slow/late", "/soon/a"):
            answer = await http.get(path, headers=wallet.sign("GET", gateway.url + path))
            assert answer.content == b"x" * size
    assert gateway.transfers(wallet.address)[1:] == [
        ("void", 0, "too_slow"),
        ("capture", PRICE_UNITS, None),
    ]


async def test_where_the_content_decides_it_is_asked_for_whole(
    launch: Launch, api: Api, wallet: Wallet
) -> None:
    """Else a caller could ask for a part, which lacks a member, and have it for nothing."""
    gateway = launch("sqlite", routes=ROUTES)
    api.behave("/schema/part", says(OK))
    asked = {"Range": "bytes=0-1", "If-Range": '"a"', "Accept-Encoding": "gzip, br"}
    async with gateway.client() as http:
        await buy(http, wallet)
        for path in ("/schema/part", "/plain/part"):
            signed = wallet.sign("GET", gateway.url + path, headers=asked)
            assert (await http.get(path, headers=signed)).headers["farebox-charged"] == "1"
    (judged,), (plain,) = api.seen("/schema/part"), api.seen("/plain/part")
    assert judged.header(b"range") == judged.header(b"if-range") == []
    assert judged.header(b"accept-encoding") == [b"identity"]
    assert plain.header(b"range") == [b"bytes=0-1"]
    assert plain.header(b"accept-encoding") == [b"gzip, br"]


async def test_a_long_answer_is_not_judged_by_its_content(
    launch: Launch, api: Api, wallet: Wallet
) -> None:
    gateway = launch("sqlite", routes=ROUTES, server={"buffer_answer": "1 KiB"})
    api.behave("/schema/long", says(b"<html>" + b"x" * 2_000))
    async with gateway.client() as http:
        await buy(http, wallet)
        path = "/schema/long"
        answer = await http.get(path, headers=wallet.sign("GET", gateway.url + path))
        assert len(answer.content) == 2_006
    assert gateway.transfers(wallet.address)[1:] == [("capture", PRICE_UNITS, None)]


async def test_a_chunked_answer_is_judged_like_any_other(
    launch: Launch, api: Api, wallet: Wallet
) -> None:
    """Also when it is passed on before it is known whole."""

    async def in_two(writer: Writer, gate: Gate) -> bool:
        writer.write(misbehave.CHUNKED + b"2\r\n{}\r\n")
        await writer.drain()
        await gate.wait()
        writer.write(b"0\r\n\r\n")
        return True

    gateway = launch("sqlite", routes=ROUTES)
    path = "/schema/chunked"
    gate = api.behave(path, in_two)
    async with gateway.client() as http:
        await buy(http, wallet)
        signed = wallet.sign("GET", gateway.url + path)
        async with http.stream("GET", path, headers=signed) as answer:
            pieces = answer.aiter_raw()
            assert await anext(pieces) == b"{}"
            gate.open()
            assert [piece async for piece in pieces] == []
        again = await http.get(path, headers=signed)
        assert (again.content, again.headers["farebox-replayed"]) == (b"{}", "true")
    assert gateway.transfers(wallet.address)[1:] == [("void", 0, "answer_without:result.id")]
