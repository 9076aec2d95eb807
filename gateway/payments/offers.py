"""What can be paid, and the token that ties a payment to the offer it answers.

``accepts[].extra.offer`` = base64url(key id, expiry, price, salt, MAC). The MAC covers the
deployment, method, raw target, terms and all that stands before it, so an offer needs no row:
whoever brings the token back was given this offer, for this request, at this price. It locks the
price until the offer expires, and it is the secret that tells the first presenter of an
authorization from somebody who read it in the chain's calldata (an authorization is public once it
is settled). The salt makes it one: no two 402s give the same token, whoever asks for the same
request in the same second.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import struct
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Final

from pydantic import SecretStr

from chain.networks import Asset
from gateway.db import Database
from gateway.errors import Problem
from gateway.settings import Chain, Settings
from wallet_auth import mac
from wallet_auth.keys import address_of, private_key

CALL: Final = "call"  # the change that a call leaves never expires
CREDITS: Final = "credits"  # a pack expires when its operator says
EIP3009: Final = "eip3009"
PERMIT2: Final = "permit2"
UPTO: Final = "upto"  # the scheme of that name, by Permit2
UPTO_S: Final = 3_600
"""How long its signature is good, which is settled after the call. The offer lives as any does."""

_HEAD: Final = struct.Struct(">4sQQ12s")  # key id, expiry in seconds, price in units, salt
_SALT_BYTES: Final = 12
_MAC_BYTES: Final = 24


@dataclass(frozen=True, slots=True)
class Keys:
    """The deployment's MAC keys, newest first. Old ones still open what they sealed."""

    deployment: str
    secrets: Mapping[bytes, bytes] = field(repr=False)
    current: bytes


async def load_keys(db: Database) -> Keys:
    """Read the keys all nodes share; make the first one if there is none."""
    async with db.write() as tx:
        deployment: str = await tx.fetchval("SELECT value FROM meta WHERE key = 'deployment'")
        # A row with a fixed id: of two nodes that start together, one key wins.
        await tx.execute(
            "INSERT INTO mac_key (id, secret, created_at_ms) VALUES ('00000001', $1, $2)"
            " ON CONFLICT (id) DO NOTHING",
            secrets.token_bytes(32),
            await tx.now_ms(),
        )
        rows = await tx.fetch("SELECT id, secret FROM mac_key ORDER BY created_at_ms, id")
    found = {bytes.fromhex(row["id"]): bytes(row["secret"]) for row in rows}
    return Keys(deployment, found, bytes.fromhex(rows[-1]["id"]))


@dataclass(frozen=True, slots=True)
class Terms:
    """One way to pay: exactly ``amount_units`` of ``asset`` to ``pay_to`` on ``chain``; by ``upto``
    at most so much, handed in by ``facilitator``."""

    chain: Chain
    asset: str
    pay_to: str
    amount_units: int
    purpose: str
    timeout_s: int
    method: str = EIP3009
    facilitator: str = ""

    @property
    def scheme(self) -> str:
        """x402's name for it."""
        return UPTO if self.method == UPTO else "exact"

    def sealed(self) -> bytes:
        """The terms as bytes, each part with its length in front."""
        return _sealed(
            self.chain.caip2,
            self.asset,
            self.pay_to,
            str(self.amount_units),
            self.purpose,
            str(self.timeout_s),
            # Not of the usual one: tokens that were given out before there were two stay good.
            *(() if self.method == EIP3009 else (self.method,)),
            *((self.facilitator,) if self.facilitator else ()),
        )


# The same few terms stand in every 402, and making one is the cost of an unpaid request. Bounded:
# amounts come from callers too.
@lru_cache(maxsize=1_024)
def _sealed(*parts: str) -> bytes:
    return b"".join(struct.pack(">H", len(p)) + p.encode() for p in parts)


