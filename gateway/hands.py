"""What an operator does to the books from the command line: migrate, verify, export, show, grant,
freeze, write off, refund.

Each function opens the configured database, does one thing and closes it. Safe beside running
gateways: everything goes through the ledger's own verbs.
"""

from __future__ import annotations

import asyncio
import getpass
import os
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from gateway import ledger
from gateway.accounts import wallets
from gateway.db import Database, Tx
from gateway.forms import address
from gateway.ledger import audit, read
from gateway.migrations import run as migrations
from gateway.money import format_credits, format_usd, parse_uint, parse_usd
from gateway.settings import Settings


class Refused(Exception):  # noqa: N818  (the answer is no, and nothing was done)
    """What was asked for cannot be done; the text says why."""


T = TypeVar("T")
PAGE: Final = 5_000
RECENT: Final = 5

# What an export holds: the table, its key (the order of the export), and columns left out because
# they are large, or secret, or say nothing about money.
EXPORTED: Final[tuple[tuple[str, tuple[str, ...], frozenset[str]], ...]] = (
    ("account", ("id",), frozenset()),
    ("wallet", ("address", "chain"), frozenset()),
    ("transfer", ("id",), frozenset()),
    ("lot", ("id",), frozenset()),
    ("segment", ("account_id", "from_pos"), frozenset()),
    ("pin", ("hold_id", "lot_id"), frozenset()),
    ("hold", ("id",), frozenset()),
    ("refund", ("id",), frozenset()),
    ("refund_part", ("refund_id", "lot_id"), frozenset()),
    ("payout", ("id",), frozenset()),
    ("payout_end", ("payout_id",), frozenset()),
    ("payout_request", ("account_id", "principal", "request_id"), frozenset()),
    ("operator_action", ("id",), frozenset()),
    ("payment", ("id",), frozenset()),
    ("mint_key", ("network", "ref", "n"), frozenset()),
    ("upto_call", ("payment_id",), frozenset({"data", "answer_headers", "answer_body"})),
    ("authorization_use", ("network", "asset", "payer", "nonce"), frozenset({"offer"})),
    ("chain_tx", ("network", "tx_hash"), frozenset({"raw"})),
    ("inbound", ("network", "tx_hash", "n"), frozenset()),
    ("watched", ("network", "asset", "pay_to"), frozenset()),
    ("house_balance", ("account_id", "writer"), frozenset()),
    ("batch", ("writer", "n"), frozenset()),
)


def with_database(settings: Settings, work: Callable[[Database], Awaitable[T]]) -> T:
    async def run() -> T:
        db = await Database.connect(settings.server.database)
        try:
            if work is not migrations.migrate:
                await migrations.require_current(db)
            return await work(db)
        finally:
            await db.close()

    return asyncio.run(run())


def migrate(settings: Settings) -> str:
    """Bring the schema up to date; the revision it is at."""
    return with_database(settings, migrations.migrate)


def reconcile(settings: Settings) -> list[dict[str, Any]]:
    """Everything that ever came in against the books. Raises ``chain.errors.Unavailable``."""
    from chain.rpc import Rpc
    from gateway.payments.reconcile import everything

    async def work(db: Database) -> list[dict[str, Any]]:
        rpcs = {c.caip2: Rpc(c.network, c.rpc, timeout_s=c.rpc_timeout_s) for c in settings.chains}
        try:
            done = await everything(db, settings.chains, rpcs, whole=True)
        finally:
            for rpc in rpcs.values():
                await rpc.close()
        return [each.members() for each in done]

    return with_database(settings, work)


def verify(settings: Settings) -> dict[str, dict[str, Any]]:
    """The broken invariants by name, each with its meaning and the first rows; empty if none."""

    async def work(db: Database) -> dict[str, dict[str, Any]]:
        async with db.survey() as tx:
            broken = await audit.verify(tx, await tx.now_ms())
        return {b.name: {"meaning": b.meaning, "rows": list(b.rows)} for b in broken}

    return with_database(settings, work)


def export(settings: Settings, put: Callable[[dict[str, Any]], None]) -> None:
    """Hand every row of the books to ``put``, from one snapshot, a bounded number at a time."""

    async def work(db: Database) -> None:
        async with db.survey() as tx:
            for table, key, left_out in EXPORTED:
                await _export_table(tx, table, key, left_out, put)

    with_database(settings, work)


async def _export_table(
    tx: Tx,
    table: str,
    key: tuple[str, ...],
    left_out: frozenset[str],
    put: Callable[[dict[str, Any]], None],
) -> None:
    order = ", ".join(key)
    marks = ", ".join(f"${i + 1}" for i in range(len(key)))
    after: tuple[Any, ...] = ()
    while True:
        where = f" WHERE ({order}) > ({marks})" if after else ""
        rows = await tx.fetch(
            f"SELECT * FROM {table}{where} ORDER BY {order} LIMIT {PAGE}",  # noqa: S608  (names of this file)
            *after,
        )
        for row in rows:
            put({"row": table, **{k: _plain(v) for k, v in dict(row).items() if k not in left_out}})
        if len(rows) < PAGE:
            return
        after = tuple(rows[-1][column] for column in key)


