"""Card payments that go back: whatever order Stripe's messages come in, the books end the same."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import pytest

from gateway.accounts import wallets
from gateway.config import quick
from gateway.db import Database
from gateway.errors import Problem
from gateway.ledger import Call, Close, Frozen, Guard, Held, Hold, apply, read
from gateway.payments import card, journal, stripe, stripe_facts
from gateway.payments.card import Cards
from tests.gateway.demo.stripes import KEY, SECRET, Receiver, Stripes, receiver, stripes
from tests.gateway.ledger.helpers import faults

__all__ = ["receiver", "stripes"]

WALLET = "0x" + "cd" * 20
USD = 1_000_000


@dataclass
class Shop:
    """The card payments of one deployment, and the Stripe they are with."""

    cards: Cards
    stripes: Stripes
    receiver: Receiver
    told: int = 0  # how many of the events were handed on
    calls: int = 0

    async def buy(self, usd: int = 5) -> journal.Payment:
        """A person pays; nothing of it has been heard yet."""
        payment = await card.start(self.cards, usd * USD, WALLET)
        self.stripes.tell(f"sessions/{payment.external_ref}/pay")
        return payment

    def charge(self, payment: journal.Payment) -> str:
        """Stripe's own id of the charge."""
        sdk = self.stripes.client().v1
        session = sdk.checkout.sessions.retrieve(payment.external_ref or "")
        intent = sdk.payment_intents.retrieve(str(session.payment_intent))
        return str(intent.latest_charge)

    def refund(self, payment: journal.Payment, usd: int | None = None) -> str:
        charge = self.charge(payment)
        if usd is None:
            return self.stripes.client().v1.refunds.create({"charge": charge}).id
        return self.stripes.client().v1.refunds.create({"charge": charge, "amount": usd * 100}).id

    def dispute(self, payment: journal.Payment) -> str:
        return str(self.stripes.tell(f"charges/{self.charge(payment)}/dispute")["id"])

    def messages(self) -> list[tuple[bytes, str]]:
        """Every signed message so far, in the order in which things happened."""
        self.stripes.settled()
        return list(zip(self.receiver.bodies, self.receiver.headers, strict=True))

    async def hear(self, *messages: tuple[bytes, str]) -> list[str]:
        return [await card.webhook(self.cards, body, header) for body, header in messages]

    async def hear_all(self) -> None:
        """What has not been handed on yet."""
        waiting = self.messages()[self.told :]
        self.told += len(waiting)
        await self.hear(*waiting)

    async def spend(self, usd: int, name: str = "") -> bool:
        """Make one call; False if it was refused."""
        self.calls += 1
        async with self.cards.db.write() as tx:
            account = await wallets.find(tx, WALLET)
            if account is None:
                return False
            guard = Guard(WALLET, "erc8128", name or f"call{self.calls}")
            now_ms = await tx.now_ms()
            call = Call("GET /", "GET", "/")
            (outcome,) = await apply(
                tx, [Hold(account, guard, b"", usd * USD, 60_000, call)], now_ms
            )
            if not isinstance(outcome, Held):
                return False
            await apply(tx, [Close(outcome.hold, usd * USD)], now_ms)
            return True

    async def account(self) -> tuple[float, float]:
        """What can be spent and what is owed, in dollars."""
        async with self.cards.db.read() as tx:
            account = await wallets.find(tx, WALLET)
            seen = None if account is None else await read.account(tx, account)
        return (0, 0) if seen is None else (seen.available_units / USD, seen.debt_units / USD)

    async def lot(self, payment: journal.Payment) -> tuple[str, float]:
        """Its state, and how much of it was taken back."""
        async with self.cards.db.read() as tx:
            now = await journal.by_id(tx, payment.id)
            assert now is not None
            row = await tx.fetchrow("SELECT * FROM lot WHERE id = $1", now.lot_id)
        assert row is not None
        return row["state"], row["reversed_units"] / USD

    async def state(self, payment: journal.Payment) -> str:
        async with self.cards.db.read() as tx:
            now = await journal.by_id(tx, payment.id)
        assert now is not None
        return now.state


def settings_of(stripes: Stripes, db_url: str) -> object:
    return quick(
        "http://127.0.0.1:1",
        "$0.01",
        "0x" + "ab" * 20,
        "base-sepolia",
        "http://127.0.0.1:1",
        env={},
        overrides={
            "server": {"database": db_url},
            "stripe": {"secret_key": KEY, "webhook_secret": SECRET, "api_base": stripes.url},
        },
    )


@pytest.fixture
async def shop(stripes: Stripes, receiver: Receiver, db_url: str) -> AsyncIterator[Shop]:
    settings = settings_of(stripes, db_url)
    db = await Database.connect(db_url)
    client = stripe.connect(KEY, api_base=stripes.url, retries=0)
    yield Shop(Cards(settings, db, client), stripes, receiver)  # type: ignore[arg-type]  # Settings
    assert await faults(db) == []
    await stripe.close(client)
    await db.close()


