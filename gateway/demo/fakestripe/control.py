"""``/_fake/…``: the doors that only tests and the demo use. JSON in, JSON out.

POST webhooks            {url, secret, events?}      the one endpoint from now on
POST mode                {paused?, copies?, delay_s?, retry_after_s?: [...]}  deliveries from now on
POST flush               {order?: fifo|reversed|shuffled, seed?}   send what was kept
POST deliver             {event_ids?: [...], times?}  send events (all by default) again
GET  deliveries?wait_s=  attempts so far; waits until nothing is pending
GET  calls               API calls seen: method, path, idempotency key, body
POST sessions/ID/pay     {card? or bank?, email?, authenticate?}   pay without a browser
POST sessions/ID/expire
POST intents/ID/settle   {outcome?: succeeded|failed}  the bank answers
POST charges/ID/dispute  {amount?, reason?, inquiry?}
POST disputes/ID/end     {outcome: won|lost|warning_closed|prevented}
POST refunds/ID/fail
POST clock               {advance_s}
POST faults              {kind, method?, path?, times?}
POST release             let held API calls go on
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final, get_args

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway.demo.fakestripe import checkout, refunds
from gateway.demo.fakestripe.api import Api
from gateway.demo.fakestripe.errors import StripeError, invalid
from gateway.demo.fakestripe.state import Fault, Object, State, public
from gateway.demo.fakestripe.webhooks import MAX_COPIES, Deliverer, Order, create_endpoint

FAULTS: Final = ("error_before", "error_after", "hold_before", "hold_after")


@dataclass(slots=True)
class Control:
    """What the doors work with."""

    api: Api
    deliverer: Deliverer

    @property
    def state(self) -> State:
        return self.api.state


async def handle(control: Control, request: Request) -> Response:
    """Answer one control call."""
    parts = tuple(request.url.path.removeprefix("/_fake/").strip("/").split("/"))
    try:
        if request.method == "GET":
            return JSONResponse(await _read(control, parts, request))
        body = await request.body()
        values = json.loads(body) if body else {}
        if not isinstance(values, dict):
            raise invalid("The body must be a JSON object.")
        if len(parts) == 1 and parts[0] in SWITCHES:
            return JSONResponse(SWITCHES[parts[0]](control, values))
        if len(parts) == 3 and (parts[0], parts[2]) in ACTS:
            done = ACTS[parts[0], parts[2]](control.state, parts[1], values)
            return JSONResponse(public(done))
    except StripeError as error:
        return JSONResponse(error.body(), error.status)
    except (KeyError, TypeError, ValueError) as error:
        return JSONResponse(invalid(f"{type(error).__name__}: {error}").body(), 400)
    return JSONResponse(invalid("There is no such control.").body(), 404)


async def _read(control: Control, parts: tuple[str, ...], request: Request) -> Any:
    if parts == ("calls",):
        return {"calls": list(control.state.calls)}
    if parts == ("deliveries",):
        wait_s = min(float(request.query_params.get("wait_s", "0")), 60.0)
        idle = await control.deliverer.idle(wait_s) if wait_s > 0 else None
        shown = [
            {key: value for key, value in asdict(one).items() if key in _DELIVERY}
            for one in control.deliverer.deliveries
        ]
        return {"idle": idle, "deliveries": shown}
    if parts == ("state",):
        return {kind: len(rows) for kind, rows in control.state.tables.items()}
    raise invalid("There is no such control.")


_DELIVERY: Final = {"event_id", "event_type", "url", "attempts", "state"}


def _set_webhook(control: Control, values: Object) -> Object:
    control.state.tables["webhook_endpoint"].clear()
    params = {"url": values["url"], "enabled_events": values.get("events", ["*"])}
    return public(create_endpoint(control.state, params, values["secret"]))  # type: ignore[no-any-return]  # public keeps the type of what it copies


def _set_mode(control: Control, values: Object) -> Object:
    mode = control.deliverer.mode
    mode.paused = bool(values.get("paused", mode.paused))
    mode.copies = _between(values.get("copies", mode.copies), 1, MAX_COPIES)
    mode.delay_s = float(values.get("delay_s", mode.delay_s))
    pauses = values.get("retry_after_s", mode.retry_after_s)
    mode.retry_after_s = tuple(float(pause) for pause in pauses)[:20]
    return asdict(mode)


def _flush(control: Control, values: Object) -> Object:
    order: Order = values.get("order", "fifo")
    if order not in get_args(Order):
        raise invalid("order is fifo, reversed or shuffled.", "order")
    return {"sent": control.deliverer.flush(order, int(values.get("seed", 0)))}


def _deliver(control: Control, values: Object) -> Object:
    events = control.state.tables["event"]
    chosen = values.get("event_ids") or list(events)
    times = _between(values.get("times", 1), 1, MAX_COPIES)
    sent = 0
    for _ in range(times):
        for event_id in chosen:
            sent += control.deliverer.deliver(control.state.get("event", event_id))
    return {"sent": sent}


def _advance(control: Control, values: Object) -> Object:
    control.state.advanced_s += _between(values["advance_s"], 0, 10 * 365 * 86400)
    checkout.sweep(control.state)
    return {"now_s": control.state.now_s()}


def _plan_fault(control: Control, values: Object) -> Object:
    if values["kind"] not in FAULTS:
        raise invalid(f"kind is one of {', '.join(FAULTS)}.", "kind")
    fault = Fault(
        values["kind"],
        str(values.get("method", "POST")),
        str(values.get("path", "/v1/")),
        _between(values.get("times", 1), 1, 1000),
    )
    control.state.faults.append(fault)
    return asdict(fault)


def _release(control: Control, _values: Object) -> Object:
    control.api.released.set()
    return {}


def _between(value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise invalid(f"This number must be from {least} to {most}.")
    return value


def _pay(state: State, session_id: str, values: Object) -> Object:
    session = state.get("checkout.session", session_id)
    email = values.get("email", "buyer@example.com")
    if "bank" in values:
        checkout.pay_by_bank(state, session, values["bank"], email)
        return session
    number = values.get("card", "4242424242424242")
    intent = checkout.pay_by_card(state, session, number, email)
    if intent["status"] == "requires_action" and "authenticate" in values:
        checkout.finish_authentication(state, intent, passed=bool(values["authenticate"]))
    return session


def _dispute(state: State, charge_id: str, values: Object) -> Object:
    return refunds.open_dispute(
        state,
        charge_id,
        values.get("amount"),
        values.get("reason", "fraudulent"),
        inquiry=bool(values.get("inquiry", False)),
    )


SWITCHES: Final[dict[str, Callable[[Control, Object], Object]]] = {
    "clock": _advance,
    "deliver": _deliver,
    "faults": _plan_fault,
    "flush": _flush,
    "mode": _set_mode,
    "release": _release,
    "webhooks": _set_webhook,
}

ACTS: Final[dict[tuple[str, str], Callable[[State, str, Object], Object]]] = {
    ("sessions", "pay"): _pay,
    ("sessions", "expire"): lambda state, which, _: checkout.expire_session(state, which, {}),
    ("intents", "settle"): lambda state, which, values: checkout.settle_intent(
        state, which, values.get("outcome")
    ),
    ("charges", "dispute"): _dispute,
    ("disputes", "end"): lambda state, which, values: refunds.end_dispute(
        state, which, values["outcome"]
    ),
    ("refunds", "fail"): lambda state, which, _: refunds.fail_refund(state, which),
}
