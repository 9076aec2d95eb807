"""A payment that vanished and was given up comes in after all: the house gets back what it bore.

On a chain of its own whose blocks are safe after 4 more and final after 8.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from anvil.devnet import Account, Devnet, Options, running
from chain.blocks import Trail
from gateway import ledger
from gateway.payments import journal, losses, watcher
from gateway.payments.recover import recover
from gateway.payments.watcher import Watch
from tests.fixtures_chain import USDC
from tests.gateway.ledger import helpers
from tests.gateway.payments.parts import Claimed, Desk, opened_desk
from tests.gateway.payments.test_finality import account, look, reversed_by, spend, state, take


@pytest.fixture(scope="module")
def shallow() -> Iterator[Devnet]:
    with running(options=Options(slots_in_an_epoch=4)) as net:
        yield net


@pytest.fixture
async def desk(shallow: Devnet, db_url: str) -> AsyncIterator[Desk]:
    async with opened_desk(shallow, db_url) as found:
        await watcher.begin(found.rails, found.rails.settings.chains[0], USDC)
        yield found
        assert await helpers.faults(found.rails.db) == []


@pytest.fixture
def payer(shallow: Devnet) -> Account:
    return shallow.accounts[0]


async def write_off(desk: Desk, wallet: Account) -> losses.Given:
    account_id = (await account(desk, wallet.address)).id
    async with desk.rails.db.write() as tx:
        return await losses.write_off(tx, account_id, why="never seen again", by="ops")


async def house_lost(desk: Desk) -> int:
    """What the house bears now."""
    async with desk.rails.db.read() as tx:
        units: int = await tx.fetchval(
            "SELECT CAST(coalesce(sum(-balance), 0) AS BIGINT) FROM house_balance"
            " WHERE account_id = $1",
            ledger.LOSSES,
        )
    return units


async def money(desk: Desk, wallet: Account) -> tuple[int, int, int]:
    """What the payer can spend and owes, and what the house bears."""
    seen = await account(desk, wallet.address)
    return seen.available_units, seen.debt_units, await house_lost(desk)


async def give_up_sending(desk: Desk, claimed: Claimed) -> None:
    """We do not send it again: as for one that was somebody else's transaction."""
    async with desk.rails.db.write() as tx:
        await journal.fail(tx, claimed.payment.id, "reorged", "gone", await tx.now_ms())
    assert await state(desk, claimed) == "reversed"


async def given_up(desk: Desk, payer: Account, claimed: Claimed) -> None:
    """A payment of 10,000, 4,000 of it spent, is gone, and the loss is written off."""
    assert await take(desk, claimed) == "succeeded"
    assert isinstance(await spend(desk, payer.address, 4_000, "r1"), ledger.Closed)
    await reversed_by(desk, claimed, Trail(), 2)
    assert isinstance(await spend(desk, payer.address, 1, "r-owing"), ledger.Frozen)
    await give_up_sending(desk, claimed)
    assert await write_off(desk, payer) == losses.Given(4_000, 0)
    assert await money(desk, payer) == (0, 0, 4_000)
    assert isinstance(await spend(desk, payer.address, 1, "r-poor"), ledger.Short)


async def watch(desk: Desk, by: Watch) -> None:
    assert await by.look(desk.rails, desk.rails.settings.chains[0])


async def test_not_while_its_payment_is_sent_again(desk: Desk, payer: Account) -> None:
    claimed = await desk.claim(payer)
    await take(desk, claimed)
    await spend(desk, payer.address, 4_000, "r1")
    assert await write_off(desk, payer) == losses.Given(0, 0)
    await reversed_by(desk, claimed, Trail(), 1)
    with pytest.raises(losses.TooEarly, match=claimed.payment.id):
        await write_off(desk, payer)
    assert await money(desk, payer) == (0, 4_000, 0)


async def test_not_while_it_is_in_dispute(desk: Desk, payer: Account) -> None:
    """What else is owed is given up, and what is in dispute stays."""
    one, two = await desk.claim(payer), await desk.claim(payer)
    for each in (one, two):
        await take(desk, each)
    await spend(desk, payer.address, 20_000, "r1")
    lots = [(await desk.payment(each)).lot_id or 0 for each in (one, two)]
    account_id = (await account(desk, payer.address)).id
    async with desk.rails.db.write() as tx:
        await ledger.apply(tx, [ledger.Freeze(lots[0], "disputed")], await tx.now_ms())
    with pytest.raises(losses.TooEarly, match="dispute"):
        await write_off(desk, payer)
    async with desk.rails.db.write() as tx:
        await ledger.apply(tx, [ledger.Reverse(lots[1], 10_000, "x")], await tx.now_ms())
    assert await write_off(desk, payer) == losses.Given(10_000, 10_000)
    assert (await account(desk, payer.address)).id == account_id
    assert await money(desk, payer) == (0, 10_000, 10_000)


@pytest.mark.parametrize("by", ["itself", "another"])
async def test_what_comes_in_after_all_is_the_houses_once(
    desk: Desk, payer: Account, by: str
) -> None:
    """By its own transaction or another one; what is left over is the payer's."""
    claimed = await desk.claim(payer)
    await given_up(desk, payer, claimed)
    desk.net.receipt(desk.send(claimed) if by == "itself" else desk.send_by_stranger(claimed))
    watching = Watch()
    for _ in range(3):
        await watch(desk, watching)
        assert await state(desk, claimed) == "succeeded"
        assert await money(desk, payer) == (6_000, 0, 0)
    assert len(await desk.minted()) == (1 if by == "itself" else 2)
    assert isinstance(await spend(desk, payer.address, 6_000, "r2"), ledger.Closed)


@pytest.mark.parametrize("by", ["the first", "another"])
async def test_given_up_twice_and_back_by_any(desk: Desk, payer: Account, by: str) -> None:
    """The transaction that took the place of the first is lost too; then one of them comes in."""
    claimed = await desk.claim(payer)
    await given_up(desk, payer, claimed)
    desk.net.receipt(desk.send_by_stranger(claimed))
    watching = Watch()
    await watch(desk, watching)
    assert await money(desk, payer) == (6_000, 0, 0)
    assert isinstance(await spend(desk, payer.address, 5_000, "r2"), ledger.Closed)
    desk.net.rpc("anvil_reorg", 1, [])
    await look(desk)
    assert await money(desk, payer) == (0, 9_000, 0)
    await give_up_sending(desk, claimed)
    assert await write_off(desk, payer) == losses.Given(9_000, 0)
    desk.net.receipt(desk.send(claimed) if by == "the first" else desk.send_by_stranger(claimed))
    await watch(desk, watching)
    assert await money(desk, payer) == (1_000, 0, 0)


async def test_other_money_of_the_payer_is_the_payers(desk: Desk, payer: Account) -> None:
    """What was given up is not taken from what is paid later for something else."""
    claimed = await desk.claim(payer)
    await given_up(desk, payer, claimed)
    other = await desk.claim(payer)
    # Ours would wait for the chain nonce of the one that is gone.
    desk.net.receipt(desk.send_by_stranger(other))
    assert await recover(desk.rails, await desk.payment(other)) == "succeeded"
    assert await money(desk, payer) == (10_000, 0, 4_000)
