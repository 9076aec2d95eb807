"""Money that came without a request: whose it is, and how its sender says so.

A Transfer log is proof of itself. Without a signature its sender is credited and nobody else; for
another wallet the sender signs which transfer it gives away (``wallet_auth/recipient.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from chain.errors import Unavailable
from chain.rpc import Rpc
from chain.schemes import eip3009
from chain.transfers import Transfer
from gateway.db import Row, Tx, WriteConflict
from gateway.payments import inbound, journal
from gateway.payments.inbound import For, Inbound, Placed
from gateway.payments.journal import AuthKey, Payment
from gateway.payments.rails import Rails
from gateway.settings import Settings

PROVIDER = "deposits"
SOURCE = "deposit"


async def chain_of(rpc: Rpc, address: str) -> str:
    """Where an address is one wallet: "" (everywhere) for a key, its network for a contract."""
    kind = await eip3009.account_kind(rpc, address)
    return "" if kind == "key" else rpc.network.caip2


# Payments by Permit2 that are not at their end and have no transfer: what came may be their money,
# also if they were given up. One amount of one payer to one payee is worth the same as any other.
_OF: Final = (
    "SELECT id, auth_nonce FROM payment p WHERE payer = $1 AND network = $2 AND asset = $3"
    " AND amount_units = $4 AND pay_to = $5 AND method = 'permit2' AND provider = 'x402'"
    " AND NOT EXISTS (SELECT 1 FROM inbound i WHERE i.payment_id = p.id AND i.state <> 'gone')"
)
# Each state has an index of its own. Ids begin with the time.
_OPEN: Final = f"{_OF} AND state = 'processing' UNION ALL {_OF} AND state = 'failed' ORDER BY id"


async def calldata_of(rails: Rails, transfer: Transfer) -> bytes:
    """What the transaction of a transfer says, if a payment by Permit2 may be in it; else nothing.

    Permit2 marks what it uses in no log. Asked before the books are written, since a node is asked:
    a payment that is claimed later than this finds its transfer by itself. Raises ``ChainError``.
    """
    if transfer.authorizer is not None:
        return b""
    async with rails.db.read() as tx:
        if await journal.owner_of(tx, transfer) is not None or not await _open(tx, transfer):
            return b""
    rpc = rails.rpcs[transfer.network]
    sent = await rpc.call("eth_getTransactionByHash", [transfer.tx_hash])
    if not isinstance(sent, dict):
        raise Unavailable("rpc_bad_answer", f"{transfer.tx_hash} has logs and is not there")
    return rpc.data(sent.get("input"))


async def _open(tx: Tx, transfer: Transfer) -> Sequence[Row]:
    return await tx.fetch(
        _OPEN,
        transfer.from_,
        transfer.network,
        transfer.asset,
        transfer.value_units,
        transfer.to,
    )


async def by_permit2(tx: Tx, transfer: Transfer, calldata: bytes) -> Payment | None:
    """The payment by Permit2 that a transfer is of, or may be of, locked: the one that has it, the
    one our own transaction was made for, or one whose nonce a stranger's carries."""
    if transfer.authorizer is not None:
        return None
    owner = await journal.owner_of(tx, transfer)
    if owner is None and calldata:
        carried = (
            row["id"]
            for row in await _open(tx, transfer)
            if bytes.fromhex(row["auth_nonce"][2:]) in calldata
        )
        owner = next(carried, None)
    payment = None if owner is None else await journal.by_id(tx, owner, lock=True)
    # Of a payment that was settled for somebody else nothing is ours.
    return payment if payment is not None and payment.recipient is not None else None


async def authorized_by(
    tx: Tx, transfer: Transfer, calldata: bytes = b""
) -> tuple[Payment | None, str | None]:
    """The payment that claimed the authorization a transfer was made by, and what it was decided
    to be used for; two None: it was made by none, or by one that was never presented here.
    ``calldata``: of its transaction, if ``calldata_of`` has it."""
    payment = await by_permit2(tx, transfer, calldata)
    if payment is not None:
        return payment, "settle"
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


async def give(  # noqa: PLR0917  (a transfer, and whose it is)
    tx: Tx,
    settings: Settings,
    transfer: Transfer,
    recipient: str,
    recipient_chain: str,
    calldata: bytes = b"",
) -> Placed:
    """Credit a transfer to a wallet, as a payment of its own. Any number of times, once.
    ``calldata``: of its transaction, from ``calldata_of``.

    One that was made by an authorization of a payment finishes that payment instead. ``taken``:
    it went to another wallet before.
    """
    now_ms = await tx.now_ms()
    payment, decision = await authorized_by(tx, transfer, calldata)
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
    if await journal.take(tx, payment, [transfer], now_ms) is None:
        raise WriteConflict("another payment has taken this transfer meanwhile")
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
