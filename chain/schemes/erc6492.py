"""Signatures of contract wallets that are perhaps not deployed yet (ERC-6492), for ``/verify``.

The wrapper names a factory and the calldata that would deploy the wallet. Both are the payer's
words, so they are only ever run in ``eth_call``, for factories the operator listed, and never in
a transaction: no gas account sends what a payer wrote. A wallet that is deployed is asked by
ERC-1271 as any other, with the signature inside the wrapper.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Final

from chain import multicall
from chain.errors import Rejected, Reverted, Unavailable
from chain.networks import Asset
from chain.rpc import Rpc
from chain.schemes import eip3009
from chain.schemes.eip3009 import Authorization
from wallet_auth.keys import Wrapper

UNDEPLOYED: Final = "undeployed"
DEPLOY_GAS: Final = 3_000_000  # of the simulation; a Safe with its proxy needs 350,000
_BAD_SIGNATURE: Final = "invalid_exact_evm_payload_signature"


async def verify(
    rpc: Rpc, asset: Asset, auth: Authorization, now_s: int, factories: Set[str] = frozenset()
) -> str:
    """``eip3009.verify``, which says ``"undeployed"`` too: of an authorization that would move the
    money once its wallet is deployed by one of ``factories`` (lower case), which somebody else has
    to do. ``Rejected``, ``Unavailable``."""
    wrapper = auth.wrapper
    by_key = eip3009.signed_by_key(rpc.network, asset, auth)
    if wrapper is None or by_key or await rpc.code(auth.from_):
        return await eip3009.verify(rpc, asset, auth, now_s)
    if wrapper.factory not in factories:
        raise Rejected(
            _BAD_SIGNATURE,
            "wallets that are not deployed yet (ERC-6492) are not accepted, unless their factory "
            "is listed here",
        )
    await _simulate(rpc, asset, auth, wrapper)
    return UNDEPLOYED


async def _simulate(rpc: Rpc, asset: Asset, auth: Authorization, wrapper: Wrapper) -> None:
    """Deploy and transfer in one call that is not sent. The token itself asks the wallet."""
    if not (await rpc.has_code(multicall.ADDRESS) and await rpc.has_code(asset.address)):
        raise Unavailable("rpc_error", f"{rpc.network.name} has no Multicall3, or no such token")
    calls = [
        (wrapper.factory, wrapper.calldata),
        (asset.address, eip3009.transfer_calldata(auth)),
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
