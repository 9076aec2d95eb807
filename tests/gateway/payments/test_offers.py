"""Offer tokens: what was offered can be paid, for that request, at that price, until it expires."""

from __future__ import annotations

import asyncio
import base64
import json
import string
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chain.networks import NETWORKS
from gateway.db import Database
from gateway.errors import Problem
from gateway.payments import offers
from gateway.payments.offers import CALL, CREDITS, Asked, Keys, Opened, Terms, seal, unseal
from gateway.settings import Settings
from tests.gateway.payments.parts import KEYS, PAY_TO, SETTLER_KEY, settings_for
from wallet_auth.keys import checksum

NOW_S = 1_800_000_000
EXPIRY_S = NOW_S + 120
ASKED = Asked("GET", b"/v1/forecast/oslo?days=3", 2_000)
BASE = settings_for().chains[0]
USDC = BASE.network.usdc


def terms(**change: Any) -> Terms:
    made = Terms(BASE, USDC.address, PAY_TO, 10_000, CALL, 120)
    return replace(made, **change)


def sealed(asked: Asked = ASKED, made: Terms | None = None, keys: Keys = KEYS) -> str:
    (token,) = seal(keys, asked, [made or terms()], EXPIRY_S)
    return token


def opened(
    token: str,
    asked: Asked = ASKED,
    candidates: list[Terms] | None = None,
    *,
    keys: Keys = KEYS,
    now_s: int = NOW_S,
) -> Opened:
    return unseal(keys, token, asked, candidates or [terms()], now_s)


def code_of(token: str, *args: Any, **options: Any) -> str:
    with pytest.raises(Problem) as problem:
        opened(token, *args, **options)
    assert problem.value.status == 402
    return problem.value.code


def raw_of(token: str) -> bytes:
    return base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))


