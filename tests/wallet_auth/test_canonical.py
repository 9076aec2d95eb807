"""JSON as bytes that are hashed: the published vectors, RFC 8785's, and no two values alike."""

from __future__ import annotations

import json
import math
import struct
import subprocess
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from wallet_auth.canonical import ascii_form, forms_of, jcs, member_as_sent

# SHA-256 of the canonical JSON, as published with the wallet API: ASCII-escaped and raw UTF-8.
PUBLISHED = [
    (
        {},
        "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
        "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    ),
    (
        {"b": [3, 1, 2], "a": {"y": None, "x": True}, "n": 7},
        "db9145a10d5379afdf106bd5bd345779058fd5ffdb855463357d2fc2dc1e5ed7",
        "db9145a10d5379afdf106bd5bd345779058fd5ffdb855463357d2fc2dc1e5ed7",
    ),
    (
        {"city": "Zürich", "q": "café"},
        "9aec7ef5b7e4795beed963244ab3727871a07b35428c8eacbcb7e19e9edc294f",
        "54cf0d76ac5860efd740b3aff48e9cfd5f6e9b1dea57aa75af3d72af2ece3557",
    ),
    (
        {"limit": 50, "skip": 0},
        "4879729d88891f52ee7d8b54ea2f618e20a75b3817e55e0dbeb84c2bca8f3d93",
        "4879729d88891f52ee7d8b54ea2f618e20a75b3817e55e0dbeb84c2bca8f3d93",
    ),
]


@pytest.mark.parametrize(("value", "escaped", "raw"), PUBLISHED)
def test_published_hashes(value: dict[str, Any], escaped: str, raw: str) -> None:
    forms = list(forms_of(value))
    assert forms[0].digest == escaped
    assert raw in {form.digest for form in forms}
    assert len(forms) == len({escaped, raw})  # the same text is not tried twice


# RFC 8785, appendix B: the bits of a double and what stands for it.
NUMBERS = [
    ("0000000000000000", "0"),
    ("8000000000000000", "0"),
    ("0000000000000001", "5e-324"),
    ("8000000000000001", "-5e-324"),
    ("7fefffffffffffff", "1.7976931348623157e+308"),
    ("ffefffffffffffff", "-1.7976931348623157e+308"),
    ("4340000000000000", "9007199254740992"),
    ("c340000000000000", "-9007199254740992"),
    ("4430000000000000", "295147905179352830000"),
    ("44b52d02c7e14af5", "9.999999999999997e+22"),
    ("44b52d02c7e14af6", "1e+23"),
    ("44b52d02c7e14af7", "1.0000000000000001e+23"),
    ("444b1ae4d6e2ef4e", "999999999999999700000"),
    ("444b1ae4d6e2ef4f", "999999999999999900000"),
    ("444b1ae4d6e2ef50", "1e+21"),
    ("3eb0c6f7a0b5ed8c", "9.999999999999997e-7"),
    ("3eb0c6f7a0b5ed8d", "0.000001"),
    ("41b3de4355555553", "333333333.3333332"),
    ("41b3de4355555554", "333333333.33333325"),
    ("41b3de4355555555", "333333333.3333333"),
    ("41b3de4355555556", "333333333.3333334"),
    ("41b3de4355555557", "333333333.33333343"),
    ("becbf647612f3696", "-0.0000033333333333333333"),
    ("43143ff3c1cb0959", "1424953923781206.2"),
]


@pytest.mark.parametrize(("bits", "text"), NUMBERS)
def test_numbers_of_rfc_8785(bits: str, text: str) -> None:
    (value,) = struct.unpack(">d", bytes.fromhex(bits))
    assert jcs([value]) == f"[{text}]".encode()


def test_keys_stand_in_the_order_of_rfc_8785() -> None:
    """RFC 8785, 3.2.3: by UTF-16 unit, so beyond U+FFFF comes before U+FB33."""
    value = {
        "\u20ac": "Euro Sign",
        "\r": "Carriage Return",
        "\ufb33": "Hebrew Letter Dalet With Dagesh",
        "1": "One",
        "\U0001f600": "Emoji: Grinning Face",
        "\u0080": "Control",
        "\u00f6": "Latin Small Letter O With Diaeresis",
    }
    names = list(json.loads(jcs(value)))
    assert names == ["\r", "1", "\u0080", "\u00f6", "\u20ac", "\U0001f600", "\ufb33"]
    assert list(json.loads(ascii_form(value)))[-1] == "\U0001f600"  # by code point it is last


def test_what_a_double_cannot_hold_has_no_form() -> None:
    """Its neighbour would have the same bytes: who passes it on could change one to the other."""
    assert jcs({"n": 2**53 - 1}) == b'{"n":9007199254740991}'
    for odd in (2**53, 2**53 + 1, -(2**53), 10**40):
        with pytest.raises(ValueError, match="2\\^53"):
            jcs({"n": odd})
        assert "jcs" not in {form.name for form in forms_of({"n": odd, "x": 1.5})}


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3)
)
OBJECTS = st.dictionaries(TEXT, VALUES, max_size=4)


