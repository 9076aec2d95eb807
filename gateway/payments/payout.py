"""Unused credits back on chain, to the wallet that paid for them, at most once for each credit.

ask       which of the payer's final lots; one transaction withholds their units in the ledger
          and writes the payment that is to carry them out. From then on they are nobody's to
          spend.
carry     send it and end it by what the chain proves (``carry.py``)
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from chain import tokens
from chain.errors import ChainError, Rejected
from chain.eth import selector, uint_word
from chain.rpc import Rpc
from gateway import ledger
from gateway.db import Tx, transact
from gateway.errors import Problem
from gateway.money import format_credits, format_usd
from gateway.observe import log
from gateway.payments import carry, gas, in_hand, journal
from gateway.payments.journal import Payment
from gateway.payments.rails import PAUSES, Rails
from gateway.settings import Chain, Settings
from wallet_auth.keys import address_word, keccak256

VALID_S: Final = 1_800  # how long the token takes an authorization that was signed
AT_ONCE: Final = 10  # most lots that one request pays out
_SOURCES: Final = ("x402", "deposit", journal.EXTERNAL)
_TRANSFER: Final = selector("transfer(address,uint256)")


def policy(settings: Settings) -> dict[str, Any]:
    """Whether credits can be had back, in words for whoever is about to buy some."""
    chains = [chain for chain in settings.chains if chain.refund_key is not None]
    if not chains:
        return {
            "refundable": False,
            "text": "Credits are not paid back, unless the law or the operator says so.",
        }
    least = {chain.caip2: format_usd(chain.refund_min_units) for chain in chains}
    return {
        "refundable": True,
        "text": "Unused credits are paid back in USDC, without a fee, to the wallet that paid for "
        "them on these networks, once that payment is final: POST /farebox/v1/credits/refund.",
        "least_usd": least,
    }


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request asks back. ``lot_id`` None: of any lot; ``amount_units`` None: all."""

    lot_id: int | None
    amount_units: int | None


@dataclass(frozen=True, slots=True)
class Asker:
    """A bound identity: the payer itself. ``request_id`` makes its request happen once."""

    account_id: int
    address: str
    chain: str  # "" for a key; a contract wallet's own
    request_id: str

    @property
    def principal(self) -> str:
        return f"{self.chain}:{self.address}" if self.chain else self.address


@dataclass(frozen=True, slots=True)
class _Payable:
    """A lot that may go back, and the mint key that names it for ever."""

    lot_id: int
    network: str
    tx_hash: str
    n: int
    asset: str
    remaining_units: int


def nonce_of(deployment: str, network: str, tx_hash: str, n: int, ordinal: int) -> str:
    """The authorization nonce of a payout: one for each mint and ordinal, for ever."""
    parts = ["farebox payout 1", deployment, network, tx_hash, str(n), str(ordinal)]
    return "0x" + keccak256("\0".join(parts).encode()).hex()


# -- asking ----------------------------------------------------------------------------------------


async def ask(rails: Rails, asker: Asker, wanted: Wanted, content: bytes) -> tuple[list[str], bool]:
    """Withhold what is asked back and send it. Returns the payments' ids, and whether the same
    request had been made before. Raises ``Problem`` with nothing withheld."""
    if all(chain.refund_key is None for chain in rails.settings.chains):
        raise Problem("refund_not_offered", "Credits are not paid back on chain here.")
    async with rails.db.read() as tx:
        before = await _asked_before(tx, asker, content)
        payable = [] if before is not None else await _payable(tx, rails.settings, asker, wanted)
    if before is not None:
        return before, True
    blocks_now = await _look_ahead(rails, asker, wanted, payable)

    async def work(tx: Tx) -> tuple[list[str], bool]:
        now_ms = await tx.now_ms()
        new = await tx.execute(
            "INSERT INTO payout_request (account_id, principal, request_id, content, payment_ids,"
            " at_ms) VALUES ($1, $2, $3, $4, '[]', $5) ON CONFLICT DO NOTHING",
            asker.account_id,
            asker.principal,
            asker.request_id,
            content,
            now_ms,
        )
        if not new:  # the same request at the same moment, on another node perhaps
            return await _asked_before(tx, asker, content) or [], True
        ids = await _withhold(tx, rails, asker, wanted, payable, blocks_now, now_ms)
        await tx.execute(
            "UPDATE payout_request SET payment_ids = $4 WHERE account_id = $1 AND principal = $2"
            " AND request_id = $3",
            asker.account_id,
            asker.principal,
            asker.request_id,
            json.dumps(ids),
        )
        return ids, False

    ids, repeat = await transact(rails.db, work)
    if not repeat:
        await asyncio.gather(*(carry.first_try(rails, each) for each in ids))
    return ids, repeat