def token_of(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


NOT_OURS = "invalid_payment_requirements"

# --- what opens -----------------------------------------------------------------------------


@given(
    method=st.text(string.ascii_uppercase, min_size=1, max_size=12),
    target=st.binary(max_size=200),
    price=st.integers(0, 2**53),
    amount=st.integers(1, 2**60),
    purpose=st.sampled_from([CALL, CREDITS]),
    timeout=st.integers(0, 10**6),
    expiry=st.integers(0, 2**40),
    asked_price=st.integers(0, 2**53),
)
@settings(max_examples=150, deadline=None)
def test_what_was_offered_opens(  # noqa: PLR0917
    method: str,
    target: bytes,
    price: int,
    amount: int,
    purpose: str,
    timeout: int,
    expiry: int,
    asked_price: int,
) -> None:
    """The price in the token wins over what the request would cost now."""
    made = terms(amount_units=amount, purpose=purpose, timeout_s=timeout)
    (token,) = seal(KEYS, Asked(method, target, price), [made], expiry)
    both = [replace(made, purpose=each) for each in (CALL, CREDITS)]
    found = unseal(KEYS, token, Asked(method, target, asked_price), both, expiry)
    assert (found.price_units, found.expiry_s, found.terms) == (price, expiry, made)
    assert found.digest == offers.token_digest(token)
    assert offers.promised_units(token) == price
    assert len(token) < 100 and set(token) <= set(string.ascii_letters + string.digits + "-_")


def test_the_offers_of_one_402_open_in_their_order() -> None:
    several = [terms(), terms(amount_units=1_000_000, purpose=CREDITS), terms(timeout_s=60)]
    tokens = seal(KEYS, ASKED, several, EXPIRY_S)
    assert [opened(t, candidates=several).terms for t in tokens] == several
    assert len(set(tokens)) == 3
    assert seal(KEYS, ASKED, [], EXPIRY_S) == []


def test_no_two_402s_give_the_same_token() -> None:
    """The token is the secret of the first presenter: nobody gets it by asking the same."""
    tokens = {sealed() for _ in range(100)}
    assert len({offers.token_digest(token) for token in tokens}) == 100


def test_it_can_be_paid_until_it_expires() -> None:
    token = sealed()
    assert opened(token, now_s=EXPIRY_S).expiry_s == EXPIRY_S
    assert code_of(token, now_s=EXPIRY_S + 1) == "offer_expired"


def test_what_is_not_ours_is_not_called_expired() -> None:
    """Whether an old token was ours is told to nobody who could not have had it."""
    assert code_of(sealed(), terms_for("POST"), now_s=EXPIRY_S + 1) == NOT_OURS


def terms_for(method: str) -> Asked:
    return replace(ASKED, method=method)


# --- what does not --------------------------------------------------------------------------


def test_any_changed_bit_is_refused() -> None:
    raw = raw_of(sealed())
    for at in range(len(raw)):
        for bit in range(8):
            changed = raw[:at] + bytes((raw[at] ^ 1 << bit,)) + raw[at + 1 :]
            assert code_of(token_of(changed)) == NOT_OURS, (at, bit)


def test_any_other_length_is_refused() -> None:
    raw = raw_of(sealed())
    for size in range(len(raw)):
        assert code_of(token_of(raw[:size])) == NOT_OURS
    assert code_of(token_of(raw + b"\0")) == NOT_OURS
    assert code_of(token_of(raw + raw)) == NOT_OURS


@given(st.text(st.characters(max_codepoint=127), max_size=120))
@settings(max_examples=200, deadline=None)
def test_any_text_is_refused_and_has_a_digest(text: str) -> None:
    assert code_of(text) == NOT_OURS
    assert len(offers.token_digest(text)) == 32


def test_another_spelling_of_a_token_is_no_token() -> None:
    """Padding, the other alphabet, spare bits: whoever changes a character has changed it."""
    token = sealed()
    for _ in range(50):
        if "-" in token or "_" in token:
            break
        token = sealed()
    others = [token + "=", token.replace("-", "+").replace("_", "/")]
    spare = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"
    others.append(token[:-1] + spare[spare.index(token[-1]) ^ 1])
    for other in others:
        assert other != token
        with pytest.raises(Problem) as caught:
            opened(other)
        assert caught.value.code == "invalid_payment_requirements"
        assert offers.token_digest(other) != offers.token_digest(token) == opened(token).digest


OTHER_REQUESTS = [
    terms_for("HEAD"),
    terms_for("get"),
    terms_for("GET "),
    replace(ASKED, target=b"/v1/forecast/oslo?days=4"),
    replace(ASKED, target=b"/v1/forecast/oslo"),
    replace(ASKED, target=b""),
    # The same bytes in a row, cut elsewhere.
    Asked("GE", b"T/v1/forecast/oslo?days=3", 2_000),
    Asked("GET/", b"v1/forecast/oslo?days=3", 2_000),
]


@pytest.mark.parametrize("other", OTHER_REQUESTS, ids=repr)
def test_another_request_is_refused(other: Asked) -> None:
    token = sealed()
    assert opened(token).terms == terms()
    assert code_of(token, other) == NOT_OURS
    assert code_of(sealed(other), ASKED) == NOT_OURS


OTHER_CHAIN = settings_for(
    chains={"base": {"rpc": ["http://x.test"], "pay_to": PAY_TO, "settler_key": SETTLER_KEY}}
).chains[0]


@pytest.mark.parametrize(
    "change",
    [
        {"amount_units": 9_999},
        {"amount_units": 100_000},
        {"purpose": CREDITS},
        {"timeout_s": 121},
        {"timeout_s": -120},
        {"pay_to": "0x" + "ac" * 20},
        {"asset": "0x" + "12" * 20},
        {"chain": OTHER_CHAIN},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_terms_are_refused(change: dict[str, Any]) -> None:
    other = terms(**change)
    assert code_of(sealed(), candidates=[other]) == NOT_OURS
    assert code_of(sealed(made=other)) == NOT_OURS
    assert opened(sealed(), candidates=[other, terms()]).terms == terms()


def test_terms_are_sealed_with_their_lengths() -> None:
    """Digits do not move from one part to the next."""
    one = terms(amount_units=1, purpose="00", timeout_s=2)
    two = terms(amount_units=10, purpose="0", timeout_s=2)
    assert one.sealed() != two.sealed()


def test_another_deployment_with_the_same_key_is_refused() -> None:
    """A database copied for a test still has the keys."""
    assert code_of(sealed(), keys=replace(KEYS, deployment="d-other")) == NOT_OURS


def test_no_candidate_opens_nothing() -> None:
    with pytest.raises(Problem):
        unseal(KEYS, sealed(), ASKED, [], NOW_S)


# --- keys -----------------------------------------------------------------------------------


def test_a_new_key_seals_and_the_old_one_still_opens() -> None:
    old, new = b"\0\0\0\1", b"\0\0\0\2"
    rotated = Keys(KEYS.deployment, {old: KEYS.secrets[old], new: b"n" * 32}, new)
    before, after = sealed(), sealed(keys=rotated)
    assert opened(before, keys=rotated).terms == opened(after, keys=rotated).terms == terms()
    # A node that has not read the new key yet, and one that has dropped the old one.
    assert code_of(after, keys=KEYS) == NOT_OURS
    dropped = Keys(KEYS.deployment, {new: b"n" * 32}, new)
    assert code_of(before, keys=dropped) == NOT_OURS
    assert opened(after, keys=dropped).terms == terms()


def test_the_same_id_with_another_secret_opens_nothing() -> None:
    other = Keys(KEYS.deployment, {KEYS.current: b"x" * 32}, KEYS.current)
    assert code_of(sealed(), keys=other) == NOT_OURS


def test_secrets_are_not_shown() -> None:
    assert "kkkk" not in repr(KEYS) and "kkkk" not in str(KEYS)


async def test_nodes_that_start_together_share_one_key(db_url: str) -> None:
    nodes = [await Database.connect(db_url, wait_s=20) for _ in range(4)]
    found = await asyncio.gather(*(offers.load_keys(node) for node in nodes))
    again = await offers.load_keys(nodes[0])
    assert all(keys == again for keys in found)
    assert len(again.secrets) == 1 and len(again.secrets[again.current]) == 32
    assert opened(sealed(keys=found[0]), keys=found[3]).terms == terms()
    for node in nodes:
        await node.close()


async def test_the_newest_key_of_the_database_is_used(db_url: str) -> None:
    db = await Database.connect(db_url)
    first = await offers.load_keys(db)
    token = sealed(keys=first)
    async with db.write() as tx:
        await tx.execute(
            "INSERT INTO mac_key (id, secret, created_at_ms) VALUES ('0000000a', $1, $2)",
            b"2" * 32,
            await tx.now_ms() + 1,
        )
    rotated = await offers.load_keys(db)
    assert rotated.current == b"\0\0\0\x0a"
    assert rotated.deployment == first.deployment
    assert rotated.secrets == {**first.secrets, b"\0\0\0\x0a": b"2" * 32}
    assert opened(token, keys=rotated).terms == terms()
    await db.close()


# --- what is offered ------------------------------------------------------------------------


def two_chains(**settler: Any) -> Settings:
    """Base Sepolia from one cent, Base from five; Base settles here unless told otherwise."""
    both = {
        name: {
            "rpc": ["http://127.0.0.1:1"],
            "pay_to": PAY_TO,
            "settler_key": SETTLER_KEY,
            "min_onchain": least,
        }
        for name, least in (("base-sepolia", "$0.01"), ("base", "$0.05"))
    }
    if not settler.get("base", True):
        del both["base"]["settler_key"]
    return settings_for(chains=both)


TWO = two_chains()


@given(st.integers(0, 30_000_000), st.integers(0, 30_000_000))
@settings(max_examples=200, deadline=None)
def test_every_offer_for_a_call_pays_for_it(price: int, shortfall: int) -> None:
    """A pack that does not cover what is missing would be paid and refused."""
    found = offers.terms_for_call(TWO, price, shortfall)
    calls, packs = found[:2], found[2:]
    assert [(t.chain.name, t.amount_units) for t in calls] == [
        ("base-sepolia", max(price, 10_000)),
        ("base", max(price, 50_000)),
    ]
    assert {t.purpose for t in calls} == {CALL}
    assert {t.purpose for t in packs} <= {CREDITS}
    wanted = [units for units in (1_000_000, 5_000_000, 20_000_000) if units >= shortfall]
    assert {t.amount_units for t in packs} == set(wanted) - {price}
    assert len({(t.chain.name, t.amount_units) for t in found}) == len(found)
    assert all(t.pay_to == PAY_TO and t.asset == t.chain.network.usdc.address for t in found)


@pytest.mark.parametrize(("shortfall", "least"), [(1_000_000, 1_000_000), (1_000_001, 5_000_000)])
def test_a_pack_of_exactly_what_is_missing_is_offered(shortfall: int, least: int) -> None:
    packs = [t for t in offers.terms_for_call(TWO, 7, shortfall) if t.purpose == CREDITS]
    assert min(t.amount_units for t in packs) == least


@pytest.mark.parametrize("units", [1, 9_999, 10_000, 49_999, 50_000, 3_000_000])
def test_credits_are_offered_where_they_can_be_settled(units: int) -> None:
    found = offers.terms_for_credits(TWO, units)
    least = {"base-sepolia": 10_000, "base": 50_000}
    assert [t.chain.name for t in found] == [n for n, at in least.items() if units >= at]
    assert {(t.amount_units, t.purpose) for t in found} <= {(units, CREDITS)}


def test_a_network_that_cannot_be_settled_is_not_offered() -> None:
    only = two_chains(base=False)
    assert {t.chain.name for t in offers.terms_for_call(only, 10, 10)} == {"base-sepolia"}
    assert {t.chain.name for t in offers.terms_for_credits(only, 10**6)} == {"base-sepolia"}


def test_new_settings_give_new_offers() -> None:
    """Offers are remembered per settings, not per price alone."""
    assert offers.terms_for_call(TWO, 7, 7)[0].pay_to == PAY_TO
    other = "0x" + "cd" * 20
    chain = {"rpc": ["http://x.test"], "pay_to": other, "settler_key": SETTLER_KEY}
    assert offers.terms_for_call(settings_for(chains={"base": chain}), 7, 7)[0].pay_to == other


@pytest.mark.parametrize("name", ["base-sepolia", "base"])
def test_requirements_are_those_of_the_specification(name: str) -> None:
    made = next(t for t in offers.terms_for_call(TWO, 123_456, 0) if t.chain.name == name)
    network = NETWORKS[name]
    assert json.loads(offers.requirements(made, "tok-en")) == {
        "scheme": "exact",
        "network": network.caip2,
        "amount": "123456",
        "asset": checksum(network.usdc.address),
        "payTo": checksum(PAY_TO),
        "maxTimeoutSeconds": 120,
        "extra": {
            "name": network.usdc.eip712_name,
            "version": network.usdc.eip712_version,
            "paymentFlow": "upfront",
            "offer": "tok-en",
        },
    }
    assert offers.requirements_v1(made, "http://shop.test/x", "What it is") == {
        "scheme": "exact",
        "network": network.v1_name,
        "maxAmountRequired": "123456",
        "resource": "http://shop.test/x",
        "description": "What it is",
        "mimeType": "application/json",
        "payTo": checksum(PAY_TO),
        "maxTimeoutSeconds": 120,
        "asset": checksum(network.usdc.address),
        "extra": {"name": network.usdc.eip712_name, "version": network.usdc.eip712_version},
    }


def test_a_token_that_the_network_does_not_have_is_not_offered() -> None:
    with pytest.raises(ValueError, match="not a token"):
        offers.requirements(terms(asset="0x" + "12" * 20), "token")
