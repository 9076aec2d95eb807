"""The scheme ``exact`` in its two ways, EIP-3009 and Permit2, by one shape.

Both are a permission of ``from_`` to move ``value_units`` to ``to`` once, under a ``nonce`` that a
contract burns: the token itself, or Permit2 for all tokens. Only what differs is told apart here.
"""

from __future__ import annotations

from chain.networks import Asset, Network
from chain.rpc import Rpc
from chain.schemes import eip3009, permit2, upto
from wallet_auth.keys import recover

Authorization = eip3009.Authorization | permit2.Authorization
Permission = Authorization | upto.Authorization
"""Of any scheme: what is told of it below holds for ``upto`` as for ``exact`` by Permit2."""


def parse(payload: object, extensions: object = None) -> Authorization:
    """Whichever the payload holds. ``Rejected("invalid_payload")`` for neither and for both.

    ``extensions``: of the payment, where Permit2 may be approved in them (``eip2612.find``)."""
    if isinstance(payload, dict) and "permit2Authorization" in payload:
        if "authorization" in payload:
            raise permit2.malformed("the payload has two authorizations")
        return permit2.parse(payload, extensions)
    return eip3009.parse(payload)


def method_of(auth: Permission) -> str:
    """The row of ``gateway/payments/methods.py`` that knows how its transfer is told, and x402's
    ``assetTransferMethod``."""
    return "eip3009" if isinstance(auth, eip3009.Authorization) else "permit2"


def burned_at(asset: str, auth: Permission) -> str:
    """The contract at which ``(from_, nonce)`` can be used once."""
    return asset if isinstance(auth, eip3009.Authorization) else permit2.PERMIT2


def call_of(asset: Asset, auth: Authorization) -> tuple[str, bytes]:
    """Receiver and calldata of what settles it; anybody may send it."""
    if isinstance(auth, eip3009.Authorization):
        return asset.address, eip3009.transfer_calldata(auth)
    return permit2.EXACT_PROXY, permit2.settle_calldata(auth)


def check(auth: Authorization, *, asset: Asset, pay_to: str, amount_units: int, now_s: int) -> None:
    """Compare with what was asked for; no network. ``Rejected`` with the code of the scheme."""
    if isinstance(auth, eip3009.Authorization):
        eip3009.check(auth, pay_to=pay_to, amount_units=amount_units, now_s=now_s)
    else:
        permit2.check(auth, asset=asset, pay_to=pay_to, amount_units=amount_units, now_s=now_s)


def refused_from_s(auth: Permission) -> int:
    """The first block time at which its contract refuses it for good: EIP-3009 wants a time before
    ``validBefore``, Permit2 takes its deadline still."""
    after = 0 if isinstance(auth, eip3009.Authorization) else 1
    return auth.valid_before_s + after


def signed_by_key(network: Network, asset: Asset, auth: Authorization) -> bool:
    """Whether the key of ``from_`` signed this: enough for an address that has no code."""
    if isinstance(auth, eip3009.Authorization):
        return eip3009.signed_by_key(network, asset, auth)
    return recover(permit2.digest(network, auth), auth.signature) == auth.from_


async def verify(rpc: Rpc, asset: Asset, auth: Authorization, now_s: int) -> str:
    """Ask the chain whether this would move the money now: ``"key"`` or ``"contract"``.

    ``Rejected`` with the reason, ``Unavailable`` if the chain cannot be asked.
    """
    if isinstance(auth, eip3009.Authorization):
        return await eip3009.verify(rpc, asset, auth, now_s)
    return await permit2.verify(rpc, asset, auth)
