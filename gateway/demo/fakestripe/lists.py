"""Lists with cursors and filters, and ``expand[]``.

Source: Stripe API reference, "Pagination" and "Expanding responses".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from gateway.demo.fakestripe import forms
from gateway.demo.fakestripe.errors import invalid
from gateway.demo.fakestripe.state import Object, State, public

# list endpoint -> (object kind, members that may be filtered by)
LISTS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "/v1/charges": ("charge", ("customer", "payment_intent")),
    "/v1/checkout/sessions": (
        "checkout.session",
        ("customer", "payment_intent", "status", "client_reference_id"),
    ),
    "/v1/customers": ("customer", ("email",)),
    "/v1/disputes": ("dispute", ("charge", "payment_intent")),
    "/v1/events": ("event", ("type",)),
    "/v1/payment_intents": ("payment_intent", ("customer",)),
    "/v1/payment_methods": ("payment_method", ("customer", "type")),
    "/v1/refunds": ("refund", ("charge", "payment_intent")),
    "/v1/webhook_endpoints": ("webhook_endpoint", ()),
}


def retrieve(kind: str) -> Callable[[State, str, forms.Params], Object]:
    """``GET /v1/…/{id}`` for a kind of object."""

    def read(state: State, object_id: str, params: forms.Params) -> Object:
        forms.only(params, ())
        return state.get(kind, object_id)

    return read


def listed(state: State, path: str, params: Mapping[str, Any]) -> Object:
    """One page of a kind of object, newest first."""
    kind, filters = LISTS[path]
    extra = ("types", "delivery_success") if kind == "event" else ()
    forms.only(params, ("limit", "starting_after", "ending_before", "created", *filters, *extra))
    limit = forms.integer(params, "limit")
    limit = 10 if limit is None else limit
    if not 1 <= limit <= 100:
        raise invalid("Invalid integer: limit must be between 1 and 100.", "limit")
    rows = [row for row in reversed(state.tables[kind].values()) if _wanted(row, params, filters)]
    types = forms.listing(params, "types") if kind == "event" else []
    if types:
        rows = [row for row in rows if row["type"] in types]
    ids = [row["id"] for row in rows]
    after, before = forms.text(params, "starting_after"), forms.text(params, "ending_before")
    if after is not None:
        state.get(kind, after, "starting_after")
        rows = rows[ids.index(after) + 1 :] if after in ids else []
    elif before is not None:
        state.get(kind, before, "ending_before")
        rows = rows[: ids.index(before)] if before in ids else []
        return page(path, rows[-limit:], has_more=len(rows) > limit)
    return page(path, rows[:limit], has_more=len(rows) > limit)


def _wanted(row: Object, params: Mapping[str, Any], filters: tuple[str, ...]) -> bool:
    for name in filters:
        value = forms.text(params, name)
        if value is not None and row.get(name) != value:
            return False
    created = params.get("created")
    if isinstance(created, str):
        return bool(row["created"] == forms.integer(params, "created"))
    bounds = forms.mapping(params, "created")
    tests: dict[str, Callable[[int, int], bool]] = {
        "gt": int.__gt__,
        "gte": int.__ge__,
        "lt": int.__lt__,
        "lte": int.__le__,
    }
    for name in bounds:
        bound = forms.integer(bounds, name, f"created[{name}]")
        if name not in tests or bound is None:
            raise invalid(f"Received unknown parameter: created[{name}]", "created")
        if not tests[name](row["created"], bound):
            return False
    return True


def page(path: str, rows: list[Object], *, has_more: bool) -> Object:
    """Stripe's list object."""
    return {"object": "list", "data": rows, "has_more": has_more, "url": path}


def expanded(state: State, body: Any, paths: list[str]) -> Any:
    """Replace ids by the objects they name, for each ``expand[]`` path."""
    for path in paths:
        if path.count(".") > 3:
            raise invalid("You cannot expand more than 4 levels of a property.", "expand")
        _expand(state, body, path.split("."), path)
    return body


def _expand(state: State, here: Any, parts: list[str], whole: str) -> None:
    if isinstance(here, list):
        for item in here:
            _expand(state, item, parts, whole)
        return
    if not isinstance(here, dict) or parts[0] not in here:
        raise invalid(f"This property cannot be expanded ({whole[:100]}).", "expand")
    value = here[parts[0]]
    if isinstance(value, str) and parts[0] in state.tables:
        value = here[parts[0]] = public(state.get(parts[0], value))
    elif isinstance(value, str) and parts[0] == "latest_charge":
        value = here[parts[0]] = public(state.get("charge", value))
    if len(parts) > 1 and value is not None:
        _expand(state, value, parts[1:], whole)
