"""The x402 scheme ``upto``: the payer permits a maximum, and what the call came to is moved.

By Permit2, through a proxy of its own. The witness also names a facilitator, and the proxy takes a
call from that address alone: so it says how much, nobody else can hand the payment in, and it
cannot go through Multicall3. ``(owner, nonce)`` at Permit2 is used up by the first settlement,
whatever it moves, and is the same one that ``exact`` by Permit2 uses.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from chain.errors import Rejected
from chain.eth import bytes_tail, selector, uint_word
from chain.networks import Asset, Network
from chain.rpc import Rpc
from chain.schemes import permit2
from chain.schemes.eip3009 import EXPIRY_MARGIN_S
from wallet_auth.keys import address_word, eip712_hash, keccak256

PROXY: Final = "0x4020a4f3b7b90cca423b9fabcc0ce57c6c240002"
EXCEEDED: Final = "invalid_upto_evm_payload_settlement_exceeds_amount"

_WITNESS: Final = b"Witness(address to,address facilitator,uint256 validAfter)"
_TRANSFER_TYPE: Final = keccak256(
    b"PermitWitnessTransferFrom(TokenPermissions permitted,address spender,uint256 nonce,"
    b"uint256 deadline,Witness witness)" + permit2.TOKEN_TYPE + _WITNESS
)
_SETTLE: Final = selector(
    "settle(((address,uint256),uint256,uint256),uint256,address,(address,address,uint256),bytes)"
)
_AMOUNT_AT: Final = 4 + 4 * 32
_FACILITATOR_AT: Final = 4 + 7 * 32  # the word of the calldata that names it


@dataclass(frozen=True, slots=True)
class Authorization:
    """A signed permission for ``facilitator`` to move at most ``most_units`` of ``token`` from
    ``from_`` to ``to``, once. Fields as in ``permit2.Authorization``."""

    from_: str
    to: str
    token: str
    spender: str
    facilitator: str
    most_units: int
    valid_after_s: int
    valid_before_s: int
    nonce: str
    signature: bytes


def parse(payload: object) -> Authorization:
    """``{"signature", "permit2Authorization"}``; else ``Rejected("invalid_payload")``."""
    form = permit2.form_of(payload, {"to", "facilitator", "validAfter"})
    return Authorization(
        from_=permit2.address(form.given, "from"),
        to=permit2.address(form.witness, "to"),
        token=permit2.address(form.permitted, "token"),
        spender=permit2.address(form.given, "spender"),
        facilitator=permit2.address(form.witness, "facilitator"),
        most_units=permit2.number(form.permitted, "amount"),
        valid_after_s=permit2.number(form.witness, "validAfter"),
        valid_before_s=permit2.number(form.given, "deadline"),
        nonce=f"0x{permit2.number(form.given, 'nonce'):064x}",
        signature=form.signature,
    )


def check(
    auth: Authorization, *, asset: Asset, pay_to: str, facilitators: Collection[str], now_s: int
) -> None:
    """Compare with what was asked for, in the official order, but for the amount (``check_most``,
    ``check_actual``); no network. ``facilitators``: whom it may name. ``Rejected``."""
    refusals = (
        (auth.spender != PROXY, "invalid_permit2_spender", "another spender than x402's for upto"),
        (auth.to != pay_to, "invalid_permit2_recipient_mismatch", "it pays somebody else"),
        (
            auth.facilitator not in facilitators,
            "upto_facilitator_mismatch",
            "it names another facilitator",
        ),
        (auth.valid_before_s < now_s + EXPIRY_MARGIN_S, "permit2_deadline_expired", "too late"),
        (auth.valid_after_s > now_s, "permit2_not_yet_valid", "too early"),
        (auth.token != asset.address, "permit2_token_mismatch", "another token"),
    )
    for refused, code, why in refusals:
        if refused:
            raise Rejected(code, f"the upto authorization: {why}")


def check_most(auth: Authorization, units: int) -> None:
    """Before the call: what is permitted is the maximum that was asked for, neither less nor more.
    ``Rejected``."""
    if auth.most_units != units:
        raise Rejected("permit2_amount_mismatch", "the upto authorization: another maximum")


def check_actual(auth: Authorization, units: int) -> None:
    """After it: what it came to is within what is permitted. ``Rejected``."""
    if units > auth.most_units:
        raise Rejected(EXCEEDED, f"{units} units are more than the {auth.most_units} permitted")


def digest(network: Network, auth: Authorization) -> bytes:
    """The EIP-712 digest that the payer signed."""
    witness = address_word(auth.to) + address_word(auth.facilitator) + uint_word(auth.valid_after_s)
    words = (
        _TRANSFER_TYPE
        + permit2.permitted_hash(auth.token, auth.most_units)
        + address_word(auth.spender)
        + bytes.fromhex(auth.nonce[2:])
        + uint_word(auth.valid_before_s)
        + keccak256(keccak256(_WITNESS) + witness)
    )
    return eip712_hash(permit2.domain(network), keccak256(words))


def settle_calldata(auth: Authorization, units: int) -> bytes:
    """``settle(permit, amount, owner, witness, signature)`` of the proxy."""
    return (
        _SETTLE
        + address_word(auth.token)
        + uint_word(auth.most_units)
        + bytes.fromhex(auth.nonce[2:])
        + uint_word(auth.valid_before_s)
        + uint_word(units)
        + address_word(auth.from_)
        + address_word(auth.to)
        + address_word(auth.facilitator)
        + uint_word(auth.valid_after_s)
        + uint_word(10 * 32)
        + bytes_tail(auth.signature)
    )


def with_amount(data: bytes, units: int) -> bytes:
    """The same call for another amount."""
    return data[:_AMOUNT_AT] + uint_word(units) + data[_AMOUNT_AT + 32 :]


def sender_of(to: str, data: bytes) -> str | None:
    """The one address that may make a call. None: anybody may."""
    if to != PROXY or not data.startswith(_SETTLE):
        return None
    return "0x" + data[_FACILITATOR_AT + 12 : _FACILITATOR_AT + 32].hex()


async def verify(rpc: Rpc, asset: Asset, auth: Authorization, units: int) -> str:
    """Ask the chain whether its facilitator could move ``units`` now: ``"key"`` or ``"contract"``.

    Of 0 units only the signature is looked at. ``Rejected`` with the reason, ``Unavailable`` if
    the chain cannot be asked.
    """
    move = permit2.Move(
        owner=auth.from_,
        nonce=auth.nonce,
        digest=digest(rpc.network, auth),
        signature=auth.signature,
        units=units,
        proxy=PROXY,
        call=settle_calldata(auth, units),
        sender=auth.facilitator,
    )
    return await permit2.would_move(rpc, asset, move)
