"""The call itself: forward under a hold, capture what was used or void, and only then answer.

The capture is committed before the end of the answer leaves; for an answer short enough to be
kept in memory before its first byte. So every answer a caller has whole is in the ledger. A caller
who hangs up, or stops reading, pays for what the upstream did all the same.

An answer that is a stream of events is passed on from its first byte; one that does not say how
long it is, as soon as it makes the caller wait. What counts as success is told in ``outcome.py``.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import lru_cache
from typing import Any, Final, NamedTuple

from gateway import ledger, observe
from gateway.db import CommitUnknown, DatabaseUnavailable
from gateway.errors import Problem
from gateway.fields import values
from gateway.limits import Client, Flight
from gateway.middleware import Outgoing
from gateway.money import format_credits
from gateway.node import Behind, Node, unavailable
from gateway.pricing.quote import Quote
from gateway.proxy import cors, headers, location, outcome, replies
from gateway.proxy.body import Body
from gateway.proxy.metering import Metering
from gateway.proxy.pace import ended_uncharged
from gateway.proxy.routes_table import Route, upstream_target
from gateway.proxy.streaming import Caller, all_but_the_end
from gateway.proxy.target import Target
from gateway.proxy.upstream import Answer, Timeouts, open_upstream
from wallet_auth import Signer
from wallet_auth.erc8128 import SCHEME as SIGNATURE

Receive = Callable[[], Awaitable[Any]]
Fields = Sequence[tuple[bytes, bytes]]
# An answer of unknown length that is whole by then is answered with its charge, as short ones are;
# else it is a stream, and its caller should not wait for us to find out how long it gets.
STREAM_AFTER_S: Final = 0.05
# Never stored with an answer: it would be given to whoever repeats the request.
_NOT_STORED = frozenset((b"set-cookie", b"content-length", b"date", b"server"))
_BOUND: Final = (b"farebox-auth", b"bound")
_PAID: Final = (b"farebox-auth", b"payment")


class Incoming(NamedTuple):
    """The caller's request as it goes up: the same raw bytes that were priced and signed."""

    route: Route
    target: Target
    headers: Fields
    body: Body
    client: Client
    method: str = ""  # towards the upstream, if it is not the request's own


class Ticket(NamedTuple):
    """The right to run a call once: its hold, who it is for, and the payment that came with it.

    ``payer``: of the credential that it is paid with. ``credential``: one that goes out with the
    answer, this once. ``after``: its hold reserves nothing, and it is paid for what it came to.
    """

    hold: ledger.HoldRow
    balance: ledger.Balance
    signer: Signer | None
    receipt: replies.Receipt | None
    flight: Flight
    price: Quote | None = None  # its quote, where what it comes to hangs on the answer
    payer: str | None = None
    credential: str | None = None
    after: After | None = None


class After(NamedTuple):
    """A call that is paid after the work: by which payment, the most it may come to, and what runs
    it (``afterwards.py``)."""

    payment_id: str
    most_units: int
    run: Callable[[HeldCall, Incoming], Awaitable[None]]
    made: type[HeldCall]


Opening = Callable[["HeldCall", Incoming], AbstractAsyncContextManager[Answer]]


async def run(
    node: Node, incoming: Incoming, ticket: Ticket, receive: Receive, send: Outgoing
) -> None:
    """Run a call that is held and answer it. Whatever happens, the hold ends here.

    ``receive`` is read no more for the request, only to notice that the caller hangs up.
    """
    after = ticket.after
    if after is None:
        await run_call(HeldCall(node, incoming.route, ticket, receive, send), incoming)
    else:
        await after.run(after.made(node, incoming.route, ticket, receive, send), incoming)


