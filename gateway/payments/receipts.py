"""Signed offers and receipts (x402 extension ``offer-receipt``): proofs that need no gateway.

Both are EIP-712 typed data in the form of the specification (their domain is always chain 1,
whatever is paid on). They are signed by a key of the deployment that all nodes derive from the MAC
keys they share; ``GET v1/receipts/keys`` says which address that is. A receipt is the same whenever
it is asked for, since it tells when the payment ended. Offers are signed where the operator wants
them (``server.sign_offers``), since a signature costs more than all the rest of a 402.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from gateway.payments.offers import Keys
from wallet_auth.keys import (
    CURVE_ORDER,
    address_of,
    checksum,
    eip712_hash,
    keccak256,
    private_key,
    recover,
    sign_digest,
)

EXTENSION: Final = "offer-receipt"
_DOMAIN_TYPE: Final = keccak256(b"EIP712Domain(string name,string version,uint256 chainId)")


def _domain(name: bytes) -> bytes:
    words = (_DOMAIN_TYPE, keccak256(name), keccak256(b"1"), (1).to_bytes(32, "big"))
    return keccak256(b"".join(words))


_MEMBERS: Final = {
    "Receipt": "uint256 version,string network,string resourceUrl,string payer,uint256 issuedAt,"
    "string transaction",
    "Offer": "uint256 version,string resourceUrl,string scheme,string network,string asset,"
    "string payTo,string amount,uint256 validUntil",
}
_DOMAINS: Final = {"Receipt": _domain(b"x402 receipt"), "Offer": _domain(b"x402 offer")}
_TYPES: Final = {name: keccak256(f"{name}({each})".encode()) for name, each in _MEMBERS.items()}
_FIELDS: Final = {
    name: [each.partition(" ")[::2] for each in members.split(",")]
    for name, members in _MEMBERS.items()
}


@dataclass(frozen=True, slots=True)
class Receipt:
    """Who paid for what, where and when. ``transaction`` empty: nothing was sent."""

    network: str
    resource_url: str
    payer: str
    issued_at_s: int
    transaction: str

    def payload(self) -> dict[str, Any]:
        """The members that are signed, as the specification names them."""
        return {
            "version": 1,
            "network": self.network,
            "resourceUrl": self.resource_url,
            "payer": self.payer,
            "issuedAt": self.issued_at_s,
            "transaction": self.transaction,
        }


@dataclass(frozen=True, slots=True)
class Offer:
    """One of the terms of a 402, and until when they can be paid."""

    resource_url: str
    network: str
    asset: str
    pay_to: str
    amount_units: int
    valid_until_s: int
    scheme: str = "exact"

    def payload(self) -> dict[str, Any]:
        """The members that are signed, spelled as in ``accepts``."""
        return {
            "version": 1,
            "resourceUrl": self.resource_url,
            "scheme": self.scheme,
            "network": self.network,
            "asset": checksum(self.asset),
            "payTo": checksum(self.pay_to),
            "amount": str(self.amount_units),
            "validUntil": self.valid_until_s,
        }


def digest(payload: Mapping[str, Any]) -> bytes:
    """The EIP-712 digest of a payload: an offer has a scheme, a receipt has none. Raises
    ``KeyError``, ``TypeError``."""
    name = "Offer" if "scheme" in payload else "Receipt"
    words = [_TYPES[name]]
    for kind, member in _FIELDS[name]:
        value = payload[member]
        words.append(
            keccak256(value.encode()) if kind == "string" else int(value).to_bytes(32, "big")
        )
    return eip712_hash(_DOMAINS[name], keccak256(b"".join(words)))


def signed(keys: Keys, receipt: Receipt) -> dict[str, Any]:
    """``extensions`` of a settlement's response: the receipt with its signature."""
    return {EXTENSION: {"info": {"receipt": _artifact(keys, receipt.payload())}}}


def signed_offers(keys: Keys, offers: Sequence[tuple[int, Offer]]) -> dict[str, Any]:
    """``extensions`` of a 402: signed offers, and where each stands in ``accepts``."""
    made = [{**_artifact(keys, offer.payload()), "acceptIndex": index} for index, offer in offers]
    return {EXTENSION: {"info": {"offers": made}, "schema": {}}}


def _artifact(keys: Keys, payload: dict[str, Any]) -> dict[str, Any]:
    key = _key(keys.secrets[keys.current], keys.deployment)
    signature = sign_digest(private_key(key), digest(payload))
    return {"format": "eip712", "payload": payload, "signature": "0x" + signature.hex()}


def signer_of(artifact: Mapping[str, Any]) -> str | None:
    """The address that signed an offer or a receipt; None if it is malformed."""
    try:
        signature = bytes.fromhex(artifact["signature"].removeprefix("0x"))
        return recover(digest(artifact["payload"]), signature)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None


def addresses(keys: Keys) -> list[str]:
    """Whose signatures are this deployment's: the key in use, then older ones."""
    order = sorted(keys.secrets, key=lambda name: name != keys.current)
    return [
        checksum(address_of(private_key(_key(keys.secrets[name], keys.deployment))))
        for name in order
    ]


@lru_cache(maxsize=16)  # as many as a deployment has keys
def _key(secret: bytes, deployment: str) -> bytes:
    text = b"farebox-receipt-1" + deployment.encode()
    number = int.from_bytes(hmac.digest(secret, text, "sha256"), "big")
    return (number % (CURVE_ORDER - 1) + 1).to_bytes(32, "big")
