"""The runners of tests/clients: what the official x402 clients send when they meet a 402."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.wallet_auth.shop import PAY_TO, Answer, Shop, asks, open_shop, read_payment, terms
from tests.wallet_auth.support import ADDRESS, CLIENTS, KEY, node


@pytest.fixture
def shop() -> Iterator[Shop]:
    with open_shop() as shop:
        yield shop


def run(script: str, *arguments: str) -> list[dict[str, Any]]:
    program = sys.executable if script.endswith(".py") else node()
    done = subprocess.run(
        [program, script, *arguments],
        cwd=CLIENTS,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


RUNNERS = {
    "pay_v2.mjs": ("payment-signature", 2),
    "pay_v1.mjs": ("x-payment", 1),
    "pay_py.py": ("payment-signature", 2),
}


@pytest.mark.parametrize("script", RUNNERS)
def test_a_stock_client_pays_with_nothing_but_a_key(script: str, shop: Shop) -> None:
    name, version = RUNNERS[script]
    answers = run(script, f"{shop.url}/x?a=1", KEY, "POST", '{"q":1}', "2")
    assert [(a["status"], json.loads(a["body"])) for a in answers] == [(200, {"ok": True})] * 2
    assert all("payment-response" in a["headers"] for a in answers)
    assert [seen.header(name) is not None for seen in shop.seen] == [False, True, False, True]
    nonces = set()
    for seen in shop.seen:
        assert (seen.method, seen.target, seen.body) == ("POST", "/x?a=1", b'{"q":1}')
        payload = read_payment(seen, name)
        if payload is None:
            continue
        assert payload["x402Version"] == version
        authorization = payload["payload"]["authorization"]
        assert authorization["from"].lower() == ADDRESS
        assert (authorization["to"], authorization["value"]) == (PAY_TO, "10000")
        nonces.add(authorization["nonce"])
        if version == 2:
            assert payload["accepted"] == terms()  # extra.offer comes back untouched
    assert len(nonces) == 2


def test_a_refusal_of_the_client_is_reported(shop: Shop) -> None:
    """Official clients refuse more than a dollar before they sign."""
    shop.script = lambda _: asks(terms(amount="1000001"))
    for script in ("pay_v2.mjs", "pay_py.py"):
        (answer,) = run(script, shop.url, KEY)
        assert set(answer) == {"error"}, answer
    assert all(read_payment(seen) is None for seen in shop.seen)


def test_an_answer_without_a_price_is_passed_on(shop: Shop) -> None:
    shop.script = lambda _: Answer(200, {"Farebox-Charged": "0.2", "X-Other": "1"}, b"hello")
    for script in RUNNERS:
        (answer,) = run(script, shop.url, KEY)
        assert (answer["status"], answer["body"]) == (200, "hello")
        assert answer["headers"] == {"farebox-charged": "0.2"}


def test_the_lock_file_names_no_addresses() -> None:
    lock = json.loads((CLIENTS / "package-lock.json").read_text())
    assert len(lock["packages"]) > 5
    assert all("resolved" not in package for package in lock["packages"].values())
    assert all("integrity" in p for path, p in lock["packages"].items() if path)
