"""The profile of ERC-8128: what is accepted, and what a refusal tells beside its code."""

from __future__ import annotations

import base64
import hashlib

import pytest

from tests.wallet_auth.support import (
    ADDRESS,
    BASIC,
    BODY,
    DIGEST,
    NONCE,
    NOW,
    URL,
    accepted,
    by_hand,
    changed,
    header,
    params,
    plain,
    posted,
    refused,
    replaced,
    request_of,
    signed,
)
from wallet_auth import SCHEMES, AuthError, Signer, check_body, verify
from wallet_auth.erc8128 import Policy, accept_signature
from wallet_auth.erc8128 import verify as verify_erc8128


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