def numbers_as_doubles(text: bytes | str) -> Any:
    return json.loads(text, parse_int=float)


@given(OBJECTS, OBJECTS)
def test_two_values_share_no_form(one: dict[str, Any], other: dict[str, Any]) -> None:
    if {form.text for form in forms_of(one)} & {form.text for form in forms_of(other)}:
        # 1 and 1.0 are one number; nothing else is alike.
        assert numbers_as_doubles(json.dumps(one)) == numbers_as_doubles(json.dumps(other))


@given(OBJECTS)
def test_a_form_reads_back_as_its_value(value: dict[str, Any]) -> None:
    for form in forms_of(value):
        assert numbers_as_doubles(form.text) == numbers_as_doubles(json.dumps(value))
        assert form.digest == sha256(form.text).hexdigest()


def test_node_writes_the_same(tmp_path: Any) -> None:
    """The form of JavaScript clients, by JavaScript itself."""
    values = [
        {"b": 1.0, "a": 1e21, "c": 1e-7, "d": 123456789012345680000.0, "e": -0.0, "f": 0.1},
        {"\U0001f600": 1, "\ufb33": {"ü": 'é\u2028\x7f\x1f"\\\n'}, "é": [True, None, 1.5e300]},
        {"n": [5e-324, 1e23, 4.35, 0.000001, 1e-6, 100, -7]},
    ]
    script = tmp_path / "write.mjs"
    script.write_text(
        "const sorted = v => Array.isArray(v) ? v.map(sorted) : v && typeof v === 'object'"
        " ? Object.fromEntries(Object.keys(v).sort().map(k => [k, sorted(v[k])])) : v;\n"
        "const all = JSON.parse(process.argv[2]);\n"
        "process.stdout.write(JSON.stringify(all.map(v => JSON.stringify(sorted(v)))));\n"
    )
    told = subprocess.run(
        ["node", str(script), json.dumps(values)], capture_output=True, check=True, text=True
    )
    assert [text.encode() for text in json.loads(told.stdout)] == [jcs(value) for value in values]


@given(OBJECTS, st.sampled_from([None, 1, "\t"]), st.booleans())
def test_a_member_is_found_as_it_was_sent(
    value: dict[str, Any], indent: int | str | None, escaped: bool
) -> None:
    assume("parameters" not in value)
    sent = json.dumps(value, indent=indent, ensure_ascii=escaped)
    before = json.dumps({"a": [1, {"parameters": 2}], **value})[:-1]
    body = f' {before},\n "parameters" : {sent} , "z":"}}"}} '
    assert member_as_sent(body, "parameters") == sent.encode()
    assert member_as_sent(json.dumps(value), "parameters") is None


def test_nan_stays_out() -> None:
    for odd in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not JSON"):
            jcs([odd])
