"""What is sold, for how much, and what of it is not charged: for ``farebox routes`` and for
``GET v1/prices``.

Made from the settings by the same rules that price requests, and anew for new settings: a list can
say nothing else than a 402.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from gateway.forms import Member, Price
from gateway.money import UNITS_PER_USD, format_credits, format_usd
from gateway.settings import FailedIf, Route, Settings, Upstream

_TOOL: Final = "tool "
_OF_TOOLS: Final = "not charged: errors"
_ALL_ELSE: Final = "all but tools/call"


def table(settings: Settings, now_s: int) -> list[dict[str, Any]]:
    """The priced routes and tools, in the order they are tried."""
    return [
        {
            "upstream": upstream.name,
            "mount": upstream.mount,
            "match": match,
            **_of_price(price, now_s),
            "failed_if": None if rules is None else _rules(rules),
            "failed_if_text": _OF_TOOLS if match.startswith(_TOOL) else _words(rules),
        }
        for upstream, match, price, rules, _ in _sold(settings)
    ]


def public(settings: Settings, now_s: int) -> dict[str, Any]:
    """The same for callers: where they find what is sold, and what credits cost."""
    per_usd = settings.credits.per_usd
    return {
        "credits_per_usd": per_usd,
        "units_per_usd": UNITS_PER_USD,
        "packs": [_amount(units, per_usd) for units in settings.credits.packs_units],
        "prices": [
            _row(upstream, match, _of_price(price, now_s), rules, route, per_usd)
            for upstream, match, price, rules, route in _sold(settings)
        ],
    }


def changes(settings: Settings) -> tuple[int, ...]:
    """The seconds at which scheduled prices begin to hold, in order: between two of them nothing
    changes."""
    from gateway.pricing.rules import compile_price
    from gateway.pricing.scheduled import Scheduled

    rules = (compile_price(price) for _, _, price, _, _ in _sold(settings))
    scheduled = (rule for rule in rules if isinstance(rule, Scheduled))
    return tuple(sorted({step.from_s for rule in scheduled for step in rule.steps}))


Sold = tuple[Upstream, str, Price, FailedIf | None, Route | None]


def _sold(settings: Settings) -> Iterator[Sold]:
    for upstream in settings.upstreams:
        for route in upstream.routes:
            rules = None if route.price.rule == "free" else route.failed_if
            yield upstream, route.match, route.price, rules, route
        for name, price in upstream.tools:
            yield upstream, f"{_TOOL}{name}", price, None, None
        if upstream.kind == "mcp":
            yield upstream, _ALL_ELSE, Price("free", 0, {}), None, None


def _of_price(price: Price, now_s: int) -> dict[str, Any]:
    """The price that holds, and those that will."""
    from gateway.pricing.rules import compile_price
    from gateway.pricing.scheduled import Scheduled

    rule, later = compile_price(price), []
    if isinstance(rule, Scheduled):
        later = [step.shown() for step in rule.steps if step.from_s > now_s]
        rule = rule.at(now_s)
    terms = rule.describe()
    free = rule.fixed_units == 0
    text = "free" if free else terms.get("price", terms["rule"])
    told = {"price_text": text, "price": terms, "price_version": rule.version}
    return {**told, "price_changes": later} if later else told


def _amount(units: int, per_usd: int) -> dict[str, Any]:
    return {"usd": format_usd(units), "credits": format_credits(units, per_usd), "units": units}


def _row(  # noqa: PLR0917  (one caller)
    upstream: Upstream,
    match: str,
    of_price: dict[str, Any],
    rules: FailedIf | None,
    route: Route | None,
    per_usd: int,
) -> dict[str, Any]:
    mount = upstream.mount.rstrip("/")
    told = {"id": f"{upstream.name} {match}", "unit": "call", **of_price}
    units = told["price"].get("price_units", told["price"].get("max_units"))
    if units is not None:
        told |= {"at_most": "price_units" not in told["price"], **_amount(units, per_usd)}
    if route is None:
        told |= {"method": "POST", "path": mount or "/"}
        if not match.startswith(_TOOL):
            return told
        free = told["price_text"] == "free"
        return {**told, "tool": match[len(_TOOL) :], "not_charged": "" if free else _OF_TOOLS}
    told |= {"method": route.method, "path": mount + route.path}
    told |= {"description": route.description, "not_charged": _words(rules)}
    if route.bazaar is not None:
        schemas = {"query": route.bazaar.query_schema, "body": route.bazaar.body_schema}
        told["schema"] = {name: schema for name, schema in schemas.items() if schema is not None}
    return told


def _rules(failed_if: FailedIf) -> dict[str, Any]:
    """``failed_if`` as it can be written in a configuration."""
    return {
        "status": [_status(each) for each in failed_if.status],
        "slower_than_s": failed_if.slower_than_s,
        "empty": failed_if.empty,
        "answer_without": [_place(each) for each in failed_if.answer_without],
        "answer_with": [_place(each) for each in failed_if.answer_with],
    }


def _status(span: tuple[int, int]) -> str:
    first, last = span
    return str(first) if first == last else f"{first // 100}xx"


def _place(member: Member) -> Any:
    if member.equals is None:
        return member.name
    return {"path": member.name, "equals": member.equals}


def _words(failed_if: FailedIf | None) -> str:
    """The same for people."""
    if failed_if is None:
        return ""
    told = [*map(_status, failed_if.status)]
    if failed_if.slower_than_s is not None:
        told.append(f"slower than {failed_if.slower_than_s} s")
    if failed_if.empty:
        told.append("empty")
    for how, members in (("without", failed_if.answer_without), ("with", failed_if.answer_with)):
        for each in members:
            value = "" if each.equals is None else f" = {json.dumps(each.equals)}"
            told.append(f"{how} {each.name}{value}")
    return "not charged: " + ", ".join(dict.fromkeys([*told, "5xx"]))
