"""Where an upstream's redirect leads: to the public address, never to its own internal one.

An upstream behind a mount knows itself by another origin and path. A ``Location`` or
``Content-Location`` that names its origin, or an absolute path of it, is **rewritten** to the
gateway's public address of the same resource, and **dropped** if it has none (it lies outside the
path the mount stands for) or cannot be read. Other hosts and relative references pass unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from urllib.parse import SplitResult, urlsplit, urlunsplit

from gateway.proxy.client import Origin
from gateway.proxy.routes_table import Route

_NAMES: Final = frozenset((b"location", b"content-location"))
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}

Fields = list[tuple[bytes, bytes]]


def rewrite(
    headers: Sequence[tuple[bytes, bytes]], route: Route, origin: Origin, public_url: str
) -> Fields:
    """Header fields of an answer with every address of the upstream made public, or taken out."""
    out: Fields = []
    for name, value in headers:
        if name not in _NAMES:
            out.append((name, value))
            continue
        public = public_address(value, route.mount, origin, public_url)
        if public is not None:
            out.append((name, public))
    return out


def public_address(value: bytes, mount: str, origin: Origin, public_url: str) -> bytes | None:
    """One URI reference as callers may see it; None if there is no public form of it."""
    text = value.decode("latin-1").strip(" \t")
    try:
        parts = urlsplit(text)
        ours = bool(parts.netloc) and _is_at(parts, origin)
    except ValueError:
        return None
    if parts.netloc and not ours:
        return value
    if not parts.netloc and (parts.scheme or not parts.path.startswith("/")):
        return value  # relative to the request, whose path is the same below the mount
    path = _public_path(parts.path, mount, origin.base_path.decode("ascii"))
    if path is None:
        return None
    base = urlsplit(public_url) if ours else SplitResult("", "", "", "", "")
    found = urlunsplit((base.scheme, base.netloc, path, parts.query, parts.fragment))
    return found.encode("latin-1")


def _is_at(parts: SplitResult, origin: Origin) -> bool:
    """Whether a reference with an authority is to the upstream's host and port."""
    port = parts.port or _DEFAULT_PORTS.get(parts.scheme or ("https" if origin.tls else "http"))
    return (parts.hostname or "") == origin.host and port == origin.port


def _public_path(path: str, mount: str, base_path: str) -> str | None:
    """The upstream's path under the mount; None if it is not below the upstream's base path."""
    if path != base_path and not path.startswith(f"{base_path}/"):
        return None if path else mount
    return (mount.rstrip("/") + path[len(base_path) :]) or "/"
