"""The network is closed in tests: only the loopback address and Unix sockets can be reached.

An audit hook sees every connection and name look-up made through Python's socket module, in any
thread. It cannot be removed, and refusing is also remembered, so that a test whose code under
test swallows the error still fails (``tests/conftest.py``).
"""

from __future__ import annotations

import ipaddress
import sys
from typing import Any

refused: list[str] = []
"""What was asked for and refused since the last test looked."""


class NetworkClosedError(RuntimeError):
    """A test tried to leave this machine."""


def _loopback(host: object) -> bool:
    if isinstance(host, bytes):
        host = host.decode("ascii", "replace")
    if not isinstance(host, str) or host in {"", "localhost"}:
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event in {"socket.connect", "socket.sendto", "socket.sendmsg"}:
        address = arguments[1]
        if not isinstance(address, tuple) or _loopback(address[0]):
            return
    elif event == "socket.getaddrinfo":
        address = arguments[0]
        if _loopback(address) or _numeric(address):
            return
    else:
        return
    refused.append(f"{event} {address}")
    raise NetworkClosedError(f"the network is closed in tests: {event} {address}")


def _numeric(host: object) -> bool:
    """An address that needs no look-up (servers bind to 0.0.0.0)."""
    try:
        ipaddress.ip_address(str(host))
    except ValueError:
        return False
    return True


def close_network() -> None:
    """Refuse everything but loopback in this process from now on."""
    sys.addaudithook(_hook)
