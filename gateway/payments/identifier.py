"""``payment-identifier`` (x402 extension): the same call signed for again is not paid for again.

The client's id is unsigned, so it is never an id of its own: it is an alias of the authorization's
one-time value, per wallet, looked up after the signature was checked. An alias that is known with
another authorization of the same wallet and the same content answers from store, and the new
authorization is not sent; with other content it is a conflict.
"""

from __future__ import annotations

from chain.schemes import exact
from gateway import ledger
from gateway.accounts import wallets
from gateway.errors import Problem
from gateway.ledger import read
from gateway.payments.from_credits import Spent
from gateway.payments.order import CameWith, order_of
from gateway.payments.rails import Rails
from gateway.payments.wire import IDENTIFIER, Presented


def alias_of(presented: Presented) -> str | None:
    """The alias under which the call of this payment is kept."""
    return None if presented.identifier is None else f"{IDENTIFIER}:{presented.identifier}"


async def find(rails: Rails, presented: Presented, came: CameWith) -> Spent | None:
    """The call this wallet has paid for under the same identifier, with another authorization.

    None: there is none, or nobody can tell yet whose signature this is (contract wallets). Raises
    ``Problem``: ``request_id_conflict`` for other content, and what ``order_of`` raises.
    """
    alias, payer = alias_of(presented), presented.authorization.from_
    if alias is None:
        return None
    async with rails.db.read() as tx:
        account_id = await wallets.find(tx, payer)
        if account_id is None:
            return None
        holds = await read.holds_of_request(tx, account_id, alias)
        hold = next((each for each in holds if each.principal == payer), None)
        if hold is None or hold.request_id == presented.authorization.nonce:
            return None
        close = await read.close_of(tx, hold.id)
        now_s = await tx.now_ms() // 1000
    order = order_of(rails, presented, came, now_s)
    signed = exact.signed_by_key(order.chain.network, order.asset, order.auth)
    if order.offer is None or not signed:
        return None
    if hold.content != came.content:
        raise Problem(
            "request_id_conflict",
            "This payment identifier was used before, with other content. Take a new one.",
        )
    outcome = ledger.Repeated(hold, close)
    return Spent(
        order.chain, payer, account_id, hold.max_units, outcome, repeat=True, same_presenter=True
    )
