"""Sign-in-with-x (CAIP-122, EIP-4361), as official x402 clients send it: a call paid from credits.

The 402 carries a challenge that needs no row: its ``requestId`` holds the ceiling, what is known of
the body, and a MAC over deployment, method, raw target and every line of the message that is to be
signed. Whoever brings it back signed was asked by us, for this very request, within its time; and
what was signed says in words what may be spent. The nonce is not burnt here: that is the ledger's
unique key.
"""

from __future__ import annotations

import base64
import hmac
import re
import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from json import dumps
from typing import Any, Final, NamedTuple, Protocol

from wallet_auth import keys, mac
from wallet_auth.errors import AuthError
from wallet_auth.request import Call, Signer
from wallet_auth.strict import base64_bytes, json_object

SCHEME: Final = "siwx"
EXTENSION: Final = "sign-in-with-x"
HEADER: Final = b"sign-in-with-x"
MAX_BODY_BYTES: Final = 64 << 10
"""Bodies up to this size are bound to the proof; of a longer one it says nothing."""
MAX_HEADER_BYTES: Final = 8_000
_LONGEST_PATH: Final = 200
_LONGEST_URI: Final = 1_000

_REQUIRED: Final = ("domain", "address", "uri", "version", "chainId", "type", "nonce", "issuedAt")
_OPTIONAL: Final = ("statement", "expirationTime", "notBefore", "requestId")
_ADDRESS: Final = re.compile(r"0x[0-9a-fA-F]{40}")
_CHAIN: Final = re.compile(r"eip155:([1-9][0-9]{0,18})")
_NONCE: Final = re.compile(r"[0-9a-f]{32}")
_SIGNATURE: Final = re.compile(r"0x((?:[0-9a-fA-F]{2})+)")
# EIP-4361: a statement is reserved and unreserved characters of RFC 3986, and spaces.
_NOT_IN_STATEMENT: Final = re.compile(r"[^A-Za-z0-9:/?#\[\]@!$&'()*+,;=._~ -]")
# RFC 3986, without its rare ones: what every client's URL parser gives back as it was.
_PLAIN_TARGET: Final = re.compile(rb"/[A-Za-z0-9._~!$&'()*+,;=:@/?%-]*")

_HEAD: Final = struct.Struct(">4sQB")  # key id, ceiling in units, what is known of the body
_TIMES: Final = struct.Struct(">IH")  # what a nonce begins with: its end, and how long before
_NO_BODY, _DIGEST, _ANY_BODY = 0, 1, 2
_DIGEST_BYTES: Final = 32
_MAC_BYTES: Final = 16