async def run_call(call: HeldCall, incoming: Incoming, opening: Opening | None = None) -> None:
    """``run`` for a call that answers in a way of its own. ``opening``: instead of ``open_call``,
    for what has to be said to the upstream before it, and after."""
    node, ticket = call.node, call.ticket
    hold = ticket.hold
    node.in_flight[hold.id] = hold  # from here its lease is renewed (leases.py)
    try:
        async with (opening or open_call)(call, incoming) as answer:
            await call.relay(answer)
    except Problem as problem:
        if problem.code == "upstream_wants_payment":
            observe.count("oddity", kind="upstream_wants_payment")
        await call.failed(problem)
    except BaseException:
        # A fault of ours or a cancelled task: nothing was delivered whole, so nothing is
        # charged. If even this cannot be written the sweeper does it.
        await call.void("gateway_error", None)
        raise
    finally:
        node.in_flight.pop(hold.id, None)
        ticket.flight.land(charged=call.charged)
        if call.charged:
            observe.count_paid()
        else:
            observe.count("requests", outcome="uncharged")
            ended_uncharged(node, hold.account_id, incoming.client)


def open_call(call: HeldCall, incoming: Incoming) -> open_upstream:
    """The one request that a hold is for."""
    node, ticket, route = call.node, call.ticket, incoming.route
    hold = ticket.hold
    behind = node.upstreams[route.upstream]
    request_id = (b"farebox-request-id", hold.request_id.encode("latin-1"))
    if ticket.signer is not None:
        ours = [
            _BOUND,
            request_id,
            (b"farebox-wallet", ticket.signer.address.encode()),
            (b"farebox-account", b"%d" % hold.account_id),
        ]
    else:
        ours = [_PAID, request_id]
        payer = ticket.payer if ticket.receipt is None else ticket.receipt.payer
        if payer is not None:
            ours.append((b"farebox-payer", payer.encode()))
    fields = incoming.headers
    if call.metering is not None:
        wishes = b",".join(values(fields, b"farebox-prefer"))
        ours += call.metering.ours(incoming.body.size, wishes)
        fields = outcome.without_parts(fields)
    elif route.failed_if.by_content:
        fields = outcome.without_parts(fields)
        ours.append(outcome.UNCOMPRESSED)
    return open_upstream(
        node.client,
        behind.origin,
        incoming.method or hold.method,
        upstream_target(route, behind.origin.base_path, incoming.target),
        headers=headers.request_headers(
            fields,
            host=behind.origin.authority,
            ours=ours,
            inject=behind.inject,
            signature_is_ours=ticket.signer is not None and ticket.signer.scheme == SIGNATURE,
        ),
        body=incoming.body.up(),
        length=incoming.body.size,
        timeouts=timeouts_of(node, behind, route),
    )


def timeouts_of(node: Node, behind: Behind, route: Route) -> Timeouts:
    """A route's own limit, else its upstream's, else the gateway's."""
    server = node.settings.server
    return _timeouts(
        behind.settings.connect_timeout_s or server.upstream_connect_timeout_s,
        route.timeout_s or behind.settings.timeout_s or server.upstream_timeout_s,
    )


@lru_cache(maxsize=1_000)  # as many as the configuration has
def _timeouts(connect_s: int, total_s: int) -> Timeouts:
    return Timeouts(connect_s=connect_s, first_byte_s=total_s, idle_s=total_s, total_s=total_s)


