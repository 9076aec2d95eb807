"""Credits for another wallet than the one that pays: how the payer says so, and who believes it.

A payment proves its payer and nobody else, and it can be relayed. So its credits go to another
wallet only if the payer signed that, for this one authorization or this one transfer: in our own
words (``wallet_auth/recipient.py``), or in the lines that other gateways have published.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from chain.errors import ChainError
from chain.schemes import eip3009
from gateway.accounts import wallets
from gateway.errors import NextAction, Problem
from gateway.payments import claims
from gateway.payments.journal import AuthKey
from gateway.payments.order import Gift, Order, key_of
from gateway.payments.rails import Rails, refused
from gateway.payments.wire import Presented
from gateway.settings import Settings
from wallet_auth import recipient as giving
from wallet_auth.request import Call

SIGNATURES: Final = frozenset(("payer_signature", "sponsor_signature"))
MEMBERS: Final = SIGNATURES | {"payer_wallet_address"}
UNITS_PER_LINE: Final = 10_000
"""Units of a credit in the published lines: they know no other rate."""
_SIGNATURE: Final = re.compile(r"0x(?:[0-9a-fA-F]{2}){1,4096}")


def signature_in(wanted: dict[str, Any]) -> bytes | None:
    """The payer's signature, under our name or the published one.

    Raises ``Problem("invalid_request")``.
    """
    named = [name for name in sorted(SIGNATURES) if wanted.get(name) is not None]
    if not named:
        return None
    if len(named) > 1:
        raise Problem("invalid_request", "payer_signature and sponsor_signature are one: send one.")
    value = wanted[named[0]]
    if not isinstance(value, str) or _SIGNATURE.fullmatch(value) is None:
        raise Problem("invalid_request", f"{named[0]} is 0x and hex digits.")
    return bytes.fromhex(value[2:])


def published(payer: str, recipient: str, units: int, tied_to: str, value: str) -> list[str]:
    """The published lines, if the amount is a whole number of their credits."""
    count, rest = divmod(units, UNITS_PER_LINE)
    return [] if rest else [giving.sponsor_lines(payer, recipient, count, tied_to, value)]


async def signed(  # noqa: PLR0917  (a signature, and what it may be of)
    rails: Rails, network: str, payer: str, texts: Sequence[str], signature: bytes, call: Call
) -> bool:
    """Whether the payer signed one of the texts. ``call`` asks a contract, which is a wallet on its
    own network and has no key. Raises ``ChainError``."""
    is_key = await claims.chain_of(rails.rpcs[network], payer) == ""
    ask = None if is_key else call
    for text in texts:
        if await giving.signed_by(ask, network, payer, text, signature):
            return True
    return False


def text_of(rails: Rails, presented: Presented, recipient: str) -> str:
    """The words that give the credits of a payment to another wallet. Raises ``Problem``."""
    return _text(rails, key_of(rails.chain_of(presented), presented), recipient)


def _text(rails: Rails, key: AuthKey, recipient: str) -> str:
    deployment = rails.keys.deployment
    return giving.payment_message(deployment, key.network, key.asset, key.nonce, recipient)


async def accept(rails: Rails, order: Order, gift: Gift) -> tuple[Order, int | None]:
    """The order with its recipient, and that one's account if it has one.

    Raises ``Problem``, with nothing claimed or sent: ``payer_signature_required`` if the payer did
    not sign that, ``dependency_unavailable`` if nobody can tell.
    """
    auth = order.auth
    text = _text(rails, order.key, gift.recipient)
    lines = []
    if isinstance(auth, eip3009.Authorization):  # whose nonces they name
        lines = published(auth.from_, gift.recipient, auth.value_units, "nonce", auth.nonce)
    try:
        network, texts = order.chain.caip2, [text, *lines]
        good = await signed(rails, network, auth.from_, texts, gift.signature, gift.call)
        where = await claims.chain_of(rails.rpcs[network], gift.recipient)
    except ChainError as error:
        raise refused(error) from error
    if not good:
        raise required(rails.settings, auth.from_, gift.recipient, text, missing=False)
    async with rails.db.read() as tx:
        account_id = await wallets.find(tx, gift.recipient, where)
    return replace(order, given=(gift.recipient, where)), account_id


def required(
    settings: Settings, payer: str, recipient: str, text: str, *, missing: bool
) -> Problem:
    """The refusal that says what to sign."""
    said = "is missing" if missing else "is not the sender's, or of other words"
    return Problem(
        "payer_signature_required",
        f"The money comes from {payer}; to credit {recipient} that wallet signs the "
        f"message (EIP-191 personal_sign), and payer_signature {said}.",
        members={"message": text, "payer": payer},
        next_actions=next_actions(settings),
    )


def next_actions(settings: Settings) -> list[NextAction]:
    """What to send once the message is signed."""
    return [
        NextAction(
            "POST",
            f"{settings.server.public_url}/farebox/v1/credits/purchase",
            "the same body with payer_signature: the signature of `message`",
            body={"payer_signature": "<the payer's signature of message>"},
        )
    ]
