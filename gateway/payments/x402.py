"""x402 payments: verify, claim, settle on chain, mint once.

    verify and simulate   nothing is written, nothing is sent
    claim                 one transaction: the authorization's unique row, the payment, the chain
                          nonce and the signed raw transaction
    broadcast and wait    bounded; what is not known after that is pending, never failed
    finish                one transaction: the mint, the payment, the hold of the call it pays for

Whoever presents the same authorization again joins the payment that exists. Nobody is ever told
to pay again for something whose outcome is not known.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from chain.errors import ChainError, Rejected, Unavailable
from chain.receipts import Receipt
from chain.rpc import Rpc
from chain.schemes import eip3009, exact, permit2
from chain.transfers import Transfer
from gateway import ledger, observe
from gateway.accounts import credentials, wallets
from gateway.db import CommitUnknown, Database, DatabaseUnavailable, Tx, transact
from gateway.errors import Problem
from gateway.ledger import read
from gateway.observe import log
from gateway.payments import (
    aliases,
    budget,
    engine,
    from_credits,
    in_hand,
    journal,
    offers,
    permits,
    recover,
    remote,
    sponsor,
    together,
)
from gateway.payments.journal import AuthKey, Claim, Payment
from gateway.payments.lane import Begun, Handed, Job
from gateway.payments.methods import METHODS, Spent
from gateway.payments.nonces import Call
from gateway.payments.order import (
    CameWith,
    Order,
    key_of,
    order_of,
    payer_chain_of,
    refused_order,
)
from gateway.payments.rails import Rails, refused
from gateway.payments.wire import Presented
from gateway.settings import Chain, Settings

_FOREVER_S: Final = 2**62  # validBefore may be anything the token takes, a column may not
MakeHold = Callable[[int, int], ledger.Hold]
"""``(account_id, price_units) -> Hold``: the hold of the call that a payment came with."""


@dataclass(frozen=True, slots=True)
class Paid:
    """What is known of a payment now. ``held`` is the outcome of the call's hold, if it was taken
    with the mint; ``repeat``: the payment had been presented before; ``credential``: what it was
    given to spend its credits with, told here and never again."""

    payment: Payment
    price_units: int | None
    held: ledger.Outcome | None
    repeat: bool
    same_presenter: bool
    credential: str | None = None


async def pay(
    rails: Rails, presented: Presented, came: CameWith, make_hold: MakeHold | None = None
) -> Paid:
    """Bring a presented payment to an end, or as far as the bounded wait goes.

    A payment row comes back in state ``succeeded``, ``processing`` (pending) or ``failed``.
    Raises ``Problem`` for a payment that was refused before anything was sent.
    """
    chain = rails.chain_of(presented)
    auth, key = presented.authorization, key_of(chain, presented)
    while True:
        known = await _join(rails, key, came, presented.offer)
        if known is not None:
            return known
        running = rails.settling.get(key)
        if running is not None:
            # Either that one claims the payment and we join it, or it was refused before it
            # claimed anything and this one asks for itself.
            await asyncio.shield(running)
            continue
        now_s, account_id = await _may_pay(rails, chain, auth.from_, came.purpose)
        order = order_of(rails, presented, came, now_s)
        named = await aliases.find(rails, order)
        if named is not None:
            payment, payer_chain = named
            payment = await _await_end(rails, payment)
            return Paid(payment, None, None, repeat=True, same_presenter=payer_chain == "")
        if came.gift is not None:
            order, account_id = await sponsor.accept(rails, order, came.gift)
        if key in rails.settling:
            continue
        running = rails.settling[key] = asyncio.get_running_loop().create_future()
        payment_id = journal.new_id()
        try:
            with in_hand.working_on(rails, [payment_id]):
                first = await _settle(rails, order, payment_id, account_id, make_hold)
        finally:
            del rails.settling[key]
            running.set_result(None)
        if first is not None:
            return first


async def _may_pay(rails: Rails, chain: Chain, payer: str, purpose: str) -> tuple[int, int | None]:
    """The time in seconds and the payer's account, if money may be taken: not for a call that
    cannot run, and not from a wallet whose settlements just failed. Raises ``Problem``."""
    async with rails.db.read() as tx:
        now_ms = await tx.now_ms()
        blocked = await budget.payer_is_blocked(tx, chain, payer, now_ms)
        account_id = await wallets.find(tx, payer)
        seen = None
        if purpose == offers.CALL and account_id is not None:
            seen = await read.account(tx, account_id)
    if seen is not None and (seen.frozen or seen.debt_units):
        raise Problem("account_frozen", "This account cannot spend now; nothing was sent.")
    if blocked:
        raise Problem(
            "rate_limited",
            "Payments of this wallet failed on chain a moment ago; nothing was sent. Try again "
            "in an hour.",
            headers={"Retry-After": "3600"},
        )
    return now_ms // 1_000, account_id


async def _now_s(db: Database) -> int:
    async with db.read() as tx:
        return await tx.now_ms() // 1000


async def _join(rails: Rails, key: AuthKey, came: CameWith, offer: str | None) -> Paid | None:
    """The payment this authorization already belongs to. Waits for one that another node settles.

    Raises ``Problem("payment_already_used")`` when it was used for something else.
    """
    async with rails.db.read() as tx:
        claim = await journal.claim_of(tx, key)
        payment = await journal.by_id(tx, claim.payment_id) if claim is not None else None
        if claim is not None:
            await aliases.require_same(tx, claim.payment_id, came.alias)
    if claim is not None and claim.decision == from_credits.CREDITS:
        raise from_credits.Decided
    if claim is None or payment is None:
        return None
    if claim.content != came.content:
        raise Problem(
            "payment_already_used",
            "This payment was presented with another request before.",
            members={"payment_id": payment.id},
        )
    payment = await _await_end(rails, payment)
    same = offer is not None and offers.token_digest(offer) == claim.offer
    # The claim was made under this very token, so it is ours, and its price still holds.
    price_units = offers.promised_units(offer) if offer is not None and same else None
    return Paid(payment, price_units, None, repeat=True, same_presenter=same)


async def _await_end(
    rails: Rails,
    payment: Payment,
    look: Callable[[Rails, Payment], Awaitable[object]] | None = None,
) -> Payment:
    """Look at a payment until it ends or our wait is over. ``look`` brings it on; without one
    somebody else settles it."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + rails.settings.server.settle_wait_s
    pause_s = 0.02
    while payment.state == "processing" and loop.time() < deadline_s:
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 2, 0.5)
        if look is not None:
            await look(rails, payment)
        async with rails.db.read() as tx:
            payment = await journal.by_id(tx, payment.id) or payment
    return payment