@dataclass(frozen=True, slots=True)
class Asked:
    """The request an offer is made for."""

    method: str
    target: bytes
    price_units: int
    """What the request itself costs; 0 when credits are what is bought."""
    body: bytes = b""
    """What else the offer is tied to: the body, where the price hangs on it (begins with ``#``,
    which no target has)."""
    upto: bool = False
    """Whether its route is paid by ``upto``, and then by nothing else."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A token that is ours: which price it promised, and for which purpose the money is."""

    price_units: int
    expiry_s: int
    terms: Terms
    digest: bytes


@lru_cache(maxsize=16)  # there is one, asked for with every 402
def _beginning(deployment: str) -> bytes:
    """What every MAC of an offer begins with."""
    return mac.sized(b"farebox-offer-2", deployment.encode())


def _mac(keys: Keys, head: bytes, asked: Asked, terms: Terms) -> bytes:
    """The MAC of an offer as a text of its own: what ``seal_each`` makes in pieces."""
    request = mac.sized(asked.method.encode(), asked.target + asked.body, head)
    text = _beginning(keys.deployment) + request + covered(terms)
    return hmac.digest(keys.secrets[head[:4]], text, "sha256")[:_MAC_BYTES]


def seal(keys: Keys, asked: Asked, terms: Sequence[Terms], expiry_s: int) -> list[str]:
    """The tokens of the offers of one 402, in their order; they can be paid until ``expiry_s``."""
    return seal_each(keys, asked, list(map(covered, terms)), expiry_s)


def covered(terms: Terms) -> bytes:
    """Terms as the MAC of an offer covers them."""
    return mac.sized(terms.sealed())


def seal_each(keys: Keys, asked: Asked, covered_terms: Iterable[bytes], expiry_s: int) -> list[str]:
    """``seal`` for terms that are ``covered`` already."""
    salt = secrets.token_bytes(_SALT_BYTES)
    head = _HEAD.pack(keys.current, expiry_s, asked.price_units, salt)
    begun = mac.begin(keys.secrets[keys.current], _beginning(keys.deployment))
    request = mac.sized(asked.method.encode(), asked.target + asked.body, head)
    return [
        urlsafe_b64encode(head + made[:_MAC_BYTES]).decode().rstrip("=")
        for made in mac.ends(begun, request, covered_terms)
    ]


def unseal(keys: Keys, token: str, asked: Asked, candidates: Sequence[Terms], now_s: int) -> Opened:
    """The offer a token stands for. ``asked.price_units`` is ignored: the token names the price.

    ``candidates`` are all terms the accepted requirements can mean (they differ in purpose only).
    Raises ``Problem``: ``offer_expired``, or ``invalid_payment_requirements`` when the token is
    not ours, or was given for another request or other terms.
    """
    try:
        raw = _raw(token)
        key_id, expiry_s, price_units, _ = _HEAD.unpack(raw[: _HEAD.size])
    except (ValueError, struct.error):
        raise _not_ours() from None
    if key_id in keys.secrets:
        head = raw[: _HEAD.size]
        for terms in candidates:
            if hmac.compare_digest(_mac(keys, head, asked, terms), raw[_HEAD.size :]):
                if expiry_s < now_s:
                    raise Problem("offer_expired", "This offer has expired: take a new one.")
                return Opened(price_units, expiry_s, terms, hashlib.sha256(raw).digest())
    raise _not_ours()


def _raw(token: str) -> bytes:
    """The bytes of a token in the one spelling that we write; ``ValueError`` for every other."""
    raw = base64.b64decode(token.encode("ascii") + b"=" * (-len(token) % 4), b"-_", True)
    if urlsafe_b64encode(raw).decode().rstrip("=") != token:
        raise ValueError("another spelling of the same token")
    return raw


def _not_ours() -> Problem:
    return Problem(
        "invalid_payment_requirements",
        "This payment does not answer an offer made for this request.",
    )


def token_digest(token: str) -> bytes:
    """The same digest as ``Opened.digest``, for a token that need not be valid any more."""
    try:
        raw = _raw(token)
    except ValueError:
        raw = b""
    return hashlib.sha256(raw).digest()


def promised_units(token: str) -> int:
    """The price a token names. Only for one that is known to be ours."""
    units: int = _HEAD.unpack(_raw(token)[: _HEAD.size])[2]
    return units


