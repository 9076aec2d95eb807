"""The local Stripe through the real SDK: objects, errors, idempotency, lists."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import httpx
import pytest
import stripe

from tests.gateway.demo.stripes import KEY, Stripes, one_item, session_params, until


def test_a_session_is_opened_paid_and_shown(stripes: Stripes) -> None:
    client = stripes.client()
    session = client.v1.checkout.sessions.create(session_params())
    assert (session.status, session.payment_status) == ("open", "unpaid")
    assert session.payment_intent is None  # as since API 2022-08-01
    assert session.amount_total == 500 and session.url and session.url.startswith(stripes.url)
    stripes.tell(f"sessions/{session.id}/pay", card="4242424242424242", email="a@example.com")
    session = client.v1.checkout.sessions.retrieve(
        session.id, {"expand": ["payment_intent.latest_charge"]}
    )
    assert (session.status, session.payment_status, session.url) == ("complete", "paid", None)
    intent = session.payment_intent
    assert isinstance(intent, stripe.PaymentIntent)
    assert intent.amount_received == 500 and intent.metadata["payment"] == "pay_1"
    assert isinstance(intent.latest_charge, stripe.Charge)
    assert intent.latest_charge.payment_method_details.card.last4 == "4242"
    assert "4242424242424242" not in str(intent)
    assert session.customer_details and session.customer_details.email == "a@example.com"
    assert [
        item.amount_total for item in client.v1.checkout.sessions.line_items.list(session.id)
    ] == [500]


async def test_the_async_client_works_unchanged(stripes: Stripes) -> None:
    http = stripe.HTTPXClient()
    client = stripe.StripeClient(
        KEY, base_addresses={"api": stripes.url}, max_network_retries=0, http_client=http
    )
    made = await client.v1.checkout.sessions.create_async(session_params())
    again = await client.v1.checkout.sessions.retrieve_async(made.id)
    assert again.id == made.id
    with pytest.raises(stripe.InvalidRequestError) as missing:
        await client.v1.checkout.sessions.retrieve_async("cs_test_none")
    assert missing.value.code == "resource_missing" and missing.value.http_status == 404
    await http.close_async()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"line_items": [one_item(49)]}, "amount_too_small"),
        ({"line_items": [one_item(500, "xyz")]}, None),
        ({"expires_at": 1}, None),
        ({"success_url": "javascript:1"}, "url_invalid"),
        ({"line_items": ""}, "parameter_missing"),
        ({"colour": "red"}, "parameter_unknown"),
        ({"mode": "subscription"}, None),
        ({"metadata": {"k": "v" * 501}}, None),
        ({"customer": "cus_none"}, "resource_missing"),
    ],
)
def test_wrong_parameters_are_refused(
    stripes: Stripes, change: dict[str, Any], code: str | None
) -> None:
    with pytest.raises(stripe.InvalidRequestError) as refused:
        stripes.client().v1.checkout.sessions.create(session_params(**change))
    assert refused.value.code == code
    assert stripes.ask("state")["checkout.session"] == 0


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (None, "did not provide an API key"),
        ("Bearer sk_live_1234567", "Invalid API Key"),
        ("Bearer pk_test_1234567", "Invalid API Key"),
        ("Basic !!!", "did not provide an API key"),
    ],
)
def test_only_test_keys_get_in(stripes: Stripes, header: str | None, words: str) -> None:
    headers = {} if header is None else {"Authorization": header}
    answer = stripes.http.get(f"{stripes.url}/v1/customers", headers=headers)
    assert answer.status_code == 401 and words in answer.json()["error"]["message"]
    assert "1234567" not in answer.text


def test_the_api_version_is_answered_and_checked(stripes: Stripes) -> None:
    auth = {"Authorization": f"Bearer {KEY}"}
    asked = {**auth, "Stripe-Version": "2025-01-27.acacia"}
    answer = stripes.http.get(f"{stripes.url}/v1/customers", headers=asked)
    assert answer.headers["stripe-version"] == "2025-01-27.acacia"
    assert answer.headers["request-id"].startswith("req_")
    bad = stripes.http.get(
        f"{stripes.url}/v1/customers", headers={**auth, "Stripe-Version": "tomorrow"}
    )
    assert bad.status_code == 400


def test_unknown_addresses_are_404(stripes: Stripes) -> None:
    with pytest.raises(stripe.InvalidRequestError, match="Unrecognized request URL") as missing:
        stripes.client().v1.products.create({"name": "x"})
    assert missing.value.http_status == 404


# --- idempotency ----------------------------------------------------------------------------


def test_same_key_same_parameters_is_replayed(stripes: Stripes) -> None:
    client = stripes.client()
    options: stripe.RequestOptions = {"idempotency_key": "k1"}
    first = client.v1.checkout.sessions.create(session_params(), options)
    second = client.v1.checkout.sessions.create(session_params(), options)
    assert first.id == second.id
    assert first.last_response and second.last_response
    assert "idempotent-replayed" not in first.last_response.headers
    assert second.last_response.headers["idempotent-replayed"] == "true"
    assert (
        second.last_response.headers["original-request"]
        == first.last_response.headers["request-id"]
    )
    assert stripes.ask("state")["checkout.session"] == 1


def test_same_key_other_parameters_is_an_idempotency_error(stripes: Stripes) -> None:
    client = stripes.client()
    client.v1.checkout.sessions.create(session_params(), {"idempotency_key": "k1"})
    with pytest.raises(stripe.IdempotencyError, match="same parameters"):
        client.v1.checkout.sessions.create(
            session_params(client_reference_id="other"), {"idempotency_key": "k1"}
        )
    with pytest.raises(stripe.IdempotencyError, match="same endpoint"):
        client.v1.customers.create({}, {"idempotency_key": "k1"})
    assert stripes.ask("state")["customer"] == 0


def test_a_key_is_forgotten_after_a_day(stripes: Stripes) -> None:
    client = stripes.client()
    first = client.v1.customers.create({}, {"idempotency_key": "k1"})
    stripes.tell("clock", advance_s=24 * 3600 + 1)
    assert client.v1.customers.create({}, {"idempotency_key": "k1"}).id != first.id


def test_refused_parameters_do_not_use_up_the_key(stripes: Stripes) -> None:
    client = stripes.client()
    with pytest.raises(stripe.InvalidRequestError):
        client.v1.checkout.sessions.create(
            session_params(success_url="x:"), {"idempotency_key": "k1"}
        )
    assert client.v1.checkout.sessions.create(session_params(), {"idempotency_key": "k1"}).id


def test_a_decline_is_kept_under_the_key(stripes: Stripes) -> None:
    client = stripes.client()
    params: Any = {
        "amount": 500,
        "currency": "usd",
        "confirm": True,
        "payment_method": "pm_card_visa_chargeDeclined",
    }
    for _ in range(2):
        with pytest.raises(stripe.CardError) as declined:
            client.v1.payment_intents.create(params, {"idempotency_key": "k1"})
        assert declined.value.code == "card_declined"
    assert stripes.ask("state")["payment_intent"] == 1


def test_a_key_in_use_is_409(stripes: Stripes) -> None:
    client = stripes.client()
    stripes.tell("faults", kind="hold_before", path="/v1/customers")
    made: list[str] = []
    first = threading.Thread(
        target=lambda: made.append(client.v1.customers.create({}, {"idempotency_key": "k1"}).id)
    )
    first.start()
    until(lambda: len(stripes.ask("calls")["calls"]) == 1)
    with pytest.raises(stripe.APIError) as busy:
        client.v1.customers.create({}, {"idempotency_key": "k1"})
    assert busy.value.http_status == 409
    assert busy.value.json_body["error"]["code"] == "idempotency_key_in_use"
    stripes.tell("release")
    first.join(20)
    assert client.v1.customers.create({}, {"idempotency_key": "k1"}).id == made[0]


async def test_of_many_at_once_one_is_made(stripes: Stripes) -> None:
    async with httpx.AsyncClient(trust_env=False) as http:
        headers = {"Authorization": f"Bearer {KEY}", "Idempotency-Key": "k1"}
        answers = await asyncio.gather(
            *(http.post(f"{stripes.url}/v1/customers", headers=headers) for _ in range(50))
        )
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("idempotent-replayed" in answer.headers for answer in answers) == 49


@pytest.mark.parametrize(("kind", "made"), [("error_before", 0), ("error_after", 1)])
def test_a_500_says_nothing_about_the_effect(stripes: Stripes, kind: str, made: int) -> None:
    client = stripes.client()
    stripes.tell("faults", kind=kind, path="/v1/customers")
    with pytest.raises(stripe.APIError) as broken:
        client.v1.customers.create({}, {"idempotency_key": "k1"})
    assert broken.value.http_status == 500
    assert stripes.ask("state")["customer"] == made
    client.v1.customers.create({}, {"idempotency_key": "k1"})
    assert stripes.ask("state")["customer"] == 1


# --- lists ----------------------------------------------------------------------------------


def test_lists_page_newest_first(stripes: Stripes) -> None:
    client = stripes.client()
    ids = [client.v1.customers.create({"email": f"c{n}@example.com"}).id for n in range(7)]
    page = client.v1.customers.list({"limit": 3})
    assert [one.id for one in page.data] == ids[:3:-1] and page.has_more
    assert [one.id for one in page.auto_paging_iter()] == ids[::-1]
    before = client.v1.customers.list({"limit": 2, "ending_before": ids[0]})
    assert [one.id for one in before.data] == [ids[2], ids[1]] and before.has_more
    one = client.v1.customers.list({"email": "c3@example.com"})
    assert [c.id for c in one.data] == [ids[3]] and not one.has_more
    assert client.v1.customers.list({"created": {"gt": page.data[0].created + 100}}).data == []
    with pytest.raises(stripe.InvalidRequestError):
        client.v1.customers.list({"limit": 101})


def test_events_are_listed_by_type(stripes: Stripes) -> None:
    client = stripes.client()
    session = client.v1.checkout.sessions.create(session_params())
    stripes.tell(f"sessions/{session.id}/pay")
    every = [event.type for event in client.v1.events.list().data][::-1]
    assert every == [
        "payment_intent.created",
        "charge.succeeded",
        "payment_intent.succeeded",
        "checkout.session.completed",
    ]
    some = client.v1.events.list({"types": ["charge.succeeded"]})
    assert [event.type for event in some.data] == ["charge.succeeded"]
    assert client.v1.events.retrieve(some.data[0].id).data.object["paid"] is True


# --- payment intents, refunds, disputes -----------------------------------------------------


def test_off_session_with_authentication_needed_is_declined(stripes: Stripes) -> None:
    client = stripes.client()
    customer = client.v1.customers.create({"email": "a@example.com"})
    method = client.v1.payment_methods.attach(
        "pm_card_authenticationRequired", {"customer": customer.id}
    )
    with pytest.raises(stripe.CardError) as declined:
        client.v1.payment_intents.create(
            {
                "amount": 2000,
                "currency": "usd",
                "customer": customer.id,
                "payment_method": method.id,
                "confirm": True,
                "off_session": True,
            }
        )
    assert declined.value.code == "authentication_required"
    inside = declined.value.json_body["error"]["payment_intent"]
    assert inside["status"] == "requires_payment_method"
    listed = client.v1.customers.payment_methods.list(customer.id)
    assert [one.id for one in listed.data] == [method.id]


def test_refunds_add_up_and_stop_at_the_charge(stripes: Stripes) -> None:
    client = stripes.client()
    intent = client.v1.payment_intents.create(
        {"amount": 1000, "currency": "usd", "confirm": True, "payment_method": "pm_card_visa"}
    )
    client.v1.refunds.create({"payment_intent": intent.id, "amount": 300})
    second = client.v1.refunds.create({"payment_intent": intent.id, "amount": 500})
    with pytest.raises(stripe.InvalidRequestError, match="greater than unrefunded"):
        client.v1.refunds.create({"payment_intent": intent.id, "amount": 201})
    charge_id = str(intent.latest_charge)
    assert client.v1.charges.retrieve(charge_id).amount_refunded == 800
    stripes.tell(f"refunds/{second.id}/fail")
    assert client.v1.charges.retrieve(charge_id).amount_refunded == 300
    client.v1.refunds.create({"charge": charge_id})
    charge = client.v1.charges.retrieve(charge_id)
    assert charge.amount_refunded == 1000 and charge.refunded
    with pytest.raises(stripe.InvalidRequestError) as done:
        client.v1.refunds.create({"charge": charge_id})
    assert done.value.code == "charge_already_refunded"


@pytest.mark.parametrize("outcome", ["won", "lost"])
def test_a_dispute_takes_the_money_and_may_give_it_back(stripes: Stripes, outcome: str) -> None:
    client = stripes.client()
    intent = client.v1.payment_intents.create(
        {"amount": 1000, "currency": "usd", "confirm": True, "payment_method": "pm_card_visa"}
    )
    dispute = stripes.tell(f"charges/{intent.latest_charge}/dispute", reason="fraudulent")
    with pytest.raises(stripe.InvalidRequestError) as refused:
        client.v1.refunds.create({"payment_intent": intent.id})
    assert refused.value.code == "charge_disputed"
    sent = client.v1.disputes.update(
        dispute["id"], {"evidence": {"uncategorized_text": "they used it"}, "submit": True}
    )
    assert sent.status == "under_review"
    stripes.tell(f"disputes/{dispute['id']}/end", outcome=outcome)
    assert client.v1.disputes.retrieve(dispute["id"]).status == outcome
    types = [event.type for event in client.v1.events.list().data]
    assert types.count("charge.dispute.funds_withdrawn") == 1
    assert types.count("charge.dispute.funds_reinstated") == (1 if outcome == "won" else 0)


def test_a_session_expires_by_the_clock_and_by_hand(stripes: Stripes) -> None:
    client = stripes.client()
    late = client.v1.checkout.sessions.create(session_params())
    early = client.v1.checkout.sessions.create(session_params())
    assert client.v1.checkout.sessions.expire(early.id).status == "expired"
    with pytest.raises(stripe.InvalidRequestError):
        client.v1.checkout.sessions.expire(early.id)
    stripes.tell("clock", advance_s=24 * 3600)
    assert client.v1.checkout.sessions.retrieve(late.id).status == "expired"
    answer = stripes.http.post(f"{stripes.url}/_fake/sessions/{late.id}/pay", json={})
    assert answer.status_code == 400
    types = [event.type for event in client.v1.events.list().data]
    assert types == ["checkout.session.expired"] * 2
