"""Unused credits back on chain: to their payer, once, whatever happens in between.

On a chain of its own whose blocks are final after 8 more.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from anvil.devnet import Account, Devnet, Options, running
from chain import blocks
from chain.blocks import Trail
from chain.errors import Unavailable
from chain.rpc import Rpc
from chain.schemes import eip3009
from gateway import ledger
from gateway.accounts import wallets
from gateway.errors import Problem
from gateway.ledger import read
from gateway.payments import carry, confirm, journal, payout, reconcile, watcher
from gateway.payments.journal import Payment
from gateway.payments.payout import Asker, Wanted
from gateway.payments.rails import Rails
from gateway.payments.recover import recover
from tests.e2e.stage import new_account
from tests.e2e.test_crash import cancel
from tests.e2e.wallet import Wallet, encode
from tests.fixtures_chain import NETWORK, FaultyNode
from tests.gateway.ledger import helpers
from tests.gateway.payments.parts import Desk, opened_desk

ALL = Wanted(None, None)


@pytest.fixture(scope="module")
def shallow() -> Iterator[Devnet]:
    with running(options=Options(slots_in_an_epoch=4)) as net:
        yield net


@pytest.fixture
async def node(shallow: Devnet) -> AsyncIterator[FaultyNode]:
    made = FaultyNode(shallow)
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
def till(shallow: Devnet) -> Account:
    """The refund wallet: one of the test's own, with ten USDC."""
    made = new_account()
    shallow.transfer(shallow.accounts[0].address, made.address, 10_000_000)
    return made


@pytest.fixture
async def desk(
    shallow: Devnet, db_url: str, node: FaultyNode, till: Account
) -> AsyncIterator[Desk]:
    key = {"refund_key": till.private_key, "refund_min": "$0.01"}
    async with opened_desk(shallow, db_url, node.url, timeout_s=2, wait_s=1, **key) as found:
        yield found
        assert await helpers.faults(found.rails.db) == []


@pytest.fixture
def payer(shallow: Devnet) -> Account:
    made = new_account()
    shallow.transfer(shallow.accounts[0].address, made.address, 5_000_000)
    return made


async def follow(desk: Desk, count: int = 9) -> None:
    """Blocks are made, until what is in one is final."""
    desk.net.mine(count)
    await confirm.look(desk.rails, desk.rails.settings.chains[0], Trail())


@pytest.fixture
def undone(shallow: Devnet) -> Iterator[None]:
    """What is done to the chain is undone, so that its clock is ours again."""
    snapshot = shallow.rpc("evm_snapshot")
    yield
    assert shallow.rpc("evm_revert", snapshot) is True
    shallow.rpc("evm_setTime", int(time.time()))


async def pass_by(desk: Desk, made: Payment) -> None:
    """A block comes in which the authorization has expired. For tests that are ``undone``."""
    at_s = max((await blocks.newest(desk.rpc)).time_s + 1, made.valid_before_s or 0)
    desk.net.rpc("evm_setNextBlockTimestamp", at_s)
    desk.net.mine()


async def bought(desk: Desk, payer: Account, units: int = 1_000_000, *, final: bool = True) -> int:
    """Credits that the payer bought; their lot."""
    claimed = await desk.claim(payer, units=units)
    desk.net.receipt(desk.send(claimed))
    assert await recover(desk.rails, await desk.payment(claimed)) == "succeeded"
    if final:
        await follow(desk)
    lot = (await desk.payment(claimed)).lot_id
    assert lot is not None
    return lot


async def asker(desk: Desk, payer: Account, name: str = "") -> Asker:
    async with desk.rails.db.read() as tx:
        account_id = await wallets.find(tx, payer.address)
    assert account_id is not None
    return Asker(account_id, payer.address, "", name or secrets.token_hex(8))


async def ask(desk: Desk, payer: Account, wanted: Wanted = ALL, name: str = "") -> list[Payment]:
    ids, _ = await payout.ask(
        desk.rails, await asker(desk, payer, name), wanted, repr(wanted).encode()
    )
    return await rows(desk, ids)


async def rows(desk: Desk, ids: list[str]) -> list[Payment]:
    async with desk.rails.db.read() as tx:
        return await payout.rows_of(tx, ids)


async def refused(desk: Desk, payer: Account, code: str, wanted: Wanted = ALL) -> Problem:
    with pytest.raises(Problem) as caught:
        await ask(desk, payer, wanted)
    assert caught.value.code == code, caught.value
    assert await scalar(desk, "SELECT count(*) FROM payout") == 0
    assert await scalar(desk, "SELECT count(*) FROM payout_request") == 0
    return caught.value


