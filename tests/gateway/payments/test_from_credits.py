"""Credits before money: when a payment spends what its wallet has, and when it does not."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from anvil.devnet import Account
from chain.rpc import Rpc
from gateway import ledger
from gateway.accounts import wallets
from gateway.db import Database, transact
from gateway.errors import Problem
from gateway.ledger import read
from gateway.payments import from_credits, journal, offers
from gateway.payments.from_credits import Spent, take
from gateway.payments.order import CameWith
from gateway.payments.rails import Rails
from gateway.payments.wire import Presented, decode
from tests.fixtures_chain import NETWORK, USDC, payment
from tests.gateway.ledger import helpers
from tests.gateway.payments.parts import KEYS, PAY_TO, settings_for

PRICE = 2_000
ASKED = offers.Asked("GET", b"/cheap/1", PRICE)
CAME = CameWith(ASKED, offers.CALL, b"content")
KEY = "0x" + "22" * 32
PAYER = Account("0x1563915e194d8cfba1943570603f7606a3115508", KEY, 0)
OTHER = Account("0x5cbdd86a2fa8dc4bddd8a8f69dba48572eec07fb", "0x" + "33" * 32, 0)


@dataclass(frozen=True, slots=True)
class Shop:
    """Rails on a database, a wallet's account in it, and a chain that does not answer."""

    rails: Rails
    account_id: int

    async def mint(self, units: int, **change: Any) -> int:
        lot = ledger.Mint(
            self.account_id, units, "test", str(time.monotonic_ns()), 0, "x402",
            payer=PAYER.address,
        )  # fmt: skip
        async with self.rails.db.write() as tx:
            (made,) = await ledger.apply(tx, [replace(lot, **change)], await tx.now_ms())
        assert isinstance(made, ledger.Minted)
        return made.lot_id

    async def left(self) -> dict[int, int]:
        """What is left of each lot."""
        async with self.rails.db.read() as tx:
            return {lot.id: lot.remaining_units for lot in await read.lots(tx, self.account_id, 9)}

    def hold(self, account_id: int, units: int) -> ledger.Hold:
        nonce = str(time.monotonic_ns())
        return ledger.Hold(
            account_id, ledger.Guard(PAYER.address, "x402:test", nonce, None), b"content", units,
            60_000, helpers.CALL,
        )  # fmt: skip

    async def take(self, presented: Presented, came: CameWith = CAME) -> Spent | None:
        return await take(self.rails, presented, came, self.hold)

    async def balance(self) -> tuple[int, int]:
        async with self.rails.db.read() as tx:
            seen = await read.account(tx, self.account_id)
        assert seen is not None
        return seen.available_units, seen.held_units

    async def uses(self) -> list[tuple[str, str]]:
        async with self.rails.db.read() as tx:
            rows = await tx.fetch("SELECT decision, payment_id FROM authorization_use")
        return [(row["decision"], row["payment_id"]) for row in rows]


@pytest.fixture
async def shop(db_url: str) -> AsyncIterator[Shop]:
    db = await Database.connect(db_url, wait_s=20)
    settings = settings_for(server={"database": db_url})
    async with db.write() as tx:
        account_id = await wallets.ensure(tx, PAYER.address, await tx.now_ms())
    nobody = Rpc(NETWORK, ["http://127.0.0.1:1"], timeout_s=1)
    yield Shop(Rails(settings, db, KEYS, {NETWORK.caip2: nobody}, {}), account_id)
    assert await helpers.faults(db) == []
    await nobody.close()
    await db.close()


def encoded(value: object) -> bytes:
    return base64.b64encode(json.dumps(value).encode())


def pay(
    purpose: str = offers.CALL,
    units: int = 10_000,
    asked: offers.Asked = ASKED,
    signer: Account = PAYER,
    expiry_s: int | None = None,
    **fields: Any,
) -> Presented:
    """A v2 payment for an offer of ours, as a stock client makes it."""
    now_s = int(time.time())
    chain = settings_for().chains[0]
    terms = offers.Terms(chain, USDC.address, PAY_TO, units, purpose, 120)
    (token,) = offers.seal(KEYS, asked, [terms], expiry_s or now_s + 120)
    accepted = json.loads(offers.requirements(terms, token))
    fields.setdefault("valid_before_s", now_s + 120)
    payload = payment(signer, PAY_TO, units, from_=PAYER.address, **fields)
    return decode(encoded({"x402Version": 2, "payload": payload, "accepted": accepted}))


async def test_a_payment_of_a_wallet_with_credits_spends_them(shop: Shop) -> None:
    await shop.mint(8_000)
    presented = pay()
    spent = await shop.take(presented)
    assert spent is not None
    assert isinstance(spent.outcome, ledger.Held)
    assert (spent.payer, spent.account_id, spent.price_units) == (
        PAYER.address, shop.account_id, PRICE,
    )  # fmt: skip
    assert (spent.repeat, spent.same_presenter) == (False, True)
    assert await shop.balance() == (6_000, PRICE)
    assert await shop.uses() == [("credits", str(spent.outcome.hold.id))]


