"""How money is moved on chain, and how it is told afterwards that it was.

One row for each way of paying that the engine settles. A payment keeps the name of its own
(``payment.method``), so that whoever finishes it later asks the right contract.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from chain import transfers
from chain.networks import Asset
from chain.receipts import Receipt
from chain.rpc import Rpc
from chain.schemes import permit2
from chain.transfers import Transfer


@dataclass(frozen=True, slots=True)
class Spent:
    """The one-time value that a payment uses up, and where its money goes."""

    asset: Asset
    payer: str
    nonce: str
    pay_to: str


class Method(Protocol):
    """What the chain is asked about a payment. All raise ``Unavailable``; none guesses."""

    async def is_used(self, rpc: Rpc, spent: Spent, block: str) -> bool:
        """Whether the one-time value was used up at ``block`` ("latest" or a number), by a
        transfer or by its owner taking it back. A node that lacks the block must not answer."""
        ...

    async def find(self, rpc: Rpc, spent: Spent, from_block: int) -> str | None:
        """The transaction that moved money by it since ``from_block``, whoever sent it and
        whomever it paid. None: none is known here."""
        ...

    async def was_taken_back(self, rpc: Rpc, spent: Spent, from_block: int) -> bool:
        """Whether its owner is known to have made it useless since ``from_block``."""
        ...

    def transfer(self, network: str, receipt: Receipt, spent: Spent) -> Transfer | None:
        """The transfer of this very payment to ``pay_to`` among a transaction's logs. None: that
        transaction did not move its money, whatever its status."""
        ...


class Eip3009:
    """``transferWithAuthorization``: the token itself marks ``(authorizer, nonce)``."""

    async def is_used(self, rpc: Rpc, spent: Spent, block: str) -> bool:
        return await transfers.authorization_used(rpc, spent.asset, spent.payer, spent.nonce, block)

    async def find(self, rpc: Rpc, spent: Spent, from_block: int) -> str | None:
        return await transfers.find_authorization(
            rpc, spent.asset, spent.payer, spent.nonce, from_block
        )

    async def was_taken_back(self, rpc: Rpc, spent: Spent, from_block: int) -> bool:
        event = transfers.AUTHORIZATION_CANCELED
        found = await transfers.find_authorization(
            rpc, spent.asset, spent.payer, spent.nonce, from_block, event
        )
        return found is not None

    def transfer(self, network: str, receipt: Receipt, spent: Spent) -> Transfer | None:
        for each in transfers.transfers_in(network, receipt, spent.asset, spent.pay_to):
            told = (each.authorizer, each.auth_nonce, each.from_)
            if told == (spent.payer, spent.nonce, spent.payer):
                return each
        return None


class Permit2:
    """``exact`` by Permit2, which marks ``(owner, nonce)`` and says nothing of it in a log.

    So a transaction is told by its calldata: it moved this payment if it carries the nonce and a
    Transfer from the payer to ``pay_to`` stands in its receipt.
    """

    async def is_used(self, rpc: Rpc, spent: Spent, block: str) -> bool:
        return await permit2.nonce_used(rpc, spent.payer, spent.nonce, block)

    async def find(self, rpc: Rpc, spent: Spent, from_block: int) -> str | None:
        return await transfers.find_transfer(
            rpc, spent.asset, spent.payer, from_block, bytes.fromhex(spent.nonce[2:])
        )

    async def was_taken_back(self, rpc: Rpc, spent: Spent, from_block: int) -> bool:
        """Never known: what made it useless may as well have been a transfer to somebody else."""
        return False

    def transfer(self, network: str, receipt: Receipt, spent: Spent) -> Transfer | None:
        for each in transfers.transfers_in(network, receipt, spent.asset, spent.pay_to):
            if each.from_ == spent.payer and each.authorizer is None:
                return each
        return None


METHODS: Final[dict[str, Method]] = {"eip3009": Eip3009(), "permit2": Permit2()}
