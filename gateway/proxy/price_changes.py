"""The routes of a configuration, with the prices that were in force until just now.

A price that was raised is not charged at once to those who may have read the one before: not to
who signs without a ceiling, for as long as an offer can be paid and a signature be valid. That also
holds when the gateway was restarted with another configuration, on any node.
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
    await prices.remember(db, known)
    versions = {route.id: route.price.version for route in every}
    changed = await prices.note(db, versions, grace_s(settings) * 1000)
    before = {
        # What is free now needs nobody's proof, whatever it was before.
        route.id: await _since(db, route.price, changed[route.id])
        for route in every
        if route.id in changed and not route.free
    }
    return compile_routes(settings.upstreams, before) if before else table


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