def _plain(value: Any) -> Any:
    return bytes(value).hex() if isinstance(value, (bytes, memoryview)) else value


async def _account_id(tx: Tx, who: str) -> int | None:
    """The account of a wallet address, or of an account id in digits."""
    if who.startswith("0x"):
        return await wallets.find(tx, _wallet(who))
    return _number(who)


def _wallet(who: str) -> str:
    try:
        return address(who)
    except ValueError as error:
        raise ValueError(f"{who} {error}") from None


def _number(who: str) -> int:
    try:
        return parse_uint(who, maximum=2**62)
    except ValueError:
        raise ValueError(f"{who!r} is neither a wallet address nor an account id") from None


def show(settings: Settings, who: str) -> dict[str, Any] | None:
    """Balance, wallets and the newest entries of an account; None if there is none.

    Raises ``ValueError`` if ``who`` is neither an address nor a number.
    """

    async def work(db: Database) -> dict[str, Any] | None:
        async with db.write() as tx:
            account_id = await _account_id(tx, who)
            if account_id is None or await read.account(tx, account_id) is None:
                return None
            await ledger.apply(tx, [ledger.Expire(account_id)], await tx.now_ms())
            seen = await read.account(tx, account_id)
            owners = await wallets.wallets_of(tx, account_id)
            lines = await read.statement(tx, account_id, RECENT)
        return None if seen is None else _shown(settings, seen, owners, lines)

    return with_database(settings, work)


def _shown(
    settings: Settings, seen: read.AccountView, owners: list[str], lines: Any
) -> dict[str, Any]:
    rate = settings.credits.per_usd
    return {
        "account": seen.id,
        "wallets": owners,
        "available": format_credits(seen.available_units, rate),
        "available_units": seen.available_units,
        "held": format_credits(seen.held_units, rate),
        "held_units": seen.held_units,
        "debt_units": seen.debt_units,
        "lifetime_added_units": seen.added_units,
        "lifetime_spent_units": seen.spent_units,
        "next_expiry_ms": seen.next_expiry_ms,
        "frozen": seen.frozen,
        "recent": [
            {"id": t.id, "kind": t.kind, "amount_units": t.amount_units, "at_ms": t.at_ms}
            for t in lines
        ],
    }


def grant(
    settings: Settings, who: str, amount: str, *, why: str, grant_id: str | None
) -> dict[str, Any]:
    """Mint credits worth ``amount`` dollars for a wallet address, once for each ``grant_id``.

    Opens the account if the wallet has none. Raises ``ValueError`` for a malformed address,
    amount or id.
    """
    units = parse_usd(amount)
    if units == 0:
        raise ValueError("a grant of nothing")
    reference = _reference(grant_id)

    async def work(db: Database) -> dict[str, Any]:
        async with db.write() as tx:
            now_ms = await tx.now_ms()
            if who.startswith("0x"):
                account_id = await wallets.ensure(tx, _wallet(who), now_ms)
            else:
                account_id = _number(who)
                if await read.account(tx, account_id) is None:
                    raise ValueError(f"there is no account {who}")
            span = settings.credits.expire_after
            mint = ledger.Mint(
                account_id=account_id,
                amount_units=units,
                network="grant",
                ref=reference,
                n=0,
                source="grant",
                expires_ms=ledger.NEVER if span is None else span.after_ms(now_ms),
                reason=why,
            )
            (outcome,) = await ledger.apply(tx, [mint], now_ms)
        return _granted(settings, outcome, account_id, units, reference)

    return with_database(settings, work)


def _granted(
    settings: Settings, outcome: ledger.Outcome, account_id: int, units: int, reference: str
) -> dict[str, Any]:
    if isinstance(outcome, ledger.MintedBefore) and (
        (outcome.account_id, outcome.amount_units) != (account_id, units)
    ):
        raise ValueError(f"grant id {reference!r} was used for another grant")
    return {
        "outcome": "granted" if isinstance(outcome, ledger.Minted) else "granted before",
        "account": account_id,
        "amount_units": units,
        "credits": format_credits(units, settings.credits.per_usd),
        "id": reference,
    }


def _reference(given: str | None) -> str:
    """The id under which something is done once; a fresh one if none was given."""
    reference = given or secrets.token_hex(16)
    if len(reference) > 128 or not reference.isprintable():
        raise ValueError("an id is at most 128 printable characters")
    return reference


