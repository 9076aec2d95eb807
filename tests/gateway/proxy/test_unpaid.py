"""The quick 402 is the one that is raised, byte for byte; only tokens differ between any two."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import string
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.middleware import problem_answer
from gateway.payments import challenge, offers
from gateway.payments.offers import Asked, Keys, Terms, unseal
from gateway.proxy import advice, unpaid
from gateway.settings import Settings
from tests.fixtures_chain import NETWORK
from tests.gateway.payments.parts import KEYS, PAY_TO, SETTLER_KEY, settings_for

NOW_S = 1_800_000_000
DOLLAR = 1_000_000
CHAIN = {"rpc": ["http://127.0.0.1:1"], "pay_to": PAY_TO, "settler_key": SETTLER_KEY}
SHOPS = [
    settings_for(),
    settings_for(chains={"base-sepolia": CHAIN, "base": CHAIN}, credits={"packs": ["$1"]}),
    settings_for(server={"public_url": "https://shop.test:8443", "offer_timeout_s": 17}),
    settings_for(stripe={"secret_key": "sk_test_x", "webhook_secret": "whsec_x"}),
    settings_for(credits={"per_usd": 1_000}),
    settings_for(chains={"base-sepolia": CHAIN | {"permit2": True}, "base": CHAIN}),
    settings_for(chains={"base": CHAIN | {"permit2": True, "eip2612": True}}),
    # Nothing settles here, so there is nothing to offer.
    settings_for(chains={"base-sepolia": {n: CHAIN[n] for n in ("rpc", "pay_to")}}),
]
VISIBLE = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=40)
TARGETS = VISIBLE.map(lambda text: ("/" + text).encode())
METHODS = st.sampled_from(["GET", "POST", "M-SEARCH", "A%sB", "X'Y"])
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
IDS = st.text(string.hexdigits.lower(), min_size=16, max_size=16)
FLOORS = st.just(()) | st.tuples(
    st.tuples(st.just(NETWORK.caip2), st.integers(1, 30 * DOLLAR)),
)
EXTENSIONS = st.just("") | st.dictionaries(TEXTS, TEXTS | st.integers(), min_size=1).map(json.dumps)


def raised(  # noqa: PLR0917
    shop: Settings,
    asked: Asked,
    request_id: str,
    description: str,
    extensions: str,
    floors: offers.Floors,
) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """What is sent when the problem is raised, as the front and the edge send it."""
    problem = challenge.for_call(
        shop, KEYS, asked, NOW_S, description=description, extensions=extensions, floors=floors
    )
    problem.headers["Vary"] = "Accept"
    base = shop.server.public_url
    advice.complete(problem, asked.method, base + asked.target.decode(), base)
    return problem_answer(problem, request_id)


@given(
    st.sampled_from(SHOPS),
    st.builds(Asked, METHODS, TARGETS, st.integers(0, 30 * DOLLAR)),
    IDS,
    TEXTS,
    EXTENSIONS,
    FLOORS,
)
@example(SHOPS[0], Asked("GET", b"/a\"b%s%%(id)s?q='\\", 2_000), "0" * 16, 'p"q % é \u2028', "", ())
@example(SHOPS[0], Asked("POST", b"/", 0), "f" * 16, "", '{"a":"%s \\u00e9"}', ())
@example(SHOPS[0], Asked("POST", b"/", 0), "f" * 16, "", "", ((NETWORK.caip2, 50 * DOLLAR),))
def test_it_is_the_402_that_is_raised(  # noqa: PLR0917
    shop: Settings,
    asked: Asked,
    request_id: str,
    description: str,
    extensions: str,
    floors: offers.Floors,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offers, "_SALT_BYTES", 0)  # two 402s are compared whole
        lines, body = unpaid.answer(
            shop,
            KEYS,
            asked,
            NOW_S,
            request_id,
            description=description,
            extensions=extensions,
            floors=floors,
        )
        status, fields, expected = raised(shop, asked, request_id, description, extensions, floors)
    assert status == 402
    assert body == expected
    assert lines == b"".join(b"%b: %b\r\n" % field for field in fields)


def required(lines: bytes) -> dict[str, Any]:
    named = dict(line.split(b": ", 1) for line in lines.splitlines())
    found: dict[str, Any] = json.loads(base64.b64decode(named[b"payment-required"], validate=True))
    return found


def test_tokens_of_one_second_differ_and_open() -> None:
    shop, asked = SHOPS[0], Asked("GET", b"/v1/x?y", 2_000)
    first, second = (required(unpaid.answer(shop, KEYS, asked, NOW_S, "id")[0]) for _ in range(2))
    tokens = [[offer["extra"]["offer"] for offer in each["accepts"]] for each in (first, second)]
    assert len(tokens[0]) == 4
    assert not set(tokens[0]) & set(tokens[1])
    terms = offers.terms_for_call(shop, 2_000, 2_000)
    for each in tokens:
        for token, made in zip(each, terms, strict=True):
            opened = unseal(KEYS, token, asked, [made], NOW_S)
            assert (opened.price_units, opened.terms) == (2_000, made)
            assert opened.expiry_s == NOW_S + shop.server.offer_timeout_s


def test_other_settings_prices_and_words_are_other_answers() -> None:
    """What is remembered is remembered for what it was made for."""

    def made(shop: Settings, price_units: int, description: str) -> Any:
        lines, body = unpaid.answer(
            shop, KEYS, Asked("GET", b"/", price_units), NOW_S, "id", description=description
        )
        new = required(lines)
        return new["resource"], [o["amount"] for o in new["accepts"]], json.loads(body)["pay"]

    one = made(SHOPS[0], 20_000, "a")
    assert one == made(SHOPS[0], 20_000, "a")
    for other in ((SHOPS[2], 20_000, "a"), (SHOPS[0], 30_000, "a"), (SHOPS[0], 20_000, "b")):
        assert made(*other) != one


def test_no_line_can_be_written_into_the_header() -> None:
    lines, _ = unpaid.answer(
        SHOPS[0], KEYS, Asked("GET", b"/", 1), NOW_S, "id", description="a\r\nset-cookie: b"
    )
    assert lines.count(b"\n") == lines.count(b"\r\n") == 7
    assert b"set-cookie" not in lines


@given(
    st.binary(min_size=1, max_size=80) | st.sampled_from([b"k" * n for n in (63, 64, 65, 80)]),
    TEXTS,
    st.builds(Asked, METHODS, TARGETS, st.integers(0, 2**60)),
    TEXTS,
)
def test_the_mac_is_hmac_sha_256(
    secret: bytes, deployment: str, asked: Asked, purpose: str
) -> None:
    """Begun hashes carry on as RFC 2104 says, for keys shorter and longer than a block."""
    keys = Keys(deployment, {bytes(4): secret}, bytes(4))
    terms = Terms(SHOPS[0].chains[0], "0x" + "00" * 20, PAY_TO, 7, purpose, 120)
    (token,) = offers.seal(keys, asked, [terms], NOW_S)
    raw = base64.urlsafe_b64decode(token + "=")
    parts = (b"farebox-offer-2", deployment.encode(), asked.method.encode(), asked.target, raw[:32])
    text = b"".join(len(part).to_bytes(4, "big") + part for part in (*parts, terms.sealed()))
    assert raw[32:] == hmac.new(secret, text, hashlib.sha256).digest()[:24]
    assert unseal(keys, token, asked, [terms], NOW_S).price_units == asked.price_units
