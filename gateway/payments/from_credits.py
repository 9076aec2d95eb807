"""Credits before money: a payment for a call whose wallet has credits already spends those instead.

A stock x402 client knows nothing of credits and signs a payment for every call. The signature is
proof enough to spend that much of what the same wallet paid for over x402 before, and of nothing
else its account has: the hold is restricted to those lots, so it makes no difference what a card,
a sponsor or an operator put there. Nothing is broadcast, and the signature is never written
anywhere. Which of the two an authorization is used
for is decided once, for ever and on every node, by its row in ``authorization_use``: inserted with
``credits`` in the transaction that takes the hold. The key of a mint is another one, so if somebody
broadcasts the authorization all the same, its transfer becomes credits of its payer like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from chain import transfers
from chain.errors import ChainError
from chain.schemes import eip3009, exact
from gateway import ledger
from gateway.accounts import wallets
from gateway.db import Tx, transact
from gateway.errors import Problem
from gateway.ledger import read
from gateway.payments import journal, offers
from gateway.payments.journal import Claim
from gateway.payments.order import CameWith, Order, key_of, order_of
from gateway.payments.rails import Rails
from gateway.payments.wire import Presented
from gateway.settings import Chain

CREDITS = "credits"  # authorization_use.decision
SPARE_S = 60  # how far a client's clock may be ahead
MakeHold = Callable[[int, int], ledger.Hold]


def only(payer: str) -> ledger.Only:
    """What a payment of this wallet may spend, being a weaker proof than a signed request."""
    return ledger.Only(source="x402", payer=payer)


class Decided(Problem):
    """This authorization was spent as credits meanwhile; it is never settled."""

    def __init__(self) -> None:
        super().__init__(
            "payment_already_used",
            "This payment was presented before, and paid for a call from the payer's credits.",
        )


@dataclass(frozen=True, slots=True)
class Spent:
    """A call whose payment was answered from credits. ``outcome`` is that of its hold.

    ``repeat``: it had been presented before; ``same_presenter``: by whoever does so now, as the
    offer's token shows.
    """

    chain: Chain
    payer: str
    account_id: int
    price_units: int
    outcome: ledger.Outcome
    repeat: bool
    same_presenter: bool


async def take(
    rails: Rails, presented: Presented, came: CameWith, make_hold: MakeHold
) -> Spent | None:
    """Take the hold of a call from the payer's credits, if this payment may be used for that.

    None: it is to be settled as usual, or refused in the words of those who settle. Raises
    ``Decided`` when it was used so before, with other content; and ``Problem`` for a payment that
    does not answer an offer made for this request.
    """
    chain = rails.chain_of(presented)
    if not isinstance(presented.authorization, eip3009.Authorization):
        return None  # always settled
    key = key_of(chain, presented)
    async with rails.db.read() as tx:
        claim = await journal.claim_of(tx, key)
        if claim is not None:
            return await _again(tx, chain, presented, came, claim)
        account_id, has_units = await _own_credits(tx, key.payer)
        now_s = await tx.now_ms() // 1000
    order = order_of(rails, presented, came, now_s) if has_units else None
    if (
        account_id is None
        or order is None
        or has_units < order.price_units
        or not _for_this_call(rails, order, presented, now_s)
        or not await _still_good(rails, order, presented)
    ):
        return None
    try:
        outcome = await _hold(rails, order, account_id, make_hold)
    except _TakenError:
        # By a settlement (whoever settles joins it), or by this very request on another node.
        async with rails.db.read() as tx:
            claim = await journal.claim_of(tx, key)
            return None if claim is None else await _again(tx, chain, presented, came, claim)
    if outcome is None:
        return None
    return Spent(
        chain, key.payer, account_id, order.price_units, outcome, repeat=False, same_presenter=True
    )


async def _again(
    tx: Tx, chain: Chain, presented: Presented, came: CameWith, claim: Claim
) -> Spent | None:
    """What became of a payment that is known. None: it was, or is being, settled."""
    if claim.decision != CREDITS:
        return None
    held = await read.hold_by_id(tx, int(claim.payment_id))
    if held is None or claim.content != came.content:
        raise Decided
    token = presented.offer
    return Spent(
        chain,
        presented.authorization.from_,
        held.account_id,
        held.max_units,
        ledger.Repeated(held, await read.close_of(tx, held.id)),
        repeat=True,
        same_presenter=token is not None and offers.token_digest(token) == claim.offer,
    )


def _for_this_call(rails: Rails, order: Order, presented: Presented, now_s: int) -> bool:
    """Whether it was signed for this very call, now, and for at least what the call can cost."""
    latest_s = now_s + rails.settings.server.offer_timeout_s + SPARE_S
    return (
        order.purpose == offers.CALL
        and order.price_units <= order.auth.value_units
        and order.auth.valid_before_s <= latest_s
        # v2: an offer that was made for this request. v1 has no token; the chain is asked instead.
        and (order.offer is not None or presented.version == 1)
    )


async def _still_good(rails: Rails, order: Order, presented: Presented) -> bool:
    """Whether the key of the payer signed it, and (v1) the token has not moved it yet.

    Only keys: what a contract wallet takes for a signature, and on which chain, is for those who
    settle.
    """
    if not exact.signed_by_key(order.chain.network, order.asset, order.auth):
        return False
    if presented.version != 1:
        return True
    try:
        return not await transfers.authorization_used(
            rails.rpcs[order.chain.caip2], order.asset, order.auth.from_, order.auth.nonce
        )
    except ChainError:
        return False


class _TakenError(Exception):
    """Another request has the authorization: nothing of this transaction may stand."""


async def _hold(
    rails: Rails, order: Order, account_id: int, make_hold: MakeHold
) -> ledger.Outcome | None:
    """The hold and the row that decides, both or neither. None: not from credits.

    Raises ``_TakenError``.
    """

    async def work(tx: Tx) -> ledger.Outcome | None:
        now_ms = await tx.now_ms()
        step = replace(make_hold(account_id, order.price_units), only=only(order.auth.from_))
        (outcome,) = await ledger.apply(tx, [step], now_ms)
        if isinstance(outcome, ledger.Short | ledger.Frozen):
            return None
        if isinstance(outcome, ledger.Held):
            claim = Claim(str(outcome.hold.id), order.content, order.offer, CREDITS)
            if not await journal.claim(tx, order.key, claim, now_ms):
                raise _TakenError
        return outcome

    return await transact(rails.db, work)


async def _own_credits(tx: Tx, payer: str) -> tuple[int | None, int]:
    """The account of a wallet and what it may spend this way now: a look, not yet a decision."""
    account_id = await wallets.find(tx, payer)
    seen = None if account_id is None else await read.account(tx, account_id)
    if account_id is None or seen is None or seen.frozen or seen.debt_units:
        return account_id, 0
    return account_id, await read.left_of(tx, account_id, only(payer))