async def test_a_refund_takes_as_many_credits_and_a_failed_one_brings_them_back(
    shop: Shop,
) -> None:
    payment = await shop.buy(5)
    await shop.hear_all()
    assert await shop.account() == (5, 0)
    refund = shop.refund(payment, 2)
    await shop.hear_all()
    assert await shop.account() == (3, 0)
    assert await shop.lot(payment) == ("live", 2)
    assert await shop.state(payment) == "succeeded"
    shop.stripes.tell(f"refunds/{refund}/fail")
    await shop.hear_all()
    assert await shop.account() == (5, 0)
    shop.refund(payment)
    await shop.hear_all()
    assert await shop.account() == (0, 0)
    assert (await shop.lot(payment), await shop.state(payment)) == (("live", 5), "refunded")


async def test_a_refund_heard_before_its_payment(shop: Shop) -> None:
    """It is minted in full and taken back, so that it comes back in full if the refund fails."""
    payment = await shop.buy(5)
    bought = shop.messages()
    refund = shop.refund(payment, 2)
    # A refund names only the money, which nobody knows yet; the charge names the payment, too.
    assert set(await shop.hear(*shop.messages()[len(bought) :])) == {"not ours", "applied"}
    assert await shop.account() == (0, 0)
    await shop.hear(*bought)
    assert await shop.account() == (3, 0)
    assert await shop.lot(payment) == ("live", 2)
    told = len(shop.messages())
    shop.stripes.tell(f"refunds/{refund}/fail")
    await shop.hear(*shop.messages()[told:])
    assert await shop.account() == (5, 0)


async def test_a_dispute_freezes_then_takes_and_gives_back_when_it_is_won(shop: Shop) -> None:
    payment = await shop.buy(5)
    other = await shop.buy(2)
    await shop.hear_all()
    assert await shop.spend(1, "the call")
    dispute = shop.dispute(payment)
    opened, withdrawn = shop.messages()[shop.told :]
    await shop.hear(opened)
    assert await shop.lot(payment) == ("frozen", 0)
    # The other payment's credits are not touched, but what was spent of this one is owed.
    assert await shop.account() == (2, 1)
    assert not await shop.spend(1)
    await shop.hear(withdrawn)
    assert await shop.lot(payment) == ("live", 5)
    assert (await shop.account(), await shop.state(payment)) == ((2, 1), "disputed")
    async with shop.cards.db.read() as tx:
        now = await journal.by_id(tx, payment.id)
        assert now is not None
        assert now.lot_id is not None
        uses = await read.calls_of_lot(tx, now.lot_id, 10)
    assert [(use.hold.request_id, use.units) for use in uses] == [("the call", USD)]
    shop.told += 2
    shop.stripes.tell(f"disputes/{dispute}/end", outcome="won")
    await shop.hear_all()
    assert (await shop.account(), await shop.state(payment)) == ((6, 0), "succeeded")
    assert await shop.state(other) == "succeeded"


async def test_a_lost_dispute_of_spent_credits_is_paid_by_the_next_payment(shop: Shop) -> None:
    payment = await shop.buy(5)
    await shop.hear_all()
    assert await shop.spend(4)
    dispute = shop.dispute(payment)
    shop.stripes.tell(f"disputes/{dispute}/end", outcome="lost")
    await shop.hear_all()
    assert await shop.account() == (0, 4)
    async with shop.cards.db.write() as tx:
        account = await wallets.find(tx, WALLET)
        assert account is not None
        step = Hold(account, Guard(WALLET, "x", "y"), b"", 0, 1, Call("GET /", "GET", "/"))
        assert await apply(tx, [step], await tx.now_ms()) == [Frozen(4 * USD)]
    await shop.buy(10)
    await shop.hear_all()
    assert await shop.account() == (6, 0)
    assert await shop.spend(6)


async def test_an_inquiry_touches_nothing(shop: Shop) -> None:
    payment = await shop.buy(5)
    dispute = shop.stripes.tell(f"charges/{shop.charge(payment)}/dispute", inquiry=True)["id"]
    await shop.hear_all()
    assert (await shop.account(), await shop.lot(payment)) == ((5, 0), ("live", 0))
    shop.stripes.tell(f"disputes/{dispute}/end", outcome="warning_closed")
    await shop.hear_all()
    assert (await shop.account(), await shop.lot(payment)) == ((5, 0), ("live", 0))


async def test_what_is_heard_twice_changes_nothing(shop: Shop) -> None:
    payment = await shop.buy(5)
    shop.refund(payment, 1)
    await shop.hear_all()
    await shop.spend(1)
    shop.refund(payment, 2)
    messages = shop.messages()
    await shop.hear(*messages)
    async with shop.cards.db.read() as tx:
        lines = await tx.fetchval("SELECT count(*) FROM transfer")
    assert set(await shop.hear(*messages, *reversed(messages))) == {"repeated"}
    async with shop.cards.db.write() as tx:
        # And the same picture folded again, as the return page and the reconciler do.
        await card.settle(tx, shop.cards, payment.id, (), await tx.now_ms())
        assert await tx.fetchval("SELECT count(*) FROM transfer") == lines
    assert await shop.account() == (1, 0)


