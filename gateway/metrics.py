"""What ``/metrics`` says, in the text format of Prometheus 0.0.4: made when it is asked for.

Three sources, and each line says by its HELP which it is. **Counters** are this machine's: of all
its worker processes together, since the start. **From the database**: the same on every node, so
take the largest and never the sum. **This process**: what only the one that answers knows, such as
whether a provider's breaker is open. Labels come from the configuration and from tables in the
code; gas accounts and providers are told apart by their place in the configuration. No address,
key, URL or id of a request is ever one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from chain import endpoints
from gateway import __version__, observe
from gateway.db import Database, DatabaseUnavailable, Tx
from gateway.payments import budget, exposure, gas, remote, upto_rows, worth

if TYPE_CHECKING:
    from gateway.node import Node

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_PROVIDERS: Final = ("x402", "stripe", "deposits", "facilitator", "payout")
_NOTED: Final = "comparison"  # key in ``meta``


class Sample(NamedTuple):
    value: int
    labels: Mapping[str, str] = {}


class Family(NamedTuple):
    """One metric: its name without ``farebox_``, and every value it has."""

    name: str
    meaning: str
    samples: Sequence[Sample]
    kind: str = "gauge"


def text(families: Sequence[Family]) -> str:
    """The families as they go over the wire."""
    lines = []
    for family in families:
        name = f"farebox_{family.name}"
        lines.append(f"# HELP {name} {_escaped(family.meaning)}")
        lines.append(f"# TYPE {name} {family.kind}")
        for value, labels in family.samples:
            told = ",".join(f'{key}="{_quoted(each)}"' for key, each in labels.items())
            lines.append(f"{name}{{{told}}} {value}" if told else f"{name} {value}")
    return "\n".join([*lines, ""])


def _escaped(words: str) -> str:
    return words.replace("\\", "\\\\").replace("\n", "\\n")


def _quoted(words: str) -> str:
    return _escaped(words).replace('"', '\\"')


async def look(node: Node) -> str:
    """Everything there is to say now."""
    found = [Family("build_info", "Always 1.", [Sample(1, {"version": __version__})])]
    found += _counters()
    found += _process(node)
    try:
        async with node.db.read() as tx:
            found += await _database(node, tx)
        up = 1
    except DatabaseUnavailable:
        up = 0
    found.append(Family("database_up", "This process: whether the database answers.", [Sample(up)]))
    return text(found)


def _counters() -> Iterator[Family]:
    told: dict[str, list[Sample]] = {}
    for name, value, number in observe.counted():
        label = observe.COUNTERS[name].label
        told.setdefault(name, []).append(Sample(number, {label: value}))
    for name, samples in told.items():
        yield Family(f"{name}_total", observe.COUNTERS[name].meaning, samples, "counter")


# -- what only this process knows ------------------------------------------------------------------


def _process(node: Node) -> Iterator[Family]:
    yield Family(
        "writer_up",
        "This process: whether the ledger's writer runs.",
        [Sample(int(node.writer.alive))],
    )
    cache = node.limits.cache
    if cache is not None:
        meaning = "This process: whether Redis answers; 0: limits are counted apart."
        yield Family("redis_up", meaning, [Sample(int(cache.up))])
        yield Family("redis_outages_total", "This process.", [Sample(cache.outages)], "counter")
    now_ms = endpoints.now_ms()
    rested: list[Sample] = []
    broken: list[Sample] = []
    for caip2, rpc in node.rails.rpcs.items():
        for place, each in enumerate(rpc.endpoints, 1):
            labels = {"network": caip2, "provider": str(place)}
            bad = each.resting(now_ms) or each.suspect is not None
            rested.append(Sample(int(bad), labels))
            broken.append(Sample(int(each.broken(now_ms)), labels))
    yield Family(
        "rpc_provider_passed_over",
        "This process: 1 if an RPC provider failed, refused, lags or disagrees, and others are "
        "asked first. By its place in the configuration.",
        rested,
    )
    yield Family(
        "rpc_breaker_open",
        "This process: 1 if an RPC provider failed so often that it is asked one question at a "
        "time. By its place in the configuration.",
        broken,
    )
    resting = [
        Sample(
            int(remote.standing(node.rails, chain) == remote.PASSED_OVER),
            {"network": chain.caip2},
        )
        for chain in node.settings.chains
        if chain.facilitator
    ]
    if resting:
        meaning = "This process: 1 if the other facilitator is passed over now."
        yield Family("facilitator_passed_over", meaning, resting)
    unknown = [
        Sample(
            int(worth.data_fault(node.rails, chain) is not None),
            {"network": chain.caip2},
        )
        for chain in node.settings.chains
        if chain.network.op_stack
    ]
    if unknown:
        meaning = "This process: 1 if what a rollup takes for data on L1 cannot be known now."
        yield Family("l1_data_price_unknown", meaning, unknown)


# -- what all nodes know ---------------------------------------------------------------------------


async def _database(node: Node, tx: Tx) -> list[Family]:
    now_ms = await tx.now_ms()
    return [
        *await _pending(tx, now_ms),
        *await _holds(tx, now_ms),
        *await _gas(node, tx, now_ms),
        *await _worth(node, tx),
        *await _provisional(node, tx),
        *await _afterwards(tx),
        *await _compared(tx, now_ms),
    ]


async def _pending(tx: Tx, now_ms: int) -> list[Family]:
    rows = await tx.fetch(
        "SELECT provider, count(*) AS n, min(created_at_ms) AS oldest_ms FROM payment"
        " WHERE state = 'processing' GROUP BY provider"
    )
    known = {row["provider"]: row for row in rows}
    number, age = [], []
    for provider in _PROVIDERS:
        row = known.get(provider)
        labels = {"provider": provider}
        number.append(Sample(0 if row is None else row["n"], labels))
        since_ms = now_ms if row is None else row["oldest_ms"]
        age.append(Sample(max(now_ms - since_ms, 0) // 1000, labels))
    return [
        Family("payments_pending", "From the database: payments that have not ended.", number),
        Family(
            "payments_pending_oldest_seconds",
            "From the database: age of the oldest of them; 0 if there is none.",
            age,
        ),
    ]


async def _holds(tx: Tx, now_ms: int) -> list[Family]:
    row = await tx.fetchrow(
        "SELECT count(*) AS n, coalesce(sum(CASE WHEN lease_ms < $1 THEN 1 ELSE 0 END), 0) AS late"
        " FROM open_hold",
        now_ms,
    )
    number, late = (0, 0) if row is None else (row["n"], row["late"])
    return [
        Family(
            "holds_open",
            "From the database: calls under way, each under its hold.",
            [Sample(number)],
        ),
        Family(
            "holds_lapsed",
            "From the database: those of them whose lease is over; the sweeper ends them.",
            [Sample(int(late))],
        ),
    ]


async def _gas(node: Node, tx: Tx, now_ms: int) -> list[Family]:
    left, state, spent, limit, paused = [], [], [], [], []
    for chain in node.settings.chains:
        network = {"network": chain.caip2}
        for place, (standing, settlements) in enumerate(await gas.accounts_now(tx, chain), 1):
            labels = {**network, "account": str(place)}
            state += [
                Sample(int(standing == each), {**labels, "state": each}) for each in gas.STANDINGS
            ]
            if settlements is not None:
                left.append(Sample(settlements, labels))
        gwei = await budget.spent_gwei(tx, chain, now_ms)
        spent.append(Sample(gwei, network))
        if chain.gas_per_hour_gwei is not None:
            limit.append(Sample(chain.gas_per_hour_gwei, network))
            paused.append(Sample(int(await budget.is_spent(tx, chain, now_ms)), network))
    return [
        Family(
            "gas_account_state",
            "From the database: 1 for the state a gas account is in. By its place in the"
            " configuration.",
            state,
        ),
        Family(
            "gas_account_settlements_left",
            "From the database: for how many settlements a gas account is good at the price of its"
            " last look.",
            left,
        ),
        Family(
            "gas_last_hour_gwei",
            "From the database: gas money of the last hour, without what was spent for others.",
            spent,
        ),
        Family("gas_per_hour_gwei", "The setting gas_per_hour.", limit),
        Family(
            "gas_budget_spent",
            "From the database: 1 if nothing is sent now because gas_per_hour has no room.",
            paused,
        ),
    ]


async def _worth(node: Node, tx: Tx) -> list[Family]:
    gwei, units, floor, withheld = [], [], [], []
    for chain in node.settings.chains:
        network = {"network": chain.caip2}
        noted = await worth.noted_gwei(tx, chain)
        if noted is None:
            continue
        gwei.append(Sample(noted, network))
        cost = worth.cost_units(chain, noted)
        if cost is not None:
            least = worth.floor_units(chain, noted)
            units.append(Sample(cost, network))
            floor.append(Sample(least, network))
            withheld.append(Sample(int(least > chain.min_onchain_units), network))
    return [
        Family(
            "settlement_cost_gwei",
            "From the database: what one payment costs to settle, at the price of the last look.",
            gwei,
        ),
        Family(
            "settlement_cost_units",
            "From the database: the same in units of $0.000001, by the setting native_usd.",
            units,
        ),
        Family(
            "offer_floor_units",
            "From the database: nothing below this is offered now: three times that cost.",
            floor,
        ),
        Family(
            "offers_withheld",
            "From the database: 1 if that is more than min_onchain, so that offers are withheld.",
            withheld,
        ),
    ]


async def _provisional(node: Node, tx: Tx) -> list[Family]:
    now, limit = [], []
    for chain in node.settings.chains:
        network = {"network": chain.caip2}
        now.append(Sample(await exposure.provisional_units(tx, chain.caip2), network))
        limit.append(Sample(chain.exposure_limit_units, network))
    return [
        Family("provisional_units", "From the database: minted and not safe yet.", now),
        Family("exposure_limit_units", "The setting exposure_limit.", limit),
    ]


async def _afterwards(tx: Tx) -> list[Family]:
    found = await upto_rows.standing(tx)
    return [
        Family(
            "upto_calls",
            "From the database: calls by upto that have not ended: open (under way), due (done and"
            " not sent), sent, unsettled (done, and never to be paid).",
            [Sample(each.calls, {"state": each.state}) for each in found],
        ),
        Family(
            "upto_units",
            "From the database: what they may come to, or did.",
            [Sample(each.units, {"state": each.state}) for each in found],
        ),
    ]


# -- what the background loop found ----------------------------------------------------------------


async def note(db: Database, key: str, places: Mapping[str, int]) -> None:
    """Keep what a comparison came to, for whichever node is asked: unexplained differences by
    place. ``key``: which comparison, ``books`` or ``outside``."""
    async with db.write() as tx:
        value = json.dumps({"at_ms": await tx.now_ms(), "found": dict(places)})
        await tx.execute(
            "INSERT INTO meta (key, value) VALUES ($1, $2)"
            " ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            f"{_NOTED}_{key}",
            value,
        )


async def _compared(tx: Tx, now_ms: int) -> list[Family]:
    rows = await tx.fetch(
        "SELECT key, value FROM meta WHERE key IN ($1, $2)", f"{_NOTED}_books", f"{_NOTED}_outside"
    )
    found, age = [], []
    for row in rows:
        which = {"comparison": row["key"].removeprefix(f"{_NOTED}_")}
        told = json.loads(row["value"])
        age.append(Sample(max(now_ms - told["at_ms"], 0) // 1000, which))
        found += [Sample(n, {**which, "where": where}) for where, n in told["found"].items()]
    return [
        Family(
            "differences",
            "From the database: what the last comparison found and could not explain; of the books"
            " with themselves (ledger verify), and with chain and cards outside (reconcile).",
            found,
        ),
        Family("differences_age_seconds", "From the database: how old that is.", age),
    ]
