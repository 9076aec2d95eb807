"""Webhooks of the local Stripe, verified with the SDK: retries, copies, order, storms."""

from __future__ import annotations

import random
import time

import pytest
import stripe

from tests.gateway.demo.stripes import SECRET, Receiver, Stripes, session_params


def open_session(stripes: Stripes) -> str:
    return stripes.client().v1.checkout.sessions.create(session_params()).id


PAID = [
    "payment_intent.created",
    "charge.succeeded",
    "payment_intent.succeeded",
    "checkout.session.completed",
]


def test_a_payment_is_announced_and_verifies(stripes: Stripes, receiver: Receiver) -> None:
    stripes.tell(f"sessions/{open_session(stripes)}/pay")
    deliveries = stripes.settled()
    assert sorted(receiver.types()) == sorted(PAID)
    assert all(one["state"] == "succeeded" for one in deliveries)
    done = next(e for e in receiver.events if e.type == "checkout.session.completed")
    assert done.data.object["payment_status"] == "paid"
    assert done.data.object["metadata"]["payment"] == "pay_1"
    assert done.livemode is False
    body, header = receiver.bodies[0], receiver.headers[0]
    for wrong in (
        lambda: stripe.Webhook.construct_event(body + b" ", header, SECRET),
        lambda: stripe.Webhook.construct_event(body, header, "whsec_other"),
        lambda: stripe.Webhook.construct_event(body, "", SECRET),
    ):
        with pytest.raises(stripe.SignatureVerificationError):
            wrong()


def test_an_event_holds_the_object_as_it_was(stripes: Stripes, receiver: Receiver) -> None:
    session = open_session(stripes)
    stripes.tell(f"sessions/{session}/pay", bank="000123456789")
    intent = stripes.client().v1.checkout.sessions.retrieve(session).payment_intent
    stripes.tell(f"intents/{intent}/settle")
    stripes.settled()
    by_type = {event.type: event for event in receiver.events}
    assert by_type["checkout.session.completed"].data.object["payment_status"] == "unpaid"
    later = by_type["checkout.session.async_payment_succeeded"]
    assert later.data.object["payment_status"] == "paid"


def test_a_debit_that_fails_later(stripes: Stripes, receiver: Receiver) -> None:
    session = open_session(stripes)
    stripes.tell(f"sessions/{session}/pay", bank="000111111116")
    intent = stripes.client().v1.checkout.sessions.retrieve(session).payment_intent
    stripes.tell(f"intents/{intent}/settle")
    stripes.settled()
    assert "checkout.session.async_payment_failed" in receiver.types()
    assert "payment_intent.succeeded" not in receiver.types()


def test_delivery_goes_on_until_2xx_with_fresh_signatures(
    stripes: Stripes, receiver: Receiver
) -> None:
    receiver.refusals = 3
    stripes.client().v1.customers.create({})
    (delivery,) = stripes.settled()
    assert delivery["attempts"] == [500, 500, 500, 200]
    assert receiver.types() == ["customer.created"]


def test_delivery_gives_up_in_the_end(stripes: Stripes, receiver: Receiver) -> None:
    receiver.refusals = 1000
    stripes.tell("mode", retry_after_s=[0.01] * 7)
    stripes.client().v1.customers.create({})
    (delivery,) = stripes.settled()
    assert delivery["state"] == "failed" and delivery["attempts"] == [500] * 8


def test_an_unreachable_endpoint_is_tried_again(stripes: Stripes, receiver: Receiver) -> None:
    url = receiver.url
    stripes.tell("mode", retry_after_s=[0.01])
    stripes.tell("webhooks", url="http://127.0.0.1:1/nobody", secret=SECRET)
    stripes.client().v1.customers.create({})
    (delivery,) = stripes.settled()
    assert set(delivery["attempts"]) == {"ConnectError"}
    stripes.tell("webhooks", url=url, secret=SECRET)
    stripes.tell("deliver", event_ids=[delivery["event_id"]])
    stripes.settled()
    assert receiver.types() == ["customer.created"]


@pytest.mark.parametrize("order", ["fifo", "reversed", "shuffled"])
def test_kept_events_come_in_the_order_asked_for(
    stripes: Stripes, receiver: Receiver, order: str
) -> None:
    stripes.tell("mode", paused=True)
    stripes.tell(f"sessions/{open_session(stripes)}/pay")
    assert receiver.events == []
    assert stripes.tell("flush", order=order, seed=1)["sent"] == 4
    stripes.settled()
    shuffled = list(PAID)
    random.Random(1).shuffle(shuffled)
    assert shuffled not in (PAID, PAID[::-1])
    expected = {"fifo": PAID, "reversed": PAID[::-1], "shuffled": shuffled}
    assert receiver.types() == expected[order]


def test_late_delivery_comes_late(stripes: Stripes, receiver: Receiver) -> None:
    stripes.tell("mode", delay_s=0.3)
    began = time.monotonic()
    stripes.client().v1.customers.create({})
    stripes.settled()
    assert time.monotonic() - began >= 0.3 and len(receiver.events) == 1


def test_a_storm_of_duplicates_is_delivered_whole(stripes: Stripes, receiver: Receiver) -> None:
    stripes.tell("mode", copies=250)
    stripes.tell(f"sessions/{open_session(stripes)}/pay")
    deliveries = stripes.settled()
    assert len(deliveries) == len(receiver.events) == 1000
    assert len({event.id for event in receiver.events}) == 4
    assert len(set(receiver.bodies)) == 4  # the same bytes every time


def test_only_wanted_events_are_sent(stripes: Stripes, receiver: Receiver) -> None:
    stripes.tell("webhooks", url=receiver.url, secret=SECRET, events=["charge.succeeded"])
    stripes.tell(f"sessions/{open_session(stripes)}/pay")
    stripes.settled()
    assert receiver.types() == ["charge.succeeded"]


def test_endpoints_are_made_through_the_api(stripes: Stripes) -> None:
    client = stripes.client()
    made = client.v1.webhook_endpoints.create(
        {"url": "http://127.0.0.1:1/", "enabled_events": ["*"]}
    )
    assert made.secret and made.secret.startswith("whsec_")
    listed = client.v1.webhook_endpoints.list()
    assert [one.id for one in listed.data] == [made.id]
    assert "secret" not in listed.data[0] and "_secret" not in listed.data[0]
    assert client.v1.webhook_endpoints.delete(made.id).deleted
    assert client.v1.webhook_endpoints.list().data == []
