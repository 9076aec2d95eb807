"""The purchase forms of the published wallet API, as our own purchase takes them.

Payment headers are put into the form of x402 where clients of that API leave something out;
amounts in answers become JSON numbers.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable
from typing import Any, Final

from gateway.external.envelope import number
from gateway.fields import Fields
from gateway.node import Node
from gateway.payments.wire import MAX_HEADER_BYTES, PAYMENT_HEADERS
from wallet_auth.strict import base64_bytes, json_object

_NAMES: Final = {"valid_after": "validAfter", "valid_before": "validBefore"}


# -- header fields ------------------------------------------------------------------------------


def with_usual_payment(node: Node, headers: Iterable[tuple[bytes, bytes]]) -> Fields:
    """The fields with the payment as x402 has it, if it is one that can be read at all."""
    return Fields([(n, _usual(node, v) if n in PAYMENT_HEADERS else v) for n, v in headers])


def _usual(node: Node, header: bytes) -> bytes:
    try:
        body = json_object(base64_bytes(header.strip())) if len(header) <= MAX_HEADER_BYTES else {}
    except ValueError:
        return header  # refused in the words of every other payment
    found = _usual_payload(node, body)
    return header if found == body else b64encode(json.dumps(found).encode())


def _usual_payload(node: Node, body: dict[str, Any]) -> dict[str, Any]:
    """Both published shapes of an envelope, in a wrapper or not, as x402 version 2 or 1."""
    inner = body.get("paymentPayload")
    found = dict(inner) if isinstance(inner, dict) else dict(body)
    accepted = found.get("accepted")
    if isinstance(accepted, dict):
        found["x402Version"] = 2
        found["accepted"] = {**accepted, "network": _network(accepted)}
    elif "scheme" in found and "network" in found:
        # Version 1 has short names for networks; these clients write CAIP-2 all the same.
        names = {c.caip2: c.network.v1_name or c.caip2 for c in node.settings.chains}
        network = _network(found)
        found |= {"x402Version": 1, "network": names.get(network, network)}
    payload = found.get("payload")
    if isinstance(payload, dict) and isinstance(payload.get("authorization"), dict):
        found["payload"] = {**payload, "authorization": _authorization(payload["authorization"])}
    return found


def _network(found: dict[str, Any]) -> str:
    network = str(found.get("network", ""))
    return f"eip155:{network}" if network.isascii() and network.isdigit() else network


def _authorization(found: dict[str, Any]) -> dict[str, Any]:
    return {_NAMES.get(name, name): value for name, value in found.items()}


# -- answers ------------------------------------------------------------------------------------

_CREDITS: Final = ("credits", "minted", "balance")


def in_numbers(node: Node, view: dict[str, Any]) -> dict[str, Any]:
    """A purchase as this API tells it: credits are JSON numbers."""
    per_usd = node.settings.credits.per_usd
    found = dict(view)
    units = {"credits": "amount_units", "minted": "minted_units", "balance": "balance_units"}
    for name in _CREDITS:
        if name in found and units[name] in found:
            found[name] = number(found[units[name]], per_usd)
    if "balance" in found:
        found["balance_credits"] = found["balance"]
    return found
