"""The upstream of the soak: fails, stalls and truncates, and keeps a durable count of what it did.

    python -m tests.soak.upstream --port N --record FILE --seed TEXT

Each call leaves ``b ID`` when its request has arrived and ``d ID`` before the last piece of a
whole, successful answer is written; ID is ``Farebox-Request-Id``. The lines are handed to the
kernel one by one, so no kill can take one back. What happens to a call is drawn from the seed and
its id, so it does not depend on the order of arrival.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
from pathlib import Path

from tests.gateway.proxy.misbehave import answer, reset

STALL_S = 30  # longer than any route waits
LONG = 150_000  # bytes: more than a gateway keeps before it answers
_PIECE = 30_000


class Record:
    """The count. ``note`` returns when the line cannot be lost any more with this process."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(self, what: str, request_id: str) -> None:
        os.write(self._file, f"{what} {request_id}\n".encode())


class Upstream:
    """One connection after the other, each call by its own draw."""

    def __init__(self, record: Record, seed: str) -> None:
        self._record = record
        self._seed = seed

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the gateway was killed, or ended the connection
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request. False: the connection ends with it."""
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head[:-4].split(b"\r\n")
        target = lines[0].split(b" ")[1].decode()
        fields = {n.lower(): v.strip() for n, _, v in (line.partition(b":") for line in lines[1:])}
        await reader.readexactly(int(fields.get(b"content-length", b"0")))
        request_id = fields[b"farebox-request-id"].decode()
        self._record.note("b", request_id)
        draw = random.Random(f"{self._seed}:{request_id}")
        if target.startswith("/stall/"):
            return await _stall(draw, writer)
        if target.startswith("/long/"):
            return await self._long(request_id, draw, writer)
        return await self._short(request_id, draw, writer)

    async def _short(
        self, request_id: str, draw: random.Random, writer: asyncio.StreamWriter
    ) -> bool:
        if draw.random() < 0.1:
            await asyncio.sleep(draw.random() * 0.1)
        body = json.dumps({"id": request_id, "n": draw.random()}).encode()
        match draw.choices(("whole", "500", "404", "cut", "reset"), (88, 4, 2, 3, 3))[0]:
            case "500":
                writer.write(answer(b"broken", status=b"500 Internal Server Error"))
                return True
            case "404":
                writer.write(answer(b"not there", status=b"404 Not Found"))
                return True
            case "cut":
                writer.write(answer(body)[:-5])
                return False
            case "reset":
                reset(writer)
                return False
        self._record.note("d", request_id)
        writer.write(answer(body, b"Content-Type: application/json"))
        return True

    async def _long(
        self, request_id: str, draw: random.Random, writer: asyncio.StreamWriter
    ) -> bool:
        """Piece by piece, so that it is passed on before it has ended; some end too early."""
        body = request_id.encode() + b"." * (LONG - len(request_id))
        pieces = [body[at : at + _PIECE] for at in range(0, LONG, _PIECE)]
        whole = draw.random() < 0.8
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % LONG)
        for piece in pieces[:-1]:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(draw.random() * 0.01)
        if not whole:
            return False
        self._record.note("d", request_id)
        writer.write(pieces[-1])
        return True


async def _stall(draw: random.Random, writer: asyncio.StreamWriter) -> bool:
    """Nothing, or half an answer, for longer than anybody waits. Never counts as done."""
    if draw.random() < 0.5:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nfirst")
        await writer.drain()
    await asyncio.sleep(STALL_S)
    return False


def counts(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    """How often each request id was begun, and how often it was done."""
    begun: dict[str, int] = {}
    done: dict[str, int] = {}
    for line in path.read_text().splitlines():
        what, _, request_id = line.partition(" ")
        into = begun if what == "b" else done
        into[request_id] = into.get(request_id, 0) + 1
    return begun, done


async def main(port: int, record: Path, seed: str) -> None:
    upstream = Upstream(Record(record), seed)
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--seed", required=True)
    given = parser.parse_args()
    asyncio.run(main(given.port, given.record, given.seed))
