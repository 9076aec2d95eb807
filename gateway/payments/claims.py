"""Money that came without a request: whose it is, and how its sender says so.

A Transfer log is proof of itself. Without a signature its sender is credited and nobody else; for
another wallet the sender signs which transfer it gives away (``wallet_auth/recipient.py``).
"""

from __future__ import annotations

from dataclasses import replace

from chain.rpc import Rpc
from chain.schemes import eip3009
from chain.transfers import Transfer
from gateway.db import Tx
from gateway.payments import inbound, journal
from gateway.payments.inbound import For, Inbound, Placed
from gateway.payments.journal import AuthKey, Payment
from gateway.settings import Settings

PROVIDER = "deposits"
SOURCE = "deposit"


async def chain_of(rpc: Rpc, address: str) -> str:
    """Where an address is one wallet: "" (everywhere) for a key, its network for a contract."""
    kind = await eip3009.account_kind(rpc, address)
    return "" if kind == "key" else rpc.network.caip2


async def authorized_by(tx: Tx, transfer: Transfer) -> tuple[Payment | None, str | None]:
    """The payment that claimed the authorization a transfer was made by, and what it was decided
    to be used for; two None: it was made by none, or by one that was never presented here."""
    if transfer.authorizer is None or transfer.auth_nonce is None:
        return None, None
    key = AuthKey(transfer.network, transfer.asset, transfer.authorizer, transfer.auth_nonce)
    row = await tx.fetchrow(
        "SELECT payment_id, decision FROM authorization_use WHERE network = $1 AND asset = $2"
        " AND payer = $3 AND nonce = $4",
        key.network,
        key.asset,
        key.payer,
        key.nonce,
    )
    if row is None:
        return None, None
    payment = await journal.by_id(tx, row["payment_id"], lock=True)
    return payment, row["decision"]


async def give(
    tx: Tx,
    settings: Settings,
    transfer: Transfer,
    recipient: str,
    recipient_chain: str,
) -> Placed:
    """Credit a transfer to a wallet, as a payment of its own. Any number of times, once.

    One that was made by an authorization of a payment finishes that payment instead. ``taken``:
    it went to another wallet before.
    """
    now_ms = await tx.now_ms()
    payment, decision = await authorized_by(tx, transfer)
    if payment is not None and decision == "settle":
        return await _finish(tx, payment, transfer, (recipient, recipient_chain), now_ms)
    row = await inbound.see(tx, transfer, now_ms)
    if row.recipient is not None:
        whose = (row.recipient, row.recipient_chain)
        return Placed(row, taken=whose != (recipient, recipient_chain))
    span = settings.credits.expire_after
    # An authorization that was paid from credits and broadcast all the same never expires.
    expires = span is not None and decision is None
    made = _new_payment(transfer, recipient, recipient_chain, now_ms)
    made = replace(made, expires_ms=span.after_ms(now_ms) if expires and span else None)
    await journal.insert(tx, made)
    whose_is = For(recipient, recipient_chain, SOURCE, made.id, made.expires_ms)
    return await inbound.place(tx, transfer, whose_is, now_ms)


async def _finish(
    tx: Tx, payment: Payment, transfer: Transfer, whose: tuple[str, str], now_ms: int
) -> Placed:
    await journal.finish(tx, payment.id, transfer, now_ms)
    row = await inbound.see(tx, transfer, now_ms)
    return Placed(row, taken=(row.recipient, row.recipient_chain) != whose)


def _new_payment(transfer: Transfer, recipient: str, recipient_chain: str, now_ms: int) -> Payment:
    return Payment(
        id=journal.new_id(),
        provider=PROVIDER,
        state="processing",
        purpose="credits",
        payer=transfer.from_,
        recipient=recipient,
        recipient_chain=recipient_chain,
        network=transfer.network,
        asset=transfer.asset,
        amount_units=transfer.value_units,
        expires_ms=None,
        auth_nonce=None,
        valid_before_s=None,
        from_block=transfer.block_number,
        tx_hash=transfer.tx_hash,
        external_ref=None,
        external_url=None,
        lot_id=None,
        error_code=None,
        error_detail=None,
        created_at_ms=now_ms,
        updated_at_ms=now_ms,
        lease_ms=0,
    )


def transfer_of(row: Inbound) -> Transfer:
    """What was seen, as it stands in the books."""
    return Transfer(
        network=row.network,
        tx_hash=row.tx_hash,
        n=row.ordinal,
        asset=row.asset,
        from_=row.from_address,
        to=row.pay_to,
        value_units=row.value_units,
        block_number=row.block_number,
        block_hash=row.block_hash,
        auth_nonce=row.auth_nonce,
        authorizer=row.authorizer,
    )
