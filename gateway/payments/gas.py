"""Gas accounts: which one sends, what may be spent, and that none stays stuck.

Every chain nonce that was allotted is looked after here until a block has used it: its bytes are
handed over again when nodes have dropped them, replaced at a higher fee when they are overdue, and
replaced by nothing (a transfer of zero to ourselves) when no payment of it can succeed any more,
so that what expired holds up nobody. The same nonce always; every replacement is stored first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from chain import receipts, sender
from chain.errors import ChainError, Rejected, Unavailable, Unknown
from chain.receipts import Receipt
from chain.rpc import Rpc
from chain.sender import Market, Prepared
from gateway.db import Row, Tx, transact
from gateway.observe import log
from gateway.payments import budget, nonces, worth
from gateway.payments.nonces import Open
from gateway.payments.rails import Rails
from gateway.settings import Chain
from wallet_auth.keys import address_of, private_key

PAUSE_STUCK_MS: Final = 60_000  # no more is queued behind a transaction that is stuck for so long
STANDINGS: Final = ("ok", "low", "empty", "stuck")
LOW: Final = 20  # settlements that a gas account should be good for
USUAL_GAS: Final = 130_000  # of one settlement, generously
NOTE_EVERY_MS: Final = 60_000
_CLOSELY: Final = 6  # times as often where offers hang on what gas costs
_AT_ONCE: Final = 50
_TEND_LEASE_MS: Final = 10_000
_PATIENCE_MS: Final = 1_500  # before a transaction that nodes do not show is handed over again
_GWEI: Final = 10**9
_MOST_GWEI: Final = 2**53


@dataclass(frozen=True, slots=True)
class GasAccount:
    """A key that pays for settlements, and its address. ``known``: the first chain nonce that was
    never allotted, as far as was looked."""

    key: str = field(repr=False)
    address: str
    known: int = 0


def accounts(chain: Chain) -> list[GasAccount]:
    """The gas accounts of a network, each once, in the order of the configuration."""
    first = () if chain.settler_key is None else (chain.settler_key,)
    keys = dict.fromkeys(key.get_secret_value() for key in (*first, *chain.settler_keys))
    return [GasAccount(key, address_of(private_key(key))) for key in keys]


def most_wei(chain: Chain) -> int | None:
    """The most that may be paid for a unit of gas; None: what it costs."""
    return None if chain.max_fee_gwei is None else chain.max_fee_gwei * _GWEI


async def choose(
    rails: Rails, chain: Chain, only: str | None = None, *, owed: bool = False
) -> GasAccount:
    """The gas account for the next transaction: not stuck, not empty, with the fewest under way.

    ``only``: the one address that may send it (``upto.sender_of``). ``owed``: as of a job. Raises
    ``Unavailable`` with one of ``rails.PAUSES`` when nothing may be sent now.
    """
    ours = [each for each in accounts(chain) if only in (None, each.address)]
    if not ours:
        which = "no settler key" if only is None else f"no key of {only} any more"
        raise Unavailable("gas_account_empty", f"{chain.name} has {which}")
    async with rails.db.read() as tx:
        now_ms = await tx.now_ms()
        if not owed:
            await budget.require(tx, chain, now_ms)
        rows = await tx.fetch(
            "SELECT a.sender, a.stuck_ms, a.balance_gwei, a.need_gwei, a.next_nonce,"
            " (SELECT count(*) FROM chain_nonce n WHERE n.network = a.network AND n.sender ="
            " a.sender AND n.done_ms IS NULL) AS under_way FROM gas_account a WHERE a.network = $1",
            chain.caip2,
        )
    known = {row["sender"]: row for row in rows}
    good = [a for a in ours if not _is_stuck(known.get(a.address), now_ms)]
    if not good:
        raise Unavailable("gas_accounts_stuck", f"every gas account on {chain.name} is stuck")
    funded = [a for a in good if not _is_short(known.get(a.address), 1)]
    if not funded:
        raise Unavailable("gas_account_empty", f"every gas account on {chain.name} is empty")

    def load(account: GasAccount) -> tuple[bool, bool, int]:
        row = known.get(account.address)
        if row is None:
            return False, False, 0
        return row["stuck_ms"] is not None, _is_short(row, LOW), row["under_way"]

    best = min(funded, key=load)
    row = known.get(best.address)
    return best if row is None else replace(best, known=row["next_nonce"])


def _is_stuck(row: Row | None, now_ms: int) -> bool:
    since: int | None = None if row is None else row["stuck_ms"]
    return since is not None and since <= now_ms - PAUSE_STUCK_MS


def _is_short(row: Row | None, settlements: int) -> bool:
    """Whether an account is known not to be good for so many settlements."""
    if row is None or row["balance_gwei"] is None or row["need_gwei"] is None:
        return False
    short: bool = row["balance_gwei"] < settlements * row["need_gwei"]
    return short


async def standing(rails: Rails) -> dict[str, str]:
    """Every gas account that needs somebody, by network and address: ``low``, ``empty``, ``stuck``;
    and the networks whose gas budget is used up. As of the last look; empty if all is well."""
    found: dict[str, str] = {}
    async with rails.db.read() as tx:
        now_ms = await tx.now_ms()
        for chain in rails.settings.chains:
            if await budget.is_spent(tx, chain, now_ms):
                found[chain.caip2] = "gas_budget_spent"
            for account, (state, _) in zip(
                accounts(chain), await accounts_now(tx, chain), strict=True
            ):
                if state != "ok":
                    found[f"{chain.caip2} {account.address}"] = state
    return found


async def accounts_now(tx: Tx, chain: Chain) -> list[tuple[str, int | None]]:
    """Each gas account of a network, in the order of the configuration: one of ``STANDINGS``, and
    for how many settlements it is good (None: nobody has looked yet). As of the last look."""
    rows = await tx.fetch(
        "SELECT sender, stuck_ms, balance_gwei, need_gwei FROM gas_account WHERE network = $1",
        chain.caip2,
    )
    known = {row["sender"]: row for row in rows}
    found: list[tuple[str, int | None]] = []
    for account in accounts(chain):
        row = known.get(account.address)
        left = None
        if row is not None and row["balance_gwei"] is not None and row["need_gwei"]:
            left = row["balance_gwei"] // row["need_gwei"]
        state = "empty" if _is_short(row, 1) else "low" if _is_short(row, LOW) else "ok"
        if row is not None and row["stuck_ms"] is not None:
            state = "stuck"
        found.append((state, left))
    return found


def cost_gwei(receipt: Receipt) -> int:
    """What a transaction cost, rounded up; with what a rollup took for its data, where its
    receipts say so. Bounded: a node that lies must not keep a nonce from being closed."""
    wei = receipt.gas_used * receipt.gas_price_wei + receipt.l1_fee_wei
    return min(-(-wei // _GWEI), _MOST_GWEI)


def expected_gwei(gas_limit: int, now: Market, l1_wei: int) -> int:
    """What a transaction will cost about, at the price of now; ``l1_wei`` of it for its data."""
    wei = gas_limit * (now.base_wei + now.tip_wei) + l1_wei
    return min(-(-wei // _GWEI), _MOST_GWEI)


async def mark_empty(rails: Rails, chain: Chain, address: str) -> None:
    """A node would not take a transaction of this account for want of money: until somebody has
    looked again nothing more is signed for it."""
    log.error("%s: gas account %s cannot pay for what it signed", chain.name, address)
    async with rails.db.write() as tx:
        await tx.execute(
            "UPDATE gas_account SET balance_gwei = 0, need_gwei = coalesce(need_gwei, 1)"
            " WHERE network = $1 AND sender = $2",
            chain.caip2,
            address,
        )


# -- looking after what was signed -----------------------------------------------------------------


async def tend(
    rails: Rails, rpc: Rpc, chain: Chain, address: str, *, patience_ms: int = _PATIENCE_MS
) -> bool:
    """Look after the open chain nonces of one gas account. False: somebody else is at it.

    What was signed within ``patience_ms`` is left to whoever is sending it. Raises ``ChainError``
    if the chain cannot be asked; what one transaction meets keeps no other waiting.
    """
    until_ms = await _lease(rails, chain, address)
    if until_ms is None:
        return False
    try:
        now = await sender.market(rpc, address)
        mined = await sender.mined_count(rpc, address)
        overdue_after_ms = overdue_ms(rpc, chain)
        async with rails.db.write() as tx:
            # What was in a block that is no longer part of the chain is looked after again.
            await nonces.reopen(tx, chain.caip2, address, mined)
        async with rails.db.read() as tx:
            waiting = await nonces.open_of(tx, chain.caip2, address, _AT_ONCE)
            now_ms = await tx.now_ms()
        for each in waiting:
            if each.nonce < mined:
                await _close(rails, rpc, each.newest)
        later = [each for each in waiting if each.nonce >= mined]
        for each in later:
            age_ms = now_ms - each.newest_ms
            if age_ms >= patience_ms:
                await _help(rails, rpc, chain, each, now, overdue=age_ms >= overdue_after_ms)
        await _note(rails, rpc, chain, address, now, later, now_ms)
    finally:
        await _release(rails, chain, address, until_ms)
    return True


async def _lease(rails: Rails, chain: Chain, address: str) -> int | None:
    """Until when (ms) this process looks after an account; None: somebody else does."""
    async with rails.db.write() as tx:
        now_ms = await tx.now_ms()
        mine = await tx.execute(
            "UPDATE gas_account SET tended_ms = $3 WHERE network = $1 AND sender = $2"
            " AND tended_ms <= $4",
            chain.caip2,
            address,
            now_ms + _TEND_LEASE_MS,
            now_ms,
        )
    return now_ms + _TEND_LEASE_MS if mine else None


async def _release(rails: Rails, chain: Chain, address: str, until_ms: int) -> None:
    """Not the lease of another, who may have it since ours was over."""
    async with rails.db.write() as tx:
        await tx.execute(
            "UPDATE gas_account SET tended_ms = 0 WHERE network = $1 AND sender = $2"
            " AND tended_ms = $3",
            chain.caip2,
            address,
            until_ms,
        )


async def _close(rails: Rails, rpc: Rpc, newest: Prepared) -> None:
    """A block has used this nonce, with one of our transactions or with somebody's."""
    async with rails.db.read() as tx:
        ours = await nonces.versions(tx, newest.network, newest.sender, newest.nonce)
    try:
        receipt = await first_receipt(rpc, ours)
    except Unavailable as error:
        log.warning("transaction %s: %s; it is looked at again", newest.tx_hash, error)
        return
    cost = None if receipt is None else cost_gwei(receipt)
    async with rails.db.write() as tx:
        await nonces.close(tx, newest, cost, await tx.now_ms())


