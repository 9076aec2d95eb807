"""Reading a 402 and signing a payment: vectors of the official clients, and odd offers."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from x402.mechanisms.evm.default_assets import DEFAULT_ASSETS

from tests.wallet_auth.shop import PAY_TO, Seen, challenge, encode, read_payment, terms
from tests.wallet_auth.support import ADDRESS, KEY, NOW
from wallet_auth import keys, offers
from wallet_auth.offers import (
    TOKENS,
    Token,
    authorize,
    choose,
    read_header,
    usd_units,
    write_header,
)

DOLLAR = 1_000_000
NONCE = bytes(range(32))


def test_the_token_table_is_that_of_the_official_client() -> None:
    for network, tokens in TOKENS.items():
        (token,) = tokens
        theirs = DEFAULT_ASSETS[network][0]
        assert token == Token(
            theirs["asset"].lower(), theirs["name"], theirs["version"], theirs["decimals"]
        )


# -- headers --------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False).filter(lambda x: abs(x) < 1e300),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_headers_come_back(value: dict[str, Any]) -> None:
    header = write_header(value)
    assert read_header(header) == value
    assert read_header(header.rstrip("=")) == value
    assert header.isascii()


def _b64(text: str | bytes) -> str:
    return base64.b64encode(text if isinstance(text, bytes) else text.encode()).decode()


@pytest.mark.parametrize(
    "header",
    [
        "",
        "%%%%",
        "A",
        "{}",
        _b64("hello"),
        _b64("[]"),
        _b64('"x"'),
        _b64("null"),
        _b64('{"a":1,"a":1}'),
        _b64('{"a":{"b":1,"b":2}}'),
        _b64('{"a":NaN}'),
        _b64('{"a":-Infinity}'),
        _b64('{"a":1e999}'),
        _b64('{"a":' + "[" * 33 + "]" * 33 + "}"),
        _b64('{"a":' + "[" * 20000 + "]" * 20000 + "}"),
        _b64(b'{"a":"\xff"}'),
        _b64('{"a":1}') + " ",
        _b64('{"a":"??>"}').replace("+", "-").replace("/", "_"),
        _b64('{"a":"' + "x" * 70000 + '"}'),
    ],
    ids=range(19),
)
def test_bad_headers_are_refused(header: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        read_header(header)


# -- amounts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("1", DOLLAR),
        ("$1", DOLLAR),
        ("0.25", 250_000),
        ("$0.000001", 1),
        ("0", 0),
        ("01.5", 1500000),
    ],
)
def test_amounts_in_usd(text: str, units: int) -> None:
    assert usd_units(text) == units


@pytest.mark.parametrize("text", ["", "$", "-1", "1.", ".5", "1.0000001", "1e3", "1,0", "٣", " 1"])
def test_odd_amounts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="USD"):
        usd_units(text)


# -- choosing -------------------------------------------------------------------------------------


def chosen(*accepts: Any, cap_units: int = DOLLAR, **options: Any) -> offers.Offer | None:
    return choose(challenge(*accepts), cap_units=cap_units, **options)[0]


def test_the_first_acceptable_offer_is_taken() -> None:
    odd: Any = "odd"
    card: Any = {"scheme": "card", "network": "fiat", "amount": "5"}
    pack, small = terms(amount="5000000"), terms(amount="20000")
    offer, reasons = choose(challenge(card, odd, pack, small, terms()), cap_units=DOLLAR)
    assert offer is not None
    assert offer.terms == small
    assert (offer.amount, offer.amount_units, offer.pay_to) == (20000, 20000, PAY_TO.lower())
    assert [reason.split(":")[0] for reason in reasons] == ["offer 0", "offer 1", "offer 2"]
    assert "5000000" in reasons[2]


def test_the_cap_is_the_last_that_passes() -> None:
    assert chosen(terms(amount="1000000")) is not None
    assert chosen(terms(amount="1000001")) is None
    assert chosen(terms(amount="1"), cap_units=0) is None


def test_networks_can_be_limited() -> None:
    assert chosen(terms(), networks=["eip155:8453"]) is None
    assert chosen(terms(), networks=["eip155:84532"]) is not None
    assert chosen(terms(), networks=[]) is None


def test_other_tokens_can_be_allowed() -> None:
    address = "0x" + "ab" * 20
    own = {"eip155:31337": (Token(address, "Test", "1", 18),)}
    offer = terms(network="eip155:31337", asset=address, amount=str(10**16 + 1), extra={})
    assert chosen(offer) is None
    got = chosen(offer, tokens=own)
    assert got is not None
    assert got.amount_units == 10_001  # a fraction of a unit counts as one
    assert chosen(offer, tokens=own, cap_units=10_000) is None


EXTRA = {"name": "USDC", "version": "2"}


@pytest.mark.parametrize(
    "change",
    [
        {"scheme": "upto"},
        {"scheme": None},
        {"network": "eip155:1"},  # the asset is another network's
        {"network": "base-sepolia"},
        {"network": "eip155:084532"},
        {"network": 84532},
        {"network": None},
        {"asset": PAY_TO},
        {"asset": None},
        {"asset": 1},
        {"amount": "0"},
        {"amount": "-1"},
        {"amount": "0x10"},
        {"amount": "1.5"},
        {"amount": 10000},
        {"amount": " 1"},
        {"amount": "9" * 79},
        {"amount": "9" * 78},
        {"amount": None},
        {"payTo": "0x" + "0" * 40},
        {"payTo": "merchant"},
        {"payTo": None},
        {"maxTimeoutSeconds": 0},
        {"maxTimeoutSeconds": "60"},
        {"maxTimeoutSeconds": True},
        {"maxTimeoutSeconds": 60.0},
        {"maxTimeoutSeconds": None},
        {"extra": [1]},
        {"extra": EXTRA | {"assetTransferMethod": "permit2"}},
        {"extra": EXTRA | {"paymentFlow": "escrow"}},
        {"extra": EXTRA | {"name": "USD Coin"}},
        {"extra": EXTRA | {"version": "1"}},
    ],
    ids=str,
)
def test_odd_offers_are_passed_over(change: dict[str, Any]) -> None:
    assert chosen(terms(**change)) is None
    assert chosen(terms(**change), terms(payTo="0x" + "12" * 20)) is not None


@pytest.mark.parametrize(
    "extra",
    [None, {}, EXTRA, EXTRA | {"assetTransferMethod": "eip3009", "paymentFlow": "authorization"}],
)
def test_plain_offers_are_taken(extra: dict[str, Any] | None) -> None:
    assert chosen(terms(extra=extra)) is not None


def test_challenges_that_are_none() -> None:
    for odd in ({}, {"x402Version": 1, "accepts": [terms()]}, challenge() | {"accepts": terms()}):
        assert choose(odd, cap_units=DOLLAR)[0] is None
    many = challenge(*[{}] * offers.MAX_OFFERS, terms())
    assert choose(many, cap_units=DOLLAR)[0] is None


@given(JSON, st.sampled_from(sorted(terms())))
def test_whatever_an_offer_holds_it_is_only_refused(value: Any, member: str) -> None:
    offer = terms() | {member: value}
    got, reasons = choose(challenge(offer), cap_units=DOLLAR)
    assert (got is None) == bool(reasons)


# -- signing --------------------------------------------------------------------------------------


def _payment(asked: dict[str, Any], now_s: int = NOW) -> offers.Payment:
    offer, _ = choose(asked, cap_units=DOLLAR)
    assert offer is not None
    return authorize(keys.private_key(KEY), asked, offer, now_s=now_s, nonce=NONCE)


def test_a_payment_echoes_what_was_asked() -> None:
    asked = challenge(extensions={"bazaar": {"info": {"é": 1}}})
    payment = _payment(asked)
    seen = Seen("GET", "/", (("payment-signature", payment.header),), b"", None)
    payload = read_payment(seen)
    assert payload is not None
    assert payload["accepted"] == asked["accepts"][0]
    assert (payload["resource"], payload["extensions"]) == (asked["resource"], asked["extensions"])
    assert payload["x402Version"] == 2
    assert payload["payload"]["authorization"] == {
        "from": keys.checksum(ADDRESS),
        "to": PAY_TO,
        "value": "10000",
        "validAfter": "0",
        "validBefore": str(NOW + 60),
        "nonce": "0x" + NONCE.hex(),
    }


def test_an_authorization_does_not_live_long() -> None:
    assert _payment(challenge(terms(maxTimeoutSeconds=10**9))).valid_before_s == NOW + 600


def test_a_payment_does_not_show_its_signature() -> None:
    payment = _payment(challenge())
    signature = read_header(payment.header)["payload"]["signature"]
    assert payment.header not in repr(payment)
    assert signature[2:20] not in repr(payment)


def test_a_nonce_is_32_bytes() -> None:
    offer, _ = choose(challenge(), cap_units=DOLLAR)
    assert offer is not None
    with pytest.raises(ValueError, match="32 bytes"):
        authorize(keys.private_key(KEY), challenge(), offer, now_s=NOW, nonce=bytes(31))


def _vectors() -> list[tuple[str, dict[str, Any]]]:
    """Payments the official clients made (tests/vectors), by the first Anvil key."""
    file = Path(__file__).parents[1] / "vectors" / "x402-vectors.json"
    found = json.loads(file.read_text())
    good = [*found["valid"], *found["python_generated"]]
    return [
        (v["name"], v["payload"])
        for v in good
        if v["payload"].get("x402Version") == 2
        and v["payload"]["payload"].get("authorization", {}).get("from", "").lower() == ADDRESS
        and len(v["payload"]["payload"]["signature"]) == 132
        and "yParity" not in v["name"]
    ]


@pytest.mark.parametrize(("name", "payload"), _vectors())
def test_our_signature_is_that_of_the_official_clients(name: str, payload: dict[str, Any]) -> None:
    """RFC 6979 makes signatures reproducible: same authorization, same bytes."""
    assert name
    authorization = payload["payload"]["authorization"]
    offer, reasons = choose(challenge(payload["accepted"]), cap_units=10 * DOLLAR)
    assert offer is not None, reasons
    digest = offers.transfer_digest(
        offer,
        ADDRESS,
        int(authorization["validAfter"]),
        int(authorization["validBefore"]),
        bytes.fromhex(authorization["nonce"][2:]),
    )
    signature = keys.sign_digest(keys.private_key(KEY), digest)
    assert "0x" + signature.hex() == payload["payload"]["signature"]


def test_there_are_vectors() -> None:
    assert len(_vectors()) >= 4


def test_the_shop_itself_checks_signatures() -> None:
    header = read_header(_payment(challenge()).header)
    header["payload"]["authorization"]["value"] = "20000"
    with pytest.raises(AssertionError):
        read_payment(Seen("GET", "/", (("payment-signature", encode(header)),), b"", None))
