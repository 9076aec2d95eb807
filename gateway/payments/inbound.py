"""Transfers to us in the books: one row each, and the one place where a transfer becomes credits.

Whatever door a transfer is told through (a settled payment, a transaction hash, the watcher), it
ends here, in the transaction of whoever found it. The row's lock puts the doors one behind the
other, the mint's key is the wall behind that.

What may be minted now is said by ``exposure.py``; the rest waits for ``confirm.py`` to see its
block deep enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Final, Literal

from chain.transfers import Transfer
from gateway import ledger, observe
from gateway.accounts import wallets
from gateway.db import Row, Tx, WriteConflict
from gateway.payments import exposure, nonces, upto_rows

State = Literal["unclaimed", "waiting", "minted", "gone"]
Depth = Literal["included", "safe", "final"]
TOLD_ANEW: Final = 2**32  # added to the ordinal of another fact under the same one
REORGED: Final = "reorged"  # error_code of a payment whose block left the chain


@dataclass(frozen=True, slots=True)
class Inbound:
    """A row. Column meanings: ``tables.py``."""

    network: str
    tx_hash: str
    n: int
    asset: str
    pay_to: str
    from_address: str
    value_units: int
    block_number: int
    block_hash: str
    authorizer: str | None
    auth_nonce: str | None
    state: State
    depth: Depth
    agreed: int
    recipient: str | None
    recipient_chain: str
    source: str | None
    payment_id: str | None
    expires_ms: int | None
    lot_id: int | None
    seen_at_ms: int
    updated_at_ms: int

    @property
    def ordinal(self) -> int:
        """Its place among the transaction's transfers to us."""
        return self.n % TOLD_ANEW


COLUMNS: Final = tuple(f.name for f in fields(Inbound))
LIST: Final = ", ".join(COLUMNS)


@dataclass(frozen=True, slots=True)
class For:
    """Whose credits a transfer becomes. ``source``: of the lot; ``expires_ms`` None: never."""

    recipient: str
    recipient_chain: str
    source: str
    payment_id: str | None = None
    expires_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Placed:
    """What became of a transfer. ``row.state`` is ``minted`` or ``waiting``; ``taken``: it is
    somebody else's and nothing was changed. ``extra``: the outcome of the step taken with it."""

    row: Inbound
    taken: bool = False
    extra: ledger.Outcome | None = None


MakeHold = Callable[[int], ledger.Hold]


def row_of(row: Row) -> Inbound:
    return Inbound(**{name: row[name] for name in COLUMNS})


async def known(tx: Tx, network: str, tx_hash: str) -> list[Inbound]:
    """All transfers to us of a transaction that are in the books."""
    rows = await tx.fetch(
        f"SELECT {LIST} FROM inbound WHERE network = $1 AND tx_hash = $2 ORDER BY n",  # noqa: S608
        network,
        tx_hash,
    )
    return [row_of(row) for row in rows]


async def locked(tx: Tx, network: str, tx_hash: str, n: int) -> Inbound | None:
    """The row, ours until the transaction ends."""
    row = await tx.fetchrow(
        f"SELECT {LIST} FROM inbound WHERE network = $1 AND tx_hash = $2 AND n = $3"  # noqa: S608
        f"{tx.for_update}",
        network,
        tx_hash,
        n,
    )
    return None if row is None else row_of(row)


