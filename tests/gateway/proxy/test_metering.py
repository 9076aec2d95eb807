"""A call is metered in pieces as it is in one, and what is odd is counted."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from gateway import observe
from gateway.forms import Price
from gateway.pricing.quote import PriceRequest, Quote, quote
from gateway.pricing.rules import compile_price
from gateway.proxy.metering import Metering

OPTIONS: dict[str, Any] = {
    "max": "$0.05",
    "when_unknown": "$0.02",
    "rates": {"tokens_in": "$1 / 1M", "tokens_out": "$100 / 1M"},
}
SSE = [(b"Content-Type", b"text/event-stream; charset=utf-8")]
JSON = [(b"Content-Type", b"application/json")]


class Said:
    """An upstream's answer: its head and the pieces of its body."""

    def __init__(self, headers: list[tuple[bytes, bytes]], *pieces: bytes) -> None:
        self.headers = headers
        self._pieces = pieces

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        for piece in self._pieces:
            yield piece


def priced(**change: Any) -> Quote:
    rule = compile_price(Price("metered", 0, {**OPTIONS, **change}))
    return quote(rule, PriceRequest("POST", b"/", None, b"", None))


def metering(price: Quote, *, held: int | None = None, by_upstream: bool = False) -> Metering:
    units = price.max_units if held is None else held
    return Metering(price, units, 100, by_upstream=by_upstream)


def odd() -> dict[str, int]:
    return {kind: n for name, kind, n in observe.counted() if name == "oddity"}


@pytest.fixture
def counted() -> Any:
    before = odd()
    return lambda: {k: n - before[k] for k, n in odd().items() if n != before[k]}


def answer_of(tokens_in: Any, tokens_out: Any) -> bytes:
    usage = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out}
    return json.dumps({"choices": [{"text": "x" * 100}], "usage": usage}).encode()


async def passed(made: Metering, said: Said, wishes: bytes = b"") -> bytes:
    made.ours(7, wishes)
    made.begin(said)  # type: ignore[arg-type]  # an answer in all that is asked of it
    return b"".join([p async for p in made.pieces(said, b"")])  # type: ignore[arg-type]  # as above


@pytest.mark.parametrize("size", [1, 7, 1_000])
async def test_pieces_are_metered_as_the_whole(size: int, counted: Any) -> None:
    body = answer_of(1_000, 20)
    whole = metering(priced())
    whole.ours(7, b"")
    whole.begin(Said(JSON))  # type: ignore[arg-type]  # as above
    whole.whole(body)
    assert whole.charge().units == 3_000
    pieces = metering(priced())
    cut = [body[i : i + size] for i in range(0, len(body), size)]
    assert await passed(pieces, Said(JSON, *cut)) == body
    assert pieces.charge().units == 3_000
    events = metering(priced())
    stream = b'data: {"x": 1}\n\ndata: ' + body + b"\n\ndata: [DONE]\n\n"
    cut = [stream[i : i + size] for i in range(0, len(stream), size)]
    assert await passed(events, Said(SSE, *cut)) == stream
    assert events.charge().units == 3_000
    assert counted() == {}


async def test_an_answer_that_is_no_json_is_not_kept() -> None:
    made = metering(priced())
    await passed(made, Said([(b"content-type", b"image/png")], answer_of(1, 1)))
    assert made.charge().units == 20_000


async def test_an_answer_too_long_to_be_read_is_unknown() -> None:
    made = metering(priced())
    long = b'{"x": "' + b"x" * (5 << 20) + b'", ' + answer_of(1, 1)[1:]
    await passed(made, Said(JSON, long[:100], long[100:]))
    assert made.charge().units == 20_000


async def test_an_odd_count_is_counted_and_charged_as_unknown(counted: Any) -> None:
    made = metering(priced())
    await passed(made, Said(JSON, answer_of(1, -5)))
    assert made.charge().units == 20_000
    assert counted() == {"meter_malformed": 1}


async def test_more_than_was_held_is_counted_and_cut(counted: Any) -> None:
    made = metering(priced(), held=900)
    await passed(made, Said(JSON, answer_of(901, 0)))
    charged = made.charge()
    assert (charged.units, charged.beyond) == (900, True)
    assert counted() == {"meter_above_hold": 1}


