"""The strict readers that every layer uses: what two programs could read differently is refused."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wallet_auth.strict import MAX_DEPTH, base64_bytes, json_object

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    SCALARS.filter(lambda x: x not in (float("inf"), float("-inf"))) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(TEXT, VALUES, max_size=4), st.booleans())
def test_what_json_writes_is_read(value: dict[str, Any], plain: bool) -> None:
    assert json_object(json.dumps(value, ensure_ascii=plain).encode()) == value


def nested(depth: int, inside: str = "") -> bytes:
    return b'{"a":' * (depth - 1) + f"[{inside}]".encode() + b"}" * (depth - 1)


def test_brackets_in_strings_are_no_depth() -> None:
    text = "[{" * MAX_DEPTH + '\\"[{' * MAX_DEPTH
    assert json_object(json.dumps({"a": text}).encode()) == {"a": text}
    assert json_object(nested(MAX_DEPTH))
    wide = b'{"a":[' + b",".join([b"[]"] * 100) + b"]}"
    assert len(json_object(wide)["a"]) == 100


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "strict JSON"),
        (b"{", "strict JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'"x"', "not a JSON object"),
        (b'{"a":1}{}', "strict JSON"),
        (b"{'a':1}", "strict JSON"),
        (b'{"a":1,}', "strict JSON"),
        (b'{"a":01}', "strict JSON"),
        (b'{"a":1,"a":1}', "stands twice"),
        (b'{"a":{"b":1,"\\u0062":2}}', "stands twice"),
        (b'{"a":NaN}', "NaN"),
        (b'{"a":-Infinity}', "Infinity"),
        (b'{"a":1e999}', "past all bounds"),
        (b'{"a":-1e999}', "past all bounds"),
        (b'{"a":' + b"9" * 5_000 + b"}", "strict JSON"),
        (b'{"a":"\\ud800"}', "surrogates"),
        (b'{"a":"\\uDFFF\\uD800"}', "surrogates"),
        (b'{"\\udc00":1}', "surrogates"),
        (b'{"a":"\xed\xa0\x80"}', "utf-8"),
        (b'{"a":"\xff"}', "utf-8"),
        (b'\xef\xbb\xbf{"a":1}', "strict JSON"),
        ('{"a":1}'.encode("utf-16"), "utf-8"),
        (b'{"a":"\n"}', "strict JSON"),
        (nested(MAX_DEPTH + 1), "nested deeper"),
        (b"[" * 1_000_000, "nested deeper"),
        (b'{"a":' * 1_000_000, "nested deeper"),
        (b'"\\\\"' + b"[" * (MAX_DEPTH + 1), "nested deeper"),
    ],
    ids=range(28),
)
def test_odd_json_is_refused(raw: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why) as refused:
        json_object(raw)
    assert len(str(refused.value)) < 200


def test_a_pair_of_surrogates_is_one_character() -> None:
    assert json_object(b'{"a":"\\ud83d\\ude00"}') == {"a": "\U0001f600"}


def test_fractions_can_be_refused() -> None:
    assert json_object(b'{"a":1.5,"b":1e2}') == {"a": 1.5, "b": 100.0}
    assert json_object(b'{"a":-15}', floats=False) == {"a": -15}
    for number in ("1.5", "1e2", "0.0", "NaN", "1" * 1_000 + ".0"):
        with pytest.raises(ValueError, match="no number here") as refused:
            json_object(f'{{"a":{number}}}'.encode(), floats=False)
        assert len(str(refused.value)) < 200


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "raw", [b'"' + b'\\"' * 300_000, b'{"' + b'\\"' * 300_000 + b"\\", b'"' * 600_001], ids=range(3)
)
def test_a_string_without_end_takes_no_time(raw: bytes) -> None:
    """The limit is far off on purpose: what tries every quote as a beginning needs half an hour."""
    with pytest.raises(ValueError, match="strict JSON"):
        json_object(raw)


# -- base64 ---------------------------------------------------------------------------------------


@given(st.binary(min_size=1))
def test_base64_comes_back_with_and_without_padding(raw: bytes) -> None:
    text = base64.b64encode(raw)
    assert base64_bytes(text) == base64_bytes(text.rstrip(b"=")) == raw


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"=",
        b"A",
        b"AAAAA",
        b"AA=",
        b"AAA==",
        b"AAAA=",
        b"AAAA==",
        b"AA===",
        b"A=AA",
        b"AA==AA==",
        b"AA AA",
        b"AAAA\n",
        b" AAAA",
        b"--__",
        b"AA\xc3\xa4",
    ],
)
def test_odd_base64_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match="not base64"):
        base64_bytes(text)
