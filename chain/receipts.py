"""Transaction receipts, read strictly: what a node says happened, or an error, nothing between.

A receipt decides over money, and the node is another party. A field that is missing, of another
form or of another transaction makes the whole answer ``Unavailable("rpc_bad_answer")``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chain.errors import Unavailable
from chain.eth import count, data_bytes, is_address, quantity
from chain.rpc import Rpc


@dataclass(frozen=True, slots=True)
class Log:
    """One event of a transaction. ``index`` counts within the block."""

    address: str  # lower case
    topics: tuple[bytes, ...]
    data: bytes
    index: int


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of a transaction that is in a block. Logs are in their order on chain."""

    tx_hash: str
    succeeded: bool
    block_number: int
    block_hash: str
    gas_used: int
    gas_price_wei: int
    logs: tuple[Log, ...]
    # What a rollup of the OP stack charged besides, for the data it posts on L1 (``l1Fee``).
    l1_fee_wei: int = 0


async def read(rpc: Rpc, tx_hash: str) -> Receipt | None:
    """The receipt of a transaction; None while it is in no block the node knows of."""
    answer = await rpc.call("eth_getTransactionReceipt", [tx_hash])
    return None if answer is None else parse(answer, tx_hash)


def parse(answer: Any, tx_hash: str) -> Receipt:
    """A receipt out of a node's answer. ``Unavailable`` if it is not one of ``tx_hash``."""
    try:
        return _parse(answer, tx_hash)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Unavailable("rpc_bad_answer", f"bad receipt of {tx_hash}: {error}") from None


def _parse(answer: Any, tx_hash: str) -> Receipt:
    if not isinstance(answer, dict) or answer["transactionHash"].lower() != tx_hash.lower():
        raise ValueError("it is of another transaction")
    status = quantity(answer["status"])
    if status not in (0, 1):
        raise ValueError(f"status {status}")
    block_hash = "0x" + data_bytes(answer["blockHash"], 32).hex()
    logs = sorted(
        (_log(log, tx_hash, block_hash) for log in _list(answer["logs"]) if not _removed(log)),
        key=lambda log: log.index,
    )
    if len({log.index for log in logs}) != len(logs):
        raise ValueError("two logs with one index")
    return Receipt(
        tx_hash=tx_hash.lower(),
        succeeded=status == 1,
        block_number=count(answer["blockNumber"]),
        block_hash=block_hash,
        gas_used=quantity(answer["gasUsed"]),
        gas_price_wei=quantity(answer.get("effectiveGasPrice", "0x0")),
        logs=tuple(logs),
        l1_fee_wei=quantity(answer.get("l1Fee") or "0x0"),
    )


def _log(log: dict[str, Any], tx_hash: str, block_hash: str) -> Log:
    if log["transactionHash"].lower() != tx_hash.lower() or log["blockHash"].lower() != block_hash:
        raise ValueError("a log is of another transaction or block")
    return log_of(log)


def log_of(log: dict[str, Any]) -> Log:
    """One event out of a node's answer; ``ValueError`` and the like if it is none."""
    if not is_address(log["address"]):
        raise ValueError("a log without an address")
    return Log(
        address=log["address"].lower(),
        topics=tuple(data_bytes(topic, 32) for topic in _list(log["topics"])),
        data=data_bytes(log["data"]),
        index=quantity(log["logIndex"]),
    )


def _removed(log: Any) -> bool:
    if not isinstance(log, dict):
        raise ValueError("a log that is no object")
    return log.get("removed", False) is not False


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("not a list")
    return value