@pytest.mark.parametrize(
    ("say", "units", "kind"),
    [
        ("$0.01; t={t}", 10_000, None),
        ("$0.06; t={t}", 20_000, "meter_above_hold"),
        ("$0.01; t=forged", 20_000, "meter_foreign"),
        ("$0.01", 20_000, "meter_malformed"),
    ],
)
async def test_an_own_word_is_held_against_this_call(
    say: str, units: int, kind: str | None, counted: Any
) -> None:
    made = metering(priced(), by_upstream=True)
    token = dict(made.ours(0, b""))[b"farebox-meter"].decode()
    field = (b"Farebox-Amount", say.replace("{t}", token).encode())
    # What its JSON says does not count on such a route.
    await passed(made, Said([*JSON, field], answer_of(1, 1)))
    assert made.charge().units == units
    assert counted() == ({} if kind is None else {kind: 1})


async def test_a_message_is_no_own_word() -> None:
    for by_upstream, units in ((False, 3_000), (True, 20_000)):
        made = metering(priced(), by_upstream=by_upstream)
        made.ours(7, b"")
        made.begin(Said(JSON))  # type: ignore[arg-type]  # as above
        made.message(json.loads(answer_of(1_000, 20)), 9)
        assert made.charge().units == units


async def test_a_word_nobody_asked_for_is_foreign(counted: Any) -> None:
    made = metering(priced())
    await passed(made, Said([*JSON, (b"farebox-usage", b"tokens_in=0; t=x")], answer_of(1_000, 20)))
    assert made.charge().units == 3_000
    assert counted() == {"meter_foreign": 1}


EVENT = b'data: {"x": 1}\n\n'


async def test_a_stream_is_cut_where_it_comes_to_more_than_was_held() -> None:
    price = priced(events="tokens_out", rates={"tokens_out": "$100 / 1M"})
    made = metering(price, held=1_000)
    out = await passed(made, Said(SSE, *[EVENT] * 50))
    assert made.cut
    assert out == EVENT * 11  # the one that was too much has been said
    assert made.charge().units == 1_000
    told = json.loads(made.farewell("id", 1_000, 5).split(b"data: ")[1])
    assert told["error"]["code"] == "cut_at_hold"
    # Just what was held is not too much.
    made = metering(price, held=1_000)
    assert await passed(made, Said(SSE, *[EVENT] * 10)) == EVENT * 10
    assert not made.cut
    assert made.farewell("id", 1_000, 5) == b""


async def test_bytes_of_a_stream_run_with_it() -> None:
    price = priced(rates={"bytes_out": "$0.0001 / 1"})
    made = metering(price)
    await passed(made, Said(SSE, *[EVENT] * 500))
    assert made.cut
    assert made.charge().units == 50_000


async def test_costs_stand_between_events_never_within_one() -> None:
    price = priced(events="tokens_out", rates={"tokens_out": "$100 / 1M"})
    made = metering(price)
    half = len(EVENT) // 2
    out = await passed(made, Said(SSE, EVENT[:half], EVENT[half:], EVENT), b"Cost-Events, x")
    assert out.startswith(EVENT + b"event: farebox.cost\ndata: ")
    assert out.endswith(b"\n\n" + EVENT)
    told = json.loads(out.split(b"farebox.cost\ndata: ")[1].split(b"\n")[0])
    assert told == {"so_far": "0.01", "so_far_units": 100, "held": "5", "held_units": 50_000}
    assert b'"final": true' in made.farewell("id", 200, 5)
    # An error in the middle of an event does not become a part of it.
    made = metering(price, held=0)
    await passed(made, Said(SSE, EVENT + EVENT[:half]))
    assert made.farewell("id", 0, 5).startswith(b"\n\nevent: error\n")


async def test_nothing_of_ours_stands_in_a_compressed_stream() -> None:
    """It was asked not to be one; what would be written into it would spoil it for its reader."""
    price = priced(rates={"bytes_out": "$1 / 1"}, events=None)
    body = gzip.compress(EVENT)
    coded = [*SSE, (b"Content-Encoding", b"gzip")]
    for held in (None, 0):  # whole, and cut
        made = metering(price, held=held)
        assert await passed(made, Said(coded, body), b"cost-events") == body
        assert made.cut
        assert made.farewell("id", 1, 5) == b""
    made = metering(priced(), held=50_000)
    assert await passed(made, Said(coded, body), b"cost-events") == body
    assert not made.with_costs
    assert made.charge().units == 20_000
