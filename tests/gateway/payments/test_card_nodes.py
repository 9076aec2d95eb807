"""Card payments of a whole deployment: whose message it is, what fits, and who is looked at."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway.db import Database
from gateway.errors import Problem
from gateway.payments import card, journal, stripe
from gateway.payments.card import Cards
from gateway.payments.journal import Payment
from gateway.payments.stripe_facts import Event
from tests.gateway.demo.stripes import KEY, SECRET
from tests.gateway.ledger import helpers
from tests.gateway.payments.parts import blank, settings_for
from tests.gateway.payments.test_stripe import FIVE_USD, PAYMENT, signed, told

WALLET = "0x" + "ca" * 20
T0 = 1_800_000_000_000
DAY_MS = 86_400_000


@pytest.fixture
async def db(db_url: str) -> AsyncIterator[Database]:
    database = await Database.connect(db_url, wait_s=20)
    yield database
    assert await helpers.faults(database) == []
    await database.close()


@pytest.fixture
async def cards(db: Database) -> AsyncIterator[Cards]:
    client = stripe.connect(KEY, api_base="http://127.0.0.1:1")
    yield Cards(shop(), db, client)
    await stripe.close(client)


def shop() -> Any:
    return settings_for(
        stripe={"secret_key": KEY, "webhook_secret": SECRET, "api_base": "http://127.0.0.1:1"}
    )


class Delivery:
    """One story's events, under ids of their own, and the payment they are about."""

    def __init__(self, name: str, *actions: str) -> None:
        story = told(*actions)
        # Every id of the story gets the name, so that many can be told to one database.
        text = json.dumps(story.sent)
        text = re.sub(rf'"{PAYMENT}"', f'"{PAYMENT}{name}"', text)
        text = re.sub(r'"(evt|pi|cs_test|ch|re|du|dp)_', rf'"\1_{name}', text)
        self.sent: list[dict[str, Any]] = json.loads(text)
        session = re.sub(r"^cs_test_", f"cs_test_{name}", story.session["id"])
        self.payment = blank(
            f"{PAYMENT}{name}",
            provider=card.PROVIDER,
            state="created",
            purpose="credits",
            payer=None,
            recipient=WALLET,
            network=None,
            asset=None,
            auth_nonce=None,
            valid_before_s=None,
            from_block=None,
            amount_units=FIVE_USD,
            external_ref=session,
        )

    @property
    def events(self) -> list[Event]:
        return [
            Event(e["id"], e["type"], e["created"], e["livemode"], None, e["data"]["object"])
            for e in self.sent
        ]


async def insert(db: Database, *payments: Payment) -> None:
    async with db.write() as tx:
        for each in payments:
            await journal.insert(tx, each)


async def deliver(cards: Cards, event: dict[str, Any]) -> str:
    """As Stripe does it: the body, signed."""
    body = json.dumps(event).encode()
    return await card.webhook(cards, body, signed(body))


async def stored(db: Database, payment: Payment) -> Payment:
    async with db.read() as tx:
        found = await journal.by_id(tx, payment.id)
    assert found is not None
    return found


async def lots(db: Database, payment: Payment) -> list[int]:
    """What was minted for a payment: the units of each lot, normally one or none."""
    async with db.read() as tx:
        rows = await tx.fetch("SELECT minted_units FROM lot WHERE payment_id = $1", payment.id)
    return [row["minted_units"] for row in rows]


async def test_the_same_message_at_several_nodes_at_once(db_url: str, cards: Cards) -> None:
    delivery = Delivery("x", "card")
    await insert(cards.db, delivery.payment)
    other = await Database.connect(db_url, wait_s=20)
    nodes = [cards, Cards(cards.settings, other, cards.client)]
    for event in delivery.sent:
        got = await asyncio.gather(*(deliver(nodes[n % 2], event) for n in range(6)))
        assert sorted(got) in (["applied"] + ["repeated"] * 5, ["not ours"] + ["repeated"] * 5)
    assert await lots(cards.db, delivery.payment) == [FIVE_USD]
    await other.close()


async def test_a_message_waits_for_the_one_before_it_and_knows_what_it_said(
    db_url: str, cards: Cards
) -> None:
    """Begun and paid arrive in the same moment: begun must not be the last word."""
    other = await Database.connect(db_url, wait_s=20)
    delivery = Delivery("x", "bank", "settle")
    await insert(cards.db, delivery.payment)
    kinds = {event["type"]: n for n, event in enumerate(delivery.sent)}
    begun = delivery.sent[kinds["checkout.session.completed"]]
    paid = delivery.events[kinds["checkout.session.async_payment_succeeded"]]
    async with other.write() as tx:
        assert await card._take(tx, cards, paid) == "applied"
        late = asyncio.create_task(deliver(cards, begun))
        await asyncio.sleep(0.1)
        assert not late.done()
    assert await late == "applied"
    after = await stored(cards.db, delivery.payment)
    assert after.state == "succeeded" and after.lot_id is not None
    assert await lots(cards.db, delivery.payment) == [FIVE_USD]
    await other.close()


