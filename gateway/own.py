"""What the gateway's own endpoints share: JSON in and out, and who may ask."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response

from gateway.accounts import proofs
from gateway.db import CommitUnknown, DatabaseUnavailable
from gateway.errors import NextAction, Problem
from gateway.fields import values
from gateway.forms import RateLimit
from gateway.limits import Client, Standing, client_of
from gateway.middleware import read_body
from gateway.money import format_credits
from gateway.node import Node, unavailable
from gateway.proxy import siwx as siwx_challenges
from gateway.proxy.advice import SIGN
from gateway.proxy.identity import Caller, auth_problem, identify
from gateway.proxy.target import Target, from_scope
from wallet_auth import AuthError, check_body, siwx
from wallet_auth.strict import json_object

MAX_OWN_BODY_BYTES: Final = 64 * 1024
NODE: Final = "farebox.node"  # where the front puts the node in the ASGI scope
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
SHARED: Final = 10  # times as much for an address that many callers may share


def node_of(request: Request) -> Node:
    node: Node = request.scope[NODE]
    return node


def client_of_request(request: Request) -> Client:
    """Where a request came from."""
    peer, _ = request.scope["client"] or ("", 0)
    trusted = node_of(request).settings.server.trusted_proxies
    return client_of(peer, request.scope["headers"], trusted)


async def count_of_client(request: Request, what: str, count: int) -> Standing:
    """One more ``what`` from this client, of ``count`` in a minute.

    An address that many may share (a proxy that nobody named) may ten times as much.
    """
    client = client_of_request(request)
    limit = RateLimit(count if client.single else count * SHARED, 60)
    return await node_of(request).limits.take(f"{what}:address:{client.address}", limit)


async def count_checkout(request: Request, account_id: int | None = None) -> None:
    """One more card payment begins: a row of ours and a session at Stripe.

    Raises ``Problem("rate_limited")``. ``account_id``: who signed the request, if the wallet has
    an account; else the address counts, since a new key costs nothing.
    """
    node = node_of(request)
    count = node.settings.stripe.checkouts_per_min
    if account_id is None:
        standing = await count_of_client(request, "checkout", count)
    else:
        key = f"checkout:account:{account_id}"
        standing = await node.limits.take(key, RateLimit(count, 60))
    if not standing.allowed:
        raise Problem(
            "rate_limited",
            "Too many card payments were begun from here within a minute; nothing was charged.",
            headers={"Retry-After": str(-(-standing.reset_ms // 1000))},
        )


async def body_of(request: Request) -> bytes:
    """The whole body, at most 64 KiB. Raises ``Problem("body_too_large")``."""
    return await read_body(request.receive, request.scope["headers"], MAX_OWN_BODY_BYTES)


def object_of(body: bytes, known: frozenset[str]) -> dict[str, Any]:
    """A JSON object with no members but ``known``. Raises ``Problem("invalid_request")``."""
    try:
        value = json_object(body) if body.strip() else {}
    except ValueError as error:
        raise Problem("invalid_request", f"The body is {error}.") from None
    unknown = sorted(value.keys() - known)
    if unknown:
        raise Problem(
            "invalid_request",
            f"Unknown member {unknown[0][:60]!r}; known are {', '.join(sorted(known))}.",
        )
    return value


async def caller_of(request: Request, body: bytes) -> Caller:
    """Who signed or pays; nobody is allowed too. Raises ``Problem`` for a proof that fails."""
    node = node_of(request)
    target = from_scope(request.scope)
    if values(request.scope["headers"], siwx.HEADER):
        raise Problem(
            "identity_unsupported",
            "Sign-in-with-x is for priced calls and for reading: sign this request (ERC-8128).",
        )
    headers = request.scope["headers"]
    client = client_of_request(request)
    caller = await identify(node, request.method, target, headers, node.now_s(), client)
    _check_digest(node, request, target, caller, body)
    return caller


async def bound_caller(
    request: Request, body: bytes, *, reads: bool = True
) -> tuple[Caller, int | None]:
    """A caller with a bound identity and its account (None: it never had credits).

    A payment proves a payer, not a login: it opens nothing here. What only ``reads`` may be asked
    with sign-in-with-x too; its challenge stands in the 401.
    """
    if reads and values(request.scope["headers"], siwx.HEADER):
        caller = await _signed_in(request, body)
    else:
        caller = await caller_of(request, body)
    if caller.wallet is None:
        words = "Sign this request with the wallet it is about (ERC-8128)."
        raise _unsigned(request, body, Problem("identity_required", words), reads=reads)
    return caller, await node_of(request).account_of(*caller.wallet)


async def _signed_in(request: Request, body: bytes) -> Caller:
    """Who answered the challenge of our own 401, once. Raises ``Problem``."""
    node, target = node_of(request), from_scope(request.scope)
    headers, client = request.scope["headers"], client_of_request(request)
    try:
        caller = await identify(node, request.method, target, headers, node.now_s(), client)
        signer = caller.signer
        if signer is None or caller.wallet is None:
            raise Problem("identity_required", "There is no proof in SIGN-IN-WITH-X.")
        try:
            check_body(signer, body)
        except AuthError as error:
            raise Problem("invalid_siwx_nonce", error.detail) from None
        value = "/".join((signer.request_id, *caller.wallet))
        if not await proofs.spend(node.db, siwx.SCHEME, value, signer.expires_s * 1_000):
            raise Problem("invalid_siwx_nonce", "This proof was used before: take a new challenge.")
    except Problem as refusal:
        if refusal.meaning.status != 402:
            raise
        raise _unsigned(request, body, refusal, reads=True) from None
    except (DatabaseUnavailable, CommitUnknown) as error:
        raise unavailable(error) from error
    return caller


def _unsigned(request: Request, body: bytes, refusal: Problem, *, reads: bool) -> Problem:
    """The 401 that says how to sign. What ``reads`` has a challenge with it, in the form that it
    has in the extensions of a 402."""
    node, target = node_of(request), from_scope(request.scope)
    members: dict[str, Any] = {}
    if reads:
        tag = siwx_challenges.tag(body)
        text = siwx_challenges.challenge(node, request.method, target, tag, 0, node.now_s())
        members["extensions"] = {siwx.EXTENSION: json.loads(text)}
    return Problem(
        refusal.code,
        refusal.detail,
        status=401,
        members=members,
        headers={"WWW-Authenticate": 'Signature realm="farebox"', "Cache-Control": "no-store"},
        next_actions=[
            NextAction(
                request.method,
                node.settings.server.public_url + target.raw.decode("ascii"),
                "the same request with Signature-Input and Signature (ERC-8128), covering "
                "@authority, @method, @path, and content-digest if there is a body",
                "sign",
                SIGN,
            )
        ],
    )


def _check_digest(
    node: Node, request: Request, target: Target, caller: Caller, body: bytes
) -> None:
    if caller.signer is None:
        return
    try:
        check_body(caller.signer, body)
    except AuthError as error:
        raise auth_problem(node, request.method, target, error) from None


def number_of(request: Request, name: str, default: int, *, most: int) -> int:
    """A whole number of the query, from 1 to ``most``. Raises ``Problem("invalid_request")``."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 19 or not 1 <= int(text) <= most:
        raise Problem("invalid_request", f"{name} is a number from 1 to {most}.")
    return int(text)


