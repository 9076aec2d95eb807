"""``farebox routes``: what is sold, for how much, and what of it is not charged."""

from __future__ import annotations

import json
from typing import Any

from gateway.forms import Member
from gateway.settings import FailedIf, Settings


def table(settings: Settings) -> list[dict[str, Any]]:
    """The priced routes and tools, in the order they are tried."""
    from gateway.pricing.rules import compile_price

    rows = []
    for upstream in settings.upstreams:
        priced: list[tuple[str, Any, FailedIf | None]]
        priced = [(route.match, route.price, route.failed_if) for route in upstream.routes]
        priced += [(f"tool {name}", price, None) for name, price in upstream.tools]
        for match, price, failed_if in priced:
            terms = compile_price(price).describe()
            free = terms.get("price_units") == 0
            text = "free" if free else terms.get("price", terms["rule"])
            rules = None if free or failed_if is None else failed_if
            rows.append(
                {
                    "upstream": upstream.name,
                    "mount": upstream.mount,
                    "match": match,
                    "price_text": text,
                    "price": terms,
                    "failed_if": None if rules is None else _rules(rules),
                    "failed_if_text": _words(rules),
                }
            )
    return rows


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
