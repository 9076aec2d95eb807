"""A call of a priced tool under its hold: judged by the JSON-RPC response, however it comes.

An answer in one piece is read whole. Of a stream the events pass as they come (progress,
questions of the server), but the one that is the response waits for the charge, as the last byte
of any other answer does.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final

from gateway import ledger
from gateway.errors import Problem
from gateway.money import format_credits
from gateway.proxy import cors, events, outcome, replies
from gateway.proxy import mcp_answers as answers
from gateway.proxy import mcp_messages as messages
from gateway.proxy.forward import HeldCall
from gateway.proxy.streaming import Caller
from gateway.proxy.upstream import Answer

_JSON: Final = (b"content-type", b"application/json")
_KIND: Final = (("content-type", "application/json"), ("cache-control", "private"))
Fields = list[tuple[bytes, bytes]]


def require_readable(answer: Answer) -> None:
    """An answer that cannot be read is not passed: its reader might find it asks for payment."""
    codings = answer.values(b"content-encoding")
    if any(value.strip().lower() not in (b"", b"identity") for value in codings):
        raise Problem("upstream_error", "The upstream's answer has a content encoding.")


class ToolCall(HeldCall):
    """One call of a tool. ``message_id`` is the JSON-RPC id it is answered under."""

    def __init__(self, *arguments: Any, message_id: Any) -> None:
        super().__init__(*arguments)
        self._message_id = message_id

    async def relay(self, answer: Answer) -> None:
        """Pass the upstream's answer on, charged if it is a result that is no error."""
        if answer.status >= 300:  # a session that ended, and other words of the transport
            await super().relay(answer)
        else:
            require_readable(answer)
            if self.metering is not None:
                self.metering.begin(answer)
            if outcome.streams(answer.headers):
                await self._events(answer)
            else:
                await self._one(answer)

    async def _one(self, answer: Answer) -> None:
        body, whole = await answer.read(answers.MAX_RESULT_BYTES)
        found = events.object_of(body) if whole else None
        if found is None or not answers.answers(found, self._message_id):
            raise Problem("upstream_error", "The upstream's answer is no response to this call.")
        closed, told = await self._decided(found, len(body))
        kept = [pair for pair in self._fields(answer) if pair[0] != b"content-type"]
        text = json.dumps(told).encode()
        await self._all([*kept, _JSON], closed, text)

    async def _events(self, answer: Answer) -> None:
        await self._begin(answer)
        caller = Caller(self._receive, self._send, answer)
        waiting = b""
        try:
            async with aclosing(answer.chunks()) as pieces:
                while piece := await self._next(pieces, caller):
                    waiting += piece
                    while (parts := events.split(waiting)) is not None:
                        event, waiting = parts
                        if await self._last(event, caller):
                            return
                    if len(waiting) > answers.MAX_RESULT_BYTES:
                        break
            if caller.absent:
                await self._unheard()
                return
        finally:
            caller.forget()
        raise Problem("upstream_error", "The upstream's stream ended without a response.")

    async def _next(self, pieces: AsyncGenerator[bytes], caller: Caller) -> bytes:
        try:
            return await anext(pieces, b"")
        except Problem:
            if caller.absent:  # else who makes the upstream give up rides free
                await self._unheard()
            raise

    async def _unheard(self) -> None:
        """The caller left, or did not read, and the tool was heard out: that is charged."""
        await self._close(None, ledger.Answer(200, _KIND, None))

    async def _last(self, event: bytes, caller: Caller) -> bool:
        """Pass an event on, or end the call with it: then it was the last one."""
        if self.metering is not None:
            self.metering.passed(event)
        found = events.data_of(event)
        if found is not None and answers.answers(found, self._message_id):
            _, told = await self._decided(found, 0)
            await self._send({"type": "http.response.body", "body": answers.event(told)})
            return True
        if await caller.take(answers.shown(event)):
            return False
        await self._unheard()
        await self._send({"type": "http.response.body", "body": b""})
        return True

    async def _begin(self, answer: Answer) -> None:
        hold = self.ticket.hold
        held = format_credits(hold.max_units, self.node.settings.credits.per_usd)
        pairs = (
            ("farebox-request-id", hold.request_id),
            ("farebox-held", held),
            *replies.paid_from(self.node, self.ticket.receipt, None, 0),
        )
        lines = [(name.lower().encode(), value.encode("latin-1")) for name, value in pairs]
        await self._start(200, [*self._fields(answer), *lines])

    async def _decided(
        self, found: dict[str, Any], length: int
    ) -> tuple[ledger.Closed, dict[str, Any]]:
        """End the hold by a response of so many bytes; the response as the caller may see it."""
        if self.metering is not None:
            self.metering.message(found, length)
        reason = answers.why_not_charged(found)
        clean = answers.with_meta(found, {})
        stored = ledger.Answer(200, _KIND, json.dumps(clean).encode())
        if len(stored.body or b"") > self.node.settings.server.buffer_answer_bytes:
            stored = ledger.Answer(200, _KIND, None)
        closed = await self._close(reason, stored)
        return closed, answers.with_meta(clean, self._money(closed))

    def _money(self, closed: ledger.Closed) -> dict[str, Any]:
        charged, available = closed.transfer.amount_units, closed.balance.available_units
        return answers.money(
            (
                *replies.charge_headers(self.node, self.ticket.hold, charged, available),
                *replies.paid_from(self.node, self.ticket.receipt, charged, available),
            )
        )

    async def failed(self, problem: Problem, reason: str | None = None) -> None:
        """The upstream failed: not charged, and said so as a JSON-RPC error."""
        if self._started:
            await super().failed(problem, reason)
            return
        error = {
            "code": answers.INTERNAL_ERROR,
            "message": problem.detail,
            "data": problem.body(self.ticket.hold.request_id),
        }
        body = messages.answer(self._message_id, "error", error)
        closed = await self.void(reason or problem.code, ledger.Answer(200, _KIND, body))
        await self._all([_JSON, (b"cache-control", b"private")], closed, body)

    async def _all(self, fields: Fields, closed: ledger.Closed | None, body: bytes) -> None:
        lines = self._receipt(closed) + b"content-length: %d\r\n" % len(body)
        self._started = True
        await self._send.whole(200, cors.expose(fields), lines, body)
