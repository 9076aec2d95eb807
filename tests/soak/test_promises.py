"""The soak's judge: it finds nothing in a true story, and names what was done to a false one."""

from __future__ import annotations

from typing import Any

import pytest

from tests.soak.promises import Ended, Facts, Told, broken, charges, uncharged

FIRST = Told("a", 200, False, 10_000, b"body", True)
STORY = Facts(
    begun={"a": 1, "b": 1, "c": 1, "l": 1},
    done={"a": 1, "b": 1, "l": 1},
    told=(
        FIRST,
        Told("a", 200, True, 0, b"body", True),
        Told("c", 502, False, 0, b"problem", True, "upstream_error"),
        Told("l", 200, False, None, b"long", False),
    ),
    bought={"pay": 1_000_000},
    ledger={
        "a": (Ended("capture", 10_000, ""),),
        "b": (Ended("void", 0, "interrupted"),),
        "c": (Ended("void", 0, "upstream_error"),),
        "l": (Ended("capture", 10_000, ""),),
    },
    lots={"pay": (1_000_000,)},
    on_chain_units=1_000_000,
    audits={},
    unfinished=(),
)


def test_a_true_story() -> None:
    assert broken(STORY) == []
    assert charges(STORY) == {"a": 10_000, "l": 10_000}
    assert uncharged(STORY) == {"interrupted": 1}


def with_answer(*more: Told) -> dict[str, Any]:
    return {"told": (*STORY.told, *more)}


def with_ledger(request_id: str, *ended: Ended) -> dict[str, Any]:
    return {"ledger": {**STORY.ledger, request_id: ended}}


ONCE = "a request id is charged at most once"
CALLED = "at most one upstream call is started for a request id"
WORK = "completed upstream calls >= charges"
ACCOUNTED = "charges + interrupted >= completed upstream calls"
WHOLE = "every answer a client had whole is in the ledger with that charge"
REPEAT = "a repeat gets the same answer, and only the first one is charged"
MONEY = "USDC at pay_to = minted"
BOUGHT = "every purchase a client was told of is minted, once"
AUDIT = "farebox ledger verify finds nothing"
ENDS = "everything that was interrupted ends without a human"
NAMED = "nothing fails in a way that has no name"
PAID = Ended("capture", 10_000, "")

LIES: list[tuple[str, dict[str, Any]]] = [
    (AUDIT, {"audits": {"I1_balance_is_sum": {}}}),
    (ENDS, {"unfinished": ("hold x",)}),
    (ONCE, with_ledger("a", PAID, Ended("void", 0, "interrupted"))),
    (CALLED, {"begun": {**STORY.begun, "a": 2}}),
    (CALLED, {"begun": {**STORY.begun, "unheld": 1}}),
    (WORK, with_ledger("d", PAID)),
    (ACCOUNTED, {"done": {**STORY.done, "c": 1}}),
    (ACCOUNTED, {"done": {**STORY.done, "unheld": 1}}),
    (ACCOUNTED, with_ledger("b", Ended("", 0, ""))),
    (WHOLE, with_answer(Told("d", 200, False, 10_000, b"", True))),
    (WHOLE, with_ledger("a", Ended("capture", 9_999, ""))),
    (WHOLE, with_ledger("l", Ended("void", 0, "interrupted"))),
    (WHOLE, with_answer(Told("b", 503, False, 10_000, b"", True))),
    (WHOLE, with_answer(Told("a", 503, True, 10_000, b"", True))),
    (WHOLE, with_answer(Told("unknown", 200, True, 0, b"", True))),
    (REPEAT, with_answer(Told("a", 200, False, 10_000, b"body", True))),
    (REPEAT, with_answer(Told("a", 200, True, 0, b"another", True))),
    (MONEY, {"on_chain_units": 1_000_001}),
    (MONEY, {"lots": {}, "bought": {}}),
    (BOUGHT, {"bought": {"pay": 999_999}}),
    (BOUGHT, {"lots": {"pay": (500_000, 500_000)}}),
    (NAMED, {"faults": ("500",)}),
]


@pytest.mark.parametrize(("promise", "lie"), LIES, ids=[f"{n}" for n in range(len(LIES))])
def test_a_lie_is_named(promise: str, lie: dict[str, Any]) -> None:
    told = {name: getattr(STORY, name) for name in STORY.__slots__}
    assert promise in [each.promise for each in broken(Facts(**told | lie))]


def test_what_is_said_of_a_broken_promise_is_short() -> None:
    (found,) = broken(
        Facts(**{n: getattr(STORY, n) for n in STORY.__slots__} | {"faults": "abcdefgh"})
    )
    assert str(found) == f"{NAMED} (8): a; b; c; d; e"
