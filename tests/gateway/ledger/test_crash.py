"""kill -9 at random moments: the books are in order, and all that was acknowledged is there."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from gateway.db import Database
from tests import servers
from tests.gateway.ledger.helpers import faults
from tests.keeper import die_with_parent

ROUNDS = 20
ROOT = Path(__file__).parents[3]


async def test_what_was_acknowledged_survives_kill_9(db_url: str) -> None:
    rng = random.Random(20_261_120)
    nursery = _nursery(db_url)
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    acknowledged: list[dict[str, Any]] = []
    db = await Database.connect(db_url, wait_s=30)
    try:
        for number in range(ROUNDS):
            nursery.stdin.write(f"round{number}\n")
            pid = json.loads(nursery.stdout.readline())["pid"]
            after = rng.randrange(1, 250)  # answers, then the kill
            told = 0
            for line in nursery.stdout:
                said = json.loads(line)
                if "ended" in said:
                    break
                acknowledged.append(said)
                told += 1
                if told == after:
                    os.kill(pid, signal.SIGKILL)
            assert told >= after, f"round {number} ended by itself"
            assert await faults(db) == [], f"round {number}"
        await _all_there(db, acknowledged)
    finally:
        nursery.stdin.close()
        nursery.kill()
        nursery.wait(10)
        nursery.stdout.close()
        await db.close()


def _nursery(url: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("crash_child.py")), url],
        cwd=ROOT,
        env=servers.child_env({"PYTHONPATH": str(ROOT)}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        preexec_fn=die_with_parent,  # noqa: PLW1509  (touches no lock)
    )


async def _all_there(db: Database, acknowledged: list[dict[str, Any]]) -> None:
    async with db.read() as tx:
        holds = {row["id"]: row["request_id"] for row in await tx.fetch("SELECT * FROM hold")}
        transfers = {row["id"]: row for row in await tx.fetch("SELECT * FROM transfer")}
    kinds = set()
    for said in acknowledged:
        kind = next(iter(said))
        kinds.add(kind)
        match kind:
            case "held":
                assert holds.get(said["held"]) == said["request"], said
            case "closed":
                row = transfers.get(said["closed"])
                assert row is not None, said
                assert (row["kind"], row["amount_units"]) == (said["kind"], said["units"]), said
            case "minted":
                assert transfers[said["minted"]]["kind"] == "mint", said
    assert kinds >= {"held", "closed", "minted"}
    assert len(acknowledged) > 20 * ROUNDS
