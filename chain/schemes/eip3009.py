"""The x402 scheme ``exact`` with EIP-3009 ``transferWithAuthorization``, as USDC has it.

Parse, check, verify: each step refuses with the reason code of the x402 specification. What was
parsed is a canonical value; two byte forms of one payment become equal here, and everything that
must be unique is keyed on ``(network, asset, from, nonce)``, never on signature bytes.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from typing import Final

from chain.errors import Rejected, Reverted, Unavailable
from chain.eth import bytes_tail, is_address, selector, uint_word
from chain.networks import Asset, Network
from chain.rpc import Rpc
from wallet_auth.keys import (
    CURVE_ORDER,
    HALF_ORDER,
    MAX_CONTRACT_SIGNATURE,
    Wrapper,
    address_word,
    contract_signed,
    eip712_domain,
    eip712_hash,
    keccak256,
    recover,
    unwrap,
)

EXPIRY_MARGIN_S: Final = 6  # x402: validBefore must be this far away, for the block to come
SIMULATION_GAS: Final = 500_000  # USDC needs 103,000 at most from a key
ERC1271_GAS: Final = 300_000

TRANSFER_TYPE: Final = keccak256(
    b"TransferWithAuthorization(address from,address to,uint256 value,uint256 validAfter,"
    b"uint256 validBefore,bytes32 nonce)"
)
_ARGUMENTS: Final = "address,address,uint256,uint256,uint256,bytes32"
_TRANSFER_VRS: Final = selector(f"transferWithAuthorization({_ARGUMENTS},uint8,bytes32,bytes32)")
_TRANSFER_BYTES: Final = selector(f"transferWithAuthorization({_ARGUMENTS},bytes)")

_MEMBERS: Final = frozenset({"from", "to", "value", "validAfter", "validBefore", "nonce"})
_NUMBER: Final = re.compile(r"[0-9]{1,78}")
_NONCE: Final = re.compile(r"0x[0-9a-fA-F]{64}")
_SIGNATURE: Final = re.compile(r"0x(?:[0-9a-fA-F]{2})+")

_BAD_SIGNATURE: Final = "invalid_exact_evm_payload_signature"
_UNDEPLOYED: Final = "invalid_exact_evm_payload_undeployed_smart_wallet"
_TOO_EARLY: Final = "invalid_exact_evm_payload_authorization_valid_after"
_TOO_LATE: Final = "invalid_exact_evm_payload_authorization_valid_before"


@dataclass(frozen=True, slots=True)
class Authorization:
    """One signed permission to move ``value_units`` from ``from_`` to ``to`` once.

    Addresses and nonce are lower case. The times are Unix seconds; the token wants a block time
    strictly between them. ``signature`` is 65 bytes with v 27 or 28 for a key, else whatever the
    contract wallet takes. ``wrapper`` is what it came in (ERC-6492), no part of the payment: with
    or without, it is the same one.
    """

    from_: str
    to: str
    value_units: int
    valid_after_s: int
    valid_before_s: int
    nonce: str
    signature: bytes
    wrapper: Wrapper | None = field(default=None, compare=False)


def parse(payload: object) -> Authorization:
    """Read the scheme's part of a payment payload: ``{"signature", "authorization"}``.

    Strict: anything the official clients do not write is ``Rejected("invalid_payload")``. Members
    beside these two are left alone; the authorization must have exactly its six.
    """
    if not isinstance(payload, dict):
        raise _malformed("the payload is not an object")
    authorization = payload.get("authorization")
    if not isinstance(authorization, dict) or authorization.keys() != _MEMBERS:
        raise _malformed("authorization must have from, to, value, validAfter, validBefore, nonce")
    for name in ("from", "to"):
        if not is_address(authorization[name]):
            raise _malformed(f"authorization.{name} is not an address")
    nonce, signature = authorization["nonce"], payload.get("signature")
    if not isinstance(nonce, str) or _NONCE.fullmatch(nonce) is None:
        raise _malformed("authorization.nonce is not 32 bytes of hex")
    if not isinstance(signature, str) or len(signature) > 2 + 2 * MAX_CONTRACT_SIGNATURE:
        raise _malformed("signature is missing or too long")
    if _SIGNATURE.fullmatch(signature) is None:
        raise _malformed("signature is not hex")
    try:
        bare, wrapper = unwrap(bytes.fromhex(signature[2:]))
    except ValueError as error:
        raise Rejected(_BAD_SIGNATURE, f"a malformed ERC-6492 signature: {error}") from None
    return Authorization(
        from_=authorization["from"].lower(),
        to=authorization["to"].lower(),
        value_units=_number(authorization, "value"),
        valid_after_s=_number(authorization, "validAfter"),
        valid_before_s=_number(authorization, "validBefore"),
        nonce=nonce.lower(),
        signature=_canonical(bare),
        wrapper=wrapper,
    )


def check(auth: Authorization, *, pay_to: str, amount_units: int | None, now_s: int) -> None:
    """Compare with what was asked for, in the order of the official facilitator; no network.

    ``amount_units`` None takes any amount above zero. ``Rejected`` carries the x402 code.
    """
    if auth.to != pay_to.lower():
        raise Rejected(
            "invalid_exact_evm_payload_recipient_mismatch",
            f"the authorization pays {auth.to}, not {pay_to.lower()}",
        )
    if auth.value_units != amount_units and (amount_units is not None or auth.value_units == 0):
        wanted = "more than 0" if amount_units is None else str(amount_units)
        raise Rejected(
            "invalid_exact_evm_payload_authorization_value_mismatch",
            f"the authorization is for {auth.value_units} units, wanted {wanted}",
        )
    if auth.valid_before_s < now_s + EXPIRY_MARGIN_S:
        raise Rejected(
            _TOO_LATE, f"validBefore {auth.valid_before_s} is too near or past; now is {now_s}"
        )
    if auth.valid_after_s > now_s:
        raise Rejected(_TOO_EARLY, f"validAfter {auth.valid_after_s} is ahead; now is {now_s}")


def digest(network: Network, asset: Asset, auth: Authorization) -> bytes:
    """The EIP-712 digest that the payer signed."""
    domain = eip712_domain(asset.eip712_name, asset.eip712_version, network.chain_id, asset.address)
    return eip712_hash(domain, keccak256(TRANSFER_TYPE + _struct_words(auth)))


def signed_by_key(network: Network, asset: Asset, auth: Authorization) -> bool:
    """Whether the key of ``from_`` signed this: enough for an address that has no code."""
    return recover(digest(network, asset, auth), auth.signature) == auth.from_


async def verify(rpc: Rpc, asset: Asset, auth: Authorization, now_s: int) -> str:
    """Ask the chain whether this authorization would move the money now.

    Returns how it is signed: ``"key"``, or ``"contract"`` when the payer has code (a contract
    wallet, or an EIP-7702 delegation), in which case only ERC-1271 counts, as in USDC itself.
    A wallet that is not deployed yet is refused: what would deploy it is the payer's calldata, and
    that is never run. ``Rejected`` with the reason, ``Unavailable`` if the chain cannot be asked.
    """
    signed = digest(rpc.network, asset, auth)
    looks_like_key = recover(signed, auth.signature) == auth.from_
    if looks_like_key:  # the usual case: everything is asked at once
        code, deployed, refusal = await asyncio.gather(
            rpc.code(auth.from_), rpc.has_code(asset.address), _simulate(rpc, asset, auth, now_s)
        )
    else:
        code, deployed = await asyncio.gather(rpc.code(auth.from_), rpc.has_code(asset.address))
        refusal = None
    if not code and not looks_like_key:
        raise _bad_signature(auth)
    if not deployed:
        # A call to an address without code succeeds and moves nothing.
        raise Unavailable("rpc_error", f"there is no token at {asset.address}")
    if code:
        await _require_contract_signature(rpc, signed, auth)
        if not looks_like_key:
            refusal = await _simulate(rpc, asset, auth, now_s)
    if refusal is not None:
        raise refusal
    return "contract" if code else "key"


def transfer_calldata(auth: Authorization) -> bytes:
    """The call that settles: the ``(v, r, s)`` overload for 65 bytes, else the ``bytes`` one.

    The first exists in every EIP-3009 token; USDC packs its arguments and treats both alike.
    """
    sig = auth.signature
    if len(sig) == 65:
        return _TRANSFER_VRS + _struct_words(auth) + uint_word(sig[64]) + sig[:64]
    return _TRANSFER_BYTES + _struct_words(auth) + uint_word(7 * 32) + bytes_tail(sig)


async def account_kind(rpc: Rpc, address: str, block: str = "latest") -> str:
    """Whose account money from ``address`` belongs to: ``"key"`` or ``"contract"``.

    ``"key"`` if there is no code, or an EIP-7702 designator (``0xef0100`` and an address): then
    the key still owns the address on every chain. A contract wallet stands for one chain only.
    """
    code = await rpc.code(address, block)
    delegated = len(code) == 23 and code[:3] == b"\xef\x01\x00"
    return "key" if not code or delegated else "contract"


def _struct_words(auth: Authorization) -> bytes:
    return (
        address_word(auth.from_)
        + address_word(auth.to)
        + uint_word(auth.value_units)
        + uint_word(auth.valid_after_s)
        + uint_word(auth.valid_before_s)
        + bytes.fromhex(auth.nonce[2:])
    )


async def _simulate(rpc: Rpc, asset: Asset, auth: Authorization, now_s: int) -> Reverted | None:
    """Run the transfer without sending it; the refusal, if the token refuses."""
    data = transfer_calldata(auth)
    try:
        await rpc.eth_call(asset.address, data, gas=SIMULATION_GAS)
    except Reverted as refusal:
        # A call at "latest" runs at the time of the newest block, which on an idle chain is long
        # ago: only there can an authorization that is due by our clock be too early.
        if refusal.code != _TOO_EARLY or auth.valid_after_s >= now_s:
            return refusal
    else:
        return None
    try:
        await rpc.eth_call(asset.address, data, "pending", gas=SIMULATION_GAS)
    except Reverted as refusal:
        return refusal
    return None


async def _require_contract_signature(rpc: Rpc, signed: bytes, auth: Authorization) -> None:
    async def call(_caip2: str, to: str, data: bytes) -> bytes:
        try:
            return await rpc.eth_call(to, data, gas=ERC1271_GAS)
        except Reverted:
            return b""  # many wallets revert instead of answering no

    if not await contract_signed(call, rpc.network.caip2, auth.from_, signed, auth.signature):
        raise Rejected(
            _BAD_SIGNATURE, f"the contract at {auth.from_} does not accept the signature"
        )


def _bad_signature(auth: Authorization) -> Rejected:
    if auth.wrapper is not None:
        return Rejected(
            _UNDEPLOYED,
            f"there is no wallet at {auth.from_} yet (ERC-6492), and it is not deployed from here; "
            "nothing was claimed, and the same payment is good once the wallet is there",
        )
    if len(auth.signature) != 65:
        detail = "a signature of a key is 65 bytes"
    else:
        detail = f"the signature is not {auth.from_}'s, or not in canonical form"
    return Rejected(_BAD_SIGNATURE, detail)


def _canonical(signature: bytes) -> bytes:
    """Write v as 27 or 28 where a client wrote the parity 0 or 1; the token knows no other.

    Only where the rest is a well-formed signature of a key: contract wallets have forms of 65
    bytes in which the last one means something else (a Safe's approved hash has s = 0, v = 1).
    """
    if len(signature) != 65 or signature[64] > 1:
        return signature
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:64], "big")
    if not (0 < r < CURVE_ORDER and 0 < s <= HALF_ORDER):
        return signature
    return signature[:64] + bytes((signature[64] + 27,))


def _number(authorization: dict[str, object], name: str) -> int:
    text = authorization[name]
    if not isinstance(text, str) or _NUMBER.fullmatch(text) is None:
        raise _malformed(f"authorization.{name} is not a string of decimal digits")
    value = int(text)
    if value >= 2**256:
        raise _malformed(f"authorization.{name} is larger than uint256")
    return value


def _malformed(detail: str) -> Rejected:
    return Rejected("invalid_payload", detail)