async def test_shown_again_it_is_the_same_call(shop: Shop) -> None:
    await shop.mint(8_000)
    presented = pay()
    first = await shop.take(presented)
    assert first is not None and isinstance(first.outcome, ledger.Held)
    again = await shop.take(presented)
    assert again is not None
    assert again.outcome == ledger.Repeated(first.outcome.hold, None)
    assert (again.repeat, again.same_presenter) == (True, True)
    # Without the token, or with another one, it is not known who shows it.
    for offer in (None, pay().offer):
        stranger = await shop.take(replace(presented, offer=offer))
        assert stranger is not None and not stranger.same_presenter
    assert await shop.balance() == (6_000, PRICE)


async def test_with_other_content_it_is_refused_for_ever(shop: Shop) -> None:
    await shop.mint(8_000)
    presented = pay()
    assert await shop.take(presented) is not None
    with pytest.raises(from_credits.Decided) as caught:
        await shop.take(presented, replace(CAME, content=b"other"))
    assert caught.value.code == "payment_already_used"
    assert await shop.balance() == (6_000, PRICE)


async def test_credits_that_ran_out_do_not_make_it_a_settlement(shop: Shop) -> None:
    await shop.mint(PRICE)
    presented = pay()
    assert await shop.take(presented) is not None
    assert await shop.balance() == (0, PRICE)
    again = await shop.take(presented)
    assert again is not None and isinstance(again.outcome, ledger.Repeated)


async def test_a_settled_authorization_is_not_spent_from_credits(shop: Shop) -> None:
    await shop.mint(8_000)
    presented = pay()
    key = journal.AuthKey(NETWORK.caip2, USDC.address, PAYER.address, presented.authorization.nonce)
    async with shop.rails.db.write() as tx:
        assert await journal.claim(tx, key, journal.Claim("pay_1", b"content", None), 1)
    assert await shop.take(presented) is None
    assert await shop.balance() == (8_000, 0)


LONG = {"valid_before_s": int(time.time()) + 3_600}
Make = Callable[[], Presented]


@pytest.mark.parametrize(
    "make",
    [
        lambda: pay(purpose=offers.CREDITS, units=1_000_000),
        lambda: pay(**LONG),
        lambda: pay(signer=OTHER),
        lambda: replace(pay(), offer=None),
        # The chain would have to be asked, and does not answer.
        lambda: replace(pay(), version=1, network=NETWORK.v1_name or "", offer=None),
    ],
    ids=["a pack", "valid for long", "signed by another key", "without a token", "v1"],
)
async def test_what_is_settled_as_usual(shop: Shop, make: Make) -> None:
    await shop.mint(2_000_000)
    assert await shop.take(make()) is None
    assert await shop.balance() == (2_000_000, 0)
    assert await shop.uses() == []


@pytest.mark.parametrize(
    ("units", "change"),
    [
        (PRICE - 1, {}),
        (8_000, {"source": "stripe"}),
        (8_000, {"source": "grant", "payer": None}),
        (8_000, {"payer": OTHER.address}),
    ],
    ids=["too few", "card", "grant", "sponsored"],
)
async def test_only_what_this_wallet_paid_for(
    shop: Shop, units: int, change: dict[str, Any]
) -> None:
    await shop.mint(units, **change)
    assert await shop.take(pay()) is None
    assert await shop.uses() == []


@pytest.mark.parametrize("soon", [True, False], ids=["expires first", "expires last"])
@pytest.mark.parametrize(
    "change",
    [{"source": "card", "payer": None}, {"payer": OTHER.address}, {"source": "deposit"}],
    ids=["card", "sponsored", "sent"],
)
async def test_nobody_turns_it_off_or_on_for_a_wallet_by_giving_it_something(
    shop: Shop, change: dict[str, Any], soon: bool
) -> None:
    """What others put into an account is not spent by its payments, and does not stop them."""
    later_ms = int(time.time() * 1000) + 86_400_000
    gift = await shop.mint(50_000, **change, expires_ms=later_ms if soon else ledger.NEVER)
    assert await shop.take(pay()) is None
    own = await shop.mint(3 * PRICE + 1, expires_ms=ledger.NEVER if soon else later_ms)
    for left in (2 * PRICE + 1, PRICE + 1, 1):
        spent = await shop.take(pay())
        assert spent is not None and isinstance(spent.outcome, ledger.Held)
        async with shop.rails.db.write() as tx:
            await ledger.apply(tx, [ledger.Close(spent.outcome.hold, PRICE)], await tx.now_ms())
        assert await shop.left() == {own: left, gift: 50_000}
    assert await shop.take(pay()) is None
    assert await shop.balance() == (50_001, 0)