async def _asked_before(tx: Tx, asker: Asker, content: bytes) -> list[str] | None:
    row = await tx.fetchrow(
        "SELECT content, payment_ids FROM payout_request WHERE account_id = $1"
        " AND principal = $2 AND request_id = $3",
        asker.account_id,
        asker.principal,
        asker.request_id,
    )
    if row is None:
        return None
    if bytes(row["content"]) != content:
        raise Problem("request_id_conflict", "This request id asked for something else before.")
    ids: list[str] = json.loads(row["payment_ids"])
    return ids


async def _payable(tx: Tx, settings: Settings, asker: Asker, wanted: Wanted) -> list[_Payable]:
    """The asker's lots that may go back now, those that expire first in front.

    Only what this very wallet paid on chain, for itself: credits that somebody else paid for are
    not the asker's money, and those it gave away are not the asker's any more.
    """
    rows = await tx.fetch(
        "SELECT l.id, l.remaining_units, l.state, l.source, i.network, i.tx_hash, i.n, i.asset,"
        " i.depth, i.state AS seen FROM lot l LEFT JOIN inbound i ON i.lot_id = l.id"
        " AND i.from_address = $2 AND i.recipient = $2 AND i.recipient_chain = $3"
        " WHERE l.account_id = $1 AND l.payer = $2 AND ($4 = 0 OR l.id = $4)"
        " AND ($4 <> 0 OR (l.state = 'live' AND l.remaining_units > 0))"
        " ORDER BY l.expires_ms, l.id LIMIT 1000",
        asker.account_id,
        asker.address,
        asker.chain,
        wanted.lot_id or 0,
    )
    found, provisional = [], False
    for row in rows:
        if row["seen"] != "minted" or row["source"] not in _SOURCES:
            continue
        if row["depth"] != "final":
            provisional = True
            continue
        chain = next((c for c in settings.chains if c.caip2 == row["network"]), None)
        if chain is None or chain.refund_key is None or chain.network.asset(row["asset"]) is None:
            continue
        if row["state"] == "live" and row["remaining_units"] > 0:
            key = (row["network"], row["tx_hash"], row["n"], row["asset"])
            found.append(_Payable(row["id"], *key, row["remaining_units"]))
    if not found and provisional:
        raise Problem(
            "refund_not_final",
            "The payment behind these credits is not final on chain yet.",
            headers={"Retry-After": "60"},
        )
    if not found:
        raise Problem("not_refundable", "None of these credits can be paid back to this wallet.")
    return found[:AT_ONCE]


async def _look_ahead(
    rails: Rails, asker: Asker, wanted: Wanted, payable: Sequence[_Payable]
) -> dict[str, int]:
    """Ask each network whether the refund wallet could pay now, by a call that nobody can use.

    The newest block of each: up to it no authorization of these payouts is used.
    """
    newest: dict[str, int] = {}
    for network, asset in dict.fromkeys((each.network, each.asset) for each in payable):
        chain = rails.settings.chain(network)
        mine = [each for each in payable if (each.network, each.asset) == (network, asset)]
        units = sum(each.remaining_units for each in mine)
        if wanted.amount_units is not None:
            units = min(units, wanted.amount_units)
        rpc = rails.rpcs[network]
        call = {
            "from": carry.wallet_of(chain),
            "to": asset,
            "data": "0x" + (_TRANSFER + address_word(asker.address) + uint_word(units)).hex(),
        }
        try:
            await gas.choose(rails, chain)
            newest[network] = await rpc.block_number()
            await rpc.call("eth_call", [call, "latest"])
        except Rejected as refusal:
            await _not_blacklisted(rpc, chain, asset, asker.address)
            log.error("%s: a refund of %d units: %s", chain.name, units, refusal)
            raise _not_now() from refusal
        except ChainError as error:
            if error.code in PAUSES:
                raise _not_now() from error
            raise Problem(
                "dependency_unavailable",
                "The chain cannot be reached right now; nothing was withheld.",
                headers={"Retry-After": "5"},
            ) from error
    return newest


def _not_now() -> Problem:
    return Problem(
        "refund_unavailable",
        "The refund cannot be paid at the moment; nothing was withheld. Ask the operator.",
        headers={"Retry-After": "600"},
    )


