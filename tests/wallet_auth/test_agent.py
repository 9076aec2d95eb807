"""The client half over real HTTP: httpx and httpx2, sync and async, against a scripted shop."""

from __future__ import annotations

import asyncio
import json
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import httpx
import httpx2
import pytest

from tests.wallet_auth.shop import (
    Answer,
    Seen,
    Shop,
    asks,
    encode,
    open_shop,
    pay_then_serve,
    pending,
    read_payment,
    settled,
    terms,
)
from tests.wallet_auth.support import ADDRESS, KEY
from wallet_auth.agent import PENDING_TRIES, WalletAuth, new_request_id, pay
from wallet_auth.told import pending_delay

Send = Callable[..., Any]


class Events:
    """What the agent told, in order."""

    def __init__(self) -> None:
        self.all: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, kind: str, facts: Mapping[str, Any]) -> None:
        self.all.append((kind, dict(facts)))

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.all]


@pytest.fixture
def shop() -> Iterator[Shop]:
    with open_shop() as shop:
        yield shop


def _sync(client: type[Any]) -> Send:
    def send(auth: WalletAuth, method: str, url: str, **options: Any) -> Any:
        with client(auth=auth, trust_env=False) as http:
            return http.request(method, url, **options)

    return send


def _async(client: type[Any]) -> Send:
    def send(auth: WalletAuth, method: str, url: str, **options: Any) -> Any:
        async def go() -> Any:
            async with client(auth=auth, trust_env=False) as http:
                return await http.request(method, url, **options)

        return asyncio.run(go())

    return send


CLIENTS = {
    "httpx": _sync(httpx.Client),
    "httpx async": _async(httpx.AsyncClient),
    "httpx2": _sync(httpx2.Client),
    "httpx2 async": _async(httpx2.AsyncClient),
}
every_client = pytest.mark.parametrize("send", CLIENTS.values(), ids=CLIENTS)
send_plain = CLIENTS["httpx"]


@every_client
def test_a_request_is_signed(send: Send, shop: Shop) -> None:
    shop.script = lambda _: Answer(200)
    answer = send(WalletAuth(KEY), "GET", shop.url + "/a%20b?q=%2F&r=1")
    assert answer.status_code == 200
    (seen,) = shop.seen
    assert seen.target == "/a%20b?q=%2F&r=1"
    assert seen.signer is not None
    assert (seen.signer.address, seen.signer.kind) == (ADDRESS, "key")
    assert seen.signer.covered == {"@authority", "@method", "@path", "@query"}
    assert 0 < seen.signer.expires_s - seen.signer.created_s <= 300


@every_client
def test_a_402_is_paid_once_with_the_same_request(send: Send, shop: Shop) -> None:
    events = Events()
    body = json.dumps({"text": "é" * 1000}).encode()
    answer = send(
        WalletAuth(KEY, on_event=events),
        "POST",
        shop.url + "/render?a",
        content=body,
        headers={"Content-Type": "application/json", "Farebox-Max": "$0.02", "X-Mine": "1"},
    )
    assert (answer.status_code, answer.json()) == (200, {"ok": True})
    first, second = shop.seen
    for seen in (first, second):
        assert (seen.method, seen.target, seen.body) == ("POST", "/render?a", body)
        assert seen.header("x-mine") == "1"
        assert seen.header("content-type") == "application/json"
        # The payment comes with an identity of the same wallet.
        assert seen.signer is not None
        assert (seen.signer.address, seen.signer.ceiling) == (ADDRESS, "$0.02")
        assert "content-digest" in seen.signer.covered
    assert first.signer is not None
    assert second.signer is not None
    assert first.signer.request_id != second.signer.request_id
    assert read_payment(first) is None
    payload = read_payment(second)
    assert payload is not None
    assert payload["accepted"] == terms()  # the server's token comes back untouched
    assert events.kinds == ["signed", "paying", "signed", "paid"]
    assert events.all[1][1]["amount_units"] == 10_000
    assert KEY[2:] not in repr(events.all)
    assert payload["payload"]["signature"] not in repr(events.all)


