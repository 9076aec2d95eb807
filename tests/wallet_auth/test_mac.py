"""HMAC that is begun once, against the one of the standard library."""

from __future__ import annotations

import hmac

from hypothesis import given
from hypothesis import strategies as st

from gateway.payments.offers import Keys
from wallet_auth import mac, siwx

TEXTS = st.binary(max_size=150)
SECRETS = st.binary(max_size=90) | st.sampled_from([b"k" * n for n in (0, 32, 63, 64, 65, 200)])


@given(SECRETS, TEXTS, TEXTS)
def test_it_is_hmac_sha_256(secret: bytes, first: bytes, rest: bytes) -> None:
    begun = mac.begin(secret, first)
    expected = hmac.digest(secret, first + rest, "sha256")
    assert mac.end(begun, rest) == expected
    assert mac.end(begun, rest) == expected  # what was begun is left as it was


@given(SECRETS, TEXTS, TEXTS, st.lists(TEXTS, max_size=4))
def test_several_ends_of_one_text(
    secret: bytes, first: bytes, middle: bytes, last: list[bytes]
) -> None:
    found = mac.ends(mac.begin(secret, first), middle, iter(last))
    assert found == [hmac.digest(secret, first + middle + text, "sha256") for text in last]


@given(st.lists(TEXTS, max_size=4), st.lists(TEXTS, max_size=4))
def test_parts_with_their_lengths_are_told_apart(one: list[bytes], other: list[bytes]) -> None:
    assert (mac.sized(*one) == mac.sized(*other)) is (one == other)
    assert mac.sized(*one) == b"".join(len(p).to_bytes(4, "big") + p for p in one)


def test_the_seal_of_a_challenge_is_over_all_its_parts() -> None:
    """The form other nodes of the deployment make and read: it may not change unnoticed."""
    keys = Keys("d-1", {b"\0\0\0\1": b"k" * 32}, b"\0\0\0\1")
    asked = siwx.Asked("POST", b"/v1/x?y", "https://shop.test", "shop.test", b"")
    lines = ("shop.test", "https://shop.test/v1/x?y", "words", "nonce", "from", "to")
    head = b"\0\0\0\1" + b"rest"
    parts = (b"farebox-siwx-1", b"d-1", b"POST", b"/v1/x?y", head, *(x.encode() for x in lines))
    text = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    assert siwx._mac(keys, head, asked, lines) == hmac.digest(b"k" * 32, text, "sha256")[:16]


def test_long_targets_are_not_remembered() -> None:
    """What is kept of requests from outside is bounded in number and in length."""
    keys = Keys("d-1", {b"\0\0\0\1": b"k" * 32}, b"\0\0\0\1")
    siwx._remembered.cache_clear()
    for length in (1, siwx._LONGEST_PATH, siwx._LONGEST_PATH + 1, 5_000):
        asked = siwx.Asked("GET", b"/" + b"a" * (length - 1), "http://x", "x", b"")
        assert siwx.challenge(keys, asked, "[]", 1, "$1", (1_900_000_000, 1_900_000_060))
    assert siwx._remembered.cache_info().currsize == 2
