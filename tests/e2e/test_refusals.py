"""Payments that are refused: which code, nothing sent, nothing written, and how to go on."""

from __future__ import annotations

import base64
import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from anvil.devnet import Devnet
from tests.e2e.stage import PRICE_UNITS, Api, Gateway
from tests.e2e.wallet import Wallet, buy, decode, encode, new_wallet, offers, outcome, problem

Launch = Callable[..., Gateway]
VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "vectors" / "x402-vectors.json").read_text()
)
META = VECTORS["meta"]
PURCHASE = "/farebox/v1/credits/purchase"
EVM = "invalid_exact_evm_payload_"
TABLES = ("payment", "authorization_use", "chain_tx", "hold", "transfer", "lot", "account")


def written(gateway: Gateway) -> list[int]:
    """How much the gateway has written down about money, and what it has sent."""
    counts = " UNION ALL ".join(f"SELECT count(*) AS n FROM {table}" for table in TABLES)
    return [row["n"] for row in gateway.rows(counts)] + [gateway.sent()]


@pytest.fixture
def unmoved(sqlite_gateway: Gateway) -> Iterator[Gateway]:
    """A gateway in which the test must leave no trace."""
    before = written(sqlite_gateway)
    yield sqlite_gateway
    assert written(sqlite_gateway) == before


async def ask(http: httpx.AsyncClient, target: str, header: str) -> httpx.Response:
    return await http.get(target, headers={"PAYMENT-SIGNATURE": header})


def check_refused(answer: httpx.Response, code: str, why: str) -> None:
    """A refusal as clients need it: its code, and for 402 what was refused and fresh offers."""
    told = problem(answer, code)
    if answer.status_code == 402:
        assert answer.headers["cache-control"] == "no-store", why
        assert offers(answer), why
        assert told["x402Version"] == 1 and told["accepts"], why
        assert code in told["error"], why
        said = outcome(answer)
        assert (said["success"], said["transaction"]) == (False, ""), why
        assert said["errorReason"] == code and said["errorMessage"], why
    else:
        assert answer.status_code == 400, why
        assert "payment-required" not in answer.headers, why


# --- the vectors ----------------------------------------------------------------------------------

MALFORMED = {
    "empty": "payment_required",  # the official servers, too, take it for no payment
    "valid without padding": EVM + "recipient_mismatch",  # read, and not made out to us
    "utf8 description": EVM + "recipient_mismatch",
}


@pytest.mark.parametrize("name", ["PAYMENT-SIGNATURE", "X-PAYMENT", "PAYMENT"])
@pytest.mark.parametrize("vector", VECTORS["malformed_headers"], ids=lambda v: v["name"])
async def test_malformed_headers(
    vector: dict[str, Any], name: str, unmoved: Gateway, api: Api, target: str
) -> None:
    async with unmoved.client() as http:
        answer = await http.get(target, headers={name: vector["header"]})
    code = MALFORMED.get(vector["name"], "invalid_payload")
    if code == "payment_required":
        problem(answer, code)
    else:
        check_refused(answer, code, vector["name"])
    assert api.calls(target) == 0


INVALID = {
    "6492 factory not allowlisted": EVM + "undeployed_smart_wallet",
    "recipient mismatch": EVM + "recipient_mismatch",
    "v1 recipient mismatch": EVM + "recipient_mismatch",
    "value too low": EVM + "authorization_value_mismatch",
    "value too high": EVM + "authorization_value_mismatch",
    "expired validBefore": EVM + "authorization_valid_before",
    "validBefore within 6s buffer": EVM + "authorization_valid_before",
    "validAfter in future": EVM + "authorization_valid_after",
    "signature bit-flip": EVM + "signature",
    "signed by another key": EVM + "signature",
    "signed for wrong chainId domain": EVM + "signature",
    "signed for wrong token name": EVM + "signature",
    "signed for wrong verifyingContract": EVM + "signature",
    "high-s malleated signature": EVM + "signature",
    "insufficient balance (valid sig, unfunded key)": "insufficient_funds",
    "missing signature": "invalid_payload",
    "empty signature 0x": "invalid_payload",
    "missing authorization": "invalid_payload",
    "nonce short": "invalid_payload",
    "value as hex string": "invalid_payload",
    "value with plus/space": "invalid_payload",
    "value as JSON number": "invalid_payload",
    "value negative": "invalid_payload",
    "accepted.network mismatch": "invalid_network",
    "accepted.scheme mismatch": "invalid_scheme",
    "x402Version 3": "invalid_x402_version",
}
# A good payment beside a seller's own mistake: here token and domain stand in our own table.
GOOD_HERE = {"requirements lack EIP-712 domain", "asset not a contract"}


