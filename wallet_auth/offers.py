"""The paying half of x402 v2: read a 402, choose an offer, sign the authorization. Pure.

Only ``exact`` over EIP-3009 (``TransferWithAuthorization``) is spoken. A client trusts nothing in a
402: which token an address is comes from the table below, never from the offer, and an offer that
is odd in any member is passed over. Amounts: ``amount`` is in the token's base units, everything
named ``_units`` in micro-USD (the tokens of the table are worth a dollar).
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from coincurve import PrivateKey

from wallet_auth import keys
from wallet_auth.strict import base64_bytes, json_object

MAX_HEADER: Final = 65536
MAX_OFFERS: Final = 32
MAX_TIMEOUT_S: Final = 600
"""Longest an authorization is made valid for, whatever the 402 asks: so long it can be cashed."""
_NUMBER: Final = re.compile(r"[0-9]{1,78}")
_ADDRESS: Final = re.compile(r"0x[0-9a-fA-F]{40}")
_NETWORK: Final = re.compile(r"eip155:([1-9][0-9]{0,18})")
_USD: Final = re.compile(r"\$?([0-9]{1,12})(?:\.([0-9]{1,6}))?")
_FLOWS: Final = (None, "authorization", "upfront")

_TRANSFER_TYPE: Final = keys.keccak256(
    b"TransferWithAuthorization(address from,address to,uint256 value,"
    b"uint256 validAfter,uint256 validBefore,bytes32 nonce)"
)


@dataclass(frozen=True, slots=True)
class Token:
    """A dollar token with EIP-3009: its address in lower case and its EIP-712 domain."""

    address: str
    name: str
    version: str
    decimals: int = 6


TOKENS: Final[Mapping[str, tuple[Token, ...]]] = {
    "eip155:8453": (Token("0x833589fcd6edb6e08f4c7c32d4f71b54bda02913", "USD Coin", "2"),),
    "eip155:84532": (Token("0x036cbd53842c5426634e7929541ec2318f3dcf7e", "USDC", "2"),),
    "eip155:1": (Token("0xa0b86991c6218b36c1d19d4a2e9eb0ce3606eb48", "USD Coin", "2"),),
    "eip155:137": (Token("0x3c499c542cef5e3811e1192ce70d8cc03d5c3359", "USD Coin", "2"),),
    "eip155:42161": (Token("0xaf88d065e77c8cc2239327c5edb3a432268e5831", "USD Coin", "2"),),
    "eip155:421614": (Token("0x75faf114eafb1bdbe2f0316df893fd58ce46aa4d", "USD Coin", "2"),),
    "eip155:43114": (Token("0xb97ef9ef8734c71904d8002f8b6bc66dd9c48a6e", "USD Coin", "2"),),
    "eip155:42220": (Token("0xceba9300f2b948710d2653dd7b07f33a8b32118c", "USDC", "2"),),
}
"""USDC by network, as the official x402 clients know it."""


@dataclass(frozen=True, slots=True)
class Offer:
    """One member of ``accepts`` that can be paid."""

    terms: Mapping[str, Any]
    """The offer as it came, to be echoed unchanged (its ``extra`` may hold the server's token)."""
    network: str
    chain_id: int
    token: Token
    amount: int
    amount_units: int
    pay_to: str
    timeout_s: int


@dataclass(frozen=True, slots=True)
class Payment:
    """A signed authorization, ready to be sent. The header is as good as the money until then."""

    header: str
    """The value of ``PAYMENT-SIGNATURE``."""
    offer: Offer
    payer: str
    nonce: str
    valid_before_s: int

    def __repr__(self) -> str:
        return f"Payment({self.offer.network}, {self.offer.amount_units} units, nonce={self.nonce})"


def usd_units(amount: str) -> int:
    """``"1"``, ``"0.25"`` or ``"$0.25"`` in micro-USD. Raises ``ValueError``."""
    match = _USD.fullmatch(amount)
    if match is None:
        raise ValueError(f"not an amount in USD with at most six decimals: {amount!r}")
    return int(match[1]) * 1_000_000 + int((match[2] or "").ljust(6, "0"))


def read_header(value: str) -> dict[str, Any]:
    """The JSON object in a base64 header of x402. Strict (``wallet_auth/strict.py``); raises
    ``ValueError``."""
    if len(value) > MAX_HEADER:
        raise ValueError("not a header of a sensible size")
    return json_object(base64_bytes(value.encode("ascii")))


def write_header(value: Mapping[str, Any]) -> str:
    """The inverse of ``read_header``: compact JSON in standard base64."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(text.encode("ascii")).decode("ascii")


def choose(
    challenge: Mapping[str, Any],
    *,
    cap_units: int,
    networks: Collection[str] | None = None,
    tokens: Mapping[str, Sequence[Token]] = TOKENS,
) -> tuple[Offer | None, list[str]]:
    """The first offer that may be paid, and why those before it were not.

    ``challenge`` is the decoded ``PAYMENT-REQUIRED``; ``networks`` limits the table's networks.
    """
    accepts = challenge.get("accepts")
    if challenge.get("x402Version") != 2 or not isinstance(accepts, list):
        return None, ["not an x402 v2 challenge"]
    reasons: list[str] = []
    for n, terms in enumerate(accepts[:MAX_OFFERS]):
        try:
            return _offer(terms, cap_units, networks, tokens), reasons
        except ValueError as reason:
            reasons.append(f"offer {n}: {reason}")
    return None, reasons


def _offer(
    terms: object,
    cap_units: int,
    networks: Collection[str] | None,
    tokens: Mapping[str, Sequence[Token]],
) -> Offer:
    if not isinstance(terms, dict):
        raise ValueError("is not an object")
    network, extra = terms.get("network"), terms.get("extra") or {}
    if terms.get("scheme") != "exact" or not isinstance(extra, dict):
        raise ValueError("is not of the scheme exact")
    if extra.get("assetTransferMethod") not in (None, "eip3009"):
        raise ValueError("is not paid by EIP-3009")
    if extra.get("paymentFlow") not in _FLOWS:
        raise ValueError("has an unknown payment flow")
    chain = _NETWORK.fullmatch(network) if isinstance(network, str) else None
    if chain is None or (networks is not None and network not in networks):
        raise ValueError("is on a network that is not allowed")
    asset = _matching(terms.get("asset"), _ADDRESS, "asset").lower()
    token = next((t for t in tokens.get(chain[0], ()) if t.address == asset), None)
    if token is None or token.decimals < 6:
        raise ValueError("is in a token that is not known")
    if (extra.get("name", token.name), extra.get("version", token.version)) != (
        token.name,
        token.version,
    ):
        raise ValueError("names another EIP-712 domain than the token has")
    amount = int(_matching(terms.get("amount"), _NUMBER, "amount"))
    amount_units = -(-amount // 10 ** (token.decimals - 6))
    if not 0 < amount_units <= cap_units:
        raise ValueError(f"asks {amount_units} micro-USD, {cap_units} may be paid")
    pay_to = _matching(terms.get("payTo"), _ADDRESS, "payTo").lower()
    timeout_s = terms.get("maxTimeoutSeconds")
    if type(timeout_s) is not int or timeout_s <= 0 or int(pay_to, 16) == 0:
        raise ValueError("has no timeout or no payee")
    return Offer(
        terms=terms,
        network=chain[0],
        chain_id=int(chain[1]),
        token=token,
        amount=amount,
        amount_units=amount_units,
        pay_to=pay_to,
        timeout_s=min(timeout_s, MAX_TIMEOUT_S),
    )


def authorize(
    key: PrivateKey, challenge: Mapping[str, Any], offer: Offer, *, now_s: int, nonce: bytes
) -> Payment:
    """Sign the transfer ``offer`` asks for and wrap it as ``PAYMENT-SIGNATURE``.

    ``nonce`` is 32 random bytes; the token takes it once. Offer, resource and extensions are
    echoed as they came: servers compare them.
    """
    payer = keys.address_of(key)
    valid_before_s = now_s + offer.timeout_s
    digest = transfer_digest(offer, payer, 0, valid_before_s, nonce)
    payload: dict[str, Any] = {
        "x402Version": 2,
        "payload": {
            "authorization": {
                "from": keys.checksum(payer),
                "to": keys.checksum(offer.pay_to),
                "value": str(offer.amount),
                "validAfter": "0",
                "validBefore": str(valid_before_s),
                "nonce": "0x" + nonce.hex(),
            },
            "signature": "0x" + keys.sign_digest(key, digest).hex(),
        },
        "accepted": offer.terms,
    }
    for member in ("resource", "extensions"):
        if challenge.get(member) is not None:
            payload[member] = challenge[member]
    return Payment(
        header=write_header(payload),
        offer=offer,
        payer=payer,
        nonce="0x" + nonce.hex(),
        valid_before_s=valid_before_s,
    )


def transfer_digest(
    offer: Offer, payer: str, valid_after_s: int, valid_before_s: int, nonce: bytes
) -> bytes:
    """The EIP-712 digest of ``TransferWithAuthorization`` (EIP-3009) for ``offer``."""
    if len(nonce) != 32:
        raise ValueError("an authorization nonce is 32 bytes")
    token = offer.token
    return keys.eip712_hash(
        keys.eip712_domain(token.name, token.version, offer.chain_id, token.address),
        keys.keccak256(
            _TRANSFER_TYPE
            + keys.address_word(payer)
            + keys.address_word(offer.pay_to)
            + offer.amount.to_bytes(32, "big")
            + valid_after_s.to_bytes(32, "big")
            + valid_before_s.to_bytes(32, "big")
            + nonce
        ),
    )


def _matching(value: object, form: re.Pattern[str], member: str) -> str:
    if not isinstance(value, str) or not form.fullmatch(value):
        raise ValueError(f"has no proper {member}")
    return value
