"""Who is calling, and is a payment with it: at most one identity and one payment a request.

An identity that is present and fails ends the request; nothing weaker is tried in its place.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from secrets import token_hex
from typing import Final, NamedTuple

from chain.errors import ChainError
from chain.schemes import exact
from gateway import ledger
from gateway.accounts import credentials
from gateway.accounts.credentials import Credential
from gateway.db import DatabaseUnavailable
from gateway.errors import NextAction, Problem
from gateway.fields import by_name, values
from gateway.limits import UNKNOWN, Client
from gateway.node import Node, unavailable
from gateway.payments.identifier import alias_of
from gateway.payments.wire import PAYMENT_HEADERS, Presented, decode, payment_header
from gateway.proxy.advice import SIGN
from gateway.proxy.headers import is_our_key
from gateway.proxy.siwx import prove
from gateway.proxy.target import Target
from wallet_auth import AuthError, Call, SignedRequest, Signer, siwx, verify
from wallet_auth.keys import ERC1271_YES

Headers = Sequence[tuple[bytes, bytes]]
# A clock that is wrong cannot be seen from the inside.
_CLOCKS: Final = frozenset(("signature_expired", "signature_not_yet_valid"))
_ACCEPT_SIGNATURE = (
    'eth=("@authority" "@method" "@path" "@query" "content-digest");created;expires;nonce;keyid'
)


class Caller(NamedTuple):
    """What a request proved. ``signer`` is a bound identity, ``presented`` a payment; both may
    be None (nobody), and both may be there when they are of one wallet."""

    signer: Signer | None
    presented: Presented | None
    alias: str | None  # Idempotency-Key
    # What the signer agreed to pay at most, where the proof itself says so (sign-in-with-x).
    ceiling_units: int | None = None
    credential: Credential | None = None  # as weak as a payment: it spends its own lot

    # What its signature may spend. Not None: it is worth no more than a payment (external API).
    only: ledger.Only | None = None

    @property
    def proves_nothing(self) -> bool:
        return self.signer is None and self.presented is None and self.credential is None

    @property
    def wallet(self) -> tuple[str, str] | None:
        """Address and chain of the identity: a key is one wallet everywhere, a contract is not."""
        if self.signer is None:
            return None
        chain = "" if self.signer.kind == "key" else f"eip155:{self.signer.chain_id}"
        return self.signer.address, chain


NOBODY: Final = Caller(None, None, None)
# Whoever says who he is, or pays, does it in one of these.
_SAYING: Final = frozenset((b"signature-input", b"authorization", b"idempotency-key", siwx.HEADER))


async def identify(  # noqa: PLR0917  (a request)
    node: Node,
    method: str,
    target: Target,
    headers: Headers,
    now_s: int,
    client: Client = UNKNOWN,
) -> Caller:
    """Parse and check everything that says who is calling. Raises ``Problem``.

    The body has not been read: ``wallet_auth.check_body`` compares it with the signed digest.
    """
    named = by_name(headers)
    if says_nothing(headers):
        return NOBODY
    presented = None
    signer = ceiling_units = None
    if b"signature-input" in named:
        signer = await _signer(node, method, target, headers, now_s, _asking(node, client))
    if siwx.HEADER in named:
        if signer is not None:
            raise Problem("identity_conflict", "The request is signed in more than one way.")
        signer, ceiling_units = await prove(
            node, method, target, headers, now_s, _asking(node, client)
        )
    raw = payment_header(headers)
    if raw is not None:
        settings = node.settings
        presented = decode(raw, permit2=settings.takes_permit2, by_upto=settings.takes_upto)
    credential = None
    if b"authorization" in named and any(map(is_our_key, named[b"authorization"])):
        if signer is not None:
            raise Problem("identity_conflict", "The request is signed, and brings a key too.")
        credential = await _credential(node, named[b"authorization"])
    caller = Caller(signer, presented, _alias(headers), ceiling_units, credential)
    require_same_wallet(node, caller)
    return caller


def says_nothing(headers: Headers) -> bool:
    """Whether no header field says who is calling or pays."""
    named = by_name(headers)
    return named.keys().isdisjoint(_SAYING) and named.keys().isdisjoint(PAYMENT_HEADERS)


def require_same_wallet(node: Node, caller: Caller) -> None:
    """Refuse a payment of another wallet than the one that signed. A contract is a wallet on its
    own chain only: elsewhere somebody else may hold the address. Raises
    ``Problem("payer_mismatch")``."""
    signer, presented, credential = caller.signer, caller.presented, caller.credential
    if presented is not None and credential is not None:
        if presented.authorization.from_ != credential.payer:
            raise Problem("payer_mismatch", "The payment and the credential are of two wallets.")
        return
    if signer is None or presented is None:
        return
    payer = presented.authorization.from_
    _, only_on = caller.wallet or ("", "")
    if payer != signer.address or (only_on and only_on != node.rails.chain_of(presented).caip2):
        where = f" on {only_on}" if only_on else ""
        raise Problem(
            "payer_mismatch",
            f"The request is signed by {signer.address}{where} and paid by {payer} on "
            f"{presented.network}.",
        )


async def _credential(node: Node, values: Sequence[bytes]) -> Credential:
    """Who brings a credential of ours. Raises ``Problem``."""
    if len(values) > 1:
        raise Problem("identity_conflict", "Authorization may be sent only once.")
    text = values[0].split(None, 1)[1].strip().decode("latin-1")
    if not text.startswith(credentials.PREFIX):
        raise Problem("identity_unsupported", "Keys are not issued here yet: sign the request.")
    try:
        async with node.db.read() as tx:
            found = await credentials.find(tx, text)
    except DatabaseUnavailable as error:
        raise unavailable(error) from error
    if found is None:
        raise Problem(
            "credential_invalid", "This credential is not one of ours, or its hour is over."
        )
    return found


def _alias(headers: Headers) -> str | None:
    found = values(headers, b"idempotency-key")
    if not found:
        return None
    text = found[0].decode("latin-1").strip()
    if len(found) > 1 or not 1 <= len(text) <= 255 or not text.isascii() or not text.isprintable():
        raise Problem("invalid_request", "Idempotency-Key is one value of 1 to 255 characters.")
    return text


def _asking(node: Node, client: Client) -> Call:
    """How a contract wallet is asked for a client. Whoever names one can make us ask, so what is
    answered with no is counted, like calls that end uncharged, and refused when it is too much."""
    key = f"contract:{client.address}" if client.single else None

    async def ask(caip2: str, to: str, data: bytes) -> bytes:
        full = node.limits.too_many_uncharged(key)
        if full is not None:
            limit, standing = full
            raise Problem(
                "rate_limited",
                f"More than {limit.count} signatures of contract wallets from here were wrong "
                "within a minute.",
                headers={"Retry-After": str(-(-standing.reset_ms // 1000))},
            )
        told = await node.eth_call(caip2, to, data)
        if told != ERC1271_YES:
            node.limits.ended_uncharged(key)
        return told

    return ask


async def _signer(  # noqa: PLR0917  (one caller)
    node: Node, method: str, target: Target, headers: Headers, now_s: int, ask: Call
) -> Signer | None:
    request = SignedRequest(
        method=method,
        target=target.raw,
        authority=node.authority,
        scheme=node.scheme,
        index=by_name(headers),
    )
    try:
        return await verify(request, now_s, ask)
    except AuthError as error:
        raise auth_problem(node, method, target, error) from None
    except ChainError as error:
        raise unavailable(error) from error


def auth_problem(node: Node, method: str, target: Target, error: AuthError) -> Problem:
    """A failed identity as an answer: which check, and what to sign instead (RFC 9421, 5.1)."""
    problem = Problem(
        error.code,
        error.detail,
        members=error.params,
        next_actions=[
            NextAction(
                method,
                node.settings.server.public_url + target.raw.decode("ascii"),
                "the same request signed anew (ERC-8128) with a fresh nonce, covering @authority, "
                "@method, @path, @query if there is one, and content-digest if there is a body",
                "sign",
                SIGN,
            )
        ],
    )
    if error.code in _CLOCKS:
        problem.members["now_s"] = node.now_s()
    if problem.status == 401:
        problem.headers["WWW-Authenticate"] = 'Signature realm="farebox"'
        problem.headers["Accept-Signature"] = _ACCEPT_SIGNATURE
    return problem


def guard_of(node: Node, caller: Caller) -> ledger.Guard:
    """What this request burns: the one-time value of the strongest proof it carries.

    A payment's own one-time value is burnt with it: shown again, alone or beside a signature made
    anew, the payment finds the call it paid for and pays for no other. Its payment-identifier is
    an alias, which another authorization of the same wallet may have too. Beside a bare payment
    an Idempotency-Key is not an alias: it is signed by nobody, and as an id of its own it would
    let one authorization stand for many calls.
    """
    scheme, paid_by, alias = "", None, caller.alias
    if caller.presented is not None:
        chain_settings = node.rails.chain_of(caller.presented)
        asset = caller.presented.asset or chain_settings.network.usdc.address
        where = exact.burned_at(asset, caller.presented.authorization)
        scheme = f"x402:{chain_settings.caip2}:{where}"
        paid_by = f"{scheme}:{caller.presented.authorization.nonce}"
        alias = alias or alias_of(caller.presented)
    signer, wallet = caller.signer, caller.wallet
    if signer is not None and wallet is not None:
        # The account tells apart who holds the address on which chain, as it does for payers.
        return ledger.Guard(wallet[0], signer.scheme, signer.request_id, alias, paid_by)
    if caller.presented is None and caller.credential is not None:
        # It is shown with every call, so it is no one-time value: the caller names one, or we do.
        request_id = caller.alias or f"{time.time_ns() // 1_000_000:012x}{token_hex(10)}"
        return ledger.Guard(caller.credential.name, credentials.SCHEME, request_id)
    if caller.presented is None:
        raise ledger.LedgerFault("a request without a proof cannot be guarded")
    auth = caller.presented.authorization
    return ledger.Guard(auth.from_, scheme, auth.nonce, alias_of(caller.presented), payment=paid_by)