async def see(tx: Tx, transfer: Transfer, now_ms: int) -> Inbound:
    """The row of a transfer that was just read from the chain, locked; made if it is new.

    A row that knows another block learns this one. If that is already history, whoever follows
    the chain (``confirm.py``) finds out and corrects it: nothing is decided by it for good.

    A transaction's hash fixes what it asks for, not what it does: in another block one transfer of
    a batch may fail, and the next one takes its ordinal. Such a one is another fact, and gets a
    key of its own once the row that has the ordinal is reversed. Until then ``LedgerFault``.
    """
    told = (transfer.asset, transfer.from_, transfer.to, transfer.value_units)
    last = None
    for row in await _at(tx, transfer):
        if told == (row.asset, row.from_address, row.pay_to, row.value_units):
            if row.state != "gone" and (
                row.block_hash == transfer.block_hash or row.depth == "final"
            ):
                return row
            return await _moved_to(tx, row, transfer.block_number, transfer.block_hash, now_ms)
        if row.lot_id is None:  # nothing hangs on it: a node was wrong, or its block is gone
            await tx.execute(
                "DELETE FROM inbound WHERE network = $1 AND tx_hash = $2 AND n = $3",
                row.network,
                row.tx_hash,
                row.n,
            )
            continue
        if row.state != "gone":
            raise ledger.LedgerFault(f"the transfer {row.tx_hash}/{row.n} is told in two ways")
        last = row
    return await _new(tx, transfer, transfer.n if last is None else last.n + TOLD_ANEW, now_ms)


async def _at(tx: Tx, transfer: Transfer) -> list[Inbound]:
    """What was ever told of this ordinal, oldest first, locked."""
    rows = await tx.fetch(
        f"SELECT {LIST} FROM inbound WHERE network = $1 AND tx_hash = $2"  # noqa: S608
        f" AND n % $3 = $4 ORDER BY n{tx.for_update}",
        transfer.network,
        transfer.tx_hash,
        TOLD_ANEW,
        transfer.n,
    )
    return [row_of(row) for row in rows]


async def _new(tx: Tx, transfer: Transfer, n: int, now_ms: int) -> Inbound:
    await tx.execute(
        "INSERT INTO inbound (network, tx_hash, n, asset, pay_to, from_address, value_units,"
        " block_number, block_hash, authorizer, auth_nonce, state, depth, agreed, seen_at_ms,"
        " updated_at_ms) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, 'unclaimed',"
        " 'included', 0, $12, $12) ON CONFLICT (network, tx_hash, n) DO NOTHING",
        transfer.network,
        transfer.tx_hash,
        n,
        transfer.asset,
        transfer.to,
        transfer.from_,
        transfer.value_units,
        transfer.block_number,
        transfer.block_hash,
        transfer.authorizer,
        transfer.auth_nonce,
        now_ms,
    )
    row = await locked(tx, transfer.network, transfer.tx_hash, n)
    if row is None or (row.from_address, row.value_units) != (
        transfer.from_,
        transfer.value_units,
    ):  # another node noted it at the same moment, as something else
        raise WriteConflict(f"the transfer {transfer.tx_hash}/{n} is told in two ways")
    return row


async def _moved_to(
    tx: Tx, row: Inbound, block_number: int, block_hash: str, now_ms: int
) -> Inbound:
    state = row.state
    if state == "gone":  # it is back: what it had minted is restored once it may be
        state = "unclaimed" if row.recipient is None else "waiting"
    await tx.execute(
        "UPDATE inbound SET block_number = $4, block_hash = $5, depth = 'included', agreed = 0,"
        " state = $6, updated_at_ms = $7 WHERE network = $1 AND tx_hash = $2 AND n = $3",
        row.network,
        row.tx_hash,
        row.n,
        block_number,
        block_hash,
        state,
        now_ms,
    )
    found = await locked(tx, row.network, row.tx_hash, row.n)
    if found is None:
        raise ledger.LedgerFault(f"the transfer {row.tx_hash}/{row.n} vanished")
    return found


