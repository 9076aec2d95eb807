"""The 402: one answer that v1 and v2 clients read alike, and that costs nothing to ask for."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chain.networks import NETWORKS, network
from gateway.app import build, close_node, open_node
from gateway.errors import Problem
from gateway.money import format_credits, format_usd
from gateway.node import Node
from gateway.payments import challenge, offers
from gateway.payments.offers import Asked
from gateway.settings import Settings
from tests.gateway.payments.parts import KEYS, PAY_TO, SETTLER_KEY, settings_for

NOW_S = 1_800_000_000
URL = "http://shop.test"
ASKED = Asked("GET", b"/v1/forecast/oslo?days=3", 2_000)
SHOP = settings_for()
DOLLAR = 1_000_000


def required(problem: Problem) -> dict[str, Any]:
    """PAYMENT-REQUIRED, as a v2 client reads it."""
    found: dict[str, Any] = json.loads(
        base64.b64decode(problem.headers["PAYMENT-REQUIRED"], validate=True)
    )
    assert found["x402Version"] == 2
    return found


def without_token(offer: dict[str, Any]) -> dict[str, Any]:
    return {**offer, "extra": {k: v for k, v in offer["extra"].items() if k != "offer"}}


def for_call(asked: Asked = ASKED, shop: Settings = SHOP, **options: Any) -> Problem:
    return challenge.for_call(shop, KEYS, asked, NOW_S, **options)


# --- one answer for all ---------------------------------------------------------------------


def same_in_both(problem: Problem) -> None:
    """The v1 body asks for what the first v2 offer on a v1 network asks for."""
    new, old = required(problem), problem.members
    assert old["x402Version"] == 1
    assert old["error"] == new["error"]
    first = next(o for o in new["accepts"] if network(o["network"]).v1_name is not None)
    (only,) = old["accepts"]
    assert only["network"] == network(first["network"]).v1_name
    assert only["maxAmountRequired"] == first["amount"]
    for name in ("scheme", "asset", "payTo", "maxTimeoutSeconds"):
        assert only[name] == first[name]
    assert only["extra"] == {name: first["extra"][name] for name in ("name", "version")}
    resource = new["resource"]
    assert (only["resource"], only["description"]) == (resource["url"], resource["description"])
    assert only["mimeType"] == resource["mimeType"]
    assert all(isinstance(only[name], str) for name in ("description", "mimeType", "resource"))


@given(
    price=st.integers(0, 5 * DOLLAR),
    balance=st.none() | st.integers(0, 5 * DOLLAR),
    needed=st.none() | st.integers(0, 30 * DOLLAR),
    description=st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
)
@settings(max_examples=200, deadline=None)
def test_v1_body_and_v2_header_tell_the_same_terms(
    price: int, balance: int | None, needed: int | None, description: str
) -> None:
    problem = for_call(
        Asked("POST", b"/x", price),
        balance_units=balance,
        needed_units=needed,
        description=description,
    )
    same_in_both(problem)
    accepts = required(problem)["accepts"]
    cost = price if needed is None else needed
    missing = max(cost - (balance or 0), 0)
    # The call itself first; then the packs that cover what is missing, and none that does not.
    assert int(accepts[0]["amount"]) == max(cost, 10_000)
    packs = [DOLLAR, 5 * DOLLAR, 20 * DOLLAR]
    wanted = [p for p in packs if p >= missing and p != max(cost, 10_000)]
    assert [int(offer["amount"]) for offer in accepts[1:]] == wanted
    told = problem.members["credits"]
    assert (told["price_units"], told["balance_units"]) == (cost, balance or 0)
    assert told["shortfall_units"] == missing
    for name in ("price", "balance", "shortfall"):
        assert told[name] == format_credits(told[f"{name}_units"], told["per_usd"])
    assert problem.code == ("payment_required" if balance is None else "insufficient_credits")
    assert problem.status == 402


@given(st.integers(10_000, 100_000 * DOLLAR))
@settings(max_examples=100, deadline=None)
def test_a_purchase_is_offered_exactly(units: int) -> None:
    problem = challenge.for_credits(SHOP, KEYS, Asked("POST", b"/buy", 0), NOW_S, units)
    same_in_both(problem)
    assert [offer["amount"] for offer in required(problem)["accepts"]] == [str(units)]
    assert problem.code == "payment_required"


def test_a_network_without_a_v1_name_is_for_v2_clients_only() -> None:
    """One name that a v1 client does not know makes it throw away the whole answer."""
    unnamed = [name for name, row in NETWORKS.items() if row.v1_name is None]
    assert unnamed
    chain = {"rpc": ["http://x.test"], "pay_to": PAY_TO, "settler_key": SETTLER_KEY}
    only = for_call(shop=settings_for(chains={unnamed[0]: chain}))
    assert only.members["accepts"] == []
    assert required(only)["accepts"][0]["network"] == NETWORKS[unnamed[0]].caip2
    both = for_call(shop=settings_for(chains={unnamed[0]: chain, "base": chain}))
    assert [offer["network"] for offer in both.members["accepts"]] == ["base"]
    assert len({offer["network"] for offer in required(both)["accepts"]}) == 2


def test_every_offer_can_be_paid_at_its_price() -> None:
    """What the header carries is what ``x402.pay`` opens again."""
    problem = for_call(needed_units=9_000)
    chain = SHOP.chains[0]
    for n, offer in enumerate(required(problem)["accepts"]):
        candidates = [
            offers.Terms(
                chain,
                offer["asset"].lower(),
                offer["payTo"].lower(),
                int(offer["amount"]),
                purpose,
                offer["maxTimeoutSeconds"],
            )
            for purpose in (offers.CALL, offers.CREDITS)
        ]
        token = offer["extra"]["offer"]
        found = offers.unseal(KEYS, token, ASKED, candidates, NOW_S)
        assert (found.price_units, found.expiry_s) == (ASKED.price_units, NOW_S + 120)
        assert found.terms.purpose == (offers.CALL if n == 0 else offers.CREDITS)


def test_a_402_that_is_asked_for_again_has_the_same_terms_and_another_token() -> None:
    """Official clients pay the first of two 402s on the terms of the second, or the other way."""
    one, two = for_call(balance_units=5), for_call(balance_units=5)
    first, second = required(one), required(two)
    assert [without_token(o) for o in first["accepts"]] == [
        without_token(o) for o in second["accepts"]
    ]
    tokens = [o["extra"]["offer"] for o in first["accepts"] + second["accepts"]]
    assert len(set(tokens)) == len(tokens)
    assert {k: v for k, v in first.items() if k != "accepts"} == {
        k: v for k, v in second.items() if k != "accepts"
    }
    assert (one.members, one.detail, one.next_actions) == (
        two.members,
        two.detail,
        two.next_actions,
    )


def test_only_ascii_goes_into_the_header() -> None:
    """Whatever a description says, in any script."""
    words = 'λ – "quoted" \\ <b>\u2028 🙂'
    problem = for_call(description=words)
    assert problem.headers["PAYMENT-REQUIRED"].isascii()
    assert required(problem)["resource"]["description"] == words
    asked = Asked("GET", b'/a%20b/"q"?x=\\&<>', 2_000)
    assert required(for_call(asked))["resource"]["url"] == URL + '/a%20b/"q"?x=\\&<>'


# --- words ----------------------------------------------------------------------------------


def test_the_change_of_a_small_call_is_told_before_anything_is_signed() -> None:
    """Two tenths of a cent cost one cent on chain; the rest stays the payer's."""
    detail = for_call().detail
    assert "0.2 credits ($0.002)" in detail
    assert "$0.01" in detail and "0.8 credits ($0.008)" in detail
    assert "smallest payment" not in for_call(Asked("GET", b"/x", 10_000)).detail