def time_of(request: Request, name: str) -> int | None:
    """A time of the query in milliseconds: a whole number of them, or RFC 3339 with its offset.

    Raises ``Problem("invalid_request")``.
    """
    text = request.query_params.get(name)
    if text is None:
        return None
    if text.isascii() and text.isdigit() and len(text) <= 15:
        return int(text)
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        at = None
    if at is None or at.tzinfo is None:
        raise Problem(
            "invalid_request",
            f"{name} is a number of milliseconds, or a time such as 2026-11-21T08:00:00Z.",
        )
    return (at - _EPOCH) // timedelta(milliseconds=1)


def one_of(request: Request, name: str, known: Sequence[str]) -> str | None:
    """A word of the query out of those known. Raises ``Problem("invalid_request")``."""
    text = request.query_params.get(name)
    if text is not None and text not in known:
        raise Problem("invalid_request", f"{name} is one of {', '.join(known)}.")
    return text


def only(request: Request, known: frozenset[str]) -> None:
    """A filter that is not known must not be answered as if it had been applied.

    Raises ``Problem("invalid_request")`` for other parameters, and for one that is there twice.
    """
    names = [name for name, _ in request.query_params.multi_items()]
    for name in names:
        if name not in known:
            raise Problem(
                "invalid_request",
                f"Unknown parameter {name[:60]!r}; known are {', '.join(sorted(known))}.",
            )
    if len(set(names)) < len(names):
        raise Problem("invalid_request", "A parameter is there twice.")


def table_of(
    request: Request,
    columns: Sequence[str],
    rows: Iterable[Mapping[str, Any]],
    next_cursor: int | None,
) -> Response:
    """The rows of a page as CSV; the next page is in ``Link`` (RFC 8288)."""
    headers = {"Cache-Control": "no-store", "Content-Disposition": "attachment"}
    if next_cursor is not None:
        query = urlencode(dict(request.query_params) | {"cursor": str(next_cursor)})
        url = f"{node_of(request).settings.server.public_url}{request.url.path}?{query}"
        headers["Link"] = f'<{url}>; rel="next"'
    return Response(csv_text(columns, rows), 200, headers, "text/csv")


def amount(node: Node, name: str, units: int) -> dict[str, Any]:
    """An amount as every object shows it: credits as text, and the exact units."""
    return {
        name: format_credits(units, node.settings.credits.per_usd),
        f"{name}_units": units,
    }


def answer(status: int, value: object, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer for its asker alone."""
    from starlette.responses import JSONResponse

    return JSONResponse(value, status, {"Cache-Control": "no-store", **(headers or {})})


# What spreadsheet programs take for the beginning of a formula. A number is not one.
_FORMULA: Final = re.compile(r"(?!-[0-9]+(?:\.[0-9]+)?\Z)[=+\-@\t\r]")


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A table (RFC 4180) with a line of names.

    Cells hold texts of callers, and are opened by programs that run some of them: those begin with
    an apostrophe here. Numbers stay numbers.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(columns)
    writer.writerows([_cell(row[name]) for name in columns] for row in rows)
    return out.getvalue()


def _cell(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value
