"""EIP-2612 permits for Permit2: what x402's extension ``eip2612GasSponsoring`` carries.

A payer that never approved Permit2 signs the approval instead of sending it, and whoever settles
hands it in with the payment, in one call (``permit2.settle_calldata``). The token takes a permit
from anybody, once: what somebody else hands in first is used up, and its allowance is there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from chain.errors import Rejected
from chain.eth import is_address, selector, uint_word
from chain.schemes.eip3009 import EXPIRY_MARGIN_S

KEY: Final = "eip2612GasSponsoring"
VERSION: Final = "1"
NONCES: Final = selector("nonces(address)")

_FORMAT: Final = "invalid_eip2612_extension_format"
_NUMBER: Final = re.compile(r"[0-9]{1,78}")
_SIGNATURE: Final = re.compile(r"0x[0-9a-fA-F]{130}")


@dataclass(frozen=True, slots=True)
class Permit:
    """A signed permission for ``spender`` to move ``value_units`` of ``asset`` of ``from_``.

    Addresses are lower case; ``nonce`` is the token's count for ``from_``. Unix seconds. The
    signature is r, s and v, as a contract is handed it; whether it is right the token says.
    """

    from_: str
    asset: str
    spender: str
    value_units: int
    nonce: int
    deadline_s: int
    signature: bytes

    def words(self) -> bytes:
        """Value, deadline, r, s and v, as the proxies take them."""
        r, s, v = self.signature[:32], self.signature[32:64], self.signature[64]
        return uint_word(self.value_units) + uint_word(self.deadline_s) + r + s + uint_word(v)


def find(extensions: object) -> Permit | None:
    """The permit among the ``extensions`` of a payment. None: there is none; a client that needs
    none sends back what it was told, which has no signature.

    ``Rejected("invalid_eip2612_extension_format")`` for any odd form.
    """
    given = extensions
    for name in (KEY, "info"):
        given = given.get(name) if isinstance(given, dict) else None
    if not isinstance(given, dict) or "signature" not in given:
        return None
    if given.get("version") != VERSION:
        raise _malformed("version is not 1")
    signature = given["signature"]
    if not isinstance(signature, str) or _SIGNATURE.fullmatch(signature) is None:
        raise _malformed("signature is not 65 bytes in hex")
    return Permit(
        from_=_address(given, "from"),
        asset=_address(given, "asset"),
        spender=_address(given, "spender"),
        value_units=_number(given, "amount"),
        nonce=_number(given, "nonce"),
        deadline_s=_number(given, "deadline"),
        signature=bytes.fromhex(signature[2:]),
    )


def check(permit: Permit, *, owner: str, token: str, spender: str, units: int, now_s: int) -> None:
    """Whether it is the approval that a payment of ``owner`` needs, neither less nor more: the
    proxies refuse another amount. ``Rejected``, in the official order."""
    refusals = (
        (permit.from_ != owner, "eip2612_from_mismatch", "is of another wallet"),
        (permit.asset != token, "eip2612_asset_mismatch", "is for another token"),
        (permit.spender != spender, "eip2612_spender_not_permit2", "permits another than Permit2"),
        (permit.deadline_s < now_s + EXPIRY_MARGIN_S, "eip2612_deadline_expired", "is too late"),
        (permit.value_units != units, "permit2_2612_amount_mismatch", "is for another amount"),
    )
    for refused, code, why in refusals:
        if refused:
            raise Rejected(code, f"the EIP-2612 permit {why}")


def _address(table: dict[str, Any], name: str) -> str:
    found = table.get(name)
    if not isinstance(found, str) or not is_address(found):
        raise _malformed(f"{name} is not an address")
    return found.lower()


def _number(table: dict[str, Any], name: str) -> int:
    text = table.get(name)
    if not isinstance(text, str) or _NUMBER.fullmatch(text) is None or int(text) >= 2**256:
        raise _malformed(f"{name} is not a string of decimal digits below 2^256")
    return int(text)


def _malformed(detail: str) -> Rejected:
    return Rejected(_FORMAT, f"{KEY}: {detail}")
