"""The 402 of a request that says nothing about who sends it: the answer that is made most often.

Little of it changes from one request to the next: the address, the tokens of the offers, what the
extensions say, the id for the log. The rest is made once for a route and a price, by the very code
that makes every other 402 (``challenge.for_call`` and ``problem_answer``), from parts drawn at
random; the answer is cut where those stand, and there the parts of each request are put in.
"""

from __future__ import annotations

import re
import secrets
from base64 import b64decode
from binascii import b2a_base64
from collections.abc import Callable
from functools import lru_cache
from json import dumps, loads
from operator import itemgetter
from typing import Any, NamedTuple

from gateway.middleware import problem_answer
from gateway.payments import challenge, offers
from gateway.settings import Settings


def answer(
    settings: Settings,
    keys: offers.Keys,
    asked: offers.Asked,
    now_s: int,
    request_id: str,
    *,
    at_most: bool = False,
    description: str = "",
    extensions: str = "",
    floors: offers.Floors = (),
) -> tuple[bytes, bytes]:
    """Header lines and body of the 402, for ``Outgoing.whole(402, (), *answer(…))``.

    Byte for byte what is sent when the ``Problem`` of ``challenge.for_call`` is raised for the same
    request by a program (``Vary: Accept`` is among the lines). Only the tokens differ, as they do
    between any two.
    """
    form = _form(
        offers.Same(settings),
        (asked.price_units, asked.upto),
        at_most,
        description,
        bool(extensions),
        floors,
    )
    tokens = offers.seal_each(keys, asked, form.covered, now_s + settings.server.offer_timeout_s)
    parts = (
        _inside(asked.target.decode("ascii")),
        _inside(asked.method),
        extensions,
        request_id,
        *tokens,
    )
    required = form.required.filled(parts).encode()
    body = form.body.filled(parts).encode()
    return form.lines % (b2a_base64(required, newline=False), len(body)), body


class _Text(NamedTuple):
    """A text with ``%s`` in its holes, and what finds the parts that go there."""

    text: str
    chosen: Callable[[tuple[str, ...]], Any]

    def filled(self, parts: tuple[str, ...]) -> str:
        text: str = self.text % self.chosen(parts)
        return text


class _Form(NamedTuple):
    """All of an answer but the parts of one request."""

    covered: tuple[bytes, ...]
    """The terms of the offers, as their tokens cover them."""
    required: _Text
    """What PAYMENT-REQUIRED holds."""
    lines: bytes
    """The header lines, with holes for PAYMENT-REQUIRED and the length of the body."""
    body: _Text


# Bounded: prices come from callers too, where they depend on what is asked.
@lru_cache(maxsize=512)
def _form(  # noqa: PLR0917  (all that an answer hangs on)
    same: offers.Same,
    price: tuple[int, bool],
    at_most: bool,
    description: str,
    extended: bool,
    floors: offers.Floors,
) -> _Form:
    settings, price_units = same.settings, price[0]
    method, target, request_id, extensions = (secrets.token_hex(16) for _ in range(4))
    form_asked = offers.Asked(method, b"/" + target.encode(), price_units, upto=price[1])
    problem = challenge.for_call(
        settings,
        offers.Keys("", {bytes(4): secrets.token_bytes(32)}, bytes(4)),
        form_asked,
        0,
        at_most=at_most,
        description=description,
        extensions=dumps(extensions) if extended else "",
        floors=floors,
    )
    problem.headers["Vary"] = "Accept"
    required = b64decode(problem.headers["PAYMENT-REQUIRED"]).decode()
    tokens = [offer["extra"]["offer"] for offer in loads(required)["accepts"]]
    # In the order in which ``answer`` has the true ones.
    parts = ("/" + target, method, dumps(extensions), request_id, *tokens)
    _, fields, body = problem_answer(problem, request_id)
    variable = {b"payment-required": b"%b", b"content-length": b"%d"}
    return _Form(
        covered=tuple(
            map(
                offers.covered,
                offers.terms_for_asked(settings, form_asked, price_units, price_units, floors),
            )
        ),
        required=_cut(required, parts),
        lines=b"".join(
            b"%b: %b\r\n" % (name, variable.get(name) or value.replace(b"%", b"%%"))
            for name, value in fields
        ),
        body=_cut(body.decode(), parts),
    )


def _cut(text: str, parts: tuple[str, ...]) -> _Text:
    """``text`` with holes where the parts stand."""
    pieces = re.split("(" + "|".join(map(re.escape, parts)) + ")", text)
    fixed = (piece.replace("%", "%%") for piece in pieces[::2])
    return _Text("%s".join(fixed), itemgetter(*map(parts.index, pieces[1::2])))


def _inside(text: str) -> str:
    """Text as it stands between the quotes of a JSON string."""
    if text.isascii() and text.isprintable() and '"' not in text and "\\" not in text:
        return text
    return dumps(text)[1:-1]
