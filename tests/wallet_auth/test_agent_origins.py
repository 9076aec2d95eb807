"""What a client believes of one server counts for that server: its clock, its credentials."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.wallet_auth.shop import (
    Answer,
    Script,
    Seen,
    Shop,
    asks,
    open_shop,
    read_payment,
    settled,
)
from tests.wallet_auth.support import KEY
from wallet_auth.agent import WalletAuth
from wallet_auth.origins import CREDENTIAL_S, Origins
from wallet_auth.recovery import MAX_SKEW_S

CREDENTIAL = "fbx_c_" + "A" * 43
OTHER = "fbx_c_" + "B" * 43


@pytest.fixture
def shop() -> Iterator[Shop]:
    with open_shop() as shop:
        yield shop


@pytest.fixture
def evil() -> Iterator[Shop]:
    with open_shop() as shop:
        yield shop


def get(auth: WalletAuth, url: str, **options: Any) -> httpx.Response:
    redirects = options.pop("follow_redirects", False)
    with httpx.Client(auth=auth, trust_env=False, follow_redirects=redirects) as http:
        return http.get(url, **options)


def refused(url: str, status: int = 401, **said: Any) -> Answer:
    action = {"do": "sign", "method": "GET", "url": url, "send": ""}
    told = {"code": "signature_expired", "next_actions": [action], **said}
    return Answer(status, {"Content-Type": "application/problem+json"}, json.dumps(told).encode())


def created_s(seen: Seen) -> int:
    """When the signature says that it was made."""
    text = seen.header("signature-input") or ""
    (found,) = re.findall(r";created=(\d+)", text)
    return int(found)


def ahead_by(shop: Shop, skew_s: int, **said: Any) -> Script:
    """A server whose clock is ahead of ours, and that tells so as a gateway does."""
    shop.checks = False  # by our clock they would be wrong

    def script(seen: Seen) -> Answer:
        now_s = int(time.time()) + skew_s
        if abs(created_s(seen) - now_s) < 200:
            return Answer(200)
        return refused(shop.url + seen.target, **{"now_s": now_s, **said})

    return script


def test_a_clock_counts_for_its_own_origin(shop: Shop, evil: Shop) -> None:
    evil.script = ahead_by(evil, 5_000)
    shop.script = ahead_by(shop, 0)
    auth = WalletAuth(KEY)
    assert get(auth, evil.url + "/a").status_code == 200
    assert len(evil.seen) == 2
    assert get(auth, shop.url + "/a").status_code == 200
    assert len(shop.seen) == 1  # signed by our own clock
    assert get(auth, evil.url + "/b").status_code == 200
    assert len(evil.seen) == 3  # and there by theirs, at once


def test_a_clock_that_goes_right_again_is_set_back(shop: Shop) -> None:
    auth = WalletAuth(KEY)
    shop.script = ahead_by(shop, 5_000)
    assert get(auth, shop.url + "/a").status_code == 200
    shop.script = ahead_by(shop, 0, code="signature_not_yet_valid")
    assert get(auth, shop.url + "/a").status_code == 200
    assert len(shop.seen) == 4
    assert get(auth, shop.url + "/a").status_code == 200
    assert len(shop.seen) == 5


@pytest.mark.parametrize(
    ("skew_s", "said"),
    [
        (5_000, {"code": "identity_unsupported"}),
        (5_000, {"code": "signature_invalid"}),
        (5_000, {"status": 409}),
        (5_000, {"code": "signature_not_yet_valid"}),  # its clock says the contrary
        (MAX_SKEW_S + 1_000, {}),
        (-MAX_SKEW_S - 1_000, {"code": "signature_not_yet_valid"}),
    ],
)
def test_nobody_else_sets_it(shop: Shop, skew_s: int, said: dict[str, Any]) -> None:
    shop.script = ahead_by(shop, skew_s, **said)
    assert get(WalletAuth(KEY), shop.url).status_code == said.get("status", 401)
    assert all(abs(created_s(seen) - time.time()) < 400 for seen in shop.seen)
    assert len(shop.seen) == 3


def test_a_server_that_we_were_sent_on_to_tells_nothing(shop: Shop, evil: Shop) -> None:
    shop.script = lambda _: Answer(307, {"Location": evil.url + "/x"})
    evil.checks = False  # what is signed for one server is not good at another
    evil.script = lambda _: refused(shop.url + "/a", now_s=int(time.time()) + 5_000)
    answer = get(WalletAuth(KEY), shop.url + "/a", follow_redirects=True)
    assert answer.status_code == 401
    assert (len(shop.seen), len(evil.seen)) == (1, 1)


# -- credentials --------------------------------------------------------------------------------


class Till:
    """A shop whose payments bring a credential that is good for so many calls."""

    def __init__(self, credential: str = CREDENTIAL, good_for: int = 2) -> None:
        self.credential, self.left, self._good_for = credential, 0, good_for

    def __call__(self, seen: Seen) -> Answer:
        shown = seen.header("authorization")
        if shown is not None:
            assert shown == f"Bearer {self.credential}"
            assert read_payment(seen) is None
            self.left -= 1
            return Answer(200) if self.left >= 0 else asks()
        if read_payment(seen) is None:
            return asks()
        self.left = self._good_for
        paid = settled()
        return Answer(200, {**paid.headers, "Farebox-Credential": self.credential}, paid.body)


def test_a_credential_spends_what_the_payment_left(shop: Shop, evil: Shop) -> None:
    shop.script = Till()
    auth = WalletAuth(KEY, signs=False)
    assert [get(auth, shop.url).status_code for _ in range(4)] == [200] * 4
    told = [(s.header("authorization") is not None, bool(read_payment(s))) for s in shop.seen]
    assert told == [
        (False, False),  # 402
        (False, True),  # paid
        (True, False),
        (True, False),
        (True, False),  # spent: 402
        (False, True),
    ]
    assert auth.signed_units == 20_000
    assert all(seen.header("signature-input") is None for seen in shop.seen)
    # One id for each call, so that a repeat of it is none.
    ids = [s.header("idempotency-key") for s in shop.seen]
    assert [key is not None for key in ids] == [bearer for bearer, _ in told]
    assert len({key for key in ids if key}) == 3
    evil.script = lambda _: Answer(200)
    assert get(auth, evil.url).status_code == 200
    assert evil.seen[0].header("authorization") is None
    assert CREDENTIAL not in repr(vars(auth))


def test_a_credential_that_is_refused_is_forgotten(shop: Shop) -> None:
    shop.script = Till()
    auth = WalletAuth(KEY, signs=False)
    assert get(auth, shop.url).status_code == 200

    def over(seen: Seen) -> Answer:
        if seen.header("authorization") is None:
            return Answer(200)
        return refused(shop.url + seen.target, code="credential_invalid")

    shop.script = over
    del shop.seen[:]
    assert get(auth, shop.url).status_code == 200
    assert get(auth, shop.url).status_code == 200
    assert [s.header("authorization") is not None for s in shop.seen] == [True, False, False]


@pytest.mark.parametrize("given", ["fbx_c_short", CREDENTIAL + "x", "Basic eA==", "fbx_k_1"])
def test_what_is_no_credential_is_not_kept(shop: Shop, given: str) -> None:
    shop.script = Till(given)
    auth = WalletAuth(KEY, signs=False)
    assert get(auth, shop.url).status_code == 200
    shop.script = lambda _: Answer(200)
    assert get(auth, shop.url).status_code == 200
    assert shop.seen[-1].header("authorization") is None


def test_a_credential_of_a_server_that_we_were_sent_on_to_is_not_kept(
    shop: Shop, evil: Shop
) -> None:
    evil.script = lambda _: Answer(200, {**settled().headers, "Farebox-Credential": CREDENTIAL})

    def on(seen: Seen) -> Answer:
        return Answer(307, {"Location": evil.url}) if read_payment(seen) else asks()

    shop.script = on
    auth = WalletAuth(KEY, signs=False)
    assert get(auth, shop.url, follow_redirects=True).status_code == 200
    shop.script = lambda _: Answer(200)
    get(auth, shop.url)
    assert shop.seen[-1].header("authorization") is None


@pytest.mark.parametrize("signs", [True, False])
def test_a_key_that_the_caller_brings_is_sent_as_it_is(shop: Shop, signs: bool) -> None:
    shop.script = lambda _: asks()
    auth = WalletAuth(KEY, signs=signs)
    answer = get(auth, shop.url, headers={"Authorization": f"Bearer {OTHER}"})
    assert answer.status_code == 402
    (seen,) = shop.seen
    assert seen.header("authorization") == f"Bearer {OTHER}"
    assert seen.header("signature-input") is None
    assert auth.signed_units == 0


def test_an_authorization_for_the_api_behind_stays(shop: Shop) -> None:
    shop.script = Till()
    auth = WalletAuth(KEY, signs=False)
    assert get(auth, shop.url).status_code == 200
    shop.script = lambda _: Answer(200)
    get(auth, shop.url, headers={"Authorization": "Bearer of-the-api"})
    assert shop.seen[-1].header("authorization") == "Bearer of-the-api"
    signing = WalletAuth(KEY)
    get(signing, shop.url, headers={"Authorization": "Bearer of-the-api"})
    assert shop.seen[-1].header("authorization") == "Bearer of-the-api"
    assert shop.seen[-1].signer is not None


# -- the memory itself --------------------------------------------------------------------------


def test_what_is_remembered_is_bounded() -> None:
    origins = Origins(3)
    for name in "abc":
        origins.set_skew(name, 7)
    assert origins.skew_s("a") == 7  # asked for: the last to go
    origins.set_skew("d", 7)
    assert [origins.skew_s(name) for name in "abcd"] == [7, 0, 7, 7]
    for n in range(1_000):
        assert origins.skew_s(f"never heard {n}") == 0
        origins.set_skew(f"right {n}", 0)
    assert len(origins) == 3


def test_an_hour_ends() -> None:
    origins = Origins()
    assert origins.keep_credential("a", CREDENTIAL, 10.0)
    assert origins.credential("a", 10.0 + CREDENTIAL_S - 1) == CREDENTIAL
    assert origins.credential("a", 10.0 + CREDENTIAL_S) == ""
    assert not origins.keep_credential("a", CREDENTIAL + "\n", 10.0)


def test_another_that_came_meanwhile_stays() -> None:
    origins = Origins()
    origins.keep_credential("a", CREDENTIAL, 0.0)
    origins.keep_credential("a", OTHER, 0.0)
    origins.drop_credential("a", CREDENTIAL)
    assert origins.credential("a", 1.0) == OTHER
    origins.drop_credential("a", OTHER)
    origins.drop_credential("b", OTHER)
    assert origins.credential("a", 1.0) == ""
    assert len(origins) == 1


def test_several_threads_share_it() -> None:
    origins = Origins(2)

    def go(mine: str) -> None:
        for n in range(500):
            origins.set_skew(f"{mine}{n}", 1)
            origins.skew_s(f"{mine}{n - 1}")

    threads = [threading.Thread(target=go, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(origins) == 2
