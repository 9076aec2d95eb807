"""Our own sales by Permit2 to wallets that never approved it: one signature more, no gas."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from typing import Any

import pytest

from anvil.devnet import Devnet
from chain.errors import Rejected
from chain.eth import selector
from chain.schemes import eip2612, permit2
from gateway.config import ConfigError
from gateway.db import Database, Tx
from gateway.errors import Problem
from gateway.payments import challenge, gas, journal, offers, permits, watcher
from gateway.payments.journal import Payment
from gateway.payments.lane import Begun
from gateway.payments.recover import recover
from gateway.payments.wire import decode_object
from tests.fixtures_chain import USDC, FaultyNode
from tests.fixtures_permit2 import (
    approve,
    hand_in_permit,
    permit,
    plant,
    settle_by_stranger,
    take_back,
)
from tests.gateway.ledger import helpers
from tests.gateway.payments.parts import Desk, settings_for
from tests.gateway.payments.test_finality import account
from tests.gateway.payments.test_permit2 import (
    ASKED,
    CHAIN,
    UNITS,
    blocked,
    by_permit2,
    desk_at,
    give,
    look,
    offer_of,
    pay,
    refused,
    row,
    send,
    transactions,
    whole,
)

LATER_MS = 2**62
WITH_PERMIT = selector(
    "settleWithPermit((uint256,uint256,bytes32,bytes32,uint8),"
    "((address,uint256),uint256,uint256),address,(address,uint256),bytes)"
)
PLAIN = selector("settle(((address,uint256),uint256,uint256),address,(address,uint256),bytes)")


@pytest.fixture
def net(chain_net: Devnet) -> Devnet:
    """A chain with Permit2 and the proxy; nobody has approved anything."""
    plant(chain_net)
    return chain_net


def sponsoring(net: Devnet, database: str, *urls: str, **options: Any) -> Any:
    return desk_at(net, database, *urls, **({"eip2612": True} | options))


def sponsored(offer: dict[str, Any], payload: dict[str, Any], extensions: Any) -> dict[str, Any]:
    return whole(offer, payload) | {"extensions": extensions}


async def calls(desk: Desk) -> list[bytes]:
    """What each call that was signed begins with, oldest first."""
    async with desk.rails.db.read() as tx:
        rows = await tx.fetch("SELECT data FROM chain_member ORDER BY nonce")
    return [bytes(each["data"])[:4] for each in rows]


# --- what a 402 says --------------------------------------------------------------------------


def declared(problem: Problem) -> dict[str, Any]:
    found = json.loads(base64.b64decode(problem.headers["PAYMENT-REQUIRED"]))
    extensions: dict[str, Any] = found["extensions"]
    return extensions


def test_credits_say_so_only_where_permit2_is_offered_and_it_is_chosen() -> None:
    keys = offers.Keys("d-tests", {b"\0\0\0\1": b"k" * 32}, b"\0\0\0\1")

    def told(**options: Any) -> dict[str, Any]:
        settings = settings_for(chains={"base-sepolia": CHAIN | options})
        return declared(challenge.for_credits(settings, keys, ASKED, 0, UNITS))

    assert eip2612.KEY not in told()
    assert eip2612.KEY not in told(permit2=True)
    said = told(permit2=True, eip2612=True)[eip2612.KEY]
    assert said["info"]["version"] == "1"
    # What a client fills in stands in none of it: where both have a value, the server's wins.
    assert set(said["info"]) == {"description", "version"}
    assert set(said["schema"]["required"]) > {"from", "nonce", "signature"}


def test_it_needs_permit2() -> None:
    with pytest.raises(ConfigError, match=r"eip2612.* needs permit2 = true"):
        settings_for(chains={"base-sepolia": CHAIN | {"eip2612": True}})


# --- a payment --------------------------------------------------------------------------------


async def test_a_wallet_without_gas_and_approval_pays_once_on_two_nodes(
    net: Devnet, db_url: str
) -> None:
    payer = net.accounts[5]
    net.rpc("anvil_setBalance", payer.address, "0x0")
    async with sponsoring(net, db_url) as one, sponsoring(net, db_url) as two:
        body = sponsored(offer_of(one), by_permit2(payer), permit(payer, UNITS))
        before = transactions(net)
        told = await asyncio.gather(*(pay(desk, body) for desk in (one, two, one, two)))
        assert {each.payment.state for each in told} == {"succeeded"}
        assert len({each.payment.id for each in told}) == 1
        assert transactions(net) == before + 1
        assert await calls(one) == [WITH_PERMIT]
        ((ref, payment_id, units),) = await one.minted()
        assert (ref, payment_id, units) == (told[0].payment.tx_hash, told[0].payment.id, UNITS)
        assert (await account(one, payer.address)).available_units == UNITS
        assert await helpers.faults(one.rails.db) == []
        # The same one without its permit is the same payment; with other content it is not.
        assert (await pay(two, whole(body["accepted"], body["payload"]))).payment == told[0].payment
        with pytest.raises(Problem) as raised:
            await pay(two, body, b"d" * 32)
        assert raised.value.code == "payment_already_used"


async def test_where_it_is_approved_the_permit_is_left_alone(net: Devnet, db_url: str) -> None:
    payer = net.accounts[5]
    approve(net, payer)
    async with sponsoring(net, db_url) as desk:
        body = sponsored(offer_of(desk), by_permit2(payer), permit(payer, UNITS))
        assert (await pay(desk, body)).payment.state == "succeeded"
        assert await calls(desk) == [PLAIN]


async def test_a_client_that_only_echoes_is_told_what_to_do(net: Devnet, sqlite_url: str) -> None:
    payer = net.accounts[5]
    async with sponsoring(net, sqlite_url) as desk:
        settings, keys = desk.rails.settings, desk.rails.keys
        echo = declared(challenge.for_credits(settings, keys, ASKED, 0, UNITS))
        refusal = await refused(desk, sponsored(offer_of(desk), by_permit2(payer), echo))
        assert (refusal.code, refusal.status) == ("PERMIT2_ALLOWANCE_REQUIRED", 412)
        assert eip2612.KEY in refusal.detail


async def test_where_it_is_off_a_permit_counts_for_nothing(net: Devnet, sqlite_url: str) -> None:
    payer = net.accounts[5]
    async with desk_at(net, sqlite_url) as desk:
        body = sponsored(offer_of(desk), by_permit2(payer), permit(payer, UNITS))
        refusal = await refused(desk, body)
        assert refusal.code == "PERMIT2_ALLOWANCE_REQUIRED"
        assert eip2612.KEY not in refusal.detail
        wrong = sponsored(offer_of(desk), by_permit2(payer), permit(payer, UNITS + 1))
        assert (await refused(desk, wrong)).code == "PERMIT2_ALLOWANCE_REQUIRED"


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"nonce": "0x0"}, 400, "invalid_eip2612_extension_format"),
        ({"version": "2"}, 400, "invalid_eip2612_extension_format"),
        ({"from": "0x" + "0b" * 20}, 402, "eip2612_from_mismatch"),
        ({"asset": "0x" + "0b" * 20}, 402, "eip2612_asset_mismatch"),
        ({"spender": permit2.EXACT_PROXY}, 402, "eip2612_spender_not_permit2"),
        ({"deadline": "1700000000"}, 402, "eip2612_deadline_expired"),
        ({"amount": str(UNITS - 1)}, 402, "permit2_2612_amount_mismatch"),
        ({"amount": str(2**256 - 1)}, 402, "permit2_2612_amount_mismatch"),
        ({"nonce": "1", "signature": "0x" + "1b" * 65}, 412, "PERMIT2_ALLOWANCE_REQUIRED"),
    ],
)
async def test_a_permit_that_is_not_the_one_is_refused(
    net: Devnet, sqlite_url: str, change: dict[str, str], status: int, code: str
) -> None:
    payer = net.accounts[5]
    extensions = permit(payer, UNITS)
    extensions[eip2612.KEY]["info"] |= change
    async with sponsoring(net, sqlite_url) as desk:
        refusal = await refused(desk, sponsored(offer_of(desk), by_permit2(payer), extensions))
        assert (refusal.status, refusal.code) == (status, code)


async def test_beside_what_is_signed_by_eip3009_it_is_not_looked_at(net: Devnet) -> None:
    """A stock client sends back whatever was declared, whichever offer it takes."""
    from tests.fixtures_chain import payment

    payer = net.accounts[5]
    body = whole({}, payment(payer, "0x" + "ab" * 20, UNITS))
    body["accepted"] = {
        "scheme": "exact",
        "network": "eip155:84532",
        "asset": USDC.address,
        "payTo": "0x" + "ab" * 20,
        "amount": str(UNITS),
    }
    body["extensions"] = {eip2612.KEY: {"info": {"signature": "odd"}}}
    assert decode_object(body, permit2=True).authorization.from_ == payer.address.lower()


# --- who comes between ------------------------------------------------------------------------


def once_verified(node: FaultyNode, act: Callable[[], object]) -> None:
    """Do something on chain between our looking at a payment and our sending it."""
    left = [act]

    def change(asked: dict[str, Any], result: Any) -> Any:
        if asked["params"][0]["to"] == permit2.EXACT_PROXY and left:
            left.pop()()
        return result

    node.fault("eth_call", "change_by", change)


async def test_the_permit_is_handed_in_by_somebody_else(
    net: Devnet, db_url: str, faulty_node: FaultyNode
) -> None:
    payer = net.accounts[5]
    extensions = permit(payer, UNITS)
    once_verified(faulty_node, lambda: hand_in_permit(net, extensions))
    async with sponsoring(net, db_url, faulty_node.url) as desk:
        told = await pay(desk, sponsored(offer_of(desk), by_permit2(payer), extensions))
        assert told.payment.state == "succeeded"
        assert [units for *_, units in await desk.minted()] == [UNITS]


async def test_a_proxy_that_minds_a_used_permit_gets_the_plain_call(
    net: Devnet, db_url: str, faulty_node: FaultyNode
) -> None:
    payer = net.accounts[5]
    extensions = permit(payer, UNITS)
    once_verified(faulty_node, lambda: hand_in_permit(net, extensions))
    minds = {"code": 3, "message": "execution reverted", "data": "0x"}
    faulty_node.fault("eth_estimateGas", "error", minds, times=1)
    async with sponsoring(net, db_url, faulty_node.url) as desk:
        told = await pay(desk, sponsored(offer_of(desk), by_permit2(payer), extensions))
        assert told.payment.state == "succeeded"
        assert await calls(desk) == [PLAIN]


async def test_the_permit_is_used_and_taken_back(
    net: Devnet, db_url: str, faulty_node: FaultyNode
) -> None:
    """Nothing is claimed, so the same payment is good once there is an allowance again."""
    payer = net.accounts[5]
    extensions = permit(payer, UNITS)

    def use() -> None:
        hand_in_permit(net, extensions)
        approve(net, payer, 0)

    once_verified(faulty_node, use)
    async with sponsoring(net, db_url, faulty_node.url) as desk:
        body = sponsored(offer_of(desk), by_permit2(payer), extensions)
        assert (await refused(desk, body)).code == "PERMIT2_ALLOWANCE_REQUIRED"
        faulty_node.faults.clear()
        refusal = await refused(desk, body)
        assert (refusal.status, "the token is at 1" in refusal.detail) == (412, True)
        assert not await blocked(desk, payer)
        body["extensions"] = permit(payer, UNITS, nonce=1)
        assert (await pay(desk, body)).payment.state == "succeeded"
        assert [units for *_, units in await desk.minted()] == [UNITS]


async def test_the_nonce_is_invalidated(net: Devnet, db_url: str, faulty_node: FaultyNode) -> None:
    payer = net.accounts[5]
    payload = by_permit2(payer)
    once_verified(faulty_node, lambda: take_back(net, payload))
    async with sponsoring(net, db_url, faulty_node.url) as desk:
        body = sponsored(offer_of(desk), payload, permit(payer, UNITS))
        assert (await refused(desk, body)).code == "permit2_invalid_nonce"


@pytest.mark.parametrize("between", [False, True], ids=["before", "between"])
async def test_the_whole_payment_is_handed_in_by_somebody_else(
    net: Devnet, db_url: str, faulty_node: FaultyNode, between: bool
) -> None:
    payer = net.accounts[5]
    payload, extensions = by_permit2(payer), permit(payer, UNITS)
    theirs: list[str] = []

    def settle() -> None:
        theirs.append(settle_by_stranger(net, payload, extensions))

    if between:
        once_verified(faulty_node, settle)
    else:
        settle()
    async with sponsoring(net, db_url, faulty_node.url) as desk:
        told = await pay(desk, sponsored(offer_of(desk), payload, extensions))
        assert (told.payment.state, [told.payment.tx_hash]) == ("succeeded", theirs)
        assert await desk.minted() == [(theirs[0], told.payment.id, UNITS)]
        assert await calls(desk) == []


# --- claimed, and the process is gone ---------------------------------------------------------


async def pending(desk: Desk, payload: dict[str, Any], extensions: dict[str, Any]) -> Any:
    """A payment that is claimed and signed, and reached no node."""
    told = await pay(desk, sponsored(offer_of(desk), payload, extensions))
    assert told.payment.state == "processing"
    assert await calls(desk) == [WITH_PERMIT]
    return told.payment


@pytest.mark.parametrize("how", ["sent", "permit", "whole", "bumped"])
async def test_one_that_is_claimed_is_minted_once_by_whatever_moved_it(
    net: Devnet, db_url: str, faulty_node: FaultyNode, how: str
) -> None:
    payer = net.accounts[5]
    payload, extensions = by_permit2(payer), permit(payer, UNITS)
    faulty_node.fault("eth_sendRawTransaction", "drop")
    async with sponsoring(net, db_url, faulty_node.url, wait_s=1) as desk:
        await watcher.begin(desk.rails, desk.rails.settings.chains[0], USDC)
        claimed = await pending(desk, payload, extensions)
        if how == "whole":
            tx_hash = settle_by_stranger(net, payload, extensions)
            net.mine(70)  # safe: the watcher would credit a deposit
            assert await give(desk, tx_hash, "0x" + "99" * 20) == "taken"
        elif how == "bumped":
            faulty_node.faults.clear()
            chain, settler = desk.rails.settings.chains[0], net.settler.address
            await gas.tend(desk.rails, desk.rpc, chain, settler, patience_ms=0)
            async with desk.rails.db.read() as tx:
                rows = await tx.fetch("SELECT tx_hash FROM chain_tx ORDER BY at_ms, tx_hash")
            tx_hash = next(each["tx_hash"] for each in rows if on_chain(net, each["tx_hash"]))
        else:
            if how == "permit":
                hand_in_permit(net, extensions)
            tx_hash = await send(desk, claimed)
        await look(desk)
        assert await recover(desk.rails, await row(desk, claimed)) == "succeeded"
        await look(desk)
        done = await row(desk, claimed)
        assert (done.state, done.tx_hash) == ("succeeded", tx_hash)
        assert await desk.minted() == [(tx_hash, done.id, UNITS)]
        async with desk.rails.db.read() as tx:
            assert await tx.fetchval("SELECT count(*) FROM payment") == 1
        assert await helpers.faults(desk.rails.db) == []


def on_chain(net: Devnet, tx_hash: str) -> bool:
    return net.rpc("eth_getTransactionReceipt", tx_hash) is not None


async def test_ours_fails_and_moves_nothing(
    net: Devnet, db_url: str, faulty_node: FaultyNode
) -> None:
    """The payer used its permit for itself: known at once, and counted against it."""
    payer = net.accounts[5]
    faulty_node.fault("eth_sendRawTransaction", "drop")
    async with sponsoring(net, db_url, faulty_node.url, wait_s=1) as desk:
        extensions = permit(payer, UNITS)
        claimed = await pending(desk, by_permit2(payer), extensions)
        hand_in_permit(net, extensions)
        approve(net, payer, 0)
        async with desk.rails.db.read() as tx:
            raw = bytes(await tx.fetchval("SELECT raw FROM chain_tx"))
        failed = net.rpc("eth_sendRawTransaction", "0x" + raw.hex())
        assert net.receipt(failed)["status"] == "0x0"
        assert await recover(desk.rails, claimed) == "failed"
        assert await blocked(desk, payer)
        assert await desk.minted() == []
        assert transactions(net) == int(
            net.rpc("eth_getTransactionCount", net.settler.address, "latest"), 16
        )


# --- one permit, two payments -----------------------------------------------------------------


async def test_a_permit_is_sent_with_one_payment_at_a_time(
    net: Devnet, db_url: str, faulty_node: FaultyNode
) -> None:
    """A client that pays for two calls at once signs the same permit nonce for both."""
    payer = net.accounts[5]
    faulty_node.fault("eth_sendRawTransaction", "drop")
    async with (
        sponsoring(net, db_url, faulty_node.url, wait_s=1) as one,
        sponsoring(net, db_url) as two,
    ):
        first = await pending(one, by_permit2(payer), permit(payer, UNITS))
        other = by_permit2(payer)
        body = sponsored(offer_of(two), other, permit(payer, UNITS))
        with pytest.raises(Problem) as raised:
            await pay(two, body)
        assert raised.value.code == "PERMIT2_ALLOWANCE_REQUIRED"
        assert "is under way" in raised.value.detail
        assert await calls(two) == [WITH_PERMIT]
        async with two.rails.db.read() as tx:
            assert await tx.fetchval("SELECT count(*) FROM payment") == 1
        # Whoever repeats the first one is told of the first one.
        await send(one, first)
        assert await recover(one.rails, first) == "succeeded"
        with pytest.raises(Problem) as raised:
            await pay(two, body)
        assert "the token is at 1" in raised.value.detail
        body["extensions"] = permit(payer, UNITS, nonce=1)
        assert (await pay(two, body)).payment.state == "succeeded"
        assert not await blocked(two, payer)
        assert [units for *_, units in await two.minted()] == [UNITS] * 2


async def test_one_that_is_approved_meanwhile_waits_for_the_permit_all_the_same(
    net: Devnet, db_url: str, faulty_node: FaultyNode
) -> None:
    """The permit that is under way takes the approval down to what its payment uses up."""
    payer = net.accounts[5]
    faulty_node.fault("eth_sendRawTransaction", "drop")
    async with sponsoring(net, db_url, faulty_node.url, wait_s=1) as desk:
        first = await pending(desk, by_permit2(payer), permit(payer, UNITS))
        once_verified(faulty_node, lambda: approve(net, payer))
        body = sponsored(offer_of(desk), by_permit2(payer), permit(payer, UNITS))
        with pytest.raises(Problem, match="is under way"):
            await pay(desk, body)
        faulty_node.faults.clear()
        await send(desk, first)
        assert await recover(desk.rails, first) == "succeeded"
        with pytest.raises(Problem, match="the token is at 1"):
            await pay(desk, body)
        assert await calls(desk) == [WITH_PERMIT]


async def test_a_permit_is_free_again_when_its_payment_has_failed(
    net: Devnet, db_url: str, faulty_node: FaultyNode
) -> None:
    payer = net.accounts[5]
    faulty_node.fault("eth_sendRawTransaction", "drop")
    async with sponsoring(net, db_url, faulty_node.url, wait_s=1) as desk:
        await pending(desk, by_permit2(payer), permit(payer, UNITS))
        async with desk.rails.db.write() as tx:  # as if it had expired in no block
            await tx.execute("UPDATE payment SET state = 'failed', updated_at_ms = 0")
            await tx.execute("DELETE FROM chain_nonce")
            await tx.execute("DELETE FROM chain_member")
            await tx.execute("DELETE FROM gas_account")
        await pending(desk, by_permit2(payer), permit(payer, UNITS))
        body = sponsored(offer_of(desk), by_permit2(payer), permit(payer, UNITS))
        with pytest.raises(Problem, match="is under way"):  # with the second one
            await pay(desk, body)
        async with desk.rails.db.read() as tx:
            assert await tx.fetchval("SELECT count(*) FROM payment") == 2


async def test_of_two_that_find_it_free_again_one_waits_for_the_other(
    net: Devnet, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row is there from a payment that has ended: whoever comes second sees the new one."""
    payer = net.accounts[5]
    given = permit2.parse(by_permit2(payer), permit(payer, UNITS)).permit
    assert given is not None
    async with desk_at(net, postgres_url) as desk:
        db = desk.rails.db

        async def claim() -> None:
            job = desk.job(payer)
            async with db.write() as tx:
                assert await job.begin(tx, Begun(1, 0))
                await permits.hold(tx, job, given, LATER_MS, 1)

        await claim()
        async with db.write() as tx:
            await tx.execute("UPDATE payment SET state = 'failed'")
        others: list[asyncio.Task[None]] = []
        by_id = journal.by_id

        async def slowly(tx: Tx, payment_id: str, *, lock: bool = False) -> Payment | None:
            """The other one comes when the first has read whose it was: no wire shows that."""
            if not others:
                others.append(asyncio.create_task(claim()))
                await waiting(db)
            return await by_id(tx, payment_id, lock=lock)

        monkeypatch.setattr(journal, "by_id", slowly)
        await claim()
        with pytest.raises(Rejected, match="is under way"):
            await others[0]