async def first_receipt(rpc: Rpc, ours: Sequence[Prepared]) -> Receipt | None:
    """The receipt of whichever of these is in a block: of one nonce at most one can be."""
    for each in ours:
        receipt = await receipts.read(rpc, each.tx_hash)
        if receipt is not None:
            return receipt
    return None


def overdue_ms(rpc: Rpc, chain: Chain) -> int:
    """After how long a transaction that is in no block is not just waiting its turn."""
    return max(chain.bump_after_s * 1_000, 2 * rpc.network.finality.block_ms)


async def _help(
    rails: Rails, rpc: Rpc, chain: Chain, each: Open, now: Market, *, overdue: bool
) -> None:
    """Bring one transaction on its way: again, dearer, or as nothing. Says what it meets."""
    cancelled = sender.call_of(each.newest.raw)[0] == each.newest.sender
    try:
        if not each.wanted and not cancelled:
            done = await _replace(rails, rpc, chain, each, now)
        else:
            done = overdue and _fee_matters(each, now)
            done = done and await _replace(rails, rpc, chain, each, now)
        if not done and not await _is_known(rpc, each):
            await _again_or_dearer(rails, rpc, chain, each, now)
    except (Unavailable, Unknown, Rejected) as error:
        # Not taken now; or perhaps sent; or the nonce went to another one, which the next look
        # sees; or no block can hold these bytes, and that is for a person.
        log.warning("transaction %s: %s; it is looked at again", each.newest.tx_hash, error)


