"""The field parser against the reference library (http_sf), on generated and on broken values."""

from __future__ import annotations

from typing import Any

import http_sf
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from wallet_auth import structured

KEYS = st.from_regex(r"[a-z*][a-z0-9_\-.*]{0,6}", fullmatch=True)
STRINGS = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=12)
BARE = st.one_of(
    st.integers(-999_999_999_999_999, 999_999_999_999_999),
    STRINGS,
    st.binary(max_size=12),
    st.booleans(),
    st.decimals(-999_999, 999_999, places=2, allow_nan=False),
    st.from_regex(r"[A-Za-z*][!#$%&'*+\-.^_`|~0-9A-Za-z:/]{0,8}", fullmatch=True).map(
        http_sf.Token
    ),
)
PARAMS = st.dictionaries(KEYS, BARE, max_size=3)
ITEMS = st.tuples(BARE, PARAMS)
INNER = st.tuples(st.lists(ITEMS, max_size=4), PARAMS)
DICTIONARIES = st.dictionaries(KEYS, ITEMS | INNER, min_size=1, max_size=4)


def _reference(text: str) -> dict[str, Any] | None:
    """What the library makes of a dictionary, ``None`` if it refuses or a key comes twice."""
    twice = []

    def note(key: str, context: str) -> None:
        if context == "dictionary":
            twice.append(key)

    try:
        found = http_sf.parse(text.encode("latin-1"), tltype="dictionary", on_duplicate_key=note)
    except (ValueError, TypeError):
        return None
    return None if twice or not isinstance(found, dict) or not found else found


def _ours(text: str) -> dict[str, str] | None:
    try:
        return structured.members(structured.text_of(text.encode("latin-1")))
    except ValueError:
        return None


@given(DICTIONARIES)
def test_what_the_library_writes_is_read(value: dict[str, Any]) -> None:
    text = http_sf.ser(value)
    found = _ours(text)
    assert found is not None
    assert list(found) == list(value)
    for key, member in found.items():
        if isinstance(value[key][0], list):
            parts = structured.inner_list(member)
            assert parts is not None
            assert [name for name, _ in parts[1]] == list(value[key][1])
        else:
            assert structured.inner_list(member) is None


PIECES = st.sampled_from(
    [
        *("a", "eth", "tok/en", "A", "*", "=", "(", ")", '"', "\\", ";", ",", ":", " ", "-", "%"),
        *("?1", "?2", "12", "1.5", "1.", "@5", '%"x"', '"@path"', '"a\\"b"', '"a\\b"', ":AAA=:"),
    ]
)


@given(st.lists(PIECES, max_size=14).map("".join))
@example("a=()")
@example('a=("x" "y");created=1')
@example('a=("x""y")')
@example('a=( "x"  "y" ) ;b')
@example("a=1;b=2, c=(1 2);d,e")
@example("a=1,")
@example(",a=1")
@example(" a=1 ")
@example("a=1234567890123456")
@example("a=1;b;b")
@example("a=1,a=2")
@example("a,b;c=?0")
def test_both_accept_and_refuse_the_same(text: str) -> None:
    theirs, found = _reference(text), _ours(text)
    assert (found is None) == (theirs is None), (text, found, theirs)
    if found is not None and theirs is not None:
        assert list(found) == list(theirs)


@given(STRINGS)
def test_strings_keep_their_value(value: str) -> None:
    bare = http_sf.ser(value)
    assert structured.string(bare) == value
    assert structured.integer(bare) is None


@given(st.integers(-999_999_999_999_999, 999_999_999_999_999))
def test_integers_keep_their_value(value: int) -> None:
    assert structured.integer(str(value)) == value
    assert structured.string(str(value)) is None


@pytest.mark.parametrize("bare", [None, "1.5", "?1", '"1"', "tok", ":AQ==:", "-", ""])
def test_what_is_no_integer(bare: str | None) -> None:
    assert structured.integer(bare) is None


@given(st.binary(max_size=100))
def test_bytes_keep_their_value_with_and_without_padding(value: bytes) -> None:
    bare = http_sf.ser(value)
    assert structured.byte_sequence(bare) == value
    assert structured.byte_sequence(bare.replace("=", "")) == value


@pytest.mark.parametrize("bare", ["", "::x", ":A:", ":AAAAA:", ":AA-_:", ":AA=A:", "AA==", ":AA"])
def test_what_are_no_bytes(bare: str) -> None:
    assert structured.byte_sequence(bare) is None


@pytest.mark.parametrize(
    "inner",
    [
        '("@path";req)',
        '("x";key="a")',
        '("Content-Type")',
        "(path)",
        "(1)",
        '("a b")',
        '("")',
        '("a\\"b")',
        '("@")',
        '("a:b")',
    ],
)
def test_only_plain_lower_case_names(inner: str) -> None:
    with pytest.raises(ValueError, match="plain component names"):
        structured.names(inner)


def test_names_are_read_and_written() -> None:
    names = ["@method", "content-digest", "x_y"]
    assert structured.names('( "@method"  "content-digest" "x_y" )') == names
    assert structured.serialize_names(names) == '("@method" "content-digest" "x_y")'
    assert structured.names("()") == []


@pytest.mark.parametrize("value", [b"a=\x00", b"a=\r\n b", b"a=\tb", b"a=\xe4", b"a=\x7f"])
def test_only_visible_ascii(value: bytes) -> None:
    with pytest.raises(ValueError, match="visible ASCII"):
        structured.text_of(value)


def test_a_field_has_a_longest_length() -> None:
    assert structured.text_of(b"a" * structured.MAX_FIELD)
    with pytest.raises(ValueError, match="longer"):
        structured.text_of(b"a" * (structured.MAX_FIELD + 1))


LONG = 200_000


@pytest.mark.timeout(30)  # a wall and not a figure: quadratic work on these never ends
@pytest.mark.parametrize(
    "text",
    [
        'a=("' + "x" * LONG,
        "a" * LONG + "!",
        "a=1" + ";b" * LONG + "!",
        "a=(" + '"x" ' * LONG,
        "a=(" + '"x";b ' * LONG,
        "a=" + " " * LONG,
        "a=:" + "A" * LONG,
        "a;" * LONG,
        'a="' + "\\" * (LONG + 1),
        "a=(" + " " * LONG,
        "a=1;" + " " * LONG,
    ],
    ids=range(11),
)
def test_hostile_values_take_linear_time(text: str) -> None:
    with pytest.raises(ValueError, match="dictionary"):
        structured.members(text)
