"""``POST v1/credits/purchase`` with a transaction hash: money that was sent without asking first.

202 until it is final enough for its amount, then 200, and the same hash has the same answer ever
after. What the log says is credited, whatever was asked for; the answer says if that differs.
Everything that cannot be credited has a code of its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from chain import receipts
from chain.errors import ChainError
from chain.receipts import Receipt
from chain.transfers import TRANSFER, Transfer, transfers_in
from gateway.db import Tx, transact
from gateway.errors import Problem
from gateway.ledger import LedgerFault, read
from gateway.money import format_usd
from gateway.payments import claims, inbound, journal, purchase, sponsor, watcher
from gateway.payments.inbound import Inbound, Placed
from gateway.payments.journal import Payment
from gateway.payments.rails import Rails
from gateway.settings import Chain, Settings
from wallet_auth import recipient as giving
from wallet_auth.keys import address_word
from wallet_auth.request import Call

MEMBERS: Final = frozenset(("transaction_hash", "network", "transfer"))
_HASH: Final = re.compile(r"0x[0-9a-fA-F]{64}")


@dataclass(frozen=True, slots=True)
class Claim:
    """What the request says. ``recipient`` None: whoever sent the money."""

    tx_hash: str
    chains: tuple[Chain, ...]
    n: int | None
    recipient: str | None
    signature: bytes | None
    asked_units: int | None


def parse(settings: Settings, wanted: dict[str, Any], recipient: str | None) -> Claim:
    """Raises ``Problem("invalid_request")``."""
    tx_hash, n = wanted["transaction_hash"], wanted.get("transfer")
    if not isinstance(tx_hash, str) or _HASH.fullmatch(tx_hash) is None:
        raise Problem("invalid_request", "transaction_hash is 0x and 64 hex digits.")
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < 10_000):
        raise Problem("invalid_request", "transfer is a whole number from 0.")
    named = wanted.get("network")
    chains = tuple(c for c in settings.chains if named in (None, c.name, c.caip2))
    if not chains:
        raise Problem("invalid_request", f"network {str(named)[:60]!r} is not taken here.")
    asked = "amount_usd" in wanted or "credits" in wanted
    return Claim(
        tx_hash=tx_hash.lower(),
        chains=chains,
        n=n,
        recipient=recipient,
        signature=sponsor.signature_in(wanted),
        asked_units=purchase.amount_of(settings, wanted) if asked else None,
    )


@dataclass(frozen=True, slots=True)
class Claimed:
    """What became of it: the payment, and each transfer. ``repeat``: it had been credited before.

    Not all ``minted``: it waits until its block is deep enough.
    """

    payment: Payment
    rows: tuple[Inbound, ...]
    minted_units: int
    repeat: bool

    @property
    def minted(self) -> bool:
        return all(row.state == "minted" for row in self.rows)


async def known(rails: Rails, asked: Claim) -> Claimed | None:
    """What the books know, if that is all there is to say: no node has to be asked then."""
    rows = await _known(rails, asked)
    return None if rows is None else await _claimed(rails, rows, repeat=True)


async def credit(rails: Rails, asked: Claim, call: Call) -> Claimed:
    """Credit what a transaction moved to us. Raises ``Problem`` (202 is one too), ``ChainError``.

    ``call``: how a contract is asked whether a signature is its own.
    """
    chain, receipt = await _find(rails, asked)
    moved = await _creditable(rails, asked, chain, receipt)
    theirs = asked.recipient is None or all(each.from_ == asked.recipient for each in moved)
    if len(moved) > 1 and not theirs:
        raise Problem(
            "invalid_request",
            "This transaction has several transfers: say which one (transfer).",
            members={"transfers": [each.n for each in moved]},
        )
    rows = []
    for transfer in moved:
        placed = await _give(rails, asked, chain, transfer, call)
        if placed.taken:
            raise _taken(asked)
        rows.append(placed.row)
    return await _claimed(rails, rows, repeat=False)


async def _known(rails: Rails, asked: Claim) -> list[Inbound] | None:
    async with rails.db.read() as tx:
        for chain in asked.chains:
            rows = await inbound.known(tx, chain.caip2, asked.tx_hash)
            if asked.n is not None:
                rows = [row for row in rows if row.ordinal == asked.n]
            rows = [row for row in rows if row.state != "gone"]
            if rows and all(row.state == "minted" for row in rows):
                # Without a name the answer is of what was credited; with one it must be theirs.
                if any(not _answers(asked, row) for row in rows):
                    raise _taken(asked)
                return rows
    return None


def _answers(asked: Claim, row: Inbound) -> bool:
    """Whether what was credited is what this claim comes to, or came to (``_whose``)."""
    if asked.recipient in (None, row.recipient):
        return True
    inexact = asked.signature is not None and asked.asked_units not in (None, row.value_units)
    return inexact and row.recipient == row.from_address


def _taken(asked: Claim) -> Problem:
    return Problem(
        "payment_already_used",
        "This transfer was credited to another wallet before.",
        members={"transaction": asked.tx_hash},
    )


async def _find(rails: Rails, asked: Claim) -> tuple[Chain, Receipt]:
    """The transaction, on whichever of the networks it is. 202 while it is in no block."""
    unreachable: ChainError | None = None
    for chain in asked.chains:
        try:
            receipt = await receipts.read(rails.rpcs[chain.caip2], asked.tx_hash)
        except ChainError as error:
            unreachable = error
            continue
        if receipt is not None:
            return chain, receipt
    if unreachable is not None:
        raise unreachable
    raise Problem(
        "settlement_pending",
        "This transaction is in no block here yet. Send the same request again.",
        headers={"Retry-After": "2"},
        members={"transaction": asked.tx_hash, "state": "not_found"},
        status=202,
    )


async def _creditable(rails: Rails, asked: Claim, chain: Chain, receipt: Receipt) -> list[Transfer]:
    """The transfers of a transaction that count here. Raises ``Problem`` that says why none."""
    about = {"transaction": asked.tx_hash, "network": chain.caip2}
    if not receipt.succeeded:
        raise Problem("transaction_failed", "It failed, and moved nothing.", members=about)
    moved: list[Transfer] = []
    for asset in chain.network.assets:
        async with rails.db.read() as tx:
            since = await watcher.watched(tx, chain, asset)
        found = transfers_in(chain.caip2, receipt, asset, chain.pay_to)
        if found and since is None:
            since = await watcher.begin(rails, chain, asset)
        if found and since is not None and receipt.block_number < since.first_block:
            raise Problem(
                "transfer_too_old",
                "It was made before this gateway's books begin.",
                members={**about, "first_block": since.first_block},
            )
        moved += [each for each in found if asked.n in (None, each.n)]
    if not moved:
        other = _other_token(receipt, chain)
        why = "It moved nothing to this gateway."
        if asked.n is not None:
            why = f"It has no transfer {asked.n} to this gateway."
        if other is not None:
            why = f"It moved the token {other} to this gateway, which is not taken here."
        reason = "no_transfer" if other is None else "wrong_token"
        raise Problem("transfer_not_found", why, members={**about, "reason": reason})
    big = [each for each in moved if each.value_units >= chain.min_onchain_units]
    if not big:
        least = format_usd(chain.min_onchain_units)
        raise Problem("transfer_too_small", f"Less than {least} is not credited.", members=about)
    return big


def _other_token(receipt: Receipt, chain: Chain) -> str | None:
    """A token that was sent to us and is none of ours."""
    to_word = address_word(chain.pay_to)
    for log in receipt.logs:
        ours = chain.network.asset(log.address) is not None
        told = len(log.topics) >= 3 and log.topics[0] == TRANSFER and log.topics[2] == to_word
        if told and not ours:
            return log.address
    return None


async def _give(rails: Rails, asked: Claim, chain: Chain, transfer: Transfer, call: Call) -> Placed:
    rpc = rails.rpcs[chain.caip2]
    recipient = await _whose(rails, asked, transfer, call)
    where = await claims.chain_of(rpc, recipient)
    calldata = await claims.calldata_of(rails, transfer)

    async def work(tx: Tx) -> Placed:
        return await claims.give(tx, rails.settings, transfer, recipient, where, calldata)

    return await transact(rails.db, work)


async def _whose(rails: Rails, asked: Claim, transfer: Transfer, call: Call) -> str:
    """Who gets it: its sender, or whom the sender signed it away to. Raises ``Problem``.

    The published lines count credits. Where the transfer is not of exactly so many, they gave away
    something else than what came: then it is the sender's.
    """
    network, payer = transfer.network, transfer.from_
    recipient, value = asked.recipient or payer, transfer.value_units
    if recipient == payer:
        return payer
    text = giving.message(rails.keys.deployment, network, transfer.tx_hash, transfer.n, recipient)
    if asked.signature is not None:
        texts = [text]
        if asked.n is None:  # those lines name a transaction: of one with several none is meant
            texts += sponsor.published(payer, recipient, value, "tx", transfer.tx_hash)
        if transfer.auth_nonce is not None and transfer.authorizer == payer:
            texts += sponsor.published(payer, recipient, value, "nonce", transfer.auth_nonce)
        if await sponsor.signed(rails, network, payer, texts, asked.signature, call):
            return recipient
        other = asked.asked_units
        if asked.n is None and other not in (None, value):
            lines = sponsor.published(payer, recipient, other or 0, "tx", transfer.tx_hash)
            if await sponsor.signed(rails, network, payer, lines, asked.signature, call):
                return payer
    missing = asked.signature is None
    raise sponsor.required(rails.settings, payer, recipient, text, missing=missing)


async def _claimed(rails: Rails, rows: list[Inbound], *, repeat: bool) -> Claimed:
    first = next((row for row in rows if row.state != "minted"), rows[0])
    async with rails.db.read() as tx:
        payment = None
        if first.payment_id is not None:
            payment = await journal.by_id(tx, first.payment_id)
        lots = [row.lot_id for row in rows if row.lot_id is not None]
        minted = [await read.minted_units(tx, lot_id) or 0 for lot_id in lots]
    if payment is None:
        raise LedgerFault(f"the transfer {first.tx_hash}/{first.n} has no payment")
    return Claimed(payment, tuple(rows), sum(minted), repeat)


async def came_through(rails: Rails, done: Claimed, door: str) -> None:
    """What a wallet sent for itself, and names here, was bought through this door: also if it was
    found in the chain before, when nothing was known of any. Any number of times, once."""
    rows = [row for row in done.rows if row.source == claims.SOURCE and row.lot_id is not None]
    mine = [row for row in rows if row.from_address == row.recipient]
    if not mine:
        return

    async def work(tx: Tx) -> None:
        for row in mine:
            await tx.execute(
                "UPDATE lot SET source = $2 WHERE id = $1 AND source = $3",
                row.lot_id,
                door,
                claims.SOURCE,
            )
            await tx.execute(
                "UPDATE inbound SET source = $4 WHERE network = $1 AND tx_hash = $2 AND n = $3",
                row.network,
                row.tx_hash,
                row.n,
                door,
            )

    await transact(rails.db, work)


def shown(settings: Settings, asked: Claim, done: Claimed) -> dict[str, Any]:
    """A claim that was credited, as whoever named the transaction sees it."""
    view: dict[str, Any] = {
        "success": True,
        **purchase.shown(settings, done.payment, done.minted_units),
        "wallet_address": done.payment.recipient,
        "transfers": [
            {
                "transfer": row.ordinal,
                "from": row.from_address,
                "wallet_address": row.recipient,
                "amount_units": row.value_units,
            }
            for row in done.rows
        ],
    }
    if asked.asked_units is not None:
        more = done.minted_units - asked.asked_units
        told = "exact" if more == 0 else "overpaid" if more > 0 else "underpaid"
        view |= {"asked_units": asked.asked_units, "difference_units": more, "paid": told}
    return view