class Same:
    """Settings as a cache key: by identity. A reload makes new ones; to hash them whole would cost
    more than what is kept."""

    __slots__ = ("settings",)

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __hash__(self) -> int:
        return id(self.settings)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.settings is self.settings


Floors = tuple[tuple[str, int], ...]
"""Where gas is dear now: the CAIP-2 id of a network, and the least amount in units that is worth a
settlement there (worth.py). Networks whose ``min_onchain`` is worth it do not stand here."""
PERMIT2_GAS: Final = 2  # times what a payment by EIP-3009 takes


def terms_for_asked(
    settings: Settings,
    asked: Asked,
    price_units: int,
    shortfall_units: int,
    floors: Floors = (),
) -> tuple[Terms, ...]:
    """Every way to pay for what is asked, at this price."""
    if asked.upto:
        return _terms_by_upto(Same(settings), price_units, floors)
    return terms_for_call(settings, price_units, shortfall_units, floors)


@lru_cache(maxsize=256)
def _terms_by_upto(same: Same, price_units: int, floors: Floors) -> tuple[Terms, ...]:
    settings = same.settings
    return tuple(
        by_upto(chain, chain.network.usdc.address, price_units, facilitator_of(chain))
        for chain in settings.chains
        if chain.settler_key is not None
        and price_units >= floor_units(floors, chain.caip2, PERMIT2)
    )


def by_upto(chain: Chain, asset: str, most_units: int, facilitator: str) -> Terms:
    """A call for at most so much; nothing is left over that ``min_onchain`` could be for."""
    return Terms(chain, asset, chain.pay_to, most_units, CALL, UPTO_S, UPTO, facilitator)


@lru_cache(maxsize=64)
def _address_of(key: SecretStr) -> str:
    return address_of(private_key(key.get_secret_value()))


def facilitator_of(chain: Chain) -> str:
    """The gas account that payments by ``upto`` are to name: the first of the configuration."""
    return "" if chain.settler_key is None else _address_of(chain.settler_key)


def terms_for_call(
    settings: Settings, price_units: int, shortfall_units: int, floors: Floors = ()
) -> tuple[Terms, ...]:
    """Every way to pay for a call: this call first, then the packs that cover what is missing.

    The call's own offer is at least the chain's ``min_onchain``; what the call does not use of it
    stays as the payer's credits. A pack smaller than the shortfall would be paid and refused. By
    Permit2 the call can be paid where that is on, last: it costs an approval and more gas.

    Nothing is offered below its network's floor. The call is then offered at the smallest pack that
    is not, so that its terms do not move with every price of gas, or not at all.
    """
    packs = tuple(units for units in settings.credits.packs_units if units >= shortfall_units)
    return _terms_for_call(Same(settings), price_units, packs, floors)


@lru_cache(maxsize=256)
def _terms_for_call(
    same: Same, price_units: int, packs_units: tuple[int, ...], floors: Floors
) -> tuple[Terms, ...]:
    settings = same.settings
    calls = _calls(settings, price_units, floors, EIP3009)
    first = {(terms.chain.caip2, terms.amount_units) for terms in calls}
    packs = [
        terms
        for units in packs_units
        for terms in by_eip3009(settings, units, floors)
        if (terms.chain.caip2, terms.amount_units) not in first
    ]
    return (*calls, *packs, *_calls(settings, price_units, floors, PERMIT2))


def _calls(settings: Settings, price_units: int, floors: Floors, method: str) -> list[Terms]:
    """The offers for one call itself, one for each network that settles by ``method``."""
    found = []
    for chain in settings.chains:
        if chain.settler_key is None or (method == PERMIT2 and not chain.permit2):
            continue
        units = max(price_units, chain.min_onchain_units)
        least = floor_units(floors, chain.caip2, method)
        if units < least:
            packs = (pack for pack in settings.credits.packs_units if pack >= max(units, least))
            units = next(packs, 0)
        if units:
            found.append(_terms(settings, chain, units, CALL, method))
    return found