async def test_a_wallet_without_an_account_or_stopped(shop: Shop) -> None:
    assert await shop.take(pay()) is None
    await shop.mint(8_000)
    step = ledger.FreezeAccount(shop.account_id, frozen=True, reason="test", by="test")
    async with shop.rails.db.write() as tx:
        await ledger.apply(tx, [step], await tx.now_ms())
    assert await shop.take(pay()) is None
    assert await shop.balance() == (8_000, 0)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"asked": replace(ASKED, target=b"/cheap/2")}, "invalid_payment_requirements"),
        ({"expiry_s": 1}, "offer_expired"),
        (
            {"valid_before_s": int(time.time())},
            "invalid_exact_evm_payload_authorization_valid_before",
        ),
        (
            {"valid_after_s": int(time.time()) + 3_000},
            "invalid_exact_evm_payload_authorization_valid_after",
        ),
    ],
    ids=["another request", "expired offer", "expired", "too early"],
)
async def test_a_payment_that_answers_no_offer_is_refused(
    shop: Shop, change: dict[str, Any], code: str
) -> None:
    await shop.mint(8_000)
    with pytest.raises(Problem) as caught:
        await shop.take(pay(**change))
    assert caught.value.code == code
    assert await shop.balance() == (8_000, 0)


async def test_at_most_what_the_offer_promised(shop: Shop) -> None:
    """The price rose since the offer: it is locked. It fell: nobody pays more than it is now."""
    await shop.mint(20_000)
    dearer = replace(CAME, asked=replace(ASKED, price_units=9_000))
    spent = await shop.take(pay(), dearer)
    assert spent is not None and spent.price_units == PRICE
    cheaper = replace(CAME, asked=replace(ASKED, price_units=500))
    spent = await shop.take(pay(), cheaper)
    assert spent is not None and spent.price_units == 500


async def test_presented_many_times_at_once_it_is_held_once(shop: Shop) -> None:
    await shop.mint(1_000_000)
    presented = pay()
    others = [await Database.connect(shop.rails.db.url, wait_s=20) for _ in range(2)]
    nodes = [replace(shop, rails=replace(shop.rails, db=db)) for db in (shop.rails.db, *others)]
    spent = await asyncio.gather(*(nodes[n % 3].take(presented) for n in range(12)))
    outcomes = [each.outcome for each in spent if each is not None]
    assert len(outcomes) == 12
    assert sum(isinstance(each, ledger.Held) for each in outcomes) == 1
    assert sum(isinstance(each, ledger.Repeated) for each in outcomes) == 11
    assert await shop.balance() == (1_000_000 - PRICE, PRICE)
    for db in others:
        await db.close()


async def test_many_payments_at_once_never_spend_more_than_there_is(shop: Shop) -> None:
    await shop.mint(3 * PRICE)
    payments = [pay() for _ in range(8)]
    spent = await asyncio.gather(*(shop.take(each) for each in payments))
    assert sum(each is not None for each in spent) == 3
    assert await shop.balance() == (0, 3 * PRICE)
    assert len(await shop.uses()) == 3


async def test_what_a_settlement_claims_first_is_not_held(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another node claims the authorization between our look and our row."""
    await shop.mint(8_000)
    presented = pay()
    key = journal.AuthKey(NETWORK.caip2, USDC.address, PAYER.address, presented.authorization.nonce)
    truly = from_credits._hold

    async def late(*arguments: Any) -> Any:
        async with shop.rails.db.write() as tx:
            assert await journal.claim(tx, key, journal.Claim("pay_1", b"content", None), 1)
        return await truly(*arguments)

    monkeypatch.setattr(from_credits, "_hold", late)
    assert await shop.take(presented) is None
    assert await shop.balance() == (8_000, 0)
    assert await shop.uses() == [("settle", "pay_1")]


async def test_what_is_spent_in_between_is_not_taken_from_others_credits(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our look and our hold a card payment is minted, and the wallet's own lot is used."""
    await shop.mint(8_000)
    truly = from_credits._hold

    async def late(*arguments: Any) -> Any:
        later_ms = int(time.time() * 1000) + 86_400_000
        await shop.mint(5_000, source="stripe", payer=None, expires_ms=later_ms)
        own = replace(shop.hold(shop.account_id, 8_000), only=from_credits.only(PAYER.address))
        async with shop.rails.db.write() as tx:
            await ledger.apply(tx, [own], await tx.now_ms())
        return await truly(*arguments)

    monkeypatch.setattr(from_credits, "_hold", late)
    assert await shop.take(pay()) is None
    assert await shop.balance() == (5_000, 8_000)
    assert await shop.uses() == []


async def test_the_signature_is_not_kept(shop: Shop) -> None:
    await shop.mint(8_000)
    presented = pay()
    assert await shop.take(presented) is not None

    async def everything(tx: Any) -> str:
        rows = []
        for table in ("authorization_use", "hold", "request_alias", "transfer", "payment"):
            rows += [tuple(map(repr, row)) for row in await tx.fetch(f"SELECT * FROM {table}")]
        return repr(rows)

    stored = await transact(shop.rails.db, everything)
    for form in (presented.authorization.signature.hex(), repr(presented.authorization.signature)):
        assert form not in stored
