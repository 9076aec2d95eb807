"""What became of a request, for the wallet that made it."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.errors import Problem
from gateway.ledger import read
from gateway.own import answer, body_of, bound_caller, node_of
from gateway.proxy.replies import receipt_of_call


async def request_outcome(request: Request) -> Response:
    """``GET v1/requests/{id}``: every call of the signing wallet's account with this id."""
    node = node_of(request)
    _, account_id = await bound_caller(request, await body_of(request))
    calls = []
    if account_id is not None:
        async with node.db.read() as tx:
            for hold in await read.holds_of_request(
                tx, account_id, request.path_params["request_id"]
            ):
                calls.append(receipt_of_call(node, hold, await read.charge_of(tx, hold.id)))
    if not calls:
        raise Problem("not_found", "No call of this account has this request id.")
    return answer(200, {**calls[0], "calls": calls})


ROUTES = [Route("/farebox/v1/requests/{request_id}", request_outcome, methods=["GET"])]
