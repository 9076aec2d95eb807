"""Keys, hashes and signatures of Ethereum accounts: secp256k1, EIP-191, EIP-712, ERC-1271.

Signatures are strict everywhere: 65 bytes ``r || s || v``, v 27 or 28, s in the lower half of the
curve order (EIP-2). One message has exactly one accepted signature per nonce of the signer, so
nothing that was seen can be turned into something that looks new.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import sha3
from coincurve import PrivateKey, PublicKey
from coincurve._libsecp256k1 import ffi, lib
from coincurve.context import GLOBAL_CONTEXT

from wallet_auth.request import Call

CURVE_ORDER: Final = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
HALF_ORDER: Final = CURVE_ORDER // 2
_HALF_ORDER_BYTES: Final = HALF_ORDER.to_bytes(32, "big")

ERC1271_MAGIC: Final = bytes.fromhex("1626ba7e")
"""Selector of ``isValidSignature(bytes32,bytes)`` and the answer that means yes."""
ERC1271_YES: Final = ERC1271_MAGIC + bytes(28)
ERC6492_SUFFIX: Final = bytes.fromhex("6492" * 16)
MAX_CONTRACT_SIGNATURE: Final = 4096
"""Bytes of a contract wallet's signature; a Safe of 20 owners needs 1,300."""
_PRECOMPILES: Final = 0x10000
"""Addresses below are precompiles on some chain. Number 4 returns its input, which begins with
the ERC-1271 selector: a careless check takes that for a yes."""

_CONTEXT: Final = GLOBAL_CONTEXT.ctx

_ADDRESS: Final = re.compile(r"0x[0-9a-f]{40}")
_KEY: Final = re.compile(r"(?:0x)?([0-9a-fA-F]{64})")


def keccak256(data: bytes) -> bytes:
    """Keccak-256 as Ethereum uses it (not NIST SHA3-256)."""
    digest: bytes = sha3.keccak_256(data).digest()
    return digest


def eip191_hash(message: bytes) -> bytes:
    """The digest ``personal_sign`` signs: version byte 0x45 of EIP-191."""
    return keccak256(b"\x19Ethereum Signed Message:\n%d" % len(message) + message)


def eip712_hash(domain_separator: bytes, struct_hash: bytes) -> bytes:
    """The digest of typed data (EIP-712)."""
    return keccak256(b"\x19\x01" + domain_separator + struct_hash)


def eip712_domain(name: str, version: str, chain_id: int, contract: str) -> bytes:
    """The separator of the usual four-field domain (EIP-712); ``contract`` in lower-case hex."""
    return keccak256(
        _DOMAIN_TYPE
        + keccak256(name.encode())
        + keccak256(version.encode())
        + chain_id.to_bytes(32, "big")
        + address_word(contract)
    )


_DOMAIN_TYPE: Final = keccak256(
    b"EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"
)


def address_word(address: str) -> bytes:
    """A lower-case address as a 32-byte ABI word. Raises ``ValueError``."""
    if not _ADDRESS.fullmatch(address):
        raise ValueError("an address in lower-case hex is needed")
    return bytes(12) + bytes.fromhex(address[2:])


def private_key(key: str | bytes | PrivateKey) -> PrivateKey:
    """A private key from hex (``0x`` or not), 32 bytes, or itself.

    Raises ``ValueError`` without repeating what was given.
    """
    if isinstance(key, PrivateKey):
        return key
    if isinstance(key, str):
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError("a private key of 64 hexadecimal digits is needed")
        key = bytes.fromhex(match[1])
    if len(key) != 32 or not 0 < int.from_bytes(key, "big") < CURVE_ORDER:
        raise ValueError("a private key is 32 bytes and lies on the curve's range")
    return PrivateKey(key)


def address_of(key: PrivateKey | PublicKey) -> str:
    """The account's address, lower case."""
    public = key.public_key if isinstance(key, PrivateKey) else key
    return "0x" + keccak256(public.format(compressed=False)[1:])[12:].hex()


def checksum(address: str) -> str:
    """The mixed-case spelling of EIP-55, for people and for libraries that insist on it."""
    digits = address[2:].lower()
    marks = keccak256(digits.encode()).hex()
    return "0x" + "".join(
        d.upper() if mark >= "8" else d for d, mark in zip(digits, marks, strict=False)
    )


def sign_digest(key: PrivateKey, digest: bytes) -> bytes:
    """``r || s || v`` with v 27 or 28 and low s (libsecp256k1 makes no other)."""
    raw: bytes = key.sign_recoverable(digest, hasher=None)
    return raw[:64] + bytes((raw[64] + 27,))


