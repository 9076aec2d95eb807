"""What became of requests, for the wallet that made them: one, all of them, those of a run."""

from __future__ import annotations

from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.errors import NextAction, Problem
from gateway.ledger import activity, breakdowns, pages, read
from gateway.node import Node
from gateway.own import (
    amount,
    answer,
    body_of,
    bound_caller,
    node_of,
    number_of,
    one_of,
    only,
    table_of,
    time_of,
)
from gateway.proxy.advice import SIGN
from gateway.proxy.audited import audited
from gateway.proxy.replies import receipt_of_call
from gateway.proxy.runs import NAME

_PAGE: Final = 100
_MOST: Final = 1_000
_LIST: Final = "/farebox/v1/requests"
COLUMNS: Final = (
    "request_id",
    "wallet",
    "scheme",
    "payment_id",
    "run",
    "route",
    "method",
    "target",
    "price_version",
    "state",
    "reason",
    "held",
    "held_units",
    "charged",
    "charged_units",
    "refunded",
    "refunded_units",
    "started_at_ms",
    "ended_at_ms",
    "duration_ms",
)
"""The columns of the CSV form: the members of each call, in this order."""


_FILTERS: Final = frozenset(
    ("run", "route", "state", "wallet", "price_version", "from", "to", "limit", "cursor", "format")
)


async def request_outcome(request: Request) -> Response:
    """``GET v1/requests/{id}``: every call of the signing wallet's account with this id or
    Idempotency-Key, the newest first, each with what its charge is made of (``breakdown``, lines
    that add up to it) and audited: the terms it was priced by, the entries it
    made, the lots that paid and the transactions that had bought those.

    A call that was run again is there with all its runs.
    """
    node = node_of(request)
    _, account_id = await bound_caller(request, await body_of(request))
    asked = request.path_params["request_id"]
    calls: list[dict[str, Any]] = []
    if account_id is not None:
        async with node.db.read() as tx:
            found = {hold.id: hold for hold in await read.holds_of_request(tx, account_id, asked)}
            # Found by an alias: only its first run has one.
            for other in {hold.request_id for hold in found.values()} - {asked}:
                runs = await read.holds_of_request(tx, account_id, other)
                found |= {hold.id: hold for hold in runs}
            for hold in sorted(found.values(), key=lambda hold: (-hold.at_ms, -hold.id)):
                charge = await read.charge_of(tx, hold.id)
                told = receipt_of_call(node, hold, charge)
                told["breakdown"] = await breakdowns.of_call(tx, charge.close)
                calls.append({**told, "audit": await audited(node, tx, hold, charge)})
    if not calls:
        raise _nothing(node, "No call of this account has this request id.")
    return answer(200, {**calls[0], "calls": calls})


async def requests(request: Request) -> Response:
    """``GET v1/requests``: the account's calls, or with ``?run=`` those of a run, newest first.

    ``route``, ``state``, ``wallet``, ``price_version``, ``from`` and ``to`` say which. ``limit``
    and ``cursor`` page; ``format=csv`` gives the same rows as a table, the next page in ``Link``.
    """
    node = node_of(request)
    _, account_id = await bound_caller(request, await body_of(request))
    only(request, _FILTERS)
    run = request.query_params.get("run")
    limit = number_of(request, "limit", _PAGE, most=_MOST)
    cursor = number_of(request, "cursor", 0, most=2**62) or None
    form = one_of(request, "format", ("json", "csv"))
    if run is not None and not NAME.fullmatch(run):
        raise Problem("invalid_request", "run is not the name of a run.")
    wallet = request.query_params.get("wallet")
    wanted = activity.Wanted(
        route=request.query_params.get("route"),
        state=one_of(request, "state", activity.STATES),
        principal=None if wallet is None else wallet.lower(),
        price=request.query_params.get("price_version"),
        from_ms=time_of(request, "from"),
        to_ms=time_of(request, "to"),
    )
    page: pages.Page[activity.Call] = pages.Page((), None)
    if account_id is not None:
        async with node.db.read() as tx:
            if run is None:
                page = await activity.calls(tx, account_id, limit, cursor, wanted)
            else:
                page = await activity.calls_of_run(tx, account_id, run, limit, cursor, wanted)
    rows = [receipt_of_call(node, call.hold, call.charge) for call in page.rows]
    if form == "csv":
        return table_of(request, COLUMNS, rows, page.next_cursor)
    return answer(200, {"requests": rows, "next_cursor": page.next_cursor})


async def run_total(request: Request) -> Response:
    """``GET v1/runs/{run}``: how many calls it has, how they ended, and what they came to."""
    node = node_of(request)
    _, account_id = await bound_caller(request, await body_of(request))
    run = request.path_params["run"]
    found = None
    if account_id is not None:
        async with node.db.read() as tx:
            found = await activity.run_sum(tx, account_id, run)
    if found is None:
        raise _nothing(node, "No call of this account belongs to this run.")
    return answer(
        200,
        {
            "run": run,
            "calls": found.calls,
            "calls_charged": found.charged,
            "calls_not_charged": found.not_charged,
            "calls_pending": found.pending,
            **amount(node, "total", found.charged_units - found.refunded_units),
            **amount(node, "charged", found.charged_units),
            **amount(node, "refunded", found.refunded_units),
            **amount(node, "held", found.held_units),
            "first_at_ms": found.first_at_ms,
            "last_at_ms": found.last_at_ms,
        },
    )


def _nothing(node: Node, words: str) -> Problem:
    url = node.settings.server.public_url + _LIST
    send = "nothing, signed by the wallet that made the call: the calls of its account"
    return Problem("not_found", words, next_actions=[NextAction("GET", url, send, "read", SIGN)])


ROUTES = [
    Route(_LIST, requests, methods=["GET"]),
    # A request id is the client's own, and may hold a slash.
    Route(_LIST + "/{request_id:path}", request_outcome, methods=["GET"]),
    Route("/farebox/v1/runs/{run}", run_total, methods=["GET"]),
]
