"""Money that came without a request: read from the chain, claimed by its hash, compared.

One transfer through several doors at once is one mint.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from itertools import combinations_with_replacement
from typing import Any

import pytest

from anvil.devnet import Account, Devnet, Options, running
from chain import transfers
from chain.errors import Unavailable
from chain.transfers import Transfer
from gateway import ledger
from gateway.accounts import wallets
from gateway.db import Tx, transact
from gateway.payments import claims, inbound, journal, reconcile, watcher
from gateway.payments.recover import recover
from gateway.payments.watcher import Watch
from tests.fixtures_chain import NETWORK, USDC
from tests.gateway.ledger import helpers
from tests.gateway.payments.parts import PAY_TO, Claimed, Desk, opened_desk
from tests.gateway.payments.test_finality import account


@pytest.fixture(scope="module")
def shallow() -> Iterator[Devnet]:
    with running(options=Options(slots_in_an_epoch=4)) as net:
        yield net


@pytest.fixture
async def desk(shallow: Devnet, sqlite_url: str) -> AsyncIterator[Desk]:
    async with opened_desk(shallow, sqlite_url) as found:
        await begin(found)
        yield found
        assert await helpers.faults(found.rails.db) == []


async def begin(desk: Desk) -> None:
    await watcher.begin(desk.rails, desk.rails.settings.chains[0], USDC)


async def look(desk: Desk, watch: Watch | None = None) -> bool:
    return await (watch or Watch()).look(desk.rails, desk.rails.settings.chains[0])


def send(desk: Desk, sender: Account, units: int, to: str = PAY_TO) -> str:
    tx_hash = desk.net.transfer(sender.address, to, units)
    desk.net.receipt(tx_hash)
    return tx_hash


async def open_account(desk: Desk, wallet: str) -> None:
    async with desk.rails.db.write() as tx:
        await wallets.ensure(tx, wallet, helpers.T0)


async def rows(desk: Desk) -> list[tuple[str, str]]:
    async with desk.rails.db.read() as tx:
        found = await tx.fetch("SELECT tx_hash, state FROM inbound ORDER BY seen_at_ms, tx_hash")
    return [(row["tx_hash"], row["state"]) for row in found]


async def differences(desk: Desk, *, whole: bool = True) -> list[tuple[str, bool]]:
    chains, rpcs = desk.rails.settings.chains, desk.rails.rpcs
    done = await reconcile.everything(desk.rails.db, chains, rpcs, whole=whole)
    return [(odd.kind, odd.explained) for each in done for odd in each.differences]


# --- the watcher ----------------------------------------------------------------------------


async def test_a_known_wallets_deposit_is_credited_once_it_is_safe(desk: Desk) -> None:
    sender = desk.net.accounts[0]
    await open_account(desk, sender.address)
    tx_hash = send(desk, sender, 20_000)
    watch = Watch()
    await look(desk, watch)
    assert await rows(desk) == [(tx_hash, "unclaimed")]
    assert await desk.minted() == []
    desk.net.mine(4)
    for _ in range(3):
        await look(desk, watch)
    assert await rows(desk) == [(tx_hash, "minted")]
    assert (await account(desk, sender.address)).available_units == 20_000
    ((ref, payment_id, units),) = await desk.minted()
    assert (ref, units) == (tx_hash, 20_000)
    async with desk.rails.db.read() as tx:
        paid = await journal.by_id(tx, payment_id)
    assert paid is not None
    assert (paid.provider, paid.state, paid.amount_units) == ("deposits", "succeeded", 20_000)
    assert paid.expires_ms is not None
    desk.net.mine(8)
    await look(desk, watch)
    assert await differences(desk) == []


async def test_a_look_that_is_cut_off_when_a_deposit_is_final_is_made_good(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Final and nobody's is not looked at again: it must not be noted before it is attributed."""
    sender = desk.net.accounts[0]
    await open_account(desk, sender.address)
    tx_hash = send(desk, sender, 20_000)
    desk.net.mine(20)
    watch = Watch()
    with monkeypatch.context() as patch:

        async def cut_off(*_: object) -> None:
            raise Unavailable("rpc_error", "it went away")

        patch.setattr(watcher, "_attribute", cut_off)
        with pytest.raises(Unavailable):
            await look(desk, watch)
    assert await rows(desk) == [(tx_hash, "unclaimed")]
    await look(desk, watch)
    assert await rows(desk) == [(tx_hash, "minted")]
    await look(desk, watch)
    async with desk.rails.db.read() as tx:
        assert await tx.fetchval("SELECT depth FROM inbound") == "final"
    assert await differences(desk) == []