async def _settle(
    rails: Rails,
    order: Order,
    payment_id: str,
    account_id: int | None,
    make_hold: MakeHold | None,
) -> Paid | None:
    """Verify, claim, broadcast, wait, finish. None: another node claimed it meanwhile."""
    rpc = rails.rpcs[order.chain.caip2]
    begun: list[Payment] = []

    def job(recipient_chain: str) -> Job:
        return _job(rails, order, payment_id, recipient_chain, begun)

    try:
        handed = await _hand_in(rails, order, rpc, job)
    except Rejected as refusal:
        return await _spent_before(rails, order, rpc, refusal)
    except ChainError as error:
        observe.count("settlements", outcome="unavailable")
        raise refused(error) from error
    if handed is None:
        return None
    payment = replace(begun[-1], tx_hash=handed.tx_hash)
    hold = None if make_hold is None else _priced(make_hold, order.price_units)
    held = credential = None
    try:
        if handed.receipt is not None:
            ending = _Ending(payment, handed.receipt, account_id)
            payment, held, credential = await _finish(rails, order, ending, hold)
    except (ChainError, DatabaseUnavailable, CommitUnknown) as error:
        # The money may have moved and the mint may even stand; the background loop finds out.
        log.info("payment %s: %s; it is looked at again", payment.id, error)
    if payment.state == "processing":
        await _let_go(rails, payment)
    if handed.receipt is None and order.chain.facilitator:
        payment = await _by_others(rails, payment)
    if payment.state == "processing":
        observe.count("settlements", outcome="pending")
    return Paid(
        payment, order.price_units, held, repeat=False, same_presenter=True, credential=credential
    )


async def _by_others(rails: Rails, payment: Payment) -> Payment:
    """A facilitator may have sent what nobody told us of: look, as long as the caller may wait."""
    try:
        return await _await_end(rails, payment, recover.recover)
    except (ChainError, DatabaseUnavailable, CommitUnknown) as error:
        log.info("payment %s: %s; it is looked at again", payment.id, error)
        return payment