async def look(desk: Desk, made: Payment, rails: Rails | None = None) -> str:
    return await carry.look(rails or desk.rails, (await rows(desk, [made.id]))[0])


async def scalar(desk: Desk, sql: str, *params: object) -> Any:
    return await helpers.scalar(desk.rails.db, sql, *params)


async def available(desk: Desk, payer: Account) -> int:
    who = await asker(desk, payer)
    found = await scalar(desk, "SELECT available FROM account WHERE id = $1", who.account_id)
    return int(found)


async def spend(desk: Desk, payer: Account, units: int) -> bool:
    account_id = (await asker(desk, payer)).account_id
    async with desk.rails.db.write() as tx:
        now_ms = await tx.now_ms()
        step = helpers.hold(account_id, secrets.token_hex(8), units)
        (held,) = await ledger.apply(tx, [step], now_ms)
        if not isinstance(held, ledger.Held):
            return False
        await ledger.apply(tx, [ledger.Close(held.hold, units)], now_ms)
    return True


async def paid(desk: Desk, made: Payment) -> None:
    """It is in a block, then that is final, and the ledger says so: never before."""
    assert await look(desk, made) == "processing"
    await follow(desk)
    assert await look(desk, made) == "succeeded"
    assert await look(desk, made) == "succeeded"  # and no second time


# --- as it should go ------------------------------------------------------------------------


async def test_what_is_left_of_a_lot_goes_back_to_its_payer(
    desk: Desk, payer: Account, till: Account
) -> None:
    lot = await bought(desk, payer)
    assert await spend(desk, payer, 300_000)
    before = desk.net.balance_units(payer.address)
    (made,) = await ask(desk, payer, Wanted(lot, None))
    assert (made.state, made.amount_units, made.recipient) == (
        "processing",
        700_000,
        payer.address,
    )
    assert await available(desk, payer) == 0
    assert not await spend(desk, payer, 1)
    assert desk.net.balance_units(payer.address) == before + 700_000
    await paid(desk, made)
    assert desk.net.balance_units(till.address) == 10_000_000 - 700_000
    async with desk.rails.db.read() as tx:
        lines = await read.statement(tx, (await asker(desk, payer)).account_id, 3)
    (done,) = await rows(desk, [made.id])
    assert [(t.kind, t.amount_units) for t in lines] == [
        ("payout", 700_000),
        ("release", 700_000),
        ("withhold", 700_000),
    ]
    assert lines[0].reason == done.tx_hash
    shown = payout.shown(desk.rails.settings, done)
    assert (shown["state"], shown["transaction"]) == ("paid", done.tx_hash)
    assert await scalar(desk, "SELECT balance FROM house_balance WHERE account_id = 7") == 700_000


async def test_an_amount_is_taken_from_as_many_lots_as_it_needs(desk: Desk, payer: Account) -> None:
    await bought(desk, payer, 400_000)
    await bought(desk, payer, 400_000)
    made = await ask(desk, payer, Wanted(None, 500_000))
    assert [each.amount_units for each in made] == [400_000, 100_000]
    assert await available(desk, payer) == 300_000
    (rest,) = await ask(desk, payer)
    assert rest.amount_units == 300_000
    assert len({each.auth_nonce for each in (*made, rest)}) == 3
    await follow(desk)
    assert [await look(desk, each) for each in (*made, rest)] == ["succeeded"] * 3


async def test_the_same_request_pays_once_and_another_under_its_id_is_a_conflict(
    desk: Desk, payer: Account
) -> None:
    await bought(desk, payer)
    first = await ask(desk, payer, Wanted(None, 100_000), "k")
    again = await ask(desk, payer, Wanted(None, 100_000), "k")
    assert [each.id for each in again] == [each.id for each in first]
    assert await available(desk, payer) == 900_000
    with pytest.raises(Problem) as caught:
        await ask(desk, payer, Wanted(None, 200_000), "k")
    assert caught.value.code == "request_id_conflict"


# --- what is not paid back ------------------------------------------------------------------