async def test_a_strangers_deposit_is_kept_until_it_is_claimed(desk: Desk) -> None:
    sender = desk.net.accounts[1]
    tx_hash = send(desk, sender, 30_000)
    desk.net.mine(20)
    for _ in range(3):
        await look(desk)
    assert await rows(desk) == [(tx_hash, "unclaimed")]
    assert await differences(desk) == [("suspense", True)]
    assert await give(desk, tx_hash, sender.address) == "minted"
    assert await give(desk, tx_hash, sender.address) == "minted"
    assert await give(desk, tx_hash, desk.net.accounts[2].address) == "taken"
    assert [units for *_, units in await desk.minted()] == [30_000]
    assert await differences(desk) == []


async def test_dust_is_left_alone_and_explained(desk: Desk) -> None:
    send(desk, desk.net.accounts[0], 9_999)
    desk.net.mine(10)
    await look(desk)
    assert await rows(desk) == []
    assert await differences(desk) == [("too_small", True)]


async def test_a_payment_under_way_is_left_to_itself(desk: Desk) -> None:
    claimed = await desk.claim()
    desk.net.receipt(desk.send(claimed))
    await look(desk)
    assert await rows(desk) == []
    assert await differences(desk) == [("under_way", True)]
    assert await recover(desk.rails, await desk.payment(claimed)) == "succeeded"
    await look(desk)
    assert await rows(desk) == [(claimed.prepared.tx_hash, "minted")]
    assert await differences(desk) == []


async def test_a_payment_that_was_given_up_and_is_paid_is_finished(desk: Desk) -> None:
    claimed = await desk.claim()
    async with desk.rails.db.write() as tx:
        await journal.fail(tx, claimed.payment.id, "settlement_failed", "so we thought", 1)
    desk.net.receipt(desk.send_by_stranger(claimed))
    await look(desk)
    assert (await desk.payment(claimed)).state == "succeeded"
    assert [units for *_, units in await desk.minted()] == [10_000]


async def test_one_process_reads_at_a_time(desk: Desk) -> None:
    one, two = Watch(), Watch()
    assert await look(desk, one)
    assert not await look(desk, two)
    assert await look(desk, one)
    async with desk.rails.db.write() as tx:
        await tx.execute("UPDATE lease SET until_ms = 0")
    assert await look(desk, two)
    assert not await look(desk, one)
    async with desk.rails.db.read() as tx:
        assert await tx.fetchval("SELECT fence FROM lease") == 2


async def test_it_reads_on_from_the_last_final_block(desk: Desk) -> None:
    desk.net.mine(20)
    await look(desk)
    async with desk.rails.db.read() as tx:
        known = await watcher.watched(tx, desk.rails.settings.chains[0], USDC)
    assert known is not None
    assert known.read_to == int(desk.net.rpc("eth_blockNumber"), 16) - 8
    again = await watcher.begin(desk.rails, desk.rails.settings.chains[0], USDC)
    assert again.first_block == known.first_block


# --- all doors at once ----------------------------------------------------------------------


async def give(desk: Desk, tx_hash: str, recipient: str) -> str:
    """Claim it for a wallet."""
    found = await transfers.transfers_of(desk.rpc, tx_hash, USDC, PAY_TO)
    assert found
    moved: Transfer = found[0]

    async def work(tx: Tx) -> str:
        placed = await claims.give(tx, desk.rails.settings, moved, recipient, "")
        return "taken" if placed.taken else placed.row.state

    return await transact(desk.rails.db, work)


async def by_recovery(desk: Desk, claimed: Claimed) -> object:
    return await recover(desk.rails, await desk.payment(claimed))


async def by_watcher(desk: Desk, claimed: Claimed) -> object:
    del claimed
    return await look(desk, Watch())


async def by_claim(desk: Desk, claimed: Claimed) -> object:
    return await give(desk, claimed.prepared.tx_hash, claimed.payment.payer or "")


async def by_stranger(desk: Desk, claimed: Claimed) -> object:
    """Somebody whose wallet did not pay: refused or too late, and never in the way."""
    return await give(desk, claimed.prepared.tx_hash, "0x" + "99" * 20)


DOORS: list[Callable[[Desk, Claimed], Awaitable[object]]] = [
    by_recovery,
    by_watcher,
    by_claim,
    by_stranger,
]


