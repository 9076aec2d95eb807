"""Card payments: commit the intent, open a Checkout Session, mint when Stripe says it was paid.

    start     payment row ``created`` -> Checkout Session under the payment's id -> its URL stored
    webhook   the event, the payment and the mint are one transaction, then 200
    look      asks Stripe about a payment whose message may have been lost

What a payment should be is folded from the set of facts Stripe has told, whatever their order
(``stripe_facts.py``); the mint's key is the payment intent, so it is minted once. Refunds and
disputes then move the lot it became: what was taken back is reversed, what is in dispute is
frozen, and both are undone when Stripe says so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gateway import ledger
from gateway.accounts import wallets
from gateway.db import Database, Tx, WriteConflict, transact
from gateway.errors import Problem
from gateway.ledger import read
from gateway.money import format_credits, format_usd
from gateway.observe import log
from gateway.payments import journal, stripe, stripe_facts
from gateway.payments.journal import Payment
from gateway.payments.stripe_facts import Event, Expected, Fact, Picture
from gateway.settings import Settings
from wallet_auth.keys import checksum

PROVIDER = "stripe"


@dataclass(slots=True)
class Cards:
    """What card payments need, once per process."""

    settings: Settings  # replaced when the configuration is read again (gateway/reload.py)
    db: Database
    client: stripe.Client


async def start(cards: Cards, amount_units: int, wallet: str) -> Payment:
    """Open a card payment of ``amount_units`` for a wallet; ``external_url`` is where to pay.

    Raises ``Problem``: ``invalid_amount``, ``card_refused``, ``dependency_unavailable``.
    """
    stripe.cents_of(amount_units)
    payment = await transact(cards.db, lambda tx: _intend(tx, cards.settings, amount_units, wallet))
    base = cards.settings.server.public_url
    try:
        checkout = await stripe.create_checkout(
            cards.client,
            payment_id=payment.id,
            created_s=payment.created_at_ms // 1000,
            amount_units=amount_units,
            title=f"{format_credits(amount_units, cards.settings.credits.per_usd)} credits",
            detail=f"For the wallet {checksum(wallet)}",
            success_url=f"{base}/farebox/buy/{payment.id}",
            cancel_url=f"{base}/farebox/buy?wallet={checksum(wallet)}"
            f"&usd={format_usd(amount_units).removeprefix('$')}&canceled=1",
        )
    except stripe.Refused as error:
        async with cards.db.write() as tx:
            await journal.fail(tx, payment.id, error.code, error.detail, await tx.now_ms())
        raise Problem("card_refused", f"{error.detail}.") from None
    except stripe.Unknown as error:
        # A session may be open that nobody was told of: unpaid it expires, and a new try is a
        # new payment with a session of its own.
        raise Problem(
            "dependency_unavailable",
            "The card provider did not answer; nothing was charged.",
            headers={"Retry-After": "5"},
        ) from error
    async with cards.db.write() as tx:
        await tx.execute(
            "UPDATE payment SET external_ref = $2, external_url = $3, updated_at_ms = $4"
            " WHERE id = $1",
            payment.id,
            checkout.session_id,
            checkout.url,
            await tx.now_ms(),
        )
    return replace(payment, external_ref=checkout.session_id, external_url=checkout.url)


async def _intend(tx: Tx, settings: Settings, amount_units: int, wallet: str) -> Payment:
    now_ms = await tx.now_ms()
    span = settings.credits.expire_after
    payment = Payment(
        id=journal.new_id(),
        provider=PROVIDER,
        state="created",
        purpose="credits",
        payer=None,
        recipient=wallet,
        recipient_chain="",
        network=None,
        asset=None,
        amount_units=amount_units,
        expires_ms=None if span is None else span.after_ms(now_ms),
        auth_nonce=None,
        valid_before_s=None,
        from_block=None,
        tx_hash=None,
        external_ref=None,
        external_url=None,
        lot_id=None,
        error_code=None,
        error_detail=None,
        created_at_ms=now_ms,
        updated_at_ms=now_ms,
        lease_ms=now_ms + 30_000,  # the first look, if no message came
    )
    await journal.insert(tx, payment)
    return payment


async def webhook(cards: Cards, payload: bytes, signature: str | None) -> str:
    """Take a message of Stripe. Returns what it was: applied, repeated or not ours.

    Answer 2xx only after this returns: Stripe sends again what was not taken. Raises
    ``Problem("invalid_webhook_signature")`` and ``DatabaseUnavailable``.
    """
    secret = cards.settings.stripe.webhook_secret
    if secret is None:
        raise Problem("not_found", "Cards are not switched on.")
    event = stripe.parse_event(payload, signature, secret.get_secret_value())
    return await transact(cards.db, lambda tx: _take(tx, cards, event))


async def _take(tx: Tx, cards: Cards, event: Event) -> str:
    now_ms = await tx.now_ms()
    known = stripe_facts.facts(event)
    intent = next((fact.payment_intent for fact in known if fact.payment_intent), None)
    payment_id = await _payment_of(tx, known)
    if payment_id is None and intent is not None:
        # Whoever mints for this money right now does not see this event, nor we that mint: one of
        # the two waits for the other, and looks again.
        await _claim_intent(tx, intent)
        if await _payment_of(tx, known) is not None:
            raise WriteConflict("the payment of this event was minted meanwhile")
    stored = await tx.execute(
        "INSERT INTO provider_event (provider, event_id, kind, payment_id, intent, facts, at_ms)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (provider, event_id) DO NOTHING",
        PROVIDER,
        event.id,
        event.type,
        payment_id,
        intent,
        json.dumps([fact.dump() for fact in known]),
        now_ms,
    )
    if not stored:
        return "repeated"
    if payment_id is None:
        return "not ours"
    await settle(tx, cards, payment_id, (), now_ms)
    return "applied"


async def _claim_intent(tx: Tx, intent: str) -> None:
    """Until this transaction ends, nobody else looks at what is known of this money.

    PostgreSQL: a lock by name, taken before the look. SQLite's write lock is ours already.
    """
    if tx.dialect == "postgres":
        await tx.execute("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", intent)


async def _payment_of(tx: Tx, known: Sequence[Fact]) -> str | None:
    """Our payment: by the id we gave Stripe, by the session, or by the money it minted."""
    for fact in known:
        found: str | None = await tx.fetchval(
            "SELECT id FROM payment WHERE provider = $1 AND (id = $2 OR external_ref = $3)",
            PROVIDER,
            fact.payment_id or "",
            fact.session_id or "",
        )
        if found is None and fact.payment_intent:
            found = await tx.fetchval(
                "SELECT l.payment_id FROM mint_key k JOIN lot l ON l.id = k.lot_id"
                " WHERE k.network = $1 AND k.ref = $2",
                PROVIDER,
                fact.payment_intent,
            )
        if found is not None:
            return found
    return None


async def settle(
    tx: Tx, cards: Cards, payment_id: str, more: Sequence[Fact], now_ms: int
) -> Payment | None:
    """Make the payment what all known facts say it is, and mint once if it was paid.

    Safe to run any number of times, from the webhook and from ``look``.
    """
    payment = await journal.by_id(tx, payment_id, lock=True)
    if payment is None or payment.recipient is None:
        return None
    known = [*await _facts_of(tx, payment_id), *more]
    picture = stripe_facts.fold(known, _expected(cards, payment))
    if picture.payment_intent is not None:
        # Refunds and disputes name only the money, and may have come before it.
        await _claim_intent(tx, picture.payment_intent)
        known += await _facts_of_intent(tx, picture.payment_intent)
        picture = stripe_facts.fold(known, _expected(cards, payment))
    if picture.notes:
        log.warning("card payment %s: %s", payment_id, ", ".join(picture.notes))
    lot_id = payment.lot_id
    if lot_id is None and picture.paid_units:
        # In full, also when some of it went back before: so an undone refund finds its credits.
        lot_id = await _mint(tx, payment, picture, now_ms)
    if lot_id is not None:
        await _claim(tx, payment, lot_id, picture, now_ms)
    if (picture.state, lot_id) != (payment.state, payment.lot_id):
        await tx.execute(
            "UPDATE payment SET state = $2, lot_id = $3, error_code = $4, updated_at_ms = $5"
            " WHERE id = $1",
            payment_id,
            picture.state,
            lot_id,
            picture.reason or None,
            now_ms,
        )
    return await journal.by_id(tx, payment_id)


def _expected(cards: Cards, payment: Payment) -> Expected:
    return Expected(
        payment_id=payment.id,
        session_id=payment.external_ref,
        amount_units=payment.amount_units,
        livemode=cards.client.livemode,
    )


async def _facts_of(tx: Tx, payment_id: str) -> list[Fact]:
    rows = await tx.fetch(
        "SELECT facts FROM provider_event WHERE provider = $1 AND payment_id = $2",
        PROVIDER,
        payment_id,
    )
    return [stripe_facts.load(text) for row in rows for text in json.loads(row["facts"])]


async def _facts_of_intent(tx: Tx, intent: str) -> list[Fact]:
    rows = await tx.fetch(
        "SELECT facts FROM provider_event WHERE provider = $1 AND intent = $2", PROVIDER, intent
    )
    return [stripe_facts.load(text) for row in rows for text in json.loads(row["facts"])]


async def _mint(tx: Tx, payment: Payment, picture: Picture, now_ms: int) -> int:
    account_id = await wallets.ensure(tx, payment.recipient or "", now_ms, payment.recipient_chain)
    mint = ledger.Mint(
        account_id=account_id,
        amount_units=picture.paid_units,
        network=PROVIDER,
        ref=picture.payment_intent or "",
        n=0,
        source="card",
        expires_ms=payment.expires_ms or ledger.NEVER,
        payment_id=payment.id,
    )
    outcome = (await ledger.apply(tx, [mint], now_ms))[0]
    if not isinstance(outcome, (ledger.Minted, ledger.MintedBefore)):
        raise ledger.LedgerFault(f"payment {payment.id}: a mint was answered with {outcome}")
    return outcome.lot_id


async def _claim(tx: Tx, payment: Payment, lot_id: int, picture: Picture, now_ms: int) -> None:
    """Make the lot what the picture says: so much of it reversed, the rest frozen or free.

    A dispute begins before and ends after its money moves, so that what changes hands stays away
    from the account. Says nothing new: changes nothing.
    """
    minted = await read.minted_units(tx, lot_id)
    back = ledger.Reverse(lot_id, min(picture.reversed_units, minted or 0), _why(picture))
    steps: list[ledger.Step] = [back, ledger.Unfreeze(lot_id, "the dispute has ended")]
    if picture.frozen:
        steps = [ledger.Freeze(lot_id, "the payment is disputed"), back]
    outcomes = await ledger.apply(tx, steps, now_ms)
    last = outcomes[-1]
    if not isinstance(last, ledger.LotIs):
        raise ledger.LedgerFault(f"payment {payment.id}: a claim was answered with {last}")
    if any(isinstance(outcome, ledger.LotIs) and outcome.changed for outcome in outcomes):
        log.warning(
            "card payment %s, lot %s: %s of %s taken back%s; the account can spend %s and owes %s",
            payment.id,
            lot_id,
            format_usd(picture.reversed_units),
            format_usd(picture.paid_units),
            ", in dispute" if picture.frozen else "",
            format_usd(last.balance.available_units),
            format_usd(last.debt_units),
        )


def _why(picture: Picture) -> str:
    if picture.state == "disputed":
        return "the dispute of the payment"
    return "the payment was refunded" if picture.reversed_units else "the money stayed after all"


async def look(cards: Cards, payment: Payment) -> str:
    """Ask Stripe about a payment whose message may have been lost. Returns its state now.

    Raises ``stripe.CardError`` when Stripe cannot say.
    """
    if payment.external_ref is None:
        return payment.state
    found = await stripe.read_session(cards.client, payment.external_ref)
    if not found:
        return payment.state

    async def work(tx: Tx) -> Payment | None:
        return await settle(tx, cards, payment.id, found, await tx.now_ms())

    after = await transact(cards.db, work)
    return payment.state if after is None else after.state


async def take_open(tx: Tx, now_ms: int, limit: int) -> Sequence[Payment]:
    """Card payments that may have been paid without our hearing of it, due for another look.

    A session is open for an hour, a bank debit takes days: the older a payment, the rarer the
    looks (a tenth of its age, at least half a minute), and none after thirty days.
    """
    rows = await tx.fetch(
        "SELECT id, created_at_ms FROM payment WHERE provider = $1 AND external_ref IS NOT NULL"
        " AND lease_ms <= $2 AND created_at_ms > $3 AND (state = 'processing'"
        " OR (state = 'created' AND created_at_ms > $4)) ORDER BY lease_ms LIMIT $5",
        PROVIDER,
        now_ms,
        now_ms - 30 * 86_400_000,
        now_ms - 7_200_000,
        limit,
    )
    found = []
    for row in rows:
        wait_ms = max((now_ms - row["created_at_ms"]) // 10, 30_000)
        await tx.execute(
            "UPDATE payment SET lease_ms = $2 WHERE id = $1", row["id"], now_ms + wait_ms
        )
        payment = await journal.by_id(tx, row["id"])
        if payment is not None:
            found.append(payment)
    return found