async def place(
    tx: Tx, transfer: Transfer, whose: For, now_ms: int, hold: MakeHold | None = None
) -> Placed:
    """A transfer was found and is to be somebody's: mint it now, or let it wait.

    Safe to run any number of times and through any number of doors at once. ``hold`` makes a hold
    of the recipient's account, taken in the same step as the mint.
    """
    row = await see(tx, transfer, now_ms)
    if row.recipient is not None and (row.recipient, row.recipient_chain) != (
        whose.recipient,
        whose.recipient_chain,
    ):
        return Placed(row, taken=True)
    if row.recipient is None:
        row = await _give_to(tx, row, whose, now_ms)
    elif whose.payment_id is not None and row.payment_id is None:
        await tx.execute(
            "UPDATE inbound SET payment_id = $4 WHERE network = $1 AND tx_hash = $2 AND n = $3",
            row.network,
            row.tx_hash,
            row.n,
            whose.payment_id,
        )
    if row.state == "waiting":
        return await credit(tx, row, now_ms, hold)
    extra = None
    if hold is not None:
        account_id = await wallets.ensure(tx, whose.recipient, now_ms, whose.recipient_chain)
        extra = (await ledger.apply(tx, [hold(account_id)], now_ms))[0]
    return Placed(row, extra=extra)


async def _give_to(tx: Tx, row: Inbound, whose: For, now_ms: int) -> Inbound:
    await tx.execute(
        "UPDATE inbound SET recipient = $4, recipient_chain = $5, source = $6, payment_id = $7,"
        " expires_ms = $8, state = 'waiting', updated_at_ms = $9"
        " WHERE network = $1 AND tx_hash = $2 AND n = $3",
        row.network,
        row.tx_hash,
        row.n,
        whose.recipient,
        whose.recipient_chain,
        whose.source,
        whose.payment_id,
        whose.expires_ms,
        now_ms,
    )
    found = await locked(tx, row.network, row.tx_hash, row.n)
    if found is None:
        raise ledger.LedgerFault(f"the transfer {row.tx_hash}/{row.n} vanished")
    return found


async def credit(tx: Tx, row: Inbound, now_ms: int, hold: MakeHold | None = None) -> Placed:
    """Mint a locked row that waits, if it may be now. A row that minted before and was reversed
    gets those very credits back, which pays what they had left as debt."""
    if row.recipient is None or row.source is None:
        raise ledger.LedgerFault(f"the transfer {row.tx_hash}/{row.n} is nobody's")
    if not await exposure.admitted(tx, row):
        return Placed(row)
    account_id = await wallets.ensure(tx, row.recipient, now_ms, row.recipient_chain)
    before = await _minted_before(tx, row)
    first: ledger.Step
    if row.lot_id is not None:
        first = ledger.Reverse(row.lot_id, 0, "the transfer is in the chain again")
    else:
        first = ledger.Mint(
            account_id=account_id,
            amount_units=row.value_units,
            network=row.network,
            ref=row.tx_hash,
            n=row.n,
            source=row.source,
            expires_ms=row.expires_ms or ledger.NEVER,
            payer=row.from_address,
            payment_id=row.payment_id,
            reason=None if before is None else f"{row.source}, in place of lot {before}",
        )
    again = [] if before is None else await _written_off(tx, row)
    steps = [*again, first] if hold is None else [*again, first, hold(account_id)]
    outcomes = (await ledger.apply(tx, steps, now_ms))[len(again) :]
    done = outcomes[0]
    if not isinstance(done, (ledger.Minted, ledger.MintedBefore, ledger.LotIs)):
        raise ledger.LedgerFault(f"{row.tx_hash}/{row.n}: a mint was answered with {done}")
    await tx.execute(
        "UPDATE inbound SET state = 'minted', lot_id = $4, updated_at_ms = $5"
        " WHERE network = $1 AND tx_hash = $2 AND n = $3",
        row.network,
        row.tx_hash,
        row.n,
        done.lot_id,
        now_ms,
    )
    if row.payment_id is not None:
        ended = await tx.execute(
            "UPDATE payment SET state = 'succeeded', tx_hash = $2, lot_id = $3,"
            " updated_at_ms = $4, error_code = NULL, error_detail = NULL"
            " WHERE id = $1 AND state <> 'succeeded'",
            row.payment_id,
            row.tx_hash,
            done.lot_id,
            now_ms,
        )
        if ended:
            count_ended(tx, "succeeded")
        if isinstance(done, ledger.Minted) and row.source == upto_rows.DOOR:
            await upto_rows.charge(tx, row.payment_id, done.lot_id, now_ms)
    found = await locked(tx, row.network, row.tx_hash, row.n)
    if found is None:
        raise ledger.LedgerFault(f"the transfer {row.tx_hash}/{row.n} vanished")
    return Placed(found, extra=outcomes[1] if hold is not None else None)


