"""Stripe's request encoding: decoded like the SDK writes it, refused when malformed."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stripe._encode import _api_encode  # the SDK's own encoder is the oracle

from gateway.demo.fakestripe.errors import StripeError
from gateway.demo.fakestripe.forms import boolean, decode, integer, metadata, one_of, only, text

NAMES = st.text("abcxyz_", min_size=1, max_size=6)
VALUES = st.recursive(
    st.text("abc 12&=[]%+é", max_size=8),
    lambda below: (
        st.lists(below, min_size=1, max_size=3)
        | st.dictionaries(NAMES, below, min_size=1, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_what_the_sdk_encodes_is_decoded_to_the_same(params: dict[str, Any]) -> None:
    encoded = urlencode(list(_api_encode(params))).encode()
    assert decode(encoded) == params


def test_empty_brackets_append() -> None:
    assert decode(b"expand[]=a&expand[]=b") == {"expand": ["a", "b"]}


def test_metadata_keeps_numeric_keys() -> None:
    assert decode(b"metadata[0]=a") == {"metadata": {"0": "a"}}


@pytest.mark.parametrize(
    "encoded",
    [
        b"a[b=1",
        b"[b]=1",
        b"a]b[=1",
        b"a=1&a[b]=2",
        b"a[b]=2&a=1",
        b"a[b][c]=1&a[b]=2",
        b"x" + b"[a]" * 8 + b"=1",
        b"a[201]=1",
        b"%ff=1",
        b"a",
        b"&".join(b"a%d=1" % n for n in range(501)),
    ],
)
def test_malformed_is_refused(encoded: bytes) -> None:
    with pytest.raises(StripeError) as refused:
        decode(encoded)
    assert refused.value.status == 400


@pytest.mark.parametrize("value", ["1.0", "1e3", "１", "", " 1", "0x1", "9" * 16])
def test_odd_integers_are_refused_or_absent(value: str) -> None:
    if value == "":
        assert integer({"n": value}, "n") is None
        return
    with pytest.raises(StripeError, match="Invalid integer"):
        integer({"n": value}, "n")


def test_readers() -> None:
    assert integer({"n": "-5"}, "n") == -5
    assert boolean({"b": "true"}, "b") and not boolean({}, "b")
    assert text({"t": ""}, "t") is None
    assert one_of({"o": "x"}, "o", ("x", "y")) == "x"
    assert metadata({"metadata": {"a": "1", "b": ""}}) == {"a": "1"}
    for wrong in (
        lambda: integer({"n": "1"}, "n", least=2),
        lambda: boolean({"b": "yes"}, "b"),
        lambda: text({"t": {}}, "t"),
        lambda: one_of({"o": "z"}, "o", ("x", "y")),
        lambda: metadata({"metadata": {"a": "x" * 501}}),
        lambda: only({"a": "1"}, ("b",)),
    ):
        with pytest.raises(StripeError):
            wrong()
