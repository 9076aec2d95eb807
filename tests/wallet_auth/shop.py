"""A tiny HTTP server that asks for money, for tests of what clients send. It settles nothing.

It is no stand-in for the gateway (the end-to-end tests use that one): it checks the wire form of
signatures and payments with code of its own and lets a test script every answer.
"""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from eth_account import Account
from eth_account.messages import encode_typed_data

from wallet_auth import SignedRequest, Signer, verify

USDC = "0x036CbD53842c5426634e7929541eC2318f3dCF7e"
PAY_TO = "0x3C44CdDdB6a900fa2b585dd299e03d12FA4293BC"


@dataclass
class Seen:
    """One request as it arrived."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    signer: Signer | None

    def header(self, name: str) -> str | None:
        found = [value for n, value in self.headers if n == name]
        assert len(found) < 2, f"{name} was sent twice"
        return found[0] if found else None


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b"{}"


Script = Callable[[Seen], Answer]


@dataclass
class Shop:
    """The server's address and what it has seen so far."""

    url: str
    seen: list[Seen] = field(default_factory=list)
    script: Script = lambda _: Answer(200)
    checks: bool = True  # whether signatures are checked before the script sees them

    @property
    def authority(self) -> str:
        return self.url.removeprefix("http://")


def encode(value: object) -> str:
    return base64.b64encode(json.dumps(value).encode()).decode()


def terms(**changes: Any) -> dict[str, Any]:
    """One offer of a 402, version 2."""
    offer: dict[str, Any] = {
        "scheme": "exact",
        "network": "eip155:84532",
        "amount": "10000",
        "asset": USDC,
        "payTo": PAY_TO,
        "maxTimeoutSeconds": 60,
        "extra": {"name": "USDC", "version": "2", "paymentFlow": "upfront", "offer": "token-1"},
    }
    return {name: value for name, value in (offer | changes).items() if value is not None}


def challenge(*accepts: dict[str, Any], **members: Any) -> dict[str, Any]:
    return {
        "x402Version": 2,
        "error": "payment_required",
        "resource": {"url": "http://shop/x", "description": "", "mimeType": "application/json"},
        "accepts": list(accepts or [terms()]),
    } | members


def asks(*accepts: dict[str, Any], **members: Any) -> Answer:
    """The 402 of a shop that takes both versions: v2 in the header, v1 in the body."""
    old = {
        "scheme": "exact",
        "network": "base-sepolia",
        "maxAmountRequired": "10000",
        "resource": "http://shop/x",
        "description": "",
        "mimeType": "application/json",
        "payTo": PAY_TO,
        "maxTimeoutSeconds": 60,
        "asset": USDC,
        "extra": {"name": "USDC", "version": "2"},
    }
    body = {"x402Version": 1, "error": "payment_required", "accepts": [old]}
    header = {"PAYMENT-REQUIRED": encode(challenge(*accepts, **members))}
    return Answer(402, header, json.dumps(body).encode())


def settled(**changes: Any) -> Answer:
    receipt = {"success": True, "transaction": "0x" + "ab" * 32, "network": "eip155:84532"}
    return Answer(200, {"PAYMENT-RESPONSE": encode(receipt | changes)}, b'{"ok":true}')


def pending(retry_after: str | None = "0") -> Answer:
    receipt = {"success": False, "errorReason": "settlement_pending", "transaction": "0xaa"}
    headers = {"PAYMENT-RESPONSE": encode(receipt | {"network": "eip155:84532"})}
    return Answer(402, headers | ({} if retry_after is None else {"Retry-After": retry_after}))


def read_payment(seen: Seen, name: str = "payment-signature") -> dict[str, Any] | None:
    """The payment a request carries, its signature checked by eth_account."""
    value = seen.header(name)
    if value is None:
        return None
    payload: dict[str, Any] = json.loads(base64.b64decode(value, validate=True))
    authorization = payload["payload"]["authorization"]
    message = encode_typed_data(
        domain_data={"name": "USDC", "version": "2", "chainId": 84532, "verifyingContract": USDC},
        message_types={
            "TransferWithAuthorization": [
                {"name": "from", "type": "address"},
                {"name": "to", "type": "address"},
                {"name": "value", "type": "uint256"},
                {"name": "validAfter", "type": "uint256"},
                {"name": "validBefore", "type": "uint256"},
                {"name": "nonce", "type": "bytes32"},
            ]
        },
        message_data={
            "from": authorization["from"],
            "to": authorization["to"],
            "value": int(authorization["value"]),
            "validAfter": int(authorization["validAfter"]),
            "validBefore": int(authorization["validBefore"]),
            "nonce": bytes.fromhex(authorization["nonce"][2:]),
        },
    )
    signer = Account.recover_message(message, signature=payload["payload"]["signature"])
    assert signer == authorization["from"]
    return payload


def pay_then_serve(seen: Seen) -> Answer:
    """The usual shop: 402 without a payment, 200 with one of either version."""
    paid = read_payment(seen) or read_payment(seen, "x-payment")
    return settled() if paid else asks()


@contextmanager
def open_shop(script: Script = pay_then_serve) -> Iterator[Shop]:
    """Run a shop on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            seen = self._read()
            shop.seen.append(seen)
            answer = shop.script(seen)
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)

        do_GET = do_POST = do_PUT = handle_any  # noqa: N815  (names of the standard library)

        def _read(self) -> Seen:
            body = b""
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = tuple((name.lower(), value) for name, value in self.headers.items())
            wire = tuple((n.encode("latin-1"), v.encode("latin-1")) for n, v in headers)
            if not shop.checks:
                return Seen(self.command, self.path, headers, body, None)
            request = SignedRequest(
                self.command, self.path.encode("latin-1"), shop.authority, "http", wire, body
            )
            signer = asyncio.run(verify(request, int(time.time()), None))
            return Seen(self.command, self.path, headers, body, signer)

        def log_message(self, *_: object) -> None:
            """Say nothing: the test looks at what was seen."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    shop = Shop(f"http://127.0.0.1:{server.server_port}", script=script)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield shop
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
