"""The request target: one spelling for one resource, the same bytes all the way.

The bytes that are routed are the bytes that are priced, signed and sent upstream. That is only
safe when an upstream cannot read them as another path than we did, so every form that two
parsers are known to read differently is refused with 400 ``invalid_target`` (design: path and
target mismatch):

    absolute-form, authority-form, ``*``, fragment        not an origin-form path
    ``//``, ``.`` and ``..`` segments, backslash, ``;``   merged, climbed, or cut off by some
    %2f %5c %2e %25 %3b, encoded controls                 become the above after decoding
    encoded letters, digits, ``-``, ``_``, ``~``          a second spelling of the plain ones
    bytes outside RFC 3986 pchar, bad or non-UTF-8 %XX    repaired differently by everybody

What may still be written in two ways (``:`` and ``%3A``, ``%c3`` and ``%C3``) is matched in its
decoded form, so both spellings have one price, and sent upstream as it came.

Where the bytes come from: uvicorn 0.54 keeps ``raw_path`` and ``query_string`` as received, but
an empty query (``/a?``) looks like none under both of its parsers, and with httptools a fragment
and the origin of an absolute-form target are lost. ``gateway/proxy/wire.py`` therefore puts the
whole target, untouched, into the ASGI state under ``RAW_TARGET``. Under another server that
entry is missing and the target is rebuilt from the two fields; then ``/a?`` is ``/a`` for
pricing, signature and upstream alike, and a signature made over ``/a?`` fails.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final
from urllib.parse import unquote_to_bytes

from gateway.errors import Problem
from gateway.fields import by_name

RAW_TARGET: Final = "farebox.raw_target"
_SHORT: Final = 256
MAX_TARGET_BYTES: Final = 8_000  # the least RFC 9110 section 4.1 asks servers to take

# RFC 3986 pchar without ";" and "%": what may stand in a segment as it is.
_PCHAR: Final = rb"A-Za-z0-9._~!$&'()*+,=:@-"
_PLAIN_PATH: Final = re.compile(rb"(?:/[" + _PCHAR + rb"]+)*/?")
_PATH: Final = re.compile(rb"(?:/(?:[" + _PCHAR + rb"]|%[0-9A-Fa-f]{2})+)*/?")
# Any printable ASCII but "#"; a percent sign must begin an octet.
_QUERY: Final = re.compile(rb"(?:[!-\"$&-~]|%[0-9A-Fa-f]{2})*")
# Decoded octets that must not have been written in encoded form.
_NEVER_ENCODED: Final = re.compile(rb"[\x00-\x1f\x7f/\\;%A-Za-z0-9._~-]")
_OCTET: Final = re.compile(rb"%([0-9A-Fa-f]{2})")
_LENGTH: Final = re.compile(rb"[0-9]{1,18}")


@dataclass(frozen=True, slots=True)
class Target:
    """An accepted request target.

    ``raw`` is the target as received; ``path`` and ``query`` are its parts, undecoded. ``query``
    is None when there is no ``?`` and empty when nothing follows it. ``decoded`` is the path with
    its percent-encoding resolved once: it is for matching only and is never sent anywhere.
    """

    path: bytes
    query: bytes | None
    raw: bytes
    decoded: bytes


def from_scope(scope: Mapping[str, Any]) -> Target:
    """The target of an ASGI HTTP request. Raises ``Problem("invalid_target")``."""
    state: Mapping[str, Any] = scope.get("state") or {}
    raw: bytes | None = state.get(RAW_TARGET)
    if raw is None:
        query: bytes = scope.get("query_string") or b""
        raw = scope["raw_path"] + (b"?" + query if query else b"")
    return _remembered(raw) if len(raw) <= _SHORT else parse(raw)


def parse(raw: bytes) -> Target:
    """Check a raw target and take it apart. Raises ``Problem("invalid_target")``."""
    if len(raw) > MAX_TARGET_BYTES:
        raise Problem(
            "invalid_target",
            f"the request target is longer than {MAX_TARGET_BYTES} bytes",
            status=414,
        )
    path, mark, rest = raw.partition(b"?")
    decoded = _check_path(path)
    query = rest if mark else None
    if query:
        _check_query(query)
    return Target(path, query, raw, decoded)


# Bounded in number and size: most requests ask for one of a few targets. A refusal is not kept.
_remembered: Final = lru_cache(maxsize=4_096)(parse)


def _refuse(why: str) -> Problem:
    return Problem("invalid_target", why)


def _check_path(path: bytes) -> bytes:
    if not path.startswith(b"/"):
        raise _refuse("the target must be a path that begins with '/' (origin-form)")
    decoded = path if _PLAIN_PATH.fullmatch(path) is not None else _decode_path(path)
    # Only a segment that begins with a dot can be a dot segment; encoded dots were refused.
    if b"/." in path and not {b".", b".."}.isdisjoint(path.split(b"/")):
        raise _refuse("'.' and '..' segments are not accepted")
    return decoded


def _decode_path(path: bytes) -> bytes:
    if b"//" in path:
        raise _refuse("empty path segments ('//') are not accepted")
    if b"#" in path:
        raise _refuse("a fragment does not belong into a request target")
    if _PATH.fullmatch(path) is None:
        raise _refuse("the path holds a byte that must be percent-encoded, or a bad '%' sequence")
    for octet in _OCTET.findall(path):
        if _NEVER_ENCODED.match(bytes.fromhex(octet.decode())):
            raise _refuse(f"%{octet.decode()} is not accepted in a path")
    decoded = unquote_to_bytes(path)
    _check_utf8(decoded)
    return decoded


def _check_query(query: bytes) -> None:
    if _QUERY.fullmatch(query) is None:
        raise _refuse("the query holds a byte that must be percent-encoded, or a bad '%' sequence")
    if b"%" in query:
        _check_utf8(unquote_to_bytes(query))


def _check_utf8(decoded: bytes) -> None:
    try:
        decoded.decode()
    except UnicodeDecodeError:
        raise _refuse("the percent-encoded bytes are not UTF-8") from None


def check_framing(headers: Iterable[tuple[bytes, bytes]], http_version: str) -> None:
    """Refuse a request whose length or host two parsers could see differently.

    RFC 9112 sections 3.2, 6.1 and 6.3: Content-Length beside Transfer-Encoding, either of them
    twice, a transfer coding other than ``chunked``, any transfer coding in HTTP/1.0, several
    Host fields, or none in HTTP/1.1. Raises ``Problem("invalid_request")`` that closes the
    connection, because where the next request begins is not known. Names are lower case.
    """
    named = by_name(headers)
    lengths = named.get(b"content-length", ())
    if lengths and (len(lengths) > 1 or _LENGTH.fullmatch(lengths[0]) is None):
        raise _unframed("Content-Length must be given once, in plain digits")
    codings = named.get(b"transfer-encoding", ())
    if codings:
        if len(codings) > 1 or codings[0].lower() != b"chunked":
            raise _unframed("the only transfer coding accepted is 'chunked'")
        if lengths:
            raise _unframed("Content-Length and Transfer-Encoding exclude each other")
        if http_version == "1.0":
            raise _unframed("HTTP/1.0 has no Transfer-Encoding")
    hosts = len(named.get(b"host", ()))
    if hosts != 1 and (hosts or http_version == "1.1"):
        raise _unframed("Host must be given exactly once")


def _unframed(why: str) -> Problem:
    return Problem("invalid_request", why, headers={"Connection": "close"})