async def test_every_vector(launch: Launch, api: Api, target: str) -> None:
    """Those of the official clients that are good settle; the rest gets the code of the table."""
    gateway = launch("sqlite", pay_to=META["payTo"].lower())
    before = written(gateway)
    received = gateway.received()
    assert INVALID.keys() | GOOD_HERE == {v["name"] for v in VECTORS["invalid"]}
    async with gateway.client() as http:
        for vector in VECTORS["invalid"]:
            if vector["name"] not in GOOD_HERE:
                name = {vector["header_name"]: vector["header"]}
                answer = await http.get(target, headers=name)
                check_refused(answer, INVALID[vector["name"]], vector["name"])
        assert written(gateway) == before
        good = [
            v
            for v in [*VECTORS["valid"], *VECTORS["python_generated"]]
            if "6492" not in v["name"] and "1271" not in v["name"] and "echo" not in v["name"]
        ]
        assert len(good) == 8
        for n, vector in enumerate(good):
            name = {vector["header_name"]: vector["header"]}
            answer = await http.get(f"{target}?{n}", headers=name)
            assert answer.status_code == 200, (vector["name"], answer.text)
    assert api.calls(target) == 0
    assert gateway.received() == received + 8 * PRICE_UNITS
    assert gateway.sent() == 8


# --- more odd forms -------------------------------------------------------------------------------


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(payload: dict[str, Any]) -> None:
        *above, last = path.split(".")
        here: Any = payload
        for key in above:
            here = here[key]
        if value is ...:
            del here[last]
        else:
            here[last] = value

    return change


