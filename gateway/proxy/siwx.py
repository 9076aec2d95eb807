"""Sign-in-with-x on a priced route: the challenge that its 402 carries, and who answers it.

A challenge is for one request and needs no row. What it says of the body is a digest, so the body
of a request that pays nothing is read as well, up to 64 KiB and for a moment; of a longer one, or
one whose length is not told, it says nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import lru_cache
from hashlib import sha256
from typing import Any, Final

from chain.errors import ChainError
from gateway.errors import Problem
from gateway.fields import values
from gateway.middleware import content_length, has_body, read_body
from gateway.money import format_credits, format_usd
from gateway.node import Node, unavailable
from gateway.proxy.body import CONTENT_DIGEST, Body
from gateway.proxy.target import Target
from wallet_auth import AuthError, Call, Signer, siwx

Receive = Callable[[], Awaitable[Any]]
PREFIX: Final = "invalid_siwx_"
"""Codes of proofs that failed. They are answered with fresh offers and a fresh challenge."""
UNREAD: Final = b"?"
"""Instead of a digest: the body did not come, so no challenge can be made for it."""
_PATIENCE_S: Final = 5


def refused(code: str) -> bool:
    """Whether a refusal is of a proof like these."""
    return code.startswith(PREFIX)


async def prove(  # noqa: PLR0917  (one caller)
    node: Node, method: str, target: Target, headers: Any, now_s: int, ask: Call
) -> tuple[Signer, int]:
    """Who answered our challenge for this request, and what it may cost at most, in units.

    The body has not been read: ``check_digests`` compares it. Raises ``Problem``.
    """
    found = values(headers, siwx.HEADER)
    if len(found) > 1:
        raise Problem("identity_conflict", "SIGN-IN-WITH-X may be sent only once.")
    asked = _asked(node, method, target, None)
    try:
        return await siwx.verify(found[0], node.rails.keys, asked, now_s, ask)
    except AuthError as error:
        raise Problem(error.code, error.detail) from None
    except ChainError as error:
        raise unavailable(error) from error


def extension(  # noqa: PLR0917  (one caller)
    node: Node,
    method: str,
    target: Target,
    body: bytes | None,
    ceiling_units: int,
    now_s: int,
    beside: str,
) -> str:
    """``extensions`` of a 402 as JSON text: ``beside``, the members that stand there for every
    request, and this one where a challenge can be made."""
    if body == UNREAD:
        return f"{{{beside}}}"
    text = challenge(node, method, target, body, ceiling_units, now_s)
    return f'{{"{siwx.EXTENSION}":{text},{beside}}}'


def challenge(  # noqa: PLR0917  (a request, and what it may cost)
    node: Node, method: str, target: Target, body: bytes | None, ceiling_units: int, now_s: int
) -> str:
    """A challenge for this request, as JSON text."""
    settings = node.settings
    return siwx.challenge(
        node.rails.keys,
        _asked(node, method, target, body),
        _chains(tuple(chain.caip2 for chain in settings.chains)),
        ceiling_units,
        _words(ceiling_units, settings.credits.per_usd),
        (now_s, now_s + settings.server.offer_timeout_s),
    )


def _asked(node: Node, method: str, target: Target, body: bytes | None) -> siwx.Asked:
    return siwx.Asked(method, target.raw, node.settings.server.public_url, node.authority, body)


_chains = lru_cache(maxsize=8)(siwx.supported)


@lru_cache(maxsize=256)  # as many as there are prices
def _words(units: int, per_usd: int) -> str:
    return f"{format_usd(units)} ({format_credits(units, per_usd)} credits)"


def tag_of(body: Body) -> bytes | None:
    """What a challenge says of a body that has been read."""
    if body.size > siwx.MAX_BODY_BYTES:
        return None
    return body.digests[CONTENT_DIGEST] if body.size else b""


async def look(receive: Receive, headers: Any, came: bytes | None) -> bytes | None:
    """The same for a request that is about to be asked for money. ``came``: its whole body, if it
    is here already."""
    if came is not None:
        return tag(came)
    if not has_body(headers):
        return b""
    length = content_length(headers)
    if length is None or length > siwx.MAX_BODY_BYTES:
        return None
    try:
        async with asyncio.timeout(_PATIENCE_S):
            return tag(await read_body(receive, headers, siwx.MAX_BODY_BYTES))
    except (TimeoutError, Problem):
        return UNREAD  # the 402 itself needs no body


def tag(body: bytes) -> bytes | None:
    """What a challenge says of a body, given whole."""
    if len(body) > siwx.MAX_BODY_BYTES:
        return None
    return sha256(body).digest() if body else b""