@every_client
def test_a_streamed_body_is_sent_again(send: Send, shop: Shop) -> None:
    def parts() -> Iterator[bytes]:
        yield b"one"
        yield b"two"

    async def later() -> AsyncIterator[bytes]:
        yield b"one"
        yield b"two"

    is_async = send in (CLIENTS["httpx async"], CLIENTS["httpx2 async"])
    answer = send(WalletAuth(KEY), "PUT", shop.url, content=later() if is_async else parts())
    assert answer.status_code == 200
    assert [seen.body for seen in shop.seen] == [b"onetwo", b"onetwo"]
    assert all(seen.signer and seen.signer.digests for seen in shop.seen)


@every_client
def test_pending_repeats_the_very_same_payment(send: Send, shop: Shop) -> None:
    events = Events()
    answers = [asks(), pending(), pending("0"), settled()]
    shop.script = lambda _: answers[len(shop.seen) - 1]
    answer = send(WalletAuth(KEY, on_event=events), "POST", shop.url, content=b"x")
    assert answer.status_code == 200
    paid = shop.seen[1:]
    assert len(paid) == 3
    assert paid[0] == paid[1] == paid[2]  # every byte, the request id too
    assert len({seen.header("payment-signature") for seen in paid}) == 1
    assert events.kinds == ["signed", "paying", "signed", "pending", "pending", "paid"]


def test_pending_has_an_end(shop: Shop) -> None:
    events = Events()
    shop.script = lambda seen: pending() if read_payment(seen) else asks()
    auth = WalletAuth(KEY, on_event=events)
    answer = send_plain(auth, "GET", shop.url)
    assert answer.status_code == 402
    assert len(shop.seen) == 1 + 1 + PENDING_TRIES
    assert events.kinds[-1] == "pending"
    assert auth.signed_units == 10_000


def test_a_second_402_is_left_to_the_caller(shop: Shop) -> None:
    shop.script = lambda _: asks()
    auth = WalletAuth(KEY)
    answer = send_plain(auth, "GET", shop.url)
    assert answer.status_code == 402
    assert len(shop.seen) == 2
    assert auth.signed_units == 10_000


def test_a_refused_payment_is_told(shop: Shop) -> None:
    events = Events()
    refusal = encode({"success": False, "errorReason": "insufficient_funds", "transaction": ""})
    refused = Answer(402, {"PAYMENT-RESPONSE": refusal})
    shop.script = lambda seen: refused if read_payment(seen) else asks()
    answer = send_plain(WalletAuth(KEY, on_event=events), "GET", shop.url)
    assert answer.status_code == 402
    assert len(shop.seen) == 2
    assert events.all[-1][0] == "refused"
    assert events.all[-1][1]["receipt"]["errorReason"] == "insufficient_funds"


@pytest.mark.parametrize(
    "first",
    [
        Answer(200),
        Answer(200, asks().headers),
        Answer(401),
        Answer(500),
        Answer(402),
        Answer(402, {"PAYMENT-REQUIRED": "%%%"}),
        Answer(402, {"PAYMENT-REQUIRED": encode({"x402Version": 3, "accepts": [terms()]})}),
        asks(terms(amount="1000001")),
        asks(terms(scheme="upto")),
        pending(),
    ],
    ids=[
        "200",
        "200 with a price",
        "401",
        "500",
        "bare 402",
        "no base64",
        "v3",
        "over the cap",
        "upto",
        "pending",
    ],
)
def test_what_is_not_paid(shop: Shop, first: Answer) -> None:
    shop.script = lambda _: first
    auth = WalletAuth(KEY)
    answer = send_plain(auth, "GET", shop.url)
    assert answer.status_code == first.status
    assert len(shop.seen) == 1
    assert auth.signed_units == 0


def test_caps_and_networks_are_the_callers(shop: Shop) -> None:
    shop.script = lambda seen: settled() if read_payment(seen) else asks(terms(amount="5000000"))
    for options, status in (
        ({"max_usd_per_payment": "4.999999"}, 402),
        ({"max_usd_per_payment": "5", "networks": ["eip155:8453"]}, 402),
        ({"max_usd_per_payment": "$5", "networks": ["eip155:84532"]}, 200),
    ):
        answer = send_plain(WalletAuth(KEY, **options), "GET", shop.url)
        assert answer.status_code == status