def floor_units(floors: Floors, network: str, method: str = EIP3009) -> int:
    """The least that is offered on a network now; 0: whatever its settings say."""
    least = next((units for caip2, units in floors if caip2 == network), 0)
    return least * PERMIT2_GAS if method == PERMIT2 else least


def terms_for_credits(settings: Settings, amount_units: int, floors: Floors = ()) -> list[Terms]:
    """The ways to buy exactly this amount of credits."""
    usual = by_eip3009(settings, amount_units, floors)
    by_permit2 = [
        replace(each, method=PERMIT2)
        for each in usual
        if each.chain.permit2 and amount_units >= floor_units(floors, each.chain.caip2, PERMIT2)
    ]
    return [*usual, *by_permit2]


def by_eip3009(settings: Settings, amount_units: int, floors: Floors = ()) -> list[Terms]:
    """Those of them that every client speaks."""
    return [
        _terms(settings, chain, amount_units, CREDITS, EIP3009)
        for chain in settings.chains
        if chain.settler_key is not None
        and amount_units >= max(chain.min_onchain_units, floor_units(floors, chain.caip2))
    ]


def _terms(settings: Settings, chain: Chain, units: int, purpose: str, method: str) -> Terms:
    asset, timeout_s = chain.network.usdc.address, settings.server.offer_timeout_s
    return Terms(chain, asset, chain.pay_to, units, purpose, timeout_s, method)


def requirements(terms: Terms, token: str) -> str:
    """x402 v2 PaymentRequirements (x402 specification v2, section 5.1), as JSON text."""
    asset = _asset(terms)
    before, after = _around_token(
        terms.chain.caip2,
        terms.amount_units,
        terms.asset,
        terms.pay_to,
        terms.timeout_s,
        asset.eip712_name,
        asset.eip712_version,
        terms.method,
        terms.facilitator,
    )
    return before + token + after


def _asset(terms: Terms) -> Asset:
    asset = terms.chain.network.asset(terms.asset)
    if asset is None:
        raise ValueError(f"{terms.asset} is not a token of {terms.chain.name}")
    return asset


@lru_cache(maxsize=1_024)  # as for _sealed
def _around_token(  # noqa: PLR0917  (the members, in their order)
    network: str,
    amount_units: int,
    asset: str,
    pay_to: str,
    timeout_s: int,
    name: str,
    version: str,
    method: str,
    facilitator: str,
) -> tuple[str, str]:
    from wallet_auth.keys import checksum

    how = {
        EIP3009: {"paymentFlow": "upfront"},
        PERMIT2: {"assetTransferMethod": PERMIT2, "paymentFlow": "upfront"},
        # Of its own nature it is settled after the call, which is no member.
        UPTO: {"assetTransferMethod": PERMIT2, "facilitatorAddress": checksum(facilitator)}
        if facilitator
        else {},
    }
    text = json.dumps(
        {
            "scheme": UPTO if method == UPTO else "exact",
            "network": network,
            "amount": str(amount_units),
            "asset": checksum(asset),
            "payTo": checksum(pay_to),
            "maxTimeoutSeconds": timeout_s,
            # The token stands last, so that the text can be cut where it goes.
            "extra": {
                "name": name,
                "version": version,
                **how[method],
                "offer": "",
            },
        },
        separators=(",", ":"),
    )
    return text[:-3], text[-3:]


def requirements_v1(terms: Terms, resource: str, description: str) -> dict[str, Any]:
    """x402 v1 PaymentRequirements: short network name, camelCase, no token."""
    from wallet_auth.keys import checksum

    asset = _asset(terms)
    return {
        "scheme": "exact",
        "network": terms.chain.network.v1_name,
        "maxAmountRequired": str(terms.amount_units),
        "resource": resource,
        "description": description,
        "mimeType": "application/json",
        "payTo": checksum(terms.pay_to),
        "maxTimeoutSeconds": terms.timeout_s,
        "asset": checksum(terms.asset),
        "extra": {"name": asset.eip712_name, "version": asset.eip712_version},
    }
