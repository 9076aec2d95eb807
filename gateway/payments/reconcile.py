"""Compare the chain, the card provider's messages and the books, and itemise what differs.

Every transfer to ``pay_to`` since the block from which it counts must be minted for exactly what
its log says, or be explained: kept in suspense, waiting to be safe, too small, or of a payment
that is still under way. Everything that was minted for a transfer must be on the chain. What the
refund wallet paid by authorization must be a refund of the books, and the other way round. A
difference that has no such reason is one that a person has to look at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from chain import blocks, transfers
from chain.networks import Asset
from chain.rpc import Rpc
from chain.transfers import Authorized, Incoming
from gateway.db import Database, Tx
from gateway.observe import log
from gateway.payments import carry, inbound, watcher
from gateway.payments.rails import Rails
from gateway.settings import Chain

SPAN: Final = 2_000
SETTLING_MS: Final = 120_000
"""How long a new transfer may be in nobody's books before that is a fault: the watcher reads every
few seconds, and a payment that is under way is finished by the background loop."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not alike on both sides. ``explained``: it is known and will end."""

    kind: str
    where: str  # network or provider
    ref: str
    chain_units: int  # what the outside says
    books_units: int
    explained: bool

    def members(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "where": self.where,
            "ref": self.ref,
            "outside_units": self.chain_units,
            "books_units": self.books_units,
            "explained": self.explained,
        }


@dataclass(frozen=True, slots=True)
class Compared:
    """What a comparison covered, and what came of it."""

    where: str
    from_block: int | None
    to_block: int | None
    transfers: int
    units: int
    differences: tuple[Difference, ...]
    what: str = "payments"  # or "refunds"

    def members(self) -> dict[str, Any]:
        return {
            "where": self.where,
            "what": self.what,
            "from_block": self.from_block,
            "to_block": self.to_block,
            "transfers": self.transfers,
            "units": self.units,
            "differences": [each.members() for each in self.differences],
        }


@dataclass(frozen=True, slots=True)
class _Minted:
    """A mint as the ledger has it."""

    lot_id: int
    minted_units: int
    reversed_units: int


async def everything(
    db: Database, chains: Sequence[Chain], rpcs: Mapping[str, Rpc], *, whole: bool
) -> list[Compared]:
    """Compare every network and the cards. ``whole``: from the first block that counts; else from
    where the last comparison without a difference ended. Raises ``ChainError``."""
    done = []
    for chain in chains:
        for asset in chain.network.assets:
            done.append(await one(db, chain, rpcs[chain.caip2], asset, whole=whole))
            done += await _refunds(db, chain, rpcs[chain.caip2], asset, whole=whole)
    async with db.read() as tx:
        done.append(Compared("stripe", None, None, *await _cards(tx)))
    return done


async def one(db: Database, chain: Chain, rpc: Rpc, asset: Asset, *, whole: bool) -> Compared:
    """One token on one network."""
    async with db.read() as tx:
        known = await watcher.watched(tx, chain, asset)
    if known is None:
        return Compared(chain.caip2, None, None, 0, 0, ())
    first = known.first_block if whole else known.compared_to + 1
    head = await blocks.newest(rpc)
    told: list[Incoming] = []
    for low in range(first, head.number + 1, SPAN):
        high = min(low + SPAN - 1, head.number)
        told += await transfers.incoming(rpc, asset, chain.pay_to, low, high)
    # Read after the chain: what came meanwhile is in the books and not in ``told``, and is looked
    # for by its block; the other way round it would look as if it were in nobody's books.
    async with db.read() as tx:
        books = await _books(tx, chain, asset, first, whole=whole)
    found = _compare(chain, told, books, head.number)
    return Compared(
        chain.caip2,
        first,
        head.number,
        len(told),
        sum(each.value_units for each in told),
        tuple(found),
    )


@dataclass(frozen=True, slots=True)
class _Books:
    """What the ledger has, by transaction and ordinal. Several may have been told of one."""

    minted: Mapping[tuple[str, int], Sequence[_Minted]]
    rows: Mapping[tuple[str, int], Sequence[inbound.Inbound]]
    first: int
    whole: bool
    under_way: frozenset[str]  # transactions of payments that are not finished

    def live(self, place: tuple[str, int]) -> _Minted | None:
        """The mint that stands now: the one that is not reversed, else the last one."""
        told = self.minted.get(place, ())
        return max(told, key=lambda m: (m.reversed_units == 0, m.lot_id), default=None)

    def row(self, place: tuple[str, int]) -> inbound.Inbound | None:
        """The row that is in force."""
        told = self.rows.get(place, ())
        return max(told, key=lambda row: (row.state != "gone", row.n), default=None)


