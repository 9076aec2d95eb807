"""Who signed a body, and what that is worth here.

The published shapes are worth a payment: they name neither this gateway nor a price, so somebody
else may have had them signed for a purpose of its own. They spend what was bought through
``/api/external``, so much a session; the wallet may allow them everything once, with a signature
that is bound. The strong shape is a bound identity.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from typing import Any, Final, NamedTuple

from gateway import ledger
from gateway.errors import NextAction, Problem
from gateway.fields import by_name
from gateway.node import Node
from gateway.payments import journal
from gateway.proxy.headers import is_our_key
from gateway.proxy.identity import Caller, Headers
from gateway.proxy.target import Target
from wallet_auth import AuthError, personal, siwx
from wallet_auth.canonical import Form, forms_of, jcs, member_as_sent
from wallet_auth.personal import EMPTY, Call, Signed

PARAMETERS: Final = "parameters"
PUBLISHED_HERE: Final = "/api/external/"
"""Where the published shapes are known. Under our own prefix only the strong one is."""


class Proof(NamedTuple):
    """A caller, and the text of the parameters whose hash was signed."""

    caller: Caller
    signed: Signed
    payload: bytes

    @property
    def bound(self) -> bool:
        return self.caller.only is None


def is_wrapper(body: dict[str, Any]) -> bool:
    """Whether a body says who signed it; else it is the parameters themselves."""
    return "session_nonce" in body and "wallet_address" in body


def of_parameters(  # noqa: PLR0917  (a request, read)
    node: Node, target: Target, headers: Headers, body: dict[str, Any], raw: bytes, call: Call
) -> Proof:
    """Who signed a wrapper whose payload is its ``parameters``. Raises ``Problem``."""
    parameters = body.get(PARAMETERS, {})
    if not isinstance(parameters, dict):
        raise Problem("invalid_request", "parameters is not a JSON object.")

    def payloads(strong: bool) -> Iterable[Form]:
        if not strong:
            return forms_of(parameters, member_as_sent(raw.decode(), PARAMETERS))
        try:
            text = jcs(parameters)
        except ValueError as error:
            raise Problem("invalid_request", f"parameters: {error}.") from None
        return [Form("jcs", text, sha256(text).hexdigest())]

    return _proof(node, target, headers, body, call, payloads, tuple(parameters))


def of_nothing(
    node: Node, target: Target, headers: Headers, body: dict[str, Any], call: Call
) -> Proof:
    """Who signed a wrapper that hashes no payload. Raises ``Problem``."""
    return _proof(node, target, headers, body, call, lambda _strong: [EMPTY], ())


def _proof(  # noqa: PLR0917  (two callers)
    node: Node,
    target: Target,
    headers: Headers,
    body: dict[str, Any],
    call: Call,
    payloads: Any,
    names: tuple[str, ...],
) -> Proof:
    _require_alone(headers)
    settings, keys, now_s = node.settings, node.rails.keys, node.now_s()
    path = target.raw.decode("ascii")
    try:
        signed = personal.read(body)
        forms = payloads(signed.strong)
        if signed.strong:
            unknown = body.keys() - personal.WRAPPER - personal.TERMS - {PARAMETERS}
            if unknown:
                raise AuthError("invalid_request", f"Unknown member {min(unknown)[:60]!r}.")
            (form,) = forms
            audience = settings.server.public_url
            signer = personal.check_strong(keys, signed, audience, "POST", path, form, now_s)
            return Proof(Caller(signer, None, None), signed, form.text)
        if not path.startswith(PUBLISHED_HERE):
            raise Problem(
                "identity_unsupported",
                "This needs the strong form: audience, ceiling and expires_at beside the others.",
            )
        signer, form = personal.check_published(keys, signed, call, forms, now_s)
    except AuthError as error:
        raise problem_of(node, target, error, names) from None
    return Proof(Caller(signer, None, None, only=own_lots(node, signed)), signed, form.text)


def _require_alone(headers: Headers) -> None:
    """At most one identity a request."""
    named = by_name(headers)
    if (
        b"signature-input" in named
        or siwx.HEADER in named
        or any(map(is_our_key, named.get(b"authorization", ())))
    ):
        raise Problem("identity_conflict", "The request is signed in its body and in its header.")


def own_lots(node: Node, signed: Signed) -> ledger.Only:
    """What the published shapes spend by themselves."""
    return ledger.Only(
        source=journal.EXTERNAL,
        session=signed.session,
        most_units=node.settings.external.session_limit_units,
    )


def every_lot(node: Node, signed: Signed) -> ledger.Only:
    """What they spend once their wallet has allowed it: all, and no more a session than before."""
    return ledger.Only(
        session=signed.session, most_units=node.settings.external.session_limit_units
    )


async def may_spend_all(node: Node, wallet: str) -> bool:
    """Whether the wallet has allowed its published signatures to spend all it has."""
    async with node.db.read() as tx:
        found = await tx.fetchval(
            "SELECT external_all FROM wallet WHERE address = $1 AND chain = ''", wallet
        )
    return bool(found)


def new_session(node: Node, prefix: str) -> NextAction:
    """How to get a session nonce to sign anew with."""
    return NextAction(
        "POST",
        f"{node.settings.server.public_url}{prefix}/auth/session",
        "the wallet: the answer has a session_nonce to sign the request anew with",
        "read",
        body={"wallet_address": "<0x…>"},
    )


def problem_of(node: Node, target: Target, error: AuthError, names: tuple[str, ...]) -> Problem:
    """A failed proof as an answer that says what to sign instead."""
    base = node.settings.server.public_url
    url = base + target.raw.decode("ascii")
    prefix = "/api/external" if url.startswith(base + PUBLISHED_HERE) else "/farebox/v1"
    members = dict(error.params)
    if "accepted_payload_hash_forms" in members:
        members["payload_canonical_top_level_keys"] = sorted(names)
    again = NextAction(
        "POST",
        url,
        "the same body with signature: personal_sign (EIP-191) of expected_message by "
        "wallet_address, with a request_id that was not used before",
        body={"signature": "<personal_sign of expected_message>"},
    )
    actions = [again] if "expected_message" in members else []
    if "SESSION" in error.code:
        actions = [new_session(node, prefix)]
    return Problem(error.code, error.detail, members=members, next_actions=actions)
