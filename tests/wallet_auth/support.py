"""What the tests of this folder share: a wallet, signed requests, and the peers in Node."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from wallet_auth import AuthError, SignedRequest, Signer, keys, verify
from wallet_auth.request import split_url
from wallet_auth.signing import sign_request

KEY = "0xac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80"  # Anvil's first
ADDRESS = "0xf39fd6e51aad88f6f4ce6ab8827279cfffb92266"
NOW = 1_900_000_000
NONCE = "0190c8a1-7c00-7abc-8def-0123456789ab"
URL = "https://api.example/v1/forecast/oslo"
BASIC = ("@authority", "@method", "@path")
BODY = b'{"city":"oslo"}'
DIGEST = "sha-256=:" + base64.b64encode(hashlib.sha256(BODY).digest()).decode() + ":"
OTHER_KEY = "0x" + "11" * 32
CLIENTS = Path(__file__).parents[1] / "clients"

Headers = Iterable[tuple[str, str]]


def request_of(
    method: str, url: str, headers: Headers, body: bytes | None, *, read: bool = True
) -> SignedRequest:
    """The request as a server with this very public address would see it."""
    scheme, authority, target = split_url(url)
    wire = tuple((n.lower().encode(), v.encode("latin-1")) for n, v in headers)
    return SignedRequest(method, target, authority, scheme, wire, (body or b"") if read else None)


def signed(
    method: str = "GET",
    url: str = URL,
    headers: Headers = (),
    body: bytes | None = None,
    *,
    read: bool = True,
    **options: Any,
) -> SignedRequest:
    """A request signed by our own signing half."""
    sent = list(headers)
    if body:
        sent.append(("content-length", str(len(body))))
    arguments: dict[str, Any] = {"now_s": NOW, "nonce": NONCE} | options
    added = sign_request(KEY, method, url, sent, body, **arguments)
    replaced = {name.lower() for name in added}
    kept = [(n, v) for n, v in sent if n.lower() not in replaced]
    return request_of(method, url, [*kept, *added.items()], body, read=read)


def by_hand(
    request: SignedRequest,
    components: Iterable[str],
    params: str | None = None,
    *,
    values: Mapping[str, str] | None = None,
    key: str = KEY,
    inner: str | None = None,
    label: str = "eth",
    signature: bytes | None = None,
) -> SignedRequest:
    """Sign with any components and parameters, without the program's own signature base.

    The base is put together here, from RFC 9421 2.5 alone, so that the tests have an opinion of
    their own. ``values`` replaces or adds component values; ``inner`` the list as it is sent.
    """
    names = list(components)
    if params is None:
        params = f';created={NOW};expires={NOW + 60};nonce="{NONCE}";keyid="erc8128:1:{ADDRESS}"'
    path, mark, query = request.target.decode().partition("?")
    known = {
        "@authority": request.authority,
        "@method": request.method,
        "@path": path,
        "@query": mark + query,
        **{n.decode(): v.decode("latin-1") for n, v in request.headers},
        **(values or {}),
    }
    listed = "(" + " ".join(f'"{name}"' for name in names) + ")" if inner is None else inner
    base = "".join(f'"{name}": {known.get(name, "")}\n' for name in names)
    base += f'"@signature-params": {listed}{params}'
    if signature is None:
        digest = keys.eip191_hash(base.encode("latin-1"))
        signature = keys.sign_digest(keys.private_key(key), digest)
    encoded = base64.b64encode(signature).decode()
    return with_headers(
        request,
        ("signature-input", f"{label}={listed}{params}"),
        ("signature", f"{label}=:{encoded}:"),
    )


def with_headers(request: SignedRequest, *headers: tuple[str, str]) -> SignedRequest:
    """The same request with these field lines added at the end."""
    more = tuple((n.encode(), v.encode("latin-1")) for n, v in headers)
    return changed(request, headers=request.headers + more)


def replaced(request: SignedRequest, name: str, value: str | bytes | None) -> SignedRequest:
    """The same request with one field's value replaced, or without it."""
    raw = value.encode("latin-1") if isinstance(value, str) else value
    kept = [
        (n, v if n != name.encode() else raw)
        for n, v in request.headers
        if n != name.encode() or raw is not None
    ]
    return changed(request, headers=tuple(kept))


def changed(request: SignedRequest, **members: Any) -> SignedRequest:
    """The same request with other members."""
    import dataclasses

    return dataclasses.replace(request, **members)


def header(request: SignedRequest, name: str) -> str:
    """The value of a field that is there once."""
    (value,) = [v for n, v in request.headers if n == name.encode()]
    return value.decode("latin-1")


def plain(*headers: tuple[str, str], url: str = URL, method: str = "GET") -> SignedRequest:
    """A request that is not signed yet."""
    return request_of(method, url, headers, None)


def posted(*headers: tuple[str, str], body: bytes = BODY) -> SignedRequest:
    length = ("content-length", str(len(body)))
    return request_of("POST", URL, [length, *headers], body)


def params(**given: str | int | None) -> str:
    """Signature parameters as they are sent; ``None`` leaves one out, strings come raw."""
    known: dict[str, str | int | None] = {
        "created": NOW,
        "expires": NOW + 60,
        "nonce": f'"{NONCE}"',
        "keyid": f'"erc8128:1:{ADDRESS}"',
    }
    merged = known | given
    return "".join(f";{name}={value}" for name, value in merged.items() if value is not None)


async def accepted(request: SignedRequest, now_s: int = NOW) -> Signer:
    signer = await verify(request, now_s, None)
    assert signer is not None
    return signer


async def refused(request: SignedRequest, code: str, now_s: int = NOW, **options: Any) -> AuthError:
    with pytest.raises(AuthError) as caught:
        await verify(request, now_s, options.get("call"))
    assert caught.value.code == code, caught.value
    assert caught.value.detail
    return caught.value


class Peer:
    """A long-running Node script that answers one JSON line with one."""

    def __init__(self, script: str) -> None:
        self._process = subprocess.Popen(
            [node(), script],
            cwd=CLIENTS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "NODE_OPTIONS": ""},
        )

    def ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Send one job, wait for its answer (the test's own timeout bounds it)."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the peer ended with {self._process.poll()}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process: it stops when its input does."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        finally:
            self._process.kill()
            self._process.stdout.close()


def node() -> str:
    """The Node binary; the tests of this folder need it and the packages of tests/clients."""
    found = shutil.which("node")
    if found is None or not (CLIENTS / "node_modules" / "@slicekit").is_dir():
        pytest.fail("needs Node 20+ and `npm ci` in tests/clients", pytrace=False)
    return found


def body_base64(body: bytes | None) -> str | None:
    return None if body is None else base64.b64encode(body).decode()