AUTH = "payload.authorization."
ODD: list[tuple[str, Any, str]] = [
    ("x402Version", ..., "invalid_payload"),
    ("x402Version", "2", "invalid_payload"),
    ("x402Version", True, "invalid_payload"),
    ("x402Version", 2.0, "invalid_payload"),
    ("x402Version", 0, "invalid_x402_version"),
    ("x402Version", 10**30, "invalid_x402_version"),
    ("accepted", ..., "invalid_payload"),
    ("accepted", [], "invalid_payload"),
    ("accepted.scheme", "upto", "invalid_scheme"),
    ("accepted.scheme", 1, "invalid_payload"),
    ("accepted.network", "eip155:1", "invalid_network"),
    ("accepted.network", "eip155:0084532", "invalid_network"),
    ("accepted.network", "base-sepolia", "invalid_network"),
    ("accepted.network", "n" * 201, "invalid_payload"),
    ("accepted.asset", "0x" + "12" * 20, "invalid_payment_requirements"),
    ("accepted.asset", None, "invalid_payload"),
    ("accepted.payTo", "0x" + "12" * 20, EVM + "recipient_mismatch"),
    ("accepted.amount", "１００００", "invalid_payload"),
    ("accepted.amount", "010000", "invalid_payload"),
    ("accepted.amount", "10000 ", "invalid_payload"),
    ("accepted.amount", "-10000", "invalid_payload"),
    ("accepted.amount", "9" * 78, "invalid_payload"),
    ("accepted.amount", 10_000, "invalid_payload"),
    ("accepted.amount", "0", "invalid_payment_requirements"),
    ("accepted.maxTimeoutSeconds", "120", "invalid_payment_requirements"),
    ("accepted.maxTimeoutSeconds", -1, "invalid_payment_requirements"),
    ("accepted.extra.offer", 7, "invalid_payload"),
    ("accepted.extra.offer", "", "invalid_payment_requirements"),
    ("accepted.extra.offer", "é", "invalid_payload"),
    ("accepted.extra.offer", "A", "invalid_payment_requirements"),
    ("accepted.extra.offer", "A" * 75, "invalid_payment_requirements"),
    ("accepted.extra.offer", "A" * 511, "invalid_payment_requirements"),
    ("accepted.extra.offer", "A" * 512, "invalid_payload"),
    ("payload", "x", "invalid_payload"),
    ("payload.permit2Authorization", {}, "invalid_scheme"),
    ("payload.signature", "0x" + "00" * 65, EVM + "signature"),
    ("payload.signature", "0x" + "11" * 64, EVM + "signature"),
    ("payload.signature", "0x123", "invalid_payload"),
    ("payload.signature", "0x" + "11" * 20_000, "invalid_payload"),
    (AUTH + "from", "0x" + "1" * 39, "invalid_payload"),
    (AUTH + "from", "0x" + "0" * 40, EVM + "signature"),
    (AUTH + "to", "0x" + "12" * 20, EVM + "recipient_mismatch"),
    (AUTH + "value", "1_0000", "invalid_payload"),
    (AUTH + "value", " 10000", "invalid_payload"),
    (AUTH + "value", "+10000", "invalid_payload"),
    (AUTH + "value", "1e4", "invalid_payload"),
    (AUTH + "value", "٣", "invalid_payload"),
    (AUTH + "value", "", "invalid_payload"),
    (AUTH + "value", "9" * 79, "invalid_payload"),
    (AUTH + "value", str(2**256), "invalid_payload"),
    (AUTH + "value", "0", EVM + "authorization_value_mismatch"),
    (AUTH + "validAfter", 0, "invalid_payload"),
    (AUTH + "validBefore", None, "invalid_payload"),
    (AUTH + "validBefore", "1e9", "invalid_payload"),
    (AUTH + "validBefore", "0", EVM + "authorization_valid_before"),
    (AUTH + "nonce", "0x" + "g" * 64, "invalid_payload"),
    (AUTH + "nonce", 1, "invalid_payload"),
    (AUTH + "nonce", "0X" + "1" * 64, "invalid_payload"),
    (AUTH + "more", "1", "invalid_payload"),
]


async def test_odd_forms(unmoved: Gateway, api: Api, target: str, wallet: Wallet) -> None:
    wrong = []
    async with unmoved.client() as http:
        offer = offers(await http.get(target))[0]
        good = decode(wallet.pay(offer))
        for path, value, code in ODD:
            payload = copy.deepcopy(good)
            _set(path, value)(payload)
            text = json.dumps(payload, ensure_ascii=False)
            answer = await ask(http, target, base64.b64encode(text.encode()).decode())
            try:
                if len(text) > 24_000 // 4 * 3:
                    assert answer.status_code in (400, 431)
                else:
                    check_refused(answer, code, path)
            except (AssertionError, KeyError, ValueError) as error:
                wrong.append(f"{path} = {str(value)[:60]!r}: {error}")
    assert not wrong, "\n".join(wrong)
    assert api.calls(target) == 0


