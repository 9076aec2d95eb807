"""What came in: Transfer logs as proofs, and whether an authorization was used.

Money is credited for a log and nothing else. A transaction that succeeded proves nothing by
itself: a call to an address without code succeeds too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from chain import receipts
from chain.errors import NodeError, Unavailable
from chain.eth import count, data_bytes, selector
from chain.networks import Asset
from chain.receipts import Log, Receipt
from chain.rpc import Rpc
from wallet_auth.keys import address_word, keccak256

TRANSFER: Final = keccak256(b"Transfer(address,address,uint256)")
AUTHORIZATION_USED: Final = keccak256(b"AuthorizationUsed(address,bytes32)")
AUTHORIZATION_CANCELED: Final = keccak256(b"AuthorizationCanceled(address,bytes32)")
_AUTHORIZATION_STATE: Final = selector("authorizationState(address,bytes32)")
MAX_LOG_REQUESTS: Final = 64
MAX_LOOKED_INTO: Final = 500  # transactions whose calldata is read in one search


@dataclass(frozen=True, slots=True)
class Transfer:
    """One transfer of ``asset`` to us, as it stands in a block.

    ``n`` counts this transaction's Transfers of the asset to ``to``, from 0: unlike the log index
    it survives a reorganisation that includes the transaction again. ``authorizer`` and
    ``auth_nonce`` are those of the ``AuthorizationUsed`` directly before it, if there is one.
    """

    network: str  # CAIP-2
    tx_hash: str
    n: int
    asset: str
    from_: str
    to: str
    value_units: int
    block_number: int
    block_hash: str
    auth_nonce: str | None
    authorizer: str | None


async def transfers_of(rpc: Rpc, tx_hash: str, asset: Asset, pay_to: str) -> list[Transfer] | None:
    """The transfers of ``asset`` to ``pay_to`` in a transaction.

    None: in no block yet, or no longer. An empty list: it failed, or moved nothing to us.
    """
    receipt = await receipts.read(rpc, tx_hash)
    return None if receipt is None else transfers_in(rpc.network.caip2, receipt, asset, pay_to)


def transfers_in(caip2: str, receipt: Receipt, asset: Asset, pay_to: str) -> list[Transfer]:
    """The same from a receipt at hand. Transfers of zero are counted and left out."""
    if not receipt.succeeded:
        return []
    to_word = address_word(pay_to.lower())
    found: list[Transfer] = []
    n = 0
    before: Log | None = None
    for log in receipt.logs:
        if _is_transfer(log, asset) and log.topics[2] == to_word:
            value_units = _value(log)
            used = _authorization(before, log, asset)
            if value_units > 0:
                found.append(
                    Transfer(
                        network=caip2,
                        tx_hash=receipt.tx_hash,
                        n=n,
                        asset=asset.address,
                        from_=_address(log.topics[1]),
                        to=pay_to.lower(),
                        value_units=value_units,
                        block_number=receipt.block_number,
                        block_hash=receipt.block_hash,
                        auth_nonce=used[1] if used else None,
                        authorizer=used[0] if used else None,
                    )
                )
            n += 1
        before = log
    return found


@dataclass(frozen=True, slots=True)
class Incoming:
    """A transfer to us as a search of the logs tells it. Fields as in ``Transfer``."""

    tx_hash: str
    n: int
    from_: str
    value_units: int
    block_number: int
    block_hash: str


async def incoming(
    rpc: Rpc, asset: Asset, pay_to: str, first: int, last: int, *, ask: int = 2
) -> list[Incoming]:
    """All transfers of ``asset`` to ``pay_to`` in blocks ``first`` to ``last``, oldest first.

    Up to ``ask`` providers are asked and what any of them knows is told: one whose index lags
    leaves out what is there. A transfer that two of them place in different blocks is told twice.
    """
    to_word = address_word(pay_to.lower())
    topics: list[object] = ["0x" + TRANSFER.hex(), None, "0x" + to_word.hex()]
    found: dict[Incoming, None] = {}
    for answer in await _told(rpc, asset, topics, (first, last), ask):
        counts: dict[tuple[str, str], int] = {}
        for each in answer:
            if not _is_transfer(each.log, asset) or each.log.topics[2] != to_word:
                raise Unavailable("rpc_bad_answer", "eth_getLogs: a log that was not asked for")
            n = counts.get((each.tx_hash, each.block_hash), 0)
            counts[each.tx_hash, each.block_hash] = n + 1
            units = _value(each.log)
            if units:
                from_ = _address(each.log.topics[1])
                place = each.block_number, each.block_hash
                found[Incoming(each.tx_hash, n, from_, units, *place)] = None
    return sorted(found, key=lambda each: (each.block_number, each.tx_hash, each.n))


@dataclass(frozen=True, slots=True)
class Authorized:
    """A transfer out of a wallet by an authorization (EIP-3009) that it signed."""

    tx_hash: str
    nonce: str
    to: str
    value_units: int
    block_number: int


async def authorized(
    rpc: Rpc, asset: Asset, owner: str, first: int, last: int, *, ask: int = 2
) -> list[Authorized]:
    """All transfers out of ``owner`` that its authorizations moved in blocks ``first`` to
    ``last``, oldest first. Asked and told like ``incoming``."""
    word = address_word(owner.lower())
    events = ["0x" + AUTHORIZATION_USED.hex(), "0x" + TRANSFER.hex()]
    found: dict[Authorized, None] = {}
    for answer in await _told(rpc, asset, [events, "0x" + word.hex()], (first, last), ask):
        before: _Told | None = None
        for each in answer:
            if len(each.log.topics) != 3 or each.log.topics[1] != word:
                raise Unavailable("rpc_bad_answer", "eth_getLogs: a log that was not asked for")
            same = before is not None and before.tx_hash == each.tx_hash
            used = _authorization(before.log if before and same else None, each.log, asset)
            if used is not None and _is_transfer(each.log, asset):
                to, units = _address(each.log.topics[2]), _value(each.log)
                found[Authorized(each.tx_hash, used[1], to, units, each.block_number)] = None
            before = each
    return sorted(found, key=lambda each: (each.block_number, each.tx_hash, each.nonce))


@dataclass(frozen=True, slots=True)
class _Told:
    """A log of the token and where it stands."""

    log: Log
    block_number: int
    block_hash: str
    tx_hash: str


async def _told(
    rpc: Rpc, asset: Asset, topics: list[object], span: tuple[int, int], ask: int
) -> list[list[_Told]]:
    """What each of up to ``ask`` providers tells of a span of blocks, in the chain's order."""
    where = {"address": asset.address, "topics": topics}
    told: list[list[_Told]] = []
    spans = deque([span])
    for _ in range(MAX_LOG_REQUESTS):
        if not spans:
            return told
        low, high = spans.popleft()
        if low > high:
            continue
        question = [{**where, "fromBlock": hex(low), "toBlock": hex(high)}]
        try:
            answers = await rpc.call_each("eth_getLogs", question, ask)
        except NodeError:
            if low == high:
                raise
            middle = (low + high) // 2
            spans.extendleft([(middle + 1, high), (low, middle)])
            continue
        told += [_in_order(answer, asset, (low, high)) for answer in answers]
    raise Unavailable("rpc_error", f"blocks from {span[0]} are too many to search at this node")


