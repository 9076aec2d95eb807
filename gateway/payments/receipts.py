"""Signed receipts (x402 extension ``offer-receipt``): proof of a payment that needs no gateway.

A receipt is EIP-712 typed data in the form of the specification (its domain is always chain 1,
whatever the payment was made on). It is signed by a key of the deployment that all nodes derive
from the MAC keys they share; ``GET v1/receipts/keys`` says which address that is. It is the same
whenever it is asked for, since it tells when the payment ended.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
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
_DOMAIN: Final = keccak256(
    _DOMAIN_TYPE + keccak256(b"x402 receipt") + keccak256(b"1") + (1).to_bytes(32, "big")
)
_TYPE: Final = keccak256(
    b"Receipt(uint256 version,string network,string resourceUrl,string payer,uint256 issuedAt,"
    b"string transaction)"
)


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


def digest(payload: Mapping[str, Any]) -> bytes:
    """The EIP-712 digest of a receipt's payload. Raises ``KeyError``, ``TypeError``."""
    words = [int(payload["version"]).to_bytes(32, "big")]
    words += [keccak256(payload[name].encode()) for name in ("network", "resourceUrl", "payer")]
    words.append(int(payload["issuedAt"]).to_bytes(32, "big"))
    words.append(keccak256(payload["transaction"].encode()))
    return eip712_hash(_DOMAIN, keccak256(_TYPE + b"".join(words)))


def signed(keys: Keys, receipt: Receipt) -> dict[str, Any]:
    """``extensions`` of a settlement's response: the receipt with its signature."""
    payload = receipt.payload()
    key = _key(keys.secrets[keys.current], keys.deployment)
    signature = sign_digest(private_key(key), digest(payload))
    artifact = {"format": "eip712", "payload": payload, "signature": "0x" + signature.hex()}
    return {EXTENSION: {"info": {"receipt": artifact}}}


def signer_of(artifact: Mapping[str, Any]) -> str | None:
    """The address that signed a receipt; None if it is malformed. Needs nothing else."""
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
