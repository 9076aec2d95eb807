"""When a transfer becomes credits, and what becomes of them when its block leaves the chain.

On a chain of its own whose blocks are safe after 4 more and final after 8.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from anvil.devnet import Devnet, Options, running
from chain.blocks import Trail
from chain.transfers import Transfer
from gateway import ledger
from gateway.accounts import wallets
from gateway.ledger import read
from gateway.payments import confirm, exposure, inbound, journal
from gateway.payments.inbound import Inbound
from gateway.payments.recover import recover
from tests.fixtures_chain import NETWORK, USDC, FaultyNode
from tests.gateway.ledger import helpers
from tests.gateway.ledger.helpers import T0
from tests.gateway.payments.parts import PAY_TO, Claimed, Desk, opened_desk

Open = Callable[..., AbstractAsyncContextManager[Desk]]


@pytest.fixture(scope="module")
def shallow() -> Iterator[Devnet]:
    with running(options=Options(slots_in_an_epoch=4)) as net:
        yield net


@pytest.fixture
async def desk(shallow: Devnet, sqlite_url: str) -> AsyncIterator[Desk]:
    async with opened_desk(shallow, sqlite_url) as found:
        yield found
        assert await helpers.faults(found.rails.db) == []


async def take(desk: Desk, claimed: Claimed) -> str:
    """Send it, and look once."""
    desk.net.receipt(desk.send(claimed))
    return await recover(desk.rails, await desk.payment(claimed))


async def look(desk: Desk, trail: Trail | None = None) -> list[tuple[Inbound, inbound.Depth]]:
    return await confirm.look(desk.rails, desk.rails.settings.chains[0], trail or Trail())


async def row_of(desk: Desk, claimed: Claimed) -> Inbound:
    async with desk.rails.db.read() as tx:
        found = await inbound.known(tx, NETWORK.caip2, claimed.prepared.tx_hash)
    assert len(found) == 1
    return found[0]


async def account(desk: Desk, wallet: str) -> read.AccountView:
    async with desk.rails.db.read() as tx:
        account_id = await wallets.find(tx, wallet)
        seen = None if account_id is None else await read.account(tx, account_id)
    assert seen is not None
    return seen


async def state(desk: Desk, claimed: Claimed) -> str:
    return (await desk.payment(claimed)).state


async def spend(desk: Desk, wallet: str, units: int, request_id: str) -> ledger.Outcome:
    """A call of the wallet that costs this much."""
    account_id = (await account(desk, wallet)).id
    async with desk.rails.db.write() as tx:
        now_ms = await tx.now_ms()
        held = (await ledger.apply(tx, [helpers.hold(account_id, request_id, units)], now_ms))[0]
        if not isinstance(held, ledger.Held):
            return held
        return (await ledger.apply(tx, [ledger.Close(held.hold, units)], now_ms))[0]


# --- how deep -------------------------------------------------------------------------------


async def test_a_small_amount_is_minted_at_inclusion_and_followed_until_final(desk: Desk) -> None:
    claimed = await desk.claim()
    assert await take(desk, claimed) == "succeeded"
    row = await row_of(desk, claimed)
    assert (row.state, row.depth) == ("minted", "included")
    trail = Trail()
    seen = []
    for _ in range(12):
        desk.net.mine()
        await look(desk, trail)
        depth = (await row_of(desk, claimed)).depth
        if depth not in seen:
            seen.append(depth)
        assert row.lot_id is not None
        async with desk.rails.db.read() as tx:
            assert await exposure.provisional(tx, row.lot_id) is (depth != "final")
    assert seen == ["included", "safe", "final"]
    assert await look(desk, trail) == []
    assert trail.blocks == {}


@pytest.mark.parametrize(
    ("otherwise", "blocks"), [("safe", 4), ("finalized", 8), (2, 2), (6, 6), ("included", 4)]
)
async def test_a_large_amount_waits_for_its_block(
    shallow: Devnet, sqlite_url: str, otherwise: str | int, blocks: int
) -> None:
    mint_at = {"instant_limit": "$5", "otherwise": otherwise}
    async with opened_desk(shallow, sqlite_url, mint_at=mint_at) as desk:
        claimed = await desk.claim(units=6_000_000)
        assert await take(desk, claimed) == "processing"
        for _ in range(blocks - 1):
            desk.net.mine()
            await look(desk)
            assert await state(desk, claimed) == "processing"
        assert await desk.minted() == []
        desk.net.mine()
        await look(desk)
        assert await state(desk, claimed) == "succeeded"
        paid = (claimed.prepared.tx_hash, claimed.payment.id, 6_000_000)
        assert await desk.minted() == [paid]
        await look(desk)
        assert await recover(desk.rails, await desk.payment(claimed)) == "succeeded"
        assert await desk.minted() == [paid]
        assert await helpers.faults(desk.rails.db) == []


async def test_small_amounts_of_one_wallet_add_up(desk: Desk) -> None:
    payer, other = desk.net.accounts[:2]
    paid = [await desk.claim(payer, units=2_000_000) for _ in range(3)]
    assert [await take(desk, each) for each in paid] == ["succeeded", "succeeded", "processing"]
    assert await take(desk, await desk.claim(other, units=5_000_000)) == "succeeded"
    assert (await account(desk, payer.address)).available_units == 4_000_000
    desk.net.mine(3)  # the first two are safe then, the third is not
    await look(desk)
    assert await state(desk, paid[2]) == "succeeded"
    assert (await account(desk, payer.address)).available_units == 6_000_000


async def test_all_wallets_together_have_a_limit(shallow: Devnet, sqlite_url: str) -> None:
    async with opened_desk(shallow, sqlite_url, exposure_limit="$3") as desk:
        paid = [await desk.claim(desk.net.accounts[i], units=1_500_000) for i in range(3)]
        said = [await take(desk, each) for each in paid]
        assert said == ["succeeded", "succeeded", "processing"]
        desk.net.mine(2)
        await look(desk)
        assert await state(desk, paid[2]) == "succeeded"


async def test_two_nodes_do_not_both_take_the_last_of_the_limit(
    shallow: Devnet, postgres_url: str
) -> None:
    limited: dict[str, Any] = {"exposure_limit": "$2"}
    async with (
        opened_desk(shallow, postgres_url, **limited) as one,
        opened_desk(shallow, postgres_url, **limited) as two,
    ):
        for turn in range(4):
            first = await one.claim(one.net.accounts[2 * turn % 8], units=1_500_000)
            second = await two.claim(two.net.accounts[(2 * turn + 1) % 8], units=1_500_000)
            said = await asyncio.gather(take(one, first), take(two, second))
            assert sorted(said) == ["processing", "succeeded"]
            one.net.mine(10)
            await asyncio.gather(look(one), look(two))
            assert [await state(one, first), await state(two, second)] == ["succeeded"] * 2
        assert len(await one.minted()) == 8
        assert await helpers.faults(one.rails.db) == []


# --- blocks that leave ----------------------------------------------------------------------


async def reversed_by(desk: Desk, claimed: Claimed, trail: Trail, depth: int) -> None:
    """The block with the payment leaves the chain; one look reverses what it minted."""
    desk.net.mine(depth - 1)
    await look(desk, trail)
    desk.net.rpc("anvil_reorg", depth, [])
    await look(desk, trail)
    row = await row_of(desk, claimed)
    assert (row.state, await state(desk, claimed)) == ("gone", "processing")


@pytest.mark.parametrize("spent", [0, 7_000, 10_000])
@pytest.mark.parametrize("depth", range(1, 9))
async def test_what_leaves_the_chain_is_reversed_and_comes_back_once(
    desk: Desk, depth: int, spent: int
) -> None:
    """Also below what this node had called safe: only what is final is not looked at again."""
    payer = desk.net.accounts[0]
    claimed = await desk.claim(payer)
    trail = Trail()
    assert await take(desk, claimed) == "succeeded"
    minted = await desk.minted()
    if spent:
        assert isinstance(await spend(desk, payer.address, spent, "r1"), ledger.Closed)
    await reversed_by(desk, claimed, trail, depth)
    gone = await account(desk, payer.address)
    assert (gone.available_units, gone.debt_units) == (0, spent)
    refused = await spend(desk, payer.address, 1, "r2")
    assert isinstance(refused, ledger.Frozen if spent else ledger.Short)
    await look(desk, trail)  # once is enough
    assert (await account(desk, payer.address)).debt_units == spent

    # Whoever finishes payments sends the very same bytes again.
    assert await recover(desk.rails, await desk.payment(claimed)) == "processing"
    desk.net.receipt(claimed.prepared.tx_hash)
    assert await recover(desk.rails, await desk.payment(claimed)) == "succeeded"
    back = await account(desk, payer.address)
    assert (back.available_units, back.debt_units) == (10_000 - spent, 0)
    assert await desk.minted() == minted
    desk.net.mine(10)
    await look(desk, trail)
    row = await row_of(desk, claimed)
    assert (row.state, row.depth) == ("minted", "final")
    assert (await account(desk, payer.address)).available_units == 10_000 - spent


async def test_on_postgres_and_seen_by_two_nodes_it_is_reversed_once(
    shallow: Devnet, postgres_url: str
) -> None:
    async with (
        opened_desk(shallow, postgres_url) as one,
        opened_desk(shallow, postgres_url) as two,
    ):
        for turn in range(3):
            payer = shallow.accounts[turn]
            claimed = await one.claim(payer)
            assert await take(one, claimed) == "succeeded"
            await spend(one, payer.address, 4_000, f"r{turn}")
            shallow.rpc("anvil_reorg", 1, [])
            await asyncio.gather(look(one), look(two), look(one), look(two))
            gone = await account(one, payer.address)
            assert (gone.available_units, gone.debt_units) == (0, 4_000)
            shallow.receipt(one.send(claimed))
            payment = await one.payment(claimed)
            said = await asyncio.gather(
                *(recover(desk.rails, payment) for desk in (one, two, one, two))
            )
            assert set(said) == {"succeeded"}
            back = await account(one, payer.address)
            assert (back.available_units, back.debt_units) == (6_000, 0)
        assert len(await one.minted()) == 3
        assert await helpers.faults(one.rails.db) == []


async def test_a_transaction_that_moves_to_another_block_stays_one_mint(desk: Desk) -> None:
    claimed = await desk.claim()
    assert await take(desk, claimed) == "succeeded"
    before = await row_of(desk, claimed)
    desk.net.mine(3)
    raw = "0x" + claimed.prepared.raw.hex()
    desk.net.rpc("anvil_reorg", 4, [[raw, 2]])
    await look(desk)
    after = await row_of(desk, claimed)
    assert after.block_hash != before.block_hash
    assert after.block_hash == desk.net.receipt(claimed.prepared.tx_hash)["blockHash"]
    assert (after.state, after.depth, after.lot_id) == ("minted", "included", before.lot_id)
    payer = claimed.payment.payer or ""
    async with desk.rails.db.read() as tx:
        lines = await read.statement(tx, (await account(desk, payer)).id, 10)
    assert [line.kind for line in lines] == ["mint"]


async def test_by_another_transaction_it_mints_once_more_and_pays_the_debt(desk: Desk) -> None:
    payer = desk.net.accounts[3]
    claimed = await desk.claim(payer)
    trail = Trail()
    assert await take(desk, claimed) == "succeeded"
    first = await row_of(desk, claimed)
    await spend(desk, payer.address, 4_000, "r1")
    await reversed_by(desk, claimed, trail, 2)
    theirs = desk.send_by_stranger(claimed)
    desk.net.receipt(theirs)
    assert await recover(desk.rails, await desk.payment(claimed)) == "succeeded"
    seen = await account(desk, payer.address)
    assert (seen.available_units, seen.debt_units) == (6_000, 0)
    async with desk.rails.db.read() as tx:
        mint = (await read.statement(tx, seen.id, 20))[::-1]
    reasons = [line.reason for line in mint if line.kind == "mint"]
    assert reasons == ["x402", f"x402, in place of lot {first.lot_id}"]
    assert (await desk.payment(claimed)).tx_hash == theirs


async def test_one_that_cannot_come_back_is_reversed_for_good(desk: Desk) -> None:
    payer = desk.net.accounts[4]
    at_s = int(desk.net.rpc("eth_getBlockByNumber", "latest", False)["timestamp"], 16)
    claimed = await desk.claim(payer, valid_before_s=at_s + 600)
    assert await take(desk, claimed) == "succeeded"
    await spend(desk, payer.address, 10_000, "r1")
    await reversed_by(desk, claimed, Trail(), 1)
    desk.net.rpc("evm_setNextBlockTimestamp", at_s + 700)
    desk.net.mine()
    assert await recover(desk.rails, await desk.payment(claimed)) == "reversed"
    assert (await desk.payment(claimed)).state == "reversed"
    seen = await account(desk, payer.address)
    assert (seen.available_units, seen.debt_units) == (0, 10_000)
    desk.send(claimed)  # too late for the token; but the chain nonce is used up
    other = await desk.claim(payer)  # the next money pays what is owed
    assert await take(desk, other) == "succeeded"
    seen = await account(desk, payer.address)
    assert (seen.available_units, seen.debt_units) == (0, 0)


async def test_a_node_that_is_behind_takes_nothing_back(shallow: Devnet, sqlite_url: str) -> None:
    """It has another chain only if it has another block there; to have none is no news."""
    node = FaultyNode(shallow)
    await node.start()
    try:
        async with opened_desk(shallow, sqlite_url, node.url) as desk:
            claimed = await desk.claim()
            assert await take(desk, claimed) == "succeeded"
            number = (await row_of(desk, claimed)).block_number
            shallow.mine(2)

            def behind(asked: Any, answer: Any) -> Any:
                if asked["params"][0] in ("latest", "safe", "finalized"):
                    return shallow.rpc("eth_getBlockByNumber", hex(number - 1), False)
                return answer

            node.fault("eth_getBlockByNumber", "change_by", behind)
            node.fault("eth_getTransactionReceipt", "change", lambda _: None)
            await look(desk)
            assert (await row_of(desk, claimed)).state == "minted"
    finally:
        await node.stop()


# --- whom to believe ------------------------------------------------------------------------


def another_amount(receipt: Any) -> Any:
    """The same transaction, but it moved a thousand times as much."""
    if receipt is None:
        return None
    for log in receipt["logs"]:
        if log["data"] != "0x":
            log["data"] = "0x" + (int(log["data"], 16) * 1_000).to_bytes(32, "big").hex()
    return receipt


@pytest.fixture
async def liars(shallow: Devnet) -> AsyncIterator[list[FaultyNode]]:
    made = [FaultyNode(shallow) for _ in range(3)]
    for each in made:
        await each.start()
    yield made
    for each in made:
        await each.stop()


async def test_one_liar_mints_nothing_above_the_limit(
    shallow: Devnet, sqlite_url: str, liars: list[FaultyNode]
) -> None:
    urls = [liars[0].url, liars[1].url]
    async with opened_desk(shallow, sqlite_url, *urls) as desk:
        claimed = await desk.claim(units=10_000)
        desk.net.receipt(desk.send(claimed))
        liars[0].fault("eth_getTransactionReceipt", "change", another_amount)
        assert await recover(desk.rails, await desk.payment(claimed)) == "processing"
        desk.net.mine(20)
        for _ in range(3):
            await look(desk)
        assert await desk.minted() == []
        # It tells the truth again, and what it had made up is corrected by what it tells.
        liars[0].faults.clear()
        assert await recover(desk.rails, await desk.payment(claimed)) == "succeeded"
        assert [units for *_, units in await desk.minted()] == [10_000]
        assert await helpers.faults(desk.rails.db) == []


@pytest.mark.parametrize("fault", ["receipt", "block", "depth", "hang", "429", "chain"])
async def test_two_of_three_are_enough_and_one_is_not(
    shallow: Devnet, sqlite_url: str, liars: list[FaultyNode], fault: str
) -> None:
    def forge(node: FaultyNode) -> None:
        match fault:
            case "receipt":
                node.fault("eth_getTransactionReceipt", "change", lambda _: None)
            case "block":
                node.fault(
                    "eth_getBlockByNumber", "change", lambda b: {**b, "hash": "0x" + "5" * 64}
                )
            case "depth":
                node.fault("eth_getBlockByNumber", "change", lambda b: {**b, "number": "0x1"})
            case "hang":
                node.fault("eth_getTransactionReceipt", "drop")
            case "429":
                node.fault("eth_getTransactionReceipt", "status", 429)
            case "chain":
                node.fault("eth_chainId", "change", lambda _: "0x1")

    urls = [shallow.rpc_url, liars[0].url, liars[1].url]
    async with opened_desk(shallow, sqlite_url, *urls, rpc_timeout_s=2) as desk:
        claimed = await desk.claim(units=6_000_000)
        assert await take(desk, claimed) == "processing"
        desk.net.mine(4)
        forge(liars[0])
        forge(liars[1])
        await look(desk)
        assert await state(desk, claimed) == "processing"
        liars[1].faults.clear()
        for endpoint in desk.rpc.endpoints:
            endpoint.answered()
        await look(desk)
        assert await state(desk, claimed) == "succeeded"


# --- one transaction, another story -----------------------------------------------------------


async def test_an_ordinal_that_becomes_another_payments_is_another_fact(desk: Desk) -> None:
    """As when the first of a batch fails in the new block and the second moves up."""
    one = await desk.claim(desk.net.accounts[5], units=10_001)
    two = await desk.claim(desk.net.accounts[6], units=10_002)

    def moved(claimed: Claimed, n: int, block: str) -> Transfer:
        return Transfer(
            network=NETWORK.caip2,
            tx_hash="0x" + "77" * 32,
            n=n,
            asset=USDC.address,
            from_=claimed.payment.payer or "",
            to=PAY_TO,
            value_units=claimed.payment.amount_units,
            block_number=7,
            block_hash=block,
            auth_nonce=claimed.payment.auth_nonce,
            authorizer=claimed.payment.payer,
        )

    async def finish(claimed: Claimed, transfer: Transfer) -> str:
        async with desk.rails.db.write() as tx:
            return (await journal.finish(tx, claimed.payment.id, transfer, T0))[0].state

    old, new = "0x" + "a" * 64, "0x" + "b" * 64
    assert await finish(one, moved(one, 0, old)) == "succeeded"
    assert await finish(two, moved(two, 1, old)) == "succeeded"
    with pytest.raises(ledger.LedgerFault, match="told in two ways"):
        await finish(two, moved(two, 0, new))  # before the old story is known to be over
    async with desk.rails.db.write() as tx:
        for row in await inbound.known(tx, NETWORK.caip2, "0x" + "77" * 32):
            assert await inbound.vanished(tx, row, T0)
    for _ in range(2):
        assert await finish(two, moved(two, 0, new)) == "succeeded"
    balances = [
        (await account(desk, each.payment.payer or "")).available_units for each in (one, two)
    ]
    assert balances == [0, 10_002]
    # And back again, should the chain change its mind once more.
    async with desk.rails.db.write() as tx:
        for row in await inbound.known(tx, NETWORK.caip2, "0x" + "77" * 32):
            await inbound.vanished(tx, row, T0)
    assert await finish(one, moved(one, 0, old)) == "succeeded"
    assert await finish(two, moved(two, 1, old)) == "succeeded"
    balances = [
        (await account(desk, each.payment.payer or "")).available_units for each in (one, two)
    ]
    assert balances == [10_001, 10_002]