async def test_only_final_lots_of_this_payer_and_enough_of_them(desk: Desk, payer: Account) -> None:
    lot = await bought(desk, payer, 20_000, final=False)
    await refused(desk, payer, "refund_not_final")
    await refused(desk, payer, "refund_not_final", Wanted(lot, None))
    await follow(desk)
    await refused(desk, payer, "not_refundable", Wanted(None, 20_001))
    await refused(desk, payer, "not_refundable", Wanted(None, 9_999))
    await refused(desk, payer, "not_refundable", Wanted(lot + 1, None))
    stranger = new_account()
    async with desk.rails.db.write() as tx:
        now_ms = await tx.now_ms()
        other = await wallets.ensure(tx, stranger.address, now_ms)
        granted = ledger.Mint(other, 50_000, "grant", "g", 0, "grant")
        (done,) = await ledger.apply(tx, [granted], now_ms)
    assert isinstance(done, ledger.Minted)
    await refused(desk, stranger, "not_refundable")
    await refused(desk, stranger, "not_refundable", Wanted(lot, None))
    await refused(desk, payer, "not_refundable", Wanted(done.lot_id, None))
    assert await spend(desk, payer, 10_001)
    await refused(desk, payer, "not_refundable")  # 9,999 are too little
    assert await available(desk, payer) == 9_999


async def test_what_cannot_be_paid_now_is_not_withheld(
    desk: Desk, payer: Account, till: Account, node: FaultyNode
) -> None:
    await bought(desk, payer)
    desk.net.blacklist(payer.address)
    assert "refuses" in (await refused(desk, payer, "not_refundable")).detail
    desk.net.blacklist(payer.address, False)
    node.fault("eth_blockNumber", "drop")
    await refused(desk, payer, "dependency_unavailable")
    node.faults.clear()
    async with desk.rails.db.write() as tx:
        who = (await asker(desk, payer)).account_id
        step = ledger.FreezeAccount(who, True, "x", "ops")
        await ledger.apply(tx, [step], await tx.now_ms())
    await refused(desk, payer, "account_frozen")


async def test_an_empty_refund_wallet_and_none_at_all(
    shallow: Devnet, sqlite_url: str, payer: Account
) -> None:
    async with opened_desk(shallow, sqlite_url, refund_key=new_account().private_key) as poor:
        await bought(poor, payer)
        await refused(poor, payer, "refund_unavailable")
        assert payout.policy(poor.rails.settings)["refundable"] is True
    key = {"refund_key": new_account().private_key}
    async with opened_desk(shallow, sqlite_url, gas_per_hour="0.000000001", **key) as spent:
        async with spent.rails.db.write() as tx:
            await tx.execute("UPDATE chain_nonce SET cost_gwei = 1, at_ms = $1", await tx.now_ms())
        await refused(spent, payer, "refund_unavailable")
    async with opened_desk(shallow, sqlite_url) as off:
        assert payout.policy(off.rails.settings)["refundable"] is False
        await refused(off, payer, "refund_not_offered")
        assert await available(off, payer) == 1_000_000


# --- at once --------------------------------------------------------------------------------


async def test_many_requests_and_calls_at_once_on_two_nodes(desk: Desk, payer: Account) -> None:
    lot = await bought(desk, payer)
    rpc = Rpc(NETWORK, [desk.net.rpc_url])
    other = Rails(desk.rails.settings, desk.rails.db, desk.rails.keys, {NETWORK.caip2: rpc})
    before = desk.net.balance_units(payer.address)

    async def one(i: int) -> list[str]:
        wanted = (Wanted(lot, None), Wanted(None, 400_000))[i % 2]
        who = await asker(desk, payer, f"k{i // 2 % 3}-{i % 2}")
        try:
            return (await payout.ask((desk.rails, other)[i % 2], who, wanted, b"%d" % (i % 2)))[0]
        except Problem as problem:
            assert problem.code == "not_refundable", problem
            return []

    try:
        found, spent = await asyncio.gather(
            asyncio.gather(*(one(i) for i in range(12))),
            asyncio.gather(*(spend(desk, payer, 30_000) for _ in range(10))),
        )
    finally:
        for lane in other.lanes.values():
            await asyncio.gather(*lane.in_flight)
        await rpc.close()
    made = await rows(desk, sorted({each for ids in found for each in ids}))
    assert made
    out = sum(each.amount_units for each in made)
    assert out + 30_000 * sum(spent) + await available(desk, payer) == 1_000_000
    await follow(desk)
    assert [await look(desk, each) for each in made] == ["succeeded"] * len(made)
    assert desk.net.balance_units(payer.address) == before + out


# --- in between -----------------------------------------------------------------------------


