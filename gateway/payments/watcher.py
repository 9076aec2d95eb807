"""Read every transfer to us from the chain, and see to it that each one becomes somebody's credits.

The logs of ``pay_to`` are read from the first block that counts to the newest one, again and again
for blocks that are not final: what a provider left out, or a reorganisation brought, is found the
next time. What belongs to a payment is left to it. The rest is credited once it is safe, to its
sender if this house knows that wallet; else it stays in suspense until its sender claims it.

One process reads a network at a time, under a lease. Everything it does may be done twice.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from chain import blocks, transfers
from chain.blocks import Trail
from chain.networks import Asset
from chain.rpc import Rpc
from chain.transfers import Transfer
from gateway import ledger
from gateway.accounts import wallets
from gateway.db import Tx, transact
from gateway.observe import log
from gateway.payments import claims, confirm, inbound, journal
from gateway.payments.inbound import Inbound
from gateway.payments.rails import Rails
from gateway.settings import Chain

SPAN: Final = 5_000  # blocks read in one look


@dataclass(frozen=True, slots=True)
class Watched:
    """An address of ours and how far it was read. Column meanings: ``tables.py``."""

    first_block: int
    read_to: int
    compared_to: int


@dataclass(slots=True)
class Watch:
    """What one process keeps while it watches. Lost without loss."""

    holder: str = field(default_factory=lambda: secrets.token_hex(8))
    trails: dict[str, Trail] = field(default_factory=dict)

    async def look(self, rails: Rails, chain: Chain) -> bool:
        """One look at a network; False if another process is doing that."""
        server = rails.settings.server
        lease_ms = 1_000 * (server.takeover_s + server.sweep_s)  # taken again every ``sweep_s``
        async with rails.db.write() as tx:
            fence = await take_lease(tx, f"watch:{chain.caip2}", self.holder, lease_ms)
        if fence is None:
            self.trails.pop(chain.caip2, None)
            return False
        for asset in chain.network.assets:
            await read(rails, chain, asset, fence)
        trail = self.trails.setdefault(chain.caip2, Trail())
        for row, depth in await confirm.look(rails, chain, trail):
            await _attribute(rails, chain, row)
            if depth == "final":  # only now: it is not looked at any more
                await confirm.deepen(rails, row, depth)
        return True


async def take_lease(tx: Tx, name: str, holder: str, for_ms: int) -> int | None:
    """Take or renew a lease; its fence, or None while another one holds it."""
    now_ms = await tx.now_ms()
    await tx.execute(
        "INSERT INTO lease (name, holder, fence, until_ms) VALUES ($1, '', 0, 0)"
        " ON CONFLICT (name) DO NOTHING",
        name,
    )
    row = await tx.fetchrow(
        f"SELECT holder, fence, until_ms FROM lease WHERE name = $1{tx.for_update}",  # noqa: S608
        name,
    )
    if row is None or (row["holder"] != holder and row["until_ms"] > now_ms):
        return None
    fence: int = row["fence"] + (row["holder"] != holder)
    await tx.execute(
        "UPDATE lease SET holder = $2, fence = $3, until_ms = $4 WHERE name = $1",
        name,
        holder,
        fence,
        now_ms + for_ms,
    )
    return fence


async def drop_leases(tx: Tx) -> None:
    """Whoever held a lease is dead. Its fence stays: the next holder gets a higher one."""
    await tx.execute("UPDATE lease SET until_ms = 0")


async def watched(tx: Tx, chain: Chain, asset: Asset) -> Watched | None:
    """From where an address of ours counts; None until a node could be asked at first start."""
    row = await tx.fetchrow(
        "SELECT first_block, read_to, compared_to FROM watched WHERE network = $1 AND asset = $2"
        " AND pay_to = $3",
        chain.caip2,
        asset.address,
        chain.pay_to,
    )
    return None if row is None else Watched(*row)


async def begin(rails: Rails, chain: Chain, asset: Asset) -> Watched:
    """The same; noted now if it is not yet: an address counts from the first start that names it.

    In a ledger of an earlier release it counts from its first payment.
    """
    async with rails.db.read() as tx:
        known = await watched(tx, chain, asset)
        earliest: int | None = await tx.fetchval(
            "SELECT min(from_block) FROM payment WHERE network = $1 AND asset = $2",
            chain.caip2,
            asset.address,
        )
    if known is not None:
        return known
    head = await rails.rpcs[chain.caip2].block_number()
    first = head + 1 if earliest is None else min(earliest, head + 1)

    async def work(tx: Tx) -> Watched | None:
        await tx.execute(
            "INSERT INTO watched (network, asset, pay_to, first_block, read_to, compared_to,"
            " at_ms) VALUES ($1, $2, $3, $4, $5, $5, $6) ON CONFLICT DO NOTHING",
            chain.caip2,
            asset.address,
            chain.pay_to,
            first,
            first - 1,
            await tx.now_ms(),
        )
        return await watched(tx, chain, asset)

    done = await transact(rails.db, work)
    if done is None:
        raise ledger.LedgerFault(f"{chain.pay_to} is not noted")
    return done


async def read(rails: Rails, chain: Chain, asset: Asset, fence: int) -> None:
    """Read the logs from the last final block that was read to the newest one."""
    known = await begin(rails, chain, asset)
    rpc = rails.rpcs[chain.caip2]
    points = await blocks.points(rpc, confirm.trusted(chain))
    first = known.read_to + 1
    if first > points.head:
        return
    last = min(points.head, first + SPAN - 1)
    found = await transfers.incoming(rpc, asset, chain.pay_to, first, last)
    for tx_hash in await _new(rails, chain, found):
        await _note(rails, rpc, chain, asset, tx_hash)
    await _advance(rails, chain, asset, min(last, points.final), fence)


async def _new(rails: Rails, chain: Chain, found: Sequence[transfers.Incoming]) -> list[str]:
    """The transactions with a transfer that the books do not know in that block, oldest first."""
    async with rails.db.read() as tx:
        rows = await tx.fetch(
            "SELECT tx_hash, n, block_hash FROM inbound WHERE network = $1 AND block_number >= $2"
            " AND state <> 'gone'",
            chain.caip2,
            min((each.block_number for each in found), default=0),
        )
    known = {(r["tx_hash"], r["n"] % inbound.TOLD_ANEW, r["block_hash"]) for r in rows}
    new = dict.fromkeys(
        each.tx_hash
        for each in found
        if (each.tx_hash, each.n, each.block_hash) not in known
        and each.value_units >= chain.min_onchain_units
    )
    return list(new)


async def _note(rails: Rails, rpc: Rpc, chain: Chain, asset: Asset, tx_hash: str) -> None:
    """Put what a transaction moved to us into the books, or leave it to its payment."""
    moved = await transfers.transfers_of(rpc, tx_hash, asset, chain.pay_to)
    for transfer in moved or []:
        if transfer.value_units < chain.min_onchain_units:
            continue

        async def work(tx: Tx, transfer: Transfer = transfer) -> None:
            payment, decision = await claims.authorized_by(tx, transfer)
            now_ms = await tx.now_ms()
            # By Permit2 it is nobody's until its payment takes it (``_attribute`` at the latest).
            if payment is None or decision != "settle" or payment.method == "permit2":
                await inbound.see(tx, transfer, now_ms)
            elif payment.state not in ("processing", "succeeded"):
                # It was given up, and its money came all the same.
                log.warning("payment %s was %s, and is paid now", payment.id, payment.state)
                await journal.finish(tx, payment.id, transfer, now_ms)

        await transact(rails.db, work)


async def _advance(rails: Rails, chain: Chain, asset: Asset, to: int, fence: int) -> None:
    """Blocks that are final and were read need not be read again. Only by who holds the lease."""
    async with rails.db.write() as tx:
        await tx.execute(
            "UPDATE watched SET read_to = $4 WHERE network = $1 AND asset = $2 AND pay_to = $3"
            " AND read_to < $4 AND EXISTS (SELECT 1 FROM lease WHERE name = $5 AND fence = $6)",
            chain.caip2,
            asset.address,
            chain.pay_to,
            to,
            f"watch:{chain.caip2}",
            fence,
        )


async def _attribute(rails: Rails, chain: Chain, row: Inbound) -> None:
    """Credit a safe transfer to its sender, if this house knows that wallet."""
    where = await claims.chain_of(rails.rpcs[chain.caip2], row.from_address)
    said = await claims.calldata_of(rails, claims.transfer_of(row))

    async def work(tx: Tx) -> None:
        payment = await claims.by_permit2(tx, claims.transfer_of(row), said)
        if payment is None and await wallets.find(tx, row.from_address, where) is None:
            return
        # Not locked here: a payment's row comes before its transfer's, and ``give`` sees to that.
        for now in await inbound.known(tx, row.network, row.tx_hash):
            if now.n == row.n and now.state == "unclaimed" and now.depth != "included":
                moved = claims.transfer_of(now)
                await claims.give(tx, rails.settings, moved, row.from_address, where, said)
        log.info("%s of %s is credited to its sender", row.tx_hash, row.network)

    await transact(rails.db, work)
