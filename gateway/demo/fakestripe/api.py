"""``/v1``: authentication, API version, idempotency, lists, expansion; the table of endpoints."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from gateway.demo.fakestripe import checkout, forms, methods, payments, refunds, webhooks
from gateway.demo.fakestripe.errors import StripeError, invalid
from gateway.demo.fakestripe.idempotency import Answer, Table
from gateway.demo.fakestripe.lists import LISTS, expanded, listed, page, retrieve
from gateway.demo.fakestripe.state import API_VERSION, Object, State, public

HOLD_S: Final = 60.0
MAX_BODY: Final = 1 << 20

_VERSION = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}(\.[a-z]+)?")
_KEY = re.compile(r"(sk|rk)_test_[A-Za-z0-9_]{3,120}")

CREATES: Final[dict[str, Callable[[State, forms.Params], Object]]] = {
    "/v1/checkout/sessions": checkout.create_session,
    "/v1/customers": methods.create_customer,
    "/v1/payment_intents": payments.create_intent,
    "/v1/payment_methods": methods.create_payment_method,
    "/v1/refunds": refunds.create_refund,
    "/v1/webhook_endpoints": webhooks.create_endpoint,
}

# (collection, action after the id or "") -> what a POST there does
ACTIONS: Final[dict[tuple[str, str], Callable[[State, str, forms.Params], Object]]] = {
    ("/v1/checkout/sessions", "expire"): checkout.expire_session,
    ("/v1/customers", ""): methods.update_customer,
    ("/v1/disputes", ""): refunds.submit_evidence,
    ("/v1/disputes", "close"): refunds.close_dispute,
    ("/v1/payment_intents", "cancel"): payments.cancel_intent,
    ("/v1/payment_intents", "confirm"): payments.confirm_intent,
    ("/v1/payment_methods", "attach"): methods.attach,
    ("/v1/payment_methods", "detach"): methods.detach,
}


READS: Final[dict[tuple[str, str], Callable[[State, str, forms.Params], Object]]] = {
    **{(collection, ""): retrieve(kind) for collection, (kind, _) in LISTS.items()},
    ("/v1/checkout/sessions", "line_items"): lambda state, which, _: page(
        f"/v1/checkout/sessions/{which}/line_items",
        checkout.line_items(state, which),
        has_more=False,
    ),
    ("/v1/customers", "payment_methods"): lambda state, which, params: listed(
        state, "/v1/payment_methods", {**params, "customer": which}
    ),
}

DELETES: Final[dict[tuple[str, str], Callable[[State, str], Object]]] = {
    ("/v1/customers", ""): methods.delete_customer,
    ("/v1/webhook_endpoints", ""): webhooks.delete_endpoint,
}


@dataclass(slots=True)
class Api:
    """What the ``/v1`` handler works with."""

    state: State
    idempotency: Table
    released: asyncio.Event


async def handle(api: Api, request: Request) -> Response:
    """Answer one API call."""
    state = api.state
    request_id = "req_" + secrets.token_hex(7)
    headers = {"Request-Id": request_id, "Stripe-Version": API_VERSION}
    try:
        api_key = _authenticate(request.headers.get("authorization", ""))
        version = request.headers.get("stripe-version", API_VERSION)
        if not _VERSION.fullmatch(version):
            raise invalid(f"Invalid Stripe API version: {version[:50]}")
        headers["Stripe-Version"] = version
        encoded = await _encoded(request)
        key = request.headers.get("idempotency-key") if request.method == "POST" else None
        call = {"method": request.method, "path": request.url.path, "idempotency_key": key}
        state.calls.append({**call, "request_id": request_id, "body": encoded.decode("latin-1")})
        answer = await _faulty(api, request, _Call(encoded, request_id, api_key, key))
    except StripeError as error:
        answer = _answer(error.status, error.body(), request_id)
    if answer.request_id != request_id:
        headers["Idempotent-Replayed"] = "true"
        headers["Original-Request"] = answer.request_id
    return Response(
        answer.body, answer.status, headers={**headers, "Content-Type": "application/json"}
    )


@dataclass(frozen=True, slots=True)
class _Call:
    encoded: bytes
    request_id: str
    api_key: str
    key: str | None


async def _faulty(api: Api, request: Request, call: _Call) -> Answer:
    """The answer, with the planned misbehaviour of this call around it."""
    fault = api.state.take_fault(request.method, request.url.path)
    lost = StripeError(500, "api_error", "An unknown error occurred.")
    if fault == "error_before":
        raise lost
    answer = await _once(api, request, call, hold=fault == "hold_before")
    if fault == "hold_after":
        await _hold(api)
    if fault == "error_after":
        raise lost
    return answer


async def _once(api: Api, request: Request, call: _Call, *, hold: bool) -> Answer:
    """Run under the idempotency key, if there is one: claim it, then keep the answer or free it."""
    state, table = api.state, api.idempotency
    if call.key is None:
        return _run(state, request, call)
    path = request.url.path
    stored = table.begin(call.api_key, call.key, path, call.encoded, state.now_s())
    if stored is not None:
        return stored
    try:
        if hold:
            await _hold(api)
        answer = _run(state, request, call)
    except StripeError as error:
        if not error.started:
            table.drop(call.api_key, call.key)
            raise
        answer = _answer(error.status, error.body(), call.request_id)
    except BaseException:
        table.drop(call.api_key, call.key)
        raise
    table.finish(call.api_key, call.key, answer)
    return answer


def _run(state: State, request: Request, call: _Call) -> Answer:
    """Do it, without giving way to another call."""
    params = forms.decode(call.encoded)
    checkout.sweep(state)
    state.request = {"id": call.request_id, "idempotency_key": call.key}
    try:
        body = _dispatch(state, request.method, request.url.path.rstrip("/"), params)
    finally:
        state.request = None
    expand = [path for path in forms.listing(params, "expand") if isinstance(path, str)]
    return _answer(200, expanded(state, public(body), expand), call.request_id)


async def _hold(api: Api) -> None:
    api.released.clear()
    try:
        async with asyncio.timeout(HOLD_S):
            await api.released.wait()
    except TimeoutError:
        return


def _answer(status: int, body: Object, request_id: str) -> Answer:
    return Answer(status, json.dumps(body, indent=2).encode(), request_id)


async def _encoded(request: Request) -> bytes:
    if request.method != "POST":
        return request.url.query.encode("latin-1")
    if int(request.headers.get("content-length", "0")) > MAX_BODY:
        raise invalid("Request too large.")
    return await request.body()


def _authenticate(header: str) -> str:
    """The API key out of ``Bearer`` or ``Basic``; only test keys are let in."""
    kind, _, value = header.partition(" ")
    key = ""
    if kind.lower() == "bearer":
        key = value.strip()
    elif kind.lower() == "basic":
        try:
            key = base64.b64decode(value, validate=True).decode("utf-8").partition(":")[0]
        except (binascii.Error, UnicodeDecodeError):
            key = ""
    if not key:
        raise StripeError(
            401,
            "invalid_request_error",
            "You did not provide an API key. You need to provide your API key in the "
            "Authorization header, using Bearer auth (e.g. 'Authorization: Bearer "
            "YOUR_SECRET_KEY').",
        )
    if not _KEY.fullmatch(key):
        raise StripeError(
            401, "invalid_request_error", f"Invalid API Key provided: {key[:8]}****{key[-4:]}"
        )
    return key


def _dispatch(state: State, method: str, path: str, params: forms.Params) -> Object:
    collection, object_id, action = _split(path)
    if path == "/v1/account" and method == "GET":
        return {"id": state.account, "object": "account", "country": "US", "type": "standard"}
    if method == "GET" and path in LISTS:
        return listed(state, path, params)
    if method == "POST" and path in CREATES:
        return CREATES[path](state, params)
    if method == "POST" and object_id and (collection, action) in ACTIONS:
        return ACTIONS[collection, action](state, object_id, params)
    if method == "GET" and object_id and (collection, action) in READS:
        return READS[collection, action](state, object_id, params)
    if method == "DELETE" and object_id and (collection, action) in DELETES:
        return DELETES[collection, action](state, object_id)
    raise StripeError(
        404, "invalid_request_error", f"Unrecognized request URL ({method}: {path[:200]})."
    )


def _split(path: str) -> tuple[str, str, str]:
    """``/v1/a/b/ID/action`` -> (collection, id, action)."""
    for collection in LISTS:
        if path.startswith(collection + "/"):
            object_id, _, action = path[len(collection) + 1 :].partition("/")
            return collection, object_id, action
    return path, "", ""