async def _books(tx: Tx, chain: Chain, asset: Asset, first: int, *, whole: bool) -> _Books:
    minted: dict[tuple[str, int], list[_Minted]] = {}
    for row in await tx.fetch(
        "SELECT k.ref, k.n, k.lot_id, l.minted_units, l.reversed_units FROM mint_key k"
        " JOIN lot l ON l.id = k.lot_id"
        " LEFT JOIN inbound i ON i.network = k.network AND i.tx_hash = k.ref AND i.n = k.n"
        " LEFT JOIN payment p ON p.id = l.payment_id"
        " WHERE k.network = $1 AND coalesce(i.asset, p.asset, $2) = $2",
        chain.caip2,
        asset.address,
    ):
        lot = _Minted(row["lot_id"], row["minted_units"], row["reversed_units"])
        minted.setdefault((row["ref"], row["n"] % inbound.TOLD_ANEW), []).append(lot)
    rows: dict[tuple[str, int], list[inbound.Inbound]] = {}
    for each in await tx.fetch(
        f"SELECT {inbound.LIST} FROM inbound WHERE network = $1 AND asset = $2"  # noqa: S608
        " AND pay_to = $3",
        chain.caip2,
        asset.address,
        chain.pay_to,
    ):
        known = inbound.row_of(each)
        rows.setdefault((known.tx_hash, known.ordinal), []).append(known)
    open_ = await tx.fetch(
        "SELECT t.tx_hash FROM chain_tx t JOIN payment p ON p.id = t.payment_id"
        " WHERE p.state = 'processing' AND t.network = $1"
        " UNION SELECT t.tx_hash FROM chain_tx t JOIN chain_member m ON m.network = t.network"
        " AND m.sender = t.sender AND m.nonce = t.nonce JOIN payment p ON p.id = m.payment_id"
        " WHERE p.state = 'processing' AND t.network = $1",
        chain.caip2,
    )
    return _Books(minted, rows, first, whole, frozenset(row["tx_hash"] for row in open_))


def _compare(
    chain: Chain, told: Sequence[Incoming], books: _Books, head: int
) -> Iterator[Difference]:
    seen: set[tuple[str, int]] = set()
    for each in told:
        place = each.tx_hash, each.n
        seen.add(place)
        lot, row = books.live(place), books.row(place)
        stands = 0 if lot is None else lot.minted_units - lot.reversed_units
        if stands == each.value_units:
            continue
        why = _why(chain, each, row, books, head)
        kind = why or ("orphan" if lot is None else "amount_differs")
        yield Difference(kind, chain.caip2, _ref(place), each.value_units, stands, why is not None)
    for place, lots in books.minted.items():
        stands = sum(lot.minted_units - lot.reversed_units for lot in lots)
        if stands and place not in seen:
            row = books.row(place)
            # Compared before, or newer than what was read; without a row it is of an earlier
            # release, and only a whole comparison can tell.
            inside = books.whole if row is None else books.first <= row.block_number <= head
            if inside:
                young = row is not None and row.depth != "final"
                kind = "leaving" if young else "mint_without_transfer"
                yield Difference(kind, chain.caip2, _ref(place), 0, stands, young)


def _ref(place: tuple[str, int]) -> str:
    return f"{place[0]}/{place[1]}"


def _why(
    chain: Chain, each: Incoming, row: inbound.Inbound | None, books: _Books, head: int
) -> str | None:
    """Why a transfer is not minted now, if there is a good reason."""
    if each.value_units < chain.min_onchain_units:
        return "too_small"
    if row is not None and row.value_units == each.value_units:
        if row.state == "unclaimed":
            return "suspense"
        if row.state == "waiting":
            return "waiting"
    if each.tx_hash in books.under_way:
        return "under_way"
    new_blocks = SETTLING_MS // chain.network.finality.block_ms
    if (row is None or row.state == "gone") and head - each.block_number < new_blocks:
        return "new"
    return None


@dataclass(frozen=True, slots=True)
class _Refund:
    """A payout as the books have it. ``paid`` None: it has not ended."""

    payment_id: str
    wallet: str
    nonce: str
    to: str
    units: int
    paid: bool | None
    from_block: int

    @property
    def books_units(self) -> int:
        return self.units if self.paid else 0