def count_ended(tx: Tx, outcome: str) -> None:
    """A payment on chain has ended, once this transaction stands."""
    tx.after_commit(lambda: observe.count("settlements", outcome=outcome))


async def _minted_before(tx: Tx, row: Inbound) -> int | None:
    """The lot that its payment had minted before its transaction, or another one, left the chain:
    the statement then shows which lot a new one stands for."""
    if row.payment_id is None:
        return row.lot_id
    before: int | None = await tx.fetchval(
        "SELECT lot_id FROM payment WHERE id = $1", row.payment_id
    )
    return before


async def _written_off(tx: Tx, row: Inbound) -> list[ledger.Step]:
    """What was given up of the payment is owed again, and paid by what comes in now: whoever bore
    the loss gets it back, whichever of its transactions that is."""
    if row.payment_id is None:
        return []
    lost = await tx.fetch(
        "SELECT id FROM lot WHERE payment_id = $1 AND lost_units > 0 ORDER BY id", row.payment_id
    )
    return [ledger.Reopen(each["id"], "its payment is in the chain again") for each in lost]


async def moved(tx: Tx, judged: Inbound, block_number: int, block_hash: str, now_ms: int) -> bool:
    """The transaction stands in another block now: the same mint, with another place."""
    row = await locked(tx, judged.network, judged.tx_hash, judged.n)
    if row is None or row.state == "gone" or row.block_hash != judged.block_hash:
        return False  # somebody else has looked meanwhile
    await _moved_to(tx, row, block_number, block_hash, now_ms)
    return True


async def vanished(tx: Tx, judged: Inbound, now_ms: int) -> bool:
    """Its block left the chain and the transaction is in no other one: take back what it minted.

    What was spent of it is the account's debt from now on, until it comes back or is paid.
    """
    row = await locked(tx, judged.network, judged.tx_hash, judged.n)
    if row is None or row.state == "gone" or row.block_hash != judged.block_hash:
        return False
    if row.state == "minted" and row.lot_id is not None:
        why = f"block {row.block_number} left the chain"
        await ledger.apply(tx, [ledger.Reverse(row.lot_id, row.value_units, why)], now_ms)
    await tx.execute(
        "UPDATE inbound SET state = 'gone', depth = 'included', agreed = 0, updated_at_ms = $4"
        " WHERE network = $1 AND tx_hash = $2 AND n = $3",
        row.network,
        row.tx_hash,
        row.n,
        now_ms,
    )
    if row.payment_id is not None:
        # One of our own is sent again by whoever finishes payments; of others nothing is known
        # but that they may come back.
        ours = await nonces.sent_for(tx, row.payment_id)
        await tx.execute(
            "UPDATE payment SET state = $2, lease_ms = $3, error_code = $4, error_detail = $5,"
            " updated_at_ms = $3 WHERE id = $1",
            row.payment_id,
            "processing" if ours else "reversed",
            now_ms,
            REORGED,
            "the block with this payment left the chain",
        )
    return True


async def deepened(tx: Tx, judged: Inbound, depth: Depth, *, agreed: bool, now_ms: int) -> None:
    """The block it was judged in is this deep now."""
    await tx.execute(
        "UPDATE inbound SET depth = $5, agreed = $6, updated_at_ms = $7 WHERE network = $1"
        " AND tx_hash = $2 AND n = $3 AND block_hash = $4 AND state <> 'gone'",
        judged.network,
        judged.tx_hash,
        judged.n,
        judged.block_hash,
        depth,
        int(agreed),
        now_ms,
    )
