"""Our own sales settled by somebody else's facilitator, whatever that one is up to.

It is a server of its own that each test gives a character. In every case the payer has paid once,
has its credits once, and is never told to pay again for money that may have moved.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from aiohttp import web

from anvil.devnet import Devnet
from chain.schemes import eip3009
from gateway import app, ready, work
from gateway.ledger import audit
from gateway.node import Node
from gateway.payments import remote
from gateway.payments.lane import Job
from tests.e2e.wallet import Wallet, new_wallet, offers, outcome
from tests.fixtures_chain import NETWORK, USDC
from tests.gateway.payments.parts import PAY_TO, settings_for
from tests.servers import eventually

KEY = "what-the-facilitator-wants"
BUY = b'{"amount_usd": "1"}'
Answer = Callable[["Theirs", dict[str, Any]], Awaitable[web.StreamResponse]]


@dataclass(slots=True)
class Theirs:
    """Somebody else's facilitator, with a gas account of its own."""

    net: Devnet
    url: str = ""
    character: Answer | None = None
    down: bool = False
    kinds: list[Any] = field(
        default_factory=lambda: [{"x402Version": 2, "scheme": "exact", "network": NETWORK.caip2}]
    )
    asked: list[dict[str, Any]] = field(default_factory=list)
    looks: int = 0
    end: asyncio.Event = field(default_factory=asyncio.Event)

    def send(self, body: dict[str, Any]) -> str:
        """Hand the authorization in, as an honest one would."""
        auth = eip3009.parse(body["paymentPayload"]["payload"])
        data = "0x" + eip3009.transfer_calldata(auth).hex()
        return self.net.send(self.net.operator.address, USDC.address, data)

    async def supported(self, request: web.Request) -> web.StreamResponse:
        self.looks += 1
        if self.down:
            return web.Response(status=503)
        return web.json_response({"kinds": self.kinds, "extensions": [], "signers": {}})

    async def settle(self, request: web.Request) -> web.StreamResponse:
        assert request.headers["Authorization"] == f"Bearer {KEY}"
        body = await request.json()
        self.asked.append(body)
        if self.down:
            return web.Response(status=503)
        assert self.character is not None
        return await self.character(self, body)


def said(success: bool, transaction: str = "", **more: Any) -> web.StreamResponse:
    return web.json_response(
        {"success": success, "transaction": transaction, "network": NETWORK.caip2} | more
    )


async def honest(theirs: Theirs, body: dict[str, Any]) -> web.StreamResponse:
    return said(True, theirs.send(body))


async def pending(theirs: Theirs, body: dict[str, Any]) -> web.StreamResponse:
    return said(False, theirs.send(body), errorReason="settlement_pending")


async def success_for_nothing(theirs: Theirs, body: dict[str, Any]) -> web.StreamResponse:
    return said(True, "0x" + secrets.token_hex(32))


async def success_without_a_hash(theirs: Theirs, body: dict[str, Any]) -> web.StreamResponse:
    return said(True)


async def somebody_elses(theirs: Theirs, body: dict[str, Any]) -> web.StreamResponse:
    """The same amount to the same address, by somebody who bought nothing."""
    units = int(body["paymentRequirements"]["amount"])
    return said(True, theirs.net.transfer(theirs.net.accounts[7].address, PAY_TO, units))


async def fails(theirs: Theirs, body: dict[str, Any]) -> web.StreamResponse:
    return said(False, errorReason="invalid_exact_evm_payload_signature")


async def fails_after_sending(theirs: Theirs, body: dict[str, Any]) -> web.StreamResponse:
    theirs.send(body)
    return said(False, errorReason="insufficient_funds")


async def silent(theirs: Theirs, body: dict[str, Any]) -> web.StreamResponse:
    await theirs.end.wait()
    return web.Response()


async def silent_after_sending(theirs: Theirs, body: dict[str, Any]) -> web.StreamResponse:
    theirs.send(body)
    return await silent(theirs, body)


async def cuts_after_sending(theirs: Theirs, body: dict[str, Any]) -> web.StreamResponse:
    theirs.send(body)
    return web.Response(body=b'{"success": true, "transaction": "0x')


async def talks_html(theirs: Theirs, body: dict[str, Any]) -> web.StreamResponse:
    return web.Response(text="<h1>hello</h1>", content_type="text/html")


async def talks_for_ever(theirs: Theirs, body: dict[str, Any]) -> web.StreamResponse:
    return web.Response(body=b'{"success": "' + b"x" * 1_000_000)


async def refuses(theirs: Theirs, body: dict[str, Any]) -> web.StreamResponse:
    return web.Response(status=429)