async def test_messages_about_nothing_of_ours_are_taken_and_change_nothing(cards: Cards) -> None:
    """Another program shares the Stripe account; what it sells is not our business."""
    delivery = Delivery("x", "card", "refund")
    for event in delivery.sent:
        assert await deliver(cards, event) == "not ours"
        assert await deliver(cards, event) == "repeated"
    async with cards.db.read() as tx:
        assert await tx.fetchval("SELECT count(*) FROM lot") == 0
        assert await tx.fetchval("SELECT count(*) FROM payment") == 0
    async with cards.db.write() as tx:
        assert await card.settle(tx, cards, delivery.payment.id, (), T0) is None


async def test_a_message_before_the_session_is_known_finds_its_payment(cards: Cards) -> None:
    """Paid so fast that the answer that names the session has not been stored yet."""
    delivery = Delivery("x", "card")
    payment = blank(
        delivery.payment.id,
        provider=card.PROVIDER,
        state="created",
        recipient=WALLET,
        network=None,
        amount_units=FIVE_USD,
    )
    await insert(cards.db, payment)
    for event in delivery.sent:
        await deliver(cards, event)
    assert await lots(cards.db, payment) == [FIVE_USD]


@pytest.mark.parametrize("what", ["mode", "currency", "session"])
async def test_what_does_not_fit_the_payment_mints_nothing(cards: Cards, what: str) -> None:
    delivery = Delivery("x", "card")
    await insert(cards.db, delivery.payment)
    for event in delivery.sent:
        text = json.dumps(event)
        if what == "mode":
            text = text.replace('"livemode": false', '"livemode": true')
        elif what == "currency":
            text = text.replace('"usd"', '"eur"')
        elif event["data"]["object"]["object"] != "checkout.session":
            continue  # it names no session
        else:
            text = text.replace('"cs_test_x', '"cs_test_other')
        assert text != json.dumps(event)
        await deliver(cards, json.loads(text))
    assert await lots(cards.db, delivery.payment) == []


async def test_without_a_webhook_secret_nothing_is_believed(cards: Cards) -> None:
    silent = Cards(settings_for(), cards.db, cards.client)
    body = json.dumps(Delivery("x", "card").sent[0]).encode()
    with pytest.raises(Problem) as problem:
        await card.webhook(silent, body, signed(body))
    assert problem.value.code == "not_found"


# --- which are looked at --------------------------------------------------------------------


def waiting(name: str, **change: Any) -> Payment:
    made = {"provider": card.PROVIDER, "state": "created", "external_ref": name, "lease_ms": 0}
    return blank(name, **(made | change))


async def take(db: Database, now_ms: int, limit: int = 50) -> list[str]:
    async with db.write() as tx:
        return [p.id for p in await card.take_open(tx, now_ms, limit)]


async def test_the_older_a_payment_the_rarer_the_looks(db: Database) -> None:
    await insert(
        db,
        waiting("new", created_at_ms=T0),
        waiting("old", created_at_ms=T0 - 2 * 3_600_000 + 1),
        waiting("expired session", created_at_ms=T0 - 2 * 3_600_000),
        waiting("bank", state="processing", created_at_ms=T0 - 29 * DAY_MS),
        waiting("bank, given up", state="processing", created_at_ms=T0 - 30 * DAY_MS),
        waiting("no session", external_ref=None),
        waiting("paid", state="succeeded", created_at_ms=T0),
        waiting("failed", state="failed", created_at_ms=T0),
        waiting("x402", provider="x402", state="processing", created_at_ms=T0),
    )
    assert sorted(await take(db, T0)) == ["bank", "new", "old"]
    assert await take(db, T0 + 29_999) == []
    assert await take(db, T0 + 30_000) == ["new"]
    assert (await stored(db, waiting("bank"))).lease_ms == T0 + 29 * DAY_MS // 10
    assert (await stored(db, waiting("old"))).lease_ms == T0 + (2 * 3_600_000 - 1) // 10


async def test_two_workers_look_at_different_ones(db_url: str, db: Database) -> None:
    """The rows of the first are leased when the second asks, or taken twice: a look is harmless."""
    other = await Database.connect(db_url, wait_s=20)
    names = [f"pay_{n}" for n in range(12)]
    await insert(db, *(waiting(name, created_at_ms=T0) for name in names))
    first = await take(db, T0, 6)
    second = await take(other, T0, 6)
    assert sorted(first + second) == sorted(names)
    await other.close()
