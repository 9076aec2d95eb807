"""Send a transaction exactly once: ask for fees, sign, hand over, wait.

The caller stores the signed bytes between ``sign`` and ``broadcast`` and allots the chain nonce
(its database is the allocator; ``Fees.nonce`` is only what the nodes believe). Handing the same
bytes over again is always safe; signing the same intent again under a new nonce never is while
the first is unknown.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Final

from chain import receipts
from chain.errors import NodeError, Rejected, Reverted, Unavailable, Unknown
from chain.networks import Network
from chain.receipts import Receipt
from chain.rpc import Rpc
from chain.waiting import all_of
from wallet_auth.keys import address_of, keccak256, private_key, sign_digest

MAX_GAS: Final = 500_000  # a payer whose wallet needs more is refused: the gateway pays for it
_TYPE_2: Final = b"\x02"  # EIP-1559
_POOL: Final = 64  # more transactions of one account than that wait in no pool (geth: 64)


@dataclass(frozen=True, slots=True)
class Fees:
    """What a transaction may use and cost (EIP-1559), and the next chain nonce by the nodes."""

    gas_limit: int
    max_fee_wei: int  # per gas
    tip_wei: int  # per gas
    nonce: int

    @property
    def most_wei(self) -> int:
        """The most it can cost, without what a rollup charges for its data on L1."""
        return self.gas_limit * self.max_fee_wei


@dataclass(frozen=True, slots=True)
class Prepared:
    """A signed transaction that was not necessarily sent. ``raw`` is all it takes to send it."""

    network: str  # CAIP-2
    sender: str
    nonce: int
    raw: bytes = field(repr=False)
    tx_hash: str


@dataclass(frozen=True, slots=True)
class Market:
    """What gas costs now (wei per gas), the next chain nonces by the nodes, and the newest block.

    ``nonce`` counts what is in a pool and is the larger of two nodes' (where there are two): one
    that lags would have us reuse a nonce.
    """

    base_wei: int
    tip_wei: int
    nonce: int
    block_number: int
    block_s: int

    def fees(self, gas_limit: int, max_fee_wei: int | None = None) -> Fees:
        """Fees to be included now. ``Unavailable("gas_price_too_high")`` over ``max_fee_wei``."""
        # Twice the base fee holds through six full blocks; what is not needed is not paid.
        fee_wei = 2 * self.base_wei + self.tip_wei
        if max_fee_wei is not None and fee_wei > max_fee_wei:
            if self.base_wei + self.tip_wei > max_fee_wei:
                raise Unavailable(
                    "gas_price_too_high",
                    f"gas costs {self.base_wei + self.tip_wei} wei, over {max_fee_wei}",
                )
            fee_wei = max_fee_wei
        return Fees(gas_limit, fee_wei, self.tip_wei, self.nonce)


async def market(rpc: Rpc, gas_account: str, known: int | None = None) -> Market:
    """Read what it takes to sign for a gas account now.

    ``known``: chain nonces of it that are known to be taken. Of those that a node counts beyond
    them most must be in blocks: a number far ahead that is signed with once waits for ever.
    """
    block, tip, pending = await all_of(
        rpc.call("eth_getBlockByNumber", ["latest", False]),
        rpc.call("eth_maxPriorityFeePerGas", []),
        rpc.call_each("eth_getTransactionCount", [gas_account, "pending"], 2),
    )
    if not isinstance(block, dict) or "baseFeePerGas" not in block:
        raise Unavailable("rpc_bad_answer", "the newest block has no base fee (EIP-1559)")
    nonce = max(rpc.count(each) for each in pending)
    if known is not None and nonce > known + _POOL:
        mined = await mined_count(rpc, gas_account)
        if nonce > mined + _POOL:
            detail = f"{nonce} transactions of {gas_account} are told of, {mined} are in blocks"
            raise Unavailable("rpc_bad_answer", detail)
    return Market(
        rpc.count(block["baseFeePerGas"]),
        min(rpc.count(tip), most_tip_wei(rpc.network)),
        nonce,
        rpc.count(block.get("number")),
        rpc.count(block.get("timestamp")),
    )


def most_tip_wei(network: Network) -> int:
    """The most that is offered as a tip, per gas."""
    return network.most_tip_gwei * 10**9


async def mined_count(rpc: Rpc, gas_account: str) -> int:
    """How many transactions of an account are in blocks: the larger of two nodes' counts."""
    counts = await rpc.call_each("eth_getTransactionCount", [gas_account, "latest"], 2)
    return max(rpc.count(each) for each in counts)


