"""Payment headers: read strictly, refused in words, never misread."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chain.schemes.eip3009 import Authorization
from gateway.errors import CODES, Problem
from gateway.payments.wire import (
    MAX_HEADER_BYTES,
    Presented,
    decode,
    encode,
    payment_header,
    response_headers,
)

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "vectors" / "x402-vectors.json").read_text()
)
AUTH = Authorization(
    from_="0x" + "aa" * 20,
    to="0x" + "bb" * 20,
    value_units=10_000,
    valid_after_s=0,
    valid_before_s=2_000_000_000,
    nonce="0x" + "cd" * 32,
    signature=b"\x11" * 64 + b"\x1b",
)


def payload(auth: Authorization = AUTH) -> dict[str, Any]:
    return {
        "signature": "0x" + auth.signature.hex(),
        "authorization": {
            "from": auth.from_,
            "to": auth.to,
            "value": str(auth.value_units),
            "validAfter": str(auth.valid_after_s),
            "validBefore": str(auth.valid_before_s),
            "nonce": auth.nonce,
        },
    }


def v1(auth: Authorization = AUTH) -> dict[str, Any]:
    return {
        "x402Version": 1,
        "scheme": "exact",
        "network": "base-sepolia",
        "payload": payload(auth),
    }


def v2(auth: Authorization = AUTH, **extra: Any) -> dict[str, Any]:
    return {
        "x402Version": 2,
        "payload": payload(auth),
        "accepted": {
            "scheme": "exact",
            "network": "eip155:84532",
            "amount": "10000",
            "asset": "0x036CbD53842c5426634e7929541eC2318f3dCF7e",
            "payTo": "0x" + "BB" * 20,
            "maxTimeoutSeconds": 120,
            "extra": {"name": "USDC", "version": "2", "offer": "tok-en_", **extra},
        },
        "resource": {"url": "http://shop.test/x"},
    }


def packed(value: object) -> bytes:
    return base64.b64encode(json.dumps(value).encode())


def refused(header: bytes) -> Problem:
    with pytest.raises(Problem) as problem:
        decode(header)
    assert problem.value.detail
    return problem.value


def changed(base: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """A copy with one member replaced, or left out (``...``)."""
    made = copy.deepcopy(base)
    *above, last = path.split(".")
    inner = made
    for name in above:
        inner = inner[name]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return made


# --- what is read ---------------------------------------------------------------------------


def test_a_v2_payment_is_read() -> None:
    assert decode(packed(v2())) == Presented(
        version=2,
        scheme="exact",
        network="eip155:84532",
        authorization=AUTH,
        asset="0x036cbd53842c5426634e7929541ec2318f3dcf7e",
        pay_to="0x" + "bb" * 20,
        amount="10000",
        timeout_s=120,
        offer="tok-en_",
    )


def test_a_v1_payment_is_read() -> None:
    assert decode(packed(v1())) == Presented(1, "exact", "base-sepolia", AUTH)


UINT = st.integers(0, 2**256 - 1)
ADDRESS = st.binary(min_size=20, max_size=20).map(lambda raw: "0x" + raw.hex())
AUTHS = st.builds(
    Authorization,
    from_=ADDRESS,
    to=ADDRESS,
    value_units=UINT,
    valid_after_s=UINT,
    valid_before_s=UINT,
    nonce=st.binary(min_size=32, max_size=32).map(lambda raw: "0x" + raw.hex()),
    signature=st.one_of(
        st.binary(min_size=64, max_size=64).map(lambda raw: raw + b"\x1c"),
        st.binary(min_size=66, max_size=300),
    ),
)


@given(AUTHS, st.sampled_from([v1, v2]), st.booleans(), st.booleans(), st.randoms())
@settings(max_examples=150, deadline=None)
def test_what_a_client_writes_is_what_is_read(
    auth: Authorization, version: Any, padded: bool, upper: bool, shuffle: Any
) -> None:
    """Whatever the numbers, the padding, the case of the hex and the order of the members."""
    body = version(auth)
    if upper:
        for name in ("from", "to", "nonce"):
            text = body["payload"]["authorization"][name]
            body["payload"]["authorization"][name] = "0x" + text[2:].upper()
    members = list(body.items())
    shuffle.shuffle(members)
    header = encode(dict(members)).encode()
    found = decode(header if padded else header.rstrip(b"="))
    assert found.authorization == auth
    assert found.version == body["x402Version"]


def test_members_that_are_not_known_are_passed_over() -> None:
    """Extensions are echoed by official clients, and v2 payloads have a resource."""
    body = v2() | {"extensions": {"bazaar": {"info": {"id": "x" * 20}}}}
    body["accepted"]["note"] = [1, 2.5, None]
    body["payload"]["more"] = {"a": 1}
    assert decode(packed(body)) == decode(packed(v2()))


def test_the_identifier_of_a_payment() -> None:
    known: dict[str, bool] = VECTORS["payment_identifier"]["id_validity"]
    for text, good in known.items():
        body = v2() | {"extensions": {"payment-identifier": {"info": {"id": text}}}}
        if good:
            assert decode(packed(body)).identifier == text
        else:
            with pytest.raises(Problem, match="invalid_payload"):
                decode(packed(body))
    for odd in (None, 7, [], {"payment-identifier": 7}, {"payment-identifier": {"info": {}}}):
        assert decode(packed(v2() | {"extensions": odd})).identifier is None


@pytest.mark.parametrize("vector", VECTORS["valid"], ids=lambda v: v["name"])
def test_official_clients_are_understood(vector: dict[str, Any]) -> None:
    found = decode(vector["header"].encode())
    wanted = vector["requirements"]
    assert found.version == vector["payload"]["x402Version"]
    assert found.scheme == wanted["scheme"]
    assert str(found.authorization.value_units) == wanted.get(
        "amount", wanted.get("maxAmountRequired")
    )
    if found.version == 2:
        assert (found.network, found.amount) == (wanted["network"], wanted["amount"])
        assert found.pay_to == wanted["payTo"].lower()


@pytest.mark.parametrize("vector", VECTORS["malformed_headers"], ids=lambda v: v["name"])
def test_headers_the_official_decoders_stumble_over(vector: dict[str, Any]) -> None:
    header = vector["header"].encode()
    if vector["name"] == "empty":
        assert payment_header([(b"payment-signature", header)]) is None
    elif vector["name"] in ("valid without padding", "utf8 description"):
        assert decode(header).version == 2
    else:
        assert refused(header).code == "invalid_payload"


# --- odd base64 -----------------------------------------------------------------------------

GOOD = packed(v2())


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"=",
        b"====",
        GOOD + b"=",
        GOOD + b"====",
        b"=" + GOOD,
        GOOD[:40] + b"=" + GOOD[40:],
        GOOD[:40] + b" " + GOOD[40:],
        GOOD[:40] + b"\r\n" + GOOD[40:],
        GOOD[:40] + b"\0" + GOOD[40:],
        b'"' + GOOD + b'"',
        b"Bearer " + GOOD,
        GOOD + b"," + GOOD,
        GOOD[:-1] if len(GOOD.rstrip(b"=")) % 4 == 2 else GOOD.rstrip(b"=")[:-1] + b"-",
        GOOD.replace(b"e", "е".encode(), 1),
        base64.urlsafe_b64encode(json.dumps(v2(offer="???>>>~~~")).encode()).replace(b"=", b"_"),
        base64.b64encode(GOOD),
        base64.b32encode(json.dumps(v2()).encode()),
        json.dumps(v2()).encode(),
        b"A" * (MAX_HEADER_BYTES + 1),
        b"\xff\xfe",
    ],
)
def test_odd_base64_is_refused(header: bytes) -> None:
    assert refused(header).code == "invalid_payload"


def test_a_header_has_a_bound() -> None:
    """Far above what official clients send with all their extensions."""
    room = MAX_HEADER_BYTES * 3 // 4 - len(json.dumps(v2() | {"extensions": ""}))
    for size, fits in ((room - 2, True), (room + 2, False)):
        header = packed(v2() | {"extensions": "x" * size})
        assert (len(header) <= MAX_HEADER_BYTES) is fits
        if fits:
            assert decode(header) == decode(packed(v2()))
        else:
            assert "too long" in refused(header).detail


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_truncated_header_is_refused(cut: int) -> None:
    assert refused(GOOD.rstrip(b"=")[:-cut]).code == "invalid_payload"


# --- odd JSON -------------------------------------------------------------------------------

TEXT = json.dumps(v2())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "2",
        '"x"',
        "[]",
        "[" + TEXT + "]",
        TEXT[:-1],
        TEXT + TEXT,
        TEXT + "x",
        "\ufeff" + TEXT,
        TEXT.replace('"x402Version": 2', '"x402Version": 2, "x402Version": 1'),
        TEXT.replace('"value": "10000"', '"value": "10000", "value": "1"'),
        TEXT.replace('"resource":', '"n": NaN, "resource":'),
        TEXT.replace('"resource":', '"n": Infinity, "resource":'),
        TEXT.replace('"resource":', '"n": 1e999, "resource":'),
        TEXT.replace('"resource":', '"n": ' + "9" * 5_000 + ', "resource":'),
        TEXT.replace('"resource":', '"n": "\\ud800", "resource":'),
        TEXT.replace('"resource":', '"n": ' + "[" * 40 + "]" * 40 + ', "resource":'),
        TEXT.replace('"', "'"),
        TEXT.replace("}", ",}", 1),
    ],
    ids=lambda text: text[:12],
)
def test_odd_json_is_refused(text: str) -> None:
    assert refused(base64.b64encode(text.encode())).code == "invalid_payload"


def test_json_in_another_encoding_is_refused() -> None:
    for encoding in ("utf-16", "utf-32", "latin-1"):
        raw = json.dumps(v2(name="Ü"), ensure_ascii=False).encode(encoding)
        assert refused(base64.b64encode(raw)).code == "invalid_payload"


@pytest.mark.parametrize("version", [..., None, True, "2", 2.0, 1.0, [2], {}])
def test_a_version_is_a_whole_number(version: object) -> None:
    for body in (v1(), v2()):
        assert refused(packed(changed(body, "x402Version", version))).code == "invalid_payload"


@pytest.mark.parametrize("version", [0, 3, -1, 10**30])
def test_another_version_is_not_spoken(version: int) -> None:
    problem = refused(packed(changed(v2(), "x402Version", version)))
    assert (problem.code, problem.status) == ("invalid_x402_version", 402)


def test_the_version_decides_how_it_is_read() -> None:
    """A v1 payload that calls itself 2 has no accepted offer, and the other way round."""
    assert refused(packed(v1() | {"x402Version": 2})).code == "invalid_payload"
    assert refused(packed(v2() | {"x402Version": 1})).code == "invalid_payload"


# --- odd members ----------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["upto", "Exact", "exact ", "batch-settlement"])
@pytest.mark.parametrize("version", [v1, v2])
def test_another_scheme_is_not_spoken(version: Any, scheme: str) -> None:
    path = "scheme" if version is v1 else "accepted.scheme"
    problem = refused(packed(changed(version(), path, scheme)))
    assert (problem.code, problem.status) == ("invalid_scheme", 402)


def test_permit2_is_not_spoken() -> None:
    body = changed(v2(), "payload", {"signature": "0x11", "permit2Authorization": {}})
    assert refused(packed(body)).code == "invalid_scheme"


def by_permit2(**change: Any) -> dict[str, Any]:
    inner = {
        "from": "0x" + "aA" * 20,
        "permitted": {"token": "0x" + "dd" * 20, "amount": "10000"},
        "spender": "0x" + "ee" * 20,
        "nonce": "255",
        "deadline": "2000000000",
        "witness": {"to": "0x" + "bb" * 20, "validAfter": "0"},
    }
    return {"signature": "0x" + "11" * 64 + "1b", "permit2Authorization": inner | change}


def test_permit2_is_read_where_it_is_taken() -> None:
    header = packed(changed(v2(), "payload", by_permit2()))
    auth = decode(header, permit2=True).authorization
    assert (auth.from_, auth.to) == ("0x" + "aa" * 20, "0x" + "bb" * 20)
    assert (auth.value_units, auth.nonce) == (10_000, "0x" + f"{255:064x}")
    assert refused(header).code == "invalid_scheme"


@pytest.mark.parametrize(
    ("version", "made", "code"),
    [
        (v1, by_permit2(), "invalid_scheme"),
        (v2, by_permit2() | payload(), "invalid_payload"),
        (v2, by_permit2(nonce="0xff"), "invalid_payload"),
        (v2, by_permit2(more="1"), "invalid_payload"),
        (v2, by_permit2() | {"signature": "0x1"}, "invalid_payload"),
        (v2, {"signature": "0x11", "permit2Authorization": None}, "invalid_payload"),
    ],
)
def test_odd_payments_by_permit2_are_refused(version: Any, made: Any, code: str) -> None:
    with pytest.raises(Problem) as problem:
        decode(packed(changed(version(), "payload", made)), permit2=True)
    assert problem.value.code == code


NOT_TEXT = [..., None, "", 1, True, ["exact"], {"a": 1}, "x" * 201]


@pytest.mark.parametrize("value", NOT_TEXT, ids=repr)
@pytest.mark.parametrize(
    "path",
    ["accepted.scheme", "accepted.network", "accepted.amount", "accepted.asset", "accepted.payTo"],
)
def test_what_is_accepted_is_named_in_text(path: str, value: object) -> None:
    assert refused(packed(changed(v2(), path, value))).code == "invalid_payload"


@pytest.mark.parametrize("value", NOT_TEXT, ids=repr)
@pytest.mark.parametrize("path", ["scheme", "network"])
def test_v1_names_scheme_and_network_in_text(path: str, value: object) -> None:
    assert refused(packed(changed(v1(), path, value))).code == "invalid_payload"


@pytest.mark.parametrize("value", [..., None, [], "x", 1])
@pytest.mark.parametrize("path", ["accepted", "payload", "payload.authorization"])
def test_what_must_be_an_object_is_one(path: str, value: object) -> None:
    assert refused(packed(changed(v2(), path, value))).code == "invalid_payload"


@pytest.mark.parametrize("offer", [1, True, [], {}, "ü", "x" * 512], ids=repr)
def test_an_offer_is_a_short_ascii_token(offer: object) -> None:
    assert refused(packed(v2(offer=offer))).code == "invalid_payload"


@pytest.mark.parametrize("extra", [..., None, [], "x", {}, {"offer": None}], ids=repr)
def test_a_payment_may_come_without_an_offer(extra: object) -> None:
    assert decode(packed(changed(v2(), "accepted.extra", extra))).offer is None


@pytest.mark.parametrize("value", [..., None, True, "120", 1.5, [120]], ids=repr)
def test_a_timeout_that_is_no_number_is_none(value: object) -> None:
    """It is compared with our own terms, so an odd one matches no offer."""
    assert decode(packed(changed(v2(), "accepted.maxTimeoutSeconds", value))).timeout_s is None


NUMBERS = ["value", "validAfter", "validBefore"]
ODD_NUMBERS = [
    ..., None, True, 10, 10.0, "", " 1", "1 ", "1\n", "+1", "-1", "1_0", "1.0", "1e3", "0x10",
    "0b1", "１", "٣", "²", "1,000", "ten", "9" * 79, str(2**256), ["1"], {"v": "1"},
]  # fmt: skip


@pytest.mark.parametrize("value", ODD_NUMBERS, ids=repr)
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_plain_digits(name: str, value: object) -> None:
    body = changed(v2(), f"payload.authorization.{name}", value)
    assert refused(packed(body)).code == "invalid_payload"


@pytest.mark.parametrize("value", ["0", "007", str(2**256 - 1)])
def test_numbers_that_are_read(value: str) -> None:
    body = changed(v2(), "payload.authorization.value", value)
    assert decode(packed(body)).authorization.value_units == int(value)


ODD_HEX = [
    ...,
    None,
    1,
    "",
    "0x",
    "0xzz",
    "aa" * 20,
    "0x" + "a" * 39,
    "0x" + "a" * 41,
    "0X" + "a" * 40,
]


@pytest.mark.parametrize("value", [*ODD_HEX, "0x" + "ａ" * 40], ids=repr)
@pytest.mark.parametrize("name", ["from", "to", "nonce"])
def test_addresses_and_nonces_are_whole(name: str, value: object) -> None:
    body = changed(v2(), f"payload.authorization.{name}", value)
    assert refused(packed(body)).code == "invalid_payload"


@pytest.mark.parametrize(
    "value", [..., None, 1, "", "0x", "0x1", "11" * 65, "0x" + "1g" * 65, "0x" + "11" * 20_000]
)
def test_a_signature_is_hex_of_some_length(value: object) -> None:
    assert refused(packed(changed(v2(), "payload.signature", value))).code == "invalid_payload"


def test_an_authorization_has_its_six_members_and_no_other() -> None:
    body = v2()
    body["payload"]["authorization"]["extra"] = "1"
    assert refused(packed(body)).code == "invalid_payload"


# --- anything at all ------------------------------------------------------------------------

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


def paths(value: object, above: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield above + name
            yield from paths(inner, f"{above}{name}.")


PATHS = {version: list(paths(version())) for version in (v1, v2)}


def told(header: bytes) -> None:
    """It is read, or refused with a code of the table; nothing else ever happens."""
    try:
        found = decode(header)
    except Problem as problem:
        assert problem.code in CODES and problem.status in (400, 402)
    else:
        assert 0 <= found.authorization.value_units < 2**256


@given(st.sampled_from([v1, v2]), st.data(), JUNK)
@settings(max_examples=300, deadline=None)
def test_one_member_of_any_kind_is_no_crash(
    version: Any, data: st.DataObject, junk: object
) -> None:
    path = data.draw(st.sampled_from(PATHS[version]))
    told(packed(changed(version(), path, junk)))


@given(st.binary(max_size=60) | JUNK.map(packed))
@settings(max_examples=200, deadline=None)
def test_any_header_is_no_crash(header: bytes) -> None:
    told(header)


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_one_byte_of_any_kind_is_no_crash(at: int, byte: int) -> None:
    told(GOOD[:at] + bytes((byte,)) + GOOD[at + 1 :])


# --- which header ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [b"payment-signature", b"x-payment", b"payment"])
def test_each_payment_header_is_found(name: bytes) -> None:
    headers = [(b"accept", b"x"), (name, b" abc "), (b"x-payment-response", b"y")]
    assert payment_header(headers) == b"abc"


@pytest.mark.parametrize("value", [b"", b"  ", b"\t"])
def test_an_empty_payment_header_is_none(value: bytes) -> None:
    assert payment_header([(b"x-payment", value)]) is None
    assert payment_header([]) is None


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (b"payment-signature", b"payment-signature"),
        (b"payment-signature", b"x-payment"),
        (b"x-payment", b"payment"),
    ],
)
@pytest.mark.parametrize("value", [b"abc", b""])
def test_two_payments_are_a_conflict(one: bytes, two: bytes, value: bytes) -> None:
    with pytest.raises(Problem) as problem:
        payment_header([(one, b"abc"), (two, value)])
    assert problem.value.code == "identity_conflict"


# --- what is written ------------------------------------------------------------------------


def read(header: str) -> dict[str, Any]:
    assert header.isascii() and len(header) % 4 == 0
    found: dict[str, Any] = json.loads(base64.b64decode(header, validate=True))
    return found


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.none() | st.booleans()))
def test_what_is_encoded_reads_the_same(value: dict[str, Any]) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return  # half a surrogate pair: no text of ours holds one
    assert read(encode(value)) == value


def test_both_generations_are_told_the_outcome_in_their_words() -> None:
    (new, new_text), (old, old_text) = response_headers(
        success=True,
        network="eip155:84532",
        payer="0xaa",
        transaction="0x01",
        amount_units=10**17,
        v1_name="base-sepolia",
    )
    assert (new, old) == ("PAYMENT-RESPONSE", "X-PAYMENT-RESPONSE")
    same = {"success": True, "transaction": "0x01", "payer": "0xaa"}
    assert read(new_text) == same | {"network": "eip155:84532", "amount": str(10**17)}
    assert read(old_text) == same | {"network": "base-sepolia"}


def test_a_refusal_says_why_and_names_no_transaction() -> None:
    for _, text in response_headers(
        success=False,
        network="eip155:1",
        payer="0xaa",
        error=("insufficient_funds", "It is empty – λ"),
    ):
        assert read(text) == {
            "success": False,
            "transaction": "",
            "network": "eip155:1",
            "payer": "0xaa",
            "errorReason": "insufficient_funds",
            "errorMessage": "It is empty – λ",
        }
