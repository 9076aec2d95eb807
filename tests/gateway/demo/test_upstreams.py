"""The sample API: what it answers, and that it counts what arrives."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest

from gateway.demo.upstreams import SampleApi


@pytest.fixture(scope="module")
def api() -> Iterator[SampleApi]:
    with SampleApi() as running:
        yield running


@pytest.fixture
def http(api: SampleApi) -> Iterator[httpx.Client]:
    api.calls.clear()
    with httpx.Client(base_url=api.url) as client:
        yield client


def test_forecast(api: SampleApi, http: httpx.Client) -> None:
    first = http.get("/v1/forecast/Oslo").json()
    assert first == http.get("/v1/forecast/Oslo").json()
    assert first["city"] == "Oslo" and len(first["days"]) == 3
    assert all(-15 <= day["celsius"] < 30 for day in first["days"])
    assert http.get("/v1/forecast/oslo").json()["days"] == first["days"]
    assert http.get("/v1/forecast/lima").json()["days"] != first["days"]
    assert (api.calls.count("GET /v1/forecast/Oslo"), api.calls.count()) == (2, 4)


def test_render(http: httpx.Client) -> None:
    answer = http.post("/v1/render", json={"text": "<b>&"})
    assert answer.headers["content-type"] == "image/svg+xml"
    assert "&lt;b&gt;&amp;" in answer.text and "<b>" not in answer.text


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"text": 1}', b'{"text": ""}', b"\xff"])
def test_render_refuses(body: bytes, http: httpx.Client) -> None:
    assert http.post("/v1/render", content=body).status_code == 422
    assert http.post("/v1/render", json={"text": "a" * 201}).status_code == 422


def test_echo(http: httpx.Client) -> None:
    answer = http.post("/v1/echo", content=b"\x00\xff", headers={"content-type": "x/y"})
    assert (answer.content, answer.headers["content-type"]) == (b"\x00\xff", "x/y")


@pytest.mark.parametrize("usage", [True, False])
def test_chat(http: httpx.Client, usage: bool) -> None:
    asked = {"model": "m", "messages": [{"role": "user", "content": "one two  three"}]}
    whole = http.post("/v1/chat/completions", json=asked).json()
    assert whole["choices"][0]["message"]["content"] == "one two three"
    assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    streamed = {**asked, "stream": True, "stream_options": {"include_usage": usage}}
    answer = http.post("/v1/chat/completions", json=streamed)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done = [each.removeprefix("data: ") for each in answer.text.split("\n\n")][:-1]
    assert done == "[DONE]"
    chunks = [json.loads(each) for each in events]
    said = [c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"]]
    assert "".join(said) == "one two three"
    assert [c["usage"] for c in chunks if "usage" in c] == [whole["usage"]] * usage


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"messages": []}', b'{"messages": [{"content": 1}]}', b'{"messages": 1}'],
)
def test_chat_refuses(body: bytes, http: httpx.Client) -> None:
    assert http.post("/v1/chat/completions", content=body).status_code == 422


def test_counting_by_request_id(api: SampleApi, http: httpx.Client) -> None:
    for _ in range(2):
        http.post("/v1/echo", headers={"Farebox-Request-Id": "r1"})
    http.get("/health")
    assert api.calls.of_request("r1") == 2
    assert api.calls.of_request("r2") == 0
    assert (api.calls.count(), api.calls.count("GET /health")) == (2, 1)


def test_wrong_method_and_path(http: httpx.Client) -> None:
    assert http.post("/v1/forecast/oslo").status_code == 405
    assert http.get("/nothing").status_code == 404