async def _is_known(rpc: Rpc, each: Open) -> bool:
    return await rpc.call("eth_getTransactionByHash", [each.newest.tx_hash]) is not None


async def _again_or_dearer(rails: Rails, rpc: Rpc, chain: Chain, each: Open, now: Market) -> None:
    """Hand the same bytes over again; where nodes do not take them for their price, dearer ones.

    As long as that can be the reason: a node that finds every price too low is not paid any.
    """
    try:
        await sender.broadcast(rpc, each.newest.raw)
    except Unavailable as error:
        dearer = error.code == "underpriced" and _fee_matters(each, now)
        if not dearer or not await _replace(rails, rpc, chain, each, now):
            raise


def _fee_matters(each: Open, now: Market) -> bool:
    """Not when it offers three times the price of now already: something else keeps it."""
    offered = sender.fees_of(each.newest.raw)
    return offered.max_fee_wei < 3 * (2 * now.base_wei + now.tip_wei)


async def _replace(rails: Rails, rpc: Rpc, chain: Chain, each: Open, now: Market) -> bool:
    """Sign the same nonce again with higher fees, store it, send it: the same call, or none if
    nobody wants it any more. False: that would cost more than may be, or the key is gone."""
    key = next((a.key for a in accounts(chain) if a.address == each.newest.sender), None)
    most_tip_wei = sender.most_tip_wei(chain.network)
    fees = sender.raised(sender.fees_of(each.newest.raw), now, most_wei(chain), most_tip_wei)
    if key is None or fees is None:
        return False
    to, data = sender.call_of(each.newest.raw)
    if not each.wanted:
        to, data = each.newest.sender, b""
        limit = await sender.gas_limit(rpc, each.newest.sender, to, data)
        fees = sender.Fees(limit, fees.max_fee_wei, fees.tip_wei, fees.nonce)
    fresh = sender.sign(key, chain.network.chain_id, each.nonce, to, data, fees)
    l1_wei = len(fresh.raw) * await worth.byte_wei(rails, rpc, chain)
    cost = expected_gwei(fees.gas_limit, replace(now, tip_wei=fees.tip_wei), l1_wei)

    async def work(tx: Tx) -> bool:
        return await nonces.replace(tx, fresh, each.newest.tx_hash, await tx.now_ms(), cost)

    if not await transact(rails.db, work):
        return True  # somebody else has replaced it meanwhile, or it is in a block
    what = "offered more for" if each.wanted else "given up and freed"
    log.info("%s: nonce %d of %s is %s", chain.name, each.nonce, fresh.sender, what)
    await sender.broadcast(rpc, fresh.raw)
    return True


