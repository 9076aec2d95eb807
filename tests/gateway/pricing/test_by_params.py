"""Prices by what is asked: a case fits whatever the rest of a request says; the first one wins."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.errors import Problem
from gateway.forms import Price
from gateway.pricing.quote import PriceRequest, Usage, charge, quote
from gateway.pricing.rules import compile_price

OPTIONS: dict[str, Any] = {
    "cases": [
        {"body": {"model": "big", "image": {"hd": True}}, "price": "$0.50"},
        {"body": {"model": ["big", "huge"]}, "price": "$0.40"},
        {"query": {"pages": 10}, "price": "$0.30"},
        {"path": "/v1/report/[year]/*", "price": "$0.20"},
        {"body": {"upload": "*"}, "price": "$0.15"},
    ],
    "default": "$0.10",
}


def price(
    body: bytes = b"{}", query: bytes | None = None, path: bytes = b"/v1/x", **change: Any
) -> int:
    rule = compile_price(Price("by_params", 0, {**OPTIONS, **change}))
    request = PriceRequest("POST", path, query, b"application/json; charset=utf-8", body)
    quoted = quote(rule, request)
    assert quoted.exact
    assert charge(quoted, Usage((("tokens_out", 5),))).units == quoted.max_units
    return quoted.max_units


@pytest.mark.parametrize(
    ("asked", "units"),
    [
        ({"body": b'{"model": "big", "image": {"hd": true, "w": 9}, "x": [1]}'}, 500_000),
        ({"body": b'{"model": "big", "image": {"hd": false}}'}, 400_000),
        ({"body": b'{"model": "huge", "image": {"hd": true}}'}, 400_000),
        ({"query": b"a=1&pages=10"}, 300_000),
        ({"query": b"p%61ges=1%30"}, 300_000),
        ({"query": b"pages=100"}, 100_000),
        ({"path": b"/v1/report/2026/may"}, 200_000),
        ({"path": b"/v1/report"}, 100_000),
        ({"body": b'{"upload": 0}'}, 150_000),
        ({"body": b'{"upload": null}'}, 100_000),
        ({"body": b'{"model": {"model": "big"}}'}, 100_000),
    ],
)
def test_the_first_case_that_fits_is_the_price(asked: dict[str, Any], units: int) -> None:
    assert price(**asked) == units


CHEAP: dict[str, Any] = {
    "cases": [
        {"body": {"model": "small", "image": {"hd": False}}, "price": "$0.01"},
        {"query": {"pages": 1, "full": "false"}, "price": "$0.02"},
        {"query": {"kind": "thumb"}, "price": "$0.03"},
        {"path": "/v1/thumb/*", "price": "$0.04"},
    ]
}


@pytest.mark.parametrize(
    ("asked", "listed_units"),
    [
        # what some upstream takes for a dear case is not the cheap default
        ({"body": b'{"model": "big", "image": {"hd": 1}}'}, 500_000),
        ({"body": b'{"model": "big", "image": {"hd": "true"}}'}, 500_000),
        ({"body": b'{"model": "big", "image": {"hd": "whatever"}}'}, 500_000),
        ({"body": b'{"model": "big", "image": {"hd": "no"}}'}, 400_000),
        ({"body": b'{"model": ["big"]}'}, 400_000),
        ({"body": b'{"model": "HUGE"}'}, 400_000),
        ({"body": b'{"model": "huge\\u0000x"}'}, 400_000),
        ({"body": '{"model": "ｈｕｇｅ"}'.encode()}, 400_000),
        ({"query": b"pages=010"}, 300_000),
        ({"query": b"pages=%2B10"}, 300_000),
        ({"query": b"pages=10.0"}, 300_000),
        ({"query": b"pages=1e1"}, 300_000),
        ({"query": b"pages=10px"}, 300_000),
        ({"query": b"pages=%D9%A1%D9%A0"}, 300_000),
        ({"query": b"pages=+10"}, 300_000),
        ({"path": b"/V1/Report/2026/"}, 200_000),
        ({"path": b"/v1/report/2026."}, 200_000),
    ],
)
def test_what_may_be_the_dear_thing_costs_as_much(asked: dict[str, Any], listed_units: int) -> None:
    assert price(**asked) == listed_units


@pytest.mark.parametrize(
    ("asked", "units"),
    [
        ({"body": b'{"model": "small", "image": {"hd": false}}'}, 10_000),
        ({"body": b'{"model": " small", "image": {"hd": false}}'}, 100_000),
        ({"body": b'{"model": "small", "image": {"hd": 0}}'}, 100_000),
        ({"body": b'{"model": "small", "image": {"hd": "false"}}'}, 100_000),
        ({"query": b"pages=1&full=false"}, 20_000),
        ({"query": b"pages=01&full=false"}, 100_000),
        ({"query": b"pages=true&full=false"}, 100_000),
        ({"query": b"pages=1&full="}, 100_000),
        ({"query": b"pages=1&full=0"}, 100_000),
        ({"query": b"kind=thumb"}, 30_000),
        ({"query": b"kind=%20thumb"}, 100_000),
        ({"query": b"kind=THUMB"}, 100_000),
        ({"path": b"/v1/thumb/1"}, 40_000),
        ({"path": b"/v1/Thumb/1"}, 100_000),
        ({"path": b"/v1/thumb."}, 100_000),
    ],
)
def test_what_may_not_be_the_cheap_thing_is_not_cheap(asked: dict[str, Any], units: int) -> None:
    assert price(**asked, **CHEAP) == units


def test_of_a_metered_price_and_a_flat_one_the_dearer_is_charged() -> None:
    metered = {
        "rule": "metered",
        "max": "$1",
        "when_unknown": "min",
        "rates": {"tokens_out": "$1 / 1M"},
    }
    options = {"cases": [{"query": {"by": "use"}, "price": metered}], "default": "$0.10"}
    rule = compile_price(Price("by_params", 0, options))
    quoted = quote(rule, PriceRequest("GET", b"/", b"by=USE", b"", None))
    assert (quoted.max_units, quoted.exact) == (1_000_000, False)
    assert charge(quoted, Usage((("tokens_out", 7),))).units == 100_000
    assert charge(quoted, Usage((("tokens_out", 300_000),))).units == 300_000
    assert charge(quoted, None).units == 100_000


@pytest.mark.parametrize(
    "kind",
    [
        b"application/json; charset=utf-7",
        b"application/json; charset=utf-16le",
        b'application/json; charset="utf-7"',
        b"application/json; charset=utf-8; charset=utf-7",
        b"application/json; a=b,application/x-www-form-urlencoded",
        b"application/json,application/json",
        b"application/json; charset=",
    ],
)
def test_a_body_of_another_charset_or_of_two_types_is_refused(kind: bytes) -> None:
    rule = compile_price(Price("by_params", 0, OPTIONS))
    with pytest.raises(Problem) as refused:
        quote(rule, PriceRequest("POST", b"/v1/x", None, kind, b'{"model": "+AGI-ig"}'))
    assert refused.value.code == "unsupported_media_type"


@pytest.mark.parametrize(
    "kind",
    [
        b"application/json",
        b"Application/JSON;charset=UTF-8",
        b'application/vnd.api+json; charset="utf-8"; profile="https://x.example/a"',
        b"application/json;",
    ],
)
def test_json_is_taken_as_it_is_usually_named(kind: bytes) -> None:
    rule = compile_price(Price("by_params", 0, OPTIONS))
    assert quote(rule, PriceRequest("POST", b"/v1/x", None, kind, b"{}")).max_units == 100_000


@pytest.mark.parametrize(
    "query",
    [
        b"pages=1&pages=10",
        b"a=1;pages=10",
        b"pages=10;a",
        b".pages=10",
        b"pages.=10",
        b"pages%00=10",
        b"pages%5B=10",
        b"Pages=10",
        b"pages[]=10",
        b"pages=1;pages=10",
        b"pages%20=10",
        b"pages",
        b"pages=10&pages[0]=1",
    ],
)
def test_a_query_two_readers_may_read_differently_is_refused(query: bytes) -> None:
    if query == b"pages":
        assert price(query=query) == 100_000
        return
    with pytest.raises(Problem) as refused:
        price(query=query)
    assert refused.value.code == "invalid_request"


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "x", "model": "big"}',
        b'{"Model": "big"}',
        b'{"model": "big", "IMAGE": 1}',
        b'{"model": "big", "image": {"HD": true}}',
        b"[]",
        b"",
        b'{"up_load": 1}',
    ],
)
def test_a_body_two_readers_may_read_differently_is_refused(body: bytes) -> None:
    with pytest.raises(Problem) as refused:
        price(body=body)
    assert refused.value.code == "invalid_request"


def test_what_fits_nothing_can_be_refused() -> None:
    with pytest.raises(Problem) as refused:
        price(default="refuse")
    assert refused.value.code == "price_unknown"


def test_a_semicolon_of_something_else_does_not_matter() -> None:
    assert price(query=b"a=1;b=2&pages=10&c=;") == 300_000


def test_a_case_can_be_metered() -> None:
    metered = {
        "rule": "metered",
        "max": "$1",
        "when_unknown": "min",
        "rates": {"tokens_out": "$1 / 1M"},
    }
    options = {"cases": [{"query": {"by": "use"}, "price": metered}], "default": "$0.10"}
    rule = compile_price(Price("by_params", 0, options))
    assert rule.metered
    assert not rule.needs_body
    quoted = quote(rule, PriceRequest("GET", b"/", b"by=use", b"", None))
    assert quoted.max_units == 1_000_000
    assert quoted.price_version == rule.version
    assert charge(quoted, Usage((("tokens_out", 7),))).units == 7


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"cases": []}, "cases is a list"),
        ({"cases": [{"price": "$1"}]}, "names nothing"),
        ({"cases": [{"path": "v1", "price": "$1"}]}, "path is a path"),
        ({"cases": [{"path": "/v1"}]}, r"cases\[0\].price"),
        ({"cases": [{"path": "/v1", "price": "free"}]}, "what is free is a route"),
        ({"cases": [{"path": "/v1", "price": {"rule": "by_params"}}]}, "metered price here"),
        ({"cases": [{"body": {"n": 1.5}, "price": "$1"}]}, "whole number"),
        ({"cases": [{"query": {"n": True}, "price": "$1"}]}, "whole number"),
        ({"cases": [{"query": {"n": []}, "price": "$1"}]}, "names no value"),
        ({"cases": [{"body": {"n": {}}, "price": "$1"}]}, "is no value"),
        ({"cases": [{"form": {"n": 1}, "price": "$1"}]}, "not an option"),
        ({"default": "free"}, "default is an amount"),
        ({"otherwise": "$1"}, "not an option"),
    ],
)
def test_cases_that_say_nothing_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        compile_price(Price("by_params", 0, {**OPTIONS, **change}))
    with pytest.raises(ValueError, match="default is missing"):
        compile_price(Price("by_params", 0, {"cases": OPTIONS["cases"]}))