def _texts(good: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    text = json.dumps(good)
    deep = "[" * 60 + "]" * 60
    yield (
        "a key twice",
        text.replace('"x402Version": 2', '"x402Version": 2, "x402Version": 2').encode(),
    )
    yield "a value twice", text.replace('"value":', '"value": "1", "value":').encode()
    yield "NaN", text.replace('"x402Version": 2', '"x402Version": 2, "a": NaN').encode()
    yield "Infinity", text.replace('"x402Version": 2', '"x402Version": 2, "a": -Infinity').encode()
    yield "deep", text.replace('"x402Version": 2', f'"x402Version": 2, "a": {deep}').encode()
    yield "very deep", b'{"a":' * 2_000 + b"1" + b"}" * 2_000
    yield (
        "not UTF-8",
        text.replace('"x402Version": 2', '"x402Version": 2, "a": "\xff"').encode("latin-1"),
    )
    yield (
        "a lone surrogate",
        text.replace('"x402Version": 2', '"x402Version": 2, "a": "\\ud800"').encode(),
    )
    yield "something behind", text.encode() + b"{}"
    yield "a BOM in front", b"\xef\xbb\xbf" + text.encode()
    yield "UTF-16", text.encode("utf-16")
    yield "an array", f"[{text}]".encode()
    yield (
        "a huge number",
        text.replace('"x402Version": 2', f'"x402Version": {"9" * 5_000}').encode(),
    )


async def test_json_that_two_readers_could_read_differently(
    unmoved: Gateway, target: str, wallet: Wallet
) -> None:
    async with unmoved.client() as http:
        good = decode(wallet.pay(offers(await http.get(target))[0]))
        for why, text in _texts(good):
            header = base64.b64encode(text).decode()
            check_refused(await ask(http, target, header), "invalid_payload", why)
        header = base64.b64encode(json.dumps(good).encode()).decode()
        for why, spoilt in {
            "a space inside": header[:40] + " " + header[40:],
            "too much padding": header.rstrip("=") + "====",
            "padding inside": header[:8] + "=" + header[8:],
            "a lone character": header.rstrip("=") + "A" * ((1 - len(header.rstrip("="))) % 4),
            "base64url": base64.urlsafe_b64encode(b"\xff\xfe\xfd" * 9).decode(),
            "two values": f"{header}, {header}",
        }.items():
            check_refused(await ask(http, target, spoilt), "invalid_payload", why)
        long = await ask(http, target, "A" * 24_004)
        check_refused(long, "invalid_payload", "long")
        longer = await ask(http, target, "A" * 40_000)
        assert longer.status_code == 431


# --- what our own terms say -----------------------------------------------------------------------


async def test_our_own_terms_decide(
    unmoved: Gateway, api: Api, target: str, wallet: Wallet, chain_session: Devnet
) -> None:
    now_s = int(time.time())
    poor = new_wallet(chain_session, PRICE_UNITS - 1)
    stranger = new_wallet(chain_session, 0)
    async with unmoved.client() as http:
        asked = await http.get(target)
        offer = offers(asked)[0]
        v1 = asked.json()["accepts"][0]
        value, before, after = (
            f"{EVM}authorization_{what}"
            for what in ("value_mismatch", "valid_before", "valid_after")
        )
        for why, header, code in (
            ("too little", wallet.pay(offer, amount=PRICE_UNITS - 1), value),
            ("too much", wallet.pay(offer, amount=PRICE_UNITS + 1), value),
            ("over", wallet.pay(offer, valid_before_s=now_s - 1), before),
            ("nearly over", wallet.pay(offer, valid_before_s=now_s + 4), before),
            ("too early", wallet.pay(offer, valid_after_s=now_s + 60), after),
            ("another chain", wallet.pay(offer, chain_id=1), EVM + "signature"),
            ("another name", wallet.pay(offer, name="USD Coin"), EVM + "signature"),
            ("of another", wallet.pay(offer, from_=stranger.address), EVM + "signature"),
            ("v1: too little", wallet.pay_v1(v1, amount=PRICE_UNITS - 1), value),
        ):
            check_refused(await ask(http, target, header), code, why)
        check_refused(await ask(http, target, poor.pay(offer)), "insufficient_funds", "poor")
        # The same of a purchase.
        body = b'{"amount_usd": "1"}'
        offer = offers(await http.post(PURCHASE, content=body))[0]
        for header, code in (
            (wallet.pay(offer, amount=1), EVM + "authorization_value_mismatch"),
            (poor.pay(offer), "insufficient_funds"),
            (encode([]), "invalid_payload"),
            (encode({"x402Version": 3}), "invalid_x402_version"),
            (wallet.pay({**offer, "network": "eip155:1"}), "invalid_network"),
        ):
            answer = await http.post(PURCHASE, content=body, headers={"PAYMENT-SIGNATURE": header})
            check_refused(answer, code, "purchase")
    assert api.calls(target) == 0


async def test_what_the_token_refuses(
    unmoved: Gateway, target: str, wallet: Wallet, chain_session: Devnet
) -> None:
    async with unmoved.client() as http:
        offer = offers(await http.get(target))[0]
        chain_session.blacklist(wallet.address)
        try:
            check_refused(await ask(http, target, wallet.pay(offer)), "payer_blocked", "listed")
        finally:
            chain_session.blacklist(wallet.address, listed=False)
        chain_session.pause()
        try:
            check_refused(await ask(http, target, wallet.pay(offer)), "asset_paused", "paused")
        finally:
            chain_session.pause(paused=False)


# --- at most one identity and one payment, of one wallet ------------------------------------------


async def test_two_payments_or_two_wallets(
    unmoved: Gateway, api: Api, target: str, wallet: Wallet, chain_session: Devnet
) -> None:
    other = new_wallet(chain_session)
    url = unmoved.url + target
    async with unmoved.client() as http:
        offer = offers(await http.get(target))[0]
        for pair in (
            [("PAYMENT-SIGNATURE", wallet.pay(offer)), ("X-PAYMENT", wallet.pay(offer))],
            [("PAYMENT-SIGNATURE", wallet.pay(offer)), ("PAYMENT-SIGNATURE", wallet.pay(offer))],
            [("PAYMENT", wallet.pay(offer)), ("PAYMENT-SIGNATURE", other.pay(offer))],
        ):
            answer = await http.get(target, headers=pair)
            assert problem(answer, "identity_conflict")["status"] == 400
        paid = {"PAYMENT-SIGNATURE": other.pay(offer)}
        answer = await http.get(target, headers=wallet.sign("GET", url, headers=paid))
        assert problem(answer, "payer_mismatch")["status"] == 409
        spoilt = other.sign("GET", url + "?x", headers=paid)  # an identity that fails ends it
        answer = await http.get(target, headers=spoilt)
        assert problem(answer, "signature_invalid")["status"] == 401
        key = {"Authorization": "Bearer fbx_not-one-of-ours", **paid}
        assert (await http.get(target, headers=key)).status_code == 401
        body = json.dumps({"amount_usd": "1", "wallet_address": wallet.address}).encode()
        offer = offers(await http.post(PURCHASE, content=body))[0]
        answer = await http.post(
            PURCHASE, content=body, headers={"PAYMENT-SIGNATURE": other.pay(offer)}
        )
        assert problem(answer, "payer_mismatch")["status"] == 409
    assert api.calls(target) == 0


# --- the purchase itself --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{}", "invalid_request"),
        (b'{"amount_usd": "1", "credits": 500}', "invalid_request"),
        (b'{"amount_usd": 1}', "invalid_request"),
        (b'{"amount_usd": "0.0000001"}', "invalid_amount"),
        (b'{"amount_usd": "0.009999"}', "invalid_amount"),
        (b'{"amount_usd": "-1"}', "invalid_amount"),
        (b'{"amount_usd": "1e3"}', "invalid_amount"),
        (b'{"amount_usd": "NaN"}', "invalid_amount"),
        (b'{"amount_usd": "100001"}', "invalid_amount"),
        (b'{"credits": true}', "invalid_request"),
        (b'{"credits": 500.0}', "invalid_request"),
        (b'{"credits": 499}', "invalid_amount"),
        (b'{"credits": -500}', "invalid_amount"),
        (b'{"amount_usd": "1", "amount_usd": "2"}', "invalid_request"),
        (b'{"amount_usd": "1", "price": "0"}', "invalid_request"),
        (b'{"amount_usd": "1", "payment_method": "cash"}', "invalid_request"),
        (b'[{"amount_usd": "1"}]', "invalid_request"),
        (b"\xff", "invalid_request"),
        (b"x" * 70_000, "body_too_large"),
    ],
)
async def test_what_cannot_be_bought(body: bytes, code: str, unmoved: Gateway) -> None:
    async with unmoved.client() as http:
        told = problem(await http.post(PURCHASE, content=body), code)
    if body == b'{"credits": 499}':
        assert told["suggested_credits"] == 500


