"""The profile of ERC-8128: what is accepted, and every refusal with its code."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from typing import Any

import pytest

from gateway.errors import CODES as GATEWAY_CODES
from tests.wallet_auth.support import (
    ADDRESS,
    KEY,
    NONCE,
    NOW,
    by_hand,
    changed,
    header,
    replaced,
    request_of,
    signed,
    with_headers,
)
from wallet_auth import CODES, SCHEMES, AuthError, SignedRequest, Signer, check_body, verify
from wallet_auth.erc8128 import Policy, accept_signature
from wallet_auth.erc8128 import verify as verify_erc8128
from wallet_auth.signing import sign_request

URL = "https://api.example/v1/forecast/oslo"
BASIC = ("@authority", "@method", "@path")
BODY = b'{"city":"oslo"}'
DIGEST = "sha-256=:" + base64.b64encode(hashlib.sha256(BODY).digest()).decode() + ":"


def plain(*headers: tuple[str, str], url: str = URL, method: str = "GET") -> SignedRequest:
    """A request that is not signed yet."""
    return request_of(method, url, headers, None)


def posted(*headers: tuple[str, str], body: bytes = BODY) -> SignedRequest:
    length = ("content-length", str(len(body)))
    return request_of("POST", URL, [length, *headers], body)


def params(**given: str | int | None) -> str:
    """Signature parameters as they are sent; ``None`` leaves one out, strings come raw."""
    known: dict[str, str | int | None] = {
        "created": NOW,
        "expires": NOW + 60,
        "nonce": f'"{NONCE}"',
        "keyid": f'"erc8128:1:{ADDRESS}"',
    }
    merged = known | given
    return "".join(f";{name}={value}" for name, value in merged.items() if value is not None)


async def accepted(request: SignedRequest, now_s: int = NOW) -> Signer:
    signer = await verify(request, now_s, None)
    assert signer is not None
    return signer


async def refused(request: SignedRequest, code: str, now_s: int = NOW, **options: Any) -> AuthError:
    with pytest.raises(AuthError) as caught:
        await verify(request, now_s, options.get("call"))
    assert caught.value.code == code, caught.value
    assert caught.value.detail
    return caught.value


# -- what is accepted -----------------------------------------------------------------------------


async def test_a_signed_request_names_its_signer() -> None:
    signer = await accepted(signed())
    assert signer == Signer(
        scheme="erc8128",
        address=ADDRESS,
        chain_id=1,
        kind="key",
        request_id=NONCE,
        created_s=NOW,
        expires_s=NOW + 120,
        digests=(),
        ceiling=None,
        covered=frozenset(BASIC),
    )


async def test_what_is_covered_is_told() -> None:
    request = signed(
        "POST",
        URL + "?days=3",
        [("Farebox-Max", " $0.01 "), ("Farebox-Run", "r1"), ("Idempotency-Key", "k"), ("x-a", "b")],
        BODY,
        components=["x-a", "@scheme"],
        chain_id=8453,
    )
    signer = await accepted(request)
    assert signer.covered == frozenset(
        {*BASIC, "@query", "content-digest", "farebox-max", "farebox-run", "idempotency-key"}
        | {"x-a", "@scheme"}
    )
    assert (signer.ceiling, signer.chain_id) == ("$0.01", 8453)
    assert signer.digests == (("sha-256", hashlib.sha256(BODY).digest()),)


async def test_a_request_without_a_wallet_is_nobody() -> None:
    assert await verify(plain(), NOW, None) is None
    foreign = 'sig1=("@authority" "@path";req);created=1;keyid="some-key";alg="ed25519"'
    theirs = [("signature-input", foreign), ("signature", "sig1=:AAAA:")]
    assert await verify(plain(*theirs), NOW, None) is None
    assert await verify(plain(("signature", "eth=:AAAA:")), NOW, None) is None
    assert await verify(plain(("signature-input", "not a dictionary (")), NOW, None) is None
    # The word alone is no key id.
    aside = 'sig1=("@path");nonce="erc8128:1";keyid="some-key", other="erc8128:1"'
    assert await verify(plain(("signature-input", aside)), NOW, None) is None


async def test_a_foreign_signature_may_stand_beside() -> None:
    foreign = [
        ("Signature-Input", 'cdn=("@authority";req "x-y" 1);created=1;tag="a,b";keyid="k"'),
        ("Signature", "cdn=:AAAA:;x"),
    ]
    request = signed(headers=foreign)
    assert header(request, "signature-input").startswith("cdn=")
    assert (await accepted(request)).address == ADDRESS


@pytest.mark.parametrize("label", ["eth", "sig1", "a", "x-y.z_1*"])
async def test_any_label(label: str) -> None:
    assert (await accepted(signed(label=label))).address == ADDRESS


@pytest.mark.parametrize(
    "keyid",
    [
        f"erc8128:1:0x{ADDRESS[2:].upper()}",
        f"erc8128:8453:{ADDRESS}",
        f"erc8128:{10**18}:{ADDRESS}",
    ],
)
async def test_key_ids_ignore_the_case_of_hex(keyid: str) -> None:
    signer = await accepted(by_hand(plain(), BASIC, params(keyid=f'"{keyid}"')))
    assert signer.address == ADDRESS
    assert signer.chain_id == int(keyid.split(":")[1])


async def test_parameters_come_in_any_order_and_spacing() -> None:
    mixed = f';tag="t";keyid="erc8128:1:{ADDRESS}";nonce="n";expires={NOW + 9};created={NOW}'
    assert (await accepted(by_hand(plain(), BASIC, mixed))).request_id == "n"
    # RFC 9421 signs the canonical form, whatever the spacing on the wire.
    request = by_hand(plain(), BASIC)
    sent = header(request, "signature-input")
    loose = sent.replace("=(", "=( ").replace('" "', '"   "').replace(";", ";  ")
    loose = loose.replace(f"created={NOW}", f"created=000{NOW}")
    assert (await accepted(replaced(request, "signature-input", f" {loose} "))).address == ADDRESS


@pytest.mark.parametrize("name", ["@request-target", "@target-uri", "@scheme"])
async def test_other_derived_components(name: str) -> None:
    values = {
        "@request-target": "/v1/forecast/oslo?a=1",
        "@target-uri": URL + "?a=1",
        "@scheme": "https",
    }
    request = by_hand(plain(url=URL + "?a=1"), (*BASIC, "@query", name), values=values)
    assert name in (await accepted(request)).covered


async def test_field_lines_are_joined_and_trimmed() -> None:
    request = plain(("x-a", "  one "), ("x-b", ""), ("x-a", "two  words\t"))
    request = by_hand(request, (*BASIC, "x-a", "x-b"), values={"x-a": "one, two  words"})
    assert (await accepted(request)).covered >= {"x-a", "x-b"}


@pytest.mark.parametrize(
    ("now_s", "code"),
    [
        (NOW - 31, "signature_not_yet_valid"),
        (NOW - 30, None),
        (NOW + 60, None),
        (NOW + 90, None),
        (NOW + 91, "signature_expired"),
    ],
)
async def test_times_and_the_skew(now_s: int, code: str | None) -> None:
    request = by_hand(plain(), BASIC)
    if code is None:
        assert (await accepted(request, now_s)).expires_s == NOW + 60
    else:
        caught = await refused(request, code, now_s)
        assert caught.params == {"created": NOW, "expires": NOW + 60, "now": now_s}


async def test_the_window_is_a_policy() -> None:
    longest = by_hand(plain(), BASIC, params(expires=NOW + 300))
    assert (await accepted(longest)).expires_s == NOW + 300
    longer = by_hand(plain(), BASIC, params(expires=NOW + 301))
    await refused(longer, "signature_window_too_long")
    assert await verify_erc8128(longer, NOW, None, policy=Policy(window_s=301)) is not None


async def test_a_body_not_read_is_left_to_the_caller() -> None:
    signer = await accepted(signed("POST", body=BODY, read=False))
    check_body(signer, BODY)
    with pytest.raises(AuthError, match="signature_digest_mismatch"):
        check_body(signer, BODY + b" ")


async def test_two_digests_and_one_unknown() -> None:
    both = f"{DIGEST}, sha-512=:{base64.b64encode(hashlib.sha512(BODY).digest()).decode()}:"
    request = posted(("content-digest", both), ("content-digest", "md5=:AAAA:"))
    request = by_hand(
        request, (*BASIC, "content-digest"), values={"content-digest": both + ", md5=:AAAA:"}
    )
    assert [name for name, _ in (await accepted(request)).digests] == ["sha-256", "sha-512"]


@pytest.mark.parametrize("value", ["md5=:AAAA:", "sha-256=:AAAA:", "sha-256", ""])
@pytest.mark.parametrize("body", [None, b""])
async def test_a_digest_that_says_nothing_is_refused_at_once(
    value: str, body: bytes | None
) -> None:
    request = by_hand(plain(("content-digest", value)), (*BASIC, "content-digest"))
    await refused(changed(request, body=body), "signature_digest_mismatch")


async def test_a_digest_of_no_body_may_be_covered() -> None:
    empty = "sha-256=:" + base64.b64encode(hashlib.sha256(b"").digest()).decode() + ":"
    request = by_hand(plain(("content-digest", empty)), (*BASIC, "content-digest"))
    assert len((await accepted(request)).digests) == 1
    await refused(changed(request, body=b"x"), "signature_digest_mismatch")


async def test_the_answer_to_the_unsigned_says_what_to_cover() -> None:
    request = request_of("POST", URL + "?", [("content-length", "3")], None, read=False)
    assert accept_signature(request) == (
        'eth=("@authority" "@method" "@path" "@query" "content-digest");created;expires;nonce;keyid'
    )
    assert accept_signature(plain()).startswith('eth=("@authority" "@method" "@path");')


# -- every refusal --------------------------------------------------------------------------------

Case = Callable[[], SignedRequest]
OTHER_KEY = "0x" + "11" * 32
SIXTY_FIVE = b"\x01" * 64 + b"\x1b"


def _input(change: Callable[[str], str]) -> Case:
    """A good request whose Signature-Input is changed after signing."""

    def case() -> SignedRequest:
        request = by_hand(plain(), BASIC)
        return replaced(request, "signature-input", change(header(request, "signature-input")))

    return case


def _signature(value: str | bytes | None) -> Case:
    return lambda: replaced(by_hand(plain(), BASIC), "signature", value)


REFUSALS: list[tuple[str, str, Case]] = [
    # signature_missing_component
    *(
        ("signature_missing_component", f"without {gone}", case)
        for gone, case in {
            "@authority": lambda: by_hand(plain(), BASIC[1:]),
            "@method": lambda: by_hand(plain(), ("@authority", "@path")),
            "@path": lambda: by_hand(plain(), BASIC[:2]),
            "anything": lambda: by_hand(plain(), ()),
            "@query": lambda: by_hand(plain(url=URL + "?a=1"), BASIC),
            "@query when empty": lambda: by_hand(plain(url=URL + "?"), BASIC),
            "@path but its target": lambda: by_hand(
                plain(), (*BASIC[:2], "@request-target"), values={"@request-target": "/v1"}
            ),
            "content-digest": lambda: by_hand(posted(), BASIC),
            "content-digest of an unread body": lambda: changed(
                by_hand(posted(), BASIC), body=None
            ),
            "content-digest that is sent": lambda: by_hand(
                posted(("content-digest", DIGEST)), BASIC
            ),
            "content-digest of chunks": lambda: by_hand(
                plain(("transfer-encoding", "chunked")), BASIC
            ),
            "content-digest of bytes without framing": lambda: changed(
                by_hand(plain(), BASIC), body=b"x"
            ),
        }.items()
    ),
    # what decides about money and repeats
    ("ceiling_not_covered", "sent", lambda: by_hand(plain(("farebox-max", "$1")), BASIC)),
    (
        "ceiling_not_covered",
        "added later",
        lambda: with_headers(by_hand(plain(), BASIC), ("farebox-max", "$1")),
    ),
    (
        "idempotency_key_not_covered",
        "sent",
        lambda: by_hand(plain(("idempotency-key", "k")), BASIC),
    ),
    # times
    ("signature_expired", "old", lambda: by_hand(plain(), BASIC, params(created=5, expires=9))),
    (
        "signature_not_yet_valid",
        "early",
        lambda: by_hand(plain(), BASIC, params(created=NOW + 31, expires=NOW + 40)),
    ),
    (
        "signature_window_too_long",
        "301 s",
        lambda: by_hand(plain(), BASIC, params(expires=NOW + 301)),
    ),
    (
        "signature_window_too_long",
        "from the beginning of time",
        lambda: by_hand(plain(), BASIC, params(created=0)),
    ),
    # nonce
    *(
        (
            "signature_nonce_missing",
            f"nonce {nonce!r}"[:40],
            lambda nonce=nonce: by_hand(plain(), BASIC, params(nonce=nonce)),
        )
        for nonce in (None, '""', "12", "tok", '"a b"', '"a/b"', '"a\\"b"', '"a,b"', ":AAAA:")
    ),
    (
        "signature_nonce_missing",
        "129 characters",
        lambda: by_hand(plain(), BASIC, params(nonce=f'"{"n" * 129}"')),
    ),
    # body
    (
        "signature_digest_mismatch",
        "other body",
        lambda: changed(signed("POST", body=BODY), body=BODY.replace(b"oslo", b"rome")),
    ),
    *(
        (
            "signature_digest_mismatch",
            name,
            lambda value=value: by_hand(
                posted(("content-digest", value)), (*BASIC, "content-digest")
            ),
        )
        for name, value in {
            "of another body": "sha-256=:" + "A" * 43 + "=:",
            "one of two": DIGEST + ", sha-512=:" + "A" * 86 + "==:",
            "unknown algorithm": "md5=:AAAA:",
            "other case": DIGEST.replace("sha", "SHA"),
            "short": "sha-256=:AAAA:",
            "no bytes": 'sha-256="abc"',
            "twice": f"{DIGEST}, {DIGEST}",
            "no dictionary": "sha-256",
            "empty": "",
            "base64url": DIGEST[:-2] + "_:",
        }.items()
    ),
    # authority
    (
        "signature_authority_mismatch",
        "signed for Host",
        lambda: by_hand(
            plain(("host", "Inner.example:443")), BASIC, values={"@authority": "inner.example"}
        ),
    ),
    # who
    (
        "identity_conflict",
        "two wallets",
        lambda: replaced(
            replaced(
                by_hand(plain(), BASIC),
                "signature-input",
                f"eth=(){params()}, b=(){params()}",
            ),
            "signature",
            "eth=:AAAA:, b=:AAAA:",
        ),
    ),
    (
        "identity_conflict",
        "Signature-Input twice",
        lambda: with_headers(by_hand(plain(), BASIC), ("signature-input", "a=()")),
    ),
    (
        "identity_conflict",
        "Signature twice",
        lambda: with_headers(by_hand(plain(), BASIC), ("signature", "a=:AAAA:")),
    ),
    (
        "identity_unsupported",
        "contract wallet",
        lambda: by_hand(plain(), BASIC, signature=b"\x01" * 130),
    ),
    (
        "identity_unsupported",
        "ERC-6492",
        lambda: by_hand(plain(), BASIC, signature=b"\x01" * 64 + bytes.fromhex("6492" * 16)),
    ),
    # the request itself
    ("invalid_request", "lower-case method", lambda: by_hand(plain(method="get"), BASIC)),
    ("invalid_request", "no method", lambda: by_hand(plain(method=""), BASIC)),
    (
        "invalid_request",
        "two lengths",
        lambda: by_hand(plain(("content-length", "0"), ("content-length", "0")), BASIC),
    ),
    *(
        (
            "invalid_request",
            f"{name} twice",
            lambda name=name: by_hand(
                plain((name, "1"), (name, "2")), (*BASIC, name), values={name: "1, 2"}
            ),
        )
        for name in (
            "farebox-max",
            "idempotency-key",
            "farebox-run",
            "farebox-quote",
            "farebox-mandate",
        )
    ),
    *(
        (
            "invalid_target",
            repr(target),
            lambda target=target: changed(by_hand(plain(), BASIC), target=target),
        )
        for target in (b"*", b"", b"https://x/", b"/a b", b"/\xc3\xa9", b"/a#b", b"/a\x00", b"a")
    ),
    # signature_invalid: form
    *(
        ("signature_invalid", name, _input(change))
        for name, change in {
            "no dictionary": lambda sent: sent + ",",
            "tab": lambda sent: sent.replace(" ", "\t", 1),
            "control character": lambda sent: sent + "\x01",
            "folded line": lambda sent: sent.replace(" ", "\r\n ", 1),
            "not ASCII": lambda sent: sent.replace(NONCE, "é"),
            "too long": lambda sent: sent + ", b=" + "1" * 9000,
            "label twice": lambda sent: f"{sent}, {sent}",
            "other label": lambda sent: sent.replace("eth=", "other="),
            "no list": lambda sent: sent.replace("eth=(", "eth=((", 1),
            "component twice": lambda sent: sent.replace('"@path"', '"@path" "@path"'),
            "flag req": lambda sent: sent.replace('"@path"', '"@path";req'),
            "flag bs": lambda sent: sent.replace('"@path"', '"@path" "x";bs'),
            "flag sf": lambda sent: sent.replace('"@path"', '"@path" "x";sf'),
            "flag tr": lambda sent: sent.replace('"@path"', '"@path" "x";tr'),
            "flag key": lambda sent: sent.replace('"@path"', '"@path" "x";key="a"'),
            "upper case": lambda sent: sent.replace('"@path"', '"@path" "X-A"'),
            "token component": lambda sent: sent.replace('"@path"', '"@path" x'),
            "alg": lambda sent: sent + ';alg="ecdsa"',
            "unknown parameter": lambda sent: sent + ";v=1",
            "parameter twice": lambda sent: sent + f";created={NOW}",
            "key id twice": lambda sent: sent + ';keyid="other"',
            "tag of another type": lambda sent: sent + ";tag=1",
        }.items()
    ),
    *(
        ("signature_invalid", name, lambda given=given: by_hand(plain(), BASIC, params(**given)))
        for name, given in {
            "no created": {"created": None},
            "no expires": {"expires": None},
            "created is a string": {"created": f'"{NOW}"'},
            "created is a decimal": {"created": f"{NOW}.0"},
            "created is negative": {"created": "-5"},
            "expires at once": {"expires": NOW},
            "expires before": {"expires": NOW - 1},
            "key id is a token": {"keyid": f"erc8128:1:{ADDRESS}"},
            "key id in upper case": {"keyid": f'"ERC8128:1:{ADDRESS}"'},
            "key id without chain": {"keyid": f'"erc8128:{ADDRESS}"'},
            "key id of chain 0": {"keyid": f'"erc8128:0:{ADDRESS}"'},
            "key id of chain 01": {"keyid": f'"erc8128:01:{ADDRESS}"'},
            "key id of chain 0x1": {"keyid": f'"erc8128:0x1:{ADDRESS}"'},
            "key id without 0x": {"keyid": f'"erc8128:1:{ADDRESS[2:]}"'},
            "short key id": {"keyid": f'"erc8128:1:{ADDRESS[:-1]}"'},
            "long key id": {"keyid": f'"erc8128:1:{ADDRESS}0"'},
            "spaced key id": {"keyid": f'"erc8128:1:{ADDRESS} "'},
        }.items()
    ),
    # signature_invalid: form, and the signature itself is right
    ("signature_invalid", "component signed twice", lambda: by_hand(plain(), (*BASIC, "@path"))),
    *(
        (
            "signature_invalid",
            f"signed with {more}",
            lambda more=more: by_hand(plain(), BASIC, params() + more),
        )
        for more in (
            f";created={NOW}",
            ';alg="eip191"',
            ";v=1",
            ";flag",
            ";tag=1",
            f';keyid="erc8128:2:{ADDRESS}"',
        )
    ),
    *(
        (
            "signature_invalid",
            f"signed with the flag {flag}",
            lambda flag=flag: by_hand(
                plain(), BASIC, inner=f'("@authority" "@method" "@path";{flag})'
            ),
        )
        for flag in ("req", "bs", "sf", "tr", 'key="a"')
    ),
    *(
        ("signature_invalid", f"Signature {name}", _signature(value))
        for name, value in {
            "absent": None,
            "empty": "",
            "of another label": "sig=:AAAA:",
            "no bytes": 'eth="abc"',
            "a list": "eth=(:AAAA:)",
            "without bytes": "eth=::",
            "with a parameter": "eth=:AAAA:;a=1",
            "odd base64": "eth=:A:",
            "base64url": "eth=:AA-_:",
            "folded": "eth=:AAAA\r\n AAAA:",
            "twice": "eth=:AAAA:, eth=:AAAA:",
        }.items()
    ),
    # signature_invalid: components
    *(
        (
            "signature_invalid",
            f"covers {name}",
            lambda name=name: by_hand(plain(), (*BASIC, name)),
        )
        for name in (
            "@query",
            "@status",
            "@query-param",
            "@signature-params",
            "@unknown",
            "x-not-there",
            "content-digest",
        )
    ),
    *(
        (
            "signature_invalid",
            f"covered field with {name}",
            lambda value=value: by_hand(plain(("x-a", value)), (*BASIC, "x-a")),
        )
        for name, value in {
            "a tab": "a\tb",
            "a line": "a\nb",
            "a fold": "a\r\n b",
            "NUL": "a\0b",
            "DEL": "a\x7f",
            "Latin": "é",
        }.items()
    ),
    # signature_invalid: the curve
    ("signature_invalid", "another key", lambda: by_hand(plain(), BASIC, key=OTHER_KEY)),
    ("signature_invalid", "noise", lambda: by_hand(plain(), BASIC, signature=SIXTY_FIVE)),
    (
        "signature_invalid",
        "wrong for Host as well",
        lambda: by_hand(plain(("host", "inner.example")), BASIC, key=OTHER_KEY),
    ),
    (
        "signature_invalid",
        "Host that is no host",
        lambda: by_hand(plain(("host", "a\x00b")), BASIC, values={"@authority": "a\x00b"}),
    ),
    *(
        (
            "signature_invalid",
            f"signed over another {name}",
            lambda name=name, value=value: by_hand(plain(), BASIC, values={name.strip(): value}),
        )
        for name, value in {
            "@method": "POST",
            "@method ": "get",
            "@path": "/v1/forecast/rome",
            "@path ": "/v1/forecast/osl%6f",
            "@authority": "api.example:443",
            "@authority ": "API.example",
        }.items()
    ),
]


@pytest.mark.parametrize(
    ("code", "case"),
    [pytest.param(code, case, id=f"{code}: {name}") for code, name, case in REFUSALS],
)
async def test_a_refusal_says_why(code: str, case: Case) -> None:
    await refused(case(), code)


def test_every_code_has_a_refusal_and_a_status() -> None:
    assert {code for code, _, _ in REFUSALS} == CODES
    assert GATEWAY_CODES.keys() >= CODES


def test_only_known_codes_can_be_raised() -> None:
    with pytest.raises(ValueError, match="not a code"):
        AuthError("signature_odd", "…")


async def test_missing_components_are_named() -> None:
    request = by_hand(
        request_of("POST", URL + "?a", [("content-length", "1")], b"x"), ("@method", "@path")
    )
    caught = await refused(request, "signature_missing_component")
    assert caught.params == {
        "required": ["@authority", "@method", "@path", "@query", "content-digest"],
        "missing": ["@authority", "@query", "content-digest"],
    }


async def test_the_authority_never_comes_from_host() -> None:
    """A good signature stays good under any Host; Host only words a refusal."""
    assert (await accepted(signed(headers=[("host", "evil.example")]))).address == ADDRESS
    request = by_hand(plain(("host", "evil.example")), BASIC, values={"@authority": "evil.example"})
    caught = await refused(request, "signature_authority_mismatch")
    assert caught.params == {"expected": "api.example", "signed": "evil.example"}


async def test_a_signature_for_an_empty_query_is_not_one_for_none() -> None:
    with_mark = by_hand(plain(url=URL + "?"), (*BASIC, "@query"))
    assert (await accepted(with_mark)).address == ADDRESS
    await refused(changed(with_mark, target=with_mark.target[:-1]), "signature_invalid")


async def test_two_schemes_at_once_are_a_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEMES, "twin", verify_erc8128)
    await refused(signed(), "identity_conflict")
    assert await verify(plain(), NOW, None) is None


# -- contract wallets -----------------------------------------------------------------------------

WALLET = "0x" + "c0" * 20


def _contract(signature: bytes, chain_id: int = 8453) -> SignedRequest:
    keyid = f'"erc8128:{chain_id}:{WALLET}"'
    return by_hand(plain(), BASIC, params(keyid=keyid), signature=signature)


class Chain:
    """Answers calls like an RPC would and remembers them."""

    def __init__(self, answer: bytes | Exception) -> None:
        self.answer = answer
        self.calls: list[tuple[str, str, bytes]] = []

    async def __call__(self, caip2: str, to: str, data: bytes) -> bytes:
        self.calls.append((caip2, to, data))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


YES = bytes.fromhex("1626ba7e") + bytes(28)


@pytest.mark.parametrize("size", [1, 65, 130, 4096])
async def test_a_contract_wallet_is_asked_on_the_chain_of_its_key_id(size: int) -> None:
    chain = Chain(YES)
    signer = await verify(_contract(b"\x02" * size), NOW, chain)
    assert signer is not None
    assert (signer.kind, signer.address, signer.chain_id) == ("contract", WALLET, 8453)
    ((caip2, to, data),) = chain.calls
    assert (caip2, to) == ("eip155:8453", WALLET)
    assert data.startswith(bytes.fromhex("1626ba7e"))
    assert b"\x02" * size in data


async def test_a_contract_wallet_can_say_no() -> None:
    for answer in (b"", b"\xff" * 32, YES + bytes(32)):
        chain = Chain(answer)
        await refused(_contract(b"\x02" * 70), "signature_invalid", call=chain)
        assert len(chain.calls) == 1


async def test_a_key_is_never_looked_up_on_chain() -> None:
    chain = Chain(RuntimeError("asked"))
    signer = await verify(signed(), NOW, chain)
    assert signer is not None
    assert signer.kind == "key"
    assert chain.calls == []


async def test_cheap_refusals_come_before_the_chain() -> None:
    chain = Chain(YES)
    late = changed(_contract(b"\x02" * 70), headers=_contract(b"\x02" * 70).headers)
    await refused(late, "signature_expired", NOW + 1000, call=chain)
    await refused(with_headers(late, ("farebox-max", "$1")), "ceiling_not_covered", call=chain)
    wrapped = b"\x02" * 70 + bytes.fromhex("6492" * 16)
    await refused(_contract(wrapped), "identity_unsupported", call=chain)
    await refused(_contract(b"\x02" * 4097), "signature_invalid", call=chain)
    assert chain.calls == []


async def test_a_chain_that_is_not_served() -> None:
    await refused(
        _contract(b"\x02" * 70), "identity_unsupported", call=Chain(LookupError("no such chain"))
    )
    wrong_key = by_hand(plain(), BASIC, key=OTHER_KEY)
    await refused(wrong_key, "signature_invalid", call=Chain(LookupError("no such chain")))


async def test_a_chain_that_cannot_be_asked_is_not_a_refusal() -> None:
    class UnavailableError(Exception):
        pass

    with pytest.raises(UnavailableError):
        await verify(_contract(b"\x02" * 70), NOW, Chain(UnavailableError()))


# -- the signing half -----------------------------------------------------------------------------


def test_signing_is_deterministic_and_adds_only_what_is_needed() -> None:
    arguments: dict[str, Any] = {"now_s": NOW, "nonce": "n"}
    once = sign_request(KEY, "GET", URL, [], None, **arguments)
    assert once == sign_request(KEY, "GET", URL, [], None, **arguments)
    assert list(once) == ["Signature-Input", "Signature"]
    posted = sign_request(KEY, "POST", URL, [], BODY, **arguments)
    assert posted["Content-Digest"] == DIGEST
    given = sign_request(KEY, "POST", URL, [("Content-Digest", DIGEST)], BODY, **arguments)
    assert "Content-Digest" not in given
    assert given["Signature"] == posted["Signature"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"nonce": "a b"}, "nonce"),
        ({"nonce": ""}, "nonce"),
        ({"window_s": 0}, "window"),
        ({"window_s": 301}, "window"),
        ({"components": ["x-not-there"]}, "x-not-there"),
        ({"components": ["X-Upper"]}, "plain component names"),
        ({"components": ["@query"]}, "query"),
        ({"method": "get"}, "method"),
        ({"url": "https://u@x/"}, "absolute"),
        ({"headers": [("Signature-Input", "eth=()"), ("Signature", "eth=:AAAA:")]}, "already"),
        (
            {"headers": [("Signature-Input", f'a=();keyid="erc8128:1:{ADDRESS}"')]},
            "already",
        ),
        ({"headers": [("Farebox-Max", "1"), ("Farebox-Max", "2")]}, "only once"),
    ],
)
def test_what_the_verifier_would_refuse_is_not_signed(change: dict[str, Any], match: str) -> None:
    arguments: dict[str, Any] = {
        "method": "GET",
        "url": URL,
        "headers": [],
        "body": None,
        "now_s": NOW,
        "nonce": "n",
    }
    with pytest.raises(ValueError, match=match):
        sign_request(KEY, **(arguments | change))
