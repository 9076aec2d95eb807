"""Balance, statement and lots of the wallet that signs the request."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway import ledger
from gateway.external import proof
from gateway.fields import values
from gateway.ledger import pages, read, statement
from gateway.money import format_usd
from gateway.node import Node
from gateway.own import (
    amount,
    answer,
    body_of,
    bound_caller,
    caller_of,
    node_of,
    number_of,
    one_of,
    only,
    table_of,
    time_of,
)
from gateway.proxy.headers import is_our_key
from gateway.proxy.identity import Caller
from gateway.proxy.target import from_scope
from wallet_auth.personal import Call
from wallet_auth.strict import json_object

_RECENT = 5
_PAGE = 100
_DAY_MS = 86_400_000
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_BALANCE: Final = Call("balance", "-")


async def balance(request: Request) -> Response:
    """Total, available and held, lifetime sums, what expires next, the latest five lines.

    A POST may also be signed in its body, in the strong form of the wallet API."""
    node = node_of(request)
    body = await body_of(request)
    caller = _signed_in_body(request, body)
    if caller is None:
        caller, account_id = await bound_caller(request, body)
    else:
        account_id = await node.account_of(*(caller.wallet or ("", "")))
    wallet = caller.wallet[0] if caller.wallet is not None else ""
    if account_id is None:
        return answer(200, _empty(node, wallet))
    # What is due lapses first, so that nobody is shown credits they cannot spend.
    await node.writer.submit(ledger.Expire(account_id))
    async with node.db.read() as tx:
        seen = await read.account(tx, account_id)
        lines = await read.statement(tx, account_id, _RECENT)
        now_ms = await tx.now_ms()
    if seen is None:
        return answer(200, _empty(node, wallet))
    return answer(200, _shown(node, wallet, seen, lines, now_ms))


def _signed_in_body(request: Request, body: bytes) -> Caller | None:
    """Who signed a body that says so; None: it does not. Raises ``Problem``."""
    try:
        wanted = json_object(body) if request.method == "POST" and body else {}
    except ValueError:
        return None  # only its digest matters, as ever
    if not proof.is_wrapper(wanted):
        return None
    target, headers = from_scope(request.scope), request.scope["headers"]
    return proof.of_nothing(node_of(request), target, headers, wanted, _BALANCE).caller


def _empty(node: Node, wallet: str) -> dict[str, Any]:
    nothing = read.AccountView(0, 0, 0, 0, 0, 0, None, frozen=False)
    return _shown(node, wallet, nothing, (), 0)


def _shown(
    node: Node,
    wallet: str,
    seen: read.AccountView,
    lines: Any,
    now_ms: int,
) -> dict[str, Any]:
    total = seen.available_units + seen.held_units
    expiry = None
    if seen.next_expiry_ms is not None:
        expiry = {
            "at_ms": seen.next_expiry_ms,
            "days": max(seen.next_expiry_ms - now_ms, 0) // _DAY_MS,
        }
    return {
        "wallet": wallet,
        **amount(node, "total", total),
        **amount(node, "available", seen.available_units),
        **amount(node, "held", seen.held_units),
        **amount(node, "debt", seen.debt_units),
        "usd": format_usd(total),
        "per_usd": node.settings.credits.per_usd,
        "lifetime_added_units": seen.added_units,
        "lifetime_spent_units": seen.spent_units,
        "next_expiry": expiry,
        "frozen": seen.frozen,
        "recent": [line_of(node, line) for line in lines],
    }


def line_of(node: Node, line: ledger.TransferRow) -> dict[str, Any]:
    """One line of a statement: signed amount, and the balance after it."""
    sign = 1 if line.credit == line.account_id else -1
    return {
        "id": line.id,
        "kind": line.kind,
        **amount(node, "amount", sign * line.amount_units),
        **amount(node, "balance", line.balance_units),
        "reason": line.reason,
        "at_ms": line.at_ms,
    }


_FILTERS: Final = frozenset(("type", "from", "to", "limit", "cursor", "format"))
COLUMNS: Final = (
    *("id", "at", "wallet", "type", "kind", "amount", "amount_units", "balance", "balance_units"),
    *("description", "request_id", "reason", "at_ms"),
)
"""The columns of the CSV form: the members of each line, in this order."""


async def transactions(request: Request) -> Response:
    """The statement, newest first; ``?cursor=`` goes on behind the last line seen.

    ``type``, ``from`` and ``to`` say which lines; ``format=csv`` gives the same as a table.
    """
    node = node_of(request)
    caller, account_id = await bound_caller(request, await body_of(request))
    only(request, _FILTERS)
    limit = number_of(request, "limit", _PAGE, most=1_000)
    cursor = number_of(request, "cursor", 0, most=2**62)
    form = one_of(request, "format", ("json", "csv"))
    wanted = statement.Wanted(
        one_of(request, "type", statement.TYPES), time_of(request, "from"), time_of(request, "to")
    )
    page: pages.Page[statement.Line] = pages.Page((), None)
    if account_id is not None:
        async with node.db.read() as tx:
            page = await statement.page(tx, account_id, limit, cursor or None, wanted)
    wallet = caller.wallet[0] if caller.wallet is not None else ""
    rows = [_told(node, line, wallet) for line in page.rows]
    if form == "csv":
        return table_of(request, COLUMNS, rows, page.next_cursor)
    return answer(200, {"transactions": rows, "next_cursor": page.next_cursor})


def _told(node: Node, line: statement.Line, wallet: str) -> dict[str, Any]:
    """A line with what it was for. ``wallet`` of a call is the one that signed it."""
    call, row = line.call, line.transfer
    if call is not None:
        description = f"{call.method} {call.target}"
    else:
        description = line.source or row.reason or row.kind
    return {
        **line_of(node, row),
        "at": (_EPOCH + timedelta(milliseconds=row.at_ms)).isoformat(timespec="milliseconds"),
        "wallet": call.principal if call is not None else wallet,
        "type": line.type,
        "description": description,
        "request_id": None if call is None else call.request_id,
    }


async def _lots_of(request: Request) -> tuple[int | None, int | None]:
    """Which lot (None: all) of which account the caller may see. Raises ``Problem``."""
    body = await body_of(request)
    if any(map(is_our_key, values(request.scope["headers"], b"authorization"))):
        credential = (await caller_of(request, body)).credential
        if credential is not None:
            return credential.lot_id, credential.account_id
    return None, (await bound_caller(request, body))[1]


async def lots(request: Request) -> Response:
    """Where the credits came from and when they expire. A credential is shown its own lot."""
    node = node_of(request)
    only, account_id = await _lots_of(request)
    rows: Any = ()
    if account_id is not None:
        await node.writer.submit(ledger.Expire(account_id))
        async with node.db.read() as tx:
            rows = await read.lots(tx, account_id, _PAGE, only)
    return answer(
        200,
        {
            "lots": [
                {
                    "id": row.id,
                    "source": row.source,
                    "payment_id": row.payment_id,
                    "payer": row.payer,
                    **amount(node, "minted", row.minted_units),
                    **amount(node, "remaining", row.remaining_units),
                    **amount(node, "reversed", row.reversed_units),
                    **amount(node, "frozen", row.claim_units - row.reversed_units),
                    **amount(node, "short", row.short_units),
                    **amount(node, "lost", row.lost_units),
                    **amount(node, "outgoing", row.outgoing_units),
                    **amount(node, "paid_out", row.paid_out_units),
                    "expires_at_ms": None if row.expires_ms >= ledger.NEVER else row.expires_ms,
                    "state": row.state,
                }
                for row in rows
            ]
        },
    )


ROUTES = [
    Route("/farebox/v1/credits/balance", balance, methods=["GET", "POST"]),
    Route("/farebox/v1/credits/transactions", transactions, methods=["GET"]),
    Route("/farebox/v1/credits/lots", lots, methods=["GET"]),
]