def recover(digest: bytes, signature: bytes) -> str | None:
    """The address whose key made ``signature`` over ``digest``, or ``None`` if it is not strict.

    Any strict signature recovers to some address: the caller compares. libsecp256k1 is called
    as coincurve calls it, without its objects in between, which cost a sixth of the whole. Nothing
    is shared between calls: other threads run while the library works.

    (A cache of public keys and ``secp256k1_ecdsa_verify`` would be a fifth cheaper and wrong: it
    sees r and s only and takes both values of v, so that one signature would have two forms here.
    To tell which is the true one costs more than is saved.)
    """
    if len(signature) != 65 or len(digest) != 32:
        return None
    v = signature[64]
    if v not in (27, 28) or signature[32:64] > _HALF_ORDER_BYTES:
        return None
    parsed = ffi.new("secp256k1_ecdsa_recoverable_signature *")
    point = ffi.new("secp256k1_pubkey *")
    # No: r or s is zero or past the order, or r is no point of the curve.
    if not (
        lib.secp256k1_ecdsa_recoverable_signature_parse_compact(
            _CONTEXT, parsed, signature[:64], v - 27
        )
        and lib.secp256k1_ecdsa_recover(_CONTEXT, point, parsed, digest)
    ):
        return None
    return _address_of_point(bytes(ffi.buffer(point)))


@lru_cache(maxsize=8192)  # wallets come back; 64 bytes and an address each
def _address_of_point(point: bytes) -> str:
    """The address of a public key in the library's own form, which stays inside this process."""
    return address_of(PublicKey(ffi.new("secp256k1_pubkey *", {"data": point})))


def erc1271_calldata(digest: bytes, signature: bytes) -> bytes:
    """``isValidSignature(digest, signature)`` (ERC-1271)."""
    padding = bytes(-len(signature) % 32)
    return (
        ERC1271_MAGIC
        + digest
        + (64).to_bytes(32, "big")
        + len(signature).to_bytes(32, "big")
        + signature
        + padding
    )


@dataclass(frozen=True, slots=True)
class Wrapper:
    """What ERC-6492 puts around the signature of a wallet that is perhaps not deployed: a factory
    (lower case) and the calldata that makes it deploy the wallet. Both are the signer's words."""

    factory: str
    calldata: bytes


def unwrap(signature: bytes) -> tuple[bytes, Wrapper | None]:
    """The signature itself, and the wrapper it came in: ``abi.encode(address, bytes, bytes)`` and
    the suffix (ERC-6492).

    Raises ``ValueError`` if what stands before the suffix is not that, holds no signature, or one
    that is wrapped once more.
    """
    if not signature.endswith(ERC6492_SUFFIX):
        return signature, None
    body = signature[: -len(ERC6492_SUFFIX)]
    if body[:12] != bytes(12):
        raise ValueError("no address of a factory")
    calldata, inner = _dynamic(body, 1), _dynamic(body, 2)
    if not inner or inner.endswith(ERC6492_SUFFIX):
        raise ValueError("no signature in it, or one that is wrapped again")
    return inner, Wrapper("0x" + body[12:32].hex(), calldata)


def _dynamic(body: bytes, word: int) -> bytes:
    """The ABI's ``bytes`` whose offset stands in this word."""
    start = int.from_bytes(body[32 * word : 32 * word + 32], "big")
    if start < 96:
        raise ValueError("an offset into the head")
    length = int.from_bytes(body[start : start + 32], "big")
    if start + 32 + length > len(body):
        raise ValueError("it ends too early")
    return body[start + 32 : start + 32 + length]


async def contract_signed(
    call: Call, caip2: str, address: str, digest: bytes, signature: bytes
) -> bool:
    """Whether the contract at ``address`` on ``caip2`` takes ``signature`` for its own (ERC-1271).

    The answer must be exactly the one word the standard names; more bytes, or fewer, is a no.
    Signatures over ``MAX_CONTRACT_SIGNATURE`` bytes and addresses of precompiles are not asked.
    A wrapper (ERC-6492) is taken off, and what it would deploy is left alone: a wallet that is not
    there answers nothing, which is a no.
    """
    if len(signature) > MAX_CONTRACT_SIGNATURE or int(address, 16) < _PRECOMPILES:
        return False
    try:
        inner, _ = unwrap(signature)
    except ValueError:
        return False
    return await call(caip2, address, erc1271_calldata(digest, inner)) == ERC1271_YES
