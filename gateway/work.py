"""The background loop: finish what was interrupted, end what lapsed, check the books.

Every piece may run in any number of processes at once: payments are leased row by row, holds are
ended by compare-and-set, the rest is safe to do twice. A piece that fails is logged and tried in
the next round; it never stops the others.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final

from chain.errors import ChainError
from chain.survey import survey
from gateway import metrics
from gateway.accounts import credentials, proofs
from gateway.db import CommitUnknown, Database, DatabaseUnavailable
from gateway.ledger import audit, sweep
from gateway.node import Node
from gateway.observe import log
from gateway.payments import (
    card,
    carry,
    gaps,
    gas,
    in_hand,
    journal,
    reconcile,
    recover,
    remote,
    upto,
    watcher,
)
from gateway.payments.journal import Payment
from gateway.payments.rails import Rails
from gateway.payments.stripe import CardError
from gateway.settings import Chain, Settings

AUDIT_EVERY_S: Final = 3_600
SURVEY_EVERY_S: Final = 10
_KEPT_MS: Final = 600_000  # what has ended is kept so long: clocks differ
_LONGEST_LOOK_MS: Final = 60_000
_PER_ROUND: Final = 50
_PASSING: Final = (ChainError, CardError, DatabaseUnavailable, CommitUnknown, TimeoutError)


async def loop(node: Node, *, audits: bool = True) -> None:
    """Run until the node stops. Of several workers on one machine one need do the ``audits``."""
    server = node.settings.server
    pieces = [
        _every(node, server.sweep_s, _sweep),
        _every(node, min(server.sweep_s, 2), finish_payments),
        _every(node, min(server.sweep_s, 2), finish_payouts),
        _every(node, min(server.sweep_s, 2), finish_upto),
        _every(node, min(server.sweep_s, 2), _tend_gas),
        _every(node, server.reconcile_s, _look_at_cards),
        _every(node, 600, _purge),
        _every(node, SURVEY_EVERY_S, _Providers().survey),
        _every(node, server.sweep_s, _Watcher().watch),
    ]
    if audits:
        pieces.append(_every(node, AUDIT_EVERY_S, _audit))
        pieces.append(_every(node, server.reconcile_s, _reconcile))
    await asyncio.gather(*pieces)


async def _every(node: Node, period_s: float, piece: Callable[[Node], Awaitable[None]]) -> None:
    while not node.stopping.is_set():
        try:
            await piece(node)
        except _PASSING as error:
            log.warning("%s: %s; it is tried again", _name(piece), error)
        except Exception:
            log.exception("%s failed; it is tried again", _name(piece))
        try:
            async with asyncio.timeout(period_s):
                await node.stopping.wait()
        except TimeoutError:
            continue


def _name(piece: Callable[[Node], Awaitable[None]]) -> str:
    return str(getattr(piece, "__name__", piece)).strip("_")


async def _sweep(node: Node) -> None:
    await sweep.note_open_holds(node.db)
    # What runs here is alive, however long this process or the database stood still.
    lease_ms = node.settings.server.hold_lease_s * 1_000
    await sweep.renew(node.db, list(node.in_flight.values()), lease_ms)
    if node.patience.is_over(await _now_ms(node)):
        for hold in await sweep.void_lapsed(node.db, sweep.LAPSE_MARGIN_MS):
            log.warning(
                "call %s on %s was interrupted: its hold is void, nothing was charged",
                hold.request_id,
                hold.route,
            )
    await sweep.expire_due(node.db)
    node.patience.looked(await _now_ms(node))


async def _now_ms(node: Node) -> int:
    async with node.db.read() as tx:
        return await tx.now_ms()


async def finish_payments(node: Node) -> None:
    """Bring payments to an end whose request is gone."""
    await _finish(node, recover.recover)


async def finish_upto(node: Node) -> None:
    """Settle calls that are done and paid afterwards, whose request is gone."""
    for payment_id in await upto.finish_due(node.rails):
        if node.stopping.is_set():
            return
        try:
            await upto.settle(node.rails, payment_id)
        except _PASSING as error:
            log.warning("payment %s: %s; it is looked at again", payment_id, error)
        except Exception:
            log.exception("payment %s failed; it is looked at again", payment_id)


async def finish_payouts(node: Node) -> None:
    """Bring refunds to an end: send what is not sent, and see what is final."""
    await _finish(node, carry.look, going_out=True)


async def _finish(
    node: Node, bring_on: Callable[[Rails, Payment], Awaitable[str]], *, going_out: bool = False
) -> None:
    rails = node.rails
    async with node.db.write() as tx:
        now_ms = await tx.now_ms()
        lease_ms = in_hand.lease_ms(rails, now_ms) - now_ms
        taken = await journal.take_unfinished(tx, now_ms, lease_ms, _PER_ROUND, going_out=going_out)

    async def look(payment: Payment) -> None:
        state = await bring_on(rails, payment)
        rails.in_hand.discard(payment.id)
        if state == "processing":
            async with node.db.write() as tx:
                now_ms = await tx.now_ms()
                await journal.release(tx, payment.id, now_ms + _next_look_ms(payment, now_ms))
        else:
            log.info("payment %s, interrupted before, is %s", payment.id, state)

    with in_hand.working_on(rails, [payment.id for payment in taken]):
        await _each(node, taken, look)


async def _tend_gas(node: Node) -> None:
    await gas.tend_all(node.rails)
    await gaps.fill_all(node.rails)


async def _each(
    node: Node, payments: Sequence[Payment], look: Callable[[Payment], Awaitable[object]]
) -> None:
    """One that cannot be worked on keeps no other waiting. When the process stops, the rest are
    left to whoever finds their leases over."""
    for payment in payments:
        if node.stopping.is_set():
            return
        try:
            await look(payment)
        except _PASSING as error:
            log.warning("payment %s: %s; it is looked at again", payment.id, error)
        except Exception:
            log.exception("payment %s failed; it is looked at again", payment.id)


def _next_look_ms(payment: Payment, now_ms: int) -> int:
    """Soon while somebody may still wait for it, then ever more rarely."""
    return min(max((now_ms - payment.created_at_ms) // 4, 1_000), _LONGEST_LOOK_MS)


async def _look_at_cards(node: Node) -> None:
    if node.cards is None:
        return
    async with node.db.write() as tx:
        waiting = await card.take_open(tx, await tx.now_ms(), _PER_ROUND)
    await _each(node, waiting, partial(card.look, node.cards))


class _Watcher:
    """Follows the transfers to us on every network, as far as no other process does."""

    def __init__(self) -> None:
        self._watch = watcher.Watch()

    async def watch(self, node: Node) -> None:
        chains = node.settings.chains
        await asyncio.gather(*(self._look(node, chain) for chain in chains))

    async def _look(self, node: Node, chain: Chain) -> None:
        try:
            await self._watch.look(node.rails, chain)
        except _PASSING as error:  # one network keeps no other waiting
            log.warning("%s is not followed now: %s", chain.name, error)
        except Exception:
            log.exception("%s is not followed now; it is tried again", chain.name)


class _Providers:
    """What was last said of the RPC providers, so that a change is one line in the log."""

    def __init__(self) -> None:
        self._said: dict[tuple[str, str], str | None] = {}

    async def survey(self, node: Node) -> None:
        for chain in node.settings.chains:
            if chain.facilitator:
                await remote.usable(node.rails, chain)
        for caip2, rpc in node.rails.rpcs.items():
            for view in await survey(rpc, node.now_s()):
                if self._said.get((caip2, view.label)) == view.fault:
                    continue
                self._said[caip2, view.label] = view.fault
                if view.fault is None:
                    log.info("%s: %s agrees again", caip2, view.label)
                else:
                    log.warning("%s: %s: %s %s", caip2, view.label, view.fault, view.detail)


async def _purge(node: Node) -> None:
    async with node.db.read() as tx:
        now_ms = await tx.now_ms()
    await sweep.purge_answers(node.db, now_ms - node.settings.server.answer_keep_s * 1000)
    await credentials.purge(node.db, now_ms - _KEPT_MS)
    await proofs.purge(node.db, now_ms - _KEPT_MS)


async def _reconcile(node: Node) -> None:
    places: dict[str, int] = {}
    for each in await reconcile.run(node.rails):
        odd = sum(not difference.explained for difference in each.differences)
        places[each.where] = places.get(each.where, 0) + odd
    await metrics.note(node.db, "outside", places)


async def _audit(node: Node) -> None:
    """All audits, in a thread with a connection of its own: they read everything there is."""
    broken = await asyncio.to_thread(lambda: asyncio.run(_verify(node.settings.server.database)))
    for each in broken:
        log.error("the books are wrong: %s: %s: %s", each.name, each.meaning, each.rows[:1])
    await metrics.note(node.db, "books", {"ledger": len(broken)})


async def _verify(url: str) -> list[audit.Broken]:
    db = await Database.connect(url)
    try:
        async with db.survey() as tx:
            # Hashing every row there is would take the time of the requests.
            return await audit.verify(tx, await tx.now_ms(), chains=False)
    finally:
        await db.close()


def run(settings: Settings, *, as_json: bool = False) -> None:
    """``farebox work``: only this loop, until it is told to stop."""
    from gateway.app import closing, open_node

    async def main() -> None:
        node = await open_node(settings)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, node.stopping.set)
        async with closing(node), asyncio.TaskGroup() as tasks:
            tasks.create_task(in_hand.renewing(node.rails, node.stopping))
            await loop(node)

    del as_json  # it says nothing but its log
    asyncio.run(main())
