"""A deployment that settles for others, in this process, and what its callers send."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from anvil.devnet import Account, Devnet
from gateway import app
from gateway.node import Node
from tests.fixtures_chain import NETWORK, USDC, payment
from tests.gateway.payments.parts import PAY_TO, settings_for

API_KEY = "facilitator-key-of-the-tests"
SELLER = "0x" + "5e" * 20


@dataclass(frozen=True, slots=True)
class Facilitator:
    """One node, and an HTTP client that has its key."""

    net: Devnet
    node: Node
    http: httpx.AsyncClient

    async def ask(self, what: str, asked: dict[str, Any]) -> dict[str, Any]:
        answer = await self.http.post(f"/farebox/x402/{what}", json=asked)
        assert answer.status_code == 200, answer.text
        said: dict[str, Any] = answer.json()
        assert None not in said.values()
        return said

    def sent(self) -> int:
        """Transactions of the gas account that the chain knows."""
        count: str = self.net.rpc("eth_getTransactionCount", self.net.settler.address, "pending")
        return int(count, 16)

    async def rows(self) -> list[dict[str, Any]]:
        async with self.node.db.read() as tx:
            return [dict(row) for row in await tx.fetch("SELECT * FROM payment")]


@asynccontextmanager
async def opened(
    net: Devnet,
    database: str,
    *rpc_urls: str,
    settle_wait_s: int = 5,
    settler_keys: Sequence[str] = (),
    **facilitator: Any,
) -> AsyncIterator[Facilitator]:
    """A node with the facilitator switched on, unless ``api_key`` is "". No background loop."""
    options = {"api_key": API_KEY, **facilitator}
    settings = settings_for(
        server={"database": database, "settle_wait_s": settle_wait_s},
        facilitator={name: value for name, value in options.items() if value != ""},
        chains={
            "base-sepolia": {
                "rpc": list(rpc_urls) or [net.rpc_url],
                "pay_to": PAY_TO,
                "settler_key": net.settler.private_key,
                "settler_keys": list(settler_keys),
                "rpc_timeout_s": 3,
            }
        },
    )
    node = await app.open_node(settings)
    transport = httpx.ASGITransport(app=app.build(node), raise_app_exceptions=False)
    headers = {"authorization": f"Bearer {API_KEY}"}
    try:
        async with httpx.AsyncClient(
            transport=transport, base_url="http://shop.test", headers=headers
        ) as http:
            yield Facilitator(net, node, http)
    finally:
        for lane in node.rails.lanes.values():
            if lane.runner is not None:
                await asyncio.wait([lane.runner])
            await asyncio.gather(*lane.in_flight)
        await app.close_node(node)


def requirements(pay_to: str = SELLER, amount: object = "10000", **change: Any) -> dict[str, Any]:
    return {
        "scheme": "exact",
        "network": NETWORK.caip2,
        "amount": amount,
        "asset": USDC.address,
        "payTo": pay_to,
        "maxTimeoutSeconds": 300,
        "extra": {"name": USDC.eip712_name, "version": USDC.eip712_version},
    } | change


def asking(payload: Any, wanted: dict[str, Any] | None = None, version: int = 2) -> dict[str, Any]:
    """The body of verify and settle, as the official clients write it."""
    wanted = wanted or requirements()
    payment = {"x402Version": version, "payload": payload}
    payment |= (
        {"accepted": wanted}
        if version == 2
        else {"scheme": wanted["scheme"], "network": wanted["network"]}
    )
    return {"x402Version": version, "paymentPayload": payment, "paymentRequirements": wanted}


def paying(payer: Account, units: int = 10_000, to: str = SELLER, **fields: Any) -> dict[str, Any]:
    """A payment of a key, whole."""
    return asking(payment(payer, to, units, **fields))
