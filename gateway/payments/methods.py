"""How money is moved on chain, and how it is told afterwards that it was.

One row for each way of paying that the engine settles. A payment keeps the name of its own
(``payment.method``), so that whoever finishes it later asks the right contract.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from chain import blocks, receipts, transfers
from chain.networks import Asset
from chain.receipts import Receipt
from chain.rpc import Rpc
from chain.schemes import permit2
from chain.transfers import Transfer

PROVIDERS: Final = 2  # asked for logs, where the absence of one is a proof
DEEP_BLOCKS: Final = 100  # every node has the state of so many blocks, and the logs before them


@dataclass(frozen=True, slots=True)
class Spent:
    """The one-time value that a payment uses up, and where its money goes."""

    asset: Asset
    payer: str
    nonce: str
    pay_to: str
    value_units: int


class Method(Protocol):
    """What the chain is asked about a payment. All raise ``Unavailable``; none guesses."""

    async def is_used(self, rpc: Rpc, spent: Spent, block: str) -> bool:
        """Whether the one-time value was used up at ``block`` ("latest" or a number), by a
        transfer or by its owner taking it back. A node that lacks the block must not answer."""
        ...

    async def find(self, rpc: Rpc, spent: Spent, from_block: int) -> list[str]:
        """The transactions since ``from_block`` that may have moved money by it, whoever sent
        them. Empty: none is known here."""
        ...

    async def went_elsewhere(self, rpc: Rpc, spent: Spent, from_block: int) -> bool:
        """Of a one-time value that is used up: whether it is proven that whatever did so since
        ``from_block`` is told of by ``find`` from now on. If nothing that ``find`` tells of is its
        transfer then, it was taken back or paid somebody else, and will never be one."""
        ...

    def transfers(self, network: str, receipt: Receipt, spent: Spent) -> list[Transfer]:
        """The transfers to ``pay_to`` among a transaction's logs that may be this payment's.
        Empty: that transaction did not move its money, whatever its status."""
        ...


class Eip3009:
    """``transferWithAuthorization``: the token itself marks ``(authorizer, nonce)``."""

    async def is_used(self, rpc: Rpc, spent: Spent, block: str) -> bool:
        return await transfers.authorization_used(rpc, spent.asset, spent.payer, spent.nonce, block)

    async def find(self, rpc: Rpc, spent: Spent, from_block: int) -> list[str]:
        found = await self._marked(rpc, spent, from_block, transfers.AUTHORIZATION_USED)
        return [] if found is None else [found]

    async def went_elsewhere(self, rpc: Rpc, spent: Spent, from_block: int) -> bool:
        used_by = await self._marked(rpc, spent, from_block, transfers.AUTHORIZATION_USED)
        if used_by is not None:
            return await receipts.read(rpc, used_by) is not None
        return await self.was_taken_back(rpc, spent, from_block)

    async def was_taken_back(self, rpc: Rpc, spent: Spent, from_block: int) -> bool:
        """Whether its owner is known to have cancelled it since ``from_block``."""
        event = transfers.AUTHORIZATION_CANCELED
        return await self._marked(rpc, spent, from_block, event) is not None

    async def _marked(self, rpc: Rpc, spent: Spent, from_block: int, event: bytes) -> str | None:
        return await transfers.find_authorization(
            rpc, spent.asset, spent.payer, spent.nonce, from_block, event
        )

    def transfers(self, network: str, receipt: Receipt, spent: Spent) -> list[Transfer]:
        whose = (spent.payer, spent.nonce, spent.payer)
        return [
            each
            for each in transfers.transfers_in(network, receipt, spent.asset, spent.pay_to)
            if (each.authorizer, each.auth_nonce, each.from_) == whose
        ][:1]


class Permit2:
    """``exact`` by Permit2, which marks ``(owner, nonce)`` and says nothing of it in a log.

    So a transaction is told by its calldata: it may have moved this payment if it carries the nonce
    and a Transfer of the amount from the payer to ``pay_to`` stands in its receipt. Calldata can
    carry more nonces than it uses, so which payment gets a transfer is decided by who takes it
    first (``journal.take``): there is one payment for each transfer, and never more.
    """

    async def is_used(self, rpc: Rpc, spent: Spent, block: str) -> bool:
        return await permit2.nonce_used(rpc, spent.payer, spent.nonce, block)

    async def find(self, rpc: Rpc, spent: Spent, from_block: int) -> list[str]:
        nonce = bytes.fromhex(spent.nonce[2:])
        return await transfers.find_transfers(
            rpc, spent.asset, spent.payer, spent.pay_to, from_block, nonce, ask=PROVIDERS
        )

    async def went_elsewhere(self, rpc: Rpc, spent: Spent, from_block: int) -> bool:
        """Known once it is used at a block so deep that no provider's logs lag behind it: what
        took it back leaves a mark in a log only sometimes, and a transfer elsewhere never does."""
        points = await blocks.points(rpc, "safe")
        deep = max(points.final, points.head - DEEP_BLOCKS)
        return deep >= from_block and await self.is_used(rpc, spent, hex(deep))

    def transfers(self, network: str, receipt: Receipt, spent: Spent) -> list[Transfer]:
        whose = (spent.payer, spent.value_units, None)
        return [
            each
            for each in transfers.transfers_in(network, receipt, spent.asset, spent.pay_to)
            if (each.from_, each.value_units, each.authorizer) == whose
        ]


EIP3009: Final = Eip3009()
METHODS: Final[dict[str, Method]] = {"eip3009": EIP3009, "permit2": Permit2()}