async def _hand_in(
    rails: Rails, order: Order, rpc: Rpc, job: Callable[[str], Job]
) -> Handed | None:
    """Verify, and let the engine settle. ``job`` makes one for the payer's kind of account."""
    auth = order.auth
    if isinstance(auth, permit2.Authorization):
        _, form = await permit2.settable(rpc, order.asset, auth)
        whose = await payer_chain_of(rpc, order)
        return await permits.settle(rails, order.asset, form, job(whose))  # by ourselves
    if await remote.usable(rails, order.chain):
        kind = await eip3009.verify(rpc, order.asset, auth, await _now_s(rails.db))
        whose = "" if kind == "key" else await payer_chain_of(rpc, order)
        asked = remote.Order(order.chain, order.asset, auth)
        return await remote.settle(rails, asked, job(whose), "eip3009")
    if eip3009.signed_by_key(order.chain.network, order.asset, auth):
        # The usual case. Whether the payer has code, in which case its key's signature does not
        # count, and whether the token would take it, is asked with everybody else's.
        if not await rpc.has_code(order.asset.address):
            raise Unavailable("rpc_error", f"there is no token at {order.asset.address}")
        with suppress(engine.PayerHasCode):
            return await engine.settle(rails, replace(job(""), code_known=False))
    await eip3009.verify(rpc, order.asset, auth, await _now_s(rails.db))
    recipient_chain = await payer_chain_of(rpc, order)
    return await engine.settle(rails, replace(job(recipient_chain), alone=True))


def _job(
    rails: Rails, order: Order, payment_id: str, recipient_chain: str, begun: list[Payment]
) -> Job:
    """The order as the engine takes it: what is sent, and how it is claimed. ``begun`` gets the
    payment as it was written."""
    auth = order.auth

    async def begin(tx: Tx, at: Begun) -> bool:
        if not await aliases.bind(tx, order, payment_id, recipient_chain, at.now_ms):
            return False
        claim = Claim(payment_id, order.content, order.offer)
        if not await journal.claim(tx, order.key, claim, at.now_ms):
            await aliases.unbind(tx, payment_id)
            return False
        payment = _new_payment(rails, order, payment_id, recipient_chain, at)
        await journal.insert(tx, payment)
        begun.append(payment)
        return True

    return Job(
        chain=order.chain,
        call=Call(payment_id, *exact.call_of(order.asset, auth)),
        payer=auth.from_,
        spends=(order.key.asset, auth.from_, auth.nonce),
        valid_before_s=auth.valid_before_s,
        begin=begin,
    )


async def _spent_before(rails: Rails, order: Order, rpc: Rpc, refusal: Rejected) -> Paid | None:
    """The token refuses an authorization: perhaps because it has moved this money already.

    By a transaction of another node, which claimed it before it sent: None, the caller joins. By
    a stranger's, before the payment was presented here: it is minted to its payer. It was public
    then, so whoever presents it has not shown that it is theirs. Else raises the refusal.
    """
    async with rails.db.read() as tx:
        if await journal.claim_of(tx, order.key) is not None:
            return None
    auth = order.auth
    try:
        found: list[Transfer] = []
        if refusal.code in recover.SPENT:
            spent = Spent(order.asset, auth.from_, auth.nonce, order.chain.pay_to, auth.value_units)
            found = await recover.seen(rpc, spent, exact.method_of(auth))
        if not found:
            observe.count("settlements", outcome="refused")
            raise refusal
        recipient_chain = await payer_chain_of(rpc, order)
    except ChainError as error:
        raise refused_order(order, error) from error

    async def work(tx: Tx) -> Payment | None:
        now_ms = await tx.now_ms()
        at = Begun(now_ms, found[0].block_number)
        payment = _new_payment(rails, order, journal.new_id(), recipient_chain, at)
        if not await journal.claim(tx, order.key, Claim(payment.id, order.content, None), now_ms):
            return None
        # If the identifier is another payment's, this one is minted all the same: it was paid.
        await aliases.bind(tx, order, payment.id, recipient_chain, now_ms)
        await journal.insert(tx, payment)
        transfer = await journal.take(tx, payment, found, now_ms)
        if transfer is None:  # nothing of this stands
            raise refused_order(order, refusal)
        done, _ = await journal.finish(tx, payment.id, transfer, now_ms)
        return done

    done = await transact(rails.db, work)
    if done is None:
        return None
    return Paid(done, order.price_units, None, repeat=True, same_presenter=False)


