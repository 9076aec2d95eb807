"""Events are found wherever a stream is cut into pieces, in memory that does not grow."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.proxy.events import MAX_EVENT_BYTES, Scan

MARK = (b'"prompt_tokens"', b'"completion_tokens"')


def scan(pieces: list[bytes]) -> tuple[int, list[dict[str, Any]]]:
    found = Scan(MARK, counting=True)
    values = [value for piece in pieces for value in found.feed(piece)]
    return found.events, [*values, *found.rest()]


VALUES = st.one_of(
    st.builds(lambda n: {"usage": {"prompt_tokens": n}}, st.integers(0, 99)),
    st.builds(lambda t: {"delta": t}, st.text(max_size=9)),
    st.just({"usage": None}),
)


@given(
    values=st.lists(VALUES, max_size=8),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    cuts=st.lists(st.integers(0, 400), max_size=6),
    note=st.booleans(),
)
def test_where_it_is_cut_does_not_matter(
    values: list[dict[str, Any]], end: str, cuts: list[int], note: bool
) -> None:
    events = [f"event: x{end}data: {json.dumps(value)}{end}{end}" for value in values]
    if note:
        events.insert(0, f": hello{end}{end}")
    whole = "".join([*events, f"data: [DONE]{end}{end}"]).encode()
    places = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    pieces = [whole[a:b] for a, b in pairwise(places)]
    count, found = scan(pieces)
    if end != "\r":  # a lone CR may be the first half of a CRLF, so an end can be seen late
        assert count == len(values)
    assert found == [value for value in values if value.get("usage")]


def test_data_in_several_lines_is_one() -> None:
    assert scan([b'data: {"usage":\ndata:  {"prompt_tokens": 4}}\n\n']) == (
        1,
        [{"usage": {"prompt_tokens": 4}}],
    )


def test_an_end_without_an_empty_line_is_read() -> None:
    assert scan([b'data: {"prompt_tokens": 4}'])[1] == [{"prompt_tokens": 4}]


@pytest.fixture
def far() -> Iterator[None]:
    """The limit that a library of the chain's sets when it is loaded. Under it Python's parser
    does not raise ``RecursionError`` for deep JSON: the process is gone."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(100_000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.parametrize(
    "data",
    [
        b'{"prompt_tokens": ',
        b'[{"prompt_tokens": 1}]',
        b'"prompt_tokens"',
        b'{"prompt_tokens": 1} x',
        b'{"prompt_tokens": ' + b"[" * 100_000 + b"}",
        b'{"prompt_tokens": \xff}',
    ],
    ids=lambda data: data[:24].decode("latin-1"),
)
def test_what_is_no_object_is_nothing(data: bytes, far: None) -> None:
    assert scan([b"data: " + data + b"\n\n"])[1] == []


def test_an_end_that_comes_in_two_pieces_is_seen_at_once() -> None:
    for end in (b"\n\n", b"\r\n\r\n"):
        for cut in range(1, len(end)):
            found = Scan(MARK, counting=True)
            assert found.feed(b'data: {"prompt_tokens": 1}' + end[:cut]) == []
            assert not found.between
            assert found.feed(end[cut:]) == [{"prompt_tokens": 1}]
            assert found.between


def test_an_event_without_end_takes_no_memory() -> None:
    found = Scan(MARK, counting=True)
    for _ in range(80):
        assert found.feed(b"data: " + b"x" * 65_536) == []
        assert len(found._begun) <= MAX_EVENT_BYTES + 65_600
        assert not found.between
    assert found.feed(b'\n\ndata: {"prompt_tokens": 1}\n\n') == [{"prompt_tokens": 1}]
    assert found.between
