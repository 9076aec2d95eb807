"""How often a route may be asked, and how often a caller's calls may end uncharged.

Who has proved a wallet is counted by its account, everybody else by the client's address: nobody,
a payment alone (a payer is not a login, and anybody can name one), a proof that fails. Without a
proof the address is counted before anything is parsed or verified. All refusals come before the
hold, so they burn nothing. Header fields: draft-ietf-httpapi-ratelimit-headers-11.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from gateway.db import DatabaseUnavailable
from gateway.errors import Problem
from gateway.forms import RateLimit
from gateway.limits import Client, Flight, Standing
from gateway.node import Node, unavailable
from gateway.proxy.identity import Caller, Headers
from gateway.proxy.routes_table import Route

Send = Callable[[Any], Awaitable[None]]


class Pace:
    """One request to a limited route: whether it was counted, and what that left."""

    __slots__ = ("_client", "_free", "_limit", "_node", "_route", "counted", "fields")

    def __init__(self, node: Node, route: Route, limit: RateLimit, client: Client) -> None:
        self._node = node
        self._route = route.id
        self._free = route.free
        self._limit = limit
        self._client = client
        self.counted = False
        self.fields: dict[str, str] = {}

    async def arrived(self, headers: Headers) -> None:
        """Before anything else. Raises ``Problem("rate_limited")``."""
        if self._free or not any(name == b"signature-input" for name, _ in headers):
            await self._by_address()

    async def identified(self, caller: Caller) -> None:
        """As soon as it is known who calls. Raises ``Problem("rate_limited")``."""
        if self.counted:
            return
        if caller.wallet is None:
            await self._by_address()
            return
        try:
            account_id = await self._node.account_of(*caller.wallet)
        except DatabaseUnavailable as error:
            raise unavailable(error) from error
        await self._count("account", str(account_id or "/".join(caller.wallet)))

    async def refused(self, problem: Problem) -> Problem:
        """A refusal with the fields; the limit's own when it was for a proof that failed."""
        if not self.counted:
            try:
                await self._by_address()
            except Problem as limited:
                problem = limited
        problem.headers.update(self.fields)
        return problem

    async def _by_address(self) -> None:
        await self._count("address", self._client.address)

    async def _count(self, kind: str, who: str) -> None:
        self.counted = True
        key = f"route:{self._route}:{kind}:{who}"
        standing = await self._node.limits.take(key, self._limit)
        self.fields = _fields(kind, self._limit, standing)
        if not standing.allowed:
            raise _too_many(
                f"This route takes {self._limit.count} requests in {self._limit.window_s} seconds "
                f"from one {kind}.",
                self.fields,
                standing,
            )

    def told(self) -> list[tuple[bytes, bytes]]:
        """The fields as every answer to a counted request carries them."""
        return [(name.lower().encode(), value.encode()) for name, value in self.fields.items()]


def refuse_uncharged(node: Node, account_id: int | None, client: Client) -> None:
    """Before the hold: too many calls of this account or client cost work and no money.

    Raises ``Problem("rate_limited")``.
    """
    found = node.limits.too_many_uncharged(*_keys(account_id, client))
    if found is not None:
        limit, standing = found
        raise _too_many(
            f"More than {limit.count} of your calls ended uncharged within a minute, or too many "
            "are on their way.",
            _fields("uncharged", limit, standing),
            standing,
        )


def take_off(node: Node, account_id: int, client: Client) -> Flight:
    """A call begins. Right after ``refuse_uncharged``, calls that come at once are told apart."""
    return node.limits.take_off(*_keys(account_id, client))


def ended_uncharged(node: Node, account_id: int, client: Client) -> None:
    """The upstream was called and nothing was charged for it."""
    node.limits.ended_uncharged(*_keys(account_id, client))


def _keys(account_id: int | None, client: Client) -> tuple[str | None, str | None]:
    # An address that many share says nothing about one of them.
    return (
        f"account:{account_id}" if account_id is not None else None,
        f"address:{client.address}" if client.single else None,
    )


def _fields(policy: str, limit: RateLimit, standing: Standing) -> dict[str, str]:
    return {
        "RateLimit-Policy": f'"{policy}";q={limit.count};w={limit.window_s}',
        "RateLimit": f'"{policy}";r={standing.remaining};t={_seconds(standing.reset_ms)}',
    }


def _too_many(detail: str, fields: dict[str, str], standing: Standing) -> Problem:
    headers = {"Retry-After": str(_seconds(standing.reset_ms)), **fields}
    return Problem("rate_limited", detail, headers=headers)


def _seconds(ms: int) -> int:
    return -(-ms // 1000)
