"""The process that is killed in ``test_crash.py``: it spends, and prints what it was answered.

    python tests/gateway/ledger/crash_child.py URL

For every line on its standard input it forks a child and prints its number. The child goes on
where the last one was killed and writes each acknowledged outcome to the standard output, in one
piece, before it asks for anything else.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from functools import partial

from gateway.accounts import wallets
from gateway.db import Database, transact
from gateway.ledger import Call, Closed, Guard, Held, Hold, HoldRow, Mint, Minted, Writer
from gateway.ledger.rows import HOLD, columns, hold_row
from gateway.ledger.steps import Close, Outcome
from tests.keeper import die_with_parent

ACCOUNTS = 3


def tell(outcome: Outcome) -> None:
    match outcome:
        case Held(row):
            said: dict[str, object] = {"held": row.id, "request": row.request_id}
        case Closed(transfer):
            said = {"closed": transfer.id, "kind": transfer.kind, "units": transfer.amount_units}
        case Minted(lot_id):
            said = {"minted": lot_id}
        case _:
            said = {"other": type(outcome).__name__}
    os.write(1, (json.dumps(said) + "\n").encode())


async def spend(writer: Writer, accounts: list[int], name: str, rng: random.Random) -> None:
    """One customer: buys, holds, closes, for ever."""
    number = 0
    while True:
        number += 1
        account = rng.choice(accounts)
        if rng.random() < 0.2:
            ttl_ms = rng.choice((20, 200, 10**9))
            fact = ("test", f"{name}-{number}", 0)
            expires_ms = time.time_ns() // 1_000_000 + ttl_ms
            mint = Mint(account, rng.randrange(1, 50), *fact, "grant", expires_ms)
            tell(await writer.submit(mint))
            continue
        guard = Guard("0xp", "test", f"{name}-{number}")
        hold = Hold(account, guard, b"c", rng.randrange(10), 60_000, Call("r", "GET", "/"))
        outcome = await writer.submit(hold)
        tell(outcome)
        if isinstance(outcome, Held) and rng.random() < 0.9:
            await close(writer, outcome.hold, rng)


async def close(writer: Writer, row: HoldRow, rng: random.Random) -> None:
    if rng.random() < 0.2:
        tell(await writer.submit(Close(row, void_reason="upstream_error")))
    else:
        tell(await writer.submit(Close(row, rng.randrange(row.max_units + 1))))


async def left_open(db: Database) -> Sequence[HoldRow]:
    """What those who were killed before this one did not finish."""
    async with db.read() as tx:
        rows = await tx.fetch(
            f"SELECT {columns(HOLD, 'h')} FROM hold h LEFT JOIN transfer t ON t.id = h.id"
            " WHERE t.id IS NULL ORDER BY h.id LIMIT 20"
        )
    return [hold_row(row) for row in rows]


async def main(url: str, name: str) -> None:
    rng = random.Random(name)
    db = await Database.connect(url, wait_s=30)
    accounts = []
    for n in range(ACCOUNTS):
        address = f"0x{n:040x}"
        accounts.append(await transact(db, partial(wallets.ensure, address=address, now_ms=0)))
    writer = await Writer.start(db)
    open_before = await left_open(db)
    await asyncio.gather(
        *(close(writer, row, rng) for row in open_before),
        *(spend(writer, accounts, f"{name}-{i}", rng) for i in range(8)),
    )


def nursery(url: str) -> None:
    """Forking takes a moment, importing everything takes a second."""
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            die_with_parent()  # a fork does not inherit it
            asyncio.run(main(url, line.strip()))
            os._exit(1)  # unreachable: it spends until it is killed
        os.write(1, (json.dumps({"pid": pid}) + "\n").encode())
        os.waitpid(pid, 0)
        os.write(1, b'{"ended": true}\n')


if __name__ == "__main__":
    nursery(sys.argv[1])
