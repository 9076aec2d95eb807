"""Small pure pieces of Ethereum: ABI words, strict hex.

Written by hand because the general libraries take a third of a second to import and this is all
that is used of them; the tests compare each with eth_abi and eth_utils. Hashes, keys,
signatures and checksums are in ``wallet_auth/keys.py``.
"""

from __future__ import annotations

import re
from typing import Final

from wallet_auth.keys import keccak256

_QUANTITY: Final = re.compile(r"0x(?:0|[1-9a-f][0-9a-f]{0,63})")
_DATA: Final = re.compile(r"0x(?:[0-9a-fA-F]{2})*")
_ADDRESS: Final = re.compile(r"0x[0-9a-fA-F]{40}")


def selector(signature: str) -> bytes:
    """The four bytes a call begins with, of e.g. ``"transfer(address,uint256)"``."""
    return keccak256(signature.encode())[:4]


def uint_word(value: int) -> bytes:
    """An unsigned integer as one ABI word; ``OverflowError`` outside uint256."""
    return value.to_bytes(32, "big")


def bytes_tail(data: bytes) -> bytes:
    """Dynamic bytes as the ABI puts them in the tail: length, then padded content."""
    return uint_word(len(data)) + data + bytes(-len(data) % 32)


def read_string(data: bytes) -> str:
    """A single ABI-encoded string as a call returns it. ``ValueError`` if it is anything else."""
    if len(data) < 64 or int.from_bytes(data[:32], "big") != 32:
        raise ValueError("not an ABI-encoded string")
    length = int.from_bytes(data[32:64], "big")
    if length > len(data) - 64:
        raise ValueError("not an ABI-encoded string")
    return data[64 : 64 + length].decode()


def is_address(value: object) -> bool:
    """Whether this is ``0x`` and 40 hex digits, in any case of letters."""
    return isinstance(value, str) and _ADDRESS.fullmatch(value) is not None


def quantity(value: object) -> int:
    """A JSON-RPC quantity ("0x0", "0x41", no leading zeros, at most 256 bits)."""
    if not isinstance(value, str) or _QUANTITY.fullmatch(value) is None:
        raise ValueError(f"not a quantity: {str(value)[:80]!r}")
    return int(value, 16)


def count(value: object) -> int:
    """A quantity of blocks, seconds, transactions, or wei for a unit of gas: below 2**63, as
    columns hold it. A node that says more is wrong."""
    number = quantity(value)
    if number >= 2**63:
        raise ValueError(f"{str(value)[:80]} is past all bounds")
    return number


def data_bytes(value: object, length: int | None = None) -> bytes:
    """JSON-RPC unformatted data, of exactly ``length`` bytes if that is given."""
    if not isinstance(value, str) or _DATA.fullmatch(value) is None:
        raise ValueError(f"not hex data: {str(value)[:80]!r}")
    data = bytes.fromhex(value[2:])
    if length is not None and len(data) != length:
        raise ValueError(f"expected {length} bytes, got {len(data)}")
    return data