async def test_a_wallet_to_buy_for_must_be_one(unmoved: Gateway, wallet: Wallet) -> None:
    async with unmoved.client() as http:
        body = b'{"amount_usd": "1"}'
        offer = offers(await http.post(PURCHASE, content=body))[0]
        paid = {"PAYMENT-SIGNATURE": wallet.pay(offer)}
        body = b'{"amount_usd": "1", "wallet_address": "0x12"}'
        problem(await http.post(PURCHASE, content=body, headers=paid), "invalid_request")


async def test_credits_by_number(sqlite_gateway: Gateway, wallet: Wallet) -> None:
    async with sqlite_gateway.client() as http:
        body = b'{"credits": 500}'
        offer = offers(await http.post(PURCHASE, content=body))[0]
        assert offer["amount"] == "5000000"
        paid = {"PAYMENT-SIGNATURE": wallet.pay(offer)}
        answer = await http.post(PURCHASE, content=body, headers=paid)
    assert answer.json()["minted"] == "500"
    assert sqlite_gateway.balance(wallet.address) == (5_000_000, 0)


async def test_other_places_and_methods(unmoved: Gateway, wallet: Wallet) -> None:
    async with unmoved.client() as http:
        problem(await http.get("/farebox/v1/nothing"), "not_found")
        problem(await http.get("/farebox/v1/payments/pay_0"), "not_found")
        told = await http.get(PURCHASE)
        problem(told, "method_not_allowed")
        assert told.headers["allow"] == "POST"
        problem(await http.delete("/v1/x"), "method_not_allowed")
        for target in ("/v1/../v1/x", "/v1//x", "/v1/%2e%2e/x", "/v1/x;y", "/v1/%zz", "/V1\\x"):
            raw = httpx.Request("GET", unmoved.url, extensions={"target": target.encode()})
            problem(await http.send(raw), "invalid_target")


