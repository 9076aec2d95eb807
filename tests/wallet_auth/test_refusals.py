"""The profile of ERC-8128: every refusal, with its code."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gateway.errors import CODES as GATEWAY_CODES
from tests.wallet_auth.support import (
    ADDRESS,
    BASIC,
    BODY,
    DIGEST,
    NONCE,
    NOW,
    OTHER_KEY,
    URL,
    by_hand,
    changed,
    header,
    params,
    plain,
    posted,
    refused,
    replaced,
    signed,
    with_headers,
)
from wallet_auth import CODES, AuthError, SignedRequest

Case = Callable[[], SignedRequest]
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
    of_siwx = {code for code in CODES if code.startswith("invalid_siwx_")}  # test_siwx.py
    of_bodies = {code for code in CODES if code.startswith("EXTERNAL_")}  # test_personal.py
    assert {code for code, _, _ in REFUSALS} == CODES - of_siwx - of_bodies
    assert GATEWAY_CODES.keys() >= CODES


def test_only_known_codes_can_be_raised() -> None:
    with pytest.raises(ValueError, match="not a code"):
        AuthError("signature_odd", "…")
