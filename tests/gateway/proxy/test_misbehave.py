"""What tests of hang-ups rest on: the upstream's own view of its connection, in every order."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.gateway.proxy.misbehave import BEHAVIOURS, Writer, closed, misbehaving
from tests.servers import eventually


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[socket.socket, Writer]]:
    """A caller's socket, and the upstream's end of it as a behaviour has it."""
    accepted: asyncio.Future[Writer] = asyncio.get_running_loop().create_future()

    def take(_reader: asyncio.StreamReader, writer: Writer) -> None:
        accepted.set_result(writer)

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    try:
        with socket.create_connection(server.sockets[0].getsockname()) as caller:
            writer = await accepted
            yield caller, writer
            writer.close()
    finally:
        server.close()


def hang_up(caller: socket.socket, how: str) -> None:
    linger = struct.pack("ii", how == "RST", 0)
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    caller.close()


@pytest.mark.parametrize("how", ["FIN", "RST"])
async def test_who_hung_up_is_seen_before_the_loop_sees_it(how: str) -> None:
    async with pair() as (caller, writer):
        assert not closed(writer)
        hang_up(caller, how)
        assert closed(writer)


@pytest.mark.parametrize("how", ["FIN", "RST"])
async def test_who_hung_up_is_seen_after_the_loop_saw_it(how: str) -> None:
    """With a RST the transport closes the socket that would be asked: ``EBADF``, once taken for
    the end of the behaviour."""
    async with pair() as (caller, writer):
        hang_up(caller, how)
        if how == "RST":
            await eventually(lambda: writer.get_extra_info("socket").fileno() == -1)
        else:
            await asyncio.sleep(0)
        assert closed(writer)


async def test_a_behaviour_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(*_: object) -> bool:
        raise OSError("of its own")

    monkeypatch.setitem(BEHAVIOURS, b"/fails", fails)
    with pytest.raises(ExceptionGroup, match="behaviour failed"):
        async with misbehaving() as up:
            reader, writer = await asyncio.open_connection("127.0.0.1", up.port)
            writer.write(b"GET /fails HTTP/1.1\r\n\r\n")
            assert await reader.read() == b""
            writer.close()