@pytest.mark.parametrize("pair", list(combinations_with_replacement(range(len(DOORS)), 2)), ids=str)
async def test_one_transfer_through_two_doors_at_two_nodes_mints_once(
    shallow: Devnet, postgres_url: str, pair: tuple[int, int]
) -> None:
    first, second = (DOORS[i] for i in pair)
    async with (
        opened_desk(shallow, postgres_url) as one,
        opened_desk(shallow, postgres_url) as two,
    ):
        await begin(one)
        for turn in range(3):
            claimed = await one.claim(one.net.accounts[turn])
            one.net.receipt(one.send(claimed))
            one.net.mine(5)
            await asyncio.gather(
                *(door(desk, claimed) for desk in (one, two) for door in (first, second))
            )
            await by_recovery(one, claimed)
            assert (await one.payment(claimed)).state == "succeeded"
            payer = claimed.payment.payer or ""
            assert (await account(one, payer)).available_units == 10_000
        assert len(await one.minted()) == 3
        assert await helpers.faults(one.rails.db) == []
        assert await differences(one) == []


async def test_a_plain_transfer_claimed_by_many_at_once_mints_once(
    shallow: Devnet, postgres_url: str
) -> None:
    async with (
        opened_desk(shallow, postgres_url) as one,
        opened_desk(shallow, postgres_url) as two,
    ):
        await begin(one)
        sender = one.net.accounts[4]
        await open_account(one, sender.address)
        tx_hash = send(one, sender, 40_000)
        one.net.mine(5)
        said = await asyncio.gather(
            *(give(desk, tx_hash, sender.address) for desk in (one, two) for _ in range(3)),
            look(one),
            look(two),
        )
        assert set(said[:6]) == {"minted"}
        assert [units for *_, units in await one.minted()] == [40_000]
        async with one.rails.db.read() as tx:
            assert await tx.fetchval("SELECT count(*) FROM payment") == 1


# --- what differs ---------------------------------------------------------------------------


async def settled(desk: Desk) -> Claimed:
    """A payment that is minted and final."""
    claimed = await desk.claim()
    desk.net.receipt(desk.send(claimed))
    assert await recover(desk.rails, await desk.payment(claimed)) == "succeeded"
    desk.net.mine(10)
    await look(desk)
    assert await differences(desk) == []
    return claimed


@pytest.mark.parametrize("by", [1, -1])
async def test_one_unit_of_difference_is_found(shallow: Devnet, sqlite_url: str, by: int) -> None:
    async with opened_desk(shallow, sqlite_url) as desk:
        await begin(desk)
        await settled(desk)
        async with desk.rails.db.write() as tx:
            await tx.execute(
                "UPDATE lot SET remaining_units = 0, minted_units = minted_units + $1", by
            )
        assert await differences(desk) == [("amount_differs", False)]


async def test_a_transfer_that_nobody_noted_is_found(desk: Desk) -> None:
    send(desk, desk.net.accounts[3], 50_000)
    assert await differences(desk) == [("new", True)]
    desk.net.mine(70)
    assert await differences(desk) == [("orphan", False)]


async def test_a_mint_that_nothing_paid_for_is_found(desk: Desk) -> None:
    await settled(desk)
    async with desk.rails.db.write() as tx:
        account_id = await wallets.ensure(tx, "0x" + "12" * 20, helpers.T0)
        mint = ledger.Mint(account_id, 1, NETWORK.caip2, "0x" + "34" * 32, 0, "x402")
        await ledger.apply(tx, [mint], helpers.T0)
    assert await differences(desk) == [("mint_without_transfer", False)]


async def test_a_card_payment_without_its_lot_is_found(desk: Desk) -> None:
    from tests.gateway.payments.parts import blank

    card = blank("pay_card", provider="stripe", state="succeeded", network=None, auth_nonce=None)
    async with desk.rails.db.write() as tx:
        await journal.insert(tx, card)
    assert await differences(desk) == [("card_not_minted", False)]


async def test_the_loop_compares_what_is_new_and_goes_on(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    await settled(desk)
    await reconcile.run(desk.rails)
    async with desk.rails.db.read() as tx:
        known = await watcher.watched(tx, desk.rails.settings.chains[0], USDC)
    assert known is not None and known.compared_to == known.read_to
    assert await differences(desk, whole=False) == []
    send(desk, desk.net.accounts[3], 50_000)
    desk.net.mine(70)
    await reconcile.run(desk.rails)
    assert "orphan" in caplog.text
    async with desk.rails.db.read() as tx:
        again = await watcher.watched(tx, desk.rails.settings.chains[0], USDC)
    assert again is not None and again.compared_to == known.compared_to


def test_no_row_is_left_unread() -> None:
    """The states of a row are those the comparison knows."""
    states: Any = inbound.State
    assert set(states.__args__) == {"unclaimed", "waiting", "minted", "gone"}
