"""Signed requests as bytes on the wire, made before the clock starts."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from anvil.devnet import Account
from gateway.payments.offers import Keys
from tests.e2e.wallet import Wallet
from wallet_auth import keys
from wallet_auth import personal as personal_form
from wallet_auth.canonical import jcs
from wallet_auth.keys import checksum
from wallet_auth.signing import sign_request

BODY = json.dumps({"q": "x" * 1000}).encode()
PATH = "/v1/echo"
INVOKE = "/farebox/v1/tools/bench/actions/echo/invoke"


def time_id() -> str:
    """A request id that begins with time, as the agent's own."""
    return f"{time.time_ns():016x}{secrets.token_hex(8)}"


def plain(url: str) -> bytes:
    """The request without an identity."""
    return _wire(url, {})


def _wire(url: str, extra: dict[str, str], target: str = PATH) -> bytes:
    host = url.removeprefix("http://")
    head = {"Host": host, "Content-Type": "application/json", "Content-Length": str(len(BODY))}
    lines = [f"POST {target} HTTP/1.1", *(f"{n}: {v}" for n, v in {**head, **extra}.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + BODY


def signed(
    url: str,
    wallets: list[bytes],
    count: int,
    *,
    random_ids: bool = False,
    query: str = "",
    ceiling: str = "",
    path: str = PATH,
) -> bytes:
    """``count`` requests, a NUL behind each, signed by the wallets in turn. ``ceiling``: under
    each signature, as ``Farebox-Max``."""
    from coincurve import PrivateKey

    now_s = int(time.time())
    signers = [PrivateKey(secret) for secret in wallets]
    also = {"Farebox-Max": ceiling} if ceiling else {}
    out = []
    for i in range(count):
        nonce = secrets.token_hex(16) if random_ids else time_id()
        added = sign_request(
            signers[i % len(signers)],
            "POST",
            url + path + query,
            [("Content-Type", "application/json"), *also.items()],
            BODY,
            now_s=now_s,
            nonce=nonce,
            window_s=300,
        )
        out.append(_wire(url, also | added, path + query))
    return b"\0".join(out) + b"\0"


def paid(url: str, payers: Sequence[Account], offer: dict[str, Any], count: int) -> bytes:
    """``count`` requests, each with an x402 payment of its own for this offer."""
    # The official Python facilitator takes mixed-case addresses only.
    wallets = [Wallet(replace(payer, address=checksum(payer.address))) for payer in payers]
    out = [
        _wire(url, {"PAYMENT-SIGNATURE": wallets[i % len(wallets)].pay(offer)})
        for i in range(count)
    ]
    return b"\0".join(out) + b"\0"


def personal(url: str, wallets: list[bytes], count: int) -> bytes:
    """``count`` requests for the conventional peer, signed as EIP-191 texts."""
    from coincurve import PrivateKey

    from tests.bench.conventional import text_of

    signers = [PrivateKey(secret) for secret in wallets]
    out = []
    for i in range(count):
        nonce = time_id()
        digest = keys.eip191_hash(text_of("POST", PATH, BODY, nonce).encode())
        signature = keys.sign_digest(signers[i % len(signers)], digest)
        out.append(_wire(url, {"X-Nonce": nonce, "X-Signature": "0x" + signature.hex()}))
    return b"\0".join(out) + b"\0"


def strong(url: str, keys_: Keys, wallets: list[bytes], count: int) -> bytes:
    """``count`` invokes of the same call through the wallet API, in the strong form of
    personal-sign."""
    from coincurve import PrivateKey

    now_s = int(time.time())
    signers = [PrivateKey(secret) for secret in wallets]
    addresses = [keys.address_of(signer) for signer in signers]
    sessions = [personal_form.session_nonce(keys_, each, now_s)[0] for each in addresses]
    parameters, path = json.loads(BODY), INVOKE
    payload = hashlib.sha256(jcs(parameters)).hexdigest()
    out = []
    for i in range(count):
        n = i % len(signers)
        body: dict[str, Any] = {
            "wallet_address": addresses[n],
            "session_nonce": sessions[n],
            "request_id": time_id(),
            "audience": url,
            "ceiling": "$0.05",
            "expires_at": now_s + 300,
        }
        signed = personal_form.read(body | {"signature": ""})
        message = personal_form.strong_message(signed, "POST", path, payload)
        body |= {"signature": personal_form.sign(signers[n], message), "parameters": parameters}
        text = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {url.removeprefix('http://')}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
        )
        out.append(head.encode() + text)
    return b"\0".join(out) + b"\0"


def write(path: Path, requests: bytes) -> Path:
    path.write_bytes(requests)
    return path


def new_wallets(count: int) -> list[bytes]:
    """Private keys that nobody has used."""
    return [secrets.token_bytes(32) for _ in range(count)]


def address_of(secret: bytes) -> str:
    return keys.address_of(keys.private_key(secret))
