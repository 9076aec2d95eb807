"""The EIP-191 messages: published shapes, the strong one, sessions, and that none is another."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import pytest
from eth_account import Account
from eth_account.messages import encode_defunct
from hypothesis import given
from hypothesis import strategies as st

from tests.wallet_auth.support import ADDRESS, KEY, NOW, OTHER_KEY
from wallet_auth import AuthError, keys, personal
from wallet_auth.canonical import Form, forms_of, jcs
from wallet_auth.personal import Call, Signed
from wallet_auth.recipient import message, payment_message, sponsor_lines

AUDIENCE = "https://api.example"
BALANCE = Call("balance", "-")
INVOKE = Call(
    "invoke",
    "weather",
    (
        "/external/tools/weather/actions/forecast/invoke",
        "/api/external/tools/weather/actions/forecast/invoke",
    ),
)
PARAMETERS = {"city": "Zürich", "q": "café"}
PATH = "/api/external/tools/weather/actions/forecast/invoke"


@dataclass(frozen=True)
class Keys:
    deployment: str = "d1"
    secrets: dict[bytes, bytes] = field(default_factory=lambda: {b"0001": b"a" * 32})
    current: bytes = b"0001"


MAC_KEYS = Keys()


def session(wallet: str = ADDRESS, now_s: int = NOW) -> str:
    return personal.session_nonce(MAC_KEYS, wallet, now_s)[0]


def sign(text: str, key: str = KEY) -> str:
    """By the library that wallets use, not by our own code."""
    made = Account.sign_message(encode_defunct(text=text), key).signature
    return "0x" + bytes(made).hex()


def wrapper(text_of: Any, key: str = KEY, **members: Any) -> dict[str, Any]:
    """A body whose signature is over ``text_of`` of it."""
    body = {
        "wallet_address": ADDRESS,
        "session_nonce": session(),
        "request_id": "inv-01",
        **members,
    }
    return {**body, "signature": sign(text_of(personal.read({**body, "signature": ""})), key)}


def strong(**members: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"audience": AUDIENCE, "ceiling": "$0.05", "expires_at": NOW + 60}
    given |= members
    payload = sha256(jcs(PARAMETERS)).hexdigest()
    return wrapper(lambda s: personal.strong_message(s, "POST", PATH, payload), **given)


def refusal(body: dict[str, Any], call: Call = INVOKE, now_s: int = NOW) -> AuthError:
    with pytest.raises(AuthError) as caught:
        check(body, call, now_s)
    return caught.value


def check(body: dict[str, Any], call: Call = INVOKE, now_s: int = NOW) -> Any:
    """As an endpoint does: the strong shape if its members are there, else a published one."""
    signed = personal.read(body)
    if signed.strong:
        text = jcs(PARAMETERS)
        payload = Form("jcs", text, sha256(text).hexdigest())
        return personal.check_strong(MAC_KEYS, signed, AUDIENCE, "POST", PATH, payload, now_s)
    payloads = forms_of(PARAMETERS) if call.paths else [personal.EMPTY]
    return personal.check_published(MAC_KEYS, signed, call, payloads, now_s)


# -- the published shapes ------------------------------------------------------------------------


def test_the_scoped_shape_is_these_bytes() -> None:
    signed = Signed("0x" + "aa" * 20, "1f0c", "bal-01", "")
    assert personal.scoped_message(signed, BALANCE, "") == (
        "agentpmt-external\nwallet:0xaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\nsession:1f0c\n"
        "request:bal-01\naction:balance\nproduct:-\npayload:"
    )


def test_the_path_bound_shape_is_these_bytes() -> None:
    signed = Signed("0x" + "aa" * 20, "1f0c", "inv-01", "")
    assert personal.path_message(signed, INVOKE.paths[0], "ab" * 32) == (
        "agentpmt-external\nwallet:0xaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\nsession:1f0c\n"
        "request:inv-01\nmethod:POST\npath:/external/tools/weather/actions/forecast/invoke\n"
        "payload:" + "ab" * 32
    )


@pytest.mark.parametrize("path", INVOKE.paths)
@pytest.mark.parametrize("which", [0, 1])
def test_both_paths_and_both_json_forms_are_accepted(path: str, which: int) -> None:
    form = list(forms_of(PARAMETERS))[which]
    body = wrapper(lambda s: personal.path_message(s, path, form.digest))
    signer, hashed = check(body)
    assert (signer.address, signer.kind, signer.ceiling) == (ADDRESS, "key", None)
    assert signer.request_id == f"{body['session_nonce']}:inv-01"
    assert hashed == form


def test_the_bytes_that_were_sent_are_one_more_form() -> None:
    sent = b'{ "q": "caf\\u00E9", "city": "Z\xc3\xbcrich" }'
    body = wrapper(lambda s: personal.path_message(s, INVOKE.paths[0], sha256(sent).hexdigest()))
    signed = personal.read(body)
    _, hashed = personal.check_published(MAC_KEYS, signed, INVOKE, forms_of(PARAMETERS, sent), NOW)
    assert hashed.text == sent
    refusal(body)  # nobody hashed them


def test_one_changed_byte_says_what_was_expected() -> None:
    body = wrapper(lambda s: personal.scoped_message(s, BALANCE, ""))
    check(body, BALANCE)
    error = refusal({**body, "request_id": "bal-02"}, BALANCE)
    assert error.code == "EXTERNAL_SIGNATURE_WALLET_MISMATCH"
    expected = error.params["expected_message"]
    assert "request:bal-02" in expected and error.params["expected_wallet"] == ADDRESS
    recovered = error.params["recovered_wallet_for_expected_message"]
    assert re.fullmatch("0x[0-9a-f]{40}", recovered) and recovered != ADDRESS
    check({**body, "request_id": "bal-02", "signature": sign(expected)}, BALANCE)


def test_every_byte_of_a_message_counts() -> None:
    body = wrapper(lambda s: personal.scoped_message(s, BALANCE, ""))
    text = personal.scoped_message(personal.read(body), BALANCE, "")
    for at in range(len(text)):
        changed = text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :]
        assert refusal({**body, "signature": sign(changed)}, BALANCE).code.endswith("MISMATCH")


def test_the_refusal_names_paths_and_hashes() -> None:
    body = wrapper(lambda s: personal.path_message(s, INVOKE.paths[0], "00" * 32))
    params = refusal(body).params
    assert params["accepted_path_candidates"] == list(INVOKE.paths)
    forms = {form.name: form.digest for form in forms_of(PARAMETERS)}
    assert params["accepted_payload_hash_forms"] == forms


@pytest.mark.parametrize(
    "signature",
    [None, "", 7, "0x", "0x" + "00" * 64, "0x" + "00" * 66, "00" * 65, "0x" + "00" * 65, "0xzz"],
)
def test_what_is_no_signature(signature: object) -> None:
    body = {**wrapper(lambda s: ""), "signature": signature}
    error = refusal(body, BALANCE)
    assert error.code == "EXTERNAL_SIGNATURE_MALFORMED"
    assert error.params["expected_message"].startswith("agentpmt-external\n")


def test_a_signature_has_one_spelling() -> None:
    """High s and other v recover to the same key: only one form is taken."""
    body = wrapper(lambda s: personal.scoped_message(s, BALANCE, ""))
    raw = bytes.fromhex(body["signature"][2:])
    high = (keys.CURVE_ORDER - int.from_bytes(raw[32:64])).to_bytes(32)
    twin = raw[:32] + high + bytes((raw[64] ^ 7,))
    low_v = raw[:64] + bytes((raw[64] - 27,))
    for other in (twin, low_v):
        refusal({**body, "signature": "0x" + other.hex()}, BALANCE)


# -- the strong shape ----------------------------------------------------------------------------


def test_the_strong_shape_is_these_bytes() -> None:
    signed = Signed("0x" + "aa" * 20, "1f0c", "inv-01", "", AUDIENCE, "$0.05", 1_790_000_000)
    assert personal.strong_message(signed, "POST", PATH, "ab" * 32) == (
        "farebox-external-1\naudience:https://api.example\n"
        "wallet:0xaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\nsession:1f0c\nrequest:inv-01\n"
        f"method:POST\npath:{PATH}\nceiling:$0.05\nexpires:1790000000\npayload:" + "ab" * 32
    )


def test_the_strong_shape_is_bound_to_all_it_says() -> None:
    signer = check(strong())
    assert (signer.address, signer.ceiling, signer.expires_s) == (ADDRESS, "$0.05", NOW + 60)
    assert check(strong(ceiling="-")).ceiling is None
    body = strong()
    for changed in ({"ceiling": "$0.06"}, {"ceiling": "-"}, {"expires_at": NOW + 61}):
        assert refusal({**body, **changed}).code == "EXTERNAL_SIGNATURE_WALLET_MISMATCH"
    assert refusal(strong(audience="https://evil.example")).code == "signature_authority_mismatch"
    assert refusal(strong(), now_s=NOW + 60).code == "signature_expired"
    check(strong(), now_s=NOW + 59)


@pytest.mark.parametrize(
    "members",
    [
        {"expires_at": None},
        {"expires_at": True},
        {"expires_at": "1900000060"},
        {"expires_at": 0},
        {"expires_at": 2**40},
        {"expires_at": 1.5},
        {"ceiling": 5},
        {"ceiling": "0.05"},
        {"ceiling": "$00.05"},
        {"ceiling": "$0.05\nexpires:1"},
        {"ceiling": "$0.0000001"},
        {"audience": None},
    ],
)
def test_terms_in_odd_forms(members: dict[str, Any]) -> None:
    body = {**strong(), **members}
    assert refusal(body).code == "invalid_request"


def test_any_of_its_members_makes_a_body_strong() -> None:
    """What claims the strong shape and fails is not looked at as a published one."""
    body = wrapper(
        lambda s: personal.path_message(s, PATH, next(iter(forms_of(PARAMETERS))).digest)
    )
    check(body)
    for name, value in (("audience", AUDIENCE), ("ceiling", "-"), ("expires_at", NOW + 60)):
        assert refusal({**body, name: value}).code == "invalid_request"
    terms = {"audience": AUDIENCE, "expires_at": NOW + 60}
    assert refusal({**body, **terms}).code == "EXTERNAL_SIGNATURE_WALLET_MISMATCH"


# -- sessions ------------------------------------------------------------------------------------


def test_a_session_is_a_uuid_of_its_wallet_for_a_quarter_of_an_hour() -> None:
    nonce, expiry_s = personal.session_nonce(MAC_KEYS, ADDRESS, NOW)
    assert expiry_s == NOW + 900
    parsed = uuid.UUID(nonce)
    assert (parsed.version, parsed.variant) == (4, uuid.RFC_4122)
    assert len({session() for _ in range(20)}) == 20  # in one and the same second
    signed = Signed(ADDRESS, nonce, "a", "")
    assert personal.check_session(MAC_KEYS, signed, NOW + 899) == expiry_s
    with pytest.raises(AuthError) as late:
        personal.check_session(MAC_KEYS, signed, NOW + 900)
    assert late.value.code == "EXTERNAL_SIGNATURE_SESSION_NONCE_EXPIRED"


def test_a_session_of_another_wallet_deployment_or_key_is_none() -> None:
    nonce = session()
    rotated = Keys(secrets={b"0001": b"a" * 32, b"0002": b"b" * 32}, current=b"0002")
    personal.check_session(rotated, Signed(ADDRESS, nonce, "a", ""), NOW)
    newer = personal.session_nonce(rotated, ADDRESS, NOW)[0]
    others = [
        (MAC_KEYS, "0x" + "ab" * 20, nonce),
        (Keys(deployment="d2"), ADDRESS, nonce),
        (Keys(secrets={b"0001": b"c" * 32}), ADDRESS, nonce),
        (MAC_KEYS, ADDRESS, newer),
        (MAC_KEYS, ADDRESS, str(uuid.uuid4())),
    ]
    for mac_keys, wallet, text in others:
        with pytest.raises(AuthError) as wrong:
            personal.check_session(mac_keys, Signed(wallet, text, "a", ""), NOW)
        assert wrong.value.code == "EXTERNAL_SIGNATURE_SESSION_NONCE_INVALID"


def test_every_bit_of_a_session_counts() -> None:
    number = uuid.UUID(session()).int
    for bit in range(128):
        changed = str(uuid.UUID(int=number ^ 1 << bit))
        body = {"wallet_address": ADDRESS, "session_nonce": changed, "request_id": "a"}
        error = refusal({**body, "signature": "0x" + "11" * 65}, BALANCE)
        assert error.code == "EXTERNAL_SIGNATURE_SESSION_NONCE_INVALID"


@pytest.mark.parametrize("form", ["", "x", "upper", "{%s}", "%s ", "shorter"])
def test_a_session_has_one_spelling(form: str) -> None:
    text = {"upper": session().upper(), "shorter": session()[:-1]}.get(form, form)
    text = text.replace("%s", session())
    body = {"wallet_address": ADDRESS, "session_nonce": text, "request_id": "a", "signature": ""}
    assert refusal(body).code == "EXTERNAL_SIGNATURE_SESSION_NONCE_INVALID"


# -- one reading for every text ------------------------------------------------------------------

WALLETS = st.integers(0, 2**160 - 1).map(lambda n: f"0x{n:040x}")
SESSIONS = st.integers(0, 2**122 - 1).map(
    lambda n: str(
        uuid.UUID(
            int=(n >> 74 << 80) | 4 << 76 | (n >> 62 & 0xFFF) << 64 | 2 << 62 | (n & (1 << 62) - 1)
        )
    )
)
IDS = st.from_regex(personal.REQUEST_ID, fullmatch=True)
SLUGS = st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}", fullmatch=True)
DIGESTS = st.just("") | st.integers(0, 2**256 - 1).map(lambda n: f"{n:064x}")
PATHS = st.builds("/external/tools/{}/actions/{}/invoke".format, SLUGS, SLUGS)


@st.composite
def requests(draw: st.DrawFn) -> tuple[tuple[Any, ...], str]:
    """A request of any shape, as all that makes it and as the text that is signed."""
    signed = Signed(draw(WALLETS), draw(SESSIONS), draw(IDS), "")
    shape, payload = draw(st.sampled_from(["scoped", "path", "strong"])), draw(DIGESTS)
    if shape == "scoped":
        call = Call(draw(SLUGS), draw(SLUGS | st.just("-")))
        return (shape, signed, call, payload), personal.scoped_message(signed, call, payload)
    path = draw(PATHS)
    if shape == "path":
        return (shape, signed, path, payload), personal.path_message(signed, path, payload)
    signed = signed._replace(
        audience=draw(st.sampled_from([AUDIENCE, "http://x:1"])),
        ceiling=draw(st.sampled_from(["-", "$0.05", "$1"])),
        expires_s=draw(st.integers(1, 2**40 - 1)),
    )
    method = draw(st.sampled_from(["GET", "POST"]))
    text = personal.strong_message(signed, method, path, payload)
    return (shape, signed, method, path, payload), text


def parsed(text: str) -> list[tuple[str, ...]]:
    """Every reading of a text, by the shapes as they are published and documented."""
    lines = {
        "scoped": ("wallet", "session", "request", "action", "product", "payload"),
        "path": ("wallet", "session", "request", "method", "path", "payload"),
        "strong": (
            *("audience", "wallet", "session", "request", "method", "path", "ceiling"),
            *("expires", "payload"),
        ),
    }
    first = {"scoped": "agentpmt-external", "path": "agentpmt-external"}
    found = []
    for shape, names in lines.items():
        begin = re.escape(first.get(shape, "farebox-external-1"))
        pattern = begin + "".join(rf"\n{name}:([^\n]*)" for name in names)
        match = re.fullmatch(pattern, text)
        if match is not None:
            found.append((shape, *match.groups()))
    return found


@given(requests(), requests())
def test_no_two_requests_share_their_bytes(
    one: tuple[tuple[Any, ...], str], other: tuple[tuple[Any, ...], str]
) -> None:
    assert (one[1] == other[1]) == (one[0] == other[0])


@given(requests())
def test_a_text_has_one_reading(request: tuple[tuple[Any, ...], str]) -> None:
    shape, text = request[0][0], request[1]
    readings = parsed(text)
    assert [reading[0] for reading in readings] == [shape]
    signed = request[0][1]
    assert {signed.wallet, signed.session, signed.request_id} <= set(readings[0])


@given(st.text(max_size=12) | st.from_regex(r"[a-z]{0,3}[\n\r:]?[a-z]{0,3}", fullmatch=True))
def test_an_id_that_could_hold_a_line_is_none(request_id: str) -> None:
    body = {"wallet_address": ADDRESS, "session_nonce": session(), "request_id": request_id}
    if personal.REQUEST_ID.fullmatch(request_id):
        assert personal.read(body).request_id == request_id
        assert "\n" not in request_id and ":" not in request_id
    else:
        assert refusal({**body, "signature": ""}).code == "invalid_request"


def test_no_other_text_that_wallets_sign_here_is_one_of_these() -> None:
    """The lines of a gift begin alike; read as one of these they are none."""
    payer, other = "0x" + "ab" * 20, "0x" + "cd" * 20
    texts = [
        sponsor_lines(payer, other, 500, "nonce", "0x" + "11" * 32),
        message("ab" * 16, "eip155:84532", "0x" + "22" * 32, 0, other),
        payment_message("ab" * 16, "eip155:84532", "0x" + "33" * 20, "0x" + "11" * 32, other),
    ]
    assert all(parsed(text) == [] for text in texts)


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("wallet_address", None),
        ("wallet_address", 5),
        ("wallet_address", ADDRESS[2:]),
        ("wallet_address", ADDRESS + "\n"),
        ("wallet_address", "0x" + "\u0661" * 40),
        ("session_nonce", None),
        ("request_id", None),
        ("request_id", ""),
        ("request_id", "a b"),
        ("request_id", "a\nb"),
        ("request_id", "a:b"),
        ("request_id", "x" * 129),
        ("request_id", "\u00e9"),
    ],
)
def test_a_wrapper_in_odd_forms(member: str, value: object) -> None:
    body = {"wallet_address": ADDRESS, "session_nonce": session(), "request_id": "a"}
    assert refusal({**body, "signature": "", member: value}).code == "invalid_request"


def test_an_address_may_be_written_with_capitals() -> None:
    body = wrapper(
        lambda s: personal.scoped_message(s, BALANCE, ""), wallet_address=keys.checksum(ADDRESS)
    )
    assert check(body, BALANCE)[0].address == ADDRESS


def test_our_own_hand_signs_as_wallets_do() -> None:
    assert personal.sign(keys.private_key(OTHER_KEY), "a\nb") == sign("a\nb", OTHER_KEY)