HOSTILE = [
    success_for_nothing,
    success_without_a_hash,
    fails,
    fails_after_sending,
    silent,
    silent_after_sending,
    cuts_after_sending,
    talks_html,
    talks_for_ever,
    refuses,
    somebody_elses,
]
SENDS = {honest, pending, fails_after_sending, silent_after_sending, cuts_after_sending}


@pytest.fixture
async def theirs(chain_net: Devnet) -> AsyncIterator[Theirs]:
    made = Theirs(chain_net)
    application = web.Application()
    application.router.add_get("/x402/supported", made.supported)
    application.router.add_post("/x402/settle", made.settle)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}/x402"
    yield made
    made.end.set()
    await runner.cleanup()


@dataclass(frozen=True, slots=True)
class Shop:
    node: Node
    http: httpx.AsyncClient
    net: Devnet

    async def buy(self, wallet: Wallet, header: str | None = None) -> httpx.Response:
        """Pay for $1 of credits; ``header``: with this payment."""
        return await self.http.post(
            "/farebox/v1/credits/purchase",
            content=BUY,
            headers={"PAYMENT-SIGNATURE": header or await self.signed(wallet)},
        )

    async def signed(self, wallet: Wallet) -> str:
        asked = await self.http.post("/farebox/v1/credits/purchase", content=BUY)
        return wallet.pay(offers(asked)[0])

    async def minted(self) -> list[int]:
        async with self.node.db.read() as tx:
            rows = await tx.fetch("SELECT minted_units FROM lot")
        return [row["minted_units"] for row in rows]

    async def finished(self) -> None:
        """The background loop's rounds until nothing is open."""
        async with asyncio.timeout(30):
            while True:
                async with self.node.db.write() as tx:
                    await tx.execute("UPDATE payment SET lease_ms = 0 WHERE state = 'processing'")
                await work.finish_payments(self.node)
                async with self.node.db.read() as tx:
                    if not await tx.fetchval(
                        "SELECT count(*) FROM payment WHERE state = 'processing'"
                    ):
                        return

    def ours(self) -> int:
        count: str = self.net.rpc("eth_getTransactionCount", self.net.settler.address, "pending")
        return int(count, 16)

    def forgive(self) -> None:
        """As if it had rested long enough."""
        self.node.rails.remotes[NETWORK.caip2].rest_until_s = float("-inf")


