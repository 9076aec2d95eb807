"""How much may be minted before its block is safe: of one wallet, and of all wallets together.

A block that is new can leave the chain again, with the money in it. Until it is safe, what was
minted for it is a risk of the house, and it is bounded: small amounts are minted at once within
``mint_at.instant_limit`` for each wallet and ``exposure_limit`` for the network. What is beyond
that waits. An amount above ``instant_limit`` also needs a second provider that says the same, or
a safe block where there is only one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.db import Row, Tx
from gateway.payments import upto_rows
from gateway.settings import Chain, MintAt, Settings

if TYPE_CHECKING:
    from gateway.payments.inbound import Inbound


async def admitted(tx: Tx, row: Inbound) -> bool:
    """Whether a transfer may be minted now.

    Locks the network's policy if it would add to what is provisional, so that two that arrive
    together do not both fit into the last of a limit.
    """
    new = row.depth == "included"
    policy = await _policy(tx, row.network, lock=new)
    if policy is None:  # nobody has said anything: what the settings are when nothing is set
        usual = MintAt.model_validate({})
        instant, at_inclusion = usual.instant_limit_units, usual.otherwise == "included"
    else:
        instant, at_inclusion = policy["instant_limit_units"], bool(policy["at_inclusion"])
    sure = row.value_units <= instant or bool(row.agreed)
    if not new or not sure:
        return sure
    exposed = await exposed_units(tx, row.network, but=row.payment_id or "")
    if exposed + row.value_units > _limit(policy):
        return False
    if at_inclusion:
        return True
    its = await provisional_units(tx, row.network, row.from_address)
    return its + row.value_units <= instant


async def has_room(tx: Tx, network: str, units: int) -> bool:
    """Whether a call that may come to so much can be done before it is settled. Locks the network's
    policy, so that two do not both fit into the last of the limit."""
    policy = await _policy(tx, network, lock=True)
    return await exposed_units(tx, network) + units <= _limit(policy)


async def exposed_units(tx: Tx, network: str, but: str = "") -> int:
    """What the house would lose at worst: what is minted and not yet safe, and what is done or
    being done and not settled (``upto``, without the payment ``but``)."""
    found: int = await tx.fetchval(
        "SELECT coalesce((SELECT sum(value_units) FROM inbound WHERE network = $1"  # noqa: S608
        " AND state = 'minted' AND depth = 'included'), 0)"
        " + coalesce((SELECT sum(coalesce(units, most_units)) FROM upto_call WHERE network = $1"
        f" AND {upto_rows.UNENDED} AND state <> 'unsettled' AND payment_id <> $2), 0)",
        network,
        but,
    )
    return int(found)


async def _policy(tx: Tx, network: str, *, lock: bool) -> Row | None:
    return await tx.fetchrow(
        f"SELECT * FROM mint_policy WHERE network = $1{tx.for_update if lock else ''}",  # noqa: S608
        network,
    )


def _limit(policy: Row | None) -> int:
    usual: int = Chain.model_fields["exposure_limit_units"].default
    return usual if policy is None else int(policy["exposure_limit_units"])


async def provisional_units(tx: Tx, network: str, wallet: str = "") -> int:
    """What is minted and not yet safe, of one wallet or (without one) of all."""
    found: int = await tx.fetchval(
        "SELECT coalesce(sum(value_units), 0) FROM inbound WHERE network = $1"
        " AND state = 'minted' AND depth = 'included' AND ($2 = '' OR from_address = $2)",
        network,
        wallet,
    )
    return int(found)


async def set_policies(tx: Tx, settings: Settings) -> None:
    """Put this configuration's limits where all nodes find them."""
    for chain in settings.chains:
        await tx.execute(
            "INSERT INTO mint_policy (network, instant_limit_units, exposure_limit_units,"
            " at_inclusion) VALUES ($1, $2, $3, $4) ON CONFLICT (network) DO UPDATE SET"
            " instant_limit_units = excluded.instant_limit_units,"
            " exposure_limit_units = excluded.exposure_limit_units,"
            " at_inclusion = excluded.at_inclusion",
            chain.caip2,
            chain.mint_at.instant_limit_units,
            chain.exposure_limit_units,
            int(chain.mint_at.otherwise == "included"),
        )


async def provisional(tx: Tx, lot_id: int) -> bool:
    """Whether the chain could still take a lot back: then it must not be paid out."""
    found: str | None = await tx.fetchval("SELECT depth FROM inbound WHERE lot_id = $1", lot_id)
    return found not in (None, "final")