async def test_what_was_not_sent_is_sent_later(
    desk: Desk, payer: Account, node: FaultyNode
) -> None:
    await bought(desk, payer)
    before = desk.net.balance_units(payer.address)
    node.fault("eth_estimateGas", "drop")
    (made,) = await ask(desk, payer)
    assert (made.state, made.tx_hash) == ("processing", None)
    assert await available(desk, payer) == 0
    node.faults.clear()
    assert await look(desk, made) == "processing"
    await paid(desk, made)
    assert desk.net.balance_units(payer.address) == before + 1_000_000


async def test_two_nodes_that_finish_the_same_one_send_it_once(
    desk: Desk, payer: Account, node: FaultyNode, till: Account
) -> None:
    await bought(desk, payer)
    node.fault("eth_estimateGas", "drop")
    (made,) = await ask(desk, payer)
    node.faults.clear()
    rpc = Rpc(NETWORK, [desk.net.rpc_url])
    other = Rails(desk.rails.settings, desk.rails.db, desk.rails.keys, {NETWORK.caip2: rpc})
    try:
        await asyncio.gather(*(look(desk, made, each) for each in (desk.rails, other) * 3))
    finally:
        for lane in other.lanes.values():
            await asyncio.gather(*lane.in_flight)
        await rpc.close()
    assert (
        await scalar(desk, "SELECT count(*) FROM chain_member WHERE payment_id = $1", made.id) == 1
    )
    await paid(desk, made)
    assert desk.net.balance_units(till.address) == 9_000_000


async def test_somebody_else_hands_it_in_first(
    desk: Desk, payer: Account, node: FaultyNode, till: Account
) -> None:
    """The node that was asked to simulate has the signed authorization."""
    await bought(desk, payer)
    node.fault("eth_sendRawTransaction", "drop")
    (made,) = await ask(desk, payer)
    calls = [each["params"][0] for each in node.seen if each["method"] == "eth_estimateGas"]
    desk.net.send(desk.net.operator.address, calls[-1]["to"], calls[-1]["data"])
    node.faults.clear()
    await paid(desk, made)
    assert desk.net.balance_units(till.address) == 9_000_000


async def test_the_token_refuses_a_second_one_of_the_same_payout(
    desk: Desk, payer: Account, till: Account
) -> None:
    """Also where a ledger that was set back signs another one, for another amount."""
    await bought(desk, payer)
    (made,) = await ask(desk, payer)
    at = carry._sight(desk.rails, made)
    for data in (
        eip3009.transfer_calldata(carry._signed(at)),
        eip3009.transfer_calldata(
            carry._signed(
                carry._sight(
                    desk.rails,
                    Payment(
                        **{n: getattr(made, n) for n in journal.COLUMNS}
                        | {"amount_units": 5, "valid_before_s": 2_000_000_000}
                    ),
                )
            )
        ),
    ):
        receipt = desk.net.receipt(
            desk.net.send(desk.net.operator.address, at.asset.address, "0x" + data.hex())
        )
        assert int(receipt["status"], 16) == 0
    assert desk.net.balance_units(till.address) == 9_000_000
    await paid(desk, made)


@pytest.mark.usefixtures("undone")
async def test_what_expired_unused_is_the_lots_again_and_can_be_asked_for_anew(
    desk: Desk,
    payer: Account,
    node: FaultyNode,
    monkeypatch: pytest.MonkeyPatch,
    till: Account,
) -> None:
    lot = await bought(desk, payer)
    node.fault("eth_estimateGas", "drop")
    monkeypatch.setattr(payout, "VALID_S", 20)
    (made,) = await ask(desk, payer, name="k")
    node.faults.clear()
    assert await look(desk, made) == "processing"  # too late to be sent
    assert await available(desk, payer) == 0
    await pass_by(desk, made)
    assert await look(desk, made) == "processing"  # that block is not final
    assert await available(desk, payer) == 0
    await follow(desk)
    assert await look(desk, made) == "failed"
    assert await available(desk, payer) == 1_000_000
    assert await ask(desk, payer, name="k") == await rows(desk, [made.id])  # it stays what it was
    assert (await rows(desk, [made.id]))[0].error_code == "refund_failed"
    monkeypatch.undo()
    (second,) = await ask(desk, payer, Wanted(lot, None))
    assert second.auth_nonce != made.auth_nonce
    await paid(desk, second)
    assert desk.net.balance_units(till.address) == 9_000_000