@asynccontextmanager
async def opened(net: Devnet, database: str, theirs: Theirs) -> AsyncIterator[Shop]:
    chain = {
        "rpc": [net.rpc_url],
        "pay_to": PAY_TO,
        "settler_key": net.settler.private_key,
        "facilitator": theirs.url,
        "facilitator_key": KEY,
        "facilitator_wait_s": 1,
    }
    settings = settings_for(
        server={"database": database, "settle_wait_s": 5}, chains={"base-sepolia": chain}
    )
    node = await app.open_node(settings)
    transport = httpx.ASGITransport(app=app.build(node), raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://shop.test") as http:
            yield Shop(node, http, net)
        async with node.db.read() as tx:
            assert await audit.verify(tx, await tx.now_ms()) == []
    finally:
        for lane in node.rails.lanes.values():
            if lane.runner is not None:
                await asyncio.wait([lane.runner])
            await asyncio.gather(*lane.in_flight)
        await app.close_node(node)


@pytest.mark.parametrize("character", [honest, pending], ids=lambda c: c.__name__)
async def test_it_settles_and_we_send_nothing(
    chain_net: Devnet, db_url: str, theirs: Theirs, character: Answer
) -> None:
    theirs.character = character
    wallet = new_wallet(chain_net)
    async with opened(chain_net, db_url, theirs) as shop:
        sent, before = shop.ours(), chain_net.balance_units(PAY_TO)
        header = await shop.signed(wallet)
        paid = await shop.buy(wallet, header)
        assert paid.status_code == 200, paid.text
        assert chain_net.receipt(outcome(paid)["transaction"])["status"] == "0x1"
        assert shop.ours() == sent
        assert chain_net.balance_units(PAY_TO) == before + 1_000_000
        assert await shop.minted() == [1_000_000]
        again = await shop.buy(wallet, header)
        assert (again.status_code, again.headers["farebox-replayed"]) == (200, "true")
        assert await shop.minted() == [1_000_000]
        assert len(theirs.asked) == 1


@pytest.mark.parametrize("character", HOSTILE, ids=lambda c: c.__name__)
async def test_whatever_it_says_one_payment_is_one_mint(
    chain_net: Devnet, sqlite_url: str, theirs: Theirs, character: Answer
) -> None:
    theirs.character = character
    wallet = new_wallet(chain_net)
    async with opened(chain_net, sqlite_url, theirs) as shop:
        sent = shop.ours()
        header = await shop.signed(wallet)
        paid = await shop.buy(wallet, header)
        assert paid.status_code == 200, paid.text
        assert chain_net.balance_units(wallet.address) == 9_000_000
        assert await shop.minted() == [1_000_000]
        if character not in SENDS:
            assert shop.ours() == sent + 1
        # It is passed over for a while, and the next one is settled here at once.
        asked = len(theirs.asked)
        assert (await shop.buy(wallet)).status_code == 200
        assert len(theirs.asked) == asked
        assert await shop.minted() == [1_000_000] * 2
        assert chain_net.balance_units(wallet.address) == 8_000_000


async def test_what_it_sends_late_moves_nothing_more(
    chain_net: Devnet, sqlite_url: str, theirs: Theirs
) -> None:
    theirs.character = fails
    wallet = new_wallet(chain_net)
    async with opened(chain_net, sqlite_url, theirs) as shop:
        assert (await shop.buy(wallet)).status_code == 200
        theirs.send(theirs.asked[0])
        await shop.finished()
        assert await shop.minted() == [1_000_000]
        assert chain_net.balance_units(wallet.address) == 9_000_000


async def test_sent_and_in_no_block_is_pending_and_never_pay_again(
    chain_net: Devnet, sqlite_url: str, theirs: Theirs
) -> None:
    theirs.character = fails_after_sending
    wallet = new_wallet(chain_net)
    async with opened(chain_net, sqlite_url, theirs) as shop:
        header = await shop.signed(wallet)
        chain_net.rpc("evm_setAutomine", False)
        try:
            waits = await shop.buy(wallet, header)
        finally:
            chain_net.rpc("evm_setAutomine", True)
        assert (waits.status_code, waits.json()["code"]) == (202, "settlement_pending")
        assert "payment-required" not in waits.headers
        assert await shop.minted() == []
        chain_net.mine()
        await shop.finished()
        assert await shop.minted() == [1_000_000]
        assert (await shop.buy(wallet, header)).status_code == 200
        assert chain_net.balance_units(wallet.address) == 9_000_000


@pytest.mark.parametrize("character", [silent, silent_after_sending], ids=lambda c: c.__name__)
async def test_we_die_while_it_is_asked(
    chain_net: Devnet, db_url: str, theirs: Theirs, character: Answer
) -> None:
    """The claim stands, nothing was signed by us: whoever finds the row finishes it."""
    theirs.character = character
    wallet = new_wallet(chain_net)
    async with opened(chain_net, db_url, theirs) as shop:
        header = await shop.signed(wallet)
        buying = asyncio.create_task(shop.buy(wallet, header))
        await eventually(lambda: bool(theirs.asked), "the question")
        buying.cancel()
        await asyncio.wait([buying])
        await shop.finished()
        assert await shop.minted() == [1_000_000]
        assert (await shop.buy(wallet, header)).status_code == 200
        assert await shop.minted() == [1_000_000]
        assert chain_net.balance_units(wallet.address) == 9_000_000


async def test_two_who_find_it_sign_for_it_once(
    chain_net: Devnet, sqlite_url: str, theirs: Theirs
) -> None:
    """Both saw a payment without a transaction; the second one finds the first one's."""
    theirs.character = silent
    wallet = new_wallet(chain_net)
    async with opened(chain_net, sqlite_url, theirs) as shop:
        buying = asyncio.create_task(shop.buy(wallet))
        await eventually(lambda: bool(theirs.asked), "the question")
        buying.cancel()
        await asyncio.wait([buying])
        async with shop.node.db.read() as tx:
            payment_id = await tx.fetchval("SELECT id FROM payment")
            call = await remote.call_for(tx, payment_id)
        assert call is not None

        async def never(_tx: object, _at: object) -> bool:
            raise AssertionError("it is claimed already")

        chain = shop.node.settings.chains[0]
        job = Job(chain, call, wallet.address, (payment_id,), 2**40, never)
        chain_net.rpc("evm_setAutomine", False)
        try:
            first = await remote.ourselves(shop.node.rails, job)
            assert first is not None and first.receipt is None
            chain_net.rpc("anvil_dropTransaction", first.tx_hash)  # as if it were not on its way
            assert await remote.ourselves(shop.node.rails, job) is None
        finally:
            chain_net.rpc("evm_setAutomine", True)
        async with shop.node.db.read() as tx:
            assert await tx.fetchval("SELECT count(*) FROM chain_nonce") == 1
        await shop.finished()
        assert await shop.minted() == [1_000_000]
    theirs.end.set()


async def test_one_that_expires_with_it_has_failed_and_only_then(
    chain_net: Devnet, sqlite_url: str, theirs: Theirs
) -> None:
    """It takes the payment, and the payer's money is gone before we can hand it in."""
    wallet = new_wallet(chain_net, units=1_000_000)

    async def robs(theirs: Theirs, body: dict[str, Any]) -> web.StreamResponse:
        chain_net.rpc("anvil_impersonateAccount", wallet.address)
        chain_net.rpc("anvil_setBalance", wallet.address, hex(10**18))
        chain_net.transfer(wallet.address, "0x" + "0b" * 20, 1_000_000)
        return said(False, errorReason="insufficient_funds")

    theirs.character = robs
    async with opened(chain_net, sqlite_url, theirs) as shop:
        waits = await shop.buy(wallet)
        assert (waits.status_code, waits.json()["code"]) == (202, "settlement_pending")
        chain_net.rpc("evm_increaseTime", hex(3_600))
        chain_net.mine()
        await shop.finished()
        async with shop.node.db.read() as tx:
            row = await tx.fetchrow("SELECT state, error_code FROM payment")
        assert row is not None and row["state"] == "failed"
        assert row["error_code"] == "invalid_exact_evm_payload_authorization_valid_before"
        assert await shop.minted() == []


# -- to us, and back -------------------------------------------------------------------------------


async def standing(shop: Shop) -> str:
    """What ``/readyz`` says of it, which is ready however it is."""
    found = await ready.look(shop.node)
    assert found.ready
    return found.checks[f"{NETWORK.caip2} facilitator"]


async def test_down_and_up_again(chain_net: Devnet, sqlite_url: str, theirs: Theirs) -> None:
    theirs.character = honest
    wallet = new_wallet(chain_net)
    async with opened(chain_net, sqlite_url, theirs) as shop:

        async def by_us() -> bool:
            sent = shop.ours()
            assert (await shop.buy(wallet)).status_code == 200
            return shop.ours() > sent

        assert not await by_us()
        theirs.down = True
        assert await by_us()  # it was asked, and gave no answer
        looks, asked = theirs.looks, len(theirs.asked)
        assert await by_us()  # it is left in peace
        assert (theirs.looks, len(theirs.asked)) == (looks, asked)
        assert await standing(shop) == remote.PASSED_OVER
        shop.forgive()
        assert await standing(shop) == "not looked at"
        assert await by_us()  # still down: looked at, not asked
        assert (theirs.looks, len(theirs.asked)) == (looks + 1, asked)
        theirs.down = False
        shop.forgive()
        assert not await by_us()
        assert await standing(shop) == "ok"
        assert await shop.minted() == [1_000_000] * 5
        assert chain_net.balance_units(wallet.address) == 5_000_000


@pytest.mark.parametrize(
    "kinds",
    [
        [],
        "exact",
        [None, 1],
        [{"x402Version": 2, "scheme": "exact", "network": "eip155:8453"}],
        [{"x402Version": 1, "scheme": "exact", "network": "base-sepolia"}],
    ],
    ids=str,
)
async def test_one_that_does_not_settle_here_is_not_asked(
    chain_net: Devnet, sqlite_url: str, theirs: Theirs, kinds: Any
) -> None:
    theirs.kinds = kinds
    wallet = new_wallet(chain_net)
    async with opened(chain_net, sqlite_url, theirs) as shop:
        assert (await shop.buy(wallet)).status_code == 200
        assert theirs.asked == []
        assert await shop.minted() == [1_000_000]


async def test_what_is_not_good_is_not_shown_to_it(
    chain_net: Devnet, sqlite_url: str, theirs: Theirs
) -> None:
    poor = new_wallet(chain_net, units=999_999)
    async with opened(chain_net, sqlite_url, theirs) as shop:
        refused = await shop.buy(poor)
        assert (refused.status_code, refused.json()["code"]) == (402, "insufficient_funds")
        assert theirs.asked == []
        async with shop.node.db.read() as tx:
            assert await tx.fetchval("SELECT count(*) FROM payment") == 0


async def test_turned_off_in_the_middle_of_many(
    chain_net: Devnet, db_url: str, theirs: Theirs
) -> None:
    """Purchases go on by the next way, and none is minted twice."""
    answered = 0

    async def stops(theirs: Theirs, body: dict[str, Any]) -> web.StreamResponse:
        nonlocal answered
        answered += 1
        if answered == 5:
            theirs.down = True
        if answered >= 5:
            return await silent_after_sending(theirs, body)
        return await honest(theirs, body)

    theirs.character = stops
    buyers = [new_wallet(chain_net, units=1_000_000) for _ in range(10)]
    async with opened(chain_net, db_url, theirs) as shop:
        before = chain_net.balance_units(PAY_TO)
        got = await asyncio.gather(*(shop.buy(each) for each in buyers))
        assert {each.status_code for each in got} <= {200, 202}
        await shop.finished()
        assert await shop.minted() == [1_000_000] * 10
        assert chain_net.balance_units(PAY_TO) == before + 10_000_000
