"""Signatures of contract wallets that are perhaps not deployed yet (ERC-6492).

The wrapper names a factory and the calldata that would deploy the wallet. Both are the payer's
words, so they are only ever run in ``eth_call``, for factories the operator listed, and never in
a transaction: no gas account sends what a payer wrote. A wallet that is deployed is asked by
ERC-1271 as any other, with the signature inside the wrapper.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Final

from chain import multicall
from chain.errors import Rejected, Reverted, Unavailable
from chain.networks import Asset
from chain.rpc import Rpc
from chain.schemes import eip3009
from chain.schemes.eip3009 import Authorization
from wallet_auth.keys import ERC6492_SUFFIX

UNDEPLOYED: Final = "undeployed"
DEPLOY_GAS: Final = 3_000_000  # of the simulation; a Safe with its proxy needs 350,000
_BAD_SIGNATURE: Final = "invalid_exact_evm_payload_signature"


@dataclass(frozen=True, slots=True)
class Wrapped:
    """What stands in the wrapper: whom to call, with what, and the signature of the wallet."""

    factory: str  # lower case
    calldata: bytes
    signature: bytes


def unwrap(signature: bytes) -> Wrapped | None:
    """The wrapper's content: ``abi.encode(address, bytes, bytes)`` and the suffix.

    None without the suffix. ``Rejected`` if what stands before it is not that, or is wrapped once
    more.
    """
    if not signature.endswith(ERC6492_SUFFIX):
        return None
    body = signature[:-32]
    try:
        if len(body) < 96 or body[:12] != bytes(12):
            raise ValueError("no address")
        wrapped = Wrapped("0x" + body[12:32].hex(), _tail(body, 1), _tail(body, 2))
        if wrapped.signature.endswith(ERC6492_SUFFIX):
            raise ValueError("wrapped twice")
    except ValueError as error:
        raise Rejected(_BAD_SIGNATURE, f"a malformed ERC-6492 signature: {error}") from None
    return wrapped


def _tail(body: bytes, word: int) -> bytes:
    start = int.from_bytes(body[32 * word : 32 * word + 32], "big")
    if start < 96 or start + 32 > len(body):
        raise ValueError("an offset that leads nowhere")
    length = int.from_bytes(body[start : start + 32], "big")
    if start + 32 + length > len(body):
        raise ValueError("it ends too early")
    return body[start + 32 : start + 32 + length]


async def verify(
    rpc: Rpc, asset: Asset, auth: Authorization, now_s: int, factories: Set[str] = frozenset()
) -> tuple[str, Authorization]:
    """``eip3009.verify`` of a signature that may be wrapped.

    Returns ``"key"``, ``"contract"`` or ``"undeployed"``, and the authorization with the signature
    the token is to see. ``"undeployed"``: it would move the money once its wallet is deployed by
    one of ``factories`` (lower case), which somebody else has to do. ``Rejected``, ``Unavailable``.
    """
    wrapped = unwrap(auth.signature)
    if wrapped is None:
        return await eip3009.verify(rpc, asset, auth, now_s), auth
    inner = replace(auth, signature=wrapped.signature)
    if await rpc.code(auth.from_):
        return await eip3009.verify(rpc, asset, inner, now_s), inner
    if wrapped.factory not in factories:
        raise Rejected(
            _BAD_SIGNATURE,
            "wallets that are not deployed yet (ERC-6492) are not accepted, unless their factory "
            "is listed here",
        )
    await _simulate(rpc, asset, inner, wrapped)
    return UNDEPLOYED, inner


async def _simulate(rpc: Rpc, asset: Asset, inner: Authorization, wrapped: Wrapped) -> None:
    """Deploy and transfer in one call that is not sent. The token itself asks the wallet."""
    if not (await rpc.has_code(multicall.ADDRESS) and await rpc.has_code(asset.address)):
        raise Unavailable("rpc_error", f"{rpc.network.name} has no Multicall3, or no such token")
    calls = [
        (wrapped.factory, wrapped.calldata),
        (asset.address, eip3009.transfer_calldata(inner)),
    ]
    data = multicall.aggregate(calls, allow_failure=True)
    try:
        answer = await rpc.eth_call(multicall.ADDRESS, data, gas=DEPLOY_GAS)
    except Reverted as error:
        raise Rejected(_BAD_SIGNATURE, f"deploying the wallet fails: {error.detail}") from None
    (deployed, _), (moved, returned) = multicall.results(answer, 2)
    if not deployed:
        raise Rejected(_BAD_SIGNATURE, "the factory refuses to deploy the wallet")
    if not moved:
        raise multicall.refusal(returned)
