"""The edge: problems become answers in one place, nothing leaks, a part is never the whole."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest

from gateway import middleware
from gateway.errors import CODES, NextAction, Problem
from gateway.middleware import CallerGoneError, edge, log_id, read_body, stream_body
from tests.gateway.proxy.serving import PARSERS, body_of, serving, status_of, talk
from tests.servers import eventually

GET = b"GET /a HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
HEAD = GET.replace(b"GET", b"HEAD")


def raising(error: BaseException) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise error

    return app


async def ok(scope: Any, receive: Any, send: Any) -> None:
    body = await read_body(receive, scope["headers"], 1_000)
    head = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": body})


def fields_of(answer: bytes) -> dict[bytes, bytes]:
    lines = answer.split(b"\r\n\r\n")[0].split(b"\r\n")[1:]
    return {n.lower(): v.strip() for n, _, v in (line.partition(b":") for line in lines)}


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("code", ["payment_required", "invalid_target", "dependency_unavailable"])
async def test_a_problem_is_answered(parser: str, code: str) -> None:
    problem = Problem(
        code,
        "why",
        headers={"Retry-After": "3", "WWW-Authenticate": "Bearer"},
        members={"credits": {"shortfall": "1"}},
        next_actions=[
            NextAction("POST", "/x", "this"),
            NextAction("GET", "/y", "that", "repeat", {"A": "<a>"}, {"b": "<b>"}, 3),
        ],
    )
    async with serving(edge(raising(problem)), parser) as port:
        answer = await talk(port, GET)
        head_answer = await talk(port, HEAD)
    assert status_of(answer) == CODES[code].status
    fields = fields_of(answer)
    assert fields[b"content-type"] == b"application/problem+json"
    assert fields[b"cache-control"] == b"no-store"
    assert (fields[b"retry-after"], fields[b"www-authenticate"]) == (b"3", b"Bearer")
    assert fields[b"access-control-allow-origin"] == b"*"
    said = json.loads(body_of(answer))
    assert (said["code"], said["detail"], said["status"]) == (code, "why", CODES[code].status)
    assert said["credits"] == {"shortfall": "1"} and len(said["request_id"]) == 16
    assert said["next_actions"] == [
        {"do": "change", "method": "POST", "url": "/x", "send": "this"},
        {
            "do": "repeat",
            "method": "GET",
            "url": "/y",
            "send": "that",
            "headers": {"A": "<a>"},
            "body": {"b": "<b>"},
            "after_s": 3,
        },
    ]
    assert status_of(head_answer) == CODES[code].status
    assert body_of(head_answer) == b""


async def test_the_raisers_fields_win() -> None:
    problem = Problem("payment_required", "x", headers={"Cache-Control": "no-cache"})
    async with serving(edge(raising(problem))) as port:
        answer = await talk(port, GET)
    assert answer.lower().count(b"cache-control") == 1
    assert fields_of(answer)[b"cache-control"] == b"no-cache"


@pytest.mark.parametrize("parser", PARSERS)
async def test_an_unknown_error_says_nothing_and_is_logged_once(
    parser: str, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "0xdeadbeefprivatekey"
    async with serving(edge(raising(ValueError(secret))), parser) as port:
        answer = await talk(port, GET)
    assert status_of(answer) == 500
    said = json.loads(body_of(answer))
    assert said["code"] == "internal_error"
    assert secret.encode() not in answer and b"Traceback" not in answer and b"Value" not in answer
    errors = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert [r.name for r in errors] == ["farebox"]
    assert said["request_id"] in errors[0].getMessage()


async def test_a_dependency_that_is_away_is_one_line_a_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What it came from stands in it; where it was raised would be a page for each request."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        cause = ConnectionError("nobody listens")
        raise Problem("dependency_unavailable", "not now") from cause

    async with serving(edge(app)) as port:
        assert status_of(await talk(port, GET)) == 503
    (told,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert "not now (ConnectionError: nobody listens)" in told.getMessage()
    assert told.exc_info is None


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("error", [Problem("upstream_error", "cut"), ValueError("x")])
@pytest.mark.parametrize("length", [b"100", None])
async def test_an_answer_that_has_begun_is_cut(
    parser: str, error: Exception, length: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        head = [(b"content-length", length)] if length else []
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": b"part", "more_body": True})
        raise error

    async with serving(edge(app), parser) as port:
        answer = await talk(port, GET.replace(b"Connection: close\r\n", b""))
    assert status_of(answer) == 200 and b"part" in answer
    assert not answer.endswith(b"0\r\n\r\n")  # no end of a chunked body, and fewer than 100 bytes
    assert b"problem" not in answer
    assert [r for r in caplog.records if r.name == "uvicorn.error" and r.exc_info] == []


async def test_every_request_has_its_own_log_id() -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(log_id(scope))
        raise Problem("not_found", "no")

    async with serving(edge(app)) as port:
        said = [json.loads(body_of(await talk(port, GET)))["request_id"] for _ in range(3)]
    assert seen == said and len(set(seen)) == 3


def _with_headers(size: int) -> bytes:
    """A request whose fields count ``size`` in all, in many small and one large."""
    fixed = [(b"host", b"a"), (b"connection", b"close")]
    used = sum(len(n) + len(v) + 4 for n, v in fixed)
    filler = [(b"x-%03d" % i, b"") for i in range(50)]
    used += sum(len(n) + 4 for n, _ in filler)
    rest = [(b"x-big", b"a" * (size - used - len(b"x-big") - 4))]
    lines = b"".join(n + b": " + v + b"\r\n" for n, v in fixed + filler + rest)
    return b"GET /a HTTP/1.1\r\n" + lines + b"\r\n"


@pytest.mark.parametrize("parser", PARSERS)
async def test_the_header_limit(parser: str) -> None:
    app = edge(ok, max_headers_bytes=8_192, base="https://api.example")
    async with serving(app, parser) as port:
        assert status_of(await talk(port, _with_headers(8_192))) == 200
        answer = await talk(port, _with_headers(8_193))
    assert status_of(answer) == 431
    assert fields_of(answer)[b"connection"] == b"close"
    (action,) = json.loads(body_of(answer))["next_actions"]
    assert (action["do"], action["url"]) == ("change", "https://api.example/a")


async def test_ambiguous_framing_is_refused_for_every_path() -> None:
    reached: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])

    request = (
        b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
    )
    async with serving(edge(app), "h11") as port:
        answer = await talk(port, request)
    assert status_of(answer) == 400 and answer.count(b"HTTP/1.1 ") == 1
    assert reached == []


def _post(body: bytes, framing: bytes) -> bytes:
    return b"POST /a HTTP/1.1\r\nHost: a\r\nConnection: close\r\n" + framing + b"\r\n\r\n" + body


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (_post(b"a" * 1_000, b"Content-Length: 1000"), 200),
        (_post(b"", b"Content-Length: 0"), 200),
        (_post(b"a" * 1_001, b"Content-Length: 1001"), 413),
        (_post(b"", b"Content-Length: 999999999"), 413),  # refused before a byte of it came
        (_post(b"3e8\r\n" + b"a" * 1_000 + b"\r\n0\r\n\r\n", b"Transfer-Encoding: chunked"), 200),
        (_post(b"3e9\r\n" + b"a" * 1_001 + b"\r\n", b"Transfer-Encoding: chunked"), 413),
    ],
)
async def test_the_body_limit(parser: str, request_bytes: bytes, status: int) -> None:
    async with serving(edge(ok), parser) as port:
        answer = await talk(port, request_bytes)
    assert status_of(answer) == status
    if status == 200:
        assert set(body_of(answer)) <= set(b"a")
    else:
        assert json.loads(body_of(answer))["code"] == "body_too_large"


async def test_a_body_in_pieces_is_whole() -> None:
    async with serving(edge(ok)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(_post(b"", b"Content-Length: 6"))
        for byte in b"abcdef":
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)
        assert body_of(await reader.read()) == b"abcdef"
        writer.close()


@pytest.mark.parametrize("name", ["BODY_IDLE_S", "BODY_TOTAL_S"])
async def test_a_body_that_stops_coming(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, name, 0.05)
    async with serving(edge(ok)) as port:
        answer = await talk(port, _post(b"abc", b"Content-Length: 6"))
    assert status_of(answer) == 408
    assert json.loads(body_of(answer))["code"] == "invalid_request"


@pytest.mark.parametrize("parser", PARSERS)
async def test_a_caller_that_hangs_up_is_not_answered_and_no_error(
    parser: str, caplog: pytest.LogCaptureFixture
) -> None:
    ended: list[type[BaseException] | None] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await read_body(receive, scope["headers"], 1_000)
        except BaseException as error:
            ended.append(type(error))
            raise

    async with serving(edge(app), parser) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(_post(b"abc", b"Content-Length: 6"))
        await writer.drain()
        writer.close()
        await eventually(lambda: bool(ended))
    assert ended == [CallerGoneError]
    assert [r for r in caplog.records if r.levelno >= logging.ERROR] == []


def _messages(*messages: dict[str, Any]) -> Callable[[], Any]:
    queue = list(messages)

    async def receive() -> dict[str, Any]:
        return queue.pop(0)

    return receive


async def test_pieces_before_a_hang_up_are_not_a_body() -> None:
    receive = _messages(
        {"type": "http.request", "body": b"abc", "more_body": True}, {"type": "http.disconnect"}
    )
    seen = []
    with pytest.raises(CallerGoneError):
        async for piece in stream_body(receive, [], 10):
            seen.append(piece)
    assert seen == [b"abc"]


async def test_head_answers_have_no_body_whatever_the_application_sends() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"abc"})

    scope = {
        "type": "http",
        "method": "HEAD",
        "http_version": "1.1",
        "headers": [(b"host", b"a")],
    }
    await edge(app)(scope, _messages(), send)
    assert sent[1]["body"] == b""


async def test_other_kinds_of_connection() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "lifespan.startup.complete"})

    await edge(app)({"type": "lifespan"}, _messages(), send)
    await edge(app)({"type": "websocket"}, _messages({"type": "websocket.connect"}), send)
    assert [m["type"] for m in sent] == ["lifespan.startup.complete", "websocket.close"]
