"""The words by which a sender gives the credits of a transfer to another wallet (EIP-191).

Six lines joined by a line feed, none at the end, every value in one fixed form. The first line is
no other message's here, so nothing signed for another purpose can be presented as this one:

    Farebox: credits of a transfer to another wallet
    deployment: 0f0e...                 the ledger's own id, 32 hex digits
    network: eip155:84532
    transaction: 0x...                  64 hex digits, lower case
    transfer: 0                         its place among the transaction's transfers to the gateway
    recipient: 0x...                    40 hex digits, lower case
"""

from __future__ import annotations

import re
from typing import Final

from wallet_auth.keys import contract_signed, eip191_hash, recover
from wallet_auth.request import Call

FIRST_LINE: Final = "Farebox: credits of a transfer to another wallet"
_FORMS: Final = {
    "deployment": re.compile(r"[0-9a-f]{32}"),
    "network": re.compile(r"eip155:[1-9][0-9]{0,18}"),
    "transaction": re.compile(r"0x[0-9a-f]{64}"),
    "transfer": re.compile(r"0|[1-9][0-9]{0,9}"),
    "recipient": re.compile(r"0x[0-9a-f]{40}"),
}


def message(deployment: str, network: str, tx_hash: str, n: int, recipient: str) -> str:
    """The text to sign. ``ValueError`` for a value of another form."""
    values = (deployment, network, tx_hash, str(n), recipient)
    lines = [FIRST_LINE]
    for (name, form), value in zip(_FORMS.items(), values, strict=True):
        if form.fullmatch(value) is None:
            raise ValueError(f"{name} has another form")
        lines.append(f"{name}: {value}")
    return "\n".join(lines)


async def signed_by(
    call: Call | None, network: str, sender: str, text: str, signature: bytes
) -> bool:
    """Whether ``sender`` signed ``text``: by its key, or with ``call`` as a contract (ERC-1271)."""
    digest = eip191_hash(text.encode())
    if call is not None:
        return await contract_signed(call, network, sender, digest, signature)
    return recover(digest, signature) == sender