async def test_one_that_was_under_way_when_we_looked_counts_as_such(
    net: Devnet, db_url: str
) -> None:
    """It has used the permit since, and what the chain said of it before is worth nothing."""
    payer = net.accounts[5]
    given = permit2.parse(by_permit2(payer), permit(payer, UNITS)).permit
    assert given is not None
    async with desk_at(net, db_url) as desk:

        async def claim(since_ms: int) -> None:
            job = desk.job(payer)
            async with desk.rails.db.write() as tx:
                assert await job.begin(tx, Begun(1, 0))
                await permits.hold(tx, job, given, since_ms, 1)

        await claim(LATER_MS)
        async with desk.rails.db.write() as tx:
            await tx.execute("UPDATE payment SET state = 'succeeded', updated_at_ms = 1000")
        with pytest.raises(Rejected, match="is under way"):
            await claim(1_000)
        await claim(1_001)


async def waiting(db: Database) -> None:
    """Return when a transaction waits for another's row."""
    sql = (
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        " AND datname = current_database()"
    )
    for _ in range(2_000):
        async with db.read() as tx:
            if await tx.fetchval(sql):
                return
        await asyncio.sleep(0.01)
    raise AssertionError("nobody waits")


async def test_two_payments_with_one_permit_at_once_at_two_nodes(
    net: Devnet, db_url: str, faulty_node: FaultyNode
) -> None:
    """Both pass the look at the chain; one is sent."""
    payer = net.accounts[5]
    async with sponsoring(net, db_url) as one, sponsoring(net, db_url) as two:
        bodies = [
            sponsored(offer_of(one), by_permit2(payer), permit(payer, UNITS)) for _ in range(4)
        ]
        before = transactions(net)
        told = await asyncio.gather(
            *(pay(desk, body) for desk, body in zip((one, two) * 2, bodies, strict=True)),
            return_exceptions=True,
        )
        paid = [each for each in told if not isinstance(each, BaseException)]
        codes = {each.code for each in told if isinstance(each, Problem)}
        assert ([each.payment.state for each in paid], codes) == (
            ["succeeded"],
            {"PERMIT2_ALLOWANCE_REQUIRED"},
        )
        assert transactions(net) == before + 1
        assert [units for *_, units in await one.minted()] == [UNITS]
        assert not await blocked(one, payer)
