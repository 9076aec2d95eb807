"""What an invoke is answered with: the tool's answer in one JSON object, and what it cost.

Stored is the object without the money in it: a repeat gets it with the charge of a repeat, which is
none, and with the balance as it is then.
"""

from __future__ import annotations

import json
import re
from base64 import b64decode, b64encode
from typing import Any, Final

from gateway import ledger
from gateway.errors import Problem
from gateway.ledger import read
from gateway.middleware import Outgoing
from gateway.money import UNITS_PER_USD
from gateway.node import Node
from gateway.payments.wire import Presented
from gateway.proxy import cors, events, mcp_answers, outcome, replies
from gateway.proxy.forward import HeldCall, Ticket
from gateway.proxy.identity import Caller
from gateway.proxy.routes_table import Route
from gateway.proxy.upstream import Answer
from wallet_auth.strict import require_shallow

MAX_ANSWER_BYTES: Final = 4 << 20
KIND: Final = (("content-type", "application/json"), ("cache-control", "private"))
_BOM: Final = b"\xef\xbb\xbf"
_BALANCE: Final = re.compile(rb"farebox-balance: [^\r]*\r\n")
_FIELDS: Final = [(name.encode(), value.encode()) for name, value in KIND]


def number(units: int, per_usd: int = 1) -> int | float:
    """An amount as a JSON number: in dollars, or in what a dollar has so many of."""
    whole, rest = divmod(units * per_usd, UNITS_PER_USD)
    return units * per_usd / UNITS_PER_USD if rest else whole


def wrapped(status: int, succeeded: bool, output: Any) -> dict[str, Any]:
    """A tool's answer in the published arrangement."""
    return {
        "success": succeeded,
        "response": {
            "status_code": status,
            "success": succeeded,
            "data": {"success": succeeded, "output": output},
        },
    }


def output_of(answer: Answer, body: bytes) -> Any:
    """The answer's JSON; else its text; else its bytes as base64."""
    found = _parsed(body)
    if found is not None:
        return found[0]
    kind = b", ".join(answer.values(b"content-type"))
    try:
        return body.decode()
    except UnicodeDecodeError:
        told = kind.decode("latin-1")
        return {"content_type": told, "base64": b64encode(body).decode()}


def _parsed(body: bytes) -> tuple[Any] | None:
    try:
        require_shallow(body, outcome.MAX_DEPTH)
        return (_JSON.decode(body.removeprefix(_BOM).decode()),)
    except ValueError:
        return None