async def gas_limit(
    rpc: Rpc, gas_account: str, to: str, data: bytes, *, max_gas: int = MAX_GAS
) -> int:
    """What a call may use. The estimate is a simulation right before sending: ``Reverted`` if the
    call would fail, ``Rejected`` if it needs more than ``max_gas``."""
    call = {"from": gas_account, "to": to, "data": "0x" + data.hex()}
    gas = rpc.quantity(await rpc.call("eth_estimateGas", [call, "pending"]))
    # A quarter more: storage that is warm in the estimate may be cold in the block.
    if gas + gas // 4 > max_gas:
        raise Rejected(
            "invalid_transaction_state", f"this payment needs {gas} gas, more than is paid for"
        )
    return gas + gas // 4


async def fees(
    rpc: Rpc,
    gas_account: str,
    to: str,
    data: bytes,
    *,
    max_gas: int = MAX_GAS,
    max_fee_wei: int | None = None,
) -> Fees:
    """``gas_limit`` and ``market`` together: all that is needed to sign one call."""
    limit, now = await all_of(
        gas_limit(rpc, gas_account, to, data, max_gas=max_gas), market(rpc, gas_account)
    )
    return now.fees(limit, max_fee_wei)


def raised(
    old: Fees, now: Market, max_fee_wei: int | None = None, max_tip_wei: int | None = None
) -> Fees | None:
    """Fees that replace a transaction with the same nonce and have it included now.

    Pools want a tenth more of both the fee and the tip (geth, reth, nethermind); this is an eighth
    more, or what gas costs now. None: it would cost more than ``max_fee_wei``, ``max_tip_wei`` of
    it as a tip.
    """
    fee_wei = max(2 * now.base_wei + now.tip_wei, _eighth_more(old.max_fee_wei))
    tip_wei = max(now.tip_wei, _eighth_more(old.tip_wei))
    if max_tip_wei is not None and tip_wei > max_tip_wei:
        return None
    if max_fee_wei is not None and fee_wei > max_fee_wei:
        fee_wei = max_fee_wei
        if fee_wei < _eighth_more(old.max_fee_wei) or fee_wei < tip_wei:
            return None
    return Fees(old.gas_limit, max(fee_wei, tip_wei), tip_wei, old.nonce)


def _eighth_more(wei: int) -> int:
    return wei + wei // 8 + 1


def sign(  # noqa: PLR0917  (the order of the transaction's own fields)
    key: str, chain_id: int, nonce: int, to: str, data: bytes, fees: Fees
) -> Prepared:
    """Sign a call. Pure computation of a fraction of a millisecond; ``fees.nonce`` is not used.

    ``key`` is ``0x`` and 64 hex digits. Deterministic (RFC 6979): the same arguments give the same
    bytes and hash.
    """
    secret = private_key(key)
    body: list[bytes | list[bytes]] = [
        _integer(chain_id),
        _integer(nonce),
        _integer(fees.tip_wei),
        _integer(fees.max_fee_wei),
        _integer(fees.gas_limit),
        bytes.fromhex(to[2:]),
        b"",  # value
        data,
        [],  # access list
    ]
    signature = sign_digest(secret, keccak256(_TYPE_2 + _rlp(body)))
    parity, r, s = signature[64] - 27, signature[:32], signature[32:64]
    raw = _TYPE_2 + _rlp([*body, _integer(parity), r.lstrip(b"\0"), s.lstrip(b"\0")])
    tx_hash = "0x" + keccak256(raw).hex()
    return Prepared(f"eip155:{chain_id}", address_of(secret), nonce, raw, tx_hash)


def call_of(raw: bytes) -> tuple[str, bytes]:
    """Receiver and calldata of a transaction made by ``sign``: to sign the same call again."""
    fields = _fields(raw)
    return "0x" + fields[5].hex(), fields[7]


def fees_of(raw: bytes) -> Fees:
    """What a transaction made by ``sign`` may use and cost, and its nonce."""
    fields = _fields(raw)
    nonce, tip_wei, fee_wei, limit = (int.from_bytes(fields[i], "big") for i in (1, 2, 3, 4))
    return Fees(limit, fee_wei, tip_wei, nonce)


def _fields(raw: bytes) -> list[bytes]:
    import rlp

    found: list[bytes] = rlp.decode(raw[1:])
    return found


