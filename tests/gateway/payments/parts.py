"""What the tests of payments share: settings, rails on a real chain, claimed payments."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from anvil.devnet import Account, Devnet
from chain import sender
from chain.rpc import Rpc
from chain.schemes import eip3009
from chain.sender import Prepared
from gateway.config import load
from gateway.db import Database, Tx
from gateway.payments import exposure, journal, nonces, offers
from gateway.payments.journal import AuthKey, Claim, Payment
from gateway.payments.lane import Begun, Job
from gateway.payments.rails import Rails
from gateway.settings import Settings
from tests.fixtures_chain import NETWORK, USDC, payment

PAY_TO = "0x" + "ab" * 20
SETTLER_KEY = "0x" + "11" * 32
KEYS = offers.Keys("d-tests", {b"\0\0\0\1": b"k" * 32}, b"\0\0\0\1")


def settings_for(**change: Any) -> Settings:
    """A gateway with one chain that nobody answers for. ``change``: what is added to a section;
    ``chains`` and ``upstreams`` are replaced as a whole."""
    chain = {"rpc": ["http://127.0.0.1:1"], "pay_to": PAY_TO, "settler_key": SETTLER_KEY}
    sections: dict[str, Any] = {
        "server": {"public_url": "http://shop.test", "database": "sqlite:///nowhere.db"},
        "credits": {"packs": ["$1", "$5", "$20"]},
        "chains": {"base-sepolia": chain},
        "upstreams": {
            "api": {"url": "http://127.0.0.1:9", "routes": [{"match": "* /*", "price": "$0.01"}]}
        },
    }
    for name, values in change.items():
        if name in ("chains", "upstreams"):
            sections[name] = values
        else:
            sections[name] = sections.get(name, {}) | values
    return load(None, env={}, overrides=sections)


def blank(payment_id: str, **change: Any) -> Payment:
    """A payment over x402 that somebody works on."""
    made = Payment(
        id=payment_id,
        provider="x402",
        state="processing",
        purpose="call",
        payer="0x" + "aa" * 20,
        recipient="0x" + "aa" * 20,
        recipient_chain="",
        network=NETWORK.caip2,
        asset=USDC.address,
        amount_units=10_000,
        expires_ms=None,
        auth_nonce="0x" + "01" * 32,
        valid_before_s=2_000_000_000,
        from_block=0,
        tx_hash=None,
        external_ref=None,
        external_url=None,
        lot_id=None,
        error_code=None,
        error_detail=None,
        created_at_ms=1_700_000_000_000,
        updated_at_ms=1_700_000_000_000,
        lease_ms=0,
    )
    return replace(made, **change)


@dataclass(frozen=True, slots=True)
class Claimed:
    """A payment as it stands in the ledger before anything is sent."""

    payment: Payment
    prepared: Prepared
    authorization: eip3009.Authorization


@dataclass(frozen=True, slots=True)
class Desk:
    """Rails on a real chain and a real database, without a gateway around them."""

    net: Devnet
    rails: Rails
    rpc: Rpc

    def patient(self) -> Desk:
        """The same for a node that is well again: nothing has to be there within a second."""
        self.rpc.timeout_ms = 20_000
        for endpoint in self.rpc.endpoints:
            endpoint.answered()
        settings = self.rails.settings
        server = settings.server.model_copy(update={"settle_wait_s": 20})
        rails = replace(self.rails, settings=settings.model_copy(update={"server": server}))
        return replace(self, rails=rails)

    async def claim(
        self,
        payer: Account | None = None,
        *,
        units: int = 10_000,
        gas: int | None = None,
        chain_nonce: int = 0,
        **fields: Any,
    ) -> Claimed:
        """A payment, claimed and signed as ``x402.pay`` does it, and not broadcast.

        ``gas`` overrides the limit; ``chain_nonce`` is the least number it gets.
        """
        payer = payer or self.net.accounts[0]
        fields.setdefault("valid_before_s", int(time.time()) + 3_600)
        signed = payment(payer, PAY_TO, units, **fields)
        auth = eip3009.parse(signed)
        data = eip3009.transfer_calldata(auth)
        settler = self.net.settler
        count = int(self.net.rpc("eth_getTransactionCount", settler.address, "pending"), 16)
        fees = sender.Fees(gas or 200_000, 10**10, 10**9, max(count, chain_nonce))
        new = blank(
            journal.new_id(),
            payer=auth.from_,
            recipient=auth.from_,
            amount_units=units,
            auth_nonce=auth.nonce,
            valid_before_s=auth.valid_before_s,
            from_block=int(self.net.rpc("eth_blockNumber"), 16),
            created_at_ms=time.time_ns() // 1_000_000,
        )
        key = AuthKey(NETWORK.caip2, USDC.address, auth.from_, auth.nonce)
        async with self.rails.db.write() as tx:
            now_ms = await tx.now_ms()
            assert await journal.claim(tx, key, Claim(new.id, b"content", None), now_ms)
            await journal.insert(tx, new)
            call = nonces.Call(new.id, USDC.address, data)
            nonce = await nonces.allot(
                tx, NETWORK.caip2, settler.address, fees.nonce, [call], now_ms
            )
            prepared = sender.sign(
                settler.private_key, NETWORK.chain_id, nonce, USDC.address, data, fees
            )
            await nonces.store(tx, prepared, now_ms)
        return Claimed(new, prepared, auth)

    def job(self, payer: Account, *, units: int = 10_000, **fields: Any) -> Job:
        """A payment as ``x402.pay`` hands it to the engine, signed now."""
        fields.setdefault("valid_before_s", int(time.time()) + 3_600)
        auth = eip3009.parse(payment(payer, PAY_TO, units, **fields))
        payment_id = journal.new_id()

        async def begin(tx: Tx, at: Begun) -> bool:
            key = AuthKey(NETWORK.caip2, USDC.address, auth.from_, auth.nonce)
            if not await journal.claim(tx, key, Claim(payment_id, b"content", None), at.now_ms):
                return False
            new = blank(
                payment_id,
                payer=auth.from_,
                recipient=auth.from_,
                amount_units=units,
                auth_nonce=auth.nonce,
                valid_before_s=auth.valid_before_s,
                from_block=at.from_block,
                created_at_ms=at.now_ms,
                lease_ms=at.now_ms,
            )
            await journal.insert(tx, new)
            return True

        return Job(
            chain=self.rails.settings.chains[0],
            call=nonces.Call(payment_id, USDC.address, eip3009.transfer_calldata(auth)),
            payer=auth.from_,
            spends=(USDC.address, auth.from_, auth.nonce),
            valid_before_s=auth.valid_before_s,
            begin=begin,
            code_known=False,
        )

    async def row(self, job: Job) -> Payment | None:
        """What was written for a job."""
        async with self.rails.db.read() as tx:
            return await journal.by_id(tx, job.call.payment_id)

    async def sent_for(self, job: Job) -> Sequence[Prepared]:
        """What was signed for a job, newest first."""
        async with self.rails.db.read() as tx:
            return await nonces.sent_for(tx, job.call.payment_id)

    def send(self, claimed: Claimed) -> str:
        """Our transaction reaches the chain."""
        sent: str = self.net.rpc("eth_sendRawTransaction", "0x" + claimed.prepared.raw.hex())
        return sent

    def send_by_stranger(self, claimed: Claimed) -> str:
        """Somebody else hands the authorization in; the transaction's hash."""
        data = "0x" + eip3009.transfer_calldata(claimed.authorization).hex()
        return self.net.send(self.net.operator.address, USDC.address, data)

    async def payment(self, claimed: Claimed) -> Payment:
        async with self.rails.db.read() as tx:
            found = await journal.by_id(tx, claimed.payment.id)
        assert found is not None
        return found

    async def minted(self) -> list[tuple[str, str, int]]:
        """Every mint there is: its transaction, its payment, its amount."""
        async with self.rails.db.read() as tx:
            rows = await tx.fetch(
                "SELECT k.ref, l.payment_id, l.minted_units FROM mint_key k"
                " JOIN lot l ON l.id = k.lot_id ORDER BY l.id"
            )
        return [(row["ref"], row["payment_id"], row["minted_units"]) for row in rows]


@asynccontextmanager
async def opened_desk(
    net: Devnet, database: str, *rpc_urls: str, timeout_s: int = 10, wait_s: int = 20, **chain: Any
) -> AsyncIterator[Desk]:
    """A desk for the length of a block. ``rpc_urls``: other nodes than the chain itself;
    ``timeout_s``: of a question to them; ``wait_s``: of the engine for a block; ``chain``: further
    settings of the network."""
    urls = list(rpc_urls) or [net.rpc_url]
    if "settler_keys" not in chain:
        chain["settler_key"] = net.settler.private_key
    settings = settings_for(
        server={"database": database, "settle_wait_s": wait_s},
        chains={"base-sepolia": {"rpc": urls, "pay_to": PAY_TO, **chain}},
    )
    db = await Database.connect(database)
    rpc = Rpc(NETWORK, urls, timeout_s=timeout_s)
    keys = await offers.load_keys(db)
    async with db.write() as tx:
        await exposure.set_policies(tx, settings)
    rails = Rails(settings, db, keys, {NETWORK.caip2: rpc})
    try:
        yield Desk(net, rails, rpc)
    finally:
        for lane in rails.lanes.values():
            await asyncio.gather(*lane.in_flight)
        await rpc.close()
        await db.close()
