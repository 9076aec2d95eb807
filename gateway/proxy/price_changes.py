"""The routes of a configuration, with the prices that were in force until just now.

A price that was raised is not charged at once to those who may have read the one before: not to
who signs without a ceiling, for as long as an offer can be paid and a signature be valid. That also
holds when the gateway was restarted with another configuration, on any node, and when another route
takes the request than before (``past_lists``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from gateway.db import Database
from gateway.forms import Price
from gateway.ledger import prices
from gateway.pricing import scheduled
from gateway.pricing.quote import PriceRule
from gateway.pricing.rules import compile_price
from gateway.proxy import past_lists
from gateway.proxy.routes_table import RouteTable, compile_routes
from gateway.settings import Settings
from wallet_auth.erc8128 import POLICY


def grace_s(settings: Settings) -> int:
    """How long a price that was read may lead to a call: the longest offer, then the longest
    signature."""
    return settings.server.offer_timeout_s + POLICY.window_s


async def open_routes(db: Database, settings: Settings) -> RouteTable:
    """The routes to serve. Notes their prices, so that the next change knows of them."""
    table = compile_routes(settings.upstreams)
    every = table.every()
    known: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {}
    for route in every:
        for form in (route.form, *scheduled.forms(route.form)):
            rule = compile_price(form)
            known[rule.version] = (rule.describe(), _source(form))
    whole, source = past_lists.source_of(settings.upstreams, table)
    known[whole] = ({"rule": "list"}, source)
    await prices.remember(db, known)
    versions = {route.id: route.price.version for route in every} | {past_lists.LIST: whole}
    changed = await prices.note(db, versions, grace_s(settings) * 1000)
    before = {
        # What is free now needs nobody's proof, whatever it was before.
        route.id: await _since(db, route.price, changed[route.id])
        for route in every
        if route.id in changed and not route.free
    }
    before |= await _moved(db, table, changed.get(past_lists.LIST, ()))
    return compile_routes(settings.upstreams, before) if before else table


async def _moved(
    db: Database, table: RouteTable, history: Sequence[tuple[int, str]]
) -> dict[str, PriceRule]:
    """The prices of routes whose requests stood elsewhere in a list of ``history``; its last one
    is ``table``."""
    past: list[tuple[int, str, RouteTable, past_lists.Places]] = []
    for at_ms, version in history[:-1]:
        then = await _list_of(db, version)
        if then is not None:
            past.append((at_ms, version, then, past_lists.places(then, table)))
    found: dict[str, PriceRule] = {}
    for route in table.every():
        if route.free or not any(route.id in places for *_, places in past):
            continue
        made: PriceRule | None = None
        for at_ms, version, then, places in past:
            rule = past_lists.before(version, then, places.get(route.id, ()), route)
            made = rule if made is None else scheduled.after(made, at_ms // 1000, rule)
        if made is not None:
            found[route.id] = scheduled.after(made, history[-1][0] // 1000, route.price)
    return found


async def _list_of(db: Database, version: str) -> RouteTable | None:
    """An earlier list; None: this release does not know all that stood in it."""
    async with db.read() as tx:
        known = await prices.terms_of(tx, version)
    if known is None:
        return None
    rules: dict[str, PriceRule] = {}
    for each in past_lists.versions_in(known.source):
        rule = await rule_of(db, each)
        if rule is None:
            return None
        rules[each] = rule
    try:
        return past_lists.table_of(known.source, rules)
    except ValueError:
        return None


async def _since(db: Database, price: PriceRule, history: Sequence[tuple[int, str]]) -> PriceRule:
    """A price with those that were in force since ``history`` begins; ``price`` is its last."""
    made: PriceRule | None = None
    for at_ms, version in history:
        rule = price if version == price.version else await rule_of(db, version)
        if rule is not None:
            made = rule if made is None else scheduled.after(made, at_ms // 1000, rule)
    return made or price


async def rule_of(db: Database, version: str) -> PriceRule | None:
    """The rule a version stands for; None: it was never in force here, or this release does not
    know its kind any more."""
    async with db.read() as tx:
        known = await prices.terms_of(tx, version)
    if known is None:
        return None
    try:
        rule = compile_price(Price(**known.source))
    except (TypeError, ValueError):
        return None
    return rule if rule.version == version else None


def _source(price: Price) -> dict[str, Any]:
    return {"rule": price.rule, "units": price.units, "options": _plain(price.options)}


def _plain(value: Any) -> Any:
    """As JSON has it: TOML also has times."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value.isoformat() if isinstance(value, datetime) else value
