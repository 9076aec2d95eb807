"""The x402 scheme ``exact`` by Permit2 (``assetTransferMethod: permit2``), for any ERC-20 token.

The payer signs for Permit2 that the x402 proxy may move an amount, and, as the witness, to whom.
The proxy takes no other receiver, so anybody may hand it in. What makes a payment unique is
``(owner, nonce)`` at Permit2, whatever the token; its nonces have no order.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, replace
from typing import Any, Final

from chain.errors import Rejected, Reverted, Unavailable
from chain.eth import bytes_tail, is_address, selector, uint_word
from chain.networks import Asset, Network
from chain.rpc import Rpc
from chain.schemes import eip2612
from chain.schemes.eip3009 import ERC1271_GAS, EXPIRY_MARGIN_S, SIMULATION_GAS
from wallet_auth.keys import (
    MAX_CONTRACT_SIGNATURE,
    address_word,
    contract_signed,
    eip712_hash,
    keccak256,
    recover,
    unwrap,
)

PERMIT2: Final = "0x000000000022d473030f116ddee9f6b43ac78ba3"
EXACT_PROXY: Final = "0x402085c248eea27d92e8b30b2c58ed07f9e20001"

_DOMAIN_TYPE: Final = keccak256(
    b"EIP712Domain(string name,uint256 chainId,address verifyingContract)"
)
TOKEN_TYPE: Final = b"TokenPermissions(address token,uint256 amount)"
_WITNESS: Final = b"Witness(address to,uint256 validAfter)"
_TRANSFER_TYPE: Final = keccak256(
    b"PermitWitnessTransferFrom(TokenPermissions permitted,address spender,uint256 nonce,"
    b"uint256 deadline,Witness witness)" + TOKEN_TYPE + _WITNESS
)
_SETTLE: Final = selector(
    "settle(((address,uint256),uint256,uint256),address,(address,uint256),bytes)"
)
_SETTLE_WITH_PERMIT: Final = selector(
    "settleWithPermit((uint256,uint256,bytes32,bytes32,uint8),"
    "((address,uint256),uint256,uint256),address,(address,uint256),bytes)"
)
_NONCE_BITMAP: Final = selector("nonceBitmap(address,uint256)")
_ALLOWANCE: Final = selector("allowance(address,address)")
_BALANCE: Final = selector("balanceOf(address)")

_NUMBER: Final = re.compile(r"[0-9]{1,78}")
_SIGNATURE: Final = re.compile(r"0x(?:[0-9a-fA-F]{2})+")
_BAD_SIGNATURE: Final = "invalid_permit2_signature"
ALLOWANCE_REQUIRED: Final = "permit2_allowance_required"


@dataclass(frozen=True, slots=True)
class Authorization:
    """A signed permission to move ``value_units`` of ``token`` from ``from_`` to ``to`` once.

    Addresses are lower case; ``nonce`` is Permit2's, as ``0x`` and 64 hex digits. Unix seconds.
    ``signature`` is without a wrapper (ERC-6492). ``permit``: lets Permit2 move as much, for a
    payer that has not approved it; no part of what is signed here, and none of what is bought.
    """

    from_: str
    to: str
    token: str
    spender: str
    value_units: int
    valid_after_s: int
    valid_before_s: int  # Permit2's deadline
    nonce: str
    signature: bytes
    permit: eip2612.Permit | None = None


def parse(payload: object, extensions: object = None) -> Authorization:
    """``{"signature", "permit2Authorization"}``; else ``Rejected("invalid_payload")``.

    ``extensions``: of the payment; for what is wrong with a permit there, ``eip2612.find``.
    """
    form = form_of(payload, {"to", "validAfter"})
    return Authorization(
        from_=address(form.given, "from"),
        to=address(form.witness, "to"),
        token=address(form.permitted, "token"),
        spender=address(form.given, "spender"),
        value_units=number(form.permitted, "amount"),
        valid_after_s=number(form.witness, "validAfter"),
        valid_before_s=number(form.given, "deadline"),
        nonce=f"0x{number(form.given, 'nonce'):064x}",
        signature=form.signature,
        permit=eip2612.find(extensions),
    )


@dataclass(frozen=True, slots=True)
class Form:
    """The tables of a payload, with exactly the members they should have, and the signature."""

    given: dict[str, Any]
    permitted: dict[str, Any]
    witness: dict[str, Any]
    signature: bytes


def form_of(payload: object, witness: set[str]) -> Form:
    """What all schemes by Permit2 have in common; ``witness``: the members of theirs.
    ``Rejected("invalid_payload")``."""
    outer = _table(payload, "payload", {"signature", "permit2Authorization"}, exact=False)
    names = {"from", "permitted", "spender", "nonce", "deadline", "witness"}
    given = _table(outer.get("permit2Authorization"), "permit2Authorization", names)
    signature = outer.get("signature")
    if not isinstance(signature, str) or len(signature) > 2 + 2 * MAX_CONTRACT_SIGNATURE:
        raise malformed("signature is missing or too long")
    if _SIGNATURE.fullmatch(signature) is None:
        raise malformed("signature is not hex")
    try:
        bare, _ = unwrap(bytes.fromhex(signature[2:]))
    except ValueError as error:
        raise Rejected(_BAD_SIGNATURE, f"a malformed ERC-6492 signature: {error}") from None
    return Form(
        given,
        _table(given["permitted"], "permitted", {"token", "amount"}),
        _table(given["witness"], "witness", witness),
        bare,
    )


def check(auth: Authorization, *, asset: Asset, pay_to: str, amount_units: int, now_s: int) -> None:
    """Compare with what was asked for, in the official order; no network. ``Rejected``."""
    refusals = (
        (auth.spender != EXACT_PROXY, "invalid_permit2_spender", "another spender than x402's"),
        (auth.to != pay_to, "invalid_permit2_recipient_mismatch", "it pays somebody else"),
        (auth.valid_before_s < now_s + EXPIRY_MARGIN_S, "permit2_deadline_expired", "too late"),
        (auth.valid_after_s > now_s, "permit2_not_yet_valid", "too early"),
        (auth.value_units != amount_units, "permit2_amount_mismatch", "another amount"),
        (auth.token != asset.address, "permit2_token_mismatch", "another token"),
    )
    for refused, code, why in refusals:
        if refused:
            raise Rejected(code, f"the Permit2 authorization: {why}")
    if auth.permit is not None:
        eip2612.check(
            auth.permit,
            owner=auth.from_,
            token=auth.token,
            spender=PERMIT2,
            units=auth.value_units,
            now_s=now_s,
        )


def digest(network: Network, auth: Authorization) -> bytes:
    """The EIP-712 digest that the payer signed."""
    witness = address_word(auth.to) + uint_word(auth.valid_after_s)
    words = (
        _TRANSFER_TYPE
        + permitted_hash(auth.token, auth.value_units)
        + address_word(auth.spender)
        + bytes.fromhex(auth.nonce[2:])
        + uint_word(auth.valid_before_s)
        + keccak256(keccak256(_WITNESS) + witness)
    )
    return eip712_hash(domain(network), keccak256(words))


def domain(network: Network) -> bytes:
    """Permit2's EIP-712 domain, which has no version."""
    return keccak256(
        _DOMAIN_TYPE + keccak256(b"Permit2") + uint_word(network.chain_id) + address_word(PERMIT2)
    )