class Keys(Protocol):
    """The MAC keys of a deployment; the current one seals, all of them open."""

    @property
    def deployment(self) -> str: ...
    @property
    def secrets(self) -> Mapping[bytes, bytes]: ...
    @property
    def current(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Asked:
    """The request a challenge is for. ``authority`` and ``origin`` are those of the public URL.

    ``body`` is its SHA-256, ``b""`` for none, ``None`` for one that is not looked at.
    """

    method: str
    target: bytes
    origin: str
    authority: str
    body: bytes | None


@dataclass(frozen=True, slots=True)
class Proof:
    """A proof as it was sent, in form but not in substance checked."""

    domain: str
    address: str
    statement: str | None
    uri: str
    version: str
    chain_id: str
    nonce: str
    issued_at: str
    expiration_time: str | None
    not_before: str | None
    request_id: str | None
    resources: tuple[str, ...] | None
    signature: bytes


# -- the challenge ------------------------------------------------------------------------------


def challenge(  # noqa: PLR0917  (all parts of one text)
    mac_keys: Keys,
    asked: Asked,
    chains: str,
    ceiling_units: int,
    words: str,
    times: tuple[int, int],
) -> str:
    """The extension for a 402, as JSON text: ``{"info": …, "supportedChains": …, "schema": …}``.

    ``words`` are the ceiling for people; ``chains`` is ``supported`` of the networks; ``times``
    are when it is made and when it ends, in Unix seconds.
    """
    now_s, expiry_s = times
    fixed = (_remembered if len(asked.target) <= _LONGEST_PATH else _fixed)(
        asked.method, asked.target, asked.origin, asked.authority, words, chains
    )
    nonce = _TIMES.pack(expiry_s, expiry_s - now_s).hex() + secrets.token_hex(10)
    issued, expires = _iso(now_s), _iso(expiry_s)
    head = _HEAD.pack(mac_keys.current, ceiling_units, _known(asked.body)) + (asked.body or b"")
    own = mac.sized(nonce.encode(), issued.encode(), expires.encode())
    begun = mac.begin(mac_keys.secrets[mac_keys.current], _beginning(mac_keys.deployment))
    made = mac.end(begun, fixed.request + mac.sized(head) + fixed.lines + own)
    request_id = base64.urlsafe_b64encode(head + made[:_MAC_BYTES]).decode().rstrip("=")
    return (
        f'{fixed.before}"nonce":"{nonce}","issuedAt":"{issued}","expirationTime":"{expires}",'
        f'"requestId":"{request_id}"}},{fixed.after}'
    )


class _Fixed(NamedTuple):
    """What all challenges for one request have in common: of the sealed text, and of the JSON."""

    request: bytes
    lines: bytes
    before: str
    after: str


def _fixed(  # noqa: PLR0917  (all parts of one text)
    method: str, target: bytes, origin: str, authority: str, words: str, chains: str
) -> _Fixed:
    path = target.decode("ascii")
    statement = _statement(method, path, words)
    uri = origin + (path if _is_plain(target) else "/")
    return _Fixed(
        mac.sized(method.encode(), target),
        mac.sized(authority.encode(), uri.encode(), statement.encode()),
        f'{{"info":{{"domain":{dumps(authority)},"uri":{dumps(uri)},'
        f'"statement":{dumps(statement)},"version":"1",',
        f'"supportedChains":{chains},"schema":{{}}}}',
    )


_remembered = lru_cache(maxsize=1024)(_fixed)  # bounded in length too: targets come from outside


def supported(caip2: tuple[str, ...]) -> str:
    """``supportedChains`` as JSON text: keys of any chain, contract wallets of these."""
    return dumps([{"chainId": each, "type": "eip191"} for each in caip2], separators=(",", ":"))


def _statement(method: str, path: str, words: str) -> str:
    shown = path if len(path) <= _LONGEST_PATH else path[:_LONGEST_PATH] + "..."
    # What a statement cannot hold is shown as ~; what is bound is the target itself.
    return _NOT_IN_STATEMENT.sub("~", f"Spend at most {words} on {method} {shown}")


def _is_plain(target: bytes) -> bool:
    return len(target) <= _LONGEST_URI and _PLAIN_TARGET.fullmatch(target) is not None


def _known(body: bytes | None) -> int:
    if body is None:
        return _ANY_BODY
    return _DIGEST if body else _NO_BODY


@lru_cache(maxsize=256)  # the same few seconds over and over
def _iso(at_s: int) -> str:
    """Unix seconds as ISO 8601 in UTC, as JavaScript writes it. No clock is asked here, so none
    is imported: the calendar is Howard Hinnant's ``civil_from_days``."""
    days, second = divmod(at_s, 86_400)
    era, day_of_era = divmod(days + 719_468, 146_097)
    year = (day_of_era - day_of_era // 1_460 + day_of_era // 36_524 - day_of_era // 146_096) // 365
    day_of_year = day_of_era - (365 * year + year // 4 - year // 100)
    shifted = (5 * day_of_year + 2) // 153
    day = day_of_year - (153 * shifted + 2) // 5 + 1
    month = shifted + 3 if shifted < 10 else shifted - 9
    year += era * 400 + (month <= 2)
    clock = f"{second // 3_600:02}:{second // 60 % 60:02}:{second % 60:02}"
    return f"{year:04}-{month:02}-{day:02}T{clock}.000Z"


def _mac(mac_keys: Keys, head: bytes, asked: Asked, lines: tuple[str, ...]) -> bytes:
    parts = (asked.method.encode(), asked.target, head, *[line.encode() for line in lines])
    begun = mac.begin(mac_keys.secrets[head[:4]], _beginning(mac_keys.deployment))
    return mac.end(begun, mac.sized(*parts))[:_MAC_BYTES]


@lru_cache(maxsize=16)  # there is one, asked for with every 402
def _beginning(deployment: str) -> bytes:
    return mac.sized(b"farebox-siwx-1", deployment.encode())


# -- the proof ----------------------------------------------------------------------------------


def parse(header: bytes) -> Proof:
    """Read a ``SIGN-IN-WITH-X`` header. Raises ``AuthError`` ``invalid_siwx_header``."""
    if len(header) > MAX_HEADER_BYTES:
        raise _malformed("is too long")
    try:
        sent = json_object(base64_bytes(header.strip(b" \t")))
    except ValueError as error:
        raise _malformed(f"is {error}") from None
    text = {name: _text(sent, name) for name in (*_REQUIRED, "signature")}
    more = {name: _text(sent, name) if sent.get(name) is not None else None for name in _OPTIONAL}
    if text["type"] != "eip191" or not _CHAIN.fullmatch(text["chainId"]):
        raise _malformed("is not of an eip155 account (type eip191)")
    if not _ADDRESS.fullmatch(text["address"]):
        raise _malformed("has an address that is none")
    signature = _SIGNATURE.fullmatch(text["signature"])
    if signature is None or len(signature[1]) > 2 * keys.MAX_CONTRACT_SIGNATURE:
        raise _malformed("has a signature that is not hex, or too long")
    return Proof(
        domain=text["domain"],
        address=text["address"],
        statement=more["statement"],
        uri=text["uri"],
        version=text["version"],
        chain_id=text["chainId"],
        nonce=text["nonce"],
        issued_at=text["issuedAt"],
        expiration_time=more["expirationTime"],
        not_before=more["notBefore"],
        request_id=more["requestId"],
        resources=_resources(sent.get("resources")),
        signature=bytes.fromhex(signature[1]),
    )


def _text(sent: dict[str, Any], name: str) -> str:
    value = sent.get(name)
    # No line of the message may hold another one.
    if not isinstance(value, str) or not value or not value.isprintable():
        raise _malformed(f"has no {name}")
    return value


def _resources(value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(
        isinstance(each, str) and each.isprintable() for each in value
    ):
        raise _malformed("has resources that are no list of text")
    return tuple(value)


def message(proof: Proof) -> str:
    """The text that was signed (EIP-4361), in the words of both official clients."""
    lines = [
        f"{proof.domain} wants you to sign in with your Ethereum account:",
        proof.address,
        "",
        *((proof.statement, "") if proof.statement is not None else ("",)),
        f"URI: {proof.uri}",
        f"Version: {proof.version}",
        f"Chain ID: {proof.chain_id.removeprefix('eip155:')}",
        f"Nonce: {proof.nonce}",
        f"Issued At: {proof.issued_at}",
    ]
    for label, value in (
        ("Expiration Time", proof.expiration_time),
        ("Not Before", proof.not_before),
        ("Request ID", proof.request_id),
    ):
        if value is not None:
            lines.append(f"{label}: {value}")
    if proof.resources is not None:
        lines += ["Resources:", *(f"- {each}" for each in proof.resources)]
    return "\n".join(lines)


async def signed_by(proof: Proof, call: Call | None) -> str:
    """Check the signature: ``key`` or ``contract``. Raises ``AuthError``."""
    digest = keys.eip191_hash(message(proof).encode())
    address = proof.address.lower()
    if keys.recover(digest, proof.signature) == address:
        return "key"
    if call is not None:
        try:
            if await keys.contract_signed(call, proof.chain_id, address, digest, proof.signature):
                return "contract"
        except LookupError:
            pass  # a chain that is not served here: nobody to ask
    raise AuthError(
        "invalid_siwx_signature", "The signature was not made by this account over this message."
    )


async def verify(
    header: bytes, mac_keys: Keys, asked: Asked, now_s: int, call: Call | None
) -> tuple[Signer, int]:
    """Who signed one of our challenges for this request, and the ceiling in units.

    ``asked.body`` is not looked at: what the proof says of it is in ``Signer.digests`` (or
    ``any_body``), for ``check_digests``. Raises ``AuthError`` with one of the ``invalid_siwx_*``
    codes.
    """
    proof = parse(header)
    head, ceiling_units = _opened(proof, mac_keys, asked)
    expiry_s, lasts_s = _TIMES.unpack(bytes.fromhex(proof.nonce)[: _TIMES.size])
    if now_s > expiry_s:
        raise AuthError("invalid_siwx_expired", "This challenge has expired: take a new one.")
    kind = await signed_by(proof, call)
    digest = head[_HEAD.size :]
    signer = Signer(
        scheme=SCHEME,
        address=proof.address.lower(),
        chain_id=int(proof.chain_id.removeprefix("eip155:")),
        kind=kind,
        request_id=proof.nonce,
        created_s=expiry_s - lasts_s,
        expires_s=expiry_s,
        digests=(("sha-256", digest),) if digest else (),
        ceiling=None,
        covered=frozenset(),
        any_body=head[_HEAD.size - 1] == _ANY_BODY,
    )
    return signer, ceiling_units


def _opened(proof: Proof, mac_keys: Keys, asked: Asked) -> tuple[bytes, int]:
    """Head and ceiling of a challenge that is ours, for this request and said in these words."""
    try:
        text = proof.request_id or ""
        raw = base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), b"-_", validate=True)
        key_id, ceiling_units, known = _HEAD.unpack(raw[: _HEAD.size])
    except (ValueError, struct.error):
        raise _not_ours() from None
    size = _HEAD.size + (_DIGEST_BYTES if known == _DIGEST else 0)
    plain = (proof.version, proof.not_before, proof.resources) == ("1", None, None)
    if (
        not plain
        or len(raw) != size + _MAC_BYTES
        or key_id not in mac_keys.secrets
        or not _NONCE.fullmatch(proof.nonce)
        or proof.domain != asked.authority
    ):
        raise _not_ours()
    lines = (
        proof.domain,
        proof.uri,
        proof.statement or "",
        proof.nonce,
        proof.issued_at,
        proof.expiration_time or "",
    )
    if not hmac.compare_digest(_mac(mac_keys, raw[:size], asked, lines), raw[size:]):
        raise _not_ours()
    return raw[:size], ceiling_units


def _malformed(what: str) -> AuthError:
    return AuthError("invalid_siwx_header", f"SIGN-IN-WITH-X {what}.")


def _not_ours() -> AuthError:
    return AuthError(
        "invalid_siwx_nonce", "This proof does not answer a challenge made for this request."
    )
