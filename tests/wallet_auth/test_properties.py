"""Properties over generated requests: one base per request, and no covered byte may change."""

from __future__ import annotations

import asyncio
import dataclasses
import string
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.wallet_auth.support import ADDRESS, NOW, changed, header, replaced, signed
from wallet_auth import AuthError, SignedRequest, verify
from wallet_auth.components import signature_base

PATH = st.text(st.sampled_from(string.ascii_letters + "0123456789/-._~!$&'()*+,;=:@%"), max_size=20)
QUERY = st.none() | st.text(st.sampled_from(string.ascii_letters + "0123456789=&?/%+"), max_size=20)
VISIBLE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=16)
VALUES = VISIBLE.map(str.strip)
METHODS = st.sampled_from(["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "M-SEARCH"])
FIELDS = st.dictionaries(st.from_regex(r"x-[a-z0-9_]{1,6}", fullmatch=True), VALUES, max_size=3)
BODIES = st.none() | st.binary(max_size=64)
AUTHORITIES = st.sampled_from(["api.example", "api.example:8402", "127.0.0.1:1", "x", "[::1]:9"])


@st.composite
def requests(draw: st.DrawFn) -> SignedRequest:
    """A request signed by our signing half, everything on it covered."""
    query = draw(QUERY)
    url = f"{draw(st.sampled_from(['http', 'https']))}://{draw(AUTHORITIES)}/{draw(PATH)}"
    fields = draw(FIELDS)
    if draw(st.booleans()):
        fields["farebox-max"] = "$0.01"
    return signed(
        draw(METHODS),
        url + ("" if query is None else f"?{query}"),
        list(fields.items()),
        draw(BODIES),
        components=list(fields),
        chain_id=draw(st.integers(1, 2**53)),
    )


def outcome(request: SignedRequest) -> str:
    """The signer's address, or the code of the refusal."""
    try:
        signer = asyncio.run(verify(request, NOW, None))
    except AuthError as error:
        return error.code
    return "nobody" if signer is None else signer.address


@given(requests())
def test_what_we_sign_we_accept(request: SignedRequest) -> None:
    assert outcome(request) == ADDRESS


def _flip(value: bytes, at: int, bit: int) -> bytes:
    at %= len(value)
    return value[:at] + bytes((value[at] ^ 1 << bit,)) + value[at + 1 :]


COVERED = ("@method", "@path", "@query", "@authority", "body", "content-digest", "field", "params")


@given(requests(), st.sampled_from(COVERED), st.integers(0, 10_000), st.integers(0, 7))
def test_no_bit_of_what_is_covered_may_flip(
    request: SignedRequest, part: str, at: int, bit: int
) -> None:
    names = [n for n, _ in request.headers if n.startswith(b"x-") or n == b"farebox-max"]
    if part in ("@method", "@authority"):
        member = part[1:]
        raw = _flip(getattr(request, member).encode(), at, bit % 7).decode()
        other = changed(request, **{member: raw})
    elif part in ("@path", "@query"):
        other = changed(request, target=_flip(request.target, at, bit))
    elif part == "body":
        assume(request.body)
        other = changed(request, body=_flip(request.body or b"", at, bit))
    else:
        name = {"params": "signature-input", "field": names[0].decode() if names else ""}.get(
            part, part
        )
        assume(any(n.decode() == name and v for n, v in request.headers))
        before = header(request, name).encode()
        after = _flip(before, at, bit)
        # Spaces around a value are no part of it; the label is no part of what is signed.
        assume(after.strip(b" \t") != before and b"=" in after and at % len(before) > 3)
        other = replaced(request, name, after)
    got = outcome(other)
    assert got != ADDRESS, (part, got)


@given(requests(), st.integers(0, 64), st.integers(0, 7))
def test_no_bit_of_the_signature_may_flip(request: SignedRequest, at: int, bit: int) -> None:
    import base64

    sent = header(request, "signature")
    raw = base64.b64decode(sent.removeprefix("eth=:").removesuffix(":"))
    flipped = base64.b64encode(_flip(raw, at, bit)).decode()
    assert outcome(replaced(request, "signature", f"eth=:{flipped}:")) == "signature_invalid"


@given(requests(), requests())
def test_a_signature_fits_one_request(one: SignedRequest, other: SignedRequest) -> None:
    """Signatures are moved between requests: only an equal request takes a foreign one."""
    moved = other
    for name in ("signature-input", "signature"):
        moved = replaced(moved, name, header(one, name))
    same = dataclasses.replace(one, headers=()) == dataclasses.replace(other, headers=())
    got = outcome(moved)
    assert got != ADDRESS or same or one.scheme != other.scheme


PARTS = st.fixed_dictionaries(
    {
        "method": METHODS,
        "target": st.tuples(PATH, QUERY).map(
            lambda t: ("/" + t[0] + ("" if t[1] is None else "?" + t[1])).encode()
        ),
        "authority": AUTHORITIES,
        "scheme": st.sampled_from(["http", "https"]),
        "fields": FIELDS,
    }
)
DERIVED = ("@method", "@path", "@authority", "@scheme", "@target-uri", "@request-target")
PARAMS = st.builds(
    lambda c, e, n: f';created={c};expires={e};nonce="{n}"',
    st.integers(0, 99),
    st.integers(0, 99),
    st.from_regex(r"[A-Za-z0-9._~:=-]{1,6}", fullmatch=True),
)


def _base(parts: dict[str, Any], components: tuple[str, ...], params: str) -> bytes:
    lines = {n.encode(): [v.encode()] for n, v in parts["fields"].items()}
    request = SignedRequest(
        parts["method"], parts["target"], parts["authority"], parts["scheme"], (), None
    )
    query = () if request.query is None else ("@query",)
    return signature_base(request, (*components, *query, *parts["fields"]), params, lines)


SIGNED = st.tuples(PARTS, st.permutations(DERIVED), PARAMS)


@given(SIGNED, SIGNED)
def test_the_base_is_injective(a: Any, b: Any) -> None:
    """Equal bytes mean equal parts, equal components in equal order, equal parameters."""
    (one, first, params), (other, second, others) = a, b
    same = a == b and list(one["fields"]) == list(other["fields"])
    assert (_base(one, tuple(first), params) == _base(other, tuple(second), others)) is same


@given(PARTS, PARAMS, st.data())
def test_the_base_tells_apart_what_differs_in_one_part(
    parts: dict[str, Any], params: str, data: st.DataObject
) -> None:
    """Two random requests hardly ever nearly agree; here they differ in exactly one part."""
    member = data.draw(st.sampled_from(sorted(parts)))
    other = parts | {member: data.draw(PARTS)[member]}
    assume(other != parts)
    assert _base(parts, DERIVED, params) != _base(other, DERIVED, params)


@given(VISIBLE, VISIBLE, VISIBLE)
def test_a_value_cannot_pretend_to_be_another_line(name: str, value: str, evil: str) -> None:
    """A field that tries to close its line and open another is refused or stays one line."""
    from hypothesis import reject

    request = SignedRequest("GET", b"/", "x", "https", (), None)
    for attempt in (f'{value}\n"@method": POST', f"{value}\r\n{evil}", f"{value}\u2028{evil}"):
        lines = {b"x-a": [attempt.encode()]}
        with pytest.raises(AuthError):
            signature_base(request, ["x-a"], "()", lines)
    if not name:
        reject()
    base = signature_base(request, ["x-a"], "()", {b"x-a": [value.encode()]})
    assert base.count(b"\n") == 1


@given(st.binary(max_size=200), st.binary(max_size=60))
def test_any_bytes_in_the_fields_give_an_answer(sent_input: bytes, sent: bytes) -> None:
    """Whatever is sent is nobody, somebody else, or a named refusal; nothing else is raised."""
    good = signed()
    wild = replaced(replaced(good, "signature-input", sent_input), "signature", sent)
    assert outcome(wild) in {"nobody", "signature_invalid"}
    half = header(good, "signature-input").encode()
    at = len(sent_input) % len(half)
    spliced = half[:at] + sent_input[:20] + half[at:]
    assume(sent_input[:20].strip(b" "))
    assert outcome(replaced(good, "signature-input", spliced)) != ADDRESS