async def _not_blacklisted(rpc: Rpc, chain: Chain, asset: str, wallet: str) -> None:
    token = chain.network.asset(asset)
    if token is not None and (await tokens.read_standing(rpc, token, wallet)).blacklisted:
        raise Problem("not_refundable", f"{token.symbol} refuses to be paid to this wallet.")


async def _withhold(  # noqa: PLR0917  (one transaction's parts)
    tx: Tx,
    rails: Rails,
    asker: Asker,
    wanted: Wanted,
    payable: Sequence[_Payable],
    newest: dict[str, int],
    now_ms: int,
) -> list[str]:
    """Take the units out of the lots and write a payment for each. All that is wanted, or none."""
    left = wanted.amount_units
    ids: list[str] = []
    best_units = 0
    for lot in payable:
        if left == 0:
            break
        chain = rails.settings.chain(lot.network)
        payment_id = journal.new_id()
        step = ledger.PayOut(lot.lot_id, payment_id, left, chain.refund_min_units)
        (done,) = await ledger.apply(tx, [step], now_ms)
        if isinstance(done, ledger.NotPayable):
            best_units = max(best_units, done.left_units)
            if left is None or done.left_units < chain.refund_min_units or wanted.lot_id:
                continue
            step = ledger.PayOut(lot.lot_id, payment_id, min(left, done.left_units))
            if step.amount_units is None or step.amount_units < chain.refund_min_units:
                continue
            (done,) = await ledger.apply(tx, [step], now_ms)
        if isinstance(done, ledger.Frozen):
            raise Problem("account_frozen", "This account is frozen or in debt.")
        if not isinstance(done, ledger.Withheld):
            raise ledger.LedgerFault(f"a payout was answered with {done}")
        await journal.insert(tx, _payment(rails, asker, chain, lot, done.payout, newest, now_ms))
        ids.append(payment_id)
        left = None if left is None else left - done.payout.amount_units
    if not ids or left:
        least = min(rails.settings.chain(each.network).refund_min_units for each in payable)
        raise Problem(
            "not_refundable",
            f"Not so much can be paid back now, or less than {format_usd(least)} of a lot.",
            members={"lot_left_units": best_units, "least_units": least},
        )
    return ids


def _payment(  # noqa: PLR0917
    rails: Rails,
    asker: Asker,
    chain: Chain,
    lot: _Payable,
    row: ledger.PayoutRow,
    newest: dict[str, int],
    now_ms: int,
) -> Payment:
    key = (lot.network, lot.tx_hash, lot.n)
    return Payment(
        id=row.payment_id,
        provider=journal.PAYOUT,
        state="processing",
        purpose="refund",
        payer=carry.wallet_of(chain),
        recipient=asker.address,
        recipient_chain=asker.chain,
        network=lot.network,
        asset=lot.asset,
        amount_units=row.amount_units,
        expires_ms=None,
        auth_nonce=nonce_of(rails.keys.deployment, *key, row.ordinal),
        valid_before_s=now_ms // 1000 + VALID_S,
        from_block=newest[lot.network],
        tx_hash=None,
        external_ref=None,
        external_url=None,
        lot_id=None,
        error_code=None,
        error_detail=None,
        created_at_ms=now_ms,
        updated_at_ms=now_ms,
        lease_ms=in_hand.lease_ms(rails, now_ms),
        pay_to=asker.address,
    )


# -- showing ---------------------------------------------------------------------------------------


async def rows_of(tx: Tx, ids: Sequence[str]) -> list[Payment]:
    """The payments of a request, in its order."""
    return [p for each in ids if (p := await journal.by_id(tx, each)) is not None]


def shown(settings: Settings, payment: Payment) -> dict[str, Any]:
    """A refund as anybody with its id sees it."""
    return {
        "payment_id": payment.id,
        # Sent is not paid: that takes a block that is final.
        "state": {"succeeded": "paid", "failed": "failed"}.get(payment.state, "processing"),
        "provider": payment.provider,
        "amount_usd": format_usd(payment.amount_units),
        "amount_units": payment.amount_units,
        "credits": format_credits(payment.amount_units, settings.credits.per_usd),
        "network": payment.network,
        "to": payment.recipient,
        "transaction": payment.tx_hash,
        "created_at_ms": payment.created_at_ms,
        "updated_at_ms": payment.updated_at_ms,
        "status_url": f"{settings.server.public_url}/farebox/v1/payments/{payment.id}",
        "error": payment.error_code,
        "error_detail": payment.error_detail,
    }