def test_who_is_known_is_told_the_balance() -> None:
    assert "The balance is 0.1 credits ($0.001)" in for_call(balance_units=1_000).detail
    assert "sign the request" in for_call().detail


def test_a_refusal_keeps_its_code_and_words_and_brings_new_offers() -> None:
    refusal = Problem(
        "insufficient_funds",
        "The wallet is empty.",
        headers={"PAYMENT-RESPONSE": "abc"},
        members={"payment_id": "pay_1"},
    )
    for problem in (
        for_call(refusal=refusal),
        challenge.for_credits(SHOP, KEYS, ASKED, NOW_S, DOLLAR, refusal=refusal),
    ):
        assert (problem.code, problem.detail) == ("insufficient_funds", "The wallet is empty.")
        assert problem.headers["PAYMENT-RESPONSE"] == "abc"
        assert problem.members["payment_id"] == "pay_1"
        assert required(problem)["error"] == "insufficient_funds: The wallet is empty."
        same_in_both(problem)
    assert refusal.members == {"payment_id": "pay_1"} and "PAYMENT-REQUIRED" not in refusal.headers


@pytest.mark.parametrize("refusal", [None, Problem("insufficient_funds", "The wallet is empty.")])
def test_a_client_without_header_fields_can_buy(refusal: Problem | None) -> None:
    asked = Asked("POST", b"/buy", 0)
    problem = challenge.for_credits(SHOP, KEYS, asked, NOW_S, DOLLAR, refusal=refusal)
    assert problem.members["payment_required"] == required(problem)
    assert [action.url for action in problem.next_actions] == [URL + "/buy"] * 2
    assert "paymentPayload" in problem.next_actions[1].send
    assert "payment_required" not in for_call().members