async def _refunds(
    db: Database, chain: Chain, rpc: Rpc, asset: Asset, *, whole: bool
) -> list[Compared]:
    """What refund wallets paid out, those of keys before this one too. Their plain transfers are
    their owner's own business: a refund is always an authorization."""
    async with db.read() as tx:
        known = await watcher.watched(tx, chain, asset)
        before = await _payouts(tx, chain, asset)
    wallets = {each.wallet for each in before.values()}
    if chain.refund_key is not None:
        wallets.add(carry.wallet_of(chain))
    if known is None or not wallets:
        return []
    first = known.first_block if whole else known.compared_to + 1
    head = await blocks.newest(rpc)
    told: list[tuple[str, Authorized]] = []
    for wallet in sorted(wallets):
        for low in range(first, head.number + 1, SPAN):
            high = min(low + SPAN - 1, head.number)
            found = await transfers.authorized(rpc, asset, wallet, low, high)
            told += [(wallet, each) for each in found]
    async with db.read() as tx:
        after = await _payouts(tx, chain, asset)
    # While one is open nothing is ticked off (``run``), so all of its life lies in one comparison.
    due = {key for key, each in before.items() if each.paid and each.from_block >= first - 1}
    units = sum(each.value_units for _, each in told)
    odd = tuple(_compare_refunds(chain, told, after, due))
    return [Compared(chain.caip2, first, head.number, len(told), units, odd, "refunds")]


async def _payouts(tx: Tx, chain: Chain, asset: Asset) -> dict[tuple[str, str], _Refund]:
    """Every payout on a network, by wallet and nonce of its authorization."""
    rows = await tx.fetch(
        "SELECT p.id, p.payer, p.auth_nonce, p.pay_to, p.from_block, o.amount_units, e.paid"
        " FROM payout o JOIN payment p ON p.id = o.payment_id"
        " LEFT JOIN payout_end e ON e.payout_id = o.id WHERE p.network = $1 AND p.asset = $2",
        chain.caip2,
        asset.address,
    )
    return {
        (row["payer"], row["auth_nonce"]): _Refund(
            row["id"],
            row["payer"],
            row["auth_nonce"],
            row["pay_to"],
            row["amount_units"],
            None if row["paid"] is None else bool(row["paid"]),
            row["from_block"],
        )
        for row in rows
    }


def _compare_refunds(
    chain: Chain,
    told: Sequence[tuple[str, Authorized]],
    books: Mapping[tuple[str, str], _Refund],
    due: set[tuple[str, str]],
) -> Iterator[Difference]:
    seen: set[tuple[str, str]] = set()
    for wallet, each in told:
        key = wallet, each.nonce
        row = books.get(key)
        if key in seen:  # two providers have it in different blocks
            continue
        seen.add(key)
        if row is None:
            kind, ref, here = "payout_unknown", each.tx_hash, 0
        elif row.to != each.to:
            kind, ref, here = "payout_to_another", row.payment_id, row.books_units
        elif row.units != each.value_units:
            kind, ref, here = "amount_differs", row.payment_id, row.books_units
        elif row.paid is False:
            kind, ref, here = "paid_and_given_back", row.payment_id, 0
        else:
            continue
        yield Difference(kind, chain.caip2, ref, each.value_units, here, explained=False)
    for key, row in books.items():
        if row.paid is None:
            units = row.units if key in seen else 0
            yield Difference("under_way", chain.caip2, row.payment_id, units, 0, explained=True)
        elif key in due and key not in seen:
            kind, units = "payout_without_transfer", row.books_units
            yield Difference(kind, chain.caip2, row.payment_id, 0, units, explained=False)


async def _cards(tx: Tx) -> tuple[int, int, tuple[Difference, ...]]:
    """Each card payment that succeeded against the lot it made."""
    rows = await tx.fetch(
        "SELECT p.id, p.amount_units, p.lot_id, l.minted_units FROM payment p LEFT JOIN lot l"
        " ON l.id = p.lot_id WHERE p.provider = 'stripe' AND p.state = 'succeeded'"
    )
    wrong = tuple(
        Difference(
            "card_not_minted" if row["minted_units"] is None else "amount_differs",
            "stripe",
            row["id"],
            row["amount_units"],
            row["minted_units"] or 0,
            explained=False,
        )
        for row in rows
        if row["minted_units"] != row["amount_units"]
    )
    return len(rows), sum(row["amount_units"] for row in rows), wrong


async def run(rails: Rails) -> list[Compared]:
    """The comparison of the background loop: what is new since the last one, and the cards.

    What was compared, is final and has no open question is not compared again.
    """
    done = await everything(rails.db, rails.settings.chains, rails.rpcs, whole=False)
    for each in done:
        for odd in each.differences:
            if not odd.explained:
                log.error("the books and %s differ: %s", each.where, odd.members())
    for chain in rails.settings.chains:
        if any(c.differences for c in done if c.where == chain.caip2):
            continue
        async with rails.db.write() as tx:
            await tx.execute(
                "UPDATE watched SET compared_to = read_to WHERE network = $1 AND pay_to = $2"
                " AND compared_to < read_to",
                chain.caip2,
                chain.pay_to,
            )
    return done