async def test_one_whose_payer_is_blacklisted_meanwhile_stays_withheld(
    desk: Desk, payer: Account, node: FaultyNode
) -> None:
    await bought(desk, payer)
    node.fault("eth_estimateGas", "drop")
    (made,) = await ask(desk, payer)
    node.faults.clear()
    desk.net.blacklist(payer.address)
    assert await look(desk, made) == "processing"
    assert await available(desk, payer) == 0
    desk.net.blacklist(payer.address, False)
    assert await look(desk, made) == "processing"
    await paid(desk, made)


async def test_a_block_that_leaves_the_chain_takes_no_refund_with_it(
    desk: Desk, payer: Account, till: Account
) -> None:
    await bought(desk, payer)
    (made,) = await ask(desk, payer)
    assert desk.net.balance_units(till.address) == 9_000_000
    desk.net.mine(2)
    desk.net.rpc("anvil_reorg", 3, [])
    assert desk.net.balance_units(till.address) == 10_000_000
    for _ in range(20):
        assert await look(desk, made) == "processing"
        desk.net.mine()
        if desk.net.balance_units(till.address) == 9_000_000:
            break
    await paid(desk, made)
    assert desk.net.balance_units(till.address) == 9_000_000


def test_a_nonce_is_of_one_deployment_mint_and_ordinal() -> None:
    parts = ("d", "eip155:1", "0xaa", 1, 2)
    other = ("e", "eip155:10", "0xab", 3, 4)
    nonces = {payout.nonce_of(*parts)}
    for i in range(5):
        changed: Any = (*parts[:i], other[i], *parts[i + 1 :])
        nonces.add(payout.nonce_of(*changed))
    assert len(nonces) == 6
    assert all(len(each) == 66 for each in nonces)


async def test_a_node_that_comes_late_sends_nothing_again(
    desk: Desk, payer: Account, node: FaultyNode
) -> None:
    """It had seen that nothing was signed; meanwhile another one has stored its transaction."""
    await bought(desk, payer)
    node.fault("eth_sendRawTransaction", "drop")
    (made,) = await ask(desk, payer)
    await carry._send(desk.rails, carry._sight(desk.rails, made))
    sql = "SELECT count(*) FROM chain_member WHERE payment_id = $1"
    assert await scalar(desk, sql, made.id) == 1
    node.faults.clear()
    assert await look(desk, made) == "processing"
    await paid(desk, made)