# What nodes say of a raw transaction, in lower case (geth, reth, erigon, nethermind, anvil).
_HAVE_IT: Final = ("already known", "already imported", "known transaction", "already exists")
_NONCE_USED: Final = ("nonce too low", "nonce is too low", "nonce has already been used")
_TOO_CHEAP: Final = ("underpriced", "less than block base fee", "fee too low", "below base fee")
_NO_GAS_MONEY: Final = ("insufficient funds",)
_NEVER: Final = (
    "intrinsic gas too low",
    "exceeds block gas limit",
    "invalid sender",
    "invalid chain id",
    "invalid signature",
    "rlp:",
    "failed to decode",
    "transaction type not supported",
    "priority fee per gas higher than max fee",
    "oversized data",
)


async def broadcast(rpc: Rpc, raw: bytes) -> None:
    """Hand a signed transaction to the network. Returns if it is in the pool or in a block.

    ``Rejected("nonce_taken")``: another transaction of this account has used the nonce. (Before
    an intent is signed again, see ``authorization_used``: the first may still have been included.)
    ``Rejected("transaction_refused")``: no block can ever hold these bytes. ``Unavailable``: not
    taken now, the same bytes may be sent again. ``Unknown``: sent, no answer; look for the hash.
    """
    tx_hash = "0x" + keccak256(raw).hex()
    try:
        await rpc.send_raw(raw)
    except Reverted as error:
        # A node that tries the call before it takes it; whether it passed it on is not said.
        raise Unknown("rpc_error", error.detail, tx_hash) from None
    except NodeError as error:
        said = error.message.lower()
        if any(words in said for words in _HAVE_IT):
            return
        if any(words in said for words in _NONCE_USED):
            await _expect_mined(rpc, tx_hash, error)
        elif any(words in said for words in _NO_GAS_MONEY):
            raise Unavailable("gas_account_empty", error.detail) from None
        elif any(words in said for words in _TOO_CHEAP):
            raise Unavailable("underpriced", error.detail) from None
        elif any(words in said for words in _NEVER):
            raise Rejected("transaction_refused", error.detail) from None
        else:
            # Words we do not know: some nodes answer so after having passed it on.
            raise Unknown("rpc_error", error.detail, tx_hash) from None


async def wait(rpc: Rpc, tx_hash: str, timeout_s: int) -> Receipt | None:
    """Wait for a transaction to be in a block; None if it is not within ``timeout_s``.

    None says nothing about what will become of it. A node that cannot be asked meanwhile is the
    same as one that does not know yet.
    """
    deadline_ms = _now_ms() + timeout_s * 1_000
    pause_ms = 5  # a local chain is done at once; a real one is asked a few times per block
    longest_ms = min(max(rpc.network.finality.block_ms // 4, 100), 1_000)
    while True:
        left_ms = deadline_ms - _now_ms()
        try:
            async with asyncio.timeout(max(left_ms, 1) / 1_000):
                receipt = await receipts.read(rpc, tx_hash)
        except (Unavailable, TimeoutError):
            receipt = None
        left_ms = deadline_ms - _now_ms()
        if receipt is not None or left_ms <= 0:
            return receipt
        await asyncio.sleep(min(pause_ms, left_ms) / 1_000)
        pause_ms = min(pause_ms * 2, longest_ms)


async def _expect_mined(rpc: Rpc, tx_hash: str, error: NodeError) -> None:
    """The nonce is used: fine if by this very transaction, final if by another one.

    Two nodes are asked, where there are two: one that lags does not know what was just mined.
    """
    try:
        answers = await rpc.call_each("eth_getTransactionByHash", [tx_hash], 2)
    except Unavailable as fault:
        raise Unknown(fault.code, fault.detail, tx_hash) from None
    if all(answer is None for answer in answers):
        raise Rejected("nonce_taken", error.detail) from None


def _integer(value: int) -> bytes:
    return value.to_bytes((value.bit_length() + 7) // 8, "big")


def _rlp(item: bytes | list[bytes | list[bytes]] | list[bytes]) -> bytes:
    """Recursive Length Prefix (Ethereum yellow paper, appendix B), encoding only."""
    if isinstance(item, list):
        body, short = b"".join(_rlp(each) for each in item), 0xC0
    elif len(item) == 1 and item[0] < 0x80:
        return item
    else:
        body, short = item, 0x80
    if len(body) < 56:
        return bytes((short + len(body),)) + body
    length = _integer(len(body))
    return bytes((short + 55 + len(length),)) + length + body


def _now_ms() -> int:
    return time.monotonic_ns() // 1_000_000