def _refuse(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


_JSON: Final = json.JSONDecoder(parse_constant=_refuse)


class Money:
    """What an answer says about money: of a payment for this call alone what it paid, else what
    the call cost and what is left of the credits that the proof may spend."""

    def __init__(self, node: Node, caller: Caller, price_units: int, url: str) -> None:
        self._node = node
        self._caller = caller
        self._price_units = price_units
        self._url = url

    @property
    def limited(self) -> bool:
        """Whether the proof may not know of everything that the account has."""
        return self._caller.only is not None or self._caller.credential is not None

    async def told(
        self, charged_units: int, available_units: int | None, pairs: replies.Pairs
    ) -> dict[str, Any]:
        """The members beside the tool's answer. ``available_units``: what the account has left, if
        that is known."""
        caller = self._caller
        if caller.presented is not None and caller.signer is None:
            return {"x402": self._payment(caller.presented, pairs)}
        if self.limited or available_units is None:
            available_units = await left(self._node, caller)
        per_usd = self._node.settings.credits.per_usd
        return {
            "price_credits": number(self._price_units, per_usd),
            "charged_credits": number(charged_units, per_usd),
            "balance_credits": number(available_units, per_usd),
            "balance_usd": number(available_units),
            "credit_source": "wallet",
        }

    def _payment(self, presented: Presented, pairs: replies.Pairs) -> dict[str, Any]:
        said: dict[str, Any] = {}
        for name, value in pairs:
            if name.lower() == "payment-response":
                said = json.loads(b64decode(value))
        chain = self._node.rails.chain_of(presented)
        asset = chain.network.usdc
        if presented.asset is not None:
            asset = chain.network.asset(presented.asset) or asset
        auth = presented.authorization
        units = int(said.get("amount", "0"))
        return {
            "transaction": said.get("transaction", ""),
            "network": chain.caip2,
            "resource_url": self._url,
            "payment": {
                "token": asset.symbol,
                "asset": asset.address,
                "amount_base_units": str(units),
                "amount_usd": number(units),
                "payer_wallet_address": auth.from_,
                "pay_to": auth.to,
            },
        }


async def left(node: Node, caller: Caller) -> int:
    """What the caller may spend now, in units."""
    proof, only = caller.credential, caller.only
    if proof is not None:
        account_id: int | None = proof.account_id
        only = ledger.Only(lot_id=proof.lot_id)
    else:
        account_id = None if caller.wallet is None else await node.account_of(*caller.wallet)
    if account_id is None:
        return 0
    async with node.db.read() as tx:
        if only is not None:
            return await read.left_of(tx, account_id, only)
        seen = await read.account(tx, account_id)
    return seen.available_units if seen is not None else 0


class Invoke(HeldCall):
    """A call whose answer comes in the envelope."""

    def __init__(  # noqa: PLR0917  (as HeldCall, and what it says about money)
        self,
        node: Node,
        route: Route,
        ticket: Ticket,
        receive: Any,
        send: Outgoing,
        money: Money,
    ) -> None:
        super().__init__(node, route, ticket, receive, send)
        self._money = money

    async def relay(self, answer: Answer) -> None:
        """Read the upstream's answer whole, end the hold, and answer."""
        if answer.status == 402 or answer.status >= 500:
            await super().relay(answer)  # refused in the words of any other call
            return
        if self.metering is not None:
            self.metering.begin(answer)
        body, whole = await answer.read(MAX_ANSWER_BYTES)
        if self.metering is not None:
            self.metering.whole(body)
        if not whole:
            raise Problem("upstream_error", "The upstream's answer is too long for this API.")
        await self.finish(self._reason(answer, body), answer.status, output_of(answer, body))

    async def finish(self, reason: str | None, status: int, output: Any) -> None:
        """End the hold and answer: charged if there is no reason not to be."""
        text = json.dumps(wrapped(status, reason is None, output)).encode()
        stored = text if len(text) <= self.node.settings.server.buffer_answer_bytes else None
        closed = await self._close(reason, ledger.Answer(200, KIND, stored))
        charged, available = closed.transfer.amount_units, closed.balance.available_units
        pairs = replies.paid_from(self.node, self.ticket.receipt, charged, available)
        money = json.dumps(await self._money.told(charged, available, pairs)).encode()
        await self.answer(closed, b"%b, %b" % (text[:-1], money[1:]))  # one object of the two

    def _receipt(self, closed: ledger.Closed | None) -> bytes:
        lines = super()._receipt(closed)
        return _BALANCE.sub(b"", lines) if self._money.limited else lines

    async def answer(self, closed: ledger.Closed, body: bytes) -> None:
        """The whole answer in one piece."""
        lines = self._receipt(closed) + b"content-length: %d\r\n" % len(body)
        self._started = True
        await self._send.whole(200, cors.expose(list(_FIELDS)), lines, body)


class InvokeTool(Invoke):
    """The same for a tool of an MCP server, judged by the JSON-RPC response."""

    async def relay(self, answer: Answer) -> None:
        if answer.status != 200:
            await super().relay(answer)
            return
        if self.metering is not None:
            self.metering.begin(answer)
        body, whole = await answer.read(MAX_ANSWER_BYTES)
        found = _response(body, streams=outcome.streams(answer.headers)) if whole else None
        if found is None:
            raise Problem("upstream_error", "The upstream's answer is no response to this call.")
        if self.metering is not None:
            self.metering.message(found, len(body))
        reason = mcp_answers.why_not_charged(found)
        clean = mcp_answers.with_meta(found, {})
        output = clean.get("result", clean.get("error"))
        await self.finish(reason, 200, output)


MESSAGE_ID: Final = 1


def _response(body: bytes, *, streams: bool) -> dict[str, Any] | None:
    """The response to our message, alone or among the events of a stream."""
    if not streams:
        found = events.object_of(body)
        return found if mcp_answers.answers(found, MESSAGE_ID) else None
    body += b"\n\n"
    while (parts := events.split(body)) is not None:
        event, body = parts
        found = events.data_of(event)
        if mcp_answers.answers(found, MESSAGE_ID):
            return found
    return None


async def again(reply: replies.Reply, money: Money) -> replies.Reply:
    """The answer to an invoke that was made before."""
    headers = reply.headers
    if money.limited:
        headers = tuple(pair for pair in headers if pair[0].lower() != "farebox-balance")
    stored = events.object_of(reply.body) if reply.status == 200 else None
    if stored is None or not stored.keys() & {"response", "receipt"}:
        return replies.Reply(reply.status, headers, reply.body)
    # Too long to keep, and there is only the receipt: what it was, and what it cost.
    told = {"success": True, **stored, "replayed": True, **await money.told(0, None, headers)}
    return replies.Reply(200, headers, json.dumps(told).encode())