def test_where_else_to_pay_is_told() -> None:
    plain = for_call().members["pay"]
    assert plain["purchase"] == f"{URL}/farebox/v1/credits/purchase"
    assert plain["usdc"] == {
        "network": "eip155:84532",
        "asset": SHOP.chains[0].network.usdc.address,
        "pay_to": PAY_TO,
        "amount_units": 10_000,
    }
    assert "card" not in plain
    with_cards = settings_for(stripe={"secret_key": "sk_test_x", "webhook_secret": "whsec_x"})
    assert for_call(shop=with_cards).members["pay"]["card"] == f"{URL}/farebox/buy"
    actions = for_call().next_actions
    assert [(a.method, a.url) for a in actions] == [
        ("GET", URL + ASKED.target.decode()),
        ("POST", f"{URL}/farebox/v1/credits/purchase"),
    ]
    assert format_usd(DOLLAR).removeprefix("$") in actions[1].send


# --- nothing is written ---------------------------------------------------------------------


@pytest.fixture
async def node(db_url: str, tmp_path: Path) -> AsyncIterator[Node]:
    """A whole gateway whose chain, upstream and card provider nobody answers for."""
    shop = settings_for(
        server={"database": db_url},
        stripe={
            "secret_key": "sk_test_x",
            "webhook_secret": "whsec_x",
            "api_base": "http://127.0.0.1:1",
        },
    )
    opened = await open_node(shop)
    yield opened
    await close_node(opened)


TABLES = {
    "sqlite": "SELECT name FROM sqlite_master WHERE type = 'table'",
    "postgres": "SELECT tablename FROM pg_tables WHERE schemaname = 'public'",
}


async def contents(node: Node) -> dict[str, list[str]]:
    """Every row of every table there is."""
    async with node.db.read() as tx:
        names = [row[0] for row in await tx.fetch(TABLES[tx.dialect])]
        return {
            name: sorted(repr(list(row)) for row in await tx.fetch(f"SELECT * FROM {name}"))
            for name in names
        }


async def test_asking_for_prices_writes_nothing_and_asks_nobody(node: Node) -> None:
    """No row, no Stripe session, no call to a chain: whoever asks costs us a few signatures."""
    before = await contents(node)
    assert before["mac_key"] and before.keys() >= {"payment", "provider_event", "hold", "answer"}
    transport = httpx.ASGITransport(build(node))
    async with httpx.AsyncClient(transport=transport, base_url=URL) as http:
        for n in range(5):
            call = await http.get(f"/v1/forecast/{n}")
            purchase = await http.post("/farebox/v1/credits/purchase", json={"amount_usd": "5"})
            for answer in (call, purchase):
                assert answer.status_code == 402, answer.text
                assert answer.headers["cache-control"] == "no-store"
                assert json.loads(base64.b64decode(answer.headers["payment-required"]))["accepts"]
    assert await contents(node) == before


# --- when gas is dear -------------------------------------------------------------------------


FLOORS = ((network("base-sepolia").caip2, 30_000),)


def test_a_call_that_is_not_worth_its_gas_is_offered_with_the_smallest_pack() -> None:
    """Said in words and to programs; what a payer sends itself is taken at the usual amount."""
    problem = for_call(floors=FLOORS)
    assert [offer["amount"] for offer in required(problem)["accepts"]] == [
        "1000000",
        "5000000",
        "20000000",
    ]
    same_in_both(problem)
    assert "Gas is dear on base-sepolia now: payments below $0.03 are not settled" in problem.detail
    assert "The smallest payment settled is $1" in problem.detail
    assert problem.members["withheld"] == [
        {
            "network": FLOORS[0][0],
            "reason": "gas_price",
            "below_usd": "$0.03",
            "below_units": 30_000,
        }
    ]
    assert problem.members["pay"] == for_call().members["pay"]


def test_nothing_is_said_where_nothing_is_withheld() -> None:
    dearer = Asked("GET", b"/x", 30_000)
    with_floor, without = for_call(dearer, floors=FLOORS), for_call(dearer)
    assert with_floor.detail == without.detail
    assert "withheld" not in with_floor.members
    assert [without_token(o) for o in required(with_floor)["accepts"]] == [
        without_token(o) for o in required(without)["accepts"]
    ]


def test_when_no_payment_is_worth_its_gas_the_other_ways_stay() -> None:
    problem = for_call(floors=((FLOORS[0][0], 21_000_000),))
    assert required(problem)["accepts"] == problem.members["accepts"] == []
    assert problem.members["withheld"][0]["below_usd"] == "$21"
    assert problem.members["pay"] == for_call().members["pay"]


@pytest.mark.parametrize(("units", "offered"), [(29_999, False), (30_000, True)])
def test_credits_below_the_floor_are_not_offered(units: int, offered: bool) -> None:
    asked = Asked("POST", b"/buy", 0)
    problem = challenge.for_credits(SHOP, KEYS, asked, NOW_S, units, floors=FLOORS)
    assert bool(required(problem)["accepts"]) is offered
    assert ("withheld" in problem.members) is not offered
    assert ("purchase_id" in problem.members) is offered
    assert ("Gas is dear" in problem.detail) is not offered
    assert problem.members["pay"]["usdc"]["amount_units"] == units
