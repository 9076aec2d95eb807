"""What an upstream says of its usage, and what is not believed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.pricing.meters import FOREIGN, MALFORMED, OddStatement, counts_in, markers, stated
from gateway.pricing.quote import Reads, Usage

TOKEN = "abcDEF_-0123456789"
READS = Reads(
    (
        ("tokens_in", (("usage", "prompt_tokens"), ("usage", "input_tokens"))),
        ("sub_calls", (("choices", "0", "tool_calls"),)),
    ),
    frozenset(("tokens_in", "sub_calls", "bytes_out")),
)


@pytest.mark.parametrize(
    ("value", "counts", "odd"),
    [
        ({"usage": {"prompt_tokens": 7}}, {"tokens_in": 7}, False),
        ({"usage": {"input_tokens": 8}}, {"tokens_in": 8}, False),
        ({"usage": {"prompt_tokens": None, "input_tokens": 8}}, {"tokens_in": 8}, False),
        ({"usage": {"prompt_tokens": 0}}, {"tokens_in": 0}, False),
        ({"choices": [{"tool_calls": [{}, {}]}]}, {"sub_calls": 2}, False),
        ({"choices": [{"tool_calls": 5}]}, {"sub_calls": 5}, False),
        ({"choices": []}, {}, False),
        ({"choices": {"0": 1}}, {}, False),
        ({"usage": 4}, {}, False),
        ({"usage": {"prompt_tokens": -1}}, {}, True),
        ({"usage": {"prompt_tokens": 1.0}}, {}, True),
        ({"usage": {"prompt_tokens": "1"}}, {}, True),
        ({"usage": {"prompt_tokens": True}}, {}, True),
        ({"usage": {"prompt_tokens": 10**15 + 1}}, {}, True),
        ({"usage": {"prompt_tokens": {}}}, {}, True),
        ([], {}, False),
        (None, {}, False),
    ],
    ids=str,
)
def test_only_whole_numbers_are_counts(value: Any, counts: dict[str, int], odd: bool) -> None:
    assert counts_in(value, READS) == (counts, odd)


def test_markers_are_the_last_names() -> None:
    assert set(markers(READS)) == {b'"prompt_tokens"', b'"input_tokens"', b'"tool_calls"'}


@pytest.mark.parametrize(
    ("usages", "amounts", "said"),
    [
        ([], [], None),
        (["tokens_in=7; t=T"], [], Usage((("tokens_in", 7),))),
        ([" tokens_in=7 , sub_calls=0 ;t=T "], [], Usage((("tokens_in", 7), ("sub_calls", 0)))),
        ([], ["$0.5; t=T"], Usage(amount_units=500_000)),
        ([], ["0.5;\tt=T"], Usage(amount_units=500_000)),
    ],
)
def test_a_true_word_is_believed(usages: list[str], amounts: list[str], said: Usage | None) -> None:
    made = [[text.replace("T", TOKEN).encode() for text in texts] for texts in (usages, amounts)]
    assert stated(made[0], made[1], TOKEN, READS) == said


@pytest.mark.parametrize(
    ("usages", "amounts", "kind"),
    [
        (["tokens_in=7; t=T", "tokens_in=7; t=T"], [], MALFORMED),
        (["tokens_in=7; t=T"], ["$1; t=T"], MALFORMED),
        (["tokens_in=7; t=t"], [], FOREIGN),
        (["tokens_in=7; t=Tx"], [], FOREIGN),
        (["tokens_in=7"], [], MALFORMED),
        (["tokens_in=7; t="], [], MALFORMED),
        (["tokens_in=7; T"], [], MALFORMED),
        (["; t=T"], [], MALFORMED),
        (["tokens_in; t=T"], [], MALFORMED),
        (["tokens_in=; t=T"], [], MALFORMED),
        (["tokens_in=-7; t=T"], [], MALFORMED),
        (["tokens_in=7.0; t=T"], [], MALFORMED),
        (["tokens_in=1e3; t=T"], [], MALFORMED),
        (["tokens_in=1_0; t=T"], [], MALFORMED),
        (["tokens_in=0x1; t=T"], [], MALFORMED),
        (["tokens_in=7,; t=T"], [], MALFORMED),
        (["tokens_in=7,tokens_in=7; t=T"], [], MALFORMED),
        (["pages=7; t=T"], [], MALFORMED),
        (["tokens_in=" + "9" * 16 + "; t=T"], [], MALFORMED),
        (["tokens_in=7; t=T; t=T"], [], MALFORMED),
        (["tokens_in=7; x=1; t=T"], [], MALFORMED),
        ([], ["$-1; t=T"], MALFORMED),
        ([], ["$1e1; t=T"], MALFORMED),
        ([], ["NaN; t=T"], MALFORMED),
        ([], ["$0.0000001; t=T"], MALFORMED),
        ([], ["$" + "9" * 30 + "; t=T"], MALFORMED),
        ([], ["$1, $2; t=T"], MALFORMED),
        ([], [""], MALFORMED),
    ],
)
def test_anything_else_is_not(usages: list[str], amounts: list[str], kind: str) -> None:
    made = [[text.replace("T", TOKEN).encode() for text in texts] for texts in (usages, amounts)]
    with pytest.raises(OddStatement) as odd:
        stated(made[0], made[1], TOKEN, READS)
    assert odd.value.kind == kind


@given(st.binary(max_size=60), st.booleans())
def test_nothing_without_the_random_value_is_believed(text: bytes, amount: bool) -> None:
    with pytest.raises(OddStatement):
        stated([] if amount else [text], [text] if amount else [], TOKEN, READS)