def _priced(make_hold: MakeHold, price_units: int) -> Callable[[int], ledger.Hold]:
    return lambda account_id: make_hold(account_id, price_units)


def _new_payment(
    rails: Rails, order: Order, payment_id: str, recipient_chain: str, at: Begun
) -> Payment:
    recipient, recipient_chain = order.given or (order.auth.from_, recipient_chain)
    span = rails.settings.credits.expire_after
    expires = order.purpose == offers.CREDITS and span is not None
    return Payment(
        id=payment_id,
        provider="x402",
        state="processing",
        purpose=order.purpose,
        payer=order.auth.from_,
        recipient=recipient,
        recipient_chain=recipient_chain,
        network=order.chain.caip2,
        asset=order.asset.address,
        amount_units=order.auth.value_units,
        expires_ms=span.after_ms(at.now_ms) if expires and span is not None else None,
        auth_nonce=order.auth.nonce,
        valid_before_s=min(exact.refused_from_s(order.auth), _FOREVER_S),
        from_block=at.from_block,
        tx_hash=None,
        external_ref=None,
        external_url=None,
        lot_id=None,
        error_code=None,
        error_detail=None,
        created_at_ms=at.now_ms,
        updated_at_ms=at.now_ms,
        lease_ms=in_hand.lease_ms(rails, at.now_ms),
        method=exact.method_of(order.auth),
        pay_to=order.auth.to,
        door=order.door,
    )


@dataclass(frozen=True, slots=True)
class _Ending:
    """A payment whose transaction is in a block, and the payer's account if it has one."""

    payment: Payment
    receipt: Receipt
    account_id: int | None


async def _finish(
    rails: Rails, order: Order, ending: _Ending, hold: Callable[[int], ledger.Hold] | None
) -> tuple[Payment, ledger.Outcome | None, str | None]:
    """Finish by what the logs say of this very payment. Still processing: not known yet."""
    auth, payment = order.auth, ending.payment
    spent = Spent(order.asset, auth.from_, auth.nonce, auth.to, auth.value_units)
    found = METHODS[payment.method].transfers(order.chain.caip2, ending.receipt, spent)
    if not found:
        # A neighbour may have taken it along, or the payer was faster: find out now, and send it
        # alone if it is still good.
        await recover.recover(rails, payment)
        return await _await_end(rails, payment, recover.recover), None, None
    life_s = _credential_s(rails.settings, order, payment)

    async def work(tx: Tx) -> tuple[Payment, ledger.Outcome | None, str | None]:
        now_ms, given = await tx.now_ms(), None
        transfer = await journal.take(tx, payment, found, now_ms)
        if transfer is None:
            return payment, None, None
        done, held = await journal.finish(tx, payment.id, transfer, now_ms, hold)
        if life_s and done.state == "succeeded" and done.lot_id is not None:
            end_ms = now_ms + life_s * 1_000
            given = await credentials.issue(tx, done.id, done.lot_id, auth.from_, end_ms)
        return done, held, given

    return await together.write(rails.endings, rails.db, ending.account_id, work)


def _credential_s(settings: Settings, order: Order, payment: Payment) -> int:
    """How long a credential for what this payment leaves is good; 0: it gets none.

    Only the key that pays for itself does: what a contract takes for a signature another may make.
    """
    auth = order.auth
    own = (payment.recipient, payment.recipient_chain) == (auth.from_, "")
    if not own or not order.bare or auth.value_units <= order.price_units:
        return 0
    signed = exact.signed_by_key(order.chain.network, order.asset, auth)
    return settings.credits.credential_s if signed else 0


async def _let_go(rails: Rails, payment: Payment) -> None:
    """Hand an unfinished payment to the background loop, which also knows how to fail one."""
    rails.in_hand.discard(payment.id)
    try:
        async with rails.db.write() as tx:
            await journal.release(tx, payment.id, await tx.now_ms())
    except (DatabaseUnavailable, CommitUnknown):
        return  # its lease runs out by itself