def permitted_hash(token: str, units: int) -> bytes:
    """What of which token is permitted, as EIP-712 hashes it."""
    return keccak256(keccak256(TOKEN_TYPE) + address_word(token) + uint_word(units))


def settle_calldata(auth: Authorization) -> bytes:
    """``settle(permit, owner, witness, signature)`` of the proxy, or with the permit of a payer
    that has not approved Permit2 ``settleWithPermit(permit2612, …)``."""
    begin = _SETTLE if auth.permit is None else _SETTLE_WITH_PERMIT + auth.permit.words()
    words = (len(begin) - 4) // 32 + 8
    return (
        begin
        + address_word(auth.token)
        + uint_word(auth.value_units)
        + bytes.fromhex(auth.nonce[2:])
        + uint_word(auth.valid_before_s)
        + address_word(auth.from_)
        + address_word(auth.to)
        + uint_word(auth.valid_after_s)
        + uint_word(words * 32)
        + bytes_tail(auth.signature)
    )


@dataclass(frozen=True, slots=True)
class Move:
    """What a chain is asked about: who permitted it (``digest``, ``signature``), and the call of a
    proxy that would move so many units, made by ``sender`` (None: by anybody). ``permit``: the call
    brings the approval along."""

    owner: str
    nonce: str
    digest: bytes
    signature: bytes
    units: int
    proxy: str
    call: bytes
    sender: str | None = None
    permit: eip2612.Permit | None = None


async def settable(rpc: Rpc, asset: Asset, auth: Authorization) -> tuple[str, Authorization]:
    """``verify``, and the form in which it should be settled: without its permit where Permit2 may
    move enough already. That costs less, and hangs on nothing that others can use up."""
    if auth.permit is not None and await _allowance(rpc, asset, auth.from_) >= auth.value_units:
        auth = replace(auth, permit=None)
    return await verify(rpc, asset, auth), auth


async def verify(rpc: Rpc, asset: Asset, auth: Authorization) -> str:
    """Ask the chain whether this would move the money now: ``"key"`` or ``"contract"``.

    ``Rejected`` with the reason, ``Unavailable`` if the chain cannot be asked.
    """
    move = Move(
        owner=auth.from_,
        nonce=auth.nonce,
        digest=digest(rpc.network, auth),
        signature=auth.signature,
        units=auth.value_units,
        proxy=EXACT_PROXY,
        call=settle_calldata(auth),
        permit=auth.permit,
    )
    return await would_move(rpc, asset, move)