class HeldCall:
    """One call under a hold, from the upstream's head to the end of the hold."""

    def __init__(
        self, node: Node, route: Route, ticket: Ticket, receive: Receive, send: Outgoing
    ) -> None:
        self.node = node
        self._route = route
        self.ticket = ticket
        self._receive = receive
        self._send = send
        self._started = False
        self.charged = False
        price, after = ticket.price, ticket.after
        self._most_units = ticket.hold.max_units if after is None else after.most_units
        self.metering = (
            None
            if price is None
            else Metering(
                price,
                self._most_units,
                node.settings.credits.per_usd,
                by_upstream=route.amount_from == "upstream",
            )
        )

    async def relay(self, answer: Answer) -> None:
        """Pass an upstream's answer on, charged if it counts as success."""
        if answer.status == 402:
            raise Problem("upstream_wants_payment", "The upstream itself asks for payment.")
        if answer.status >= 500:
            problem = Problem(
                "upstream_error",
                f"The upstream answered {answer.status}.",
                members={"upstream_status": answer.status},
            )
            await self.failed(problem, f"upstream_status_{answer.status}")
            return
        limit = self.node.settings.server.buffer_answer_bytes
        if self.metering is not None:
            self.metering.begin(answer)
        if outcome.streams(answer.headers):
            await self._streamed(answer, b"")
            return
        at_hand = answer.at_hand(limit)
        if at_hand is not None:
            await self._whole(answer, at_hand)
            return
        within_s = STREAM_AFTER_S if answer.content_length is None else None
        body, whole = await answer.read(limit, within_s=within_s)
        if whole and len(body) <= limit:
            await self._whole(answer, body)
        else:
            await self._streamed(answer, body)

    async def _whole(self, answer: Answer, body: bytes) -> None:
        """Short enough: the charge is durable before the first byte leaves."""
        if self.metering is not None:
            self.metering.whole(body)
        fields = self._fields(answer)
        stored = ledger.Answer(answer.status, _storable(fields), body)
        closed = await self._close(self._reason(answer, body), stored)
        length = len(body)
        if self.ticket.hold.method == "HEAD" and answer.content_length is not None:
            length = answer.content_length
        lines = self._receipt(closed)
        if answer.status not in (204, 304):
            lines += b"content-length: %d\r\n" % length
        if any(name == cors.ALLOW_ORIGIN for name, _ in fields):
            fields = cors.expose(fields)
        else:
            lines += cors.OPEN_TO_ALL
        if self.ticket.credential is not None:
            fields = self._with_credential(fields)
        self._started = True
        await self._send.whole(answer.status, fields, lines, body)

    async def _streamed(self, answer: Answer, first: bytes) -> None:
        """Too long to keep back: it starts under the durable hold, its end waits for the charge."""
        kept = self._fields(answer)
        fields = list(kept)
        metering = self.metering
        if answer.content_length is not None and (metering is None or not metering.stream):
            fields.append((b"content-length", str(answer.content_length).encode()))
        per_usd = self.node.settings.credits.per_usd
        hold = self.ticket.hold
        fields += _encoded(
            (
                ("Farebox-Request-Id", hold.request_id),
                ("Farebox-Held", format_credits(self._most_units, per_usd)),
                *replies.paid_from(self.node, self.ticket.receipt, None, 0),
            )
        )
        await self._start(answer.status, self._with_credential(fields))
        caller = Caller(self._receive, self._send, answer)
        keep_bytes = self.node.settings.server.buffer_answer_bytes
        if metering is not None and metering.with_costs:
            keep_bytes = 0  # what stands in it of us is not part of the answer
        try:
            rest = await all_but_the_end(answer, first, caller, keep_bytes, metering)
            slow = caller.slow
        except Problem:
            if caller.absent:
                # Else who takes what it wants, and then makes the upstream give up, rides free.
                reason = outcome.status_reason(self._route.failed_if, answer.status)
                await self._close(reason, ledger.Answer(answer.status, _storable(kept), None))
            raise
        finally:
            caller.forget()
        reason = self._reason(answer, rest.copy, caller_was_slow=slow)
        closed = await self._close(reason, ledger.Answer(answer.status, _storable(kept), rest.copy))
        last = rest.last
        if metering is not None and metering.stream:
            charged = closed.transfer.amount_units
            available = closed.balance.available_units if self.ticket.payer is None else None
            last += metering.farewell(hold.request_id, charged, available)
        await self._send({"type": "http.response.body", "body": last})

    def _fields(self, answer: Answer) -> list[tuple[bytes, bytes]]:
        """The upstream's header fields as the caller may see them, without a length."""
        return location.rewrite(
            headers.response_headers(
                answer.headers, private=True, metered=self.metering is not None
            ),
            self._route,
            self.node.upstreams[self._route.upstream].origin,
            self.node.settings.server.public_url,
        )

    def _with_credential(self, fields: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """What is sent, and was not stored: with the credential, which no cache may keep."""
        credential = self.ticket.credential
        if credential is None:
            return fields
        return [
            *(field for field in fields if field[0] != b"cache-control"),
            (b"cache-control", b"no-store"),
            (b"farebox-credential", credential.encode()),
        ]

    def _reason(
        self, answer: Answer, body: bytes | None, *, caller_was_slow: bool = False
    ) -> str | None:
        """Why an answer that came to its end is not charged; None for success."""
        if self._route.failed_if.by_status_alone:
            return outcome.status_reason(self._route.failed_if, answer.status)
        ended = outcome.Ended(
            method=self.ticket.hold.method,
            status=answer.status,
            headers=answer.headers,
            body=body,
            waited_s=answer.waited_s,
            caller_was_slow=caller_was_slow,
        )
        return outcome.reason(self._route.failed_if, ended)

    async def failed(self, problem: Problem, reason: str | None = None) -> None:
        """The upstream failed (or we did, with an answer for it): not charged, and said so.

        ``reason`` is what stands on the row; the problem's code unless it is given.
        """
        if self._started:
            # Part of the answer is out. Cut it, so that the caller does not take it for whole.
            await self.void(reason or problem.code, None)
            raise problem
        hold = self.ticket.hold
        body = json.dumps(problem.body(hold.request_id)).encode()
        kind = (("content-type", "application/problem+json"), ("cache-control", "private"))
        answer = ledger.Answer(problem.status, kind, body)
        closed = await self.void(reason or problem.code, answer)
        fields = _encoded(kind) + _encoded(tuple(problem.headers.items()))
        fields.append((b"content-length", str(len(body)).encode()))
        fields = self._with_credential(fields)
        self._started = True
        await self._send.whole(problem.status, cors.expose(fields), self._receipt(closed), body)

    async def void(self, reason: str, answer: ledger.Answer | None) -> ledger.Closed | None:
        """End the hold without a charge. None: it cannot be written now, the sweeper will."""
        try:
            return await self._submit(ledger.Close(self.ticket.hold, 0, reason, answer))
        except (DatabaseUnavailable, CommitUnknown, Problem):
            return None

    async def _close(self, reason: str | None, answer: ledger.Answer) -> ledger.Closed:
        """Capture, or void for ``reason``. Raises ``Problem`` if the charge is not durable."""
        hold = self.ticket.hold
        amount = self._most_units if reason is None else 0
        breakdown = None
        if self.metering is not None and reason is None:
            made = self.metering.charge()
            amount, breakdown = made.units, self.metering.lines_of(made)
        try:
            return await self._submit(
                ledger.Close(hold, amount, reason, answer, breakdown=breakdown)
            )
        except (DatabaseUnavailable, CommitUnknown) as error:
            raise unavailable(error) from error

    async def _submit(self, step: ledger.Close) -> ledger.Closed:
        outcome = await self.node.writer.submit(step)
        if isinstance(outcome, ledger.Closed):
            self.charged = outcome.transfer.kind == "capture"
            return outcome
        # Our lease was over and the sweeper voided the hold: what was done is not charged, and
        # what is not charged is not delivered as if it were.
        raise Problem("outcome_unknown", "The call took longer than its hold lasted.")

    def _receipt(self, closed: ledger.Closed | None) -> bytes:
        """What the call cost, as header lines."""
        hold, receipt = self.ticket.hold, self.ticket.receipt
        if closed is None:
            # Not written now, or not known to be: v1/requests/{id} and a repeat will tell.
            text = f"farebox-request-id: {hold.request_id}\r\n"
            paid_from = replies.paid_from(self.node, receipt, None, 0)
        else:
            per_usd = self.node.settings.credits.per_usd
            charged, available = closed.transfer.amount_units, closed.balance.available_units
            text = (
                f"farebox-request-id: {hold.request_id}\r\n"
                f"farebox-charged: {format_credits(charged, per_usd)}\r\n"
            )
            if self.ticket.payer is None:  # a credential is not told what else there is
                text += f"farebox-balance: {format_credits(available, per_usd)}\r\n"
            paid_from = replies.paid_from(self.node, receipt, charged, available)
        for name, value in paid_from:
            text += f"{name}: {value}\r\n"
        return text.encode("latin-1")

    async def _start(self, status: int, fields: list[tuple[bytes, bytes]]) -> None:
        self._started = True
        await self._send(
            {"type": "http.response.start", "status": status, "headers": cors.expose(fields)}
        )


def _storable(fields: list[tuple[bytes, bytes]]) -> tuple[tuple[str, str], ...]:
    return tuple(
        [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in fields
            if name not in _NOT_STORED
        ]
    )


def _encoded(pairs: tuple[tuple[str, str], ...]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in pairs]
