"""``/farebox/x402``: a facilitator for other people's servers, when the operator switches it on."""

from __future__ import annotations

import secrets
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from chain.errors import ChainError, Rejected, Unavailable
from chain.schemes import eip2612, upto
from gateway.errors import Problem
from gateway.facilitator import judge, settle, wire
from gateway.facilitator.wire import Asked
from gateway.node import Node
from gateway.own import answer, body_of, node_of
from gateway.payments import gas, recover
from gateway.settings import Chain
from wallet_auth.keys import checksum

_PENDING: Final = "settlement_pending"


def _node(request: Request, *, key_needed: bool = True) -> Node:
    """The node, if others are served and the caller has the key. Raises ``Problem``."""
    node = node_of(request)
    key = node.settings.facilitator.api_key
    if key is None:
        raise Problem("not_found", "This gateway settles for nobody else.")
    given = request.headers.getlist("authorization")
    if not given and not key_needed:
        return node
    wanted = f"Bearer {key.get_secret_value()}".encode()
    if len(given) != 1 or not secrets.compare_digest(given[0].encode(), wanted):
        raise Problem(
            "api_key_required",
            "Send the key of this facilitator: Authorization: Bearer …",
            headers={"WWW-Authenticate": 'Bearer realm="farebox"'},
        )
    return node


async def supported(request: Request) -> Response:
    """``GET x402/supported``: what is settled here, and from which addresses."""
    node = _node(request, key_needed=False)
    chains = [chain for chain in node.settings.chains if chain.settler_key is not None]
    kinds = [kind for chain in chains for kind in await _kinds(node, chain)]
    signers = dict.fromkeys(a.address for chain in chains for a in gas.accounts(chain))
    return answer(
        200,
        {
            "kinds": kinds,
            "extensions": [eip2612.KEY],
            "signers": {"eip155:*": list(signers)},
        },
    )


async def _kinds(node: Node, chain: Chain) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"x402Version": 2, "scheme": "exact", "network": chain.caip2}]
    if chain.network.v1_name is not None:
        found.append({"x402Version": 1, "scheme": "exact", "network": chain.network.v1_name})
    try:
        upto_too = await node.rails.rpcs[chain.caip2].has_code(upto.PROXY)
    except Unavailable:
        upto_too = True  # as exact is told too: what cannot be settled now is refused when it comes
    if upto_too:
        # The payer signs for this one, so it stays the same while the configuration does.
        extra = {"facilitatorAddress": checksum(gas.accounts(chain)[0].address)}
        kind = {"x402Version": 2, "scheme": wire.UPTO, "network": chain.caip2, "extra": extra}
        found.append(kind)
    return found


async def verify(request: Request) -> Response:
    """``POST x402/verify``: 200 with a verdict, whatever it is."""
    node = _node(request)
    asked = wire.read(await body_of(request))
    try:
        order = judge.order_of(node.rails, asked, node.now_s(), settling=False)
        if await settle.already_presented(node.rails, order.key):
            raise Rejected(recover.USED, "this authorization was presented for settlement before")
        await settle.within_budget(node.rails, order)
        await judge.look(node.rails, order, node.now_s())
    except ChainError as error:
        return answer(200, wire.verdict(asked, _reason(error, "unexpected_verify_error")))
    return answer(200, wire.verdict(asked, None))


async def settle_it(request: Request) -> Response:
    """``POST x402/settle``: 200 with what became of it. A repeat is told the same."""
    node = _node(request)
    asked = wire.read(await body_of(request))
    return answer(200, await _settled(node, asked))


async def _settled(node: Node, asked: Asked) -> dict[str, Any]:
    try:
        order = judge.order_of(node.rails, asked, node.now_s(), settling=True)
        # Only upto names an amount of its own: exact moves what was signed.
        units = order.units if isinstance(order.auth, upto.Authorization) else None
        if order.units == 0:
            await settle.settle_nothing(node.rails, order)
            return wire.settled(asked, units=0)
        payment = await settle.settle(node.rails, order)
    except ChainError as error:
        return wire.settled(asked, failure=_reason(error, "unexpected_settle_error"))
    if payment.state == "succeeded":
        return wire.settled(asked, tx_hash=payment.tx_hash or "", units=units)
    if payment.state == "failed":
        code = payment.error_code or "invalid_transaction_state"
        return wire.settled(asked, failure=(code, payment.error_detail or "it failed"))
    words = "the transaction was sent and is in no block yet; ask again, do not pay again"
    return wire.settled(asked, tx_hash=payment.tx_hash or "", failure=(_PENDING, words))


def _reason(error: ChainError, unexpected: str) -> tuple[str, str]:
    """A refusal in the specification's words. What could not be looked at is no refusal: its own
    code stands in the message."""
    if isinstance(error, Rejected):
        return error.code, error.detail
    return unexpected, f"{error.code}: nothing was sent, ask again later"


ROUTES = [
    Route("/farebox/x402/supported", supported, methods=["GET"]),
    Route("/farebox/x402/verify", verify, methods=["POST"]),
    Route("/farebox/x402/settle", settle_it, methods=["POST"]),
]
