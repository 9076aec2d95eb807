"""Many calls in one transaction, each with its own end: Multicall3's ``aggregate3``.

The contract stands at one address on every public chain (mds1/multicall). It calls with itself as
the sender, so only what anybody may hand in can go through it. A call that fails is undone by
itself where ``allow_failure`` is set; the transaction then succeeds all the same, so its status
says nothing about any of them: their logs do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from chain.errors import NodeError, Reverted, Unavailable
from chain.eth import bytes_tail, read_string, selector, uint_word
from chain.rpc import Rpc
from wallet_auth.keys import address_word

ADDRESS: Final = "0xca11bde05977b3631167028862be2a173976ca11"
_ERROR_STRING: Final = selector("Error(string)")
_AGGREGATE3: Final = selector("aggregate3((address,bool,bytes)[])")


def aggregate(calls: Sequence[tuple[str, bytes]], *, allow_failure: bool) -> bytes:
    """Calldata that makes all these calls (receiver, calldata), in their order."""
    heads, tails = b"", b""
    for to, data in calls:
        heads += uint_word(32 * len(calls) + len(tails))
        tails += address_word(to) + uint_word(allow_failure) + uint_word(3 * 32) + bytes_tail(data)
    return _AGGREGATE3 + uint_word(32) + uint_word(len(calls)) + heads + tails


def results(answer: bytes, count: int) -> list[tuple[bool, bytes]]:
    """Success and returned bytes of each of ``count`` calls. ``Unavailable`` if it is not that."""
    try:
        body = _at(answer, 0)
        if int.from_bytes(body[:32], "big") != count:
            raise ValueError("another number of results")
        array = body[32:]
        found = []
        for i in range(count):
            one = _at(array, i)
            data = _at(one, 1)
            length = int.from_bytes(data[:32], "big")
            if int.from_bytes(one[:32], "big") > 1 or len(data) < 32 + length:
                raise ValueError("not a result")
            found.append((one[31] == 1, data[32 : 32 + length]))
    except (IndexError, ValueError) as error:
        raise Unavailable("rpc_bad_answer", f"aggregate3: {error}") from None
    return found


def code_probe(addresses: Sequence[str]) -> bytes:
    """Initialisation code whose "deployed code" is one byte an address: 1 where there is code.

    Run by an ``eth_call`` without a receiver, which deploys nothing: one question for all.
    """
    probe = b"".join(
        # PUSH20 address, EXTCODESIZE, ISZERO, ISZERO, PUSH2 i, MSTORE8
        b"\x73" + bytes.fromhex(address[2:]) + b"\x3b\x15\x15\x61" + i.to_bytes(2, "big") + b"\x53"
        for i, address in enumerate(addresses)
    )
    return probe + b"\x61" + len(addresses).to_bytes(2, "big") + b"\x60\x00\xf3"  # PUSH2 n, RETURN


async def having_code(rpc: Rpc, addresses: Sequence[str]) -> list[bool]:
    """Which of these addresses have code now. Raises ``Unavailable``."""
    if len(addresses) < 3:
        return [bool(await rpc.code(address)) for address in addresses]
    probe = {"data": "0x" + code_probe(addresses).hex()}
    try:
        told = rpc.data(await rpc.call("eth_call", [probe, "latest"]))
    except (NodeError, Reverted):
        told = b""  # a node that does not run calls without a receiver
    if len(told) != len(addresses) or any(byte > 1 for byte in told):
        return [bool(await rpc.code(address)) for address in addresses]
    return [byte == 1 for byte in told]


def refusal(returned: bytes) -> Reverted:
    """What a call that failed returned, as the error it would have been on its own."""
    reason = ""
    if returned[:4] == _ERROR_STRING:
        try:
            reason = read_string(returned[4:])
        except ValueError:
            reason = ""
    return Reverted(reason, returned)


def _at(data: bytes, word: int) -> bytes:
    """What the offset in this word points to."""
    offset = int.from_bytes(data[32 * word : 32 * word + 32], "big")
    if len(data) < 32 * word + 32 or offset + 32 > len(data):
        raise ValueError("an offset that leads nowhere")
    return data[offset:]
