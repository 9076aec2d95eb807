"""The quick reader of signatures says what the full one says, or nothing."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.wallet_auth.support import ADDRESS, BASIC, NONCE, NOW, by_hand, changed, plain, signed
from tests.wallet_auth.test_properties import requests
from wallet_auth import AuthError, SignedRequest, claims, structured, verify
from wallet_auth.claims import Claim
from wallet_auth.request import Lines, lines_of

SIGNATURE = "eth=:" + base64.b64encode(bytes(range(65))).decode() + ":"


def _usual(lines: Lines) -> Claim | None:
    return claims._usual(lines.get(b"signature-input", []), lines)


def _full(lines: Lines) -> Claim | str | None:
    """What the full reader says: a claim, nobody (None), or the code of the refusal."""
    try:
        return claims._any(lines.get(b"signature-input", []), lines)
    except AuthError as error:
        return error.code


def _agree(lines: Lines) -> bool:
    """Whether the quick reader had something to say; if so, it is what the full one says."""
    quick = _usual(lines)
    if quick is not None:
        assert quick == _full(lines)
    return quick is not None


@given(requests())
def test_what_clients_write_is_read_quickly(request_: SignedRequest) -> None:
    assert _agree(request_.lines())


LABELS = st.sampled_from(["eth", "sig1", "a", "*x-y.z_1*", "Eth", "", "1a", "e" * 64, "e" * 65])
NAMES = st.sampled_from([*BASIC, "@query", "content-digest", "x-a", "a%s", "A", "", "@", 'x"', "é"])
LISTS = st.one_of(
    st.lists(NAMES, max_size=5).map(structured.serialize_names),
    st.sampled_from(
        [
            "()",
            "( )",
            '("@path"  "@method")',
            '( "@path" )',
            '("@path";req)',
            '("@path" 1)',
            '("@path"))',
            "(" + '"aaaaaaaaaaaaaaaaaaaaaaaa" ' * 17 + ")",
            structured.serialize_names([f"h{i}" for i in range(30)]),
        ]
    ),
)
NUMBERS = st.one_of(
    st.integers(0, 10**16).map(str),
    st.sampled_from(
        ["0", "1", "00", "01", "-1", "-0", "1.0", "", "9" * 15, "9" * 16, str(NOW), str(NOW + 60)]
    ),
)
NONCES = st.one_of(
    st.from_regex(r"[A-Za-z0-9._~:=-]{1,130}", fullmatch=True),
    st.sampled_from(["", " ", "a b", "a\\\\b", "é", NONCE, "n" * 128, "n" * 129]),
)
KEYIDS = st.one_of(
    st.builds(
        lambda chain, address: f"erc8128:{chain}:{address}",
        st.one_of(st.integers(-1, 10**20).map(str), st.sampled_from(["01", "", "1 "])),
        st.sampled_from(
            [ADDRESS, ADDRESS.upper(), "0x" + ADDRESS[2:].upper(), ADDRESS[:-1], ADDRESS + "0"]
        ),
    ),
    st.sampled_from(["ERC8128:1:" + ADDRESS, "erc8128:1", "key"]),
)
INPUTS = st.builds(  # mostly in the usual form, each part odd now and then
    lambda label, inner, created, expires, nonce, keyid: (
        f'{label}={inner};created={created};expires={expires};nonce="{nonce}";keyid="{keyid}"'
    ),
    st.just("eth") | LABELS,
    st.just('("@authority" "@method")') | LISTS,
    st.just("1") | NUMBERS,
    st.just(str(NOW)) | NUMBERS,
    st.just(NONCE) | NONCES,
    st.just(f"erc8128:1:{ADDRESS}") | KEYIDS,
)
GOOD = (
    f'eth=("@authority" "@method" "@path");created={NOW};expires={NOW + 60}'
    f';nonce="{NONCE}";keyid="erc8128:1:{ADDRESS}"'
)
DIGITS = st.sampled_from(
    [
        *(SIGNATURE[5:-1], SIGNATURE[5:-2], "", "=", "A" * 86 + "==", "A" * 87 + "=", "A" * 88),
        *("A" * 87 + "B", "A" * 43 + "=" + "A" * 43 + "=", "A" * 86 + "B=", "-" * 87 + "="),
    ]
)
SENT = st.builds(
    lambda label, digits: f"{label}=:{digits}:",
    st.just("eth") | LABELS,
    st.just(SIGNATURE[5:-1]) | DIGITS,
)
EDITS: list[Callable[[bytes, int, bytes], bytes]] = [
    lambda value, at, piece: value[:at] + piece + value[at:],
    lambda value, at, piece: value[:at] + value[at + 1 :],
    lambda value, at, piece: value[:at] + piece + value[at + 1 :],
    lambda value, at, piece: value + piece,
    lambda value, at, piece: piece + value,
]
PIECES = st.sampled_from([b" ", b"\t", b"\n", b'"', b",", b";", b"=", b"0", b"a", b"A", b"\xe9"])


@given(INPUTS, SENT)
@example(GOOD, SIGNATURE)
def test_pieces_put_together(sent_input: str, sent: str) -> None:
    lines = lines_of(
        [(b"signature-input", sent_input.encode("latin-1")), (b"signature", sent.encode())]
    )
    _agree(lines)


@given(
    st.sampled_from(["signature-input", "signature"]),
    st.lists(st.tuples(st.sampled_from(EDITS), st.integers(0, 300), PIECES), max_size=2),
)
def test_a_usual_request_with_a_few_characters_changed(
    name: str, edits: list[tuple[Callable[[bytes, int, bytes], bytes], int, bytes]]
) -> None:
    fields = {"signature-input": GOOD.encode(), "signature": SIGNATURE.encode()}
    for edit, at, piece in edits:
        fields[name] = edit(fields[name], at % len(fields[name]), piece)
    said = _agree(lines_of([(n.encode(), v) for n, v in fields.items()]))
    assert said or edits


@pytest.mark.parametrize(
    ("before", "after", "read"),
    [
        ('("@authority" ', '( "@authority" ', True),
        ('("@authority" ', '("@authority"  ', True),
        ('"@path")', '"@path" )', True),
        (";created=", "; created=", True),
        ("created=", "created=0", True),
        ('"@path"', '"@method"', False),
        ('"@path"', '"@path";req', False),
        ("eth=", "eth=x;a=", False),
    ],
)
def test_other_forms_are_left_to_the_full_reader(before: str, after: str, read: bool) -> None:
    """What is not canonical is signed in another form than it is sent in (RFC 9421 2.3)."""
    assert before in GOOD
    sent = GOOD.replace(before, after).encode()
    lines = lines_of([(b"signature-input", sent), (b"signature", SIGNATURE.encode())])
    assert _usual(lines) is None
    assert isinstance(_full(lines), Claim) is read


@pytest.mark.parametrize("twice", [b"signature-input", b"signature"])
def test_two_lines_are_left_to_the_full_reader(twice: bytes) -> None:
    fields = [(b"signature-input", GOOD.encode()), (b"signature", SIGNATURE.encode())]
    assert _agree(lines_of(fields))
    again = lines_of([*fields, *(field for field in fields if field[0] == twice)])
    assert not _agree(again)
    assert _full(again) == "identity_conflict"


@given(requests())
def test_both_readers_verify_alike(request_: SignedRequest) -> None:
    """The same verdict with the quick reader and without it."""
    with pytest.MonkeyPatch.context() as patch:
        before = asyncio.run(verify(request_, NOW, None))
        patch.setattr(claims, "_usual", lambda inputs, lines: None)
        assert before == asyncio.run(verify(request_, NOW, None))
        assert before is not None


def test_a_long_list_is_read_and_not_remembered() -> None:
    """Plans of lists from outside are bounded in number and in length."""
    from wallet_auth import components

    names = [f"x-{i}" for i in range(30)]
    request = plain(*((name, "v") for name in names))
    long = by_hand(request, (*BASIC, *names))
    components._remembered.cache_clear()
    assert asyncio.run(verify(long, NOW, None)) is not None
    assert components._remembered.cache_info().currsize == 0
    assert asyncio.run(verify(signed(), NOW, None)) is not None
    assert components._remembered.cache_info().currsize == 1


def test_a_name_with_a_percent_sign_is_only_a_name() -> None:
    """Names go into a format string."""
    request = plain(("a%s", "%d%s"), ("%", "100%"))
    good = by_hand(request, (*BASIC, "a%s", "%"))
    signer = asyncio.run(verify(good, NOW, None))
    assert signer is not None
    assert signer.address == ADDRESS
    with pytest.raises(AuthError):
        asyncio.run(verify(changed(good, headers=good.headers[1:]), NOW, None))


SIZES = st.sampled_from([0, 1, 2, 3, 32, 64, 65])
KEYS = st.sampled_from(["eth", "sha-256", "a"])


@given(KEYS, KEYS, SIZES, st.binary(max_size=66) | st.binary(min_size=32, max_size=32), st.data())
def test_only_bytes_is_what_the_full_parser_reads(
    key: str, written: str, size: int, value: bytes, data: st.DataObject
) -> None:
    text = f"{written}=:{base64.b64encode(value).decode()}:".encode()
    for _ in range(data.draw(st.integers(0, 2))):
        edit, piece = data.draw(st.sampled_from(EDITS)), data.draw(PIECES)
        text = edit(text, data.draw(st.integers(0, len(text))), piece)
    found = structured.only_bytes(text, key.encode(), size)
    if found is not None:
        members = structured.members(structured.text_of(text))
        assert list(members) == [key]
        assert structured.byte_sequence(members[key]) == found
        assert len(found) == size
    elif key == written and text == f"{key}=:{base64.b64encode(value).decode()}:".encode():
        assert len(value) != size
