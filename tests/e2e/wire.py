"""What a gateway says on its lines, cut into messages, and which of them change anything.

A message is what it sends until the other side answers: an HTTP request, a round trip with
PostgreSQL. Whether a round trip changes anything durable is PostgreSQL's own word, not a guess from
the program: the transaction status of ReadyForQuery, and the row counts of CommandComplete
(https://www.postgresql.org/docs/current/protocol-message-formats.html).
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from typing import Final, NamedTuple, Protocol


class Said(NamedTuple):
    """A message in a few words, the same in every run of a flow, and whether it may change what
    survives the gateway."""

    words: str
    changes: bool


class Talk(Protocol):
    """One connection, followed on both sides."""

    def sent(self, data: bytes) -> Iterator[tuple[bytes, Said | None]]:
        """What is to be passed on now; with ``Said`` where a message begins, which is then whole
        but for a body of unknown length."""

    def heard(self, data: bytes) -> bool:
        """The other side said this; whether the last message is answered by now."""


# --- HTTP -------------------------------------------------------------------------------------


class Http:
    """Requests one after the other on a connection, as HTTP/1.1 clients send them."""

    def __init__(self) -> None:
        self._held = b""
        self._asking = False

    def sent(self, data: bytes) -> Iterator[tuple[bytes, Said | None]]:
        if self._asking:
            yield data, None
            return
        self._held += data
        head, end, body = self._held.partition(b"\r\n\r\n")
        length = re.search(rb"\r\ncontent-length:\s*(\d+)", head, re.IGNORECASE)
        if end and len(body) >= (int(length[1]) if length else 0):
            whole, self._held, self._asking = self._held, b"", True
            yield whole, self._said(whole)

    def heard(self, data: bytes) -> bool:
        self._asking = False
        return True

    def _said(self, request: bytes) -> Said:
        return Said(request.split(b" ", 1)[0].decode(), changes=True)


class JsonRpc(Http):
    """Questions to a node. Only a transaction that is sent changes anything there."""

    def _said(self, request: bytes) -> Said:
        method = re.search(rb'"method"\s*:\s*"(\w+)"', request)
        words = method[1].decode() if method else "?"
        return Said(words, changes=method is None or words == "eth_sendRawTransaction")


# --- PostgreSQL -------------------------------------------------------------------------------

_SSL, _GSS = 80_877_103, 80_877_104  # asked before the start, answered by a single byte
_ENDS: Final = (
    b"SQHpX"  # Sync, Query, Flush, a password, Terminate: then the other side has its say
)
_WRITES = re.compile(
    r"\b(insert\s+into|delete\s+from|update(?!\s+(?:of|skip|nowait|set)\b))\s+\"?(\w+)",
    re.IGNORECASE,
)
# Outside a transaction: what begins one, only asks, or concerns nothing but the session.
_QUIET = re.compile(
    r"\s*(begin|start|rollback|select|show|set|reset|close|unlisten|deallocate)\b", re.IGNORECASE
)
_COUNTED: Final = (b"INSERT", b"UPDATE", b"DELETE", b"MERGE", b"COPY")
_IDLE_TAGS: Final = (
    *(b"SELECT", b"BEGIN", b"COMMIT", b"ROLLBACK", b"START", b"SET", b"RESET", b"SHOW", b"CLOSE"),
    *(b"LOCK", b"SAVEPOINT", b"RELEASE", b"DEALLOCATE", b"DISCARD", b"UNLISTEN"),
)


class Postgres:
    """The frontend/backend protocol, version 3, as far as it says what is written."""

    def __init__(self) -> None:
        self._up, self._down = bytearray(), bytearray()
        self._started = False
        self._byte = False  # the answer is a single byte without a frame
        self._until_ready = False  # the answer ends with ReadyForQuery
        self._status = b"I"  # I: outside a transaction, T: in one, E: in one that has failed
        self._named: dict[bytes, str] = {}
        self._running: deque[str] = deque()
        self._wrote: list[str] = []  # by this transaction, rows that there were

    def sent(self, data: bytes) -> Iterator[tuple[bytes, Said | None]]:
        self._up += data
        while end := self._flight():
            whole = bytes(self._up[:end])
            del self._up[:end]
            yield whole, self._said(whole)

    def heard(self, data: bytes) -> bool:
        if self._byte:
            self._byte = False
            return True
        self._down += data
        at, ready = 0, not self._until_ready
        while (end := _frame_end(self._down, at)) is not None:
            kind, body = self._down[at : at + 1], bytes(self._down[at + 5 : end])
            ready = self._answered(kind, body) or ready
            at = end
        del self._down[:at]
        return ready

    def _flight(self) -> int:
        """Where the first whole message ends; 0 if there is none yet."""
        if not self._started:
            length = int.from_bytes(self._up[:4], "big")
            return length if 8 <= length <= len(self._up) else 0
        at = 0
        while (end := _frame_end(self._up, at)) is not None:
            if self._up[at] in _ENDS:
                return end
            at = end
        return 0

    def _said(self, flight: bytes) -> Said:
        if not self._started:
            self._byte = int.from_bytes(flight[4:8], "big") in {_SSL, _GSS}
            self._started = not self._byte
            self._until_ready = False
            return Said("connect", changes=False)
        prepared, run = "", []
        at, bound = 0, ""
        while (end := _frame_end(flight, at)) is not None:
            kind, body = flight[at : at + 1], flight[at + 5 : end]
            if kind == b"P":
                name, sql = body.split(b"\0", 2)[:2]
                prepared = self._named[name] = sql.decode()
            elif kind == b"B":
                bound = self._named[body.split(b"\0", 2)[1]]
            elif kind == b"E":
                run.append(bound)
            elif kind == b"Q":
                run.append(body.rstrip(b"\0").decode())
            at = end
        self._until_ready = flight[-5:] != b"H\0\0\0\4"
        self._running.extend(run)
        if not run:
            return Said(f"prepare {_brief(prepared)}", changes=False)
        if run[0].strip().rstrip(";").upper() in {"COMMIT", "END"}:
            wrote = ", ".join(dict.fromkeys(self._wrote))
            return Said(f"COMMIT {wrote}".strip(), changes=bool(wrote))
        alone = self._status == b"I" and not all(_QUIET.match(each) for each in run)
        return Said(_brief(run[0]), changes=alone)

    def _answered(self, kind: bytes, body: bytes) -> bool:
        if kind == b"C":
            sql = self._running.popleft() if self._running else ""
            if _wrote(body.rstrip(b"\0"), sql):
                self._wrote.append(_brief(sql))
        elif kind == b"Z":
            self._status = body
            self._running.clear()
            if body == b"I":
                self._wrote.clear()
        return kind == b"Z"


def _frame_end(data: bytes | bytearray, at: int) -> int | None:
    """Where the frame ends that begins there: a byte of kind, a length that counts itself."""
    if len(data) < at + 5:
        return None
    end = at + 1 + int.from_bytes(data[at + 1 : at + 5], "big")
    return end if end <= len(data) else None


def _wrote(tag: bytes, sql: str) -> bool:
    """Whether a statement changed rows, by the tag it ended with."""
    verb, _, rest = tag.partition(b" ")
    if verb in _COUNTED:
        return int(rest.split()[-1]) > 0
    # A SELECT of what another statement inside it has written.
    return verb not in _IDLE_TAGS or (verb == b"SELECT" and bool(_WRITES.search(sql)))


def _brief(sql: str) -> str:
    """A statement in a few words: what it writes to, or how it begins."""
    writes = (f"{verb.split()[0].lower()} {table}" for verb, table in _WRITES.findall(sql))
    return " and ".join(dict.fromkeys(writes)) or " ".join(sql.split())[:60]