async def _note(  # noqa: PLR0917
    rails: Rails,
    rpc: Rpc,
    chain: Chain,
    address: str,
    now: Market,
    later: Sequence[Open],
    now_ms: int,
) -> None:
    """What ``choose`` and ``/readyz`` go by: the balance, the price, and whether it is stuck."""
    stuck = bool(later) and later[0].at_ms <= now_ms - 2 * overdue_ms(rpc, chain)
    wei = rpc.quantity(await rpc.call("eth_getBalance", [address, "latest"]))
    byte_wei = await worth.byte_wei(rails, rpc, chain)
    need = expected_gwei(USUAL_GAS, now, worth.SETTLE_BYTES * byte_wei)
    if wei // _GWEI < LOW * need:
        log.error("%s: gas account %s is low: %d gwei", chain.name, address, wei // _GWEI)
    async with rails.db.write() as tx:
        await tx.execute(
            "UPDATE gas_account SET balance_gwei = $3, need_gwei = $4, noted_ms = $6, stuck_ms ="
            " CASE WHEN $5 = 0 THEN NULL ELSE coalesce(stuck_ms, $6) END"
            " WHERE network = $1 AND sender = $2",
            chain.caip2,
            address,
            min(wei // _GWEI, 2**62),
            need,
            int(stuck),
            now_ms,
        )
        await worth.note(tx, chain, worth.settlement_gwei(now, byte_wei), now_ms)


async def tend_all(rails: Rails) -> None:
    """One round for the background loop: every gas account that has something under way, and each
    once a minute for its balance and the price of gas; more often where offers hang on that."""
    for chain in rails.settings.chains:
        rpc = rails.rpcs[chain.caip2]
        for account in accounts(chain):
            if not await _is_due(rails, chain, account.address):
                continue
            try:
                await tend(rails, rpc, chain, account.address)
            except ChainError as error:
                log.warning("%s: gas account %s: %s", chain.name, account.address, error)


async def _is_due(rails: Rails, chain: Chain, address: str) -> bool:
    async with rails.db.read() as tx:
        now_ms = await tx.now_ms()
        row = await tx.fetchrow(
            "SELECT noted_ms, balance_gwei, need_gwei FROM gas_account WHERE network = $1"
            " AND sender = $2",
            chain.caip2,
            address,
        )
        oldest_ms = await nonces.oldest_open_ms(tx, chain.caip2, address)
    if row is None:
        async with rails.db.write() as tx:
            await tx.execute(
                "INSERT INTO gas_account (network, sender, next_nonce) VALUES ($1, $2, 0)"
                " ON CONFLICT DO NOTHING",
                chain.caip2,
                address,
            )
        return True
    late = oldest_ms is not None and oldest_ms <= now_ms - _PATIENCE_MS
    every_ms = NOTE_EVERY_MS
    if chain.native_usd_units is not None:
        every_ms //= _CLOSELY
    if _is_short(row, LOW):  # somebody is on the way to refill it
        every_ms = min(every_ms, NOTE_EVERY_MS // 12)
    return late or row["noted_ms"] <= now_ms - every_ms
