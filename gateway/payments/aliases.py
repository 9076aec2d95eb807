"""``payment-identifier`` on purchases: the payer's own name for a payment of credits.

Bound in the transaction that claims the authorization, before anything is sent: of two that come
under one name at once, here or on two nodes, one is sent. It stays with that payment for ever, also
if that failed. A name is signed by nobody, so it counts only beside an authorization that is good.
"""

from __future__ import annotations

from chain.errors import ChainError
from chain.schemes import exact
from gateway.db import Tx
from gateway.errors import Problem
from gateway.ledger import LedgerFault
from gateway.payments import journal
from gateway.payments.journal import Payment
from gateway.payments.order import Order, payer_chain_of, refused_order
from gateway.payments.rails import Rails


async def bind(tx: Tx, order: Order, payment_id: str, payer_chain: str, now_ms: int) -> bool:
    """Give a new payment the name it came with. False: the payer has used it for another one.

    ``payer_chain``: as ``Payment.recipient_chain``.
    """
    if order.alias is None:
        return True
    return (
        await tx.execute(
            "INSERT INTO payment_alias (payer, payer_chain, alias, payment_id, content, at_ms)"
            " VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (payer, payer_chain, alias) DO NOTHING",
            order.auth.from_,
            payer_chain,
            order.alias,
            payment_id,
            order.content,
            now_ms,
        )
        == 1
    )


async def unbind(tx: Tx, payment_id: str) -> None:
    """Take back what ``bind`` did in this transaction: the payment is not made after all."""
    await tx.execute("DELETE FROM payment_alias WHERE payment_id = $1", payment_id)


async def require_same(tx: Tx, payment_id: str, alias: str | None) -> None:
    """A payment that has a name is shown again under that one, or under none. Raises
    ``Problem("request_id_conflict")``."""
    if alias is None:
        return
    bound = await tx.fetchval("SELECT alias FROM payment_alias WHERE payment_id = $1", payment_id)
    if bound not in (None, alias):
        raise Problem(
            "request_id_conflict", "This payment was presented under another identifier before."
        )


async def find(rails: Rails, order: Order) -> tuple[Payment, str] | None:
    """The payment this payer has made under the same name, by another authorization, and on which
    chain the payer is a contract.

    Raises ``Problem``: ``request_id_conflict`` if it was for something else, and whatever is wrong
    with this authorization.
    """
    if order.alias is None:
        return None
    async with rails.db.read() as tx:
        rows = await tx.fetch(
            "SELECT payer_chain, payment_id, content FROM payment_alias"
            " WHERE payer = $1 AND alias = $2",
            order.auth.from_,
            order.alias,
        )
        now_s = await tx.now_ms() // 1_000
    if not rows:
        return None
    payer_chain = ""
    if not exact.signed_by_key(order.chain.network, order.asset, order.auth):
        rpc = rails.rpcs[order.chain.caip2]
        try:
            await exact.verify(rpc, order.asset, order.auth, now_s)
            payer_chain = await payer_chain_of(rpc, order)
        except ChainError as error:
            raise refused_order(order, error) from error
    row = next((each for each in rows if each["payer_chain"] == payer_chain), None)
    if row is None:
        return None
    if bytes(row["content"]) != order.content:
        raise Problem(
            "request_id_conflict",
            "This payment identifier was used before, for something else. Take a new one.",
        )
    async with rails.db.read() as tx:
        payment = await journal.by_id(tx, row["payment_id"])
    if payment is None:
        raise LedgerFault(f"there is no payment {row['payment_id']}")
    return payment, payer_chain
