"""The words by which a payer gives credits to another wallet (EIP-191).

Lines joined by a line feed, none at the end, every value in one fixed form. The first line is
no other message's here, so nothing signed for another purpose can be presented as this one.

A transfer that is on chain:

    Farebox: credits of a transfer to another wallet
    deployment: 0f0e...                 the ledger's own id, 32 hex digits
    network: eip155:84532
    transaction: 0x...                  64 hex digits, lower case
    transfer: 0                         its place among the transaction's transfers to the gateway
    recipient: 0x...                    40 hex digits, lower case

A payment that has not been sent yet, by its EIP-3009 authorization:

    Farebox: credits of a payment to another wallet
    deployment, network
    asset: 0x...                        40 hex digits, lower case
    authorization: 0x...                its nonce, 64 hex digits, lower case
    recipient

The third form is not ours: ``sponsor_lines``.
"""

from __future__ import annotations

import re
from typing import Final

from wallet_auth.keys import contract_signed, eip191_hash, recover
from wallet_auth.request import Call

FIRST_LINE: Final = "Farebox: credits of a transfer to another wallet"
FIRST_LINE_OF_PAYMENT: Final = "Farebox: credits of a payment to another wallet"
FIRST_LINE_PUBLISHED: Final = "agentpmt-external-sponsor"
_FORMS: Final = {
    "deployment": re.compile(r"[0-9a-f]{32}"),
    "network": re.compile(r"eip155:[1-9][0-9]{0,18}"),
    "transaction": re.compile(r"0x[0-9a-f]{64}"),
    "transfer": re.compile(r"0|[1-9][0-9]{0,9}"),
    "recipient": re.compile(r"0x[0-9a-f]{40}"),
    "asset": re.compile(r"0x[0-9a-f]{40}"),
    "authorization": re.compile(r"0x[0-9a-f]{64}"),
    "payer": re.compile(r"0x[0-9a-f]{40}"),
    "credits": re.compile(r"[1-9][0-9]{0,18}"),
    "nonce": re.compile(r"0x[0-9a-f]{64}"),
    "tx": re.compile(r"0x[0-9a-f]{64}"),
}


def message(deployment: str, network: str, tx_hash: str, n: int, recipient: str) -> str:
    """The text to sign. ``ValueError`` for a value of another form."""
    return _text(
        FIRST_LINE,
        ": ",
        deployment=deployment,
        network=network,
        transaction=tx_hash,
        transfer=str(n),
        recipient=recipient,
    )


def payment_message(
    deployment: str, network: str, asset: str, authorization: str, recipient: str
) -> str:
    """The text to sign for a payment. ``ValueError`` for a value of another form."""
    return _text(
        FIRST_LINE_OF_PAYMENT,
        ": ",
        deployment=deployment,
        network=network,
        asset=asset,
        authorization=authorization,
        recipient=recipient,
    )


def sponsor_lines(payer: str, recipient: str, count: int, tied_to: str, value: str) -> str:
    """The published form (a hundred credits to the dollar), which names no network and no gateway.

    ``tied_to``: ``nonce`` of an authorization, which itself names those, or ``tx``, the hash of a
    transaction. ``ValueError`` for a value of another form.
    """
    if tied_to not in ("nonce", "tx"):
        raise ValueError("the lines are tied to a nonce or a tx")
    values = {"payer": payer, "recipient": recipient, "credits": str(count), tied_to: value}
    return _text(FIRST_LINE_PUBLISHED, ":", **values)


def _text(first: str, between: str, /, **values: str) -> str:
    lines = [first]
    for name, value in values.items():
        if _FORMS[name].fullmatch(value) is None:
            raise ValueError(f"{name} has another form")
        lines.append(f"{name}{between}{value}")
    return "\n".join(lines)


async def signed_by(
    call: Call | None, network: str, sender: str, text: str, signature: bytes
) -> bool:
    """Whether ``sender`` signed ``text``: by its key, or with ``call`` as a contract (ERC-1271)."""
    digest = eip191_hash(text.encode())
    if call is not None:
        return await contract_signed(call, network, sender, digest, signature)
    return recover(digest, signature) == sender