async def test_an_unpaid_402_writes_nothing(unmoved: Gateway, api: Api, target: str) -> None:
    async with unmoved.client() as http:
        for _ in range(5):
            asked = await http.get(target, headers={"Accept": "application/json"})
            told = problem(asked, "payment_required")
            assert asked.headers["cache-control"] == "no-store"
            first, *packs = offers(asked)
            assert first["amount"] == str(PRICE_UNITS)
            assert [pack["amount"] for pack in packs] == ["1000000", "5000000", "20000000"]
            assert {offer["extra"]["paymentFlow"] for offer in (first, *packs)} == {"upfront"}
            assert [v1["maxAmountRequired"] for v1 in told["accepts"]] == [str(PRICE_UNITS)]
            assert told["accepts"][0]["resource"] == unmoved.url + target
            assert "PAYMENT-REQUIRED" in asked.headers["access-control-expose-headers"]
    assert api.calls(target) == 0


async def test_a_402_offers_what_covers_the_shortfall(
    sqlite_gateway: Gateway, wallet: Wallet
) -> None:
    async with sqlite_gateway.client() as http:
        await buy(http, wallet, "0.010000")
        url = sqlite_gateway.url + "/v1/x"
        assert (await http.get("/v1/x", headers=wallet.sign("GET", url))).status_code == 200
        answer = await http.get("/v1/x", headers=wallet.sign("GET", url))
    told = problem(answer, "insufficient_credits")
    assert told["credits"]["balance_units"] == 0
    assert told["credits"]["shortfall_units"] == PRICE_UNITS
    assert told["credits"]["shortfall"] == "1"