def test_the_total_is_capped(shop: Shop) -> None:
    events = Events()
    auth = WalletAuth(KEY, max_total_usd="0.02", on_event=events)
    got = [send_plain(auth, "GET", shop.url).status_code for _ in range(3)]
    assert got == [200, 200, 402]
    assert auth.signed_units == 20_000
    assert events.kinds[-1] == "declined"
    assert "total of 20000" in events.all[-1][1]["reasons"][0]


def test_the_total_holds_over_threads(shop: Shop) -> None:
    auth = WalletAuth(KEY, max_total_usd="0.05")
    statuses: list[int] = []

    def go() -> None:
        statuses.append(send_plain(auth, "GET", shop.url).status_code)

    threads = [threading.Thread(target=go) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] * 5 + [402] * 7
    nonces = {
        payload["payload"]["authorization"]["nonce"]
        for seen in shop.seen
        if (payload := read_payment(seen)) is not None
    }
    assert len(nonces) == 5


def test_a_payment_of_the_callers_own_is_not_paid_again(shop: Shop) -> None:
    shop.script = lambda _: asks()
    required = asks().headers["PAYMENT-REQUIRED"]
    payment = pay(KEY, required)
    answer = send_plain(
        WalletAuth(KEY), "GET", shop.url, headers={"PAYMENT-SIGNATURE": payment.header}
    )
    assert answer.status_code == 402
    (seen,) = shop.seen
    assert seen.header("payment-signature") == payment.header
    assert seen.signer is not None


def test_pay_says_why_not() -> None:
    with pytest.raises(ValueError, match="100 may be paid"):
        pay(KEY, asks().headers["PAYMENT-REQUIRED"], max_usd="0.0001")
    with pytest.raises(ValueError, match="there is no offer"):
        pay(KEY, encode({"x402Version": 2, "accepts": []}))
    one, other = (pay(KEY, asks().headers["PAYMENT-REQUIRED"]) for _ in range(2))
    assert one.nonce != other.nonce


def test_a_broken_answer_does_not_lose_the_payment(shop: Shop) -> None:
    """The paid request fails on the wire: the caller hears of it, the cap counts it."""

    def script(seen: Seen) -> Answer:
        if read_payment(seen):
            raise ConnectionAbortedError  # the handler dies, the connection closes
        return asks()

    shop.script = script
    auth = WalletAuth(KEY)
    with pytest.raises(httpx.RemoteProtocolError):
        send_plain(auth, "GET", shop.url)
    assert auth.signed_units == 10_000
    shop.script = pay_then_serve
    assert send_plain(auth, "GET", shop.url).status_code == 200


def test_nothing_secret_in_repr() -> None:
    auth = WalletAuth(KEY, max_total_usd="3")
    shown = f"{auth!r} {auth} {vars(auth)}"
    assert KEY[2:] not in shown
    assert str(int(KEY, 16)) not in shown
    assert ADDRESS in repr(auth)


def test_a_bad_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match="USD"):
        WalletAuth(KEY, max_usd_per_payment="lots")
    with pytest.raises(ValueError, match="USD"):
        WalletAuth(KEY, max_total_usd="-1")
    with pytest.raises(ValueError, match="private key"):
        WalletAuth("0x12")


def test_request_ids_begin_with_the_time() -> None:
    ids = [new_request_id() for _ in range(200)]
    assert len(set(ids)) == 200
    parsed = [uuid.UUID(text) for text in ids]
    assert {(u.version, u.variant) for u in parsed} == {(7, uuid.RFC_4122)}
    stamps = [u.int >> 80 for u in parsed]
    assert stamps == sorted(stamps)


@pytest.mark.parametrize(
    ("headers", "delay"),
    [
        ({"retry-after": "3"}, 3),
        ({"retry-after": "0"}, 0),
        ({"retry-after": "3600"}, 10),
        ({"retry-after": "9" * 5000}, 10),
        ({"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT"}, 2),
        ({}, 2),
    ],
)
def test_delays_are_bounded(headers: dict[str, str], delay: int) -> None:
    receipt = {"payment-response": encode({"success": False, "errorReason": "settlement_pending"})}
    assert pending_delay(httpx.Response(402, headers=receipt | headers)) == delay
    assert pending_delay(httpx.Response(200, headers=receipt | headers)) is None
    both = receipt | headers | {"payment-required": "x"}
    assert pending_delay(httpx.Response(402, headers=both)) is None
    assert pending_delay(httpx.Response(402, headers=headers)) is None