async def would_move(rpc: Rpc, asset: Asset, move: Move) -> str:
    """``verify`` for any scheme by Permit2. Of 0 units only the signature is looked at."""
    code, *deployed = await asyncio.gather(
        rpc.code(move.owner),
        rpc.has_code(move.proxy),
        rpc.has_code(PERMIT2),
        rpc.has_code(asset.address),
    )
    if not all(deployed):
        # A call to an address without code succeeds and moves nothing.
        raise Rejected("permit2_proxy_not_deployed", "this network has no x402 proxy for Permit2")
    if not await _is_signed(rpc, move, bool(code)):
        hint = "" if code else "; no wallet is deployed there"
        raise Rejected(_BAD_SIGNATURE, f"the signature is not {move.owner}'s{hint}")
    kind = "contract" if code else "key"
    if move.units == 0:
        return kind
    # First: whoever has paid with all it had should not be told to approve or to bring more.
    if await nonce_used(rpc, move.owner, move.nonce):
        raise Rejected("permit2_invalid_nonce", "this nonce of the payer is used")
    await _has_money(rpc, asset, move)
    try:
        await rpc.eth_call(move.proxy, move.call, gas=SIMULATION_GAS, sender=move.sender)
    except Reverted as error:
        if move.permit is not None:
            raise await _not_permitted(rpc, asset, move.permit, error) from None
        raise Rejected("permit2_simulation_failed", error.detail) from None
    return kind


async def _not_permitted(
    rpc: Rpc, asset: Asset, permit: eip2612.Permit, error: Reverted
) -> Rejected:
    """Why a payment with a permit would not be taken, as far as that can be told."""
    try:
        count = await _word(rpc, asset.address, eip2612.NONCES + address_word(permit.from_))
    except Reverted:
        why = "the token knows no EIP-2612 permits"
    else:
        why = f"with its EIP-2612 permit too the call fails: {error.detail}"
        if count != permit.nonce:
            why = f"its EIP-2612 permit has nonce {permit.nonce}, and the token is at {count}"
    return Rejected(ALLOWANCE_REQUIRED, f"{permit.from_} has not approved Permit2, and {why}")


async def _is_signed(rpc: Rpc, move: Move, has_code: bool) -> bool:
    """As Permit2 decides: an address with code by ERC-1271, any other by its key."""
    if not has_code:
        return recover(move.digest, move.signature) == move.owner

    async def call(_caip2: str, to: str, data: bytes) -> bytes:
        try:
            return await rpc.eth_call(to, data, gas=ERC1271_GAS)
        except Reverted:
            return b""

    return await contract_signed(call, rpc.network.caip2, move.owner, move.digest, move.signature)


async def _has_money(rpc: Rpc, asset: Asset, move: Move) -> None:
    allowance, balance = await asyncio.gather(
        _allowance(rpc, asset, move.owner),
        _word(rpc, asset.address, _BALANCE + address_word(move.owner)),
    )
    if move.permit is None and allowance < move.units:
        raise Rejected(ALLOWANCE_REQUIRED, f"{move.owner} has not approved Permit2 for this token")
    if balance < move.units:
        raise Rejected("permit2_insufficient_balance", "the paying wallet does not hold enough")


async def _allowance(rpc: Rpc, asset: Asset, owner: str) -> int:
    """How much of an owner's Permit2 may move."""
    data = _ALLOWANCE + address_word(owner) + address_word(PERMIT2)
    return await _word(rpc, asset.address, data)


async def nonce_used(rpc: Rpc, owner: str, nonce: str, block: str = "latest") -> bool:
    """Whether Permit2 has marked this nonce, by a transfer or by its owner."""
    place, bit = divmod(int(nonce, 16), 256)
    data = _NONCE_BITMAP + address_word(owner.lower()) + uint_word(place)
    return bool(await _word(rpc, PERMIT2, data, block) >> bit & 1)


async def _word(rpc: Rpc, to: str, data: bytes, block: str = "latest") -> int:
    answer = await rpc.eth_call(to, data, block)
    if len(answer) != 32:
        raise Unavailable("rpc_bad_answer", f"{to} did not answer with one word")
    return int.from_bytes(answer, "big")


def _table(value: object, what: str, names: set[str], *, exact: bool = True) -> dict[str, Any]:
    if not isinstance(value, dict) or (exact and value.keys() != names):
        raise malformed(f"{what} should be an object with {', '.join(sorted(names))}")
    return value


def address(table: dict[str, Any], name: str) -> str:
    """A member that is an address, in lower case."""
    if not is_address(table[name]):
        raise malformed(f"{name} is not an address")
    found: str = table[name].lower()
    return found


def number(table: dict[str, Any], name: str) -> int:
    """A member that is a uint256, as a string of decimal digits."""
    text = table[name]
    if not isinstance(text, str) or _NUMBER.fullmatch(text) is None or int(text) >= 2**256:
        raise malformed(f"{name} is not a string of decimal digits below 2^256")
    return int(text)


def malformed(detail: str) -> Rejected:
    """What every odd form is refused with."""
    return Rejected("invalid_payload", detail)
