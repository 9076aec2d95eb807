"""Blocks, followed from one to the next by parent hash.

A number names a place and a hash names a block: what stands at a place can change until it is
final. ``Trail`` is a line of blocks each of which names the one before as its parent, so it is
one node's consistent story however many nodes answered. A block of which the trail knows another
hash at its place is not in the chain any more.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, Final

from chain.errors import NodeError, Unavailable
from chain.eth import count, data_bytes
from chain.rpc import Rpc

AT_ONCE: Final = 16  # headers asked for together
LONGEST: Final = 20_000  # blocks a trail may hold


@dataclass(frozen=True, slots=True)
class Header:
    """What of a block is needed to follow it."""

    number: int
    hash: str
    parent: str
    time_s: int


@dataclass(frozen=True, slots=True)
class Points:
    """How far a chain can be trusted now. ``safe``: mints up to here are not provisional;
    ``final``: nothing up to here is looked at again."""

    head: int
    safe: int
    final: int


def parse(answer: Any) -> Header | None:
    """A header out of a node's answer; None if there is no such block. ``Unavailable`` if it is
    something else."""
    if answer is None:
        return None
    try:
        return Header(
            number=count(answer["number"]),
            hash="0x" + data_bytes(answer["hash"], 32).hex(),
            parent="0x" + data_bytes(answer["parentHash"], 32).hex(),
            time_s=count(answer["timestamp"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Unavailable("rpc_bad_answer", f"bad block: {error}") from None


async def header(rpc: Rpc, block: int | str) -> Header | None:
    """The block at a number or tag; None if there is none."""
    at = hex(block) if isinstance(block, int) else block
    found = parse(await rpc.call("eth_getBlockByNumber", [at, False]))
    if found is not None and isinstance(block, int) and found.number != block:
        raise Unavailable("rpc_bad_answer", f"asked for block {block}, got {found.number}")
    return found


async def newest(rpc: Rpc) -> Header:
    """The newest block."""
    found = await header(rpc, "latest")
    if found is None:
        raise Unavailable("rpc_bad_answer", "there is no newest block")
    return found


async def points(rpc: Rpc, trusted: int | str, head: int | None = None) -> Points:
    """The newest block, and the newest ones that are trusted and final.

    ``trusted``: ``"safe"``, ``"finalized"`` (each by the network's own tags) or a number of
    blocks, for networks whose nodes know no such tags. Nothing is safe where a node has no block
    for the tag yet.
    """
    if head is None:
        head = (await newest(rpc)).number
    if isinstance(trusted, int):
        return Points(head, head - trusted, head - trusted)
    finality = rpc.network.finality
    final = await _tagged(rpc, finality.final)
    if trusted == "finalized" or finality.safe == finality.final:
        return Points(head, final, final)
    return Points(head, max(await _tagged(rpc, finality.safe), final), final)


async def _tagged(rpc: Rpc, tag: str) -> int:
    try:
        found = await header(rpc, tag)
    except NodeError:  # "safe block not found", of a chain that has none yet
        return -1
    return -1 if found is None else found.number


@dataclass(slots=True)
class Trail:
    """A line of blocks up to the newest one. Belongs to whoever follows a chain; may be lost."""

    blocks: dict[int, Header] = field(default_factory=dict)

    def hash_at(self, number: int) -> str | None:
        """The hash of the block at this place; None: the trail does not reach there."""
        found = self.blocks.get(number)
        return None if found is None else found.hash

    async def follow(self, rpc: Rpc, down_to: int) -> Header:
        """Bring the trail to the newest block, and down to the place ``down_to``.

        Where the new blocks do not join the old ones, the old ones are dropped: that is a
        reorganisation. Raises ``Unavailable`` if the nodes tell no line that holds together (as
        when one happens meanwhile); the trail then is empty or as it was.
        """
        head = await newest(rpc)
        if head.number - down_to > LONGEST:
            raise Unavailable("rpc_error", f"blocks from {down_to} are too many to follow")
        fresh = await self._down(rpc, head, down_to)
        self.blocks = fresh
        return head

    async def _down(self, rpc: Rpc, head: Header, down_to: int) -> dict[int, Header]:
        line = {head.number: head}
        lowest = head
        while lowest.number > max(down_to, 0):
            known = self.blocks.get(lowest.number - 1)
            if known is not None and known.hash == lowest.parent:
                line[known.number] = lowest = known
                continue
            # Only what is new, usually one block; after a reorganisation, more at once.
            gap = lowest.number - 1 - max(self.blocks, default=0)
            first = max(lowest.number - (min(gap, AT_ONCE) if gap > 0 else AT_ONCE), down_to, 0)
            wanted = range(lowest.number - 1, first - 1, -1)
            found = await asyncio.gather(*(header(rpc, number) for number in wanted))
            for each in found:
                if each is None or each.hash != lowest.parent:
                    raise Unavailable("rpc_disagrees", f"no parent of block {lowest.number}")
                line[each.number] = lowest = each
        return line