STORIES = ("won", "lost", "refunds", "open")


async def _story(shop: Shop, which: str) -> tuple[journal.Payment, float]:
    """Something happens at Stripe. The payment, and what of its $5 the buyer keeps in the end."""
    payment = await shop.buy(5)
    kept: dict[str, float] = {"won": 4, "lost": 0, "refunds": 3, "open": 0}
    if which == "refunds":
        failed = shop.refund(payment, 1)
        shop.refund(payment, 2)
        shop.stripes.tell(f"refunds/{failed}/fail")
        return payment, kept[which]
    if which == "won":
        shop.refund(payment, 1)
    dispute = shop.dispute(payment)
    # Money that is taken and comes back within one second is told apart by its event's second.
    shop.stripes.tell("clock", advance_s=2)
    if which != "open":
        shop.stripes.tell(f"disputes/{dispute}/end", outcome=which)
    return payment, kept[which]


@pytest.mark.parametrize("which", STORIES)
async def test_every_order_ends_with_the_same_books(shop: Shop, which: str) -> None:
    """Messages shuffled and doubled, with the money being spent somewhere on the way."""
    rng = random.Random(which)
    kept_before = 0.0
    for _ in range(4):
        payment, kept = await _story(shop, which)
        fresh = shop.messages()[shop.told :]
        shop.told += len(fresh)
        order = [*fresh, *fresh]
        rng.shuffle(order)
        spent = 0
        for message in order:
            await shop.hear(message)
            if not spent and rng.random() < 0.3 and await shop.spend(2):
                spent = 2
        available, debt = await shop.account()
        kept_before += kept - spent
        assert available - debt == kept_before, (which, spent)
        state, reversed_usd = await shop.lot(payment)
        assert (state, reversed_usd) == ("live", 5 - kept)


async def test_messages_that_arrive_at_once(shop: Shop) -> None:
    expected = 0.0
    for which in STORIES:
        _, kept = await _story(shop, which)
        expected += kept
        fresh = shop.messages()[shop.told :]
        shop.told += len(fresh)
        await asyncio.gather(*(shop.hear(message) for message in [*fresh, *fresh]))
        available, debt = await shop.account()
        assert available - debt == expected, which


async def test_a_dispute_that_arrives_while_its_payment_is_minted(
    stripes: Stripes, receiver: Receiver, postgres_url: str
) -> None:
    """Neither transaction sees the other's row; one has to wait, or the dispute is lost."""
    db = await Database.connect(postgres_url)
    client = stripe.connect(KEY, api_base=stripes.url, retries=0)
    settings = settings_of(stripes, postgres_url)
    shop = Shop(Cards(settings, db, client), stripes, receiver)  # type: ignore[arg-type]  # Settings
    payment = await shop.buy(5)
    shop.refund(payment)
    messages = shop.messages()
    events = [stripe.parse_event(body, header, SECRET) for body, header in messages]
    paid = next(e for e in events if e.type == "checkout.session.completed")
    refunded = [m for m, e in zip(messages, events, strict=True) if e.type == "refund.created"]
    async with db.write() as tx:
        assert await card._take(tx, shop.cards, paid) == "applied"
        task = asyncio.create_task(shop.hear(*refunded))
        await _waiting(db, task)
    assert await task == ["applied"]
    assert await shop.account() == (0, 0)
    assert await shop.lot(payment) == ("live", 5)
    assert await faults(db) == []
    await stripe.close(client)
    await db.close()


async def _waiting(db: Database, task: asyncio.Task[list[str]]) -> None:
    """Until the task waits for somebody's lock, or is done without."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not task.done():
        async with db.read() as tx:
            waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory'"
            if await tx.fetchval(waits):
                return


async def test_what_no_card_brought_is_not_taken_back(shop: Shop) -> None:
    """A refund of a payment of somebody else's is stored and changes nothing."""
    payment = await shop.buy(5)
    await shop.hear_all()
    fact = stripe_facts.Fact(
        "refund", 1, False, None, None, None, "pi_other", "ch_x", "re_x", 500, "usd", "succeeded"
    )
    async with shop.cards.db.write() as tx:
        await card.settle(tx, shop.cards, payment.id, (fact,), await tx.now_ms())
    assert await shop.account() == (5, 0)


async def test_a_wrong_signature_changes_nothing(shop: Shop) -> None:
    await shop.buy(5)
    messages: Sequence[tuple[bytes, str]] = shop.messages()
    with pytest.raises(Problem, match="signature"):
        await shop.hear((messages[0][0] + b" ", messages[0][1]))
    assert await shop.account() == (0, 0)