def operator() -> str:
    """Who runs this command, as the machine knows them."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return f"uid {os.getuid()}"


def freeze(settings: Settings, who: str, *, frozen: bool, why: str) -> dict[str, Any]:
    """Stop the spending of an account, or allow it again; who did it and why is kept.

    Calls that run may end. Raises ``ValueError`` for a malformed ``who``, ``Refused`` if there is
    no such account.
    """

    async def work(db: Database) -> dict[str, Any]:
        async with db.write() as tx:
            account_id = await _known_account(tx, who)
            step = ledger.FreezeAccount(account_id, frozen, why, operator())
            (outcome,) = await ledger.apply(tx, [step], await tx.now_ms())
        if not isinstance(outcome, ledger.AccountIs):
            raise ledger.LedgerFault(f"a freeze was answered with {outcome}")
        return {"account": account_id, "frozen": outcome.frozen, "changed": outcome.changed}

    return with_database(settings, work)


def write_off(settings: Settings, who: str, *, why: str, freeze: bool) -> dict[str, Any]:
    """Give up what an account owes; who did it and why is kept. It can spend again, unless its
    spending is stopped with ``freeze`` in the same transaction.

    Raises ``ValueError`` for a malformed ``who``, ``Refused`` if there is no such account, it owes
    nothing, or its debt may still be cured.
    """
    from gateway.payments import losses

    async def work(db: Database) -> dict[str, Any]:
        async with db.write() as tx:
            account_id, by = await _known_account(tx, who), operator()
            try:
                given = await losses.write_off(tx, account_id, why=why, by=by)
            except losses.TooEarly as error:
                raise Refused(str(error)) from None
            if not given.units:
                raise Refused(f"{who} owes nothing")
            if freeze:
                step = ledger.FreezeAccount(account_id, True, why, by)
                await ledger.apply(tx, [step], await tx.now_ms())
            seen = await read.account(tx, account_id)
        return {
            "account": account_id,
            "amount_units": given.units,
            "credits": format_credits(given.units, settings.credits.per_usd),
            "debt_units": given.left_units,
            "frozen": seen is not None and seen.frozen,
        }

    return with_database(settings, work)


async def _known_account(tx: Tx, who: str) -> int:
    account_id = await _account_id(tx, who)
    if account_id is None or await read.account(tx, account_id) is None:
        raise Refused(f"there is no account of {who}")
    return account_id


def refund(
    settings: Settings,
    request_id: str,
    who: str,
    *,
    amount: str | None,
    why: str,
    refund_id: str | None,
) -> dict[str, Any]:
    """Give back what a call was charged, or ``amount`` dollars of it, once for each ``refund_id``.

    It returns to the credits that paid, with their expiry. Raises ``ValueError`` for a malformed
    argument, ``Refused`` if there is no such call or less is left of it.
    """
    units = None if amount is None else parse_usd(amount)
    if units == 0:
        raise ValueError("a refund of nothing")
    key = _reference(refund_id)

    async def work(db: Database) -> dict[str, Any]:
        async with db.write() as tx:
            account_id = await _known_account(tx, who)
            call = await _charged_call(tx, account_id, request_id, who)
            step = ledger.Refund(call.id, key, units, why, operator())
            (outcome,) = await ledger.apply(tx, [step], await tx.now_ms())
        return _refunded(settings, outcome, request_id)

    return with_database(settings, work)


async def _charged_call(tx: Tx, account_id: int, request_id: str, who: str) -> ledger.HoldRow:
    """The one call of this account with this request id that was charged."""
    calls = await read.holds_of_request(tx, account_id, request_id)
    if not calls:
        raise Refused(f"{who} made no call {request_id!r}")
    charges = [(call, await read.charge_of(tx, call.id)) for call in calls]
    charged = [call for call, it in charges if it.close is not None and it.close.amount_units]
    if not charged:
        raise Refused(f"call {request_id!r} was not charged: {charges[0][1].state}")
    if len(charged) > 1:  # an id counts for one wallet or key, and an account may have several
        ids = ", ".join(call.request_id for call in charged)
        raise Refused(f"{len(charged)} calls go by {request_id!r}; name one by its own id: {ids}")
    return charged[0]


def _refunded(settings: Settings, outcome: ledger.Outcome, request_id: str) -> dict[str, Any]:
    match outcome:
        case ledger.Refunded(refund=row) | ledger.RefundedBefore(refund=row):
            first = isinstance(outcome, ledger.Refunded)
            return {
                "outcome": "refunded" if first else "refunded before",
                "account": row.account_id,
                "request_id": request_id,
                "amount_units": row.amount_units,
                "credits": format_credits(row.amount_units, settings.credits.per_usd),
                "id": row.key,
            }
        case ledger.NotRefundable(left_units=left):
            raise Refused(f"of this charge {format_usd(left)} is left to refund")
        case ledger.RefundConflict(refund=row):
            raise ValueError(f"refund id {row.key!r} was used for another refund")
    raise ledger.LedgerFault(f"a refund was answered with {outcome}")
