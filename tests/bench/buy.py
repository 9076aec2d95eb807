"""P-buy and P-gas: payments that are settled on a chain, against the official sellers.

P-buy: each request carries an x402 payment of its own, which is verified, settled, minted, spent
and answered. The peers are those of ``peers.py``; everybody has a fresh chain each round.
P-gas: what the chain counts for 100 payments settled together, and for as many one by one.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anvil.devnet import Devnet, running
from chain.receipts import Receipt
from chain.rpc import Rpc
from chain.schemes import eip3009
from gateway.config import load
from gateway.db import Database, Tx
from gateway.migrations.run import migrate
from gateway.payments import engine, journal, offers
from gateway.payments.journal import AuthKey, Claim
from gateway.payments.lane import Begun, Job
from gateway.payments.nonces import Call
from gateway.payments.rails import Rails
from tests.bench import requests, run
from tests.bench.peers import _missing, _offer, _versions, _x402_express, _x402_py
from tests.bench.report import Run, row
from tests.bench.run import BenchFault, Load, median
from tests.fixtures_chain import NETWORK, USDC, payment
from tests.gateway.payments.parts import blank
from tests.servers import free_port

CONNECTIONS = 32
PAID_PER_S = 900  # payments signed for a second of load
PRICE_UNITS = 10_000
TOGETHER = 100


def buy(given: Run) -> None:
    """P-buy and the sellers that settle each request, in alternating rounds."""
    rounds: dict[str, Callable[[Path, int], Load]] = {"P-buy": _ours}
    peers = {"x402-py": _x402_py, "x402-express": _x402_express}
    rounds |= {name: peer for name, peer in peers.items() if not _missing(name)}
    found: dict[str, list[Load]] = {name: [] for name in rounds}
    for _ in range(given.rounds):
        for name, measure in rounds.items():
            with run.scratch() as folder:
                found[name].append(measure(folder, given.seconds))
    ours = median(found["P-buy"])
    given.put("P-buy", ours.per_s, "purchases/s", **row(ours))
    # From the payment's arrival to the paid answer: verified, settled in a block, minted, spent.
    p50_ms = round(ours.p50_ms, 1)
    given.put("P-buy.p95", ours.p95_ms, "ms", goal=1_000, most=True, p50_ms=p50_ms, c=CONNECTIONS)
    for name, goal in {"x402-py": 10.0, "x402-express": 5.0}.items():
        if name in found:
            peer = median(found[name])
            given.put(
                f"P-buy.{name}",
                ours.per_s / peer.per_s,
                f"x {name}",
                goal=goal,
                buy=row(ours),
                peer=row(peer),
                compared=_versions(name),
            )


def _ours(folder: Path, seconds: int) -> Load:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    pay_to = "0x" + secrets.token_hex(20)
    with running() as net:
        config = _config(folder, net, port, pay_to)
        with run.server("spend", port, "--config", str(config)) as pid:
            offer = _offer(url)
            file = requests.write(
                folder / "paid.bin", requests.paid(url, net.accounts, offer, PAID_PER_S * seconds)
            )
            found = run.load(url, file, pid, seconds=seconds, connections=CONNECTIONS, once=True)
            settled = net.balance_units(pay_to) // PRICE_UNITS
    if settled < found.per_s * seconds * 0.95:
        raise BenchFault(f"answered {found.per_s * seconds:.0f}, settled {settled}")
    run.check_books(f"sqlite:///{folder}/bench.db")
    return found


def _config(folder: Path, net: Devnet, port: int, pay_to: str) -> Path:
    config = folder / f"farebox-{port}.toml"
    config.write_text(
        f"""
[server]
listen = "127.0.0.1:{port}"
admin_listen = ""
database = "sqlite:///{folder}/bench.db"
log_level = "error"
[chains.base-sepolia]
rpc = ["{net.rpc_url}"]
pay_to = "{pay_to}"
settler_key = "{net.settler.private_key}"
[upstreams.bench]
url = "http://127.0.0.1:1"
routes = [ {{ match = "POST {requests.PATH}", price = "$0.01" }} ]
"""
    )
    return config


# --- gas ------------------------------------------------------------------------------------------


def gas(given: Run) -> None:
    """P-gas: gas of a payment among 100, against one of its own, of the same token."""
    with run.scratch() as folder, running() as net:
        together, alone = asyncio.run(_gas(f"sqlite:///{folder}/gas.db", net))
    given.put(
        "P-gas",
        together / alone,
        "x one by one",
        goal=0.65,
        most=True,
        together=round(together),
        alone=round(alone),
        count=TOGETHER,
    )


async def _gas(database: str, net: Devnet) -> tuple[float, float]:
    """Gas for each payment: settled together, and one by one."""
    pay_to = "0x" + secrets.token_hex(20)
    chain = {
        "rpc": [net.rpc_url],
        "pay_to": pay_to,
        "settler_key": net.settler.private_key,
        "settle_batch": TOGETHER,
    }
    settings = load(
        None,
        env={},
        overrides={
            "server": {"database": database},
            "chains": {"base-sepolia": chain},
            "upstreams": {"x": {"url": net.rpc_url, "routes": [{"match": "* /*", "price": "$1"}]}},
        },
    )
    db = await Database.connect(database)
    await migrate(db)
    rpc = Rpc(NETWORK, [net.rpc_url])
    rails = Rails(settings, db, await offers.load_keys(db), {NETWORK.caip2: rpc})
    try:
        await _settled(rails, net, pay_to, 1)  # the payee has a balance from here on
        singles = [(await _settled(rails, net, pay_to, 1))[0].gas_used for _ in range(20)]
        (batch,) = await _settled(rails, net, pay_to, TOGETHER)
        return batch.gas_used / TOGETHER, sum(singles) / len(singles)
    finally:
        await rpc.close()
        await db.close()


async def _settled(rails: Rails, net: Devnet, pay_to: str, count: int) -> list[Receipt]:
    """The receipts of the transactions that settled so many payments at once."""
    before = net.balance_units(pay_to)
    jobs = [_job(rails, net, pay_to, i) for i in range(count)]
    handed = await asyncio.gather(*(engine.settle(rails, job) for job in jobs))
    receipts = {}
    for each in handed:
        if each is None or each.receipt is None:
            raise BenchFault("a payment was not settled")
        receipts[each.tx_hash] = each.receipt
    if net.balance_units(pay_to) != before + count:
        raise BenchFault("a payment moved nothing")
    return list(receipts.values())


def _job(rails: Rails, net: Devnet, pay_to: str, number: int) -> Job:
    payer = net.accounts[number % len(net.accounts)]
    signed: dict[str, Any] = payment(payer, pay_to, 1, valid_before_s=int(time.time()) + 3_600)
    auth = eip3009.parse(signed)
    payment_id = journal.new_id()

    async def begin(tx: Tx, at: Begun) -> bool:
        key = AuthKey(NETWORK.caip2, USDC.address, auth.from_, auth.nonce)
        await journal.insert(tx, blank(payment_id, payer=auth.from_, auth_nonce=auth.nonce))
        return await journal.claim(tx, key, Claim(payment_id, b"", None), at.now_ms)

    return Job(
        chain=rails.settings.chains[0],
        call=Call(payment_id, USDC.address, eip3009.transfer_calldata(auth)),
        payer=auth.from_,
        spends=(USDC.address, auth.from_, auth.nonce),
        valid_before_s=auth.valid_before_s,
        begin=begin,
        code_known=False,
    )