def _in_order(logs: object, asset: Asset, span: tuple[int, int]) -> list[_Told]:
    if not isinstance(logs, list):
        raise Unavailable("rpc_bad_answer", "eth_getLogs did not answer with a list")
    try:
        told = [
            _Told(
                receipts.log_of(log),
                count(log["blockNumber"]),
                _hash(log, "blockHash"),
                _hash(log, "transactionHash"),
            )
            for log in logs
            if log.get("removed", False) is False
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Unavailable("rpc_bad_answer", f"eth_getLogs: {error}") from None
    for each in told:
        if each.log.address != asset.address or not span[0] <= each.block_number <= span[1]:
            raise Unavailable("rpc_bad_answer", "eth_getLogs: a log that was not asked for")
    return sorted(told, key=lambda each: (each.block_number, each.log.index))


def _hash(log: dict[str, object], name: str) -> str:
    return "0x" + data_bytes(log[name], 32).hex()


def _value(log: Log) -> int:
    """What a Transfer moved. More than there can be of a token is a node's mistake."""
    value = int.from_bytes(log.data, "big")
    if value >= 2**62:
        raise Unavailable("rpc_bad_answer", f"a transfer of {value} units")
    return value


async def authorization_used(
    rpc: Rpc, asset: Asset, authorizer: str, nonce: str, block: str = "latest"
) -> bool:
    """Whether the token has marked this nonce, by a transfer or by a cancellation.

    A node that lags behind does not know a ``block`` given by number, and is not believed.
    """
    data = _AUTHORIZATION_STATE + address_word(authorizer.lower()) + bytes.fromhex(nonce[2:])
    answer = await rpc.eth_call(asset.address, data, block)
    if len(answer) != 32 or answer[:31] != bytes(31) or answer[31] > 1:
        raise Unavailable("rpc_bad_answer", "authorizationState did not answer yes or no")
    return answer[31] == 1


async def find_authorization(  # noqa: PLR0917  (what is asked for, and since when)
    rpc: Rpc,
    asset: Asset,
    authorizer: str,
    nonce: str,
    from_block: int,
    event: bytes = AUTHORIZATION_USED,
) -> str | None:
    """The transaction that used (or, by ``event``, cancelled) this authorization since
    ``from_block``, whoever sent it.

    None: no such transfer; where ``authorization_used`` says yes all the same, it was cancelled
    or used before ``from_block``, or the node that was asked for logs lags. Nodes limit how many
    blocks one question may span, each in its own way, so a refused span is halved.
    """
    topics = [
        "0x" + event.hex(),
        "0x" + address_word(authorizer.lower()).hex(),
        nonce.lower(),
    ]

    async def pick(logs: object) -> str | None:
        return _transaction_of(logs, topics, asset)

    return await _search(rpc, {"address": asset.address, "topics": topics}, from_block, pick)


async def find_transfers(  # noqa: PLR0917  (what is asked for, and since when)
    rpc: Rpc, asset: Asset, payer: str, pay_to: str, from_block: int, carries: bytes, *, ask: int
) -> list[str]:
    """The transactions since ``from_block`` that moved money of ``payer`` to ``pay_to`` and have
    ``carries`` in their calldata, oldest first. For contracts that leave no mark of what they used
    up: that a transaction carries something does not say that this is what moved the money.

    Told by any of ``ask`` providers: one whose index lags leaves out what is there.
    """
    words = [address_word(payer.lower()), address_word(pay_to.lower())]
    topics: list[object] = ["0x" + each.hex() for each in (TRANSFER, *words)]
    found: dict[str, int] = {}
    for answer in await _told(rpc, asset, topics, (from_block, await rpc.block_number()), ask):
        for each in answer:
            if not _is_transfer(each.log, asset) or list(each.log.topics[1:]) != words:
                raise Unavailable("rpc_bad_answer", "eth_getLogs: a log that was not asked for")
            found.setdefault(each.tx_hash, each.block_number)
    if len(found) > MAX_LOOKED_INTO:
        raise Unavailable("rpc_error", f"{len(found)} transfers of {payer} are too many to look at")
    carrying = []
    for tx_hash in sorted(found, key=lambda each: found[each]):
        sent = await rpc.call("eth_getTransactionByHash", [tx_hash])
        if not isinstance(sent, dict):
            raise Unavailable("rpc_bad_answer", f"{tx_hash} has logs and is not there")
        if carries in rpc.data(sent.get("input")):
            carrying.append(tx_hash)
    return carrying


async def _search(
    rpc: Rpc,
    where: dict[str, object],
    from_block: int,
    pick: Callable[[object], Awaitable[str | None]],
) -> str | None:
    """What ``pick`` finds in the logs since a block, asked for in spans that the node takes."""
    spans = deque([(from_block, await rpc.block_number())])
    for _ in range(MAX_LOG_REQUESTS):
        if not spans:
            return None
        first, last = spans.popleft()
        if first > last:
            continue
        try:
            logs = await rpc.call(
                "eth_getLogs", [{**where, "fromBlock": hex(first), "toBlock": hex(last)}]
            )
        except NodeError:
            if first == last:
                raise
            middle = (first + last) // 2
            spans.extendleft([(middle + 1, last), (first, middle)])
            continue
        found = await pick(logs)
        if found is not None:
            return found
    if not spans:
        return None
    raise Unavailable("rpc_error", f"blocks from {from_block} are too many to search at this node")


def _transaction_of(logs: object, topics: list[str], asset: Asset) -> str | None:
    """The transaction of the one log that was asked for; a node that sent another one is wrong."""
    if not isinstance(logs, list):
        raise Unavailable("rpc_bad_answer", "eth_getLogs did not answer with a list")
    for log in logs:
        try:
            if log.get("removed", False) is not False:
                continue
            if (
                log["address"].lower() != asset.address
                or [topic.lower() for topic in log["topics"]] != topics
            ):
                raise ValueError("a log that was not asked for")
            tx_hash = log["transactionHash"].lower()
            if not isinstance(tx_hash, str) or len(tx_hash) != 66:
                raise ValueError("a log without a transaction")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise Unavailable("rpc_bad_answer", f"eth_getLogs: {error}") from None
        return tx_hash
    return None


def _is_transfer(log: Log, asset: Asset) -> bool:
    return (
        log.address == asset.address
        and len(log.topics) == 3
        and log.topics[0] == TRANSFER
        and len(log.data) == 32
    )


def _authorization(before: Log | None, transfer: Log, asset: Asset) -> tuple[str, str] | None:
    """Authorizer and nonce, if the log right before is the token's own mark for this payer."""
    if (
        before is None
        or before.index != transfer.index - 1
        or before.address != asset.address
        or len(before.topics) != 3
        or before.topics[0] != AUTHORIZATION_USED
        or before.topics[1] != transfer.topics[1]
    ):
        return None
    return _address(before.topics[1]), "0x" + before.topics[2].hex()


def _address(topic: bytes) -> str:
    return "0x" + topic[12:].hex()
