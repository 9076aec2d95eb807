"""Headers: nothing of the caller's passes for ours, nothing of the upstream's either."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import observe
from gateway.proxy import headers
from gateway.proxy.headers import is_our_key, request_headers, response_headers

HOST = (b"host", b"api.internal:9000")


def up(*pairs: tuple[bytes, bytes], **more: object) -> list[tuple[bytes, bytes]]:
    sent = request_headers(pairs, host=HOST[1], **more)  # type: ignore[arg-type]  # test shorthand
    assert sent[0] == HOST
    return sent[1:]


PASS_UP = [
    (b"accept", b"*/*"),
    (b"accept-encoding", b"gzip, br"),
    (b"user-agent", b"curl/8"),
    (b"content-type", b"application/json"),
    (b"content-encoding", b"gzip"),
    (b"content-digest", b"sha-256=:AA==:"),
    (b"idempotency-key", b"abc"),
    (b"authorization", b"Basic dTpw"),
    (b"authorization", b"Bearer sk-upstreams-own"),
    (b"authorization", b"fbx_no-scheme"),
    (b"signature", b"sig1=:AA==:"),
    (b"signature-input", b'sig1=("@method")'),
    (b"cookie", b"a=1; b=2"),
    (b"x-custom", b"1"),
    (b"x-custom", b"2"),
    (b"x-wall", b"1"),
    (b"payments", b"1"),
]

DROP_UP = """
connection keep-alive proxy-connection proxy-authorization proxy-authenticate te trailer
transfer-encoding upgrade http2-settings content-length expect host
payment payment-signature payment-required payment-response x-payment x-payment-response
x-payment-required sign-in-with-x settlement-overrides
forwarded via x-forwarded-for x-forwarded-proto x-forwarded-host x-real-ip true-client-ip
x-wallet x-wallet-address x-walletanything farebox-account farebox-wallet farebox-auth
farebox-payer farebox-meter farebox-max farebox-credential x-farebox-anything
x-http-method-override x-http-method x-method-override x-original-url x-rewrite-url
"""


@pytest.mark.parametrize("pair", PASS_UP)
def test_passes_up(pair: tuple[bytes, bytes]) -> None:
    assert up(pair) == [pair]


def test_order_and_repeats_are_kept() -> None:
    assert up(*PASS_UP) == PASS_UP


@pytest.mark.parametrize("name", DROP_UP.split())
def test_dropped_up(name: str) -> None:
    for spelling in {name, name.replace("-", "_"), name.replace("-", "_", 1)}:
        assert up((spelling.encode(), b"1")) == []


@pytest.mark.parametrize(
    "value",
    [
        b"Bearer fbx_abc",
        b"bearer fbx_abc",
        b"BEARER  fbx_abc",
        b"Bearer \tfbx_abc",
        b"Bearer\tfbx_abc",
        b"bearer\t fbx_abc",
        b" Bearer fbx_abc",
        b"Bearer fbx_abc more",
    ],
)
def test_our_keys_do_not_go_up(value: bytes) -> None:
    assert is_our_key(value)
    assert up((b"authorization", value)) == []


@pytest.mark.parametrize(
    "value",
    [b"", b"Bearer", b"Bearer\t", b"Bearerfbx_abc", b"Basic fbx_abc", b"Bearer\tx fbx_abc"],
)
def test_other_keys_are_not_taken_for_ours(value: bytes) -> None:
    assert not is_our_key(value)
    assert up((b"authorization", value)) == [(b"authorization", value)]


def test_signatures_of_ours_do_not_go_up() -> None:
    pairs = ((b"signature", b"x"), (b"signature-input", b"y"), (b"content-digest", b"z"))
    assert up(*pairs, signature_is_ours=True) == [pairs[2]]


def test_connection_nominated_fields_do_not_go_up_and_cannot_remove_ours() -> None:
    sent = up(
        (b"connection", b"close, X-Gone,\tfarebox-auth , authorization, host"),
        (b"connection", b"x-also"),
        (b"x-gone", b"1"),
        (b"x-also", b"1"),
        (b"x-stays", b"1"),
        ours=[(b"farebox-auth", b"bound")],
        inject=[(b"authorization", b"Bearer upstream-key")],
    )
    assert sent == [
        (b"x-stays", b"1"),
        (b"farebox-auth", b"bound"),
        (b"authorization", b"Bearer upstream-key"),
    ]


def test_injected_fields_stand_alone() -> None:
    sent = up(
        (b"authorization", b"Bearer callers"),
        (b"x-key", b"callers"),
        (b"x_key", b"callers"),
        (b"traceparent", b"callers"),
        ours=[(b"traceparent", b"ours"), (b"x-key", b"ours")],
        inject=[(b"authorization", b"Bearer operators"), (b"x-key", b"operators")],
    )
    assert sent == [
        (b"traceparent", b"ours"),
        (b"authorization", b"Bearer operators"),
        (b"x-key", b"operators"),
    ]


@pytest.mark.parametrize(
    ("cookie", "sent"),
    [
        (b"farebox_session=x", None),
        (b"a=1; farebox_session=x; b=2", b"a=1; b=2"),
        (b"a=1;__Host-farebox_s=x", b"a=1"),
        (b"__Secure-Farebox=x;a=farebox", b"a=farebox"),
    ],
)
def test_our_cookies_do_not_go_up(cookie: bytes, sent: bytes | None) -> None:
    assert up((b"cookie", cookie)) == ([] if sent is None else [(b"cookie", sent)])


NAMES = st.sampled_from(
    [n.encode() for n in DROP_UP.split()]
    + [b"accept", b"x-a", b"x_wallet", b"farebox_auth", b"connection", b"authorization"]
)


@given(st.lists(st.tuples(NAMES, st.binary(max_size=6)), max_size=12))
def test_what_we_state_is_the_only_statement(pairs: list[tuple[bytes, bytes]]) -> None:
    ours = [(b"farebox-auth", b"bound"), (b"farebox-wallet", b"0xabc")]
    inject = [(b"authorization", b"Bearer operators")]
    sent = request_headers(pairs, host=HOST[1], ours=ours, inject=inject)
    assert [p for p in sent if p[0].replace(b"_", b"-").startswith(b"farebox")] == ours
    assert [p for p in sent if p[0] == b"authorization"] == inject
    assert [p for p in sent if p[0] == b"host"] == [HOST]
    assert not {n for n, _ in sent} & {b"content-length", b"transfer-encoding", b"connection"}


DROP_DOWN = """
connection keep-alive te trailer transfer-encoding upgrade proxy-authenticate content-length
payment-required payment-response payment-signature x-payment-response x-payment
sign-in-with-x extension-responses settlement-overrides farebox-amount farebox-usage
farebox-charged farebox-balance farebox-credential ratelimit ratelimit-policy ratelimit-limit
clear-site-data service-worker-allowed alt-svc x-accel-redirect x-sendfile date server
"""


@pytest.mark.parametrize("name", DROP_DOWN.split())
def test_dropped_down(name: str) -> None:
    spellings = {name, name.replace("-", "_"), name.title(), name.upper()}
    for spelling in spellings:
        assert response_headers([(spelling.encode(), b"1")]) == []


def test_passes_down() -> None:
    pairs = [
        (b"content-type", b"text/html"),
        (b"content-encoding", b"gzip"),
        (b"etag", b'"a"'),
        (b"set-cookie", b"a=1; Path=/"),
        (b"set-cookie", b"b=farebox"),
        (b"location", b"/elsewhere"),
        (b"www-authenticate", b"Basic"),
        (b"cache-control", b"public, max-age=60"),
        (b"x-ratelimit-remaining", b"5"),
    ]
    assert response_headers(pairs) == pairs
    assert response_headers([(b"Content-Type", b"a")]) == [(b"content-type", b"a")]


@pytest.mark.parametrize(
    "cookie",
    [b"farebox_session=x; Path=/", b"Farebox=x", b"__Host-farebox_s=x", b" farebox_a = x"],
)
def test_the_upstream_cannot_set_our_cookies(cookie: bytes) -> None:
    assert response_headers([(b"set-cookie", cookie)]) == []


def test_connection_nominated_fields_do_not_go_down() -> None:
    pairs = [(b"Connection", b"X-Gone, close"), (b"X-Gone", b"1"), (b"x-stays", b"1")]
    assert response_headers(pairs) == [(b"x-stays", b"1")]


@pytest.mark.parametrize(
    ("given_values", "sent"),
    [
        ([], b"private"),
        ([b"public, max-age=60"], b"private, max-age=60"),
        ([b"Public", b"s-maxage=9,  max-age=60"], b"private, max-age=60"),
        ([b"no-store"], b"private, no-store"),
        ([b"private"], b"private"),
        ([b'private="x-a", max-age=1'], b"private, max-age=1"),
    ],
)
def test_a_paid_answer_is_private(given_values: list[bytes], sent: bytes) -> None:
    pairs = [(b"cache-control", v) for v in given_values]
    pairs += [(b"cdn-cache-control", b"max-age=60"), (b"surrogate-control", b"max-age=60")]
    out = response_headers(pairs, private=True)
    assert [v for n, v in out if n == b"cache-control"] == [sent]
    names = [n for n, _ in out]
    assert names == [b"cache-control", b"vary"]
    assert b"Payment-Signature" in dict(out)[b"vary"]


def test_the_length_is_ours() -> None:
    pairs = [(b"content-length", b"999")]
    assert response_headers(pairs, length=5) == [(b"content-length", b"5")]
    assert response_headers(pairs) == []


def test_long_names_are_judged_alike_and_not_kept() -> None:
    """A caller chooses them, up to the limit of a head, and as many as it likes."""
    kept = headers._up.cache_info().currsize, headers._dropped_down.cache_info().currsize
    plain, ours = b"x-" + b"a" * 100, b"x_farebox_" + b"a" * 100
    given = [(plain, b"1"), (ours, b"2")]
    assert (plain, b"1") in headers.request_headers(given, host=b"h")
    assert not any(name == ours for name, _ in headers.request_headers(given, host=b"h"))
    down = [(plain, b"1"), (b"farebox_" + b"a" * 100, b"2")]
    assert headers.response_headers(down) == [(plain, b"1")]
    after = headers._up.cache_info().currsize, headers._dropped_down.cache_info().currsize
    assert after == kept


def _oddities() -> int:
    kinds = {label: n for name, label, n in observe.counted() if name == "oddity"}
    return kinds["meter_foreign"]


@pytest.mark.parametrize(
    ("name", "metered", "counted"),
    [
        (b"Farebox-Usage", False, 1),
        (b"farebox-amount", False, 1),
        (b"Farebox_Amount", False, 1),
        (b"Farebox-Amount", True, 0),  # it is judged, and counted, where it is read
        (b"Farebox-Charged", False, 0),
        (b"Date", False, 0),
        (b"X-Usage", False, 0),
    ],
)
def test_what_an_upstream_says_of_an_amount_is_counted_where_nobody_asked(
    name: bytes, metered: bool, counted: int
) -> None:
    before = _oddities()
    passed = response_headers([(name, b"$1")], metered=metered)
    assert _oddities() - before == counted
    assert passed == ([(b"x-usage", b"$1")] if name == b"X-Usage" else [])
