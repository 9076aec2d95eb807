"""Request bodies: checked whole before anything is held, in flat memory, gone afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import socket
from collections.abc import AsyncIterator, Callable

import httpx
import pytest

from tests.e2e.stage import PRICE_UNITS, Api, Gateway, answer_when_open
from tests.e2e.wallet import Wallet, buy, offers, problem
from tests.servers import eventually

Launch = Callable[..., Gateway]
MINTED = 1_000_000
BIG = 50 << 20
ROOM = {"max_body": "64 MiB"}


async def test_fifty_mebibytes_in_flat_memory(
    launch: Launch, api: Api, wallet: Wallet, target: str
) -> None:
    """Signed, and paid for without a signature: both are read and hashed whole before the hold."""
    gateway = launch("sqlite", server=ROOM)
    body = secrets.token_bytes(1 << 20) * 50
    digest = hashlib.sha256(body).digest()
    async with gateway.client() as http:
        await buy(http, wallet)
        before = gateway.memory_kib("VmHWM")
        signed = wallet.sign("POST", gateway.url + target, body)
        answer = await http.post(target, headers=signed, content=body)
        assert answer.status_code == 200
        again = await http.post(target, headers=signed, content=body)
        assert again.headers["farebox-replayed"] == "true"
        other = await http.post(target, headers=signed, content=body[:-1] + bytes([body[-1] ^ 1]))
        problem(other, "signature_digest_mismatch")
        offer = offers(await http.post(target + "/paid", content=b""))[0]
        paid = {"PAYMENT-SIGNATURE": wallet.pay(offer)}
        assert (await http.post(target + "/paid", headers=paid, content=body)).status_code == 200
        assert gateway.memory_kib("VmHWM") < before + 16 * 1024
    for path in (target, target + "/paid"):
        (seen,) = api.seen(path)
        assert hashlib.sha256(seen.body).digest() == digest
        assert seen.header(b"content-length") == [str(BIG).encode()]
    await eventually(lambda: gateway.unnamed_files() == 0, "the files to go")


@pytest.mark.parametrize(("memory", "files"), [("1 MiB", 0), ("64 KiB", 1)])
async def test_what_is_longer_than_body_memory_stands_in_a_file(  # noqa: PLR0917  (fixtures)
    memory: str, files: int, launch: Launch, api: Api, wallet: Wallet, target: str
) -> None:
    gateway = launch("sqlite", server={"body_memory": memory})
    gate = api.behave(target, answer_when_open)
    body = secrets.token_bytes(100_000)
    async with gateway.client() as http:
        await buy(http, wallet)
        signed = wallet.sign("POST", gateway.url + target, body)
        asking = asyncio.create_task(http.post(target, headers=signed, content=body))
        await eventually(lambda: gate.arrived == 1, "the call")
        assert gateway.unnamed_files() == files
        gate.open()
        assert (await asking).status_code == 200
        await eventually(lambda: gateway.unnamed_files() == 0, "the file to go")
    assert api.seen(target)[0].body == body


async def test_nothing_stays_on_disk_whatever_goes_wrong(
    launch: Launch, api: Api, wallet: Wallet, target: str
) -> None:
    gateway = launch("sqlite", server={"body_memory": "64 KiB", "max_body": "1 MiB"})
    body = secrets.token_bytes(500_000)
    async with gateway.client() as http:
        await buy(http, wallet)

        async def post(path: str, sent: bytes, signed_for: bytes = body) -> httpx.Response:
            signed = wallet.sign("POST", gateway.url + path, signed_for)
            return await http.post(path, headers=signed, content=sent)

        problem(await post(target, body[::-1]), "signature_digest_mismatch")
        problem(await post("/reset", body), "upstream_error")
        # Answered before the whole of it was sent: the answer counts.
        assert (await post("/early", body)).status_code == 413
        too_long = body * 3
        with contextlib.suppress(httpx.WriteError, httpx.ReadError):
            problem(await post(target, too_long, too_long), "body_too_large")
        headers = wallet.sign("POST", gateway.url + target, body)
        with socket.create_connection(("127.0.0.1", gateway.port)) as caller:
            fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            length = f"Content-Length: {len(body)}\r\n"
            caller.sendall(f"POST {target} HTTP/1.1\r\nHost: x\r\n{length}{fields}\r\n".encode())
            caller.sendall(body[:300_000])
            await eventually(lambda: gateway.unnamed_files() == 1, "the file")
        await eventually(lambda: gateway.unnamed_files() == 0, "the files to go")
        # The one that left before its end has burnt nothing.
        answer = await http.post(target, headers=headers, content=body)
        assert answer.status_code == 200 and "farebox-replayed" not in answer.headers
    assert api.calls(target) == 1
    assert gateway.balance(wallet.address) == (MINTED - PRICE_UNITS, 0)


async def test_a_chunked_body_is_sent_up_with_its_length(
    sqlite_gateway: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    """The digest is of the content, and so is what the upstream gets."""
    body = secrets.token_bytes(3 << 20)

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 70_000):
            yield body[start : start + 70_000]

    gateway = sqlite_gateway
    async with gateway.client() as http:
        await buy(http, wallet)
        signed = wallet.sign("POST", gateway.url + target, body)
        answer = await http.post(target, headers=signed, content=pieces())
        assert answer.status_code == 200, answer.text
    (seen,) = api.seen(target)
    assert seen.body == body
    assert seen.header(b"content-length") == [str(len(body)).encode()]