@pytest.mark.usefixtures("undone")
async def test_what_is_used_and_not_found_is_not_given_back(
    undone: None, desk: Desk, payer: Account, node: FaultyNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that has lost its logs: the money is gone, whatever it does not find."""
    await bought(desk, payer)
    monkeypatch.setattr(payout, "VALID_S", 40)
    (made,) = await ask(desk, payer)
    assert desk.net.balance_units(payer.address) == 5_000_000
    await pass_by(desk, made)
    await follow(desk)
    node.fault("eth_getLogs", "change", lambda _: [])
    node.fault("eth_getTransactionReceipt", "change", lambda _: None)
    with pytest.raises(Unavailable):
        await look(desk, made)
    assert await available(desk, payer) == 0
    node.faults.clear()
    assert await look(desk, made) == "succeeded"


@pytest.mark.usefixtures("undone")
async def test_one_that_the_refund_wallet_takes_back_is_the_lots_again(
    desk: Desk,
    payer: Account,
    node: FaultyNode,
    till: Account,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await bought(desk, payer)
    node.fault("eth_estimateGas", "drop")
    monkeypatch.setattr(payout, "VALID_S", 20)
    (made,) = await ask(desk, payer)
    node.faults.clear()
    header = encode({"payload": {"authorization": {"nonce": made.auth_nonce}}})
    cancel(desk.net, Wallet(till), header)
    await pass_by(desk, made)
    await follow(desk)
    assert await look(desk, made) == "failed"
    assert await available(desk, payer) == 1_000_000


# --- compared with the chain ----------------------------------------------------------------


async def compared(
    desk: Desk, *, whole: bool = True
) -> tuple[int, int, list[tuple[str, int, int]]]:
    """How many refunds the chain tells of, of how much, and what differs from the books."""
    chains, rpcs = desk.rails.settings.chains, desk.rails.rpcs
    done = await reconcile.everything(desk.rails.db, chains, rpcs, whole=whole)
    (found,) = [each for each in done if each.what == "refunds"]
    assert all(odd.explained == (odd.kind == "under_way") for odd in found.differences)
    odd = [(each.kind, each.chain_units, each.books_units) for each in found.differences]
    return found.transfers, found.units, odd


async def watched(desk: Desk, payer: Account, units: int = 1_000_000) -> None:
    """Somebody bought credits at a gateway that watches its chain."""
    chain = desk.rails.settings.chains[0]
    await watcher.begin(desk.rails, chain, chain.network.assets[0])
    await bought(desk, payer, units)


def hand_in(desk: Desk, made: Payment, **change: Any) -> None:
    """An authorization of the refund wallet that the books say otherwise of, on chain."""
    columns = {name: getattr(made, name) for name in journal.COLUMNS}
    at = carry._sight(desk.rails, Payment(**{**columns, **change}))
    data = "0x" + eip3009.transfer_calldata(carry._signed(at)).hex()
    receipt = desk.net.receipt(desk.net.send(desk.net.operator.address, at.asset.address, data))
    assert int(receipt["status"], 16) == 1


async def test_what_was_paid_out_is_compared(
    desk: Desk, payer: Account, till: Account, node: FaultyNode
) -> None:
    await watched(desk, payer)
    assert await compared(desk) == (0, 0, [])
    (made,) = await ask(desk, payer)
    assert await compared(desk) == (1, 1_000_000, [("under_way", 1_000_000, 0)])
    await reconcile.run(desk.rails)
    await paid(desk, made)
    desk.net.rpc("anvil_impersonateAccount", till.address)
    desk.net.rpc("anvil_setBalance", till.address, hex(10**18))
    desk.net.transfer(till.address, desk.net.operator.address, 5)  # its owner's own business
    assert await compared(desk) == (1, 1_000_000, [])
    assert await compared(desk, whole=False) == (1, 1_000_000, [])
    node.fault("eth_getLogs", "change", lambda _: [])
    assert (await compared(desk))[2] == [("payout_without_transfer", 0, 1_000_000)]
    assert (await compared(desk, whole=False))[2] == [("payout_without_transfer", 0, 1_000_000)]


@pytest.mark.parametrize("by", [1, -1])
async def test_one_unit_more_or_less_on_chain_is_found(
    desk: Desk, payer: Account, node: FaultyNode, by: int
) -> None:
    await watched(desk, payer)
    node.fault("eth_sendRawTransaction", "drop")
    (made,) = await ask(desk, payer)
    node.faults.clear()
    hand_in(desk, made, amount_units=1_000_000 + by)
    open_ = ("under_way", 1_000_000, 0)
    assert (await compared(desk))[2] == [("amount_differs", 1_000_000 + by, 0), open_]


async def test_a_refund_to_another_wallet_or_of_no_lot_is_found(
    desk: Desk, payer: Account, node: FaultyNode
) -> None:
    await watched(desk, payer)
    node.fault("eth_sendRawTransaction", "drop")
    (made,) = await ask(desk, payer)
    node.faults.clear()
    hand_in(desk, made, pay_to=desk.net.operator.address)
    hand_in(desk, made, auth_nonce="0x" + "77" * 32, amount_units=3)
    open_ = ("under_way", 1_000_000, 0)
    told = [("payout_to_another", 1_000_000, 0), ("payout_unknown", 3, 0), open_]
    assert (await compared(desk))[2] == told


@pytest.mark.parametrize(
    ("table", "change", "told"),
    [
        ("payout", "amount_units = amount_units + 1", ("amount_differs", 1_000_000, 1_000_001)),
        ("payout", "amount_units = amount_units - 1", ("amount_differs", 1_000_000, 999_999)),
        ("payout_end", "paid = 0", ("paid_and_given_back", 1_000_000, 0)),
    ],
)
async def test_one_unit_more_or_less_in_the_books_is_found(  # noqa: PLR0917
    shallow: Devnet,
    sqlite_url: str,
    payer: Account,
    till: Account,
    table: str,
    change: str,
    told: tuple[str, int, int],
) -> None:
    key = {"refund_key": till.private_key, "refund_min": "$0.01"}
    async with opened_desk(shallow, sqlite_url, **key) as desk:
        await watched(desk, payer)
        (made,) = await ask(desk, payer)
        await paid(desk, made)
        async with desk.rails.db.write() as tx:
            await tx.execute(f"DROP TRIGGER {table}_no_update")
            await tx.execute(f"UPDATE {table} SET {change}")
        assert (await compared(desk))[2] == [told]
